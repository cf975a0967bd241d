"""On SIGTERM a training writes a checkpoint before it ends: spot machines are reclaimed at short notice.

The step in progress is finished and saved, and then the process ends as if interrupted. If it is killed after a grace
period, the last regular checkpoint counts. A second signal ends it at once.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback

from clear.training.loop.parallel import world


class _Leave(TrainerCallback):
    """Saves and stops after the step in which any process was asked to leave."""

    asked = agreed = False  # this process; all processes

    def on_step_end(self, args, state, control, **_) -> None:
        self.agreed = self.asked
        if world() > 1:  # all processes must stop after the same step
            flag = torch.tensor(int(self.asked), device=args.device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            self.agreed = bool(flag)
        if self.agreed and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True


@contextmanager
def saved_on_sigterm(trainer: Trainer) -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM lets `trainer.train()` save and return; KeyboardInterrupt is then raised at the end of the block.

    If the training was over by then, nothing is raised, and the function given to the block says that one was asked to
    leave. Outside the main thread, where Python allows no handler, nothing is changed.
    """
    leave = _Leave()
    if threading.current_thread() is not threading.main_thread():
        yield lambda: leave.asked or leave.agreed
        return

    def ask(number: int, frame: object) -> None:
        if leave.asked:
            raise KeyboardInterrupt
        leave.asked = True

    trainer.add_callback(leave)
    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield lambda: leave.asked or leave.agreed
    finally:
        signal.signal(signal.SIGTERM, before)
    if (leave.asked or leave.agreed) and trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt
