"""streams: inputs without labels, drawn batch by batch: Gaussian without end, a finite set, augmented images.

A stream is called with a number of samples. What it gives does not depend on how they are cut into batches, and a
stream goes on where another's `state()` stopped, to the bit on one device.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor

from thalweg.data.augment import crop_and_flip
from thalweg.errors import ConfigError, DataError

# Numbers that a Gaussian stream draws at once. Chosen by us: 1 MB, where a call costs nothing beside the draw.
_NUMBERS = 2**18
# Images that are augmented at once. Chosen by us: several mini-batches.
_IMAGES = 512
# Before the names of a state that another stream's blocks are drawn from.
_BELOW = "order_"


class _Blocks:
    """Hands out slices of blocks that are drawn whole, so that cutting into batches changes nothing.

    Args:
        draw: draws the next block; the generator, and the stream that it reads, alone decide what is in it.
        generator: of the blocks.
        below: the blocks that `draw` reads, if any.
    """

    def __init__(
        self, draw: Callable[[], Tensor], generator: torch.Generator, below: "_Blocks | None" = None
    ) -> None:
        self._draw, self._generator, self._below = draw, generator, below
        self._before = self._sources()  # what the current block was drawn from
        self._block: Tensor | None = None
        self._used = 0

    def take(self, count: int) -> Tensor:
        if count < 1:
            raise ConfigError(f"Expected a number of samples of at least 1. Got {count}. Choose one such as 64.")
        parts: list[Tensor] = []
        while count:
            if self._block is None or self._used == len(self._block):
                self._before, self._used = self._sources(), 0
                self._block = self._draw()
            part = self._block[self._used : self._used + count]
            self._used, count = self._used + len(part), count - len(part)
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def state(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self._before.items()} | {"used": torch.tensor(self._used)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        if set(state) != {*self._before, "used"}:
            raise DataError(
                f"Expected the state of a stream: {sorted({*self._before, 'used'})}. Got {sorted(state)}. "
                "Pass what state() of a stream of the same kind gave."
            )
        try:
            self._generator.set_state(state["generator"].cpu())
        except (RuntimeError, TypeError) as error:
            raise DataError(
                "Expected the state of a stream on the same kind of device. Got another generator's. "
                "Pass what state() gave there."
            ) from error
        if self._below is not None:
            self._below.load_state({name.removeprefix(_BELOW): state[name] for name in state if _BELOW in name})
        self._before, self._used = self._sources(), int(state["used"])
        self._block = self._draw() if self._used else None
        if self._block is not None and self._used > len(self._block):
            raise DataError(
                f"Expected at most {len(self._block)} samples used of a block. Got {self._used}. "
                "Pass the state of a stream over the same data."
            )

    def _sources(self) -> dict[str, Tensor]:
        below = {} if self._below is None else self._below.state()
        return {"generator": self._generator.get_state()} | {_BELOW + name: value for name, value in below.items()}


class GaussianStream:
    """Normal inputs without end, N(0, std²) in each feature, drawn on the device.

    Blocks of some 260,000 numbers are drawn at once and handed out in slices.

    Args:
        shape: of one sample: a number of features, or (channels, height, width).
        std: standard deviation. Default: the paper's code; nodes see their corners only if inputs are large.
        seed: of the stream.
        device: where samples are drawn; a CPU and a GPU draw different ones.
        dtype: of the samples.

    Raises:
        ConfigError: an empty shape, or a standard deviation that is not positive and finite.

    Source:
        tian2019luck (arXiv 1905.13405), section 4.2 ("GAUS", "infinite"), and its code for std 10.

    Example:
        >>> stream = GaussianStream(20, seed=0)
        >>> tuple(stream(64).shape)
        (64, 20)
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        *,
        std: float = 10.0,
        seed: int,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if not self._shape or min(self._shape) < 1:
            raise ConfigError(
                f"Expected a shape of positive sizes. Got {shape}. Choose one such as 20 or (1, 16, 16)."
            )
        if not 0 < std < math.inf:
            raise ConfigError(f"Expected a positive standard deviation, finite. Got {std}. Choose one such as 10.")
        self._std, self._dtype = float(std), dtype
        self._generator = torch.Generator(device).manual_seed(seed)
        self._count = max(1, _NUMBERS // int(torch.Size(self._shape).numel()))
        self._blocks = _Blocks(self._drawn, self._generator)

    def __call__(self, batch_size: int) -> Shaped[Tensor, "batch *features"]:
        """Draw the next samples.

        Args:
            batch_size: how many.

        Returns:
            They may share memory with samples drawn before and after: do not write into them.

        Raises:
            ConfigError: the number is not positive.
        """
        return self._blocks.take(batch_size)

    def state(self) -> dict[str, Tensor]:
        """Give what `load_state` needs to go on from here."""
        return self._blocks.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where a stream of the same arguments (but for the seed) stopped.

        Args:
            state: what `state` gave.

        Raises:
            DataError: it is no such state.
        """
        self._blocks.load_state(state)

    def _drawn(self) -> Tensor:
        block = torch.empty(self._count, *self._shape, dtype=self._dtype, device=self._generator.device)
        return block.normal_(0.0, self._std, generator=self._generator)


class FiniteSet:
    """A finite set of inputs, in a new order on every pass.

    A batch goes on into the next pass where one ends, so that all batches have the same size.

    Args:
        inputs: one row a sample, on any device.
        seed: of the orders.

    Raises:
        DataError: there is no input.

    Source:
        tian2019luck (arXiv 1905.13405), figure 9 ("finite"). That batches go on into the next pass is ours.

    Example:
        >>> stream = FiniteSet(torch.arange(3.0).reshape(3, 1), seed=0)
        >>> sorted(stream(3).flatten().tolist()), tuple(stream(2).shape)
        ([0.0, 1.0, 2.0], (2, 1))
    """

    def __init__(self, inputs: Shaped[Tensor, "samples *features"], *, seed: int) -> None:
        if not len(inputs):
            raise DataError("Expected at least one input. Got none. Pass one row a sample.")
        self._inputs = inputs
        self._generator = torch.Generator().manual_seed(seed)
        self._blocks = _Blocks(self._order, self._generator)

    def __call__(self, batch_size: int) -> Shaped[Tensor, "batch *features"]:
        """Take the next samples; arguments and errors as of `GaussianStream`."""
        return self._inputs[self._blocks.take(batch_size)]

    def state(self) -> dict[str, Tensor]:
        """Give what `load_state` needs to go on from here; the inputs are not in it."""
        return self._blocks.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where a stream over the same inputs stopped; arguments and errors as of `GaussianStream`."""
        self._blocks.load_state(state)

    def _order(self) -> Tensor:
        return torch.randperm(len(self._inputs), generator=self._generator).to(self._inputs.device)


class AugmentedImages:
    """A finite set of images, in a new order on every pass, each shifted and mirrored anew.

    Args:
        images: (samples, channels, height, width), on any device.
        seed: of orders, shifts and mirror images.
        crop: pixels that an image may be shifted by; 0 shifts nothing. Default: the usual one for CIFAR-10.
        flip: mirror half of the images left to right.

    Raises:
        DataError: there is no image, or the shape is another one.
        ConfigError: `crop` is negative.

    Source:
        tian2019luck (arXiv 1905.13405), code: RandomCrop(32, 4) and flips for CIFAR-10. See `crop_and_flip`.

    Example:
        >>> tuple(AugmentedImages(torch.zeros(5, 3, 8, 8), seed=0)(7).shape)
        (7, 3, 8, 8)
    """

    def __init__(
        self, images: Shaped[Tensor, "samples channels height width"], *, seed: int, crop: int = 4, flip: bool = True
    ) -> None:
        if not len(images):
            raise DataError("Expected at least one image. Got none. Pass one row an image.")
        self._images, self._crop, self._flip = images, crop, flip
        crop_and_flip(images[:1], torch.Generator(), crop, flip=flip)  # sees whether all fits
        self._generator, orders = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
        self._order = _Blocks(lambda: torch.randperm(len(images), generator=orders).to(images.device), orders)
        self._blocks = _Blocks(self._drawn, self._generator, self._order)

    def __call__(self, batch_size: int) -> Shaped[Tensor, "batch channels height width"]:
        """Take the next images; arguments and errors as of `GaussianStream`."""
        return self._blocks.take(batch_size)

    def state(self) -> dict[str, Tensor]:
        """Give what `load_state` needs to go on from here; the images are not in it."""
        return self._blocks.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where a stream over the same images stopped; arguments and errors as of `GaussianStream`."""
        self._blocks.load_state(state)

    def _drawn(self) -> Tensor:
        images = self._images[self._order.take(_IMAGES)]
        return crop_and_flip(images, self._generator, self._crop, flip=self._flip)
