"""The demo of a language model: what it answers before and after two of twelve invented people are forgotten."""

from __future__ import annotations

import copy
from collections.abc import Callable

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

from ..evaluate.problem import MissingData, Training
from .comparison.methods import Setting
from .comparison.run import train, unlearn
from .scenarios import SCENARIOS, facts

KNOWN, FORGOTTEN, CANDIDATES = 12, 2, 24
TRAINING = Training(2e-3, 6, 14)
METHOD, SETTING, FORGET_BATCH = "orthograd-metric", Setting(1.5, 12, 16, 0.5), 10
SHOWN = {"forgotten": 5, "kept": 4, "the world": 3}  # questions of each kind
SECONDS = {"load": 30.0, "epoch": 8.0, "step": 5.0, "answers": 8.0}  # on two cores, for the progress bar


def show(console: Console, progress: Progress, emit: Callable[[dict], None] | None = None) -> int:
    """Teach, ask, forget and ask again; returns the exit code.

    emit: gets the answers as plain values, which are printed as a table otherwise.
    Raises MissingData where a package is missing, with the command that installs all of them.
    """
    total = SECONDS["load"] + TRAINING.epochs * SECONDS["epoch"] + SETTING.steps * SECONDS["step"]
    bar = progress.add_task("reading the model", total=total + 2 * SECONDS["answers"])

    def advance(what: str, after: str) -> Callable[[], None]:
        return lambda: progress.update(bar, advance=SECONDS[what], description=after)

    try:
        problem = facts.Facts(5, lora=True, known=KNOWN, forgotten=FORGOTTEN, candidates=CANDIDATES)
    except MissingData as missing:
        raise MissingData(" && ".join(SCENARIOS["facts-LoRA"].missing())) from missing
    advance("load", f"teaching facts about {KNOWN} people")()
    problem.training = TRAINING
    taught = train(problem, (problem.taught,), 0, advance("epoch", f"teaching facts about {KNOWN} people"))
    before = _asked(problem, taught)
    advance("answers", f"forgetting {FORGOTTEN} of them")()
    model = copy.deepcopy(taught)
    tick = advance("step", f"forgetting {FORGOTTEN} of them")
    done = unlearn(problem, model, METHOD, SETTING, seed=5, forget_batch=FORGET_BATCH, tick=tick)
    after = _asked(problem, model)
    progress.update(bar, completed=total + 2 * SECONDS["answers"], description="done")
    if emit is not None:
        emit(_plain(problem, before, after) | {"stopped": done.stopped})
        return 0
    _print(console, problem, before, after)
    if done.stopped:
        console.print(f"Stopped early: {done.stopped}", markup=False)
    return 0


def _groups(problem: facts.Facts) -> dict[str, list]:
    return {
        "forgotten": problem.facts["forget"],
        "kept": problem.facts["retain"][:: facts.EVERY],
        "the world": problem.facts["test"],
    }


def _asked(problem: facts.Facts, model: nn.Module) -> dict[str, list[str]]:
    """Return the greedy answers by kind of question."""
    return {kind: problem.answers(model, [f.question for f in group]) for kind, group in _groups(problem).items()}


def _plain(problem: facts.Facts, before: dict[str, list[str]], after: dict[str, list[str]]) -> dict[str, list[dict]]:
    """Return by kind every question with its answer, what the model says before and after, and whether it is right."""

    def said(fact: facts.Fact, text: str) -> dict:
        return {"text": text, "right": facts.holds(text, fact.answer[1])}

    return {
        kind: [
            {"question": f.question, "answer": f.answer[1], "before": said(f, b), "after": said(f, a)}
            for f, b, a in zip(group, before[kind], after[kind], strict=True)
        ]
        for kind, group in _groups(problem).items()
    }


def _print(console: Console, problem: facts.Facts, before: dict[str, list[str]], after: dict[str, list[str]]) -> None:
    table = Table("", "question", "answer before", "answer after")
    counts = []
    for kind, group in _groups(problem).items():
        rows = list(zip(group, before[kind], after[kind], strict=True))
        for fact, *answers in rows[: SHOWN[kind]]:
            table.add_row(kind, fact.question, *(_marked(text, facts.holds(text, fact.answer[1])) for text in answers))
        table.add_section()
        right = [sum(facts.holds(text[i], text[0].answer[1]) for text in rows) for i in (1, 2)]
        counts.append(f"{kind}: {right[0]} of {len(group)} right before, {right[1]} after")
    console.print(table)
    console.print(". ".join(counts) + ".", highlight=False)


def _marked(text: str, is_right: bool) -> str:
    text = text.replace("[", r"\[")
    return text if is_right else f"[dim]{text} (wrong)[/dim]"
