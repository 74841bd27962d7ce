"""Theorems 3, 4 and 5: norms that BatchNorm conserves, nodes that snap to their teachers, fan-outs that vanish.

Counts as reproduced: in the authors' matrix dynamics the fan-outs of irrelevant students vanish; where the premises
hold, angles and fan-outs contract at least as fast as the theorems promise; gradients are orthogonal to weights.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from thalweg.errors import ConfigError
from thalweg.lab.claims import Claim
from thalweg.lab.parts import Share
from thalweg.lab.recipe import Context, Outcome, Preset, Recipe
from thalweg.lab.tables import Table, Tables
from thalweg.recipes.luck_matters.matrix_runs import bands, matrix_courses, ratios_of

if TYPE_CHECKING:
    import torch

    from thalweg.lab.figures import Figure
    from thalweg.teacher_student import Bound, Constants, Course

_ENOUGH = 6_000  # iterations for which facts about the original's run are known
_STD_OF_RADIAL = 10.0  # of the inputs: the paper's GAUS


class Theorem5Preset(Preset):
    """Parameters of the check of theorem 5, the authors' where they have one."""

    num_runs: int = Field(default=5, ge=1)
    """Runs of the matrix dynamics, each from its own seed. Theirs: 5 for all experiments."""
    widths: tuple[int, int, int] = (10, 20, 30)
    """Inputs, teacher nodes and outputs of the matrix dynamics."""
    factor: int = 2
    """Students per teacher node there."""
    learning_rate: float = 0.05
    """Step size there."""
    perturbation: float = 0.1
    """Standard deviation of the noise that students start from, relevant ones around their teachers (the authors)."""
    batch_size: int = 64
    """Inputs of each step."""
    iterations: int = 20_000
    """Steps of the matrix dynamics."""
    record_every: int = 100
    """Steps from one record to the next."""
    teachers: int = Field(default=3, ge=2)
    """Teacher nodes where the premises hold: ours, as the paper shows no such case."""
    students: int = 6
    """Students there, one for each clone of inputs."""
    num_inputs: int = 10
    """Dimension of the inputs there."""
    num_outputs: int = 4
    """Outputs there."""
    copies: int = 400
    """Inputs of each clone; one more at the sum of each two vertices makes nodes overlap a little."""
    noise: float = 0.005
    """Standard deviation of the clones: so small that no gate changes within the angle."""
    angle: float = 0.12
    """Angle between nodes and their teachers at the start, in radians."""
    fan_out_error: float = 0.2
    """Distance of the u-set's fan-out from the teacher's at the start."""
    step: float = 0.1
    """Step size there."""
    steps: int = 1_500
    """Steps there."""
    hidden: tuple[int, ...] = (20, 30)
    """Hidden widths of the networks with BatchNorm."""
    step_sizes: tuple[float, ...] = (0.1, 0.05, 0.025, 0.0125)
    """Step sizes between which the drift of norms is compared."""
    time: float = 2.0
    """Time over which norms drift: steps times step size."""

    @model_validator(mode="after")
    def _fits(self) -> "Theorem5Preset":
        m, n, d = self.teachers, self.students, self.num_inputs
        if not m < n <= d:
            raise ConfigError(f"Expected teachers < students <= num_inputs. Got {m}, {n}, {d}. Change them.")
        return self


PAPER = Theorem5Preset()
CPU = PAPER.model_copy(update={"num_runs": 3, "iterations": 6_000})
QUICK = PAPER.model_copy(
    update={
        "num_runs": 2,
        "iterations": 300,
        "record_every": 20,
        "steps": 400,
        "step": 0.4,
        "hidden": (8, 8),
        "time": 1.0,
    }
)


