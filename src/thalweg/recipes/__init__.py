"""Recipes: one file per figure or theorem of a paper."""
