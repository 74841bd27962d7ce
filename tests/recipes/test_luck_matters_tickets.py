"""Tickets and pruning: nodes are chosen as slow searches choose them, networks are what they are said to be."""

import itertools
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from thalweg.lab.claims import judge
from thalweg.lab.recipe import Context
from thalweg.recipes.luck_matters import lottery, modulation_pruning
from thalweg.recipes.luck_matters.falling import Setting, gaussian_pairs, outputs_of, student_of
from thalweg.recipes.luck_matters.lottery import LotteryPreset
from thalweg.recipes.luck_matters.modulation_pruning import PruningPreset
from thalweg.recipes.luck_matters.tickets import (
    again,
    chooser,
    interval,
    lucky,
    others,
    part_of,
    spread,
    top,
    weight_norm,
)
from thalweg.teacher_student import chain

# Sizes at which every piece of a run is taken, in a second.
SMALL: dict[str, Any] = {
    "fc_widths": (2, 3),
    "num_inputs": 4,
    "num_outputs": 5,
    "std": 1.0,
    "epochs": 2,
    "epoch_samples": 320,
    "num_seeds": 2,
    "eval_samples": 64,
}
TICKETS = LotteryPreset(**SMALL, sizes=(2,), looks=2)
PRUNING = PruningPreset(**SMALL, norms=("after_relu",), multiples=(1.0, 2.5), again_samples=320)


@pytest.mark.parametrize("copies", [1, 2])
def test_lucky_nodes_are_those_of_the_best_of_all_assignments(copies: int) -> None:
    rho = torch.rand(5, 2, generator=torch.Generator().manual_seed(copies), dtype=torch.float64)
    teachers = [0, 1] * copies
    best = max(
        itertools.permutations(range(5), len(teachers)),
        key=lambda students: sum(float(rho[j, t]) for j, t in zip(students, teachers, strict=True)),
    )
    assert lucky(rho, copies) == sorted(best)


def test_no_student_is_kept_twice_even_if_it_is_the_best_for_all() -> None:
    assert lucky(torch.tensor([[0.9, 0.8], [0.1, 0.7], [0.2, 0.1]]), 1) == [0, 1]


def test_top_others_and_norms_against_plain_loops() -> None:
    assert top(torch.tensor([0.5, 2.0, 0.5, 1.0]), 3) == [0, 1, 3]
    drawn = others([1, 4], 6, torch.Generator().manual_seed(0))
    assert len(drawn) == 2
    assert drawn == sorted(set(drawn) - {1, 4})
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).double()
    net[0].weight.data = torch.arange(12.0, dtype=torch.float64).reshape(4, 3)
    net[0].bias.data = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    rows = [(*row, bias) for row, bias in zip(net[0].weight.tolist(), net[0].bias.tolist(), strict=True)]
    wanted = [math.sqrt(sum(w**2 for w in row)) for row in rows]
    assert weight_norm(net, 0).tolist() == pytest.approx(wanted, rel=1e-12)


def test_intervals_are_students() -> None:
    values = [0.1, 0.4, -0.2, 0.3, 0.25, 0.0]
    half = 2.570581835636314 * stdev(values) / math.sqrt(6)  # the 97.5 % point for 5 degrees of freedom, from tables
    found = interval(values)
    assert found is not None
    assert (found["low"], found["high"]) == pytest.approx((mean(values) - half, mean(values) + half), rel=1e-10)
    assert interval([1.0]) is None
    rows = [{"kind": "a", "x": v} for v in values] + [{"kind": "b", "x": 7.0}]
    assert spread(rows, ["kind"], "x")[0] == {"kind": "a", **found}
    assert spread(rows, ["kind"], "x")[1]["low"] == 7.0


