"""Which unit is which: permutations and copies are found exactly, and streaming is what plain code computes."""

import numpy as np
import pytest
import torch
from torch import nn

import thalweg
from thalweg.embeddings import embed
from thalweg.errors import ConfigError, DataError, MemoryLimitError, NumericalError, StructureError
from thalweg.nets.transformer import BlockWidths, EncoderClassifier
from thalweg.structure import permute, random_permutations, trace
from thalweg.teacher_student import CrossMoments, match, mean_rank, sight


def drawn(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw all weights and running statistics, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(0.5 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
                if name.endswith("running_var"):
                    tensor.abs_().add_(0.2)
    return module


def mlp(*widths: int, seed: int = 0) -> nn.Module:
    layers: list[nn.Module] = []
    for one, two in zip((3, *widths), (*widths, 2), strict=True):
        layers += [nn.Linear(one, two), nn.Tanh()]
    return drawn(nn.Sequential(*layers[:-1]), seed)


def cnn(channels: int = 4, pool: int = 1, seed: int = 0) -> nn.Module:
    return drawn(
        nn.Sequential(
            *(nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(), nn.AvgPool2d(pool)),
            *(nn.Conv2d(channels, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * (8 // pool - 2) ** 2, 3)),
        ),
        seed,
    )


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def transformer() -> nn.Module:
    blocks = (BlockWidths(2, 3, 4, 7),)
    return drawn(EncoderClassifier(num_features=6, num_tokens=4, dim=8, blocks=blocks, num_classes=3))


CASES = {
    "mlp": (lambda: mlp(6, 5), noise(80, 3)),
    "cnn with BatchNorm": (cnn, noise(20, 1, 8, 8)),
    "transformer": (transformer, noise(30, 4, 6)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_permutation_of_all_units_is_found(name):
    build, x = CASES[name]
    a, b = build(), build()
    view = trace(a, x[:4])
    orders = random_permutations(view, torch.Generator().manual_seed(2))
    b.load_state_dict(permute(view, a.state_dict(), orders))
    found = match(a, b, x, batch_size=7)
    assert found.skipped == {}
    assert [m.a for m in found.layers] == [g.name for g in view.groups] == [m.b for m in found.layers]
    for layer in found.layers:
        where = np.argsort(orders[layer.a])
        living = layer.alive_a
        assert living.sum() >= 1
        assert layer.rho[living].min() >= 1 - 1e-12
        assert torch.equal(layer.best[living], torch.from_numpy(where)[living])
        assert torch.equal(layer.partners[living], torch.from_numpy(where)[living])
        assert layer.mean_best >= 1 - 1e-12
        assert layer.one_to_one >= 1 - 1e-12
        assert layer.covered == 1
        assert layer.num_winners == living.sum()
        moved = layer.correlation[layer.order_b][:, layer.order_a][: living.sum(), : living.sum()]
        assert (moved.diagonal() >= 1 - 1e-12).all()


def test_copies_of_an_embedding_correlate_fully_and_have_no_margin():
    a, x = mlp(4, 3), noise(60, 3)
    made = embed(a, x[:4], {"0": 7, "2": 5}, view=trace(a, x[:4]))
    found = match(a, made.module, x)
    for layer in found.layers:
        parents = torch.from_numpy(made.embedding.plan.splits[layer.a].parents)
        copies = layer.correlation[torch.arange(len(parents)), parents]
        assert (copies - 1).abs().max() <= 1e-12
        assert layer.num_winners == len(layer.alive_a) < len(layer.alive_b)
        split = torch.bincount(parents) > 1
        assert layer.margin[split].abs().max() <= 1e-12
        assert layer.margin[~split].min() > 1e-3
        assert len(layer.without_counterpart) == 0


def test_streaming_is_what_numpy_says_of_all_samples_at_once():
    a, b, x = mlp(6, 5), mlp(8, 4, seed=3), noise(101, 3)
    found = match(a, b, [(x[:40], x[:40]), (x[40:], x[40:])])
    assert found.num_samples == 101
    with torch.no_grad():
        for layer, depth in zip(found.layers, (2, 4), strict=True):
            ours, theirs = a[:depth](x).numpy(), b[:depth](x).numpy()
            whole = np.corrcoef(theirs, ours, rowvar=False)[: theirs.shape[1], theirs.shape[1] :]
            assert np.abs(layer.correlation.numpy() - whole).max() <= 1e-12
            assert layer.mean_best == pytest.approx(whole.max(0).mean(), abs=1e-12)
            assert layer.num_rows == 101


def test_the_size_of_pieces_does_not_matter(monkeypatch):
    a, b, x = cnn(), cnn(3, seed=4), noise(12, 1, 8, 8)
    whole = match(a, b, x)
    monkeypatch.setattr(sight, "_PIECE", 1)
    again = match(a, b, x)
    for one, two in zip(whole.layers, again.layers, strict=True):
        assert (one.correlation - two.correlation).abs().max() <= 1e-12


def test_positions_of_other_sizes_are_averaged():
    x = noise(16, 1, 8, 8)
    a, b = cnn(), cnn(pool=2, seed=5)
    first, second = match(a, b, x).layers
    assert (first.compared, second.compared) == ("maps averaged to 4x4", "averages over positions")
    with torch.no_grad():
        ours = nn.functional.avg_pool2d(a[:4](x), 2)
        rows = [m.movedim(1, -1).flatten(0, -2).numpy() for m in (b[:4](x), ours)]
        means = [net[:6](x).flatten(2).mean(2).numpy() for net in (b, a)]
    for layer, (of_b, of_a) in ((first, rows), (second, means)):
        theirs, own = of_b[:, layer.alive_b.numpy()], of_a[:, layer.alive_a.numpy()]
        whole = np.corrcoef(theirs, own, rowvar=False)[: theirs.shape[1], theirs.shape[1] :]
        living = layer.correlation[layer.alive_b][:, layer.alive_a]
        assert np.abs(living.numpy() - whole).max() <= 1e-12


def test_of_other_depths_the_most_alike_layers_meet():
    deep, x = mlp(6, 5), noise(90, 3)
    shallow = nn.Sequential(*[deep[i] for i in range(2)], nn.Linear(6, 2).double())
    found = match(deep, shallow, x)
    assert set(found.table) == {("0", "0"), ("2", "0")}
    assert found.table["0", "0"] >= 1 - 1e-12 > found.table["2", "0"]
    other = match(shallow, deep, x)
    assert [(m.a, m.b) for m in other.layers] == [("0", "0")]
    named = match(deep, shallow, x, layers=[("2", "0")])
    assert [(m.a, m.b) for m in named.layers] == [("2", "0")]
    assert not named.table
    assert named.layers[0].mean_best == pytest.approx(found.table["2", "0"], abs=1e-12)


@pytest.mark.parametrize("layers", ["auto", "best"])
def test_the_start_of_the_winners(layers):
    a, b, start, x = mlp(5), mlp(9, seed=6), mlp(9, seed=7), noise(70, 3)
    layer = match(a, b, x, layers=layers, earlier=[start, b]).layers[0]
    then = match(a, start, x).layers[0]
    assert torch.equal(layer.earlier[0], then.correlation)
    assert layer.earlier_means() == pytest.approx((then.mean_best, layer.mean_best), abs=1e-12)
    assert layer.earlier_ranks() == (mean_rank(then.correlation, layer.best), 0.0)


def test_dead_units_are_counted_apart():
    a = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    drawn(a)
    with torch.no_grad():
        a[0].weight[1], a[0].bias[1] = 0, -1
    layer = match(a, a, noise(50, 3)).layers[0]
    assert layer.alive_a.tolist() == [True, False, True, True] == layer.alive_b.tolist()
    assert layer.mean_best >= 1 - 1e-12
    assert layer.partners.tolist() == [0, -1, 2, 3]
    assert layer.rho[1] == 0
    assert layer.order_a[-1] == 1 == layer.order_b[-1]


def test_networks_that_are_dead_have_no_numbers():
    a = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    view = trace(a, noise(4, 3))
    with torch.no_grad():
        a[0].weight.zero_()
    layer = match(a, a, noise(9, 3), views=(view, view)).layers[0]
    assert np.isnan([layer.mean_best, layer.covered, layer.one_to_one, *layer.margin]).all()
    assert layer.num_winners == 0


def test_networks_are_not_changed_and_their_mode_is_left():
    net, x = cnn().train(), noise(6, 1, 8, 8)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    assert thalweg.match(net, net, x).layer("0").mean_best >= 1 - 1e-12
    assert net.training
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


X = noise(8, 3)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"layers": "nearest"}, ConfigError, "Expected layers"),
        ({"layers": [("0", 1)]}, ConfigError, "as pairs"),
        ({"layers": []}, ConfigError, "at least one"),
        ({"batch_size": 0}, ConfigError, "batch size of at least 1"),
        ({"batch_size": -1}, ConfigError, "batch size of at least 1"),
        ({"data": [(X, X), (X[:, :2], X)]}, StructureError, "Got of A: RuntimeError"),
        ({"layers": [("0", "9")]}, StructureError, "groups 0, 2 of B"),
        ({"b": mlp(4), "layers": "in order"}, StructureError, "Got 2 and 1"),
        ({"b": nn.Linear(3, 2)}, StructureError, "Got none"),
        ({"b": nn.Identity()}, StructureError, "Got none"),
        ({"b": drawn(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)))}, StructureError, "Got of B"),
        ({"earlier": [mlp(5, 3)]}, StructureError, r"an earlier B .* Got \(3, 5\)"),
        ({"earlier": [mlp(5)]}, StructureError, "an earlier B"),
        ({"b": mlp(4, 4), "views": True}, StructureError, "Expected B with the tensors of its view"),
        ({"data": X[:0]}, DataError, "Got none"),
        ({"data": [X, X]}, DataError, "Expected batches"),
        ({"data": X * float("inf"), "views": True}, NumericalError, "in 0 of A"),
    ],
)
def test_what_is_refused(change, error, words):
    a = mlp(5, 4)
    given = {"a": a, "b": a, "data": X} | change
    if "views" in given:
        given["views"] = (trace(a, X[:4]), trace(a, X[:4]))
    with pytest.raises(error, match=words):
        match(**given)


def test_a_layer_that_was_not_compared_is_told():
    net = mlp(4)
    with pytest.raises(StructureError, match="'9'"):
        match(net, net, X).layer("9")


def test_correlations_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr(sight, "_SUMS", 100)
    with pytest.raises(MemoryLimitError, match="Got 128 for 1"):
        match(mlp(4), mlp(4), X)


def test_what_varies_is_not_known_without_samples():
    with pytest.raises(DataError, match="Got none"):
        CrossMoments().varying()
