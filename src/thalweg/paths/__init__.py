"""Paths of low loss between two points of a landscape."""

from thalweg.paths.leg import Blend as Blend
from thalweg.paths.leg import BlendLeg as BlendLeg
from thalweg.paths.leg import LazyLeg as LazyLeg
from thalweg.paths.leg import Leg as Leg
from thalweg.paths.leg import blend_leg as blend_leg
from thalweg.paths.path import Path as Path
from thalweg.paths.profile import Lowest as Lowest
from thalweg.paths.profile import Profile as Profile
from thalweg.paths.profile import profile as profile
from thalweg.paths.straight import linear as linear
from thalweg.paths.worst import Worst as Worst
