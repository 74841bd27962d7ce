"""What every built-in recipe keeps to; a new one is tested by existing."""

import json

import pytest

from thalweg.lab.catalogue import BUILT_IN, find_recipes

entries = pytest.mark.parametrize("entry", find_recipes(), ids=lambda entry: entry.recipe.name)


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
    for preset in recipe.presets.values():
        assert [name for name, field in type(preset).model_fields.items() if not field.description] == []
    assert all((recipe.title, recipe.source, recipe.summary))
    assert all(all((c.sentence, c.expected, c.criterion)) for c in recipe.claims)
