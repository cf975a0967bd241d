"""The stop rule of GRPO: if true accuracy falls while the reward rises, that is reward hacking, whatever the KL."""

from collections.abc import Sequence
from pathlib import Path

from transformers import Trainer, TrainerCallback

from clear.data.io import replacing
from clear.model.checkpoint import save_tensors
from clear.schema import Grpo
from clear.training.loop.parallel import rank
from clear.training.loop.saved import trained_state


def falls_while_reward_rises(measured: Sequence[tuple[float, float]], patience: int, margin: float) -> bool:
    """The stop rule, over (true accuracy, mean reward since the measurement before) in the order they were measured.

    True if each of the last `patience` measurements lies more than `margin` below the best accuracy before them
    and has a higher reward than that best one had. `patience` 0: never.
    """
    if not patience or len(measured) <= patience:
        return False
    accuracy, reward = max(measured[:-patience], key=lambda pair: pair[0])
    return all(a < accuracy - margin and r > reward for a, r in measured[-patience:])


def measured(history: Sequence[dict]) -> list[tuple[float, float]]:
    """(Held-out accuracy, mean reward of the steps since the measurement before) of a Trainer's log."""
    found, rewards = [], []
    for line in history:
        rewards += [line["reward"]] if "reward" in line else []
        if "accuracy_holdout" in line:
            found.append((line["accuracy_holdout"], sum(rewards) / len(rewards)))
            rewards = []
    return found


class StopRule(TrainerCallback):
    """Stops a trainer by `falls_while_reward_rises`; the best weights that were measured lie in the file `best`.

    It judges by the trainer's own log, which a resumed run brings along.
    """

    def __init__(self, trainer: Trainer, best: Path, grpo: Grpo) -> None:
        self._trainer, self._best, self._grpo = trainer, best, grpo

    def on_measured(self, accuracy: float) -> None:
        """Called with the accuracy of the current weights, before they are trained on."""
        known = [a for a, _ in measured(self._trainer.state.log_history)]
        if rank() == 0 and accuracy > max(known, default=-1.0):
            with replacing(self._best) as partial:
                save_tensors(trained_state(self._trainer.accelerator.unwrap_model(self._trainer.model)), partial)

    def on_log(self, args, state, control, logs=None, **_) -> None:
        if self.stopped():
            control.should_training_stop = True

    def stopped(self) -> bool:
        """Whether the rule holds for the log as it is."""
        history = measured(self._trainer.state.log_history)
        return falls_while_reward_rises(history, self._grpo.stop_after, self._grpo.stop_margin)
