"""Is what `projgrad plan` predicts what a step takes? `python -m bench.planned [--case NAME ...]`, five minutes.

Five models on a CPU: the memory of a process at its peak, above what it had before the model was made, and the
operations of a plain step as torch counts them. Every step runs in a process of its own. Plans of the steps that were
measured on GPUs (bench/results/gpu_steps.csv, steps_h200.csv) are compared with those. bench/results/planned.csv.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin disturb whoever runs next

import torch
from torch import Tensor, nn

import projgrad
from projgrad.experiments.benchmark.machine import environment
from projgrad.experiments.benchmark.models import Job as Batches
from projgrad.experiments.benchmark.models import conv_net, decoder, mlp
from projgrad.experiments.benchmark.report import read_csv, write_csv
from projgrad.experiments.benchmark.worker import Worker, complain, serve
from projgrad.experiments.comparison.memory import peak_memory
from projgrad.experiments.plan.plan import DTYPES
from projgrad.experiments.plan.steps import Job, costs
from projgrad.experiments.plan.subjects import Subject, subject_of

from .command import started
from .report import RESULTS

COLUMNS = ("case", "step", "n", "dtype", "optimizer", "planned_mb", "measured_mb", "ratio")
COLUMNS += ("planned_first_mb", "measured_first_mb", "first_ratio")
LIMIT = 0.1  # of a prediction's error


class Case(NamedTuple):
    """A model, by a function of `benchmark.models` or a type of transformers with its options."""

    model: Callable[[], tuple[nn.Module, Callable]] | tuple[str, dict]
    n: int
    tokens: int = 64
    optimizer: str = "sgd"
    dtype: str = "float32"
    lora: int = 0

    def subject(self, folder: Path) -> Subject:
        if isinstance(self.model, tuple):
            return subject_of(str(_saved(*self.model, folder)), self.tokens, self.lora, "float32")
        made: list[Callable] = []

        def make() -> nn.Module:
            model, batch = self.model()
            made.append(batch)
            return model

        def losses(model: nn.Module, n: int) -> Callable[[], Tensor]:
            x, y = made[-1](n)
            return lambda: Batches.losses(model(x), y)

        return Subject("", make, losses)


LLAMA = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}
LLAMA |= {"num_key_value_heads": 2, "vocab_size": 8000, "tie_word_embeddings": True}
GPT2 = {"n_embd": 384, "n_layer": 6, "n_head": 6, "vocab_size": 8000, "n_positions": 128}
CASES = {
    "mlp": Case(lambda: mlp(784, 2048, 2048, 10), 64),
    "conv": Case(lambda: conv_net(3, 64, 128, 256), 64),
    "decoder": Case(lambda: decoder(512, 6, 128, 4000), 16, optimizer="adamw"),
    "gpt2": Case(("gpt2", GPT2), 16, 128, "adamw"),
    "llama-lora": Case(("llama", LLAMA), 32, 128, "adamw", lora=8),
}
WAYS = ("plain", "global", "per_tensor", "metric")


def _saved(kind: str, options: dict, folder: Path) -> Path:
    from transformers import AutoConfig

    AutoConfig.for_model(kind, **options).save_pretrained(folder / kind)
    return folder / kind / "config.json"


def work(name: str, way: str, folder: Path) -> None:
    """Answer with the peaks of a first and of a second step, with the model in them."""
    try:
        case = CASES[name]
        serve(lambda _: peaks(case, case.subject(folder), way))
    except Exception as error:
        complain(error)


def peaks(case: Case, subject: Subject, way: str) -> dict:
    small = nn.Linear(8, 8)
    small(torch.zeros(1, 8)).sum().backward()
    torch.optim.SGD(small.parameters()).step()  # code that is loaded once, torch._dynamo among it, is not measured
    before = torch.get_default_dtype()
    with peak_memory() as whole:
        torch.set_default_dtype(DTYPES[case.dtype])
        model = subject.make().train()
        torch.set_default_dtype(before)
        job = Job(model, lambda k: subject.losses(model, k), case.n, case.optimizer, "cpu")
        step = _step(job, way)
        step()
    held = sum(t.nbytes for p in job.params for t in (p, p.grad, *_state(job, p)) if t is not None)
    held += sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    with peak_memory() as later:
        step()
    return {"first_mb": whole.bytes / 1e6, "mb": (later.bytes + held) / 1e6}


def _state(job: Job, p: Tensor) -> list[Tensor]:
    return [value for value in job.optimizer.state.get(p, {}).values() if isinstance(value, Tensor)]


def _step(job: Job, way: str) -> Callable[[], object]:
    if way == "plain":
        return job.plain
    options = {"per_tensor": {"scope": "per_tensor"}, "metric": {"metric": "optimizer"}}.get(way, {})
    unlearner = projgrad.OrthoGrad(job.model, job.optimizer, 0.5, **options)
    return lambda: unlearner.step(lambda: job.forget().mean(), job.retain)


def measure(name: str, folder: Path) -> list[dict]:
    case, rows = CASES[name], []
    planned = costs(case.subject(folder), WAYS, case.n, DTYPES[case.dtype], case.optimizer)
    for way in WAYS:
        arguments = ["-m", "bench.planned", "--worker", name, way, "--folder", str(folder)]
        with Worker(arguments, {"MALLOC_MMAP_THRESHOLD_": "65536"}) as worker:
            found = worker.ask()
        row = {"case": name, "step": way, "n": case.n, "dtype": case.dtype, "optimizer": case.optimizer}
        row |= {"planned_mb": planned[way].peak_bytes / 1e6, "measured_mb": found["mb"]}
        row |= {"planned_first_mb": planned[way].first_step_bytes / 1e6, "measured_first_mb": found["first_mb"]}
        rows.append(row)
    return rows


def measured_on_gpus() -> dict[tuple[str, str], tuple[float, float]]:
    """Return the MB of first and later steps, by case and contender."""
    found = {}
    for row in read_csv(RESULTS / "gpu_steps.csv"):
        found[row["case"], row["contender"]] = float(row["total_mb"]), float(row["model_mb"]) + float(row["later_mb"])
    for row in read_csv(RESULTS / "steps_h200.csv"):
        if row["later_mb"] and row["first_mb"] and "mixed" not in row["note"]:
            found[row["case"], row["contender"]] = float(row["first_mb"]), float(row["later_mb"])
    return found


def on_gpus() -> list[dict]:
    """Return rows for language models in bfloat16 with SGD on 512 tokens, as they were measured on GPUs."""
    measured, rows = measured_on_gpus(), []
    names = {"plain": "plain", "projgrad global": "global", "explicit QR, per tensor": "explicit_qr"}
    for name, kind, n in (("llama-n4", "Llama-3.2-1B", 4), ("gpt2-n32", "gpt2", 32)):
        for case, loss in ((name, "chunked"), (f"{name}-torch", "float32")):
            ways = {way: measured[case, one] for one, way in names.items() if (case, one) in measured}
            planned = costs(subject_of(kind, 512, loss=loss), ways, n, torch.bfloat16, "sgd", "cuda")
            for way, (first, later) in ways.items():
                row = {"case": f"{case}, GPU", "step": way, "n": n, "dtype": "bfloat16", "optimizer": "sgd"}
                row |= {"planned_mb": planned[way].peak_bytes / 1e6, "measured_mb": later}
                rows.append(row | {"planned_first_mb": planned[way].first_step_bytes / 1e6, "measured_first_mb": first})
    return rows


def main() -> None:
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=[*CASES, "gpu"], default=[*CASES, "gpu"])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for planned.csv")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(*args.worker, args.folder)
    path, about = args.out / "planned.csv", environment()
    with tempfile.TemporaryDirectory() as folder:
        for name in args.case:
            rows = on_gpus() if name == "gpu" else measure(name, Path(folder))
            for row in rows:
                row["ratio"] = row["planned_mb"] / row["measured_mb"]
                row["first_ratio"] = row["planned_first_mb"] / row["measured_first_mb"]
                off = "" if abs(row["ratio"] - 1) <= LIMIT else f", more than {LIMIT:.0%} off"
                numbers = f"{row['planned_mb']:.0f} MB planned, {row['measured_mb']:.0f} measured, {row['ratio']:.2f}"
                print(f"{row['case']}, {row['step']}: {numbers}{off}; first step {row['first_ratio']:.2f}", flush=True)
            done = {row["case"] for row in rows}
            others = [row for row in read_csv(path) if row["case"] not in done] if path.exists() else []
            write_csv(path, [*others, *(row | about for row in rows)], [*COLUMNS, *about])


if __name__ == "__main__":
    started(main)
