"""The protocol: a convolutional network in training is lifted at some epochs, and goes on without its constraints."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, Literal

from thalweg.lab.files import write_whole
from thalweg.lab.recipe import Context, Preset
from thalweg.lab.tables import Table
from thalweg.recipes.needle_in_the_haystack.images import DataName, Images, load

if TYPE_CHECKING:
    from torch import Tensor, nn

    from thalweg.lifting import Lifting
    from thalweg.training import Fit

Space = Literal["fc", "local"]
CNN = "CNN"
RELAXED: dict[Space, str] = {"fc": "eFCN", "local": "eLCN"}
STANDARD: dict[Space, str] = {"fc": "FCN", "local": "LCN"}
"""Names of networks in tables: the paper's, and LCN for locally connected; e… is one that was lifted."""


class ProtocolPreset(Preset):
    """What the recipes of lab 2 share: data, network, and how it is trained, relaxed and trained on."""

    data: DataName = "cifar10"
    """CIFAR-10 or CIFAR-100, normalised channel by channel; scikit-learn's digits for what must take seconds."""
    num_train: int = 50_000
    """Samples to train on: the first of the training set."""
    num_test: int = 10_000
    """Samples to test on."""
    image_size: int | None = None
    """Height and width that images are shrunk to. None: as they are."""
    network: Literal["vanilla_cnn", "alexnet"] = "vanilla_cnn"
    """Three convolutions of equal width, or the paper's AlexNet."""
    width: float = 64.0
    """Channels of the "vanilla_cnn"; factor on those of the "alexnet"."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """SGD without momentum, or Adam."""
    batch_size: int = 250
    """Samples of a mini-batch (the paper)."""
    shuffle: bool = False
    """Whether each epoch has a new order (the paper's code: no)."""
    epochs: int = 150
    """Of the convolutional network (the paper)."""
    learning_rate: float = 0.1
    """Of the convolutional network, constant (the paper)."""
    relaxed_epochs: int = 100
    """Of relaxed networks and of those trained from scratch (the paper)."""
    relaxed_learning_rate: float = 0.01
    """Of the same (the paper)."""
    num_times: int = 20
    """Relax times are so many at most, spread logarithmically over the epochs, and 0 (the paper's code)."""
    relax_times: tuple[int, ...] | None = None
    """Relax times in epochs, in place of those."""
    num_seeds: int = 1
    """Networks that the whole protocol is run with (the paper shows one)."""
    padded: bool = True
    """Keep the padding as a layer of its own, as the paper's code does: a third of the weights reads zeros."""

    @property
    def times(self) -> tuple[int, ...]:
        """Relax times, ascending."""
        return self.relax_times if self.relax_times is not None else log_spaced(self.epochs, self.num_times)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the networks."""
        return tuple(self.seed * 1_000 + k for k in range(self.num_seeds))


def log_spaced(last: int, count: int) -> tuple[int, ...]:
    """Spread epochs logarithmically from 1 to the last, each once, with 0 in front.

    Example:
        >>> log_spaced(150, 20)
        (0, 1, 2, 3, 4, 6, 8, 10, 13, 18, 23, 30, 40, 52, 67, 88, 115, 150)
    """
    exponents = [math.log10(last) * k / (count - 1) for k in range(count)]
    return tuple(sorted({0, *(int(10**e + 1e-9) for e in exponents)}))


@dataclass
class Share:
    """The part of a run's progress that a piece of work has.

    Args:
        context: of the run.
        start: fraction done when it begins.
        end: when it ends.
    """

    context: Context
    start: float = 0.0
    end: float = 1.0

    def told(self, what: str) -> Callable[[float, str], None]:
        """Give what a training reports to."""
        return lambda x, text: self.context.progress(self.start + (self.end - self.start) * x, f"{what}: {text}")

    def split(self, weights: Sequence[float]) -> "Iterator[Share]":
        """Cut it into pieces of given weights."""
        done, whole = 0.0, sum(weights) or 1.0
        for weight in weights:
            low, high = (self.start + (self.end - self.start) * x / whole for x in (done, done + weight))
            done += weight
            yield Share(self.context, low, high)


@dataclass
class Protocol:
    """The protocol for one seed.

    Args:
        preset: its settings.
        context: where interrupted work is kept.
        seed: of this network.
        images: the data.
    """

    preset: ProtocolPreset
    context: Context
    seed: int
    images: Images

    def build(self) -> "nn.Module":
        """Build the convolutional network at its start."""
        import torch

        from thalweg import nets

        shape = self.images.train[0].shape
        options = {"image_size": int(shape[-1]), "in_channels": int(shape[1]), "num_classes": self.images.num_classes}
        with torch.random.fork_rng():
            torch.default_generator.manual_seed(self.seed)
            if self.preset.network == "alexnet":
                return nets.alexnet(self.preset.width, **options)
            return nets.vanilla_cnn(round(self.preset.width), **options)

    def convolutional(self, share: Share, snapshots: Sequence[int]) -> "tuple[dict[int, dict[str, Tensor]], Table]":
        """Train the convolutional network; give its state after each of the epochs asked for, and what was seen."""
        net = self.build()
        kept: dict[int, dict[str, Tensor]] = {}
        folder = self.context.folder

        def observe(epoch: int, module: "nn.Module") -> Mapping[str, float]:
            if epoch in snapshots:
                kept[epoch] = {name: t.detach().cpu().clone() for name, t in module.state_dict().items()}
                if folder is not None:
                    _save(folder / f"cnn-{self.seed}-{epoch}.safetensors", kept[epoch])
            return self.images.measured(module) if epoch in self._observed(self.preset.epochs) else {}

        fitted = self._fitted(net, self.preset.epochs, self.preset.learning_rate, observe, share, CNN)
        for epoch in snapshots:
            if epoch not in kept and folder is not None:  # of an interrupted run
                kept[epoch] = _load(folder / f"cnn-{self.seed}-{epoch}.safetensors")
        return kept, self._rows(fitted, CNN, None)

    def relaxed(
        self, state: "Mapping[str, Tensor]", time: int, space: Space, share: Share, *, with_measures: bool = True
    ) -> "Relaxed":
        """Lift the network in a state, and train it on without its constraints."""
        from thalweg.lifting import lift

        net = self.build().eval()
        net.load_state_dict(dict(state))
        lifted = lift(net, self.images.train[0][:4], to=space, padded=self.preset.padded)
        start = {name: t.detach().clone() for name, t in lifted.module.state_dict().items()} if with_measures else {}
        name = RELAXED[space]
        fitted = self._trained_on(lifted.module, lifted.lifting, name, time, share)
        rows = self._rows(fitted, name, time)
        return Relaxed(name, time, lifted.module.eval(), lifted.lifting, lifted.error, fitted, rows, start)

    def standard(self, space: Space, share: Share) -> "Relaxed":
        """Train the network of the same shape from torch's default initialisation."""
        module, lifting = self.unconstrained(space)
        name = STANDARD[space]
        fitted = self._trained_on(module, lifting, name, None, share)
        return Relaxed(name, None, module.eval(), lifting, 0.0, fitted, self._rows(fitted, name, None), {})

    def unconstrained(self, space: Space) -> "tuple[nn.Module, Lifting]":
        """Build the network of the lifted shape as torch initialises it."""
        import torch

        from thalweg.lifting import lift

        lifted = lift(self.build().eval(), self.images.train[0][:4], to=space, padded=self.preset.padded)
        with torch.random.fork_rng():
            torch.default_generator.manual_seed(self.seed)
            for layer in lifted.module.modules():
                if callable(reset := getattr(layer, "reset_parameters", None)):
                    reset()
        return lifted.module, lifted.lifting

    def _trained_on(
        self, module: "nn.Module", lifting: "Lifting", name: str, time: int | None, share: Share
    ) -> "Fit":
        from thalweg.lifting import deviation

        preset = self.preset

        def observe(epoch: int, module: "nn.Module") -> Mapping[str, float]:
            if epoch not in self._observed(preset.relaxed_epochs):
                return {}
            found = deviation(lifting, dict(module.named_parameters()))
            away = {"delta": found.total, "delta_lifted": found.lifted, "sharing": found.sharing}
            return {**self.images.measured(module), **away, "distance": found.distance}

        label = name if time is None else f"{name} of epoch {time}"
        return self._fitted(module, preset.relaxed_epochs, preset.relaxed_learning_rate, observe, share, label)

    def _fitted(
        self,
        net: "nn.Module",
        epochs: int,
        learning_rate: float,
        observe: "Callable[[int, nn.Module], Mapping[str, float]]",
        share: Share,
        what: str,
    ) -> "Fit":
        import torch

        from thalweg.errors import NumericalError
        from thalweg.training import fit

        objective = self.images.objective(net.train(), self.context)
        fitted = fit(
            objective,
            objective.theta(),
            epochs=epochs,
            generator=torch.Generator().manual_seed(self.seed),
            batch_size=self.preset.batch_size,
            optimizer=self.preset.optimizer,
            learning_rate=learning_rate,
            momentum=0.0,
            weight_decay=0.0,
            schedule="constant",
            shuffle=self.preset.shuffle,
            observe=observe,
            keep=self.context.folder,
            progress=share.told(f"seed {self.seed}, {what}"),
        )
        if fitted.status == "diverged":
            raise NumericalError(
                f"Expected a training that ends finite. Got NaN or infinity in epoch {fitted.epochs + 1} of {what}, "
                f"seed {self.seed}. Take a smaller learning rate than {learning_rate:g}."
            )
        fitted.write(net)
        return fitted

    def _observed(self, epochs: int) -> tuple[int, ...]:
        return log_spaced(epochs, self.preset.num_times)

    def _rows(self, fitted: "Fit", name: str, time: int | None) -> Table:
        shared = {"seed": self.seed, "network": name, "relax_time": time}
        return [{**shared, "epoch": k, **row} for k, row in enumerate(fitted.observations) if row]


@dataclass(frozen=True)
class Relaxed:
    """A network that was trained in a relaxed space.

    Args:
        name: under which it stands in tables.
        time: relax time in epochs; None if it was trained from scratch.
        module: at its end, in eval mode.
        lifting: the map from the convolutional network.
        error: relative change of the outputs by the lift.
        fitted: its training.
        rows: what was seen on the way.
        start: its state at the start; empty if it was not asked for.
    """

    name: str
    time: int | None
    module: "nn.Module"
    lifting: "Lifting"
    error: float
    fitted: "Fit"
    rows: Table
    start: "Mapping[str, Tensor]"

    @property
    def state(self) -> "dict[str, Tensor]":
        """Parameters and buffers at the end."""
        return {name: t.detach() for name, t in self.module.state_dict().items()}


def loaded(preset: ProtocolPreset, context: Context) -> Images:
    """Load a preset's data."""
    return load(preset.data, preset.num_train, preset.num_test, preset.image_size, context)


def part(context: Context, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Compute a part of a run once: an interrupted run that is started again finds what it had.

    Args:
        context: of the run; without a folder, everything is computed.
        name: of the part.
        compute: gives what is kept, of JSON's kinds. Large states of its training are dropped with it.
    """
    if context.folder is None:
        return compute()
    file = context.folder / f"part-{name}.json"
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = set(context.folder.glob("fit-*.pt"))
        found = json.loads(json.dumps(compute()))
        write_whole(file, json.dumps(found).encode())
        for state in set(context.folder.glob("fit-*.pt")) - before:
            state.unlink(missing_ok=True)
    return found


def averages(rows: Table, keys: Sequence[str], columns: Sequence[str]) -> Table:
    """Average over the rows that agree in some columns, with the range: NAME, NAME_least, NAME_most."""
    found: dict[tuple[Any, ...], Table] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    out = []
    for values, own in found.items():
        row = dict(zip(keys, values, strict=True))
        for name in columns:
            numbers = [float(r[name]) for r in own if r.get(name) is not None]
            if numbers:
                row |= {name: mean(numbers), f"{name}_least": min(numbers), f"{name}_most": max(numbers)}
        out.append(row)
    return out


def _save(path: Path, state: "Mapping[str, Tensor]") -> None:
    from thalweg.checkpoint import save_state

    path.parent.mkdir(parents=True, exist_ok=True)
    save_state(path, state)


def _load(path: Path) -> "dict[str, Tensor]":
    from thalweg.checkpoint import load_state

    return load_state(path)
