"""The page: claims, tables, figures, configuration and environment of runs, in one file without a network.

Plotly's code is embedded once, compressed, and unpacked by the browser. The page's security policy forbids
any request, and any script but the two whose hashes it names.
"""

import base64
import gzip
import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thalweg.errors import ConfigError
from thalweg.lab.catalogue import load_recipe
from thalweg.lab.claims import VERDICTS
from thalweg.lab.figures.figure import Figure
from thalweg.lab.files import write_whole
from thalweg.lab.runs.run import Manifest, Run
from thalweg.lab.wording import MARKS, in_time, in_words

_TEMPLATES = Path(__file__).parent / "templates"


_NUMBER = re.compile(r"[-+−±<>≤≥~≈\[( ]*\d[-+−–±\d\s.,;e%×^·⁻⁰¹²³⁴-⁹\[\]()]*|[-+−]?(inf|nan)|[–-]?")
"""A cell of a column of numbers: a number, an interval, or none."""


@dataclass(frozen=True)
class TextTable:
    """A table of a report, in words.

    Args:
        title: one line.
        columns: their headings.
        rows: cells, one for each column.
        caption: what to see in it.

    Raises:
        ConfigError: a row has more or fewer cells than there are columns.

    Example:
        >>> TextTable("Norms", ("checkpoint", "l2"), (("a.pt", "0.3"), ("b.pt", "–"))).are_numbers
        (False, True)
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ConfigError(
                    f"Expected {len(self.columns)} cells in every row of {self.title!r}. Got {len(row)}: {row}. "
                    "Fill the gaps with –."
                )

    @property
    def are_numbers(self) -> tuple[bool, ...]:
        """For each column, whether it holds numbers, which stand to the right."""
        columns = [[row[i] for row in self.rows] for i in range(len(self.columns))]
        return tuple(bool(any(cells)) and all(_NUMBER.fullmatch(cell) for cell in cells) for cells in columns)


@dataclass(frozen=True)
class Section:
    """One run in a report: of a recipe, or of a command that holds nothing against a paper and has no claims.

    Args:
        manifest: what the run is.
        figures: its pictures.
        note: why there are no pictures, if there are none.
        tables: tables above the pictures.
        listings: title -> lines of code, below the tables.
    """

    manifest: Manifest
    figures: tuple[Figure, ...]
    note: str = ""
    tables: tuple[TextTable, ...] = ()
    listings: Mapping[str, str] = field(default_factory=dict)


def section_of(run: Run) -> Section:
    """Draw a stored run's tables with its recipe's figures.

    A recipe that is gone, has another version, or cannot draw leaves a note in place of the pictures: the
    claims and the data of the run stand without it.

    Args:
        run: a run of the store.

    Returns:
        The run with its figures, or with a note that says why there are none.
    """
    manifest = run.manifest
    try:
        recipe = load_recipe(manifest.reference).recipe
        if recipe.version != manifest.version:
            note = f"The run is of version {manifest.version}, its recipe now of version {recipe.version}."
            return Section(manifest, (), f"No figures: {note}")
        return Section(manifest, tuple(recipe.figures(run.tables())))
    except Exception as error:  # the recipe may be a user's: its fault must not hide the claims
        return Section(manifest, (), f"No figures: {type(error).__name__}: {error}")


def write_report(path: Path, sections: Sequence[Section], title: str | None = None) -> Path:
    """Write a report as one HTML file, whole or not at all.

    Args:
        path: the file.
        sections: what it shows, in order.
        title: default the title of the first run.

    Returns:
        The path.

    Raises:
        StoreError: the file cannot be written.
    """
    write_whole(path, render(sections, title).encode())
    return path


def render(sections: Sequence[Section], title: str | None = None) -> str:
    """Write a report as HTML. Every text is escaped, whatever it holds.

    Args:
        sections: what it shows, in order.
        title: heading of the page. Default: the title of the first run.

    Returns:
        One page that needs no other file and no network.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"in_words": in_words, "in_time": in_time}
    boot = (_TEMPLATES / "boot.js").read_text(encoding="utf-8")
    plotly = _plotly_code() if any(section.figures for section in sections) else ""
    return environment.get_template("page.html.j2").render(
        title=title or (sections[0].manifest.title if sections else "No runs"),
        sections=sections,
        plots=[[_plot_json(figure) for figure in section.figures] for section in sections],
        counts=_counts(sections),
        marks=MARKS,
        style=(_TEMPLATES / "style.css").read_text(encoding="utf-8"),
        boot=boot,
        plotly=_packed(plotly),
        script_hashes=" ".join(f"'sha256-{_hash(code)}'" for code in (boot, plotly) if code),
    )


def _counts(sections: Sequence[Section]) -> dict[str, int]:
    found = Counter(claim.verdict for section in sections for claim in section.manifest.claims)
    return {verdict: found[verdict] for verdict in VERDICTS}


def _plot_json(figure: Figure) -> str:
    """Write a picture as JSON that cannot end the element it stands in."""
    text: Any = figure.plotly.to_json()
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return str(text)


def _plotly_code() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs()).replace("\r\n", "\n")


def _packed(code: str) -> str:
    return base64.b64encode(gzip.compress(code.encode(), 9, mtime=0)).decode() if code else ""


def _hash(code: str) -> str:
    return base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
