"""Streaming correlations against numpy, whatever the pieces, and what is read off them."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from thalweg.errors import DataError, ShapeError, StructureError
from thalweg.nets import relu_cnn, relu_mlp, widened
from thalweg.teacher_student import CrossMoments, best_students, chain, correlations, mean_best, mean_rank


def pair(norm: str = "none", *, conv: bool = False) -> tuple[nn.Sequential, nn.Sequential]:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(5)
        if conv:
            teacher = relu_cnn((2, 3), image_size=7, num_outputs=4, norm=norm)
        else:
            teacher = relu_mlp((3, 4), num_inputs=4, num_outputs=3, norm=norm)
        return teacher.double(), widened(teacher, 3).double()


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize(("conv", "norm"), [(False, "none"), (False, "after_relu"), (True, "before_relu")])
def test_is_numpys_pearson_correlation_in_one_pass(conv: bool, norm: str) -> None:
    teacher, student = pair(norm, conv=conv)
    x = drawn(50, *((1, 7, 7) if conv else (4,)))
    found = correlations(teacher, student, x, batch_size=7)
    with torch.no_grad():
        pairs = zip(chain(student).trace(x).activations, chain(teacher).trace(x).activations, strict=True)
    for rho, (ours, theirs) in zip(found, pairs, strict=True):
        a, b = (f.transpose(0, 1).flatten(1).numpy() for f in (ours, theirs))
        with np.errstate(invalid="ignore", divide="ignore"):
            naive = np.nan_to_num(np.corrcoef(a, b)[: len(a), len(a) :])
        np.testing.assert_allclose(rho.numpy(), naive, atol=1e-12)


def test_pieces_and_batches_change_nothing() -> None:
    teacher, student = pair()
    x = drawn(40, 4)
    whole = correlations(teacher, student, x)
    for other in (
        correlations(teacher, student, x, batch_size=1),
        correlations(teacher, student, x.split([1, 30, 9])),
    ):
        for rho, again in zip(whole, other, strict=True):
            torch.testing.assert_close(again, rho, atol=1e-12, rtol=0.0)


def test_a_large_mean_costs_no_digits_and_a_constant_correlates_with_nothing() -> None:
    a, b = drawn(200, 3), drawn(200, 3) + drawn(200, 3).flip(0)
    moments, shifted = CrossMoments(), CrossMoments()
    for start in range(0, 200, 50):
        some = slice(start, start + 50)
        moments.update(a[some], b[some])
        shifted.update(a[some] + 1e5, b[some] - 1e5)
    torch.testing.assert_close(shifted.correlation(), moments.correlation(), atol=1e-9, rtol=0.0)
    dead = CrossMoments()
    dead.update(torch.full((200, 2), 0.1, dtype=torch.float64), b)
    assert dead.correlation().abs().max() == 0.0
    assert [found.tolist() for found in dead.varying()] == [[False, False], [True, True, True]]


def test_single_precision_agrees_to_six_digits() -> None:
    teacher, student = pair()
    x = drawn(300, 4)
    exact = correlations(teacher, student, x)
    found = correlations(teacher.float(), student.float(), x.float())
    for rho, again in zip(exact, found, strict=True):
        torch.testing.assert_close(again, rho, atol=1e-6, rtol=0.0)


def test_products_of_few_digits_are_not_used() -> None:
    a, b = drawn(500, 3).float(), drawn(500, 4).float()
    exact, quick = CrossMoments(), CrossMoments(is_quick=True)
    exact.update(a, b)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        quick.update(a, b)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(quick.correlation(), exact.correlation())


def test_a_network_correlates_with_itself() -> None:
    teacher, _ = pair()
    for rho in correlations(teacher, teacher, drawn(100, 4)):
        alive = rho.diagonal() != 0
        torch.testing.assert_close(rho.diagonal()[alive], torch.ones_like(rho.diagonal()[alive]))


def test_ranks_and_best_matches() -> None:
    rho = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.8], [0.1, 0.3]])
    assert best_students(rho).tolist() == [0, 1]
    assert mean_best(rho) == pytest.approx(0.85)
    assert mean_rank(rho, torch.tensor([0, 2])) == 0.0  # a tie is no defeat
    assert mean_rank(rho, torch.tensor([3, 0])) == 1.0
    assert mean_rank(rho, torch.tensor([1, 3])) == pytest.approx(2 / 3)
    assert mean_rank(rho[:1], torch.tensor([0, 0])) == 0.0
    dead = torch.cat([rho, torch.zeros(len(rho), 1).to(rho)], 1)  # a teacher node that does not vary has no winner
    assert mean_rank(dead, torch.tensor([1, 3, 0])) == pytest.approx(2 / 3)


def test_refuses_what_it_cannot_correlate() -> None:
    teacher, student = pair()
    with pytest.raises(DataError, match="Expected samples"):
        correlations(teacher, student, iter(()))
    with pytest.raises(DataError, match="Expected samples"):
        correlations(teacher, student, drawn(0, 4))
    with pytest.raises(DataError, match="Leave targets out"):
        correlations(teacher, student, iter([[drawn(5, 4), drawn(5, 3)]]))
    with pytest.raises(DataError, match="Expected samples"):
        CrossMoments().varying()
    with pytest.raises(ShapeError, match="as many samples"):
        CrossMoments().update(drawn(3, 2), drawn(4, 2))
    with pytest.raises(ShapeError, match="as many hidden layers"):
        correlations(relu_mlp((3,), num_inputs=4, num_outputs=3).double(), student, drawn(5, 4))
    with pytest.raises(StructureError, match=r"an nn\.Sequential"):
        correlations(nn.Linear(4, 3), student, drawn(5, 4))
    bare = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2, track_running_stats=False), nn.ReLU(), nn.Linear(2, 3))
    shallow = relu_mlp((3,), num_inputs=4, num_outputs=3)
    for pair_of in ((bare, shallow), (shallow, bare)):
        with pytest.raises(StructureError, match="running statistics"):
            correlations(*pair_of, drawn(5, 4).float())
    plain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(50, 4)).double()
    padded = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(98, 4)).double()
    with pytest.raises(ShapeError, match="as many samples"):
        correlations(plain, padded, drawn(2, 1, 7, 7))
