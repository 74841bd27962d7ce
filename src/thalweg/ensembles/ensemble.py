"""Ensemble: several networks whose predictions are averaged; what they share is computed once."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from thalweg.ensembles.members import example_of, settled
from thalweg.ensembles.statistics import layers_with_statistics, re_estimated
from thalweg.errors import ConfigError, StructureError
from thalweg.matching.refit import Fit
from thalweg.objective import Objective
from thalweg.paths.pair import State
from thalweg.precision import copied, placed
from thalweg.probes.accuracy import Classes
from thalweg.structure.sites import Handler, SiteCall, run_with

Average = Literal["probabilities", "outputs"]

_SAME = 1e-9
"""Largest relative difference, in float64, between a net that is exported and the ensemble. Chosen by us."""


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Networks of one architecture, averaged.

    Args:
        name: for tables.
        module: the architecture, in eval mode.
        members: parameters and buffers of each; shared ones are the same in all.
        average: "probabilities": ln of the mean of the softmax probabilities, what a cross-entropy takes;
            "outputs": the mean of the outputs.
        axis: dim of the outputs along which classes lie; None if targets are no classes.
        shared: parameters and buffers of the backbone; what they compute is computed once.
        first_own: weight of the first layer that each member has for itself; None without a backbone.
        own_layers: how many linear maps each member has for itself; None: all.
        fits: the layers that were fitted, member by member.
        notes: what a user should know.
        example: a few inputs.
    """

    name: str
    module: nn.Module
    members: tuple[State, ...]
    average: Average
    axis: int | None
    shared: frozenset[str] = frozenset()
    first_own: str | None = None
    own_layers: int | None = None
    fits: tuple[Fit, ...] = ()
    notes: tuple[str, ...] = ()
    example: Any = field(default=None, repr=False)

    def member_outputs(self, inputs: Any) -> Iterator[Tensor]:
        """Give the outputs of one member after the other; the backbone's linear maps run for the first one only.

        Args:
            inputs: a batch.

        Yields:
            The outputs of each member.

        Raises:
            StructureError: the network gives something other than one tensor.
        """
        kept: list[Tensor] = []
        for number, state in enumerate(self.members):
            outputs = run_with(self.module, state, inputs, self._handler(kept, is_first=not number))
            if not isinstance(outputs, Tensor):
                got = type(outputs).__name__
                raise StructureError(f"Expected a network that gives one tensor. Got a {got}. Wrap the module.")
            yield outputs

    def outputs(self, inputs: Any) -> Tensor:
        """Compute the ensemble's outputs on a batch."""
        total: Tensor | None = None
        for outputs in self.member_outputs(inputs):
            total = self.added(total, outputs)
        return self.averaged(total, len(self.members))  # type: ignore[arg-type]

    def added(self, total: Tensor | None, outputs: Tensor) -> Tensor:
        """Add a member's outputs to the sum so far; None begins."""
        if self.average == "outputs" or self.axis is None:
            return outputs if total is None else total + outputs
        logs = outputs.log_softmax(self.axis)
        return logs if total is None else torch.logaddexp(total, logs)

    def averaged(self, total: Tensor, count: int) -> Tensor:
        """Make the average of the sum over so many members."""
        return total / count if self.average == "outputs" or self.axis is None else total - math.log(count)

    def export(self) -> dict[str, Tensor]:
        """Write the ensemble as one net of the same architecture.

        It is one if only the last layer is each member's own and the outputs are averaged: then the mean of the
        last layers gives the mean of the outputs. With a convex loss its loss is the members' mean loss at most.

        Returns:
            Parameters and buffers by name.

        Raises:
            StructureError: the ensemble is not one net, or what follows the last layer is not linear.

        **Source:** Anokhin & Yarotsky 2020 (arXiv 2008.00741), section 6. Proved by running it, in float64.
        """
        if len(self.members) == 1:
            return dict(self.members[0])
        if self.own_layers != 1 or self.average != "outputs":
            got = "all layers" if self.own_layers is None else f"{self.own_layers} own layers"
            raise StructureError(
                f"Expected an ensemble with one own layer and average 'outputs'. Got {got} and {self.average!r}. "
                "Only such a one is a single net."
            )
        found = mean_state(self.members, keep=self.shared)
        if self.example is not None:
            self._require_same(found)
        return found

    def _require_same(self, state: State) -> None:
        place = {"device": next(self.module.parameters()).device, "dtype": torch.float64}
        module, inputs = copied(self.module, **place), placed(self.example, **place)  # type: ignore[arg-type]
        doubles = tuple(placed(dict(member), **place) for member in self.members)  # type: ignore[arg-type]
        twin = Ensemble(self.name, module, doubles, self.average, self.axis)
        mean = mean_state(doubles, keep=self.shared)
        wanted, got = twin.outputs(inputs), run_with(module, mean, inputs, _untouched)
        if float((wanted - got).abs().max()) > _SAME * (1 + float(wanted.abs().max())):
            raise StructureError(
                "Expected a network whose outputs are linear in its last layer. Got one that goes on behind it. "
                "Average the outputs of the members instead."
            )

    def _handler(self, kept: list[Tensor], *, is_first: bool) -> Handler:
        if self.first_own is None or len(self.members) == 1:
            return _untouched
        place, is_behind = 0, False

        def handler(call: SiteCall) -> Tensor | None:
            nonlocal place, is_behind
            is_behind = is_behind or call.site.weight == self.first_own
            if is_behind or call.site.weight not in self.shared:
                return None
            if is_first:
                kept.append(call.apply(call.weight, call.bias))
            place += 1
            return kept[place - 1].clone()

        return handler


