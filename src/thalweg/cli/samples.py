"""Data of a user's own in the forms that an Objective takes: tensors, or batches that are the same every time."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from thalweg.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import DataLoader

BATCH_SIZE = 500
"""Samples of a batch, where the user says nothing. Chosen by us: it divides the sets of 10,000, 50,000 and 60,000
images evenly, and the graphs of a Hessian product of a ResNet fit into a few GB. Sums are exact at any size."""


@dataclass(frozen=True)
class Samples:
    """Data as an Objective takes them.

    Args:
        data: a pair (inputs, targets) of tensors, or a re-iterable of batches.
        origin: what they are, in words.
        num_samples: how many; None where only reading them would tell.
    """

    data: Any
    origin: str
    num_samples: int | None

    @property
    def is_pair(self) -> bool:
        """Whether the data are tensors that are not in batches yet."""
        return isinstance(self.data, tuple)


def settled(found: Any, origin: str, batch_size: int | None = None) -> Samples:
    """Bring what a user gives into one of the two forms that an Objective takes.

    Args:
        found: (inputs, targets) of tensors or arrays, a data set of thalweg or torch, a DataLoader, or a list or
            another re-iterable of batches.
        origin: what it is, in words.
        batch_size: samples of a batch, for a torch data set or a DataLoader.

    Raises:
        ConfigError: a batch size is given for batches that are cut.
        DataError: it is of another form, empty, not of numbers, or differs from pass to pass.
    """
    from torch.utils.data import DataLoader, TensorDataset
    from torch.utils.data import Dataset as TorchDataset

    from thalweg.data import Dataset

    if isinstance(found, Dataset):
        return _pair(found.inputs, found.targets, f"{found.name} ({found.source})")
    if isinstance(found, TensorDataset) and len(found.tensors) == 2:
        return _pair(*found.tensors, origin)
    if isinstance(found, tuple | list) and len(found) == 2 and _is_array(found[1]):
        return _pair(found[0], found[1], origin)
    if isinstance(found, TorchDataset):
        found = DataLoader(found, batch_size=batch_size or BATCH_SIZE)
    if isinstance(found, DataLoader):
        samples = Samples(_in_order(found, batch_size, origin), origin, _length(found.dataset))
    elif not isinstance(found, Iterable) or isinstance(found, Iterator | tuple | str | Mapping) or _is_array(found):
        raise DataError(
            f"Expected {origin} to give (inputs, targets), a data set, a DataLoader, a list of batches, or a dict of "
            f"them by train and test. Got a {type(found).__name__}. Mend what --data names."
        )
    elif batch_size is not None:
        raise ConfigError(f"Expected no --batch-size with {origin}. Got batches that are cut. Leave it out.")
    else:
        samples = Samples(found, origin, _total(found) if isinstance(found, list) else None)
    first_batch(samples)
    _require_the_same_again(samples)
    return samples


def _total(batches: list[Any]) -> int | None:
    """Count the samples of a list of batches; None where they are not one row each."""
    from thalweg.batching import num_samples

    try:
        return sum(num_samples(batch) for batch in batches)
    except DataError:
        return None


def _pair(inputs: Any, targets: Any, origin: str) -> Samples:
    import torch

    from thalweg.batching import num_samples

    inputs = _converted(inputs, origin)
    targets = _converted(targets, origin)
    if targets.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        targets = targets.long()  # what torch's losses take for class labels
    if not targets.ndim or not len(targets):
        raise DataError(f"Expected at least one sample. Got none of {origin}. Check the data.")
    try:
        count = num_samples((inputs, targets))
    except DataError as error:
        raise DataError(
            f"Expected as many inputs as targets of {origin}. Got {_lengths(inputs)} and {len(targets)}. "
            "Check the data."
        ) from error
    return Samples((inputs, targets), origin, count)


def _lengths(inputs: Any) -> str:
    from torch.utils._pytree import tree_leaves

    return ", ".join(str(len(leaf)) if leaf.ndim else "a single number" for leaf in tree_leaves(inputs))


def _converted(value: Any, origin: str) -> Any:
    """Make tensors of arrays, through tuples, lists and dicts."""
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, np.ndarray):
        try:
            return torch.from_numpy(np.array(value))
        except (TypeError, ValueError) as error:
            raise DataError(f"Expected numbers of {origin}. Got the type {value.dtype}. Convert it.") from error
    if isinstance(value, tuple | list) and value:
        return tuple(_converted(v, origin) for v in value)
    if isinstance(value, Mapping) and value:
        return {str(k): _converted(v, origin) for k, v in value.items()}
    raise DataError(f"Expected tensors of {origin}. Got a {type(value).__name__}. Convert it.")


def _is_array(value: object) -> bool:
    import numpy as np
    from torch import Tensor

    return isinstance(value, Tensor | np.ndarray)


def _length(dataset: Any) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None


def _in_order(loader: "DataLoader[Any]", batch_size: int | None, origin: str) -> "DataLoader[Any]":
    """Take shuffling out of a loader: a landscape has the same samples on every pass."""
    from torch.utils.data import DataLoader, RandomSampler, WeightedRandomSampler

    is_shuffled = isinstance(loader.sampler, RandomSampler)
    is_redrawn = getattr(loader.sampler, "replacement", False) or isinstance(loader.sampler, WeightedRandomSampler)
    if is_redrawn:
        raise DataError(
            f"Expected {origin} to give the same samples on every pass. Got a {type(loader.sampler).__name__}, which "
            "draws others. Give its data set."
        )
    if loader.batch_size is None or not (is_shuffled or batch_size):
        return loader
    return DataLoader(
        loader.dataset,
        batch_size=batch_size or loader.batch_size,
        sampler=None if is_shuffled else loader.sampler,
        collate_fn=loader.collate_fn,
    )


def _require_the_same_again(samples: Samples) -> None:
    """Read the first batch twice: random augmentation would make another landscape of every pass."""
    import torch
    from torch.utils._pytree import tree_leaves
    from torch.utils.data import SubsetRandomSampler

    if isinstance(samples.data, list) or isinstance(getattr(samples.data, "sampler", None), SubsetRandomSampler):
        return
    one, two = (tree_leaves(first_batch(samples)) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        if isinstance(a, torch.Tensor) and not _is_same(a, b):
            raise DataError(
                f"Expected {samples.origin} to give the same batches on every pass. Got other numbers in the first "
                "batch when it was read again. Leave out random augmentation and shuffling."
            )


def _is_same(one: "Tensor", two: "Tensor") -> bool:
    is_number = one == one  # noqa: PLR0124 - NaN alone differs from itself
    return one.shape == two.shape and bool(((one == two) | ~is_number).all())


def first_batch(samples: Samples) -> tuple[Any, Any]:
    """Read the first batch.

    Raises:
        DataError: there is none, it is no pair, or reading it fails.
    """
    if samples.is_pair:
        inputs, targets = samples.data
        return inputs, targets
    try:
        found = next(iter(samples.data), None)
    except Exception as error:  # whatever a user's loader raises
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        raise DataError(f"Expected {samples.origin} to give batches. Got {reason}. Mend it.") from error
    if found is None:
        raise DataError(f"Expected at least one batch. Got none of {samples.origin}. Check the data.")
    if not isinstance(found, tuple | list) or len(found) != 2:
        got = f"{len(found)} parts" if isinstance(found, tuple | list) else f"a {type(found).__name__}"
        raise DataError(
            f"Expected batches (inputs, targets) of {samples.origin}. Got {got}. "
            "Give pairs; inputs may be a tuple, or a dict of keyword arguments."
        )
    return found[0], found[1]
