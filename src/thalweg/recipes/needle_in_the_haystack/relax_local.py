"""Beyond the paper: relax weight sharing alone. What does the locally-connected network give, and at what cost?

The paper names it as promising for practice and does not try it. Both relaxations run side by side, from the same
convolutional networks, and so does a control that keeps all constraints and trains on at the same rate: a lower rate
alone raises accuracy, too. What is compared is accuracy, memory and time.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from thalweg.lab.claims import Claim
from thalweg.lab.parts import Share, averages
from thalweg.lab.recipe import Context, Outcome, Recipe
from thalweg.lab.tables import Table, Tables
from thalweg.recipes.needle_in_the_haystack import relax
from thalweg.recipes.needle_in_the_haystack.measures import protocol_tables
from thalweg.recipes.needle_in_the_haystack.protocol import (
    CNN,
    RELAXED,
    STANDARD,
    Protocol,
    ProtocolPreset,
    derived,
    loaded,
)

if TYPE_CHECKING:
    from thalweg.lab.figures import Figure

EFCN, ELCN, CONTROL, FCN, LCN = *(RELAXED[space] for space in ("fc", "local", "shared")), *STANDARD.values()


class RelaxLocalPreset(ProtocolPreset):
    """Parameters of the comparison: those of the protocol."""


PAPER = derived(RelaxLocalPreset, relax.PAPER, padded=False)
CPU = derived(RelaxLocalPreset, relax.CPU, relax_times=(0, 10, 40))
QUICK = derived(RelaxLocalPreset, relax.QUICK, relax_times=(15,), relaxed_epochs=4, relaxed_learning_rate=0.1)


def run(preset: RelaxLocalPreset, context: Context) -> Outcome:
    """Run the protocol for every seed, into both spaces."""
    images = loaded(preset, context)
    tables: dict[str, Table] = {"curves": [], "networks": []}
    shares = Share(context).split([1.0] * len(preset.seeds))
    for seed, share in zip(preset.seeds, shares, strict=True):
        found = protocol_tables(Protocol(preset, context, seed, images), ("local", "fc", "shared"), share)
        for name, rows in tables.items():
            rows.extend(found[name])
    by_time = averages(tables["networks"], ("network", "relax_time"), [*relax.COLUMNS, "parameters", "megabytes"])
    cost = _costs(by_time)
    measured = _measured(tables, by_time)
    if preset.data == "digits":  # as for `relax`
        measured = {key: measured[key] for key in ("exact", "falls", "remembers")}
    return Outcome(tables={**tables, "by_time": by_time, "cost": cost}, measured=measured)


def _costs(by_time: Table) -> Table:
    """Set the best accuracy of each kind against its costs: parameters, memory, time with that before the lift."""
    found = []
    for name in (CNN, CONTROL, FCN, LCN, EFCN, ELCN):
        best = max((row for row in by_time if row["network"] == name), key=lambda row: float(row["test_accuracy"]))
        percent = 100 * best["test_accuracy"]
        found.append(
            {
                "network": name,
                "relax_time": best["relax_time"],
                "test_accuracy": best["test_accuracy"],
                "parameters": round(best["parameters"]),
                "megabytes": best["megabytes"],
                "seconds": best["total_seconds"],
                "points_per_million_parameters": 1e6 * percent / best["parameters"],
                "points_per_megabyte": percent / best["megabytes"],
                "points_per_second": percent / best["total_seconds"],
            }
        )
    return found


def _measured(tables: Tables, by_time: Table) -> dict[str, Any]:
    """Measure the claims; accuracies in percent."""
    rows = {(row["network"], row["relax_time"]): row for row in by_time}
    times = sorted({row["relax_time"] for row in by_time if row["relax_time"] is not None})
    local = [row for row in tables["networks"] if row["network"] == ELCN]
    tests = {key: round(100 * row["test_accuracy"], 3) for key, row in rows.items()}
    best = {name: max(tests[name, time] for time in times) for name in (EFCN, ELCN, CONTROL)}
    most = {name: round(100 * rows[name, None]["best_test_accuracy"], 3) for name in (CNN, FCN)}
    sizes = {name: rows[name, times[0]]["parameters"] for name in (EFCN, ELCN)}
    return {
        "exact": max(row["gap"] for row in local),
        "falls": max(row["train_loss"] / row["start_train_loss"] for row in local),
        "remembers": round(
            100 * min(rows[ELCN, t]["test_accuracy"] - rows[ELCN, t]["start_test_accuracy"] for t in times), 3
        ),
        "prior": {ELCN: tests[ELCN, times[0]], FCN: most[FCN]},
        "reaches": {ELCN: best[ELCN], CNN: most[CNN]},
        "control": best,
        "cheaper": {EFCN: best[EFCN], ELCN: best[ELCN], "ratio of parameters": sizes[ELCN] / sizes[EFCN]},
        "locality": {LCN: tests[LCN, None], FCN: tests[FCN, None]},
    }


def figures(tables: Tables) -> "Sequence[Figure]":
    """Draw the trainings, the accuracies, and what they cost."""
    from thalweg.lab.figures import curves
    from thalweg.recipes.needle_in_the_haystack.pictures import accuracy_figures, deviation_figures, training_figures

    cost = [
        curves(
            _ordered(tables["networks"], column),
            id=f"cost-{column}",
            title=f"Accuracy and what it costs in {words}",
            caption="Every network of every seed at its end.",
            x=column,
            y="test_accuracy",
            series="network",
            log_x=True,
            x_title=words,
            y_title="test accuracy",
        )
        for column, words in (("parameters", "parameters"), ("total_seconds", "seconds of training"))
    ]
    return [
        *accuracy_figures(tables["by_time"]),
        *cost,
        *training_figures(tables["curves"]),
        *deviation_figures(tables["by_time"]),
    ]


def _ordered(rows: Table, column: str) -> Table:
    return sorted(rows, key=lambda row: float(row[column]))


RECIPE = Recipe(
    name="needle_in_the_haystack/relax_local",
    title="Relaxing weight sharing alone: locally-connected networks",
    source="dascoli2019finding, section 5: its open question",
    version=2,
    presets={"paper": PAPER, "cpu": CPU, "quick": QUICK},
    claims=(
        Claim(
            "exact",
            "The locally-connected lift computes what the convolutional network does: largest difference of outputs.",
            "0",
            "at most 1e-5 in single precision, all test images",
            lambda m: m <= 1e-5,
        ),
        Claim(
            "falls",
            "Training loss falls when weight sharing is left: largest ratio of the last to the first.",
            "as for dense networks",
            "below 1 for every network and relax time",
            lambda m: m < 1,
        ),
        Claim(
            "remembers",
            "Nothing is forgotten: least change of test accuracy from the lift to the end, in points.",
            "as for dense networks",
            "at least -1 point for every relax time, mean over networks",
            lambda m: m >= -1,
        ),
        Claim(
            "prior",
            "Locality and an untrained prior beat the dense network: test accuracy in percent.",
            "as for dense networks",
            "its end by at least 2 points above the best of the dense one, mean over networks",
            lambda m: m[ELCN] - m[FCN] >= 2,
        ),
        Claim(
            "reaches",
            "At its best relax time it reaches the convolutional network: test accuracy in percent.",
            "as for dense networks",
            "its end at most 0.5 points below the best of the convolutional one, mean over networks",
            lambda m: m[ELCN] >= m[CNN] - 0.5,
        ),
        Claim(
            "control",
            "What it gains is not the lower rate alone: test accuracy in percent at the best relax times.",
            "not measured",
            "the locally-connected network above the one that keeps its constraints at the same rate (ours)",
            lambda m: m[ELCN] > m[CONTROL],
        ),
        Claim(
            "cheaper",
            "It gives what the dense relaxation gives for a fraction of the memory: best accuracies in percent.",
            "promising (the paper)",
            "at most 1 point below the dense one, with at most a fifth of its parameters, padding folded (ours)",
            lambda m: m[ELCN] >= m[EFCN] - 1 and m["ratio of parameters"] <= 0.2,
        ),
        Claim(
            "locality",
            "Locality alone, without shared weights and without a lift, helps: test accuracy in percent.",
            "not measured",
            "a locally-connected network from scratch is above a dense one, mean over networks (ours)",
            lambda m: m[LCN] > m[FCN],
        ),
    ),
    run=run,
    figures=figures,
    summary=(
        "A dense relaxation costs hundreds of megabytes, nearly all of it for weights that stay near 0. Leaving "
        "weights unshared but local costs a small part of that. The table of costs sets accuracy against parameters, "
        "memory and seconds."
    ),
)
