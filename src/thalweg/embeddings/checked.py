"""Embed and reduce a module and see that it computes the same: the two doors for a user's own network."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from thalweg.embeddings.exactness import implied_embedding, require_exact
from thalweg.embeddings.plan import Plan, split_plan
from thalweg.embeddings.reduction import Reduction, find_merges
from thalweg.embeddings.splitting import Embedding
from thalweg.embeddings.surgery import fitting
from thalweg.errors import StructureError
from thalweg.space import Space
from thalweg.structure import View, trace
from thalweg.structure.comparison import output_change

_SAME = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Relative change of the outputs that rounding may cause (chosen by us, far above what is seen: 1e-15 and 1e-6);
more means that the module hides a size."""


@dataclass(frozen=True)
class Embedded:
    """A network carried into a wider one.

    Args:
        module: the wide module, at the embedded point.
        embedding: the map; `embedding.apply` carries other points.
        view: the groups of the narrow module.
        error: max|f_wide - f| / max|f| on the example inputs, in the module's own precision.
    """

    module: nn.Module
    embedding: Embedding
    view: View
    error: float


@dataclass(frozen=True)
class Reduced:
    """A network brought back to a narrower one.

    Args:
        module: the narrow module.
        reduction: which units were merged and dropped.
        view: the groups of the wide module.
        error: max|f_narrow - f| / max|f| on the example inputs, in the module's own precision.
    """

    module: nn.Module
    reduction: Reduction
    view: View
    error: float


def embed(
    module: nn.Module,
    inputs: Any,
    widths: Mapping[str, int],
    *,
    shares: Literal["equal", "random"] | Mapping[str, Sequence[float | int]] = "equal",
    plan: Plan | None = None,
    view: View | None = None,
    generator: torch.Generator | None = None,
    wide: nn.Module | None = None,
) -> Embedded:
    """Carry a network exactly into a wider one; a critical point stays a critical point.

    Args:
        module: any `nn.Module`.
        inputs: one example batch to trace and to check with: a tensor, a tuple of arguments, or a dict of keyword
            arguments.
        widths: group -> width after; `trace(module, inputs).groups` lists the groups.
        shares: "equal" (default, as in the paper's experiments), "random", or given: see `split_plan`.
        plan: a plan of your own, in place of widths and shares.
        view: a view of your own, in place of tracing.
        generator: of random shares.
        wide: a module of your own with the wide shapes, to be filled. Default: a resized copy.

    Returns:
        The wide module at the embedded point, with the map and the change of the outputs.

    Raises:
        PlanError: the plan breaks a law.
        StructureError: the module cannot be traced or resized, or the wide one computes something else.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> bigger = embed(net, torch.randn(5, 2), {"0": 6})
        >>> bigger.module[0].out_features, bigger.error < 1e-5
        (6, True)
    """
    view = view or trace(module, inputs)
    plan = plan or split_plan(view, widths, shares=shares, generator=generator)
    embedding = Embedding(view, Space.of(module), plan)
    result = embedding.wide(module) if wide is None else _filled(wide, embedding, module)
    with nullcontext() if wide is not None else fitting(result, view, plan.widths):
        error = output_change(result, module, inputs)
    _require_same(error, module, "wide")
    require_exact(module, result, embedding, inputs)
    return Embedded(result, embedding, view, error)


def reduce(
    module: nn.Module,
    inputs: Any,
    *,
    similarity: float | None = None,
    amplitude: float = 0.0,
    groups: Iterable[str] | None = None,
    view: View | None = None,
) -> Reduced:
    """Merge units that do the same and drop units that do nothing.

    Without `similarity` and `amplitude` the outputs stay, and what `embed` made is undone.

    Args:
        module: any `nn.Module`.
        inputs: one example batch to trace and to check with: a tensor, a tuple of arguments, or a dict of keyword
            arguments.
        similarity: merge units at least this similar (see `find_merges`); changes the outputs.
        amplitude: drop units whose amplitude is at most this fraction of the largest; changes the outputs.
        groups: which groups. Default: all that can be reduced.
        view: a view of your own, in place of tracing.

    Returns:
        The narrow module, with what was merged and the change of the outputs.

    Raises:
        PlanError: similarity or amplitude out of range, or a named group that cannot be reduced.
        StructureError: the module cannot be traced or resized, or the narrow one computes something else
            although only equal units were merged.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> bigger = embed(net, torch.randn(5, 2), {"0": 6}).module
        >>> reduce(bigger, torch.randn(5, 2)).reduction.widths
        {'0': (6, 3)}
    """
    view = view or trace(module, inputs)
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    reduction = find_merges(view, state, similarity=similarity, amplitude=amplitude, groups=groups)
    return reduce_by(module, inputs, reduction, keeps_outputs=similarity is None and amplitude == 0)


def reduce_by(module: nn.Module, inputs: Any, reduction: Reduction, *, keeps_outputs: bool = False) -> Reduced:
    """Carry out a reduction that is known already, and see that the narrow module computes what it says.

    Args:
        module: the module that the reduction was found on.
        inputs: one example batch, as `reduce` takes it.
        reduction: which units are merged and dropped.
        keeps_outputs: the outputs on the example must stay, because only equal units are merged.

    Returns:
        The narrow module, with the change of the outputs.

    Raises:
        StructureError: the module cannot be resized, or the narrow one computes something else.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> view = trace(net, torch.randn(5, 2))
        >>> reduction = find_merges(view, dict(net.named_parameters()), similarity=0.5)
        >>> reduce_by(net, torch.randn(5, 2), reduction).reduction is reduction
        True
    """
    result = reduction.narrow(module)
    with fitting(result, reduction.view, {n: after for n, (_, after) in reduction.widths.items()}):
        error = output_change(result, module, inputs)
    if keeps_outputs:
        _require_same(error, module, "narrow")
    require_exact(result, module, implied_embedding(reduction, result), inputs)
    return Reduced(result, reduction, reduction.view, error)


def _filled(wide: nn.Module, embedding: Embedding, module: nn.Module) -> nn.Module:
    """Load the embedded state into a user's own wide module."""
    state = embedding.state({**dict(module.named_parameters()), **dict(module.named_buffers())})
    target = {**dict(wide.named_parameters()), **dict(wide.named_buffers())}
    wrong = [n for n in state if n not in target or target[n].shape != state[n].shape]
    if wrong or len(target) != len(state):
        name = wrong[0] if wrong else next(n for n in target if n not in state)
        expected = tuple(state[name].shape) if name in state else "no such tensor"
        got = tuple(target[name].shape) if name in target else "none"
        raise StructureError(
            f"Expected the wide module to have {name!r} of shape {expected}. Got {got} "
            f"({len(wrong)} tensors differ). Choose widths that fit it."
        )
    result = copy.deepcopy(wide)
    with torch.no_grad():
        for name, tensor in {**dict(result.named_parameters()), **dict(result.named_buffers())}.items():
            tensor.copy_(state[name])
    return result.train(module.training)


def _require_same(error: float, module: nn.Module, which: str) -> None:
    dtype = next(module.parameters()).dtype
    if not error <= _SAME.get(dtype, 1e-1):
        raise StructureError(
            f"Expected the {which} module to compute the same outputs. Got a relative change of {error:.1e}. "
            "Its code fixes a size (a head count, a scale): leave that group at its width or pass your own module."
        )
