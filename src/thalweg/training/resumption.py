"""resumption: torch's own randomness made repeatable, and the file from which a mini-batch training goes on."""

import contextlib
import hashlib
import os
import pickle
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import thalweg
from thalweg.batching import num_samples, rows_of
from thalweg.errors import CheckpointError, DataError
from thalweg.objective import Objective
from thalweg.training.naming import named, worded

# Samples of the first batch at which loss and gradient name a landscape. Chosen by us: a mini-batch of the paper.
_SAMPLES = 128

DAMAGES = (  # what reading a foreign or damaged file, or taking it up, can raise
    *(OSError, EOFError, RuntimeError, pickle.UnpicklingError, KeyError),
    *(ValueError, TypeError, AttributeError, IndexError),
)


class Randomness:
    """The state of torch's global generators as one training sees them: dropout and augmenting loaders draw there.

    Args:
        device: where the training computes.
        seed: of the states at the start.
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        self._indices: list[int] = []
        if device.type == "cuda":
            self._indices = [torch.cuda.current_device() if device.index is None else device.index]
        self._seed = seed
        with self.aside(0):
            self.states = [generator.get_state() for generator in self._generators()]

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Put the states in place while a block runs; afterwards the user's own are back, untouched."""
        with self._forked():
            for generator, state in zip(self._generators(), self.states, strict=True):
                generator.set_state(state)
            yield
            self.states = [generator.get_state() for generator in self._generators()]

    @contextlib.contextmanager
    def aside(self, place: int) -> Iterator[None]:
        """Seed the generators while a block runs that is no part of the training; afterwards all is as before.

        Args:
            place: tells one such block of the training from others.
        """
        with self._forked():
            for generator in self._generators():
                generator.manual_seed(self._seed + place)
            yield

    def _forked(self) -> contextlib.AbstractContextManager[None]:
        forked: contextlib.AbstractContextManager[None] = torch.random.fork_rng(devices=self._indices)
        return forked

    def _generators(self) -> list[torch.Generator]:
        on_devices = [torch.cuda.default_generators[index] for index in self._indices]
        return [torch.default_generator, *on_devices]


class KeptFile:
    """A file that holds the state of a training, named by everything that decides it.

    Args:
        folder: made when first written.
        name: of the training.
    """

    def __init__(self, folder: str | os.PathLike[str], name: str) -> None:
        self._path = Path(folder) / f"fit-{name}.pt"

    def write(self, state: dict[str, Any]) -> None:
        """Write a state; a reader sees the old file or the new one.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        aside = self._path.with_name(f".{self._path.name}.{os.getpid()}-{secrets.token_hex(4)}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as stream:
                torch.save(state, stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(aside, self._path)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
            raise CheckpointError(
                f"Expected a place that can be written. Got {self._path}: {reason}. "
                "Free some space, or choose another place."
            ) from error
        finally:
            if aside.parent.is_dir():
                aside.unlink(missing_ok=True)

    def read(self) -> dict[str, Any] | None:
        """Read the state; None where there is none that can be read."""
        if not self._path.is_file():
            return None
        try:
            found = torch.load(self._path, map_location="cpu", weights_only=True)
        except DAMAGES:
            return None
        return found if isinstance(found, dict) else None


def landscape_name(objective: Objective, theta: Tensor, settings: Iterable[Any]) -> str:
    """Name a training by its module, start, settings, data, and loss and gradient at the start, to the last bit.

    Data in memory count as a whole, those of a loader by the first batch. The gradient is that of a few samples: it
    tells one module and one loss from another without a pass over the data. What shows in train mode alone, as a
    dropout's p and a BatchNorm's momentum, is taken from the words of the module; users' classes and functions count
    with their source.

    Args:
        objective: the landscape.
        theta: the start.
        settings: whatever else decides the result; their text counts.

    Returns:
        Sixteen hexadecimal digits.
    """
    own = worded(objective.loss) if isinstance(objective.loss, nn.Module) else named(objective.loss)
    words = (thalweg.__version__, objective.space, worded(objective.module), own, *settings)
    digest = hashlib.sha256(repr(words).encode())
    state = dict(objective.module.named_parameters()) | dict(objective.module.named_buffers())
    fixed = [tensor for name, tensor in state.items() if name not in objective.space.names]
    with Randomness(objective.device, 0).installed():  # a landscape in train mode may draw
        tensors = [theta, *fixed, *_loss_and_gradient(objective, theta)]
    for batch in objective.batches():
        tensors += [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
        if not objective.in_memory:
            break
    for tensor in tensors:
        digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _loss_and_gradient(objective: Objective, theta: Tensor) -> list[Tensor]:
    batch = next(iter(objective.batches()))
    with contextlib.suppress(DataError):
        batch = rows_of(batch, slice(min(_SAMPLES, num_samples(batch))))
    leaves = objective.leaves(theta.to(device=objective.device, dtype=objective.dtype))
    loss = objective.leaf_loss(leaves, *batch)
    if not loss.requires_grad:
        return [loss]
    return [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)]
