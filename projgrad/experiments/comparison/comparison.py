"""The whole comparison as a list of runs, each saved when it is finished: what is on disk is not run again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ... import evaluate
from ...evaluate.metrics import PARTS
from ...evaluate.problem import MissingData, Problem
from ..scenarios import SCENARIOS
from .environment import environment
from .memory import peak_bytes
from .methods import METHODS, TITLES, TUNED_AS, Setting
from .run import Unlearned, train, unlearn
from .store import load_or_set_aside, read_json, read_or_set_aside, save_model, write_json

SETTINGS = Path(__file__).with_name("settings")
CURVE_POINTS = 12
FIRST_SEED = 5  # the seeds of the search, 100 and 101, forget digits 0 and 1, people 20 and 21, speakers 1 and 2
MEMORY_SECONDS = 3.0  # one new process for each method


@dataclass(frozen=True)
class ComparisonPlan:
    """What to run. settings, study: by scenario, then method; memory: also measure the peak memory of a step."""

    command: str
    seeds: tuple[int, ...]
    settings: dict[str, dict[str, Setting]]
    study: dict[str, dict[str, tuple[Setting, ...]]]
    memory: bool = True


def read_settings(scenario: str) -> dict[str, Any]:
    """Return what `bench.tune` chose on validation data.

    "chosen" and "study": settings by method. "counts": how many candidates of a method were usable, which shows a
    method that needs luck.
    """
    return read_json(SETTINGS / f"{scenario}.json") or {"chosen": {}, "study": {}, "counts": {}}


def make_plan(
    command: str,
    scenarios: tuple[str, ...],
    seeds: int,
    methods: tuple[str, ...] | None = None,
    study: bool = False,
    memory: bool = True,
) -> ComparisonPlan:
    """Plan runs with the chosen settings; methods: by default all that were tuned on the scenario."""
    settings, studies = {}, {}
    for name in scenarios:
        tuning = read_settings(name)
        chosen = {method: Setting(**values) for method, values in tuning["chosen"].items()}
        wanted = tuple(chosen) if methods is None else methods
        settings[name] = {m: chosen[TUNED_AS.get(m, m)] for m in wanted if TUNED_AS.get(m, m) in chosen}
        studied = tuning["study"] if study else {}
        studies[name] = {method: tuple(Setting(**values) for values in rows) for method, rows in studied.items()}
    return ComparisonPlan(command, tuple(range(FIRST_SEED, FIRST_SEED + seeds)), settings, studies, memory)


class Comparison:
    """Runs a plan. `results` is complete for what has finished, and in `compare.json` after every run.

    advance(seconds, what): called often, with the expected seconds that have passed (not measured ones).
    """

    def __init__(
        self, plan: ComparisonPlan, out: Path, advance: Callable[[float, str], None] = lambda _, __: None
    ) -> None:
        self.plan, self.out, self.path, self.advance = plan, out, out / "compare.json", advance
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._new_runs = 0
        self.results: dict[str, Any] = {
            "finished": False,
            "command": plan.command,
            "environment": environment(),
            "scenarios": {name: self._describe(name) for name in plan.settings},
        }

    def _describe(self, name: str) -> dict[str, Any]:
        """Return a scenario's part of the results, before its runs."""
        scenario, counts = SCENARIOS[name], read_settings(name)["counts"]
        settings = {
            method: asdict(setting) | counts.get(TUNED_AS.get(method, method), {})
            for method, setting in self.plan.settings[name].items()
        }
        fields = {key: getattr(scenario, key) for key in ("title", "credit", "forget_title", "small")}
        return {
            **fields,
            "orthograd_methods": [method for method, about in METHODS.items() if about.is_orthograd],
            "seeds": list(self.plan.seeds),
            "settings": settings,
            "sizes": {},
            "skipped": None,
            "runs": [],
            "study": [],
        }

    @property
    def expected_seconds(self) -> float:
        """Estimate the relative cost, for the progress bar; its speed corrects the unit."""
        return sum(self._expected_seconds(name) for name in self.plan.settings)

    def _expected_seconds(self, name: str) -> float:
        training, _ = SCENARIOS[name].seconds
        runs = self._unlearning_runs(name)
        steps = sum(setting.steps * self._step_seconds(name, method, setting) for _, method, setting in runs)
        memory = MEMORY_SECONDS * len(runs) if self.plan.memory else 0.0
        return len(self.plan.seeds) * (2 * training + steps) + memory

    def _step_seconds(self, name: str, method: str, setting: Setting) -> float:
        scenario = SCENARIOS[name]
        projected = 1.0 if METHODS[method].is_orthograd else 0.0
        return scenario.seconds[1] * (0.5 + 0.5 * (1 + projected) * setting.n / scenario.n)

    def _unlearning_runs(self, name: str) -> list[tuple[str, str, Setting]]:
        """Return (table of the results, method, setting) of the unlearning runs of each seed."""
        study = self.plan.study[name].items()
        return [("runs", method, setting) for method, setting in self.plan.settings[name].items()] + [
            ("study", method, setting) for method, settings in study for setting in settings
        ]

    def run(self) -> dict[str, Any]:
        """Run what is not on disk, and what is damaged there; returns the results."""
        read_or_set_aside(self.path, lambda found: isinstance(found, dict) and "scenarios" in found)
        self._save()
        for name, about in self.results["scenarios"].items():
            try:
                if not self.plan.settings[name]:
                    raise MissingData(f"No settings of these methods. Run:\n    python -m bench.tune {name}")
                for seed in self.plan.seeds:
                    self._run_seed(name, about, self._load(name, seed), seed)
                if self.plan.memory:
                    self._measure_memory(name, about)
            except MissingData as missing:
                about["skipped"] = str(missing)
                self.advance(self._expected_seconds(name), f"{name}: skipped")
            self._save()
        self.results["finished"] = True
        self._save()
        return self.results

    def _load(self, name: str, seed: int) -> Problem:
        return SCENARIOS[name].load(seed).to(self.device)

    def _run_seed(self, name: str, about: dict[str, Any], problem: Problem, seed: int) -> None:
        """Score the models that nothing was unlearned from, then run every method of the plan."""
        models = self._reference_models(name, problem, seed)
        original = models["original"]
        if not about["sizes"]:
            about["sizes"] = {part: len(getattr(problem, part)) for part in ("retain", "forget", "validation", "test")}
            about["parameters"] = sum(p.numel() for p in original.parameters())
            about["trainable"] = sum(p.numel() for p in original.parameters() if p.requires_grad)
        goal: dict[str, float] | None = None
        stamp = self._stamp(name, problem)
        for method, model in models.items():  # the retrained one, where there is one, first
            score = partial(score_model, problem, model, original, goal)
            run = self._load_or_run(name, seed, method, {}, stamp, score)
            about["runs"].append(run)
            goal = goal or (goal_without_retraining(run["scores"]) if problem.training is None else run["scores"])
        for table, method, setting in self._unlearning_runs(name):
            runs_before, label = self._new_runs, method if table == "runs" else f"{method}-n{setting.n}"
            points = min(CURVE_POINTS, max(1, setting.steps // 3)) if table == "runs" else 0
            cost = self._step_seconds(name, method, setting)
            tick = partial(self.advance, cost, f"{name}, seed {seed}: {TITLES[method]}, n = {setting.n}")
            options = {"seed": seed, "forget_batch": SCENARIOS[name].forget_batch, "points": points, "tick": tick}
            unlearn_and_score = partial(_unlearn_and_score, problem, original, goal, method, setting, **options)
            run = self._load_or_run(name, seed, label, asdict(setting), stamp, unlearn_and_score)
            about[table].append(run | {"method": method})
            if self._new_runs == runs_before:
                self.advance(cost * setting.steps, f"{name}, seed {seed}")
            self._save()

    def _stamp(self, name: str, problem: Problem) -> dict[str, Any]:
        """Return what a run depends on besides its setting."""
        versions = {key: self.results["environment"][key] for key in ("projgrad", "torch", "cuda", "threads")}
        training = problem.training and asdict(problem.training)
        return versions | {"training": training, "forget_batch": SCENARIOS[name].forget_batch}

    def _load_or_run(
        self, name: str, seed: int, label: str, setting: dict, stamp: dict, run: Callable[[], dict]
    ) -> dict[str, Any]:
        """Return the run of an earlier call with the same setting, or a new one, saved."""
        path = self.out / "runs" / name / f"{seed}-{label}.json"
        saved = read_or_set_aside(path, _is_run)
        if saved is None or saved["setting"] != setting or saved["stamp"] != stamp:
            self._new_runs += 1
            about = {"method": label, "seed": seed, "n": setting.get("n"), "setting": setting, "stamp": stamp}
            saved = about | run()
            write_json(path, saved)
        return saved

    def _reference_models(self, name: str, problem: Problem, seed: int) -> dict[str, nn.Module]:
        """Return the retrained model, where there is one, and the original."""
        training = problem.training
        cost = SCENARIOS[name].seconds[0] / training.epochs if training else 0.0
        models = {}
        for kind in ("retrained", "original") if training else ("original",):
            tick = partial(self.advance, cost, f"{name}, seed {seed}: training {TITLES[kind]}")
            models[kind] = load_or_train(self.out, name, seed, kind, problem, tick)
        return models

    def _measure_memory(self, name: str, about: dict[str, Any]) -> None:
        """Add to every run the peak memory of a step, measured on the first seed by method and retain samples."""
        path, runs = self.out / "runs" / name / "memory.json", self._unlearning_runs(name)
        wanted = [{"table": table, "method": method, **asdict(setting)} for table, method, setting in runs]
        seed = self.plan.seeds[0]
        problem = self._load(name, seed)
        depends_on = {"steps": wanted, "stamp": self._stamp(name, problem)}
        saved = read_or_set_aside(path, _is_memory) or {}
        if any(saved.get(key) != value for key, value in depends_on.items()):
            original = load_or_train(self.out, name, seed, "original", problem)
            steps, size = [(method, setting) for _, method, setting in runs], SCENARIOS[name].forget_batch
            tick = partial(self._memory_tick, name)
            saved = depends_on | {"bytes": peak_bytes(problem, original, steps, size, tick)}
            write_json(path, saved)
        peaks = {(s["table"], s["method"], s["n"]): peak for s, peak in zip(wanted, saved["bytes"], strict=True)}
        for table in ("runs", "study"):
            for run in about[table]:
                run["peak_bytes"] = peaks.get((table, run["method"], run["n"]))

    def _memory_tick(self, name: str, method: str) -> None:
        self.advance(MEMORY_SECONDS, f"{name}: memory of a step of {TITLES[method]}")

    def _save(self) -> None:
        write_json(self.path, self.results)


def load_or_train(
    out: Path, name: str, seed: int, kind: str, problem: Problem, tick: Callable[[], None] = lambda: None
) -> nn.Module:
    """Return the "original" or the "retrained" model, on the samples' device.

    It is a published one, or one of an earlier call, or trained and kept; another recipe is another file. `tick` is
    called for every epoch.
    """
    device, training = problem.test.labels.device, problem.training
    if training is None:
        return problem.build().to(device)
    parts = (problem.retain, problem.forget) if kind == "original" else (problem.retain,)
    if kind == "original" and problem.taught is not None:
        seed, parts = 0, (problem.taught,)
    recipe = "-".join(f"{value:g}" for value in asdict(training).values())
    path = out / "models" / f"{name}-{seed}-{kind}-{recipe}.safetensors"
    if (model := load_or_set_aside(path, problem.build)) is not None:
        for _ in range(training.epochs):
            tick()
        return model.to(device)
    model = train(problem, parts, seed, tick)
    save_model(path, model)
    return model


def _is_run(saved: Any) -> bool:
    """Return whether a file holds all that a run is asked for later."""
    if not isinstance(saved, dict) or not saved.keys() >= {"method", "seed", "n", "setting", "stamp"}:
        return False
    scores, confidence = saved.get("scores"), saved.get("confidence")
    if not (
        isinstance(scores, dict)
        and isinstance(confidence, dict)
        and all(isinstance(scores.get(p), (int, float)) for p in PARTS)
    ):
        return False
    return not saved["setting"] or saved.keys() >= {field.name for field in fields(Unlearned)}


def _is_memory(saved: Any) -> bool:
    lists = [saved.get(key) for key in ("steps", "bytes")] if isinstance(saved, dict) else [None]
    return all(isinstance(x, list) for x in lists) and len({len(x) for x in lists}) == 1


def score_model(
    problem: Problem, model: nn.Module, original: nn.Module, goal: dict[str, float] | None
) -> dict[str, Any]:
    """Return the part of a run that says how good its model is; goal: the accuracies to reach."""
    scores = evaluate.scores(problem, model, original, goal)
    return {"confidence": scores.pop("confidence"), "scores": scores}


def _unlearn_and_score(
    problem: Problem, original: nn.Module, goal: dict[str, float], method: str, setting: Setting, **options: Any
) -> dict[str, Any]:
    model = copy.deepcopy(original)
    unlearned = unlearn(problem, model, method, setting, **options)
    return asdict(unlearned) | score_model(problem, model, original, goal)


def goal_without_retraining(original: dict[str, float]) -> dict[str, float]:
    """Return what to reach where nothing can be retrained: nothing of the forget set, all else as before."""
    return original | {"forget": 0.0}
