"""naming: functions, classes and modules as words that another process finds the same, and that change with them."""

import ast
import contextlib
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

_BY_NAME = frozenset({"torch", "thalweg", "builtins"})
"""Packages whose functions count by their names."""


def named(value: Any) -> str:
    """Name a function, a class or a bound call so that another process gives it the same name.

    What a user wrote counts with its source, but for comments and layout, and so do the functions, numbers and words
    of the same file that it uses by name. What else it reads when it is called does not.

    Args:
        value: a function, a class, an instance of one, a `functools.partial`, a text or None.

    Example:
        >>> named(len), named("sgd")
        ('builtins.len', "'sgd'")
    """
    return _named(value, set())


def worded(module: nn.Module) -> str:
    """Word a module: its parts as it shows them, their classes, and numbers such as a dropout's p that steer them.

    Args:
        module: the module.

    Example:
        >>> worded(nn.Dropout(0.1)) == worded(nn.Dropout(0.2))
        False
    """
    parts = list(module.modules())
    classes = sorted({named(type(part)) for part in parts})
    steering = [sorted((k, v) for k, v in vars(part).items() if isinstance(v, float)) for part in parts]
    shown = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(module))  # the address of a function is that of one process
    return repr((shown, classes, steering))


def _named(value: Any, seen: set[str]) -> str:
    if isinstance(value, functools.partial):
        return f"{_named(value.func, seen)}{value.args}{sorted(value.keywords.items())}"
    if isinstance(value, str) or value is None:
        return repr(value)
    owner = value if hasattr(value, "__qualname__") else type(value)
    name = f"{owner.__module__}.{owner.__qualname__}"
    if str(owner.__module__).partition(".")[0] in _BY_NAME or name in seen:
        return name
    seen.add(name)
    return f"{name} {_source(owner)} {[_used(function, seen) for function in _functions(owner)]}"


def _functions(owner: Any) -> Iterator[FunctionType]:
    """List the function, or those of a class."""
    for part in vars(owner).values() if isinstance(owner, type) else (owner,):
        found = inspect.unwrap(getattr(part, "__func__", part))
        if isinstance(found, FunctionType):
            yield found


def _source(owner: Any) -> str:
    """Give what was written, without comments and layout; where there is no file, what it was compiled to."""
    if owner.__name__ != "<lambda>":  # of which a line may have several
        with contextlib.suppress(OSError, TypeError, SyntaxError, IndexError):  # no file, or another one by now
            return ast.dump(ast.parse(textwrap.dedent(inspect.getsource(owner))))
    return repr([_compiled(function.__code__) for function in _functions(owner)])


def _compiled(code: CodeType) -> tuple[Any, ...]:
    constants = [
        _compiled(c) if isinstance(c, CodeType) else sorted(map(repr, c)) if isinstance(c, frozenset) else repr(c)
        for c in code.co_consts
    ]
    return code.co_code.hex(), code.co_names, constants


def _used(function: FunctionType, seen: set[str]) -> list[tuple[str, str]]:
    """Give the functions, classes, numbers and words around a function that it uses by name, and its defaults."""
    found = []
    names = sorted(_global_names(function.__code__) & function.__globals__.keys())
    reads = [(name, function.__globals__[name]) for name in names]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not bound yet
            reads.append((name, cell.cell_contents))
    reads += [("", value) for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())]
    for name, value in reads:
        if isinstance(value, bool | int | float | str):
            found.append((name, repr(value)))
        elif getattr(value, "__module__", None) == function.__module__ and hasattr(value, "__qualname__"):
            found.append((name, _named(value, seen)))
    return found


def _global_names(code: CodeType) -> set[str]:
    inner = (c for c in code.co_consts if isinstance(c, CodeType))
    return set(code.co_names).union(*map(_global_names, inner))
