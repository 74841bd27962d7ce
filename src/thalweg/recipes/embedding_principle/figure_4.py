"""Figure 4: the critical points that hundreds of trainings of widths 1, 2 and 3 meet, all of them in width 3.

Counts as reproduced: the four levels of the figure with their degeneracies, two of them mirror images, each critical
when embedded into the widest net. Points that the paper does not list are shown as such; a better finder meets more.

The paper keeps points at which the gradient fell below 1e-10 without any polish. Gradient descent with its rate and
number of steps comes there at the width-1 point only, in every trial of width 1; the curvatures at the others are too
small for that. Adam comes there at some of them in some trials. So every point here is polished, and how many trials
had come that far by themselves stands beside each entry (`raw visits`).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from thalweg.lab.claims import Claim
from thalweg.lab.recipe import Context, Outcome, Preset, Recipe
from thalweg.lab.tables import Tables

if TYPE_CHECKING:
    from thalweg.embeddings import Catalogue, Entry, Met
    from thalweg.lab.figures import Figure
    from thalweg.objective import Objective
    from thalweg.training import PopulationRun

LEVELS = (0.109023, 0.0697915, 0.0697915, 0.0)
"""Losses of the figure's four critical points (0.11, 0.07, 0.07, 1e-5), found by Levenberg–Marquardt."""
DEGENERACY = (2, 1, 1, 0)
"""Their degeneracies in width 3, from the figure."""


class Figure4Preset(Preset):
    """Parameters of figure 4."""

    widths: tuple[int, ...] = (1, 2, 3)
    """Widths of the nets; every critical point is embedded into the last one."""
    num_trials: int = 200
    """Trainings of each width."""
    num_points: int = 50
    """Training points on [-15, 15]."""
    optimizer: Literal["gd", "adam"] = "gd"
    """Full-batch optimizer."""
    learning_rate: float = 0.005
    """Its learning rate."""
    halves_loss: bool = True
    """Train on half the mean squared error, whose Hessian figure 3(a) shows. On all of it, gradient descent at 0.005
    cannot settle at the width-1 point: the largest curvature there, 458, exceeds 2/0.005."""
    steps: int = 300_000
    """Number of steps of each trial."""
    variance_exponent: float = 3.0
    """All parameters start from N(0, 1/m^this), m the width."""
    raw_gradient_l1: float = 1e-10
    """The paper's threshold for a critical point along a trajectory."""
    gradient_l1: float = 1e-12
    """The polish stops at this L1 norm of the gradient."""
    polish_steps: int = 40
    """Steps after which a polish is given up; points that are critical take about 20."""


PAPER = Figure4Preset()
CPU = PAPER.model_copy(update={"optimizer": "adam", "halves_loss": False, "steps": 40_000, "num_trials": 100})
QUICK = CPU.model_copy(update={"steps": 6_000, "num_trials": 16, "learning_rate": 0.01})


def run(preset: Figure4Preset, context: Context) -> Outcome:
    """Train all trials of each width, polish what they met, and make the catalogue."""
    from concurrent.futures import ThreadPoolExecutor

    from thalweg.embeddings import Met, catalogue
    from thalweg.training import candidates, polish_all

    def polished(objective: "Objective", trained: "PopulationRun", width: int) -> "Met":
        found = candidates(trained)
        points = polish_all(objective, found.thetas, gradient_l1=preset.gradient_l1, max_steps=preset.polish_steps)
        return Met(objective, points, found.trials, f"width {width}")

    losses: list[dict[str, Any]] = []
    with ThreadPoolExecutor(1) as pool:  # points of one width are polished while the next one is trained
        pending = []
        for place, width in enumerate(preset.widths):
            objective = _landscape(width, preset)
            trained = _trained(preset, context, place, width, objective)
            losses += _loss_rows(trained, width)
            pending.append(pool.submit(polished, objective, trained, width))
        context.progress(0.9, "polishing the points of least gradient")
        met = [task.result() for task in pending]
    context.progress(0.95, "catalogue of the critical points")
    made = catalogue(met, raw_gradient_l1=preset.raw_gradient_l1)
    widest = f"width {preset.widths[-1]}"
    listed = _listed(made)
    chosen = [entry for entry in listed if entry is not None]
    nodes, edges = _diagram(made, chosen)
    return Outcome(
        tables={
            "nodes": nodes,
            "edges": edges,
            "entries": made.rows(),
            "images": made.image_rows(),
            "counts": [dict(vars(count)) for count in made.counts],
            "outputs": _outputs(met[0].objective, chosen),
            "loss": losses,
        },
        arrays={f"theta_{entry.id}": entry.theta.numpy() for entry in made.entries},
        measured=_measured(made, listed, chosen, widest),
    )


