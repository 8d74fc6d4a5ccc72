"""Time and memory of the peers, on tiny sizes: every answer is right, and the table has a row for each."""

import dataclasses

import pytest
from rich.console import Console
from test_cpu import InProcess

from bench import peers, steps
from projgrad.experiments.benchmark.peers import PEERS


@pytest.mark.parametrize("model", ["mlp", "encoder"])
def test_every_peer_is_right_and_gets_a_row(model, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "worker", InProcess)
    path = tmp_path / "peers_cpu.csv"
    for case in peers.CASES:
        if case.name.endswith(f"-{model}"):
            chosen = {name: c for name, c in case.contenders.items() if model == "mlp" or not c.package}
            rows = steps.measure(dataclasses.replace(case, contenders=chosen), 2, Console(quiet=True))
            assert [row["note"] for row in rows if row["note"]] == []
            steps.write(rows, path, peers.CASES)
    table = peers.table(path)
    for name, peer in PEERS.items():
        assert (f"\n| {name} | " in table) == (peer.missing() is None and (model == "mlp" or not peer.module))
    assert f"\n| {peers.MODELS[model][0]}, n = {peers.MODELS[model][1]} | K, time | K, memory | " in table


def test_a_wrong_answer_shows_how_wrong_and_no_time():
    row = {"note": "wrong: differs from vmap + Gram by 3e-01", "difference": "0.31", "ms": ""}
    assert peers._cells(row) == ["wrong by 3e-01", ""]
    assert peers._cells(None) == ["", ""]
    assert peers._cells({"note": "", "ms": "12.34", "peak_mb": "5.678"}) == ["12.3 ms", "5.68 MB"]


def test_what_was_not_measured_is_said(tmp_path):
    assert peers.table(tmp_path / "none.csv") == "Not measured: `python -m bench.peers`."
