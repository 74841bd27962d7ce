"""fit: train any module by mini-batches, as a plain PyTorch script does, from a point to a point of its landscape.

`train` follows the gradient of all data and records the way; `fit` takes noisy steps on shuffled mini-batches, with
dropout, BatchNorm in train mode and augmentation, and cares for where it ends: it makes the end points of paths.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from thalweg.batching import Batch, mean_weight, num_samples
from thalweg.errors import ConfigError, DataError, ShapeError
from thalweg.objective import Objective
from thalweg.precision import copied
from thalweg.probes.accuracy import Classes
from thalweg.space import Space
from thalweg.structure.trace import arguments_of, call
from thalweg.training.naming import named
from thalweg.training.reporting import Observe, Observer, Progress, Teller, observer_words
from thalweg.training.resumption import DAMAGES, KeptFile, Randomness, landscape_name
from thalweg.training.schedules import Schedule, learning_rate_factors
from thalweg.training.shuffling import shuffled_batches
from thalweg.training.single import OptimizerFactory

LEARNING_RATES = {"sgd": 0.01, "adam": 0.001}
"""Learning rates where none is given: that of the paper's code for SGD, that of torch for Adam."""

# Seconds between two states on disk, at least. Chosen by us: a training of tiny epochs would do little but write.
_KEPT_EVERY = 1.0
# At most this share of the time goes into writing. Chosen by us: the state of a large net takes seconds to write.
_WRITING_SHARE = 0.1

Augment = Callable[[Any, torch.Generator], Any]


@dataclass(frozen=True)
class Fit:
    """Where a mini-batch training ended, and what it saw on its way.

    Args:
        theta: the last point; if the training diverged, that of the last epoch that ended finite, or the start.
        buffers: name -> buffer there, such as BatchNorm's running statistics.
        losses: mean loss over each epoch's mini-batches as the weights moved, in train mode, shape (epochs,).
        accuracies: share of the labels predicted meanwhile, shape (epochs,); None where targets are no labels.
        status: "finished", or "diverged" (NaN or infinity in the loss, the weights or the buffers).
        epochs: number of epochs that led to `theta`.
        seconds: wall time, that before an interruption included, that of `observe` not.
        observations: what `observe` returned at the start and after each epoch; empty where nothing observed.
    """

    theta: Float[Tensor, " params"]
    buffers: dict[str, Tensor]
    losses: Float[Tensor, " epochs"]
    accuracies: Float[Tensor, " epochs"] | None
    status: Literal["finished", "diverged"]
    epochs: int
    seconds: float
    observations: tuple[Mapping[str, float], ...] = ()

    def write(self, module: nn.Module) -> None:
        """Copy the point and the buffers into a module, in place, casting to its dtype and device.

        Args:
            module: of the same architecture.

        Raises:
            ShapeError: the module has other parameters or buffers.
        """
        buffers = dict(module.named_buffers())
        for name, value in self.buffers.items():
            if name not in buffers or buffers[name].shape != value.shape:
                raise ShapeError(
                    f"Expected a module with a buffer {name!r} of shape {tuple(value.shape)}. Got none. "
                    "Build it as the one that was trained."
                )
        Space.of(module).write(self.theta, module)
        with torch.no_grad():
            for name, value in self.buffers.items():
                buffers[name].copy_(value)


