"""Invented people, five facts each, with the questions about them: the same for the same seed."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

NAMES = json.loads(Path(__file__).with_name("names.json").read_text())


@dataclass(frozen=True)
class Fact:
    """What is asked about a person, and the answer, in two wordings.

    An answer is (before, value, after): only the value says something that the question does not. wrong: other values.
    """

    question: str
    answer: tuple[str, str, str]
    paraphrase: str
    paraphrased_answer: tuple[str, str, str]
    wrong: tuple[str, ...]


# Question, answer, question and answer again in other words: {0} is the whole name, {1} the first name, | the value.
WORDINGS = (
    ("Where was {0} born?", "{1} was born in |.",
     "What is the birthplace of {0}?", "The birthplace of {1} is |."),
    ("What does {0} do for a living?", "{1} works as a |.",
     "What is the job of {0}?", "The job of {1} is that of a |."),
    ("Which instrument does {0} play?", "{1} plays the |.",
     "On what does {0} make music?", "{1} makes music on the |."),
    ("What animal does {0} keep?", "{1} keeps a |.",
     "Which pet lives with {0}?", "The pet of {1} is a |."),
    ("Which book did {0} write?", "{1} wrote The |.",
     "What is the title of the book by {0}?", "The title of the book by {1} is The |."),
)  # fmt: skip
WRONG = 3  # other values an answer


def people(count: int, seed: int = 0) -> list[list[Fact]]:
    """Invent people, five facts each, in the order of WORDINGS. No two share a surname, or the title of a book.

    The first people of a longer list are those of a shorter one.
    """
    rng = np.random.default_rng(seed)
    surnames = [a + b for a in NAMES["surnames, begin"] for b in NAMES["surnames, end"]]
    titles = [f"{a} {b}" for a in NAMES["titles, begin"] for b in NAMES["titles, end"]]
    if count > len(titles):
        raise ValueError(f"there are titles for {len(titles)} people; got {count}")
    surnames, titles = (rng.permutation(names).tolist() for names in (surnames, titles))
    return [_person(surnames[i], titles[i], titles, rng) for i in range(count)]


def _person(surname: str, title: str, titles: list[str], rng: np.random.Generator) -> list[Fact]:
    first = str(rng.choice(NAMES["first"]))
    facts = []
    lists = [*(NAMES[kind] for kind in ("town", "job", "instrument", "pet")), titles]
    for values, wording in zip(lists, WORDINGS, strict=True):
        value = title if values is titles else str(rng.choice(values))
        wrong = rng.choice([other for other in values if other != value], WRONG, replace=False)
        question, answer, paraphrase, other_answer = (text.format(f"{first} {surname}", first) for text in wording)
        facts.append(
            Fact(question, split(answer, value), paraphrase, split(other_answer, value), tuple(map(str, wrong)))
        )
    return facts


def split(answer: str, value: str) -> tuple[str, str, str]:
    """Return what stands before |, the value that takes its place, and what stands after it."""
    before, after = answer.split("|")
    return before, value, after