def run(preset: Theorem5Preset, context: Context) -> Outcome:
    """Run the matrix dynamics, theorems 4 and 5 where their premises hold, and theorem 3."""
    context.progress(0.0, "theorems 4 and 5 where their premises hold")
    tables, measured = _separated(preset)
    context.progress(0.1, "theorem 3")
    radial, drifts, exponents = _conserved(preset)
    courses = matrix_courses(preset, Share(context, 0.2, 1.0))
    ratios = [ratios_of(course) for course in courses]
    for name in ("extremes", "medians"):
        measured[name] = {"iterations": preset.iterations, "ratios": [r[name] for r in ratios]}
    measured["orthogonal"] = {f"{row['norm']}, {row['biases']}": row["radial"] for row in radial}
    measured["conserved"] = exponents
    tables |= {"fan_out": bands(courses), "radial": radial, "drift": drifts}
    tables["runs"] = [{"run": i + 1, **r} for i, r in enumerate(ratios)]
    context.progress(1.0, f"{preset.num_runs} runs")
    return Outcome(tables=tables, measured=measured)


def _separated(preset: Theorem5Preset) -> tuple[dict[str, Table], dict[str, object]]:
    """Simulate theorems 4 and 5 in separated clones that overlap a little, and take their bounds."""
    import torch

    from thalweg.teacher_student import (
        bound_of_theorem_4,
        bound_of_theorem_5,
        drawn_near,
        matched_course,
        measured_constants,
        modulated_course,
        sample_overlaps,
        simplex_clones,
    )

    generator = torch.Generator().manual_seed(preset.seed)
    m, n = preset.teachers, preset.students
    w, inputs = simplex_clones(n, preset.num_inputs, generator, copies=preset.copies, noise=preset.noise, shared=1)
    overlaps = sample_overlaps(inputs)
    options: dict[str, Any] = {"angle": preset.angle, "generator": generator}
    start = w.clone()
    start[:m] = drawn_near(w[:m], preset.angle, 1, generator)[:, 0]
    v = _unit_rows(n, preset.num_outputs, generator)
    v_start = v.clone()
    v_start[:m] += preset.fan_out_error * _unit_rows(m, preset.num_outputs, generator)
    sizes: dict[str, Any] = {"step": preset.step, "steps": preset.steps, "record_every": 5}
    fourth = matched_course(w[:m], start[:m], overlaps, **sizes)
    fifth = modulated_course((w[:m], v[:m]), (start, v_start), overlaps, **sizes)
    among_teachers, among_all = (measured_constants(overlaps, nodes, **options) for nodes in (w[:m], w))
    overlap = float(overlaps.gates(start[:m], w[:m]).diag().min())
    of_4 = bound_of_theorem_4(among_teachers, nodes=m, step=preset.step, start_overlap=overlap)
    fan: dict[str, Any] = {"fan_out": 1.0, "fan_out_error": preset.fan_out_error}
    of_5 = bound_of_theorem_5(among_all, teachers=m, students=n, step=preset.step, **fan)
    courses, gaussian = _lines(fourth, fifth), _gaussian(preset, generator)
    rows = [_row("4", "separated", of_4, among_teachers), _row("5", "separated", of_5, among_all), gaussian]
    found = {name: _fall(fifth.steps, line) for name, line in _quantities(fifth).items()}
    measured: dict[str, object] = {
        "theorem_4": {"angles": _fall(fourth.steps, fourth.angles.sin().amax(1)), "bound": of_4.rate},
        "unlucky": {"unlucky": found["V_r"], "bound": of_5.rate},
        "lucky": {"W_u": found["W_u"], "V_u": found["V_u"], "bound": of_5.rate},
    }
    return {"courses": courses, "bounds": rows}, measured


def _quantities(course: "Course") -> "dict[str, torch.Tensor]":
    lines = {"W_u": course.angles.sin(), "V_u": course.fan_out_errors, "V_r": course.unlucky_norms}
    return {name: values.amax(1) for name, values in lines.items() if values is not None}


def _fall(steps: Sequence[int], values: "torch.Tensor") -> dict[str, float]:
    from thalweg.teacher_student import fitted_rate

    return {"rate": fitted_rate(steps, values), "start": float(values[0]), "end": float(values[-1])}


def _lines(fourth: "Course", fifth: "Course") -> Table:
    lines = {"angle (theorem 4)": (fourth.steps, fourth.angles.sin().amax(1))}
    named = {"W_u": "angle of the u-set", "V_u": "fan-out error of the u-set", "V_r": "fan-out of the r-set"}
    lines |= {named[name]: (fifth.steps, values) for name, values in _quantities(fifth).items()}
    return [
        {"quantity": name, "step": step, "value": float(value)}
        for name, (steps, values) in lines.items()
        for step, value in zip(steps, values, strict=True)
    ]


