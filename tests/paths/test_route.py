"""Schedules against the paper's statements and against its algorithm, slow and plain."""

import numpy as np
import pytest
import torch
from tests.paths.pairs import built, data, pair_of
from torch import Tensor, nn

from thalweg.nets import MLP
from thalweg.objective import Objective
from thalweg.paths.adjust import Adjuster
from thalweg.paths.centres import centres
from thalweg.paths.pair import Pair
from thalweg.paths.path import Path
from thalweg.paths.route import adjusted, butterfly, joint, path_of, simultaneous
from thalweg.paths.stages import stages

TIMES = (0.0, 0.2, 0.5, 0.9, 1.0)


def two_layer_pair(width: int, samples: int) -> Pair:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(samples, 6, generator=generator, dtype=torch.float64)
    nets = []
    for seed in (0, 1):
        with torch.random.fork_rng():
            torch.default_generator.manual_seed(seed)
            nets.append(MLP((6, width, 3), "relu").double())
    return Pair.of(Objective(nets[0], nn.MSELoss(), (x, torch.zeros(samples, 3, dtype=torch.float64))), *nets)


def test_the_arc_of_the_paper_written_out() -> None:
    pair = pair_of("two layers")
    legs, target = simultaneous(pair, pair.b, "arc")
    path = path_of(pair, legs, target)
    rows = [
        torch.cat([s["layers.0.weight"], s["layers.0.bias"][:, None], s["layers.1.weight"].T], 1)
        for s in (pair.a, pair.b)
    ]
    mu = torch.cat(rows).mean(0)
    for t in TIMES:
        angle = torch.tensor(np.pi * t / 2, dtype=torch.float64)
        wanted = mu + angle.cos() * (rows[0] - mu) + angle.sin() * (rows[1] - mu)
        got = path.parameters(t)
        mine = torch.cat([got["layers.0.weight"], got["layers.0.bias"][:, None], got["layers.1.weight"].T], 1)
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)


def test_an_arc_keeps_mean_and_covariance_of_the_units_where_both_networks_have_the_same() -> None:
    """The paper's proposition: for equal Gaussian distributions, cos and sin keep the distribution."""
    generator = torch.Generator().manual_seed(0)
    units, features = 4000, 3
    one, two = torch.randn(2, units, features, generator=generator, dtype=torch.float64)
    mu = torch.cat([one, two]).mean(0)
    middle = mu + np.sqrt(0.5) * (one - mu) + np.sqrt(0.5) * (two - mu)
    torch.testing.assert_close(middle.T.cov(), torch.eye(features, dtype=torch.float64), atol=0.08, rtol=0)


def test_weight_adjustment_is_that_of_the_paper_by_pseudo_inverse() -> None:
    pair = two_layer_pair(width=8, samples=50)
    legs, target = adjusted(pair, pair.b, adjuster=Adjuster(pair), knots=4)
    x, a, b = pair.inputs, pair.a, pair.b

    def features(w: Tensor, c: Tensor) -> np.ndarray:
        hidden = torch.relu(x @ w.T + c)
        return torch.cat([hidden, torch.ones(len(x), 1, dtype=torch.float64)], 1).T.numpy()

    wanted = torch.cat([a["layers.1.weight"], a["layers.1.bias"][:, None]], 1).numpy() @ features(
        a["layers.0.weight"], a["layers.0.bias"]
    )
    for s in (0.0, 0.25, 0.5, 1.0):
        got = legs[1].parameters(s)
        moved = features(*(torch.lerp(a[n], b[n], s) for n in ("layers.0.weight", "layers.0.bias")))
        naive = wanted @ np.linalg.pinv(moved)
        mine = torch.cat([got["layers.1.weight"], got["layers.1.bias"][:, None]], 1).numpy()
        np.testing.assert_allclose(mine, naive, rtol=1e-6, atol=1e-8)
    assert torch.equal(target["layers.1.weight"], b["layers.1.weight"])


def test_adjustment_keeps_all_outputs_while_samples_are_no_more_than_units() -> None:
    """Figure 5's premise: with N ≤ width the readers give what they gave, exactly, at every knot."""
    pair = two_layer_pair(width=40, samples=20)
    legs, _ = adjusted(pair, pair.b, adjuster=Adjuster(pair), knots=4)
    before = pair.objective.outputs(pair.theta_a)
    path = Path(pair.objective.space, tuple(legs[:2]))
    for t in (0.0, 0.25, 0.5, 0.625, 0.75, 1.0):
        torch.testing.assert_close(pair.objective.outputs(path.at(t)), before, rtol=1e-6, atol=1e-6)


def test_the_last_leg_is_convex_in_a_convex_loss() -> None:
    pair = two_layer_pair(width=8, samples=50)
    legs, _ = adjusted(pair, pair.b, adjuster=Adjuster(pair), knots=2)
    losses = [float(pair.objective.value(pair.objective.space.theta(legs[-1].parameters(s)))) for s in TIMES]
    assert max(losses[1:-1]) <= max(losses[0], losses[-1]) + 1e-12


