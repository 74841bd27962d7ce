"""Arrangements: a network with the units of a group in other places, made when it is looked at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from thalweg.structure.tree import IntArray, gather, spread
from thalweg.structure.view import View

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Base:
    """What arrangements of one group share.

    Args:
        view: the groups.
        state: parameters and buffers whose units are arranged.
        group: whose.
        names: the parameters that are coordinates.
    """

    view: View
    state: Mapping[str, Tensor] = field(repr=False)
    group: str
    names: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True, eq=False)
class Arrangement:
    """A point of a path: at each place of a group stands a unit of the base, and is read or not.

    Every tensor is gathered along every axis; where a tensor reads the group, places that are not read are 0. Both
    together are an embedding into a network of the same size, with shares of 0 and 1.

    Args:
        base: the network, and which group.
        parents: for every place the unit of the base that it copies.
        live: whether what the place gives is read; else its outgoing weights are 0.
    """

    base: Base
    parents: IntArray = field(repr=False)
    live: BoolArray = field(repr=False)

    def parameters(self) -> Mapping[str, Tensor]:
        """Give every parameter of the space."""
        return {name: self._tensor(name) for name in self.base.names}

    def state(self) -> dict[str, Tensor]:
        """Give every parameter and buffer."""
        return {name: self._tensor(name) for name in self.base.state}

    def with_changes(
        self, filled: Mapping[int, int], read: Sequence[int] = (), unread: Sequence[int] = ()
    ) -> "Arrangement":
        """Give another arrangement.

        Args:
            filled: place -> the unit that it copies now.
            read: places that are read now.
            unread: places that are no longer read.
        """
        parents, live = self.parents.copy(), self.live.copy()
        for place, unit in filled.items():
            parents[place] = unit
        live[list(read)] = True
        live[list(unread)] = False
        return Arrangement(self.base, parents, live)

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Give the plain data: tensors, and what JSON can hold. Of many, take `pack_arrangements`."""
        return pack_arrangements([self])

    @staticmethod
    def unpack(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> "Arrangement":
        """Make the arrangement that `pack` gave as plain data."""
        return unpack_arrangements(tensors, meta)[0]

    def _tensor(self, name: str) -> Tensor:
        tensor, group = self.base.state[name], self.base.group
        reads = {
            dim for (dim, g), role in self.base.view.members_of(name).items() if g == group and role == "consumer"
        }
        for dim, tree in enumerate(self.base.view.axes.get(name, ())):
            index = gather(tree, {group: self.parents})
            if not np.array_equal(index, np.arange(len(index))):
                tensor = tensor.index_select(dim, torch.from_numpy(index).to(tensor.device))
            if dim in reads and not self.live.all():
                unread = np.flatnonzero(spread(tree, {group: self.live.astype(np.float64)}) == 0)
                tensor = tensor.index_fill(dim, torch.from_numpy(unread).to(tensor.device), 0)
        return tensor


def pack_arrangements(arrangements: Sequence[Arrangement]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Give arrangements as plain data; what they share is there once.

    Args:
        arrangements: any, of one base or of several.

    Returns:
        Tensors by key, and a dict that JSON can hold. `unpack_arrangements` reads them.
    """
    bases = list({id(a.base): a.base for a in arrangements}.values())
    numbers = {id(base): str(number) for number, base in enumerate(bases)}
    tensors: dict[str, Tensor] = {}
    for number, base in enumerate(bases):
        own = [a for a in arrangements if a.base is base]
        tensors |= {f"{number}.state.{name}": tensor for name, tensor in base.state.items()}
        tensors[f"{number}.parents"] = torch.from_numpy(np.stack([a.parents for a in own]))
        tensors[f"{number}.live"] = torch.from_numpy(np.stack([a.live for a in own]))
    described = [
        {"view": b.view.to_json(), "group": b.group, "names": list(b.names), "state": list(b.state)} for b in bases
    ]
    return tensors, {"bases": described, "of": [int(numbers[id(a.base)]) for a in arrangements]}


def unpack_arrangements(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> list[Arrangement]:
    """Make the arrangements that `pack_arrangements` gave as plain data.

    Args:
        tensors: by key.
        meta: the dict.

    Returns:
        The arrangements, in their order; those that shared a base share one.
    """
    bases = [
        Base(
            View.from_json(described["view"]),
            {name: tensors[f"{number}.state.{name}"] for name in described["state"]},
            described["group"],
            tuple(described["names"]),
        )
        for number, described in enumerate(meta["bases"])
    ]
    rows = [0] * len(bases)
    found = []
    for number in meta["of"]:
        parents, live = (tensors[f"{number}.{what}"][rows[number]].cpu().numpy() for what in ("parents", "live"))
        found.append(Arrangement(bases[number], parents, live))
        rows[number] += 1
    return found
