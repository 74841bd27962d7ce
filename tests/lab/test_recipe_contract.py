"""What every built-in recipe keeps to; a new one is tested by existing."""

import ast
import inspect
import itertools
import json
import textwrap

import pytest

from thalweg.lab.catalogue import BUILT_IN, find_recipes
from thalweg.lab.recipe import Preset

entries = pytest.mark.parametrize("entry", find_recipes(), ids=lambda entry: entry.recipe.name)


def explained(kind):
    """The fields with a docstring of their own; read here alone, as pydantic would read the sources at each start."""
    found = set()
    for base in kind.__mro__[: kind.__mro__.index(Preset) + 1]:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        for node, after in itertools.pairwise(tree.body):
            text = (
                after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
            )
            if isinstance(node, ast.AnnAssign) and isinstance(text, str):
                found.add(node.target.id)
    return found


@entries
def test_the_name_of_a_recipe_is_where_its_module_lies(entry):
    assert entry.reference == f"{BUILT_IN}.{entry.recipe.name.replace('/', '.')}:RECIPE"


@entries
def test_a_recipe_has_the_three_presets_and_claims(entry):
    assert {"paper", "cpu", "quick"} <= set(entry.recipe.presets)
    assert entry.recipe.claims


@entries
def test_the_parameters_of_each_preset_are_json_and_validate_into_it(entry):
    for preset in entry.recipe.presets.values():
        text = json.dumps(preset.parameters(), allow_nan=False)
        assert type(preset).model_validate(json.loads(text)) == preset


@entries
def test_every_parameter_and_text_is_explained(entry):
    recipe = entry.recipe
    for kind in {type(preset) for preset in recipe.presets.values()}:
        assert set(kind.model_fields) - explained(kind) == set()
    assert all((recipe.title, recipe.source, recipe.summary))
    assert all(all((c.sentence, c.expected, c.criterion)) for c in recipe.claims)
