"""Data and losses as a user may write them; the tests copy this file into an empty folder."""

import functools

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import thalweg.data

COUNT = 12
INPUTS = torch.arange(2.0 * COUNT).reshape(COUNT, 2)
LABELS = torch.arange(COUNT) % 3

PAIR = (INPUTS, LABELS)
LIST_PAIR = [INPUTS, LABELS]
ARRAYS = (INPUTS.numpy(), LABELS.numpy().astype("uint8"))
REGRESSION = (INPUTS, INPUTS[:, :1])
SEVERAL_INPUTS = ((INPUTS, INPUTS), LABELS)
NAMED_INPUTS = ({"x": INPUTS}, LABELS)
BITS = (INPUTS, LABELS[:, None] > 0)
OURS = thalweg.data.Dataset(INPUTS, LABELS, 3, "ours", "made here")
TENSORS = TensorDataset(INPUTS, LABELS)
BATCHES = [(INPUTS[:5], LABELS[:5]), (INPUTS[5:], LABELS[5:])]
LOADER = DataLoader(TENSORS, batch_size=5)
SHUFFLED = DataLoader(TENSORS, batch_size=5, shuffle=True, drop_last=True)
PARTLY = DataLoader(TENSORS, batch_size=4, sampler=SubsetRandomSampler(range(8)))
WEIGHTED = DataLoader(TENSORS, batch_size=4, sampler=WeightedRandomSampler(torch.ones(COUNT), COUNT))
REPLACED = DataLoader(TENSORS, batch_size=4, sampler=RandomSampler(TENSORS, replacement=True))
SPLITS = {"train": PAIR, "test": (INPUTS[:4] + 1, LABELS[:4])}
TWO_PAIRS = (PAIR, PAIR)
OTHER_NAMES = {"training": PAIR}
EMPTY = (INPUTS[:0], LABELS[:0])
NO_BATCHES: list[Tensor] = []
TRIPLES = [(INPUTS, LABELS, LABELS)]
TEXTS = (np.array(["a", "b"]), np.array([0, 1]))
UNEQUAL = (INPUTS, LABELS[:5])
BY_NAME = [{"x": INPUTS, "y": LABELS}]
TWO_TARGETS = [(INPUTS[:5], {"a": LABELS[:5], "b": LABELS[:5]}), (INPUTS[5:], {"a": LABELS[5:], "b": LABELS[5:]})]
NUMBER = 3


class Items(Dataset):
    """A data set that is read item by item."""

    def __init__(self, count: int = COUNT, noise: float = 0.0) -> None:
        self.count, self.noise = count, noise

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return INPUTS[index] + self.noise * torch.randn(2), int(LABELS[index])


class Stream:
    """Batches that can be read again, of a number that nothing tells."""

    def __iter__(self):
        yield from BATCHES


def made(scale: float = 1.0, count: int = COUNT) -> tuple[Tensor, Tensor]:
    return scale * INPUTS[:count], LABELS[:count]


def stream() -> Stream:
    return Stream()


def once():
    yield from BATCHES


def torn() -> DataLoader:
    return DataLoader(Torn(), batch_size=5)


class Torn(Items):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        raise OSError("image\nlost")


def no_disk() -> None:
    raise FileNotFoundError("no disk")


class Focal(nn.Module):
    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets)


class NeedsGamma(nn.Module):
    def __init__(self, gamma: float) -> None:
        super().__init__()


def own_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets)


def of_three(outputs: Tensor, targets: Tensor, weight: float) -> Tensor:
    return outputs.sum()


SMOOTH = functools.partial(functional.cross_entropy, label_smoothing=0.1)
