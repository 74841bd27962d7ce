"""Plain values: what JSON can hold, so that a number read back is the number that was written."""

import json
import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

from thalweg.errors import ConfigError


def plain(value: object) -> Any:
    """Turn a value into what JSON can hold.

    NumPy scalars and arrays become numbers and lists, mappings dicts with text keys, sequences lists, paths
    text. JSON has no NaN and no infinity: these become the texts "nan", "inf", "-inf", which `float` reads.

    Raises:
        ConfigError: the value is of a kind that has no JSON form, such as a tensor or a module.

    Example:
        >>> import numpy as np
        >>> plain({"widths": np.array([2, 3]), "loss": float("nan")})
        {'widths': [2, 3], 'loss': 'nan'}
    """
    if type(value).__module__ == "numpy":  # an array or a scalar, told without loading NumPy
        return plain(value.tolist())  # type: ignore[attr-defined]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence | Set) and not isinstance(value, bytes):
        return [plain(item) for item in value]
    if hasattr(value, "__fspath__"):
        return str(value)
    raise ConfigError(
        f"Expected numbers, texts, lists and mappings. Got {type(value).__name__}. "
        "Convert it in the recipe, e.g. with .item() or .tolist()."
    )


def canonical(value: object) -> str:
    """Write a value as canonical JSON: sorted keys, no spaces, floats by `repr`.

    Raises:
        ConfigError: the value has no JSON form.

    Example:
        >>> canonical({"b": 1, "a": (0.1, 2)})
        '{"a":[0.1,2],"b":1}'
    """
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
