"""train: bring one network down its landscape by full-batch gradient steps, and keep the record of the way."""

import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from thalweg.errors import ConfigError
from thalweg.objective import Objective
from thalweg.structure.trace import arguments_of, call

# Records per decade of steps when `record="log"`. Chosen by us: 50 give steps 5 % apart, about 230 records
# in 300,000 steps, and a plateau of the shortest kind counted by `stagnation` (a factor 1.2) still holds
# four of them.
_RECORDS_PER_DECADE = 50
# Bytes of recorded thetas. Chosen by us; 10,000 records of a network of 3,200 parameters in float64.
_THETA_BYTES = 256 * 2**20

Progress = Callable[[int, float], None]


@runtime_checkable
class OptimizerFactory(Protocol):
    """Builds a torch optimizer, as the classes of `torch.optim` do."""

    def __call__(self, params: Iterable[nn.Parameter], *, lr: float) -> torch.optim.Optimizer:
        """Build the optimizer for one flat parameter."""


@dataclass(frozen=True)
class TrainingRun:
    """The record of one training.

    Args:
        steps: recorded steps, ascending, shape (records,); step 0 is the start.
        losses: R at the recorded steps.
        gradient_l1: ‖∇R‖₁ at the recorded steps.
        theta_steps: steps whose theta was kept, shape (kept,). If memory runs short, of two neighbours the
            one of the smaller gradient is kept.
        thetas: theta at those steps, shape (kept, params).
        theta: the last point; if the run diverged, the last recorded finite one.
        status: "finished", "stopped" (gradient below the bound asked for) or "diverged" (NaN or infinity).
        last_step: number of steps that led to `theta`.
        seconds: wall time.
    """

    steps: Int[Tensor, " records"]
    losses: Float[Tensor, " records"]
    gradient_l1: Float[Tensor, " records"]
    theta_steps: Int[Tensor, " kept"]
    thetas: Float[Tensor, "kept params"]
    theta: Float[Tensor, " params"]
    status: Literal["finished", "stopped", "diverged"]
    last_step: int
    seconds: float


def train(
    objective: Objective,
    theta: Float[Tensor, " params"],
    *,
    learning_rate: float,
    steps: int,
    optimizer: str | OptimizerFactory = "adam",
    record: str | int | Sequence[int] = "log",
    stop_gradient_l1: float | None = None,
    progress: Progress | None = None,
) -> TrainingRun:
    """Take full-batch steps θ ← θ - η·(direction of ∇R) and record the way.

    "gd" is θ - η∇R. "adam" is Kingma & Ba's Adam with the defaults of torch (β = 0.9, 0.999; ε = 1e-8), bit for bit
    that of `torch.optim.Adam` in its single-tensor form. Every gradient is that of all data.

    Args:
        objective: the landscape.
        theta: the start, shape (params,).
        learning_rate: η.
        steps: number of steps.
        optimizer: "adam", "gd", or a class such as `torch.optim.RMSprop` that is called with one flat
            parameter and `lr=learning_rate` and whose `step()` needs no closure.
        record: steps to record: "log" (50 per decade), every n-th, or the steps themselves. The start and
            the last step are always recorded.
        stop_gradient_l1: stop as soon as ‖∇R‖₁ is at or below this. Default: never.
        progress: called as `progress(step, loss)` at every recorded step.

    Returns:
        The run. A NaN or infinity ends it with status "diverged" and the last recorded finite point.

    Raises:
        ConfigError: an unknown optimizer, a learning rate or number of steps that is not positive, a record
            of steps outside the run.
        ShapeError: theta does not fit the module.

    **Source:** Adam: Kingma & Ba 2015 (arXiv 1412.6980), Algorithm 1. Full-batch training is that of Zhang
    et al. 2021 (arXiv 2105.14573), App. B.

    Example:
        >>> x = torch.linspace(-1, 1, 5).unsqueeze(1)
        >>> objective = Objective(nn.Linear(1, 1, bias=False), nn.MSELoss(), (x, 2 * x))
        >>> run = train(objective, torch.zeros(1), learning_rate=0.5, steps=50, optimizer="gd")
        >>> run.status, run.theta
        ('finished', tensor([2.]))
    """
    wanted = recording_steps(steps, record)
    if not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise ConfigError(f"Expected a positive learning rate. Got {learning_rate}. Choose one such as 1e-3.")
    start = time.perf_counter()
    slope = _Slope(objective, theta)
    advance = _stepper(slope, optimizer, learning_rate)
    log = _Log(slope)
    status: Literal["finished", "stopped", "diverged"] = "finished"
    for step in range(steps + 1):
        loss = slope.refresh()
        if not math.isfinite(loss):
            status = "diverged"
            break
        small = stop_gradient_l1 is not None and slope.l1() <= stop_gradient_l1
        if step in wanted or small:
            if not log.note(step, loss):
                status = "diverged"
                break
            if progress is not None:
                progress(step, loss)
        if small:
            status = "stopped"
            break
        if step < steps:
            advance()
    return log.run(status, time.perf_counter() - start)


