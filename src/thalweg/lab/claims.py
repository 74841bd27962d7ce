"""Claims: sentences of a paper with a check, and what became of them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from thalweg.errors import ConfigError
from thalweg.lab.plain import plain

Verdict = Literal["holds", "fails", "untested"]
VERDICTS: tuple[Verdict, ...] = ("holds", "fails", "untested")


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper that a number can contradict.

    Args:
        id: short name, unique in its recipe; the key under which the run reports the measured value.
        sentence: what the paper says, in one sentence.
        expected: the paper's value, as text.
        criterion: what counts as reproduced, as text, fixed before the result is seen, with its origin.
        check: the criterion as a function of the measured value: True (holds), False (fails) or None (it
            cannot be tested at this size).
    """

    id: str
    sentence: str
    expected: str
    criterion: str
    check: Callable[[Any], bool | None]


@dataclass(frozen=True)
class ClaimResult:
    """What became of a claim in one run.

    Args:
        id: the claim's name.
        sentence: the claim.
        measured: the measured value, JSON-able; None if there is none.
        expected: the paper's value.
        criterion: what counts as reproduced.
        verdict: "holds", "fails" or "untested".
        reason: why, where the verdict alone does not say it.
    """

    id: str
    sentence: str
    measured: Any
    expected: str
    criterion: str
    verdict: Verdict
    reason: str = ""


def judge(claims: Iterable[Claim], measured: Mapping[str, object]) -> tuple[ClaimResult, ...]:
    """Hold every claim against what was measured.

    A missing value leaves a claim untested; a check that raises makes it fail, with the reason.

    Args:
        claims: the claims of a recipe.
        measured: claim id -> measured value.

    Returns:
        One result per claim, in order.

    Raises:
        ConfigError: a value was measured for a claim that does not exist, or it has no JSON form.
    """
    claims = tuple(claims)
    strangers = sorted(set(measured) - {claim.id for claim in claims})
    if strangers:
        raise ConfigError(
            f"Expected measured values of the claims {', '.join(c.id for c in claims) or '(none)'}. "
            f"Got {', '.join(strangers)}. Use the id of the claim as the key."
        )
    return tuple(_judged(claim, measured) for claim in claims)


def _judged(claim: Claim, measured: Mapping[str, object]) -> ClaimResult:
    value = measured.get(claim.id)
    verdict: Verdict
    if value is None:
        verdict, reason = "untested", "not measured at this size"
    else:
        verdict, reason = _verdict(claim, value)
    return ClaimResult(claim.id, claim.sentence, plain(value), claim.expected, claim.criterion, verdict, reason)


def _verdict(claim: Claim, value: object) -> tuple[Verdict, str]:
    try:
        answer: object = claim.check(value)  # a recipe's code may give anything
        if answer is None:
            return "untested", "not testable at this size"
        is_numpy = type(answer).__module__ == "numpy" and type(answer).__name__ in ("bool", "bool_")
        if not (isinstance(answer, bool) or is_numpy):  # told without loading NumPy
            return "fails", f"the check gave {answer!r}, neither true nor false nor None"
        if _has_nan(plain(value)):
            return "fails", "NaN was measured"
        return ("holds", "") if answer else ("fails", "")
    except Exception as error:  # a check is the recipe's code: whatever it raises must not hide the run
        return "fails", f"the check raised {type(error).__name__}: {error}"


def _has_nan(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_has_nan, value.values()))
    return any(map(_has_nan, value)) if isinstance(value, list) else value == "nan"


def overall(verdicts: Iterable[Verdict]) -> Verdict:
    """Sum up verdicts: one failure fails, one success among untested ones holds.

    Example:
        >>> overall(["holds", "untested"]), overall(["holds", "fails"]), overall([])
        ('holds', 'fails', 'untested')
    """
    found = set(verdicts)
    if "fails" in found:
        return "fails"
    return "holds" if "holds" in found else "untested"
