"""Real data that comes with scikit-learn: nothing to download."""

import torch
from torch import Tensor

from thalweg.data.dataset import Dataset


def iris(*, dtype: torch.dtype = torch.float64, standardize: bool = True) -> Dataset:
    """Load Fisher's iris: 150 flowers, 4 lengths, 3 species, in the order of the file (sorted by species).

    Args:
        dtype: of the inputs. Default chosen by us: theory checks run in float64.
        standardize: bring every feature to mean 0 and variance 1 (over the 150 flowers); else centimetres.

    Returns:
        inputs of shape (150, 4), class numbers of shape (150,).

    Source:
        Fisher (1936), as bundled with scikit-learn. The experiments of zhang2021embedding (arXiv 2105.14573)
        use it; whether standardised is not said there.

    Example:
        >>> tuple(iris().inputs.shape)
        (150, 4)
    """
    from sklearn.datasets import load_iris

    values, targets = load_iris(return_X_y=True)
    inputs = torch.from_numpy(values)
    unit = "centimetres"
    if standardize:
        inputs = (inputs - inputs.mean(dim=0)) / inputs.std(dim=0, correction=0)
        unit = "each feature with mean 0 and variance 1"
    return Dataset(inputs.to(dtype), _classes(targets), 3, "iris", f"scikit-learn's iris, {unit}")


def diabetes(*, dtype: torch.dtype = torch.float64) -> Dataset:
    """Load 442 diabetes patients: 10 measurements, and the progress of the disease a year later.

    Args:
        dtype: of inputs and targets. Default chosen by us: theory checks run in float64.

    Returns:
        inputs of shape (442, 10) and targets of shape (442, 1), each column with mean 0 and variance 1.

    Source:
        Efron, Hastie, Johnstone, Tibshirani (2004), as bundled with scikit-learn. Chosen by us where a
        regression is wanted whose small networks have minima at finite places: its targets are noisy.

    Example:
        >>> tuple(diabetes().inputs.shape), diabetes().num_classes
        ((442, 10), None)
    """
    from sklearn.datasets import load_diabetes

    values, progress = (torch.from_numpy(a) for a in load_diabetes(return_X_y=True))
    inputs = (values - values.mean(dim=0)) / values.std(dim=0, correction=0)
    targets = ((progress - progress.mean()) / progress.std(correction=0)).unsqueeze(1)
    source = "scikit-learn's diabetes, each column with mean 0 and variance 1"
    return Dataset(inputs.to(dtype), targets.to(dtype), None, "diabetes", source)


def digits(*, dtype: torch.dtype = torch.float64) -> Dataset:
    """Load 1,797 handwritten digits of 8×8 pixels, grey levels divided by 16 into [0, 1].

    Args:
        dtype: of the inputs. Default chosen by us: theory checks run in float64.

    Returns:
        inputs of shape (1797, 1, 8, 8), class numbers of shape (1797,).

    Source:
        Test part of the UCI "Optical Recognition of Handwritten Digits", as bundled with scikit-learn.

    Example:
        >>> tuple(digits().inputs.shape)
        (1797, 1, 8, 8)
    """
    from sklearn.datasets import load_digits

    values, targets = load_digits(return_X_y=True)
    inputs = torch.from_numpy(values / 16).reshape(-1, 1, 8, 8)
    return Dataset(inputs.to(dtype), _classes(targets), 10, "digits", "scikit-learn's digits, grey levels / 16")


def _classes(targets: object) -> Tensor:
    return torch.as_tensor(targets, dtype=torch.long)
