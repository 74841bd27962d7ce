"""The documents tell the truth: their code runs, and what they name exists."""

import contextlib
import doctest
import importlib
import io
import re
import sys
import types
from pathlib import Path

import pytest

from thalweg.cli.app import COMMANDS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "thalweg"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
ALL_DOCUMENTS = [*DOCUMENTS, ROOT / "ARCHITECTURE.md"]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL)


def read(path: Path) -> str:
    """Give a document's text; one that is not written yet has none."""
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def blocks(path: Path, *languages: str) -> list[tuple[int, str]]:
    """(line, code) of the fenced blocks in some languages; any, where none is named."""
    text = read(path)
    found = []
    for match in FENCE.finditer(text):
        if not languages or match["language"].strip() in languages:
            indent = len(match["indent"])
            body = "".join(line[indent:] for line in match["body"].splitlines(keepends=True))
            found.append((text.count("\n", 0, match.start("body")), body))
    return found


def words_of_commands(path: Path) -> list[str]:
    """Every `thalweg …` and `make …` of a document, in a block or within a sentence."""
    spans = [code for _, body in blocks(path) for code in body.splitlines()]
    spans += re.findall(r"`([^`\n]+)`", FENCE.sub("", read(path)))
    return [span.strip().removeprefix("$ ") for span in spans]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_the_python_of_a_document_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = blocks(path, "python", "pycon")
    if not found:
        pytest.skip("no Python in it")
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("document")
    monkeypatch.setitem(sys.modules, "document", module)
    for line, code in found:
        if code.lstrip().startswith(">>>"):
            test = doctest.DocTestParser().get_doctest(code, vars(module), named(path), str(path), line)
            report = io.StringIO()
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
            assert runner.run(test, out=report.write, clear_globs=False).failed == 0, report.getvalue()
            vars(module).update(test.globs)
        else:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile("\n" * line + code, str(path), "exec"), vars(module))


@pytest.mark.parametrize("path", ALL_DOCUMENTS, ids=named)
def test_every_command_of_a_document_exists(path: Path) -> None:
    words = [re.match(r"thalweg ([a-z][a-z-]*)", span) for span in words_of_commands(path)]
    assert [w[1] for w in words if w and w[1] not in COMMANDS] == []


@pytest.mark.parametrize("path", ALL_DOCUMENTS, ids=named)
def test_every_make_target_of_a_document_exists(path: Path) -> None:
    targets = re.findall(r"^([a-z][a-z-]*):", read(ROOT / "Makefile"), re.MULTILINE)
    words = [re.match(r"make ([a-z][a-z-]*)", span) for span in words_of_commands(path)]
    assert [w[1] for w in words if w and w[1] not in targets] == []


@pytest.mark.parametrize("path", ALL_DOCUMENTS, ids=named)
def test_every_dotted_name_of_a_document_exists(path: Path) -> None:
    assert [n for n in re.findall(r"`(thalweg(?:\.\w+)+)[`(]", read(path)) if not exists(n)] == []


def exists(name: str) -> bool:
    """Say whether a dotted name leads to something: a module, or what is in one."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            value: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            if not hasattr(value, part):
                return part in getattr(value, "__dataclass_fields__", {}) and part == parts[-1]
            value = getattr(value, part)
        return True
    return False


@pytest.mark.parametrize("path", ALL_DOCUMENTS, ids=named)
def test_every_link_to_a_file_leads_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", FENCE.sub("", read(path)))
    local = [t for t in targets if not re.match(r"[a-z]+:", t)]
    assert [t for t in local if not (path.parent / t).exists()] == []


def tree() -> str:
    """The block of ARCHITECTURE.md that shows the tree: the one that names the file of theta."""
    found = [body for _, body in blocks(ROOT / "ARCHITECTURE.md") if "space.py" in body]
    if not found:
        pytest.skip("no tree in ARCHITECTURE.md yet")
    return found[0]


def test_everything_in_the_tree_of_the_architecture_exists() -> None:
    folders = ("src", "tests", "docs", "benchmarks", "results", ".ci", ".github")
    paths = [ROOT, *ROOT.glob("*"), *(p for f in folders for p in (ROOT / f).rglob("*"))]
    there = [f"/{p.relative_to(ROOT.parent).as_posix()}" + ("/" if p.is_dir() else "") for p in paths]
    ignored = read(ROOT / ".gitignore").split()
    words = re.findall(r"(?<![\w*<>./-])[\w.][\w./-]*(?:/|\.(?:py|md|bib|toml|txt|cff))(?![\w*<>.-])", tree())
    assert words
    assert [w for w in words if w not in ignored and not any(p.endswith(f"/{w}") for p in there)] == []


def test_every_room_is_in_the_tree_of_the_architecture() -> None:
    rooms = [p.name + "/" for p in PACKAGE.iterdir() if (p / "__init__.py").is_file()]
    rooms += [p.name for p in PACKAGE.glob("*.py") if p.name != "__init__.py"]
    assert [r for r in rooms if not re.search(rf"(?<![\w.]){re.escape(r)}", tree())] == []
