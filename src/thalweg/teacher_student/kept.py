"""kept: the files from which an interrupted training of students goes on, named by everything that decides it."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, uint8

import thalweg
from thalweg.checkpoint import load_metadata, load_state, save_state
from thalweg.errors import CheckpointError
from thalweg.training.naming import named

Observations = Mapping[str, Tensor]


class KeptFalls:
    """A folder with the state of a training, and a file for what was observed at each step.

    Args:
        folder: made when first written.
        name: of the training.
    """

    def __init__(self, folder: str | os.PathLike[str], name: str) -> None:
        self._folder = Path(folder) / f"students-{name}"

    def observe(self, step: int, found: Mapping[int, Observations]) -> None:
        """Write what was seen at a step, by the number of the pair.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        tensors = {f"{k}/{name}": value for k, seen in found.items() for name, value in seen.items()}
        if tensors:
            save_state(self._folder / f"{step}.safetensors", tensors)

    def write(self, step: int, tensors: Mapping[str, Tensor], words: Any) -> None:
        """Write the state after a step; a reader sees the old one or the new one.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        save_state(self._state, tensors, {"step": str(step), "words": json.dumps(words)})

    def read(self) -> tuple[int, dict[str, Tensor], Any] | None:
        """Read the state: the step, tensors and words; None where there is none that can be read."""
        try:
            words = load_metadata(self._state)
            return int(words["step"]), load_state(self._state), json.loads(words["words"])
        except (CheckpointError, KeyError, ValueError):
            return None

    def observed(self, step: int) -> dict[str, Tensor]:
        """Read what was seen at a step, "number of the pair/name" -> tensor.

        Raises:
            CheckpointError: there is nothing that can be read.
        """
        return load_state(self._folder / f"{step}.safetensors")

    @property
    def _state(self) -> Path:
        return self._folder / "state.safetensors"


def falls_name(settings: Iterable[Any], tensors: Iterable[Tensor]) -> str:
    """Name a training by what decides it, to the last bit.

    Args:
        settings: words, numbers and functions; a function counts with its source, without the data that it holds.
        tensors: weights, masks, states of the sources, learning rates.

    Returns:
        Sixteen hexadecimal digits.

    Example:
        >>> falls_name([64], []) == falls_name([65], [])
        False
    """
    words = [named(value) if callable(value) else repr(value) for value in settings]
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", repr((thalweg.__version__, words)))
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
