"""feasible: keeps the coordinates of an update that pass a test against the retain gradients."""

from typing import Any

import torch
from torch import Tensor

from .. import _options
from . import reference
from .checks import check_dtype
from .registration import call, check_reverse_mode, define_op, device_op
from .t_test import feasibility_thresholds

# Inside the ops all tensors are flat [p]; the sums [6] of `reference.feasible` come with the result.

feasible_pass = device_op(
    "feasible_pass(Tensor d, Tensor u, Tensor total, Tensor squares, int n, float bound, float slack, float floor)"
    " -> (Tensor, Tensor)"
)(reference.feasible)


def _default(d: Tensor, u: Tensor, total: Tensor, squares: Tensor, n: int, level: float) -> tuple[Tensor, Tensor]:
    return feasible_pass(d, u, total, squares, n, *feasibility_thresholds(n, level, total.dtype))


def _shapes(d: Tensor, u: Tensor, total: Tensor, squares: Tensor, n: int, level: float) -> tuple[Tensor, Tensor]:
    return d.new_empty(d.shape), d.new_empty(6, dtype=torch.float64)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[0])


def _backward(ctx: Any, dout: Tensor, _: Any) -> tuple:
    """Return dd: what arrives at the result passes where d was kept, as the mask is a constant."""
    (out,) = ctx.saved_tensors
    return torch.where(out != 0, dout, 0), None, None, None, None, None


feasible_op = define_op("feasible", _default, shapes=_shapes, setup=_setup, backward=_backward)


def feasible(d: Tensor, u: Tensor, total: Tensor, squares: Tensor, n: int, *, delta: float = 0.05) -> Tensor:
    """Keep the part of an update that helps the forget objective and, as far as n samples tell, raises no retain loss.

    d_k where  d_k u_k ≤ 0  and  d_k mean_k + q |d_k| s_k / √n ≤ 0,  and 0 elsewhere

    mean_k and s_k are mean and standard deviation of the retain gradients in coordinate k over the samples, q is the
    1 - delta quantile of Student's t with n - 1 degrees of freedom. For samples with normal gradients that are
    independent of d, a coordinate in which d raises the retain loss is kept with probability at most delta. That is a
    statement about each coordinate, not about their sum. Symmetric heavy tails keep the level; harm that is
    concentrated in few samples does not: 0.05 becomes 0.14 for n = 8 and 0.08 for n = 64 where d_k g_jk is exponential,
    0.21 and 0.13 where it is log-normal (simulated, at mean 0). A coordinate in which no sample has a gradient is kept
    if d_k u_k ≤ 0. One pass: four tensors are read, one is written.

    Args:
        d: any shape, the change that is proposed; float32, float64, bfloat16 or float16; what is not contiguous is
            copied.
        u: gradient of the forget objective that is minimised; shape and dtype of d.
        total, squares: Σ_j g_j and Σ_j g_j² over the retain samples, shape of d, one dtype: float32, float64 or
            bfloat16; summed in float32 or better. Their rounding never makes a coordinate pass: the test allows for
            (n + 4) eps of it.
        n: number of samples, at least 2.
        delta: level of the test of one coordinate, in (0, 0.5].

    Returns:
        Like d; NaN where an input is NaN or Inf. Differentiable twice in d, with the mask as a constant.

    Raises:
        ValueError: shapes that do not match, two devices, n < 2, delta outside (0, 0.5].
        TypeError: a dtype that is not supported, or two where one is expected; n is no integer or delta no number.

    Source: the idea of masking is that of arXiv 2511.02435, of which only the abstract was available; the test is ours.

    Example:
        >>> d, u = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([-1.0, -1.0, 1.0])
        >>> g = torch.tensor([[-1.0, 1.0, -1.0], [-1.1, -2.0, -1.1], [-0.9, -2.0, -0.9]])  # [n, p]
        >>> projgrad.feasible(d, u, g.sum(0), g.square().sum(0), n=3).tolist()
        [1.0, 0.0, 0.0]
    """
    tensors = {"d": d, "u": u, "total": total, "squares": squares}
    _options.check_tensors("feasible", **tensors)
    for name, x in tensors.items():
        if x.shape != d.shape:
            raise ValueError(f"feasible: {name} must have the shape of d; got {tuple(x.shape)} and d {tuple(d.shape)}")
        check_dtype("feasible", name, x)
        if x.dtype == torch.float16 and name in ("total", "squares"):
            raise TypeError(f"feasible: {name} must not be float16, where squares vanish: sum in float32")
        if x.device != d.device:
            raise ValueError(f"feasible: {name} must be on the device of d; got {x.device} and d on {d.device}")
    if u.dtype != d.dtype or squares.dtype != total.dtype:
        raise TypeError(
            "feasible: u must have the dtype of d and squares that of total; "
            + "got " + ", ".join(f"{name} {x.dtype}" for name, x in tensors.items())
        )  # fmt: skip
    n = _options.check_integer("feasible: n", n, 0)
    if n < 2:
        raise ValueError(f"feasible: a standard deviation needs n ≥ 2 retain samples; got {n}")
    delta = _options.within("feasible: delta is the level of a one-sided test and", delta, "(0, 0.5]")
    check_reverse_mode("feasible", d, u, total, squares)
    flat = [x.reshape(x.numel()) for x in tensors.values()]
    return call(feasible_op, *flat, n, delta)[0].reshape(d.shape)
