"""Students in training: the fused engine against a plain loop, interruptions, divergence, masks, errors."""

import copy
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.testing import assert_close

from thalweg.data import FiniteSet, GaussianStream
from thalweg.errors import CheckpointError, ConfigError, DataError, ShapeError, StructureError
from thalweg.nets import relu_cnn, relu_mlp, teacher_init_, widened
from thalweg.teacher_student import Fall, train_students

NORMS = [("none", False), ("after_relu", False), ("after_relu", True), ("before_relu", False), ("before_relu", True)]


def pair(norm: str = "none", affine: bool = False, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """A teacher without BatchNorm and its student, in float64."""
    generator = torch.Generator().manual_seed(seed)
    teacher = teacher_init_(relu_mlp((3, 4), num_inputs=5, num_outputs=6), generator).double()
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        student = widened(teacher, factor=3, norm=norm, affine=affine).double()
    return teacher, student


def stream(seed: int = 1, shape: int | tuple[int, ...] = 5) -> GaussianStream:
    return GaussianStream(shape, std=1.0, seed=seed, dtype=torch.float64)


def plain(
    teacher: nn.Module, student: nn.Module, steps: int, rates: list[float], masks: Mapping[str, Tensor]
) -> nn.Module:
    """What a script does: nn modules, MSELoss, torch.optim.SGD; one batch of 7 after another."""
    student, source = copy.deepcopy(student).train(), stream()
    optimizer, loss = torch.optim.SGD(student.parameters(), lr=1.0), nn.MSELoss()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rates[step]
        x = source(7)
        optimizer.zero_grad()
        loss(student(x), teacher(x).detach()).backward()
        optimizer.step()
        with torch.no_grad():
            for name, mask in masks.items():
                student.get_parameter(name).mul_(mask)
    return student


def require_same(state: Mapping[str, Tensor], module: nn.Module) -> None:
    expected = module.state_dict()
    assert list(state) == list(expected)
    for name, value in state.items():
        assert_close(value, expected[name], rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("engine", ["fused", "autograd"])
@pytest.mark.parametrize(("norm", "affine"), NORMS)
def test_both_engines_go_where_a_plain_loop_goes(norm: str, affine: bool, engine: str) -> None:
    teacher, student = pair(norm, affine)
    before = copy.deepcopy(student.state_dict())
    (fall,) = train_students(
        [teacher], [student], [stream()], steps=50, batch_size=7, learning_rate=0.3, engine=engine
    )
    require_same(fall.state, plain(teacher, student, 50, [0.3] * 50, {}))
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("engine", ["fused", "autograd"])
def test_masked_weights_stay_zero_and_rates_may_change(engine: str) -> None:
    teacher, student = pair("after_relu", affine=True)
    generator = torch.Generator().manual_seed(3)
    masks = {
        name: (torch.rand(student.get_parameter(name).shape, generator=generator) > 0.5).double()
        for name in ("linear1.weight", "linear2.weight", "linear2.bias")
    }
    with torch.no_grad():
        start = copy.deepcopy(student)
        for name, mask in masks.items():
            start.get_parameter(name).mul_(mask)
    (fall,) = train_students(
        [teacher], [student], [stream()], steps=20, batch_size=7, learning_rate=lambda step: 0.3 / (1 + step),
        masks=[masks], engine=engine,
    )  # fmt: skip
    require_same(fall.state, plain(teacher, start, 20, [0.3 / (1 + step) for step in range(20)], masks))
    assert bool((fall.state["linear2.weight"][masks["linear2.weight"] == 0] == 0).all())


def test_a_mask_of_a_norm_is_left_to_autograd() -> None:
    teacher, student = pair("after_relu", affine=True)
    masks = {"norm1.weight": torch.tensor([0.0] + [1.0] * 8, dtype=torch.float64)}
    (fall,) = train_students([teacher], [student], [stream()], steps=3, batch_size=7, masks=[masks])
    assert fall.state["norm1.weight"][0] == 0
    with pytest.raises(StructureError, match="linear layers alone"):
        train_students([teacher], [student], [stream()], steps=3, masks=[masks], engine="fused")


def test_a_convolutional_pair_trains_as_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = teacher_init_(relu_cnn((2, 3), image_size=6, num_outputs=4), generator).double()
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        student = widened(teacher, factor=2, norm="before_relu").double()
    source = stream(shape=(1, 6, 6))
    (fall,) = train_students([teacher], [student], [source], steps=10, batch_size=7, learning_rate=0.1)
    expected, source = copy.deepcopy(student).train(), stream(shape=(1, 6, 6))
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    for _ in range(10):
        x = source(7)
        optimizer.zero_grad()
        nn.functional.mse_loss(expected(x), teacher(x).detach()).backward()
        optimizer.step()
    require_same(fall.state, expected)


def test_what_is_observed_is_the_student_at_that_step_in_eval_mode() -> None:
    teacher, student = pair("after_relu")
    seen: list[tuple[int, int, bool]] = []

    def observe(step: int, k: int, module: nn.Module) -> dict[str, Tensor]:
        seen.append((step, k, module.training))
        return {"w": module.get_parameter("head.weight")}

    falls = train_students(
        [teacher] * 2, [student, pair("after_relu", seed=5)[1]], [stream(), stream(2)], steps=9, batch_size=7,
        observe_at=[4, 0, 9], observe=observe,
    )  # fmt: skip
    assert seen == [(step, k, False) for step in (0, 4, 9) for k in range(2)]
    for seed, fall in zip((0, 5), falls, strict=True):
        assert fall.steps == (0, 4, 9)
        assert torch.equal(fall.observations[0]["w"], pair("after_relu", seed=seed)[1].get_parameter("head.weight"))
        assert torch.equal(fall.observations[2]["w"], fall.state["head.weight"])
        assert not fall.observations[1]["w"].requires_grad
    short = train_students([teacher], [student], [stream()], steps=4, batch_size=7)[0]
    assert torch.equal(short.state["head.weight"], falls[0].observations[1]["w"])


@pytest.mark.parametrize("engine", ["fused", "autograd"])
def test_losses_are_means_of_the_steps_since_the_observation_before(engine: str) -> None:
    teacher, student = pair()
    each = train_students(
        [teacher], [student], [stream()], steps=6, batch_size=7, observe_at=range(7), engine=engine
    )[0].losses  # fmt: skip
    few = train_students(
        [teacher], [student], [stream()], steps=6, batch_size=7, observe_at=[0, 4, 6], engine=engine
    )[0].losses  # fmt: skip
    x = stream()(7)
    first = nn.functional.mse_loss(student(x), teacher(x)).detach()
    assert_close(few, torch.stack([first, each[1:5].mean(), each[5:].mean()]), rtol=1e-12, atol=0)
    assert_close(each[1], first, rtol=1e-12, atol=0)


@pytest.mark.parametrize("engine", ["fused", "autograd"])
def test_an_interrupted_training_goes_on_to_the_bit(engine: str, tmp_path: Path) -> None:
    starts = [pair("before_relu", affine=True, seed=seed) for seed in (0, 1)]
    teachers, students = zip(*starts, strict=True)
    stops_at = [9]

    def observe(step: int, k: int, module: nn.Module) -> dict[str, Tensor]:
        if k == 1 and step == stops_at[0]:
            raise KeyboardInterrupt
        return {"w/mean": module.get_parameter("head.weight").mean(), "step": torch.tensor(step)}

    def run(keep: Path | None) -> tuple[Fall, ...]:
        data = FiniteSet(torch.randn(30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(7)), seed=0)
        return train_students(
            list(teachers), list(students), [stream(), data], steps=12, batch_size=7, observe_at=[0, 3, 6, 9],
            observe=observe, engine=engine, keep=keep,
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    stops_at[0] = 0  # steps up to 6 must not be taken, nor observed, again
    resumed = run(tmp_path)
    stops_at[0] = -1
    for ours, whole in zip(resumed, run(None), strict=True):
        assert (ours.steps, ours.status) == (whole.steps, whole.status)
        assert torch.equal(ours.losses, whole.losses)
        for name, value in whole.state.items():
            assert torch.equal(ours.state[name], value), name
        for seen, expected in zip(ours.observations, whole.observations, strict=True):
            assert list(seen) == list(expected)
            assert all(torch.equal(seen[name], expected[name]) for name in expected)


def test_what_is_kept_of_another_training_or_damaged_is_not_taken_up(tmp_path: Path) -> None:
    teacher, student = pair()
    for rate in (0.1, 0.2):
        (fall,) = train_students(
            [teacher], [student], [stream()], steps=5, batch_size=7, learning_rate=rate, observe_at=[5], keep=tmp_path
        )
        require_same(fall.state, plain(teacher, student, 5, [rate] * 5, {}))
    folders = list(tmp_path.iterdir())
    assert len(folders) == 2
    for folder in folders:
        (folder / "state.safetensors").write_bytes(b"no state")
    (again,) = train_students(
        [teacher], [student], [stream()], steps=5, batch_size=7, learning_rate=0.2, observe_at=[5], keep=tmp_path
    )
    assert all(torch.equal(again.state[name], fall.state[name]) for name in fall.state)


@pytest.mark.parametrize("gone", [0, 2])
def test_without_an_observation_a_training_starts_anew(gone: int, tmp_path: Path) -> None:
    # Nothing of the interrupted one may be left in it: neither steps and losses, nor how far its source was.
    teacher, student = pair()

    def run(keep: Path | None) -> Fall:
        (found,) = train_students(
            [teacher], [student], [stream()], steps=4, batch_size=7, observe_at=[0, 2, 4], keep=keep,
            observe=lambda step, k, module: {"w": module.get_parameter("head.weight")},
        )  # fmt: skip
        return found

    run(tmp_path)
    next(tmp_path.glob(f"*/{gone}.safetensors")).unlink()
    again, whole = run(tmp_path), run(None)
    assert again.steps == whole.steps == (0, 2, 4)
    assert torch.equal(again.losses, whole.losses)
    assert all(torch.equal(again.state[name], value) for name, value in whole.state.items())


def test_what_is_trained_and_what_is_masked_tell_trainings_apart(tmp_path: Path) -> None:
    teacher, student = pair()
    square = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 6)).double()
    head_frozen, mask = copy.deepcopy(student), torch.zeros(5, 5, dtype=torch.float64)
    head_frozen.get_parameter("head.weight").requires_grad_(requires_grad=False)

    def run(start: nn.Module, **options: object) -> Fall:
        given = {"steps": 2, "batch_size": 7, "engine": "autograd", "keep": tmp_path}
        return train_students([teacher], [start], [stream()], **(given | options))[0]  # type: ignore[arg-type]

    run(student)
    assert torch.equal(run(head_frozen).state["head.weight"], student.get_parameter("head.weight"))
    run(square, masks=[{"0.weight": mask}])
    assert not run(square, masks=[{"2.weight": mask}]).state["2.weight"].any()


def test_a_pruned_student_and_a_norm_of_batches_are_trained() -> None:
    teacher, student = pair()
    mask = (torch.arange(45) % 2).reshape(9, 5).double()
    start = copy.deepcopy(student)
    start.get_parameter("linear1.weight").data.mul_(mask)
    masked = plain(teacher, start, 3, [0.05] * 3, {"linear1.weight": mask})
    prune.custom_from_mask(student.get_submodule("linear1"), "weight", mask)
    (fall,) = train_students([teacher], [student], [stream()], steps=3, batch_size=7)
    assert_close(fall.state["linear1.weight_orig"] * mask, masked.get_parameter("linear1.weight"), rtol=0, atol=1e-12)
    assert_close(fall.state["head.weight"], masked.get_parameter("head.weight"), rtol=0, atol=1e-12)
    bare = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.ReLU(), nn.Linear(4, 6))
    (fall,) = train_students([teacher], [bare.double()], [stream()], steps=3, batch_size=7)
    require_same(fall.state, plain(teacher, bare, 3, [0.05] * 3, {}))
    with pytest.raises(StructureError, match="whose BatchNorms have running statistics"):
        call(teachers=[bare])


