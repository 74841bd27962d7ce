"""The catalogue: the recipes of a package, and a user's own by `module:name`."""

import importlib
import importlib.util
import pkgutil
from dataclasses import dataclass

from thalweg.errors import ConfigError
from thalweg.lab.recipe import Recipe
from thalweg.lab.suggest import did_you_mean

BUILT_IN = "thalweg.recipes"


@dataclass(frozen=True)
class Entry:
    """A recipe and where it is.

    Args:
        reference: "package.module:NAME", from which any process can load it.
        recipe: the recipe.
    """

    reference: str
    recipe: Recipe


def find_recipes(package: str = BUILT_IN) -> tuple[Entry, ...]:
    """Walk a package for the modules that define `RECIPE`, in the order of their names.

    Args:
        package: name of the package. Its modules are imported; they must not import torch by that.

    Returns:
        The recipes, sorted by name.

    Raises:
        ConfigError: a `RECIPE` is not a Recipe, or two recipes share a name.
    """
    root = importlib.import_module(package)
    entries: dict[str, Entry] = {}
    for found in pkgutil.walk_packages(root.__path__, f"{package}."):
        module = importlib.import_module(found.name)
        if not hasattr(module, "RECIPE"):
            continue
        entry = Entry(f"{found.name}:RECIPE", _checked(module.RECIPE, f"{found.name}:RECIPE"))
        name = entry.recipe.name
        if name in entries:
            raise ConfigError(
                f"Expected recipes with different names. Got {name!r} in {entries[name].reference} and "
                f"{entry.reference}. Rename one."
            )
        entries[name] = entry
    return tuple(entries[name] for name in sorted(entries))


def load_recipe(reference: str, package: str = BUILT_IN) -> Entry:
    """Load a recipe by its name in a package, or a user's own by `module:name`.

    Args:
        reference: "embedding_principle/figure_3a", or "my_package.module:RECIPE".
        package: where names are looked up.

    Raises:
        ConfigError: there is no such recipe, or its module cannot be imported.
    """
    if ":" in reference:
        return Entry(reference, _imported(reference))
    found = _at_its_place(reference, package)
    if found is not None:
        return found
    entries = {entry.recipe.name: entry for entry in find_recipes(package)}
    if reference not in entries:
        hint = did_you_mean(reference, entries) or "See `thalweg recipes`, or give module:NAME of your own."
        raise ConfigError(f"Expected the name of a recipe. Got {reference!r}. {hint}")
    return entries[reference]


def _at_its_place(name: str, package: str) -> Entry | None:
    """Load a recipe from the module of its name without importing the others; None where it lies elsewhere."""
    module_name = f"{package}.{name.replace('/', '.')}"
    try:
        spec = importlib.util.find_spec(module_name)
    except (ImportError, ValueError):
        spec = None
    module = importlib.import_module(module_name) if spec is not None else None
    recipe = getattr(module, "RECIPE", None)
    return Entry(f"{module_name}:RECIPE", recipe) if isinstance(recipe, Recipe) and recipe.name == name else None


def _imported(reference: str) -> Recipe:
    module_name, _, name = reference.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module raises when it is run
        raise ConfigError(
            f"Expected a module that can be imported. Got {module_name!r}: {type(error).__name__}: {error}. "
            "Run in its folder, or install it."
        ) from error
    if not hasattr(module, name):
        hint = did_you_mean(name, vars(module)) or "Check the name after the colon."
        raise ConfigError(f"Expected a recipe in {module_name!r}. Got no attribute {name!r}. {hint}")
    return _checked(getattr(module, name), reference)


def _checked(value: object, reference: str) -> Recipe:
    if not isinstance(value, Recipe):
        raise ConfigError(
            f"Expected {reference} to be a Recipe. Got {type(value).__name__}. "
            "Build it with thalweg.lab.recipe.Recipe."
        )
    return value
