"""Crops and mirror images of whole batches."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from thalweg.data import crop_and_flip
from thalweg.errors import ConfigError, DataError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(count: int, size: int = 5) -> Tensor:
    """Images whose pixels all differ and none of which is zero."""
    return torch.arange(1.0, count * 2 * size**2 + 1).reshape(count, 2, size, size)


def candidates(image: Tensor, padding: int) -> list[Tensor]:
    """All that one image may become, by slicing: crops row by row, then their mirror images."""
    padded, size = functional.pad(image, (padding,) * 4), image.shape[-1]
    shifts = range(2 * padding + 1)
    crops = [padded[:, y : y + size, x : x + size] for y in shifts for x in shifts]
    return crops + [crop.flip(-1) for crop in crops]


def test_every_image_becomes_one_of_its_crops_and_all_of_them_are_equally_likely() -> None:
    images = numbered(1).expand(9000, 2, 5, 5)
    found = crop_and_flip(images, seeded(), padding=1)
    options = torch.stack(candidates(images[0], 1)).flatten(1)
    hits = (found.flatten(1)[:, None] == options).all(2)
    assert bool((hits.sum(1) == 1).all())
    counts = hits.sum(0)
    assert len(counts) == 18
    # 500 each, standard deviation 21.7; five of them
    assert bool(((counts - 500).abs() < 110).all())


def test_images_of_a_batch_move_each_by_itself_and_channels_together() -> None:
    images = numbered(6)
    found = crop_and_flip(images, seeded(3), padding=2)
    chosen = []
    for image, result in zip(images, found, strict=True):
        matches = [i for i, option in enumerate(candidates(image, 2)) if torch.equal(option, result)]
        chosen.append(matches[0])
    assert len(set(chosen)) > 2


def test_without_padding_and_mirror_nothing_changes() -> None:
    images = numbered(3)
    assert_close(crop_and_flip(images, seeded(), padding=0, flip=False), images, rtol=0, atol=0)


def test_the_same_generator_gives_the_same_images() -> None:
    images = numbered(4)
    assert_close(crop_and_flip(images, seeded(1)), crop_and_flip(images, seeded(1)), rtol=0, atol=0)
    assert not torch.equal(crop_and_flip(images, seeded(1)), crop_and_flip(images, seeded(2)))


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ConfigError, match="Expected a padding that is not negative"):
        crop_and_flip(numbered(1), seeded(), padding=-1)
    with pytest.raises(DataError, match="Expected images of shape"):
        crop_and_flip(torch.zeros(3, 4), seeded())
