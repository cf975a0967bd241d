"""What a row of a benchmark's TSV asks: the text as VLMEvalKit writes it, or the question alone.

VLMEvalKit's forms: a multiple-choice question is introduced, its options are listed and followed by an instruction;
CV-Bench brings the whole text in its column `prompt`; MM-Vet and other free answers are asked as they stand. Departure:
an option "None", which VLMEvalKit's reader takes for an empty cell, is listed.
"""

from collections.abc import Mapping

from clear.bench.vlmeval.names import family
from clear.data.records import Question
from clear.reasoning.prompts import question_text
from clear.sources.lmudata import options_of
from clear.sources.scenes.words import LABELS

STYLES = ("vlmeval", "plain")
"""vlmeval: as VLMEvalKit asks. plain: question and options as this project's own models are trained on."""


def prompt_of(bench: str, cells: Mapping[str, str], style: str = "vlmeval") -> str:
    """The text of a row of the benchmark `bench`. Raises ClearError for options that are all empty or too many."""
    asked = cells.get("question") or cells.get("prompt", "")
    hint = cells.get("hint", "")
    options = options_of(cells)
    if style == "plain":
        text = f"Hint: {hint}\n{asked}" if hint else asked
        return question_text(Question(cells["index"], bench, text, "", tuple(options)))
    if family(bench) == "cvbench" and cells.get("prompt"):
        return cells["prompt"]
    if not options:
        return asked
    listed = "".join(f"{label}. {text}\n" for label, text in zip(LABELS, options, strict=False) if text.strip())
    introduced = (f"Hint: {hint}\n" if hint else "") + f"Question: {asked}\n"
    return f"{introduced}Options:\n{listed}Please select the correct answer from the options above. \n"
