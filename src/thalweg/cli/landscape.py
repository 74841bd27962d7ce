"""A user's landscape on the command line: their data, a loss, and the objective that these make of a module."""

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thalweg.cli.references import called, find_object
from thalweg.cli.samples import BATCH_SIZE, Samples, first_batch
from thalweg.cli.sources import Split, find_samples
from thalweg.errors import ConfigError, DataError
from thalweg.lab.suggest import did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import nn

    from thalweg.objective import Objective

Data = Annotated[
    str,
    typer.Option(
        metavar="NAME|FOLDER|FILE|PKG.MOD:LOADER",
        help="A set of thalweg.data, a folder of one, a .npz or .safetensors file, or what gives (inputs, targets).",
    ),
]
DataArguments = Annotated[
    list[str] | None,
    typer.Option("--data-arg", metavar="KEY=VALUE", help="Argument of what loads the data; repeat for more."),
]
DataSplit = Annotated[
    str | None, typer.Option("--split", metavar="train|test", help="Which split of the data. Default: train.")
]
NumSamples = Annotated[
    int | None,
    typer.Option("--samples", metavar="N", min=1, help="A fixed random sample of the data. Default: all."),
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of everything that is drawn.")]
BatchSize = Annotated[
    int | None, typer.Option(metavar="N", min=1, help=f"Samples computed at once. Default: {BATCH_SIZE}.")
]
Loss = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|PKG.MOD:NAME",
        help="The loss. Default: cross_entropy for class labels, mse for floating targets.",
    ),
]

_ON_CLASSES = {"cross_entropy": "CrossEntropyLoss", "nll": "NLLLoss"}
_ON_NUMBERS = {
    "mse": "MSELoss",
    "l1": "L1Loss",
    "smooth_l1": "SmoothL1Loss",
    "huber": "HuberLoss",
    "bce": "BCELoss",
    "bce_with_logits": "BCEWithLogitsLoss",
    "poisson_nll": "PoissonNLLLoss",
}


@dataclass(frozen=True)
class Landscape:
    """Data and a loss: what makes a landscape of a module.

    Args:
        data: what the landscape is of.
        test_data: data to compare it with; None where there are none, or none were asked for.
        loss: `loss(outputs, targets)`.
        data_words: where the data come from, and how many samples they are.
        test_words: the same of the test data; empty where there are none.
        loss_words: which loss, and why.
        batch_size: samples computed at once, of data that do not come in batches.
    """

    data: Samples
    test_data: Samples | None
    loss: Any
    data_words: str
    test_words: str
    loss_words: str
    batch_size: int

    @property
    def words(self) -> str:
        """Data and loss, in one line."""
        return f"{self.data_words}; loss: {self.loss_words}"


def load_landscape(  # noqa: PLR0913 - one argument per option of the command line
    data: str,
    *,
    data_root: Path | None = None,
    arguments: Sequence[str] | None = None,
    split: str | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    loss: str | None = None,
    with_test: bool = False,
) -> Landscape:
    """Load a user's data, draw a sample if one is wanted, and choose the loss.

    Args:
        data: a set of thalweg.data, a folder of one, a file, or `module:name`.
        data_root: folder of the known sets.
        arguments: words `key=value` for what loads the data.
        split: "train" or "test". Default: "train", or data without a split.
        num_samples: draw so many samples, of the test data too if they are more. Default: all.
        seed: of that draw.
        batch_size: samples computed at once.
        loss: name of a loss, or `module:name`. Default: by the targets.
        with_test: load the test data as well.

    Returns:
        Data, loss, and both in words.

    Raises:
        ConfigError: an option is wrong, or does not fit the data.
        DataError: the data are missing, damaged, empty or of an unknown form.
    """
    if split not in (None, "train", "test"):
        raise ConfigError(f"Expected --split train or test. Got {split!r}. Leave it out for train.")
    wanted: Split = "test" if split == "test" else "train"
    splits: tuple[Split, ...] = ("train", "test") if with_test and wanted == "train" else (wanted,)
    found = find_samples(data, splits, data_root=data_root, arguments=arguments or (), batch_size=batch_size)
    if wanted not in found:
        raise ConfigError(f"Expected --split of data that have one. Got {data}, which has no {wanted}. Leave it out.")
    chosen, name, loss_words = _loss(loss, found[wanted])
    size = batch_size or BATCH_SIZE
    taken, data_words = _drawn(found[wanted], num_samples, seed, size)
    test, test_words = None, ""
    if wanted == "train" and "test" in found:
        total = found["test"].num_samples
        most = min(num_samples, total) if num_samples and total else num_samples
        test, test_words = _drawn(found["test"], most, seed, size)
    if name in _ON_NUMBERS:
        taken, test = _with_numbers(taken), test and _with_numbers(test)
    return Landscape(taken, test, chosen, data_words, test_words, loss_words, size)


