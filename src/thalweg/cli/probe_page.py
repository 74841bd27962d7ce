"""What `thalweg probe` shows: the table on the terminal, and the report's tables and figures."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from thalweg.cli.measurement import LARGEST_DENSE, NEAR_ZERO
from thalweg.cli.parts import Value
from thalweg.lab.figures import Figure, curves, density, eigenvalue_intervals, inertia_bars, plane, spectrum
from thalweg.lab.report import TextTable

_SIDE_BY_SIDE = 4
"""Checkpoints that are columns of a table, at most; more are rows. Chosen by us: what a wide terminal holds."""

Rows = list[tuple[str, ...]]


def summary(points: Sequence[Value]) -> tuple[list[str], Rows]:
    """Give the table of all quantities: one row for each, or one for each checkpoint where they are many."""
    facts = [_facts(point) for point in points]
    names = list(dict.fromkeys(name for fact in facts for name in fact))
    heads = [str(point["name"]) for point in points]
    if len(points) <= _SIDE_BY_SIDE:
        return ["quantity", *heads], [(name, *(fact.get(name, "–") for fact in facts)) for name in names]
    return ["checkpoint", *names], [
        (head, *(fact.get(name, "–") for name in names)) for head, fact in zip(heads, facts, strict=True)
    ]


def _facts(point: Value) -> dict[str, str]:
    found = {"parameters": f"{point['parameters']:,}", "loss": f"{point['loss']:.6g}"}
    if point["accuracy"] is not None:
        found["accuracy"] = f"{point['accuracy']:.4f}"
    gradient = point["gradient"]
    found |= {"gradient, l2 norm": f"{gradient['l2']:.4g}", "gradient, largest entry": f"{gradient['max']:.4g}"}
    for key, sign in (("largest", "λ"), ("smallest", "λ−")):
        for place, words in enumerate(_eigenvalues(point.get(key))):
            found[f"{sign}{place + 1}"] = words
    if near := point.get("density"):
        found["Tr H (Hutchinson)"] = f"{near['trace']['value']:.4g} ± {float(near['trace']['standard_error']):.2g}"
        low, high = near["extremes"]
        found["spectrum reaches from"] = f"{low:.4g} to {high:.4g}"
        found["near zero"] = _near_zero(near["near_zero"])
    if trace := point.get("trace"):
        found["Tr H (XTrace)"] = f"{trace['value']:.5g} ± {float(trace['standard_error']):.2g}"
    if signs := point.get("degeneracy"):
        if "negative" in signs:
            found["negative, zero, positive"] = f"{signs['negative']}, {signs['zero']}, {signs['positive']}"
            found["zero means"] = str(signs["rule"])
        else:
            found["near zero"] = _near_zero(signs["near_zero"])
    return found


def _eigenvalues(found: Value | None) -> list[str]:
    if found is None:
        return []
    columns = (found["values"], found["residuals"], found["errors"], found["converged"])
    return [
        f"{value:.6g} ± {residual:.1g} (estimated error {error:.1g}{'' if done else '; NOT CONVERGED'})"
        for value, residual, error, done in zip(*columns, strict=True)
    ]


def _near_zero(near: Value) -> str:
    """The bracket first: where it begins at 0, the bound is below the resolution, and a guess means little."""
    guess = f", about {near['value']:.1%}" if near["lower"] > 0 else ""
    return (
        f"{near['lower']:.1%} to {near['upper']:.1%} of eigenvalues within ±{near['threshold']:.2g}{guess} "
        f"(± {float(near['standard_error']):.1%} for random probes)"
    )


def tables(points: Sequence[Value]) -> list[TextTable]:
    """Give the report's tables."""
    columns, rows = summary(points)
    found = [
        TextTable(
            "What was measured",
            tuple(columns),
            tuple(rows),
            "λ ± r: an eigenvalue of the Hessian lies within r (the residual ‖Hv − λv‖ of a unit vector v), which is "
            "certain up to rounding. The estimated error is r² over half the gap to the next Ritz value; within ten "
            "roundings of the largest |λ| a value counts as converged whatever it is. "
            f"Near zero means within {NEAR_ZERO:g} of the largest |λ|.",
        )
    ]
    found.extend(_layer_table(str(p["name"]), p["layers"]["layers"]) for p in points if "layers" in p)
    return found


