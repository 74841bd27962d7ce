"""The protocol: a convolutional network in training is lifted at some epochs, and goes on without its constraints."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from pydantic import Field, model_validator

from thalweg.lab.parts import Share
from thalweg.lab.recipe import Context, Preset
from thalweg.lab.tables import Table
from thalweg.recipes.needle_in_the_haystack.images import DataName, Images, load

if TYPE_CHECKING:
    from torch import Tensor, nn

    from thalweg.lifting import Lifting
    from thalweg.training import Fit

Space = Literal["fc", "local", "shared"]
CNN = "CNN"
RELAXED: dict[Space, str] = {"fc": "eFCN", "local": "eLCN", "shared": "CNN, relaxed rate"}
STANDARD: dict[Space, str] = {"fc": "FCN", "local": "LCN"}
"""Names of networks in tables: the paper's, and LCN for locally connected; e… is one that was lifted. The last of the
relaxed keeps its constraints and goes on at the rate of the others: a control."""


class ProtocolPreset(Preset):
    """What the recipes of lab 2 share: data, network, and how it is trained, relaxed and trained on."""

    data: DataName = "cifar10"
    """CIFAR-10 or CIFAR-100, normalised channel by channel; scikit-learn's digits for what must take seconds."""
    num_train: int = Field(default=50_000, ge=1)
    """Samples to train on: the first of the training set."""
    num_test: int = Field(default=10_000, ge=1)
    """Samples to test on."""
    image_size: int | None = None
    """Height and width that images are shrunk to. None: as they are."""
    network: Literal["vanilla_cnn", "alexnet"] = "vanilla_cnn"
    """Three convolutions of equal width, or the paper's AlexNet."""
    width: float = 64.0
    """Channels of the "vanilla_cnn"; factor on those of the "alexnet"."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """SGD without momentum, or Adam."""
    batch_size: int = Field(default=250, ge=1)
    """Samples of a mini-batch (the paper)."""
    shuffle: bool = False
    """Whether each epoch has a new order (the paper's code: no)."""
    epochs: int = Field(default=150, ge=1)
    """Of the convolutional network (the paper)."""
    learning_rate: float = 0.1
    """Of the convolutional network, constant (the paper)."""
    relaxed_epochs: int = Field(default=100, ge=1)
    """Of relaxed networks and of those trained from scratch (the paper)."""
    relaxed_learning_rate: float = 0.01
    """Of the same (the paper)."""
    num_times: int = Field(default=20, ge=2)
    """Relax times are so many at most, spread logarithmically over the epochs, and 0 (the paper's code)."""
    relax_times: tuple[int, ...] | None = None
    """Relax times in epochs, in place of those: ascending, none beyond the last epoch."""
    num_seeds: int = Field(default=1, ge=1)
    """Networks that the whole protocol is run with (the paper shows one)."""
    padded: bool = True
    """Keep the padding as a layer of its own, as the paper's code does: a third of the weights reads zeros."""

    @model_validator(mode="after")
    def _are_times_possible(self) -> Self:
        times = self.times
        if not times or list(times) != sorted(set(times)) or times[0] < 0 or times[-1] > self.epochs:
            raise ValueError(f"relax times ascending from 0 to {self.epochs} at most, each once")
        return self

    @property
    def times(self) -> tuple[int, ...]:
        """Relax times, ascending."""
        return self.relax_times if self.relax_times is not None else log_spaced(self.epochs, self.num_times)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the networks."""
        return tuple(self.seed * 1_000 + k for k in range(self.num_seeds))


Kind = TypeVar("Kind", bound=ProtocolPreset)


def derived(kind: type[Kind], preset: ProtocolPreset, **changes: Any) -> Kind:
    """Make a preset of another recipe with the protocol of this one.

    Args:
        kind: of the preset to make.
        preset: whose protocol it shares.
        changes: what differs.
    """
    own = {name: getattr(preset, name) for name in ProtocolPreset.model_fields}
    return kind(**{**own, **changes})


def log_spaced(last: int, count: int) -> tuple[int, ...]:
    """Spread epochs logarithmically from 1 to the last, each once, with 0 in front.

    Example:
        >>> log_spaced(150, 20)
        (0, 1, 2, 3, 4, 6, 8, 10, 13, 18, 23, 30, 40, 52, 67, 88, 115, 150)
    """
    exponents = [math.log10(last) * k / (count - 1) for k in range(count)]
    return tuple(sorted({0, *(int(10**e + 1e-9) for e in exponents)}))


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
        folder = self.context.folder / f"cnn-{self.seed}" if self.context.folder is not None else None

        def observe(epoch: int, module: "nn.Module") -> Mapping[str, float]:
            if epoch in snapshots:
                kept[epoch] = {name: t.detach().cpu().clone() for name, t in module.state_dict().items()}
                if folder is not None:
                    _save(folder / f"epoch-{epoch}.safetensors", kept[epoch])
            return self.images.measured(module) if epoch in self._observed(self.preset.epochs) else {}

        rates = self.preset.epochs, self.preset.learning_rate
        fitted = self._fitted(net, rates, observe, share, CNN, folder)
        for epoch in snapshots:
            if epoch not in kept and folder is not None:  # of an interrupted run
                kept[epoch] = _load(folder / f"epoch-{epoch}.safetensors")
        rows = self._rows(fitted, CNN, None)
        return kept, [{**row, "seconds": fitted.seconds} for row in rows]

    def relaxed(
        self,
        state: "Mapping[str, Tensor]",
        time: int,
        space: Space,
        share: Share,
        folder: Path | None,
        *,
        with_start: bool = False,
    ) -> "Relaxed":
        """Lift the network in a state, and train it on without its constraints; keep its start if asked for."""
        from thalweg.lifting import lift

        net = self.build().eval()
        net.load_state_dict(dict(state))
        lifted = lift(net, self.images.train[0][:4], to=space, padded=self.preset.padded)
        gap = self.images.gap(net, lifted.module)
        start = {name: t.detach().clone() for name, t in lifted.module.state_dict().items()} if with_start else {}
        made = self._trained_on(lifted.module, lifted.lifting, RELAXED[space], time, share, folder)
        return replace(made, gap=gap, start=start)

    def standard(self, space: Space, share: Share, folder: Path | None, *, with_start: bool = False) -> "Relaxed":
        """Train the network of the same shape from torch's default initialisation."""
        module, lifting = self.unconstrained(space)
        start = {name: t.detach().clone() for name, t in module.state_dict().items()} if with_start else {}
        return replace(self._trained_on(module, lifting, STANDARD[space], None, share, folder), start=start)

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
        self,
        module: "nn.Module",
        lifting: "Lifting",
        name: str,
        time: int | None,
        share: Share,
        folder: Path | None,
    ) -> "Relaxed":
        from thalweg.lifting import deviation

        preset = self.preset

        def observe(epoch: int, module: "nn.Module") -> Mapping[str, float]:
            if epoch not in self._observed(preset.relaxed_epochs):
                return {}
            found = deviation(lifting, dict(module.named_parameters()))
            away = {"delta": found.total, "delta_lifted": found.lifted, "sharing": found.sharing}
            return {**self.images.measured(module), **away, "distance": found.distance}

        label = name if time is None else f"{name} of epoch {time}"
        rates = preset.relaxed_epochs, preset.relaxed_learning_rate
        fitted = self._fitted(module, rates, observe, share, label, folder)
        return Relaxed(name, time, module.eval(), lifting, fitted.seconds, self._rows(fitted, name, time))

    def _fitted(
        self,
        net: "nn.Module",
        rates: tuple[int, float],
        observe: "Callable[[int, nn.Module], Mapping[str, float]]",
        share: Share,
        what: str,
        folder: Path | None,
    ) -> "Fit":
        epochs, learning_rate = rates
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
            keep=folder,
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
        seconds: of its training.
        rows: what was seen on the way.
        gap: largest difference of the outputs by the lift, on all test images.
        start: its state at the start; empty if it was not asked for.
    """

    name: str
    time: int | None
    module: "nn.Module"
    lifting: "Lifting"
    seconds: float
    rows: Table
    gap: float = 0.0
    start: "Mapping[str, Tensor]" = field(default_factory=dict)

    @property
    def state(self) -> "dict[str, Tensor]":
        """Parameters and buffers at the end."""
        return {name: t.detach() for name, t in self.module.state_dict().items()}


def loaded(preset: ProtocolPreset, context: Context) -> Images:
    """Load a preset's data."""
    return load(preset.data, preset.num_train, preset.num_test, preset.image_size, context)


def _save(path: Path, state: "Mapping[str, Tensor]") -> None:
    from thalweg.checkpoint import save_state

    path.parent.mkdir(parents=True, exist_ok=True)
    save_state(path, state)


def _load(path: Path) -> "dict[str, Tensor]":
    from thalweg.checkpoint import load_state

    return load_state(path)
