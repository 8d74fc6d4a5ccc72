"""The support matrix: ours is right wherever it does not refuse, and a cell that is wrong, dies or hangs is told so."""

import os
import time

import pytest
import torch

from bench import support
from bench.features import FEATURES
from projgrad.experiments.benchmark.peers import PEERS, Peer
from projgrad.experiments.benchmark.report import read_csv

LOOPED = ("mixing", "function")  # exact with a warning that it is slow
REFUSED = ("batch norm, train", "sparse embedding")


HERE = [name for name, feature in FEATURES.items() if not feature.needs]


@pytest.mark.parametrize("name", HERE)
def test_ours_is_right_or_refuses(name):
    row = support.cell(FEATURES[name], PEERS["projgrad"])
    if name in REFUSED:
        assert row["verdict"] == "no" and row["note"].startswith("ValueError: "), row
    else:
        assert row["verdict"] == "right", row
        assert (row["note"] == support.LOOPED) == (name in LOOPED), row


def test_a_wrong_answer_is_called_wrong():
    ours = PEERS["projgrad"]

    def doubled(start):
        def started(job):
            call = start(job)
            return lambda: 2 * call()

        return started

    feature = FEATURES["linear"]
    assert support.cell(feature, Peer(doubled(ours.gram), ours.projection))["verdict"] == "wrong"
    row = support.cell(feature, Peer(ours.gram, doubled(ours.projection)))
    assert row["verdict"] == "K only" and row["projection_error"] == pytest.approx(1.0)
    short = Peer(lambda job: lambda: torch.ones(2, 2), ours.projection)
    row = support.cell(feature, short)
    assert row["verdict"] == "no" and row["note"] == "Shape: (2, 2) in the place of (4, 4)"


def test_what_is_raised_is_kept():
    def start(job):
        raise NotImplementedError("no rule\nfor this layer")

    row = support.cell(FEATURES["linear"], Peer(start, start))
    assert row["verdict"] == "no" and row["note"] == "NotImplementedError: no rule"


def test_a_cell_that_dies_or_hangs_is_a_row():
    assert support.isolated(lambda: os._exit(3), 10)["note"] == "Crash: ended with status 3"
    assert support.isolated(lambda: time.sleep(60), 0.2)["note"] == "Timeout: more than 0.2 seconds"
    assert support.isolated(lambda: {"verdict": "right"}, 10) == {"verdict": "right"}


def test_the_table_counts_and_keeps_other_cells(tmp_path):
    path = tmp_path / "support.csv"
    about = {"package": "torch 2", "limit": 1e-8, "note": ""}
    rows = [
        {
            "feature": "linear",
            "contender": "projgrad",
            "verdict": "right",
            "gram_error": 2e-16,
            "projection_error": 1e-16,
        },
        {"feature": "linear", "contender": "torchjd", "verdict": "wrong", "gram_error": 0.5},
        {"feature": "mixing", "contender": "projgrad", "verdict": "no", "note": "ValueError: shared"},
    ]
    support.write([about | row for row in rows[:2]], path)
    assert len(support.write([about | rows[2]], path)) == 3
    lines = support.table(path).splitlines()
    assert "| linear layers | 2e-16 | **wrong, 5e-01** |" in lines
    assert "| losses that share terms between samples ¹ | no: ValueError |  |" in lines
    assert lines[-3:] == [
        "| **right**, of 2 | 2 | 0 |",
        "| **only K right**, of 2 | 0 | 0 |",
        "| **wrong without a word**, of 2 | 0 | 1 |",
    ]


def test_the_results_hold_every_cell_and_ours_is_right():
    rows = read_csv(support.RESULTS / "support.csv")
    assert {(row["feature"], row["contender"]) for row in rows} == {
        (f, c) for f in FEATURES for c in support.CONTENDERS
    }
    ours = {row["feature"]: row["verdict"] for row in rows if row["contender"] == "projgrad"}
    assert ours == {name: "no" if name in REFUSED else "right" for name in FEATURES}
