"""Loops that are worth compiling: numba, numbers and nothing else."""