def _layer_table(name: str, layers: Sequence[Value]) -> TextTable:
    rows = []
    for row in layers:
        trace = row["density"]["trace"] if "density" in row else None
        rows.append(
            (
                row["layer"],
                f"{row['parameters']:,}",
                f"{row['gradient']:.4g}",
                f"{row['largest']['values'][0]:.5g}",
                f"{row['largest']['residuals'][0]:.1g}",
                f"{trace['value']:.4g} ± {float(trace['standard_error']):.2g}" if trace else "–",
            )
        )
    heads = ("layer", "parameters", "gradient, l2 norm", "λ1 of its block", "± r", "trace of its block")
    return TextTable(f"Layers of {name}", heads, tuple(rows), "Each layer's own diagonal block of the Hessian.")


def figures(points: Sequence[Value], shared: Value | None) -> list[Figure]:
    """Draw everything that was measured."""
    found = [*_over_steps(points), *_extremes(points), *_densities(points), *_layer_densities(points)]
    found += _signs(points)
    for point in points:
        if laid := point.get("slice"):
            found += _slice(laid, str(point["name"]), len(found))
    if shared is not None:
        found += _slice(shared, "all checkpoints", len(found))
    return found


def _over_steps(points: Sequence[Value]) -> list[Figure]:
    """Curvature over training, where the checkpoints are numbered."""
    steps = [point["step"] for point in points]
    if len(points) < 3 or None in steps or len(set(steps)) < len(steps):
        return []
    columns: dict[str, Callable[[Value], Any]] = {
        "loss": lambda p: p["loss"],
        "gradient, l2 norm": lambda p: p["gradient"]["l2"],
        "largest eigenvalue": lambda p: p["largest"]["values"][0] if "largest" in p else None,
        "trace": lambda p: p["density"]["trace"]["value"] if "density" in p else None,
    }
    ordered = sorted(points, key=lambda p: p["step"])
    rows = [
        {"step": p["step"], "value": value, "quantity": name}
        for name, read in columns.items()
        for p in ordered
        if (value := read(p)) is not None
    ]
    caption = "One point for each checkpoint. Values at or below 0 are left out of a logarithmic axis."
    return [
        curves(
            rows,
            id="over-training",
            title="Curvature over training",
            caption=caption,
            x="step",
            y="value",
            series="quantity",
            log_y=True,
        )
    ]


def _extremes(points: Sequence[Value]) -> list[Figure]:
    found: list[Figure] = []
    for key, words in (("largest", "Largest eigenvalues"), ("smallest", "Smallest eigenvalues")):
        rows = [
            {
                "eigenvalue": value,
                "lower": value - residual,
                "upper": value + residual,
                "converged": done,
                "index": place + 1,
                "checkpoint": point["name"],
            }
            for point in points
            if key in point
            for place, (value, residual, done) in enumerate(
                zip(*(point[key][name] for name in ("values", "residuals", "converged")), strict=True)
            )
        ]
        if rows:
            caption = "Each bar is certain to hold an eigenvalue: its half length is the residual ‖Hv − λv‖."
            found.append(
                eigenvalue_intervals(rows, id=key, title=words, caption=caption, series=_series(points, "checkpoint"))
            )
    return found


def _series(points: Sequence[Value], name: str) -> str | None:
    return name if len(points) > 1 else None


def _curve(estimate: Value, **more: Any) -> list[dict[str, Any]]:
    return [{**row, **more} for row in estimate["curve"]]


