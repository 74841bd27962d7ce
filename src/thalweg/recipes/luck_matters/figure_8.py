"""Figure 8: on CIFAR-10 students meet the nodes of a trained teacher too, if less closely.

Counts as reproduced: ρ̄ grows in every layer, winners lead early, and students label at least as well as the teacher.
The teachers are trained here: the paper's were never published. Its losses and ranks of figures 17 to 21 are of the
same runs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from thalweg.lab.claims import Claim
from thalweg.lab.parts import Share, part
from thalweg.lab.recipe import Context, Outcome, Recipe
from thalweg.lab.tables import Table, Tables
from thalweg.recipes.luck_matters.falling import (
    WORDS,
    FallPreset,
    Kind,
    Norm,
    Pairs,
    fall,
    in_common,
    is_missing_some,
    require_some,
    rows_of,
    student_of,
)
from thalweg.recipes.luck_matters.figure_7 import KINDS, courses
from thalweg.recipes.luck_matters.pictures import by_epoch, layer_figures, left_out, loss_figures, student_figures

if TYPE_CHECKING:
    from torch import Tensor, nn

    from thalweg.lab.figures import Figure

_CLASSES = 10  # of both data sets


class Figure8Preset(FallPreset):
    """Parameters of the runs: teachers and students are fully connected, convolutional, or both."""

    num_outputs: int = _CLASSES
    """Outputs: one a class."""
    data: Literal["cifar10", "digits"] = "cifar10"
    """Images; scikit-learn's digits for what must take seconds."""
    num_train: int = Field(default=50_000, ge=1)
    """Images to train on, the first of the set (of the digits that are not tested on)."""
    num_test: int = Field(default=10_000, ge=1)
    """Images to test on: correlations, losses and accuracies are of these. At most a quarter of the digits."""
    images_shrunk_to: int | None = None
    """Height and width that images are shrunk to. None: as they are."""
    augment: bool = True
    """Shift and mirror the students' images at random (the authors' code)."""
    kinds: tuple[Kind, ...] = Field(default=("fc", "cnn"), min_length=1)
    """Networks to run (the paper: both)."""
    norms: tuple[Norm, ...] = Field(default=("none", "after_relu"), min_length=1)
    """Where the students' BatchNorm stands (the paper: nowhere, and after the ReLU)."""
    teacher_epochs: int = Field(default=40, ge=1)
    """Of the teachers, which have BatchNorm after the ReLU (unknown; ours)."""
    teacher_learning_rate: float = Field(default=0.05, gt=0)
    """Of the teachers: SGD with momentum 0.9, falling to 0 by a cosine (unknown; ours)."""

    @model_validator(mode="after")
    def _is_of_images(self) -> Self:
        """Refuse what is of Gaussian inputs: a run would pass over it."""
        for name in ("num_inputs", "image_size", "std", "eval_samples"):
            usual, own = type(self).model_fields[name].default, getattr(self, name)
            if own != usual:
                raise ValueError(
                    f"Expected {name}={usual:g}, which is of Gaussian inputs. Got {own:g}. Leave it; images are "
                    "chosen by images_shrunk_to, num_train and num_test."
                )
        if self.num_outputs != _CLASSES:
            raise ValueError(f"Expected num_outputs={_CLASSES}, one a class. Got {self.num_outputs}. Leave it.")
        return self


# Not run. The convolutional rate is that of Gaussian inputs: at the start the largest eigenvalue of the Gauss-Newton
# matrix is 57 here (8 images) and 51 there (16), where 1e-4 learns and 0.01 diverges.
PAPER = Figure8Preset(epoch_samples=50_000)
# Chosen by us: half the widths of the paper's FC teacher, an eighth of its convolutional one's, images of 14×14, and
# for convolutional students half the rate, or less, at which they still fell in their first epoch. At 0.1 a fully
# connected student with BatchNorm diverged; 0.05 is the authors' rate.
CPU = PAPER.model_copy(
    update={
        "fc_widths": (25, 40, 50, 60),
        "cnn_channels": (8, 8, 8, 8),
        "num_train": 10_000,
        "num_test": 2_000,
        "images_shrunk_to": 14,
        "teacher_epochs": 15,
        "epochs": 8,
        "epoch_samples": 10_000,
        "cnn_learning_rate": 0.02,
        "cnn_norm_learning_rate": 0.01,
        "num_seeds": 3,
    }
)
QUICK = CPU.model_copy(
    update={
        "data": "digits",
        "fc_widths": (6, 8),
        "kinds": ("fc",),
        "factor": 5,
        "num_train": 800,
        "num_test": 400,
        "images_shrunk_to": None,
        "augment": False,
        "learning_rate": 0.1,
        "teacher_epochs": 5,
        "epochs": 3,
        "epoch_samples": 3_000,
        "num_seeds": 1,
    }
)


