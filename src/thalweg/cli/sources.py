"""Where a user's data come from: a known set, a folder of one, a file of tensors, or code of their own."""

import inspect
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError

from thalweg.cli.references import called, find_object, keywords_of
from thalweg.cli.samples import Samples, settled
from thalweg.errors import ConfigError, DataError
from thalweg.lab.suggest import did_you_mean

if TYPE_CHECKING:
    from thalweg.data import Dataset

Split = Literal["train", "test"]

_OPTION = "--data-arg"
_SETTLED_HERE = ("split", "data_root", "dtype")  # by --split, by --data-root, by the checkpoint
_DAMAGES = (  # what reading a damaged or foreign file raises; an encrypted archive is a RuntimeError
    *(SafetensorError, zipfile.BadZipFile, zlib.error, OSError, EOFError),
    *(ValueError, TypeError, AttributeError, RuntimeError),
)
_PLACES = (("inputs", "targets"), ("x", "y"))


def find_samples(
    data: str, splits: Sequence[Split], *, data_root: Path | None, arguments: Sequence[str], batch_size: int | None
) -> dict[Split, Samples]:
    """Find what --data names, and load the wanted splits of it.

    Args:
        data: a set of thalweg.data, a folder, a file, or `module:name`.
        splits: what is wanted; data without a split are "train".
        data_root: folder of the known sets.
        arguments: words `key=value` for what loads the data.
        batch_size: samples of a batch, for data that are read item by item.

    Returns:
        What there is of the wanted splits.

    Raises:
        ConfigError: there is no such set, file or name, or it does not take the arguments.
        DataError: the data are missing, damaged, empty, of an unknown form, or differ from pass to pass.
    """
    keywords, path = keywords_of(arguments, _OPTION), Path(data)
    if data.isidentifier() and (load := _known().get(data)):
        return _from_set(load, splits, keywords, data_root)
    if path.is_dir():
        return _from_folder(path, splits, keywords)
    if path.suffix in (".npz", ".safetensors") or path.is_file():
        if keywords:
            raise ConfigError(f"Expected no {_OPTION} with a file. Got {', '.join(keywords)}. Leave it out.")
        return _from_file(path, splits)
    if ":" in data:
        return _from_code(data, splits, keywords, batch_size)
    if not data.isidentifier():
        raise DataError(f"Expected a folder or a file of data. Got {data!r}, which is not there. Check the path.")
    raise ConfigError(
        f"Expected one of the sets {', '.join(sorted(_known()))}, a folder, a file or module:name. Got {data!r}. "
        f"{did_you_mean(data, _known()) or 'Check --data.'}"
    )


def _known() -> "dict[str, Callable[..., Dataset]]":
    """Functions of thalweg.data that give a data set, by name."""
    from thalweg import data

    functions = {n: f for n, f in vars(data).items() if inspect.isfunction(f)}
    return {n: f for n, f in functions.items() if inspect.signature(f).return_annotation is data.Dataset}


def _from_set(
    load: "Callable[..., Dataset]", splits: Sequence[Split], keywords: Mapping[str, Any], data_root: Path | None
) -> dict[Split, Samples]:
    taken = inspect.signature(load).parameters
    free = [name for name in taken if name not in _SETTLED_HERE]
    for name in keywords:
        if name not in free:
            hint = "Use --split." if name == "split" else did_you_mean(name, free) or "Leave it out."
            raise ConfigError(
                f"Expected {_OPTION} of {load.__name__}: {', '.join(free) or 'none'}. Got {name!r}. {hint}"
            )
    found: dict[Split, Samples] = {}
    for split in splits:
        own = dict(keywords)
        if "split" in taken:
            own |= {"split": split, "data_root": data_root}
            if split == "test":  # the first so many, of which there may be fewer
                own.pop("num_samples", None)
        elif split == "test":
            continue
        made = called(load, own, name=load.__name__, purpose="load data", option=_OPTION)
        if split == "test" and isinstance(keywords.get("num_samples"), int):
            made = made.select(min(keywords["num_samples"], len(made)))
        found[split] = settled(made, load.__name__, None)
    return found


def _from_folder(folder: Path, splits: Sequence[Split], keywords: Mapping[str, Any]) -> dict[Split, Samples]:
    from thalweg.data.hub import known_sets

    found = known_sets(folder)
    if len(found) == 1:
        ((name, root),) = found.items()
        return _from_set(_known()[name], splits, keywords, root)
    if found:
        raise ConfigError(
            f"Expected a folder of one data set. Got {folder}, which holds {' and '.join(found)}. "
            f"Write --data {folder / next(iter(found))}."
        )
    raise DataError(
        "Expected a folder in the Hugging Face layout of a known set: mnist/mnist/*.parquet, "
        f"cifar10/plain_text/*.parquet or cifar100/cifar100/*.parquet. Got {folder}, which holds none of them. "
        "Name a folder that does, or your own loader: --data file.py:name."
    )


def _from_file(path: Path, splits: Sequence[Split]) -> dict[Split, Samples]:
    tensors = _tensors_of(path)
    train = _pair_of(tensors, "") or _pair_of(tensors, "_train")
    if train is None:
        raise DataError(
            f"Expected inputs and targets (or x and y; with _train and _test, two splits) in {path}. "
            f"Got {', '.join(map(str, tensors)) or 'nothing'}. Save them under these names."
        )
    found: dict[Split, Samples] = {"train": settled(train, str(path), None)}
    if "test" in splits and (test := _pair_of(tensors, "_test")):
        found["test"] = settled(test, f"{path}, test", None)
    return found


def _pair_of(tensors: Mapping[str, Any], ending: str) -> tuple[Any, Any] | None:
    for x, y in _PLACES:
        if x + ending in tensors and y + ending in tensors:
            return tensors[x + ending], tensors[y + ending]
    return None


def _tensors_of(path: Path) -> dict[str, Any]:
    """Read a file of arrays; nothing in it is run."""
    import numpy as np
    from safetensors.torch import load_file

    if not path.is_file():
        raise DataError(f"Expected a file of data. Got {path}, which is not there. Check --data.")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        if path.suffix == ".npz":
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
    except _DAMAGES as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"Expected a whole {path.suffix} file of numbers. Got {path}: {reason}. Save it anew."
        ) from error
    raise ConfigError(
        f"Expected data in a .npz or .safetensors file. Got {path}. Save inputs and targets with numpy.savez, or "
        "write a loader: --data file.py:name."
    )


def _from_code(
    reference: str, splits: Sequence[Split], keywords: dict[str, Any], batch_size: int | None
) -> dict[Split, Samples]:
    from torch import Tensor

    found = find_object(reference)
    if callable(found) and not isinstance(found, Tensor):
        found = called(found, keywords, name=reference, purpose="load data", option=_OPTION)
    elif keywords:
        raise ConfigError(
            f"Expected a function for {_OPTION}. Got {reference} of type {type(found).__name__}. Leave it out."
        )
    if not isinstance(found, Mapping):
        return {"train": settled(found, reference, batch_size)}
    if not found.keys() & {"train", "test"}:
        got = ", ".join(map(str, found)) or "an empty dict"
        raise ConfigError(
            f"Expected {reference} to give train and test under these names. Got {got}. "
            "Rename them, or give (inputs, targets)."
        )
    return {s: settled(found[s], f"{reference}, {s}", batch_size) for s in splits if s in found}
