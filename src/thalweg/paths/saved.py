"""saved: paths on disk, one file with every tensor once."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

from torch import Tensor

from thalweg.checkpoint import load_metadata, load_state, save_state
from thalweg.errors import CheckpointError, ShapeError
from thalweg.paths.leg import Blend, BlendLeg, LazyLeg, Leg, Point, Reversed
from thalweg.paths.path import Path
from thalweg.paths.permutation_arrangement import Arrangement, pack_arrangements, unpack_arrangements
from thalweg.space import Space

_KEY = "thalweg path"
_DAMAGE = (KeyError, IndexError, TypeError, ValueError, AttributeError, ShapeError)


def save_path(path: Path, file: str | File) -> None:
    """Write a path; a reader sees the old file or the new one, never a part.

    A tensor that several legs or ends share is stored once. `load_path` gives the same path, bit for bit.

    Args:
        path: of blends, of lazy legs between arrangements or other points, of any of them run backwards.
        file: ending in .safetensors, .pt or .pth.

    Raises:
        CheckpointError: a leg that is none of these, an unknown suffix, or a place that cannot be written.

    Example:
        >>> import tempfile, torch
        >>> from thalweg.paths import linear
        >>> path = linear(Space(("w",), ((2,),)), torch.zeros(2), torch.ones(2))
        >>> file = File(tempfile.mkdtemp()) / "path.safetensors"
        >>> save_path(path, file)
        >>> load_path(file).at(0.5)
        tensor([0.5000, 0.5000])
    """
    store = _Store()
    record = {
        "names": list(path.space.names),
        "shapes": [list(shape) for shape in path.space.shapes],
        "durations": list(path.durations),
        "legs": [store.leg(leg) for leg in path.legs],
        "buffers": [store.all(path.start_buffers), store.all(path.end_buffers)],
    }
    record["points"] = store.points()
    save_state(file, store.tensors, {_KEY: json.dumps(record)})


def load_path(file: str | File) -> Path:
    """Read a path that `save_path` wrote.

    Args:
        file: the file.

    Returns:
        The path, on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, or holds no path.
    """
    metadata = load_metadata(file)
    if _KEY not in metadata:
        raise CheckpointError(f"Expected a path that save_path wrote. Got {file}, which holds none. Check the file.")
    state = load_state(file)
    try:
        record = json.loads(metadata[_KEY])
        points = _points(record["points"], state)
        space = Space(tuple(record["names"]), tuple(tuple(shape) for shape in record["shapes"]))
        start, end = (_named(names, state) for names in record["buffers"])
        legs = tuple(_leg(described, state, points) for described in record["legs"])
        path = Path(space, legs, tuple(record["durations"]), start, end)
        # Path divides by their sum, which may be 1 but for rounding.
        object.__setattr__(path, "durations", tuple(record["durations"]))
    except _DAMAGE as error:
        raise CheckpointError(
            f"Expected a whole path. Got {file}, which is damaged ({type(error).__name__}: {str(error)[:80]}). "
            "Copy it again, or make the path anew."
        ) from error
    return path


@dataclass(frozen=True)
class Held:
    """A point of a path that is kept as its parameters.

    Args:
        values: every parameter.
    """

    values: Mapping[str, Tensor] = field(repr=False)

    def parameters(self) -> Mapping[str, Tensor]:
        """Give them."""
        return self.values


@dataclass
class _Store:
    """Gathers tensors and points, each once, and describes legs by their numbers."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    _keys: dict[Any, str] = field(default_factory=dict)
    _points: dict[int, tuple[int, Point]] = field(default_factory=dict)

    def tensor(self, value: Tensor) -> str:
        """Give the name under which a tensor is stored."""
        place = (value.data_ptr(), value.device, value.shape, value.stride(), value.dtype) if value.numel() else value
        if place not in self._keys:
            self._keys[place] = str(len(self._keys))
            self.tensors[self._keys[place]] = value
        return self._keys[place]

    def all(self, values: Mapping[str, Tensor]) -> dict[str, str]:
        """Store tensors under names."""
        return {name: self.tensor(value) for name, value in values.items()}

    def point(self, point: Point) -> int:
        """Give the number of a point."""
        return self._points.setdefault(id(point), (len(self._points), point))[0]

    def leg(self, leg: Leg) -> dict[str, Any]:
        """Describe a leg."""
        if isinstance(leg, Reversed):
            return {"kind": "reversed", "leg": self.leg(leg.leg)}
        if isinstance(leg, LazyLeg):
            return {"kind": "lazy", "label": leg.label, "ends": [self.point(leg.start), self.point(leg.end)]}
        if isinstance(leg, BlendLeg):
            blends = {
                name: {"kind": b.kind, "terms": [self.tensor(x) for x in b.terms], "times": list(b.times)}
                for name, b in leg.blends.items()
            }
            return {"kind": "blends", "label": leg.label, "fixed": self.all(leg.fixed), "blends": blends}
        raise CheckpointError(
            f"Expected legs that are blends, lazy, or reversed. Got a {type(leg).__name__}. "
            "Save what it is made from instead: its ends, and of a flow its map (UnitMap.save)."
        )

    def points(self) -> dict[str, Any]:
        """Describe all points that legs were described by."""
        points = [point for _, point in self._points.values()]
        arranged = [point for point in points if isinstance(point, Arrangement)]
        tensors, described = pack_arrangements(arranged) if arranged else ({}, None)
        return {
            "kinds": ["arrangement" if isinstance(point, Arrangement) else "held" for point in points],
            "arrangements": described,
            "tensors": self.all(tensors),
            "held": [self._held(point) for point in points if not isinstance(point, Arrangement)],
        }

    def _held(self, point: Point) -> dict[str, str]:
        return {name: self.tensor(value.clone()) for name, value in point.parameters().items()}


def _named(names: Mapping[str, str], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: state[key] for name, key in names.items()}


def _points(record: Mapping[str, Any], state: Mapping[str, Tensor]) -> list[Point]:
    tensors = _named(record["tensors"], state)
    arranged = iter(unpack_arrangements(tensors, record["arrangements"]) if record["arrangements"] else ())
    held = iter([Held(_named(names, state)) for names in record["held"]])
    return [next(arranged) if kind == "arrangement" else next(held) for kind in record["kinds"]]


def _leg(record: Mapping[str, Any], state: Mapping[str, Tensor], points: Sequence[Point]) -> Leg:
    kind = record["kind"]
    if kind == "reversed":
        return Reversed(_leg(record["leg"], state, points))
    if kind == "lazy":
        start, end = record["ends"]
        return LazyLeg(record["label"], points[start], points[end])
    blends = {
        name: Blend(b["kind"], tuple(state[key] for key in b["terms"]), tuple(b["times"]))
        for name, b in record["blends"].items()
    }
    return BlendLeg(record["label"], _named(record["fixed"], state), blends)