def mean_state(states: Sequence[State], keep: frozenset[str] = frozenset()) -> dict[str, Tensor]:
    """Average states; what is kept, and what is not floating, is the first one's."""
    return {
        name: tensor
        if name in keep or not tensor.is_floating_point()
        else torch.stack([state[name].double() for state in states]).mean(0).to(tensor.dtype)
        for name, tensor in states[0].items()
    }


def ensemble_of(
    objective: Objective, states: Sequence[State], name: str, average: Average | None = None, **more: Any
) -> Ensemble:
    """Make an ensemble of complete states; by default class probabilities are averaged, and outputs otherwise.

    Raises:
        ConfigError: probabilities are to be averaged, but targets are no classes; or no such average.
    """
    module = copied(objective.module, device=objective.device).eval()
    inputs, targets = example_of(objective)
    outputs = run_with(module, states[0], inputs, _untouched)
    axis = Classes.of(objective.loss, outputs, targets).axis
    chosen: Average = average or ("outputs" if axis is None else "probabilities")
    if chosen not in ("probabilities", "outputs"):
        raise ConfigError(f"Expected average 'probabilities' or 'outputs'. Got {chosen!r}. Choose one of them.")
    if chosen == "probabilities" and axis is None:
        raise ConfigError("Expected class targets to average probabilities. Got others. Average the outputs.")
    return Ensemble(name, module, tuple(states), chosen, axis, example=inputs, **more)


def single(objective: Objective, source: nn.Module | State, name: str = "single") -> Ensemble:
    """Take one network as an ensemble of one, to measure it like the others.

    Args:
        objective: the landscape of a module of its architecture.
        source: the network, or its state dict.
        name: for tables.

    Returns:
        The ensemble.

    Raises:
        ShapeError: the network is of another architecture.
        CheckpointError: a weight is not finite.
    """
    return ensemble_of(objective, settled(objective, [source]), name, "outputs")


def output_ensemble(
    objective: Objective, networks: Sequence[nn.Module | State], *, average: Average | None = None
) -> Ensemble:
    """Average the predictions of independent networks: nothing is shared.

    Args:
        objective: the landscape of a module of their architecture.
        networks: modules, or state dicts.
        average: "probabilities" or "outputs". Default: probabilities for class targets.

    Returns:
        The ensemble.

    Raises:
        ConfigError: fewer than two networks, or an average that does not apply.
        ShapeError: they are of different architectures.
        CheckpointError: a weight is not finite.

    Example:
        >>> x, y = torch.eye(2), torch.tensor([0, 1])
        >>> nets = [nn.Linear(2, 2) for _ in range(3)]
        >>> found = output_ensemble(Objective(nets[0], nn.CrossEntropyLoss(), (x, y)), nets)
        >>> found.average, bool(torch.allclose(found.outputs(x).exp().sum(1), torch.ones(2)))
        ('probabilities', True)
    """
    return ensemble_of(objective, settled(objective, networks, least=2), "independent", average)


def weight_average(objective: Objective, networks: Sequence[nn.Module | State]) -> Ensemble:
    """Average the weights of networks into one; running statistics are taken anew from the data.

    Args:
        objective: the landscape of a module of their architecture, on training data.
        networks: modules, or state dicts.

    Returns:
        An ensemble of one.

    Raises:
        ConfigError: fewer than two networks.
        ShapeError: they are of different architectures.
        CheckpointError: a weight is not finite.
    """
    state = mean_state(settled(objective, networks, least=2))
    layers = layers_with_statistics(objective.module)
    notes = (f"statistics of {len(layers)} normalisation layers re-estimated",) if layers else ()
    return ensemble_of(objective, [re_estimated(objective, state)], "weight average", "outputs", notes=notes)


def _untouched(call: SiteCall) -> Tensor | None:
    """Leave every linear map as it is."""
