"""Paths of low loss between two points of a landscape."""

from thalweg.paths.leg import Blend as Blend
from thalweg.paths.leg import BlendLeg as BlendLeg
from thalweg.paths.leg import LazyLeg as LazyLeg
from thalweg.paths.leg import Leg as Leg
from thalweg.paths.leg import blend_leg as blend_leg
from thalweg.paths.path import Path as Path
from thalweg.paths.permutation import permutation_path as permutation_path
from thalweg.paths.permutation_arrangement import Arrangement as Arrangement
from thalweg.paths.permutation_slots import unit_importance as unit_importance
from thalweg.paths.profile import Lowest as Lowest
from thalweg.paths.profile import Profile as Profile
from thalweg.paths.profile import profile as profile
from thalweg.paths.saved import load_path as load_path
from thalweg.paths.saved import save_path as save_path
from thalweg.paths.straight import linear as linear
from thalweg.paths.worst import Worst as Worst
