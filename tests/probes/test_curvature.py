"""curvature: products with the Hessian, over data in any form, hold against the dense matrix."""

import copy
import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import eigsh
from tests.zoo import CASES
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from thalweg.errors import DataError, NumericalError, ShapeError
from thalweg.objective import Objective
from thalweg.probes import Curvature, HessianOperator, hessian, layers
from thalweg.probes.tape import in_pieces

exact = functools.partial(assert_close, rtol=1e-10, atol=1e-12)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(classes: int, count: int, seed: int = 5) -> Tensor:
    return torch.randint(0, classes, (count,), generator=torch.Generator().manual_seed(seed))


def images(count: int = 12) -> tuple[Tensor, Tensor]:
    return randn(count, 3, 6, 6), labels(4, count)


def cnn() -> nn.Module:
    """BatchNorm with statistics of its own, a kink, and few parameters."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 4)
    ).double()
    with torch.no_grad():
        for i, tensor in enumerate([*net.parameters(), net[1].running_mean]):
            tensor.copy_(0.4 * randn(*tensor.shape, seed=i) + (tensor if tensor.ndim == 1 else 0.0))
        net[1].running_var.copy_(1.0 + randn(4).abs())
    return net


def cnn_landscape(**options: Any) -> Objective:
    return Objective(cnn(), nn.CrossEntropyLoss(), images(), **options)


class Quadratic(nn.Module):
    """A module whose loss is ½ θᵀAθ, so that A is the Hessian at every point."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(matrix.new_zeros(len(matrix)))
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        return x * (0.5 * self.theta @ self.matrix @ self.theta)


def quadratic(matrix: Tensor) -> Objective:
    return Objective(Quadratic(matrix), lambda o, t: o.mean(), (torch.ones(1, 1).to(matrix), torch.ones(1)))


def scalar_loss(outputs: Any, _: Any) -> Tensor:
    """Curved in every output, of whatever kind the net gives."""
    return sum(((o - 0.3) ** 2).mean() + (o**3).mean() for o in torch.utils._pytree.tree_leaves(outputs))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_products_are_those_of_the_dense_hessian(case: Any) -> None:
    net, inputs = case.build().double(), case.example()
    count = len(inputs[0])
    objective = Objective(
        net, scalar_loss, [(tuple(i.double() if i.is_floating_point() else i for i in inputs), torch.ones(count))]
    )
    theta = objective.theta()
    if objective.num_params > 1500:
        pytest.skip("its dense Hessian takes long")
    vectors = randn(3, objective.num_params, seed=1)
    curvature = HessianOperator(objective, theta)
    dense = hessian(objective, theta, "blockwise")
    scale = float(dense.abs().max())
    assert float((curvature.products(vectors) - vectors @ dense).abs().max()) <= 1e-9 * max(scale, 1e-3)
    assert_close(curvature.gradient, objective.gradient(theta), rtol=1e-9, atol=1e-12)
    assert_close(curvature.value, float(objective.value(theta)), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.CrossEntropyLoss()], ids=["mse", "cross-entropy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_that_trip_forward_mode_and_linearize_are_right(loss: nn.Module, dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(randn(*p.shape, seed=i))
    targets = randn(9, 2, seed=3) if isinstance(loss, nn.MSELoss) else labels(2, 9)
    objective = Objective(net, loss, (randn(9, 3), targets), dtype=dtype)
    theta, vector = objective.theta(), randn(objective.num_params, seed=2).to(dtype)
    step, slope = 1e-6, objective.in_dtype(torch.float64).gradient
    there, back = (slope(theta.double() + s * step * vector.double()) for s in (1, -1))
    found = HessianOperator(objective, theta).product(vector)
    assert_close(found.double(), (there - back) / (2 * step), rtol=1e-4, atol=1e-5)
    assert float(found.abs().max()) > 0.01


@pytest.mark.parametrize("sizes", [(12,), (5, 5, 2), (1, 11), (4, 4, 4)])
def test_batches_of_any_size_give_the_full_data_product(sizes: tuple[int, ...]) -> None:
    x, y = images()
    whole = cnn_landscape()
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    vector = randn(whole.num_params, seed=4)
    expected = HessianOperator(whole, whole.theta()).product(vector)
    exact(HessianOperator(Objective(cnn(), nn.CrossEntropyLoss(), batches), whole.theta()).product(vector), expected)


@pytest.mark.parametrize("tape_bytes", [0, 40_000, 10**9])
@pytest.mark.parametrize("loader", [False, True])
def test_what_does_not_fit_on_tape_is_recomputed(tape_bytes: int, loader: bool) -> None:
    whole = cnn_landscape()
    data: Any = images()
    if loader:
        data = DataLoader(
            TensorDataset(*data), batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(1)
        )
    objective = Objective(cnn(), nn.CrossEntropyLoss(), data, **({} if loader else {"batch_size": 5}))
    curvature = HessianOperator(objective, whole.theta(), tape_bytes=tape_bytes)
    vector = randn(whole.num_params, seed=4)
    expected = vector @ hessian(whole, whole.theta())
    for _ in range(2):
        exact(curvature.product(vector), expected)
    assert curvature.work.products == 2.0
    assert (curvature.work.gradients == 1.0) == (tape_bytes == 10**9)  # what is recomputed is counted


def test_the_module_its_buffers_and_its_mode_stay() -> None:
    net = cnn().train()
    before = copy.deepcopy(net.state_dict())
    objective = Objective(net, nn.CrossEntropyLoss(), images())
    HessianOperator(objective, objective.theta()).product(randn(objective.num_params))
    assert net.training
    assert all(p.grad is None for p in net.parameters())
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_train_mode_uses_batch_statistics_and_still_moves_nothing() -> None:
    objective = cnn_landscape(mode="train")
    theta, vector = objective.theta(), randn(objective.num_params, seed=1)
    before = {n: b.clone() for n, b in objective.module.named_buffers()}
    found = HessianOperator(objective, theta).product(vector)
    exact(found, vector @ hessian(objective, theta))
    assert float((found - HessianOperator(cnn_landscape(), theta).product(vector)).abs().max()) > 1e-3
    for name, buffer in objective.module.named_buffers():
        assert torch.equal(buffer, before[name])


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999))
def test_it_is_symmetric_and_repeatable(seed: int) -> None:
    objective = cnn_landscape()
    curvature = HessianOperator(objective, objective.theta())
    u, v = randn(2, curvature.size, seed=seed)
    left, right = u @ curvature.product(v), v @ curvature.product(u)
    assert abs(float(left - right)) <= 1e-12 * float(u.norm() * v.norm())
    assert torch.equal(curvature.product(v), curvature.product(v))


