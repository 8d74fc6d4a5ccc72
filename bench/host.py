"""Host time of whole steps: `python -m bench.host [--case NAME ...] [--launches]`.

Language models of the usual depth and tiny widths, on one thread: nearly all of a step is what Python and torch need
to start the work. On a GPU that time must fit beside the device's. The contenders take one step each in turn.
`--launches` counts operations that start a kernel instead, on the pretended GPU of the tests. `--profile CASE
CONTENDER` shows where the time goes.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin disturb whoever runs next

import argparse
import cProfile
import pstats
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .command import ROOT
from .contenders import TOKEN_STEPS
from .harness import timed
from .models import LLAMA, SMALL_GPT2, SMALL_LLAMA, TokenJob
from .report import RESULTS, as_text, write_csv
from .machine import environment

NAMES = ("plain", "projgrad global", "projgrad per_tensor")
SAMPLES, TOKENS, ROUNDS = 4, 8, 25
TARGETS = {"llama": (1.6, 1.8), "gpt2": (None, None), "lora": (1.6, None)}
COLUMNS = ("case", "contender", "ms", "over_plain", "at_most", "launches", "launches_over_plain")


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


MODELS = {"llama": llama, "gpt2": gpt2, "lora": lora}


class HostJob(TokenJob):
    """The same with torch's cross entropy: memory is no matter here."""

    def losses(self, ids: Tensor) -> Tensor:
        logits = self.model(ids[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1).mean(1)


def job(case: str) -> TokenJob:
    torch.manual_seed(0)
    return HostJob(MODELS[case]().train(), SAMPLES, TOKENS, 50)


def steps(case: str) -> dict[str, Callable[[], object]]:
    """Return a step of every contender, each on a model of its own."""
    return {name: TOKEN_STEPS[name].start(job(case)) for name in NAMES}


def host_times(case: str, rounds: int) -> dict[str, float]:
    """Return the median milliseconds of a step, all contenders in turn."""
    called, times = steps(case), {name: [] for name in NAMES}
    for i in range(-3, rounds):
        for name, step in called.items():
            seconds = timed(step)
            if i >= 0:
                times[name].append(1e3 * seconds)
    return {name: median(values) for name, values in times.items()}


def profile(case: str, name: str) -> None:
    step = steps(case)[name]
    for _ in range(5):
        step()
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(10):
        step()
    profiler.disable()
    for key in ("tottime", "cumtime"):
        pstats.Stats(profiler).sort_stats(key).print_stats(40)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--profile"]:
        profile(*sys.argv[2:])
    else:
        for case in sys.argv[1:] or MODELS:
            t = host_times(case, ROUNDS)
            print(case, {k: (round(v, 1), round(v / t["plain"], 2)) for k, v in t.items()}, flush=True)
