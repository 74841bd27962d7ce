"""Real images from a local folder in the Hugging Face parquet layout, decoded once into a mapped cache."""

import hashlib
import io
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from thalweg.data.dataset import Dataset
from thalweg.errors import DataError

Split = Literal["train", "test"]
Bytes = NDArray[np.uint8]

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.parquet$")


@dataclass(frozen=True)
class _Layout:
    """Where a data set lies below the root, and its published per-channel statistics on [0, 1]."""

    name: str
    folder: str
    image_column: str
    num_classes: int
    means: tuple[float, ...]
    stds: tuple[float, ...]
    source: str
    label_column: str = "label"


# MNIST: mean and standard deviation of the training images. CIFAR-10: as the code of dascoli2019finding has
# them; its standard deviations are 1 % off the files' own. That code takes them for CIFAR-100 as well.
_MNIST = _Layout("mnist", "mnist/mnist", "image", 10, (0.1307,), (0.3081,), "ylecun/mnist")
_CIFAR10 = _Layout(
    *("cifar10", "cifar10/plain_text", "img", 10),
    (0.491, 0.482, 0.447),
    (0.247, 0.243, 0.262),
    "uoft-cs/cifar10",
)
_CIFAR100 = _Layout(
    *("cifar100", "cifar100/cifar100", "img", 100),
    *(_CIFAR10.means, _CIFAR10.stds),
    *("uoft-cs/cifar100", "fine_label"),
)


def mnist(
    split: Split = "train",
    *,
    data_root: str | Path | None = None,
    num_samples: int | None = None,
    image_size: int | None = None,
    normalize: bool = False,
    dtype: torch.dtype = torch.float32,
    cache: str | Path | None = None,
) -> Dataset:
    """Load MNIST: 60,000 and 10,000 handwritten digits of 28×28 pixels, grey levels in [0, 1].

    Args:
        split: "train" or "test".
        data_root: folder that holds `mnist/mnist/*.parquet`. Default: the environment's THALWEG_DATA.
        num_samples: keep only the first so many.
        image_size: shrink to this height and width by averaging over areas.
        normalize: subtract 0.1307 and divide by 0.3081, the data set's mean and standard deviation.
        dtype: of the inputs.
        cache: folder of the decoded images. Default: THALWEG_CACHE, else `thalweg` in the user's cache.

    Returns:
        inputs of shape (samples, 1, size, size), class numbers of shape (samples,).

    Raises:
        DataError: no folder is given, a file is missing or damaged, the cache cannot be written, or the
            optional libraries that read and decode the files are not installed.

    Source:
        LeCun, Cortes and Burges; the files of `ylecun/mnist` on the Hugging Face hub.
    """
    pixels = _pixels(_MNIST, split, data_root, cache, num_samples)
    return _prepared(pixels, _MNIST, image_size, normalize, dtype)


def cifar10(
    split: Split = "train",
    *,
    data_root: str | Path | None = None,
    num_samples: int | None = None,
    image_size: int | None = None,
    normalize: bool = False,
    dtype: torch.dtype = torch.float32,
    cache: str | Path | None = None,
) -> Dataset:
    """Load CIFAR-10: 50,000 and 10,000 photographs of 32×32 pixels, colours in [0, 1].

    Args:
        split: "train" or "test".
        data_root: folder that holds `cifar10/plain_text/*.parquet`. Default: the environment's THALWEG_DATA.
        num_samples: keep only the first so many.
        image_size: shrink to this height and width by averaging over areas.
        normalize: subtract (0.491, 0.482, 0.447) and divide by (0.247, 0.243, 0.262), channel by channel.
        dtype: of the inputs.
        cache: folder of the decoded images. Default: THALWEG_CACHE, else `thalweg` in the user's cache.

    Returns:
        inputs of shape (samples, 3, size, size), class numbers of shape (samples,).

    Raises:
        DataError: no folder is given, a file is missing or damaged, the cache cannot be written, or the
            optional libraries that read and decode the files are not installed.

    Source:
        Krizhevsky (2009); the files of `uoft-cs/cifar10` on the Hugging Face hub. The statistics are those
        of the code of dascoli2019finding (arXiv 1906.06766).
    """
    pixels = _pixels(_CIFAR10, split, data_root, cache, num_samples)
    return _prepared(pixels, _CIFAR10, image_size, normalize, dtype)


