"""`thalweg connect --take-apart`: which layer breaks the straight line, and how much extra width mends it."""

from typing import TYPE_CHECKING, Any

from thalweg.cli.parts import Parts, Value
from thalweg.errors import StructureError
from thalweg.lab.progress import shown_progress

if TYPE_CHECKING:
    from thalweg.cli.connect_rows import Couple
    from thalweg.paths.pair import Pair

SAMPLES = 2_000
"""Samples on which the line is taken apart, at most. Chosen by us: many lines are measured."""

TOLERANCE = 0.1
"""Barrier of the loss that counts as none. Chosen by us; every share that was tried is told with its barrier."""

Rows = list[list[str]]


def taken_apart(couple: "Couple", seed: int, parts: Parts) -> Value:
    """Measure both, with B as it is and with B's units in A's order, or read what an earlier command measured.

    Args:
        couple: the networks.
        seed: of the sample.
        parts: where results are kept.

    Returns:
        "layers" and "width", lists of plain rows, and "notes" on what does not apply.

    Raises:
        StoreError: a result cannot be written.
    """
    identity = {"part": "taken apart", **couple.identity, "seed": seed, "samples": SAMPLES, "tolerance": TOLERANCE}
    with shown_progress("taking the line apart") as report:
        found = parts.kept(identity, lambda: _measured(couple.pair, seed, report))
        report(1.0, "done")
    return found


def _measured(pair: "Pair", seed: int, report: Any) -> Value:
    from dataclasses import asdict

    from thalweg.matching import align
    from thalweg.paths.decomposition import layer_barriers
    from thalweg.paths.widening import connectivity_width
    from thalweg.structure import permute

    few = _smaller(pair, seed)
    found: Value = {"layers": [], "width": [], "notes": []}
    orders = {"as it is": pair.b}
    if pair.view.groups:
        known = align(pair.view, pair.a, pair.b, by="weights").permutations
        orders["in A's order"] = permute(pair.view, pair.b, known)
    for place, (order, target) in enumerate(orders.items()):
        report(place / len(orders), f"layers, B {order}")
        found["layers"] += [{"b": order, **asdict(entry)} for entry in layer_barriers(few, target=target)]
        report((place + 0.5) / len(orders), f"width, B {order}")
        try:
            width = connectivity_width(few, target=target, tolerance=TOLERANCE)
        except StructureError as error:
            found["notes"].append(str(error))
            continue
        found["width"].append({"b": order, **asdict(width), "extra": dict(width.extra)})
    return found


def _smaller(pair: "Pair", seed: int) -> "Pair":
    from thalweg.paths.pair import Pair

    total = pair.objective.num_samples()
    objective = pair.objective if total is None or total <= SAMPLES else pair.objective.sample(SAMPLES, seed)
    return Pair.of(objective, pair.a, pair.b, view=pair.view, fit_samples=SAMPLES, seed=seed)


def layer_rows(found: Value) -> tuple[list[str], Rows]:
    """Give the table of the layers."""
    rows = []
    for row in found["layers"]:
        mended = "–" if row["mended"] is None else f"{row['mended']:.4g}"
        rises = [f"{row[key]:.4g}" for key in ("rise_from_a", "rise_from_b")]
        rows.append([row["layer"], row["b"], f"{row['parameters']:,}", *rises, mended])
    return ["layer", "B", "parameters", "rise from A", "rise from B", "mended by a fit"], rows


def width_rows(found: Value) -> tuple[list[str], Rows]:
    """Give the table of the connectivity width."""
    rows = []
    for row in found["width"]:
        tried = ", ".join(f"{share:.3g}: {barrier:.3g}" for share, barrier in row["tried"])
        extra = sum(row["extra"].values())
        rows.append([row["b"], f"{row['share']:.3g}", f"{extra:,}", f"{row['barrier']:.3g}", tried])
    return ["B", "extra share", "units added", "barrier", "share: barrier, as tried"], rows
