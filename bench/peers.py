"""K and the projected forget gradient by every peer: `python -m bench.peers [--case NAME ...]`, on a CPU.

As `bench.steps` measures: a process for every contender, memory in a fresh one, time in turn, nothing that is wrong.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin disturb whoever runs next

import argparse
from pathlib import Path

import torch

from projgrad.experiments.benchmark.models import Job
from projgrad.experiments.benchmark.peer import Call
from projgrad.experiments.benchmark.peers import PEERS
from projgrad.experiments.benchmark.report import read_csv

from . import steps
from .command import started
from .contenders import CONV, ENCODER, MLP, Case, Contender
from .report import RESULTS

FAST = ("plain", "projgrad", "projgrad per_tensor", "torchjd")  # the others get fewer rounds
REFERENCES = {"gram": "vmap + Gram", "global": "vmap + QR", "per_tensor": "vmap + QR per_tensor"}
TRUTH = "{} in float64"  # of each of these; in float32 the QR of nearly dependent gradients is off by 1e-4 itself
MODELS = {
    "mlp": ("MLP 784-1024-1024-10", 64, MLP),
    "conv": ("4 conv + group norm + fc, 32 x 32", 64, CONV),
    "encoder": ("encoder d = 256, 4 blocks, 64 tokens", 32, ENCODER),
}


def _grams() -> dict[str, Contender]:
    """Return one contender for every K: what differs in the projection alone is left out."""
    same = ("projgrad per_tensor", "vmap + QR", "vmap + QR per_tensor")
    truth = {TRUTH.format("vmap + Gram"): _truth("vmap + Gram", "gram")}
    return {name: _contender(name, "gram") for name in PEERS if name not in same} | truth


def _contender(name: str, question: str) -> Contender:
    peer = PEERS[name]
    start = peer.start if question == "gram" else peer.project
    truth = TRUTH.format(REFERENCES["gram" if question == "gram" else peer.scope]) if peer.scope else None
    return Contender(start, truth, peer.module, name not in FAST)


def _truth(name: str, question: str) -> Contender:
    def start(job: Job) -> Call:
        job.model.double()
        job.samples = tuple(tuple(x.double() if x.is_floating_point() else x for x in some) for some in job.samples)
        return PEERS[name].start(job) if question == "gram" else PEERS[name].project(job)

    return Contender(start, slow=True)


def _projections() -> dict[str, Contender]:
    truths = {TRUTH.format(name): _truth(name, "projection") for name in ("vmap + QR", "vmap + QR per_tensor")}
    return {name: _contender(name, "projection") for name in PEERS} | truths


CONTENDERS = {"gram": _grams(), "projection": _projections()}
CASES = [
    Case(
        f"{question}-{name}",
        title,
        n,
        **sizes,
        time={},
        memory={},
        contenders=CONTENDERS[question],
        ours="projgrad",
        explicit="vmap + Gram",
        command="bench.peers",
    )
    for name, (title, n, sizes) in MODELS.items()
    for question in CONTENDERS
]
TITLES = {"gram": "K", "projection": "projected forget gradient"}


def _cells(row: dict | None) -> list[str]:
    """Return time and memory of one row, or why there are none."""
    if row is None:
        return ["", ""]
    if row["note"]:
        return [
            row["note"].partition(":")[0] + (f" by {float(row['difference']):.0e}" if row["difference"] else ""),
            "",
        ]
    return [f"{float(row['ms']):.3g} ms", f"{float(row['peak_mb']):.3g} MB" if row["peak_mb"] else ""]


def table(path: Path = RESULTS / "peers_cpu.csv") -> str:
    """Return time and memory of every peer, model by model."""
    if not path.exists():
        return "Not measured: `python -m bench.peers`."
    rows = read_csv(path)
    by_name = {(row["case"], row["contender"]): row for row in rows}
    lines = [
        f"Float32 on {rows[0]['threads']} threads, {rows[0]['device']}, torch {rows[0]['torch']}, commits "
        f"{', '.join(dict.fromkeys(row['commit'] for row in rows))}. Median time; memory above the loaded model:"
    ]
    for name, (title, n, _) in MODELS.items():
        if not any(case.endswith(f"-{name}") for case, _ in by_name):
            continue
        heads = [f"{what}, {unit}" for what in TITLES.values() for unit in ("time", "memory")]
        lines += ["", f"| {title}, n = {n} | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
        for peer in PEERS:
            found = [by_name.get((f"{question}-{name}", peer)) for question in TITLES]
            if any(found):
                lines.append(f"| {peer} | " + " | ".join(cell for row in found for cell in _cells(row)) + " |")
    return "\n".join(lines)


def main() -> None:
    from rich.console import Console

    cases = {case.name: case for case in CASES}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=cases, default=list(cases), metavar="NAME", help=", ".join(cases))
    parser.add_argument("--repeats", type=int, help="timed calls of every fast contender, at least 2")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for peers_cpu.csv")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(steps.THREADS)
    if args.worker:
        case = cases[args.worker[0]]
        return steps.work(case, case.contenders[args.worker[1]], args.result)
    console = Console(width=150)
    for name in args.case:
        rows = steps.measure(cases[name], max(2, args.repeats or cases[name].rounds), console)
        steps.write(rows, args.out / "peers_cpu.csv", CASES)
        console.print(steps.details(rows))


if __name__ == "__main__":
    started(main)
