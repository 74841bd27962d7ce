"""training: students that learn their teachers' outputs by plain SGD, many pairs in one call."""

import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from thalweg.errors import CheckpointError, ConfigError, DataError, ShapeError, StructureError
from thalweg.teacher_student.fused import FusedStepper, is_fusable
from thalweg.teacher_student.kept import KeptFalls, falls_name
from thalweg.teacher_student.runs import Fall, Observe, Pair, Run, Source
from thalweg.teacher_student.stepping import AutogradStepper, Masks, Stepper
from thalweg.teacher_student.together import advance, workers_of
from thalweg.training.naming import worded

ENGINES = ("auto", "fused", "autograd")
"""What may train a student; both of the named ones agree to rounding."""

_Dropout = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)

# Seconds between two reports of progress. Chosen by us.
_TOLD_EVERY = 0.5


def train_students(  # noqa: PLR0913 - the pairs, and one keyword for each choice of a training
    teachers: Sequence[nn.Module],
    students: Sequence[nn.Module],
    sources: Sequence[Source],
    *,
    steps: int,
    batch_size: int = 64,
    learning_rate: float | Callable[[int], float] = 0.05,
    observe_at: Sequence[int] = (),
    observe: Observe | None = None,
    masks: Sequence[Masks] | None = None,
    engine: str = "auto",
    workers: int | None = None,
    keep: str | os.PathLike[str] | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> tuple[Fall, ...]:
    """Train each student on its teacher's outputs: θ ← θ - η·∇ of mean (f - f°)², over the batch and the outputs.

    Teachers run in eval mode, with their running statistics; students run in train mode, and their BatchNorms update
    theirs as torch does. Neither is changed, but the sources are drawn from. Torch's global randomness is not used.
    A pair's result does not depend on the others, nor on how many train at a time, but for rounding: some of torch's
    sums (those of its BatchNorm) depend on how many of its threads a student has.

    Args:
        teachers: one a pair; may be one module several times.
        students: the starts, one a pair, all of one architecture.
        sources: of the inputs, one a pair, such as `thalweg.data.GaussianStream`; a source of its own for each.
        steps: of each student.
        batch_size: samples of a step. Default: the paper's code.
        learning_rate: η, or a function of the step. Default: the paper's code.
        observe_at: numbers of steps, in 0 (the start) to `steps` (the end), at which to observe.
        observe: sees a copy of the student in eval mode; its tensors are kept on the CPU.
        masks: for each pair, parameter -> 0 where it is held at zero and 1 elsewhere (pruned weights).
        engine: "fused" writes forward and backward of fully connected chains as their products, without autograd;
            "autograd" takes any module; "auto" takes the first where it can. Both agree to rounding.
        workers: students that train at a time, each in a thread; they share torch's threads. With one, the calling
            thread trains them one after another. More need sources that share nothing, no generator, no iterator,
            nor torch's global randomness. Default: on the CPU as many as torch has threads, where all sources have
            `state` and `load_state`; elsewhere one.
        keep: folder for the state at each observation, from which the same call goes on; sources must have `state`
            and `load_state`. Data that `observe` holds do not tell one training from another. Remove the folder when
            the training is over.
        progress: called with the share of the work and a text.

    Returns:
        One result a pair.

    Raises:
        ConfigError: a number out of range (no workers among them), an unknown engine, or sources that cannot be kept.
        ShapeError: the lists differ in length, students in architecture, a teacher's outputs from its student's,
            masks from the parameters, or inputs from what the networks read.
        StructureError: a student drops at random or has nothing to train, a teacher's BatchNorm has no running
            statistics, or "fused" was asked for and is not possible.
        DataError: networks and inputs do not lie on one device, or have several floating types.
        CheckpointError: `keep` cannot be written.

    Source:
        tian2019luck (arXiv 1905.13405), section 4.2. Loss as in its code, MSELoss: the gradient is 2/(B·C) times that
        of the paper's ½ Σ (f - f°)².

    Example:
        >>> from thalweg.data import GaussianStream
        >>> from thalweg.nets import relu_mlp, teacher_init_, widened
        >>> teacher = teacher_init_(relu_mlp((4,)), torch.Generator().manual_seed(0))
        >>> with torch.random.fork_rng():
        ...     _ = torch.default_generator.manual_seed(0)
        ...     student = widened(teacher)
        >>> (fall,) = train_students([teacher], [student], [GaussianStream(20, seed=0)], steps=50, observe_at=[0, 50])
        >>> fall.status, bool(fall.losses[1] < fall.losses[0])
        ('done', True)
    """
    rates, marks = _rates(learning_rate, steps), _marks(observe_at, steps)
    pairs = _pairs(teachers, students, sources, masks)
    _require_trainable(pairs, batch_size)
    are_apart, device = _have_states(sources), next(pairs[0].student.parameters()).device
    at_once = workers_of(workers, len(pairs), device, are_apart=are_apart)
    chosen = _chosen(engine, pairs)
    runs = [Run(pair, functools.partial(_stepper, chosen, pair.masks, batch_size), batch_size) for pair in pairs]
    kept, done = None, -1
    if keep is not None:
        _require_states(sources)
        trained = [[name for name, p in pair.student.named_parameters() if p.requires_grad] for pair in pairs]
        masked = [list(pair.masks) for pair in pairs]
        settings = (batch_size, marks, observe, chosen, trained, masked, *map(worded, (*teachers, *students)))
        kept = KeptFalls(keep, falls_name(settings, _deciding(pairs, rates, batch_size)))
        done = _taken_up(kept, runs)
    told = _Told(progress, steps, len(runs))
    for start, end in itertools.pairwise([0, *sorted({0, steps, *marks})]):
        if end <= done:
            continue
        advance(runs, rates[start:end], start == 0, functools.partial(told, start), at_once)
        for run in runs:
            run.close(end, observe, is_observed=end in marks)
        if kept is not None:
            _keep(kept, end, runs)
    return tuple(run.fall() for run in runs)


def _stepper(engine: str, masks: Masks, batch_size: int, student: nn.Module) -> Stepper:
    return FusedStepper(student, masks, batch_size) if engine == "fused" else AutogradStepper(student, masks)


class _Told:
    """Tells the progress, at most every half second."""

    def __init__(self, progress: Callable[[float, str], None] | None, steps: int, count: int) -> None:
        self._progress, self._steps, self._count = progress, steps, count
        self._last = time.monotonic()

    def __call__(self, start: int, taken: int) -> None:
        step = start + taken / self._count
        if self._progress is None or (step < self._steps and time.monotonic() - self._last < _TOLD_EVERY):
            return
        self._last = time.monotonic()
        words = f"{self._count} students" if self._count > 1 else "student"
        self._progress(step / self._steps, f"{words}, step {int(step)} of {self._steps}")


def _rates(learning_rate: float | Callable[[int], float], steps: int) -> list[float]:
    if steps < 1:
        raise ConfigError(f"Expected at least one step. Got {steps}. Choose a number such as 1000.")
    rates = [float(learning_rate(step)) if callable(learning_rate) else learning_rate for step in range(steps)]
    if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
        wrong = next(rate for rate in rates if not (math.isfinite(rate) and rate >= 0))
        raise ConfigError(f"Expected learning rates that are not negative. Got {wrong}. Choose one such as 0.05.")
    return rates


def _marks(observe_at: Sequence[int], steps: int) -> tuple[int, ...]:
    marks = tuple(sorted(set(observe_at)))
    if marks and not 0 <= marks[0] <= marks[-1] <= steps:
        raise ConfigError(
            f"Expected steps to observe at from 0 to {steps}. Got {marks[0]} to {marks[-1]}. Leave the others out."
        )
    return marks


def _pairs(
    teachers: Sequence[nn.Module],
    students: Sequence[nn.Module],
    sources: Sequence[Source],
    masks: Sequence[Masks] | None,
) -> list[Pair]:
    every = [{}] * len(students) if masks is None else masks
    lengths = (len(teachers), len(students), len(sources), len(every))
    if len(set(lengths)) > 1 or not students:
        raise ShapeError(
            "Expected as many teachers, students, sources and masks, at least one. Got "
            f"{', '.join(map(str, lengths))}. Pass one of each a pair."
        )
    if len({id(source) for source in sources}) < len(sources):
        raise ConfigError(
            "Expected a source of its own for each pair. Got one twice. For the same inputs make another of its seed."
        )
    shapes = [{name: value.shape for name, value in student.state_dict().items()} for student in students]
    if any(shape != shapes[0] for shape in shapes):
        raise ShapeError("Expected students of one architecture. Got several. Train each kind in a call of its own.")
    for student, mask in zip(students, every, strict=True):
        params = dict(student.named_parameters())
        wrong = [name for name, value in mask.items() if name not in params or params[name].shape != value.shape]
        if wrong:
            raise ShapeError(
                f"Expected masks by the names of parameters, of their shapes. Got {wrong[0]!r} of "
                f"{tuple(mask[wrong[0]].shape)}. Take names and shapes of named_parameters()."
            )
    return [Pair(place, *items) for place, items in enumerate(zip(teachers, students, sources, every, strict=True))]


def _require_trainable(pairs: Sequence[Pair], batch_size: int) -> None:
    modules = [module for pair in pairs for module in (pair.teacher, pair.student)]
    tensors = [tensor for module in modules for tensor in module.state_dict().values()]
    devices = {str(tensor.device) for tensor in tensors}
    firsts = [next((p for p in module.parameters() if p.is_floating_point()), None) for module in modules]
    types = {str(param.dtype) for param in firsts if param is not None}
    for found, word, remedy in ((devices, "on one device", "device"), (types, "of one floating type", "dtype")):
        if len(found) > 1:
            raise DataError(
                f"Expected all teachers and students {word}. Got {', '.join(sorted(found))}. "
                f"Move them with module.to({remedy})."
            )
    for pair in pairs:
        _require_parts(pair)
    parts = list(pairs[0].student.modules())
    has_norm = any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in parts)
    if batch_size < 1 + has_norm:
        raise ConfigError(
            f"Expected a batch size of at least {1 + has_norm}. Got {batch_size}. Choose one such as 64."
        )


