"""`projgrad bench`: on the user's own model, on the ops, and what it writes; its processes run inside this one."""

import argparse
import json
import subprocess
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from projgrad.experiments.benchmark import changes, command, ops, options, report, step_worker, steps, store
from projgrad.experiments.benchmark.contenders import Contender, loop
from projgrad.experiments.benchmark.report import read_csv
from projgrad.experiments.benchmark.show import WIDTH, Progress
from projgrad.experiments.benchmark.worker import Failed
from projgrad.experiments.comparison.store import DamagedFile
from projgrad.projectors import qr

pytestmark = pytest.mark.same_without_extension
EXAMPLE = f"{Path(__file__).parents[2] / 'examples' / 'bench_own_model.py'}:make"
HERE, ROOT = f"{__file__}:", Path(__file__).parents[2]
DRAW = report.draw
FEW = ("--rounds", "2", "--seconds", "0.001")


class InProcess:
    """A worker without a process; `started` counts them."""

    started = 0

    def __init__(self, make):
        type(self).started += 1
        self.make, self.process = make, SimpleNamespace(poll=lambda: None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ask(self, question=""):
        try:
            reply = json.loads(json.dumps(self.make()(question)))
        except Exception as error:
            raise Failed(f"{type(error).__name__}: {error}") from error
        if "error" in reply:
            raise Failed(reply["error"])
        return reply


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    threads, InProcess.started = torch.get_num_threads(), 0
    monkeypatch.setattr(steps, "start_worker", lambda task: InProcess(lambda: step_worker.answers(task)))
    monkeypatch.setattr(ops, "Worker", lambda arguments, _: InProcess(lambda: ops.answers(*arguments[-2:])))
    monkeypatch.setattr(ops, "matrix_rate", lambda _: 1e11)
    monkeypatch.setattr(ops, "release", lambda: None)
    monkeypatch.setattr(report, "draw", lambda *_: None)
    ops.product_rate.cache_clear()
    yield
    ops.product_rate.cache_clear()
    torch.set_num_threads(threads)


@pytest.fixture
def bench(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        parser = argparse.ArgumentParser(prog="projgrad bench")
        command.add(parser)
        status = command.run(parser.parse_args([*arguments, "--out", "out"]))
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    run.out = tmp_path / "out"
    return run


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


def duplicates():
    """Two retain samples twice: the Gram matrix is singular."""
    model = nn.Linear(3, 4)
    x, y = torch.randn(2, 3).repeat(2, 1), torch.tensor([0, 1, 0, 1])
    return model, lambda: cross_entropy(model(-x), y), lambda: cross_entropy(model(x), y, reduction="none")


def test_a_wrong_result_is_printed_and_not_timed(bench, monkeypatch):
    off = Contender(loop(lambda u, G: 1.01 * u), "global")
    monkeypatch.setattr(step_worker, "STEPS", step_worker.STEPS | {"off": off})
    chosen = ("--contenders", "projgrad global", "off", "loop + Gram")
    status, printed, _ = bench(f"{HERE}duplicates", *FEW, *chosen)
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


def dropout():
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(), nn.Linear(8, 4))
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 3])
    return model, lambda: cross_entropy(model(-x), y), lambda: cross_entropy(model(x), y, reduction="none")


def test_random_losses_are_not_checked_and_say_so(bench):
    status, printed, _ = bench(f"{HERE}dropout", *FEW, "--contenders", "projgrad global")
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


def own(model=None, forget=None, retain=None, *more):
    model = model or nn.Linear(3, 4)
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 3])
    forget = forget or (lambda: cross_entropy(model(-x), y))
    retain = retain or (lambda x=x: cross_entropy(model(x), y, reduction="none"))  # a default is no slice of samples
    return model, forget, retain, *more


def test_rounding_of_parameters_is_allowed_after_the_optimizer(bench):
    status, printed, _ = bench(f"{HERE}own", *FEW, "--contenders", "projgrad optimizer")
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


def adagrad():
    model = nn.Linear(3, 4)
    return own(model, None, None, torch.optim.Adagrad(model.parameters(), 0.01))


def test_an_optimizer_without_a_known_diagonal_is_no_failure(bench):
    status, printed, _ = bench(f"{HERE}adagrad", *FEW, "--contenders", "projgrad global", "projgrad optimizer")
    assert status == 0 and "projgrad optimizer: not run: " in printed


