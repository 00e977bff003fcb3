"""Comparison in terms of what is compared, so that a test holds on every processor.

Processors round differently: fused multiplications, the width of vectors and the order of sums depend on them. A number
inherits the rounding of the largest one that it was made from, 6e-8 of it for each operation in single precision.
"""

import numpy as np


def assert_close(got, want, rtol: float, scale: float | None = None, err_msg: str = "") -> None:
    """|got - want| <= rtol scale for every entry. `scale` is the largest |want|, unless larger numbers cancelled on the
    way or an error in other units is meant."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    scale = float(np.max(np.abs(want))) if scale is None else float(scale)
    np.testing.assert_allclose(got, np.broadcast_to(want, got.shape), rtol=0.0, atol=rtol * scale, err_msg=err_msg)
