"""The catalogue of the paper's 1-D problem: what went in under every disguise comes out once, with its origin."""

import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from thalweg.data import three_tanh
from thalweg.embeddings import Catalogue, Embedding, Met, catalogue, critical_points, mirror_of_data, split_plan
from thalweg.errors import DataError, ShapeError
from thalweg.nets import MLP, two_layer
from thalweg.objective import Objective
from thalweg.space import Space
from thalweg.structure import View, flip, permute, random_permutations, trace
from thalweg.training import CriticalPoints, polish_all

# Weights, biases and outgoing weights of the four critical points of the paper's figure 4, computed by
# Levenberg–Marquardt from 60 random starts per width; the third is the second under x -> -x, y -> -y.
KNOWN = {
    "width 1": [0.0895366, 0, 3.746951],
    "width 2": [1.302005, 0.154989, -9.335645, 0.417625, 0.788588, 2.341854],
    "mirrored": [1.302005, 0.154989, 9.335645, -0.417625, 0.788588, 2.341854],
    "width 3": [1, 1, 1, -7, 0, 7, 1, 1, 1],
}
LOSSES = [0.109023, 0.0697915, 0.0697915, 0.0]
GROUP = "layers.0"


@functools.cache
def landscape(width: int) -> Objective:
    data = three_tanh()
    return Objective(two_layer(width).double(), nn.MSELoss(), (data.inputs, data.targets))


@functools.cache
def view_of(width: int) -> View:
    return trace(two_layer(width).double(), three_tanh().inputs)


