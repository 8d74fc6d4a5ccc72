"""The commands, their options and their help. Nothing but the standard library: it answers before torch is imported."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from ...version import __version__

PURPOSE = "Unlearning steps that leave every retained sample alone, to first order: try them, compare them, plan them."
MOST = 1 << 20  # samples and tokens of a plan
MOST_SEEDS = 95  # settings were searched on seeds from 100
DEMOS = {"digits": "digits-labels", "faces": "faces"}
# Commands of other folders: name -> (module, what it is for). The module has add(parser) and run(args). It is imported
# when the command is given, before torch: it should import no more than the standard library.
ELSEWHERE = {"bench": ("benchmark.command", "time and memory of every op and of a step, here, against other ways")}

SETTINGS = Path(__file__).parents[1] / "comparison" / "settings"

CODES = """exit codes:
  0    done{done}
  1    {failed}
  2    an argument is wrong, or something that is missing was named
  130  interrupted by Ctrl-C{interrupted}"""
UNWRITABLE, KEPT = "a file could not be read or written", "; what is finished is kept"

EXAMPLES = {
    "": """
  projgrad doctor                            what is installed, what computes each op, and is it right?
  projgrad demo                              forget mislabelled digits: a table, pictures and a report
  projgrad compare --list                    real problems, and what they need
  projgrad plan gpt2 --n 16 --device cuda    memory and work of a step, before a GPU is rented
  projgrad bench mlp --n 8 32                time and memory of a step here, against other ways""",
    "demo": """
  projgrad demo                              digits, into out/demo-digits
  projgrad demo --data faces --seeds 1       one person of 40, quickly
  projgrad demo --data facts                 facts in a language model; writes no files
  projgrad demo --json > demo.json           the means as JSON""",
    "compare": """
  projgrad compare --list                    what there is, and what to install for it
  projgrad compare --fast                    three small problems, below ten minutes on two cores
  projgrad compare --scenario digits-labels --methods orthograd neggrad --seeds 5
  projgrad compare --fast --study --out results/mine
Give the same command again after an interruption: it goes on from there.""",
    "plan": """
  projgrad plan Llama-3.2-1B --n 16 --dtype bfloat16 --device cuda
  projgrad plan path/to/config.json --n 8 --lora 16 --memory 24
  projgrad plan my_module:my_model --n 64 --json
my_model() returns a model and a function of n, which returns a function that runs the model and returns n losses.""",
    "doctor": """
  projgrad doctor
  projgrad doctor --json > about.json        to send along with a question""",
}


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, and where the help is."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}; see {self.prog} --help\n")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return what was given, and under "error" how to refuse it.

    Ends the process where no command is to be run: help, the version, wrong arguments and completion of words.
    """
    if "_ARGCOMPLETE" in os.environ:  # the shell asks how a word may go on
        import argcomplete

        argcomplete.autocomplete(parser(os.environ.get("COMP_LINE", "").split()[1:]))
    args, rest = parser(argv).parse_known_args(argv)
    if rest:
        args.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _command_in(argv: Sequence[str]) -> str | None:
    return next((word for word in argv if not word.startswith("-")), None)


