"""The float64 truth of a step: explicit per-sample gradients, and the updates that follow from them."""

from pathlib import Path

import torch
from torch import Tensor, nn

from ...methods.common import trainable_parameters
from ...ops import reference
from .contenders import ALPHA, Job, gradients, scales

LIMITS = {torch.float64: 1e-8, torch.float32: 1e-4}  # of a difference, relative to the norm of the truth
LIMITS |= {dtype: 8 * torch.finfo(dtype).eps for dtype in (torch.bfloat16, torch.float16)}
CLOSE = {2: 0.1, 4: 1e-3, 8: 1e-6}  # the losses in float64 and in the dtype of the model, by its bytes
COPIES = 2  # of G in float64 that making the truth takes


def holds(job: Job) -> int:
    """Return the bytes of G [n, p] in float64."""
    return 8 * job.n * sum(p.numel() for p in trainable_parameters(job.model, job.optimizer).values())


def write_truth(job: Job, path: Path) -> str:
    """Write the updates of a step in float64 to a file, and return in what precision the gradients were taken.

    The model is turned to float64, with the tensors that it is given, where it and its losses allow that. Afterwards it
    is of no use to anybody else.
    """
    precision = "float64" if _in_float64(job) else "gradients as given, the rest float64"
    params = list(trainable_parameters(job.model, job.optimizer).values())
    torch.manual_seed(0)
    grads = torch.autograd.grad(job.forget().sum(), params, allow_unused=True)
    u = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]
    u = torch.cat([g.flatten().double() for g in u])
    sizes = [p.numel() for p in params]
    G = torch.empty(job.n, len(u), dtype=torch.float64, device=u.device)
    torch.manual_seed(0)
    gradients(job, G.split(sizes, 1))
    mean, weights = G.mean(0), scales(job)
    K = G @ G.mT
    parts = zip(u.split(sizes), G.split(sizes, 1), strict=True)
    per_tensor = torch.cat([project(f, rows) for f, rows in parts])
    scale = torch.cat([f.new_full(f.shape, weight) for f, weight in zip(u.split(sizes), weights, strict=True)])
    whole = project(u * scale, G * scale) / scale
    updates = {name: ALPHA * mean - (1 - ALPHA) * f for name, f in (("plain", u), ("global", whole))}
    updates |= {"per_tensor": ALPHA * mean - (1 - ALPHA) * per_tensor}
    projected = {"u, global": whole, "u, per_tensor": per_tensor}
    torch.save({name: x.cpu() for name, x in {**updates, **projected, "gram": K}.items()}, path)
    return precision


def project(u: Tensor, G: Tensor) -> Tensor:
    """Return u [p] without the span of the rows of G [n, p], by the float64 reference of `project_out`."""
    return reference.project_out(u[None], G, 0.0, None)[0][0]


def _in_float64(job: Job) -> bool:
    """Turn a job's model to float64; False, and as it was, where that does not give the same losses."""
    dtypes = {name: x.dtype for name, x in job.model.state_dict().items()}
    first = next(job.model.parameters()).dtype
    torch.manual_seed(0)
    before = job.retain().detach().double()

    def cast(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return tuple(map(_double, args)), {name: _double(x) for name, x in kwargs.items()}

    hook = job.model.register_forward_pre_hook(cast, with_kwargs=True)
    job.model.double()
    try:
        torch.manual_seed(0)
        close = CLOSE[first.itemsize]
        if torch.allclose(job.retain().detach().double(), before, rtol=close, atol=close):
            job.forget()
            return True
    except Exception:  # whatever the model's own code says to float64
        pass
    hook.remove()
    for name, x in [*job.model.named_parameters(), *job.model.named_buffers()]:
        x.data = x.data.to(dtypes.get(name, first) if x.is_floating_point() else x.dtype)
    return False


def _double(x: object) -> object:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def cosine_left(job: Job, update: Tensor) -> float:
    """Return the largest cosine of an update [p] with an explicit retain gradient, products in float64."""
    G = torch.empty(job.n, len(update), dtype=torch.float64, device=update.device)
    params = trainable_parameters(job.model, job.optimizer).values()
    torch.manual_seed(0)
    gradients(job, G.split([p.numel() for p in params], 1))
    lengths = torch.linalg.vector_norm(G, dim=1) * torch.linalg.vector_norm(update.double())
    return float(((G @ update.double()).abs() / lengths.clamp_min(torch.finfo(torch.float64).tiny)).max())


def difference(result: Tensor, truth: str, path: Path) -> float:
    """Return the error of a result relative to the norm of the truth.

    result: an update [p], K [n, n], or of another package the projected forget gradient [p]. truth: a name in the file.
    Raises ValueError where the shapes differ.
    """
    result, exact = result.double().cpu(), torch.load(path, weights_only=True)[truth]
    if exact.shape != result.shape:
        raise ValueError(f"the result has the shape {tuple(result.shape)}, and should have {tuple(exact.shape)}")
    return float((result - exact).norm() / exact.norm())
