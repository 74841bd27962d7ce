"""Ensembles: WA(n) against a pseudo-inverse, the theorem of the last layer, what is shared and what it costs."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from thalweg.ensembles import evaluate, growth, output_ensemble, single, wa_ensemble, weight_average
from thalweg.ensembles.scores import multiply_adds, num_parameters
from thalweg.errors import CheckpointError, ConfigError, DataError, ShapeError, StructureError
from thalweg.nets import MLP, ResNet
from thalweg.objective import Objective
from thalweg.structure.sites import run_with

DOUBLE = torch.float64


def drawn(build, seed: int) -> nn.Module:
    """Build a network in float64 whose weights and statistics come from a generator."""
    generator = torch.Generator().manual_seed(seed)
    net = build().to(DOUBLE).eval()
    with torch.no_grad():
        for name, tensor in (*net.named_parameters(), *net.named_buffers()):
            if tensor.is_floating_point():
                tensor.copy_(0.4 * torch.randn(tensor.shape, generator=generator, dtype=DOUBLE))
                if name.endswith("running_var"):
                    tensor.abs_().add_(0.1)
    return net


def samples(*shape: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(*shape, generator=generator, dtype=DOUBLE)
    return x, torch.randint(classes, (shape[0],), generator=generator)


def mlp() -> nn.Module:
    return MLP([5, 8, 7, 3], "relu")


def resnet() -> nn.Module:
    return ResNet(stem=4, channels=(4, 6), hidden=((5,), (5,)), in_channels=2, num_classes=3)


X, Y = samples(60, 5)
NETS = [drawn(mlp, seed) for seed in range(3)]
OBJECTIVE = Objective(NETS[0], nn.CrossEntropyLoss(), (X, Y), batch_size=25)


@functools.cache
def resnets() -> tuple[Objective, list[nn.Module]]:
    nets = [drawn(resnet, seed) for seed in range(3)]
    return Objective(nets[0], nn.CrossEntropyLoss(), samples(24, 2, 6, 6), batch_size=12), nets


def features(net: nn.Module, layers: int) -> np.ndarray:
    """Give the activations after so many layers, one row a sample, and a constant 1."""
    h = X
    for layer in net.layers[:layers]:
        h = torch.relu(layer(h))
    return np.hstack([h.detach().numpy(), np.ones((len(h), 1))])


@pytest.mark.parametrize("own_layers", [1, 2])
def test_the_first_own_layer_is_that_of_the_pseudo_inverse_and_later_ones_are_the_networks_own(own_layers):
    found = wa_ensemble(OBJECTIVE, NETS, own_layers=own_layers, ridge=0.0)
    place = 3 - own_layers
    base = features(NETS[0], place)
    for net, member in zip(NETS[1:], found.members[1:], strict=True):
        layer = net.layers[place]
        own = np.hstack([layer.weight.detach().numpy(), layer.bias.detach().numpy()[:, None]])
        expected = own @ features(net, place).T @ np.linalg.pinv(base.T)
        got = torch.cat([member[f"layers.{place}.weight"], member[f"layers.{place}.bias"][:, None]], dim=1).numpy()
        np.testing.assert_allclose(got @ base.T, expected @ base.T, rtol=0, atol=1e-9)
        for number in range(3):
            source = NETS[0] if number < place else net
            if number != place:
                weight = source.get_parameter(f"layers.{number}.weight").detach()
                torch.testing.assert_close(member[f"layers.{number}.weight"], weight, rtol=0, atol=0)


def test_an_ensemble_at_the_last_layer_is_one_net_with_a_loss_between_mean_and_max_of_the_members():
    found = wa_ensemble(OBJECTIVE, NETS, average="outputs")
    net = mlp().to(DOUBLE).eval()
    net.load_state_dict(found.export(), strict=True)
    members = torch.stack(list(found.member_outputs(X)))
    torch.testing.assert_close(net(X).detach(), members.mean(0), rtol=0, atol=1e-12)
    losses = [evaluate(single(OBJECTIVE, member), OBJECTIVE).loss for member in found.members]
    loss = evaluate(found, OBJECTIVE).loss
    assert loss == pytest.approx(float(nn.functional.cross_entropy(net(X).detach(), Y)), abs=1e-12)
    assert loss <= np.mean(losses) <= max(losses)


def test_probabilities_are_averaged_for_classes_and_outputs_for_numbers():
    found = wa_ensemble(OBJECTIVE, NETS)
    mean = torch.stack([o.softmax(1) for o in found.member_outputs(X)]).mean(0)
    torch.testing.assert_close(found.outputs(X).exp(), mean, rtol=0, atol=1e-12)
    score = evaluate(found, OBJECTIVE)
    assert score.loss == pytest.approx(float(nn.functional.nll_loss(mean.log(), Y)), abs=1e-12)
    assert score.accuracy == pytest.approx(float((mean.argmax(1) == Y).double().mean()))
    numbers = Objective(NETS[0], nn.MSELoss(), (X, X[:, :3]))
    assert wa_ensemble(numbers, NETS).average == "outputs"
    assert evaluate(output_ensemble(numbers, NETS), numbers).accuracy is None


def test_a_member_runs_on_the_backbones_features_and_what_is_shared_runs_once():
    found = wa_ensemble(OBJECTIVE, NETS, own_layers=2)
    for member, outputs in zip(found.members, found.member_outputs(X), strict=True):
        torch.testing.assert_close(outputs, run_with(found.module, member, X, lambda call: None), rtol=0, atol=0)
    widths = [5 * 8, 8 * 7, 7 * 3]
    assert multiply_adds(found) == widths[0] + 3 * sum(widths[1:])
    assert num_parameters(found) == 48 + 3 * (63 + 24)
    assert multiply_adds(output_ensemble(OBJECTIVE, NETS)) == 3 * sum(widths)


def test_multiply_adds_are_half_the_flops_that_torch_counts():
    objective, nets = resnets()
    with FlopCounterMode(display=False) as counter:
        nets[0](torch.zeros(1, 2, 6, 6, dtype=DOUBLE))
    score = evaluate(single(objective, nets[0]), objective)
    assert 2 * score.multiply_adds == counter.get_total_flops()
    assert score.parameters == sum(p.numel() for p in nets[0].parameters())


def test_the_scores_of_the_first_members_are_those_of_smaller_ensembles():
    found = wa_ensemble(OBJECTIVE, NETS)
    scores = growth(found, OBJECTIVE)
    assert scores[1] == evaluate(wa_ensemble(OBJECTIVE, NETS[:2]), OBJECTIVE)
    assert scores[2] == evaluate(found, OBJECTIVE)
    assert scores[0].loss == pytest.approx(evaluate(single(OBJECTIVE, NETS[0]), OBJECTIVE).loss, abs=1e-12)


def test_equal_networks_are_the_network_itself():
    found = wa_ensemble(OBJECTIVE, [NETS[0], NETS[0]], average="outputs")
    assert found.fits == ()
    for ensemble in (found, weight_average(OBJECTIVE, [NETS[0], NETS[0]])):
        for name, tensor in NETS[0].state_dict().items():
            torch.testing.assert_close(ensemble.export()[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("own_layers", "fitted"),
    [(1, "head"), (2, "shortcut.0 head"), (3, "residual.3 shortcut.0"), (4, "residual.0 shortcut.0")],
)
def test_past_a_skip_connection_every_layer_that_reads_the_backbone_is_fitted(own_layers, fitted):
    objective, nets = resnets()
    found = wa_ensemble(objective, nets[:2], own_layers=own_layers, ridge=0.0)
    own = [name for name, _ in nets[1].named_parameters() if name not in found.shared]
    moved = [n for n in own if n.endswith("weight") and not torch.equal(found.members[1][n], state(nets[1])[n])]
    assert [name.removeprefix("stages.1.0.").removesuffix(".weight") for name in moved] == fitted.split()


def state(net: nn.Module) -> dict[str, Tensor]:
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


def test_statistics_behind_the_cut_are_those_of_the_data_and_the_backbones_stay():
    objective, nets = resnets()
    found = wa_ensemble(objective, nets[:2], own_layers=4)
    member, x = found.members[1], next(iter(objective.batches()))[0]
    torch.testing.assert_close(member["stem.1.running_mean"], nets[0].get_buffer("stem.1.running_mean"))
    kept: list[Tensor] = []
    name = "stages.1.0.residual.0.weight"
    whole = torch.cat([batch for batch, _ in objective.batches()])
    run_with(
        found.module,
        member,
        whole,
        lambda c: kept.append(c.apply(c.weight, c.bias)) if c.site.weight == name else None,
    )
    torch.testing.assert_close(member["stages.1.0.residual.1.running_mean"], kept[0].mean((0, 2, 3)))
    assert len(x) == 12


def test_an_average_of_weights_takes_its_statistics_from_the_data():
    objective, nets = resnets()
    found = weight_average(objective, nets)
    mean = sum(net.get_parameter("head.weight") for net in nets).detach() / 3
    torch.testing.assert_close(found.members[0]["head.weight"], mean, rtol=0, atol=1e-12)
    assert not torch.equal(found.members[0]["stem.1.running_mean"], nets[0].get_buffer("stem.1.running_mean"))
    assert found.notes == ("statistics of 6 normalisation layers re-estimated",)


@pytest.mark.parametrize(("count", "batch_size", "used"), [(41, 10, 40), (7, 1, 7), (1, None, 1)])
def test_ragged_batches_and_single_samples_have_statistics_or_keep_their_own(count, batch_size, used):
    nets = [
        drawn(lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)), s)
        for s in (0, 1)
    ]
    whole = Objective(nets[0], nn.CrossEntropyLoss(), (X[:used], Y[:used]))
    objective = Objective(nets[0], nn.CrossEntropyLoss(), (X[:count], Y[:count]), batch_size=batch_size)
    found, expected = (weight_average(o, nets).members[0]["1.running_mean"] for o in (objective, whole))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert bool(torch.isfinite(torch.tensor(evaluate(wa_ensemble(objective, nets), objective).loss)))


def test_outputs_that_are_no_tensor_are_refused():
    class Two(nn.Sequential):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x), x

    nets = [drawn(lambda: Two(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), s) for s in (0, 1)]
    objective = Objective(nets[0], lambda outputs, y: nn.functional.cross_entropy(outputs[0], y), (X, Y))
    with pytest.raises(StructureError, match="a network that gives one tensor"):
        evaluate(output_ensemble(objective, nets), objective)


class Outside(nn.Module):
    """Features reach the outputs past the last linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return h + self.last(h)


