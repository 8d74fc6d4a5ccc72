"""What a probe tells: rows, a table, and one sentence of advice."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .step_length import FORGETTING, NOTHING, ROUNDING, UNBOUNDED

# Rules of thumb between what was measured; docs/probe.md says what.
NO_OVERLAP = 0.98  # preserved norm: the projected gradient is within 11 degrees of the forget gradient
LITTLE = 0.01  # change of a retain loss by plain ascent for a gain of 1; on digits 0.15 to 0.43
NOTHING_LEFT = 0.1  # preserved norm: to gain as much for the forget loss, a step has to be ten times as long
SPILLS = 0.75  # on digits 0.99 and 0.68 with n = 4, where test accuracy falls by 25 points, 0.71 and 0.32 with n = 64
FEW = 16  # retain samples a step; with 8, test accuracy falls by 10 and 15 points on digits
WIDTH = 100

NO_RATE = {UNBOUNDED: "none", ROUNDING: "rounding"}  # what stands in its place


@dataclass(frozen=True)
class ProbeRow:
    """A step with one scope and one number of retain samples.

    scope, samples: of the step. rank, preserved_norm, residual: as in `projgrad.StepRecord`, with alpha=0.
    spill: what the step does to retain samples beyond the first n, to first order and for the same gain of the forget
        loss, over what a step without projection does to them: 0 leaves them alone too, 1 is no better than plain
        ascent. mean_j |⟨g_j, u_perp⟩| / ‖u_perp‖² over the same with u. None where there are no such samples.
    learning_rate: up to which first-order effects hold; see `probe`. None where there is no such rate: `why` says
        "no limit found", "rounding" or "nothing left". With a rate, "forgetting fades" where the forget loss limits it.
    step_length: ‖Δθ‖ of the forgetting part there: the rate to use with max_norm=1, which keeps it at most this long.
    forget_change: by how much one step at that rate raises the forget loss (lowers it with ascend=False).
    seconds, plain_seconds: the gradients of a step, and of the same step without projection: medians of this run.
    peak_bytes, plain_peak_bytes: what tensors hold at their peak, beyond what was held before; None where it cannot be
        measured. The first scope's step includes the inspection of a graph that is new.
    """

    scope: str
    samples: int
    rank: int
    preserved_norm: float
    residual: float
    spill: float | None
    learning_rate: float | None
    step_length: float | None
    forget_change: float | None
    why: str
    seconds: float
    plain_seconds: float
    peak_bytes: int | None
    plain_peak_bytes: int | None


@dataclass(frozen=True)
class Probe:
    """What `probe` found: print it for a table.

    rows: by number of samples, then scope.
    forget_loss, retain_loss: now; of retain samples the mean over all that were looked at.
    plain_change: mean_j |⟨g_j, u⟩| / ‖u‖²: by how much ascent without projection changes a retain loss while it raises
        the forget loss by 1, to first order.
    parameters: numbers that are updated. alpha, tolerance: as given.
    verdict: "nothing to forget", "nothing to protect", "forget among retain", "too few samples", "not known" or
        "worth it".
    advice: the same as a sentence. notes: what could not be looked at.
    """

    rows: tuple[ProbeRow, ...]
    forget_loss: float
    retain_loss: float
    plain_change: float
    parameters: int
    alpha: float
    tolerance: float
    verdict: str
    advice: str
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as dictionaries, lists, numbers and words, for JSON."""
        return asdict(self) | {"rows": [asdict(row) for row in self.rows], "notes": list(self.notes)}

    def __str__(self) -> str:
        titles = ("scope", "n", "rank", "kept", "resid", "spill", "lr", "length", "forgets", "time", "memory")
        table = [titles, *map(_cells, self.rows)]
        widths = [max(len(row[k]) for row in table) for k in range(len(titles))]
        about = (
            f"{self.parameters:,} parameters; forget loss {self.forget_loss:.3g}, retain loss {self.retain_loss:.3g}. "
            "While plain ascent raises the forget loss by 1, it changes a retain loss by "
            f"{self.plain_change:.2g}, to first order."
        )
        lines = [*textwrap.wrap(about, WIDTH), ""]
        for row in table:
            cells = zip(row, widths, strict=True)
            lines.append("  ".join(c.ljust(w) if k == 0 else c.rjust(w) for k, (c, w) in enumerate(cells)).rstrip())
        share = f"{100 * self.tolerance:g} %"
        notes = {
            "kept": "length of the projected over that of the forget gradient",
            "spill": "change of retain samples that are not protected, over that by plain ascent",
            "lr": f"rate where retain losses change by {share} of the first-order gain, or half of that is lost",
            "length": "of the forgetting part of that step: the rate for max_norm=1; forgets: what it gains",
            "time": "of the gradients of a step, and over those without projection; memory: at the peak",
        }
        lines += ["", *(f"{name:10}{note}" for name, note in notes.items())]
        for text in (*(f"Note: {note}." for note in self.notes), self.advice):
            lines += ["", *textwrap.wrap(text, WIDTH)]
        return "\n".join(lines)


