"""agreement: how far networks compute what another one does, measured over all data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from thalweg.batching import num_samples
from thalweg.errors import DataError, NumericalError, ShapeError
from thalweg.kernels import plain_kernels
from thalweg.objective import Loss, Objective
from thalweg.probes.accuracy import Classes
from thalweg.structure.trace import output_tensors

Progress = Callable[[float, str], None]
AgreementKind = Literal["predictions", "outputs"]


@dataclass(frozen=True)
class Comparison:
    """What a network computes on all data, beside what another one does.

    Args:
        loss: R on all data.
        accuracy: fraction of the labels that the largest output names; None where targets are no classes.
        agreement: in [0, 1]. Of predictions: the fraction of labels for which both networks have their largest
            output at the same class. Of outputs, where targets are no classes: max(0, 1 − Σ|f̃ − f|²/Σ|f − f̄|²),
            the share of the variance of the other's outputs f (about their mean over the samples) that f̃ explains.
        kind: which of the two.
        max_change: max|f̃ − f|/max|f|.
        mean_change: mean|f̃ − f|/mean|f|.
    """

    loss: float
    accuracy: float | None
    agreement: float
    kind: AgreementKind
    max_change: float
    mean_change: float


def compare(
    objective: Objective,
    theta: Float[Tensor, " params"],
    modules: Sequence[nn.Module],
    *,
    progress: Progress | None = None,
) -> tuple[Comparison, ...]:
    """Measure what several networks compute beside the one at theta, in one pass over the data.

    Targets are classes if they are labels, or rows of one 1 among zeros (one-hot vectors, as for a mean squared
    error); then predictions are compared, else outputs.

    Args:
        objective: data, loss and the network that the others are held against.
        theta: its point, shape (params,).
        modules: the others; they take the same inputs and give outputs of the same shape.
        progress: called as progress(fraction, text) after every batch.

    Returns:
        One comparison for the network at theta with itself, then one for each module.

    Raises:
        DataError: no target counts in the loss.
        NumericalError: outputs of the network at theta or of a module are not finite.
        ShapeError: theta does not fit the module, outputs differ in shape, or a module has no trainable parameter.
        StructureError: a module cannot be copied.

    Source:
        zhang2021embedding, figure 5 (predictions). The agreement of outputs is ours: a coefficient of
        determination, which is 1 for the same outputs and 0 for none better than their mean.

    Example:
        >>> x, y = torch.eye(3), torch.tensor([0, 1, 2])
        >>> objective = Objective(nn.Linear(3, 3), nn.CrossEntropyLoss(), (x, y))
        >>> theta = torch.cat([torch.eye(3).reshape(-1), torch.zeros(3)])
        >>> [c.agreement for c in compare(objective, theta, [objective.module])][0]
        1.0
    """
    theta = theta.detach().to(device=objective.device, dtype=objective.dtype)
    twins = [_twin(objective, module) for module in modules]
    tallies = [_Tally(place) for place in range(1 + len(twins))]
    base = _Base()
    total, seen = objective.num_samples(), 0
    with torch.no_grad(), plain_kernels():
        for weight, (inputs, targets) in objective.weighted_batches():
            own = objective.apply(theta, inputs)
            base.add(objective.loss, own, targets, weight)
            tallies[0].add(base, own, weight * float(objective.reduced(own, targets)))
            for twin, tally in zip(twins, tallies[1:], strict=True):
                outputs = twin.apply(twin.theta(), inputs)
                tally.add(base, outputs, weight * float(objective.reduced(outputs, targets)))
            if progress is not None:
                seen += _count(inputs, targets)
                progress(seen / total if total else 0.0, f"{seen:,} samples through {len(tallies)} networks")
    return tuple(tally.comparison(base, is_sum=objective.reduction == "sum") for tally in tallies)


def _twin(objective: Objective, module: nn.Module) -> Objective:
    """Give another network on the same footing: mode, type, device, and nothing that it does to itself stays."""
    first = next(iter(objective.batches()))
    options: Any = {"mode": objective.mode, "dtype": objective.dtype, "device": objective.device}
    return Objective(module, objective.loss, [first], reduction=objective.reduction, **options)


def _count(inputs: Any, targets: Any) -> int:
    try:
        return num_samples((inputs, targets))
    except DataError:  # a batch that is not one row per sample
        return 1


def _in_double(outputs: Any, place: int) -> list[Tensor]:
    """Give the outputs of a network, 0 for the one at theta, and refuse NaN: a maximum would not show it."""
    parts = [t.to(torch.float64) for t in output_tensors(outputs) if t.numel()]
    wrong = sum(int((~torch.isfinite(part)).sum()) for part in parts)
    if wrong:
        whose = f"module {place} of those compared" if place else "the network at theta"
        raise NumericalError(
            f"Expected finite outputs of {whose}. Got {wrong} of {sum(p.numel() for p in parts)} in a batch that are "
            "NaN or infinite. Check its weights."
        )
    return parts


@dataclass
class _Base:
    """The outputs that all others are held against: those of the batch, and sums over all batches."""

    outputs: list[Tensor] = field(default_factory=list)
    classes: Classes = field(default_factory=lambda: Classes(None))
    labels: Any = None
    predicted: Any = None
    weights: float = 0.0
    num_labels: int = 0
    largest: float = 0.0
    total: float = 0.0
    spreads: "list[_Spread]" = field(default_factory=list)

    def add(self, loss: Loss, outputs: Any, targets: Any, weight: float) -> None:
        """Take in one batch."""
        self.weights += weight
        self.outputs = _in_double(outputs, 0)
        self.classes, self.labels = _classes(loss, outputs, targets)
        if (axis := self.classes.axis) is not None:
            counts = self.labels != self.classes.ignored
            self.predicted = torch.where(counts, outputs.argmax(axis), self.classes.ignored)
            self.num_labels += self.classes.count(self.labels)
        if not self.spreads:
            self.spreads = [_Spread() for _ in self.outputs]
        for part, spread in zip(self.outputs, self.spreads, strict=True):
            self.largest = max(self.largest, float(part.abs().max()))
            self.total += float(part.abs().sum())
            if self.classes.axis is None:
                spread.add(part)


@dataclass
class _Tally:
    """Sums over all batches for one network: 0 is the one at theta."""

    place: int
    loss: float = 0.0
    right: int = 0
    same: int = 0
    largest: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    def add(self, base: _Base, outputs: Any, loss: float) -> None:
        """Take in one batch; `base` has taken it in."""
        self.loss += loss
        parts = _in_double(outputs, self.place)
        if [p.shape for p in parts] != [p.shape for p in base.outputs]:
            raise ShapeError(
                f"Expected outputs of shape {[tuple(p.shape) for p in base.outputs]}. "
                f"Got {[tuple(p.shape) for p in parts]}. Compare networks with the same outputs."
            )
        if base.classes.axis is not None:
            self.right += int(base.classes.correct(outputs, base.labels))
            self.same += int(base.classes.correct(outputs, base.predicted))
        for part, own in zip(parts, base.outputs, strict=True):
            change = part - own
            self.largest = max(self.largest, float(change.abs().max()))
            self.total += float(change.abs().sum())
            self.squares += float(change.square().sum())

    def comparison(self, base: _Base, *, is_sum: bool) -> Comparison:
        """Divide the sums."""
        loss = self.loss if is_sum else self.loss / base.weights
        changes = (self.largest / (base.largest or 1.0), self.total / (base.total or 1.0))
        if base.num_labels:
            accuracy, agreement = self.right / base.num_labels, self.same / base.num_labels
            return Comparison(loss, accuracy, agreement, "predictions", *changes)
        spread = sum(s.squares for s in base.spreads)
        unexplained = self.squares / spread if spread else float(self.squares > 0)
        agreement = max(0.0, 1.0 - unexplained) if unexplained == unexplained else 0.0  # noqa: PLR0124 - NaN
        return Comparison(loss, None, agreement, "outputs", *changes)


@dataclass
class _Spread:
    """Σ|f − f̄|² over batches, f̄ for every output on its own; for all alike once samples differ in shape.

    Means and squares are merged batch by batch (Chan et al. 1979), so that no large sums cancel.
    """

    count: float = 0.0
    mean: Tensor | None = None
    second: Tensor | None = None

    @property
    def squares(self) -> float:
        """The sum so far."""
        return float(self.second.sum()) if self.second is not None else 0.0

    def add(self, outputs: Tensor) -> None:
        """Take in one batch."""
        rows = outputs.reshape(len(outputs), -1) if outputs.ndim else outputs.reshape(1, 1)
        if self.mean is not None and self.mean.shape != rows.shape[1:]:
            self._pool()
            rows = rows.reshape(-1, 1)
        count, mean = float(len(rows)), rows.mean(0)
        second = (rows - mean).square().sum(0)
        if self.mean is None or self.second is None:
            self.count, self.mean, self.second = count, mean, second
            return
        step, whole = mean - self.mean, self.count + count
        self.second = self.second + second + step.square() * (self.count * count / whole)
        self.mean, self.count = self.mean + step * (count / whole), whole

    def _pool(self) -> None:
        """Make one mean of those of all outputs."""
        if self.mean is not None and self.second is not None and len(self.mean) > 1:
            away = (self.mean - self.mean.mean()).square().sum() * self.count
            self.second, self.count = (self.second.sum() + away).reshape(1), self.count * len(self.mean)
            self.mean = self.mean.mean().reshape(1)


def _classes(loss: Loss, outputs: Any, targets: Any) -> tuple[Classes, Any]:
    """Say where the classes lie, and give the targets as labels if they are classes."""
    if _are_one_hot(outputs, targets):
        return Classes(1), targets.argmax(1)
    return Classes.of(loss, outputs, targets), targets


def _are_one_hot(outputs: Any, targets: Any) -> bool:
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor) and targets.is_floating_point()):
        return False
    if targets.ndim != 2 or targets.shape[1] < 2 or outputs.shape != targets.shape:
        return False
    return bool((((targets == 0) | (targets == 1)).all()) & (targets.sum(1) == 1).all())
