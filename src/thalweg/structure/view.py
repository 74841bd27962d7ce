"""view: what the coordinates of a module mean, as groups of interchangeable units.

A group is a set of units (neurons, channels, heads); its members are the dims of parameters and buffers along
which those units lie. A producer member makes a unit (incoming weights, bias, normalisation), a consumer
member reads it (outgoing weights).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from thalweg.errors import StructureError
from thalweg.structure.tree import Fixed, Tree, Units, from_json, groups_of, to_json, without

Role = Literal["producer", "consumer", "both"]
Coupling = Literal["none", "average", "other"]


@dataclass(frozen=True)
class Member:
    """A dim of a parameter or buffer along which a group's units lie.

    Args:
        tensor: dotted name of the parameter or buffer.
        dim: which dim.
        role: "producer", "consumer", or "both" (a tied weight).
    """

    tensor: str
    dim: int
    role: Role


@dataclass(frozen=True)
class Group:
    """A set of units that may be permuted without changing the function.

    Args:
        name: the first module that makes the units, numbered where one module makes several groups.
        size: number of units.
        members: where the units lie.
        coupling: "average" if an average runs over the units (LayerNorm, GroupNorm): every unit may be
            duplicated equally often; "other" (softmax, sum): none may be duplicated.
        bilinear: contracted between two activations (query–key): no outgoing weight that could be shared.
        scaled: producers that scale a unit, (name, dim), if only positively homogeneous operations lie
            between them and the consumers; empty otherwise.
        zero_preserving: a unit whose incoming weights are zero is zero on all data.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    coupling: Coupling = "none"
    bilinear: bool = False
    scaled: tuple[tuple[str, int], ...] = ()
    zero_preserving: bool = False

    @property
    def is_homogeneous(self) -> bool:
        """Scaling a unit's input by c > 0 and its output by 1/c keeps the function."""
        return bool(self.scaled)

    @property
    def is_tied(self) -> bool:
        """Some weight both makes and reads the units, so that a share cannot go to one alone."""
        return any(m.role == "both" for m in self.members)

    @property
    def obstacle(self) -> str | None:
        """Why units cannot be duplicated at all; None if they can."""
        if self.is_tied:
            return "a tied weight both makes and reads its units"
        if self.bilinear:
            return "its units are contracted between two activations (query and key)"
        if self.coupling == "other":
            return "a softmax, sum, maximum, joint average or function of weights runs over its units"
        if not any(m.role == "producer" for m in self.members):
            return "no parameter makes its units"
        if self.coupling == "none" and not any(m.role == "consumer" for m in self.members):
            return "no parameter reads its units"
        return None

    @property
    def is_duplicable(self) -> bool:
        """Units may be split (all of them equally often, if the coupling is an average)."""
        return self.obstacle is None

    @property
    def flags(self) -> tuple[str, ...]:
        """Words for the table."""
        words = []
        if self.is_duplicable:
            words.append("duplicable" if self.coupling == "none" else "duplicable evenly")
        if self.coupling != "none":
            words.append("coupled")
        if self.bilinear:
            words.append("bilinear")
        if self.is_tied:
            words.append("tied")
        if self.is_homogeneous:
            words.append("homogeneous")
        return tuple(words)