def test_starts_are_the_weights_that_they_are_said_to_be() -> None:
    base = gaussian_pairs(TICKETS, Setting("whole", "fc", TICKETS.fc_widths), Context())
    nodes = {"lucky": [[3, 7], [1, 4, 8]], "others": [[0, 1], [2, 3, 5]], "largest": [[5, 6], [0, 1, 2]]}
    dense = chain(base.students[0])
    for kind, rule in ((lottery.RESET, "lucky"), (lottery.RANDOM, "others"), (lottery.LARGEST, "largest")):
        first, second = nodes[rule]
        found = chain(lottery.start(TICKETS, base, 0, kind, 1, nodes))
        assert torch.equal(found.layers[0].linear.weight, dense.layers[0].linear.weight[first])
        assert torch.equal(found.layers[1].linear.weight, dense.layers[1].linear.weight[second][:, first])
        assert torch.equal(found.layers[1].linear.bias, dense.layers[1].linear.bias[second])
        assert torch.equal(found.head.weight, dense.head.weight[:, second])
    kept = lottery.start(TICKETS, base, 0, lottery.RESET, 1, nodes)
    new = lottery.start(TICKETS, base, 0, lottery.NEW, 1, nodes)
    own = lottery.start(TICKETS, base, 0, lottery.OWN, 1, nodes)
    shapes = [[p.shape for p in net.parameters()] for net in (kept, new, own)]
    assert shapes[0] == shapes[1] == shapes[2]
    assert not torch.isin(new[1].weight, base.students[0].linear1.weight).any()


def test_all_that_is_trained_again_sees_the_same_new_samples() -> None:
    base = gaussian_pairs(TICKETS, Setting("whole", "fc", TICKETS.fc_widths), Context())
    pairs = again(TICKETS, base, [0, 1, 0], base.students)
    first, other, same = (source(8) for source in pairs.sources)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert not torch.isin(first, base.sources[0](64)).any()
    assert pairs.seeds == (base.seeds[0], base.seeds[1], base.seeds[0])


def test_lottery_compares_all_starts_seed_by_seed(tmp_path: Path) -> None:
    outcome = lottery.run(TICKETS, Context(folder=tmp_path))
    ends = outcome.tables["ends"]
    assert len(ends) == 2 * (1 + len(lottery.RETRAINED) + 1)
    by = {(row["kind"], row["size"], row["seed"]): row["log_loss"] for row in ends}
    for row in outcome.tables["differences"]:
        one, other = row["name"].split(" - ")
        size = TICKETS.factor if other == lottery.DENSE else row["size"]
        gap = by[one, row["size"], row["seed"]] - by[other, size, row["seed"]]
        assert row["difference"] == pytest.approx(gap, abs=1e-12)
    assert outcome.measured == {}  # too short to tell
    assert len(lottery.figures(outcome.tables)) == 3
    assert lottery.run(TICKETS, Context(folder=tmp_path)).tables == outcome.tables  # the parts are kept


def test_what_is_pruned_is_the_student_without_the_other_nodes() -> None:
    base = gaussian_pairs(PRUNING, Setting("whole", "fc", PRUNING.fc_widths, "after_relu"), Context())
    student, x = base.students[0].eval(), base.evaluations[0]
    kept = [[0, 5, 9], [2, 3]]
    masked = student_of(base.teachers[0], PRUNING.factor, "after_relu", base.seeds[0]).eval()
    for linear, nodes in ((masked.linear2, kept[0]), (masked.head, kept[1])):
        gone = [j for j in range(linear.in_features) if j not in nodes]
        linear.weight.data[:, gone] = 0.0
    torch.testing.assert_close(outputs_of(part_of(student, kept), x), outputs_of(masked, x), atol=1e-5, rtol=1e-5)


def test_scores_of_the_last_layer_are_what_the_head_reads() -> None:
    """β of the top hidden layer is VᵀV, so that there modulation is the square of the fan-out."""
    base = gaussian_pairs(PRUNING, Setting("whole", "fc", PRUNING.fc_widths), Context())
    scores = modulation_pruning.scored(PRUNING, base, 0, base.students[0])
    assert set(scores) == set(modulation_pruning.RULES)
    head = chain(base.students[0]).head.weight.detach().double()
    squares = [float(sum(v**2 for v in head[:, j])) for j in range(head.shape[1])]
    assert scores[modulation_pruning.MODULATION][-1].tolist() == pytest.approx(squares, rel=1e-6)
    assert scores[modulation_pruning.FAN_OUT][-1].square().tolist() == pytest.approx(squares, rel=1e-5)
    with torch.no_grad():
        x = chooser(PRUNING, base, 0)
        mean_square = chain(base.students[0]).trace(x).activations[-1].double().square().mean(0)
    wanted = (torch.tensor(squares, dtype=torch.float64) * mean_square).tolist()
    assert scores[modulation_pruning.CONTRIBUTION][-1].tolist() == pytest.approx(wanted, rel=1e-5)