def test_a_pair_that_diverges_stops_and_the_others_go_on() -> None:
    teacher, student = pair()
    wild = copy.deepcopy(student)
    with torch.no_grad():
        wild.get_parameter("head.weight").mul_(1e80)
    falls = train_students(
        [teacher] * 2, [wild, student], [stream(), stream()], steps=20, batch_size=7, observe_at=[0, 10, 20],
        observe=lambda step, k, module: {"step": torch.tensor(step)},
    )  # fmt: skip
    assert [fall.status for fall in falls] == ["diverged", "done"]
    assert falls[0].steps == (0,)
    assert len(falls[0].observations) == 1
    assert all(torch.equal(falls[0].state[name], value) for name, value in wild.state_dict().items())
    require_same(falls[1].state, plain(teacher, student, 20, [0.05] * 20, {}))


def test_a_fall_is_written_into_a_module_and_progress_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = pair("after_relu")
    told: list[tuple[float, str]] = []
    monkeypatch.setattr("thalweg.teacher_student.training._TOLD_EVERY", 0.0)
    (fall,) = train_students(
        [teacher],
        [student],
        [stream()],
        steps=5,
        batch_size=7,
        progress=lambda share, text: told.append((share, text)),
    )
    assert told[-1] == (1.0, "student, step 5 of 5")
    fall.write(student)
    require_same(fall.state, student)
    with pytest.raises(CheckpointError):
        fall.write(pair("none")[1])


