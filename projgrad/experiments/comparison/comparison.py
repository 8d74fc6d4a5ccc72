"""The whole comparison as a list of runs, each saved when it is finished: what is on disk is not run again."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ... import evaluate
from ...evaluate.problem import MissingData, Problem
from ..scenarios import SCENARIOS
from .environment import environment
from .memory import peak_bytes
from .methods import TITLES, TUNED_AS, Setting
from .run import train, unlearn
from .store import load_model, read_json, save_model, write_json

SETTINGS = Path(__file__).with_name("settings")
POINTS = 12
FIRST_SEED = 5  # the seeds of the search, 100 and 101, forget digits 0 and 1, people 20 and 21, speakers 1 and 2
USABLE = 0.9  # ToW of a setting that counts as usable
MEMORY_SECONDS = 3.0  # one new process for each method


@dataclass(frozen=True)
class ComparisonPlan:
    """What to run. settings, study: by scenario, then method; memory: also measure the peak memory of a step."""

    command: str
    seeds: tuple[int, ...]
    settings: dict[str, dict[str, Setting]]
    study: dict[str, dict[str, tuple[Setting, ...]]]
    memory: bool = True


def tuned(scenario: str) -> dict[str, Any]:
    """What `bench.tune` chose on validation data, with every candidate's numbers."""
    return read_json(SETTINGS / f"{scenario}.json") or {"chosen": {}, "study": {}, "candidates": {}}


def plan(
    command: str,
    scenarios: tuple[str, ...],
    seeds: int,
    methods: tuple[str, ...] | None = None,
    study: bool = False,
    memory: bool = True,
) -> ComparisonPlan:
    """The tuned settings of some scenarios; methods: all that were tuned there, by default."""
    settings, studies = {}, {}
    for name in scenarios:
        chosen = {method: Setting(**values) for method, values in tuned(name)["chosen"].items()}
        wanted = tuple(chosen) if methods is None else methods
        settings[name] = {m: chosen[TUNED_AS.get(m, m)] for m in wanted if TUNED_AS.get(m, m) in chosen}
        found = tuned(name)["study"] if study else {}
        studies[name] = {method: tuple(Setting(**values) for values in rows) for method, rows in found.items()}
    return ComparisonPlan(command, tuple(range(FIRST_SEED, FIRST_SEED + seeds)), settings, studies, memory)


