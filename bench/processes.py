"""Steps over several processes, what they exchange and need: `python -m bench.processes [--case NAME ...]`.

Every contender has fresh processes on the CPU, one thread each, and the gloo backend. Bytes: sent by one
process in one step, as rings send them, of `fully_shard` those beside its own. Memory: the peak of the first step and
of later ones above the loaded model, of the process that needs most. A result that is not that of one process with all
samples is refused.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin disturb whoever runs next
os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed memory leaves at once: the peak is what was needed

import argparse
import copy
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import projgrad
from projgrad.experiments.benchmark.models import LEARNING_RATE, Job, conv_net, decoder, mlp
from projgrad.experiments.benchmark.report import Rows
from projgrad.experiments.comparison.memory import peak_memory

from .report import RESULTS

CASES: Mapping[str, tuple[str, int, Callable[[], tuple]]] = {  # samples of every process
    "mlp": ("MLP 784-1024-1024-10", 32, lambda: mlp(784, 1024, 1024, 10)),
    "conv": ("4 conv + group norm + fc, 32 x 32", 32, lambda: conv_net(3, 64, 128, 256, 512)),
    "decoder": ("decoder d = 256, 4 layers, 64 tokens, vocabulary 1000", 16, lambda: decoder(256, 4, 64, 1000)),
    "tiny": ("MLP 8-16-4, for tests", 3, lambda: mlp(8, 16, 10)),
}
CONTENDERS = ("DDP plain", "DDP global", "DDP per_tensor", "DDP plain AdamW", "DDP metric AdamW")
CONTENDERS += ("FSDP2 plain", "FSDP2 global", "FSDP2 plain AdamW", "FSDP2 metric AdamW")
ADAMW_RATE = 1e-4
LATER = 4  # steps after the first
LIMIT = 1e-4  # relative difference of an update from that of one process
COLUMNS = ("case", "model", "contender", "processes", "n", "parameters_mb", "forget_mb", "factors_mb", "corrections_mb")
COLUMNS += ("diagonal_mb", "other_mb", "sent_over_plain", "peak_mb", "later_mb", "difference")


class ShareOf(Job):
    """A job whose batches hold one process's samples; those of all are drawn alike everywhere."""

    def __init__(self, model: nn.Module, batch: Callable[[int], tuple[Tensor, Tensor]], n: int, rank: int, size: int):
        super().__init__(model, batch, n * size)
        self.all = self.samples
        self.samples = tuple(tuple(x[rank * n : (rank + 1) * n] for x in pair) for pair in self.samples)

    def spread(self, contender: str) -> nn.Module:
        """Return the model as the contender spreads it over the processes."""
        if contender.startswith("DDP"):
            return DistributedDataParallel(self.model)
        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        for module in getattr(self.model, "blocks", self.model):
            if any(True for _ in module.parameters()):
                fully_shard(module, mesh=mesh)
        return fully_shard(self.model, mesh=mesh)


Steps = tuple[Callable[[], object], torch.optim.Optimizer, projgrad.OrthoGrad | None]


def step_of(job: ShareOf, contender: str, model: nn.Module) -> Steps:
    """Return a step of a contender, its optimizer, and its unlearner."""
    if contender.endswith("AdamW"):
        optimizer = torch.optim.AdamW(model.parameters(), ADAMW_RATE)
    else:
        optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)

    def losses(k: int) -> Tensor:
        x, y = job.samples[k]
        return job.losses(model(x), y)

    def plain() -> None:
        optimizer.zero_grad()
        (0.5 * losses(1).mean() - 0.5 * losses(0).mean()).backward()
        optimizer.step()

    _, way, *_ = contender.split()
    if way == "plain":
        return plain, optimizer, None
    options = {"metric": "optimizer"} if way == "metric" else {"scope": way}
    unlearner = projgrad.OrthoGrad(model, optimizer, **options)
    return lambda: unlearner.step(lambda: losses(0).mean(), lambda: losses(1)), optimizer, unlearner


def whole(t: Tensor) -> Tensor:
    """Return a tensor whole, where it is in shards."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def difference(job: ShareOf, contender: str, model: nn.Module, single: nn.Module, steps: Steps) -> float:
    """Return how far .grad after one more step is from that of one process, relative."""
    step, optimizer, _ = steps
    job.model, share, job.samples = single, job.samples, job.all
    alone, other, _ = step_of(job, contender, single)
    with torch.no_grad():
        for p, q in zip(single.parameters(), model.parameters(), strict=True):
            p.copy_(whole(q))
            other.state[p] = {key: whole(value).clone() for key, value in optimizer.state.get(q, {}).items()}
    alone()
    job.model, job.samples = model, share
    step()
    found, right = ([whole(p.grad) for p in m.parameters()] for m in (model, single))
    errors, norms = (
        torch.stack([t.norm() for t in ts]) for ts in ([a - b for a, b in zip(found, right, strict=True)], right)
    )
    return float(errors.norm() / norms.norm())


def work(rank: int, size: int, name: str, contender: str, folder: str) -> None:
    """Measure one contender in one of its processes, and leave the numbers in a file."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    torch.manual_seed(0)
    _, n, build = CASES[name]
    job = ShareOf(*build(), n, rank, size)
    single, parameters = copy.deepcopy(job.model), sum(p.numel() for p in job.model.parameters()) * 4
    model = job.spread(contender)
    steps = step, _, unlearner = step_of(job, contender, model)
    with peak_memory() as first:
        step()
    before = {} if unlearner is None else dict(unlearner.sent)
    with peak_memory() as later:
        for _ in range(LATER):
            step()
    total = {} if unlearner is None else unlearner.sent
    sent = {purpose: (total[purpose] - before.get(purpose, 0)) / LATER for purpose in total}
    numbers = {"parameters": parameters, "first": first.bytes, "later": later.bytes, "sent": sent}
    numbers["difference"] = difference(job, contender, model, single, steps)
    Path(folder, str(rank)).write_text(json.dumps(numbers))
    dist.barrier()
    os._exit(0)  # gloo's threads may outlive the group, and abort when they meet an interpreter on its way out


def measure(name: str, contender: str, size: int) -> dict:
    """Return the row of one contender."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (size, name, contender, folder), nprocs=size)
        every = [json.loads(Path(folder, str(rank)).read_text()) for rank in range(size)]
    mega = lambda number: number / 1e6  # noqa: E731
    sent = {key: mega(max(one["sent"].get(key, 0) for one in every)) for one in every for key in one["sent"]}
    listed = ("forget gradient", "K", "corrections", "diagonal")
    other = sum(value for key, value in sent.items() if key not in listed)
    row = {"case": name, "model": CASES[name][0], "contender": contender, "processes": size, "n": CASES[name][1]}
    row |= {"parameters_mb": mega(every[0]["parameters"]), "difference": max(one["difference"] for one in every)}
    row |= {f"{key}_mb": mega(max(one[at] for one in every)) for key, at in (("peak", "first"), ("later", "later"))}
    if sent:
        row |= {"forget_mb": sent["forget gradient"], "factors_mb": sent["K"], "corrections_mb": sent["corrections"]}
        row |= {"diagonal_mb": sent.get("diagonal", 0.0), "other_mb": other}
        row["sent_over_plain"] = sum(sent.values()) / (2 * row["parameters_mb"] * (size - 1) / size)
    if row["difference"] > LIMIT:
        raise ArithmeticError(f"{name}, {contender}: the update is {row['difference']:.1e} from that of one process")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=[name for name in CASES if name != "tiny"])
    parser.add_argument("--processes", nargs="+", type=int, default=[2])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of processes_cpu.csv")
    args = parser.parse_args()
    rows = Rows(args.out / "processes_cpu.csv", COLUMNS, ("case", "contender", "processes"), "cpu")
    for name in args.case:
        for size in args.processes:
            for contender in CONTENDERS:
                rows.add(measure(name, contender, size))


if __name__ == "__main__":
    main()
