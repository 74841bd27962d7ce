"""Descent without a gradient: each parameter moves as soon as its own slope is known, which is then dropped."""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path as File
from typing import Any, TypeVar

import safetensors
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from thalweg.batching import Batch
from thalweg.errors import CheckpointError, StructureError
from thalweg.objective import Objective
from thalweg.structure.trace import arguments_of, call

Module = TypeVar("Module", bound=nn.Module)


class StateFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read whenever it is asked for; nothing of them is kept.

    Args:
        path: the file.

    Raises:
        CheckpointError: the file is missing, damaged, or of another format; also on use, where it has gone.

    Example:
        >>> import tempfile
        >>> from thalweg.checkpoint import save_state
        >>> path = File(tempfile.mkdtemp()) / "net.safetensors"
        >>> save_state(path, {"weight": torch.ones(2)})
        >>> dict(StateFile(path))
        {'weight': tensor([1., 1.])}
    """

    def __init__(self, path: str | File) -> None:
        self._path = File(path)
        with self._opened() as stream:
            self._names = tuple(stream.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with self._opened() as stream:
            value: Tensor = stream.get_tensor(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _opened(self) -> Any:
        try:
            return safetensors.safe_open(self._path, framework="pt")
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(
                f"Expected a whole safetensors file. Got {self._path}: {type(error).__name__}. Check the path, or "
                "write the file with save_state."
            ) from error


def hollow(module: Module) -> Module:
    """Copy a module without its weights: trainable parameters of the same shapes that take one number each.

    All of them read as zero and cannot be written into; copies are hollow too, so that an `Objective` of a hollow
    module is a landscape without a point of its own. Frozen parameters and buffers are copied as they are.

    Args:
        module: any module; its trainable parameters may be on the meta device, then they are hollow on the CPU.

    Returns:
        The copy, in the mode of the original.

    Raises:
        StructureError: a buffer or a frozen parameter is on the meta device: its values matter.

    Example:
        >>> with torch.device("meta"):
        ...     large = nn.Linear(100_000, 100_000)
        >>> weight = hollow(large).weight
        >>> weight.shape, weight.untyped_storage().nbytes()
        (torch.Size([100000, 100000]), 4)
    """
    twin = copy.deepcopy(module, {id(p): _Hollow.like(p) for p in module.parameters() if p.requires_grad})
    lost = [name for name, t in chain(twin.named_parameters(), twin.named_buffers()) if t.is_meta]
    if lost:
        raise StructureError(
            f"Expected buffers and frozen parameters with values. Got {lost[0]!r} on the meta device. "
            "Build the module on the CPU, or set requires_grad=True on a parameter that is a coordinate."
        )
    return twin


class _Hollow(nn.Parameter):
    """A parameter of any shape that takes one number, and so do its copies."""

    @classmethod
    def like(cls, parameter: Tensor) -> "_Hollow":
        device = "cpu" if parameter.is_meta else parameter.device
        return cls(torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if any(self.stride()):
            return super().__deepcopy__(memo)  # type: ignore[no-untyped-call]
        return memo.setdefault(id(self), _Hollow.like(self))


class Streamed:
    """An objective's network without weights of its own: it runs on tensors of the caller's, and moves them.

    In a descent no more than the largest slopes exist at a time: a parameter is moved, and its slope dropped, as
    soon as all its uses have been differentiated and no step of the backward pass that is yet to come has kept its
    values (a weight used twice waits for both uses; a detached use for the end). A module with differentiation rules
    of its own (`torch.autograd.Function`) or that calls `torch.func`, which may keep anything, is moved after the
    whole pass. The network is in
    train mode: BatchNorm takes the statistics of the batch, dropout drops.

    Args:
        objective: the landscape; its own module and buffers are not touched.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._module = hollow(objective.module).train()
        named = dict(self._module.named_parameters())
        self._leaves = {name: named[name] for name in objective.space.names}
        self._fall: _Fall | None = None

    def descend(self, parameters: Mapping[str, Tensor], batch: Batch, rate: float) -> float:
        """Move the tensors of `parameters` down the loss of a batch, in place, by `rate` times its gradient.

        Args:
            parameters: every name of the space, contiguous, each with a storage of its own.
            batch: inputs and targets.
            rate: η.

        Returns:
            The loss before. Where it is not finite, nothing moves.
        """
        fall = self._fall = self._fall or _Fall(self._leaves.values())
        self._point_at(parameters)
        fall.begin(self._leaves.values(), rate)
        try:
            loss = self._watched_loss(fall, batch)
            value = loss.item()
            if math.isfinite(value) and loss.requires_grad:
                fall.waits = fall.waits or _has_own_rules(loss)
                loss.backward(inputs=list(self._leaves.values()))  # type: ignore[no-untyped-call]
                for leaf in self._leaves.values():
                    fall.move(leaf)
        finally:
            self._let_go()
        return value

    def measured(self, parameters: Mapping[str, Tensor]) -> float:
        """Average the loss over all data, in the objective's batches: BatchNorm as in training, dropout off.

        Args:
            parameters: every name of the space.
        """
        self._module.eval()
        for part in self._module.modules():
            if isinstance(part, _BatchNorm):
                part.train()
        self._point_at(parameters)
        total, weights = 0.0, 0.0
        with torch.no_grad():
            for weight, batch in self._objective.weighted_batches():
                total += weight * self._loss(batch).item()
                weights += weight
        self._let_go()
        self._module.train()
        return total if self._objective.reduction == "sum" else total / weights

    def _point_at(self, parameters: Mapping[str, Tensor]) -> None:
        for name, leaf in self._leaves.items():
            leaf.data = parameters[name]

    def _let_go(self) -> None:
        for leaf in self._leaves.values():
            leaf.grad = None
            leaf.data = leaf.data.new_zeros(()).expand(leaf.shape)

    def _watched_loss(self, fall: "_Fall", batch: Batch) -> Tensor:
        """Give the loss; `fall` hears which parameters its graph keeps, or waits with all where it cannot."""
        if not fall.is_deaf:
            try:
                with torch.autograd.graph.saved_tensors_hooks(fall.pack, fall.unpack):
                    return self._loss(batch)
            except RuntimeError as error:
                if "saved tensor hooks" not in str(error):  # torch.func in the module refuses them
                    raise
                fall.is_deaf = fall.waits = True
        return self._loss(batch)

    def _loss(self, batch: Batch) -> Tensor:
        inputs, targets = batch
        return self._objective.reduced(call(self._module, arguments_of(inputs)), targets)


