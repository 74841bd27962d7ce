"""entries: what a catalogue of critical points holds, as values and as rows of tables."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from thalweg.probes.degeneracy import Inertia


@dataclass(frozen=True)
class Image:
    """An entry embedded, in equal shares, into a network at least as wide.

    Args:
        network: the network.
        theta: the embedded point, after polishing there.
        gradient_l1: ‖∇R‖₁ there.
        inertia: the signs of the Hessian's eigenvalues there; `zero` is the degeneracy.
        raw_gradient_l1: ‖∇R‖₁ at the embedded point itself, before polishing: whether the embedding is critical.
        distance: ‖theta - embedded point‖₂ of the polish.
        loss: R at the embedded point itself; that of the entry, up to rounding, if the embedding is right.
    """

    network: str
    theta: Float[Tensor, " params"]
    gradient_l1: float
    inertia: Inertia
    raw_gradient_l1: float
    distance: float
    loss: float


@dataclass(frozen=True)
class Sighting:
    """One point that a trial met, and what it is.

    Args:
        network: the network it was met in.
        trial: the trial.
        point: its number among the points of that network.
        entry: id of the entry that it is, embedded or not.
        is_embedded: whether it was met in a network wider than the one it arises in.
        raw_gradient_l1: ‖∇R‖₁ before polishing.
        distance: ‖theta - raw_theta‖₂ of the polish.
        change: largest change of an output by reducing it to its origin, relative to the largest output.
        residual: largest difference from the entry, at the width of origin, up to symmetry, relative to the largest
            entry of its parameter.
    """

    network: str
    trial: int
    point: int
    entry: int
    is_embedded: bool
    raw_gradient_l1: float
    distance: float
    change: float
    residual: float


@dataclass(frozen=True)
class Entry:
    """A distinct critical point, at the width at which it arises.

    Args:
        id: its number, from 1, by falling loss.
        widths: group -> width of origin.
        theta: the point there, polished as far as it goes.
        loss: R there.
        gradient_l1: ‖∇R‖₁ there.
        inertia: the signs of the Hessian's eigenvalues there.
        outputs: the outputs on the data, flattened.
        is_zero: whether the output is zero on all data (excluded from the main list, as in the paper).
        visits: network -> number of trials that met it, embedded or not.
        raw_visits: of these, those whose gradient was under the threshold before any polishing.
        max_distance: the longest polish of a point that is counted as a visit.
        mirror_of: id of the entry that is its mirror image, if there is another one.
        is_symmetric: whether it is its own mirror image.
        images: the entry embedded into each network of the list that is at least as wide.
    """

    id: int
    widths: Mapping[str, int]
    theta: Float[Tensor, " params"]
    loss: float
    gradient_l1: float
    inertia: Inertia
    outputs: Float[Tensor, " outputs"]
    is_zero: bool
    visits: Mapping[str, int] = field(default_factory=dict)
    raw_visits: Mapping[str, int] = field(default_factory=dict)
    max_distance: float = 0.0
    mirror_of: int | None = None
    is_symmetric: bool = False
    images: tuple[Image, ...] = ()

    @property
    def is_isolated(self) -> bool:
        """Whether no eigenvalue is zero at the origin; else a whole family of critical points is one entry.

        Steep tanh units whose step lies between two samples are such a family: critical to the bound only, and
        ever more so the steeper they are.
        """
        return self.inertia.zero == 0

    def row(self) -> dict[str, Any]:
        """Give the entry as one flat row of a table."""
        return {
            "id": self.id,
            "width": "-".join(str(w) for w in self.widths.values()),
            "loss": self.loss,
            "gradient_l1": self.gradient_l1,
            "negative": self.inertia.negative,
            "zero": self.inertia.zero,
            "positive": self.inertia.positive,
            "is_isolated": self.is_isolated,
            "is_zero": self.is_zero,
            "mirror_of": self.mirror_of,
            "is_symmetric": self.is_symmetric,
            "max_distance": self.max_distance,
            **{f"visits in {name}": count for name, count in self.visits.items()},
            **{f"raw visits in {name}": count for name, count in self.raw_visits.items()},
        }


@dataclass(frozen=True)
class Count:
    """What became of the points of one network.

    Args:
        network: the network.
        trials: number of trials that gave points.
        points: number of points.
        unpolished: points whose polish did not converge: not critical.
        moved: points that the polish carried to another loss: not critical.
        counted: points that are visits of an entry.
    """

    network: str
    trials: int
    points: int
    unpolished: int
    moved: int
    counted: int


@dataclass(frozen=True)
class Catalogue:
    """The distinct critical points of a family of networks.

    Args:
        entries: those whose output is not zero, by falling loss.
        zero_entries: those whose output is zero on all data.
        sightings: every counted point, and the entry that it is.
        counts: per network, what was counted and what was not.
    """

    entries: tuple[Entry, ...]
    zero_entries: tuple[Entry, ...]
    sightings: tuple[Sighting, ...]
    counts: tuple[Count, ...]

    def rows(self) -> list[dict[str, Any]]:
        """Give one flat row per entry, those of zero output last."""
        return [entry.row() for entry in (*self.entries, *self.zero_entries)]

    def image_rows(self) -> list[dict[str, Any]]:
        """Give one flat row per entry and network that it is embedded into."""
        return [
            {
                "id": entry.id,
                "width": "-".join(str(w) for w in entry.widths.values()),
                "loss": entry.loss,
                "network": image.network,
                "embedded_loss": image.loss,
                "raw_gradient_l1": image.raw_gradient_l1,
                "distance": image.distance,
                "gradient_l1": image.gradient_l1,
                "negative": image.inertia.negative,
                "degeneracy": image.inertia.zero,
                "positive": image.inertia.positive,
            }
            for entry in (*self.entries, *self.zero_entries)
            for image in entry.images
        ]

    def sighting_rows(self) -> list[dict[str, Any]]:
        """Give one flat row per counted point."""
        return [dict(vars(sighting)) for sighting in self.sightings]
