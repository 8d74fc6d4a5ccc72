"""Whole OrthoGrad steps of language models in bfloat16 on a GPU: `bench.steps --device cuda`, `bench/gpu.sh steps`.

Every contender has a process of its own. Those that fit beside each other take one step each in turn; those that hold
all per-sample gradients run alone, one after the other. First, updates are compared with explicit per-sample gradients
on the small model, in float32 and in bfloat16: what is wrong is not timed.
`--profile CASE CONTENDER` shows where one step goes, `--case` names what to measure.
"""

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from projgrad import StepRecord
from projgrad.experiments.benchmark.harness import DEVICE, release, spread, synchronize, wall_clock
from projgrad.experiments.benchmark.models import TokenJob, build
from projgrad.experiments.benchmark.report import meets
from projgrad.experiments.benchmark.worker import Failed, Worker, complain, serve

from .command import Deadline, arguments, rows_of, started
from .contenders import TOKEN_STEPS as CONTENDERS

COLUMNS = ("case", "model", "contender", "ms", "ms_20", "ms_80", "host_ms", "device_ms", "rounds", "first_ms")
COLUMNS += ("time_over_plain", "times_ours", "target", "met", "peak_mb", "later_mb", "model_mb", "total_mb")
COLUMNS += ("peak_over_plain", "total_over_plain", "memory_ours", "error", "residual", "note")
KEY = ("case", "contender")
ROUNDS = {False: 12, True: 3}  # steps that are timed; fewer of what runs alone
# Relative difference of an update from the explicit one: rounding of float32, and of gradients stored in bfloat16.
LIMITS = {torch.float32: 3e-3, torch.bfloat16: 8 * torch.finfo(torch.bfloat16).eps}
RESIDUALS = {torch.float32: 1e-6, torch.bfloat16: 8 * torch.finfo(torch.bfloat16).eps}


@dataclass(frozen=True)
class StepCase:
    """A language model with n sequences a batch; `targets`: of time, and of peak memory with the model, over plain.

    frugal: see `TokenJob`; a loss that is not torch's own has its samples confirmed in every step.
    """

    kind: str
    n: int
    tokens: int = 512
    targets: tuple[tuple[str, str, float], ...] = ()
    frugal: bool = True

    @property
    def name(self) -> str:
        return f"{self.kind}-n{self.n}" + ("" if self.frugal else "-torch")

    def job(self, tiny: bool, device: str, dtype: torch.dtype = torch.bfloat16) -> tuple[TokenJob, str]:
        model, vocabulary, title = build(self.kind, tiny, dtype, device)
        n, tokens = (2, 6) if tiny else (self.n, self.tokens)
        title = f"{title}, n = {n}, {tokens} tokens" + ("" if self.frugal else ", torch's loss")
        return TokenJob(model, n, tokens, vocabulary, self.frugal), title


CONTRACT = (("time_over_plain", "<=", 1.5), ("total_over_plain", "<=", 1.15))
CASES = [
    StepCase("llama", 4, targets=CONTRACT),
    StepCase("gpt2", 32),
    StepCase("llama", 4, targets=CONTRACT, frugal=False),
    StepCase("gpt2", 32, frugal=False),
    StepCase("llama", 16),
]
GATE = StepCase("gpt2", 4, 128, frugal=False)


def pairs() -> Iterator[tuple[str, str]]:
    """Yield every contender that has a truth, with the contender whose update it must equal."""
    return ((name, contender.truth) for name, contender in CONTENDERS.items() if contender.truth)


def gate_names() -> list[str]:
    return list(dict.fromkeys(itertools.chain.from_iterable(pairs())))


def remaining_cosine(record: StepRecord) -> float:
    """Return the largest cosine to a retain gradient, in units of u, which is what bfloat16 rounds."""
    parts = record.tensors.values() if record.tensors else [record]
    return max(part.residual * part.preserved_norm for part in parts)