def _cells(row: ProbeRow) -> tuple[str, ...]:
    number = lambda value: "-" if value is None else f"{value:.2g}"  # noqa: E731
    memory = "-"
    if row.peak_bytes is not None and row.plain_peak_bytes:
        memory = f"{_size(row.peak_bytes)} {row.peak_bytes / row.plain_peak_bytes:.3g}x"
    return (
        row.scope,
        str(row.samples),
        str(row.rank),
        f"{row.preserved_norm:.3f}",
        f"{row.residual:.0e}",
        number(row.spill),
        NO_RATE.get(row.why) or number(row.learning_rate),
        number(row.step_length),
        number(row.forget_change),
        f"{_time(row.seconds)} {row.seconds / row.plain_seconds:.3g}x",
        memory,
    )


def _time(value: float) -> str:
    return f"{1e3 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def _size(value: float) -> str:
    power = next((k for k in (0, 1, 2) if value < 1000 ** (k + 1)), 3)
    return f"{value / 1000**power:.3g} {('B', 'kB', 'MB', 'GB')[power]}"


def advise(rows: Sequence[ProbeRow], alpha: float, plain_change: float | None, count: int | None) -> tuple[str, str]:
    """Return the verdict and the sentence that says what to do; it looks at scope="global" where that was probed.

    plain_change: None where the forget loss has no gradient. count: of the retain samples that there are, if known.
    """
    if plain_change is None:
        return "nothing to forget", (
            "Nothing to forget: the gradient of the forget loss is zero. The samples may be forgotten already, or "
            "their loss does not depend on what is trained."
        )
    scope = "global" if any(row.scope == "global" for row in rows) else rows[0].scope
    rows = [row for row in rows if row.scope == scope]
    last = rows[-1]
    if last.preserved_norm >= NO_OVERLAP:
        return "nothing to protect", (
            f"Nothing to protect: with n = {last.samples} the projection leaves {last.preserved_norm:.3f} of the "
            "forget gradient's length, which is nearly the step without it. Ascent or NegGrad+ do the same for less."
        )
    if plain_change < LITTLE:
        return "nothing to protect", (
            f"Nothing to protect at these weights: plain ascent changes a retain loss by {plain_change:.2g} for 1 of "
            "forgetting, to first order. Retain losses at their minimum have no gradient yet, as a distillation loss "
            "at its first step: probe again after some steps."
        )
    usable = [row for row in rows if row.preserved_norm > NOTHING_LEFT and row.why != NOTHING]
    lost = next((row for row in rows if row not in usable), None)
    spills = {row.samples: row.spill for row in usable if row.spill is not None}
    for row in usable:
        known = [spill for n, spill in spills.items() if n <= row.samples]  # it falls with n
        if row.samples >= FEW and known and known[-1] <= SPILLS:
            return "worth it", f"Worth it: {_setting(row, alpha)}{_lost(lost)}"
    if lost:
        return "forget among retain", (
            f"The forget samples lie among the protected ones: with n = {lost.samples} {lost.preserved_norm:.2g} of "
            "the forget gradient's length is left. Take retain samples without them, or others that are less like "
            "them."
        )
    more = "Take more of them, or a larger alpha."
    if count is not None:
        more = f"There are only {count}: take a larger alpha, and test on samples that you hold back."
    if last.samples < FEW:
        return "too few samples", (
            f"Too few samples, by a rule of thumb from digits: with fewer than {FEW} in a step and alpha=0.5, "
            f"unlearning there cost 10 points of test accuracy and more. {more}"
        )
    n = max(spills, default=0)
    if n >= FEW:
        return "too few samples", (
            f"Too few samples: with n = {n}, retain samples that are not protected still change {spills[n]:.2f} times "
            f"as much as by plain ascent. {more}"
        )
    other = "a larger one" if count is None else "a smaller one, from 16 on"
    return "not known", (
        f"Not known: no retain samples behind the first {last.samples} were looked at, which would show whether they "
        f"are protected too. Add {other} to sizes."
    )


def _lost(row: ProbeRow | None) -> str:
    if row is None:
        return ""
    return f" With n = {row.samples} nothing is left to forget with: forget samples may lie among the retain samples."


def _setting(row: ProbeRow, alpha: float) -> str:
    setting = f'start with OrthoGrad(alpha={alpha:g}, scope="{row.scope}") and n = {row.samples}'
    if row.why == ROUNDING:
        return f"{setting}. No learning rate keeps the promise: rounding alone changes retain losses by more."
    if row.learning_rate is None:
        return f"{setting}. No learning rate was found to be too large: choose it by what is forgotten."
    setting += f", at a learning rate up to {row.learning_rate:.2g}, or up to {row.step_length:.2g} with max_norm=1."
    if row.why == FORGETTING:
        setting += " Beyond it the forget loss gains less than half of what it gains to first order."
    if alpha:
        setting += f" The rate multiplies the retain part too (alpha={alpha:g}), which was left out here: begin lower."
    return setting