def raises():
    raise ValueError("no data\nin two lines")


def vector():
    model = nn.Linear(3, 4)
    return own(model, forget=lambda: model(torch.randn(4, 3)).sum(1))


def scalar():
    model = nn.Linear(3, 4)
    return own(model, retain=lambda: model(torch.randn(4, 3)).sum())


def one():
    model = nn.Linear(3, 4)
    return own(model, retain=lambda: model(torch.randn(1, 3)).sum(1))


def two_values():
    return own()[:2]


def lists():
    return own(retain=[own()[2]])


def meta():
    return own(nn.Linear(3, 4, device="meta"))


def split():
    return own(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4, device="meta")))


def constant():
    return own(retain=lambda: torch.zeros(4))


def foreign():
    return own(None, None, None, torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1))


def no_part():
    model, x = nn.Linear(3, 4), torch.randn(4, 3)
    return own(model, retain=lambda part=None: model(x).sum(1))


def nan(at=0):
    model, x = nn.Linear(3, 4), torch.randn(4, 3)
    x[at] = float("nan")
    return own(model, retain=lambda part=slice(None): model(x[part]).sum(1))


def batch_norm():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), torch.randn(4, 3)
    return own(model, retain=lambda part=slice(None): model(x[part]).sum(1))


def frozen():
    return own(nn.Linear(3, 4).requires_grad_(False))


def needs(k, n=4):
    return own()