def gate(tiny: bool) -> dict[str, dict]:
    """Return every contender's relative difference from its explicit truth, and a note where it is too large."""
    verdict: dict[str, dict] = {}
    for dtype, limit in LIMITS.items():
        job, _ = GATE.job(tiny, DEVICE, dtype)
        forget, retain = job.samples
        most = 3 * forget.shape[1] // 4
        job.samples[0] = torch.cat([retain[:, :most], forget[:, most:]], 1)  # or there would be little to project
        for group in job.optimizer.param_groups:
            group["lr"] = 0.0  # all from the same weights
        updates, records = {}, {}
        for name in gate_names():
            records[name] = CONTENDERS[name].start(job)()
            updates[name] = torch.cat([p.grad.flatten().float() for p in job.model.parameters()])
        for name, truth in pairs():
            mine, theirs, record = updates[name], updates[truth], records[name]
            difference = float((mine - theirs).norm() / theirs.norm())
            about = verdict.setdefault(name, {"note": ""})
            about |= {"error": difference, "residual": getattr(record, "residual", None)}  # in the dtype of the steps
            if not difference <= limit:
                about["note"] = f"wrong: in {dtype} {difference:.1e} from {truth}"
            if record is not None and not remaining_cosine(record) <= RESIDUALS[dtype]:
                about["note"] = f"wrong: in {dtype} {remaining_cosine(record):.1e} of u is left in the span"
            kept = f", of which {record.preserved_norm:.2f} is kept" if record is not None else ""
            print(f"gate, {dtype}, {name}: {difference:.1e} from {truth}{kept}", file=sys.stderr)
        del job, updates
        release()
    return verdict


def step_times(step: Callable[[], object]) -> dict[str, float]:
    """Return the milliseconds of one step from an idle device to an idle device, and until the call returned."""
    synchronize()
    start = time.perf_counter()
    step()
    returned = time.perf_counter()
    synchronize()
    return {"ms": 1e3 * (time.perf_counter() - start), "host_ms": 1e3 * (returned - start)}


def device_time(step: Callable[[], object]) -> float | None:
    """Return the milliseconds of all kernels and copies of one step, without the gaps between them."""
    if DEVICE != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        wall_clock(step)
    return sum(event.self_device_time_total for event in profiler.key_averages()) / 1e3


def answers(case: StepCase, name: str, tiny: bool) -> dict[str, Callable[[], dict]]:
    """Return what a worker answers: "memory" runs a few steps, "time" and "device" one; "gate" compares updates."""
    if name == "gate":
        return {"gate": lambda: gate(tiny)}
    job, title = case.job(tiny, DEVICE)
    step = CONTENDERS[name].start(job)
    release()
    loaded = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0

    def peak() -> float:
        if DEVICE != "cuda":
            return 0.0
        megabytes = torch.cuda.max_memory_allocated() / 1e6
        torch.cuda.reset_peak_memory_stats()
        return megabytes

    def memory() -> dict:
        peak()
        first_ms = wall_clock(step)
        first = peak()
        for _ in range(1 if CONTENDERS[name].heavy else 2):
            wall_clock(step)
        later, model = peak(), loaded / 1e6
        total = max(first, later)
        about = {"model": title, "first_ms": first_ms, "model_mb": model, "total_mb": total}
        return about | {"peak_mb": total - model, "later_mb": later - model}

    def device() -> dict:
        return {"device_ms": device_time(step)}

    return {"ready": dict, "memory": memory, "time": lambda: step_times(step), "device": device}


def work(case: StepCase, name: str, tiny: bool) -> None:
    """Answer questions on the worker's side."""
    try:
        known = answers(case, name, tiny)
        serve(lambda question: known[question]())
    except Exception as error:
        complain(error)


def start(case: StepCase, name: str, tiny: bool) -> Worker:
    return Worker(["-m", "bench.steps_cuda", "--worker", case.name, name] + ["--tiny"] * tiny)


def measured(case: StepCase, names: list[str], tiny: bool, deadline: Deadline) -> dict[str, dict]:
    """Measure memory, then time with one step of each in turn; all of `names` are alive together."""
    rows = {name: {"note": ""} for name in names}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    rounds = max(2, ROUNDS[any(CONTENDERS[name].heavy for name in names)] // (4 if tiny else 1))
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(start(case, name, tiny)) for name in names}
        for i in range(-2, rounds + 1):
            for name in list(workers):
                if 1 < i < rounds and deadline.left() < 0:
                    continue
                try:
                    if i < 0:  # nobody is measured while others load
                        rows[name] |= workers[name].ask("ready" if i == -2 else "memory")
                    elif i < rounds:
                        times[name].append(workers[name].ask("time"))
                    else:
                        rows[name] |= workers[name].ask("device")
                except Failed as error:
                    rows[name]["note"] = str(error).replace(",", ";")[:200]
                    del workers[name]
    for name, row in rows.items():
        if not row["note"]:
            row |= dict(zip(("ms", "ms_20", "ms_80"), spread([t["ms"] for t in times[name]]), strict=True))
            row["host_ms"] = spread([t["host_ms"] for t in times[name]])[0]
        row["rounds"] = len(times[name])
    return rows


