"""What `thalweg connect` was asked for: which methods, with which settings, and whose paths are written."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thalweg.cli.parts import Value
from thalweg.errors import ConfigError
from thalweg.lab.suggest import did_you_mean

if TYPE_CHECKING:
    from thalweg.lab.progress import Progress
    from thalweg.paths.methods import Settings
    from thalweg.paths.panel import Own
    from thalweg.paths.trained import TrainedSettings

_PERMUTATIONS = ("free_slots", "swaps", "reflections")


@dataclass(frozen=True)
class Wishes:
    """What to connect by, how, and what to write.

    Args:
        methods: names, in the order of the table.
        closed: settings of the closed-form methods.
        trained: settings of the trained ones.
        flows: files of maps of units, by the name of the method.
        save: whose paths are written; None for the best.
        points: of a profile.
        fit_samples: that layers are fitted on.
        seed: of what is drawn.
    """

    methods: tuple[str, ...]
    closed: "Settings"
    trained: "TrainedSettings"
    flows: Mapping[str, Path] = field(default_factory=dict)
    save: tuple[str, ...] | None = None
    points: int = 61
    fit_samples: int = 10_000
    seed: int = 0

    @classmethod
    def of(cls, *, methods: str, flows: Sequence[Path], save: str, **options: Any) -> "Wishes":
        """Settle what a user asked for.

        Raises:
            ConfigError: an unknown name, or an option out of range.
        """
        from thalweg.paths.methods import Settings
        from thalweg.paths.trained import TrainedSettings

        permutation, rate = options["permutation"], options["learning_rate"]
        if permutation not in _PERMUTATIONS:
            raise ConfigError(
                f"Expected --permutation {', '.join(_PERMUTATIONS)}. Got {permutation!r}. "
                f"{did_you_mean(permutation, _PERMUTATIONS) or 'Choose one of them.'}"
            )
        if not 0 < rate < float("inf"):
            raise ConfigError(f"Expected a positive --curve-learning-rate. Got {rate}. Choose one such as 0.01.")
        by_name = _flow_names(flows)
        names = (*_methods(methods), *by_name)
        seed = options["seed"]
        return cls(
            methods=names,
            closed=Settings(knots=options["knots"], permutation=permutation, seed=seed),
            trained=TrainedSettings(
                epochs=options["epochs"],
                learning_rate=float(rate),
                batch_size=options["batch_size"],
                string_steps=options["string_steps"],
                seed=seed,
            ),
            flows=by_name,
            save=_saved(save, names),
            points=options["points"],
            fit_samples=options["fit_samples"],
            seed=seed,
        )

    def facts(self) -> Value:
        """Give the settings as plain values."""
        return {
            "points": self.points,
            "fit_samples": self.fit_samples,
            "seed": self.seed,
            "closed": asdict(self.closed),
            "trained": asdict(self.trained),
            "flows": {name: str(path) for name, path in self.flows.items()},
        }

    def deciding(self, name: str) -> Value:
        """Give what decides the row of a method, but for the networks and the data."""
        shared = {"method": name, "points": self.points, "fit_samples": self.fit_samples, "seed": self.seed}
        if name in self.flows:
            import hashlib

            return shared | {"flow": hashlib.sha256(self.flows[name].read_bytes()).hexdigest()}
        return shared | (asdict(self.trained) if self.is_trained(name) else asdict(self.closed))

    def is_trained(self, name: str) -> bool:
        """Say whether a method trains a path for the pair."""
        from thalweg.paths.trained import TRAINED

        return name in TRAINED

    def own(self, name: str, progress: "Progress") -> "dict[str, Own]":
        """Give a method that is not closed-form as the panel takes it; nothing for one that is."""
        if name in self.flows:
            from thalweg.paths.flow_model import UnitMap
            from thalweg.paths.trained import flow_method

            return {name: flow_method(UnitMap.load(self.flows[name]), name)}
        if self.is_trained(name):
            from thalweg.paths.trained import trained

            return {name: trained(name, self.trained, progress=progress)}
        return {}


def _methods(words: str) -> tuple[str, ...]:
    """Spell out names, "closed" and "all", in the order of the table."""
    from thalweg.paths.methods import METHODS
    from thalweg.paths.trained import TRAINED

    everything = (*METHODS, *TRAINED)
    wanted: set[str] = set()
    for word in (w.strip() for w in words.split(",")):
        if word not in (*everything, "closed", "all"):
            hint = did_you_mean(word, everything) or f"There are {', '.join(everything)}."
            raise ConfigError(f"Expected --methods closed, all, or names of methods. Got {word!r}. {hint}")
        wanted |= set(METHODS) if word == "closed" else set(everything) if word == "all" else {word}
    return tuple(name for name in everything if name in wanted)


def _flow_names(files: Sequence[Path]) -> dict[str, Path]:
    """Name each map by its file, and see that it can be read before anything is computed."""
    found: dict[str, Path] = {}
    for file in files:
        from thalweg.paths.flow_model import UnitMap

        UnitMap.load(file)
        name = f"flow-{file.stem}"
        if name in found:
            raise ConfigError(f"Expected files of different names for --flow. Got two {file.stem!r}. Rename one.")
        found[name] = file
    return found


def _saved(words: str, names: Sequence[str]) -> tuple[str, ...] | None:
    if words in ("best", "all", "none"):
        return {"best": None, "all": tuple(names), "none": ()}[words]
    wanted = [word.strip() for word in words.split(",")]
    for word in wanted:
        if word not in names:
            hint = did_you_mean(word, names) or "Add it to --methods."
            raise ConfigError(f"Expected --save best, all, none, or methods that are measured. Got {word!r}. {hint}")
    return tuple(name for name in names if name in wanted)
