"""The paper's matrix dynamics (theorem 2) as they are, in a two-layer network with biases: what V_r does there."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from thalweg.errors import ConfigError

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class MatrixCourse:
    """Fan-out norms along the matrix dynamics.

    Args:
        steps: at which they were recorded, 0 first.
        relevant: ‖v_j‖ of the students that started near a teacher.
        irrelevant: of all others.
        alignment: |cos| of the angle between each relevant student and its teacher, biases included, at the end.
    """

    steps: tuple[int, ...]
    relevant: Float[Tensor, "times teachers"]
    irrelevant: Float[Tensor, "times others"]
    alignment: Float[Tensor, " teachers"]


def matrix_course(
    widths: tuple[int, int, int],
    generator: torch.Generator,
    *,
    factor: int = 2,
    step: float = 0.05,
    steps: int = 20_000,
    batch_size: int = 64,
    perturbation: float = 0.1,
    record_every: int = 100,
) -> MatrixCourse:
    """Follow W += η (L* W* H*ᵀ - L W Hᵀ) in both layers from a student of which some nodes are near the teacher's.

    Args:
        widths: inputs, hidden nodes m and outputs. The authors': 10, 20, 30.
        generator: of weights and inputs, which are N(0, 1).
        factor: students per teacher node, n / m. Default: the authors' (`--node_multi`).
        step: η. Default: the authors'.
        steps: number of steps. Default: the authors'.
        batch_size: new inputs at each step, over which L, D and their kin are averaged. Default: the authors'.
        perturbation: standard deviation, above 0, of the normal noise that all students' weights are; those of
            the relevant ones are added to the teacher's. Default: the authors' (`--init_std`, `--perturb`).
        record_every: steps from one record to the next.

    Returns:
        The course of ‖v_j‖.

    Raises:
        ConfigError: a number is out of its range.

    Source:
        tian2019luck (arXiv 1905.13405), equation 6, and its code's check of theorem 5 (test_multilayer): N(0, 1)
        inputs; teachers of multiples of a quarter, without biases; a row of biases in the student's W and V; columns
        (with their bias) normalised at the start and after each step.

    Example:
        >>> course = matrix_course((4, 3, 5), torch.Generator().manual_seed(0), steps=10, record_every=5)
        >>> course.steps, tuple(course.irrelevant.shape)
        ((0, 5, 10), (3, 3))
    """
    if min(*widths, factor - 1, steps, batch_size, record_every) < 1 or not (
        0 < step < math.inf and 0 < perturbation < math.inf
    ):
        raise ConfigError(
            "Expected positive widths and counts, a factor of 2 or more, a positive step and perturbation. "
            f"Got {widths}, {factor}, {steps}, {batch_size}, {record_every}, {step}, {perturbation}. Change them."
        )
    teacher, student = _started(widths, factor, perturbation, generator)
    m = widths[1]
    times, norms = [0], [student[1][:-1].norm(dim=1)]
    for number, x in enumerate(_batches(widths[0], steps, batch_size, generator), 1):
        student = _moved(teacher, student, x, step)
        if number % record_every == 0 or number == steps:
            times.append(number)
            norms.append(student[1][:-1].norm(dim=1))
    found = torch.stack(norms)
    alignment = (student[0][:, :m] * teacher[0]).sum(0).abs()
    return MatrixCourse(tuple(times), found[:, :m], found[:, m:], alignment)


def _started(
    widths: tuple[int, int, int], factor: int, noise: float, generator: torch.Generator
) -> tuple[Pair, Pair]:
    """Draw a teacher and a student, each (inputs + 1, nodes) and (nodes + 1, outputs), columns of norm 1."""
    d, m, c = widths
    n = factor * m

    def drawn(rows: int, columns: int) -> Tensor:
        return noise * torch.randn((rows, columns), generator=generator, dtype=torch.float64)

    teacher = _grid(d, m, generator), _grid(m, c, generator)
    w, v = drawn(d + 1, n), drawn(n + 1, c)
    w[:, :m] += teacher[0]
    v[:m] += teacher[1][:-1]
    return teacher, (_columns(w), _columns(v))


def _grid(inputs: int, nodes: int, generator: torch.Generator) -> Tensor:
    """Draw a layer of the teacher: unit columns, different multiples of a quarter before that, without biases."""
    columns: list[Tensor] = []
    while len(columns) < nodes:
        drawn = torch.randint(-2, 3, (inputs,), generator=generator).double() / 4
        if bool(drawn.any()) and not any(torch.equal(drawn, other) for other in columns):
            columns.append(drawn)
        elif 5**inputs - 1 < nodes:
            raise ConfigError(
                f"Expected at most {5**inputs - 1} nodes behind {inputs} inputs. Got {nodes}. Change the widths."
            )
    return _columns(torch.cat([torch.stack(columns, 1), torch.zeros((1, nodes), dtype=torch.float64)]))


def _batches(width: int, steps: int, batch_size: int, generator: torch.Generator) -> Iterable[Tensor]:
    ones = torch.ones((batch_size, 1), dtype=torch.float64)
    for _ in range(steps):
        yield torch.cat([torch.randn((batch_size, width), generator=generator, dtype=torch.float64), ones], 1)


def _moved(teacher: Pair, student: Pair, x: Tensor, step: float) -> Pair:
    """Take one step of both layers from the same point."""
    (w_star, v_star), (w, v) = teacher, student
    size, ones = len(x), x[:, -1:]
    f_star, f = (x @ w_star).relu(), (x @ w).relu()
    gate_star, gate = (f_star > 0).to(x), (f > 0).to(x)
    top_star, top = torch.cat([f_star, ones], 1), torch.cat([f, ones], 1)
    h_star = (gate.T @ gate_star / size) * (v[:-1] @ v_star[:-1].T)
    h = (gate.T @ gate / size) * (v[:-1] @ v[:-1].T)
    second_moment = x.T @ x / size  # L_0 = L*_0
    new_w = w + step * (second_moment @ (w_star @ h_star.T - w @ h.T))
    new_v = v + step * (top.T @ (top_star @ v_star - top @ v) / size)
    return _columns(new_w), _columns(new_v)


def _columns(w: Tensor) -> Tensor:
    unit: Tensor = w / w.norm(dim=0)
    return unit
