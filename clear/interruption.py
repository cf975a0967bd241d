"""Ctrl-C and SIGTERM end a command as interrupted, wherever in it they come.

Python raises KeyboardInterrupt at whatever line is running, and much of what runs as a command begins is somebody
else's: a library catches it and raises an error of its own, a callback drops it, Python itself remembers it and leaves
as if killed. So it is written down here that one came.
"""

import signal
import sys

STATUS = 130
_NUMBERS = (signal.SIGINT, signal.SIGTERM)
_came: list[int] = []


def watch() -> None:
    """From now on both raise KeyboardInterrupt and are remembered; SIGINT only where it is not ignored (`&`, cron)."""
    for number in _NUMBERS:
        if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _raise)
    sys.unraisablehook = _again


def came(error: BaseException) -> bool:
    """Whether what a command ends with is an interruption, if perhaps under another name."""
    if isinstance(error, SystemExit):  # 0: done nevertheless; STATUS: typer's for KeyboardInterrupt
        return error.code == STATUS or bool(error.code and _came)
    return bool(_came) or isinstance(error, KeyboardInterrupt)


def ignore() -> None:
    """All is done or said. As Python ends it gives signals back their default, which would change the exit status, and
    a second Ctrl-C would print its traceback. An interruption within the execution of a text, by which dataclasses and
    named tuples are made, has Python end as if killed by it, though it was caught; the next execution forgets it."""
    for number in _NUMBERS:
        signal.signal(number, signal.SIG_IGN)
    exec("")  # noqa: S102


def _raise(number: int, _: object) -> None:
    _came.append(number)
    raise KeyboardInterrupt


def _again(lost: "sys.UnraisableHookArgs") -> None:
    """An interruption in the middle of a callback (of the garbage collector, of imports), where Python drops it, comes
    again a moment later; anything else that was dropped is reported as ever."""
    import threading  # only here: what is imported above is a time in which Python alone handles an interruption

    if not issubclass(lost.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    # A signal to the main thread and not `interrupt_main`, which would not wake it from a blocking call.
    again = threading.Timer(0.05, signal.pthread_kill, [threading.main_thread().ident, signal.SIGTERM])
    again.daemon = True
    again.start()