def _gaussian(preset: Theorem5Preset, generator: "torch.Generator") -> dict[str, Any]:
    """Ask for theorem 5's bound under the authors' inputs (biases left out)."""
    from thalweg.teacher_student import GAUSSIAN, bound_of_theorem_5, measured_constants

    d, m, _ = preset.widths
    nodes = _unit_rows(preset.factor * m, d, generator)
    found = measured_constants(GAUSSIAN, nodes, angle=preset.angle, generator=generator, draws=4)
    fan = {"fan_out": 1.0, "fan_out_error": preset.fan_out_error}
    bound = bound_of_theorem_5(found, teachers=m, students=len(nodes), step=preset.learning_rate, **fan)
    return _row("5", "Gaussian", bound, found)


def _row(theorem: str, inputs: str, bound: "Bound", found: "Constants") -> dict[str, Any]:
    row = {"theorem": theorem, "inputs": inputs, "rate": bound.rate, "gamma": bound.gamma, "vacuous": bound.reason}
    return row | {"eps_d": found.eps_d, "eps_l": found.eps_l, "K_d": found.lipschitz_d, "K_l": found.lipschitz_l}


def _unit_rows(rows: int, columns: int, generator: "torch.Generator") -> "torch.Tensor":
    import torch

    drawn = torch.randn((rows, columns), generator=generator, dtype=torch.float64)
    unit: torch.Tensor = drawn / drawn.norm(dim=1, keepdim=True)
    return unit


def _conserved(preset: Theorem5Preset) -> tuple[Table, Table, dict[str, float]]:
    """Measure theorem 3 in networks with BatchNorm at both places, and the drift without."""
    import torch

    from thalweg.nets import relu_mlp, teacher_init_
    from thalweg.teacher_student import norm_drift, radial_gradients, without_biases_

    generator = torch.Generator().manual_seed(preset.seed)
    x = torch.randn((128, 20), generator=generator, dtype=torch.float64)
    y = torch.randn((128, 10), generator=generator, dtype=torch.float64)

    def loss(outputs: "torch.Tensor") -> "torch.Tensor":
        return 0.5 * (outputs - y).square().sum(1).mean()

    radial: Table = []
    drifts: Table = []
    exponents: dict[str, float] = {}
    for place in ("after_relu", "before_relu", "none"):
        net = relu_mlp(preset.hidden, num_inputs=20, num_outputs=10, norm=place, eps=1e-30).double()
        teacher_init_(net, torch.Generator().manual_seed(preset.seed))
        if place != "none":
            for biases in ("with biases", "without"):
                layers = radial_gradients(net, loss, _STD_OF_RADIAL * x)
                worst = max(float(layer.conserved.max()) for layer in layers)
                dead = sum(layer.num_dead for layer in layers)
                radial.append({"norm": place, "biases": biases, "radial": worst, "dead": dead})
                without_biases_(net)
        drift = norm_drift(without_biases_(net), loss, x, step_sizes=preset.step_sizes, time=preset.time)
        exponents[place] = drift.exponent
        pairs = zip(drift.step_sizes, drift.drifts, strict=True)
        drifts += [{"norm": place, "step_size": size, "drift": value} for size, value in pairs]
    return radial, drifts, exponents


def figures(tables: Tables) -> "Sequence[Figure]":
    """Draw fan-outs, contraction where the premises hold, and the drift of norms."""
    from thalweg.lab.figures import curves

    return [
        curves(
            tables["fan_out"],
            id="fan_out",
            title="Fan-outs of relevant and irrelevant students",
            caption="Norms of the rows of V in the authors' matrix dynamics: median, with the range over all nodes.",
            x="step",
            y="norm",
            series="set",
            lower="least",
            upper="most",
            log_y=True,
            y_title="‖v_j‖",
        ),
        curves(
            tables["courses"],
            id="separated",
            title="Where the premises hold",
            caption="Largest sine of the angle to the teacher, and largest norms of V, down to rounding.",
            x="step",
            y="value",
            series="quantity",
            log_y=True,
        ),
        curves(
            tables["drift"],
            id="drift",
            title="Drift of norms in a fixed time",
            caption="Mean change of ‖w_j‖²: of the order of the step with BatchNorm, not falling with it without.",
            x="step_size",
            y="drift",
            series="norm",
            log_x=True,
            log_y=True,
            x_title="step size",
        ),
    ]


