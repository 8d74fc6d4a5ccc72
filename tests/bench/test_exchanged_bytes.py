"""The benchmark of several processes on a tiny model."""

import pytest

from bench import processes, readme


@pytest.mark.slow
@pytest.mark.same_without_extension
@pytest.mark.parametrize("contender", ["DDP global", "FSDP2 global"])
def test_a_row_counts_what_was_sent(contender):
    row = processes.measure("tiny", contender, 2)
    assert set(processes.COLUMNS) >= row.keys()
    once = row["parameters_mb"] * (1 if contender == "DDP global" else 0.5)  # an all-reduce, or half of one
    assert row["forget_mb"] == row["corrections_mb"] == pytest.approx(once)
    assert row["factors_mb"] > 0 and row["peak_mb"] and row["difference"] < 1e-5


@pytest.mark.slow
@pytest.mark.same_without_extension
@pytest.mark.parametrize("contender", ["DDP metric AdamW", "FSDP2 metric AdamW"])
def test_factors_are_exchanged_once_under_the_metric_too(contender):
    row = processes.measure("tiny", contender, 2)
    sharded = contender.startswith("FSDP2")
    once = row["parameters_mb"] * (0.5 if sharded else 1)
    assert row["corrections_mb"] >= 2 * once - 1e-9 and row["diagonal_mb"] == pytest.approx(once if sharded else 0.0)
    assert row["factors_mb"] < 2 * processes.measure("tiny", contender.split()[0] + " global", 2)["factors_mb"]


def test_the_table_has_a_line_for_every_row(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    (tmp_path / "processes_cpu.csv").write_text(
        "model,contender,processes,n,parameters_mb,forget_mb,factors_mb,corrections_mb,diagonal_mb,other_mb,"
        "peak_mb,later_mb,device,torch,commit\n"
        "M,DDP plain,2,3,5,,,,,,8,7,D,T,C\n"
        "M,DDP global,2,3,5,5,1,5,0,0.001,9,8,D,T,C\n"
    )
    *_, plain, ours = readme.processes().splitlines()
    assert plain == "| M, n = 3 a process | DDP plain | 5 |  |  |  |  |  | 8 | 7 |"
    assert ours == "| M, n = 3 a process | DDP global |  | 5 | 1 | 5 | 0 | 0.001 | 9 | 8 |"
