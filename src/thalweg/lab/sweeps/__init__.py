"""Sweeps: many jobs through one narrow socket, `Executor`."""
