"""`projgrad bench` on the user's own model: what it measures, keeps, compares and writes."""

import json
import subprocess
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from in_process import DRAW, EXAMPLE, FEW, MODELS, InProcess

from projgrad.experiments.benchmark import options, report, step_worker, steps, store
from projgrad.experiments.benchmark.contenders import Contender, loop
from projgrad.experiments.benchmark.report import read_csv, write_csv
from projgrad.experiments.benchmark.show import WIDTH
from projgrad.experiments.comparison.store import DamagedFile
from projgrad.projectors import qr

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.same_without_extension


def test_the_example_is_measured_beside_explicit_gradients(bench, monkeypatch):
    monkeypatch.setattr(report, "draw", DRAW)
    status, printed, _ = bench(EXAMPLE, *FEW, "--threads", "1", "--n", "4")
    assert status == 0 and "threads 1" in printed and "n = 4" in printed and "AdamW" in printed
    assert max(map(len, printed.splitlines())) <= WIDTH
    rows = {row["contender"]: row for row in read_csv(bench.out / "steps.csv")}
    for name in step_worker.STEPS:
        row = rows[name]
        assert float(row["error"]) < 1e-4 and row["ms"] and row["threads"] == "1" and not row["note"], name
        assert float(row["ms_20"]) <= float(row["ms"]) <= float(row["ms_80"]), name
    assert rows["projgrad optimizer"]["compared_with"] == "cosine left"
    assert rows["plain"]["percent_of_floor"] == "100"
    if find_spec("matplotlib"):
        assert (bench.out / "steps.svg").read_text().startswith("<?xml")
    else:
        assert "matplotlib is not installed" in printed


def test_what_is_there_is_not_measured_again(bench):
    only = (EXAMPLE, *FEW, "--n", "4", "--contenders", "projgrad global")
    bench(*only)
    count = InProcess.started
    status, printed, _ = bench(*only)
    assert status == 0 and InProcess.started == count
    assert 0 < printed.find("(kept)") < printed.index("contender ")
    bench(*only, "--threads", str(torch.get_num_threads() + 1))  # other circumstances
    assert InProcess.started == 2 * count
    bench(*only, "--again")
    assert InProcess.started == 3 * count
    bench(EXAMPLE, *FEW, "--contenders", "projgrad global")  # n as the function has it, which is another one
    assert InProcess.started == 4 * count


def test_json_and_comparison(bench):
    only = (EXAMPLE, *FEW, "--n", "4", "--contenders", "projgrad global")
    bench(*only)
    old = bench.out / "old.csv"
    lines = (bench.out / "steps.csv").read_text().splitlines()
    head = lines[0].split(",")
    for k, line in enumerate(lines[1:], 1):
        cells = dict(zip(head, line.split(","), strict=True))
        cells |= {"ms": "1e-5", "ms_20": "1e-5", "ms_80": "1e-5", "torch": "1.0"}
        lines[k] = ",".join(cells[name] for name in head)
    old.write_text("\n".join(lines) + "\n")
    status, printed, _ = bench(*only, "--compare", str(old))
    assert status == 0 and "not the same: torch 1.0 -> " in printed and "2 of 2 times changed" in printed
    assert "projgrad global: slower" in printed and "plain itself" in printed
    status, printed, _ = bench(*only, "--json")
    assert [row["contender"] for row in json.loads(printed)] == ["plain", "projgrad global"]