def cifar100(
    split: Split = "train",
    *,
    data_root: str | Path | None = None,
    num_samples: int | None = None,
    image_size: int | None = None,
    normalize: bool = False,
    dtype: torch.dtype = torch.float32,
    cache: str | Path | None = None,
) -> Dataset:
    """Load CIFAR-100: 50,000 and 10,000 photographs of 32×32 pixels in 100 fine classes, colours in [0, 1].

    Args:
        split: "train" or "test".
        data_root: folder that holds `cifar100/cifar100/*.parquet`. Default: the environment's THALWEG_DATA.
        num_samples: keep only the first so many.
        image_size: shrink to this height and width by averaging over areas.
        normalize: subtract (0.491, 0.482, 0.447) and divide by (0.247, 0.243, 0.262), channel by channel: the
            statistics of CIFAR-10.
        dtype: of the inputs.
        cache: folder of the decoded images. Default: THALWEG_CACHE, else `thalweg` in the user's cache.

    Returns:
        inputs of shape (samples, 3, size, size), numbers of the fine classes of shape (samples,).

    Raises:
        DataError: no folder is given, a file is missing or damaged, the cache cannot be written, or the
            optional libraries that read and decode the files are not installed.

    Source:
        Krizhevsky (2009); the files of `uoft-cs/cifar100` on the Hugging Face hub. The statistics are those
        of the code of dascoli2019finding (arXiv 1906.06766), which takes CIFAR-10's for both.
    """
    pixels = _pixels(_CIFAR100, split, data_root, cache, num_samples)
    return _prepared(pixels, _CIFAR100, image_size, normalize, dtype)


def known_sets(folder: str | Path) -> dict[str, Path]:
    """Find the data sets of this module by a folder: their root, the folder of one, or one within it.

    Args:
        folder: where to look.

    Returns:
        Name of a set -> its `data_root`, for every set of which there are files.

    Example:
        >>> known_sets("nowhere")
        {}
    """
    here, found = Path(os.path.abspath(folder)), {}
    for layout in (_MNIST, _CIFAR10, _CIFAR100):
        parts = Path(layout.folder).parts
        depths = [n for n in range(1, len(parts) + 1) if here.parts[-n:] == parts[:n]]
        for root in (here, *(here.parents[n - 1] for n in depths)):
            if any((root / layout.folder).glob("*.parquet")):
                found[layout.name] = root
    return found


def _pixels(
    layout: _Layout,
    split: Split,
    data_root: str | Path | None,
    cache: str | Path | None,
    num_samples: int | None,
) -> Dataset:
    """Give the first samples as bytes, copied out of the mapped cache."""
    images, labels = _decoded(layout, split, data_root, cache)
    name = f"{layout.name}-{split}"
    count = len(labels) if num_samples is None else num_samples
    if not 0 < count <= len(labels):
        raise DataError(
            f"Expected between 1 and {len(labels)} samples of {name}. Got {count}. Ask for another number."
        )
    inputs, targets = (torch.from_numpy(np.array(part[:count])) for part in (images, labels))
    return Dataset(inputs, targets, layout.num_classes, name, f"{layout.source}, {split}, first {count}")


def _prepared(
    pixels: Dataset, layout: _Layout, image_size: int | None, normalize: bool, dtype: torch.dtype
) -> Dataset:
    inputs, source = pixels.inputs.to(dtype).div_(255), f"{pixels.source}, values in [0, 1]"
    if image_size is not None:
        if not 0 < image_size <= inputs.shape[-1]:
            raise DataError(
                f"Expected an image size between 1 and {inputs.shape[-1]} for {pixels.name}. "
                f"Got {image_size}. Images are only ever shrunk."
            )
        inputs = adaptive_avg_pool2d(inputs, image_size)
        source += f", shrunk to {image_size}×{image_size}"
    if normalize:
        inputs.sub_(_per_channel(layout.means, dtype)).div_(_per_channel(layout.stds, dtype))
        source += f", minus {layout.means}, over {layout.stds}"
    return replace(pixels, inputs=inputs, source=source)


