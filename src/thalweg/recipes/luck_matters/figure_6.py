"""Figures 6 and 16: most biases of BatchNorm are negative, so that few nodes fire at once.

The paper counts those of torchvision's VGG16 and VGG11, trained on ImageNet. Without these weights, networks of the
same layout are trained here on CIFAR-10, and said to be; `--checkpoint FILE` counts those of a file instead.

Counts as reproduced: more than half are negative, and no smaller a share of them in the upper half of the layers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from thalweg.lab.claims import Claim
from thalweg.lab.parts import Share, averages, part
from thalweg.lab.recipe import Context, Outcome, Preset, Recipe
from thalweg.lab.tables import Table, Tables
from thalweg.recipes.luck_matters import bias_counts
from thalweg.recipes.luck_matters.bias_counts import Biases, Network

if TYPE_CHECKING:
    from torch import nn

    from thalweg.data.dataset import Dataset
    from thalweg.lab.figures import Figure

Stages = tuple[tuple[int, ...], ...]

VGG16: Stages = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
VGG11: Stages = ((64,), (128,), (256, 256), (512, 512), (512, 512))
"""Channels of Simonyan & Zisserman's networks D and A (arXiv 1409.1556), stage by stage."""
_TITLES = {"cifar10": "CIFAR-10", "digits": "digits"}
_BATCH = 1_000  # samples that are evaluated at once, chosen by us


def narrowed(stages: Stages, factor: float) -> Stages:
    """Scale all channels, rounded, at least 1.

    Example:
        >>> narrowed(VGG11, 1 / 64)
        ((1,), (2,), (4, 4), (8, 8), (8, 8))
    """
    return tuple(tuple(max(1, round(width * factor)) for width in stage) for stage in stages)


