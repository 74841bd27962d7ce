"""examine: whether a module, a loss and data fit together at a point, before anything dear is computed there."""

import functools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from thalweg.batching import Batch
from thalweg.errors import DataError, NumericalError, ShapeError, ThalwegError
from thalweg.kernels import plain_kernels
from thalweg.objective import Objective
from thalweg.probes.accuracy import Classes

_CLASS_LOSSES = (nn.CrossEntropyLoss, nn.NLLLoss, functional.cross_entropy, functional.nll_loss)
# torch's losses that compare outputs and targets element by element: where shapes differ, some broadcast.
_ELEMENT_LOSSES = (
    *(nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss),
    *(nn.PoissonNLLLoss, nn.KLDivLoss, nn.SoftMarginLoss, nn.HingeEmbeddingLoss),
    *(functional.mse_loss, functional.l1_loss, functional.smooth_l1_loss, functional.huber_loss),
    *(functional.binary_cross_entropy, functional.binary_cross_entropy_with_logits),
    *(functional.poisson_nll_loss, functional.kl_div, functional.soft_margin_loss),
    functional.hinge_embedding_loss,
)
_Place = tuple[int, int]  # numbers of a batch and of its first sample
_BROADCASTS = "Using a target size"  # how the warning begins that torch gives where it broadcasts targets


@dataclass(frozen=True)
class Examination:
    """What one pass over the data told.

    Args:
        num_samples: samples, in the batches with a target that counts in the loss.
        num_batches: those batches.
        loss: R(theta), summed up in float64.
        accuracy: fraction of the labels that the largest output names, in [0, 1]; None where the targets are
            no class labels.
        output_shape: shape of the outputs for one sample; None where they are not one tensor.
    """

    num_samples: int
    num_batches: int
    loss: float
    accuracy: float | None
    output_shape: tuple[int, ...] | None


def examine(objective: Objective, theta: Float[Tensor, " params"]) -> Examination:
    """See that module, loss and data fit together at a point, in one pass over the data without a graph.

    It finds what would otherwise end in a long message of torch's, or in a wrong number without any: targets
    of shape (samples,) against outputs of shape (samples, 1), which a mean squared error compares all with all.

    Args:
        objective: the landscape.
        theta: the point, shape (params,).

    Returns:
        Numbers of samples and batches, the loss, the accuracy and the shape of the outputs.

    Raises:
        ShapeError: theta does not fit the module, the targets do not fit the outputs, or the loss is no scalar.
        DataError: the data cannot be read, hold NaN or infinity, or labels that the outputs do not have; the
            module does not run on the inputs, or the loss not on its outputs.
        NumericalError: the outputs or the loss are not finite.

    Example:
        >>> x = torch.eye(4)
        >>> objective = Objective(nn.Linear(4, 3), nn.CrossEntropyLoss(), (x, torch.tensor([0, 1, 2, 2])))
        >>> examine(objective, torch.zeros(15))
        Examination(num_samples=4, num_batches=1, loss=1.09861..., accuracy=0.25, output_shape=(3,))
    """
    if theta.shape != (objective.num_params,):
        raise ShapeError(
            f"Expected theta of shape ({objective.num_params},). Got {tuple(theta.shape)}. "
            "Build it with Objective.theta(module)."
        )
    point = theta.detach().to(device=objective.device, dtype=objective.dtype)
    total = weights = 0.0
    samples = batches = labels = right = 0
    shape: tuple[int, ...] | None = None
    with torch.no_grad(), plain_kernels():
        for weight, (inputs, targets) in _read(objective):
            place = batches, samples
            _require_finite_inputs(inputs, place)
            outputs = _outputs(objective, point, inputs)
            _require_fit(objective.loss, outputs, targets, place)
            total += weight * _loss(objective, outputs, targets, place)
            weights += weight
            classes = Classes.of(objective.loss, outputs, targets)
            labels, right = labels + classes.count(targets), right + int(classes.correct(outputs, targets))
            samples, batches = samples + _count(inputs, targets), batches + 1
            shape = tuple(outputs.shape[1:]) if isinstance(outputs, Tensor) else None
    loss = total if objective.reduction == "sum" else total / weights
    return Examination(samples, batches, loss, right / labels if labels else None, shape)


