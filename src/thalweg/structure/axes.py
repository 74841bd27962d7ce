"""The algebra of axes: what every position along an axis stands for, found out by unification.

An axis is a tree. A leaf is a set of interchangeable units, a product is what `view` makes of several axes
(row-major), a sum is what `cat` makes of them. Operations that demand that two axes be the same unify them;
views refine leaves; an operation that tells positions apart freezes what it touches.
"""

import math
from collections.abc import Iterator, Sequence

INHOMOGENEOUS = "inhomogeneous"
NOT_ZERO_PRESERVING = "not zero-preserving"
AVERAGED = "averaged"
COUPLED = "coupled"
BILINEAR = "bilinear"


class Leaf:
    """A set of units; once bound, another name for the axis that it turned out to be."""

    __slots__ = ("flags", "frozen", "size", "target")

    def __init__(self, size: int, frozen: str | None = None, flags: frozenset[str] = frozenset()) -> None:
        self.size = size
        self.frozen = frozen
        self.flags = flags
        self.target: Axis | None = None


class Product:
    """Row-major product of axes, at least two of them, none of size one."""

    __slots__ = ("parts", "size")

    def __init__(self, parts: "Sequence[Axis]") -> None:
        self.parts = tuple(parts)
        self.size: int = math.prod(p.size for p in self.parts)


class Sum:
    """Concatenation of axes, at least two of them, none empty."""

    __slots__ = ("parts", "size")

    def __init__(self, parts: "Sequence[Axis]") -> None:
        self.parts = tuple(parts)
        self.size: int = sum(p.size for p in self.parts)


Axis = Leaf | Product | Sum


def product(parts: Sequence[Axis]) -> Axis:
    """Build a product, dropping trivial factors."""
    kept = [p for p in parts if p.size != 1]
    if not kept:
        return Leaf(1)
    return kept[0] if len(kept) == 1 else Product(kept)


def concatenation(parts: Sequence[Axis]) -> Axis:
    """Build a sum, dropping empty terms."""
    kept = [p for p in parts if p.size != 0]
    if not kept:
        return Leaf(0)
    return kept[0] if len(kept) == 1 else Sum(kept)


def resolve(axis: Axis) -> Axis:
    """Follow bindings to what the axis is known to be now."""
    while isinstance(axis, Leaf) and axis.target is not None:
        axis = axis.target
    return axis


def leaves(axis: Axis) -> Iterator[Leaf]:
    """Yield the unbound leaves of an axis, in order, repeated where they occur again."""
    axis = resolve(axis)
    if isinstance(axis, Leaf):
        yield axis
    else:
        for part in axis.parts:
            yield from leaves(part)


def factors(axis: Axis) -> list[Axis]:
    """List the factors of an axis (itself, if it is no product); none is a product or trivial."""
    axis = resolve(axis)
    if isinstance(axis, Product):
        return [f for part in axis.parts for f in factors(part)]
    return [] if axis.size == 1 else [axis]


def terms(axis: Axis) -> list[Axis]:
    """List the terms of an axis (itself, if it is no sum); none is a sum."""
    axis = resolve(axis)
    if isinstance(axis, Sum):
        return [t for part in axis.parts for t in terms(part)]
    return [axis]


def freeze(axis: Axis, reason: str) -> None:
    """Forbid any permutation of the axis."""
    for leaf in leaves(axis):
        leaf.frozen = leaf.frozen or reason


def flag(axis: Axis, name: str) -> None:
    """Mark every leaf of the axis."""
    for leaf in leaves(axis):
        leaf.flags |= {name}


def _bind(leaf: Leaf, axis: Axis) -> None:
    for other in leaves(axis):
        other.frozen = other.frozen or leaf.frozen
        other.flags |= leaf.flags
    leaf.target = axis