def _measured(
    made: "Catalogue", listed: "Sequence[Entry | None]", chosen: "Sequence[Entry]", widest: str
) -> dict[str, Any]:
    """Measure the claims; those on the four points only where all four were met."""
    measured: dict[str, Any] = {
        "levels": {
            "met": [None if entry is None else round(entry.loss, 9) for entry in listed],
            "further": [round(entry.loss, 5) for entry in made.entries if entry not in chosen],
        },
        "critical": max(
            (image.raw_gradient_l1 for entry in made.entries for image in entry.images if image.network == widest),
            default=None,
        ),
    }
    if len(chosen) == len(LEVELS):
        in_widest = [next(i.inertia for i in entry.images if i.network == widest) for entry in chosen]
        measured["degeneracy"] = [signs.zero for signs in in_widest]
        measured["origin"] = [sum(entry.widths.values()) for entry in chosen]
        measured["mirror"] = [chosen[1].mirror_of == chosen[2].id, chosen[2].mirror_of == chosen[1].id]
        measured["saddles"] = [signs.negative for signs in in_widest]
    return measured


def _landscape(width: int, preset: Figure4Preset) -> "Objective":
    from torch import nn

    from thalweg.data import three_tanh
    from thalweg.nets import two_layer
    from thalweg.objective import Objective

    data = three_tanh(preset.num_points)
    return Objective(two_layer(width).double(), nn.MSELoss(), (data.inputs, data.targets))


def _trained(
    preset: Figure4Preset, context: Context, place: int, width: int, objective: "Objective"
) -> "PopulationRun":
    """Train the trials of one width from small starts."""
    import torch

    from thalweg.training import train_population

    generator = torch.Generator().manual_seed(preset.seed + place)
    starts = torch.randn(preset.num_trials, objective.num_params, generator=generator, dtype=torch.float64)
    units, done = sum(preset.widths), sum(preset.widths[:place])

    def tell(step: int, rate: float) -> None:
        text = f"width {width}: {preset.num_trials} trials at step {step:,} of {preset.steps:,}, {rate:,.0f} steps/s"
        context.progress(0.9 * (done + width * step / preset.steps) / units, text)

    return train_population(
        objective,
        starts * width ** (-preset.variance_exponent / 2),
        learning_rate=preset.learning_rate / (2 if preset.halves_loss and preset.optimizer == "gd" else 1),
        steps=preset.steps,
        optimizer=preset.optimizer,
        keep=context.folder,
        progress=tell,
    )


def _loss_rows(trained: "PopulationRun", width: int) -> list[dict[str, Any]]:
    """The median over all trials, and the band from 10 to 90 %, at each record."""
    import torch

    middle = trained.losses.nanquantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), dim=0)
    return [
        {"step": step, "loss": m, "low": low, "high": high, "net": f"width {width}"}
        for step, low, m, high in zip(trained.steps.tolist(), *middle.tolist(), strict=True)
    ]


def _listed(made: "Catalogue") -> "list[Entry | None]":
    """The entries at the figure's four levels: within 1 % of it, the last below 1e-4; each entry once."""
    left = sorted(made.entries, key=lambda entry: (sum(entry.widths.values()), -entry.loss))
    found: list[Entry | None] = []
    for level in LEVELS:
        entry = next((e for e in left if (abs(e.loss / level - 1) <= 0.01 if level else e.loss < 1e-4)), None)
        found.append(entry)
        left = [e for e in left if e is not entry]
    return found


