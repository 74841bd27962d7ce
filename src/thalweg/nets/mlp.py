"""Fully connected networks of any widths."""

from collections.abc import Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from thalweg.nets.activation import Activation, activation_module
from thalweg.nets.widths import checked_widths


class MLP(nn.Module):
    """f(x) = W_L σ(… σ(W_1 x + b_1) …) + b_L.

    Inputs with more than one axis after the batch are flattened.

    Args:
        widths: widths of all layers, input and output included.
        activation: σ, after every layer but the last.
        bias: whether the hidden layers have biases.
        output_bias: whether the last layer has one. The paper's two-layer nets have none.

    Raises:
        ConfigError: fewer than two widths, one that is not positive, or an unknown activation.

    Example:
        >>> [tuple(p.shape) for p in MLP([1, 3, 1], output_bias=False).parameters()]
        [(3, 1), (3,), (1, 3)]
    """

    def __init__(
        self,
        widths: Sequence[int],
        activation: Activation = "tanh",
        *,
        bias: bool = True,
        output_bias: bool = True,
    ) -> None:
        super().__init__()
        self.widths = checked_widths("widths", widths, at_least=2)
        last = len(self.widths) - 2
        self.layers = nn.ModuleList(
            nn.Linear(old, new, bias=output_bias if i == last else bias)
            for i, (old, new) in enumerate(pairwise(self.widths))
        )
        self.activation = activation_module(activation)

    def forward(self, x: Float[Tensor, "batch *features"]) -> Float[Tensor, "batch outputs"]:
        """Compute the outputs."""
        h = x.flatten(1)
        *hidden, output = self.layers
        for layer in hidden:
            h = self.activation(layer(h))
        result: Tensor = output(h)
        return result


def two_layer(width: int, *, num_inputs: int = 1, num_outputs: int = 1, activation: Activation = "tanh") -> MLP:
    """Build the two-layer net of the embedding principle, f(x) = Σ_k a_k σ(w_k·x + b_k), no output bias.

    Args:
        width: m, the number of hidden neurons.
        num_inputs: number of features.
        num_outputs: number of outputs.
        activation: σ.

    Returns:
        The net, initialised as torch does.

    Raises:
        ConfigError: a width that is not positive, or an unknown activation.

    Source:
        zhang2021embedding (arXiv 2105.14573), figures 1, 3 and 4: 3m parameters for 1-D data at width m.

    Example:
        >>> sum(p.numel() for p in two_layer(2).parameters())
        6
    """
    return MLP((num_inputs, width, num_outputs), activation, output_bias=False)
