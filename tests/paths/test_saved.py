"""Paths on disk: the same path, bit for bit, or a clear error."""

from collections.abc import Mapping
from pathlib import Path as File

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from thalweg.checkpoint import save_state
from thalweg.errors import CheckpointError
from thalweg.paths.leg import Blend, BlendLeg, LazyLeg, Reversed
from thalweg.paths.path import Path
from thalweg.paths.permutation_arrangement import Arrangement, Base
from thalweg.paths.saved import Held, load_path, save_path
from thalweg.space import Space
from thalweg.structure import trace

NET = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
NET[0].bias.data.abs_().add_(1)  # units that are alive, whatever the draw
SPACE = Space.of(NET)


def point(seed: int) -> dict[str, Tensor]:
    """Draw parameters."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator) for n, s in zip(SPACE.names, SPACE.shapes, strict=True)}


def blended(start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> BlendLeg:
    """Move every tensor in another way."""
    a, b, c, d = SPACE.names
    middle = point(9)
    blends = {
        a: Blend("arc", (start[a], end[a], middle[a])),
        b: Blend("quadratic", (start[b], middle[b], end[b])),
        c: Blend("knots", (start[c], middle[c], end[c]), (0.0, 0.3, 1.0)),
        d: Blend("linear", (start[d], end[d])),
    }
    return BlendLeg("all", {}, blends)


def assert_same(path: Path, other: Path) -> None:
    """Both are equal, at many t, to the bit."""
    assert other.space == path.space
    assert other.durations == path.durations
    assert [leg.label for leg in other.legs] == [leg.label for leg in path.legs]
    for t in path.grid(23):
        assert torch.equal(path.at(t), other.at(t))


def test_a_path_of_blends_comes_back_bit_for_bit(tmp_path: File) -> None:
    a, b, c = point(0), point(1), point(2)
    buffers = {"mean": torch.ones(3), "count": torch.tensor(4)}
    path = Path(SPACE, (blended(a, b), Reversed(blended(c, b))), (0.3, 0.41), buffers, {})
    save_path(path, tmp_path / "p.safetensors")
    found = load_path(tmp_path / "p.safetensors")
    assert_same(path, found)
    assert torch.equal(found.start_buffers["count"], buffers["count"])
    assert found.end_buffers == {}


def test_what_legs_share_is_stored_once(tmp_path: File) -> None:
    leg = blended(point(0), point(1))
    save_path(Path(SPACE, (leg,)), tmp_path / "few.pt")
    save_path(Path(SPACE, (leg, Reversed(leg)) * 10), tmp_path / "many.pt")
    assert len(torch.load(tmp_path / "many.pt")) == len(torch.load(tmp_path / "few.pt"))


def test_lazy_legs_come_back_lazy(tmp_path: File) -> None:
    view = trace(NET, torch.zeros(2, 3))
    base = Base(view, {n: v.detach().clone() for n, v in NET.named_parameters()}, view.groups[0].name, SPACE.names)
    first = Arrangement(base, np.arange(4), np.ones(4, dtype=np.bool_))
    second = first.with_changes({0: 1, 1: 0})
    third = Held(point(3))
    path = Path(SPACE, (LazyLeg("swap", first, second), LazyLeg("on", second, third)))
    save_path(path, tmp_path / "p.safetensors")
    found = load_path(tmp_path / "p.safetensors")
    assert_same(path, found)
    before, after = found.legs
    assert isinstance(before, LazyLeg)
    assert isinstance(after, LazyLeg)
    assert before.end is after.start
    assert isinstance(before.end, Arrangement)


def test_a_leg_of_another_kind_is_refused(tmp_path: File) -> None:
    class Own:
        label = "mine"

        def parameters(self, s: float) -> Mapping[str, Tensor]:
            return point(0)

        def moving(self) -> None:
            return None

    with pytest.raises(CheckpointError, match="blends, lazy, or reversed"):
        save_path(Path(SPACE, (Own(),)), tmp_path / "p.safetensors")


def test_a_file_without_a_path_is_refused(tmp_path: File) -> None:
    save_state(tmp_path / "net.safetensors", point(0))
    with pytest.raises(CheckpointError, match="a path that save_path wrote"):
        load_path(tmp_path / "net.safetensors")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_file_cut_short_is_refused(tmp_path: File, share: float) -> None:
    file = tmp_path / "p.safetensors"
    save_path(Path(SPACE, (blended(point(0), point(1)),)), file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError):
        load_path(file)


def test_a_record_that_does_not_fit_is_refused(tmp_path: File) -> None:
    file = tmp_path / "p.safetensors"
    save_state(file, point(0), {"thalweg path": '{"names": [], "points": {}}'})
    with pytest.raises(CheckpointError, match="a whole path"):
        load_path(file)
