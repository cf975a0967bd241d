"""The pool of processes: results in order, whoever ends at whatever moment; no process lives on, nobody waits."""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from clear.data.pool import parallel, pool
from clear.errors import ClearError
from tests.conftest import ROOT


def square(job: int) -> int:
    time.sleep(0.002 * (job % 3))
    return job * job


def refuse(job: int) -> bytes:
    if job == 5:
        raise ClearError(f"row {job} is odd")
    return bytes(300_000)  # more than a pipe holds


def end(job: tuple[int, int]) -> int:
    if job[0] == job[1]:
        os.kill(os.getpid(), signal.SIGKILL)
    return job[0]


def unsendable(job: int):
    return threading.Lock()


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]


def test_results_come_in_order_and_one_pool_serves_several_functions():
    with pool(2) as apply:
        assert list(apply(square, range(100), 3)) == [n * n for n in range(100)]
        few = apply(abs, range(-90, 0), 2)  # whose last results nobody takes
        assert [next(few), next(few)] == [90, 89]
        assert list(apply(abs, [-7], 1)) == [7] and list(apply(abs, [], 1)) == []
        assert len(children()) == 2
    assert children() == []


def test_what_a_function_raises_arrives_in_its_place_with_the_worker_s_trace():
    found = parallel(refuse, range(20), workers=2, chunk=1)
    assert [len(next(found)) for _ in range(5)] == [300_000] * 5
    with pytest.raises(ClearError, match="row 5 is odd") as raised:
        next(found)
    assert "in refuse" in raised.value.__notes__[0]
    with pytest.raises(TypeError, match="cannot pickle"):
        list(parallel(unsendable, range(3), workers=2, chunk=1))
    assert children() == []


@pytest.mark.parametrize("when", [0, 7, 59])
def test_a_process_that_is_killed_ends_the_work_in_one_line(when):
    with pytest.raises(ClearError, match=r"worker process was killed, .* lower degrade\.workers"):
        list(parallel(end, [(n, when) for n in range(60)], workers=2, chunk=2))
    assert children() == []


LONG = """if True:
    import sys, time
    from clear import cli
    def work():
        from clear.data.pool import parallel
        print("go", flush=True)
        results = parallel(time.sleep, [0.05] * 10_000, workers=2, chunk=4)
        next(results)
        print("at work", flush=True)
        for _ in results:
            pass
    cli.app.command("work")(work)
    sys.argv = ["clear", "work"]
    cli.main()"""


def launch() -> subprocess.Popen:
    """A command with worker processes in a process group of its own, just as they are being started."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    run = subprocess.Popen(
        [sys.executable, "-c", LONG], stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True
    )
    assert run.stdout.readline() == "go\n"
    return run


def all_end(group: int) -> bool:
    """Whether the processes of a group all end within 20 s; multiprocessing's tracker does so a moment after us."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("number", "all_at_once"),
    [
        (signal.SIGINT, True),  # Ctrl-C at a terminal
        (signal.SIGTERM, False),  # a scheduler, or `kill`
        pytest.param(signal.SIGINT, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, True, marks=pytest.mark.slow),
    ],
)
def test_an_interruption_while_workers_start_or_work_is_one_line_and_leaves_no_process(number, all_at_once):
    for wait in (0.0, random.Random(number).random(), "until they work"):
        run = launch()
        if isinstance(wait, float):
            time.sleep(wait)
        else:
            assert run.stdout.readline() == "at work\n"
        (os.killpg if all_at_once else os.kill)(run.pid, number)
        _, stderr = run.communicate(timeout=60)  # ends once the workers, too, have closed stderr
        assert stderr == "interrupted; run the same command again to resume from the last checkpoint\n", wait
        assert run.returncode == 130 and all_end(run.pid)


def test_workers_do_not_outlive_a_command_that_is_killed():
    run = launch()
    while len(psutil.Process(run.pid).children()) < 3:  # both, and multiprocessing's tracker
        time.sleep(0.01)
    run.kill()
    run.communicate(timeout=60)
    assert all_end(run.pid)