def _read(objective: Objective) -> Iterator[tuple[float, Batch]]:
    """Yield weighted batches, and word whatever a user's loader raises."""
    batches = objective.weighted_batches()
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except ThalwegError:
            raise
        except Exception as error:
            raise DataError(
                f"Expected batches (inputs, targets) that can be read and weighed. Got {_first_line(error)}. "
                "Check the data, and the class weights of the loss."
            ) from error
        yield batch


def _require_finite_inputs(inputs: Any, place: _Place) -> None:
    """Refuse NaN and infinity, but for -inf beside other tensors: attention masks are made of it."""
    leaves = _tensors(inputs)
    for leaf in leaves:
        wrong = ~torch.isfinite(leaf)
        if len(leaves) > 1:
            wrong &= leaf != -math.inf
        if bool(wrong.any()):
            raise DataError(
                f"Expected finite inputs. Got NaN or infinity in {_where(wrong, place)}. Clean the data, or leave "
                "these samples out."
            )


def _where(wrong: Tensor, place: _Place) -> str:
    """Word how many entries of a batch are wrong, and in which samples; both are counted from 0."""
    batch, start = place
    rows = wrong.reshape(len(wrong) if wrong.ndim else 1, -1).any(dim=1)
    first = start + int(rows.nonzero()[0])
    more = f" and {int(rows.sum()) - 1} more" if rows.sum() > 1 else ""
    return f"{int(wrong.sum())} of {wrong.numel()} numbers of batch {batch}: sample {first}{more}"


def _outputs(objective: Objective, theta: Tensor, inputs: Any) -> Any:
    try:
        return objective.apply(theta, inputs)
    except Exception as error:  # whatever a user's module raises
        raise DataError(
            f"Expected inputs that {type(objective.module).__name__} runs on. "
            f"Got {_shapes(inputs)}: {_first_line(error)}. {_hint(objective.module, inputs, error)}"
        ) from error


def _hint(module: nn.Module, inputs: Any, error: Exception) -> str:
    """Guess what to do from the first layer, which is most often the one that failed."""
    if "memory" in str(error).lower():
        return "Choose a smaller batch size."
    first = next((m for m in module.modules() if isinstance(m, nn.modules.conv._ConvNd | nn.Linear)), None)
    if first is None or not isinstance(inputs, Tensor):
        return "Check the data."
    if not inputs.is_floating_point():
        return "Give floating inputs, e.g. bytes divided by 255."
    if isinstance(first, nn.Linear):
        return f"Its first linear layer takes {first.in_features} features."
    channels, num_dims = first.in_channels, 2 + len(first.kernel_size)
    if inputs.ndim == num_dims and inputs.shape[1] != channels == inputs.shape[-1]:
        return "Put the channels before the rows: inputs.movedim(-1, 1)."
    return f"Its first convolution takes {num_dims} dims: samples, {channels} channel(s), then places."


def _require_fit(loss: Any, outputs: Any, targets: Any, place: _Place) -> None:
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return
    if _is_any_of(loss, _CLASS_LOSSES) and not targets.is_floating_point():
        _require_labels(loss, outputs, targets, place)
    if _is_any_of(loss, _ELEMENT_LOSSES) and outputs.shape != targets.shape:
        raise _mismatch(outputs, targets)


def _mismatch(outputs: Tensor, targets: Tensor) -> ShapeError:
    if not targets.is_floating_point() or (targets.ndim == 1 and outputs.ndim == 2 and outputs.shape[1] > 1):
        hint = "Make class labels integers and the loss a cross-entropy, or the targets one-hot vectors."
    else:
        hint = "Reshape the targets: where they differ, torch compares all with all."
    return ShapeError(
        f"Expected targets of the shape of the outputs, {tuple(outputs.shape)}. Got {tuple(targets.shape)}. {hint}"
    )


