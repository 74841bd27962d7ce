"""Settings: a preset, changed by a file and by `key=value` words, validated by the preset's model."""

import json
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thalweg.cli.faults import settings_error
from thalweg.errors import ConfigError

if TYPE_CHECKING:
    from thalweg.lab.recipe import Preset


def split_words(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Tell the preset's name, if there is one, from the `key=value` words after it.

    Raises:
        ConfigError: a word after the first is not of the form key=value.
    """
    has_name = bool(words) and "=" not in words[0]
    name, assignments = (words[0], list(words[1:])) if has_name else (None, list(words))
    for word in assignments:
        if "=" not in word:
            raise ConfigError(f"Expected key=value after the preset. Got {word!r}. Write e.g. seed=1.")
    return name, assignments


def configured(preset: "Preset", file: Path | None, assignments: Iterable[str]) -> "Preset":
    """Change a preset by a file, then by `key=value` words; dots reach into nested fields.

    Args:
        preset: where the values start from.
        file: YAML, TOML or JSON with some of the fields.
        assignments: words such as `widths=[2,3,4]`; the value is read as YAML.

    Returns:
        The new preset.

    Raises:
        ConfigError: the file or a word cannot be read.
        SettingsError: a field is unknown, or a value is wrong; one line for each.
    """
    from pydantic import ValidationError

    values: dict[str, Any] = preset.model_dump()
    if file is not None:
        values = _merged(values, _read(file))
    for word in assignments:
        key, _, text = word.partition("=")
        values = _merged(values, _nested(key, _value(word, text)))
    try:
        return type(preset).model_validate(values)
    except ValidationError as error:
        raise settings_error(error, type(preset).model_fields, type(preset).__name__) from error


def _value(word: str, text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"Expected a value after '='. Got {word!r}. Quote it for the shell.") from error


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    found: dict[str, Any] = value
    return found


def _merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _read(file: Path) -> dict[str, Any]:
    import yaml

    readers: dict[str, Callable[[str], Any]] = {
        ".yaml": yaml.safe_load,
        ".yml": yaml.safe_load,
        ".toml": tomllib.loads,
        ".json": json.loads,
    }
    if file.suffix not in readers:
        raise ConfigError(f"Expected a .yaml, .toml or .json file. Got {str(file)!r}. Rename it.")
    try:
        values = readers[file.suffix](file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"Expected a readable {file.suffix} file. Got {reason}. Check -c.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"Expected names and values in {file}. Got {type(values).__name__}. Check -c.")
    return values
