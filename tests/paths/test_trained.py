"""Trained connections in the panel: they begin and end exactly, and beat the line that they start from."""

import pytest
import torch
from tests.paths.pairs import built, data, pair_of
from torch import nn

from thalweg.errors import ConfigError
from thalweg.matching.units import unit_rows
from thalweg.objective import Objective
from thalweg.paths.flow_model import identity_map
from thalweg.paths.methods import connect
from thalweg.paths.pair import Pair
from thalweg.paths.panel import panel
from thalweg.paths.trained import TRAINED, TrainedSettings, flow_method, trained

FAST = TrainedSettings(epochs=30, learning_rate=0.05, batch_size=20, string_steps=20)


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_path_meets_its_ends_bit_for_bit_and_beats_the_line(name):
    pair = pair_of("two layers")
    line, row = panel(pair, ("linear",), own={name: trained(name, FAST)}, points=9)
    assert (row.status, row.source) == ("measured", "trained"), row.reason
    assert row.words == TRAINED[name]
    assert row.connection.meets == 1.0
    for t, theta in ((0.0, pair.theta_a), (1.0, pair.theta_b)):
        torch.testing.assert_close(row.connection.path.at(t), theta, rtol=0, atol=0)
    inner = (row.profile.times > 0.2) & (row.profile.times < 0.8)
    assert row.profile.train_loss[inner].mean() < line.profile.train_loss[1:-1].max()


@pytest.mark.parametrize("name", TRAINED)
def test_a_network_is_connected_with_itself(name):
    net = built("two layers", 0)
    pair = Pair.of(Objective(net, nn.CrossEntropyLoss(), data("two layers")), net, net)
    (row,) = panel(pair, (), own={name: trained(name, TrainedSettings(epochs=1, string_steps=2))}, points=5)
    assert row.status == "measured", row.reason


def test_the_running_statistics_of_both_ends_are_the_networks_own():
    pair = pair_of("batch norm")
    path = trained("polygon-3", TrainedSettings(epochs=1))(pair).path
    for found, state in ((path.start_buffers, pair.a), (path.end_buffers, pair.b)):
        assert found
        for name, value in found.items():
            torch.testing.assert_close(value, state[name], rtol=0, atol=0)


def test_the_same_seed_gives_the_same_path_and_progress_is_told():
    pair, told = pair_of("two layers"), []
    settings = TrainedSettings(epochs=2, seed=3)
    first = trained("bezier", settings, progress=lambda fraction, text: told.append(fraction))(pair).path
    second = trained("bezier", settings)(pair).path
    torch.testing.assert_close(first.at(0.5), second.at(0.5), rtol=0, atol=0)
    assert told == [0.5, 1.0]


@pytest.mark.parametrize("name", ["polygon-5", "string"])
def test_a_training_that_diverges_says_so(name):
    found = trained(name, TrainedSettings(epochs=9, learning_rate=1e200, string_steps=9))(pair_of("two layers"))
    assert found.notes == ("the training diverged: choose a smaller learning rate",)


def test_a_map_of_units_that_is_the_identity_is_the_arc():
    """But for the output bias, which belongs to no unit and goes straight."""
    pair = pair_of("two layers")
    group = pair.view.groups[0]
    rows = torch.cat([unit_rows(pair.view, group, state, "butterfly") for state in (pair.a, pair.b)])
    options = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}
    found = flow_method(identity_map(group.name, rows, **options), "ours")(pair)
    assert (found.method, found.meets, found.notes) == ("ours", 1.0, ())
    arc = connect(pair, "arc").path
    *units, bias = pair.objective.space.names
    for t in (0.0, 0.3, 1.0):
        parameters, expected = found.path.parameters(t), arc.parameters(t)
        for name in units:
            torch.testing.assert_close(parameters[name], expected[name], rtol=0, atol=1e-12)
        torch.testing.assert_close(parameters[bias], torch.lerp(pair.a[bias], pair.b[bias], t))


def test_a_map_of_other_units_does_not_apply():
    pair, other = pair_of("mlp"), pair_of("two layers")
    group = other.view.groups[0]
    rows = unit_rows(other.view, group, other.a, "butterfly")
    unit_map = identity_map("none", rows, generator=torch.Generator().manual_seed(0))
    (row,) = panel(pair, (), own={"flow": flow_method(unit_map)}, points=5)
    assert row.status == "does not apply"


def test_an_unknown_name_is_refused():
    with pytest.raises(ConfigError, match=r"Expected one of polygon-3, polygon-5, bezier, string\. Got 'polygon'"):
        trained("polygon")
