"""Free units of a group: set their outgoing weights to 0, and let the layers that read the group make up for it."""

import torch
from torch import Tensor

from thalweg.paths.adjust import RIDGE, Adjuster
from thalweg.paths.pair import Pair, State
from thalweg.structure.symmetry import unit_positions
from thalweg.structure.tree import IntArray


def without_units(pair: Pair, group: str, state: State, units: IntArray) -> State:
    """Give the state in which nothing reads some units of a group.

    The linear maps that read the group are fitted anew, by a ridge centred on their weights, to what they gave
    before, on what the units that stay give them.

    Args:
        pair: whose samples serve for the fits.
        group: of the units.
        state: parameters and buffers.
        units: numbers of the units.

    Returns:
        The state with the outgoing weights of these units 0.

    **Source:** ours.
    """
    view = pair.view
    gone = torch.zeros(view.group(group).size, dtype=torch.bool)
    gone[torch.from_numpy(units)] = True
    readers = {m.tensor: m.dim for m in view.group(group).members if m.role == "consumer"}
    dead = {name: _places(pair, name, dim, group, gone) for name, dim in readers.items()}
    fitted = [s.weight for s in pair.execution.sites if s.weight in readers and s.calls == 1 and s.groups == 1]
    adjuster = Adjuster(pair, ridge=RIDGE)

    def features(name: str, inputs: Tensor) -> Tensor:
        axis = -1 if pair.execution.site(name).kernel_dims == 0 else 1  # type: ignore[union-attr]
        shape = [1] * inputs.ndim
        shape[axis] = -1
        return inputs * (~dead[name]).to(inputs).reshape(shape)

    cut = dict(state)
    for name, dim in readers.items():
        cut[name] = _zeroed(state[name], dim, dead[name])
    wanted = adjuster.targets(state, frozenset(fitted))
    found = adjuster.fitted(cut, wanted, features=features)
    for name, dim in readers.items():
        if name in found:
            found[name] = _zeroed(found[name], dim, dead[name])
    return {**cut, **found}


def _places(pair: Pair, name: str, dim: int, group: str, gone: Tensor) -> Tensor:
    """Say of each place along a dim whether it belongs to a unit that goes."""
    units = torch.from_numpy(unit_positions(pair.view, name, dim, group))
    return (units >= 0) & gone[units.clamp(min=0)]


def _zeroed(weight: Tensor, dim: int, dead: Tensor) -> Tensor:
    kept = (~dead).to(weight)
    return weight * kept.reshape([-1 if d == dim else 1 for d in range(weight.ndim)])