def test_a_block_is_the_diagonal_block() -> None:
    objective = cnn_landscape()
    theta = objective.theta()
    dense = hessian(objective, theta)
    for names in layers(objective.space).values():
        curvature = HessianOperator(objective, theta, block=names)
        rows = torch.cat([torch.arange(objective.num_params)[objective.space.slice_of(n)] for n in names])
        vector = randn(curvature.size, seed=2)
        exact(curvature.product(vector), dense[rows][:, rows] @ vector)
        exact(curvature.gradient, objective.gradient(theta)[rows])


def test_an_affine_loss_has_no_curvature() -> None:
    objective = Objective(nn.Linear(2, 1), lambda o, t: o.mean(), (torch.ones(3, 2), torch.ones(3)))
    found = HessianOperator(objective, objective.theta()).product(torch.ones(3))
    assert torch.equal(found, torch.zeros(3))


def test_a_parameter_that_is_not_used_has_no_curvature() -> None:
    net = nn.Sequential(nn.Linear(2, 1)).double()
    net.register_parameter("idle", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    objective = Objective(net, nn.MSELoss(), (randn(4, 2), randn(4, 1)))
    theta = objective.theta()
    vector = randn(5)
    exact(HessianOperator(objective, theta).product(vector), hessian(objective, theta) @ vector)


def test_a_loss_that_couples_samples_is_not_cut() -> None:
    def spread(outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - targets) ** 2).mean() + outputs.mean() ** 2

    objective = Objective(
        nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double(), spread, (randn(40, 2), randn(40, 1))
    )
    theta = objective.theta()
    assert objective.recut(theta, 4) is objective
    vector = randn(objective.num_params)
    exact(HessianOperator(objective, theta).product(vector), hessian(objective, theta) @ vector)


def test_a_loss_with_weights_of_its_own_is_not_cut() -> None:
    weight = torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)
    data = (randn(60, 2), labels(3, 60).sort().values)  # the first samples are of one class

    def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, weight=weight)

    objective = Objective(nn.Linear(2, 3).double(), weighted, data)
    assert not objective.is_additive(objective.theta())


def test_a_coupling_that_zero_weights_hide_is_found() -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 1)).double()
    nn.init.zeros_(net[2].weight)
    objective = Objective(net, nn.MSELoss(), (randn(40, 2), randn(40, 1)))
    assert not objective.is_additive(objective.theta())


def test_a_module_with_its_batch_size_in_the_code_is_not_cut() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x.view(20, 2))

    objective = Objective(Fixed().double(), nn.MSELoss(), (randn(20, 2), randn(20, 1)))
    vector = randn(3)
    exact(HessianOperator(objective, objective.theta()).product(vector), objective.hvp(objective.theta(), vector))


