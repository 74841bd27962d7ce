"""Values and verdicts in words, for the terminal and the report alike."""

from collections.abc import Mapping, Sequence

from thalweg.lab.claims import Verdict

_LONGEST = 160  # our choice: two lines of a report's cell
MARKS: dict[Verdict, str] = {"holds": "✓", "fails": "✗", "untested": "–"}


def in_words(value: object) -> str:
    """Word a JSON-able value in one short line: four significant digits, no quotes.

    Example:
        >>> in_words({"slope": 1.98765, "widths": [2, 3]})
        'slope: 1.988, widths: 2 3'
    """
    text = _nested(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _nested(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_nested(item)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        has_parts = any(isinstance(item, Mapping | list | tuple) for item in value)
        return ("; " if has_parts else " ").join(_nested(item) for item in value)
    return str(value)


def in_time(seconds: float) -> str:
    """Word a duration.

    Example:
        >>> in_time(0.25), in_time(75), in_time(7300)
        ('0.2 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
