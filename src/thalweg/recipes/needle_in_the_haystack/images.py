"""Images: the data of lab 2 in memory, and how a network does on them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from thalweg.lab.recipe import Context

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from thalweg.objective import Objective

DataName = Literal["cifar10", "cifar100", "digits"]
BATCH = 1_000
"""Samples that are evaluated at once (the paper's code)."""


@dataclass(frozen=True)
class Images:
    """Images in memory.

    Args:
        train: images and class numbers to train on.
        test: those to test on.
        num_classes: how many classes.
    """

    train: "tuple[Tensor, Tensor]"
    test: "tuple[Tensor, Tensor]"
    num_classes: int

    def objective(self, module: "nn.Module", context: Context, *, is_test: bool = False) -> "Objective":
        """Make the cross-entropy of a module on the training or the test images."""
        from torch import nn

        from thalweg.objective import Objective

        inputs, targets = self.test if is_test else self.train
        size = min(BATCH, len(targets))
        return Objective(module, nn.CrossEntropyLoss(), (inputs, targets), batch_size=size, device=context.device)

    def first(self, count: int) -> "Images":
        """Keep the first so many of the training images, and all to test on."""
        return Images((self.train[0][:count], self.train[1][:count]), self.test, self.num_classes)

    @property
    def name(self) -> str:
        """What tells these images from others: a hash of all of them."""
        import hashlib

        import torch

        digest = hashlib.sha256()
        for tensor in (*self.train, *self.test):
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def gap(self, one: "nn.Module", two: "nn.Module") -> float:
        """Give the largest difference of two networks' outputs on the test images, both in eval mode."""
        device = next(one.parameters()).device
        one.eval()
        two.eval()
        return float((self.outputs(one, self.test[0], device) - self.outputs(two, self.test[0], device)).abs().max())

    def measured(self, module: "nn.Module") -> dict[str, float]:
        """Measure loss and accuracy on both parts, in the mode in which the module is."""
        found: dict[str, float] = {}
        device = next(module.parameters()).device
        for name, part in (("train", self.train), ("test", self.test)):
            loss, accuracy = scores(self.outputs(module, part[0], device), part[1])
            found |= {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
        return found

    def outputs(self, network: "Callable[[Tensor], Tensor]", inputs: "Tensor", device: "torch.device") -> "Tensor":
        """Compute logits on a device, a batch at a time; they come to the CPU."""
        import torch

        with torch.no_grad():
            return torch.cat([network(inputs[k : k + BATCH].to(device)).cpu() for k in range(0, len(inputs), BATCH)])


def scores(logits: "Tensor", targets: "Tensor") -> tuple[float, float]:
    """Compute cross-entropy and accuracy."""
    from torch.nn.functional import cross_entropy

    right = (logits.argmax(1) == targets).double().mean()
    return float(cross_entropy(logits.double(), targets)), float(right)


def load(name: DataName, num_train: int, num_test: int, image_size: int | None, context: Context) -> Images:
    """Load images in single precision.

    Args:
        name: CIFAR as the paper's code normalises it; digits, three in four to train on, grey levels in [0, 1].
        num_train: samples to train on, the first of the set.
        num_test: samples to test on.
        image_size: what they are shrunk to; None leaves them.
        context: where the data lie.
    """
    import torch

    from thalweg.data import cifar10, cifar100, digits

    if name == "digits":
        whole = digits(dtype=torch.float32)
        places = torch.arange(len(whole))
        parts = whole.select(places[places % 4 > 0]), whole.select(places[places % 4 == 0])
        sets = [p.select(min(n, len(p))) for p, n in zip(parts, (num_train, num_test), strict=True)]
        pairs = [(s.inputs.reshape(len(s), 1, 8, 8), s.targets) for s in sets]
        return Images(pairs[0], pairs[1], 10)
    options: dict[str, Any] = {"data_root": context.data_root, "image_size": image_size, "normalize": True}
    load_set = cifar10 if name == "cifar10" else cifar100
    train = load_set("train", num_samples=num_train, **options)
    test = load_set("test", num_samples=num_test, **options)
    return Images((train.inputs, train.targets), (test.inputs, test.targets), train.num_classes or 10)
