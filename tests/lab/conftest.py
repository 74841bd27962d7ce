"""Fixtures of this folder."""

from tests.lab import toy

toys = toy.toys
