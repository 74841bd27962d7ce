"""Mini-batches of unequal sizes: each weighs what the loss divides it by."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from thalweg.objective import Objective

SAMPLES = 7
exact = functools.partial(assert_close, rtol=1e-12, atol=1e-12)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ELEMENTWISE: dict[str, Any] = {
    **{loss.__name__: loss() for loss in (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.PoissonNLLLoss)},
    **{loss.__name__: loss() for loss in (nn.BCEWithLogitsLoss, nn.SoftMarginLoss, nn.HingeEmbeddingLoss)},
    "per element": nn.MSELoss(reduction="none"),
    "function": functional.mse_loss,
    "partial": functools.partial(functional.huber_loss, delta=0.3),
    "partial per element": functools.partial(functional.l1_loss, reduction="none"),
    "partial module": functools.partial(nn.MSELoss()),
    "log target": functools.partial(functional.kl_div, log_target=True, reduction="mean"),
    "own, told its weight": (lambda o, t: ((o - t) ** 2).mean(), Tensor.numel),
}


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss by both")
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_mean_over_elements_is_that_of_all_elements_where_sequences_are_ragged(name: str) -> None:
    found = ELEMENTWISE[name]
    loss, weight = found if isinstance(found, tuple) else (found, None)
    inputs = [randn(2, length, 3, seed=length) for length in (5, 9, 1)]
    targets = [(randn(2, length, 1, seed=10 + length) > 0).double() for length in (5, 9, 1)]
    net = nn.Linear(3, 1).double()
    objective = Objective(net, loss, list(zip(inputs, targets, strict=True)), batch_weight=weight)
    outputs = torch.cat([net(x).reshape(-1) for x in inputs])
    expected = loss(outputs, torch.cat([t.reshape(-1) for t in targets])).mean().detach()
    exact(objective.value(objective.theta()), expected)
    exact(objective.in_dtype(torch.float64).value(objective.theta()), expected)


def test_a_mean_over_the_batch_is_that_of_all_samples() -> None:
    inputs, targets = randn(SAMPLES, 2), randn(SAMPLES, 3, seed=2).softmax(1)
    loss = nn.KLDivLoss(reduction="batchmean")
    whole, cut = (Objective(nn.Linear(2, 3).double(), loss, (inputs, targets), batch_size=size) for size in (None, 3))
    theta = randn(whole.num_params, seed=1)
    exact(cut.value(theta), whole.value(theta))
    exact(cut.in_dtype(torch.float64).value(theta), whole.value(theta))


def test_class_probabilities_along_ragged_sequences_count_by_position() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.line(x).transpose(1, 2)

    net, loss = Turned().double(), nn.CrossEntropyLoss()
    inputs = [randn(2, length, 2, seed=length) for length in (5, 9)]
    targets = [randn(2, 3, length, seed=10 + length).softmax(1) for length in (5, 9)]
    objective = Objective(net, loss, list(zip(inputs, targets, strict=True)))
    expected = loss(torch.cat([net(x) for x in inputs], 2), torch.cat(targets, 2)).detach()
    exact(objective.value(objective.theta()), expected)
