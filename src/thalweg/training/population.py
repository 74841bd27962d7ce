"""population: many trainings of one network from different starts, advanced together in one program.

Instead of the trajectories it keeps, between every two records, the point of least gradient over *every* step: the
least point of any plateau is then known without storing the way.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from thalweg.errors import ConfigError, ShapeError
from thalweg.objective import Objective
from thalweg.training.engines import DIVERGED, STOPPED, Engine, State, Steps, batch_orders, choose_engine
from thalweg.training.kept import Kept, Ledger, fingerprint
from thalweg.training.single import TrainingRun, recording_steps

# Stretches at which the compiled loop's losses are compared with the landscape's, after the training.
_CHECKS = 16
# Seconds that one call into an engine takes, so that progress, Ctrl-C and the kept state come in time.
_CALL_SECONDS, _TELL_SECONDS = 0.3, 1.0
# Seconds between two writings of the state; writing takes at most a twentieth of the time.
_WRITE_SECONDS, _WRITE_SHARE = 10.0, 20

Progress = Callable[[int, float], None]


@dataclass(frozen=True)
class PopulationRun:
    """The record of many trainings.

    Args:
        steps: recorded steps, ascending, shape (records,); step 0 is the start.
        losses: R at the recorded steps; that of the last step for a trial that stopped, NaN after a divergence.
        gradient_l1: ‖∇R‖₁ at the recorded steps, likewise.
        least_steps: for each stretch from one record to the next the step of least ‖∇R‖₁, over every step of
            the stretch; -1 where a trial was no longer under way. If memory runs short, neighbouring stretches
            are joined.
        least_losses: R there.
        least_l1: ‖∇R‖₁ there.
        least_thetas: the points there.
        thetas: the last points, (trials, params); of a trial that diverged, the last recorded finite one.
        statuses: "finished", "stopped" (gradient below the bound asked for) or "diverged", one for each trial.
        last_steps: number of steps that led to `thetas`.
        engine: "compiled" or "func".
        seconds: wall time, interruptions left out.
    """

    steps: Int[Tensor, " records"]
    losses: Float[Tensor, "trials records"]
    gradient_l1: Float[Tensor, "trials records"]
    least_steps: Int[Tensor, "trials stretches"]
    least_losses: Float[Tensor, "trials stretches"]
    least_l1: Float[Tensor, "trials stretches"]
    least_thetas: Float[Tensor, "trials stretches params"]
    thetas: Float[Tensor, "trials params"]
    statuses: tuple[Literal["finished", "stopped", "diverged"], ...]
    last_steps: Int[Tensor, " trials"]
    engine: str
    seconds: float

    @property
    def num_trials(self) -> int:
        """Number of trainings."""
        return len(self.thetas)

    @property
    def steps_per_second(self) -> float:
        """Steps of the whole population in a second of wall time."""
        return int(self.steps[-1]) / self.seconds if self.seconds > 0 else math.inf

    def trial(self, index: int) -> TrainingRun:
        """Give one training as `train` records it; the records are those of all and the points of least gradient.

        `stagnation` finds its plateaux, and their points of least gradient among all steps.

        Args:
            index: which trial, from 0.

        Returns:
            The record.

        Raises:
            ConfigError: there is no such trial.
        """
        if not 0 <= index < self.num_trials:
            raise ConfigError(f"Expected a trial from 0 to {self.num_trials - 1}. Got {index}. Choose another.")
        last = int(self.last_steps[index])
        recorded = self.steps <= last
        has = (self.least_steps[index] >= 0) & (self.least_steps[index] <= last)
        steps = torch.cat([self.steps[recorded], self.least_steps[index][has]])
        losses = torch.cat([self.losses[index][recorded], self.least_losses[index][has]])
        norms = torch.cat([self.gradient_l1[index][recorded], self.least_l1[index][has]])
        order = torch.argsort(steps, stable=True)
        first = torch.ones(len(order), dtype=torch.bool)
        first[1:] = steps[order][1:] > steps[order][:-1]
        order = order[first]
        return TrainingRun(
            steps=steps[order],
            losses=losses[order].double(),
            gradient_l1=norms[order].double(),
            theta_steps=self.least_steps[index][has],
            thetas=self.least_thetas[index][has],
            theta=self.thetas[index],
            status=self.statuses[index],
            last_step=last,
            seconds=self.seconds / self.num_trials,
        )


def train_population(  # noqa: PLR0913 - one noun each: the landscape, the starts, and how to walk
    objective: Objective,
    thetas: Float[Tensor, "trials params"],
    *,
    learning_rate: float,
    steps: int,
    optimizer: Literal["gd", "sgd", "adam"] = "gd",
    batch_size: int | None = None,
    seed: int = 0,
    record: str | int | Sequence[int] = "log",
    stop_gradient_l1: float | None = None,
    engine: Literal["auto", "compiled", "func"] = "auto",
    workers: int | None = None,
    keep: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> PopulationRun:
    """Train one network from many starts at once: θ ← θ - η·(direction of ∇R) for every row of `thetas`.

    The trials do not interact. Two-layer nets on the CPU in float64 run in a compiled loop, all else by
    `torch.func.vmap`; both give the same trajectory to rounding.

    Args:
        objective: the landscape; any module. Parallel batches of points must be possible for speed.
        thetas: the starts, one row for each trial, shape (trials, params).
        learning_rate: η.
        steps: number of steps.
        optimizer: "gd" (θ - η∇R), "sgd" (the same on mini-batches), "adam" (defaults of torch: β = 0.9, 0.999;
            ε = 1e-8), on all data or on mini-batches.
        batch_size: samples of a mini-batch, drawn without replacement within an epoch, the same for all trials.
            Default: all data; then the least gradient is looked for at every step, else at the records only.
        seed: of the mini-batches.
        record: steps to record: "log" (50 per decade), every n-th, or the steps themselves.
        stop_gradient_l1: a trial stops as soon as its ‖∇R‖₁ is at or below this. Default: never.
        engine: "compiled", "func", or "auto": the compiled loop where it applies and the layers are narrow.
        workers: threads of the compiled loop. Default: as many as torch uses.
        keep: a folder in which the state is kept, every ten seconds; called again with the same arguments, the
            training goes on from there and ends the same to the last bit, and a finished one is read back.
        progress: called as `progress(step, steps per second)`.

    Returns:
        The record of all trials. A NaN or infinity ends a trial with status "diverged", and only that trial.

    Raises:
        ConfigError: an unknown optimizer or engine, a learning rate, bound or number out of range, starts that
            are not finite, mini-batches of data that are not one pair of tensors in memory.
        ShapeError: the thetas do not fit the module.
        CheckpointError: the folder cannot be written.

    Source:
        zhang2021embedding (arXiv 2105.14573), section 5 and figure 4: 200 trials each for widths 1, 2, 3, whose
        trajectories are searched for small gradients. Departures: one program in place of 600 trainings.

    Example:
        >>> x = torch.linspace(-1, 1, 5).unsqueeze(1)
        >>> objective = Objective(torch.nn.Linear(1, 1, bias=False), torch.nn.MSELoss(), (x, 2 * x))
        >>> run = train_population(objective, torch.tensor([[0.0], [5.0]]), learning_rate=0.5, steps=50)
        >>> run.thetas.round(decimals=4).flatten().tolist()
        [2.0, 2.0]
    """
    records = sorted(recording_steps(steps, record))
    how = _steps(optimizer, learning_rate, batch_size, stop_gradient_l1)
    if thetas.ndim != 2 or thetas.shape[1] != objective.num_params or len(thetas) == 0:
        raise ShapeError(
            f"Expected starts of shape (trials, {objective.num_params}). Got {tuple(thetas.shape)}. "
            "Stack one Objective.theta for each trial."
        )
    if not bool(torch.isfinite(thetas).all()):
        raise ConfigError("Expected finite starts. Got NaN or infinity among them. Draw them again.")
    order = _order(objective, batch_size, seed)
    starts = thetas.detach().to(device=objective.device, dtype=objective.dtype)
    mover = choose_engine(objective, engine, _threads(workers))
    run = _run(mover, objective, starts, records, how, order, (batch_size, seed), keep, progress)
    if mover.name == "compiled" and not _is_of(objective, run):
        if engine == "compiled":
            raise ConfigError(
                "Expected a landscape that the compiled loop computes everywhere. Got one that differs where the "
                "training went. Use engine='func'."
            )
        mover = choose_engine(objective, "func", 1)
        run = _run(mover, objective, starts, records, how, order, (batch_size, seed), keep, progress)
    return run


def _run(  # noqa: PLR0913, PLR0917 - what train_population was given, settled
    mover: Engine,
    objective: Objective,
    starts: Tensor,
    records: Sequence[int],
    how: Steps,
    order: Callable[[int, int], Tensor] | None,
    batches: tuple[int | None, int],
    keep: str | os.PathLike[str] | None,
    progress: Progress | None,
) -> PopulationRun:
    ledger = Ledger(State.at(starts))
    kept = None
    if keep is not None:
        kept = Kept(Path(keep), fingerprint(objective, starts, (how, batches, records, mover.name)))
        kept.read_into(ledger)
        if not ledger.is_closed:
            kept.write(ledger)  # a folder that cannot be written is told before the work
    clock = _Clock(ledger, records[-1], progress, kept)
    try:
        _walk(ledger, records, mover.advance, how, order, clock)
    except KeyboardInterrupt:
        if ledger.is_whole:  # else what was written last stands
            clock.write()
        raise
    clock.write()
    return _closed(ledger, records, mover.name)


def _is_of(objective: Objective, run: PopulationRun) -> bool:
    """Say whether recorded losses are the landscape's, at points all along the way: a check of the compiled loop."""
    stretches = run.least_thetas.shape[1]
    places = sorted({round(i * (stretches - 1) / _CHECKS) for i in range(_CHECKS + 1)})
    thetas, losses = run.least_thetas[:, places].flatten(0, 1), run.least_losses[:, places].flatten()
    seen = (run.least_steps[:, places] >= 0).flatten()
    values = objective.value(thetas[seen])
    scale = run.losses[:, 0].nan_to_num().abs().max()
    return bool(((values - losses[seen]).abs() <= 1e-9 * values.abs() + 1e-13 * scale).all())


