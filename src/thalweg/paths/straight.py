"""The straight path: what every other one is held against."""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from thalweg.paths.leg import blend_leg
from thalweg.paths.path import Path
from thalweg.space import Space


def linear(
    space: Space,
    a: Float[Tensor, " params"],
    b: Float[Tensor, " params"],
    *,
    start_buffers: Mapping[str, Tensor] | None = None,
    end_buffers: Mapping[str, Tensor] | None = None,
) -> Path:
    """Go straight: θ(t) = (1-t)·A + t·B.

    Args:
        space: the coordinates.
        a: the start.
        b: the end.
        start_buffers: buffers of the network at the start, by name.
        end_buffers: those at the end.

    Returns:
        The path.

    Raises:
        ShapeError: a point does not fit the space.

    **Source:** Anokhin & Yarotsky 2020 (arXiv 2008.00741), section 3.1.
    """
    leg = blend_leg("all layers", space.parameters(a), space.parameters(b))
    return Path(space, (leg,), (), start_buffers or {}, end_buffers or {})