def test_pruning_compares_all_rules_at_every_width() -> None:
    outcome = modulation_pruning.run(PRUNING, Context())
    rows = outcome.tables["students"]
    rules, states, seeds = modulation_pruning.RULES, modulation_pruning.STATES, 2
    assert len(rows) == seeds * (1 + len(rules) * len(states) * len(PRUNING.multiples))
    case = {"norm": "with BN", "state": "pruned", "seed": 1}
    losses = {
        rule: mean(r["log_loss"] for r in rows if case.items() <= r.items() and r["rule"] == rule) for rule in rules
    }
    for row in outcome.tables["differences"]:
        if case.items() <= row.items():
            rule = row["name"].removesuffix(f" - {modulation_pruning.WEIGHT}")
            assert row["difference"] == pytest.approx(losses[rule] - losses[modulation_pruning.WEIGHT], abs=1e-12)
    assert outcome.measured == {}
    assert len(modulation_pruning.figures(outcome.tables)) == 4


def test_claims_of_the_lottery_are_about_the_ends_of_the_intervals() -> None:
    def rows(name: str, values: list[float]) -> list[dict[str, Any]]:
        return [{"name": name, "size": 1, "seed": k, "difference": v} for k, v in enumerate(values)]

    compared = [f"{one} - {other}" for one, other in lottery.COMPARED]
    good = rows(compared[0], [-0.1, 0.0, -0.05]) + rows(compared[1], [0.5, 0.6, 0.55])
    wide = rows(compared[2], [0.5, -0.1, 0.2])
    found = {c.id: c.verdict for c in judge(lottery.RECIPE.claims, lottery.measured(good + wide))}
    assert (found["reset_as_well_1"], found["anew_worse_1"], found["others_worse_1"]) == ("holds", "holds", "fails")
    assert found["reset_as_well_3"] == "untested"
    assert lottery.measured([row | {"size": 4} for row in good]) == {}  # no claim is about it


def test_claims_of_pruning_take_each_state_and_norm_by_itself() -> None:
    name = f"{modulation_pruning.MODULATION} - {modulation_pruning.WEIGHT}"
    rows = [
        {"norm": norm, "state": state, "name": name, "seed": k, "difference": sign * (1.0 + 0.1 * k)}
        for norm, state, sign in (("without BN", "pruned", -1), ("with BN", "trained again", 1))
        for k in range(3)
    ]
    found = modulation_pruning.measured(rows)
    assert set(found) == {"pruned", "again_norm"}
    verdicts = {c.id: c.verdict for c in judge(modulation_pruning.RECIPE.claims, found)}
    assert (verdicts["pruned"], verdicts["again_norm"], verdicts["again"]) == ("holds", "fails", "untested")


@pytest.mark.parametrize("sizes", [(), (0,), (1, 6), (1, 1)])
def test_sizes_that_leave_no_others_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError, match="Expected sizes from 1 to half of factor=10"):
        LotteryPreset(sizes=sizes)


@pytest.mark.parametrize("multiples", [(), (0.0,), (11.0,)])
def test_multiples_beyond_the_student_are_refused(multiples: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError, match="Expected multiples above 0 and up to factor=10"):
        PruningPreset(multiples=multiples)


@pytest.mark.parametrize("twice", [{"norms": ("none", "none")}, {"multiples": (1.0, 1.0)}, {"norms": ()}])
def test_pruning_counts_nothing_twice(twice: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="each of norms and multiples once"):
        PruningPreset(**twice)
