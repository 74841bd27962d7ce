"""Plain kernels: operations in their mathematical form, which can be traced, batched and differentiated twice."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


class _PlainWeightNorm(TorchFunctionMode):
    """Weight normalisation as v·(g/‖v‖): the second derivative of torch's fused form is wrong (torch 2.13)."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch._weight_norm:
            return _weight_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _weight_norm(v: torch.Tensor, g: torch.Tensor, dim: int = 0) -> torch.Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """Switch off fused attention, which has no second derivative, no batching rule, and hides its axes.

    Nor may weight normalisation be fused. What was set before is restored.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), _PlainWeightNorm():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
