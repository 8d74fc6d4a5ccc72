"""The benchmark of several processes on a tiny model."""

import pytest
import together

from bench import processes, readme


@pytest.mark.slow
@pytest.mark.same_without_extension
@pytest.mark.parametrize("way", ["DDP", "FSDP2"])
def test_a_row_counts_what_was_sent(way, monkeypatch):
    """Under the metric of the optimizer, too, the factors are exchanged once."""
    monkeypatch.setattr(processes.torch.multiprocessing, "spawn", together.start)
    plain, metric = (processes.measure("tiny", f"{way} {kind}", 2) for kind in ("global", "metric AdamW"))
    once = plain["parameters_mb"] * (1 if way == "DDP" else 0.5)  # an all-reduce, or half of one
    for row in (plain, metric):
        assert set(processes.COLUMNS) >= row.keys() and row["peak_mb"] and row["difference"] < 1e-5
    assert plain["forget_mb"] == plain["corrections_mb"] == pytest.approx(once) and plain["factors_mb"] > 0
    assert metric["corrections_mb"] >= 2 * once - 1e-9
    assert metric["diagonal_mb"] == pytest.approx(once if way == "FSDP2" else 0.0)
    assert metric["factors_mb"] < 2 * plain["factors_mb"]


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
