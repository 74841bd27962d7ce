"""The name of a run: the hash of what decides its result."""

import hashlib
from collections.abc import Mapping
from typing import Any

from thalweg.lab.plain import canonical


def run_id(recipe: str, version: int, parameters: Mapping[str, Any]) -> str:
    """Name a run: sha256 of the canonical JSON of {recipe, version, parameters}.

    The seed is one of the parameters. Device, workers and executor do not enter: they do not decide.

    Args:
        recipe: name of the recipe.
        version: version of its mathematics.
        parameters: every parameter by name, JSON-able.

    Returns:
        64 hexadecimal digits.

    Raises:
        ConfigError: a parameter has no JSON form.

    Example:
        >>> run_id("a/b", 1, {"seed": 0, "width": 2}) == run_id("a/b", 1, {"width": 2, "seed": 0})
        True
    """
    text = canonical({"recipe": recipe, "version": version, "parameters": parameters})
    return hashlib.sha256(text.encode()).hexdigest()