FLAT = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).double()


def call(**changed: object) -> tuple[Fall, ...]:
    teacher, student = pair()
    given: dict[str, object] = {"teachers": [teacher], "students": [student], "sources": [stream()], "steps": 2}
    return train_students(**(given | changed))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"steps": 0}, ConfigError, "at least one step"),
        ({"learning_rate": -0.1}, ConfigError, "not negative"),
        ({"learning_rate": lambda step: float("nan")}, ConfigError, "not negative"),
        ({"observe_at": [3]}, ConfigError, "from 0 to 2"),
        ({"batch_size": 0}, ConfigError, "batch size of at least 1"),
        ({"engine": "fastest"}, ConfigError, "auto, fused, autograd"),
        ({"workers": 0}, ConfigError, "at least one worker"),
        ({"sources": [lambda n: torch.zeros(n, 5).double()], "keep": "here"}, ConfigError, "load_state"),
        ({"students": []}, ShapeError, "as many"),
        ({"masks": [{"linear1.weight": torch.ones(2)}]}, ShapeError, "masks by the names"),
        ({"masks": [{"linear9.weight": torch.ones(2)}]}, ShapeError, "masks by the names"),
        ({"sources": [lambda n: torch.zeros(n - 1, 5).double()]}, DataError, "64 samples"),
        ({"sources": [lambda n: torch.zeros(n, 5)]}, DataError, "float64"),
        ({"teachers": [relu_mlp((3, 4), num_inputs=5, num_outputs=7).double()]}, ShapeError, "outputs of one shape"),
        ({"sources": [stream(shape=4)]}, ShapeError, r"Got \(64, 4\)"),
        ({"teachers": [FLAT], "students": [FLAT], "sources": [stream(shape=(3, 5))]}, ShapeError, "no Flatten"),
        ({"teachers": [pair()[0].to("meta")]}, DataError, "one device"),
        ({"teachers": [pair()[0].float()]}, DataError, "one floating type"),
        ({"students": [pair()[1].requires_grad_(requires_grad=False)]}, StructureError, "parameters to train"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_said(changed: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(**changed)


def test_pairs_that_do_not_fit_are_said(tmp_path: Path) -> None:
    teacher, student = pair()
    source = stream()
    with pytest.raises(ConfigError, match="of its own"):
        call(teachers=[teacher] * 2, students=[student] * 2, sources=[source] * 2)
    with pytest.raises(ShapeError, match="one architecture"):
        call(teachers=[teacher] * 2, students=[student, pair("after_relu")[1]], sources=[stream(), stream()])
    still, dropping = (nn.Sequential(nn.Dropout(p), student) for p in (0.0, 0.1))
    with pytest.raises(StructureError, match="without dropout"):
        call(teachers=[teacher] * 2, students=[still, dropping], sources=[stream(), stream()])
    with pytest.raises(ConfigError, match="at least 2"):
        call(students=[pair("after_relu")[1]], batch_size=1)
    frozen = pair()[1]
    frozen.get_parameter("head.bias").requires_grad_(requires_grad=False)
    with pytest.raises(StructureError, match="trained whole"):
        call(students=[frozen], engine="fused")
    (fall,) = call(students=[frozen])
    assert torch.equal(fall.state["head.bias"], frozen.get_parameter("head.bias"))
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(CheckpointError):
        call(keep=blocked, observe_at=[2])