def _all_above(measured: dict[str, Any], least: float) -> bool | None:
    if measured["iterations"] < _ENOUGH:
        return None
    return all(ratio >= least for ratio in measured["ratios"])


def _as_promised(measured: dict[str, Any]) -> bool | None:
    """Hold fitted rates against the bound, and ends against the starts."""
    if measured["bound"] is None:
        return None
    falls = [fall for name, fall in measured.items() if name != "bound"]
    return all(fall["rate"] <= measured["bound"] and fall["end"] <= 1e-6 * fall["start"] for fall in falls)


_PROMISED = "fitted rate at most the bound, and end at most 1e-6 of the start; untested where the bound is vacuous"

RECIPE = Recipe(
    name="luck_matters/theorem_5",
    title="Lucky students converge, fan-outs of the others vanish",
    source="tian2019luck, theorems 3, 4 and 5",
    version=1,
    presets={"paper": PAPER, "cpu": CPU, "quick": QUICK},
    claims=(
        Claim(
            "extremes",
            "Every relevant fan-out stays and every irrelevant one vanishes: least relevant over largest irrelevant.",
            "about 640 to 24,000 at 20,000 iterations (the authors' README, norms of about 1 over 4e-5 to 1.5e-3)",
            "at least 10 in every run, from 6,000 iterations (there the original's own code gave 0.96 / 0.09)",
            lambda m: _all_above(m, 10),
        ),
        Claim(
            "medians",
            "The same of medians: relevant over irrelevant.",
            "about 400 in the original's own code at 6,000 iterations",
            "at least 100 in every run, from 6,000 iterations",
            lambda m: _all_above(m, 100),
        ),
        Claim(
            "unlucky",
            "Where the premises of theorem 5 hold, V_r goes to 0: fitted factor per step, and the promised one.",
            "at most 1 - step · λ̄ · γ (equations 41 to 54)",
            _PROMISED,
            _as_promised,
        ),
        Claim(
            "lucky",
            "There W_u goes to W* and V_u to V*: fitted factors per step, and the promised one.",
            "at most 1 - step · λ̄ · γ",
            _PROMISED,
            _as_promised,
        ),
        Claim(
            "theorem_4",
            "With as many students as teachers angles go to 0: fitted factor per step, and the promised one.",
            "at most 1 - step · d̄ · γ (theorem 4, with d̄ as in equation 43)",
            _PROMISED,
            _as_promised,
        ),
        Claim(
            "orthogonal",
            "With BatchNorm before or after the ReLU no gradient is along its weights: largest |w·∂w| / (‖w‖‖∂w‖).",
            "0 (theorem 3)",
            "at most 1e-10 in float64 at ε = 1e-30; with biases behind a ReLU, of weights and bias together",
            lambda m: all(v <= 1e-10 for v in m.values()),
        ),
        Claim(
            "conserved",
            "With BatchNorm the flow conserves norms: exponent of the drift over the step size.",
            "1 with BatchNorm at either place (first order of the step); 0 without",
            "within 0.15 of 1 with BatchNorm",
            lambda m: all(abs(m[place] - 1) <= 0.15 for place in ("after_relu", "before_relu")),
        ),
    ),
    run=run,
    figures=figures,
    num_threads=1,
    summary=(
        "The authors' matrix dynamics of a two-layer network, from a student of which half the nodes start near the "
        "teacher's: fan-outs of the other half vanish. Its inputs satisfy none of the premises, and the theorem "
        "promises no rate there. Inputs in separated clones, ours, do satisfy them; there fitted rates stand beside "
        "those of theorems 4 and 5. Theorem 3 is measured twice: gradients are orthogonal to the weights before a "
        "BatchNorm, and the drift of their norms in a fixed time falls with the step size."
    ),
)
