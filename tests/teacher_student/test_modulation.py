"""β, D, L and H against the recursion of theorem 1, sample by sample, and within their bound of memory."""

import pytest
import torch
from torch import Tensor, nn

from thalweg.errors import ConfigError, DataError, MemoryLimitError, ShapeError, StructureError
from thalweg.nets import relu_cnn, relu_mlp, widened
from thalweg.teacher_student import chain, modulation, negative_biases

ALL = ("beta_star", "beta", "d_star", "d", "l_star", "l")


def pair(norm: str = "none", *, conv: bool = False) -> tuple[nn.Module, nn.Module]:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(3)
        if conv:
            teacher = relu_cnn((2, 3), image_size=7, num_outputs=4, norm=norm)
        else:
            teacher = relu_mlp((3, 4, 5), num_inputs=4, num_outputs=3, norm=norm, affine=True)
        student = widened(teacher, 2, affine=True)
        for layer in (*teacher.modules(), *student.modules()):
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                for tensor in (layer.weight.data, layer.running_var):
                    tensor.uniform_(0.5, 2.0)
                for tensor in (layer.bias.data, layer.running_mean):
                    tensor.normal_()
    return teacher.double(), student.double()


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def augmented_maps(net: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """For one sample: [[W, o], [0, 1]] of each layer with slopes and offsets of ReLU and BatchNorm put in by hand."""
    read, h, maps, gates = chain(net), x, [], []
    for layer in read.layers:
        weight, bias = layer.linear.weight, layer.linear.bias
        z = weight @ h + bias
        scale, shift = torch.ones_like(z), torch.zeros_like(z)
        if layer.norm is not None:
            scale = layer.norm.weight / (layer.norm.running_var + layer.norm.eps).sqrt()
            shift = layer.norm.bias - layer.norm.running_mean * scale
        before = layer.norm_place == "before_relu"
        gate = ((scale * z + shift if before else z) > 0).double()
        offset = gate * (scale * bias + shift) if before else scale * gate * bias + shift
        top = torch.cat([(gate * scale).unsqueeze(1) * weight, offset.unsqueeze(1)], 1)
        last = torch.zeros_like(top[:1])
        last[0, -1] = 1.0
        maps.append(torch.cat([top, last]))
        gates.append(torch.cat([gate, torch.ones(1, dtype=gate.dtype)]))
        h = (maps[-1] @ torch.cat([h, h.new_ones(1)]))[:-1]
    return maps, gates, torch.cat([read.head.weight, read.head.bias.unsqueeze(1)], 1)


@pytest.mark.parametrize("norm", ["none", "after_relu", "before_relu"])
def test_is_the_mean_of_the_recursion_of_theorem_1(norm: str) -> None:
    teacher, student = pair(norm)
    x = drawn(9, 4)
    depth = 3
    sums = [{name: 0.0 for name in ("beta_star", "beta", "d_star")} for _ in range(depth)]
    with torch.no_grad():
        for sample in x:
            theirs, gates_star, head_star = augmented_maps(teacher, sample)
            ours, gates, head = augmented_maps(student, sample)
            star, own = head.T @ head_star, head.T @ head  # β = I at the outputs
            for at in reversed(range(depth)):
                sums[at]["beta_star"] += star / len(x)
                sums[at]["beta"] += own / len(x)
                sums[at]["d_star"] += torch.outer(gates[at], gates_star[at]) / len(x)
                star = torch.einsum("jk,jn,nm->km", ours[at], star, theirs[at])
                own = torch.einsum("jk,jn,nm->km", ours[at], own, ours[at])
    found = modulation(teacher, student, x, wanted=ALL, constant=True)
    for layer, naive in zip(found, sums, strict=True):
        torch.testing.assert_close(layer.beta_star, naive["beta_star"], atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(layer.beta, naive["beta"], atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(layer.d_star, naive["d_star"], atol=1e-12, rtol=0.0)
        torch.testing.assert_close(layer.h_star, naive["beta_star"] * naive["d_star"], atol=1e-12, rtol=1e-12)
        assert layer.h.shape == layer.beta.shape


@pytest.mark.parametrize("norm", ["none", "after_relu", "before_relu"])
def test_of_convolutions_is_the_mean_over_samples_and_same_positions(norm: str) -> None:
    teacher, student = pair(norm, conv=True)
    x = drawn(3, 1, 7, 7)
    found = modulation(teacher, student, x, wanted=ALL)
    traces = [chain(net).trace(x.clone().requires_grad_(True)) for net in (teacher, student)]
    for at, layer in enumerate(found):
        jacobians = []
        for trace in traces:
            rows = [
                torch.autograd.grad(trace.outputs[:, c].sum(), trace.activations[at], retain_graph=True)[0]
                for c in range(4)
            ]
            jacobians.append(torch.stack(rows))  # each sample's outputs depend on its own nodes only
        star, own = jacobians
        cells = own[0].numel() / own.shape[2]
        naive = torch.einsum("cikab,cimab->km", own, star) / cells
        torch.testing.assert_close(layer.beta_star, naive, atol=1e-12, rtol=1e-10)
        f_star, f = (trace.activations[at].detach() for trace in traces)
        torch.testing.assert_close(layer.l_star, torch.einsum("ikab,imab->km", f, f_star) / cells)
        g = traces[1].gates[at].double()
        torch.testing.assert_close(layer.d, torch.einsum("ikab,imab->km", g, g) / cells)


@pytest.mark.parametrize("conv", [False, True])
def test_little_memory_and_batches_change_nothing(conv: bool) -> None:
    teacher, student = pair(conv=conv)
    x = drawn(6, *((1, 7, 7) if conv else (4,)))
    whole = modulation(teacher, student, x, wanted=ALL)
    one_by_one = modulation(teacher, student, x, wanted=ALL, memory=30_000 if conv else 2000)
    in_batches = modulation(teacher, student, iter(x.split([1, 3, 2])), wanted=ALL)
    for layer, *others in zip(whole, one_by_one, in_batches, strict=True):
        for other in others:
            for name in ALL:
                torch.testing.assert_close(getattr(other, name), getattr(layer, name), atol=1e-13, rtol=1e-12)


def test_single_precision_is_summed_up_in_double() -> None:
    teacher, student = pair()
    x = drawn(500, 4)
    exact = modulation(teacher, student, x, wanted=ALL)
    found = modulation(teacher.float(), student.float(), x.float(), wanted=ALL)
    for layer, other in zip(exact, found, strict=True):
        for name in ALL:
            assert getattr(other, name).dtype == torch.float64
            torch.testing.assert_close(getattr(other, name), getattr(layer, name), atol=5e-3, rtol=1e-4)


def test_only_what_is_wanted_is_computed() -> None:
    (*_, layer) = modulation(*pair(), drawn(5, 4), wanted=("d",))
    assert [name for name in ALL if getattr(layer, name) is not None] == ["d"]
    with pytest.raises(ConfigError, match="Expected beta_star and d_star"):
        _ = layer.h_star
    with pytest.raises(ConfigError, match="Expected beta and d"):
        _ = layer.h


def test_refuses_what_it_cannot_do() -> None:
    teacher, student = pair()
    with pytest.raises(MemoryLimitError, match="for one sample and output"):
        modulation(teacher, student, drawn(5, 4), memory=100)
    with pytest.raises(ConfigError, match="Choose what to compute"):
        modulation(teacher, student, drawn(5, 4), wanted=())
    with pytest.raises(DataError, match="Expected samples"):
        modulation(teacher, student, drawn(0, 4))
    with pytest.raises(ShapeError, match="as many hidden layers"):
        modulation(relu_mlp((3,), num_inputs=4, num_outputs=3).double(), student, drawn(5, 4))
    bare = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2, track_running_stats=False), nn.ReLU(), nn.Linear(2, 3))
    with pytest.raises(StructureError, match="running statistics"):
        modulation(bare, bare, drawn(5, 4).float())
    padded = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(98, 4)).double()
    plain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(50, 4)).double()
    with pytest.raises(ShapeError, match="feature maps of one size"):
        modulation(plain, padded, drawn(2, 1, 7, 7))


def test_negative_biases_are_counted_by_layer() -> None:
    state = {"head.bias": torch.ones(2)}
    for name, biases in (("b.norm", [-1.0, 1.0, -2.0, 0.0]), ("a", [1.0, -3.0])):
        norm = nn.BatchNorm1d(len(biases))
        norm.bias.data.copy_(torch.tensor(biases))
        state |= {f"{name}.{key}": tensor for key, tensor in norm.state_dict().items()}
    assert [(share.name, share.negative) for share in negative_biases(state)] == [("b.norm", 0.5), ("a", 0.5)]
    del state["a.bias"]
    assert len(negative_biases(state)) == 1
    state["b.norm.bias"] = torch.tensor([float("nan")] * 4)
    with pytest.raises(DataError, match="finite biases"):
        negative_biases(state)
    with pytest.raises(DataError, match="a BatchNorm with biases"):
        negative_biases({"weight": torch.ones(2)})
