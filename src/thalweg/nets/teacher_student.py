"""ReLU networks as teachers and students, and the weights of a random teacher."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from thalweg.errors import ConfigError
from thalweg.nets.widths import checked_widths

NormPlace = Literal["none", "after_relu", "before_relu"]
"""Where a BatchNorm stands: nowhere, Linear → ReLU → BN (the paper's experiments), or Linear → BN → ReLU."""

_GRID = (-0.5, -0.25, 0.0, 0.25, 0.5)
_BIAS = 0.5
_TINY = 1e-5  # added to the norm that a row is divided by, as in the authors' code
_ATTEMPTS = 100


def relu_mlp(
    widths: Sequence[int],
    *,
    num_inputs: int = 20,
    num_outputs: int = 100,
    norm: NormPlace = "none",
    affine: bool = False,
    eps: float = 1e-5,
) -> nn.Sequential:
    """Build a fully connected ReLU network with one linear layer of outputs.

    Args:
        widths: nodes m_l of the hidden layers. The paper's teachers: 50-75-100-125, small 10-15-20-25.
        num_inputs: features; more axes are flattened. Default: the paper's.
        num_outputs: C. Default: the paper's.
        norm: where BatchNorm stands in every hidden layer.
        affine: whether it has a scale c₀ and a bias c₁. Default: the authors' code.
        eps: ε beside its variance. Default: torch's. Theorem 3 is exact at ε → 0 only.

    Returns:
        A plain `nn.Sequential` of linear<l>, relu<l>, norm<l> and head, initialised as torch does.

    Raises:
        ConfigError: no hidden layer, a width that is not positive, or an unknown place.

    Source:
        tian2019luck (arXiv 1905.13405), section 4.2, and its code for biases (everywhere) and affine.

    Example:
        >>> list(dict(relu_mlp((2, 3), norm="after_relu").named_children()))
        ['flatten', 'linear1', 'relu1', 'norm1', 'linear2', 'relu2', 'norm2', 'head']
    """
    hidden = checked_widths("widths", widths, at_least=1)
    num_inputs, num_outputs = checked_widths("num_inputs and num_outputs", (num_inputs, num_outputs))
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    old = num_inputs
    for place, new in enumerate(hidden, 1):
        norms = _norm(norm, lambda width=new: nn.BatchNorm1d(width, eps=eps, affine=affine))
        layers.update(_block("linear", place, nn.Linear(old, new), norms, norm))
        old = new
    layers["head"] = nn.Linear(old, num_outputs)
    return nn.Sequential(layers)


def relu_cnn(
    channels: Sequence[int],
    *,
    image_size: int = 16,
    in_channels: int = 1,
    num_outputs: int = 100,
    norm: NormPlace = "none",
    affine: bool = True,
    eps: float = 1e-5,
) -> nn.Sequential:
    """Build a network of 3×3 convolutions without padding, stride or pooling, and one linear layer of outputs.

    Args:
        channels: of the hidden layers. The paper's teacher: 64-64-64-64.
        image_size: height and width of the images. Default: the paper's Gaussian ones.
        in_channels: channels of the images. Default: the authors' code.
        num_outputs: C. Default: the paper's.
        norm: where BatchNorm stands in every hidden layer.
        affine: whether it has a scale and a bias. Default: the authors' code.
        eps: ε beside its variance. Default: torch's.

    Returns:
        A plain `nn.Sequential` of conv<l>, relu<l>, norm<l>, flatten and head, initialised as torch does.

    Raises:
        ConfigError: no hidden layer, a width that is not positive, an unknown place, or images too small.

    Source:
        tian2019luck (arXiv 1905.13405), section 4.2, and its code for the layout of the convolutions.

    Example:
        >>> tuple(relu_cnn((2, 3))(torch.zeros(5, 1, 16, 16)).shape)
        (5, 100)
    """
    hidden = checked_widths("channels", channels, at_least=1)
    in_channels, num_outputs = checked_widths("in_channels and num_outputs", (in_channels, num_outputs))
    size = image_size - 2 * len(hidden)
    if size < 1:
        raise ConfigError(
            f"Expected images of at least {2 * len(hidden) + 1} pixels for {len(hidden)} convolutions. "
            f"Got image_size={image_size}. Use larger images or fewer layers."
        )
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    old = in_channels
    for place, new in enumerate(hidden, 1):
        norms = _norm(norm, lambda width=new: nn.BatchNorm2d(width, eps=eps, affine=affine))
        layers.update(_block("conv", place, nn.Conv2d(old, new, 3), norms, norm))
        old = new
    layers["flatten"] = nn.Flatten()
    layers["head"] = nn.Linear(old * size * size, num_outputs)
    return nn.Sequential(layers)


def _norm(place: str, make: object) -> list[nn.Module]:
    if place not in get_args(NormPlace):
        raise ConfigError(f"Expected norm {', '.join(get_args(NormPlace))}. Got {place!r}. Choose one of them.")
    return [] if place == "none" else [make()]  # type: ignore[operator]


def _block(
    kind: str, place: int, linear: nn.Module, norms: list[nn.Module], norm: NormPlace
) -> Iterator[tuple[str, nn.Module]]:
    yield f"{kind}{place}", linear
    named = [(f"norm{place}", layer) for layer in norms]
    relu = (f"relu{place}", nn.ReLU())
    yield from ([*named, relu] if norm == "before_relu" else [relu, *named])


def teacher_init_(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Draw the weights of a random teacher, in place: unit rows that point in different directions.

    Every entry of a linear layer's or convolution's row w_j is drawn from {-½, -¼, 0, ¼, ½} until the row is not
    zero and, normalised, differs from every other of the layer; its bias from U[-½, ½]. Row and bias are then
    divided by ‖w_j‖ + 1e-5.

    Args:
        module: the network to overwrite; other layers stay.
        generator: where the randomness comes from; its device may differ from the network's.

    Returns:
        The same module.

    Raises:
        ConfigError: a layer has more rows than there are directions to draw.

    Source:
        tian2019luck (arXiv 1905.13405), section 4.2; the normalisation is from its code, where it also applies to
        the head. Departure: rows must differ after they are normalised, not before.

    Example:
        >>> net = teacher_init_(relu_mlp((3,), num_outputs=5), torch.Generator().manual_seed(0))
        >>> net.linear1.weight.norm(dim=1).round(decimals=3).tolist()
        [1.0, 1.0, 1.0]
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            rows = _directions(len(layer.weight), layer.weight[0].numel(), generator)
            norms = rows.norm(dim=1) + _TINY
            with torch.no_grad():
                layer.weight.copy_((rows / norms.unsqueeze(1)).reshape(layer.weight.shape))
                if layer.bias is not None:
                    drawn = torch.rand(len(rows), generator=generator, device=generator.device, dtype=torch.float64)
                    layer.bias.copy_((2 * _BIAS * drawn - _BIAS) / norms)
    return module


def _directions(count: int, width: int, generator: torch.Generator) -> Tensor:
    """Draw rows of the grid, all of different directions."""
    grid = torch.tensor(_GRID, dtype=torch.float64, device=generator.device)
    found: dict[tuple[float, ...], Tensor] = {}
    for _ in range(_ATTEMPTS):
        drawn = grid[torch.randint(len(grid), (count, width), generator=generator, device=generator.device)]
        for row in drawn[drawn.abs().sum(1) > 0]:
            key = tuple((row / row.norm()).round(decimals=9).tolist())
            if len(found) < count:
                found.setdefault(key, row)
        if len(found) == count:
            return torch.stack(list(found.values()))
    raise ConfigError(
        f"Expected at most as many nodes as there are directions of {width} entries out of {_GRID}. Got {count} "
        f"nodes, and found {len(found)} directions. Make the layer narrower or its inputs wider."
    )


def widened(
    teacher: nn.Sequential, factor: int = 10, *, norm: NormPlace | None = None, affine: bool | None = None
) -> nn.Sequential:
    """Build a student of a teacher: the same depth, inputs and outputs, every hidden layer wider.

    Args:
        teacher: what `relu_mlp` or `relu_cnn` made.
        factor: n_l / m_l. Default: the paper's.
        norm: where the student's BatchNorm stands. None: as in the teacher.
        affine: whether it has a scale and a bias. None: as the teacher's kind of network has by default.

    Returns:
        The student, initialised as torch does, in the teacher's floating type and on its device; its BatchNorms have
        the ε of the teacher's, if that has any.

    Raises:
        ConfigError: the factor is below 1, or the teacher is of another make.

    Source:
        tian2019luck (arXiv 1905.13405), section 4.2.

    Example:
        >>> widened(relu_mlp((2, 3))).linear2
        Linear(in_features=20, out_features=30, bias=True)
    """
    named = dict(teacher.named_children())
    linears = [layer for layer in named.values() if isinstance(layer, nn.Linear | nn.Conv2d)]
    head = named.get("head")
    if factor < 1 or len(linears) < 2 or not isinstance(head, nn.Linear):
        raise _other_make(teacher, factor)
    place = norm if norm is not None else _place_of(list(named))
    hidden = linears[:-1]
    first, last = hidden[0], hidden[-1]
    widths = [factor * layer.weight.shape[0] for layer in hidden]
    outputs = head.out_features
    eps = next((layer.eps for layer in named.values() if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)), 1e-5)
    if isinstance(first, nn.Linear):
        options = {"num_inputs": first.in_features, "num_outputs": outputs}
        student = relu_mlp(widths, norm=place, affine=bool(affine), eps=eps, **options)
    else:
        scaled = affine is None or affine
        side = round((head.in_features // last.weight.shape[0]) ** 0.5) + 2 * len(hidden)
        options = {"image_size": side, "in_channels": first.in_channels, "num_outputs": outputs}
        student = relu_cnn(widths, norm=place, affine=scaled, eps=eps, **options)
    if _layout(student) != _layout(teacher):
        raise _other_make(teacher, factor)
    return student.to(head.weight)


def _layout(network: nn.Sequential) -> list[tuple[object, ...]]:
    """Name all layers but BatchNorms, with what a convolution does."""
    keys = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return [
        (name, type(layer), *(getattr(layer, key, None) for key in keys))
        for name, layer in network.named_children()
        if not isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)
    ]


def _other_make(teacher: nn.Sequential, factor: int) -> ConfigError:
    return ConfigError(
        f"Expected a factor of 1 or more and a teacher made by relu_mlp or relu_cnn. Got {factor} and "
        f"{type(teacher).__name__} of {', '.join(dict(teacher.named_children())) or 'nothing'}. "
        "Build the student itself."
    )


def _place_of(names: list[str]) -> NormPlace:
    if "norm1" not in names:
        return "none"
    return "before_relu" if names.index("norm1") < names.index("relu1") else "after_relu"
