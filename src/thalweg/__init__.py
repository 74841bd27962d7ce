"""thalweg charts the loss landscape of a neural network.

Three nouns: theta (a point), objective (the landscape), view (what the coordinates mean); everything else is
functions of the three. Names are loaded on first use, so that `import thalweg` does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from thalweg.objective import Objective as Objective
    from thalweg.space import Space as Space

_HOMES = {
    "Objective": "thalweg.objective",
    "Space": "thalweg.space",
}

__all__ = ["Objective", "Space", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'thalweg' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
