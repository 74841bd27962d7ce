"""Verify a view: permute the units of all groups at once and see that the outputs stay.

Weights, buffers and inputs are perturbed first, because a network at its initialisation hides faults: a head
that starts at zero gives the same outputs whatever is permuted before it.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from thalweg.errors import StructureError
from thalweg.kernels import plain_kernels
from thalweg.structure.symmetry import permute, random_permutations, rescale
from thalweg.structure.trace import Inputs, arguments_of, output_tensors, prepared
from thalweg.structure.view import View

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Relative change of the outputs that still counts as none. 1e-9 in float64 is the issue-given bar; rounding
alone stays below 1e-13, a wrong view changes outputs by more than 1e-3. A module that insists on float32 is
checked to 1e-3."""


def verified(view: View, module: nn.Module, inputs: Any, generator: torch.Generator | None = None) -> View:
    """Drop the groups that do not keep the outputs, and the scaling flags that do not hold.

    Args:
        view: the groups to check, traced or hand-written.
        module: the module they describe.
        inputs: one example batch: a tensor, a tuple of arguments, or a dict of keyword arguments.
        generator: of the random numbers. Default: seed 0.

    Returns:
        The view with `error` set; groups that failed are in `rejected`.

    Raises:
        StructureError: the module does not run on the inputs, or its outputs are not finite.
    """
    bench = Bench(module, inputs, generator or torch.Generator().manual_seed(0))
    view = view.without_groups(_inert(bench, view))
    error = bench.permutation_error(view, [g.name for g in view.groups])
    if not error <= bench.tolerance:
        kept: list[str] = []
        for group in view.groups:
            if bench.permutation_error(view, [group.name]) <= bench.tolerance and (
                bench.permutation_error(view, [*kept, group.name]) <= bench.tolerance
            ):
                kept.append(group.name)
        view = view.without_groups([g.name for g in view.groups if g.name not in kept])
        error = bench.permutation_error(view, [g.name for g in view.groups])
    return replace(_checked_scaling(bench, view), error=error)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor.to(torch.float64)