def test_pytest_benchmark_reads_the_file(bench):
    pytest.importorskip("pytest_benchmark")
    bench(EXAMPLE, *FEW, "--n", "4", "--contenders", "projgrad global")
    command = [sys.executable, "-m", "pytest_benchmark", "compare", str(bench.out / "steps.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=bench.out)
    assert done.returncode == 0, done.stderr
    assert "projgrad global" in done.stdout and "2 tests" in done.stdout


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_statistics_are_those_of_pytest_benchmark(count):
    theirs = pytest.importorskip("pytest_benchmark.stats").Stats()
    times = [0.3, 0.1, 0.2, 5.0, 0.25, 0.15, 0.11, 0.4][:count]
    for t in times:
        theirs.update(t)
    ours = store.statistics(times)
    expected = theirs.as_dict()
    for name in ("q1", "q3", "iqr", "iqr_outliers", "outliers", "ld15iqr", "hd15iqr"):
        if count % 2 and count > 1:  # quartiles of an odd number: theirs interpolate
            ours.pop(name), expected.pop(name)
    assert {name: ours[name] for name in expected} == pytest.approx(expected)


def test_a_wrong_result_is_printed_and_not_timed(bench, monkeypatch):
    off = Contender(loop(lambda u, G: 1.01 * u), "global")
    monkeypatch.setattr(step_worker, "STEPS", step_worker.STEPS | {"off": off})
    chosen = ("--contenders", "projgrad global", "off", "loop + Gram")
    status, printed, _ = bench(f"{MODELS}duplicates", *FEW, *chosen)
    rows = {row["contender"]: row for row in read_csv(bench.out / "steps.csv")}
    assert rows["off"]["note"].startswith("wrong by ") and not rows["off"]["ms"]
    assert f"off: {rows['off']['note'].split(';')[0]}" in printed
    assert rows["projgrad global"]["ms"] and float(rows["projgrad global"]["error"]) < 1e-5
    assert not rows["loop + Gram"]["ms"], "a singular system has no answer"
    assert "retain has no parameter `part`" in rows["loop + Gram"]["note"] or rows["loop + Gram"]["note"]
    assert status == 0


def test_a_wrong_result_of_projgrad_is_an_error(bench, monkeypatch):
    wrong = {"projgrad global": Contender(loop(lambda u, G: u), "global")}
    monkeypatch.setattr(step_worker, "STEPS", step_worker.STEPS | wrong)
    status, printed, errors = bench(EXAMPLE, *FEW, "--contenders", "projgrad global")
    (row,) = (row for row in read_csv(bench.out / "steps.csv") if row["contender"] == "projgrad global")
    assert status == 1 and row["note"].startswith("wrong by ") and not row["ms"]
    assert f"projgrad global: {row['note']}" in printed and f"projgrad global: {row['note']}" in errors


def test_random_losses_are_not_checked_and_say_so(bench):
    status, printed, _ = bench(f"{MODELS}dropout", *FEW, "--contenders", "projgrad global")
    assert status == 0 and "the losses differ from call to call" in " ".join(printed.split())


def test_k_alone(bench):
    status, printed, _ = bench(EXAMPLE, *FEW, "--gram")
    rows = {row["contender"]: row for row in read_csv(bench.out / "steps.csv")}
    assert status == 0 and "K alone" in printed
    assert float(rows["projgrad gram"]["error"]) < 1e-5 and float(rows["loop gram"]["error"]) < 1e-5


def test_a_built_in_model_in_bfloat16(bench, monkeypatch):
    small = step_worker.BUILT_IN["mlp"]._replace(sizes=(8, 16, 10), n=4)
    monkeypatch.setitem(step_worker.BUILT_IN, "mlp", small)
    status, _, _ = bench("mlp", *FEW, "--dtype", "float32", "bfloat16", "--contenders", "projgrad global", "loop + QR")
    rows = read_csv(bench.out / "steps.csv")
    assert status == 0 and [row["dtype"] for row in rows] == ["float32"] * 3 + ["bfloat16"] * 3
    assert all(row["ms"] for row in rows), [row["note"] for row in rows]


def test_rounding_of_parameters_is_allowed_after_the_optimizer(bench):
    status, printed, _ = bench(f"{MODELS}own", *FEW, "--contenders", "projgrad optimizer")
    (row,) = (row for row in read_csv(bench.out / "steps.csv") if row["contender"] == "projgrad optimizer")
    assert status == 0 and row["ms"] and 1e-4 < float(row["error"]) < 1e-2, printed  # lr = 1e-4


class Peer:
    """One of the interface that other packages have; `answer` makes what it returns of G [n, p] and u."""

    scope, needs_samples = "global", False

    def __init__(self, missing, answer):
        self.package, self.answer = "some-package", answer
        self.missing = lambda: missing

    def _rows(self, job):
        params = list(job.model.parameters())
        flat = lambda loss: torch.cat([g.flatten() for g in torch.autograd.grad(loss, params, retain_graph=True)])  # noqa: E731
        return torch.stack([flat(loss) for loss in job.retain()]), flat(job.forget())

    def start(self, job):
        return lambda: (lambda G, _: G @ G.mT)(*self._rows(job))

    def project(self, job):
        return lambda: self.answer(*self._rows(job))


def test_other_packages_join(bench, monkeypatch):
    name = "projgrad.experiments.benchmark.peers"
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.PEERS = {
        "right": Peer(None, lambda G, u: qr(u, G)),
        "off": Peer(None, lambda G, u: u),
        "absent": Peer("pip install some-package", None),
        "projgrad": Peer(None, None),
    }
    monkeypatch.setitem(sys.modules, name, module)
    status, printed, _ = bench(EXAMPLE, *FEW, "--n", "4", "--contenders", "right", "off", "absent")
    rows = {row["contender"]: row for row in read_csv(bench.out / "steps.csv")}
    assert status == 0 and rows["right"]["ms"] and rows["right"]["compared_with"] == "u, global"
    assert rows["off"]["note"].startswith("wrong by") and "absent: not run: pip install some-package" in printed
    assert bench(EXAMPLE, *FEW, "--n", "4", "--gram", "--contenders", "off")[0] == 0
    (row,) = (row for row in read_csv(bench.out / "steps.csv") if (row["what"], row["contender"]) == ("K", "off"))
    assert row["ms"] and row["compared_with"] == "gram"


def test_an_optimizer_without_a_known_diagonal_is_no_failure(bench):
    status, printed, _ = bench(f"{MODELS}adamax", *FEW, "--contenders", "projgrad global", "projgrad optimizer")
    assert status == 0 and "projgrad optimizer: not run: " in printed


def test_a_closure_that_draws_its_batch_is_not_called_dropout_alone(bench):
    status, printed, errors = bench(f"{MODELS}draws", *FEW, "--contenders", "plain")
    printed = " ".join(printed.split())
    assert status == 0 and "or a closure that draws its batch" in printed
    assert "error" not in printed, "no row has one"
    lines = errors.splitlines()
    assert len(lines) == 2 and lines[0].endswith("plain: result and memory") and lines[1].endswith("plain: 2 times")


def test_the_help_names_the_contenders_and_exit_codes():
    for name in {**step_worker.STEPS, **step_worker.GRAMS}:
        assert name in options.EPILOG
    assert "exit codes:" in options.EPILOG


def test_a_damaged_file_is_set_aside(bench):
    bench.out.mkdir()
    (bench.out / "steps.json").write_text('{"benchmarks": [{"extra')
    with pytest.warns(DamagedFile, match="set aside as steps.json.damaged"):
        status, _, _ = bench(EXAMPLE, *FEW, "--n", "4", "--contenders", "plain")
    assert status == 0 and (bench.out / "steps.json.damaged").exists()
    assert json.loads((bench.out / "steps.json").read_text())["benchmarks"]


def test_a_worker_whose_parent_has_gone_ends_silently():
    code = "import sys; from projgrad.experiments.benchmark.worker import serve; sys.stdin.readline()\n"
    code += "serve(lambda _: {'ms': 1}, ['a', 'b'])"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=-1, stdout=-1, stderr=-1, cwd=Path(__file__).parents[2]
    ) as process:
        process.stdout.close()
        process.stdin.write(b"go\n")
        process.stdin.close()
        assert process.stderr.read() == b"" and process.wait() == 1


def test_a_process_of_its_own_survives_what_the_function_prints(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import torch\nprint('{ imported')\ndef make():\n    print('{ called')\n    model = torch.nn.Linear(2, 2)\n"
        "    return model, lambda: model(torch.ones(3, 2)).sum(), lambda: model(torch.ones(3, 2)).sum(1)\n"
    )
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    task = step_worker.Task("mine:make", None, None, "cpu", 1, file=str(tmp_path / "truth.pt"))
    with steps.start_worker(task) as worker:
        about = worker.ask()
    assert about["n"] == 3 and about["p"] == 6 and about["precision"] == "float64" and not about["slices"]


def test_a_table_may_go_into_a_folder_that_is_not_there(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    write_csv(path, [{"a": 0.5}], ["a"])
    assert read_csv(path) == [{"a": "0.5"}]