def compared(row: dict, plain: dict, ours: dict) -> dict:
    """Return time and memory in units of plain and of ours."""
    ratios = {}
    for column, key, other in (
        ("time_over_plain", "ms", plain),
        ("peak_over_plain", "peak_mb", plain),
        ("total_over_plain", "total_mb", plain),
        ("times_ours", "ms", ours),
        ("memory_ours", "peak_mb", ours),
    ):
        ratios[column] = row[key] / other[key] if row.get(key) and other.get(key) else None
    return ratios


def profile(case: StepCase, name: str, tiny: bool) -> None:
    job, title = case.job(tiny, DEVICE)
    step = CONTENDERS[name].start(job)
    times = [wall_clock(step) for _ in range(4)]
    with torch.profiler.profile() as profiler:
        traced = wall_clock(step)
    print(f"{title}, {name}: steps of {', '.join(f'{t:.1f}' for t in times)} ms; {traced:.1f} ms while profiled")
    events = profiler.key_averages()
    for key in ("self_device_time_total", "self_cpu_time_total") if DEVICE == "cuda" else ("self_cpu_time_total",):
        print(events.table(sort_by=key, row_limit=25, max_name_column_width=70))


def main() -> None:
    cases = {case.name: case for case in CASES}
    args = arguments(
        __doc__,
        ("--case", {"nargs": "+", "choices": cases, "default": list(cases)}),
        ("--profile", {"nargs": 2, "metavar": ("CASE", "CONTENDER")}),
        ("--worker", {"nargs": 2}),
    )
    if args.worker:
        return work(cases[args.worker[0]], args.worker[1], args.tiny)
    if args.profile:
        return profile(cases[args.profile[0]], args.profile[1], args.tiny)
    deadline, failed = Deadline(args.seconds), 0
    rows = rows_of("steps", args, COLUMNS, KEY)
    chosen = [cases[name] for name in args.case if any(part in name for part in args.only.split("|"))]
    with start(CASES[0], "gate", args.tiny) as worker:
        try:
            verdict = worker.ask("gate")
        except Failed as error:
            verdict = {name: {"note": f"unchecked: {error}".replace(",", ";")} for name, _ in pairs()}
    baselines: dict[str, tuple[dict, dict]] = {}
    turns = [(case, False) for case in chosen] + [(case, True) for case in chosen]
    for case, heavy in turns:
        possible = {name: one for name, one in CONTENDERS.items() if not (one.graph and case.frugal)}
        names = [name for name, contender in possible.items() if contender.heavy == heavy]
        for group in [[name] for name in names] if heavy else [names]:
            if deadline.passed(f"{case.name}: {', '.join(group)}"):
                continue
            wrong = {name for name in group if verdict.get(name, {}).get("note")}
            results = measured(case, [name for name in group if name not in wrong], args.tiny, deadline)
            for name in [name for name, row in results.items() if row["note"] == "out of memory" and len(group) > 1]:
                results |= measured(case, [name], args.tiny, deadline)  # perhaps only beside the others
            results |= {name: {} for name in wrong}
            if not heavy:
                baselines[case.name] = (results.get("plain", {}), results.get("projgrad global", {}))
            for name in group:
                row = {"case": case.name, "contender": name, **results[name]}
                row |= {k: v for k, v in verdict.get(name, {}).items() if k != "note" or v}
                row |= compared(row, *baselines.get(case.name, ({}, {})))
                rows.add(row | meets(row, case.targets if name == "projgrad global" else ()))
                failed |= bool(row.get("note")) and not heavy
    sys.exit(int(failed))


if __name__ == "__main__":
    started(main)
