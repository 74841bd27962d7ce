"""Parts of a long measurement on disk, each kept as soon as it is whole and named by what decides it."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import thalweg
from thalweg.lab.files import write_whole
from thalweg.lab.plain import canonical, plain

Value = dict[str, Any]


def digest(values: Iterable[Any]) -> str:
    """Hash tensors by their bytes, and anything else by its words.

    Args:
        values: tensors, and what has a stable text.
    """
    import torch

    found = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            found.update(f"{value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(value).encode())
    return found.hexdigest()


@dataclass(frozen=True)
class Parts:
    """Results on disk, one file for each part, named by what decides it.

    Args:
        folder: where they lie.
        workers: processes for slices; they decide nothing.
    """

    folder: Path
    workers: int = 1

    def kept(self, identity: Mapping[str, Any], compute: Callable[[], Value]) -> Value:
        """Read a part, or compute it and write it, whole or not at all.

        Raises:
            StoreError: it cannot be written.
        """
        name = hashlib.sha256(canonical({**identity, "thalweg": thalweg.__version__}).encode()).hexdigest()[:32]
        path = self.folder / f"{name}.json"
        try:
            found: Any = json.loads(path.read_bytes())
        except (OSError, ValueError):  # not there yet, or not ours
            found = None
        if not isinstance(found, dict):
            found = plain(compute())
            write_whole(path, json.dumps(found, allow_nan=False).encode())
        value: Value = found
        return value
