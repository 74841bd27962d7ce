"""Maps of units: the identity is Arc, ends are exact, and a map fitted on some nets connects others better."""

import functools
import math
import sys
from dataclasses import replace
from pathlib import Path as File

import pytest
import torch
from torch import Tensor, nn

from thalweg.checkpoint import save_state
from thalweg.data import digits
from thalweg.errors import CheckpointError, ConfigError, NumericalError, ShapeError, StructureError
from thalweg.matching.units import unit_rows
from thalweg.objective import Objective
from thalweg.paths.flow import fit_bijection, fit_flow
from thalweg.paths.flow_leg import FlowLeg, flow_path
from thalweg.paths.flow_model import FlowKind, UnitMap, identity_map
from thalweg.structure import View

VIEW = View.of_spec(
    nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10)),
    {"hidden": [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)]},
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@functools.cache
def trained_nets() -> tuple[Objective, Tensor]:
    """Six nets 64-24-10 on digits, one a row."""
    data = digits(dtype=torch.float32)
    x, y = data.inputs[:900].flatten(1), data.targets[:900]
    thetas = []
    for seed in range(6):
        with torch.random.fork_rng():
            torch.random.default_generator.manual_seed(seed)
            net = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
        optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
        objective = Objective(net, nn.CrossEntropyLoss(), (x, y))
        thetas.append(objective.theta(net))
    return objective, torch.stack(thetas)


def rows_of(theta: Tensor) -> Tensor:
    objective, _ = trained_nets()
    return unit_rows(VIEW, VIEW.groups[0], objective.space.parameters(theta), "butterfly")


def disturbed(unit_map: UnitMap, scale: float = 0.3) -> UnitMap:
    """A map that is not the identity."""
    draws = generator(3)
    with torch.no_grad():
        for parameter in unit_map.network.parameters():
            noise = torch.randn(parameter.shape, generator=draws).to(parameter)
            parameter.add_(noise, alpha=scale / len(parameter) ** 0.5)
    return unit_map


def a_map(kind: FlowKind = "realnvp", dtype: torch.dtype = torch.float32) -> UnitMap:
    _, thetas = trained_nets()
    rows = torch.cat([rows_of(theta) for theta in thetas[:4]])
    return identity_map("hidden", rows, generator=generator(), kind=kind, hidden=(16, 16), dtype=dtype)


