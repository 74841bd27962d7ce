"""stepping: one student in training, advanced by autograd; the fused engine has the same two doors."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from thalweg.precision import copied

Masks = Mapping[str, Tensor]


@runtime_checkable
class Stepper(Protocol):
    """A student that takes steps of plain SGD."""

    def advance(self, inputs: Tensor, targets: Tensor, rates: Sequence[float]) -> Tensor:
        """Take one step for each rate, on as many consecutive batches.

        Args:
            inputs: all samples of the batches, one after another.
            targets: what the teacher makes of them.
            rates: learning rates.

        Returns:
            The sum of the batches' losses, before each step.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """Give parameters and buffers by their names, as copies."""
        ...


def twin(module: nn.Module) -> nn.Module:
    """Copy a module as it is, also one that `torch.nn.utils.prune` has gone over.

    Raises:
        StructureError: it holds what cannot be copied.
    """
    return copied(module, device=next((t.device for t in module.state_dict().values()), "cpu"))


class AutogradStepper:
    """Any module, by autograd.

    Args:
        student: it is copied.
        masks: parameter -> 0 where it is held at zero, 1 elsewhere.
    """

    def __init__(self, student: nn.Module, masks: Masks) -> None:
        self._module = twin(student).train()
        self._params = [p for p in self._module.parameters() if p.requires_grad]
        named = dict(self._module.named_parameters())
        self._masked = [(named[name], mask.to(named[name].device)) for name, mask in masks.items()]
        self._mask()

    @torch.enable_grad()
    def advance(self, inputs: Tensor, targets: Tensor, rates: Sequence[float]) -> Tensor:
        """Take one step for each rate; arguments and result as of `Stepper`."""
        size = len(inputs) // len(rates)
        total = torch.zeros((), dtype=torch.float64, device=inputs.device)
        for x, y, rate in zip(torch.split(inputs, size), torch.split(targets, size), rates, strict=True):
            loss = functional.mse_loss(self._module(x), y)
            gradients = torch.autograd.grad(loss, self._params, materialize_grads=True)
            with torch.no_grad():
                for param, gradient in zip(self._params, gradients, strict=True):
                    param.sub_(gradient, alpha=rate)
                self._mask()
                total += loss
        return total

    def state(self) -> dict[str, Tensor]:
        """Give parameters and buffers by their names, as copies."""
        return {name: value.detach().clone() for name, value in self._module.state_dict().items()}

    @torch.no_grad()
    def _mask(self) -> None:
        for param, mask in self._masked:
            param.mul_(mask)