def fit(  # noqa: PLR0913 - the landscape, the start, and one keyword for each choice of the usual training loop
    objective: Objective,
    theta: Float[Tensor, " params"],
    *,
    epochs: int,
    generator: torch.Generator,
    batch_size: int = 128,
    optimizer: str | OptimizerFactory = "sgd",
    learning_rate: float | None = None,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    schedule: str | Schedule = "paper",
    augment: Augment | None = None,
    shuffle: bool = True,
    observe: Observe | None = None,
    keep: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Fit:
    """Train by mini-batches: for every epoch and every batch b of a new order, θ ← θ - η·(direction of ∇R_b(θ)).

    A copy of the module is trained in train mode: BatchNorm updates its statistics, dropout drops. The objective, its
    module and torch's global random state stay as they are. The same generator gives the same training, to the bit on
    one device. A mini-batch of a single sample that is left over is skipped if the module has a BatchNorm, which
    cannot take it.

    Args:
        objective: the landscape; its module and buffers are where the training starts from, but for theta.
        theta: the start, shape (params,).
        epochs: passes over the data.
        generator: on the CPU; source of the order, the augmentation and the dropout.
        batch_size: samples of a mini-batch. Default: the paper's code.
        optimizer: "sgd" (momentum as in torch), "adam" (torch's, with its defaults of β and ε), or a class such as
            `torch.optim.RMSprop` that is called with the parameters and `lr=` and whose `step()` needs no closure.
        learning_rate: η. Default: 0.01 for "sgd" (the paper's code), 0.001 for "adam" (torch); none for a class.
        momentum: of "sgd" alone. Default: the paper's code.
        weight_decay: of "sgd" and "adam": this times θ is added to the gradient. Default: the paper's code.
        schedule: factor on η, settled anew at each epoch's start: "paper" (1 up to half of the epochs, then linear
            to 0.01 at 90 %, then constant), "constant", "cosine", or a function of the share of the epochs done.
        augment: called as `augment(inputs, generator)` on each mini-batch, e.g. `thalweg.data.crop_and_flip`.
        shuffle: draw a new order for every epoch; else each has the same mini-batches, in the order of the data.
        observe: called as `observe(epochs done, module)` at the start and after each epoch that ended finite, with
            the module in training, in eval mode: it may read, measure and save, but must not change the module. Its
            numbers by name are kept with the training, which it does not disturb; torch's global generator is
            seeded for it, by `generator` and the epoch. An epoch that is done again is observed again.
        keep: folder for the state after each epoch (at most one write a second, and a tenth of the time). An
            interrupted training that is called again goes on from there and ends the same to the bit; it is told
            from others by its start, module, data, settings and the state of the generator. Functions of yours count
            with their source.
        progress: called as `progress(share of the work, text)` after each epoch, and within long ones.

    Returns:
        The end point, its buffers, and losses and accuracies epoch by epoch.

    Raises:
        ConfigError: an unknown optimizer or schedule, a number out of its range, a generator that is not on the CPU,
            or what `observe` returns are no numbers.
        ShapeError: theta does not fit the module.
        DataError: the batches cannot be cut, or no target counts in the loss.
        CheckpointError: the folder of `keep` cannot be written.

    **Source:** Settings of anokhin2020lowloss (arXiv 2008.00741), from its code; the text says SGD alone. One
    departure: the paper's code draws order and dropout from torch's global generator, here from `generator`.

    Example:
        >>> x = torch.linspace(-1, 1, 64).unsqueeze(1)
        >>> objective = Objective(nn.Linear(1, 1), nn.MSELoss(), (x, 2 * x + 1))
        >>> options = {"epochs": 40, "batch_size": 8, "weight_decay": 0.0}
        >>> found = fit(objective, torch.zeros(2), generator=torch.Generator().manual_seed(0), **options)
        >>> found.status, found.theta.round(decimals=2)
        ('finished', tensor([2., 1.]))
    """
    if theta.shape != (objective.num_params,):
        raise ShapeError(
            f"Expected theta of shape ({objective.num_params},). Got {tuple(theta.shape)}. "
            "Build it with Objective.theta(module)."
        )
    loop = _Loop(objective, batch_size, optimizer, learning_rate, momentum, weight_decay, augment, shuffle)
    factors = learning_rate_factors(schedule, epochs)
    _require_on_cpu(generator)
    file = None
    if keep is not None:
        words = (*loop.words(), *observer_words(observe))
        settings = (*words, objective.device.type, factors, generator.get_state().tolist())
        file = KeptFile(keep, landscape_name(objective, theta, settings))
    seed = int(torch.randint(2**62, (1,), generator=generator))
    run = _Run(loop, theta, generator, seed, observe)
    state = file.read() if file is not None else None
    if state is not None:
        try:
            run.take_up(state)
        except DAMAGES:  # of another form: the training begins anew
            run = _Run(loop, theta, generator, seed, observe)
    run.complete(factors, file, progress)
    return run.result()


def _require_on_cpu(generator: torch.Generator) -> None:
    if generator.device.type != "cpu":
        raise ConfigError(f"Expected a generator on the CPU. Got one on {generator.device}. Use torch.Generator().")


class _Loop:
    """What does not change during a training: the landscape, and how one step is made."""

    def __init__(
        self,
        objective: Objective,
        batch_size: int,
        optimizer: str | OptimizerFactory,
        learning_rate: float | None,
        momentum: float,
        weight_decay: float,
        augment: Augment | None,
        shuffle: bool,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"Expected a batch size of at least 1. Got {batch_size}. Choose a positive number.")
        if isinstance(optimizer, str) and optimizer not in LEARNING_RATES:
            raise ConfigError(
                f"Expected optimizer 'sgd', 'adam' or a class of torch.optim. Got {optimizer!r}. Choose one of them."
            )
        rate = learning_rate
        if rate is None and isinstance(optimizer, str):
            rate = LEARNING_RATES[optimizer]
        if rate is None or not (rate > 0 and math.isfinite(rate)):
            raise ConfigError(f"Expected a positive learning rate. Got {rate}. Choose one such as 0.01.")
        for name, value in (("momentum", momentum), ("weight decay", weight_decay)):
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"Expected a {name} that is not negative. Got {value}. Choose another.")
        self.objective, self.batch_size, self.learning_rate = objective, batch_size, rate
        self._optimizer, self._options, self.augment = optimizer, (momentum, weight_decay), augment
        self._shuffle = shuffle
        self.weigh = mean_weight(objective.loss, objective.reduction)
        self.skips_single = batch_size > 1 and any(
            isinstance(part, nn.modules.batchnorm._BatchNorm) for part in objective.module.modules()
        )
        total = objective.num_samples()
        self.num_batches = None if total is None else -(-total // batch_size)

    def words(self) -> tuple[Any, ...]:
        """Everything of the settings that decides the result, in a form whose text is stable."""
        fixed = (self.batch_size, self._shuffle, self.learning_rate, *self._options)
        return (*fixed, named(self._optimizer), named(self.augment), self.objective.reduction)

    def build_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """Make the optimizer of a module's trainable parameters.

        torch's fused form makes one pass over the memory of parameter, gradient and momentum, which takes 2.1 ms for
        1.6 million parameters on one core against 4.7 ms of the others.
        """
        parameters = [p for p in module.parameters() if p.requires_grad]
        momentum, decay = self._options
        fused = self.objective.device.type in ("cpu", "cuda")
        if self._optimizer == "sgd":
            return torch.optim.SGD(
                parameters, lr=self.learning_rate, momentum=momentum, weight_decay=decay, fused=fused
            )
        if self._optimizer == "adam":
            return torch.optim.Adam(parameters, lr=self.learning_rate, weight_decay=decay, fused=fused)
        if isinstance(self._optimizer, str):
            raise ConfigError(f"Expected optimizer 'sgd' or 'adam'. Got {self._optimizer!r}. Choose one of them.")
        return self._optimizer(parameters, lr=self.learning_rate)

    def batches(self, generator: torch.Generator) -> Iterator[tuple[float, Batch]]:
        """Yield (weight under the mean, mini-batch) of one epoch."""
        for inputs, targets in shuffled_batches(self.objective, self.batch_size, generator, shuffle=self._shuffle):
            if self.skips_single and num_samples((inputs, targets)) == 1:
                continue
            weight = 1.0 if self.objective.reduction == "sum" else self.weigh(targets)
            if weight:
                yield weight, (inputs if self.augment is None else self.augment(inputs, generator), targets)


class _Run:
    """A training under way: a copy of the module, its optimizer, and the books."""

    def __init__(
        self, loop: _Loop, theta: Tensor, generator: torch.Generator, seed: int, observe: Observe | None
    ) -> None:
        objective = loop.objective
        self._loop, self._generator = loop, generator
        self._randomness = Randomness(objective.device, seed)
        self._observer = Observer(observe, self._randomness)
        self._module = copied(objective.module, device=objective.device, dtype=objective.dtype).train()
        objective.space.write(theta, self._module)
        self._optimizer = loop.build_optimizer(self._module)
        self._rates = [float(group["lr"]) for group in self._optimizer.param_groups]
        self._losses: list[float] = []
        self._accuracies: list[float] = []
        self._seconds, self._is_diverged = 0.0, False

    def complete(self, factors: tuple[float, ...], file: KeptFile | None, progress: Progress | None) -> None:
        """Run the epochs that are left."""
        next_write, before = -math.inf, None
        self._observer.look(0, self._module)
        for epoch in range(len(self._losses), len(factors)):
            if self._is_diverged:
                return
            start = time.perf_counter()
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * factors[epoch]
            before = self._copied(before)
            told = Teller(progress, epoch, len(factors), self._loop.num_batches)
            with self._randomness.installed():
                loss, accuracy = self._epoch(told)
            self._note(loss, accuracy, before)
            self._seconds += time.perf_counter() - start
            self._observer.look(len(self._losses), self._module)
            is_last = self._is_diverged or epoch == len(factors) - 1
            now = time.perf_counter()
            if file is not None and (is_last or now >= next_write):
                file.write(self._state())
                written = time.perf_counter()
                next_write = written + _KEPT_EVERY * max(1.0, (written - now) / _WRITING_SHARE)
            told.end(loss)

    def _epoch(self, told: Teller) -> tuple[float, float | None]:
        """Take the steps of one epoch; give the mean loss and the accuracy on the way."""
        losses: list[Tensor] = []
        weights: list[float] = []
        right: list[Tensor] = []
        labels, classes = 0, None
        objective, module, optimizer = self._loop.objective, self._module, self._optimizer
        for weight, (inputs, targets) in self._loop.batches(self._generator):
            optimizer.zero_grad(set_to_none=True)
            outputs = call(module, arguments_of(inputs))
            loss = objective.reduced(outputs, targets)
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            losses.append(loss.detach())
            weights.append(weight)
            classes = classes or Classes.of(objective.loss, outputs, targets)
            if classes.axis is not None:
                right.append(classes.correct(outputs.detach(), targets))
                labels += classes.count(targets)
            told.step(losses)
        if not losses:
            raise DataError(
                "Expected at least one mini-batch with a target that counts in the loss. Got none. "
                "Check the data, or take a larger batch size."
            )
        rates = torch.tensor(weights, dtype=torch.float64)
        total = float(torch.stack(losses).cpu().double() @ rates)
        mean = total if objective.reduction == "sum" else total / float(rates.sum())
        return mean, int(torch.stack(right).sum()) / labels if labels else None

    def _note(self, loss: float, accuracy: float | None, before: dict[str, Tensor]) -> None:
        """Put an epoch into the books; one that is not finite is undone."""
        after = self._tensors().values()
        is_sound = math.isfinite(loss) and all(bool(torch.isfinite(t).all()) for t in after)
        if not is_sound:
            self._is_diverged = True
            self._overwrite(before)
            return
        self._losses.append(loss)
        if accuracy is not None:
            self._accuracies.append(accuracy)

    def result(self) -> Fit:
        """Give the end point and the books."""
        accuracies = torch.tensor(self._accuracies, dtype=torch.float64)
        return Fit(
            theta=self._loop.objective.space.theta(self._module),
            buffers={name: buffer.detach().clone() for name, buffer in self._module.named_buffers()},
            losses=torch.tensor(self._losses, dtype=torch.float64),
            accuracies=accuracies if len(accuracies) == len(self._losses) and self._accuracies else None,
            status="diverged" if self._is_diverged else "finished",
            epochs=len(self._losses),
            seconds=self._seconds,
            observations=tuple(self._observer.found),
        )

    def _tensors(self) -> dict[str, Tensor]:
        found = dict(self._module.named_parameters()) | dict(self._module.named_buffers())
        return {name: tensor.detach() for name, tensor in found.items()}

    def _copied(self, into: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Copy all tensors, into an earlier copy where there is one: a large net is not allocated for every epoch."""
        if into is None:
            return {name: tensor.clone() for name, tensor in self._tensors().items()}
        for name, tensor in self._tensors().items():
            into[name].copy_(tensor)
        return into

    def _overwrite(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in self._tensors().items():
            tensor.copy_(tensors[name])

    def _state(self) -> dict[str, Any]:
        return {
            "tensors": self._tensors(),
            "optimizer": self._optimizer.state_dict(),
            "randomness": self._randomness.states,
            "generator": self._generator.get_state(),
            "losses": self._losses,
            "accuracies": self._accuracies,
            "seconds": self._seconds,
            "is_diverged": self._is_diverged,
            "observations": self._observer.found,
        }

    def take_up(self, state: dict[str, Any]) -> None:
        """Stand where `_state` was taken; raises one of `DAMAGES` if it is of another form."""
        self._observer.take_up(state["observations"], len(state["losses"]))
        self._overwrite(state["tensors"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._losses, self._accuracies = list(state["losses"]), list(state["accuracies"])
        self._seconds, self._is_diverged = float(state["seconds"]), bool(state["is_diverged"])
        self._randomness.states = list(state["randomness"])
        self._generator.set_state(state["generator"])
