"""from_curvlinops: Gauss-Newton, Fisher and K-FAC matrices of a point, as curvlinops computes them.

They are not written again here: curvlinops has them, tested. It is optional, since it pulls in torchvision.
"""

import copy
import math
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from thalweg.batching import num_samples
from thalweg.errors import ConfigError
from thalweg.kernels import plain_kernels
from thalweg.objective import Objective
from thalweg.probes.curvature import Work, one_point

Kind = Literal["hessian", "gauss_newton", "fisher", "fisher_mc", "kfac"]

_CLASSES = {
    "hessian": "HessianLinearOperator",
    "gauss_newton": "GGNLinearOperator",
    "fisher": "EFLinearOperator",
    "fisher_mc": "FisherMCLinearOperator",
    "kfac": "KFACLinearOperator",
}


class CurvlinopsMatrix:
    """A matrix of curvlinops as a `Curvature`, in the coordinates of theta.

    Args:
        operator: curvlinops' own, on flat vectors.
        dtype: floating type of the vectors.
        device: where they live.
    """

    def __init__(self, operator: Any, dtype: torch.dtype, device: torch.device) -> None:
        self.operator = operator
        self.dtype = dtype
        self.device = device
        self.work = Work()

    @property
    def size(self) -> int:
        """Number of rows."""
        return int(self.operator.shape[0])

    def product(self, vector: Float[Tensor, " params"]) -> Float[Tensor, " params"]:
        """Multiply with a vector."""
        self.work = self.work.plus(Work(products=1.0))
        with plain_kernels():
            found: Tensor = self.operator @ vector.to(device=self.device, dtype=self.dtype)
        return found.detach()


def from_curvlinops(
    objective: Objective, theta: Float[Tensor, " params"], kind: Kind, **options: Any
) -> CurvlinopsMatrix:
    """Give a matrix of curvlinops at theta, for `eigenpairs_of`, `spectral_density` and `hessian_trace`.

    Args:
        objective: the landscape; its loss must be one that curvlinops knows (a torch loss module).
        theta: the point, shape (params,).
        kind: "hessian", "gauss_newton" (the generalised one), "fisher" (empirical), "fisher_mc" (sampled labels)
            or "kfac" (its Kronecker approximation).
        options: passed to curvlinops' class.

    Returns:
        The matrix.

    Raises:
        ConfigError: curvlinops is not installed or of another major version, the kind is unknown, the loss is no
            module, or it weighs batches by something else than their samples, which curvlinops does.
        ShapeError: theta does not fit the module.

    **Source:** https://github.com/f-dangel/curvlinops, version 3.
    """
    curvlinops = _library()
    if kind not in _CLASSES:
        raise ConfigError(f"Expected one of {', '.join(_CLASSES)}. Got {kind!r}. Choose one of them.")
    if not isinstance(objective.loss, nn.Module):
        raise ConfigError(
            f"Expected a loss module such as torch.nn.CrossEntropyLoss(). Got {objective.loss!r}. "
            "curvlinops takes no other."
        )
    _require_equal_weights(objective)
    point = one_point(objective, theta)
    module = copy.deepcopy(objective.module)
    objective.space.write(point, module)
    named = dict(module.named_parameters())
    options = {"check_deterministic": False, **options}
    operator = getattr(curvlinops, _CLASSES[kind])(
        module, objective.loss, [named[n] for n in objective.space.names], list(objective.batches()), **options
    )
    return CurvlinopsMatrix(operator, objective.dtype, objective.device)


def _require_equal_weights(objective: Objective) -> None:
    """See that R is the mean over samples, or their sum, as curvlinops takes it."""
    if objective.reduction == "sum":
        return
    shares = [weight / num_samples(batch) for weight, batch in objective.weighted_batches()]
    if objective.reduction == "none" or not all(math.isclose(share, shares[0]) for share in shares):
        raise ConfigError(
            "Expected a mean loss in which every sample counts the same. Got batches of other weights, or "
            "reduction='none'. Leave out class weights and ignored targets, or use HessianOperator."
        )


def _library() -> Any:
    from importlib.metadata import version

    try:
        import curvlinops
    except ImportError as error:
        raise ConfigError(
            f"Expected curvlinops. Got {error}. Install 'thalweg[curvlinops]' (it brings torchvision)."
        ) from error
    found = version("curvlinops-for-pytorch")
    if found.partition(".")[0] != "3":
        raise ConfigError(f"Expected curvlinops 3. Got {found}. Install 'curvlinops-for-pytorch>=3,<4'.")
    return curvlinops