def parser(argv: Sequence[str]) -> Parser:
    """Make the parser; a command of another folder gets its options only where argv names it."""
    top = _describe(Parser(prog="projgrad"), PURPOSE, "", _codes(failed=f"a check failed, or {UNWRITABLE}"))
    top.add_argument("--version", action="version", version=f"projgrad {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, purpose: str, codes: str) -> argparse.ArgumentParser:
        return _describe(commands.add_parser(name, help=purpose), purpose[0].upper() + purpose[1:] + ".", name, codes)

    _add_demo(add("demo", "unlearn on real data and compare with the baselines (a minute or two)", _codes(KEPT)))
    _add_compare(add("compare", "every tuned method on real data; what is finished is not run again", _codes(KEPT)))
    _add_plan(add("plan", "memory and work of a step, before anything is allocated", _codes()))
    for name, (module, purpose) in ELSEWHERE.items():
        if _is_there(module):
            is_given = _command_in(argv) == name
            made = commands.add_parser(name, help=purpose, add_help=is_given)
            made.set_defaults(error=made.error)
            if is_given:
                module_of(name).add(made)
    purpose = "versions, what computes each op here, and a test of all of them against float64 (seconds)"
    _json(add("doctor", purpose, _codes(done=", and no result is wrong", failed="a result is wrong")))
    return top


def module_of(command: str) -> ModuleType:
    """Return the module of a command of another folder."""
    return import_module(f"..{ELSEWHERE[command][0]}", __package__)


def _is_there(module: str) -> bool:
    return Path(__file__).parents[1].joinpath(*module.split(".")).with_suffix(".py").is_file()


def _describe(made: Parser, purpose: str, name: str, codes: str) -> Parser:
    made.set_defaults(error=made.error)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.description, made.epilog = purpose, f"examples:{EXAMPLES[name]}\n\n{codes}"
    return made


def _codes(interrupted: str = "", done: str = "", failed: str = UNWRITABLE) -> str:
    return CODES.format(interrupted=interrupted, done=done, failed=failed)


def unknown(what: str, given: Sequence[str], known: Sequence[str]) -> str:
    """Say which names there are, and which one was meant, if one is near."""
    near = [match for name in given for match in difflib.get_close_matches(name, known, 1)]
    meant = f"; did you mean {', '.join(near)}?" if near else ""
    return f"no {what} named {', '.join(given)}{meant}; there are {', '.join(known)}"


def _common(made: argparse.ArgumentParser, out: str) -> None:
    made.add_argument("--out", type=folder, default=Path(out), help="folder for results and pictures [%(default)s]")
    made.add_argument("--seeds", type=_seeds, default=3, help="number of seeds [%(default)s]")
    _json(made)


def _json(made: argparse.ArgumentParser) -> None:
    made.add_argument("--json", action="store_true", help="print JSON instead of tables")


def _add_demo(made: argparse.ArgumentParser) -> None:
    kinds = "wrong labels, a person's face, or facts in a language model (prints its answers; five minutes)"
    made.add_argument("--data", choices=[*DEMOS, "facts"], default="digits", help=kinds)
    _common(made, "out")


def _add_compare(made: argparse.ArgumentParser) -> None:
    which = made.add_mutually_exclusive_group()
    named = which.add_argument(
        "--scenario", nargs="+", metavar="NAME", help="some of those that --list shows [all: hours]"
    )
    named.completer = lambda **_: sorted(path.stem for path in SETTINGS.glob("*.json"))  # of argcomplete
    which.add_argument("--fast", action="store_true", help="three small scenarios, below ten minutes on two cores")
    which.add_argument("--list", action="store_true", help="show scenarios and methods, and what is installed")
    made.add_argument("--methods", nargs="+", metavar="NAME", help="some of those that --list shows [all: hours]")
    made.add_argument("--study", action="store_true", help="also vary the number of retain samples a step")
    _common(made, "out/compare")


def _add_plan(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "config",
        help="a config.json of transformers, its folder, a name such as Llama-3.2-1B or gpt2, or module:function",
    )
    made.add_argument("--n", type=_positive, required=True, help="retain samples a step, and as many to forget")
    made.add_argument("--tokens", type=_positive, default=512, help="of a sample [%(default)s]")
    made.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="[%(default)s]")
    optimizers = ("sgd", "momentum", "adam", "adamw", "rmsprop")
    made.add_argument("--optimizer", choices=optimizers, default="adamw", help="[%(default)s]")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="[%(default)s]")
    made.add_argument("--lora", type=_positive, default=0, metavar="R", help="train adapters of this rank alone")
    made.add_argument(
        "--loss",
        choices=("chunked", "float32"),
        default="chunked",
        help="float32: of all logits at once, as models of transformers compute it [%(default)s]",
    )
    made.add_argument("--memory", type=number_of("gigabytes"), metavar="GB", help="also find the largest n that fits")
    _json(made)


def folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("must name a folder; got an empty word")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text} names a user that is not here") from None


def _whole(text: str, wanted: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be {wanted}; got {text!r}") from None


def _seeds(text: str) -> int:
    value = _whole(text, f"a whole number from 1 to {MOST_SEEDS}")
    if not 1 <= value <= MOST_SEEDS:
        raise argparse.ArgumentTypeError(f"must be at least 1 and at most {MOST_SEEDS}; got {value}")
    return value


def _positive(text: str) -> int:
    value = _whole(text, "a whole number of at least 1")
    if not 1 <= value <= MOST:
        raise argparse.ArgumentTypeError(f"must be at least 1 and at most {MOST}; got {value}")
    return value


def number_of(unit: str) -> Callable[[str], float]:
    """Return the type of an argument that is a positive number of something."""

    def positive(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number of {unit}; got {text!r}") from None
        if not 0 < value < 1e6:
            raise argparse.ArgumentTypeError(f"must be positive and finite; got {text}")
        return value

    return positive
