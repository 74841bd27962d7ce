"""What `thalweg lift` is told in words: which layer becomes what, and how much memory it may take."""

import re
from typing import TYPE_CHECKING, Any

from thalweg.errors import ConfigError

if TYPE_CHECKING:
    from thalweg.lifting.layers import Kind

_KINDS = ("fc", "local", "shared")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def kinds_of(text: str) -> "Kind | dict[str, Kind]":
    """Read a kind for all layers, or `name=kind,pattern=kind,…`.

    Args:
        text: what the user wrote.

    Raises:
        ConfigError: not of that form, or a name twice.

    Example:
        >>> kinds_of("local"), kinds_of("conv1=fc, layer1.*=local")
        ('local', {'conv1': 'fc', 'layer1.*': 'local'})
    """
    found: dict[str, Any] = {}
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        name, equals, kind = (part.strip() for part in word.rpartition("="))
        if kind not in _KINDS or (not equals and len(words) > 1):
            raise ConfigError(
                f"Expected --to fc, local or shared, or name=fc,name=local,…. Got {word!r}. Choose a kind for each."
            )
        if name in found:
            raise ConfigError(f"Expected one kind for each name. Got {name!r} twice. Leave one out of --to.")
        found[name if equals else "*"] = kind
    if not found:
        raise ConfigError("Expected --to fc, local or shared, or name=fc,name=local,…. Got nothing. Choose one.")
    return found["*"] if "=" not in text else found


def size_of(text: str | None) -> int | None:
    """Read a number of bytes: 4GB, 500 MB, 1.5GiB, 1000.

    Args:
        text: what the user wrote; None for no limit.

    Raises:
        ConfigError: not of that form.

    Example:
        >>> size_of("4GB"), size_of("1.5GiB"), size_of("1000")
        (4000000000, 1610612736, 1000)
    """
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if found is None or (found[3] and not found[2]):
        raise ConfigError(f"Expected --max-memory such as 4GB, 500MB, 1.5GiB or 1000. Got {text!r}. Give a size.")
    return int(float(found[1]) * (_BINARY if found[3] else _UNITS)[found[2]])
