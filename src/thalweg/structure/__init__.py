"""What the coordinates of a module mean: its groups of interchangeable units, traced and verified."""

from thalweg.structure.discovery import trace as trace
from thalweg.structure.oddness import odd_groups as odd_groups
from thalweg.structure.rules import RULES as RULES
from thalweg.structure.symmetry import flip as flip
from thalweg.structure.symmetry import permute as permute
from thalweg.structure.symmetry import random_permutations as random_permutations
from thalweg.structure.symmetry import rescale as rescale
from thalweg.structure.trace import Call as Call
from thalweg.structure.trace import Rule as Rule
from thalweg.structure.verify import verified as verified
from thalweg.structure.view import Group as Group
from thalweg.structure.view import Member as Member
from thalweg.structure.view import View as View
