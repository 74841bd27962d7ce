"""Figure 1: a wide net first stagnates at the function of a width-1 net, and ends at that of a width-3 net.

Two recipes. PAPER is the text's: full-batch gradient descent, rate 0.005, 300,000 steps. It shows the plateau and its
function, but does not leave it in that time, so that it supports the first two claims only; the published time axis
is not that of this recipe. CPU and QUICK use Adam, which shows the published story to its end and supports all
claims.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from thalweg.lab.claims import Claim
from thalweg.lab.recipe import Context, Outcome, Preset, Recipe
from thalweg.lab.tables import Tables

if TYPE_CHECKING:
    from torch import Tensor

    from thalweg.lab.figures import Figure
    from thalweg.objective import Objective
    from thalweg.training import PopulationRun

BAND = 0.05
"""A loss within this fraction of the width-1 optimum's counts as being on its plateau."""
FITTED = 1e-3
"""A loss below this counts as having left all plateaux."""


class Figure1Preset(Preset):
    """Parameters of figure 1."""

    width: int = 500
    """Width of the net."""
    num_points: int = 50
    """Training points on [-15, 15]."""
    optimizer: Literal["gd", "adam"] = "gd"
    """Full-batch optimizer."""
    learning_rate: float = 0.005
    """Its learning rate; on the mean squared error."""
    steps: int = 300_000
    """Its number of steps."""
    variance_exponent: float = 3.0
    """All parameters start from N(0, 1/m^this), m the width."""
    narrow_trials: int = 16
    """Trainings that find the optima of widths 1, 2 and 3 (ours; the best of each is polished)."""
    narrow_steps: int = 6_000
    """Their Adam steps, at a rate of 0.01."""


PAPER = Figure1Preset()
CPU = PAPER.model_copy(update={"optimizer": "adam", "learning_rate": 1e-3, "steps": 12_000})
QUICK = CPU.model_copy(update={"width": 100, "steps": 8_000})


def run(preset: Figure1Preset, context: Context) -> Outcome:
    """Find the narrow optima, train the wide net, and compare what they compute."""
    import torch

    from thalweg.nets import two_layer

    optima = {width: _optimum(preset, context, width) for width in (1, 2, 3)}
    trained = _trained(preset, context)
    steps, losses = trained.steps, trained.losses[0]
    slowest = _slowest(trained, optima[1][0])
    grid = torch.linspace(-15, 15, 601, dtype=torch.float64).unsqueeze(1)

    def function(width: int, theta: "Tensor") -> "Tensor":
        return _landscape(two_layer(width).double(), grid).outputs(theta)[:, 0]

    narrow = {width: function(width, theta) for width, (_, theta) in optima.items()}
    drawn = {"width 1, optimum": narrow[1], "width 3, optimum": narrow[3]}
    measured: dict[str, Any] = {
        "plateau": _share_on_plateau(steps, losses, optima[1][0]),
        "escape": float(losses[-1]),
    }
    if slowest is not None:
        drawn[f"width {preset.width}, on the plateau"] = function(preset.width, slowest)
        measured["narrow_output"] = float((drawn[f"width {preset.width}, on the plateau"] - narrow[1]).abs().max())
    end = function(preset.width, trained.thetas[0])
    drawn[f"width {preset.width}, at the end"] = end
    if float(losses[-1]) <= FITTED:
        measured["wide_output"] = float((end - narrow[3]).abs().max())
    rows = [{"step": s, "loss": v, "net": f"width {preset.width}"} for s, v in _pairs(steps, losses)]
    ends = (1, int(steps[-1]))
    rows += [{"step": s, "loss": optima[w][0], "net": f"optimum of width {w}"} for w in (1, 2) for s in ends]
    outputs = [
        {"x": x, "output": y, "network": name}
        for name, values in drawn.items()
        for x, y in zip(grid[:, 0].tolist()[::5], values.tolist()[::5], strict=True)
    ]
    arrays = {"theta": trained.thetas[0].numpy()} | ({} if slowest is None else {"slowest": slowest.numpy()})
    return Outcome(tables={"loss": rows, "outputs": outputs}, arrays=arrays, measured=measured)


def _pairs(steps: "Tensor", losses: "Tensor") -> list[tuple[int, float]]:
    return list(zip(steps.tolist(), losses.tolist(), strict=True))


def _landscape(module: Any, inputs: "Tensor | None" = None, num_points: int = 50) -> "Objective":
    from torch import nn

    from thalweg.data import three_tanh
    from thalweg.objective import Objective

    data = three_tanh(num_points)
    pair = (data.inputs, data.targets) if inputs is None else (inputs, inputs)
    return Objective(module, nn.MSELoss(), pair)


