"""Networks of the zoo made to mislead: operations that no rule knows, constants that break a symmetry."""

import torch
from torch import Tensor, nn


class _Two(nn.Module):
    """3 -> 7 -> 5 -> 2, with something odd done to the seven units."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 7)
        self.second = nn.Linear(7, 5)
        self.head = nn.Linear(5, 2)

    def finish(self, h: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(h)))


class Fourier(nn.Module):
    """A Fourier transform along the seven units orders them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 7)
        self.second = nn.Linear(4, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(torch.tanh(self.first(x)), dim=-1).abs()
        return self.head(torch.tanh(self.second(spectrum)))


class CumulativeSum(_Two):
    """A running sum along the units orders them."""

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(torch.tanh(self.first(x)).cumsum(dim=-1))


class Sorted(_Two):
    """Sorting forgets who produced what: seven interchangeable rows that no weight consumes by unit."""

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(torch.tanh(self.first(x)).sort(dim=-1).values)


class OrderedConstant(_Two):
    """A constant made inside the forward pass gives every unit its own factor."""

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(torch.tanh(self.first(x)) * torch.arange(1.0, 8.0, device=x.device, dtype=x.dtype))


class UnregisteredTensor(_Two):
    """A factor per unit that is neither a parameter nor a buffer, so no permutation can reach it."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.tensor([0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(torch.tanh(self.first(x)) * self.factor.to(x))


class RegisteredBuffer(_Two):
    """The same factor as a buffer: it moves with the units."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor([0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(torch.tanh(self.first(x)) * self.factor)


class PickedUnit(_Two):
    """One unit is read by its number."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.finish(h * h[:, 2:3])


class HardCodedView(_Two):
    """Symmetric at width 7, but refuses to run at any other width."""

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(torch.tanh(self.first(x)).view(-1, 7))


class HardCodedSlice(_Two):
    """Symmetric at width 7; at a larger width the units past the seventh are silently dropped."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.finish(h) + h[:, :7].sum(dim=-1, keepdim=True)


class WidthMean(_Two):
    """The mean over the units: permutable, but doubling one unit changes it."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.finish(h) + h.mean(dim=-1, keepdim=True)


class WidthScale(_Two):
    """The number of units enters as a Python number: permutable, but wrong at another width."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.finish(h / h.shape[-1] ** 0.5)


class SoftmaxUnits(_Two):
    """A softmax over the units couples them."""

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.first(x).softmax(dim=-1))


class ZeroHead(_Two):
    """A zero head hides every mistake from a check at the module's own parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(torch.tanh(self.first(x)).cumsum(dim=-1))


class InputMeetsHidden(nn.Module):
    """A skip connection from the input freezes the axis that it is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 7)
        self.second = nn.Linear(7, 3)
        self.third = nn.Linear(3, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.second(torch.tanh(self.first(x)))
        return self.head(torch.tanh(self.third(h)))


class SquareByChance(nn.Module):
    """The units meet the samples' axis in a Gram matrix: equal sizes, different axes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = (h @ h.T) @ h
        return self.head(torch.tanh(self.second(h)))