def _densities(points: Sequence[Value]) -> list[Figure]:
    measured = [point for point in points if "density" in point]
    if not measured:
        return []
    rows = [row for point in measured for row in _curve(point["density"], checkpoint=point["name"])]
    marks = [
        {"eigenvalue": value, "checkpoint": point["name"]}
        for point in measured
        for key in ("largest", "smallest")
        for value in point.get(key, {}).get("values", ())
    ]
    first = measured[0]["density"]
    caption = (
        f"Mean and {first['confidence']:.0%} band over {len(first['nodes'])} random vectors of "
        f"{len(first['nodes'][0])} Lanczos steps each; smoothed by a Gaussian of width {first['kernel_width']:.3g}. "
        "Ticks at the foot are the eigenvalues computed by themselves."
    )
    title = "Spectral density of the Hessian"
    series = _series(measured, "checkpoint") or ("checkpoint" if marks else None)
    return [density(rows, id="density", title=title, caption=caption, series=series, markers=marks)]


def _layer_densities(points: Sequence[Value]) -> list[Figure]:
    found: list[Figure] = []
    for point in points:
        layers = [row for row in point.get("layers", {}).get("layers", ()) if "density" in row]
        if layers:
            rows = [row for layer in layers for row in _curve(layer["density"], layer=layer["layer"])]
            title = f"Spectral density by layer, {point['name']}"
            caption = "Of each layer's own diagonal block, normalised to 1 for each."
            number = f"layers-{len(found)}"
            found.append(density(rows, id=number, title=title, caption=caption, series="layer"))
    return found


def _signs(points: Sequence[Value]) -> list[Figure]:
    counted = [p for p in points if "eigenvalues" in p.get("degeneracy", {})]
    if not counted:
        return []
    bars = [
        {"checkpoint": p["name"], **{k: p["degeneracy"][k] for k in ("negative", "zero", "positive")}}
        for p in counted
    ]
    caption = (
        "All eigenvalues, in float64. What the dashed line's bound cannot tell from zero counts as zero: "
        f"{counted[0]['degeneracy']['rule']}. Up to {LARGEST_DENSE:,} parameters."
    )
    rows = [
        {"eigenvalue": value, "threshold": p["degeneracy"]["threshold"], "checkpoint": p["name"]}
        for p in counted
        for value in p["degeneracy"]["eigenvalues"]
    ]
    found = [
        spectrum(rows, id="spectrum", title="Every eigenvalue", caption=caption, panel="checkpoint"),
        inertia_bars(bars, id="signs", title="Signs of the eigenvalues", caption=caption, x="checkpoint"),
    ]
    return found


def _slice(laid: Mapping[str, Any], name: str, number: int) -> list[Figure]:
    caption = f"Directions: {laid['directions']}. {laid['batchnorm']}"
    if laid["not_finite"]:
        caption += f" {laid['not_finite']} points have no finite loss and are left white."
    rows = laid["rows"]
    columns = [c for c in ("loss", "test_loss", "accuracy", "test_accuracy") if c in rows[0]]
    if len(laid["axes"]) == 1:
        return [
            _lines(
                rows, [c for c in columns if c.endswith(kind)], kind, f"{name}: {kind} along a line", caption, number
            )
            for kind in ("loss", "accuracy")
            if kind in rows[0]
        ]
    marks = laid["markers"]
    return [
        plane(
            rows,
            id=f"slice-{number}-{column}",
            title=f"{name}: {column.replace('_', ' ')} over a plane",
            caption=caption,
            z=column,
            z_title=column.replace("_", " "),
            markers=marks,
        )
        for column in columns
    ]


def _lines(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], kind: str, title: str, caption: str, number: int
) -> Figure:
    long = [
        {"a": row["a"], kind: row[column], "data": "test" if column.startswith("test") else "train"}
        for column in columns
        for row in rows
    ]
    return curves(long, id=f"slice-{number}-{kind}", title=title, caption=caption, x="a", y=kind, series="data")
