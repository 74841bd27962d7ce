"""Rules: what each aten operation says about the axes of its arguments and results."""

from collections.abc import Mapping
from types import MappingProxyType

from thalweg.structure.rules.contraction import CONTRACTIONS
from thalweg.structure.rules.normalisation import NORMALISATIONS
from thalweg.structure.rules.pointwise import CONSTANTS, POINTWISE
from thalweg.structure.rules.selection import SELECTIONS
from thalweg.structure.rules.shape import SHAPES
from thalweg.structure.trace import Rule

RULES: Mapping[str, Rule] = MappingProxyType(
    {**SHAPES, **SELECTIONS, **CONTRACTIONS, **NORMALISATIONS, **POINTWISE, **CONSTANTS}
)
"""aten operation -> rule. An in-place operation uses the rule of its name without the underscore."""
