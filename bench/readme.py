"""Write the measured tables of README.md and docs/ from bench/results: `python -m bench.readme`."""

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path

from projgrad.evaluate import verdict
from projgrad.evaluate.tables import caption, columns
from projgrad.experiments.benchmark.report import read_csv
from projgrad.experiments.comparison.methods import TITLES
from projgrad.experiments.scenarios import FAST, SCENARIOS

from . import applied_cost
from . import growth as growing
from .facts import facts
from .field import field
from .gpu_readme import gpu, step_rows
from .micro_batches import by_hand_table, union_table
from .micro_batches_metric import metric_table
from .peers import table as peers
from .probe import probe_table
from .report import RESULTS
from .steps import SUMMARY, summary
from .support import table as support

HIDDEN = ("steps", "usable")  # columns of the comparison's tables that there is no room for
ROOT = Path(__file__).parent.parent


def flat() -> str:
    """Return the table of the flat ops."""
    rows = read_csv(RESULTS / "flat_cpu.csv")
    names = ["projgrad", "plain Gram", "QR", "lstsq"]
    lines = [
        f"Projection of one float32 vector, median milliseconds (extra memory in MB), {rows[0]['threads']} threads, "
        f"{rows[0]['device']}, torch {rows[0]['torch']}:",
        "",
        "| n x p | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for size in dict.fromkeys(row["size"] for row in rows if row["op"] == "project_out"):
        by_name = {row["contender"]: row for row in rows if row["op"] == "project_out" and row["size"] == size}
        cells = [f"{_ms(by_name[name])} ({float(by_name[name]['extra_mb']):.0f})" for name in names]
        others = zip(names[1:], cells[1:], strict=True)
        cells = [f"**{cells[0]}**", *(f"{cell}, {_times(by_name[name])} x" for name, cell in others)]
        n, p = size.split("x")
        lines.append(f"| {n} x {int(p):,} | " + " | ".join(cells) + " |")
    solve = {row["contender"]: row for row in rows if row["op"] == "gram_solve"}
    lines += ["", "Two hundred Gram systems of n = 64, with rank detection: " + ", ".join(_solver(solve)) + "."]
    return "\n".join(lines)


def _ms(row: dict) -> str:
    return f"{float(row['ms']):.3g}"


def _times(row: dict) -> str:
    return f"{float(row['times_ours']):.1f}"


def _solver(rows: dict[str, dict]) -> list[str]:
    titles = {"projgrad": "`gram_solve`", "linalg.solve": "`torch.linalg.solve` (none)"}
    return [
        f"{titles.get(name, name)} {_ms(row)} ms" + (f" ({_times(row)} x)" if name != "projgrad" else "")
        for name, row in rows.items()
    ]


def compare() -> str:
    """Return a table and a verdict for every scenario of the fast preset, and what more retain samples buy on two."""
    results = _compared()
    lines = ["![Forget and test accuracy of every method](../bench/results/overview.png)", ""]
    for name in FAST:
        lines += _scenario(name, results[name])
    lines += [_study(name, results[name]) for name in ("digits-labels", "news-full")]
    return "\n".join(lines)


def scenarios() -> str:
    """Return the same for every other scenario that was run, and the n-study of all."""
    lines, results = [], _compared()
    for name, scenario in results.items():
        if name not in FAST:
            made = scenario["environment"]
            lines += _scenario(name, scenario)
            lines += [f"`{scenario['command']}`: torch {made['torch']}, threads: {made['threads']}.", ""]
    lines += [_study(name, scenario) for name, scenario in results.items() if scenario["study"]]
    return "\n".join(lines)


def _compared() -> dict[str, dict]:
    results = json.loads((RESULTS / "compare.json").read_text())["scenarios"]
    return {name: results[name] for name in SCENARIOS if name in results}


def _scenario(name: str, scenario: dict) -> list[str]:
    shown = [column for column in columns(scenario, TITLES) if column.title not in HIDDEN]
    titles = [scenario["forget_title"] + " %" if c.title == "forget %" else c.title for c in shown]
    rows = zip(*(column.cells for column in shown), strict=True)
    return [
        f"**{scenario['title'][0].upper()}{scenario['title'][1:]}** (`{name}`): {caption(scenario)}",
        "",
        "| " + " | ".join(titles) + " |",
        "|---" * len(titles) + "|",
        *("| " + " | ".join(cell.replace("±", " ± ") for cell in cells) + " |" for cells in rows),
        "",
        verdict(scenario, TITLES),
        "",
    ]


def _study(name: str, scenario: dict) -> str:
    return f"![{scenario['title']}: accuracy and cost against n](../bench/results/{name}-study.png)"


def steps() -> str:
    """Return the table of whole steps."""
    rows = read_csv(RESULTS / "steps_cpu.csv")
    lines = [
        f"Whole steps in float32 on {rows[0]['threads']} threads, {rows[0]['device']}, torch {rows[0]['torch']}, "
        f"commits {', '.join(dict.fromkeys(row['commit'] for row in rows))}; targets in parentheses:",
        "",
        "| " + " | ".join(SUMMARY) + " |",
        "|---|" + "---|" * (len(SUMMARY) - 1),
    ]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in summary(rows)])


