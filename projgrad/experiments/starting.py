"""Readies the process of the command line before torch is imported, which takes seconds; does nothing in any other.

Help, the version and wrong arguments are answered at once, Ctrl-C ends the imports with one line, and OpenMP gets to
know its policy, which it reads when torch is loaded.
"""

import os
import signal
import sys

INTERRUPTED = 130  # the exit code after Ctrl-C, as shells have it: 128 and the signal's number


def is_command() -> bool:
    """Return whether this process runs `projgrad` or `python -m projgrad`, and is no worker of one."""
    called, line = (sys.argv or [""])[0], sys.orig_argv
    if called == "-m":  # until the module was found
        return line[line.index("-m") + 1 :][:1] == ["projgrad"] if "-m" in line else False
    return os.path.splitext(os.path.basename(called))[0] == "projgrad" and called in line


def start() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a job in the background may ignore Ctrl-C
        signal.signal(signal.SIGINT, _stop)
    sys.excepthook = _explain
    from .cli.arguments import parse

    parse(sys.argv[1:])
    _restart_with_passive_waiting()


def imported() -> None:
    """Let errors look as they do elsewhere: projgrad is imported, and the command line explains what it knows."""
    sys.excepthook = sys.__excepthook__


def working() -> None:
    """Make Ctrl-C an exception again, where something must be ended: a bar, a file that is half written."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(number: int, frame: object) -> None:
    """End at once: nothing was begun that must be ended, and imports make other errors of a KeyboardInterrupt."""
    os.write(2, b"projgrad: interrupted\n")
    os._exit(INTERRUPTED)


def _explain(kind: type[BaseException], error: BaseException, traceback: object) -> None:
    """Say in one line what cannot be imported: torch is not installed, or the extension is that of another torch."""
    if not isinstance(error, ImportError):
        return sys.__excepthook__(kind, error, traceback)
    from .cli.problems import missing

    os.write(2, f"projgrad: {missing(error)}\n".encode())
    os._exit(2)


def _restart_with_passive_waiting() -> None:
    """Start again with OMP_WAIT_POLICY set: the C library of this process has read its variables already.

    On two shared cores small training steps took 184 ms with idle threads spinning and 12 ms with them sleeping.
    """
    if os.name == "posix" and "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if is_command():
    start()