def _require_labels(loss: Any, outputs: Tensor, targets: Tensor, place: _Place) -> None:
    """See that class labels fit; on an accelerator a wrong one would end the process."""
    dim = min(1, outputs.ndim - 1)
    num_classes, wanted = outputs.shape[dim], outputs.shape[:dim] + outputs.shape[dim + 1 :]
    if targets.shape != wanted:
        hint = "Take off their last dim: squeeze(-1)." if targets.shape == (*wanted, 1) else "Check the targets."
        raise ShapeError(
            f"Expected labels of shape {tuple(wanted)} for outputs of shape {tuple(outputs.shape)}, whose dim {dim} "
            f"are the classes. Got {tuple(targets.shape)}. {hint}"
        )
    wrong = ((targets < 0) | (targets >= num_classes)) & (targets != Classes.of(loss, outputs, targets).ignored)
    if bool(wrong.any()):
        first = int(targets[wrong][0])
        raise DataError(
            f"Expected class labels from 0 to {num_classes - 1}, as the module has {num_classes} outputs. "
            f"Got {first}, in all {_where(wrong, place)}. Count labels from 0, or build the module with "
            "more outputs."
        )


def _loss(objective: Objective, outputs: Any, targets: Any, place: _Place) -> float:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", _BROADCASTS)
            found: object = objective.loss(outputs, targets)
    except Exception as error:  # whatever a user's loss raises
        if str(error).startswith(_BROADCASTS):
            raise _mismatch(outputs, targets) from error
        raise DataError(
            f"Expected a loss that takes outputs and targets. Got {_shapes(outputs)} and {_shapes(targets)}: "
            f"{_first_line(error)}. Choose another loss, or mend the targets."
        ) from error
    if not isinstance(found, Tensor) or not found.is_floating_point():
        got = found.dtype if isinstance(found, Tensor) else type(found).__name__
        raise DataError(f"Expected the loss to return a floating tensor. Got {got}. Return it without .item().")
    if objective.reduction != "none" and found.numel() != 1:
        raise ShapeError(
            f"Expected a scalar loss. Got shape {tuple(found.shape)}. Let the loss return its mean, or build the "
            "Objective with reduction='none'."
        )
    value = float(found.mean())
    if not math.isfinite(value):
        raise _not_finite(value, outputs, targets, place)
    return value


def _not_finite(value: float, outputs: Any, targets: Any, place: _Place) -> ThalwegError:
    """Word which of targets, outputs and loss is at fault, in this order."""
    for name, part, advice in (("targets", targets, "Clean the data"), ("outputs", outputs, "Check the weights")):
        for leaf in _tensors(part):
            wrong = ~torch.isfinite(leaf)
            if bool(wrong.any()):
                kind = DataError if part is targets else NumericalError
                return kind(f"Expected finite {name}. Got NaN or infinity in {_where(wrong, place)}. {advice}.")
    return NumericalError(
        f"Expected a finite loss. Got {value} in batch {place[0]}, from finite outputs and targets. Check the loss."
    )


def _is_any_of(loss: Any, kinds: tuple[Any, ...]) -> bool:
    function = loss.func if isinstance(loss, functools.partial) else loss
    return any(isinstance(function, k) if isinstance(k, type) else function is k for k in kinds)


def _tensors(value: Any) -> list[Tensor]:
    found = (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
    return [leaf for leaf in found if leaf.is_floating_point() or leaf.is_complex()]


def _count(inputs: Any, targets: Any) -> int:
    leaves = [leaf for leaf in tree_leaves((targets, inputs)) if isinstance(leaf, Tensor) and leaf.ndim]
    return len(leaves[0]) if leaves else 1


def _shapes(value: Any) -> str:
    leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return ", ".join(f"shape {tuple(leaf.shape)}" for leaf in leaves) or f"a {type(value).__name__}"


def _first_line(error: Exception) -> str:
    reason = next(iter(str(error).splitlines()), "").strip().rstrip(".")
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__
