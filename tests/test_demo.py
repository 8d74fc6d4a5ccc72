"""The demo: honest splits, a whole tiny run, and results that survive an interruption."""

import json

import pytest
import torch

from projgrad import data
from projgrad.demo import runs, summary
from projgrad.demo.job import SETTINGS, Demo, Plan, default_plan
from projgrad.demo.methods import TITLES, TUNED
from projgrad.demo.picture import draw
from projgrad.demo.runs import Setting
from projgrad.demo.steps import METHODS
from projgrad.demo.tables import tables

pytest.importorskip("sklearn")
PARTS = ("retain", "forget", "validation", "test")


def rows(part):
    return {tuple(image.flatten().tolist()) for image in part.x}


def test_digits_are_split_without_overlap():
    task = data.digits(0)
    parts = [rows(getattr(task, name)) for name in PARTS]
    assert sum(len(getattr(task, name).y) for name in PARTS) == 1797
    assert all(a.isdisjoint(b) for i, a in enumerate(parts) for b in parts[:i])
    assert len(task.forget.y) == round(0.15 * (len(task.forget.y) + len(task.retain.y)))


def test_digits_are_stratified_and_seeded():
    task, same, other = data.digits(3), data.digits(3), data.digits(4)
    for name in ("retain", "validation", "test"):
        counts = getattr(task, name).y.bincount(minlength=10)
        assert counts.max() - counts.min() <= 0.02 * counts.sum() + 2
    for name in PARTS:
        assert all(torch.equal(a, b) for a, b in zip(getattr(task, name), getattr(same, name), strict=True))
    assert not torch.equal(task.retain.x, other.retain.x)


def test_test_images_are_the_same_for_every_seed():
    """So that tuning on other seeds' validation data never sees one."""
    first, *others = (data.digits(seed) for seed in (0, 1, 100))
    for task in others:
        assert torch.equal(task.test.x, first.test.x)
        assert rows(first.test).isdisjoint(rows(task.validation))


def test_labels_to_forget_are_wrong_and_the_others_are_not():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    truth = {tuple(image.tolist()): label for image, label in zip(images, labels, strict=True)}
    task = data.digits(1)
    for name in PARTS:
        part = getattr(task, name)
        true = torch.tensor([truth[tuple((16 * image).flatten().tolist())] for image in part.x])
        assert (part.y != true).all() if name == "forget" else (part.y == true).all()
    assert len(task.forget.y.unique()) == 10


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_share_of_wrong_labels_is_checked(share):
    with pytest.raises(ValueError, match="share of wrong training labels"):
        data.digits(0, corrupted=share)


def write_faces(folder):
    """Forty people, ten images each, in the layout of the package: the first pixel names the image."""
    for person in range(40):
        (folder / f"s{person + 1}").mkdir(parents=True)
        for i in range(10):
            pixels = bytes([person, person, i * 10, i * 10]) + bytes([32]) * (112 * 92 - 4)
            (folder / f"s{person + 1}" / f"{i + 1}.pgm").write_bytes(b"P5\n92 112\n255\n" + pixels + b"\n")


def test_faces_forget_one_person(tmp_path, monkeypatch):
    write_faces(tmp_path)
    monkeypatch.setattr(data, "_faces_folder", lambda: tmp_path)
    task = data.faces(0, person=7)
    assert [len(getattr(task, name).y) for name in PARTS] == [195, 5, 78, 117]
    assert task.forget.y.eq(7).all()
    assert all(getattr(task, name).y.ne(7).all() for name in ("retain", "validation", "test"))
    assert task.forget.x.shape[1:] == (1, 56, 46)
    top = (2 * task.test.y + 2 * 32) / 4 / 255  # two pixels of the person, two of the row below
    assert torch.allclose(task.test.x[:, 0, 0, 0], top.float())
    with pytest.raises(ValueError, match="person must be in"):
        data.faces(0, person=40)


def test_an_unreadable_image_is_named(tmp_path):
    (tmp_path / "1.pgm").write_bytes(b"P2 1 1 255 0")
    with pytest.raises(ValueError, match=r"1\.pgm is not an 8-bit binary PGM"):
        data._read_pgm(tmp_path / "1.pgm")


@pytest.fixture
def plan(monkeypatch):
    monkeypatch.setitem(runs.TRAINING, "digits", {"lr": 4e-3, "batch": 64, "epochs": 3})
    settings = {method: Setting(0.1, 2, 8, 0.5) for method in (*TUNED, "orthograd-qr")}
    return Plan("digits", (0,), settings, (Setting(0.1, 2, 8, 0.5), Setting(0.1, 2, 12, 0.5)))