class BiasPreset(Preset):
    """Parameters: a file to count in, or networks to train and how."""

    checkpoint_sha256: str | None = None
    """Hash of the checkpoint's content, filled in: what is in the file decides the result. A file with another one is
    refused."""
    checkpoint: str | None = None
    """File with the weights of any network with BatchNorm, such as torchvision's vgg16_bn: its biases are counted,
    and nothing is trained."""
    data: Literal["cifar10", "digits"] = "cifar10"
    """CIFAR-10, normalised channel by channel; scikit-learn's digits for what must take seconds."""
    num_train: int = Field(default=50_000, ge=2)
    """Samples to train on: the first of the training set."""
    num_test: int = Field(default=10_000, ge=1)
    """Samples to test on."""
    image_size: int | None = None
    """Height and width that images are shrunk to. None: as they are."""
    stages: Stages = VGG16
    """Channels of each convolution, stage by stage: BatchNorm and ReLU follow each, a pooling each stage."""
    num_seeds: int = Field(default=5, ge=1)
    """Networks (the paper: one; five are what it repeats its other experiments with)."""
    epochs: int = Field(default=150, ge=1)
    """Passes over the data (ours, as all of the training: the paper trains no VGG)."""
    batch_size: int = Field(default=128, ge=2)
    """Samples of a mini-batch."""
    learning_rate: float = Field(default=0.05, gt=0)
    """Of SGD with momentum 0.9, falling along half a cosine."""
    weight_decay: float = Field(default=5e-4, ge=0)
    """Of all parameters, BatchNorm's too, as torch's optimizers do by default."""
    augment: bool = True
    """Whether images are shifted and mirrored at random."""

    @model_validator(mode="before")
    @classmethod
    def _with_hash(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("checkpoint_sha256") is not None:
            return values
        file = values.get("checkpoint")
        try:
            return {**values, "checkpoint_sha256": bias_counts.of_file(file).sha256} if file else values
        except (TypeError, ValueError):  # the field says it in its own name
            return values

    @field_validator("checkpoint")
    @classmethod
    def _is_countable(cls, file: str | None, info: ValidationInfo) -> str | None:
        if file is not None:
            wanted, found = info.data.get("checkpoint_sha256"), bias_counts.of_file(file).sha256
            if wanted != found:
                raise ValueError(f"a file with the sha256 {wanted}, not {found}")
        return file

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the networks."""
        return tuple(self.seed * 1_000 + k for k in range(self.num_seeds))


PAPER = BiasPreset()
PAPER_VGG11 = BiasPreset(stages=VGG11)
CPU = BiasPreset(
    num_train=20_000,
    num_test=2_000,
    image_size=16,
    stages=narrowed(VGG16[:4], 1 / 4),
    num_seeds=3,
    epochs=5,
    batch_size=64,
    augment=False,
)
QUICK = BiasPreset(
    data="digits",
    num_train=1_000,
    num_test=400,
    stages=((4, 4), (8, 8), (16,)),
    num_seeds=2,
    epochs=4,
    batch_size=50,
    augment=False,
)


def run(preset: BiasPreset, context: Context) -> Outcome:
    """Count the biases of a file, or train networks and count theirs."""
    trained: Table = []
    if preset.checkpoint is not None:
        networks = {Path(preset.checkpoint).name: bias_counts.of_file(preset.checkpoint).network}
    else:
        networks, trained = _trained(preset, context)
    rows = bias_counts.by_layer(networks)
    tables = {
        "layers": rows,
        "by_layer": averages(rows, ("place", "layer"), ("negative", "zero", "nodes")),
        "networks": [_summary(preset, name, network, trained) for name, network in networks.items()],
        "histograms": bias_counts.histogram_rows(networks),
    }
    if trained:
        tables |= {"trained": trained, "by_epoch": _by_epoch(trained)}
    measured: dict[str, Any] = {}
    if preset.checkpoint is not None or preset.data != "digits":  # digits are no test of networks for photographs
        measured["majority"] = min(bias_counts.negative_share(network) for network in networks.values())
        measured["top"] = bias_counts.in_halves(networks.values())
    return Outcome(tables, _arrays(networks), measured)


def _summary(preset: BiasPreset, name: str, network: Network, trained: Table) -> dict[str, Any]:
    last = [row for row in trained if row["network"] == name][-1:]
    values = [value for biases in network for value in biases.values]
    counts = {
        "network": name,
        "origin": f"trained here on {_TITLES[preset.data]}" if last else "a checkpoint",
        "layers": len(network),
        "biases": len(values),
        "negative": bias_counts.negative_share(network),
        "zero": sum(value == 0 for value in values) / len(values),
    }
    return counts | {key: last[0][key] for key in ("train_accuracy", "test_accuracy", "seconds") if last}


def _arrays(networks: Mapping[str, Network]) -> dict[str, Any]:
    import numpy as np

    return {
        f"{name}/{place}/{biases.layer}": np.array(biases.values)
        for name, network in networks.items()
        for place, biases in enumerate(network)
    }


def _by_epoch(trained: Table) -> Table:
    """Average the shares over the networks, half by half."""
    rows = [
        {"epoch": row["epoch"], "half": half, "negative": row[half]}
        for row in trained
        for half in ("lower", "upper")
        if row.get(half) is not None
    ]
    return averages(rows, ("epoch", "half"), ("negative",))


def _trained(preset: BiasPreset, context: Context) -> tuple[dict[str, Network], Table]:
    """Train a network for each seed: their biases, and what was seen epoch by epoch."""
    sets = _loaded(preset, context)
    networks: dict[str, Network] = {}
    rows: Table = []
    for seed, share in zip(preset.seeds, Share(context).split([1.0] * len(preset.seeds)), strict=True):
        name = f"seed {seed}"

        def compute(folder: Path | None, seed: int = seed, share: Share = share) -> dict[str, Any]:
            return _fitted(preset, sets, seed, share, folder)

        found = part(context, str(seed), _name_of(sets), compute)
        networks[name] = tuple(Biases(layer, tuple(values)) for layer, values in found["layers"])
        rows += [{"network": name, **row} for row in found["epochs"]]
    return networks, rows


def _fitted(
    preset: BiasPreset, sets: "Sequence[Dataset]", seed: int, share: Share, folder: Path | None
) -> dict[str, Any]:
    """Train one network, as `part` keeps it."""
    import torch
    from torch import nn

    from thalweg.data import crop_and_flip
    from thalweg.errors import NumericalError
    from thalweg.objective import Objective
    from thalweg.training import fit

    net, data = _built(preset, sets[0], seed), (sets[0].inputs, sets[0].targets)
    device = share.context.device
    objective = Objective(net, nn.CrossEntropyLoss(), data, batch_size=min(_BATCH, len(data[1])), device=device)
    fitted = fit(
        objective,
        objective.theta(),
        epochs=preset.epochs,
        generator=torch.Generator().manual_seed(seed),
        batch_size=preset.batch_size,
        learning_rate=preset.learning_rate,
        momentum=0.9,
        weight_decay=preset.weight_decay,
        schedule="cosine",
        augment=crop_and_flip if preset.augment else None,
        observe=lambda epoch, module: _seen(module, sets[1]),
        keep=folder,
        progress=share.told(f"seed {seed}"),
    )
    if fitted.status == "diverged":
        raise NumericalError(
            f"Expected a training that ends finite. Got NaN or infinity in epoch {fitted.epochs + 1} of seed {seed}. "
            f"Take a smaller learning rate than {preset.learning_rate:g}."
        )
    fitted.write(net)
    # The accuracy in training is that of the mini-batches as the weights moved: there is none before the first.
    own = [None] if fitted.accuracies is None else [None, *fitted.accuracies.tolist()]
    epochs = [{"epoch": k, **row, "train_accuracy": own[k]} for k, row in enumerate(fitted.observations)]
    epochs[-1]["seconds"] = fitted.seconds
    return {"layers": bias_counts.of_state(net.state_dict()), "epochs": epochs}


def _built(preset: BiasPreset, data: "Dataset", seed: int) -> "nn.Module":
    import torch

    from thalweg import nets

    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        return nets.VGG(
            preset.stages,
            (),
            in_channels=int(data.inputs.shape[1]),
            image_size=int(data.inputs.shape[-1]),
            num_classes=data.num_classes or 10,
            norm="batch",
        )


def _seen(module: "nn.Module", test: "Dataset") -> dict[str, float]:
    """Measure the accuracy on the test images, and the shares of negative biases."""
    import torch

    network, device = bias_counts.of_state(module.state_dict()), next(module.parameters()).device
    with torch.no_grad():
        guesses = [module(images.to(device)).argmax(1).cpu() for images in torch.split(test.inputs, _BATCH)]
    accuracy = float((torch.cat(guesses) == test.targets).double().mean())
    shares = bias_counts.in_halves([network]) or {}
    return {"test_accuracy": accuracy, "negative": bias_counts.negative_share(network), **shares}


def _loaded(preset: BiasPreset, context: Context) -> "tuple[Dataset, Dataset]":
    """Load the images to train on and to test on, in single precision."""
    import torch

    from thalweg.data import cifar10, digits

    if preset.data == "digits":  # three in four to train on
        whole = digits(dtype=torch.float32)
        places = torch.arange(len(whole))
        train, test = whole.select(places[places % 4 > 0]), whole.select(places[places % 4 == 0])
        first, second = (
            torch.arange(min(n, len(s))) for n, s in ((preset.num_train, train), (preset.num_test, test))
        )
        return train.select(first), test.select(second)
    options: dict[str, Any] = {"data_root": context.data_root, "image_size": preset.image_size, "normalize": True}
    train = cifar10("train", num_samples=preset.num_train, **options)
    return train, cifar10("test", num_samples=preset.num_test, **options)


def _name_of(sets: "Sequence[Dataset]") -> str:
    """Hash the images: what was trained on others is not taken up."""
    import hashlib

    digest = hashlib.sha256()
    for tensor in (tensor for data in sets for tensor in (data.inputs, data.targets)):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def figures(tables: Tables) -> "Sequence[Figure]":
    """Draw the histograms, the share of negative biases over the layers and, where trained, over the epochs."""
    from thalweg.lab.figures import curves, histograms

    is_trained = "trained" in tables
    first = tables["networks"][0]
    origin = f"{first['origin']}, not the paper's weights" if is_trained else f"of {first['network']}"
    count = len(tables["networks"])
    band = "; the band spans them" if count > 1 else ""
    networks = f"{count} networks {origin}, all together" if count > 1 else f"Weights {origin}"
    drawn = [
        histograms(
            tables["histograms"],
            id="histograms",
            title=f"Biases of BatchNorm, layer by layer ({origin})",
            caption=f"{networks}. Layer 0 is nearest to the input.",
            panel="layer",
            x_title="bias",
        ),
        curves(
            tables["by_layer"],
            id="layers",
            title="Share of negative biases over the layers",
            caption=f"{networks}{band}. Biases of exactly 0 count as not negative.",
            x="place",
            y="negative",
            lower="negative_least",
            upper="negative_most",
            x_title="layer, from the input",
            y_title="share of negative biases",
        ),
    ]
    if tables.get("by_epoch"):
        drawn.append(
            curves(
                [{**row, "half": f"{row['half']} half of the layers"} for row in tables["by_epoch"]],
                id="epochs",
                title="Share of negative biases over the training",
                caption="All biases start at exactly 0, neither negative nor positive. The band spans the networks.",
                x="epoch",
                y="negative",
                series="half",
                lower="negative_least",
                upper="negative_most",
                x_title="epochs",
                y_title="share of negative biases",
            )
        )
    return drawn


RECIPE = Recipe(
    name="luck_matters/figure_6",
    title="Biases of BatchNorm: are most of them negative?",
    source="tian2019luck, figures 6 and 16",
    version=1,
    presets={"paper": PAPER, "paper_vgg11": PAPER_VGG11, "cpu": CPU, "quick": QUICK},
    claims=(
        Claim(
            "majority",
            "The majority of BatchNorm biases are negative: least share among the networks.",
            "above 0.5, of VGG16 and VGG11 trained on ImageNet",
            "more than 0.5 of all biases of each network; one of exactly 0 is not negative",
            lambda m: m > 0.5,
        ),
        Claim(
            "top",
            "In particular for the top layers: share of negative biases in the lower and the upper half of the "
            "layers.",
            "larger in the upper half",
            "in the upper half at least that of the lower half, all networks together; an odd middle layer in "
            "neither",
            lambda m: m["upper"] >= m["lower"],
        ),
    ),
    run=run,
    figures=figures,
    summary=(
        "A node behind a negative BatchNorm bias fires on less than half of the data, so that two nodes seldom fire "
        "together: what theorems 4 and 5 assume. The paper counts the biases of torchvision's VGG16 and VGG11, "
        "trained on ImageNet. These weights do not come with thalweg: without a checkpoint, networks of the same "
        "layout are trained here on CIFAR-10 (quick: on digits), and what is shown is theirs, not the paper's. "
        "thalweg run luck_matters/figure_6 --checkpoint FILE counts the biases of any network's file."
    ),
)
