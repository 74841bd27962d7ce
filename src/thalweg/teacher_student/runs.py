"""runs: a teacher, its student and the source of their inputs, and how far the student has come."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from thalweg.checkpoint import load_into
from thalweg.errors import DataError, ShapeError
from thalweg.teacher_student.stepping import Masks, Stepper, twin

Source = Callable[[int], Tensor]
"""Draws inputs: called with a number of samples."""

Observe = Callable[[int, int, nn.Module], Mapping[str, Tensor]]
"""Called with the steps done, the number of the pair and its student."""

# Numbers of inputs and targets that are held at once. Chosen by us: 1 MB, many batches of what is small.
_HELD = 2**18


@dataclass(frozen=True)
class Fall:
    """Where a student's training ended, and what it saw on its way.

    Args:
        state: parameters and buffers at the end; if the training diverged, at the last observation that was finite,
            or at the start.
        steps: at which it was observed; after a divergence there are no more.
        losses: mean training loss of the steps since the observation before; at step 0, of the first batch.
        observations: what `observe` returned at each of them, on the CPU; empty where nothing observes.
        seconds: wall time of its steps, that before an interruption included, that of `observe` not.
        status: "done", or "diverged" (NaN or infinity in the loss, the weights or the buffers).
    """

    state: dict[str, Tensor]
    steps: tuple[int, ...]
    losses: Float[Tensor, " observations"]
    observations: tuple[Mapping[str, Tensor], ...]
    seconds: float
    status: Literal["done", "diverged"]

    def write(self, module: nn.Module) -> None:
        """Copy parameters and buffers into a module, in place, casting to its dtype and device.

        Args:
            module: of the student's architecture.

        Raises:
            CheckpointError: it has others.
        """
        load_into(module, self.state)


@dataclass(frozen=True)
class Pair:
    """One teacher and one student.

    Args:
        place: its number.
        teacher: whose outputs are learnt.
        student: the start.
        source: of the inputs.
        masks: parameter -> 0 where it is held at zero, 1 elsewhere.
    """

    place: int
    teacher: nn.Module
    student: nn.Module
    source: Source
    masks: Masks


class Run:
    """The training of one pair.

    Args:
        pair: its modules are copied.
        make: makes a stepper of a student.
        batch_size: samples of a step.
    """

    def __init__(self, pair: Pair, make: Callable[[nn.Module], Stepper], batch_size: int) -> None:
        self.pair, self._make, self._batch_size = pair, make, batch_size
        self._teacher, self._shown = twin(pair.teacher).eval(), twin(pair.student).eval()
        self._stepper = make(pair.student)
        self._state = self._stepper.state()
        self._status: Literal["done", "diverged"] = "done"
        self._steps: list[int] = []
        self._losses: list[float] = []
        self._observations: list[dict[str, Tensor]] = []
        self._total, self._count, self._seconds = 0.0, 0, 0.0  # of the losses since the last observation

    @property
    def is_going(self) -> bool:
        """Whether it has not diverged."""
        return self._status == "done"

    def advance(self, rates: Sequence[float], is_first: bool, tell: Callable[[int], None]) -> None:
        """Take a step for each learning rate.

        Args:
            rates: learning rates.
            is_first: whether these are the first steps of all.
            tell: called with the steps that are taken.

        Raises:
            DataError: inputs have another number, device or dtype than asked for.
            ShapeError: the networks do not run on the inputs, or the teacher's outputs have another shape than the
                student's.
        """
        start, taken, length = time.perf_counter(), 0, 1
        totals: list[Tensor] = []
        while self.is_going and taken < len(rates):
            inputs = self._inputs(1 if is_first and not taken else min(length, len(rates) - taken))
            with torch.no_grad():
                targets = self._first_targets(inputs) if is_first and not taken else self._teacher(inputs)
            length = max(1, _HELD // (self._batch_size * (inputs[0].numel() + targets[0].numel())))
            count = len(inputs) // self._batch_size
            totals.append(self._stepper.advance(inputs, targets, rates[taken : taken + count]))
            if is_first and not taken and self._losses:
                self._losses[0] = float(totals[0])  # of the observation of step 0
            taken += count
            tell(taken)
        if totals:
            self._total += float(torch.stack(totals).sum())
            self._count += taken
        self._seconds += time.perf_counter() - start

    def close(self, step: int, observe: Observe | None, *, is_observed: bool) -> None:
        """See whether all is finite, and observe.

        Args:
            step: how many are taken.
            observe: sees the student.
            is_observed: whether this step is one to observe at.
        """
        if not self.is_going:
            return
        state = self._stepper.state()
        if not (math.isfinite(self._total) and all(_is_finite(value) for value in state.values())):
            self._status = "diverged"
            return
        self._state = state
        if not is_observed:
            return
        self._steps.append(step)
        self._losses.append(self._total / self._count if self._count else math.nan)
        self._total, self._count = 0.0, 0
        if observe is not None:
            load_into(self._shown, state)
            self._shown.eval()
            seen = observe(step, self.pair.place, self._shown)
            self._observations.append({name: value.detach().cpu().clone() for name, value in seen.items()})

    def fall(self) -> Fall:
        """Give the result so far."""
        losses = torch.tensor(self._losses, dtype=torch.float64)
        return Fall(self._state, tuple(self._steps), losses, tuple(self._observations), self._seconds, self._status)

    def seen(self, step: int) -> Mapping[str, Tensor]:
        """Give what was observed at a step; nothing where there was nothing."""
        is_seen = bool(self._observations) and self._steps[-1] == step
        return self._observations[-1] if is_seen else {}

    def words(self) -> dict[str, Any]:
        """Give all but tensors that `take_up` needs."""
        names = [list(seen) for seen in self._observations]
        keys = ("_status", "_steps", "_losses", "_total", "_count", "_seconds")
        return {"names": names} | {key: getattr(self, key) for key in keys}

    def tensors(self) -> dict[str, Tensor]:
        """Give the tensors that `take_up` needs, but for what was observed."""
        source = self.pair.source.state()  # type: ignore[attr-defined]  # a source that is kept has one
        return {f"state/{name}": value for name, value in self._state.items()} | {
            f"source/{name}": value for name, value in source.items()
        }

    def take_up(
        self, words: Mapping[str, Any], tensors: Mapping[str, Tensor], seen: Mapping[int, Mapping[str, Tensor]]
    ) -> None:
        """Go on from what `words` and `tensors` gave.

        Args:
            words: of it.
            tensors: of it.
            seen: step -> what was observed at it.
        """
        device = next(iter(self._state.values())).device
        self._state = {name: tensors[f"state/{name}"].to(device) for name in self._state}
        prefix = "source/"
        source = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
        self.pair.source.load_state(source)  # type: ignore[attr-defined]  # a source that is kept has it
        self._status, self._steps, self._losses = words["_status"], words["_steps"], words["_losses"]
        self._total, self._count, self._seconds = words["_total"], words["_count"], words["_seconds"]
        self._observations = []
        for step, names in zip(self._steps, words["names"], strict=False):  # none where nothing observes
            found = seen[step] if names else {}
            self._observations.append({name: found[f"{self.pair.place}/{name}"] for name in names})
        module = twin(self.pair.student)
        load_into(module, self._state)
        self._stepper = self._make(module)

    def _inputs(self, count: int) -> Tensor:
        drawn = [self.pair.source(self._batch_size) for _ in range(count)]
        inputs = torch.cat(drawn)
        param = next(self._shown.parameters())
        if (len(inputs), inputs.device, inputs.dtype) != (count * self._batch_size, param.device, param.dtype):
            raise DataError(
                f"Expected inputs of {self._batch_size} samples a batch, {param.dtype}, on {param.device}, as the "
                f"student. Got {len(drawn[0])}, {inputs.dtype}, on {inputs.device}. Draw them as the student is."
            )
        return inputs

    def _first_targets(self, inputs: Tensor) -> Tensor:
        """Give the teacher's outputs, and see that all fits; of the whole batch, as a BatchNorm may need one."""
        try:
            targets, made = self._teacher(inputs), self._shown(inputs)
        except RuntimeError as error:
            raise ShapeError(
                f"Expected inputs that teacher and student run on. Got {tuple(inputs.shape)}: {error}. Draw them of "
                "the networks' shape."
            ) from error
        if made.shape[1:] != targets.shape[1:]:
            raise ShapeError(
                f"Expected a teacher and a student with outputs of one shape. Got {tuple(targets.shape[1:])} and "
                f"{tuple(made.shape[1:])}. Build the student with the teacher's outputs."
            )
        found: Tensor = targets
        return found


def _is_finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value).all())
