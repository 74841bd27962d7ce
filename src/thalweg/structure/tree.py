"""A settled axis of a parameter or buffer: which positions belong to which unit of which group."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thalweg.errors import StructureError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Fixed:
    """Positions that no group moves."""

    size: int


@dataclass(frozen=True)
class Units:
    """The units of a group, one position each."""

    group: str
    size: int


@dataclass(frozen=True)
class ProductTree:
    """Row-major product of axes (flattened positions, heads times inner units)."""

    parts: "tuple[Tree, ...]"

    @property
    def size(self) -> int:
        """Number of positions."""
        return int(np.prod([p.size for p in self.parts]))


@dataclass(frozen=True)
class SumTree:
    """Concatenation of axes."""

    parts: "tuple[Tree, ...]"

    @property
    def size(self) -> int:
        """Number of positions."""
        return sum(p.size for p in self.parts)


Tree = Fixed | Units | ProductTree | SumTree


def groups_of(tree: Tree) -> Iterator[str]:
    """Yield the names of the groups along an axis, repeated where they occur again."""
    if isinstance(tree, Units):
        yield tree.group
    elif isinstance(tree, ProductTree | SumTree):
        for part in tree.parts:
            yield from groups_of(part)


def gather(tree: Tree, parents: Mapping[str, IntArray]) -> IntArray:
    """Give, for every new position, the old position that it copies.

    Args:
        tree: the axis.
        parents: group -> for every new unit the old unit it copies (a permutation, or an onto map of a
            wider set of units). Groups that are not named stay as they are.

    Returns:
        Old positions, one for each new position.
    """
    if isinstance(tree, Fixed):
        return np.arange(tree.size)
    if isinstance(tree, Units):
        return parents.get(tree.group, np.arange(tree.size))
    if isinstance(tree, ProductTree):
        index = np.zeros(1, dtype=np.int64)
        for part in tree.parts:
            index = (index[:, None] * part.size + gather(part, parents)[None, :]).reshape(-1)
        return index
    offsets = np.cumsum([0, *(p.size for p in tree.parts[:-1])])
    return np.concatenate([o + gather(p, parents) for o, p in zip(offsets, tree.parts, strict=True)])


def spread(tree: Tree, values: Mapping[str, FloatArray]) -> FloatArray:
    """Give every new position the product of the values of its units (1 for what is not named)."""
    if isinstance(tree, Fixed):
        return np.ones(tree.size)
    if isinstance(tree, Units):
        return values.get(tree.group, np.ones(tree.size))
    if isinstance(tree, ProductTree):
        scale = np.ones(1)
        for part in tree.parts:
            scale = (scale[:, None] * spread(part, values)[None, :]).reshape(-1)
        return scale
    return np.concatenate([spread(p, values) for p in tree.parts])


def unit_of(tree: Tree, group: str) -> IntArray:
    """Give every position the unit of `group` it belongs to, -1 where it belongs to none."""
    if isinstance(tree, Units) and tree.group == group:
        return np.arange(tree.size)
    if isinstance(tree, Fixed | Units):
        return np.full(tree.size, -1)
    if isinstance(tree, SumTree):
        return np.concatenate([unit_of(p, group) for p in tree.parts])
    unit = np.full(1, -1)
    for part in tree.parts:
        inner = unit_of(part, group)
        unit = np.where(inner[None, :] >= 0, inner[None, :], unit[:, None]).reshape(-1)
    return unit


def resized(tree: Tree, sizes: Mapping[str, int]) -> Tree:
    """Give the same axis with groups of other sizes."""
    if isinstance(tree, Units):
        return Units(tree.group, sizes.get(tree.group, tree.size))
    if isinstance(tree, ProductTree):
        return ProductTree(tuple(resized(p, sizes) for p in tree.parts))
    if isinstance(tree, SumTree):
        return SumTree(tuple(resized(p, sizes) for p in tree.parts))
    return tree


def without(tree: Tree, dropped: frozenset[str]) -> Tree:
    """Give the same axis with some groups fixed; runs of fixed positions are joined."""
    if isinstance(tree, Units):
        return Fixed(tree.size) if tree.group in dropped else tree
    if isinstance(tree, Fixed):
        return tree
    parts = tuple(without(p, dropped) for p in tree.parts)
    if all(isinstance(p, Fixed) for p in parts):
        return Fixed(tree.size)
    return ProductTree(parts) if isinstance(tree, ProductTree) else SumTree(parts)


def to_json(tree: Tree) -> Any:
    """Write an axis as JSON: a number, a group's name, or {"product": [...]} / {"sum": [...]}."""
    if isinstance(tree, Fixed):
        return tree.size
    if isinstance(tree, Units):
        return tree.group
    kind = "product" if isinstance(tree, ProductTree) else "sum"
    return {kind: [to_json(p) for p in tree.parts]}


def from_json(value: Any, sizes: Mapping[str, int]) -> Tree:
    """Read an axis back.

    Raises:
        StructureError: not such a value, or an unknown group.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return Fixed(value)
    if isinstance(value, str) and value in sizes:
        return Units(value, sizes[value])
    if isinstance(value, dict) and len(value) == 1:
        kind, parts = next(iter(value.items()))
        if kind in ("product", "sum") and isinstance(parts, Sequence) and not isinstance(parts, str):
            trees = tuple(from_json(p, sizes) for p in parts)
            return ProductTree(trees) if kind == "product" else SumTree(trees)
    raise StructureError(
        f'Expected an axis: a size, a group\'s name, {{"product": [...]}} or {{"sum": [...]}}. Got {value!r}. '
        "Export a spec with `thalweg view --json` to see the form."
    )
