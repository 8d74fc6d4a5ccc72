"""The folder of a comparison's results: what cannot be written, full disks, and files that are damaged."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from printed import lines
from tiny import scenario, small_plan

from projgrad.experiments.cli import problems, terminal
from projgrad.experiments.comparison import comparison, store
from projgrad.experiments.comparison.comparison import Comparison
from projgrad.experiments.comparison.store import read_or_set_aside, save_model, write_json
from projgrad.experiments.scenarios import SCENARIOS

pytestmark = pytest.mark.same_without_extension


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


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENAMETOOLONG, errno.ENOSPC])
def test_an_out_that_cannot_be_written_is_named_before_the_work(code, tiny, tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code), "x")

    monkeypatch.setattr(problems.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(Comparison, "run", lambda self: pytest.fail("it began"))
    assert tiny(tmp_path) == 2
    printed = capsys.readouterr().err
    assert f"--out {tmp_path} cannot be written: {os.strerror(code).lower()}" in printed and len(lines(printed)) == 1


@pytest.mark.parametrize("kind", ["json", "model"])
def test_a_full_disk_ends_with_the_file_and_goes_on_later(kind, tiny, tmp_path, monkeypatch, capsys):
    """The disk is full at the second run, or at the first model."""
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


def test_a_limit_on_the_size_of_files_is_seen_for_models_too(tmp_path):
    """safetensors says it in an error of its own."""
    resource = pytest.importorskip("resource")
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


def test_a_file_where_a_folder_belongs_is_named(tiny, tmp_path, capsys):
    (tmp_path / "runs").touch()
    assert tiny(tmp_path) == 1
    printed = capsys.readouterr().err
    assert f"{tmp_path / 'runs'}" in printed and "not a directory" in printed and len(lines(printed)) == 1


def test_a_damaged_file_is_no_matter_for_those_who_read_a_whole_one(tmp_path):
    write_json(tmp_path / "x", [1])
    assert read_or_set_aside(tmp_path / "x", lambda found: True) == [1]
    assert read_or_set_aside(tmp_path / "y", lambda found: True) is None
