"""Tables: what a run stores and figures are drawn from."""

from collections.abc import Mapping
from typing import Any

Table = list[dict[str, Any]]
"""Rows; a row is a flat dict of numbers and texts, by column."""

Tables = Mapping[str, Table]
"""Tables by name."""