def test_a_shuffling_loader_under_class_weights_is_the_same_landscape() -> None:
    x, y = images()
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 0.5, 2.0], dtype=torch.float64))
    whole = Objective(cnn(), loss, (x, y))
    loader = DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(1))
    curvature = HessianOperator(Objective(cnn(), loss, loader), whole.theta(), tape_bytes=0)
    vector = randn(whole.num_params)
    for _ in range(3):
        exact(curvature.product(vector), hessian(whole, whole.theta()) @ vector)


def test_recurrent_data_with_time_in_front_is_not_cut() -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.RNN(2, 3), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x)[0])

    objective = Objective(TimeFirst().double(), nn.MSELoss(), (randn(6, 4, 2), randn(6, 4, 1)))
    assert objective.recut(objective.theta(), 2) is objective


def test_large_images_are_cut_for_the_processor_and_small_vectors_are_not() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2)
    )
    objective = Objective(net, nn.CrossEntropyLoss(), (torch.zeros(200, 3, 32, 32), labels(2, 200)))
    pieces, _ = in_pieces(objective, objective.theta(), objective.leaves(objective.theta()), 10**12)
    sizes = [len(targets) for _, targets in pieces.batches()]
    assert sum(sizes) == 200
    assert 20 <= max(sizes) <= 40
    mlp = Objective(nn.Linear(20, 2), nn.CrossEntropyLoss(), (torch.zeros(2000, 20), labels(2, 2000)))
    pieces, _ = in_pieces(mlp, mlp.theta(), mlp.leaves(mlp.theta()), 10**12)
    assert len(list(pieces.batches())) == 1


def test_scipy_takes_it_as_a_linear_operator() -> None:
    objective = cnn_landscape()
    theta = objective.theta()
    found = eigsh(HessianOperator(objective, theta).to_scipy(), k=2, which="LA", return_eigenvectors=False)
    expected = torch.linalg.eigvalsh(hessian(objective, theta))[-2:]
    exact(torch.from_numpy(found).sort().values, expected)


def test_a_sample_is_fixed_by_its_seed() -> None:
    objective = cnn_landscape(batch_size=5)
    curvature, vector = HessianOperator(objective, objective.theta()), randn(objective.num_params)
    one, again, other = (curvature.sampled(6, seed).product(vector) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    exact(curvature.sampled(12).product(vector), curvature.product(vector))


def test_it_keeps_the_socket() -> None:
    objective = cnn_landscape()
    assert isinstance(HessianOperator(objective, objective.theta()), Curvature)


def test_data_that_change_between_passes_are_told() -> None:
    class Noisy(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            x, y = super().__getitem__(index)
            return x * noise.pop(), y

    noise = [1.0 + 0.1 * i for i in range(100)]
    objective = Objective(cnn(), nn.CrossEntropyLoss(), DataLoader(Noisy(*images()), batch_size=4))
    with pytest.raises(DataError, match="the same data on every pass"):
        HessianOperator(objective, objective.theta(), tape_bytes=0).product(randn(objective.num_params))


def test_what_is_not_finite_is_told() -> None:
    objective = cnn_landscape()
    theta = objective.theta()
    theta[0] = torch.nan
    with pytest.raises(NumericalError, match="finite Hessian products"):
        HessianOperator(objective, theta).product(randn(objective.num_params))


def test_wrong_lengths_and_names_are_told() -> None:
    objective = cnn_landscape()
    theta = objective.theta()
    with pytest.raises(ShapeError, match=r"Expected theta of shape \(188,\)"):
        HessianOperator(objective, theta[:-1])
    with pytest.raises(ShapeError, match="Expected one of"):
        HessianOperator(objective, theta, block=["fc.weight"])
    with pytest.raises(ShapeError, match="vectors of 188 entries"):
        HessianOperator(objective, theta).product(randn(3))
    with pytest.raises(DataError, match="between 1 and 12 samples"):
        HessianOperator(objective, theta).sampled(13)


def test_weight_normalisation_is_differentiated_twice_as_its_formula_says() -> None:
    """The fused kernel of torch 2.13 has a wrong second derivative (its own gradgradcheck fails)."""
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(randn(*p.shape, seed=i))
    objective = Objective(net, nn.MSELoss(), (randn(9, 3), randn(9, 2, seed=3)))
    theta, vector, step = objective.theta(), randn(objective.num_params, seed=2), 1e-6
    slopes = [objective.gradient(theta + sign * step * vector) for sign in (1, -1)]
    expected = (slopes[0] - slopes[1]) / (2 * step)
    for found in (
        HessianOperator(objective, theta).product(vector),
        hessian(objective, theta) @ vector,
        objective.hvp(theta, vector),
    ):
        assert_close(found, expected, rtol=1e-6, atol=1e-7)
