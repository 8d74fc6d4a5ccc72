"""The measured tables of docs/gpu.md and the README, from gpu_flat.csv, gpu_layers.csv and gpu_steps.csv."""

from collections.abc import Iterator
from pathlib import Path

from projgrad.experiments.benchmark.report import read_csv

from .report import RESULTS

NOT_MEASURED = "`bench/results` holds no table from a GPU yet; `bench/gpu.sh` measures and writes it here."
NAMES = {"flat": "the flat ops", "layers": "the ops of one layer", "steps": "whole steps"}


def gpu(folder: Path = RESULTS) -> str:
    """Return the tables of everything that was measured on a GPU."""
    parts = {part: _rows(folder / f"gpu_{part}.csv") for part in NAMES}
    if not any(parts.values()):
        return NOT_MEASURED
    writers = {"flat": _flat, "layers": _layers, "steps": _steps}
    lines = []
    for part, rows in parts.items():
        if rows:
            lines += [*writers[part](rows), ""]
    if missing := [NAMES[part] for part, rows in parts.items() if not rows]:
        lines += [f"Not measured yet: {', '.join(missing)} (`bench/gpu.sh`).", ""]
    return "\n".join(lines[:-1])


def step_rows(folder: Path = RESULTS) -> list[list[str]]:
    """Return the README's lines about whole steps on a GPU: model, time, memory of the first and of later steps, QR."""
    lines = []
    for (_,), by_name in _groups(_rows(folder / "gpu_steps.csv"), "case").items():
        plain, ours = by_name.get("plain"), by_name.get("projgrad global")
        if not (plain and ours and plain["ms"] and ours["ms"]):
            continue
        qr = by_name.get("explicit QR, per tensor")
        model, later = float(ours["model_mb"]), float(ours["later_mb"])
        others = "not measured"
        if qr and qr["ms"]:
            others = f"{float(qr['time_over_plain']):.3g} x, {float(qr['total_over_plain']):.3g} x (per tensor)"
        lines.append(
            [
                f"{ours['model']}, bfloat16, {ours['device']}",
                f"{float(ours['time_over_plain']):.3g} x",
                f"{float(ours['total_over_plain']):.3g} x",
                f"{(model + later) / float(plain['total_mb']):.3g} x",
                others,
            ]
        )
    return lines


def _rows(path: Path) -> list[dict]:
    rows = read_csv(path) if path.exists() else []
    return [row for row in rows if row["ms"] or row.get("rate") or row["note"]]


def _about(rows: list[dict]) -> str:
    row = rows[-1]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    versions = [f"{key} {row[key]}" for key in ("driver", "torch", "triton") if row.get(key)]
    return f"{row['device']}, {', '.join(versions)}, commit {commits}"


def _table(*head: str) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|---|" + "---|" * (len(head) - 1)]


def _cell(row: dict | None, more: str = "") -> str:
    """Return milliseconds, or why there are none."""
    if row is None:
        return ""
    return f"{float(row['ms']):.3g}{more}" if row["ms"] else row["note"].split(":")[0]


def _times(row: dict | None) -> str:
    return f", {float(row['times_ours']):.3g} x" if row and row.get("times_ours") else ""


def _number(row: dict, column: str, digits: int = 3) -> str:
    return f"{float(row[column]):.{digits}g}" if row and row.get(column) else ""


def _groups(rows: list[dict], *keys: str) -> dict[tuple, dict[str, dict]]:
    groups: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), {})[row["contender"]] = row
    return groups


def _ceilings(rows: list[dict]) -> str:
    rates = [f"{row['contender']} {row['rate']} {row['unit']}" for row in rows if row["op"] == "ceiling"]
    return "; ".join(rates)


def _missed(rows: list[dict]) -> Iterator[str]:
    """Yield what was aimed at and not reached, in words."""
    for row in rows:
        if row.get("met") == "NO":
            where = " ".join(row[key] for key in ("case", "op", "size", "dtype") if row.get(key))
            yield f"{where}, {row['contender']}: {row['target']} missed"


