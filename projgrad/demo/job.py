"""The whole demo as a list of small jobs whose results are saved one by one."""

import copy
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..data import CREDITS, TASKS, Task
from .environment import environment
from .methods import TITLES
from .runs import TRAINING, Run, Setting, evaluate, train, unlearn
from .steps import METHODS, REPEATS, batch, compare, peak_bytes
from .summary import summarize

SETTINGS = Path(__file__).with_name("settings.json")
POINTS = 15
MEMORY_SECONDS = 7.0  # one new process for each method


@dataclass(frozen=True)
class Plan:
    """What to run. settings: by method; panel: OrthoGrad at one setting, several numbers of retain samples."""

    data: str
    seeds: tuple[int, ...]
    settings: dict[str, Setting]
    panel: tuple[Setting, ...]
    chosen_by: dict[str, Any] = field(default_factory=dict)


def default_plan(data: str, seeds: int) -> Plan:
    """The settings that `bench.tune_demo` chose on validation data."""
    tuned = json.loads(SETTINGS.read_text())[data]
    settings = {method: Setting(**values) for method, values in tuned["chosen"].items()}
    settings["orthograd-qr"] = settings["orthograd"]
    shared = {key: tuned["panel"][key] for key in ("lr", "steps", "alpha")}
    chosen_by = {key: tuned[key] for key in ("command", "rule", "limit", "seeds", "usable", "usable_means")}
    chosen_by["candidates"] = {method: len(rows) for method, rows in tuned["candidates"].items()}
    panel = tuple(Setting(n=n, **shared) for n in tuned["panel"]["n"])
    return Plan(data, tuple(range(seeds)), settings, panel, chosen_by)


def write_json(path: Path, content: dict) -> None:
    """Atomically: a reader, or an interruption, finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


class Demo:
    """Runs a plan. `results` is always complete for what has finished, and is on disk after every run.

    advance(seconds, what): called often, with the expected seconds that have passed (not measured ones).
    """

    def __init__(self, plan: Plan, out: Path, advance: Callable[[float, str], None] = lambda _, __: None) -> None:
        self.plan, self.path, self.advance = plan, out / f"demo-{plan.data}.json", advance
        self.results: dict[str, Any] = {
            "finished": False,
            "data": plan.data,
            "credit": CREDITS[plan.data],
            "seeds": list(plan.seeds),
            "training": TRAINING[plan.data],
            "settings": {method: asdict(setting) for method, setting in plan.settings.items()},
            "panel_settings": [asdict(setting) for setting in plan.panel],
            "chosen_by": plan.chosen_by,
            "environment": environment(),
            "sizes": {},
            "runs": [],
            "steps": [],
            "memory": [],
        }

    @property
    def expected_seconds(self) -> float:
        """Relative costs, for the progress bar; its speed corrects the unit."""
        settings = [*self.plan.settings.items(), *(("orthograd", s) for s in self.plan.panel)]
        settings += [("neggrad", s) for s in self.plan.panel[-1:]]
        steps = sum(setting.steps * self._step_cost(method, setting.n) for method, setting in settings)
        steps += sum(self._compare_cost(n) for n in self._compared)
        seconds = len(self.plan.seeds) * (2 * TRAINING[self.plan.data]["epochs"] * self._epoch_cost + steps)
        return seconds + MEMORY_SECONDS * len(self._compared)

    @property
    def _epoch_cost(self) -> float:
        return {"digits": 0.06, "faces": 0.16}[self.plan.data]

    def _step_cost(self, method: str, n: int) -> float:
        scale = {"digits": 1.0, "faces": 4.0}[self.plan.data]
        return scale * (0.01 + {"orthograd": 1.5e-4, "orthograd-qr": 1e-3}.get(method, 0.0) * n)

    def _compare_cost(self, n: int) -> float:
        return (1 + REPEATS) * sum(self._step_cost(method, n) for method in METHODS)

    @property
    def _compared(self) -> list[int]:
        """Numbers of retain samples at which whole steps are compared."""
        return sorted({self.plan.settings["orthograd"].n, *(setting.n for setting in self.plan.panel)})

    def run(self) -> dict[str, Any]:
        for seed in self.plan.seeds:
            task = TASKS[self.plan.data](seed)
            self._save()
            original = self._seed(task, seed)
            for n in self._compared:
                self.advance(0.0, f"seed {seed}: timing steps, n = {n}")
                self.results["steps"].append({"seed": seed, **compare(original, *batch(task, n, seed))})
                self.advance(self._compare_cost(n), f"seed {seed}: timed steps, n = {n}")
                self._save()
        for n in self._compared:
            self.advance(0.0, f"measuring a step's memory, n = {n}")
            self.results["memory"].append(peak_bytes(original, *batch(task, n, seed)))
            self.advance(MEMORY_SECONDS, f"measured a step's memory, n = {n}")
            self._save()
        self.results["finished"] = True
        self._save()
        return self.results

    def _seed(self, task: Task, seed: int) -> nn.Module:
        models = {}
        for name, with_forget in (("original", True), ("retrained", False)):
            what = f"seed {seed}: training {TITLES[name]}"
            models[name] = train(
                task, seed, with_forget=with_forget, tick=lambda w=what: self.advance(self._epoch_cost, w)
            )
            self._keep(evaluate(models[name], task), name, seed)
        original = models["original"]
        if not self.results["sizes"]:
            parts = {part: len(getattr(task, part).y) for part in ("retain", "forget", "validation", "test")}
            self.results["sizes"] = {"parameters": sum(p.numel() for p in original.parameters()), **parts}
        for method, setting in self.plan.settings.items():
            self._unlearn(original, task, method, setting, seed, "main")
        for setting in self.plan.panel:
            self._unlearn(original, task, "orthograd", setting, seed, "panel")
        if self.plan.panel:  # the same loop without a projection, given the most retain samples
            self._unlearn(original, task, "neggrad", self.plan.panel[-1], seed, "panel")
        return original

    def _unlearn(self, original: nn.Module, task: Task, method: str, setting: Setting, seed: int, table: str) -> None:
        cost, what = self._step_cost(method, setting.n), f"seed {seed}: {TITLES[method]}, n = {setting.n}"
        run = unlearn(
            copy.deepcopy(original),
            task,
            method,
            setting,
            seed=seed,
            points=POINTS if table == "main" else 0,
            tick=lambda: self.advance(cost, what),
        )
        self._keep(run, method, seed, table=table, n=setting.n)

    def _keep(self, run: Run, method: str, seed: int, **more: Any) -> None:
        self.results["runs"].append({"method": method, "seed": seed, "table": "main", **more, **asdict(run)})
        self._save()

    def _save(self) -> None:
        self.results["summary"] = summarize(self.results)
        write_json(self.path, self.results)
