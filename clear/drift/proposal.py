"""What would cover pictures that have changed: nothing, a preset, or a set of such pictures; with the command for
it."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from clear.drift.reference import kind_of
from clear.drift.resemblance import Share

NOTEWORTHY = 0.02
"""Share of the pictures, beyond what is there without a change, from which on a kind explains something."""


@dataclass(frozen=True)
class Proposal:
    """`covers` is preset, incoming or nothing; `because` one sentence, `commands` ready to be typed, in order."""

    covers: str
    because: str
    commands: tuple[str, ...] = ()


def propose(
    night: str, damage: Sequence[Share], unlike: float, profile: str, presets: Sequence[str], watch: Sequence[str]
) -> Proposal:
    """The proposal for a night that has drifted, with a share `unlike` of pictures that are unlike everything known,
    beyond what is expected. `presets` are the active ones, `watch` the words of the command that judged the night, from
    which the one that collects its pictures is made.
    """
    grown = by_kind(damage)
    kind, excess = max(grown.items(), key=lambda item: item[1], default=("", 0.0))
    trained = sum(share.trained for share in damage if share.kind == kind)
    name = f"night_{re.sub('[^a-z0-9]+', '_', night.lower())}"
    collect = (
        shlex.join([*watch, "--collect", f"data/incoming/{name}"]),
        f"clear incoming check {name}",
    )
    # A classifier that knows no better gives strange pictures to some kind with certainty; so the half counts.
    if unlike > max(excess / 2, NOTEWORTHY):
        return Proposal(
            "incoming",
            f"{unlike:.0%} of the pictures are unlike everything in training, so that no preset can stand for "
            "them: collect some as a set, write a question and an answer for each into its table, and check it. "
            "Damage that can be computed may become a plugin instead (docs/DEGRADATIONS.md)",
            collect,
        )
    if excess < NOTEWORTHY:
        return Proposal(
            "incoming",
            "no kind of damage explains the change; look at the pictures first: size, subject or camera may have "
            "changed. If they are what the model is to answer from now on, collect some as a set",
            collect,
        )
    if trained:
        return Proposal(
            "nothing",
            f"{kind_of(kind)}, which {excess:.0%} more pictures have than before, is in the training data with "
            f"{trained} copies. Where the model does not do well enough there (docs/REVIEW.md), real pictures of "
            "it as a set are the next step",
            collect,
        )
    wish = shlex.quote(f"degrade.presets=[{','.join(dict.fromkeys([*presets, kind_of(kind)]))}]")
    return Proposal(
        "preset",
        f"{excess:.0%} more pictures than before look like the preset {kind_of(kind)}, which the model was not "
        "trained on: see in a copy of this folder what training on it does, then name it in degrade.presets of "
        "params.yaml (docs/DEGRADATIONS.md)",
        (f"clear scratch {profile} --set {wish}",),
    )


def by_kind(damage: Sequence[Share]) -> dict[str, float]:
    """Kind → share of the pictures that have it at any level, less what the reference seems to have."""
    found: dict[str, float] = {}
    for share in damage:
        found[share.kind] = found.get(share.kind, 0.0) + share.share - share.reference
    return found