@pytest.mark.parametrize("kind", ["mlp", "cnn", "batch norm", "resnet"])
def test_with_a_ridge_no_leg_is_spent_on_meeting_the_ends(kind: str) -> None:
    pair = pair_of(kind)
    legs, _ = adjusted(pair, pair.b, adjuster=Adjuster(pair, ridge=1e-4), knots=2)
    assert not any("to the fit" in leg.label for leg in legs)
    assert len(legs) == sum(bool(s.readers) for s in stages(pair))


@pytest.mark.parametrize("kind", ["mlp", "cnn", "resnet"])
def test_the_centred_fit_at_an_end_is_that_end(kind: str) -> None:
    """What is set at s = 0 and 1 bit for bit is what the fit gives there: the joint leg is continuous."""
    pair = pair_of(kind)
    adjuster = Adjuster(pair, ridge=1e-4)
    names = frozenset(s.weight for s in pair.execution.sites[1:])
    for state in (pair.a, pair.b):
        found = adjuster.fitted(state, adjuster.targets(state, names))
        for name, value in found.items():
            torch.testing.assert_close(value, state[name], rtol=1e-8, atol=1e-8)


def test_fits_of_a_pass_build_on_each_other() -> None:
    pair = pair_of("mlp")
    leg = joint(pair, pair.b, adjuster=Adjuster(pair, ridge=1e-4), knots=2)[0][0]
    middle = leg.parameters(0.5)
    adjuster = Adjuster(pair, ridge=1e-4)
    last = "layers.2.weight"
    here, there = (adjuster.targets(s, frozenset({last}))[last] for s in (pair.a, pair.b))
    again = adjuster.fitted(
        {**pair.a, **middle},
        {last: (here + there) / 2},
        prior={**pair.a, **{n: (pair.a[n] + pair.b[n]) / 2 for n in middle}},
    )
    torch.testing.assert_close(again[last], middle[last], rtol=1e-9, atol=1e-9)


def test_butterflies_move_incoming_and_outgoing_weights_together() -> None:
    pair = pair_of("mlp")
    legs, _ = butterfly(pair, pair.b, adjuster=Adjuster(pair))
    assert [set(leg.moving() or {}) for leg in legs] == [
        {"layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"},
        {"layers.1.weight", "layers.1.bias", "layers.2.weight", "layers.2.bias"},
    ]


def test_stages_hold_every_parameter_once_and_readers_lie_later() -> None:
    for kind in ("mlp", "batch norm", "resnet", "transformer"):
        pair = pair_of(kind)
        found = stages(pair)
        names = [n for stage in found for n in stage.names]
        assert sorted(names) == sorted(pair.objective.space.names)
        for place, stage in enumerate(found):
            later = {n for rest in found[place + 1 :] for n in rest.names}
            assert set(stage.readers) <= later


def test_a_residual_stream_is_read_by_every_later_layer_on_it() -> None:
    first = stages(pair_of("resnet"))[0]
    assert len(first.readers) >= 3  # the block's first convolution, the projection's, …


def test_the_centre_of_a_bias_is_its_mean_over_units_and_of_an_output_bias_the_midpoint() -> None:
    pair = pair_of("mlp")
    found = centres(pair.view, pair.a, pair.b, ["layers.0.bias", "layers.2.bias"])
    both = torch.cat([pair.a["layers.0.bias"], pair.b["layers.0.bias"]])
    torch.testing.assert_close(found["layers.0.bias"], both.mean().expand(10), rtol=1e-12, atol=1e-12)
    middle = (pair.a["layers.2.bias"] + pair.b["layers.2.bias"]) / 2
    assert torch.equal(found["layers.2.bias"], middle)


def test_the_pair_leaves_the_users_modules_alone() -> None:
    one, two = built("batch norm", 0), built("batch norm", 1)
    before = {n: t.clone() for n, t in one.state_dict().items()}
    pair = Pair.of(Objective(one, nn.CrossEntropyLoss(), data("batch norm")), one, two)
    adjusted(pair, pair.b, adjuster=Adjuster(pair), knots=2)
    assert all(torch.equal(before[n], t) for n, t in one.state_dict().items())


def test_on_the_arc_of_the_last_layer_outputs_are_those_of_both_ends_up_to_a_common_shift() -> None:
    pair = two_layer_pair(width=8, samples=50)
    legs, _ = adjusted(pair, pair.b, "arc", adjuster=Adjuster(pair), knots=2)
    inputs = next(iter(pair.objective.batches()))[0]

    def outputs(s: float) -> Tensor:
        found: Tensor = torch.func.functional_call(pair.objective.module, dict(legs[-1].parameters(s)), (inputs,))
        return found - found.mean(1, keepdim=True)

    for s in TIMES:
        angle = np.pi * s / 2
        torch.testing.assert_close(outputs(s), np.cos(angle) * outputs(0.0) + np.sin(angle) * outputs(1.0))