def host() -> str:
    """Return the table of host time and launches."""
    rows = read_csv(RESULTS / "host_cpu.csv")
    lines = [
        f"Host time of a step in multiples of the same step without projection, one thread, {rows[0]['device']}, "
        f"torch {rows[0]['torch']}, commit {rows[0]['commit']}; targets in parentheses:",
        "",
        "| model | plain | global | per_tensor | launches, plain | launches, global | launches, per_tensor |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        plain, *ours = [row for row in rows if row["case"] == case]
        cells = [plain["model"], f"{_ms(plain)} ms", *(_against(row, "over_plain", "at_most") for row in ours)]
        cells += [plain["launches"], *(_against(row, "launches_over_plain", "launches_at_most") for row in ours)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def growth() -> str:
    """Return the table of time and memory against n, t and p, and the lines about the small encoder."""
    rows = read_csv(RESULTS / "growth_cpu.csv")
    lines = [
        f"Steps in float32 on {rows[0]['threads']} threads, {rows[0]['device']}, torch {rows[0]['torch']}, commit "
        f"{rows[0]['commit']}. Time is that of the processors, exponents are fitted to the larger half of the points:",
        "",
        "| what grows | contender | time grows as | memory grows as | at the smallest | at the largest |",
        "|---|---|---|---|---|---|",
    ]
    for axis in ("n", "t", "p"):
        of_axis = [(point, row) for point, some in growing.by_point(rows) for row in some if row["axis"] == axis]
        if not of_axis:
            continue
        points = [point for point, _ in of_axis]
        title = f"{growing.LETTERS[axis]}: {points[0].size:,} to {points[-1].size:,}"
        for name in growing.NAMES:
            mine = [row for _, row in of_axis if row["contender"] == name]
            powers = (growing.exponent(*growing.curve(rows, axis, name, column)) for column in ("ms_cpu", "peak_mb"))
            cells = [
                title,
                name,
                *("" if e is None else f"{axis}^{e:.2f}" for e in powers),
                *map(_size, (mine[0], mine[-1])),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for point, (plain, ours) in growing.by_point(row for row in rows if row["axis"] == "encoder"):
        over = {key: float(ours[key]) / float(plain[key]) for key in ("ms", "ms_cpu", "first_ms", "first_ms_cpu")}
        lines.append(
            f"- Encoder, {point.p / 1e6:.2g} M parameters, {point.t} positions, n = {point.n}: a step takes "
            f"{over['ms']:.2f} x the time of a plain one, and {over['ms_cpu']:.2f} x that of the processors. The first "
            f"step, with its inspection: {over['first_ms']:.2f} and {over['first_ms_cpu']:.2f} x a first plain one."
        )
    drawn = [axis for axis in "ntp" if (RESULTS / f"growth_cpu_{axis}.svg").exists()]
    pictures = [f"![Time and memory against {axis}](../bench/results/growth_cpu_{axis}.svg)" for axis in drawn]
    return "\n".join([*lines, "", *pictures])


def _size(row: dict) -> str:
    """Return time and memory of one row of the growth, or why there are none, and an error above 1e-5."""
    error = float(row["difference"] or 0)
    off = f", wrong by {error:.0e}" if error > 1e-5 else ""
    return row["note"] or f"{float(row['ms_cpu']):,.0f} ms, {float(row['peak_mb']):,.0f} MB{off}"


def planned() -> str:
    """Return the table of plans beside what was measured."""
    rows = read_csv(RESULTS / "planned.csv")
    heads = (
        "model",
        "step",
        "n",
        "dtype, optimizer",
        "planned MB",
        "measured",
        "ratio",
        "first step planned",
        "measured",
        "ratio",
    )
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [row["case"], row["step"], row["n"], f"{row['dtype']}, {row['optimizer']}"]
        for kind in ("", "first_"):
            cells += [f"{float(row[f'{what}_{kind}mb']):,.0f}" for what in ("planned", "measured")]
            cells.append(f"{float(row[f'{kind}ratio']):.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def processes() -> str:
    """Return the table of steps over several processes."""
    rows = read_csv(RESULTS / "processes_cpu.csv")
    heads = "model", "step", "own all-reduce", "forget gradient", "K", "correction", "D", "others"
    heads += "memory, first step", "memory, later steps"
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "---|" * (len(heads) - 2)]
    for row in rows:
        count, parameters = int(row["processes"]), float(row["parameters_mb"])
        plain = row["contender"].startswith("DDP plain")
        own = f"{2 * parameters * (count - 1) / count:.3g}" if plain else ""
        names = "forget_mb", "factors_mb", "corrections_mb", "diagonal_mb", "other_mb", "peak_mb", "later_mb"
        cells = [f"{row['model']}, n = {row['n']} a process", row["contender"], own]
        lines.append(f"| {' | '.join([*cells, *(row[name] and f'{float(row[name]):.3g}' for name in names)])} |")
    about = rows[0]
    return "\n".join([f"{about['device']}, torch {about['torch']}, commit {about['commit']}.", "", *lines])


def _against(row: dict, column: str, limit: str) -> str:
    """Return a multiple of the plain step with its target."""
    missed = row[limit] and float(row[column]) > float(row[limit])
    return f"{float(row[column]):.3g}" + (f" (≤ {row[limit]}{', MISSED' if missed else ''})" if row[limit] else "")


OURS = ("projgrad global", "projgrad two passes", "projgrad per_tensor")


def numbers() -> str:
    """Return the README's short table: whole steps of OrthoGrad, and one sentence about the targets that are missed."""
    rows = [row for row in read_csv(RESULTS / "steps_cpu.csv") if not row["case"].startswith("gram-")]
    lines = [
        f'A step with `scope="global"` in multiples of the same step without projection ({rows[0]["device"]}, '
        f"{rows[0]['threads']} threads, float32). Memory is the peak above the loaded model, on a GPU with the model:",
        "",
        "| model | time | memory, first step | memory, later steps | vmap + QR: time, memory |",
        "|---|---|---|---|---|",
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        by_name = {row["contender"]: row for row in rows if row["case"] == case}
        ours, qr = by_name["projgrad global"], by_name["vmap + QR"]
        cells = [ours["model"], *(_over_plain(ours, key) for key in ("time", "memory", "later"))]
        lines.append(f"| {' | '.join(cells)} | {_over_plain(qr, 'time')}, {_over_plain(qr, 'memory')} |")
    lines += [f"| {' | '.join(cells)} |" for cells in step_rows(RESULTS)]
    targets = list(_targets_met(rows))
    mine = [row for row in rows if row["contender"] in OURS and not row["note"]]
    worst = {unit: max(mine, key=lambda row: float(row[f"{unit}_over_plain"])) for unit in ("time", "memory")}
    most = "; ".join(f"{unit} {_over_plain(row, unit)} ({_where(row)})" for unit, row in worst.items())
    missed = f"{targets.count(False)} of {len(targets)} targets set for the CPU are missed. The worst rows: {most}"
    lines += ["", f"{missed}. All rows: [CPU](docs/benchmarks.md), [GPU](docs/gpu.md)."]
    return "\n".join(lines)


def _targets_met(rows: list[dict]) -> Iterator[bool]:
    """Yield for every target of projgrad's steps, and of its lead over vmap and QR, whether it is met."""
    for row in rows:
        for unit in ("time", "memory"):
            if limit := row[f"{unit}_at_most"]:
                yield not row["note"] and float(row[f"{unit}_over_plain"]) <= float(limit)
            if limit := row[f"{unit}_at_least"]:
                yield not row["note"] and float(row[f"{unit}_over_ours"]) >= float(limit)


def _over_plain(row: dict, key: str) -> str:
    """Return a multiple of the plain step, or why there is none."""
    value = row[f"{key}_over_plain"]
    return f"{float(value):.3g} x" if value else row["note"].split(":")[0]


def _where(row: dict) -> str:
    return f"{row['model'].split(',')[0]}, {row['contender'].removeprefix('projgrad ')}"


SECTIONS = {
    "README.md": {"field": field, "numbers": numbers},
    "docs/plan.md": {"planned": planned},
    "docs/benchmarks.md": {"steps": steps, "host": host, "growth": growth, "flat": flat},
    "docs/comparison.md": {"compare": compare},
    "docs/facts.md": {"facts": facts},
    "docs/gpu.md": {"gpu": gpu},
    "docs/micro_batches.md": {"union": union_table, "metric": metric_table, "by hand": by_hand_table},
    "docs/optimizer_metric.md": {"applied cost": functools.partial(applied_cost.table, "decoder")},
    "docs/probe.md": {"probe": probe_table},
    "docs/processes.md": {"processes": processes},
    "docs/scenarios.md": {"scenarios": scenarios},
    "docs/support.md": {"support": support, "peers": peers},
    "docs/transformers.md": {"adapters": functools.partial(applied_cost.table, "adapters")},
}


def written(file: str, text: str) -> str:
    """Return `text` of a file of SECTIONS with every generated section made anew."""
    for name, section in SECTIONS[file].items():
        pattern = rf"(<!-- {name}: .*? -->\n).*?(\n<!-- end -->)"
        text, count = re.subn(pattern, lambda m, s=section: m[1] + s() + m[2], text, flags=re.S)
        if count != 1:
            raise ValueError(f"{file} must hold one section <!-- {name}: ... --> ... <!-- end -->; found {count}")
    return text


if __name__ == "__main__":
    for file in SECTIONS:
        (ROOT / file).write_text(written(file, (ROOT / file).read_text()))
