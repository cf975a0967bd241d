"""What lies between generation and loss in a GRPO step: the trajectories, and what of them is scored."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from clear.reasoning.engine import Trajectory
from clear.reasoning.prompts import Prompt
from clear.training.rl.objective import Counts


@dataclass(frozen=True)
class Rollout:
    """What the rollout of a step leaves for its loss: a row per trajectory of this process.

    steps: the SDE steps that are scored in each of its restorations. advantages (R, 2) float32, of text and image: 0
    where a row teaches nothing. The log-probabilities of the sampling policy lie in the trajectories.
    """

    prompts: Sequence[Prompt]
    trajectories: Sequence[Trajectory]
    steps: Sequence[Sequence[int]]
    advantages: Tensor
    counts: Counts

    def taught(self, rows: Sequence[int], text: bool) -> list[int]:
        """Those of the rows that teach something; without `text` only what was restored does."""
        return [n for n in rows if self.advantages[n].any() and (text or self.trajectories[n].restorations)]

    def scored(self, rows: Sequence[int], text: bool) -> tuple[list[Prompt], list[Trajectory], list[Sequence[int]]]:
        """Prompts, trajectories and steps of these rows, as `scoring.score` takes them; without `text` no token."""
        chosen = [self.trajectories[n] if text else _without_text(self.trajectories[n]) for n in rows]
        return [self.prompts[n] for n in rows], chosen, [self.steps[n] for n in rows]


def _without_text(trajectory: Trajectory) -> Trajectory:
    """The trajectory up to its last restoration, all that the image term reads, with no token of it to be scored."""
    read = trajectory.replies[: len(trajectory.restorations)]
    return replace(trajectory, replies=[replace(reply, forced=len(reply.ids)) for reply in read])