def disguised(name: str, width: int, noise: float, generator: torch.Generator) -> Tensor:
    """A known point in a network of some width: random shares, order and signs, and off by some noise."""
    narrow = torch.tensor(KNOWN[name], dtype=torch.float64)
    view, space = view_of(len(narrow) // 3), Space.of(two_layer(len(narrow) // 3))
    shares = {GROUP: _shares(len(narrow) // 3, width, generator)}
    plan = split_plan(view, {GROUP: width}, shares=shares)
    wide_view = view_of(width)
    state = landscape(width).space.parameters(Embedding(view, space, plan).apply(narrow))
    signs = np.where(torch.rand(width, generator=generator).numpy() < 0.5, -1.0, 1.0)
    moved = flip(wide_view, permute(wide_view, state, random_permutations(wide_view, generator)), {GROUP: signs})
    theta = landscape(width).space.theta(moved)
    return theta * (1 + noise * torch.randn(theta.shape, generator=generator, dtype=torch.float64))


def _shares(narrow: int, wide: int, generator: torch.Generator) -> list[float]:
    """Random shares between 0.2 and 1 before they are made to sum to 1: no copy is lost in the noise."""
    drawn = 0.2 + 0.8 * torch.rand(wide, generator=generator, dtype=torch.float64).numpy()
    parents = np.arange(wide) % narrow
    return list(drawn / np.bincount(parents, weights=drawn)[parents])


def met(names_by_width: dict[int, list[str]], noise: float, generator: torch.Generator) -> list[Met]:
    """Each known point once per width, as a trial of its own."""
    result = []
    for width, names in names_by_width.items():
        thetas = torch.stack([disguised(name, width, noise, generator) for name in names])
        points = polish_all(landscape(width), thetas)
        result.append(Met(landscape(width), points, torch.arange(len(names))))
    return result


EVERYWHERE = {1: ["width 1"], 2: ["width 1", "width 2", "mirrored"], 3: list(KNOWN)}


@functools.cache
def everything_twice() -> Catalogue:
    return catalogue(met({w: 2 * names for w, names in EVERYWHERE.items()}, 1e-3, torch.Generator().manual_seed(0)))


def test_the_four_levels_of_figure_4_with_degeneracy_2_1_1_0() -> None:
    found = everything_twice()
    assert [e.loss for e in found.entries] == pytest.approx(LOSSES, abs=5e-7)
    assert [e.widths[GROUP] for e in found.entries] == [1, 2, 2, 3]
    assert [(e.inertia.negative, e.inertia.zero) for e in found.entries] == [(0, 0)] * 4
    assert [e.visits for e in found.entries] == [
        {"width 1": 2, "width 2": 2, "width 3": 2},
        {"width 1": 0, "width 2": 2, "width 3": 2},
        {"width 1": 0, "width 2": 2, "width 3": 2},
        {"width 1": 0, "width 2": 0, "width 3": 2},
    ]
    last = {e.id: next(i for i in e.images if i.network == "width 3") for e in found.entries}
    assert [last[e.id].inertia.zero for e in found.entries] == [2, 1, 1, 0]
    assert all(image.gradient_l1 <= 1e-10 for e in found.entries for image in e.images)
    assert [e.mirror_of for e in found.entries] == [None, 3, 2, None]
    assert [e.is_symmetric for e in found.entries] == [True, False, False, True]
    assert found.zero_entries == ()


def test_images_are_critical_at_the_embedded_point_itself() -> None:
    """The embedding principle: before any polish, with the loss of the entry."""
    for entry in everything_twice().entries:
        for image in entry.images:
            wide = landscape(int(image.network.split()[1]))
            narrow = len(entry.theta) // 3
            plan = split_plan(view_of(narrow), {GROUP: wide.num_params // 3})
            theta = Embedding(view_of(narrow), Space.of(two_layer(narrow)), plan).apply(entry.theta)
            assert image.raw_gradient_l1 == pytest.approx(float(wide.gradient(theta).abs().sum()), abs=1e-13)
            assert image.raw_gradient_l1 <= 1e-10
            assert image.loss == pytest.approx(entry.loss, abs=1e-12)
            assert image.distance == pytest.approx(float((image.theta - theta).norm()), abs=1e-13)
            assert image.distance <= 1e-6


def test_an_image_that_only_a_polish_makes_critical_is_told_by_its_raw_gradient(monkeypatch) -> None:
    """An embedding that is wrong by 1 %."""

    class Wrong(Embedding):
        def apply(self, theta: Tensor) -> Tensor:
            return 1.01 * super().apply(theta)

    given_ = met({2: ["width 2"]}, 0.0, torch.Generator().manual_seed(0))
    monkeypatch.setattr(critical_points, "Embedding", Wrong)
    (entry,) = catalogue(given_).entries
    (image,) = entry.images
    assert image.gradient_l1 <= 1e-10
    assert image.raw_gradient_l1 > 1e-3
    assert image.distance > 1e-3
    assert image.loss > entry.loss + 1e-6


def test_signs_of_eigenvalues_never_fall_from_one_network_to_a_wider_one() -> None:
    """Irreversibility (Zhang et al. 2022)."""
    for entry in everything_twice().entries:
        counts = [(i.inertia.negative, i.inertia.zero, i.inertia.positive) for i in entry.images]
        for one, two in itertools.pairwise(counts):
            assert all(after >= before for before, after in zip(one, two, strict=True))


@settings(max_examples=2)
@given(seed=st.integers(0, 10_000), noise=st.sampled_from([1e-8, 1e-5, 1e-3]))
def test_every_disguise_is_seen_through(seed: int, noise: float) -> None:
    given_ = met(EVERYWHERE, noise, torch.Generator().manual_seed(seed))
    found = catalogue(given_)
    assert [e.loss for e in found.entries] == pytest.approx(LOSSES, abs=5e-7)
    assert [len(s) for s in _sightings_by_entry(found)] == [3, 2, 2, 1]
    for sighting in found.sightings:
        origin = found.entries[sighting.entry - 1].widths[GROUP]
        assert sighting.is_embedded == (f"width {origin}" != sighting.network)
        assert sighting.residual <= 1e-5
        assert sighting.change <= 1e-6
        assert sighting.raw_gradient_l1 > 0


def _sightings_by_entry(found: Catalogue) -> list[list[int]]:
    return [[s.point for s in found.sightings if s.entry == e.id] for e in found.entries]


def test_points_whose_polish_fails_or_goes_far_are_no_visits() -> None:
    objective = landscape(1)
    exact = polish_all(objective, torch.tensor([KNOWN["width 1"]], dtype=torch.float64))
    far = torch.tensor([[0.15, 0.0, 3.2]], dtype=torch.float64)
    polished = polish_all(objective, torch.cat([exact.thetas, far, exact.thetas + 0.01]))
    status = ("converged", "converged", "stalled")
    points = CriticalPoints(**{**vars(polished), "status": status})
    found = catalogue([Met(objective, points, torch.tensor([0, 1, 2]))])
    (count,) = found.counts
    assert (count.trials, count.points, count.unpolished, count.moved, count.counted) == (3, 3, 1, 1, 1)
    assert [e.visits for e in found.entries] == [{"width 1": 1}]


def test_raw_visits_are_those_under_the_threshold_before_polishing() -> None:
    objective = landscape(1)
    exact = polish_all(objective, torch.tensor([KNOWN["width 1"]], dtype=torch.float64)).thetas
    points = polish_all(objective, torch.cat([exact, exact, exact * (1 + 1e-3)]))
    (entry,) = catalogue([Met(objective, points, torch.tensor([0, 0, 1]))]).entries
    assert entry.visits == {"width 1": 2}
    assert entry.raw_visits == {"width 1": 1}
    assert entry.max_distance > 1e-4


def test_the_zero_output_is_kept_apart() -> None:
    objective = landscape(2)
    thetas = torch.cat([torch.zeros(1, 6), torch.tensor([KNOWN["width 2"]])]).double()
    found = catalogue([Met(objective, polish_all(objective, thetas), torch.arange(2))])
    assert [e.is_zero for e in found.entries] == [False]
    (zero,) = found.zero_entries
    assert zero.is_zero
    assert zero.loss == pytest.approx(5.145330, abs=1e-6)
    assert [row["id"] for row in found.rows()] == [1, 2]


def test_an_origin_at_a_width_that_is_not_in_the_list_is_found() -> None:
    """Points of width 3 only: the width-1 and width-2 networks are built."""
    found = catalogue(met({3: list(KNOWN)}, 1e-4, torch.Generator().manual_seed(2)))
    assert [e.widths[GROUP] for e in found.entries] == [1, 2, 2, 3]
    assert [len(e.theta) for e in found.entries] == [3, 6, 6, 9]
    assert [s.is_embedded for s in found.sightings] == [True, True, True, False]


def test_steep_units_that_compute_the_same_on_the_data_are_one_family() -> None:
    """A step between two samples: every slope and place of it gives one entry, which is not isolated."""
    objective = landscape(1)
    outgoing = float(three_tanh().targets[25:].mean())
    steep = torch.tensor([[w, w * c, outgoing] for w in (60, 80, 110) for c in (-0.05, 0.02)], dtype=torch.float64)
    points = polish_all(objective, steep)
    assert points.is_converged.all()
    (entry,) = catalogue([Met(objective, points, torch.arange(6))]).entries
    assert entry.visits == {"width 1": 6}
    assert not entry.is_isolated
    assert all(e.is_isolated for e in everything_twice().entries)


def test_networks_without_points_have_an_empty_catalogue() -> None:
    none = polish_all(landscape(2), torch.zeros(0, 6, dtype=torch.float64))
    found = catalogue([Met(landscape(2), none, torch.arange(0))])
    assert (found.entries, found.sightings, found.rows()) == ((), (), [])
    assert found.counts[0].counted == 0


def test_rows_are_flat() -> None:
    found = everything_twice()
    for rows in (found.rows(), found.image_rows(), found.sighting_rows()):
        assert len(rows) >= 4
        assert all(isinstance(v, str | int | float | bool | None) for row in rows for v in row.values())
    assert [row["visits in width 3"] for row in found.rows()] == [2, 2, 2, 2]
    assert [r["degeneracy"] for r in found.image_rows() if r["network"] == "width 3"] == [2, 1, 1, 0]
    images = [image for entry in found.entries for image in entry.images]
    for name, field in (("embedded_loss", "loss"), ("raw_gradient_l1", "raw_gradient_l1"), ("distance", "distance")):
        assert [row[name] for row in found.image_rows()] == [getattr(image, field) for image in images]


def test_a_deep_network_is_catalogued() -> None:
    """Data that a deep net of widths 2-1 fits: its point, embedded with random shares, is traced back to it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(-2, 2, 12, dtype=torch.float64).unsqueeze(1)
    teacher, student = MLP((1, 2, 1, 1)).double(), MLP((1, 3, 2, 1)).double()
    with torch.no_grad():
        for p in teacher.parameters():
            p.normal_(generator=generator)
    data = (x, teacher(x).detach())
    view = trace(teacher, x)
    plan = split_plan(view, {g.name: g.size + 1 for g in view.groups}, shares="random", generator=generator)
    narrow, wide = Objective(teacher, nn.MSELoss(), data), Objective(student, nn.MSELoss(), data)
    theta = Embedding(view, narrow.space, plan).apply(narrow.theta())
    given_ = [
        Met(o, polish_all(o, t.unsqueeze(0)), torch.arange(1)) for o, t in ((narrow, narrow.theta()), (wide, theta))
    ]
    (entry,) = catalogue(given_).entries
    assert list(entry.widths.values()) == [2, 1]
    assert entry.visits == {"width 2-1": 1, "width 3-2": 1}
    assert entry.loss <= 1e-25
    assert entry.images[1].inertia.zero >= entry.inertia.zero + 2


@pytest.mark.parametrize(("power", "sign"), [(1, -1), (2, 1)])
def test_the_symmetry_of_the_data_is_found(power: int, sign: int) -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.cat([x, -x])[torch.randperm(10, generator=torch.Generator().manual_seed(1))]
    y = (x**power).sum(1, keepdim=True)
    mirror = mirror_of_data(Objective(nn.Linear(3, 1).double(), nn.MSELoss(), (x, y), batch_size=4))
    assert mirror is not None
    assert mirror.sign == sign
    torch.testing.assert_close(x[mirror.order], -x, rtol=0, atol=0)
    torch.testing.assert_close(mirror.image(y.flatten()), y.flatten())


def test_data_without_the_symmetry_have_none() -> None:
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).unsqueeze(1)
    for inputs, targets in ((x + 0.1, x), (x, torch.exp(x))):
        assert mirror_of_data(Objective(nn.Linear(1, 1).double(), nn.MSELoss(), (inputs, targets))) is None
    classes = (torch.zeros(6, 1), torch.zeros(6, dtype=torch.long))
    assert mirror_of_data(Objective(nn.Linear(1, 2), nn.CrossEntropyLoss(), classes)) is None


def test_two_lists_of_one_network_are_refused() -> None:
    one = met({1: ["width 1"]}, 0.0, torch.Generator().manual_seed(0))
    for given_ in ([], one + one):
        with pytest.raises(DataError, match="networks of different widths"):
            catalogue(given_)


def test_networks_on_other_data_are_refused() -> None:
    (one,) = met({1: ["width 1"]}, 0.0, torch.Generator().manual_seed(0))
    data = three_tanh(20)
    objective = Objective(two_layer(2).double(), nn.MSELoss(), (data.inputs, data.targets))
    points = polish_all(objective, torch.zeros(1, 6, dtype=torch.float64))
    with pytest.raises(ShapeError, match="same data"):
        catalogue([one, Met(objective, points, torch.arange(1))])


def test_a_trial_is_needed_for_every_point() -> None:
    points = polish_all(landscape(1), torch.tensor([KNOWN["width 1"]], dtype=torch.float64))
    with pytest.raises(ShapeError, match="one trial per point"):
        Met(landscape(1), points, torch.arange(2))
    with pytest.raises(ShapeError, match="one trial per point"):
        Met(landscape(2), points, torch.arange(1))
