"""The GPU benchmarks in their tiny mode: the whole logic on the CPU, where there is no GPU."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import TRITON

import projgrad
from bench import flat, gpu_readme, layers, sanitize, steps, steps_cuda
from bench.contenders import TOKEN_STEPS
from projgrad.experiments.benchmark import flat as benchmark_flat
from projgrad.experiments.benchmark import harness, models
from projgrad.experiments.benchmark import layers as benchmark_layers
from projgrad.experiments.benchmark.layers import ALTERNATIVES
from projgrad.experiments.benchmark.report import Rows, meets
from projgrad.experiments.benchmark.worker import Failed

ROOT = Path(__file__).parents[2]
CEILINGS = harness.Ceilings(1e12, 6e14, 6e14, 3e14, 5e13)


def script(*arguments, **variables):
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    environment.pop("TRITON_INTERPRET", None)
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def test_the_script_lists_its_parts_and_refuses_others():
    listed = script("--list")
    assert listed.stdout.split() == ["build", "tests", "steps", "layers", "flat", "sanitize"]
    refused = script("flat", "speed")
    assert refused.returncode == 2 and "no part speed" in refused.stderr


@pytest.mark.slow
def test_a_failing_part_stops_no_other(tmp_path):
    """Nor its own report."""
    parts = "tests:no_such_test or", "layers:linear_dot 4x1x8x8"
    python = tmp_path / "python"  # without xdist, whose workers import everything once more
    python.write_text(f'#!/bin/bash\n[[ $* == *"import xdist"* ]] && exit 1\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    done = script("--tiny", *parts, OUT=str(tmp_path), PYTHON=str(python), COMMIT="named")
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"failed: {parts[0]}\n" in done.stdout and f"{parts[1]}: ends" in done.stdout
    rows = read(tmp_path / "gpu_layers_tiny.csv")
    assert {"ceiling", "linear_dot"} == {row["op"] for row in rows} and {row["commit"] for row in rows} == {"named"}
    assert all(row["ms"] for row in rows if row["contender"] == "projgrad")
    assert "linear_dot  4x1x8x8" in (tmp_path / "gpu_layers.log").read_text()


def test_a_part_prints_no_more_than_100_lines(tmp_path):
    """Its beginning and its end; the log has all."""
    python = tmp_path / "python"
    python.write_text("#!/bin/bash\ncase $* in *--calls*|*harness*) ;; *sanitize*) seq 1 500 ;; esac\n")
    python.chmod(0o755)
    done = script("--tiny", "sanitize:memcheck", OUT=str(tmp_path), PYTHON=str(python))
    printed = done.stdout.splitlines()
    assert len(printed) <= 100 and {"1", "50", "... 410 more lines in the log", "461", "500"} <= set(printed)
    assert (tmp_path / "gpu_sanitize.log").read_text().split() == [str(k) for k in range(1, 501)]


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def part(module, monkeypatch, folder, only):
    """Run one part in this process and return its exit status."""
    options = ["--device", "cuda", "--tiny", "--out", str(folder), "--only", only]
    monkeypatch.setattr(sys, "argv", [module.__name__, *options])
    with pytest.raises(SystemExit) as stop:
        module.main()
    return stop.value.code


def test_flat_ops_are_measured_and_rows_stay(tmp_path, monkeypatch):
    assert part(flat, monkeypatch, tmp_path, "8x3000") == 0
    assert {row["op"] for row in read(tmp_path / "gpu_flat_tiny.csv")} == {"ceiling", "project_out", "gram", "subtract"}
    assert part(flat, monkeypatch, tmp_path, "gram_solve") == 0
    assert {"project_out", "gram_solve"} < {row["op"] for row in read(tmp_path / "gpu_flat_tiny.csv")}  # rows stay


@pytest.fixture
def clock():
    return harness.Clock()


def test_rows_of_flat_ops_are_right_and_complete(clock):
    for case in flat.gpu_cases(tiny=True):
        rows = list(case.rows(CEILINGS, clock))
        assert [row["op"] for row in rows] == ["project_out"] * 2 + ["gram"] * 2 + ["subtract"] * 2
        assert not any(row["note"] for row in rows)
        assert bool(rows[0]["target"]) == case.contract


@pytest.mark.slow
def test_qr_has_a_process_of_its_own():
    """And the smaller size is tried where the larger one fails."""
    case = flat.GPUCase(64, 10**15, torch.float32, contract=True, fallback=500)
    failed, ours, qr = flat.qr_rows(case, tiny=True)
    assert failed["note"] and failed["contender"] == "QR" and failed["size"] == f"64x{10**15}"
    assert ours["size"] == qr["size"] == "64x500" and ours["contender"] == "projgrad" and qr["ms"]


def test_a_wrong_result_is_not_timed(monkeypatch, clock):
    monkeypatch.setattr(benchmark_flat, "project_out", lambda u, G: u)
    row = next(flat.gpu_cases(tiny=True)[0].rows(CEILINGS, clock))
    assert row["contender"] == "projgrad" and row["note"].startswith("wrong: ") and row["ms"] is None


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), ValueError("no, never")])
def test_what_cannot_run_is_a_row(error, clock):
    def call():
        raise error

    contenders = {"bad": harness.Contender(call), "good": harness.Contender(lambda: torch.ones(3))}
    harness.measure(contenders, clock)
    bad, good = (contender.columns() for contender in contenders.values())
    assert bad["ms"] is None and bad["note"] in ("out of memory", "ValueError: no; never")
    assert good["ms"] > 0 and not good["note"]


@pytest.mark.skipif(not TRITON, reason="triton has no build for this system")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", [op for op in ALTERNATIVES if hasattr(projgrad, op)])
def test_every_alternative_of_a_layer(op, dtype, monkeypatch, clock):
    """Right on tiny sizes; kernels in the interpreter where there is no GPU."""
    monkeypatch.setattr(benchmark_layers, "measure", lambda *_, **__: None)
    sizes = layers.TINY_BASES if op == "basis_project" else layers.TINY
    for size in sizes:
        rows = list(benchmark_layers.layer_rows(op, size, dtype, CEILINGS, clock))
        assert [row["contender"] for row in rows] == list(ALTERNATIVES[op])
        assert not any(row["note"] for row in rows), [row["note"] for row in rows]


class InProcess:
    """A worker without a process."""

    def __init__(self, case, name, tiny):
        self.name, self.known = name, steps_cuda.answers(case, name, tiny)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ask(self, question):
        if self.name == "explicit QR, global":
            raise Failed("out of memory")
        return self.known[question]()


@pytest.mark.slow
@pytest.mark.parametrize("transformers", [True, False])
def test_steps_of_every_contender(transformers, tmp_path, monkeypatch):
    """Also with the repository's own decoder."""
    monkeypatch.setattr(models, "TRANSFORMERS", transformers and models.TRANSFORMERS)
    monkeypatch.setattr(steps_cuda, "start", InProcess)
    assert part(steps, monkeypatch, tmp_path, "gpt2") == 0
    rows = {row["contender"]: row for row in read(tmp_path / "gpu_steps_tiny.csv")}
    assert list(rows) == list(TOKEN_STEPS)
    assert rows.pop("explicit QR, global")["note"] == "out of memory"
    assert all(row["ms"] and not row["note"] for row in rows.values())
    assert ("own decoder" in rows["plain"]["model"]) != models.TRANSFORMERS
    assert all(row["host_ms"] for row in rows.values())
    assert float(rows["projgrad global"]["error"]) <= steps_cuda.LIMITS[torch.bfloat16]