def objective_on(
    landscape: Landscape,
    module: "nn.Module",
    *,
    is_test: bool = False,
    dtype: "torch.dtype | None" = None,
    device: "torch.device | str | None" = None,
) -> "Objective":
    """Make the objective of a module.

    Args:
        landscape: data and loss.
        module: the network.
        is_test: take the test data.
        dtype: floating type of the computation. Default: the module's own.
        device: where to compute. Default: where the module is.

    Returns:
        The landscape of the module.

    Raises:
        DataError: there are no test data.
        ShapeError: the module has no trainable parameter.
        StructureError: the module cannot be copied.
    """
    from thalweg.objective import Objective

    samples = landscape.test_data if is_test else landscape.data
    if samples is None:
        raise DataError("Expected test data. Got none. Give data that have a test split.")
    batch_size = landscape.batch_size if samples.is_pair else None
    return Objective(module, landscape.loss, samples.data, batch_size=batch_size, dtype=dtype, device=device)


def _drawn(samples: Samples, count: int | None, seed: int, batch_size: int) -> tuple[Samples, str]:
    """Draw a sample, and word what is taken of what."""
    import torch

    from thalweg.batching import drawn, pieces

    total = samples.num_samples
    if count is None or count == total:
        return samples, f"{'batches' if total is None else _counted(total)} of {samples.origin}"
    if total is not None and count > total:
        raise ConfigError(f"Expected --samples of at most {total:,}. Got {count:,}. Leave it out for all.")
    batches = [samples.data] if samples.is_pair else samples.data
    inputs, targets = drawn(batches, count, torch.Generator().manual_seed(seed))
    of = "samples" if total is None else f"{total:,} samples"
    words = f"{count:,} of the {of} of {samples.origin}, drawn at random with seed {seed}"
    if isinstance(targets, torch.Tensor):
        return replace(samples, data=(inputs, targets), num_samples=count), words
    return replace(samples, data=list(pieces((inputs, targets), batch_size)), num_samples=count), words


def _counted(count: int) -> str:
    return f"{count:,} sample{'s' if count > 1 else ''}"


def _loss(word: str | None, samples: Samples) -> tuple[Any, str, str]:
    """Give the loss, its name, and both in words."""
    from torch import nn

    if word is not None and ":" in word:
        return _own_loss(word), "", word
    name, why = (word, "") if word is not None else _usual(first_batch(samples)[1])
    kinds = _ON_CLASSES | _ON_NUMBERS
    if name not in kinds:
        hint = did_you_mean(name, kinds) or "Or name your own: module:name."
        raise ConfigError(f"Expected --loss {', '.join(kinds)} or module:name. Got {name!r}. {hint}")
    return getattr(nn, kinds[name])(), name, f"{name}{why}"


def _usual(targets: Any) -> tuple[str, str]:
    """Choose a loss by the targets."""
    from torch import Tensor

    if isinstance(targets, Tensor) and targets.is_floating_point():
        return "mse", " (default for floating targets)"
    if isinstance(targets, Tensor) and "int" in str(targets.dtype):
        return "cross_entropy", " (default for class labels)"
    got = str(targets.dtype) if isinstance(targets, Tensor) else f"a {type(targets).__name__}"
    raise ConfigError(f"Expected --loss for targets that are no labels and no numbers. Got {got}. Name the loss.")


def _own_loss(reference: str) -> Any:
    from torch import nn

    found = find_object(reference)
    if isinstance(found, type) and issubclass(found, nn.Module):
        found = called(found, {}, name=reference, purpose="be built without arguments", option="functools.partial,")
    if not callable(found):
        raise ConfigError(
            f"Expected {reference} to be a loss. Got one of type {type(found).__name__}. Name a function."
        )
    if not isinstance(found, nn.Module | functools.partial):
        try:
            inspect.signature(found).bind(None, None)
        except TypeError as error:
            raise ConfigError(
                f"Expected {reference} to take (outputs, targets). Got {error}. Fix its other arguments with "
                "functools.partial."
            ) from error
        except ValueError:  # built in: what it takes is found when it runs
            pass
    return found


def _with_numbers(samples: Samples) -> Samples:
    """Make numbers of whole targets, 0 and 1 among them, for a loss that compares numbers."""
    if not samples.is_pair:
        return samples
    inputs, targets = samples.data
    return samples if targets.is_floating_point() else replace(samples, data=(inputs, targets.double()))
