"""What the levels of a benchmark have in common: a ratio of two levels says something of the same questions only.

A hard table that ends early, or lacks what a judge failed on, would give a ratio of other questions than the clean one:
above 1 where the easy ones are left. So relative robustness is over the questions on which clean and hard both have a
verdict, under whichever corruption; the figures of the levels stay what they are, and a note says who lacks how many.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from clear.bench.scoring import HARD, present
from clear.bench.vlmeval.names import CIRCULAR, number
from clear.data.records import CLEAN

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Apart:
    """Levels of one benchmark that have different questions: of `questions` in all each of `lacking` has so many fewer.

    `shared` are the questions of both clean and hard, None where these two are the same or one of them is not there.
    """

    questions: int
    lacking: dict[str, int]
    shared: frozenset[str] | None

    def within(self, rows: "pd.DataFrame") -> "pd.DataFrame":
        """The rows at clean and hard of shared questions."""
        inside = _questions(rows).isin(self.shared or ()) & rows["severity"].isin((CLEAN, HARD))
        return rows[inside]

    def note(self, bench: str, ratio: str) -> str:
        """In words; `ratio` is what the table calls the relative robustness."""
        levels = ", ".join(f"{level} lacks {count}" for level, count in self.lacking.items())
        said = f"{bench}: of {self.questions} questions {levels}"
        if self.shared is None:
            return said
        if not self.shared:
            return f"{said}; clean and high share none, so there is no {ratio}"
        return f"{said}; {ratio} is over the {len(self.shared)} that clean and high share"


def apart(rows: "pd.DataFrame", circular: bool) -> Apart | None:
    """Where the levels of one benchmark differ, None where all have the same questions; `rows` are scored.

    A question is known by its index at every level, and one that was rejected at a level is not had there. With
    `circular` a lost rotation takes its whole question along, which would be easier without it.
    """
    judged = rows[rows["reject"] == ""]
    keys = _questions(judged)
    had = {level: set(keys[judged["severity"] == level]) for level in present(rows["severity"])}
    questions = set().union(*had.values())
    lacking = {level: len(questions) - len(own) for level, own in had.items() if len(own) < len(questions)}
    if not lacking:
        return None
    clean, hard = had.get(CLEAN), had.get(HARD)
    if clean is None or hard is None or clean == hard:
        return Apart(len(questions), lacking, None)
    shared = clean & hard
    if circular:
        broken = {number(key) % CIRCULAR for key in clean ^ hard}
        shared = {key for key in shared if number(key) % CIRCULAR not in broken}
    return Apart(len(questions), lacking, frozenset(shared))


def _questions(rows: "pd.DataFrame") -> "pd.Series":
    """What a question is called at every level: its index, without the `.0` that pandas adds in a column with gaps."""
    return rows["index"].str.strip().str.replace(r"(?<=\d)\.0+$", "", regex=True)
