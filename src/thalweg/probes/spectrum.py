"""spectrum: all eigenvalues of the Hessian at a point, exact and dense.

Which solver, measured on two cores for a random symmetric matrix of 2,913 rows in float64 (best of three,
one run): values only, `torch.linalg.eigvalsh` (MKL) 0.69 s, SciPy (OpenBLAS) `ev` 0.69 s, `evd` 0.80 s,
OpenBLAS's two-stage reduction 0.84 s; on a Hessian, SciPy's `evr` took 1.4 times as long as `evd`. Nothing
beats LAPACK's plain driver, so torch's is used. With vectors the measurements disagree: SciPy's `evd`
(divide and conquer) took half of torch's time in one series, and in another, on a busy machine, the same at
best (2.4 s against 2.5 s) and more in the median (4.2 s against 2.8 s). SciPy's is used.
"""

import time
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy import linalg
from torch import Tensor

from thalweg.errors import NumericalError, ShapeError
from thalweg.objective import Objective
from thalweg.probes.hessian import Method, hessian


@dataclass(frozen=True)
class Spectrum:
    """The eigenvalues of a Hessian.

    Args:
        eigenvalues: ascending, shape (params,).
        eigenvectors: one per column, in the order of the eigenvalues, orthonormal; None if not asked for.
        method: how the Hessian was assembled and how it was solved.
        seconds: wall time of both.
    """

    eigenvalues: Float[Tensor, " params"]
    eigenvectors: Float[Tensor, "params params"] | None
    method: str
    seconds: float


def spectrum(
    objective: Objective, theta: Float[Tensor, " params"], *, vectors: bool = False, method: Method = "auto"
) -> Spectrum:
    """Compute every eigenvalue of ∇²R(theta).

    Args:
        objective: the landscape. Use float64 to count zero eigenvalues.
        theta: the point, shape (params,).
        vectors: also return the eigenvectors (about twice the time).
        method: how the Hessian is assembled, see `hessian`.

    Returns:
        The spectrum, in the objective's dtype.

    Raises:
        ShapeError: theta does not fit the module.
        StructureError: method is "structured" and does not apply.
        NumericalError: the Hessian is not finite.

    Example:
        >>> x = torch.linspace(-1, 1, 3, dtype=torch.float64).unsqueeze(1)
        >>> objective = Objective(torch.nn.Linear(1, 1).double(), torch.nn.MSELoss(), (x, x))
        >>> spectrum(objective, torch.zeros(2, dtype=torch.float64)).eigenvalues
        tensor([1.3333, 2.0000], dtype=torch.float64)
    """
    start = time.perf_counter()
    eigenvalues, eigenvectors = eigen(hessian(objective, theta, method), vectors=vectors)
    solver = "scipy evd" if vectors else "torch eigvalsh"
    return Spectrum(eigenvalues, eigenvectors, f"{method} Hessian, {solver}", time.perf_counter() - start)


def eigen(
    matrix: Float[Tensor, "params params"], *, vectors: bool = False
) -> tuple[Float[Tensor, " params"], Float[Tensor, "params params"] | None]:
    """Solve a symmetric eigenproblem with the driver that is fastest for what is asked.

    Args:
        matrix: symmetric, finite, shape (params, params).
        vectors: also return the eigenvectors.

    Returns:
        Ascending eigenvalues (params,), and the eigenvectors as columns, or None.

    Raises:
        ShapeError: the matrix is not square.
        NumericalError: the matrix is not finite.

    Example:
        >>> eigen(torch.tensor([[2.0, 0.0], [0.0, -1.0]]))[0]
        tensor([-1.,  2.])
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ShapeError(f"Expected a square matrix. Got shape {tuple(matrix.shape)}. Build it with probes.hessian.")
    if not torch.isfinite(matrix).all():
        raise NumericalError("Expected a finite matrix. Got NaN or infinity. Check the point.")
    if not vectors:
        return torch.linalg.eigvalsh(matrix), None
    if matrix.device.type != "cpu":
        values, columns = torch.linalg.eigh(matrix)
        return values, columns
    pair = linalg.eigh(matrix.detach().numpy(), driver="evd", check_finite=False)
    return torch.from_numpy(pair[0]), torch.from_numpy(pair[1])
