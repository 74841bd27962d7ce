"""What `thalweg match` found, as plain values, as arrays, and as tables."""

import math
from typing import TYPE_CHECKING, Any

from thalweg.cli.parts import Value

if TYPE_CHECKING:
    from torch import Tensor

    from thalweg.teacher_student import LayerMatch, Match

Rows = list[list[str]]


def record_of(found: "Match") -> Value:
    """Give everything but the correlation matrices as plain values.

    Args:
        found: the match.
    """
    return {
        "samples": found.num_samples,
        "layers": [_layer(layer) for layer in found.layers],
        "table": [{"a": a, "b": b, "mean_best": value} for (a, b), value in found.table.items()],
        "skipped": dict(found.skipped),
    }


def _layer(layer: "LayerMatch") -> Value:
    dead_a, dead_b = ((~alive).nonzero().flatten().tolist() for alive in (layer.alive_a, layer.alive_b))
    return {
        "a": layer.a,
        "b": layer.b,
        "units": {"a": len(layer.alive_a), "b": len(layer.alive_b)},
        "rows": layer.num_rows,
        "compared": layer.compared,
        "mean_best": layer.mean_best,
        "covered": layer.covered,
        "distinct_winners": layer.num_winners,
        "one_to_one": layer.one_to_one,
        "mean_margin": float(layer.margin[layer.alive_a].mean()),
        "best": layer.best.tolist(),
        "rho": layer.rho.tolist(),
        "runner_up": layer.runner_up.tolist(),
        "partners": layer.partners.tolist(),
        "dead": {"a": dead_a, "b": dead_b},
        "without_counterpart": layer.without_counterpart.tolist(),
        "earlier_mean_best": layer.earlier_means(),
        "earlier_mean_rank": layer.earlier_ranks(),
    }


def arrays(found: "Match") -> "dict[str, Tensor]":
    """Give the correlations of each pair of layers, and the orders in which they are drawn.

    Args:
        found: the match.
    """
    tensors = {}
    for layer in found.layers:
        name = f"{layer.a}={layer.b}"
        tensors[f"{name}/correlation"] = layer.correlation
        tensors[f"{name}/best"] = layer.best
        tensors[f"{name}/partners"] = layer.partners
        tensors[f"{name}/order_a"], tensors[f"{name}/order_b"] = layer.order_a, layer.order_b
        for place, rho in enumerate(layer.earlier):
            tensors[f"{name}/earlier/{place}"] = rho
    return tensors


def number(value: Any) -> str:
    """Word a correlation; – where there is none.

    Example:
        >>> number(0.98765), number(float("nan"))
        ('0.988', '–')
    """
    return "–" if math.isnan(float(value)) else f"{float(value):.3f}"


def layer_rows(record: Value) -> tuple[list[str], Rows]:
    """Give the table of the pairs of layers."""
    heads = ["A", "B", "units", "mean best", "≥ 0.9", "distinct", "one-to-one", "margin", "dead", "B alone"]
    rows = []
    for layer in record["layers"]:
        dead, covered = layer["dead"], float(layer["covered"])
        rows.append(
            [
                *(layer["a"], layer["b"], f"{layer['units']['a']} / {layer['units']['b']}"),
                *(number(layer["mean_best"]), "–" if math.isnan(covered) else f"{covered:.0%}"),
                *(str(layer["distinct_winners"]), number(layer["one_to_one"]), number(layer["mean_margin"])),
                *(f"{len(dead['a'])} / {len(dead['b'])}", str(len(layer["without_counterpart"]))),
            ]
        )
    return heads, rows


def table_rows(record: Value) -> tuple[list[str], Rows]:
    """Give the table of ρ̄ between all layers."""
    values = {(cell["a"], cell["b"]): cell["mean_best"] for cell in record["table"]}
    ours, theirs = (list(dict.fromkeys(cell[side] for cell in record["table"])) for side in "ab")
    return ["A \\ B", *theirs], [[a, *(number(values.get((a, b), math.nan)) for b in theirs)] for a in ours]


def earlier_rows(record: Value) -> tuple[list[str], Rows]:
    """Give the table of earlier states of B: ρ̄, and the rank that the winners had."""
    heads = ["A", "B", *(f"{what}, {name}" for name in record["earlier"] for what in ("mean best", "mean rank"))]
    rows = []
    for layer in record["layers"]:
        both = zip(layer["earlier_mean_best"], layer["earlier_mean_rank"], strict=True)
        rows.append([layer["a"], layer["b"], *(number(value) for pair in both for value in pair)])
    return heads, rows
