"""Plain kernels: attention in its mathematical form, which can be traced, batched and differentiated twice."""

import contextlib
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """Switch off fused attention, which has no second derivative, no batching rule, and hides its axes.

    What was set before is restored.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