def relative_change(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Give the largest |mine - theirs| relative to the size of its output; a NaN stays one.

    The size is that of one output over the batch, at least 1e-4 of the largest one, so that outputs on a large
    scale do not hide a change in those on a small one.
    """
    errors = [0.0]
    if [t.shape for t in mine] != [t.shape for t in theirs]:
        return float("inf")
    for one, two in zip(mine, theirs, strict=True):
        if one.numel():
            sizes = two.abs().amax(dim=0, keepdim=True) if two.ndim > 1 else two.abs().max()
            sizes = sizes.clamp(min=1e-4 * (float(two.abs().max()) or 1e4))
            errors.append(float(((one - two).abs() / sizes).max()))
    return float(np.max(errors))


class Bench:
    """A perturbed float64 copy of a module and its inputs, to try symmetries on."""

    def __init__(self, module: nn.Module, inputs: Any, generator: torch.Generator) -> None:
        self.generator = generator
        self.module, placed = prepared(module, arguments_of(inputs))
        self.inputs: Inputs = tree_map_only(Tensor, self._jittered, placed)
        state = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        self.state = {n: self._perturbed(t.detach()) for n, t in state.items()}
        raw = self._run(self.state, self.module)
        self.reference = [_real(t) for t in raw]
        dtypes = {t.dtype for t in self.state.values() if t.is_floating_point()}
        self.tolerance = _TOLERANCE[torch.float64 if dtypes <= {torch.float64} else torch.float32]
        if not any(t.is_floating_point() or t.is_complex() for t in raw):
            raise StructureError(
                "Expected real-valued outputs, such as logits. Got none: nothing could be verified. "
                "Trace the part of the module before the argmax, or return its logits too."
            )
        if not all(torch.isfinite(r).all() for r in self.reference):
            raise StructureError(
                "Expected finite outputs on the example inputs. Got NaN or infinity. "
                "Pass inputs in the range the module was made for."
            )

    @staticmethod
    def twin(module: nn.Module, inputs: Any) -> nn.Module:
        """Copy another module as the bench copies its own.

        Raises:
            StructureError: the module does not run on the inputs.
        """
        return prepared(module, arguments_of(inputs))[0]

    def outputs(self, state: Mapping[str, Tensor], module: nn.Module | None = None) -> list[Tensor]:
        """Run the module, or another one that takes the same inputs, with a state; no buffer is changed."""
        return [_real(t) for t in self._run(state, module or self.module)]

    def _run(self, state: Mapping[str, Tensor], module: nn.Module) -> list[Tensor]:
        with torch.no_grad(), plain_kernels():
            return self.call({n: t.clone() for n, t in state.items()}, module)

    def call(self, state: Mapping[str, Tensor], module: nn.Module) -> list[Tensor]:
        """Run a module with a state as the inputs are given, by position or by keyword; gradients pass through."""
        if isinstance(self.inputs, dict):
            return list(output_tensors(functional_call(module, dict(state), (), self.inputs)))
        return list(output_tensors(functional_call(module, dict(state), self.inputs)))

    def difference(self, state: Mapping[str, Tensor]) -> float:
        """Give the relative change of the outputs, the largest over all of them."""
        return relative_change(self.outputs(state), self.reference)

    def permutation_error(self, view: View, names: Sequence[str]) -> float:
        """Permute the named groups at random, all at once; the worse of two draws."""
        errors = []
        for _ in range(2):
            drawn = random_permutations(view, self.generator)
            errors.append(self.difference(permute(view, self.state, {n: drawn[n] for n in names})))
        return float(np.max(errors))

    def _jittered(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            return tensor
        return tensor + 0.5 * self._noise(tensor) * (tensor.std(correction=0) if tensor.any() else 1.0)

    def _perturbed(self, tensor: Tensor) -> Tensor:
        """Shake a parameter or buffer; what is never negative (a variance, a mask) stays so."""
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            return tensor
        if tensor.any() and bool((tensor >= 0).all()):
            return tensor * torch.exp(0.3 * self._noise(tensor))
        spread = tensor.std(correction=0) if tensor.numel() > 1 and tensor.any() else torch.tensor(1.0)
        return tensor + 0.3 * self._noise(tensor) * spread.clamp(min=1e-2).to(tensor.dtype)

    def _noise(self, tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=self.generator, dtype=tensor.dtype)


def _inert(bench: Bench, view: View) -> list[str]:
    """Find groups that the outputs do not depend on at this batch: nothing could be verified about them."""
    names = {n for n, p in bench.module.named_parameters() if p.is_floating_point()}
    leaves = {n: bench.state[n].clone().requires_grad_() for n in names}
    with plain_kernels(), torch.enable_grad():
        values = bench.call({**bench.state, **leaves}, bench.module)
        outputs = [t for t in values if t.is_floating_point() and t.requires_grad]
        if not outputs:
            return []
        total = torch.stack([(t * bench._noise(t)).sum() for t in outputs]).sum()
        try:
            with warnings.catch_warnings(action="ignore"):  # torch warns of operations without a derivative
                slopes = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        except RuntimeError:  # an operation without a derivative: nothing can be said about reach
            return []
    moving = {n for n, s in zip(leaves, slopes, strict=True) if s is not None and bool(s.any())}
    return [g.name for g in view.groups if not any(m.tensor in moving for m in g.members)]


def _checked_scaling(bench: Bench, view: View) -> View:
    """Keep the homogeneity flag only where scaling units by random positive factors keeps the outputs."""
    groups = []
    for group in view.groups:
        if group.is_homogeneous:
            factors = np.exp(torch.randn(group.size, generator=bench.generator, dtype=torch.float64).numpy())
            if not bench.difference(rescale(view, bench.state, {group.name: factors})) <= bench.tolerance:
                group = replace(group, scaled=())  # noqa: PLW2901 - the flag is what is being settled
        groups.append(group)
    return replace(view, groups=tuple(groups))