class Goes(nn.Module):
    """A last layer that something nonlinear follows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.log_softmax(self.last(torch.tanh(self.first(x))), 1)


class Tied(nn.Module):
    """A last layer whose weight is used before."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5, bias=False), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.second(torch.tanh(x @ self.first.weight)))
        return self.first(h)[:, :3]


@pytest.mark.parametrize(("build", "words"), [(Outside, "a cut that all features pass"), (Tied, "theirs alone")])
def test_what_cannot_be_cut_is_refused(build, words):
    nets = [drawn(build, seed) for seed in range(2)]
    with pytest.raises(StructureError, match=words):
        wa_ensemble(Objective(nets[0], nn.CrossEntropyLoss(), (X, Y)), nets)


def test_what_is_no_single_net_is_not_exported():
    found = wa_ensemble(OBJECTIVE, NETS)
    for ensemble in (found, replace(found, own_layers=2, average="outputs"), output_ensemble(OBJECTIVE, NETS)):
        with pytest.raises(StructureError, match="one own layer and average 'outputs'"):
            ensemble.export()
    nets = [drawn(Goes, seed) for seed in range(2)]
    objective = Objective(nets[0], nn.NLLLoss(), (X, Y))
    with pytest.raises(StructureError, match="linear in its last layer"):
        wa_ensemble(objective, nets, average="outputs").export()


