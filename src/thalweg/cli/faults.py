"""Faults in words: what went wrong in one line each, and the exit code that tells whose fault it is."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from thalweg.errors import ThalwegError
from thalweg.lab.suggest import did_you_mean

if TYPE_CHECKING:
    from pydantic import ValidationError

INTERNAL, WRONG_INPUT, CLAIM_FAILS, INTERRUPTED = 1, 2, 3, 130


class SettingsError(ThalwegError, ValueError):
    """Parameters that a preset refuses; one line for each.

    Args:
        problems: the lines.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)


def settings_error(error: "ValidationError", fields: Iterable[str], source: str = "") -> SettingsError:
    """Word what pydantic refused: the field, what was expected, what it got, what was meant.

    Args:
        error: pydantic's.
        fields: the names that there are.
        source: what the parameters are of, e.g. "preset quick".
    """
    names = tuple(fields)
    return SettingsError(_worded(problem, names, source) for problem in error.errors(include_url=False))


def _worded(problem: Any, names: tuple[str, ...], source: str) -> str:
    field = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        hint = did_you_mean(field, names)
        return f"{field}: Expected one of {', '.join(names)}. Got {field!r}. {hint or f'See {source}.'}"
    message = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    message = message.rpartition(" should have ")[2].replace(" after validation", "")  # what is too short or too long
    if problem["type"] == "missing":
        return f"{field}: Expected a value. Got none. Write {field}=…"
    if message.startswith("Expected "):  # an error of ours, whole
        return f"{field}: {message}" if field else message  # without one: of several fields together
    return f"{field}: Expected {message}. Got {problem['input']!r}."


def exit_code(error: Exception) -> int:
    """Tell whose fault an error is: 2 the input's, 1 ours."""
    from pydantic import ValidationError  # loading it takes long, and what only lists meets no error

    return WRONG_INPUT if isinstance(error, ThalwegError | ValidationError) else INTERNAL


def lines(error: Exception, *, is_debugged: bool = False) -> list[str]:
    """Word an error in lines for stderr.

    Args:
        error: what was raised.
        is_debugged: whether the traceback stands above already.
    """
    from pydantic import ValidationError

    if isinstance(error, SettingsError):
        return [f"error: {problem}" for problem in error.problems]
    if isinstance(error, ValidationError):
        return [f"error: {_worded(problem, (), error.title)}" for problem in error.errors(include_url=False)]
    text = " ".join(str(error).split()) or type(error).__name__
    notes = [" ".join(note.split()) for note in getattr(error, "__notes__", ())]
    if isinstance(error, ThalwegError):
        return [f"error: {text}", *notes]
    more = notes or ([] if is_debugged else ["Run it with --debug to see more."])
    return [" ".join([f"internal error: {type(error).__name__}: {text.removesuffix('.')}.", *more])]
