"""Students that fall towards their teachers, several seeds together, watched node by node."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field

from thalweg.lab.parts import Share, part
from thalweg.lab.recipe import Context, Preset
from thalweg.lab.tables import Table

if TYPE_CHECKING:
    from torch import Tensor, nn

    from thalweg.teacher_student import Fall

Kind = Literal["fc", "cnn"]
Norm = Literal["none", "after_relu", "before_relu"]
WORDS: dict[Norm, str] = {"none": "without BN", "after_relu": "with BN", "before_relu": "BN before ReLU"}
# Chosen by us: samples that are evaluated at once, and bytes that their activations take at most.
_AT_ONCE, _BYTES = 1024, 2**30


class FallPreset(Preset):
    """What the recipes on Gaussian inputs share: teachers, students, and how these learn."""

    fc_widths: tuple[int, ...] = Field(default=(50, 75, 100, 125), min_length=1)
    """Nodes of the fully connected teacher (the paper)."""
    num_inputs: int = Field(default=20, ge=1)
    """Features of its inputs (the paper)."""
    cnn_channels: tuple[int, ...] = Field(default=(64, 64, 64, 64), min_length=1)
    """Channels of the convolutional teacher (the paper)."""
    image_size: int = Field(default=16, ge=3)
    """Height and width of its inputs (the paper)."""
    num_outputs: int = Field(default=100, ge=1)
    """Outputs (the paper)."""
    factor: int = Field(default=10, ge=1)
    """Student nodes for each teacher node (the paper)."""
    std: float = Field(default=10.0, gt=0)
    """Standard deviation of the inputs (the paper)."""
    epochs: int = Field(default=40, ge=1)
    """Epochs (the authors' code)."""
    epoch_samples: int = Field(default=100_000, ge=1)
    """Samples that count as an epoch of the infinite stream (the authors' code)."""
    batch_size: int = Field(default=64, ge=1)
    """Samples of a step (the authors' code)."""
    learning_rate: float = Field(default=0.05, gt=0)
    """Of plain SGD on the mean squared error over batch and outputs (the authors' README)."""
    cnn_learning_rate: float | None = Field(default=1e-4, gt=0)
    """Of convolutional students without BatchNorm, which diverge at the authors' 0.05 and 0.01 (ours). None: as of
    the others."""
    cnn_norm_learning_rate: float | None = Field(default=None, gt=0)
    """Of convolutional students with BatchNorm (ours). None: as of the others, the authors'."""
    num_seeds: int = Field(default=5, ge=1)
    """Teachers, each with a student (the paper)."""
    eval_samples: int = Field(default=1024, ge=2)
    """Samples that correlations and losses are of (the authors' code draws them, and takes 192 of them)."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the pairs."""
        return tuple(self.seed * 1_000 + k for k in range(self.num_seeds))

    def of_kind(self, kind: Kind, norm: Norm) -> Self:
        """Give the parameters for students of one kind."""
        rate = self.cnn_learning_rate if norm == "none" else self.cnn_norm_learning_rate
        return self if kind == "fc" or rate is None else self.model_copy(update={"learning_rate": rate})

    @property
    def epoch_steps(self) -> int:
        """Steps of an epoch."""
        return max(1, self.epoch_samples // self.batch_size)


@dataclass(frozen=True)
class Setting:
    """What one curve of a figure stands for.

    Args:
        name: in tables.
        kind: fully connected or convolutional.
        widths: nodes of the teacher.
        norm: of the student.
        samples: of the finite set; None: an infinite stream.
    """

    name: str
    kind: Kind
    widths: tuple[int, ...]
    norm: Norm = "none"
    samples: int | None = None


@dataclass(frozen=True)
class Pairs:
    """Teachers and students, one of each for every seed.

    Args:
        seeds: their numbers.
        teachers: who gives the targets.
        students: at their start.
        sources: what inputs are drawn from.
        evaluations: inputs that correlations and losses are measured on.
        labels: class numbers of these, where they have any.
    """

    seeds: tuple[int, ...]
    teachers: "Sequence[nn.Module]"
    students: "Sequence[nn.Module]"
    sources: Sequence[Any]
    evaluations: "Sequence[Tensor]"
    labels: "Sequence[Tensor] | None" = None


def gaussian_pairs(preset: FallPreset, setting: Setting, context: Context) -> Pairs:
    """Draw random teachers, students and streams; those of a seed are alike in all settings of one shape."""
    import torch

    from thalweg.data import FiniteSet, GaussianStream, gaussian

    shape = preset.num_inputs if setting.kind == "fc" else (1, preset.image_size, preset.image_size)
    teachers, students, sources, evaluations = [], [], [], []
    for seed in preset.seeds:
        teacher = _teacher(preset, setting, seed).to(context.device)
        teachers.append(teacher)
        students.append(student_of(teacher, preset.factor, setting.norm, seed))
        stream = GaussianStream(shape, std=preset.std, seed=seed, device=context.device)
        source: Any = stream
        if setting.samples is not None:
            source = FiniteSet(stream(setting.samples).clone(), seed=seed)
        sources.append(source)
        own = torch.Generator().manual_seed(seed + 500)
        drawn = gaussian(preset.eval_samples, shape, own, std=preset.std, dtype=torch.float32)
        evaluations.append(drawn.to(context.device))
    return Pairs(preset.seeds, teachers, students, sources, evaluations)


def _teacher(preset: FallPreset, setting: Setting, seed: int) -> Any:
    import torch

    from thalweg import nets

    if setting.kind == "fc":
        net = nets.relu_mlp(setting.widths, num_inputs=preset.num_inputs, num_outputs=preset.num_outputs)
    else:
        net = nets.relu_cnn(setting.widths, image_size=preset.image_size, num_outputs=preset.num_outputs)
    return nets.teacher_init_(net, torch.Generator().manual_seed(seed))


def student_of(teacher: Any, factor: int, norm: Norm, seed: int) -> Any:
    """Build a student, initialised as torch does, from a seed."""
    import torch

    from thalweg.nets import widened

    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed + 1)
        return widened(teacher, factor, norm=norm)


def fall(
    preset: FallPreset,
    pairs: Pairs,
    share: Share,
    name: str,
    folder: Path | None,
    *,
    observed: int | None = None,
    may_diverge: bool = False,
) -> "tuple[Fall, ...]":
    """Train the students of one setting, and watch them at the start and after every epoch.

    Args:
        preset: how they learn.
        pairs: who learns from whom.
        share: of the run's progress.
        name: of the setting.
        folder: where the training goes on after an interruption.
        observed: only so many looks, at least 2, evenly spread, start and end among them. None: every epoch.
        may_diverge: give trainings that diverged too, see their status. Where networks are compared pair by pair they
            may not: what is left would be no fair sample.

    Raises:
        NumericalError: a training diverged that may not.
    """
    from thalweg.errors import NumericalError
    from thalweg.teacher_student import train_students

    steps, looks = preset.epoch_steps, observed or preset.epochs + 1
    epochs = sorted({round(k * preset.epochs / max(looks - 1, 1)) for k in range(looks)})
    falls = train_students(
        pairs.teachers,
        pairs.students,
        pairs.sources,
        steps=preset.epochs * steps,
        batch_size=preset.batch_size,
        learning_rate=preset.learning_rate,
        observe_at=[epoch * steps for epoch in epochs],
        observe=Watch(pairs),
        keep=folder,
        progress=share.told(name),
    )
    for seed, found in zip(pairs.seeds, falls, strict=True):
        if found.status == "diverged" and not may_diverge:
            raise NumericalError(
                f"Expected a training that ends finite. Got NaN or infinity in {name}, seed {seed}. "
                f"Take a smaller learning_rate than {preset.learning_rate:g}."
            )
    return falls


@dataclass(frozen=True)
class Watch:
    """Sees a student: loss, correlations with its teacher and ranks, layer by layer, and how much reads each node.

    Ranks are kept as 16-bit integers: 2 bytes for each pair of nodes, where a correlation takes 8.

    Args:
        pairs: whom it sees.
    """

    pairs: Pairs

    def __call__(self, step: int, k: int, student: "nn.Module") -> "Mapping[str, Tensor]":
        """Look once."""
        import torch

        from thalweg.teacher_student import best_students, correlations, ranks

        teacher, x = self.pairs.teachers[k], self.pairs.evaluations[k]
        size = at_once(student, x)
        seen: dict[str, Tensor] = {}
        for place, rho in enumerate(correlations(teacher, student, x, batch_size=size)):
            seen[f"best_{place}"] = rho.amax(0)
            seen[f"winner_{place}"] = best_students(rho)
            seen[f"rank_{place}"] = ranks(rho).to(torch.int16)
            seen[f"read_{place}"] = fan_out(student, place)
        outputs, wanted = (outputs_of(net, x, size) for net in (student, teacher))
        seen["loss"] = (outputs - wanted).square().mean()
        seen["agreement"] = (outputs.argmax(1) == wanted.argmax(1)).double().mean()
        if self.pairs.labels is not None:
            labels = self.pairs.labels[k]
            seen["accuracy"] = (outputs.argmax(1) == labels).double().mean()
            seen["teacher_accuracy"] = (wanted.argmax(1) == labels).double().mean()
        return seen


def at_once(student: "nn.Module", x: "Tensor") -> int:
    """Choose how many samples are evaluated at once, fewer where feature maps are large; it decides no result."""
    import torch

    from thalweg.teacher_student import chain

    with torch.no_grad():
        numbers = sum(f.numel() for f in chain(student).trace(x[:1]).activations)
    each = 9 * numbers  # bytes of a sample: two numbers in single precision for each node and position, and a gate
    return max(1, min(_AT_ONCE, _BYTES // each))


def outputs_of(net: "nn.Module", x: "Tensor", size: int = _AT_ONCE) -> "Tensor":
    """Run a network in eval mode on all inputs, in pieces of a size; outputs come in double precision."""
    import torch

    from thalweg.teacher_student import chain

    with torch.no_grad():
        return torch.cat([chain(net).trace(piece).outputs for piece in torch.split(x, size)]).double()


def fan_out(student: "nn.Module", place: int) -> "Tensor":
    """Compute ‖v_j‖ of each node j of a hidden layer: the norm of all weights that read it."""
    from thalweg.teacher_student import chain

    read = chain(student)
    after = [*(layer.linear for layer in read.layers[1:]), read.head]
    weight, width = after[place].weight.detach(), read.layers[place].width
    norms: Tensor = weight.reshape(len(weight), width, -1).movedim(1, 0).flatten(1).norm(dim=1)
    return norms


SCALARS = ("loss", "agreement", "accuracy", "teacher_accuracy")


def rows_of(preset: FallPreset, setting: str, pairs: Pairs, falls: "Sequence[Fall]") -> dict[str, Any]:
    """Turn what was seen into tables.

    Args:
        preset: of the run.
        setting: name of the setting.
        pairs: who was seen.
        falls: how they fell.

    Returns:
        "layers": one row for each seed, layer and epoch: ρ̄, r̄ of the final winners, and the mean fan-out norm of
        winners and of all others; "students": loss and agreement of each seed and epoch. Trainings that diverged are
        in neither: "diverged" has a row for each, with the epoch at which it was last seen finite.
    """
    layers: Table = []
    students: Table = []
    diverged: Table = []
    for seed, found in zip(pairs.seeds, falls, strict=True):
        if found.status == "diverged":
            seen_last = found.steps[-1] / preset.epoch_steps
            diverged.append({"setting": setting, "seed": seed, "last_finite_epoch": seen_last})
            continue
        last = found.observations[-1]
        depth = len([name for name in last if name.startswith("winner_")])
        for step, seen in zip(found.steps, found.observations, strict=True):
            shared = {"setting": setting, "seed": seed, "epoch": step / preset.epoch_steps}
            students.append({**shared, **{name: float(seen[name]) for name in SCALARS if name in seen}})
            layers += [{**shared, "layer": place, **_layer_row(seen, last, place)} for place in range(depth)]
    return {"layers": layers, "students": students, "diverged": diverged}


def _layer_row(seen: "Mapping[str, Tensor]", last: "Mapping[str, Tensor]", place: int) -> dict[str, Any]:
    import torch

    winners = last[f"winner_{place}"]
    rank, read = seen[f"rank_{place}"].double(), seen[f"read_{place}"].double()
    won = torch.zeros(len(read), dtype=torch.bool)
    won[winners] = True
    # of a teacher node that is constant all students are equals: it has no rank
    varies = (last[f"best_{place}"] != 0) | (last[f"rank_{place}"] != 0).any(0)
    ranks = rank.gather(0, winners.unsqueeze(0))[0, varies]
    return {
        "correlation": float(seen[f"best_{place}"].mean()),
        "rank": float(ranks.mean()) / max(len(rank) - 1, 1) if len(ranks) else None,
        "fan_out_winners": float(read[won].mean()),
        "fan_out_others": float(read[~won].mean()) if not bool(won.all()) else None,
        "num_winners": int(won.sum()),
    }


def fallen(preset: FallPreset, setting: Setting, context: Context, share: Share) -> dict[str, Table]:
    """Let the students of one setting fall, those that diverge too; one that is done is not computed again."""

    def compute(folder: Path | None) -> dict[str, Any]:
        pairs = gaussian_pairs(preset, setting, context)
        falls = fall(preset, pairs, share, setting.name, folder, may_diverge=True)
        return rows_of(preset, setting.name, pairs, falls)

    return part(context, setting.name.replace(" ", "-").replace(",", ""), f"{setting}", compute)


def in_common(tables: Mapping[str, Table], name: str = "layers") -> Table:
    """Give the rows of seeds that stayed finite in all settings that are left: others have no counterpart.

    Args:
        tables: of `rows_of`, of all settings.
        name: of the table.
    """
    seeds: dict[str, set[int]] = {}
    for row in tables["layers"]:
        seeds.setdefault(row["setting"], set()).add(row["seed"])
    shared = set.intersection(*seeds.values()) if seeds else set()
    return [row for row in tables[name] if row["seed"] in shared]


def is_missing_some(tables: Mapping[str, Table]) -> bool:
    """Say whether all trainings of some setting diverged: of what every setting does there is nothing to say."""
    return bool({row["setting"] for row in tables["diverged"]} - {row["setting"] for row in tables["layers"]})


def require_some(tables: Mapping[str, Table]) -> None:
    """Require that some training stayed finite.

    Raises:
        NumericalError: there is none.
    """
    from thalweg.errors import NumericalError

    if not tables["layers"]:
        raise NumericalError(
            f"Expected a training that ends finite. Got NaN or infinity in all {len(tables['diverged'])}. Take "
            "smaller rates: learning_rate=…, of convolutional ones cnn_learning_rate=… and cnn_norm_learning_rate=…."
        )
