"""What a terminal is told beside a file: width, colours, bars, and JSON."""

import json
import sys

import pytest
from printed import Stream

from projgrad.experiments.cli import terminal

pytestmark = pytest.mark.same_without_extension


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("columns, width", [("72", 72), ("200", 200), ("0", None), ("wide", None), (None, None)])
def test_columns_are_honoured(columns, width, is_terminal, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    found = terminal.console(Stream(is_terminal)).width
    assert found == (width or (found if is_terminal else terminal.WIDTH))


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


def test_json_has_no_word_that_json_lacks(capsys):
    terminal.print_json({"a": float("nan"), 1: (float("inf"), 2.5)})
    assert json.loads(capsys.readouterr().out) == {"a": None, "1": [None, 2.5]}
