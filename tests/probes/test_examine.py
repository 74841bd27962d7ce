"""What fits is counted and measured in one pass; what does not fit is refused in one line."""

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from thalweg.errors import DataError, NumericalError, ShapeError
from thalweg.objective import Objective
from thalweg.probes.examine import Examination, examine


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(count: int, classes: int = 3) -> Tensor:
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(1))


def net(features: int = 2, outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(features, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


def point(objective: Objective) -> Tensor:
    return normal(objective.num_params, seed=5)


def examined(module: nn.Module, loss: object, data: object, **options: object) -> Examination:
    objective = Objective(module.double(), loss, data, **options)
    return examine(objective, point(objective))


def refused(error: type[Exception], module: nn.Module, loss: object, data: object, **options: object) -> str:
    """Examine what must be refused; the message is one line of three sentences."""
    with pytest.raises(error) as caught:
        examined(module, loss, data, **options)
    message = str(caught.value)
    assert message.startswith("Expected ")
    assert ". Got " in message
    assert "\n" not in message
    return message


@given(count=st.integers(1, 17), batch_size=st.integers(1, 20))
def test_the_loss_is_that_of_the_objective_and_the_accuracy_that_of_the_outputs(count, batch_size):
    x, y = normal(count, 2), labels(count)
    objective = Objective(net(), nn.CrossEntropyLoss(), (x, y), batch_size=batch_size)
    found = examine(objective, point(objective))
    right = (objective.outputs(point(objective)).argmax(1) == y).double().mean()
    assert (found.num_samples, found.num_batches) == (count, -(-count // batch_size))
    assert found.output_shape == (3,)
    assert found.accuracy == pytest.approx(float(right), abs=1e-12)
    assert found.loss == pytest.approx(float(objective.value(point(objective))), rel=1e-12)


def test_it_reads_a_loader_once():
    passes = []

    class Counted(TensorDataset):
        def __getitem__(self, index):
            passes.append(index)
            return super().__getitem__(index)

    data = DataLoader(Counted(normal(7, 2), labels(7)), batch_size=3)
    objective = Objective(net(), nn.CrossEntropyLoss(), data)
    passes.clear()
    assert examine(objective, point(objective)).num_samples == 7
    assert passes == list(range(7))


def test_labels_that_the_loss_ignores_count_neither_in_the_loss_nor_in_the_accuracy():
    x, y = normal(6, 2), labels(6)
    y[::2] = -1
    loss = nn.CrossEntropyLoss(ignore_index=-1)
    objective = Objective(net(), loss, (x, y), batch_size=4)
    rest = examine(Objective(objective.module, nn.CrossEntropyLoss(), (x[1::2], y[1::2])), point(objective))
    found = examine(objective, point(objective))
    assert found.loss == pytest.approx(rest.loss, rel=1e-12)
    assert found.accuracy == rest.accuracy


def test_there_is_no_accuracy_without_labels():
    assert examined(net(), nn.MSELoss(), (normal(5, 2), normal(5, 3))).accuracy is None


def test_a_sum_is_a_sum_and_a_loss_for_each_element_is_averaged():
    x, y = normal(7, 2), normal(7, 3)
    module = net()
    total = examined(module, nn.MSELoss(reduction="sum"), (x, y), batch_size=3).loss
    mean = examined(module, nn.MSELoss(), (x, y), batch_size=3).loss
    each = examined(module, functools.partial(functional.mse_loss, reduction="none"), (x, y), batch_size=3).loss
    assert total == pytest.approx(21 * mean, rel=1e-12)
    assert each == pytest.approx(mean, rel=1e-12)


def test_labels_for_each_place_of_an_image_are_scored():
    module, x = nn.Conv2d(1, 3, 1), normal(2, 1, 4, 5)
    y = torch.zeros(2, 4, 5, dtype=torch.long)
    found = examined(module, nn.CrossEntropyLoss(), (x, y))
    assert (found.num_samples, found.output_shape) == (2, (3, 4, 5))
    assert 0.0 <= found.accuracy <= 1.0


def test_outputs_of_any_structure_are_left_to_the_loss():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(2, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"y": self.one(x)}

    found = examined(Two(), lambda o, t: functional.mse_loss(o["y"], t), (normal(5, 2), normal(5, 1)))
    assert (found.output_shape, found.accuracy) == (None, None)
    assert math.isfinite(found.loss)


def test_nothing_of_the_module_is_changed():
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double().train()
    before = {n: t.clone() for n, t in module.state_dict().items()}
    examined(module, nn.MSELoss(), (normal(5, 2), normal(5, 3)))
    for name, tensor in module.state_dict().items():
        assert_close(tensor, before[name], rtol=0, atol=0)
    assert module.training


@pytest.mark.parametrize(
    "loss", [nn.MSELoss(), nn.L1Loss(), nn.HuberLoss(), nn.SoftMarginLoss(), nn.BCEWithLogitsLoss()]
)
@pytest.mark.parametrize(("outputs", "shape"), [(1, (6,)), (3, (6, 1)), (1, (6, 3)), (3, (6,))])
def test_targets_that_would_be_broadcast_are_refused(loss, outputs, shape):
    message = refused(ShapeError, net(outputs=outputs), loss, (normal(6, 2), normal(*shape).abs()))
    assert f"the shape of the outputs, (6, {outputs}). Got {shape}." in message


def test_a_function_that_broadcasts_is_found_by_torchs_own_warning():
    loss = lambda o, t: functional.mse_loss(o, t) + 0 * o.sum()
    assert "Got (6,). Reshape the targets" in refused(ShapeError, net(outputs=1), loss, (normal(6, 2), normal(6)))


def test_class_labels_under_a_squared_error_are_told_what_to_do():
    message = refused(ShapeError, net(), nn.MSELoss(), (normal(6, 2), labels(6)))
    assert "the loss a cross-entropy" in message


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), functional.cross_entropy, nn.NLLLoss()])
@pytest.mark.parametrize("label", [3, -1])
def test_a_label_that_the_outputs_do_not_have_is_named_with_its_place(loss, label):
    y = labels(9)
    y[[5, 7]] = label
    message = refused(DataError, net(), loss, (normal(9, 2), y), batch_size=4)
    assert f"labels from 0 to 2, as the module has 3 outputs. Got {label}" in message
    assert "2 of 4 numbers of batch 1: sample 5 and 1 more" in message


def test_a_label_beyond_the_class_weights_is_refused():
    y = labels(5)
    y[2] = 3
    loss = nn.CrossEntropyLoss(weight=torch.ones(3, dtype=torch.float64))
    assert "class weights" in refused(DataError, net(), loss, (normal(5, 2), y))


def test_labels_of_a_column_are_told_to_lose_it():
    assert "squeeze(-1)" in refused(ShapeError, net(), nn.CrossEntropyLoss(), (normal(5, 2), labels(5)[:, None]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_inputs_that_are_not_finite_are_counted_and_placed(value):
    x = normal(9, 2)
    x[4, 1] = x[6, 0] = x[6, 1] = value
    message = refused(DataError, net(), nn.CrossEntropyLoss(), (x, labels(9)), batch_size=4)
    assert "3 of 8 numbers of batch 1: sample 4 and 1 more" in message


def test_a_mask_of_minus_infinity_beside_the_inputs_is_let_through():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(2, 3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.one((x + mask).softmax(1))

    mask = torch.zeros(5, 2).double()
    mask[:, 1] = -math.inf
    assert math.isfinite(examined(Masked(), nn.CrossEntropyLoss(), ((normal(5, 2), mask), labels(5))).loss)
    assert "finite inputs" in refused(DataError, Masked(), nn.CrossEntropyLoss(), ((normal(5, 2), -mask), labels(5)))


def test_numbers_too_large_for_the_precision_are_not_finite():
    x = normal(4, 2)
    x[3, 0] = 1e300
    module = net().float()
    objective = Objective(module, nn.CrossEntropyLoss(), (x, labels(4)))
    with pytest.raises(DataError, match="finite inputs"):
        examine(objective, objective.theta())


def test_targets_that_are_not_finite_are_placed():
    y = normal(6, 3)
    y[2, 1] = math.nan
    message = refused(DataError, net(), nn.MSELoss(), (normal(6, 2), y))
    assert "finite targets. Got NaN or infinity in 1 of 18 numbers of batch 0: sample 2." in message


def test_missing_targets_that_the_loss_leaves_out_are_no_fault():
    y = normal(6, 3)
    y[2, 1] = math.nan
    loss = lambda o, t: (o - t)[t.isfinite()].square().mean()
    assert math.isfinite(examined(net(), loss, (normal(6, 2), y)).loss)


def test_outputs_that_overflow_are_told_from_a_loss_that_does():
    huge = nn.Sequential(nn.Linear(2, 3), nn.Identity()).double()
    x = 1e300 * torch.ones(4, 2).double()
    objective = Objective(huge, nn.MSELoss(), (x, normal(4, 3)))
    with pytest.raises(NumericalError, match="Expected finite outputs"):
        examine(objective, torch.full((9,), 1e300, dtype=torch.float64))
    message = refused(NumericalError, net(), lambda o, t: (o - t).sum() * math.inf, (normal(4, 2), normal(4, 3)))
    assert "Expected a finite loss" in message


@pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        (lambda o, t: (o - t).square().mean(1), ShapeError, "Expected a scalar loss. Got shape (6,)."),
        (lambda o, t: 0.5, DataError, "a floating tensor. Got float."),
        (lambda o, t: (o > t).sum(), DataError, "a floating tensor. Got torch.int64."),
        (lambda o, t: o.missing, DataError, "AttributeError: 'Tensor' object has no attribute 'missing'"),
        (lambda o: o, DataError, "shape (6, 3) and shape (6, 3): TypeError"),
    ],
)
def test_a_loss_of_another_kind_is_refused(loss, error, words):
    assert words in refused(error, net(), loss, (normal(6, 2), normal(6, 3)))


@pytest.mark.parametrize(
    ("module", "inputs", "words"),
    [
        (net(), normal(6, 3), "first linear layer takes 2 features"),
        (nn.Conv2d(3, 2, 3), normal(6, 1, 8, 8), "to have 3 channels, but got 1 channels instead"),
        (nn.Conv2d(3, 2, 3), normal(6, 8, 8, 3), "inputs.movedim(-1, 1)"),
        (nn.Conv2d(1, 2, 3), normal(6, 8, 8), "takes 4 dims: samples, 1 channel(s), then places"),
        (nn.Conv2d(1, 2, 3), torch.zeros(6, 1, 8, 8, dtype=torch.uint8), "bytes divided by 255"),
    ],
)
def test_inputs_that_the_module_does_not_run_on_are_refused_with_torchs_reason(module, inputs, words):
    message = refused(DataError, module, nn.CrossEntropyLoss(), (inputs, labels(6)))
    assert f"Got shape {tuple(inputs.shape)}: RuntimeError: " in message
    assert words in message


def test_a_loader_that_fails_on_the_way_is_told_in_one_line():
    class Torn(TensorDataset):
        def __getitem__(self, index):
            if index == 5:
                raise OSError("image 5 is\ntorn")
            return super().__getitem__(index)

    data = DataLoader(Torn(normal(7, 2), labels(7)), batch_size=3)
    assert "OSError: image 5 is." in refused(DataError, net(), nn.CrossEntropyLoss(), data)


def test_a_point_of_another_size_is_refused():
    objective = Objective(net(), nn.CrossEntropyLoss(), (normal(5, 2), labels(5)))
    with pytest.raises(ShapeError, match=r"Expected theta of shape \(27,\). Got \(3,\)"):
        examine(objective, normal(3))