class _Fall:
    """What is done with a slope when it is whole; holds no parameter, so that nothing outlives the network."""

    def __init__(self, leaves: Iterable[nn.Parameter]) -> None:
        self.waits = self.is_deaf = False
        self._rate = 0.0
        self._kept: dict[int, int] = {}
        for leaf in leaves:
            leaf.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]

    def begin(self, leaves: Iterable[nn.Parameter], rate: float) -> None:
        """Expect a forward pass on these leaves."""
        self._rate = rate
        self._kept = {_storage(leaf): 0 for leaf in leaves}

    def pack(self, tensor: Tensor) -> Tensor:
        """Count the tensors that the graph keeps of each parameter."""
        place = _storage(tensor)
        if place in self._kept:
            self._kept[place] += 1
        return tensor

    def unpack(self, tensor: Tensor) -> Tensor:
        """Count those that it has come back to."""
        place = _storage(tensor)
        if place in self._kept:
            self._kept[place] -= 1
        return tensor

    def move(self, leaf: Tensor) -> None:
        """Move a parameter by its slope, if it has one, and drop the slope."""
        if leaf.grad is not None:
            leaf.data.add_(leaf.grad, alpha=-self._rate)
            leaf.grad = None

    def _arrived(self, leaf: Tensor) -> None:
        if not self.waits and self._kept.get(_storage(leaf), 0) <= 0:
            self.move(leaf)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0


def _has_own_rules(loss: Tensor) -> bool:
    """Say whether the graph behind a loss has a `torch.autograd.Function` written in Python."""
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if issubclass(type(node), torch.autograd.function.BackwardCFunction):
            return True
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
    return False
