"""Rows and table of the facts in a language model."""

import json
import sys

import pytest

facts = pytest.importorskip("bench.facts")


def run(method, seed, n=None, **scores):
    setting = {"lr": 0.5, "steps": 8, "n": n, "value": 0.95} if n else {}
    about = {"method": method, "seed": seed, "n": n, "setting": setting, "steps": 7, "step_seconds": 2.0}
    return about | {"scores": {"forget": 0.5, "tow": None, "truth_ratios": [1.0], **scores}}


def test_rows_become_a_table_of_means(tmp_path, monkeypatch, capsys):
    scenario = {
        "skipped": None,
        "runs": [run("original", 5), run("neggrad", 5, 16, tow=0.25), run("neggrad", 6, 16, tow=0.75, forget=0.1)],
        "study": [run("orthograd-metric", 5, 4, forget_quality=1.6e-7)],
    }
    environment = {"torch": "2.13", "threads": 1, "processor": "P"}
    results = {"environment": environment, "scenarios": {"facts-LoRA": scenario, "faces": {}}}
    monkeypatch.setattr(facts, "FILE", tmp_path / "facts.csv")
    monkeypatch.setattr(sys, "argv", ["facts", str(tmp_path)])
    (tmp_path / "compare.json").write_text(json.dumps(results))
    facts.main()
    facts.main()  # replaces the rows of a scenario
    assert "4 rows" in capsys.readouterr().out
    lines = facts.facts().splitlines()
    assert (
        lines[0] == "`facts-LoRA`, means over 2 seeds, ± standard deviation; torch 2.13, 1 thread:"
        and len(lines) == 4 + 3
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    at = {title: i for i, title in enumerate(rows[0])}
    assert [row[0] for row in rows[2:]] == ["original", "NegGrad+", "OrthoGrad, metric, α = 0.5, n = 4"]
    assert [row[at["forgotten facts right %"]] for row in rows[2:]] == ["50", "30 ± 28", "50"]
    assert [row[at["ToW"]] for row in rows[2:]] == ["", "0.500 ± 0.354", ""]
    assert rows[4][at["log10 of forget quality"]] == "-6.8"
    assert "7" in (tmp_path / "facts.csv").read_text().splitlines()[2].split(",")  # steps taken, not planned
