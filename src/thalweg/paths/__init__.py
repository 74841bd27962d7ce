"""Paths of low loss between two points of a landscape."""

from thalweg.paths.leg import Blend as Blend
from thalweg.paths.leg import BlendLeg as BlendLeg
from thalweg.paths.leg import LazyLeg as LazyLeg
from thalweg.paths.leg import Leg as Leg
from thalweg.paths.leg import blend_leg as blend_leg
from thalweg.paths.path import Path as Path
from thalweg.paths.straight import linear as linear
