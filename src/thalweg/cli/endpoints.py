"""End points of paths: one network at several seeds, each drawn, trained, measured and written, or found whole."""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thalweg.cli.landscape import Landscape, objective_on
from thalweg.cli.network import Network, load_network
from thalweg.cli.parts import Value, digest
from thalweg.cli.references import find_object, keywords_of
from thalweg.cli.samples import Samples, first_batch
from thalweg.cli.snapshots import example_from
from thalweg.errors import CheckpointError, ConfigError, NumericalError, ThalwegError
from thalweg.lab.suggest import did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from thalweg.objective import Objective
    from thalweg.training import Augment, Fit

METADATA_KEY = "thalweg.training"
"""Metadata of a checkpoint that `thalweg train` wrote: what decided it and what came out, as JSON."""

_AUGMENTS = {"crop_and_flip": True, "crop": False}  # whether it flips
_USERS_FAULTS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


@dataclass(frozen=True)
class Settings:
    """How a network is trained, as `thalweg.training.fit` takes it.

    Args:
        epochs: passes over the data.
        batch_size: samples of a mini-batch.
        optimizer: "sgd" or "adam".
        learning_rate: of the steps.
        momentum: of "sgd".
        weight_decay: times the weights, added to the gradient.
        schedule: of the learning rate, by name.

    Raises:
        ConfigError: an unknown name, or a number out of its range.
    """

    epochs: int
    batch_size: int
    optimizer: str
    learning_rate: float
    momentum: float
    weight_decay: float
    schedule: str

    def __post_init__(self) -> None:
        from thalweg.training.schedules import SCHEDULES

        if self.schedule not in SCHEDULES:
            hint = did_you_mean(self.schedule, SCHEDULES) or "Choose one of them."
            raise ConfigError(f"Expected --schedule {', '.join(SCHEDULES)}. Got {self.schedule!r}. {hint}")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(
                f"Expected a positive --learning-rate. Got {self.learning_rate}. Choose one such as 0.01."
            )
        for option, value in (("--momentum", self.momentum), ("--weight-decay", self.weight_decay)):
            if not 0 <= value < math.inf:
                raise ConfigError(f"Expected {option} that is not negative. Got {value}. Choose another.")

    @classmethod
    def of(cls, optimizer: str, learning_rate: float | None, **others: Any) -> "Settings":
        """Settle the learning rate that the user left open.

        Args:
            optimizer: "sgd" or "adam".
            learning_rate: None for the optimizer's default.
            others: the other settings.

        Raises:
            ConfigError: an unknown name, or a number out of its range.
        """
        from thalweg.training.minibatch import LEARNING_RATES

        if optimizer not in LEARNING_RATES:
            raise ConfigError(f"Expected --optimizer {', '.join(LEARNING_RATES)}. Got {optimizer!r}. Choose one.")
        rate = LEARNING_RATES[optimizer] if learning_rate is None else learning_rate
        return cls(optimizer=optimizer, learning_rate=rate, **others)


def augmentation(word: str | None) -> "Augment | None":
    """Find what --augment names.

    Raises:
        ConfigError: there is no such augmentation.
    """
    if word is None:
        return None
    if ":" in word:
        found = find_object(word)
        if not callable(found):
            raise ConfigError(f"Expected {word} to take (inputs, generator). Got a {type(found).__name__}. Mend it.")
        function: Augment = found
        return function
    if word not in _AUGMENTS:
        hint = did_you_mean(word, _AUGMENTS) or "Or name your own: module:name."
        raise ConfigError(f"Expected --augment {', '.join(_AUGMENTS)} or module:name. Got {word!r}. {hint}")
    import functools

    from thalweg.data import crop_and_flip

    return crop_and_flip if _AUGMENTS[word] else functools.partial(crop_and_flip, flip=False)