def _diagram(made: "Catalogue", chosen: "Sequence[Entry]") -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One node for each entry and width, and edges from each to the next wider one.

    Entries that are degenerate in their own width, where units saturate and the point lies at infinity, are left out.
    """
    nodes: list[dict[str, Any]] = []
    edges: list[dict[str, Any]] = []
    for entry in made.entries:
        before = None
        if entry.inertia.zero:
            continue
        for image in entry.images:
            name = f"{entry.id} in {image.network}"
            nodes.append(
                {
                    "id": name,
                    "width": int(image.network.split(" ")[-1]),
                    "loss": entry.loss,
                    "degeneracy": image.inertia.zero,
                    "index": image.inertia.negative,
                    "label": f"{entry.loss:.5f}" if entry.loss > 1e-9 else "≈ 0",
                    "is_new": entry not in chosen,
                    "visits": entry.visits.get(image.network, 0),
                    "raw_visits": entry.raw_visits.get(image.network, 0),
                }
            )
            if before is not None:
                edges.append({"from": before, "to": name})
            before = name
    return nodes, edges


def _outputs(objective: "Objective", chosen: "Sequence[Entry]") -> list[dict[str, Any]]:
    inputs, targets = next(iter(objective.batches()))
    drawn = {f"loss {e.loss:.5f} (no. {e.id}, width {sum(e.widths.values())})": e.outputs for e in chosen}
    return [
        {"x": x, "output": y, "point": name}
        for name, values in {**drawn, "data": targets.flatten()}.items()
        for x, y in zip(inputs[:, 0].tolist(), values.tolist(), strict=True)
    ]


def figures(tables: Tables) -> "Sequence[Figure]":
    """Draw the diagram, the functions, and the trainings."""
    from thalweg.lab.figures import curves, levels

    drawn = []
    if tables["nodes"]:
        drawn.append(
            levels(
                tables["nodes"],
                tables["edges"],
                id="levels",
                title="Critical points of narrow nets are critical points of wider ones",
                caption=(
                    "Every critical point that a trial met, at its loss, in the width where it arises and, embedded, "
                    "in every wider net. The number is its degeneracy: one more with every neuron that is added. "
                    "Points at infinity, where neurons saturate, are left out; the claims list their losses."
                ),
            )
        )
    return [
        *drawn,
        curves(
            tables["outputs"],
            id="outputs",
            title="What the nets compute at the figure's critical points",
            caption="The data, a sum of three steps, and the functions at the critical points that the paper lists.",
            x="x",
            y="output",
            series="point",
        ),
        curves(
            tables["loss"],
            id="loss",
            title="Trainings",
            caption="Median mean squared error over all trials of a width, with the band from 10 to 90 %.",
            x="step",
            y="loss",
            series="net",
            lower="low",
            upper="high",
            log_x=True,
            log_y=True,
        ),
    ]


def _levels_met(measured: Mapping[str, Sequence[float | None]]) -> bool:
    return all(loss is not None for loss in measured["met"])


RECIPE = Recipe(
    name="embedding_principle/figure_4",
    title="The critical points of widths 1 and 2 are all in width 3",
    source="zhang2021embedding, figure 4",
    version=1,
    presets={"paper": PAPER, "cpu": CPU, "quick": QUICK},
    claims=(
        Claim(
            "levels",
            "Trials of widths 1, 2 and 3 meet four critical points whose output is not zero.",
            "losses 0.11, 0.07, 0.07, 1e-5",
            "0.109023, 0.0697915 (twice) within 1 %, and one below 1e-4; further points are reported beside them",
            _levels_met,
        ),
        Claim(
            "mirror",
            "The two points of loss 0.07 are mirror images of each other.",
            "yes",
            "f(x) = -g(-x) on the data, to 1e-5 of the largest output",
            lambda m: m == [True, True],
        ),
        Claim(
            "origin",
            "One arises in width 1, two in width 2, one in width 3.",
            "1, 2, 2, 3",
            "exact",
            lambda m: m == [1, 2, 2, 3],
        ),
        Claim(
            "degeneracy",
            "In width 3 their degeneracy is the number of neurons that were added.",
            "2, 1, 1, 0",
            "exact: zero eigenvalues of the Hessian at the polished points",
            lambda m: m == list(DEGENERACY),
        ),
        Claim(
            "saddles",
            "Those of narrower nets are saddles in width 3, which training can leave: negative eigenvalues.",
            "at least one, none at the last",
            "at least one at the first three, none at the fourth",
            lambda m: min(m[:3]) >= 1 and m[3] == 0,
        ),
        Claim(
            "critical",
            "Every critical point that is met, embedded into width 3, is critical there: largest L1 gradient.",
            "0",
            "at most 1e-10, at the embedded points as they are",
            lambda m: m <= 1e-10,
        ),
    ),
    run=run,
    figures=figures,
    summary=(
        "Hundreds of networks of widths 1, 2 and 3 are trained at once from small random starts. The points where "
        "they slow down are polished to exact critical points, and the same ones, up to the order and the signs of "
        "neurons, are counted once. Each critical point of a narrow net is one of the wider nets too: there it has "
        "become a saddle, flat along one direction for every neuron that was added."
    ),
)