def _optimum(preset: Figure1Preset, context: Context, width: int) -> "tuple[float, Tensor]":
    """Train a few narrow nets, polish their ends, and give loss and point of the best."""
    import torch

    from thalweg.nets import two_layer
    from thalweg.training import polish_all, train_population

    context.progress(0.05 * width, f"optimum of width {width}")
    objective = _landscape(two_layer(width).double(), num_points=preset.num_points)
    generator = torch.Generator().manual_seed(preset.seed + 1000 + width)
    starts = torch.randn(preset.narrow_trials, objective.num_params, generator=generator, dtype=torch.float64)
    run = train_population(
        objective,
        starts * width**-1.5,
        learning_rate=0.01,
        steps=preset.narrow_steps,
        optimizer="adam",
        keep=context.folder,
    )
    points = polish_all(objective, run.thetas)
    best = int(points.values.argmin())
    return float(points.values[best]), points.thetas[best]


def _trained(preset: Figure1Preset, context: Context) -> "PopulationRun":
    """Train the wide net, its loss recorded at even and at logarithmic distances."""
    import torch

    from thalweg.nets import gaussian_init_, two_layer
    from thalweg.training import recording_steps, train_population

    net = two_layer(preset.width).double()
    objective = _landscape(net, num_points=preset.num_points)
    generator = torch.Generator().manual_seed(preset.seed)
    start = objective.theta(gaussian_init_(net, float(preset.width) ** -preset.variance_exponent, generator))
    even = set(range(0, preset.steps, max(1, preset.steps // 500)))

    def tell(step: int, rate: float) -> None:
        context.progress(0.2 + 0.75 * step / preset.steps, f"step {step:,} of {preset.steps:,}, {rate:,.0f} steps/s")

    return train_population(
        objective,
        start.unsqueeze(0),
        learning_rate=preset.learning_rate,
        steps=preset.steps,
        optimizer=preset.optimizer,
        record=sorted(even | recording_steps(preset.steps, "log")),
        keep=context.folder,
        progress=tell,
    )


def _share_on_plateau(steps: "Tensor", losses: "Tensor", level: float) -> float:
    """Share of the steps before the data are fitted (or of all) at which the loss is that of the width-1 optimum."""
    fitted = (losses <= FITTED).nonzero()
    last = int(fitted[0]) if len(fitted) else len(steps) - 1
    inside = (losses / level - 1).abs() <= BAND
    lengths = steps[1 : last + 1] - steps[:last]
    both = inside[1 : last + 1] & inside[:last]
    return float((lengths * both).sum() / steps[last])


def _slowest(trained: "PopulationRun", level: float) -> "Tensor | None":
    """The point of least gradient while the loss is that of the width-1 optimum; None if it never is."""
    inside = (trained.least_losses[0] / level - 1).abs() <= BAND
    if not bool(inside.any()):
        return None
    norms = trained.least_l1[0].clone()
    norms[~inside] = float("inf")
    return trained.least_thetas[0, int(norms.argmin())]


def figures(tables: Tables) -> "Sequence[Figure]":
    """Draw the loss with the levels of narrow nets, and the functions."""
    from thalweg.lab.figures import curves

    return [
        curves(
            tables["loss"],
            id="loss",
            title="A wide net lingers at the losses of narrower ones",
            caption="Mean squared error along the training, and the least ones that widths 1 and 2 can reach.",
            x="step",
            y="loss",
            series="net",
            log_x=True,
            log_y=True,
        ),
        curves(
            tables["outputs"],
            id="outputs",
            title="What it computes meanwhile",
            caption=(
                "On the plateau the wide net computes what the best net of width 1 computes; at the end, what width "
                "3 can represent."
            ),
            x="x",
            y="output",
            series="network",
        ),
    ]


def _small(bound: float) -> Any:
    def holds(measured: float) -> bool:
        return measured <= bound

    return holds


def _enough(measured: float) -> bool:
    return measured >= 0.05


RECIPE = Recipe(
    name="embedding_principle/figure_1",
    title="A wide net stagnates at a narrower net's function",
    source="zhang2021embedding, figure 1",
    version=1,
    presets={"paper": PAPER, "cpu": CPU, "quick": QUICK},
    claims=(
        Claim(
            "plateau",
            "Training stagnates at the loss of the best width-1 net.",
            "a plateau at 0.11",
            "at least 5 % of the steps before the loss falls below 1e-3 (of all, if it never does) are within 5 % of "
            "the loss of the width-1 optimum",
            _enough,
        ),
        Claim(
            "narrow_output",
            "There it computes what the best width-1 net computes.",
            "curves 0.1 apart",
            "at most 0.25 apart on [-15, 15], at the point of least gradient on the plateau",
            _small(0.25),
        ),
        Claim(
            "escape",
            "It leaves the plateau and fits the data: loss at the end.",
            "2.4e-4",
            "at most 1e-3 (the text's own recipe, preset paper, does not get there)",
            _small(FITTED),
        ),
        Claim(
            "wide_output",
            "Then it computes what the best width-3 net computes.",
            "curves on top of each other",
            "at most 0.15 apart on [-15, 15]; untested where the data are not fitted",
            _small(0.15),
        ),
    ),
    run=run,
    figures=figures,
    summary=(
        "A net of 500 neurons, started small, first learns what one neuron can: its loss and its function stay for "
        "thousands of steps at those of the best net of width 1, whose critical point is embedded in its landscape "
        "as a saddle. Later it leaves for what three neurons can represent, which here is the truth."
    ),
)