def test_bad_input_is_said_in_words():
    bad = {n: t.clone() for n, t in state(NETS[1]).items()}
    bad["layers.0.weight"][0, 0] = torch.nan
    other = drawn(lambda: MLP([5, 8, 6, 3]), 0)
    cases = [
        (CheckpointError, "NaN or infinity in 'layers.0.weight' of network 2", [NETS[0], bad], {}),
        (ShapeError, "in network 2", [NETS[0], other], {}),
        (ConfigError, "Expected 2 networks or more", [NETS[0]], {}),
        (ConfigError, "from 1 to 2 own layers", NETS, {"own_layers": 3}),
        (DataError, "at least one sample", NETS, {"fit_samples": 0}),
    ]
    for error, words, nets, options in cases:
        with pytest.raises(error, match=words):
            wa_ensemble(OBJECTIVE, nets, **options)
    numbers = Objective(NETS[0], nn.MSELoss(), (X, X[:, :3]))
    with pytest.raises(ConfigError, match="class targets to average probabilities"):
        output_ensemble(numbers, NETS, average="probabilities")


def test_few_samples_are_told():
    found = wa_ensemble(OBJECTIVE, NETS, fit_samples=10)
    assert "at worst 10 for 8" in found.notes[0]


def test_data_that_come_from_a_loader_serve_too():
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=20)
    objective = Objective(NETS[0], nn.CrossEntropyLoss(), loader)
    assert evaluate(wa_ensemble(objective, NETS), objective).loss == pytest.approx(
        evaluate(wa_ensemble(OBJECTIVE, NETS), OBJECTIVE).loss, abs=1e-6
    )


def test_on_digits_the_ensembles_beat_the_single_nets_in_the_order_of_the_paper():
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x, nets = (x / 16).float(), []
    for seed in range(4):
        net = drawn(lambda: MLP([64, 40, 10], "relu"), seed).float()
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(0.5)
        step = torch.optim.Adam(net.parameters(), lr=0.01)
        for _ in range(60):
            step.zero_grad()
            nn.functional.cross_entropy(net(x[:700]), y[:700]).backward()
            step.step()
        nets.append(net)
    train = Objective(nets[0], nn.CrossEntropyLoss(), (x[:700], y[:700]))
    test = Objective(nets[0], nn.CrossEntropyLoss(), (x[700:], y[700:]))
    alone = [evaluate(single(train, net), test).accuracy for net in nets]
    wa = evaluate(wa_ensemble(train, nets), test)
    independent = evaluate(output_ensemble(train, nets), test)
    assert independent.loss < wa.loss
    assert np.mean(alone) < wa.accuracy
    assert evaluate(weight_average(train, nets), test).accuracy < min(alone)