def _per_channel(values: Sequence[float], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype).reshape(-1, 1, 1)


def _decoded(
    layout: _Layout, split: Split, data_root: str | Path | None, cache: str | Path | None
) -> tuple[Bytes, NDArray[np.int64]]:
    """Give the decoded images (samples, channels, height, width), mapped from the cache, and the labels."""
    shards = _shards(layout, split, data_root)
    stem = f"{layout.name}-{split}-{_fingerprint(shards)}"
    folder = _cache_folder(cache)
    files = folder / f"{stem}-images.npy", folder / f"{stem}-labels.npy"
    try:
        return np.load(files[0], mmap_mode="r"), np.load(files[1])
    except (OSError, ValueError, EOFError):  # not there yet, or damaged: decode again
        decoded = _decode(layout, shards)
    _publish(files[0], decoded[0])
    _publish(files[1], decoded[1])
    return decoded


def _shards(layout: _Layout, split: Split, data_root: str | Path | None) -> list[Path]:
    root = data_root or os.environ.get("THALWEG_DATA")
    if not root:
        raise DataError(f"Expected a folder with {layout.folder}. Got none. Pass --data-root or set THALWEG_DATA.")
    folder = Path(root) / layout.folder
    found = sorted(p for p in folder.glob(f"{split}-*.parquet") if _SHARD.search(p.name))
    totals = {int(match[2]) for p in found if (match := _SHARD.search(p.name))}
    if not found or totals != {len(found)}:
        wanted = max(totals, default=1)
        raise DataError(
            f"Expected {wanted} file(s) {folder}/{split}-*-of-{wanted:05d}.parquet. Got {len(found)}. "
            f"Copy the files of {layout.source} there, or change --data-root."
        )
    return found


def _fingerprint(shards: Sequence[Path]) -> str:
    """Name a version of the files by what a copy or a change alters, without reading them."""
    facts = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in shards]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _cache_folder(cache: str | Path | None) -> Path:
    if chosen := cache or os.environ.get("THALWEG_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "thalweg"


def _decode(layout: _Layout, shards: Sequence[Path]) -> tuple[Bytes, NDArray[np.int64]]:
    try:
        polars, image = import_module("polars"), import_module("PIL.Image")
    except ImportError as error:
        raise DataError(
            f"Expected polars and pillow, to read {layout.name}. Got no {error.name}. "
            "Install them: pip install 'thalweg[tables]'."
        ) from error
    images: list[Bytes] = []
    labels: list[int] = []
    for shard in shards:
        try:
            table = polars.read_parquet(shard, columns=[layout.image_column, layout.label_column])
            encoded = table[layout.image_column].struct.field("bytes")
            images.append(np.stack([_channels_first(image.open(io.BytesIO(e))) for e in encoded]))
            labels.extend(table[layout.label_column])
        except (OSError, TypeError, ValueError, polars.exceptions.PolarsError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"Expected a parquet file of encoded images and labels. Got {shard}: {reason}. "
                "Copy or download it again."
            ) from error
    return np.concatenate(images), np.array(labels, dtype=np.int64)


def _channels_first(image: Any) -> Bytes:
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _publish(path: Path, array: NDArray[Any]) -> None:
    """Write an array so that a reader sees all of it or none."""
    aside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as stream:
            np.save(stream, array)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise DataError(
            f"Expected a cache folder that can be written. Got {path.parent}: {error.strerror or error}. "
            "Set THALWEG_CACHE to another folder."
        ) from error
    finally:
        if aside.parent.is_dir():
            aside.unlink(missing_ok=True)