def _require_parts(pair: Pair) -> None:
    if any(isinstance(part, _Dropout) and part.p > 0 for part in pair.student.modules()):
        raise StructureError(
            "Expected a student without dropout. Got one that drops. Set its p to 0, or leave it out."
        )
    if not any(p.requires_grad for p in pair.student.parameters()):
        raise StructureError("Expected a student with parameters to train. Got none. Set requires_grad of some.")
    norms = [part for part in pair.teacher.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    if any(norm.running_mean is None for norm in norms):
        raise StructureError(
            "Expected a teacher whose BatchNorms have running statistics. Got one without. "
            "Build it with track_running_stats=True."
        )


def _chosen(engine: str, pairs: Sequence[Pair]) -> str:
    if engine not in ENGINES:
        raise ConfigError(f"Expected an engine of {', '.join(ENGINES)}. Got {engine!r}. Choose one of them.")
    linear = {name for name, part in pairs[0].student.named_modules() if isinstance(part, nn.Linear)}
    masked = {name.rpartition(".")[0] for pair in pairs for name in pair.masks}
    can = masked <= linear and all(is_fusable(pair.student) for pair in pairs)
    if engine == "fused" and not can:
        raise StructureError(
            "Expected a chain of Linear layers with biases, trained whole, torch's own BatchNorm1d, and masks of "
            'linear layers alone. Got others. Take engine="auto".'
        )
    return "fused" if can and engine != "autograd" else "autograd"


def _have_states(sources: Sequence[Source]) -> bool:
    return all(hasattr(source, "state") and hasattr(source, "load_state") for source in sources)


def _require_states(sources: Sequence[Source]) -> None:
    if not _have_states(sources):
        raise ConfigError(
            "Expected sources with state and load_state, as `keep` is given. Got one without. Take one of "
            "thalweg.data, or leave `keep` out."
        )


def _deciding(pairs: Sequence[Pair], rates: Sequence[float], batch_size: int) -> Iterator[Tensor]:
    """Yield all tensors that decide a training; a source's data count by the first batch, which is put back."""
    yield torch.tensor(rates, dtype=torch.float64)
    for pair in pairs:
        for tensors in (pair.teacher.state_dict(), pair.student.state_dict(), pair.masks):
            yield from tensors.values()
        before: Mapping[str, Tensor] = pair.source.state()  # type: ignore[attr-defined]  # seen by _require_states
        yield from before.values()
        yield pair.source(batch_size)
        pair.source.load_state(before)  # type: ignore[attr-defined]


def _keep(kept: KeptFalls, step: int, runs: Sequence[Run]) -> None:
    kept.observe(step, {run.pair.place: run.seen(step) for run in runs})
    tensors = {f"{run.pair.place}/{name}": value for run in runs for name, value in run.tensors().items()}
    kept.write(step, tensors, [run.words() for run in runs])


def _taken_up(kept: KeptFalls, runs: Sequence[Run]) -> int:
    """Go on from what is kept; the step that it is of, or -1."""
    found = kept.read()
    if found is None:
        return -1
    step, tensors, words = found
    steps = {at for own in words for at, names in zip(own["_steps"], own["names"], strict=False) if names}
    try:
        seen = {at: kept.observed(at) for at in sorted(steps)}  # all of them, before any run is changed
    except CheckpointError:  # observations are gone
        return -1
    for run, own in zip(runs, words, strict=True):
        prefix = f"{run.pair.place}/"
        ours = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        run.take_up(own, ours, seen)
    return step