def test_token_losses_equal_cross_entropy():
    logits, y = torch.randn(5, 7, dtype=torch.float64, requires_grad=True), torch.randint(7, (5,))
    found = models.TokenLosses.apply(logits.float(), y)
    expected = torch.nn.functional.cross_entropy(logits.float(), y, reduction="none")
    torch.testing.assert_close(found, expected)
    weights = torch.randn(5)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits, weights)[0] for x in (found, expected)))


def test_rows_of_the_same_device_stay(tmp_path):
    path = tmp_path / "rows.csv"
    for size, value in (("1", 1.0), ("2", 2.0), ("1", 3.0)):
        Rows(path, ("size", "ms"), ("size",), "cpu").add({"size": size, "ms": value})
    assert {row["size"]: row["ms"] for row in read(path)} == {"1": "3", "2": "2"}
    path.write_text(path.read_text().replace(Rows(path, (), (), "cpu").about["device"], "another device"))
    assert not Rows(path, ("size", "ms"), ("size",), "cpu").rows


def test_targets_are_met_or_missed():
    wanted = [("ms", "<=", 2.0), ("rate", ">=", 3.0)]
    assert meets({"ms": 2.0, "rate": 3.0}, wanted) == {"target": "ms <= 2 and rate >= 3", "met": "yes"}
    assert meets({"ms": 2.0}, wanted)["met"] == "NO" and meets({}, [])["target"] == ""


def test_section_of_the_readme(tmp_path):
    assert gpu_readme.gpu(tmp_path) == gpu_readme.NOT_MEASURED
    columns, key = flat.COLUMNS, flat.KEY
    rows = Rows(tmp_path / "gpu_flat.csv", columns, key, "cpu")
    common = {"op": "project_out", "size": "64x50000000", "dtype": "float32"}
    rows.add({**common, "contender": "projgrad", "ms": 6.5, "extra_mb": 200.0, "percent_of_floor": 90.0})
    rows.add({**common, "contender": "QR", "note": "out of memory"})
    text = gpu_readme.gpu(tmp_path)
    assert "| 64 x 50,000,000 | float32 | 6.5 (200 MB) | 90 |  | out of memory |  |  |" in text
    assert "Not measured yet: the ops of one layer, whole steps" in text


def test_errors_that_a_checker_reports_are_counted_by_kernel():
    log = """========= Invalid __global__ read of size 4 bytes
=========     at gram_kernel+0x1a0 in gram.py:66
=========     by thread (0,0,0) in block (0,0,0)
=========     Access at 0x7f is out of bounds
=========     Saved host backtrace up to driver entry point at kernel launch time
========= Error: Race reported between Write access at void projgrad::blocked<float>(int)+0x80 in gram_solve.cu:10
=========     and Read access at void projgrad::blocked<float>(int)+0x90 in gram_solve.cu:12 [4 hazards]
========= Uninitialized __global__ memory read of size 4 bytes
=========     at 0x90 in void at::native::vectorized_elementwise_kernel(int)
"""
    found = sanitize.kernels(log)
    assert sum(found.values()) == 4
    assert {name for name in found if sanitize.OURS.search(name)} == {"gram_kernel", "void projgrad::blocked<float>"}
