"""Loss and gradient of a mini-batch at a point that moves in place, as a network in training sees them."""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from thalweg.batching import Batch, num_samples
from thalweg.errors import DataError
from thalweg.objective import Objective
from thalweg.structure.trace import arguments_of, call
from thalweg.training.shuffling import shuffled_batches


class Descent:
    """A copy of an objective's network whose parameters are views of one flat vector, theta.

    Write into `theta` and ask for a slope: no functional call, no copy of the weights, no graph through whatever
    theta was combined from. The copy is in train mode: BatchNorm takes the statistics of the batch, dropout drops.

    Args:
        objective: the landscape; its own module and buffers are not touched.
    """

    def __init__(self, objective: Objective) -> None:
        self.theta = objective.theta()
        self._objective = objective
        self._module = copy.deepcopy(objective.module).train()
        named = dict(self._module.named_parameters())
        self.views = list(objective.space.parameters(self.theta).values())
        self._leaves = [named[name] for name in objective.space.names]
        for leaf, view in zip(self._leaves, self.views, strict=True):
            leaf.data = view

    def slope(self, batch: Batch) -> tuple[float, list[Tensor]]:
        """Give the loss of a batch at theta, and its gradient, a tensor for each parameter that is the caller's."""
        loss = self._loss(batch)
        if not loss.requires_grad:  # the loss does not depend on theta
            return loss.item(), [torch.zeros_like(view) for view in self.views]
        slopes = list(torch.autograd.grad(loss, self._leaves, materialize_grads=True))
        seen: set[int] = set()
        for k, slope in enumerate(slopes):  # of p + q autograd gives one tensor twice
            if slope.data_ptr() in seen or not slope.is_contiguous():
                slopes[k] = slope.clone(memory_format=torch.contiguous_format)
            seen.add(slopes[k].data_ptr())
        return loss.item(), slopes

    def flat_slope(self, batch: Batch) -> tuple[float, Float[Tensor, " params"]]:
        """Give the same with the gradient as one vector."""
        loss, slopes = self.slope(batch)
        return loss, torch.cat([s.reshape(-1) for s in slopes])

    def loss_at(self, parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Give the loss of a batch at other parameters, differentiable in them, dropout off."""
        self._quieten()
        inputs, targets = batch
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
        outputs = functional_call(
            self._module, dict(parameters), args if isinstance(args, tuple) else (args,), kwargs
        )
        self._module.train()
        return self._objective.reduced(outputs, targets)

    def loss(self, batch: Batch) -> float:
        """Give the loss of a batch at theta alone."""
        with torch.no_grad():
            return self._loss(batch).item()

    def measured(self, batches: Iterable[tuple[float, Batch]]) -> float:
        """Average the loss at theta over weighted batches: BatchNorm as in training, dropout off.

        Args:
            batches: what `Objective.weighted_batches` gives.
        """
        self._quieten()
        total, weights = 0.0, 0.0
        for weight, batch in batches:
            total += weight * self.loss(batch)
            weights += weight
        self._module.train()
        if self._objective.reduction == "sum":
            return total
        return total / weights if weights else math.nan

    def _quieten(self) -> None:
        """Let nothing but BatchNorm be in train mode."""
        self._module.eval()
        for part in self._module.modules():
            if isinstance(part, _BatchNorm):
                part.train()

    def _loss(self, batch: Batch) -> Tensor:
        inputs, targets = batch
        return self._objective.reduced(call(self._module, arguments_of(inputs)), targets)


def training_batches(objective: Objective, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Yield one pass of mini-batches; a last one of a single sample is left out where BatchNorm could not take it."""
    has_norm = any(isinstance(part, _BatchNorm) for part in objective.module.modules())
    place = 0
    for place, batch in enumerate(shuffled_batches(objective, batch_size, generator)):
        if has_norm and place and _count(batch) == 1:
            return
        yield batch


def _count(batch: Batch) -> int:
    try:
        return num_samples(batch)
    except DataError:
        return 0


def endless_batches(objective: Objective, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Yield mini-batches, one pass over the data after another, each in a new order."""
    while True:
        yield from training_batches(objective, batch_size, generator)
