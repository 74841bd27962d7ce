"""Recipes of "Luck Matters: Understanding Training Dynamics of Deep ReLU Networks" (tian2019luck)."""
