"""Every tolerance of the test suite that depends on the dtype, in one table."""

from __future__ import annotations

import torch
from torch import Tensor

# (rtol, atol as a fraction of the largest expected magnitude). Sums run in float32 at least, float64 for float64.
# float64: sums of some thousand terms in another order. float32: the same, at 2**-24 a rounding. Half types: sums
# are float32, so what remains is the one rounding of the result (2**-9 and 2**-12 relative), and float32's share.
RELATIVE = {
    torch.float64: (1e-10, 1e-12),
    torch.float32: (1e-4, 5e-6),
    torch.bfloat16: (8e-3, 1e-4),
    torch.float16: (1e-3, 1e-4),
}


def assert_close(actual: Tensor, expected: Tensor, name: str = "", dtype: torch.dtype | None = None) -> None:
    """Asserts equality within the table's tolerance for ``dtype`` (default: that of ``actual``); NaN equals NaN."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    rtol, fraction = RELATIVE[dtype or actual.dtype]
    finite = expected.detach().double()[torch.isfinite(expected)].abs()
    atol = fraction * float(finite.max()) if finite.numel() else 0.0

    def message(text: str) -> str:
        return f"{name}: {text}"

    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol, equal_nan=True, msg=message)
