"""How far the result of an op may be from float64, by the dtype of its input."""

import torch

FLOAT64 = 1e-6  # times the limit of float32, whose eps is 5e8 times as large


def error_limit(limit: float, dtype: torch.dtype) -> float:
    """Return the limit of float32, which sums of 16-bit inputs have too, or that of float64."""
    return FLOAT64 * limit if dtype == torch.float64 else limit


def result_limit(limit: float, dtype: torch.dtype) -> float:
    """Return the limit of a result that is rounded to 16 bits where the input has them."""
    return error_limit(limit, dtype) + (torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0)
