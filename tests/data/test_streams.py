"""Streams of inputs: what they draw, that cutting changes nothing, and that they go on where they stopped."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from thalweg.data import AugmentedImages, FiniteSet, GaussianStream
from thalweg.errors import ConfigError, DataError

Stream = GaussianStream | FiniteSet | AugmentedImages


def images(count: int = 5) -> Tensor:
    return torch.arange(1.0, count * 16 + 1).reshape(count, 1, 4, 4)


MAKERS: dict[str, Callable[[int], Stream]] = {
    "gaussian": lambda seed: GaussianStream((100, 100), seed=seed),  # blocks of 26 samples
    "finite": lambda seed: FiniteSet(torch.arange(7.0), seed=seed),
    "augmented": lambda seed: AugmentedImages(images(), seed=seed, crop=1),
}


@pytest.mark.parametrize("kind", MAKERS)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5))
@settings(max_examples=10)
def test_cutting_into_batches_changes_nothing(kind: str, sizes: list[int]) -> None:
    stream, whole = MAKERS[kind](0), MAKERS[kind](0)
    batches = [stream(size) for size in sizes]
    assert [len(batch) for batch in batches] == sizes
    assert torch.equal(torch.cat(batches), whole(sum(sizes)))


@pytest.mark.parametrize("kind", MAKERS)
@given(before=st.integers(0, 60), after=st.integers(1, 60))
@settings(max_examples=10)
def test_a_stream_goes_on_where_another_stopped(kind: str, before: int, after: int) -> None:
    stream, other = MAKERS[kind](0), MAKERS[kind](1)
    if before:
        stream(before)
    other(3)
    state = stream.state()
    expected = stream(after)
    other.load_state(state)
    assert torch.equal(other(after), expected)
    stream.load_state(state)  # the state is not changed by what was drawn since
    assert torch.equal(stream(after), expected)


def test_blocks_of_images_go_on_too() -> None:
    stream, other = MAKERS["augmented"](0), MAKERS["augmented"](1)
    stream(700)  # a block is of 512
    other.load_state(stream.state())
    assert torch.equal(other(600), stream(600))


@pytest.mark.parametrize("kind", MAKERS)
def test_seeds_differ_and_the_global_state_does_not_matter(kind: str) -> None:
    state = torch.random.get_rng_state()
    first = MAKERS[kind](0)(50)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, MAKERS[kind](0)(50))
    assert not torch.equal(first, MAKERS[kind](1)(50))


def test_gaussian_inputs_have_the_papers_deviation_and_no_mean() -> None:
    drawn = GaussianStream(20, seed=0)(10_000)
    assert drawn.dtype == torch.float32
    assert abs(float(drawn.std()) - 10) < 0.1  # ten standard errors: 10 / √(2·200,000)
    assert abs(float(drawn.mean())) < 0.2
    assert float(torch.corrcoef(drawn.T).fill_diagonal_(0).abs().max()) < 0.06


def test_shape_dtype_and_deviation_are_those_asked_for() -> None:
    drawn = GaussianStream([2, 3], std=0.5, seed=0, dtype=torch.float64)(4000)
    assert (tuple(drawn.shape), drawn.dtype) == ((4000, 2, 3), torch.float64)
    assert_close(float(drawn.std()), 0.5, rtol=0.05, atol=0)


def test_every_pass_of_a_finite_set_has_each_input_once_in_a_new_order() -> None:
    stream = FiniteSet(torch.arange(7.0), seed=0)
    passes = torch.cat([stream(5) for _ in range(7)]).reshape(5, 7)
    assert torch.equal(passes.sort(1).values, torch.arange(7.0).expand(5, 7))
    assert len({tuple(row.tolist()) for row in passes}) == 5


def test_augmented_images_are_passes_of_the_set_shifted_and_mirrored() -> None:
    still = AugmentedImages(images(), seed=0, crop=0, flip=False)(10)
    for part in still.split(5):
        assert sorted(part[:, 0, 0, 0].tolist()) == images()[:, 0, 0, 0].tolist()
    mirrored = AugmentedImages(images(), seed=0, crop=0)(10)
    assert all(bool((m == s).all() | (m == s.flip(-1)).all()) for m, s in zip(mirrored, still, strict=True))
    moved = AugmentedImages(images(), seed=0)(512)
    assert len({tuple(image.flatten().tolist()) for image in moved}) > 100


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: GaussianStream(0, seed=0), ConfigError, "positive sizes"),
        (lambda: GaussianStream((), seed=0), ConfigError, "positive sizes"),
        (lambda: GaussianStream(3, seed=0, std=0.0), ConfigError, "positive standard deviation"),
        (lambda: GaussianStream(3, seed=0, std=float("inf")), ConfigError, "finite"),
        (lambda: GaussianStream(3, seed=0)(0), ConfigError, "at least 1"),
        (lambda: FiniteSet(torch.zeros(0, 3), seed=0), DataError, "at least one input"),
        (lambda: AugmentedImages(torch.zeros(0, 1, 4, 4), seed=0), DataError, "at least one image"),
        (lambda: AugmentedImages(images(), seed=0, crop=-1), ConfigError, "not negative"),
        (lambda: FiniteSet(images(), seed=0).load_state({}), DataError, "state of a stream"),
        (
            lambda: FiniteSet(images(), seed=0).load_state({"generator": torch.zeros(3), "used": torch.tensor(0)}),
            DataError,
            "same kind of device",
        ),
        (
            lambda: FiniteSet(images(3), seed=0).load_state(
                FiniteSet(images(), seed=0).state() | {"used": torch.tensor(4)}
            ),
            DataError,
            "over the same data",
        ),
    ],
)
def test_wrong_arguments_are_said(make: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