def factor(axis: Axis, outer: int, inner: int) -> tuple[Axis, Axis] | None:
    """Split an axis into (outer, inner), refining leaves; None where its positions do not factor."""
    axis = resolve(axis)
    if isinstance(axis, Leaf):
        pair = Leaf(outer), Leaf(inner)
        _bind(axis, product(pair))
        return pair
    if isinstance(axis, Product):
        return _factor_product(axis, outer, inner)
    if any(t.size % inner for t in terms(axis)):
        return None
    pairs = [factor(t, t.size // inner, inner) if t.size != inner else (Leaf(1), t) for t in terms(axis)]
    if any(p is None for p in pairs):
        return None
    found = [p for p in pairs if p is not None]
    for _, other in found[1:]:
        unify(found[0][1], other)
    return concatenation([o for o, _ in found]), found[0][1]


def _factor_product(axis: Product, outer: int, inner: int) -> tuple[Axis, Axis] | None:
    head: list[Axis] = []
    rest = factors(axis)
    need = outer
    while need > 1:
        part = rest.pop(0)
        if need % part.size == 0:
            head.append(part)
            need //= part.size
        elif part.size % need == 0:
            pair = factor(part, need, part.size // need)
            if pair is None:
                return None
            head.append(pair[0])
            rest.insert(0, pair[1])
            need = 1
        else:
            return None
    return product(head), product(rest)


def cut(axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """Cut an axis into consecutive pieces, refining leaves; frozen pieces where its positions cannot be cut."""
    axis = resolve(axis)
    if len(sizes) == 1:
        return [axis]
    if isinstance(axis, Leaf):
        pieces: list[Axis] = [Leaf(s, "picked by position" if s == 1 else None) for s in sizes]
        _bind(axis, concatenation(pieces))
        return pieces
    if isinstance(axis, Product):
        inner = product(axis.parts[1:])
        if all(s % inner.size == 0 for s in sizes):
            return [product([p, inner]) for p in cut(axis.parts[0], [s // inner.size for s in sizes])]
        freeze(axis, "cut across a product")
        return [Leaf(s, "cut across a product") for s in sizes]
    return _cut_sum(axis, sizes)


def _cut_sum(axis: Sum, sizes: Sequence[int]) -> list[Axis]:
    rest = terms(axis)
    pieces = []
    for size in sizes:
        piece: list[Axis] = []
        need = size
        while need > 0:
            term = rest.pop(0)
            if term.size > need:
                term, remainder = cut(term, [need, term.size - need])
                rest.insert(0, remainder)
            piece.append(term)
            need -= term.size
        pieces.append(concatenation(piece))
    return pieces


def unify(one: Axis, two: Axis) -> None:
    """Demand that two axes of one size be the same; freeze both where that cannot be said in this algebra."""
    one, two = resolve(one), resolve(two)
    if one is two or (one.size == two.size == 1 and not (isinstance(one, Leaf) and isinstance(two, Leaf))):
        return
    if one.size != two.size:
        freeze(one, "sizes differ")
        freeze(two, "sizes differ")
    elif isinstance(one, Leaf):
        _bind(one, two)
    elif isinstance(two, Leaf):
        _bind(two, one)
    elif not (_unify_sums(one, two) if isinstance(one, Sum) or isinstance(two, Sum) else _unify_products(one, two)):
        freeze(one, "two layouts that do not match")
        freeze(two, "two layouts that do not match")


def _unify_products(one: Axis, two: Axis) -> bool:
    left, right = factors(one), factors(two)
    while left and right:
        a, b = resolve(left[0]), resolve(right[0])
        if a.size == b.size:
            unify(a, b)
            left.pop(0)
            right.pop(0)
            continue
        big, small, rest = (a, b, left) if a.size > b.size else (b, a, right)
        pair = factor(big, small.size, big.size // small.size) if big.size % small.size == 0 else None
        if pair is None:
            return False
        rest[0:1] = [pair[0], pair[1]]
        # A refinement may have refined other factors too: look at them afresh.
        left = [f for part in left for f in factors(part)]
        right = [f for part in right for f in factors(part)]
    return True


def _unify_sums(one: Axis, two: Axis) -> bool:
    points = sorted({*_ends(one), *_ends(two)})
    sizes = [b - a for a, b in zip([0, *points[:-1]], points, strict=True)]
    for a, b in zip(cut(one, sizes), cut(two, sizes), strict=True):
        unify(a, b)
    return True


def _ends(axis: Axis) -> list[int]:
    position, ends = 0, []
    for term in terms(axis):
        position += term.size
        ends.append(position)
    return ends


def reshape(axes: Sequence[Axis], shape: Sequence[int]) -> tuple[list[Axis], list[set[int]]] | None:
    """Give the axes of a row-major view, and from which input dims each comes; None where they mix."""
    atoms = [(f, d) for d, axis in enumerate(axes) for f in factors(axis)]
    result: list[Axis] = []
    sources: list[set[int]] = []
    for size in shape:
        need = size
        parts: list[Axis] = []
        source: set[int] = set()
        while need > 1:
            first, dim = atoms.pop(0)
            atom = resolve(first)
            if isinstance(atom, Product):  # refined meanwhile
                atoms[0:0] = [(f, dim) for f in factors(atom)]
                continue
            source.add(dim)
            if need % atom.size == 0:
                parts.append(atom)
                need //= atom.size
            elif atom.size % need == 0 and (pair := factor(atom, need, atom.size // need)) is not None:
                parts.append(pair[0])
                atoms.insert(0, (pair[1], dim))
                need = 1
            else:
                return None
        result.append(product(parts) if parts else Leaf(1))
        sources.append(source)
    return result, sources
