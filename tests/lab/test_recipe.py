import dataclasses
import math
import subprocess
import sys

import pytest
from pydantic import ValidationError
from tests.lab.toy import SOURCE

from thalweg.errors import ConfigError
from thalweg.lab.catalogue import find_recipes, load_recipe
from thalweg.lab.recipe import Preset


def test_recipes_are_found_by_walking_a_package_in_the_order_of_their_names(toys):
    entries = find_recipes(toys.name)
    assert [e.recipe.name for e in entries] == ["toys/good", "toys/raises", "toys/wrong"]
    assert entries[0].reference == f"{toys.name}.good:RECIPE"


def test_a_recipe_is_loaded_by_name_or_by_reference(toys):
    by_name = load_recipe("toys/good", toys.name)
    assert by_name == load_recipe(f"{toys.name}.good:RECIPE")


def test_a_built_in_recipe_is_loaded_without_the_others(tmp_path):
    code = """
import sys
from thalweg.lab.catalogue import load_recipe
print(load_recipe("luck_matters/figure_10").reference)
print("thalweg.recipes.embedding_principle.figure_1" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["thalweg.recipes.luck_matters.figure_10:RECIPE", "False"]


def test_finding_recipes_does_not_import_torch(toys):
    before = "torch" in sys.modules
    find_recipes(toys.name)
    assert ("torch" in sys.modules) == before


def test_an_unknown_recipe_is_refused_with_the_nearest(toys):
    with pytest.raises(ConfigError, match=r"Got 'toys/god'. Did you mean 'toys/good'"):
        load_recipe("toys/god", toys.name)


def test_a_module_that_cannot_be_imported_is_refused():
    with pytest.raises(ConfigError, match=r"Got 'no_such_module': ModuleNotFoundError: No module named"):
        load_recipe("no_such_module:RECIPE")


def test_a_missing_attribute_is_refused_with_the_nearest(toys):
    with pytest.raises(ConfigError, match=r"no attribute 'RECIPES'. Did you mean 'RECIPE'"):
        load_recipe(f"{toys.name}.good:RECIPES")


def test_something_else_than_a_recipe_is_refused(toys):
    with pytest.raises(ConfigError, match=r"to be a Recipe. Got function"):
        load_recipe(f"{toys.name}.good:run")


def test_two_recipes_of_one_name_are_refused(toys):
    (toys / "twin.py").write_text(SOURCE)
    with pytest.raises(ConfigError, match=r"Expected recipes with different names. Got 'toys/good'"):
        find_recipes(toys.name)


def test_an_unknown_preset_is_refused_with_the_nearest(toys):
    recipe = load_recipe("toys/good", toys.name).recipe
    with pytest.raises(ConfigError, match=r"paper, cpu, quick. Got 'quik'. Did you mean 'quick'"):
        recipe.preset("quik")
    assert recipe.preset() == recipe.preset("cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "Figure 3"}, "Expected a recipe name such as 'paper/figure_1'. Got 'Figure 3'"),
        ({"version": 0}, "Expected a version of 1 or more. Got 0"),
        ({"presets": {}}, "Expected at least one preset. Got none in toys/good"),
    ],
)
def test_a_recipe_that_breaks_a_rule_is_refused(toys, change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(load_recipe("toys/good", toys.name).recipe, **change)


def test_claims_that_share_an_id_are_refused(toys):
    recipe = load_recipe("toys/good", toys.name).recipe
    with pytest.raises(ConfigError, match=r"Expected claims with different ids. Got rank, slope, depth, rank"):
        dataclasses.replace(recipe, claims=(*recipe.claims, recipe.claims[0]))


def test_a_preset_is_frozen_and_refuses_unknown_keys_and_infinity():
    class Rated(Preset):
        rate: float = 1.0

    with pytest.raises(ValidationError, match=r"frozen"):
        Rated().seed = 1
    with pytest.raises(ValidationError, match=r"Extra inputs"):
        Rated.model_validate({"rat": 1})
    with pytest.raises(ValidationError, match=r"finite number"):
        Rated(rate=math.inf)