@dataclass(frozen=True)
class View:
    """The groups of a module, and every axis of its parameters and buffers in terms of them.

    Args:
        groups: in the order in which the forward pass first uses them.
        axes: name of a parameter or buffer -> one tree for each dim.
        frozen_by: operations without a rule that froze an axis -> how often they did.
        rejected: groups that verification dropped.
        error: relative change of the outputs under random permutations of all groups at once; NaN if the
            view was not verified.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))
        >>> from thalweg.structure import trace
        >>> view = trace(net, torch.zeros(3, 2))
        >>> [(g.name, g.size) for g in view.groups]
        [('0', 5)]
    """

    groups: tuple[Group, ...]
    axes: Mapping[str, tuple[Tree, ...]] = field(repr=False)
    frozen_by: Mapping[str, int] = field(default_factory=dict)
    rejected: tuple[str, ...] = ()
    error: float = float("nan")

    def group(self, name: str) -> Group:
        """Find a group by name.

        Raises:
            StructureError: no such group.
        """
        for group in self.groups:
            if group.name == name:
                return group
        frozen = f" Operations without a rule froze others: {', '.join(self.frozen_by)}." if self.frozen_by else ""
        raise StructureError(
            f"Expected one of the groups {', '.join(g.name for g in self.groups) or '(none)'}. Got {name!r}.{frozen} "
            "See `thalweg view`."
        )

    def members_of(self, tensor: str) -> dict[tuple[int, str], Role]:
        """Give (dim, group) -> role for one parameter or buffer."""
        return {(m.dim, g.name): m.role for g in self.groups for m in g.members if m.tensor == tensor}

    def without_groups(self, names: Sequence[str]) -> "View":
        """Drop groups, noting them as rejected."""
        dropped = frozenset(names)
        return replace(
            self,
            groups=tuple(g for g in self.groups if g.name not in dropped),
            axes={n: tuple(without(t, dropped) for t in trees) for n, trees in self.axes.items()},
            rejected=(*self.rejected, *(g.name for g in self.groups if g.name in dropped)),
        )

    def to_json(self) -> str:
        """Write the view as JSON; `View.from_json` reads it back."""
        groups = [
            {
                "name": g.name,
                "size": g.size,
                "members": [[m.tensor, m.dim, m.role] for m in g.members],
                "coupling": g.coupling,
                "bilinear": g.bilinear,
                "scaled": [list(s) for s in g.scaled],
                "zero_preserving": g.zero_preserving,
                "flags": list(g.flags),
            }
            for g in self.groups
        ]
        axes = {name: [to_json(t) for t in trees] for name, trees in self.axes.items()}
        report = {
            "frozen_by": dict(self.frozen_by),
            "rejected": list(self.rejected),
            "error": _or_none(self.error),
        }
        return json.dumps({"view": 1, "groups": groups, "axes": axes, **report}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "View":
        """Read a view written by `to_json`.

        Raises:
            StructureError: not such a text.
        """
        try:
            value = json.loads(text)
            sizes = {g["name"]: int(g["size"]) for g in value["groups"]}
            groups = tuple(
                Group(
                    g["name"],
                    int(g["size"]),
                    tuple(Member(str(t), int(d), r) for t, d, r in g["members"]),
                    g["coupling"],
                    bool(g["bilinear"]),
                    tuple((str(n), int(d)) for n, d in g["scaled"]),
                    bool(g["zero_preserving"]),
                )
                for g in value["groups"]
            )
            axes = {n: tuple(from_json(t, sizes) for t in trees) for n, trees in value["axes"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StructureError(
                f"Expected a view as `thalweg view --json` writes it. Got {type(error).__name__}: {error}. "
                "Export it again."
            ) from error
        error_ = value.get("error")
        return cls(
            groups,
            axes,
            value.get("frozen_by", {}),
            tuple(value.get("rejected", ())),
            float("nan") if error_ is None else error_,
        )

    @classmethod
    def of_spec(cls, module: nn.Module, spec: Mapping[str, Sequence[Sequence[Any]]]) -> "View":
        """Build a view from a hand-written spec; verify it with `verified` before you trust it.

        Args:
            module: the module that the spec describes.
            spec: group -> list of (name, dim) or (name, dim, role). Default role: dim 0 of a weight, and any
                vector, is a producer; a later dim is a consumer.

        Raises:
            StructureError: an unknown name, a dim out of range, or sizes that differ within a group.
        """
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        axes: dict[str, list[Tree]] = {n: [Fixed(s) for s in t.shape] for n, t in state.items()}
        groups = []
        for name, entries in spec.items():
            members = tuple(_member(name, entry, state) for entry in entries)
            sizes = {state[m.tensor].shape[m.dim] for m in members}
            if len(sizes) != 1:
                raise StructureError(
                    f"Expected the members of {name!r} to have one size. Got sizes {sorted(sizes)}. Mend the spec."
                )
            size = sizes.pop()
            for m in members:
                axes[m.tensor][m.dim] = Units(name, size)
            groups.append(Group(name, size, members))
        return cls(tuple(groups), {n: tuple(trees) for n, trees in axes.items()})


def _member(group: str, entry: Sequence[Any], state: Mapping[str, Any]) -> Member:
    name, dim = entry[0], entry[1]
    if name not in state or not 0 <= dim < state[name].ndim:
        raise StructureError(
            f"Expected {group!r} to list (parameter, dim) of this module. Got ({name!r}, {dim}). Mend the spec."
        )
    role: Role = entry[2] if len(entry) > 2 else ("consumer" if dim > 0 else "producer")
    return Member(name, dim, role)


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def named_groups(axes: Mapping[str, tuple[Tree, ...]]) -> set[str]:
    """Collect the names of the groups that occur along any axis."""
    return {g for trees in axes.values() for tree in trees for g in groups_of(tree)}