class Compare:
    """Runs a plan. `results` is complete for what has finished, and in `compare.json` after every run.

    advance(seconds, what): called often, with the expected seconds that have passed (not measured ones).
    """

    def __init__(
        self, plan: ComparisonPlan, out: Path, advance: Callable[[float, str], None] = lambda _, __: None
    ) -> None:
        self.plan, self.out, self.path, self.advance = plan, out, out / "compare.json", advance
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._new = 0
        self.results: dict[str, Any] = {
            "finished": False,
            "command": plan.command,
            "environment": environment(),
            "scenarios": {name: self._about(name) for name in plan.settings},
        }

    def _about(self, name: str) -> dict[str, Any]:
        scenario = SCENARIOS[name]
        settings = {
            method: asdict(setting) | _usable(name, method) for method, setting in self.plan.settings[name].items()
        }
        fields = {key: getattr(scenario, key) for key in ("title", "credit", "forget_title", "small")}
        return {
            **fields,
            "seeds": list(self.plan.seeds),
            "settings": settings,
            "sizes": {},
            "skipped": None,
            "runs": [],
            "study": [],
        }

    @property
    def expected_seconds(self) -> float:
        """Relative costs, for the progress bar; its speed corrects the unit."""
        return sum(self._cost(name) for name in self.plan.settings)

    def _cost(self, name: str) -> float:
        training, _ = SCENARIOS[name].seconds
        jobs = self._jobs(name)
        steps = sum(setting.steps * self._step_cost(name, method, setting) for _, method, setting in jobs)
        memory = MEMORY_SECONDS * len(jobs) if self.plan.memory else 0.0
        return len(self.plan.seeds) * (2 * training + steps) + memory

    def _jobs(self, name: str) -> list[tuple[str, str, Setting]]:
        """(table of the results, method, setting) of the unlearning runs of each seed."""
        study = self.plan.study[name].items()
        return [("runs", method, setting) for method, setting in self.plan.settings[name].items()] + [
            ("study", method, setting) for method, settings in study for setting in settings
        ]

    def _step_cost(self, name: str, method: str, setting: Setting) -> float:
        scenario = SCENARIOS[name]
        projected = 1.0 if "orthograd" in method else 0.0
        return scenario.seconds[1] * (0.5 + 0.5 * (1 + projected) * setting.n / scenario.n)

    def run(self) -> dict[str, Any]:
        self._save()
        for name, about in self.results["scenarios"].items():
            try:
                if not self.plan.settings[name]:
                    raise MissingData(f"No settings of these methods. Run:\n    python -m bench.tune {name}")
                for seed in self.plan.seeds:
                    self._seed(name, about, self._load(name, seed), seed)
                if self.plan.memory:
                    self._memory(name, about)
            except MissingData as missing:
                about["skipped"] = str(missing)
                self.advance(self._cost(name), f"{name}: skipped")
            self._save()
        self.results["finished"] = True
        self._save()
        return self.results

    def _load(self, name: str, seed: int) -> Problem:
        return SCENARIOS[name].load(seed).to(self.device)

    def _seed(self, name: str, about: dict[str, Any], problem: Problem, seed: int) -> None:
        models = self._models(name, problem, seed)
        original = models["original"]
        if not about["sizes"]:
            about["sizes"] = {part: len(getattr(problem, part)) for part in ("retain", "forget", "validation", "test")}
            about["parameters"] = sum(p.numel() for p in original.parameters())
            about["trainable"] = sum(p.numel() for p in original.parameters() if p.requires_grad)
        goal: dict[str, float] | None = None
        stamp = self._stamp(name, problem)
        for method, model in models.items():  # the retrained one, where there is one, first
            run = self._once(name, seed, method, {}, stamp, lambda m=model, g=goal: scored(problem, m, original, g))
            about["runs"].append(run)
            goal = goal or (ideal(run["scores"]) if problem.training is None else run["scores"])
        for table, method, setting in self._jobs(name):
            before, label = self._new, method if table == "runs" else f"{method}-n{setting.n}"
            points = min(POINTS, max(1, setting.steps // 3)) if table == "runs" else 0
            cost = self._step_cost(name, method, setting)
            tick = functools.partial(self.advance, cost, f"{name}, seed {seed}: {TITLES[method]}, n = {setting.n}")
            run = functools.partial(self._unlearned, name, problem, original, goal, method, setting, seed, points, tick)
            about[table].append(self._once(name, seed, label, asdict(setting), stamp, run) | {"method": method})
            if self._new == before:  # it was there
                self.advance(cost * setting.steps, f"{name}, seed {seed}")
            self._save()

    def _unlearned(
        self,
        name: str,
        problem: Problem,
        original: nn.Module,
        goal: dict[str, float],
        method: str,
        setting: Setting,
        seed: int,
        points: int,
        tick: Callable[[], None],
    ) -> dict[str, Any]:
        model, size = copy.deepcopy(original), SCENARIOS[name].forget_batch
        done = unlearn(problem, model, method, setting, seed=seed, forget_batch=size, points=points, tick=tick)
        return asdict(done) | scored(problem, model, original, goal)

    def _stamp(self, name: str, problem: Problem) -> dict[str, Any]:
        """What a run depends on besides its setting."""
        made = {key: self.results["environment"][key] for key in ("projgrad", "torch", "cuda", "threads")}
        training = problem.training and asdict(problem.training)
        return made | {"training": training, "forget_batch": SCENARIOS[name].forget_batch}

    def _once(
        self, name: str, seed: int, label: str, setting: dict, stamp: dict, run: Callable[[], dict]
    ) -> dict[str, Any]:
        """The run of an earlier call with the same setting, or a new one, saved."""
        path = self.out / "runs" / name / f"{seed}-{label}.json"
        found = read_json(path)
        if found is None or found["setting"] != setting or found["stamp"] != stamp:
            self._new += 1
            about = {"method": label, "seed": seed, "n": setting.get("n"), "setting": setting, "stamp": stamp}
            found = about | run()
            write_json(path, found)
        return found

    def _models(self, name: str, problem: Problem, seed: int) -> dict[str, nn.Module]:
        """The retrained model, where there is one, and the original."""
        seconds, training = SCENARIOS[name].seconds[0], problem.training

        def model(kind: str) -> nn.Module:
            cost = seconds / training.epochs if training else 0.0
            tick = functools.partial(self.advance, cost, f"{name}, seed {seed}: training {TITLES[kind]}")
            return trained(self.out, name, seed, kind, problem, tick)

        return {kind: model(kind) for kind in (("retrained", "original") if training else ("original",))}

    def _memory(self, name: str, about: dict[str, Any]) -> None:
        """Peak memory of one step of every method and number of retain samples, of the first seed."""
        path, jobs = self.out / "runs" / name / "memory.json", self._jobs(name)
        wanted = [{"table": table, "method": method, **asdict(setting)} for table, method, setting in jobs]
        found = read_json(path) or {}
        if found.get("steps") != wanted:
            seed = self.plan.seeds[0]
            problem = self._load(name, seed)
            original = trained(self.out, name, seed, "original", problem)
            tick = functools.partial(self._measured, name)
            steps, size = [(method, setting) for _, method, setting in jobs], SCENARIOS[name].forget_batch
            found = {"steps": wanted, "bytes": peak_bytes(problem, original, steps, size, tick)}
            write_json(path, found)
        known = {(job[0], job[1], job[2].n): count for job, count in zip(jobs, found["bytes"], strict=True)}
        for table in ("runs", "study"):
            for run in about[table]:
                run["peak_bytes"] = known.get((table, run["method"], run["n"]))

    def _measured(self, name: str, method: str) -> None:
        self.advance(MEMORY_SECONDS, f"{name}: memory of a step of {TITLES[method]}")

    def _save(self) -> None:
        write_json(self.path, self.results)


def _usable(name: str, method: str) -> dict[str, int]:
    """How many settings of the search were good: a method that needs luck shows it."""
    rows = tuned(name)["candidates"].get(TUNED_AS.get(method, method), [])
    return {"usable": sum(row["tow"] >= USABLE for row in rows), "candidates": len(rows)} if rows else {}


def trained(
    out: Path, name: str, seed: int, kind: str, problem: Problem, tick: Callable[[], None] = lambda: None
) -> nn.Module:
    """The "original" or the "retrained" model, on the samples' device: published, from an earlier call, or trained and
    kept; another recipe is another file. `tick` is called for every epoch."""
    device, training = problem.test.labels.device, problem.training
    if training is None:
        return problem.build().to(device)
    recipe = "-".join(f"{value:g}" for value in asdict(training).values())
    path = out / "models" / f"{name}-{seed}-{kind}-{recipe}.safetensors"
    if path.exists():
        for _ in range(training.epochs):
            tick()
        return load_model(path, problem.build()).to(device)
    parts = (problem.retain, problem.forget) if kind == "original" else (problem.retain,)
    model = train(problem, parts, seed, tick)
    save_model(path, model)
    return model


def scored(problem: Problem, model: nn.Module, original: nn.Module, goal: dict[str, float] | None) -> dict[str, Any]:
    """The part of a run that says how good its model is; goal: the accuracies to reach."""
    scores = evaluate.scores(problem, model, original, goal)
    return {"confidence": scores.pop("confidence"), "scores": scores}


def ideal(original: dict[str, float]) -> dict[str, float]:
    """What to reach where nothing can be retrained: nothing of the forget set, all else as before."""
    return original | {"forget": 0.0}