def _flat(rows: list[dict]) -> list[str]:
    lines = [
        f"Flat ops on one {_about(rows)}; median milliseconds, extra memory in parentheses, multiples are of "
        "projgrad's time. The floor of `project_out` is reading G twice, or the flops of its Gram matrix, at the "
        f"rates measured beside it ({_ceilings(rows)}):",
        "",
        *_table("n x p", "dtype", "project_out", "% of floor", "plain Gram", "QR in float32", "gram", "subtract"),
    ]
    for (size, dtype), by_name in _groups([r for r in rows if r["op"] == "project_out"], "size", "dtype").items():
        ours, plain, qr = (by_name.get(name) for name in ("projgrad", "plain Gram", "QR"))
        others = {
            op: next((r for r in rows if (r["op"], r["size"], r["dtype"], r["contender"]) == key), None)
            for op in ("gram", "subtract")
            for key in [(op, size, dtype, "projgrad")]
        }
        cells = [_cell(ours, _memory(ours)), _number(ours, "percent_of_floor"), *(_cell(r) for r in others.values())]
        cells[2:2] = [_cell(row, _times(row) + _memory(row)) for row in (plain, qr)]
        lines.append(f"| {' x '.join(f'{int(x):,}' for x in size.split('x'))} | {dtype} | " + " | ".join(cells) + " |")
    solves = _groups([r for r in rows if r["op"] == "gram_solve"], "size")
    if solves:
        names = list(dict.fromkeys(name for by_name in solves.values() for name in by_name))
        lines += ["", "`gram_solve`, systems x n, float32:", "", *_table("size", *names)]
        for (size,), by_name in solves.items():
            cells = [
                _cell(by_name.get(name), _times(by_name.get(name)) if name != "projgrad" else "") for name in names
            ]
            lines.append(f"| {size.replace('x', ' x ')} | " + " | ".join(cells) + " |")
    return [*lines, *_shortfalls(rows)]


def _memory(row: dict | None) -> str:
    return f" ({float(row['extra_mb']):,.0f} MB)" if row and row["ms"] and row.get("extra_mb") else ""


def _shortfalls(rows: list[dict]) -> list[str]:
    missed = list(_missed(rows))
    return ["", "Short of what was aimed at: " + "; ".join(missed) + "."] if missed else []


def _layers(rows: list[dict]) -> list[str]:
    lines = [
        f"Ops of one layer on one {_about(rows)}; median milliseconds. The floor is the fewest flops of any route at "
        "the measured matrix rate, or the fewest bytes at the measured bandwidth:",
        "",
        *_table("op", "size", "dtype", "projgrad", "% of floor", "fastest of the library"),
    ]
    for (op, size, dtype), by_name in _groups([r for r in rows if r["op"] != "ceiling"], "op", "size", "dtype").items():
        ours = by_name.get("projgrad")
        library = [row for name, row in by_name.items() if name.startswith("library") and row["ms"]]
        best = min(library, key=lambda row: float(row["ms"]), default=None)
        cells = [_cell(ours), _number(ours, "percent_of_floor"), _cell(best, _times(best))]
        lines.append(f"| `{op}` | {size.replace('x', ' x ')} | {dtype} | " + " | ".join(cells) + " |")
    return lines


def _steps(rows: list[dict]) -> list[str]:
    lines = [
        f"Whole steps in bfloat16 with SGD on one {_about(rows)}. Plain is the same two batches without projection; "
        "memory is the allocator's peak over all steps, model included (in parentheses above the loaded model). "
        "Host is the time until a step returned to Python, device the sum of all kernels and copies of one step:",
        "",
        *_table("model", "contender", "ms", "host", "device", "time / plain", "memory in GB", "memory / plain"),
    ]
    for (_,), by_name in _groups(rows, "case").items():
        model = next((row["model"] for row in by_name.values() if row["model"]), "")
        for name, row in by_name.items():
            memory = ""
            if row["total_mb"]:
                memory = f"{float(row['total_mb']) / 1e3:.3g} ({float(row['peak_mb']) / 1e3:.3g})"
            cells = [model, name, _cell(row), _number(row, "host_ms"), _number(row, "device_ms")]
            cells += [_number(row, "time_over_plain"), memory, _number(row, "total_over_plain")]
            lines.append("| " + " | ".join(cells) + " |")
    return [*lines, *_shortfalls(rows)]
