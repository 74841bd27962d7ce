"""Endpoints: the data of a recipe of lab 3, and networks trained on them from several seeds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from thalweg.lab.progress import Progress
from thalweg.lab.recipe import Context, Preset

if TYPE_CHECKING:
    from torch import Tensor, nn

    from thalweg.objective import Objective

DataName = Literal["mnist", "cifar10", "digits"]
BATCH = 1_000
"""Samples that are evaluated at once."""


class TrainedPreset(Preset):
    """What the recipes of lab 3 share: data, and how endpoints are trained on them."""

    data: DataName = "mnist"
    """MNIST or CIFAR-10; scikit-learn's digits, three in four of them to train on, for what must take seconds."""
    num_train: int = 60_000
    """Samples to train on: the first of the training set."""
    num_test: int = 10_000
    """Samples to test on."""
    image_size: int | None = None
    """Height and width that images are shrunk to. None: as they are."""
    epochs: int = 30
    """Passes over the data (the paper: 30 on MNIST, 400 on CIFAR-10; its code: 200 for VGG16)."""
    learning_rate: float = 0.01
    """Of SGD, held for half of the epochs, then falling to 1 % (the paper's code)."""
    momentum: float = 0.9
    """Of SGD (the paper's code; its text says SGD alone)."""
    weight_decay: float = 1e-4
    """Of SGD (the paper's code)."""
    batch_size: int = 128
    """Samples of a mini-batch."""


@dataclass(frozen=True)
class Task:
    """Data in memory.

    Args:
        train: inputs and class numbers to train on.
        test: those to test on.
        num_classes: how many classes.
    """

    train: "tuple[Tensor, Tensor]"
    test: "tuple[Tensor, Tensor]"
    num_classes: int

    def objective(self, module: "nn.Module", context: Context, samples: int | None = None) -> "Objective":
        """Make the cross-entropy of a module on the training data, or on the first so many of them."""
        return _objective(module, self.train, context, samples)

    def test_objective(self, module: "nn.Module", context: Context) -> "Objective":
        """Make the same on the test data."""
        return _objective(module, self.test, context, None)


def load(preset: TrainedPreset, context: Context, *, flat: bool) -> Task:
    """Load a preset's data.

    Args:
        preset: which data, and how many.
        context: where they lie.
        flat: make vectors of images.

    Returns:
        The data, in single precision, grey levels and colours in [0, 1]; CIFAR-10 normalised channel by channel.
    """
    import torch

    from thalweg.data import cifar10, digits, mnist

    if preset.data == "digits":
        whole = digits(dtype=torch.float32)
        places = torch.arange(len(whole))
        parts = whole.select(places[places % 4 > 0]), whole.select(places[places % 4 == 0])
        sets = [p.select(min(n, len(p))) for p, n in zip(parts, (preset.num_train, preset.num_test), strict=True)]
    else:
        load_set = mnist if preset.data == "mnist" else cifar10
        options: dict[str, Any] = {"data_root": context.data_root, "image_size": preset.image_size}
        options["normalize"] = preset.data == "cifar10"
        sets = [
            load_set("train", num_samples=preset.num_train, **options),
            load_set("test", num_samples=preset.num_test, **options),
        ]
    pairs = [(s.inputs.flatten(1) if flat else s.inputs, s.targets) for s in sets]
    return Task(pairs[0], pairs[1], sets[0].num_classes or 1)


def endpoints(
    build: "Callable[[], nn.Module]",
    task: Task,
    preset: TrainedPreset,
    context: Context,
    *,
    seeds: Sequence[int],
    augment: bool = False,
    progress: Progress | None = None,
) -> "list[nn.Module]":
    """Train networks from several seeds.

    Args:
        build: makes an untrained one from torch's random state.
        task: the data.
        preset: how they are trained.
        context: where interrupted trainings are kept.
        seeds: one for each network.
        augment: crop and flip the images at random while training.
        progress: told the fraction done.

    Returns:
        The trained networks, in eval mode.

    Raises:
        NumericalError: a training diverged.
    """
    import torch

    from thalweg.data import crop_and_flip
    from thalweg.errors import NumericalError
    from thalweg.training import fit

    trained = []
    for place, seed in enumerate(seeds):
        with torch.random.fork_rng():
            torch.default_generator.manual_seed(seed)
            net = build()
        objective = task.objective(net, context)

        def tell(fraction: float, text: str, place: int = place, seed: int = seed) -> None:
            if progress is not None:
                progress((place + fraction) / len(seeds), f"network {seed}: {text}")

        run = fit(
            objective,
            objective.theta(),
            epochs=preset.epochs,
            generator=torch.Generator().manual_seed(seed),
            batch_size=preset.batch_size,
            learning_rate=preset.learning_rate,
            momentum=preset.momentum,
            weight_decay=preset.weight_decay,
            augment=crop_and_flip if augment else None,
            keep=context.folder,
            progress=tell,
        )
        if run.status == "diverged":
            raise NumericalError(
                f"Expected a training that ends finite. Got NaN or infinity in epoch {run.epochs + 1} of network "
                f"{seed}. Take a smaller learning rate than {preset.learning_rate:g}."
            )
        run.write(net)
        trained.append(net.eval())
    return trained


def pairs_of(count: int) -> list[tuple[int, int]]:
    """Give the pairs of consecutive networks, as the paper's code: (0, 1), (1, 2), …; of three all three."""
    found = [(k, k + 1) for k in range(count - 1)]
    return [*found, (count - 1, 0)] if count == 3 else found


def _objective(
    module: "nn.Module", data: "tuple[Tensor, Tensor]", context: Context, samples: int | None
) -> "Objective":
    from torch import nn

    from thalweg.objective import Objective

    inputs, targets = (part[:samples] for part in data)
    return Objective(
        module, nn.CrossEntropyLoss(), (inputs, targets), batch_size=min(BATCH, len(targets)), device=context.device
    )
