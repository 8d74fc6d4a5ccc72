"""Command line: projgrad demo | compare | plan | bench | doctor. `arguments.py` has the help of each."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from ..starting import INTERRUPTED, imported, working
from .arguments import ELSEWHERE, module_of, parse
from .problems import Unusable, missing, of_disk
from .terminal import give_up_output, prepare, say, warnings_in_one_line

FAILED, UNUSABLE, CLOSED = 1, 2, 141  # 141: whoever read the output has gone, as shells count it


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code that the help of the commands explains."""
    if argv is not None:
        return _run(argv)
    try:
        imported()
        prepare()
        code = _run(sys.argv[1:])
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED:
        os._exit(code)  # threads that are still at work would be waited for
    return code


def _run(argv: Sequence[str]) -> int:
    try:
        with warnings_in_one_line():
            code = _command(argv)
        if sys.stdout is not None:
            sys.stdout.flush()  # a full disk shows here
        return code
    except KeyboardInterrupt as interruption:
        say(str(interruption) or "interrupted")
        return INTERRUPTED
    except Unusable as error:
        say(str(error))
        return UNUSABLE
    except ImportError as error:
        if (error.name or "").startswith("projgrad"):
            raise
        say(missing(error))
        return UNUSABLE
    except BrokenPipeError:
        give_up_output()
        return CLOSED
    except OSError as error:
        give_up_output()
        say(of_disk(error))
        return FAILED


def _command(argv: Sequence[str]) -> int:
    args = parse(argv)
    if args.command in ELSEWHERE:
        working()
        return module_of(args.command).run(args)
    if args.command == "doctor":
        from .doctor import doctor

        return doctor(args)
    if args.command == "plan":
        from .planning import plan

        return plan(args)
    from .comparing import compare, demo

    return demo(args) if args.command == "demo" else compare(args)
