"""oddness: for which groups may the sign of a unit change? Measured, like the permutations of a view."""

from typing import Any

import numpy as np
import torch
from torch import nn

from thalweg.structure.symmetry import flip
from thalweg.structure.tree import FloatArray
from thalweg.structure.verify import Bench
from thalweg.structure.view import View


def odd_groups(
    view: View, module: nn.Module, inputs: Any, generator: torch.Generator | None = None
) -> tuple[str, ...]:
    """Find the groups whose units may change sign together with what reads them (tanh, sine, the identity).

    Parameters, buffers and inputs are perturbed in float64, units are flipped at random (at least one stays where
    there are two, and at least one is flipped), and the outputs may change by 1e-9 at most, relatively. All
    groups that pass alone must pass together.

    Args:
        view: the groups.
        module: the module they describe.
        inputs: one example batch: a tensor, a tuple of arguments, or a dict of keyword arguments.
        generator: of the random numbers. Default: seed 0.

    Returns:
        Names of the odd groups, in the order of the view. A group whose units are normalised one by one
        (BatchNorm) is not found: there only some of what makes a unit would have to change sign.

    Raises:
        StructureError: the module does not run on the inputs, or its outputs are not finite.

    **Source:** ours; it extends the trivial transforms of Zhang et al. 2021 (arXiv 2105.14573), appendix A.1.

    Example:
        >>> from thalweg.structure import trace
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 40), nn.ReLU(), nn.Linear(40, 1))
        >>> odd_groups(trace(net, torch.ones(5, 2)), net, torch.ones(5, 2))
        ('0',)
    """
    bench = Bench(module, inputs, generator or torch.Generator().manual_seed(0))
    found = [g.name for g in view.groups if g.is_duplicable and g.coupling == "none"]
    found = [name for name in found if _error(bench, view, [name]) <= bench.tolerance]
    if len(found) > 1 and not _error(bench, view, found) <= bench.tolerance:
        return ()
    return tuple(found)


def _error(bench: Bench, view: View, names: list[str]) -> float:
    """Flip units of the named groups at random; the worse of two draws."""
    errors = []
    for _ in range(2):
        signs = {name: _signs(view.group(name).size, bench.generator) for name in names}
        errors.append(bench.difference(flip(view, bench.state, signs)))
    return float(np.max(errors))


def _signs(count: int, generator: torch.Generator) -> FloatArray:
    """Random signs, not all alike; -1 for a single unit."""
    signs = np.where(torch.rand(count, generator=generator).numpy() < 0.5, -1.0, 1.0)
    order = torch.randperm(count, generator=generator).numpy()
    signs[order[-1]], signs[order[0]] = 1.0, -1.0
    return signs
