"""Choose the demo's settings on validation data: python -m bench.tune_demo [digits] [faces]

Every method gets the same search: 15 candidates, the same tuning seeds (never the demo's), the same rule. The test
images are the same for all seeds and are not read. Writes projgrad/demo/settings.json with every candidate's numbers.

What such a search does not cover: the ranges themselves, the numbers of steps and the training recipe were found by
hand, on tuning seeds of an earlier split that shared images with today's test set, and ranges whose best value lay at
an edge were moved. The tie rule was added after a first full run, where an exact tie had picked the worse forgetter.
"""

import argparse
import copy
import itertools
import json
from dataclasses import asdict
from statistics import fmean

import torch
from rich.console import Console
from rich.progress import Progress

from projgrad.data import TASKS
from projgrad.demo.environment import environment
from projgrad.demo.job import SETTINGS, write_json
from projgrad.demo.methods import TUNED
from projgrad.demo.runs import Setting, accuracy, train, unlearn

LIMIT = 0.05
RULE = (
    "highest mean validation accuracy over the tuning seeds among candidates whose mean share of labels left to forget "
    f"is at most {LIMIT}, ties broken by the smaller share; where no candidate reaches that, the highest validation "
    "accuracy minus that share"
)
SEEDS = {"digits": (100, 101, 102), "faces": (100, 101, 102, 103)}
PLANS = {
    "digits": {"n": 64, "steps": 60, "more_steps": [60, 150, 300], "panel": [16, 64, 256], "panel_steps": 30},
    "faces": {"n": 32, "steps": 30, "more_steps": [30, 75, 150], "panel": [8, 32, 64], "panel_steps": 15},
}
RATES = {  # by how much ascent there is in the update: it destroys a model at rates that fine-tuning needs
    "digits": {"finetune": (0.2, 0.4, 0.8, 1.6, 3.2), "ascent": (0.003, 0.006, 0.0125, 0.025, 0.05)},
    "faces": {"finetune": (0.1, 0.2, 0.4, 0.8, 1.6), "ascent": (0.001, 0.002, 0.004, 0.008, 0.016)},
}
BOTH_RATES = {"digits": (0.1, 0.2, 0.4, 0.8, 1.6), "faces": (0.005, 0.01, 0.02, 0.04, 0.08)}  # NegGrad+ and OrthoGrad
ALPHAS = (0.5, 0.8, 0.95)
PANEL_ALPHA = 0.5  # the projection, not the mean retain gradient, has to protect what should stay known
TOLERATED = 0.02
USABLE = (
    f"leaves at most {LIMIT:.0%} to forget, and at most {100 * TOLERATED:.0f} points of validation accuracy are lost"
)


def candidates(name: str, method: str) -> list[Setting]:
    """Learning rate x alpha where the method has one, learning rate x number of steps where it has none.

    NegGrad+ takes more steps than OrthoGrad: its steps are cheaper.
    """
    plan, rates = PLANS[name], RATES[name].get(method, BOTH_RATES[name])
    if method == "panel":
        return [Setting(lr, plan["panel_steps"], plan["n"], PANEL_ALPHA) for lr in rates]
    if method in ("ascent", "finetune"):
        return [Setting(lr, steps, plan["n"]) for lr, steps in itertools.product(rates, plan["more_steps"])]
    steps = plan["more_steps"][1] if method == "neggrad" else plan["steps"]
    return [Setting(lr, steps, plan["n"], alpha) for lr, alpha in itertools.product(rates, ALPHAS)]


def choose(rows: list[dict]) -> dict:
    allowed = [row for row in rows if row["forget"] <= LIMIT]
    if allowed:
        return max(allowed, key=lambda row: (row["validation"], -row["forget"]))
    return max(rows, key=lambda row: row["validation"] - row["forget"])


def tune(name: str, progress: Progress) -> dict:
    plan, seeds = PLANS[name], SEEDS[name]
    grids = {method: candidates(name, method) for method in (*TUNED, "panel")}
    bar = progress.add_task(name, total=len(seeds) * (1 + sum(map(len, grids.values()))))
    originals = []
    for seed in seeds:
        task = TASKS[name](seed)
        task = task._replace(test=task.validation)  # the test split stays unread
        originals.append((seed, task, train(task, seed, with_forget=True)))
        progress.advance(bar)
    before = fmean(accuracy(model, task.validation) for _, task, model in originals)
    found: dict[str, list[dict]] = {}
    for method, grid in grids.items():
        found[method], named = [], "orthograd" if method == "panel" else method
        for setting in grid:
            runs = []
            for seed, task, model in originals:
                runs.append(unlearn(copy.deepcopy(model), task, named, setting, seed=seed))
                progress.advance(bar)
            means = {key: round(fmean(getattr(run, key) for run in runs), 4) for key in ("forget", "validation")}
            found[method].append(asdict(setting) | means)
    panel = found.pop("panel")
    fields = tuple(Setting.__dataclass_fields__)
    chosen = {method: {key: choose(rows)[key] for key in fields} for method, rows in found.items()}
    return {
        "command": f"python -m bench.tune_demo {name}",
        "rule": RULE,
        "limit": LIMIT,
        "seeds": list(seeds),
        "chosen": chosen,
        "panel": {"n": plan["panel"], **{key: choose(panel)[key] for key in ("lr", "steps", "alpha")}},
        "usable_means": USABLE,
        "usable": {
            method: sum(row["forget"] <= LIMIT and row["validation"] >= before - TOLERATED for row in rows)
            for method, rows in found.items()
        },
        "original_validation": round(before, 4),
        "candidates": found,
        "panel_candidates": panel,
        "environment": environment(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="*", help="digits, faces; default: both")
    names = parser.parse_args().data or list(TASKS)
    if unknown := set(names) - set(TASKS):
        parser.error(f"no such data: {', '.join(sorted(unknown))}")
    console = Console()
    settings = json.loads(SETTINGS.read_text()) if SETTINGS.exists() else {}
    with Progress(console=console) as progress:
        for name in names:
            settings[name] = tune(name, progress)
            write_json(SETTINGS, settings)
            console.print(name, settings[name]["chosen"], settings[name]["usable"], settings[name]["panel"])


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
