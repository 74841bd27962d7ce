"""Recipes of "Finding the Needle in the Haystack with Convolutions" (dascoli2019finding)."""