def recording_steps(steps: int, record: str | int | Sequence[int]) -> frozenset[int]:
    """Spell out the steps to record, the first and the last included.

    Args:
        steps: number of steps of the run.
        record: "log" (50 per decade), every n-th, or the steps themselves.

    Returns:
        Steps in [0, steps].

    Raises:
        ConfigError: steps or the interval are below 1, or a step lies outside the run.

    Example:
        >>> sorted(recording_steps(10, 4))
        [0, 4, 8, 10]
    """
    if steps < 1:
        raise ConfigError(f"Expected at least one step. Got {steps}. Choose a positive number.")
    ends = {0, steps}
    if isinstance(record, int):
        if record < 1:
            raise ConfigError(f"Expected to record every n-th step, n ≥ 1. Got {record}. Choose n.")
        return frozenset(ends | set(range(0, steps, record)))
    if record == "log":
        count = math.ceil(_RECORDS_PER_DECADE * math.log10(steps)) + 1
        return frozenset(ends | {int(steps ** (i / count)) for i in range(count)})
    if isinstance(record, str):
        raise ConfigError(f"Expected record='log', an interval or steps. Got {record!r}. Choose one of them.")
    if any(not 0 <= step <= steps for step in record):
        raise ConfigError(
            f"Expected steps to record between 0 and {steps}. Got {min(record)} … {max(record)}. Leave out the rest."
        )
    return frozenset(ends | set(record))


class _Slope:
    """R and ∇R at a point that moves in place, without the cost of a functional call per step.

    A copy of the module has its parameters and their gradients as views of two flat vectors. Where that is
    not the objective's own computation (buffers that a train mode would change), the objective itself is
    asked.
    """

    def __init__(self, objective: Objective, theta: Tensor) -> None:
        objective.space.parameters(theta)
        self.theta = theta.detach().to(device=objective.device, dtype=objective.dtype).clone()
        self.gradient = torch.zeros_like(self.theta)
        self._objective = objective
        self._module = copy.deepcopy(objective.module)
        self._views = not any(True for _ in self._module.buffers())
        if not self._views:
            return
        values, slopes = objective.space.parameters(self.theta), objective.space.parameters(self.gradient)
        named = dict(self._module.named_parameters())
        for name, value in values.items():
            named[name].data = value
            named[name].grad = slopes[name]
        self._batches = list(objective.weighted_batches()) if objective.in_memory else None

    def refresh(self) -> float:
        """Recompute the gradient in place and return R."""
        if not self._views:
            value, gradient = self._objective.value_and_gradient(self.theta)
            self.gradient.copy_(gradient)
            return float(value)
        self.gradient.zero_()
        total, weights = 0.0, 0.0
        for weight, (inputs, targets) in self._batches or self._objective.weighted_batches():
            loss = self._objective.reduced(call(self._module, arguments_of(inputs)), targets)
            if loss.requires_grad:
                (loss if weight == 1.0 else loss * weight).backward()  # type: ignore[no-untyped-call]
            total += weight * loss.item()
            weights += weight
        if weights == 1.0 or self._objective.reduction == "sum":
            return total
        self.gradient.div_(weights)
        return total / weights

    def l1(self) -> float:
        """‖∇R‖₁ as of the last refresh."""
        return float(self.gradient.abs().sum())


def _stepper(slope: _Slope, optimizer: str | OptimizerFactory, learning_rate: float) -> Callable[[], object]:
    theta, gradient = slope.theta, slope.gradient
    if optimizer == "gd":
        return lambda: theta.add_(gradient, alpha=-learning_rate)
    if optimizer == "adam":
        return _adam(theta, gradient, learning_rate)
    if isinstance(optimizer, str):
        raise ConfigError(
            f"Expected optimizer 'adam', 'gd' or a class of torch.optim. Got {optimizer!r}. Choose one of them."
        )
    parameter = nn.Parameter(theta)
    parameter.grad = gradient
    return optimizer([parameter], lr=learning_rate).step


def _adam(theta: Tensor, gradient: Tensor, learning_rate: float) -> Callable[[], None]:
    """Adam on one flat vector: the operations of torch's single-tensor form, without its bookkeeping."""
    beta1, beta2, epsilon = 0.9, 0.999, 1e-8
    mean, square = torch.zeros_like(theta), torch.zeros_like(theta)
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = (1 - beta2**count) ** 0.5
        root = square.sqrt().div_(scale).add_(epsilon)
        theta.addcdiv_(mean, root, value=-learning_rate / (1 - beta1**count))

    return step


class _Log:
    """Collects the records; of the thetas it keeps what fits into memory."""

    def __init__(self, slope: _Slope) -> None:
        self._slope = slope
        self._rows: list[tuple[int, float, float]] = []
        self._kept: list[tuple[int, float, Tensor]] = []
        self._last = (0, slope.theta.clone())
        self._limit = max(16, _THETA_BYTES // (slope.theta.numel() * slope.theta.element_size()))

    def note(self, step: int, loss: float) -> bool:
        """Record a step; False if the gradient or theta is not finite."""
        l1 = self._slope.l1()
        if not (math.isfinite(l1) and bool(torch.isfinite(self._slope.theta).all())):
            return False
        self._rows.append((step, loss, l1))
        self._last = (step, self._slope.theta.clone())
        self._kept.append((step, l1, self._last[1]))
        if len(self._kept) > self._limit:
            pairs = zip(self._kept[::2], self._kept[1::2], strict=False)
            self._kept = [min(pair, key=lambda kept: kept[1]) for pair in pairs]
        return True

    def run(self, status: Literal["finished", "stopped", "diverged"], seconds: float) -> TrainingRun:
        """Close the record."""
        steps, losses, norms = zip(*self._rows, strict=True) if self._rows else ((), (), ())
        last_step, theta = self._last
        return TrainingRun(
            steps=torch.tensor(steps, dtype=torch.int64),
            losses=torch.tensor(losses, dtype=torch.float64),
            gradient_l1=torch.tensor(norms, dtype=torch.float64),
            theta_steps=torch.tensor([step for step, _, _ in self._kept], dtype=torch.int64),
            thetas=torch.stack([t for _, _, t in self._kept]) if self._kept else theta.new_empty(0, len(theta)),
            theta=theta,
            status=status,
            last_step=last_step,
            seconds=seconds,
        )
