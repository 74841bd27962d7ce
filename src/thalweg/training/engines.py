"""engines: what moves a population of points: a compiled loop for two-layer nets, or `torch.func` for any module."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._pytree import tree_map_only

from thalweg.batching import Batch
from thalweg.errors import ConfigError
from thalweg.objective import Objective
from thalweg.training.recognised import TwoLayerProblem, random_points, recognise

RUNNING, STOPPED, DIVERGED = 0, 1, 2

# Activations that trials in lockstep hold together. Chosen by us: 16 trials of width 3 on 50 samples, where the
# loop is fastest; a multiple of it no longer fits the first cache.
_LOCKSTEP_VALUES, _MOST_LOCKSTEP, _EVEN_GROUPS = 2400, 16, 4
# Widest input and output for which the compiled loop is taken by itself. Chosen by us: beyond, matrix products
# (BLAS) win over loops.
_WIDEST = 16
# How far the loop's gradient may lie from the landscape's, relative to its largest entry.
_AGREEMENT = 1e-9


@dataclass
class State:
    """A population under way: everything that decides its future, and the least gradient since the last record.

    Args:
        theta: the points, (trials, params).
        mean: Adam's first moment; zero for the others.
        square: Adam's second moment.
        status: 0 running, 1 stopped, 2 diverged.
        losses: R at the last step that was measured.
        norms: ‖∇R‖₁ there.
        least_l1: least ‖∇R‖₁ since the last record.
        least_loss: R there.
        least_step: the step.
        least_theta: the point.
    """

    theta: Float[Tensor, "trials params"]
    mean: Float[Tensor, "trials params"]
    square: Float[Tensor, "trials params"]
    status: Int[Tensor, " trials"]
    losses: Float[Tensor, " trials"]
    norms: Float[Tensor, " trials"]
    least_l1: Float[Tensor, " trials"]
    least_loss: Float[Tensor, " trials"]
    least_step: Int[Tensor, " trials"]
    least_theta: Float[Tensor, "trials params"]

    @classmethod
    def at(cls, thetas: Float[Tensor, "trials params"]) -> "State":
        """Begin at some points."""
        row = thetas.new_zeros(len(thetas))
        count = torch.zeros(len(thetas), dtype=torch.int64, device=thetas.device)
        grid = torch.zeros_like(thetas)
        return cls(
            theta=thetas.clone(),
            mean=grid,
            square=grid.clone(),
            status=count,
            losses=row,
            norms=row.clone(),
            least_l1=torch.full_like(row, math.inf),
            least_loss=row.clone(),
            least_step=count.clone(),
            least_theta=grid.clone(),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Give all tensors by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class Steps:
    """How points move.

    Args:
        optimizer: "gd" (θ - η g) or "adam".
        learning_rate: η.
        stop: ‖∇R‖₁ at or below which a trial stops; -1: never.
    """

    optimizer: Literal["gd", "adam"]
    learning_rate: float
    stop: float


@runtime_checkable
class Engine(Protocol):
    """Advances a state in place."""

    name: str

    def advance(
        self, state: State, how: Steps, begin: int, end: int, order: Int[Tensor, "steps batch"] | None, *, moves: bool
    ) -> None:
        """Take the steps [begin, end); without `moves` only measure at `begin`.

        At every step of full batches R and ‖∇R‖₁ are measured before the step, the least kept; a trial whose
        loss, gradient or point is not finite is marked as diverged, one below `how.stop` as stopped, and neither
        moves any more.

        Args:
            state: changed in place.
            how: the steps.
            begin: number of the first step.
            end: number of the step after the last.
            order: for each step the samples of its mini-batch; None: all data.
            moves: whether the points move.
        """
        ...


class Compiled:
    """The loop of `thalweg.compiled.two_layer`, a group of trials on each core at a time.

    Groups are the same whatever the number of workers, so that results do not depend on it.

    Args:
        objective: the landscape.
        problem: the same, as the loop takes it.
        workers: number of threads; the loop holds no lock.

    Raises:
        ConfigError: the loop's gradient is not the landscape's.
    """

    name = "compiled"

    def __init__(self, objective: Objective, problem: TwoLayerProblem, workers: int) -> None:
        from thalweg.compiled import functions, two_layer

        self._loop = two_layer.advance
        self._net = (problem.offsets, functions.ACTIVATIONS[problem.activation], two_layer.LOSSES[problem.loss])
        self._data = (problem.inputs, problem.targets, problem.weight)
        self._hidden, self._workers = problem.hidden, workers
        if not self.agrees(objective, torch.stack(list(random_points(objective)))):
            raise ConfigError(
                "Expected the compiled loop to have the landscape's gradient. Got another one. Use engine='func'."
            )

    def agrees(self, objective: Objective, thetas: Float[Tensor, "points params"]) -> bool:
        """Say whether value and gradient of the loop at some points are those of the landscape, up to rounding."""
        state = State.at(thetas)
        self.advance(state, Steps("gd", 1.0, -1.0), 0, 1, None, moves=True)
        values, slopes = objective.value_and_gradient(thetas)
        size = thetas.abs() + slopes.abs()  # what a difference of points is rounded by
        off = (thetas - state.theta - slopes).abs()
        near = off <= _AGREEMENT * slopes.abs().amax(1, keepdim=True) + 1e-14 * size
        same = (state.losses - values).abs() <= _AGREEMENT * values.abs() + 1e-14
        return bool((near.all(1) & same)[torch.isfinite(values) & torch.isfinite(slopes).all(1)].all())

    def advance(
        self, state: State, how: Steps, begin: int, end: int, order: Int[Tensor, "steps batch"] | None, *, moves: bool
    ) -> None:
        """Take the steps [begin, end); see `Engine`."""
        trials, params = state.theta.shape
        inputs, targets, _ = self._data
        samples = inputs.shape[1] if order is None else order.shape[1]
        most = max(1, min(_MOST_LOCKSTEP, _LOCKSTEP_VALUES // (self._hidden * samples), trials))
        groups = _EVEN_GROUPS * math.ceil(trials / (_EVEN_GROUPS * most))  # as many for each of a few threads
        lockstep = math.ceil(trials / groups)
        point = tuple(t.numpy() for t in (state.theta, state.mean, state.square))
        log = tuple(
            t.numpy()
            for t in (state.status, state.losses, state.norms, state.least_l1, state.least_loss, state.least_step,
                      state.least_theta)
        )  # fmt: skip
        batches = np.zeros((0, 0), dtype=np.int64) if order is None else order.numpy()
        steps = (1 if how.optimizer == "adam" else 0, how.learning_rate, how.stop)

        def group(first: int) -> None:
            units = [np.empty((lockstep, self._hidden, samples)) for _ in range(3)]
            batch = 0 if order is None else samples
            scratch = (
                *units,
                np.empty((lockstep, len(targets), samples)),
                np.empty((lockstep, params)),
                np.empty((len(inputs), batch)),
                np.empty((len(targets), batch)),
                np.empty(batch),
            )
            span = (first, min(first + lockstep, trials))
            self._loop(point, log, span, self._net, self._data, batches, steps, (begin, end, moves), scratch)

        heads = range(0, trials, lockstep)
        if self._workers == 1 or len(heads) == 1:
            for head in heads:
                group(head)
            return
        with ThreadPoolExecutor(min(self._workers, len(heads))) as pool:
            for done in [pool.submit(group, head) for head in heads]:
                done.result()


class Func:
    """`torch.func`: value and gradient of all points by vmap, any module, any device.

    Args:
        objective: the landscape.
    """

    name = "func"

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._is_plain = objective.in_memory and objective.mode == "eval"
        self._batches = list(objective.weighted_batches()) if objective.in_memory else []
        self._is_mean = objective.reduction != "sum"

    def advance(
        self, state: State, how: Steps, begin: int, end: int, order: Int[Tensor, "steps batch"] | None, *, moves: bool
    ) -> None:
        """Take the steps [begin, end); see `Engine`."""
        for step in range(begin, end):
            if order is None:
                values, slopes = self._on_all(state.theta)
            else:
                values, slopes = self._on(order[step - begin], state.theta)
            running = self._noted(state, values, slopes, step, how.stop, keeps=order is None)
            if moves:
                _move(state, slopes, running, how, step + 1)

    def _on_all(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Value and gradient on all data: what `Objective.value_and_gradient` gives, with less done at each call."""
        if self._is_plain:
            try:
                parts = [(weight, *self._batched(theta, batch)) for weight, batch in self._batches]
            except RuntimeError:  # an operation without a batching rule
                self._is_plain = False
            else:
                total = sum(weight for weight, _, _ in parts) if self._is_mean else 1.0
                values = sum((w * v for w, v, _ in parts[1:]), parts[0][0] * parts[0][1]) / total
                return values, sum((w * g for w, _, g in parts[1:]), parts[0][0] * parts[0][2]) / total
        return self._objective.value_and_gradient(theta)

    def _batched(self, theta: Tensor, batch: Batch, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        def loss(point: Tensor) -> Tensor:
            return scale * self._objective.batch_loss(point, *batch)

        chunk = self._objective.points_at_once(batch)
        slopes, values = torch.func.vmap(torch.func.grad_and_value(loss), chunk_size=chunk)(theta)
        return values, slopes

    def _on(self, samples: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Value and gradient on some samples, as an estimate of those on all."""
        rows = samples.to(self._objective.device)
        batch = tuple(tree_map_only(Tensor, lambda t: t[rows], part) for part in self._batches[0][1])
        scale = 1.0 if self._is_mean else (self._objective.num_samples() or 1) / len(rows)
        if self._is_plain:
            try:
                return self._batched(theta, batch, scale)
            except RuntimeError:  # an operation without a batching rule
                self._is_plain = False
        return self._one_by_one(theta, batch, scale)

    def _one_by_one(self, theta: Tensor, batch: Batch, scale: float) -> tuple[Tensor, Tensor]:
        values, slopes = [], []
        for point in theta:
            leaf = point.detach().clone().requires_grad_()
            value = scale * self._objective.batch_loss(leaf, *batch)
            values.append(value.detach())
            slopes.append(torch.autograd.grad(value, leaf, materialize_grads=True)[0])
        return torch.stack(values), torch.stack(slopes)

    @staticmethod
    def _noted(state: State, values: Tensor, slopes: Tensor, step: int, stop: float, *, keeps: bool) -> Tensor:
        running = state.status == RUNNING
        norms = slopes.abs().sum(1)
        finite = torch.isfinite(norms + values + state.theta.abs().sum(1))
        torch.where(running, values, state.losses, out=state.losses)
        torch.where(running, norms, state.norms, out=state.norms)
        state.status[running & ~finite] = DIVERGED
        running = running & finite
        if keeps:
            less = running & (norms < state.least_l1)
            torch.where(less, norms, state.least_l1, out=state.least_l1)
            torch.where(less, values, state.least_loss, out=state.least_loss)
            state.least_step[less] = step
            torch.where(less.unsqueeze(1), state.theta, state.least_theta, out=state.least_theta)
            state.status[running & (norms <= stop)] = STOPPED
            running = running & (norms > stop)
        return running


def _move(state: State, slopes: Tensor, running: Tensor, how: Steps, count: int) -> None:
    moving = running.unsqueeze(1)
    if how.optimizer == "gd":
        torch.where(moving, state.theta - how.learning_rate * slopes, state.theta, out=state.theta)
        return
    beta1, beta2, epsilon = 0.9, 0.999, 1e-8  # the defaults of torch.optim.Adam
    torch.where(moving, state.mean.lerp(slopes, 1 - beta1), state.mean, out=state.mean)
    torch.where(moving, beta2 * state.square + (1 - beta2) * slopes.square(), state.square, out=state.square)
    root = state.square.sqrt() / (1 - beta2**count) ** 0.5 + epsilon
    moved = state.theta - how.learning_rate / (1 - beta1**count) * state.mean / root
    torch.where(moving, moved, state.theta, out=state.theta)


def choose_engine(objective: Objective, name: str, workers: int) -> Engine:
    """Give the engine of that name; "auto" takes the compiled loop where it applies and wins.

    Args:
        objective: the landscape.
        name: "auto", "compiled" or "func".
        workers: threads of the compiled loop.

    Raises:
        ConfigError: no such engine, or the compiled loop does not apply.
    """
    if name not in ("auto", "compiled", "func"):
        raise ConfigError(f"Expected engine 'auto', 'compiled' or 'func'. Got {name!r}. Choose one of them.")
    if name == "func":
        return Func(objective)
    problem = recognise(objective) if _has_numba() else None
    if problem is None and name == "compiled":
        raise ConfigError(
            "Expected a two-layer net (tanh, sigmoid, ReLU or GELU; squared error, softmax with squared error, or "
            "cross-entropy) in float64 on the CPU, and numba. Got another landscape, or no numba. Use engine='func'."
        )
    is_narrow = problem is not None and max(len(problem.inputs), len(problem.targets)) <= _WIDEST
    if problem is None or (name == "auto" and not is_narrow):
        return Func(objective)
    try:
        return Compiled(objective, problem, workers)
    except ConfigError:
        if name == "compiled":
            raise
        return Func(objective)


def _has_numba() -> bool:
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True


def batch_orders(samples: int, batch: int, seed: int) -> Any:
    """Give a function (begin, end) -> the samples of the mini-batches of those steps.

    Every epoch is a permutation of its own, drawn from (seed, epoch), so that any stretch can be drawn alone; the
    last samples of an epoch that do not fill a batch are left out of it. All trials see the same batches.

    Args:
        samples: number of samples.
        batch: samples in a mini-batch.
        seed: of the permutations.
    """
    per_epoch = samples // batch

    def order(begin: int, end: int) -> Int[Tensor, "steps batch"]:
        rows = []
        for epoch in range(begin // per_epoch, (end - 1) // per_epoch + 1):
            drawn = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
            shuffled = torch.randperm(samples, generator=drawn)[: per_epoch * batch].view(per_epoch, batch)
            low, high = max(begin - epoch * per_epoch, 0), min(end - epoch * per_epoch, per_epoch)
            rows.append(shuffled[low:high])
        return torch.cat(rows)

    return order
