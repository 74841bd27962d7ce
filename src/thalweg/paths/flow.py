"""Fit a map of units to many trained nets: by the likelihood of their units, or by the loss between pairs of them."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from thalweg.batching import Batch
from thalweg.errors import ConfigError, ShapeError
from thalweg.matching.units import unit_rows, with_unit_rows
from thalweg.objective import Objective
from thalweg.paths.curves import hold_then_fall
from thalweg.paths.descent import Descent, endless_batches
from thalweg.paths.flow_model import FlowKind, UnitMap, identity_map
from thalweg.structure import Group, View
from thalweg.training.shuffling import shuffled_batches

Validate = Callable[[UnitMap], float]
Progress = Callable[[int, float], None]

_VALIDATIONS = 20
"""Times that a fit by the loss is validated. Chosen by us: 5 % of the steps apart."""
_VALIDATION_PAIRS = 4
"""Pairs of nets that it is validated on. Chosen by us."""


def fit_flow(  # noqa: PLR0913 - one fit; each keyword is one of its settings
    view: View,
    group: str,
    states: Sequence[Mapping[str, Tensor]],
    *,
    generator: torch.Generator,
    kind: FlowKind = "realnvp",
    transforms: int = 2,
    hidden: tuple[int, ...] | None = None,
    epochs: int = 20,
    batch_size: int = 1024,
    learning_rate: float = 1e-3,
    validate: Validate | None = None,
    progress: Progress | None = None,
) -> UnitMap:
    """Fit ν by maximum likelihood: the units of all nets, mapped by ν, are to be standard normal.

    Args:
        view: the groups.
        group: name of the group whose units are mapped.
        states: named parameters of the nets, one architecture.
        generator: of the weights and of the order of the units.
        kind: "realnvp" or "iaf".
        transforms: see `identity_map`.
        hidden: see `identity_map`.
        epochs: passes over all units. Chosen by us; the authors took up to 1,000, with the mid-point getting worse
            after tens.
        batch_size: units of a mini-batch. Default and the next: the authors' code.
        learning_rate: of Adam.
        validate: a loss of a map, lower is better, such as that of the midpoint of two of the nets: taken before
            the first epoch and after each, and the best map is returned. Default: minus the log-likelihood.
        progress: called as `progress(epoch, loss)`.

    Returns:
        The map.

    Raises:
        ConfigError: no net, or settings that are not positive; zuko is not installed.
        StructureError: the view has no such group.
        ShapeError: nets of unlike units.

    **Source:** Anokhin & Yarotsky 2020 (arXiv 2008.00741), section 3.3. Their mid-point got worse with training,
    and they stopped by it: `validate`.

    Example:
        >>> from torch import nn
        >>> nets = [nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 2)) for _ in range(3)]
        >>> view = View.of_spec(nets[0], {"hidden": [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)]})
        >>> states = [dict(net.named_parameters()) for net in nets]
        >>> draws = torch.Generator().manual_seed(0)
        >>> fitted = fit_flow(view, "hidden", states, hidden=(8,), epochs=2, generator=draws)
        >>> fitted.status, fitted.shape.features
        ('finished', 5)
    """
    _require_positive(len(states), epochs, batch_size, learning_rate)
    rows = torch.cat(
        [_alike(unit_rows(view, view.group(group), s, "butterfly"), view, group, states) for s in states]
    )
    options = {"kind": kind, "transforms": transforms, "hidden": hidden}
    unit_map = identity_map(group, rows, generator=generator, **options)  # type: ignore[arg-type]
    rows = rows.to(unit_map.mean)
    measure = validate or (lambda fitted: _likelihood_loss(fitted, rows))
    fit = _Fit(unit_map, learning_rate, measure)
    fit.validate()
    for epoch in range(epochs):
        for batch in torch.split(torch.randperm(len(rows), generator=generator), batch_size):
            loss = _nll(unit_map, rows[batch])
            if not fit.step(loss, 1.0):
                return fit.result("diverged")
        value = fit.validate()
        if progress is not None:
            progress(epoch + 1, value)
    return fit.result("finished")


def fit_bijection(  # noqa: PLR0913 - one fit; each keyword is one of its settings
    objective: Objective,
    view: View,
    group: str,
    thetas: Float[Tensor, "nets params"],
    *,
    generator: torch.Generator,
    transforms: int = 2,
    hidden: tuple[int, ...] | None = (128, 128),
    steps: int = 400,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    noise: float = 0.5,
    at: Literal["middle", "anywhere"] = "middle",
    held_out: int = 0,
    progress: Progress | None = None,
) -> UnitMap:
    """Fit ν by the network's own loss halfway between random pairs of nets.

    A step draws two nets, shuffles the units of the second (a net does not care, and ν is not to learn their
    order), adds noise to the units of both, and goes down the loss of the net at t on one mini-batch. As ν starts as
    the identity, the first path is Arc about the mean of all units. The loss on fixed pairs and data is taken as the
    fit goes on, and the best ν is kept: on those it is never worse than Arc.

    Args:
        objective: the landscape, with the training data.
        view: the groups.
        group: name of the group whose units are mapped.
        thetas: the nets, one for each row.
        generator: of everything that is drawn.
        transforms: see `identity_map`; the map is a RealNVP, whose inverse is as fast as itself.
        hidden: widths of the hidden layers in each coupling. The paper's 2,000 are for the 32,000 units of 16 nets;
            128 are chosen by us for a few nets (800 learn 1,200 units by heart, and others gain nothing). None: as
            `identity_map` has it.
        steps: one pair and one mini-batch each. Chosen by us.
        batch_size: samples of a mini-batch.
        learning_rate: of Adam, held for half of the steps, then falling to 1 %. Chosen by us.
        noise: normal noise on the units that are fitted on, in standard deviations of each feature. Chosen by us:
            what ν learns then holds for units beside those of these nets.
        at: t = ½, as in the paper, or t ~ U(0, 1).
        held_out: so many of the last nets are only validated on, in pairs among them (2 or more) or with the
            others. Default: none, validation is on pairs of the nets that are fitted on.
        progress: called as `progress(step, loss)` with the validated loss.

    Returns:
        The map.

    Raises:
        ConfigError: fewer than two nets to fit on, or settings that are not positive; zuko is not installed.
        StructureError: the view has no such group.
        ShapeError: the nets do not fit the objective.

    **Source:** Anokhin & Yarotsky 2020 (arXiv 2008.00741), section 3.3 (RNVP Bijection). The optimiser is not
    published. Departures: identity at the start, shuffled units, noise, the best ν kept.

    Example:
        >>> from torch import nn
        >>> x, y = torch.randn(64, 2), torch.randint(2, (64,))
        >>> nets = [nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 2)) for _ in range(3)]
        >>> view = View.of_spec(nets[0], {"hidden": [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)]})
        >>> objective = Objective(nets[0], nn.CrossEntropyLoss(), (x, y))
        >>> thetas = torch.stack([objective.theta(net) for net in nets])
        >>> draws = torch.Generator().manual_seed(0)
        >>> fitted = fit_bijection(objective, view, "hidden", thetas, steps=5, hidden=(8,), generator=draws)
        >>> min(fitted.losses) <= fitted.losses[0]
        True
    """
    _require_positive(len(thetas) - held_out - 1, steps, batch_size, learning_rate, noise)
    nets = _Nets(objective, view, view.group(group), thetas, generator)
    options = {"transforms": transforms, "hidden": hidden, "dtype": objective.dtype}
    rows = nets.rows[: len(thetas) - held_out].flatten(0, 1)
    unit_map = identity_map(group, rows, generator=generator, **options)  # type: ignore[arg-type]
    fitted_on, validated_on = range(len(thetas) - held_out), range(len(thetas))[-held_out:]
    others = validated_on if held_out >= 2 else fitted_on
    trials = [nets.pair(others, validated_on) for _ in range(_VALIDATION_PAIRS)]
    data = next(shuffled_batches(objective, _VALIDATION_PAIRS * batch_size, generator))
    fit = _Fit(unit_map, learning_rate, lambda fitted: _mean_loss(nets, fitted, trials, data))
    fit.validate()
    stream = endless_batches(objective, batch_size, generator)
    for step in range(steps):
        t = 0.5 if at == "middle" else float(torch.rand((), generator=generator, dtype=torch.float64))
        pair = nets.pair(fitted_on, fitted_on)
        loss = nets.loss(unit_map, pair, t, next(stream), noise * unit_map.std)
        if not fit.step(loss, hold_then_fall(step / steps)):
            return fit.result("diverged")
        if (step + 1) * _VALIDATIONS // steps > step * _VALIDATIONS // steps:
            value = fit.validate()
            if progress is not None:
                progress(step + 1, value)
    return fit.result("finished")


@dataclass(frozen=True)
class _Pair:
    """Two nets by number, and an order of the units of the second."""

    first: int
    second: int
    order: Tensor


class _Nets:
    """Nets to draw pairs from, and the loss between them."""

    def __init__(
        self, objective: Objective, view: View, group: Group, thetas: Tensor, generator: torch.Generator
    ) -> None:
        self._view, self._group, self._generator = view, group, generator
        self._descent = Descent(objective)
        placed = thetas.detach().to(device=objective.device, dtype=objective.dtype)
        self._states = [objective.space.parameters(theta) for theta in placed]
        rows = [unit_rows(view, group, state, "butterfly") for state in self._states]
        self.rows = torch.stack(rows).to(placed)

    def pair(self, first: Sequence[int], second: Sequence[int]) -> _Pair:
        """Draw two nets, different ones, and an order."""
        i = first[self._below(len(first))]
        others = [j for j in second if j != i]
        j = others[self._below(len(others))]
        return _Pair(i, j, torch.randperm(self._group.size, generator=self._generator))

    def loss(self, unit_map: UnitMap, pair: _Pair, t: float, batch: Batch, noise: Tensor | None = None) -> Tensor:
        """Compute the loss of the net at t, differentiable in ν; noise has a size for each feature."""
        ends_rows = [self.rows[pair.first], self.rows[pair.second][pair.order]]
        if noise is not None:
            ends_rows = [rows + noise * self._normal(rows) for rows in ends_rows]
        first, last = (unit_map.latent(rows) for rows in ends_rows)
        ends = zip(self._states[pair.first].items(), self._states[pair.second].values(), strict=True)
        between = {name: torch.lerp(a, b, t) for (name, a), b in ends}
        rows = unit_map.between(first, last, t)
        parameters = with_unit_rows(self._view, self._group, between, "butterfly", rows)
        return self._descent.loss_at(parameters, batch)

    def _normal(self, rows: Tensor) -> Tensor:
        return torch.randn(rows.shape, generator=self._generator, dtype=rows.dtype).to(rows.device)

    def _below(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self._generator))


class _Fit:
    """Steps of Adam on ν, and the best ν so far."""

    def __init__(self, unit_map: UnitMap, learning_rate: float, measure: Validate) -> None:
        self._map, self._rate, self._measure = unit_map, learning_rate, measure
        self._parameters = list(unit_map.network.parameters())
        self._optimizer = torch.optim.Adam(self._parameters, lr=learning_rate)
        self._losses: list[float] = []
        self._best, self._kept = math.inf, copy.deepcopy(unit_map.network.state_dict())

    def step(self, loss: Tensor, factor: float) -> bool:
        """Go down the loss; False if it is not finite."""
        if not math.isfinite(loss.item()):
            return False
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for settings in self._optimizer.param_groups:
            settings["lr"] = self._rate * factor
        self._optimizer.step()
        return True

    def validate(self) -> float:
        """Measure ν and keep it if it is the best."""
        with torch.no_grad():
            value = self._measure(self._map)
        self._losses.append(value)
        if value < self._best:
            self._best, self._kept = value, copy.deepcopy(self._map.network.state_dict())
        return value

    def result(self, status: Literal["finished", "diverged"]) -> UnitMap:
        """Give the best ν."""
        self._map.network.load_state_dict(self._kept)
        return replace(self._map, losses=tuple(self._losses), status=status)


def _mean_loss(nets: _Nets, unit_map: UnitMap, pairs: Sequence[_Pair], data: Batch) -> float:
    return sum(float(nets.loss(unit_map, pair, 0.5, data)) for pair in pairs) / len(pairs)


def _nll(unit_map: UnitMap, rows: Tensor) -> Tensor:
    """Minus the log-likelihood of a feature, less its constant: (½‖ν(x)‖² - log|det ∂ν|) / features."""
    latent, log_det = unit_map.network().call_and_ladj((rows - unit_map.mean) / unit_map.std)
    loss: Tensor = (0.5 * latent.square().sum(1) - log_det).mean() / unit_map.shape.features
    return loss


def _likelihood_loss(unit_map: UnitMap, rows: Tensor) -> float:
    pieces = [(len(part), float(_nll(unit_map, part))) for part in torch.split(rows, 4096)]
    return sum(count * value for count, value in pieces) / len(rows)


def _alike(rows: Tensor, view: View, group: str, states: Sequence[Mapping[str, Tensor]]) -> Tensor:
    features = unit_rows(view, view.group(group), states[0], "butterfly").shape[1]
    if rows.shape[1] != features:
        raise ShapeError(
            f"Expected units of {features} features in every net. Got {rows.shape[1]}. Pass nets of one architecture."
        )
    return rows


def _require_positive(nets: int, length: int, batch_size: int, learning_rate: float, noise: float = 0.0) -> None:
    if nets < 1 or min(length, batch_size) < 1 or not (0 < learning_rate < math.inf and 0 <= noise < math.inf):
        raise ConfigError(
            "Expected enough nets (one for a likelihood, two for pairs, and those held out) and positive settings. "
            f"Got {length} epochs or steps, batches of {batch_size}, learning rate {learning_rate}, "
            f"noise {noise}. Mend them."
        )
