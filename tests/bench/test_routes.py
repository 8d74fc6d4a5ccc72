"""The benchmark of the routes to a Gram matrix counts as the cost model counts, and finds constants it was given."""

import itertools
import sys

import pytest

from bench import routes
from projgrad.ops.cost import CPU, linear_route

SIZES = list(itertools.product((1, 4, 16, 64, 128), (1, 4, 16, 64, 256), (16, 250, 1024), (64, 1000)))


def made_up(size, rates):
    """A row of a machine that takes exactly what the model says."""
    row = dict(zip("ntio", size, strict=True))
    factors, chunks = (1e-6 * ns for ns in routes.nanoseconds(row, rates))
    return row | {"ms_factors": factors, "ms_chunks": chunks}


def test_predictions_choose_the_route_of_the_cost_model():
    for size in SIZES:
        row = made_up(size, CPU._asdict())
        chosen = linear_route(*size).name
        fits = linear_route(*size, only="factors").bytes <= CPU.chunk
        assert chosen == ("factors" if row["ms_factors"] <= row["ms_chunks"] and fits else "chunks"), size


def test_fit_finds_the_constants_behind_the_times():
    rates = {name: 3 * value for name, value in CPU._asdict().items()} | {"pair": 11.0, "pack": 0.0}
    found = routes.fit([made_up(size, rates) for size in SIZES])
    assert found == pytest.approx({name: rates[name] for name in routes.CONSTANTS}, rel=1e-6, abs=1e-9)


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(routes, "SECONDS", 0.001)
    monkeypatch.setattr(routes, "TINY", routes.TINY[:2])
    monkeypatch.setattr(sys, "argv", ["bench.routes", "--tiny", "--out", str(tmp_path)])
    routes.main()
    printed = capsys.readouterr().out
    assert "of 2 within 15% of the faster route" in printed and "token_gram" in printed
    monkeypatch.setattr(sys, "argv", ["bench.routes", "--refit", str(tmp_path / "routes_cpu_tiny.csv")])
    routes.main()
    assert "token_gram" in capsys.readouterr().out
