"""The options of `projgrad bench` and its help, made with the standard library alone, before torch is imported."""

import argparse
import os
from pathlib import Path

from ..cli.arguments import folder, number_of

MODELS = ("mlp", "conv", "decoder", "encoder")  # of `subjects`, which imports torch
OPS = ("project_out", "gram_solve", "feasible", "linear_gram", "linear_dot", "linear_combine", "linear_moments")
OPS += ("basis_project", "gram", "subtract")
LETTERS = {"t": "positions", "i": "inputs of a layer", "o": "its outputs", "p": "parameters", "k": "basis vectors"}
EPILOG = """\
examples:
  projgrad bench                          the built-in models, every contender
  projgrad bench mine:make --threads 4    your model and batch: make() returns (model, forget, retain)
                                          or these and an optimizer; closures as for OrthoGrad.step
  projgrad bench mine:make --contenders "projgrad global" --rounds 3     a quick first look
  projgrad bench mlp --n 8 32 128         one model, by the number of retain samples
  projgrad bench ops --op linear_gram --n 8 64 --t 128
  projgrad bench mlp --compare out/before/steps.csv

Results go to steps.csv, steps.json and steps.svg (ops.* of ops) in the folder --out. What is there
already, measured on the same machine and versions, is not measured again. The JSON file is one that
`pytest-benchmark compare` reads.

contenders of a step; those of other packages join where they are installed:
  plain (always measured), projgrad global, projgrad per_tensor, projgrad optimizer,
  loop + QR, loop + QR per_tensor, loop + Gram; with --gram: projgrad gram, loop gram

exit codes:
  0    done
  1    a result of projgrad is wrong or missing
  2    nothing can be measured, and one line says why
  130  interrupted by Ctrl-C; what is finished is kept
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of `projgrad bench` to a parser."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    listed = f"ops, {', '.join(MODELS)}, module:function or file.py:function [{' '.join(MODELS)}]"
    parser.add_argument("what", nargs="*", metavar="WHAT", help=listed)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="your own model is there [%(default)s]"
    )
    dtypes = ("float32", "bfloat16", "float16", "float64")
    about = f"some of {', '.join(dtypes)} [float32; of your own model: what it has]"
    parser.add_argument("--dtype", nargs="+", choices=dtypes, metavar="TYPE", help=about)
    own = "retain samples [64 or 32; of your own model what it says, else it gets n]"
    parser.add_argument("--n", nargs="+", type=_positive, metavar="N", help=own)
    for letter, name in LETTERS.items():
        parser.add_argument(f"--{letter}", nargs="+", type=_positive, metavar="N", help=f"of ops: {name}")
    parser.add_argument("--op", nargs="+", choices=OPS, metavar="NAME", help=f"of ops: some of {', '.join(OPS)} [all]")
    parser.add_argument("--gram", action="store_true", help="K of the retain batch alone instead of the whole step")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="some of those that a first run shows [all]")
    parser.add_argument("--threads", type=_threads, help="of the CPU [what torch would take]")
    parser.add_argument("--rounds", type=_rounds, default=15, help="times of every contender, at most [%(default)s]")
    parser.add_argument(
        "--seconds", type=number_of("seconds"), default=5.0, help="about, of every contender [%(default)s]"
    )
    parser.add_argument("--out", type=folder, default=Path("out/bench"), help="folder for results [%(default)s]")
    parser.add_argument("--again", action="store_true", help="measure what is there already once more")
    parser.add_argument("--compare", type=Path, metavar="CSV", help="an older steps.csv or ops.csv: what has changed?")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON and nothing else")


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number; got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def _rounds(text: str) -> int:
    if _positive(text) < 2:
        raise argparse.ArgumentTypeError("must be at least 2: of one time there are no percentiles")
    return int(text)


def _threads(text: str) -> int:
    value, most = _positive(text), max(64, 4 * (os.cpu_count() or 1))
    if value > most:  # with 100,000 OpenMP ends the process
        raise argparse.ArgumentTypeError(f"must be at most {most} here; got {value}")
    return value