def run(preset: Figure8Preset, context: Context) -> Outcome:
    """Train a teacher of each kind, then let its students fall."""
    images = _images(preset, context)
    tables: dict[str, Table] = {"layers": [], "students": [], "diverged": [], "teachers": []}
    shares = Share(context).split([1.0 if kind == "fc" else 4.0 for kind in preset.kinds])
    for kind, share in zip(preset.kinds, shares, strict=True):
        found = _of_kind(preset, context, kind, images, share)
        for name, rows in found.items():
            tables[name].extend(rows)
    require_some(tables)
    means = by_epoch(tables["layers"])
    found = measured(by_epoch(in_common(tables)), in_common(tables, "students"))
    if preset.data == "digits":  # they are no test of what is said about photographs
        found = {name: value for name, value in found.items() if name == "grows"}
    if is_missing_some(tables):  # the claim is about every setting
        found.pop("grows", None)
    return Outcome(tables={**tables, "by_epoch": means}, measured=found)


def _images(preset: Figure8Preset, context: Context) -> "tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]":
    """Load images and class numbers to train on and to test on."""
    import torch

    from thalweg.data import cifar10, digits

    if preset.data == "digits":
        whole = digits(dtype=torch.float32)
        places = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
        last = len(whole) - min(preset.num_test, len(whole) // 4)  # no image is in both sets
        sets = whole.select(places[:last][: preset.num_train]), whole.select(places[last:])
        return tuple((s.inputs.reshape(len(s), 1, 8, 8), s.targets) for s in sets)  # type: ignore[return-value]
    options: dict[str, Any] = {
        "data_root": context.data_root,
        "image_size": preset.images_shrunk_to,
        "normalize": True,
    }
    train = cifar10("train", num_samples=preset.num_train, **options)
    test = cifar10("test", num_samples=preset.num_test, **options)
    return (train.inputs, train.targets), (test.inputs, test.targets)


def _of_kind(preset: Figure8Preset, context: Context, kind: Kind, images: Any, share: Share) -> dict[str, Table]:
    (inputs, classes), test = images
    first, *rest = share.split([1.0, *[2.0] * len(preset.norms)])

    def trained(folder: Path | None) -> dict[str, Any]:
        teacher, row = _teacher(preset, kind, (inputs, classes), test, first, folder)
        return {"row": row, "state": {name: t.tolist() for name, t in teacher.state_dict().items()}}

    key = f"{preset.data} {inputs.shape} {preset.model_dump_json()}"
    kept = part(context, f"teacher-{kind}", key, trained)
    teacher = _written(_built(preset, kind, inputs), kept["state"]).to(context.device)
    tables: dict[str, Table] = {"layers": [], "students": [], "diverged": []}
    tables["teachers"] = [{"kind": kind, **kept["row"]}]
    for norm, own in zip(preset.norms, rest, strict=True):
        name = f"{KINDS[kind]}, {WORDS[norm]}"

        def compute(folder: Path | None, norm: Norm = norm, own: Share = own, name: str = name) -> dict[str, Any]:
            pairs = _pairs(preset, context, teacher, norm, inputs, test)
            falls = fall(preset.of_kind(kind, norm), pairs, own, name, folder, may_diverge=True)
            return rows_of(preset, name, pairs, falls)

        for table, rows in part(context, f"{kind}-{norm}", key, compute).items():
            tables[table].extend(rows)
    return tables


def _pairs(
    preset: Figure8Preset, context: Context, teacher: "nn.Module", norm: Norm, inputs: "Tensor", test: Any
) -> Pairs:
    from thalweg.data import AugmentedImages, FiniteSet

    count, images = len(preset.seeds), inputs.to(context.device)
    sources = [
        AugmentedImages(images, seed=seed) if preset.augment else FiniteSet(images, seed=seed)
        for seed in preset.seeds
    ]
    x, labels = (t.to(context.device) for t in test)
    students = [student_of(teacher, preset.factor, norm, seed) for seed in preset.seeds]
    return Pairs(preset.seeds, [teacher] * count, students, sources, [x] * count, [labels] * count)


def _built(preset: Figure8Preset, kind: Kind, inputs: "Tensor") -> "nn.Module":
    """Build a teacher at its start."""
    import torch

    from thalweg import nets

    with torch.random.fork_rng():
        torch.default_generator.manual_seed(preset.seed)
        if kind == "fc":
            features = inputs[0].numel()
            return nets.relu_mlp(
                preset.fc_widths, num_inputs=features, num_outputs=_CLASSES, norm="after_relu", affine=True
            )
        channels, size = int(inputs.shape[1]), int(inputs.shape[-1])
        return nets.relu_cnn(
            preset.cnn_channels, image_size=size, in_channels=channels, num_outputs=_CLASSES, norm="after_relu"
        )


def _written(module: "nn.Module", state: Any) -> "nn.Module":
    import torch

    own = module.state_dict()
    module.load_state_dict({name: torch.tensor(values).to(own[name]) for name, values in state.items()})
    return module.eval()


def _teacher(
    preset: Figure8Preset, kind: Kind, train: Any, test: Any, share: Share, folder: Path | None
) -> "tuple[nn.Module, dict[str, Any]]":
    """Train a teacher on the labels."""
    import torch
    from torch import nn

    from thalweg.errors import NumericalError
    from thalweg.objective import Objective
    from thalweg.training import fit

    device = share.context.device
    net = _built(preset, kind, train[0]).to(device)
    objective = Objective(net.train(), nn.CrossEntropyLoss(), train, batch_size=1024, device=device)
    fitted = fit(
        objective,
        objective.theta(),
        epochs=preset.teacher_epochs,
        generator=torch.Generator().manual_seed(preset.seed),
        batch_size=preset.batch_size,
        optimizer="sgd",
        learning_rate=preset.teacher_learning_rate,
        momentum=0.9,
        weight_decay=5e-4,
        schedule="cosine",
        keep=folder,
        progress=share.told(f"teacher, {KINDS[kind]}"),
    )
    if fitted.status == "diverged":
        raise NumericalError(
            f"Expected a teacher whose training ends finite. Got NaN or infinity in epoch {fitted.epochs + 1}. "
            f"Take a smaller teacher_learning_rate than {preset.teacher_learning_rate:g}."
        )
    fitted.write(net)
    net.eval()
    with torch.no_grad():
        right = torch.cat([net(x.to(device)).argmax(1).cpu() for x in torch.split(test[0], 1024)]) == test[1]
    return net.cpu(), {"accuracy": float(right.double().mean()), "seconds": fitted.seconds}


def measured(means: Table, students: Table) -> dict[str, Any]:
    """Measure the claims on the means over seeds."""
    names = list(dict.fromkeys(row["setting"] for row in means))
    if not names:  # no seed stayed finite in all settings
        return {}
    layers = {name: courses(means, name) for name in names}
    last = max(row["epoch"] for row in students)
    gains: dict[str, float] = {}
    for name in names:
        own = [row for row in students if row["setting"] == name and row["epoch"] == last]
        gains[name] = sum(row["accuracy"] - row["teacher_accuracy"] for row in own) / len(own)
    found: dict[str, Any] = {
        "grows": min(c[-1]["correlation"] - c[0]["correlation"] for name in names for c in layers[name]),
        "accuracy": {"best": max(gains.values()), **gains},
    }
    early = [layers[name][0][0]["rank"] for name in names if "rank" in layers[name][0][0]]
    if early:
        found["early"] = max(early)
    pairs = [[f"{word}, {WORDS[norm]}" for norm in ("none", "after_relu")] for word in KINDS.values()]
    ranks = [[_mean_rank(layers[name]) for name in pair] for pair in pairs if all(name in names for name in pair)]
    gaps = [normed - plain for plain, normed in ranks if plain is not None and normed is not None]
    if gaps:
        found["norm_ranks"] = max(gaps)
    return found


def _mean_rank(layers: Sequence[Table]) -> float | None:
    """Mean rank of the winners at initialisation, on average over the layers that have one."""
    own = [course[0]["rank"] for course in layers if "rank" in course[0]]
    return float(sum(own) / len(own)) if own else None


def figures(tables: Tables) -> "Sequence[Figure]":
    """Draw ρ̄ and r̄ of each layer, the accuracy and the loss."""
    caption = "Share of test images that are given their class; the teachers' own is in the table."
    students, diverged = tables["students"], tables.get("diverged", [])
    accuracy = student_figures(students, "accuracy", "Accuracy", f"{caption}{left_out(diverged)}")
    return [*layer_figures(tables["by_epoch"], diverged=diverged), *accuracy, *loss_figures(students, diverged)]


RECIPE = Recipe(
    name="luck_matters/figure_8",
    title="CIFAR-10: students of a trained teacher, layer by layer, with BatchNorm and without",
    source="tian2019luck, figure 8",
    version=2,
    presets={"paper": PAPER, "cpu": CPU, "quick": QUICK},
    claims=(
        Claim(
            "grows",
            "The correlation ρ̄ of every layer grows during training: least growth of any layer and setting.",
            "it grows, if less than on Gaussian inputs",
            "above 0",
            lambda m: m > 0,
        ),
        Claim(
            "accuracy",
            "The accuracy of students on the test images is often above their teacher's: mean difference.",
            "about +0.01",
            "above 0 in the best setting",
            lambda m: m["best"] > 0,
        ),
        Claim(
            "early",
            "Students that win in the lowest layer lead at initialisation: their mean rank, largest of any setting.",
            "a good rank at the early stage; chance gives 0.5",
            "at most 0.35",
            lambda m: m <= 0.35,
        ),
        Claim(
            "norm_ranks",
            "BatchNorm improves the mean rank at initialisation, on average over the layers: largest difference to "
            "without it, of FC and CNN.",
            "improves the mean rank",
            "below 0",
            lambda m: m < 0,
        ),
    ),
    run=run,
    figures=figures,
    summary=(
        "Teachers are trained on the labels, students on the teachers' outputs alone. With a finite set of images "
        "nodes are met less closely than with Gaussian inputs without end."
    ),
)
