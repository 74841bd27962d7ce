"""kept: the books of a population's training, and the file that lets it go on after an interruption."""

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

import thalweg
from thalweg.checkpoint import load_metadata, save_state
from thalweg.errors import CheckpointError
from thalweg.objective import Objective
from thalweg.training.engines import DIVERGED, STOPPED, State

# Bytes of the points of least gradient. Chosen by us: the bound of `train`; 12,000 points of 200 trials x 13 params.
_THETA_BYTES = 256 * 2**20

_LEAST = ("least_steps", "least_losses", "least_l1", "least_thetas")


class Ledger:
    """The state of a population and all that is recorded of it; `is_whole` unless a step is under way.

    Args:
        state: where it stands.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self.step, self.seconds, self.is_closed, self.is_whole = 0, 0.0, False, True
        self._before = (0, state.theta.clone())  # step and points at the record under way
        self.sound = state.theta.clone()  # of each trial the last recorded finite point
        self.sound_step = torch.zeros_like(state.status)
        self.ended = torch.zeros_like(state.status)  # of a stopped trial the step
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self._least: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._limit = max(4, _THETA_BYTES // (state.theta.numel() * state.theta.element_size()))

    @property
    def num_records(self) -> int:
        """Records taken so far."""
        return len(self.losses)

    def open_stretch(self, step: int) -> None:
        """Begin a stretch at a record: put away the least points of the last one, remember the sound points."""
        if step > 0:
            self._put_away()
        self._before = (step, self.state.theta.clone())

    def note_record(self) -> None:
        """Take the record of the step that has just been measured."""
        gone = self.state.status == DIVERGED
        nan = torch.full_like(self.state.losses, math.nan)
        self.losses.append(torch.where(gone, nan, self.state.losses))
        self.norms.append(torch.where(gone, nan, self.state.norms))
        step, theta = self._before
        self.sound_step = torch.where(gone, self.sound_step, torch.full_like(self.sound_step, step))
        self.sound = torch.where(gone.unsqueeze(1), self.sound, theta)

    def close(self) -> None:
        """End the last stretch."""
        self._put_away()
        self.is_closed = True

    def stacked(self) -> dict[str, Tensor]:
        """Give the records, trials first, on the CPU."""
        columns = [torch.stack(part, 1).cpu() for part in zip(*self._least, strict=True)]
        return {
            "losses": torch.stack(self.losses, 1).cpu(),
            "gradient_l1": torch.stack(self.norms, 1).cpu(),
            **dict(zip(_LEAST, columns, strict=True)),
        }

    def _put_away(self) -> None:
        state = self.state
        seen = torch.isfinite(state.least_l1)
        steps = torch.where(seen, state.least_step, torch.full_like(state.least_step, -1))
        self.ended = torch.where((state.status == STOPPED) & seen, state.least_step, self.ended)
        self._least.append((steps, state.least_loss.clone(), state.least_l1.clone(), state.least_theta.clone()))
        state.least_l1.fill_(math.inf)
        if len(self._least) > self._limit:
            pairs = zip(self._least[::2], self._least[1::2], strict=False)
            odd = self._least[-1:] if len(self._least) % 2 else []
            self._least = [_lesser(one, two) for one, two in pairs] + odd

    def tensors(self) -> dict[str, Tensor]:
        """Give everything as tensors by name."""
        found = {f"state.{name}": tensor.contiguous() for name, tensor in self.state.tensors().items()}
        found |= {"sound": self.sound, "sound_step": self.sound_step, "ended": self.ended}
        rows: dict[str, list[Tensor]] = {"losses": self.losses, "norms": self.norms}
        rows |= {name: [least[i] for least in self._least] for i, name in enumerate(_LEAST)}
        return found | {name: torch.stack(parts) for name, parts in rows.items() if parts}

    def numbers(self) -> dict[str, str]:
        """Give what is no tensor."""
        return {"step": str(self.step), "seconds": self.seconds.hex(), "is_closed": str(int(self.is_closed))}

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, str]) -> None:
        """Take what `tensors` and `numbers` gave.

        Raises:
            KeyError: something is missing.
            ValueError: a number is none.
        """
        for name, tensor in self.state.tensors().items():
            tensor.copy_(tensors[f"state.{name}"])
        device = self.state.theta.device
        self.sound, self.sound_step, self.ended = (tensors[n].to(device) for n in ("sound", "sound_step", "ended"))
        none = torch.zeros(0)
        self.losses = list(tensors.get("losses", none).to(device))
        self.norms = list(tensors.get("norms", none).to(device))
        columns = [list(tensors.get(name, none).to(device)) for name in _LEAST]
        self._least = [(a, b, c, d) for a, b, c, d in zip(*columns, strict=True)]
        self.step, self.seconds = int(numbers["step"]), float.fromhex(numbers["seconds"])
        self.is_closed = numbers["is_closed"] == "1"


def _lesser(one: tuple[Tensor, ...], two: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of two neighbouring stretches keep, for each trial, the point of the smaller gradient."""
    first = (one[2] <= two[2]) | torch.isnan(two[2])
    steps, losses, norms = (torch.where(first, a, b) for a, b in zip(one[:3], two[:3], strict=True))
    return steps, losses, norms, torch.where(first.unsqueeze(1), one[3], two[3])


class Kept:
    """A file in a folder of the user's, named by everything that decides the training.

    Args:
        folder: made when first written.
        name: of the training.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / f"population-{name}.safetensors"

    def write(self, ledger: Ledger) -> None:
        """Write the ledger; a reader sees the old file or the new one.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        try:
            save_state(self._path, ledger.tensors(), ledger.numbers())
        except CheckpointError:  # another process may just have removed the folder: it is made again
            save_state(self._path, ledger.tensors(), ledger.numbers())

    def read_into(self, ledger: Ledger) -> None:
        """Take up what was kept; a file that cannot be read is passed over, and the training begins anew."""
        if not self._path.exists():
            return
        starts = ledger.state.theta.clone()
        try:
            ledger.restore(load_file(self._path), load_metadata(self._path))
        except (CheckpointError, OSError, KeyError, ValueError, RuntimeError, SafetensorError):
            ledger.__init__(State.at(starts))  # type: ignore[misc]


def fingerprint(objective: Objective, thetas: Tensor, settings: Any) -> str:
    """Name a training by its starts, its settings, its data, and its landscape at the starts, to the last bit.

    Args:
        objective: the landscape.
        thetas: the starts.
        settings: whatever else decides the result; its text counts.

    Returns:
        Sixteen hexadecimal digits.
    """
    digest = hashlib.sha256(repr((thalweg.__version__, settings)).encode())
    tensors = [thetas, *objective.value_and_gradient(thetas)]
    if objective.in_memory:
        for batch in objective.batches():
            tensors += [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    for tensor in tensors:
        digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        plain = tensor.detach().cpu()
        digest.update((plain.float() if plain.dtype == torch.bfloat16 else plain).numpy().tobytes())
    return digest.hexdigest()[:16]
