"""Recipes: one figure or table of a paper, with its presets, its claims, and how it is computed and drawn."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from thalweg.errors import ConfigError
from thalweg.lab.claims import Claim
from thalweg.lab.progress import Progress
from thalweg.lab.suggest import did_you_mean
from thalweg.lab.tables import Tables

if TYPE_CHECKING:
    import numpy as np

    from thalweg.lab.figures.figure import Figure

DEFAULT_PRESET = "cpu"
_NAME = re.compile(r"[a-z0-9_]+(/[a-z0-9_]+)*")


class Preset(BaseModel):
    """The parameters of a recipe: everything that decides its result. Subclass it, one docstring per field.

    Frozen; unknown keys, NaN and infinity are refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of every random number of the run."""

    def parameters(self) -> dict[str, Any]:
        """Give the parameters as JSON-able values: they name the run."""
        return self.model_dump(mode="json")


def silent(fraction: float, text: str) -> None:
    """Report to nobody."""


@dataclass(frozen=True)
class Context:
    """What a run may use that does not decide its result.

    Args:
        progress: `progress(fraction, text)`, with the fraction of the run that is done, in [0, 1].
        data_root: folder of data sets, or None.
        device: where tensors live: "cpu", "cuda", "cuda:1", "mps".
        folder: where the run may keep what lets it go on after an interruption; made by whoever writes first, and
            removed when the run is stored. None: nowhere.
    """

    progress: Progress = silent
    data_root: Path | None = None
    device: str = "cpu"
    folder: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """What a run found.

    Args:
        tables: name -> rows; a row is a flat dict of numbers and texts. Figures are drawn from these.
        arrays: name -> NumPy array, stored beside the tables as safetensors.
        measured: claim id -> measured value, JSON-able. A claim without a value counts as untested.
    """

    tables: Tables
    arrays: "Mapping[str, np.ndarray]" = field(default_factory=dict)
    measured: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """One figure or table of a paper.

    A module that defines `RECIPE` must not import torch when it is imported: import it inside `run`, so that
    listing recipes stays instant.

    Args:
        name: paper and figure, e.g. "embedding_principle/figure_3a".
        title: one line.
        source: key in `sources.bib` and the figure or table.
        version: of the mathematics; raise it when the result or a criterion changes, so that old runs are
            not taken for new ones.
        presets: "paper" (as published), "cpu" (reduced; the default) and "quick" (seconds).
        claims: what is tested.
        run: `(preset, context) -> Outcome`.
        figures: `(tables) -> figures`; computes nothing.
        summary: one paragraph for the report on what this shows.
        num_threads: threads of torch while it runs; None leaves them as they are. Networks of a few dozen
            parameters run several times faster on one.

    Raises:
        ConfigError: the name is not of the form above, the version is below 1, there is no preset, or two
            claims share an id.
    """

    name: str
    title: str
    source: str
    version: int
    presets: Mapping[str, Preset]
    claims: tuple[Claim, ...]
    run: Callable[[Any, Context], Outcome]
    figures: "Callable[[Tables], Sequence[Figure]]"
    summary: str = ""
    num_threads: int | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"Expected a recipe name such as 'paper/figure_1'. Got {self.name!r}. "
                "Use lower-case letters, digits, underscores and slashes."
            )
        if self.version < 1:
            raise ConfigError(f"Expected a version of 1 or more. Got {self.version}. Count from 1.")
        if not self.presets:
            raise ConfigError(f"Expected at least one preset. Got none in {self.name}. Add 'quick'.")
        ids = [claim.id for claim in self.claims]
        if len(set(ids)) < len(ids):
            raise ConfigError(f"Expected claims with different ids. Got {', '.join(ids)} in {self.name}. Rename one.")

    @property
    def default_preset(self) -> str:
        """Name of the preset that runs when none is asked for: "cpu", or the first."""
        return DEFAULT_PRESET if DEFAULT_PRESET in self.presets else next(iter(self.presets))

    def preset(self, name: str | None = None) -> Preset:
        """Give a preset by name; None means the default.

        Raises:
            ConfigError: no such preset.
        """
        name = name or self.default_preset
        if name not in self.presets:
            raise ConfigError(
                f"Expected one of the presets {', '.join(self.presets)}. Got {name!r}. "
                f"{did_you_mean(name, self.presets) or f'Choose one that {self.name} has.'}"
            )
        return self.presets[name]
