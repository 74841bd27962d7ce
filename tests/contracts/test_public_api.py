"""What every module and every exported name keeps to; a new one is tested by existing."""

import ast
import builtins
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import thalweg
from thalweg import errors
from thalweg.cli import faults

ROOT = Path(thalweg.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
SINGLE_FILE_ROOMS = ("thalweg.space", "thalweg.objective", "thalweg.checkpoint", "thalweg.errors")
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "core", "misc", "base"}
SECTION = re.compile(r"^(?:\*\*)?([A-Z]\w+):(?:\*\*)?", re.MULTILINE)

IMPORT_IS_LIGHT = """
import sys
import {module}
found = sorted(sys.modules.keys() & {{"torch", "plotly", "sklearn", "scipy"}})
assert not found, found
"""

IMPORT_HAS_NO_EFFECT = """
import importlib, logging, pickle, pkgutil, random, sys, warnings
import numpy as np
import torch

def state():
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "grad mode": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "fast attention": torch.backends.mha.get_fastpath_enabled(),
        "torch random state": torch.get_rng_state().tolist(),
        "numpy random state": pickle.dumps(np.random.get_state()),
        "random state": random.getstate(),
        "numpy errors": np.geterr(),
        "log handlers": list(logging.getLogger().handlers),
        "log level": logging.getLogger().level,
    }

before = state()
import thalweg
for found in pkgutil.walk_packages(thalweg.__path__, "thalweg."):
    importlib.import_module(found.name)
after = state()
changed = [name for name in before if before[name] != after[name]]
assert not changed, changed
"""


def exports() -> dict[str, object]:
    """Every public function and class of thalweg, of a room's `__init__`, and of a room that is one file."""
    names = ["thalweg", *(m.name for m in pkgutil.walk_packages(thalweg.__path__, "thalweg.") if m.ispkg)]
    found = {}
    for module_name in [*names, *SINGLE_FILE_ROOMS]:
        module = importlib.import_module(module_name)
        for name in dir(module):
            value = getattr(module, name)
            is_ours = getattr(value, "__module__", "").startswith(
                module_name if module_name in SINGLE_FILE_ROOMS else "thalweg."
            )
            if not name.startswith("_") and is_ours and (inspect.isfunction(value) or inspect.isclass(value)):
                found[f"{module_name}.{name}"] = value
    return found


EXPORTS = exports()
exported = pytest.mark.parametrize("name", EXPORTS)
functions = pytest.mark.parametrize("name", [n for n, v in EXPORTS.items() if inspect.isfunction(v)])


def sections(docstring: str) -> dict[str, str]:
    """Cut a docstring into its sections: title -> text."""
    pieces = SECTION.split(docstring)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def arguments(value: object) -> list[str]:
    """Names of what a function or a constructor takes."""
    is_built = "__init__" in vars(value) or hasattr(value, "__dataclass_fields__")
    if inspect.isclass(value) and (not is_built or getattr(value, "_is_protocol", False)):
        return []
    return [p for p in inspect.signature(value).parameters if p not in ("self", "cls") and not p.startswith("_")]


def test_there_are_exports_to_check() -> None:
    assert {"thalweg.Objective", "thalweg.structure.trace", "thalweg.space.Space"} <= set(EXPORTS)


@exported
def test_an_export_has_a_docstring(name: str) -> None:
    assert (vars(EXPORTS[name]).get("__doc__") or EXPORTS[name].__doc__ or "").strip()


@exported
def test_every_argument_is_explained(name: str) -> None:
    value = EXPORTS[name]
    text = sections(inspect.getdoc(value) or "").get("Args", "")
    assert [a for a in arguments(value) if not re.search(rf"^\s+\*{{0,2}}{a}(, \w+)*:", text, re.MULTILINE)] == []


@functions
def test_what_is_returned_is_explained(name: str) -> None:
    value = EXPORTS[name]
    if inspect.signature(value).return_annotation not in (None, Iterator[None]):
        assert {"Returns", "Yields"} & set(sections(inspect.getdoc(value) or ""))


@exported
def test_everything_is_annotated(name: str) -> None:
    value = EXPORTS[name]
    members = [value] if inspect.isfunction(value) else vars(value).values()
    own = [inspect.unwrap(getattr(m, "fget", None) or getattr(m, "__func__", m)) for m in members]
    missing = []
    for function in own:
        if inspect.isfunction(function) and function.__code__.co_filename == inspect.getfile(value):
            signature = inspect.signature(function)
            unsaid = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
            missing += [f"{function.__qualname__}({n})" for n in unsaid if n not in ("self", "cls")]
            if signature.return_annotation is signature.empty:
                missing.append(f"{function.__qualname__} ->")
    assert missing == []


def raised(path: Path) -> list[tuple[str, str]]:
    """(where, error) for every error under a `Raises:` of a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            continue
        text = sections(ast.get_docstring(node) or "").get("Raises", "")
        found += [(getattr(node, "name", path.stem), n) for n in re.findall(r"^ {4}([\w.]+):", text, re.MULTILINE)]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_error_that_is_named_exists(path: Path) -> None:
    # The command line has an error of its own, which nothing below it can see.
    known = {n for room in (errors, builtins, faults) for n in dir(room) if inspect.isclass(getattr(room, n))}
    assert [r for r in raised(path) if r[1] not in known] == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_that_holds_something_has_a_docstring(path: Path) -> None:
    text = path.read_text()
    assert not text.strip() or ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_has_a_name_that_says_something(path: Path) -> None:
    assert not {*path.relative_to(ROOT).with_suffix("").parts} & VAGUE_NAMES


@pytest.mark.parametrize("module", ["thalweg", "thalweg.cli.app"])
def test_importing_it_imports_nothing_heavy(module: str) -> None:
    subprocess.run([sys.executable, "-c", IMPORT_IS_LIGHT.format(module=module)], check=True)


def test_importing_everything_changes_no_setting_and_draws_no_random_number() -> None:
    subprocess.run([sys.executable, "-c", IMPORT_HAS_NO_EFFECT], check=True)