@dataclass(frozen=True)
class Endpoint:
    """One seed before it is trained.

    Args:
        seed: of start, order, augmentation and dropout.
        path: where its checkpoint lies or will lie.
        identity: names all that decides it.
        start: names the weights that it starts from.
        record: what the checkpoint says of its training; None where it is not there yet.
    """

    seed: int
    path: Path
    identity: str
    start: str
    record: Value | None


@dataclass(frozen=True)
class Endpoints:
    """One network, data and settings, at any seed.

    Args:
        built: model, net and arguments, as `load_network` takes them.
        landscape: data and loss.
        settings: of the training.
        augment: on each mini-batch.
        out: folder of the checkpoints.
        device: where to compute.
    """

    built: Mapping[str, Any]
    landscape: Landscape
    settings: Settings
    augment: "Augment | None"
    out: Path
    device: str

    def network(self, seed: int) -> Network:
        """Build the network as the first thing that draws from torch's generators after they were seeded.

        So a plain script has the same start: `torch.manual_seed(seed)`, then the factory.
        """
        import torch

        with torch.random.fork_rng():
            torch.default_generator.manual_seed(seed)
            return load_network(None, **self.built, shape=None, example=None, inputs=example_from(self.landscape))

    def planned(self, seed: int, *, force: bool) -> Endpoint:
        """See what there is of a seed, before any work is done.

        Raises:
            CheckpointError: the checkpoint is there and of another training, and is not to be overwritten.
            ConfigError: the network cannot be built, or its state is more than tensors.
            DataError: data, loss and network do not fit together.
        """
        from torch import Tensor

        from thalweg.probes import examine

        module = self.network(seed).module
        state = module.state_dict()
        odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
        if odd:
            raise ConfigError(f"Expected a state dict of tensors. Got {odd[0]!r}, which is none. Mend the module.")
        few = objective_on(self._few(), module, device=self.device)
        examine(few, few.theta())
        endpoint = self._endpoint(seed, module)
        if endpoint.path.exists() and endpoint.record is None and not force:
            raise CheckpointError(
                f"Expected no file of another training in {self.out}. Got {endpoint.path}. "
                "Choose another --out, or overwrite it with --force."
            )
        return endpoint

    def found(self, seed: int) -> Endpoint:
        """See what there is of a seed that need not be trained; there is no record of another training's."""
        return self._endpoint(seed, self.network(seed).module)

    def _endpoint(self, seed: int, module: "nn.Module") -> Endpoint:
        from thalweg.training.naming import named
        from thalweg.training.resumption import landscape_name

        objective = self._objective(module)
        built = (*self._factory_words(), named(self.augment), self.landscape.loss_words)
        words = (*asdict(self.settings).items(), *built, seed)
        identity = landscape_name(objective, objective.theta(), words)
        path = self.out / f"seed-{seed}.safetensors"
        record = _record_of(path)
        is_same = record is not None and record.get("identity") == identity
        return Endpoint(seed, path, identity, digest(module.state_dict().values()), record if is_same else None)

    def require_sound(self, seed: int) -> None:
        """See that all data fit the network, and that the augmentation runs.

        Raises:
            DataError: they do not.
            ConfigError: the augmentation raised something.
        """
        import torch

        from thalweg.probes import examine

        module = self.network(seed).module
        for is_test in (False, True)[: 1 + (self.landscape.test_data is not None)]:
            objective = self._objective(module, is_test=is_test)
            examine(objective, objective.theta())
        if self.augment is not None:
            inputs, _ = next(self._objective(module).batches())
            try:
                self.augment(inputs, torch.Generator().manual_seed(0))
            except ThalwegError:
                raise
            except Exception as error:  # whatever a user's function raises
                raise ConfigError(
                    f"Expected --augment to take (inputs, generator). Got {type(error).__name__}: {error}. Mend it."
                ) from error

    def trained(self, endpoint: Endpoint, progress: Callable[[float, str], None]) -> Value:
        """Train from a seed, or go on where it was interrupted; measure, write the checkpoint, give the record.

        Raises:
            NumericalError: the training diverged.
            ConfigError: the network does not run in train mode.
            CheckpointError: a file cannot be written.
        """
        import torch

        from thalweg.checkpoint import save_state
        from thalweg.training import fit

        module, parts = self.network(endpoint.seed).module, self.out / "parts" / f"seed-{endpoint.seed}"
        objective = self._objective(module)
        generator = torch.Generator().manual_seed(endpoint.seed)
        try:
            found = fit(
                objective,
                objective.theta(),
                **asdict(self.settings),
                generator=generator,
                augment=self.augment,
                keep=parts,
                progress=progress,
            )
        except ThalwegError:
            raise
        except _USERS_FAULTS as error:
            reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            raise ConfigError(f"Expected a network that trains in train mode. Got {reason}. Mend it.") from error
        if found.status == "diverged":
            _remove(parts)
            raise NumericalError(
                f"Expected a training that stays finite. Got NaN or infinity in epoch {found.epochs + 1} of seed "
                f"{endpoint.seed}. Lower --learning-rate."
            )
        found.write(module)
        record = self._record(endpoint, found, module)
        save_state(endpoint.path, module.state_dict(), {METADATA_KEY: json.dumps(record, allow_nan=False)})
        _remove(parts)
        return record

    def _record(self, endpoint: Endpoint, found: "Fit", module: "nn.Module") -> Value:
        from thalweg.probes import examine

        record: Value = {
            "seed": endpoint.seed,
            "identity": endpoint.identity,
            "seconds": round(found.seconds, 3),
            "losses": found.losses.tolist(),
            "accuracies": None if found.accuracies is None else found.accuracies.tolist(),
            "train": None,
            "test": None,
        }
        for name, samples in (("train", self.landscape.data), ("test", self.landscape.test_data)):
            if samples is not None:
                objective = self._objective(module, is_test=name == "test")
                seen = examine(objective, objective.theta())
                record[name] = {"loss": seen.loss, "accuracy": seen.accuracy}
        return record

    def _objective(self, module: "nn.Module", *, is_test: bool = False) -> "Objective":
        return objective_on(self.landscape, module, is_test=is_test, device=self.device)

    def _factory_words(self) -> tuple[Any, ...]:
        """Name what builds the network, with the source of a factory of the user's, and its arguments."""
        from thalweg.training.naming import named

        model, keywords = self.built["model"], keywords_of(self.built["arguments"] or [], "--arg")
        factory = named(find_object(model)) if model is not None else None
        return self.built["net"], model, factory, sorted(keywords.items())

    def _few(self) -> Landscape:
        """Give the landscape of the first samples alone."""
        from thalweg.batching import num_samples, rows_of

        batch = first_batch(self.landscape.data)
        if self.landscape.data.is_pair:
            batch = rows_of(batch, slice(min(self.landscape.batch_size, num_samples(batch))))
            return replace(self.landscape, data=replace(self.landscape.data, data=batch), test_data=None)
        few = Samples([batch], self.landscape.data.origin, None)
        return replace(self.landscape, data=few, test_data=None)


def _record_of(path: Path) -> Value | None:
    """Read what a checkpoint says of its training; None where there is none of ours."""
    from thalweg.checkpoint import load_metadata

    if not path.exists():
        return None
    try:
        found = json.loads(load_metadata(path)[METADATA_KEY])
    except (CheckpointError, KeyError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _remove(parts: Path) -> None:
    """Drop the state of a training that has ended, and the folder of them with the last one."""
    shutil.rmtree(parts, ignore_errors=True)
    if parts.parent.is_dir() and not any(parts.parent.iterdir()):
        parts.parent.rmdir()


def same_starts(endpoints: Sequence[Endpoint]) -> bool:
    """Say whether several seeds start from the same weights."""
    return len(endpoints) > 1 and len({endpoint.start for endpoint in endpoints}) == 1
