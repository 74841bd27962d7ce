"""Side by side in a wider network, and what that measures."""

import pytest
import torch
from tests.paths.pairs import built, data, pair_of
from torch import nn

from thalweg.errors import ConfigError
from thalweg.objective import Objective
from thalweg.paths.decomposition import layer_barriers
from thalweg.paths.pair import Pair
from thalweg.paths.widening import connectivity_width, widened


@pytest.mark.parametrize("kind", ["two layers", "mlp", "no bias", "cnn"])
def test_doubled_networks_are_connected_below_the_chord_under_a_convex_loss(kind: str) -> None:
    """R(t) ≤ (1-t)·R(A) + t·R(B): outputs are a convex combination of both networks'."""
    pair = pair_of(kind)
    found = widened(pair, 1.0)
    ends = [float(pair.objective.value(t)) for t in (pair.theta_a, pair.theta_b)]
    a, b = (pair.objective.outputs(t) for t in (pair.theta_a, pair.theta_b))
    for t in (0.0, 0.3, 0.5, 0.8, 1.0):
        theta = found.path.at(t)
        torch.testing.assert_close(found.objective.outputs(theta), (1 - t) * a + t * b, rtol=1e-11, atol=1e-12)
        assert float(found.objective.value(theta)) <= (1 - t) * ends[0] + t * ends[1] + 1e-12


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("kind", ["mlp", "cnn", "batch norm", "resnet"])
def test_both_ends_of_the_wider_network_compute_what_the_networks_do(kind: str, share: float) -> None:
    pair = pair_of(kind)
    found = widened(pair, share)
    for t, state, buffers in ((0.0, pair.a, found.path.start_buffers), (1.0, pair.b, found.path.end_buffers)):
        own = torch.func.functional_call(pair.objective.module, dict(state), (pair.inputs,))
        wide = torch.func.functional_call(
            found.objective.module, {**found.path.parameters(t), **buffers}, (pair.inputs,)
        )
        torch.testing.assert_close(wide, own, rtol=1e-11, atol=1e-11)


def test_the_connectivity_width_is_the_least_share_without_a_barrier() -> None:
    pair = pair_of("mlp")
    found = connectivity_width(pair, tolerance=0.002, points=5)
    barriers = dict(found.tried)
    assert found.barrier == barriers[found.share] <= 0.002
    below = [barrier for share, barrier in found.tried if share < found.share]
    assert not below or below[-1] > 0.002


def test_a_network_and_itself_need_no_extra_width() -> None:
    objective = Objective(built("mlp", 0), nn.CrossEntropyLoss(), data("mlp"))
    found = connectivity_width(Pair.of(objective, built("mlp", 0), built("mlp", 0)))
    assert found.share == 0
    assert not any(found.extra.values())


def test_a_share_beyond_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="share in"):
        widened(pair_of("mlp"), 1.5)


@pytest.mark.parametrize("kind", ["mlp", "two layers"])
def test_a_layer_that_is_the_same_in_both_networks_has_no_part_in_the_barrier(kind: str) -> None:
    one, two = built(kind, 0), built(kind, 1)
    name = next(n for n, _ in one.named_parameters() if n.endswith("weight"))
    with torch.no_grad():
        for suffix in ("weight", "bias"):
            twin = name.removesuffix("weight") + suffix
            if twin in dict(one.named_parameters()):
                two.get_parameter(twin).copy_(one.get_parameter(twin))
    pair = Pair.of(Objective(one, nn.CrossEntropyLoss(), data(kind)), one, two)
    found = {entry.layer: entry for entry in layer_barriers(pair, points=3)}
    first = found[name.removesuffix(".weight")]
    assert (first.rise_from_a, first.rise_from_b) == (0.0, 0.0)
    assert sum(entry.parameters for entry in found.values()) == pair.objective.num_params