def _steps(optimizer: str, rate: float, batch_size: int | None, stop: float | None) -> Steps:
    if optimizer not in ("gd", "sgd", "adam"):
        raise ConfigError(f"Expected optimizer 'gd', 'sgd' or 'adam'. Got {optimizer!r}. Choose one of them.")
    if not (rate > 0 and math.isfinite(rate)):
        raise ConfigError(f"Expected a positive learning rate. Got {rate}. Choose one such as 1e-3.")
    if (optimizer == "sgd") != (batch_size is not None) and optimizer != "adam":
        raise ConfigError(
            f"Expected a batch_size with 'sgd' and none with 'gd'. Got {batch_size} with {optimizer!r}. "
            "Give both, or neither."
        )
    if stop is not None and not stop >= 0:
        raise ConfigError(f"Expected a bound of at least 0 to stop at. Got {stop}. Leave it out to stop never.")
    return Steps("adam" if optimizer == "adam" else "gd", rate, -1.0 if stop is None else stop)


def _order(objective: Objective, batch_size: int | None, seed: int) -> Callable[[int, int], Tensor] | None:
    if batch_size is None:
        return None
    samples = objective.num_samples()
    is_pair = (
        objective.in_memory
        and objective.mode == "eval"
        and samples is not None
        and sum(1 for _ in objective.batches()) == 1
    )
    if not is_pair or samples is None or not 1 <= batch_size <= samples:
        raise ConfigError(
            f"Expected mini-batches of at most {samples} samples of one pair of tensors in memory. "
            f"Got batch_size={batch_size}. Pass (inputs, targets) as the data, not in batches, in eval mode."
        )
    orders: Callable[[int, int], Tensor] = batch_orders(samples, batch_size, seed)
    return orders


