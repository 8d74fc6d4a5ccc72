"""Choose the settings of the comparison on validation data: python -m bench.tune SCENARIO ... [--methods ...] [--study]

Every method gets the same search: the same learning rates times three values of the one parameter that it has (one
where a scenario takes long), the same tuning seeds (never those of the comparison), the same rule. The test samples are
the same for all seeds and are not read. Every candidate's numbers go to bench/results/search/SCENARIO.json; what was
chosen, and how many candidates were usable, to SCENARIO.json in projgrad/experiments/comparison/settings. Models
are kept in --out. Candidates whose numbers the first file holds are not tried again: delete it to repeat a search. The
searches outside the fast preset had --seeds 100 and the --rates that the file shows, cifar-small --middle.

With --study: the learning rate for every number of retain samples of the n-study, at α = 0.5, where the projection has
to protect what should stay known.
"""

import argparse
import copy
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from projgrad.evaluate import tow
from projgrad.evaluate.problem import Problem
from projgrad.experiments.comparison.comparison import SETTINGS, goal_without_retraining, load_or_train
from projgrad.experiments.comparison.environment import environment
from projgrad.experiments.comparison.methods import METHODS, TUNED_AS, Setting
from projgrad.experiments.comparison.run import unlearn
from projgrad.experiments.comparison.store import read_json, write_json
from projgrad.experiments.scenarios import SCENARIOS

from .report import RESULTS

LOGS = RESULTS / "search"
USABLE = 0.9  # ToW of a candidate that counts as usable
RATES = (0.002, 0.008, 0.032, 0.128, 0.512, 2.048)  # the length of a first step: updates are clipped to norm 1
STUDY_ALPHA = 0.5
STUDIED = ("orthograd", "neggrad")  # with and without the projection
RULE = (
    "highest mean over the tuning seeds of ToW, with validation in the place of test, against the model retrained "
    "without the forget set (where there is none: against the original, and nothing of the forget set)"
)
Tuned = tuple[int, Problem, nn.Module, dict[str, float]]


def candidates(
    name: str, method: str, rates: tuple[float, ...] = RATES, middle: bool = False, alpha: float | None = None
) -> list[Setting]:
    scenario, about = SCENARIOS[name], METHODS[method]
    values = about.values[1:2] if middle else about.values
    if about.symbol == "α" and alpha is not None:
        values = (alpha,)

    def setting(lr: float, value: float) -> Setting:
        if about.symbol == "steps":
            return Setting(lr, round(value * scenario.steps), scenario.n)
        return Setting(lr, scenario.steps, scenario.n, value)

    return [setting(lr, value) for lr in rates for value in values]


def prepare(name: str, seed: int, out: Path, retrains: bool = True) -> Tuned:
    """Return the problem without its test samples, the original model and the accuracies to reach, on a GPU if any."""
    problem = SCENARIOS[name].load(seed).to("cuda" if torch.cuda.is_available() else "cpu")
    problem.test = problem.validation
    original = load_or_train(out, name, seed, "original", problem)
    if problem.training is None or not retrains:
        return seed, problem, original, goal_without_retraining(accuracies(problem, original))
    return seed, problem, original, accuracies(problem, load_or_train(out, name, seed, "retrained", problem))


def accuracies(problem: Problem, model: nn.Module) -> dict[str, float]:
    return {part: problem.accuracy(model, getattr(problem, part)) for part in ("forget", "retain", "test")}


def tried(name: str, prepared: list[Tuned], method: str, setting: Setting) -> dict:
    """Return a candidate's setting, mean accuracies and mean ToW over the tuning seeds."""
    by_seed = []
    for seed, problem, original, goal in prepared:
        model = copy.deepcopy(original)
        unlearn(problem, model, method, setting, seed=seed, forget_batch=SCENARIOS[name].forget_batch)
        scores = accuracies(problem, model)
        by_seed.append(scores | {"tow": tow(scores, goal)})
    means = {key: round(fmean(scores[key] for scores in by_seed), 4) for key in by_seed[0]}
    means["validation"] = means.pop("test")
    return asdict(setting) | means