def leaves():
    sys.exit(0)


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["no_such_module:make"], "no module no_such_module"),
        (["no_such_file.py:make"], "there is no file no_such_file.py"),
        ([f"{HERE}nothing"], "has no function 'nothing'"),
        ([f"{HERE}raises"], "raised ValueError: no data (test_bench.py:"),
        ([f"{HERE}vector"], "forget of"),
        ([f"{HERE}scalar"], 'reduction="none"'),
        ([f"{HERE}one"], "the loss of one sample"),
        ([f"{HERE}two_values"], "got 2 values"),
        ([f"{HERE}lists"], "lists of closures"),
        ([f"{HERE}meta"], "is on meta, but --device is cpu"),
        ([f"{HERE}split"], "is on cpu and meta"),
        ([f"{HERE}constant"], "has no gradient"),
        ([f"{HERE}foreign"], "the optimizer holds no parameter"),
        ([f"{HERE}no_part"], "is not what retain()[3:] is"),
        ([f"{HERE}own", "--n", "4"], "has no parameter n"),
        ([f"{HERE}own", "--dtype", "float64"], "is in float32, but --dtype is float64"),
        ([f"{HERE}nan"], "returns NaN or infinite losses: 1 of 4"),
        ([f"{HERE}batch_norm"], "batch norm in training mode makes a loss depend on the other samples"),
        ([f"{HERE}frozen"], "no parameter of the model of"),
        ([f"{HERE}needs"], "needs cannot be called: missing a required argument: 'k'"),
        ([f"{HERE}leaves"], "leaves ended its process: sys.exit(0)"),
        (["mlp", "--n", "1"], "at least 2"),
        (["perceptron"], "nothing named perceptron"),
        (["mlp", "--contenders", "me"], "no contender named me"),
        (["mlp", "--op", "gram"], "of ops alone"),
        (["mlp", "--compare", "nowhere.csv"], "there is no such file"),
        (["mlp", "--compare", __file__], "is no steps.csv or ops.csv"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(arguments, told, bench):
    status, _, errors = bench(*arguments, *FEW)
    assert status == 2 and told in errors and len(errors.splitlines()) == 1 and len(errors) < 400


def test_out_that_is_a_file_is_named(bench):
    bench.out.write_text("")
    status, _, errors = bench("mlp")
    assert status == 2 and "out is not a folder" in errors and InProcess.started == 0


def test_threads_beyond_the_machine_are_refused(bench, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench("mlp", "--threads", "100000")
    assert "must be at most" in capsys.readouterr().err and InProcess.started == 0


def draws():
    """Another batch at each call, without random numbers."""
    model, x, k = nn.Linear(3, 4), torch.randn(64, 3), [0]

    def retain():
        k[0] += 1
        return model(x[k[0] : k[0] + 4]).sum(1)

    return own(model, retain=retain)


def test_a_closure_that_draws_its_batch_is_not_called_dropout_alone(bench):
    status, printed, errors = bench(f"{HERE}draws", *FEW, "--contenders", "plain")
    printed = " ".join(printed.split())
    assert status == 0 and "or a closure that draws its batch" in printed
    assert "error" not in printed, "no row has one"
    lines = errors.splitlines()
    assert len(lines) == 2 and lines[0].endswith("plain: result and memory") and lines[1].endswith("plain: 2 times")


def test_the_help_names_the_contenders_and_exit_codes():
    for name in {**step_worker.STEPS, **step_worker.GRAMS}:
        assert name in options.EPILOG
    assert "exit codes:" in options.EPILOG


def test_a_worker_whose_parent_has_gone_ends_silently():
    code = "import sys; from projgrad.experiments.benchmark.worker import serve; sys.stdin.readline()\n"
    code += "serve(lambda _: {'ms': 1}, ['a', 'b'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, stderr=-1, cwd=ROOT) as process:
        process.stdout.close()
        process.stdin.write(b"go\n")
        process.stdin.close()
        assert process.stderr.read() == b"" and process.wait() == 1


def test_a_damaged_file_is_set_aside(bench):
    bench.out.mkdir()
    (bench.out / "steps.json").write_text('{"benchmarks": [{"extra')
    with pytest.warns(DamagedFile, match="set aside as steps.json.damaged"):
        status, _, _ = bench(EXAMPLE, *FEW, "--n", "4", "--contenders", "plain")
    assert status == 0 and (bench.out / "steps.json.damaged").exists()
    assert json.loads((bench.out / "steps.json").read_text())["benchmarks"]


SIZES = ("--n", "3", "--t", "4", "--i", "8", "--o", "16", "--p", "500", "--k", "2")


def test_every_op_is_right_and_resumes(bench, monkeypatch):
    monkeypatch.setattr(ops, "SYSTEMS", 3)
    status, printed, _ = bench("ops", *SIZES, *FEW)
    rows = read_csv(bench.out / "ops.csv")
    assert status == 0 and {row["op"] for row in rows} == set(command.OPS)
    assert max(map(len, printed.splitlines())) <= WIDTH
    for row in rows:
        if row["contender"] == "projgrad":
            assert row["ms"] and row["error"] and row["percent_of_floor"] and row["extra_mb"], row["op"]
    count = InProcess.started
    bench("ops", *SIZES, *FEW)
    assert InProcess.started == count
    bench("ops", *SIZES, *FEW, "--op", "gram", "--p", "500", "600", "--dtype", "float32", "bfloat16")
    sizes = {(row["size"], row["dtype"]) for row in read_csv(bench.out / "ops.csv") if row["op"] == "gram"}
    assert sizes == {(size, dtype) for size in ("3x500", "3x600") for dtype in ("float32", "bfloat16")}


def test_a_process_that_dies_is_a_note(bench, monkeypatch):
    def die(*_):
        raise Failed("out of memory")

    monkeypatch.setattr(ops.Team, "ask", die)
    status, printed, _ = bench("ops", *SIZES, *FEW, "--op", "feasible")
    assert status == 1 and "projgrad: out of memory" in printed


def test_changes_are_beyond_the_percentiles_and_five_percent():
    def row(low, middle, high):
        return {"ms_20": low, "ms": middle, "ms_80": high}

    old = row("1", "2", "3")
    assert changes.changed(old, row("2.9", "4", "5")) is None  # the ranges overlap
    assert changes.changed(old, row("3.1", "4", "5")) == 2
    assert changes.changed(row("1", "1", "1"), row("1.04", "1.04", "1.04")) is None
    assert changes.changed(old, row("", "", "")) is None


def test_contenders_that_do_not_fit_together_are_timed_apart():
    assert steps.groups({"a": 40, "b": 30, "c": 30}, 100) == [["a", "b"], ["c"]]
    assert steps.groups({"a": 90}, 100) == [["a"]] and steps.groups({"a": 1, "b": 2}, None) == [["a", "b"]]


class Terminal:
    def __init__(self, watched):
        self.watched, self.text = watched, ""

    def isatty(self):
        return self.watched

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_progress_is_for_terminals():
    for watched in (True, False):
        stream = Terminal(watched)
        progress = Progress(4, stream)
        progress.done = 2
        progress.show("mlp")
        assert ("[##########..........] 2/4 mlp" in stream.text) == watched
        progress.clear()
    assert stream.text == ""
    progress.show("mlp: plain", finished=True)
    assert stream.text == "mlp: plain\n"


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