def _threads(workers: int | None) -> int:
    if workers is not None and workers < 1:
        raise ConfigError(f"Expected at least one worker. Got {workers}. Leave it out for torch's number of threads.")
    return workers or torch.get_num_threads()


class _Clock:
    """Says how many steps one call may take, reports, and has the state written in time."""

    def __init__(self, ledger: Ledger, total: int, progress: Progress | None, kept: Kept | None) -> None:
        self._ledger, self._total, self._progress, self._kept = ledger, total, progress, kept
        self._call_steps = 1
        self._told = self._written = time.perf_counter()
        self._since = (time.perf_counter(), ledger.step)
        self._pause = _WRITE_SECONDS

    def allowed(self) -> int:
        """Steps that the next call may take."""
        return self._call_steps

    def note(self, steps: int, seconds: float) -> None:
        """Take note of a call."""
        self._ledger.seconds += seconds
        if seconds < _CALL_SECONDS / 2 and steps >= self._call_steps:
            self._call_steps *= 2
        elif seconds > 2 * _CALL_SECONDS:
            self._call_steps = max(1, self._call_steps // 2)
        now = time.perf_counter()
        if self._progress is not None and (now - self._told > _TELL_SECONDS or self._ledger.step >= self._total):
            begun, first = self._since
            self._told = now
            self._progress(min(self._ledger.step, self._total), (self._ledger.step - first) / max(now - begun, 1e-9))
        if now - self._written > self._pause:
            self.write()

    def write(self) -> None:
        """Have the state written, if it is kept at all."""
        if self._kept is not None:
            begun = time.perf_counter()
            self._kept.write(self._ledger)
            self._written = time.perf_counter()
            self._pause = max(_WRITE_SECONDS, _WRITE_SHARE * (self._written - begun))


def _walk(
    ledger: Ledger,
    records: Sequence[int],
    advance: Callable[..., None],
    how: Steps,
    order: Callable[[int, int], Tensor] | None,
    clock: _Clock,
) -> None:
    """Go from record to record; the ledger always stands at a whole step."""
    state, last = ledger.state, records[-1]
    while not ledger.is_closed:
        begun, step = time.perf_counter(), ledger.step
        ledger.is_whole = False
        due = ledger.num_records < len(records) and records[ledger.num_records] == step
        if due:
            ledger.open_stretch(step)
            if step == last or order is not None:
                advance(state, how, step, step + 1, None, moves=False)
            else:
                advance(state, how, step, step + 1, None, moves=True)
            ledger.note_record()
            if step == last:
                ledger.close()
                ledger.is_whole = True
                clock.note(1, time.perf_counter() - begun)
                break
            if order is None:
                ledger.step = step + 1
                ledger.is_whole = True
                clock.note(1, time.perf_counter() - begun)
                continue
        end = min(records[ledger.num_records], step + clock.allowed())
        advance(state, how, step, end, None if order is None else order(step, end), moves=True)
        ledger.step = end
        ledger.is_whole = True
        clock.note(end - step, time.perf_counter() - begun)


def _closed(ledger: Ledger, records: Sequence[int], engine: str) -> PopulationRun:
    state = ledger.state
    names: dict[int, Literal["finished", "stopped", "diverged"]] = {STOPPED: "stopped", DIVERGED: "diverged"}
    status = state.status.tolist()
    parts: dict[str, Any] = ledger.stacked()
    thetas = torch.where((state.status == DIVERGED).unsqueeze(1), ledger.sound, state.theta).cpu()
    stopped = torch.where(state.status == STOPPED, ledger.ended, torch.full_like(ledger.ended, records[-1]))
    return PopulationRun(
        steps=torch.tensor(records, dtype=torch.int64),
        **parts,
        thetas=thetas,
        statuses=tuple(names.get(s, "finished") for s in status),
        last_steps=torch.where(state.status == DIVERGED, ledger.sound_step, stopped).cpu(),
        engine=engine,
        seconds=ledger.seconds,
    )
