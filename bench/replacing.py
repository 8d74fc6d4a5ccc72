"""The published loop of OrthoGrad and projgrad on a small CNN: `python -m bench.replacing [--rounds N] [--out FOLDER]`.

The loop makes all per-sample gradients with vmap, a QR decomposition for every tensor, and takes the columns of Q out
of the forget gradient one after the other. First every update is compared, then the contenders take one step each in
turn. docs/replacing.md shows how one stands in for the other.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin disturb whoever runs next

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from projgrad.experiments.benchmark.contenders import ALPHA, orthograd, plain
from projgrad.experiments.benchmark.harness import spread, timed
from projgrad.experiments.benchmark.machine import environment
from projgrad.experiments.benchmark.models import Job, conv_net
from projgrad.experiments.benchmark.report import write_csv

from .contenders import vmap_qr, vmap_qr_per_tensor
from .report import RESULTS

LIMIT = 2e-5  # of ‖update - reference‖ / ‖reference‖ in float32
SIZES = {"cnn-16": (16, (3, 16, 32)), "cnn-64": (64, (3, 16, 32))}  # samples, channels of 3 x 3 convolutions
TINY = {"cnn-4": (4, (3, 8))}
COLUMNS = ("case", "model", "contender", "ms", "ms_20", "ms_80", "rounds", "over_plain", "reference", "error")

LossOfOne = Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]


def published_update(
    model: nn.Module,
    forget_loss: Tensor,
    loss_of_one: LossOfOne,
    batch: tuple[Tensor, Tensor],
    alpha: float,
    mask: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return α mean_j(g_j) - (1 - α) u_perp by parameter, as the published code of OrthoGrad computes it.

    Every tensor on its own, without a test of the rank. mask: boolean; u is kept in it and every g_j outside of it.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    us = torch.autograd.grad(forget_loss, list(params.values()))
    rows = vmap(grad(loss_of_one), (None, 0, 0))({name: p.detach() for name, p in params.items()}, *batch)
    update = {}
    for (name, p), u in zip(params.items(), us, strict=True):
        u, G = u.flatten(), rows[name].flatten(1)
        if mask is not None:
            u, G = u * mask[name].flatten(), G * ~mask[name].flatten()
        for q in torch.linalg.qr(G.mT).Q.mT:
            u = u - (u @ q) / (q @ q) * q
        update[name] = (alpha * G.mean(0) - (1 - alpha) * u).view_as(p)
    return update


def published(job: Job) -> Callable[[], object]:
    """Start steps by the published loop."""

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return job.losses(functional_call(job.model, params, (x[None],)), y[None])[0]

    def step() -> None:
        job.optimizer.zero_grad()
        update = published_update(job.model, job.forget(), loss, job.samples[1], ALPHA)
        for name, p in job.model.named_parameters():
            p.grad = update[name]
        job.optimizer.step()

    return step


CONTENDERS = {  # how a step is made, and whose update it has to equal
    "plain": (plain, None),
    "published loop": (published, None),
    "vmap + QR per tensor": (vmap_qr_per_tensor, "published loop"),
    "projgrad per_tensor": (orthograd(scope="per_tensor"), "published loop"),
    "vmap + QR": (vmap_qr, None),
    "projgrad global": (orthograd(scope="global"), "vmap + QR"),
}


def start(n: int, channels: tuple[int, ...]) -> dict[str, tuple[Job, Callable[[], object]]]:
    """Return a job and its step for every contender: the same weights and samples in all of them."""
    started = {}
    for name, (make, _) in CONTENDERS.items():
        torch.manual_seed(0)
        job = Job(*conv_net(*channels), n)
        started[name] = job, make(job)
    return started


def errors(started: Mapping[str, tuple[Job, Callable[[], object]]]) -> dict[str, float]:
    """Take the first step of all, and return how far each update is from its reference, relative."""
    updates = {}
    for name, (job, step) in started.items():
        step()
        updates[name] = torch.cat([p.grad.double().flatten() for p in job.model.parameters()])
    return {
        name: float((updates[name] - updates[other]).norm() / updates[other].norm())
        for name, (_, other) in CONTENDERS.items()
        if other
    }


def rows_of(case: str, n: int, channels: tuple[int, ...], rounds: int) -> list[dict]:
    started = start(n, channels)
    wrong, times = errors(started), {name: [] for name in started}
    for i in range(-2, rounds):
        for name, (_, step) in started.items():
            seconds = timed(step)
            if i >= 0:
                times[name].append(1e3 * seconds)
    middle = {name: spread(some) for name, some in times.items()}
    title = f"{len(channels) - 1} conv ({', '.join(map(str, channels[1:]))}) + group norm + fc, 32 x 32, n = {n}"
    return [
        {
            "case": case,
            "model": title,
            "contender": name,
            **dict(zip(("ms", "ms_20", "ms_80"), middle[name], strict=True)),
            "rounds": rounds,
            "over_plain": middle[name][0] / middle["plain"][0],
            "reference": reference,
            "error": wrong.get(name),
        }
        for name, (_, reference) in CONTENDERS.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25, help="timed steps of every contender [25]")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: for tests")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of replacing_cpu.csv")
    args = parser.parse_args()
    rows, about = [], environment()
    for case, (n, channels) in (TINY if args.tiny else SIZES).items():
        for row in rows_of(case, n, channels, max(2, args.rounds)):
            rows.append(row | about)
            line = f"{case:7} {row['contender']:21} {row['ms']:8.1f} ms, {row['over_plain']:6.2f} x plain"
            print(line + (f", {row['error']:.0e} from {row['reference']}" if row["reference"] else ""), flush=True)
    write_csv(args.out / "replacing_cpu.csv", rows, [*COLUMNS, *about])
    wrong = [row for row in rows if row["reference"] and not row["error"] <= LIMIT]
    sys.exit("".join(f"{row['contender']} is wrong by {row['error']:.1e}\n" for row in wrong) or None)


if __name__ == "__main__":
    main()
