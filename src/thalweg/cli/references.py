"""What a user names on the command line: `module:name` or `file.py:name`, and words `key=value` for it."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thalweg.cli.launch import import_from_here
from thalweg.errors import ConfigError, ThalwegError
from thalweg.lab.suggest import did_you_mean


def find_object(reference: str) -> Any:
    """Import what `module:name` or `file.py:name` names.

    Raises:
        ConfigError: no such module, file or name.
    """
    import_from_here()
    place, _, name = reference.rpartition(":")
    if not place or not name:
        raise ConfigError(f"Expected module:name or file.py:name. Got {reference!r}. Write e.g. nets.py:build.")
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (Exception, SystemExit) as error:  # whatever a user's module raises when it is run
        raise ConfigError(
            f"Expected a module that can be imported. Got {place!r}: {type(error).__name__}: {error}. "
            "Run in its folder, or install it."
        ) from error
    if not hasattr(module, name):
        hint = did_you_mean(name, vars(module)) or "Check the name after the colon."
        raise ConfigError(f"Expected {name!r} in {place!r}. Got no such name. {hint}")
    return getattr(module, name)


def called(function: Any, keywords: dict[str, Any], *, name: str, purpose: str, option: str) -> Any:
    """Call what a user named, and word whatever it raises; an error of ours is worded already.

    Args:
        function: what to call.
        keywords: its arguments.
        name: how the user named it.
        purpose: what it is called for, e.g. "build a module".
        option: how its arguments are given, for the message.

    Raises:
        ConfigError: it raised something.
        ThalwegError: it raised that.
    """
    try:
        return function(**keywords)
    except ThalwegError:
        raise
    except (Exception, SystemExit) as error:  # whatever a user's function raises
        raise ConfigError(
            f"Expected {name}{signature_of(function)} to {purpose}. Got {type(error).__name__}: {error}. "
            f"Give its arguments with {option} key=value."
        ) from error


def keywords_of(words: Sequence[str], option: str) -> dict[str, Any]:
    """Read words `key=value`; a value is read as YAML.

    Args:
        words: what the user wrote.
        option: before each word, for the message.

    Raises:
        ConfigError: a word is not of that form.

    Example:
        >>> keywords_of(["width=16", "normalize=true", "split=test"], "--arg")
        {'width': 16, 'normalize': True, 'split': 'test'}
    """
    import yaml

    keywords = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError(f"Expected {option} key=value. Got {word!r}. Write e.g. {option} width=16.")
        try:
            keywords[key] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"Expected a value after '='. Got {word!r}. Quote it for the shell.") from error
    return keywords


def signature_of(function: Any) -> str:
    """Give the arguments of a function in words."""
    try:
        return str(inspect.signature(function))
    except (TypeError, ValueError):
        return "(…)"


def _from_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module