@pytest.mark.parametrize("kind", ["realnvp", "iaf"])
def test_the_identity_is_arc_about_the_mean_of_all_units(kind: FlowKind) -> None:
    objective, thetas = trained_nets()
    mean = torch.cat([rows_of(theta) for theta in thetas[:4]]).mean(0)
    a, b = thetas[4].double(), thetas[5].double()
    path = flow_path(objective.space, VIEW, a_map(kind, torch.float64), a, b)
    for t in (0.2, 0.5, 0.9):
        cosine, sine = math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)
        expected = mean + cosine * (rows_of(a) - mean) + sine * (rows_of(b) - mean)
        torch.testing.assert_close(rows_of(path.at(t)), expected, rtol=1e-12, atol=1e-12)
        bias = objective.space.parameters(path.at(t))["2.bias"]
        ends = [objective.space.parameters(end)["2.bias"] for end in (a, b)]
        torch.testing.assert_close(bias, (1 - t) * ends[0] + t * ends[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["realnvp", "iaf"])
def test_the_ends_are_exact_and_the_inverse_is_within_its_error(kind: FlowKind) -> None:
    objective, thetas = trained_nets()
    unit_map = disturbed(a_map(kind))
    path = flow_path(objective.space, VIEW, unit_map, thetas[4], thetas[5])
    assert torch.equal(path.at(0.0), thetas[4])
    assert torch.equal(path.at(1.0), thetas[5])
    leg = path.legs[0]
    assert isinstance(leg, FlowLeg)
    assert leg.error <= 1e-5
    step = (rows_of(path.at(1e-7)) - rows_of(thetas[4])).abs() / unit_map.std
    assert float(step.max()) < 1e-4
    assert float((rows_of(path.at(0.5)) - arc(thetas[4], thetas[5])).abs().max()) > 1e-2
    assert leg.moving() is None
    assert path.length() > float((thetas[5] - thetas[4]).norm())
    torch.testing.assert_close(path.reversed().at(0.3), path.at(0.7), rtol=1e-4, atol=1e-5)


def arc(a: Tensor, b: Tensor) -> Tensor:
    _, thetas = trained_nets()
    mean = torch.cat([rows_of(theta) for theta in thetas[:4]]).mean(0)
    return mean + (rows_of(a) + rows_of(b) - 2 * mean) / 2**0.5


def test_a_map_that_float32_cannot_invert_well_is_run_in_float64() -> None:
    objective, thetas = trained_nets()
    coarse = disturbed(a_map(), scale=30.0)
    assert coarse.round_trip(rows_of(thetas[4])) > 1e-5
    leg = flow_path(objective.space, VIEW, coarse, thetas[4], thetas[5]).legs[0]
    assert isinstance(leg, FlowLeg)
    assert leg.error < 1e-10


def test_a_bijection_connects_nets_that_it_never_saw_better_than_arc() -> None:
    objective, thetas = trained_nets()
    options = {"steps": 120, "batch_size": 256, "learning_rate": 1e-3, "hidden": (16, 16)}
    unit_map = fit_bijection(objective, VIEW, "hidden", thetas[:4], generator=generator(1), **options)
    assert unit_map.status == "finished"
    assert min(unit_map.losses) < unit_map.losses[0]
    space = objective.space
    middles = [flow_path(space, VIEW, m, thetas[4], thetas[5]).at(0.5) for m in (unit_map, a_map())]
    ours, theirs = (float(objective.value(middle)) for middle in middles)
    assert ours < 0.9 * theirs


def test_nets_can_be_held_out_for_validation_and_a_fit_repeats() -> None:
    objective, thetas = trained_nets()
    options = {"steps": 4, "batch_size": 64, "hidden": (4,), "held_out": 2, "at": "anywhere"}
    state = torch.random.get_rng_state()
    seen: list[tuple[int, float]] = []
    maps = [
        fit_bijection(
            *(objective, VIEW, "hidden", thetas),
            generator=generator(5),
            progress=lambda step, loss: seen.append((step, loss)),
            **options,
        )
        for _ in range(2)
    ]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [step for step, _ in seen] == [1, 2, 3, 4] * 2
    rows = torch.cat([rows_of(theta) for theta in thetas[:4]])
    torch.testing.assert_close(maps[0].mean, rows.mean(0).float())
    assert torch.equal(maps[0].latent(rows), maps[1].latent(rows))
    assert maps[0].losses == maps[1].losses


@pytest.mark.parametrize("kind", ["realnvp", "iaf"])
def test_a_likelihood_fit_makes_the_units_more_likely(kind: FlowKind) -> None:
    objective, thetas = trained_nets()
    states = [objective.space.parameters(theta) for theta in thetas[:4]]
    options = {"kind": kind, "hidden": (16, 16), "epochs": 3, "batch_size": 32}
    fitted = fit_flow(VIEW, "hidden", states, generator=generator(), **options)
    assert fitted.losses[0] == pytest.approx(0.5, abs=1e-4)  # standardised: half a square for each feature
    assert fitted.losses[-1] < fitted.losses[0] - 0.003
    assert len(fitted.losses) == 4


def test_a_likelihood_fit_keeps_the_map_that_validates_best() -> None:
    objective, thetas = trained_nets()
    states = [objective.space.parameters(theta) for theta in thetas[:4]]
    scores = iter([3.0, 1.0, 2.0, 5.0])
    kept: list[Tensor] = []

    def validate(unit_map: UnitMap) -> float:
        kept.append(unit_map.latent(rows_of(thetas[0])).clone())
        return next(scores)

    options = {"hidden": (8,), "epochs": 3, "batch_size": 64, "validate": validate}
    fitted = fit_flow(VIEW, "hidden", states, generator=generator(), **options)
    assert fitted.losses == (3.0, 1.0, 2.0, 5.0)
    with torch.no_grad():
        torch.testing.assert_close(fitted.latent(rows_of(thetas[0])), kept[1])


def test_a_map_that_was_saved_is_the_same_map(tmp_path: File) -> None:
    objective, thetas = trained_nets()
    unit_map = replace(disturbed(a_map("iaf")), losses=(1.0, 0.5), status="finished")
    unit_map.save(tmp_path / "map.safetensors")
    loaded = UnitMap.load(tmp_path / "map.safetensors")
    assert (loaded.group, loaded.shape, loaded.losses, loaded.status) == (
        "hidden",
        unit_map.shape,
        (1.0, 0.5),
        "finished",
    )
    paths = [flow_path(objective.space, VIEW, m, thetas[4], thetas[5]) for m in (unit_map, loaded)]
    assert torch.equal(paths[0].at(0.3), paths[1].at(0.3))


def test_a_file_without_a_map_is_refused(tmp_path: File) -> None:
    save_state(tmp_path / "net.safetensors", {"weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match="map of units"):
        UnitMap.load(tmp_path / "net.safetensors")


def test_nets_that_do_not_fit_the_map_are_refused() -> None:
    objective, thetas = trained_nets()
    narrow = identity_map("hidden", rows_of(thetas[0])[:, :40], generator=generator(), hidden=(4,))
    with pytest.raises(ShapeError, match="units of 40 features"):
        flow_path(objective.space, VIEW, narrow, thetas[0], thetas[1])
    other = replace(a_map(), group="deeper")
    with pytest.raises(StructureError, match="Got 'deeper'"):
        flow_path(objective.space, VIEW, other, thetas[0], thetas[1])
    broken = a_map()
    with torch.no_grad():
        next(broken.network.parameters()).fill_(float("nan"))
    with pytest.raises(NumericalError, match="can be inverted"):
        flow_path(objective.space, VIEW, broken, thetas[0], thetas[1])
    states = [objective.space.parameters(thetas[0]), {"0.weight": torch.zeros(24, 64)}]
    with pytest.raises(ShapeError, match="one architecture"):
        fit_flow(VIEW, "hidden", states, generator=generator())


def test_wrong_settings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, thetas = trained_nets()
    with pytest.raises(ConfigError, match="Expected enough nets"):
        fit_bijection(objective, VIEW, "hidden", thetas[:1], generator=generator())
    with pytest.raises(ConfigError, match="Expected enough nets"):
        fit_flow(VIEW, "hidden", [], generator=generator())
    with pytest.raises(ConfigError, match="positive sizes"):
        identity_map("hidden", rows_of(thetas[0]), generator=generator(), transforms=0)
    monkeypatch.setitem(sys.modules, "zuko.flows", None)
    with pytest.raises(ConfigError, match=r"pip install thalweg\[flows\]"):
        a_map()
