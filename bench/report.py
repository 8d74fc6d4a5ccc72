"""Where results are kept, and their tables and pictures: `python -m bench.report FILE ...`.

It draws a picture of every CSV file named, where matplotlib is installed.
"""

import sys
from pathlib import Path

from projgrad.experiments.benchmark.machine import environment
from projgrad.experiments.benchmark.report import draw, write_csv

RESULTS = Path(__file__).parent / "results"


def report(rows: list[dict], name: str, title: str) -> None:
    """Print rows of the flat ops on a CPU, and write them to results/<name>.csv and .svg."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in ("op", "size", "contender", "ms (20-80 %)", "times ours", "target", "% of floor", "extra MB"):
        table.add_column(column, justify="left" if column in ("op", "contender") else "right")
    for row in rows:
        met = row["target"] is None or row["times_ours"] >= row["target"]
        extra = f"{row['extra_mb']:.1f}" + (f" (≤ {row['extra_mb_target']})" if row["extra_mb_target"] else "")
        table.add_row(
            row["op"],
            row["size"],
            row["contender"],
            f"{row['ms']:.2f} ({row['ms_20']:.2f}-{row['ms_80']:.2f})",
            f"{row['times_ours']:.2f}",
            "" if row["target"] is None else f"≥ {row['target']} {'met' if met else 'MISSED'}",
            f"{row['percent_of_floor']:.0f}",
            extra,
        )
    Console(width=130).print(table)
    RESULTS.mkdir(exist_ok=True)
    about = environment()
    path = RESULTS / f"{name}.csv"
    write_csv(path, [row | about for row in rows], [*rows[0], *about])
    draw(path, f"{title}\n{about['device']}, {about['threads']} threads, {about['torch']}")


def main() -> None:
    for name in sys.argv[1:]:
        try:
            print(draw(Path(name)) or f"{name}: nothing to draw", flush=True)
        except ModuleNotFoundError as error:
            print(f"no picture of {name}: {error.name} is missing", flush=True)


if __name__ == "__main__":
    main()
