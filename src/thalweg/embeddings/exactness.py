"""Prove that a wide module computes what its narrow one does, at weights where nothing can hide."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from thalweg.embeddings.plan import Plan, Split
from thalweg.embeddings.reduction import Reduction
from thalweg.embeddings.splitting import Embedding
from thalweg.errors import StructureError
from thalweg.space import Space
from thalweg.structure import View
from thalweg.structure.tree import resized
from thalweg.structure.verify import Bench, relative_change


def require_exact(narrow: nn.Module, wide: nn.Module, embedding: Embedding, inputs: Any) -> None:
    """Perturb the narrow module in float64, embed that point, and see that the wide module's outputs are the same.

    At its own weights a network can hide that its code fixes a size: a head that starts at zero, or a change
    below its own precision.

    Args:
        narrow: the narrow module.
        wide: the wide one; its weights do not matter.
        embedding: from narrow to wide.
        inputs: one example batch.

    Raises:
        StructureError: the wide module does not run, or its outputs differ.
    """
    bench = Bench(narrow, inputs, torch.Generator().manual_seed(0))
    twin = Bench.twin(wide, inputs)
    try:
        outputs = bench.outputs(embedding.state(bench.state), twin)
    except Exception as error:  # whatever a user's forward raises
        raise StructureError(
            f"Expected the resized module to run. Got {type(error).__name__}: {error}. "
            "Its code fixes a size: pass your own module with the new sizes."
        ) from error
    error_ = relative_change(outputs, bench.reference)
    if not error_ <= bench.tolerance:
        raise StructureError(
            f"Expected the resized module to compute the same outputs. Got a relative change of {error_:.1e} at "
            "perturbed weights. Its code fixes a size (a head count, a scale): leave that group at its width or "
            "pass your own module."
        )


def implied_embedding(reduction: Reduction, narrow: nn.Module) -> Embedding:
    """Give the embedding with equal shares that leads from a reduced module back to the widths before."""
    sizes = {name: merge.after for name, merge in reduction.merges.items()}
    axes = {n: tuple(resized(t, sizes) for t in trees) for n, trees in reduction.view.axes.items()}
    groups = tuple(replace(g, size=sizes.get(g.name, g.size)) for g in reduction.view.groups)
    splits = {}
    for name, merge in reduction.merges.items():
        counts = np.bincount(merge.labels[merge.labels >= 0], minlength=merge.after)
        shares = np.where(merge.labels >= 0, 1 / counts[np.maximum(merge.labels, 0)], 0.0)
        splits[name] = Split(merge.after, merge.labels, shares)
    return Embedding(View(groups, axes), Space.of(narrow), Plan(splits))
