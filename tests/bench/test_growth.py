"""The benchmark of growth: what it counts, fits and refuses to run, and that its command works."""

import sys

import pytest
import torch

from bench import growth
from projgrad.experiments.benchmark.report import read_csv


def test_parameters_are_counted_as_the_model_has_them():
    for point in (growth.Point("n", 4, 4, 16), growth.Point("p", 4, 4, 64, 2)):
        assert point.p == sum(p.numel() for p in point.job().model.parameters())


def test_every_axis_grows_and_keeps_the_rest():
    for axis in ("n", "t", "p"):
        points = [point for point in growth.POINTS if point.axis == axis]
        sizes = [point.size for point in points]
        assert sizes == sorted(set(sizes)) and len(sizes) > 3
        others = [{"n": (point.t, point.p), "t": (point.n, point.p), "p": (point.n, point.t)}[axis] for point in points]
        assert len(set(others)) == 1
    assert min(p.p for p in growth.POINTS if p.axis == "p") < 1.5e6 and max(p.p for p in growth.POINTS) > 0.99e8


def test_exponents_are_those_of_a_power_law():
    sizes = [1, 2, 4, 8, 16]
    assert growth.exponent(sizes, [3 * s**1.5 for s in sizes]) == pytest.approx(1.5)
    assert growth.exponent(sizes, [100, 100, *(s**2 for s in sizes[2:])]) == pytest.approx(2)  # the larger half
    assert growth.exponent([4], [1.0]) is None


class InProcess:
    """A team without processes that needs as many bytes an entry of G as it is told."""

    bytes_each = 16

    def __init__(self, folder=None):
        self.folder, self.asked = folder, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ask(self, name, point):
        self.asked.append(name)
        job = point.job()
        step = (growth.exact if name == growth.REFERENCE else growth.STEPS[name].start)(job)
        if not self.folder:
            return dict(zip(("ms", "ms_cpu"), growth.timed(step), strict=True))
        return growth.one_step(job, step, growth.Path(self.folder) / name) | {
            "peak_mb": self.bytes_each * point.n * point.p / 1e6
        }


def test_what_does_not_fit_is_not_run_and_says_so(monkeypatch):
    monkeypatch.setattr(growth, "Team", InProcess)
    points = [growth.Point("n", n, 4, 16) for n in (4, 8)]
    limit = 16 * 7 * points[0].p  # the second point needs 16 bytes for each of 8 p entries
    rows = growth.measure_memory(points, limit)
    growth.measure_time(rows, dict.fromkeys(growth.NAMES, 1))
    notes = {(row["n"], row["contender"]): row["note"] for row in rows}
    assert all(not note for (n, _), note in notes.items() if n == 4)
    assert [bool(notes[8, name]) for name in growth.NAMES] == [False, False, True, True]
    assert notes[8, "vmap + QR"].startswith("not run: about")
    assert all((row["ms"] is None) == bool(row["note"]) for row in rows)
    assert all(row["difference"] <= 1e-5 for row in rows if row["contender"] != "plain" and not row["note"])


def test_a_wrong_update_is_not_timed(monkeypatch):
    class Wrong(InProcess):
        def ask(self, name, point):
            out = super().ask(name, point)
            if self.folder and name == growth.NAMES[1]:
                file = growth.Path(self.folder) / name
                torch.save(1.1 * torch.load(file), file)
            return out

    monkeypatch.setattr(growth, "Team", Wrong)
    rows = growth.measure_memory([growth.Point("n", 4, 4, 16)])
    growth.measure_time(rows, dict.fromkeys(growth.NAMES, 1))
    ours = next(row for row in rows if row["contender"] == growth.NAMES[1])
    assert ours["note"].startswith("wrong: differs from") and ours["ms"] is None


@pytest.mark.slow
def test_command(tmp_path, monkeypatch):
    """Our steps in processes of their own, and the others here: they would be started in the same way."""

    class Ours(growth.Team):
        def ask(self, name, point):
            return super().ask(name, point) if name == growth.NAMES[1] else InProcess(self.folder).ask(name, point)

    monkeypatch.setattr(growth, "Team", Ours)
    monkeypatch.setattr(growth, "TINY", [growth.Point("n", n, 4, 16) for n in (4, 8)])
    monkeypatch.setattr(sys, "argv", ["bench.growth", "--tiny", "--axis", "n", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        growth.main()
    assert not ended.value.code
    rows = read_csv(tmp_path / "growth_cpu_tiny.csv")
    assert len(rows) == 8 and all(row["ms"] and row["ms_cpu"] and not row["note"] for row in rows)
    assert (tmp_path / "growth_cpu_tiny_n.svg").stat().st_size > 1000