def chosen(rows: list[dict]) -> dict:
    best = max(rows, key=lambda row: row["tow"])
    return {key: best[key] for key in Setting.__dataclass_fields__}


def searches(name: str, args: argparse.Namespace) -> list[tuple[str, list[Setting]]]:
    """Return methods with their candidates, of which the best is taken; in the study a search for each n."""
    if not args.study:
        methods = args.methods or [m for m in METHODS if m not in TUNED_AS]
        return [(m, candidates(name, m, args.rates, args.middle, args.alpha)) for m in methods]
    scenario = SCENARIOS[name]
    return [
        (method, [Setting(lr, scenario.steps, n, STUDY_ALPHA) for lr in args.rates])
        for method in args.methods or STUDIED
        for n in scenario.study
    ]


def known(log: dict, method: str, setting: Setting) -> dict | None:
    """Return the row of a candidate that was tried before, in either search: a search goes on where it stopped."""
    rows = log["candidates"].get(method, []) + log["study_candidates"].get(method, [])
    return next((row for row in rows if asdict(setting).items() <= row.items()), None)


def keep(log: dict, method: str, rows: list[dict], study: bool, finished: bool = True) -> None:
    """Put in the log the candidates' numbers and, of a finished search, the best, in the place of an earlier search."""
    if not study:
        log["candidates"][method] = rows
        if finished:
            log["chosen"][method] = chosen(rows)
        return
    for table, new in [("study_candidates", rows), ("study", [chosen(rows)])][: 1 + finished]:
        others = [row for row in log[table].get(method, []) if row["n"] != rows[0]["n"]]
        log[table][method] = sorted([*others, *new], key=lambda row: (row["n"], row["lr"]))


def shipped(log: dict) -> dict:
    """Return what the comparison needs of a log: the settings, and how many candidates of each method were usable."""
    counts = {
        method: {"usable": sum(row["tow"] >= USABLE for row in rows), "candidates": len(rows)}
        for method, rows in log["candidates"].items()
    }
    return {"chosen": log["chosen"], "study": log["study"], "counts": counts}


def save(name: str, log: dict) -> None:
    write_json(LOGS / f"{name}.json", log)
    write_json(SETTINGS / f"{name}.json", shipped(log))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenarios", nargs="+", choices=list(SCENARIOS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101])
    parser.add_argument("--out", type=Path, default=Path("out/tuning"))
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="for searches that take long")
    parser.add_argument("--middle", action="store_true", help="only the middle value of each method's own parameter")
    parser.add_argument("--alpha", type=float, help="only this value, for methods whose parameter is α")
    parser.add_argument("--no-retraining", action="store_true", help="compare with the original, none of forget right")
    parser.add_argument("--study", action="store_true", help="tune the n-study instead")
    args = parser.parse_args()
    console = Console()
    with Progress(console=console) as progress:
        for name in args.scenarios:
            path = LOGS / f"{name}.json"
            log = read_json(path) or {"chosen": {}, "study": {}, "candidates": {}, "study_candidates": {}}
            if log.get("seeds", args.seeds) != args.seeds:
                parser.error(f"{path} was tuned on seeds {log['seeds']}: use them, or delete it")
            log |= {"rule": RULE, "seeds": args.seeds, "environment": environment()}
            todo = searches(name, args)
            bar = progress.add_task(name, total=sum(len(grid) for _, grid in todo))
            prepared = [prepare(name, seed, args.out, not args.no_retraining) for seed in args.seeds]
            for method, grid in todo:
                rows = [known(log, method, setting) for setting in grid]
                for i, setting in enumerate(grid):
                    if rows[i] is None:
                        rows[i] = tried(name, prepared, method, setting)
                        keep(log, method, [row for row in rows if row], args.study, None not in rows)
                        save(name, log)
                    progress.advance(bar)
                keep(log, method, rows, args.study)
                save(name, log)
                console.print(name, chosen(rows), max(row["tow"] for row in rows), method, highlight=False)


if __name__ == "__main__":
    main()
