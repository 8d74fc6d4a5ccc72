"""Files that are complete or absent, whoever else writes them."""

import csv
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from made_up import made_up_results
from torch import nn

from projgrad._atomic import replacing
from projgrad.evaluate import write_report
from projgrad.experiments.benchmark.report import Rows
from projgrad.experiments.comparison.store import load_model, read_json, save_model, write_json
from projgrad.experiments.scenarios import cifar, speech
from projgrad.methods.pgu.pgu import PGU


def everything(tmp_path, monkeypatch):
    """All that writes a file in one step: name -> (file, function that writes it)."""
    model = nn.Linear(3, 2)
    pgu = PGU(model, torch.optim.SGD(model.parameters(), lr=0.1)).fit([torch.randn(9, 3)])
    monkeypatch.setattr(cifar, "_read", lambda archive: {"x": torch.ones(3).numpy()})
    monkeypatch.setattr(speech, "data_folder", lambda: tmp_path)
    monkeypatch.setattr(speech, "read_whisper", lambda *_: None)
    monkeypatch.setattr(speech, "transcribe", lambda model, some, *_: some.long())
    told = f"transcripts-k-{speech.SPOKEN}-{speech.WINDOW}-{speech.TOKENS}.json"
    rows = Rows(tmp_path / "rows.csv", ["a"], ["a"], "cpu")
    return {
        "json": (tmp_path / "x.json", lambda: write_json(tmp_path / "x.json", {"a": 1})),
        "model": (tmp_path / "m.safetensors", lambda: save_model(tmp_path / "m.safetensors", model)),
        "cache": (tmp_path / "cache", lambda: pgu.save(tmp_path / "cache")),
        "report": (
            tmp_path / "r.html",
            lambda: write_report(made_up_results(), {}, tmp_path / "r.html"),
        ),
        "transcripts": (tmp_path / told, lambda: speech.transcripts(tmp_path / "w", torch.ones(2, 3), "k")),
        "images": (tmp_path / "c.npz", lambda: cifar._arrays.__wrapped__(tmp_path / "c.tgz")),
        "rows": (tmp_path / "rows.csv", lambda: rows.add({"a": 1})),
    }  # fmt: skip


KINDS = ("json", "model", "cache", "report", "transcripts", "images", "rows")


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_is_written_in_one_step(kind, tmp_path, monkeypatch):
    """Under a partial name of its own; through a link; with the rights of other files; nothing left behind an error."""
    if kind == "report":
        pytest.importorskip("jinja2")
    path, write = everything(tmp_path, monkeypatch)[kind]
    (tmp_path / "disk").mkdir()
    path.symlink_to(tmp_path / "disk" / "target")
    names, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (names.append(a), replace(a, b)))
    write()
    if kind not in ("transcripts", "images"):  # which are not made again
        write()
        assert len(set(names)) == 2
    assert path.is_symlink() and os.listdir(tmp_path / "disk") == ["target"]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    path.unlink()
    there = sorted(os.listdir(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        write()
    assert sorted(os.listdir(tmp_path)) == there


def test_nothing_but_a_file_is_replaced(tmp_path):
    with pytest.raises(FileExistsError, match="is not a file"), replacing(tmp_path):
        raise AssertionError
    with pytest.raises(FileExistsError, match="/dev/null is not a file"), replacing(os.devnull):
        raise AssertionError


WRITER = """
import os
import sys
from pathlib import Path
import torch
from projgrad.experiments.benchmark.report import Rows
from projgrad.experiments.comparison.store import save_model, write_json
from projgrad.methods.pgu.pgu import PGU

folder, me = Path(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0)
model = torch.nn.Linear(3, 2)
pgu = PGU(model, torch.optim.SGD(model.parameters(), lr=0.1)).fit([torch.ones(4, 3)])
rows = Rows(folder / "rows.csv", ["writer"], ["writer"], "cpu")
print("ready", flush=True)
sys.stdin.readline()
sys.stdout = open(os.devnull, "w")  # nobody reads it
for count in range(150):
    write_json(folder / "x.json", {"writer": me, "more": [me] * 2000})
    save_model(folder / "m", model)
    pgu.save(folder / "cache")
    rows.add({"writer": me})
"""


@pytest.mark.slow
def test_two_processes_write_the_same_files(tmp_path):
    """Neither fails, and what is read meanwhile is always whole."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path)]
    writers = [subprocess.Popen([*command, str(me)], **pipes) for me in (0, 1)]
    try:
        for writer in writers:
            assert writer.stdout.readline() == "ready\n", writer.stderr.read()
        for writer in writers:
            writer.stdin.write("go\n")
            writer.stdin.flush()
        seen = set()
        while any(writer.poll() is None for writer in writers):
            found = read_json(tmp_path / "x.json")
            if found:
                seen.add(found["writer"])
                assert found["more"] == [found["writer"]] * 2000
        for writer in writers:
            assert writer.returncode == 0, writer.stderr.read()
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    assert seen
    model = load_model(tmp_path / "m", nn.Linear(3, 2))
    assert PGU.load(tmp_path / "cache", model, torch.optim.SGD(model.parameters(), lr=0.1)).cache.n == 4
    assert len(list(csv.reader((tmp_path / "rows.csv").open()))) == 2
    assert sorted(os.listdir(tmp_path)) == ["cache", "m", "rows.csv", "x.json"]
    json.loads((tmp_path / "x.json").read_text())
