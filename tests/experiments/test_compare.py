"""The comparison: complete, resumable, the same for the same seed; and settings that come from one fair search."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from pretend import DEVICE, Gpu, to_device, values
from tiny import SETTING, Tiny, scenario, small_plan

from projgrad import evaluate
from projgrad.evaluate.problem import MissingData, Part
from projgrad.evaluate.summary import ORTHOGRAD_METHODS
from projgrad.experiments.comparison import comparison
from projgrad.experiments.comparison import run as runs
from projgrad.experiments.comparison.comparison import SETTINGS, Comparison, ComparisonPlan, make_plan, read_settings
from projgrad.experiments.comparison.memory import peak_bytes
from projgrad.experiments.comparison.methods import LANGUAGE, METHODS, TITLES, TUNED_AS, Setting, batches
from projgrad.experiments.comparison.store import load_model, read_json, save_model, write_json
from projgrad.experiments.scenarios import FAST, SCENARIOS

pytestmark = pytest.mark.same_without_extension

pytest.importorskip("sklearn")
pytest.importorskip("rich")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(SCENARIOS, "tiny", scenario())
    return small_plan()


def test_every_method_makes_its_steps(tiny):
    """All of them on one small problem; those that project leave no retain component."""
    problem = Tiny(0)
    original = runs.train(problem, (problem.retain, problem.forget), 0)
    for method in METHODS:
        model = load_state(problem.build(), original)
        setting = replace(SETTING, value=METHODS[method].values[1])
        done = runs.unlearn(problem, model, method, setting, seed=0, forget_batch=4, points=3)
        assert done.steps == 3 and done.stopped is None, method
        assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True)), (
            method
        )
        assert [point["step"] for point in done.curve] == [0, 1, 2, 3]
        if METHODS[method].is_orthograd and method != "orthograd-feasible":
            assert done.residual <= 1e-5 and 0 < done.preserved_norm < 1, method


@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_a_gpu(method):
    """On the pretend one: no tensor on the wrong device, the weights and scores of the CPU."""
    original = Tiny(0).build()
    setting = replace(SETTING, value=METHODS[method].values[1])

    def found(problem, model, reference):
        runs.unlearn(problem, model, method, setting, seed=0, forget_batch=4, points=3)
        return [*model.parameters()], evaluate.scores(problem, model, reference)

    expected = found(Tiny(0), copy.deepcopy(original), original)
    with Gpu():
        on_gpu = found(Tiny(0).to(DEVICE), to_device(copy.deepcopy(original)), to_device(original))
    torch.testing.assert_close(values(on_gpu), expected)


def test_a_search_may_have_one_value_of_each_parameter():
    tune = pytest.importorskip("bench.tune")
    found = {
        m: [(s.lr, s.value, s.steps) for s in tune.candidates("digits-labels", m, (1.0, 2.0), True, 0.5)]
        for m in METHODS
    }
    steps = SCENARIOS["digits-labels"].steps
    assert found["orthograd"] == found["neggrad"] == [(1.0, 0.5, steps), (2.0, 0.5, steps)]
    assert found["npo"] == [(1.0, 0.1, steps), (2.0, 0.1, steps)]
    assert found["ascent"] == [(1.0, None, steps // 2), (2.0, None, steps // 2)]
    assert {len(rows) for rows in found.values()} == {2}


def test_a_search_goes_on_where_it_stopped(tiny, tmp_path, monkeypatch):
    """Nothing is chosen before all candidates were tried, and none is tried twice."""
    tune = pytest.importorskip("bench.tune")
    done, tried = [], tune.tried

    def interrupted(name, prepared, method, setting):
        if len(done) == 4 and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        done.append(setting)
        return tried(name, prepared, method, setting)

    monkeypatch.setattr(tune, "LOGS", tmp_path)
    monkeypatch.setattr(tune, "SETTINGS", tmp_path / "settings")
    monkeypatch.setattr(tune, "tried", interrupted)
    search = ["tune", "tiny", "--methods", "neggrad", "--rates", "0.1", "0.2", "--out", str(tmp_path / "models")]
    monkeypatch.setattr(sys, "argv", search)
    with pytest.raises(KeyboardInterrupt):
        tune.main()
    found = read_json(tmp_path / "tiny.json")
    assert len(found["candidates"]["neggrad"]) == 4 and found["chosen"] == {}
    (tmp_path / "again").touch()
    tune.main()
    found = read_json(tmp_path / "tiny.json")
    assert len(done) == len(set(done)) == len(found["candidates"]["neggrad"]) == 6
    best = max(found["candidates"]["neggrad"], key=lambda row: row["tow"])
    assert found["chosen"]["neggrad"].items() <= best.items()
    assert read_json(tmp_path / "settings" / "tiny.json") == tune.shipped(found)
    before = (tmp_path / "tiny.json").read_bytes()
    tune.main()
    assert len(done) == 6 and (tmp_path / "tiny.json").read_bytes() == before


def test_a_step_whose_memory_cannot_be_measured(tiny):
    problem = Tiny(0)
    with pytest.warns(UserWarning, match="memory of a step of orthograd could not be measured"):
        assert peak_bytes(problem, problem.build(), [("orthograd", replace(SETTING, value=2.0))], 4, print) == [None]


@pytest.mark.skipif(os.name != "posix", reason="the process is a shell script")
def test_an_interruption_ends_the_processes_that_measure_memory(tiny, tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\ngrep -ac orthograd >/dev/null && echo 5 || exec sleep 60\n")  # of its input
    script.chmod(0o755)
    started, popen = [], subprocess.Popen

    def interrupt(method):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    problem = Tiny(0)
    with pytest.raises(KeyboardInterrupt):
        peak_bytes(problem, problem.build(), [("orthograd", SETTING), ("neggrad", SETTING)], 4, interrupt)
    assert sorted(process.returncode for process in started) == [-signal.SIGKILL, 0]


def test_memory_is_measured_again_with_another_version(tiny, tmp_path, monkeypatch):
    measured = []

    def peak_bytes(problem, model, steps, size, tick):
        measured.append(len(steps))
        return [len(measured)] * len(steps)

    monkeypatch.setattr(comparison, "peak_bytes", peak_bytes)
    for version, times in (("1", 1), ("1", 1), ("2", 2)):
        compare = Comparison(replace(tiny, memory=True), tmp_path)
        compare.results["environment"]["projgrad"] = version
        runs_of_methods = compare.run()["scenarios"]["tiny"]["runs"][2:]
        assert len(measured) == times and {run["peak_bytes"] for run in runs_of_methods} == {times}


def load_state(model, other):
    model.load_state_dict(other.state_dict())
    return model


def test_a_comparison_is_complete(tiny, tmp_path):
    moved = []
    compare = Comparison(tiny, tmp_path, lambda cost, what: moved.append(cost))
    compare.run()
    found = read_json(tmp_path / "compare.json")
    about = found["scenarios"]["tiny"]
    assert found["finished"] and about["skipped"] is None
    assert [run["method"] for run in about["runs"]] == ["retrained", "original", "neggrad", "orthograd"]
    assert [(run["method"], run["n"]) for run in about["study"]] == [("orthograd", 4), ("orthograd", 8)]
    assert about["orthograd_methods"] == list(ORTHOGRAD_METHODS)
    assert about["sizes"] == {"retain": 60, "forget": 12, "validation": 18, "test": 30}
    for run in about["runs"]:
        assert 0 <= run["scores"]["mia_auc"] <= 1 and len(run["confidence"]["test"]) == 20
        assert (run["scores"]["tow"] is None) == (run["method"] == "retrained")
    assert sum(moved) == pytest.approx(compare.expected_seconds)


def test_finished_runs_are_not_run_again(tiny, tmp_path, monkeypatch):
    Comparison(tiny, tmp_path).run()
    first = read_json(tmp_path / "compare.json")
    monkeypatch.setattr(comparison, "unlearn", lambda *_, **__: pytest.fail("a finished run was repeated"))
    monkeypatch.setattr(comparison, "train", lambda *_: pytest.fail("a model was trained again"))
    moved = []
    again = Comparison(tiny, tmp_path, lambda cost, what: moved.append(cost))
    again.run()
    assert read_json(tmp_path / "compare.json")["scenarios"] == first["scenarios"]
    assert sum(moved) == pytest.approx(again.expected_seconds)


def test_another_setting_is_run_again(tiny, tmp_path):
    Comparison(tiny, tmp_path).run()
    other = ComparisonPlan("test", (0,), {"tiny": {"neggrad": Setting(0.2, 3, 8, 0.8)}}, {"tiny": {}}, False)
    Comparison(other, tmp_path).run()
    assert read_json(tmp_path / "runs" / "tiny" / "0-neggrad.json")["setting"]["lr"] == 0.2


def test_an_interruption_loses_no_finished_run(tiny, tmp_path):
    def interrupt(cost, what):
        if "OrthoGrad" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Comparison(tiny, tmp_path, interrupt).run()
    found = read_json(tmp_path / "compare.json")
    assert not found["finished"]
    assert [run["method"] for run in found["scenarios"]["tiny"]["runs"]] == ["retrained", "original", "neggrad"]
    Comparison(tiny, tmp_path).run()
    whole, fresh = read_json(tmp_path / "compare.json"), tmp_path / "fresh"
    Comparison(tiny, fresh).run()
    assert numbers(whole) == numbers(read_json(fresh / "compare.json"))


def numbers(results):
    return [(run["method"], run["seed"], run["scores"]) for run in results["scenarios"]["tiny"]["runs"]]


KILLED = """
import sys
sys.path[:0] = {tests!r}
from pathlib import Path
from projgrad.experiments.comparison.comparison import Comparison
from projgrad.experiments.scenarios import SCENARIOS
from tiny import scenario, small_plan
SCENARIOS["tiny"] = scenario()
Comparison(small_plan(seeds=tuple(range(200))), Path({out!r})).run()
"""


@pytest.mark.slow
def test_a_killed_comparison_goes_on(tmp_path, monkeypatch):
    """kill -9 in the middle: every file that is there is whole, and the runs that are there are kept."""
    monkeypatch.setitem(SCENARIOS, "tiny", scenario())
    code = KILLED.format(tests=sys.path, out=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        while not (tmp_path / "runs" / "tiny" / "2-neggrad.json").exists():
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    kept = {path: path.read_text() for path in (tmp_path / "runs").rglob("*.json")}
    assert all(json.loads(text)["method"] for text in kept.values())
    json.loads((tmp_path / "compare.json").read_text())
    Comparison(small_plan(seeds=(0, 1, 2)), tmp_path).run()
    assert all(path.read_text() == text for path, text in kept.items())
    assert len(read_json(tmp_path / "compare.json")["scenarios"]["tiny"]["runs"]) == 12


def test_the_same_seed_gives_the_same_run():
    problem, found = Tiny(0), []
    for _ in range(2):
        model = runs.train(problem, (problem.retain, problem.forget), 0)
        found.append(runs.unlearn(problem, model, "orthograd", SETTING, seed=0, forget_batch=4, points=3))
    assert found[0].curve == found[1].curve


def test_a_diverging_run_keeps_the_last_good_model(monkeypatch):
    problem = Tiny(0)
    model = runs.train(problem, (problem.retain, problem.forget), 0)
    states = []

    def make(context):
        def step(forget, retain):
            states.append([p.detach().clone() for p in context.model.parameters()])
            if len(states) == 3:
                raise FloatingPointError("the forget loss is nan; nothing was changed")
            with torch.no_grad():
                context.model[0].weight.add_(float("inf") if len(states) == 2 else 1.0)

        return step

    monkeypatch.setitem(METHODS, "neggrad", METHODS["neggrad"].__class__("breaks", make, "α", (0.5,)))
    done = runs.unlearn(problem, model, "neggrad", SETTING, seed=0, forget_batch=4)
    assert (
        done.stopped == "step 3 of 3: the forget loss is nan; nothing was changed; the model after 1 steps was restored"
    )
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), states[1], strict=True))


def test_missing_data_is_skipped_and_named(tmp_path, monkeypatch):
    def load(seed):
        raise MissingData("The clusters: needs clusters, which is not installed. Run:\n    pip install clusters")

    monkeypatch.setitem(SCENARIOS, "tiny", scenario(load))
    compare = Comparison(small_plan(), tmp_path)
    about = compare.run()["scenarios"]["tiny"]
    assert "pip install clusters" in about["skipped"] and about["runs"] == []


def test_without_a_retrained_model_the_goal_is_the_original_without_the_forget_set(tmp_path, monkeypatch):
    class Published(Tiny):
        def __init__(self, seed):
            super().__init__(seed)
            self.training = None

    monkeypatch.setitem(SCENARIOS, "tiny", scenario(Published))
    about = Comparison(small_plan(), tmp_path).run()["scenarios"]["tiny"]
    original, unlearned, _ = about["runs"]
    a, b = original["scores"], unlearned["scores"]
    expected = math.prod(
        1 - abs(b[part] - goal) for part, goal in (("forget", 0), *((p, a[p]) for p in ("retain", "test")))
    )
    assert original["method"] == "original" and b["tow"] == pytest.approx(expected)


@pytest.mark.slow
def test_memory_of_a_step_is_measured_in_a_process_of_its_own():
    problem = Tiny(0)
    pytest.importorskip("resource")
    seen = []
    found = peak_bytes(SCENARIOS["digits-labels"].load(0), SCENARIOS["digits-labels"].load(0).build(),
                       [("neggrad", Setting(0.1, 1, n, 0.5)) for n in (4, 512)], 64, seen.append)  # fmt: skip
    assert seen == ["neggrad"] * 2 and (found[0] is None or 2**20 < found[0] < found[1])
    assert len(problem.retain) == 60


def test_batches_do_not_repeat_inside():
    part = Part((torch.arange(10.0)[:, None],), torch.arange(10))
    stream = batches(part, 4, torch.Generator().manual_seed(0))
    epoch = torch.cat([next(stream).labels, next(stream).labels])
    assert len(epoch.unique()) == 8
    assert len(next(batches(part, 20, torch.Generator()))) == 10


def test_files_are_whole_or_absent(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"x": 1})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "a.json", {"x": 2})
    assert read_json(tmp_path / "a.json") == {"x": 1} and read_json(tmp_path / "b.json") is None
    monkeypatch.undo()
    model = Tiny(0).build()
    save_model(tmp_path / "m.safetensors", model)
    other = load_model(tmp_path / "m.safetensors", Tiny(1).build())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", [name for name in SCENARIOS if (SETTINGS / f"{name}.json").exists()])
def test_shipped_settings_come_from_the_same_search_for_every_method(name):
    tune = pytest.importorskip("bench.tune")
    log = read_json(tune.LOGS / f"{name}.json")
    assert read_settings(name) == tune.shipped(log)
    assert set(log["chosen"]) | set(TUNED_AS) <= set(METHODS) | set(TUNED_AS)
    grids = {method: sorted({row["lr"] for row in rows}) for method, rows in log["candidates"].items()}
    assert len({tuple(rates) for rates in grids.values()}) == 1
    assert len({len(rows) for rows in log["candidates"].values()}) == 1
    assert set(make_plan("", (name,), 3).seeds).isdisjoint(log["seeds"])
    for method, rows in log["candidates"].items():
        best = max(rows, key=lambda row: row["tow"])
        assert log["chosen"][method].items() <= best.items()


def test_committed_results_have_the_counts_of_the_shipped_settings():
    """Whatever the numbers of the candidates moved to: a plan of today counts as the frozen results do."""
    from bench.compare_results import COMMITTED

    for name, about in read_json(COMMITTED)["scenarios"].items():
        counts = read_settings(name)["counts"]
        for method, setting in about["settings"].items():
            known = counts[TUNED_AS.get(method, method)]
            assert known == {"usable": setting["usable"], "candidates": setting["candidates"]}, (name, method)


def test_the_fast_scenarios_have_settings_for_every_method():
    for name in FAST:
        assert set(make_plan("", (name,), 3).settings[name]) == set(METHODS) - set(TUNED_AS) - set(LANGUAGE)
        assert set(TITLES) == {"original", "retrained", *METHODS}


def test_committed_results_are_checked_method_by_method(tmp_path, monkeypatch):
    """A comparison that leaves a committed method out has not reproduced the table, nor has one far from it."""
    from bench import compare_results

    def write(path, **tests):
        scores = [{"scores": {"forget": 0.0, "retain": 1.0, "test": value, "tow": value}} for value in tests.values()]
        runs = [{"method": name, "seed": 0} | some for name, some in zip(tests, scores, strict=True)]
        write_json(path, {"finished": True, "scenarios": {"tiny": {"skipped": None, "runs": runs}}})

    monkeypatch.setattr(compare_results, "COMMITTED", tmp_path / "committed.json")
    write(tmp_path / "committed.json", neggrad=0.9, orthograd=0.8)
    found = {"same": (0.9, 0.8), "rounding": (0.903, 0.8), "far": (0.9, 0.79)}
    codes = {}
    for name, (neggrad, orthograd) in found.items():
        write(tmp_path / name / "compare.json", neggrad=neggrad, orthograd=orthograd)
        codes[name] = compare_results.check(tmp_path / name)
    write(tmp_path / "less" / "compare.json", neggrad=0.9)
    assert codes == {"same": 0, "rounding": 0, "far": 1} and compare_results.check(tmp_path / "less") == 1
    with pytest.raises(SystemExit, match=r"nowhere holds no compare\.json: give the folder after --out"):
        compare_results.check(tmp_path / "nowhere")
