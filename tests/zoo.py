"""The zoo: small networks of many kinds, each with an example input and the groups of units that it has.

Widths within a net are distinct wherever the architecture allows it, so that a group is known by its size.
Nothing is zero or symmetric (a case that wants zeros says so), and all of it is reproducible.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests import zoo_conv, zoo_dense, zoo_sequence, zoo_traps


@dataclass(frozen=True)
class Case:
    """A net of the zoo.

    `expected_groups` are the sizes (sorted, > 1) that a tracer with axis algebra must find; `optional_groups`
    are symmetries that are there too but may be missed. Anything else would be wrong.
    """

    name: str
    build: Callable[[], nn.Module]
    example: Callable[[], tuple[Any, ...]]
    expected_groups: tuple[int, ...]
    optional_groups: tuple[int, ...] = ()
    note: str = ""


def randomize_(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter and floating buffer anew from a generator; scales and variances in [0.5, 1.5]."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith("original0") or (p.ndim == 1 and name.endswith("weight")):
                p.uniform_(0.5, 1.5, generator=generator)
            elif p.ndim > 1:
                p.normal_(std=1.2 * p[0].numel() ** -0.5, generator=generator)
            else:
                p.normal_(std=0.3, generator=generator)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.3, generator=generator)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5, generator=generator)
    return module


def _built(make: Callable[[], nn.Module]) -> nn.Module:
    module = randomize_(make()).eval()
    if isinstance(module, zoo_traps.ZeroHead):
        nn.init.zeros_(module.head.weight)
    return module


def _normal(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def _ids(high: int, *shape: int) -> tuple[Tensor, ...]:
    return (torch.randint(high, shape, generator=torch.Generator().manual_seed(1)),)


_Row = tuple[str, Callable[[], nn.Module], tuple[tuple[int, ...], ...], tuple[int, ...], tuple[int, ...], str]

_FLAT = ((8, 3),)
_IMAGE = (2, 3, 8, 8)
_TRAP = "3 -> 7 -> 5 -> 2: "

_ROWS: tuple[_Row, ...] = (
    ("mlp", zoo_dense.mlp, _FLAT, (5, 7), (), "tanh, two hidden layers"),
    ("two_layer", zoo_dense.two_layer, ((8, 2),), (6,), (), "no output bias"),
    ("batch_norm_mlp", zoo_dense.batch_norm_mlp, _FLAT, (7,), (), "BatchNorm1d, dropout in eval mode"),
    ("data_dependent", zoo_dense.DataDependent, _FLAT, (5, 7), (), ".item() and a tensor as a condition"),
    ("gated_mlp", zoo_dense.GatedMlp, _FLAT, (5, 7), (), "SwiGLU in a residual stream of 5"),
    ("packed_gate", zoo_dense.PackedGate, _FLAT, (7,), (), "F.glu ties both halves of the packed rows"),
    (
        "weight_norm",
        zoo_dense.WeightNorm,
        _FLAT,
        (4, 6),
        (),
        "a norm runs over 6 in the second weight: coupled",
    ),
    ("shared_layer", zoo_dense.SharedLayer, _FLAT, (6,), (), "in and out axis of one weight are one group"),
    ("tied_autoencoder", zoo_dense.TiedAutoencoder, ((7, 5),), (4,), (), "one tensor produces and consumes"),
    (
        "nested_outputs",
        zoo_dense.NestedOutputs,
        ((8, 3), (8, 4)),
        (5, 6),
        (),
        "two inputs; dict of tuple of dict",
    ),
    (
        "frozen_parameters",
        zoo_dense.FrozenParameters,
        _FLAT,
        (5, 7),
        (),
        "requires_grad=False on some members",
    ),
    ("maxout", zoo_dense.Maxout, ((8, 4),), (5,), (3,), "3 pieces in each of 5 units; 3 has producers only"),
    ("prelu_rms", zoo_dense.PreluRms, _FLAT, (7,), (), "slope per unit; RMS norm couples"),
    ("mixture", zoo_dense.Mixture, _FLAT, (4, 5), (), "4 experts (softmax: coupled) of 5 units"),
    ("outer_product", zoo_dense.MultiplicativeUnits, _FLAT, (4, 5), (), "head reads the product 5 x 4"),
    ("vgg", zoo_conv.vgg, (_IMAGE,), (5, 6, 7), (), "flatten: head reads 7 x (4 frozen positions)"),
    ("lenet", zoo_conv.lenet, ((2, 1, 14, 14),), (4, 6, 7, 9), (), "average pooling, sigmoid"),
    ("conv1d", zoo_conv.conv1d, ((3, 2, 9),), (4, 5), (), ""),
    ("resnet", zoo_conv.resnet, (_IMAGE,), (4, 5, 6, 7, 9), (), "streams 4 and 6, hidden 5, 7, 9"),
    ("padded_shortcut", zoo_conv.PaddedShortcut, (_IMAGE,), (5, 7), (2, 3), "stream = 2 zeros + 5 + 3 zeros"),
    ("densenet", zoo_conv.DenseNet, ((2, 2, 8, 8),), (3, 4, 5), (), "concatenation"),
    ("depthwise", zoo_conv.depthwise, (_IMAGE,), (4, 6), (), "depthwise + pointwise"),
    ("depthwise_multiplier", zoo_conv.depthwise_multiplier, (_IMAGE,), (3, 4, 5), (), "4 groups x 3 outputs"),
    ("grouped_conv", zoo_conv.grouped_conv, (_IMAGE,), (2, 3, 5, 7), (), "2 groups of 3 inputs, 5 outputs"),
    ("group_norm", zoo_conv.group_norm, (_IMAGE,), (2, 4, 5), (), "4 groups of 2: 2 coupled; 5 coupled"),
    ("instance_norm", zoo_conv.instance_norm, (_IMAGE,), (4, 5), (), "per-channel statistics do not couple"),
    (
        "squeeze_excite",
        zoo_conv.SqueezeExcite,
        ((3, 2, 8, 8),),
        (3, 6),
        (),
        "gates multiply their own channels",
    ),
    (
        "channel_shuffle",
        zoo_conv.ChannelShuffle,
        ((3, 2, 4, 4),),
        (3, 4, 5, 8),
        (),
        "12 = 3x4 in, 15 = 3x5 out",
    ),
    (
        "branches",
        zoo_conv.Branches,
        ((3, 2, 8, 8),),
        (3, 4, 5),
        (),
        "9 = 4 + 5 by split; 5 goes on by depthwise",
    ),
    ("unet", zoo_conv.UNet, (_IMAGE,), (4, 5, 6), (), "interpolate, skip by concatenation"),
    ("pixel_shuffle", zoo_conv.PixelShuffle, ((3, 1, 5, 5),), (), (3,), "12 = 3 x (2 x 2 frozen)"),
    ("autoencoder", zoo_conv.autoencoder, (_IMAGE,), (4, 5, 7), (), "ConvTranspose2d"),
    (
        "encoder",
        zoo_sequence.Encoder,
        ((3, 9, 4),),
        (2, 2, 3, 3, 5, 7, 10, 11, 13),
        (),
        "qk 2, 2; v 5, 3; heads 3, 7",
    ),
    (
        "vit",
        zoo_sequence.VisionTransformer,
        ((2, 2, 6, 6),),
        (3, 4, 12, 17),
        (),
        "packed qkv: one head axis of 4",
    ),
    ("stock_encoder", zoo_sequence.StockEncoder, ((2, 5, 3),), (3, 4, 7, 12), (), "4 heads x 3, packed qkv"),
    ("lstm", zoo_sequence.Lstm, ((2, 4, 3),), (6,), (), "rows are (4 frozen gates) x 6"),
    (
        "two_layer_lstm",
        zoo_sequence.TwoLayerLstm,
        ((4, 2, 3),),
        (5,),
        (5,),
        "one group per layer, tied if stacked states tie",
    ),
    ("gru", zoo_sequence.Gru, ((2, 4, 3),), (5,), (), "rows are (3 frozen gates) x 5"),
    ("elman_cell", zoo_sequence.ElmanCell, ((2, 4, 3),), (7,), (), "zero state created in the forward pass"),
    ("fourier", zoo_traps.Fourier, _FLAT, (5,), (), _TRAP + "rfft freezes 7"),
    ("cumulative_sum", zoo_traps.CumulativeSum, _FLAT, (5,), (), _TRAP + "cumsum freezes 7"),
    ("sorted", zoo_traps.Sorted, _FLAT, (5,), (7,), _TRAP + "7 has producers only"),
    ("ordered_constant", zoo_traps.OrderedConstant, _FLAT, (5,), (), _TRAP + "arange freezes 7"),
    (
        "unregistered_tensor",
        zoo_traps.UnregisteredTensor,
        _FLAT,
        (5,),
        (),
        _TRAP + "a plain attribute freezes 7",
    ),
    ("registered_buffer", zoo_traps.RegisteredBuffer, _FLAT, (5, 7), (), _TRAP + "a buffer is a member"),
    ("picked_unit", zoo_traps.PickedUnit, _FLAT, (5,), (2, 4), _TRAP + "unit 2 is read by number"),
    ("hard_coded_view", zoo_traps.HardCodedView, _FLAT, (5, 7), (), _TRAP + "raises at another width"),
    (
        "hard_coded_slice",
        zoo_traps.HardCodedSlice,
        _FLAT,
        (5, 7),
        (),
        _TRAP + "silently wrong at another width",
    ),
    ("width_mean", zoo_traps.WidthMean, _FLAT, (5, 7), (), _TRAP + "a mean over 7: coupled"),
    (
        "width_scale",
        zoo_traps.WidthScale,
        _FLAT,
        (5, 7),
        (),
        _TRAP + "divided by sqrt(7): wrong at another width",
    ),
    ("softmax_units", zoo_traps.SoftmaxUnits, _FLAT, (5, 7), (), _TRAP + "a softmax over 7: coupled"),
    (
        "zero_head",
        zoo_traps.ZeroHead,
        _FLAT,
        (5,),
        (),
        _TRAP + "as cumulative_sum, under a head that is zero",
    ),
    ("input_meets_hidden", zoo_traps.InputMeetsHidden, _FLAT, (5, 7), (), "the sum with the input freezes 3"),
    ("square_by_chance", zoo_traps.SquareByChance, ((4, 3),), (4, 5), (), "batch size = width = 4"),
)

CASES: dict[str, Case] = {
    name: Case(name, partial(_built, make), partial(_normal, *shapes), groups, optional, note)
    for name, make, shapes, groups, optional, note in _ROWS
} | {
    "gpt": Case(
        "gpt",
        partial(_built, zoo_sequence.Gpt),
        partial(_ids, 13, 2, 6),
        expected_groups=(2, 3, 5, 12, 17),
        note="stream 12 (tied embedding), 3 heads, qk 2, v 5, mlp 17",
    ),
}
