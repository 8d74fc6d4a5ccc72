"""Host time of whole steps: `python -m bench.host [--case NAME ...]`.

Language models of the usual depth and tiny widths, on one thread of a CPU: nearly all of a step is what Python and
torch need to start the work. On a GPU that must fit beside the device's own time. The contenders take one step each in
turn. Operations that start a kernel are counted on the pretended GPU of the tests.
`--profile CASE CONTENDER` shows where the time goes.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin disturb whoever runs next

import argparse
import cProfile
import pstats
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projgrad.experiments.benchmark.harness import spread, timed
from projgrad.experiments.benchmark.machine import environment
from projgrad.experiments.benchmark.models import LLAMA, SMALL_GPT2, SMALL_LLAMA, TokenJob
from projgrad.experiments.benchmark.report import write_csv

from .command import ROOT
from .contenders import TOKEN_STEPS
from .report import RESULTS

NAMES = ("plain", "projgrad global", "projgrad per_tensor")
SAMPLES, TOKENS, VOCABULARY = 4, 8, 50
TARGETS = {("llama", NAMES[1]): 1.6, ("llama", NAMES[2]): 1.8, ("lora", NAMES[1]): 1.6}
LAUNCHES = 1.35  # at most, in units of plain
COLUMNS = ("case", "model", "contender", "ms", "ms_20", "ms_80", "rounds", "over_plain", "at_most")
COLUMNS += ("launches", "launches_over_plain", "launches_at_most")


def llama() -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(**{**SMALL_LLAMA, "num_hidden_layers": LLAMA["num_hidden_layers"]})
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    import transformers

    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**SMALL_GPT2, "n_layer": 12}))


def lora() -> nn.Module:
    import peft

    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=layers, lora_dropout=0.0))


CASES = {
    "llama": ("Llama of 16 layers, 146 tensors", llama),
    "gpt2": ("GPT-2 of 12 layers, 148 tensors", gpt2),
    "lora": ("LoRA on all 112 linear layers of that Llama, 224 tensors", lora),
}


class HostJob(TokenJob):
    """The same with torch's cross entropy: memory is no matter here."""

    def losses(self, ids: Tensor) -> Tensor:
        logits = self.model(ids[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1).mean(1)


def job(case: str) -> HostJob:
    torch.manual_seed(0)
    return HostJob(CASES[case][1]().train(), SAMPLES, TOKENS, VOCABULARY)


def start(case: str) -> dict[str, Callable[[], object]]:
    """Return a step of every contender, each on a model of its own."""
    return {name: TOKEN_STEPS[name].start(job(case)) for name in NAMES}


def host_times(case: str, rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds of every step, all contenders in turn; three rounds are warm-up."""
    steps, times = start(case), {name: [] for name in NAMES}
    for i in range(-3, rounds):
        for name, step in steps.items():
            seconds = timed(step)
            if i >= 0:
                times[name].append(1e3 * seconds)
    return times


def launches(case: str, name: str) -> int:
    """Return how many operations of the third step start a kernel on the pretended GPU."""
    sys.path.append(str(ROOT / "tests" / "support"))
    from pretend import Gpu, Pretend, to_device

    work = job(case)
    with Gpu() as gpu:
        to_device(work.model)
        work.samples = [Pretend(ids) for ids in work.samples]
        work.optimizer = torch.optim.SGD(work.model.parameters(), 1e-4)
        step = TOKEN_STEPS[name].start(work)
        for _ in range(3):
            gpu.launched = 0
            step()
    return gpu.launched


def rows_of(case: str, rounds: int) -> list[dict]:
    times, counts = host_times(case, rounds), {name: launches(case, name) for name in NAMES}
    middle = {name: spread(some) for name, some in times.items()}
    return [
        {
            "case": case,
            "model": f"{CASES[case][0]}, n = {SAMPLES}, {TOKENS} tokens",
            "contender": name,
            **dict(zip(("ms", "ms_20", "ms_80"), middle[name], strict=True)),
            "rounds": rounds,
            "over_plain": middle[name][0] / middle["plain"][0],
            "at_most": TARGETS.get((case, name)),
            "launches": counts[name],
            "launches_over_plain": counts[name] / counts["plain"],
            "launches_at_most": LAUNCHES if name != "plain" else None,
        }
        for name in NAMES
    ]


def profile(case: str, name: str) -> None:
    """Print where the time of ten steps goes."""
    step, profiler = start(case)[name], cProfile.Profile()
    for _ in range(5):
        step()
    profiler.enable()
    for _ in range(10):
        step()
    profiler.disable()
    for key in ("tottime", "cumtime"):
        pstats.Stats(profiler).sort_stats(key).print_stats(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=25, help="timed steps of every contender [25]")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of host_cpu.csv")
    parser.add_argument("--profile", nargs=2, metavar=("CASE", "CONTENDER"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.profile:
        return profile(*args.profile)
    rows, about = [], environment()
    for case in args.case:
        for row in rows_of(case, max(2, args.rounds)):
            rows.append(row | about)
            print(f"{case:6} {row['contender']:20} {row['ms']:6.1f} ms, {row['over_plain']:.2f} x plain", end="")
            print(f", {row['launches']} launches, {row['launches_over_plain']:.2f} x", flush=True)
    write_csv(args.out / "host_cpu.csv", rows, [*COLUMNS, *about])


if __name__ == "__main__":
    main()