def test_a_tiny_demo_runs_to_the_end(plan, tmp_path):
    moved = []
    demo = Demo(plan, tmp_path, lambda cost, what: moved.append(cost))
    demo.run()
    found = json.loads((tmp_path / "demo-digits.json").read_text())
    assert found["finished"]
    assert set(found["summary"]["methods"]) == set(TITLES)
    assert len(found["runs"]) == len(TITLES) + 3
    assert sum(moved) == pytest.approx(demo.expected_seconds)
    steps = found["summary"]["steps"]
    assert [row["n"] for row in steps] == [8, 12]
    assert all(set(row["seconds"]) == set(row["bytes"]) == set(METHODS) for row in steps)
    assert max(row["relative_difference"] for row in steps) <= 1e-4
    ours, qr = (found["summary"]["methods"][method] for method in ("orthograd", "orthograd-qr"))
    assert ours["test"]["mean"] == pytest.approx(qr["test"]["mean"], abs=0.01)
    assert "OrthoGrad leaves" in found["summary"]["verdict"]
    assert "With 8 or 12 retain samples a step on the tape takes" in found["summary"]["verdict"]
    assert draw(found, tmp_path).read_bytes().startswith(b"\x89PNG")
    assert len(list(tables(found))) == 5


def test_an_interrupted_demo_leaves_what_is_finished(plan, tmp_path):
    def interrupt(cost, what):
        if "fine-tuning" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Demo(plan, tmp_path, interrupt).run()
    found = json.loads((tmp_path / "demo-digits.json").read_text())
    assert not found["finished"]
    assert {"original", "retrained"} <= {run["method"] for run in found["runs"]}
    assert [path.name for path in tmp_path.iterdir()] == ["demo-digits.json"]


def test_runs_repeat_exactly(plan):
    task = data.digits(0)
    found = []
    for _ in range(2):
        model = runs.train(task, 0, with_forget=True)
        found.append(runs.unlearn(model, task, "orthograd", plan.settings["orthograd"], seed=0, points=2))
    assert found[0].curve == found[1].curve
    assert found[0].residual <= 1e-6


def row(forget, test, std=0.01):
    return {"forget": {"mean": forget, "std": std}, "test": {"mean": test, "std": std}}


@pytest.mark.parametrize(
    "ours, baseline, expected",
    [
        (row(0.01, 0.97), row(0.02, 0.90), "OrthoGrad wins"),
        (row(0.01, 0.90), row(0.02, 0.97), r"does not win on this data \(-7.0 points"),
        (row(0.01, 0.97), row(0.02, 0.971), "cannot be told apart"),
        (row(0.01, 0.97), row(0.50, 0.99), "no baseline gets below 5%"),
        (row(0.01, 0.97), row(0.02, 0.60, 0.4), r"NegGrad\+ \(60.0 ± 40.0 %\) broke down on some seeds"),
        (row(0.20, 0.97), row(0.02, 0.90), "That is not forgetting"),
        (row(0.01, 0.97, None), row(0.02, 0.90, None), "on one seed"),
    ],
)
def test_the_verdict_says_what_the_numbers_say(ours, baseline, expected):
    import re

    rows = {"retrained": row(0.0, 0.98), "neggrad": baseline, "orthograd": ours}
    assert re.search(expected, summary.verdict(rows, 0.05))


def needs(tape, reference, plain):
    return {"orthograd": tape, "orthograd-qr": reference, "neggrad": plain}


def test_what_the_tape_saves_is_what_was_measured():
    one = {"n": 4, "seconds": needs(3.0, 2.0, 1.0), "bytes": needs(10, 40, 10)}
    assert summary.saving([one]) == (
        "With 4 retain samples a step on the tape takes 1.5 times the time and 0.25 times the memory of a step with "
        "the reference projector, and 3 times the time and 1 times the memory of a step without projection."
    )
    more = {"n": 8, "seconds": needs(3.0, 30.0, 1.5), "bytes": needs(None, None, None)}
    assert summary.saving([one, more]) == (
        "With 4 or 8 retain samples a step on the tape takes 0.1 to 1.5 times the time of a step with the reference "
        "projector, and 2 to 3 times the time of a step without projection."
    )
    assert summary.saving([]) == ""


@pytest.mark.parametrize("name", list(data.TASKS))
def test_shipped_settings_come_from_the_same_search_for_every_method(name):
    tuned = json.loads(SETTINGS.read_text())[name]
    assert len({len(rows) for rows in tuned["candidates"].values()}) == 1
    assert set(default_plan(name, 3).seeds).isdisjoint(tuned["seeds"])
    for method in TUNED:
        rows = tuned["candidates"][method]
        allowed = [r for r in rows if r["forget"] <= tuned["limit"]]
        best = max(r["validation"] for r in allowed) if allowed else None
        chosen = next(r for r in rows if tuned["chosen"][method].items() <= r.items())
        assert best is None or chosen["validation"] == best
