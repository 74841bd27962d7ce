"""From a module to its verified view: trace, settle the groups, verify."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from thalweg.errors import StructureError
from thalweg.structure.axes import (
    AVERAGED,
    BILINEAR,
    COUPLED,
    INHOMOGENEOUS,
    NOT_ZERO_PRESERVING,
    Axis,
    Leaf,
    leaves,
    resolve,
)
from thalweg.structure.rules import RULES
from thalweg.structure.rules.pointwise import constant, pointwise
from thalweg.structure.trace import Rule, Trace, arguments_of, prepared, trace_axes
from thalweg.structure.tree import Fixed, ProductTree, SumTree, Tree, Units
from thalweg.structure.verify import verified
from thalweg.structure.view import Coupling, Group, Member, Role, View


def trace(
    module: nn.Module,
    inputs: Any,
    *,
    rules: Mapping[str, Rule] = RULES,
    verify: bool = True,
    generator: torch.Generator | None = None,
) -> View:
    """Find the groups of interchangeable units of any module by tracing one forward pass, and verify them.

    The module is copied, moved to the CPU, and run in eval mode in float64. An operation without a rule freezes
    the axes it touches and is named in `View.frozen_by`. Inputs and outputs are fixed.

    Args:
        module: any `nn.Module`; data-dependent control flow is fine, the branch that these inputs take counts.
        inputs: one example batch: a tensor, a tuple of arguments, or a dict of keyword arguments. Two or more
            samples.
        rules: aten operation -> rule. Add your own: `rules=RULES | {"my_op": rule}`.
        verify: permute all groups at once on perturbed weights and drop those that change the outputs.
        generator: of the verification's random numbers. Default: seed 0.

    Returns:
        The view. `view.error` is the relative change of the outputs, NaN without verification.

    Raises:
        StructureError: the module does not run on the inputs.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 1))
        >>> view = trace(net, torch.zeros(3, 2))
        >>> view.groups[0].flags, view.error < 1e-12
        (('duplicable', 'homogeneous'), True)
    """
    arguments = arguments_of(inputs)
    twin, placed = prepared(module, arguments)
    view = _settled(trace_axes(twin, placed, rules, pointwise, constant))
    return verified(view, module, arguments, generator) if verify else view


def _settled(found: Trace) -> View:
    """Name the free leaves that parameters and buffers contain, in the order of their first use."""
    ordered = sorted(found.axes, key=lambda n: found.order.get(n, len(found.order)))
    homes: dict[int, tuple[str, Leaf]] = {}
    for wanted in ("producer", "consumer"):
        for name in ordered:
            for dim, axis in enumerate(found.axes[name]):
                if wanted in found.roles.get((name, dim), ()):
                    for leaf in leaves(axis):
                        if _is_group(leaf):
                            homes.setdefault(id(leaf), (name, leaf))
    names = _names(homes)
    axes = {n: tuple(_tree(a, names) for a in found.axes[n]) for n in found.axes}
    groups = [_group(names[key], leaf, found, ordered) for key, (_, leaf) in homes.items()]
    first = {g.name: min(found.order[m.tensor] for m in g.members if m.tensor in found.order) for g in groups}
    view = View(tuple(sorted(groups, key=lambda g: first[g.name])), axes, dict(found.frozen_by))
    # A single unit is a group only for the sake of splitting it: there is nothing to permute.
    idle = [g.name for g in view.groups if g.size == 1 and not g.is_duplicable]
    return replace(view.without_groups(idle), rejected=())


def _is_group(leaf: Leaf) -> bool:
    return leaf.frozen is None and leaf.size > 0


def _names(homes: Mapping[int, tuple[str, Leaf]]) -> dict[int, str]:
    """Name a group after the module that makes it; number the groups of one module."""
    bases = {key: name.rpartition(".")[0] or name for key, (name, _) in homes.items()}
    counts: dict[str, int] = {}
    names = {}
    for key, base in bases.items():
        number = counts.get(base, 0)
        counts[base] = number + 1
        names[key] = f"{base}/{number}" if list(bases.values()).count(base) > 1 else base
    return names


def _tree(axis: Axis, names: Mapping[int, str]) -> Tree:
    axis = resolve(axis)
    if isinstance(axis, Leaf):
        return Units(names[id(axis)], axis.size) if id(axis) in names else Fixed(axis.size)
    parts = tuple(_tree(p, names) for p in axis.parts)
    if all(isinstance(p, Fixed) for p in parts):
        return Fixed(axis.size)
    return ProductTree(parts) if not _is_sum(axis) else SumTree(parts)


def _is_sum(axis: Axis) -> bool:
    from thalweg.structure.axes import Sum

    return isinstance(axis, Sum)


def _group(name: str, leaf: Leaf, found: Trace, ordered: list[str]) -> Group:
    members = []
    for tensor in ordered:
        for dim, axis in enumerate(found.axes[tensor]):
            if any(other is leaf for other in leaves(axis)):
                members.append(Member(tensor, dim, _role(found.roles.get((tensor, dim), set()))))
    coupling: Coupling = "other" if COUPLED in leaf.flags else "average" if AVERAGED in leaf.flags else "none"
    scaled = () if INHOMOGENEOUS in leaf.flags else _scaled(leaf, members, found)
    return Group(
        name,
        leaf.size,
        tuple(members),
        coupling,
        BILINEAR in leaf.flags,
        scaled,
        NOT_ZERO_PRESERVING not in leaf.flags and coupling == "none",
    )


def _role(roles: set[str]) -> Role:
    if len(roles) == 2:
        return "both"
    return "consumer" if roles == {"consumer"} else "producer"


def _scaled(leaf: Leaf, members: list[Member], found: Trace) -> tuple[tuple[str, int], ...]:
    """Producers that scale a unit; none unless every producer either scales it or is normalised away."""
    producers = {(m.tensor, m.dim) for m in members if m.role != "consumer"}
    makers = {s.place for s in found.makers.get(id(leaf), set())} & producers
    normalised = {s.place for s in found.normalised} & producers
    last = makers - normalised
    if not last or (makers | normalised) != producers or not any(m.role == "consumer" for m in members):
        return ()
    return tuple(sorted(last))


__all__ = ["StructureError", "trace"]
