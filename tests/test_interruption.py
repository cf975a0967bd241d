"""Ctrl-C and SIGTERM end a command with a line and status 130, wherever in it they come."""

import os
import signal
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("place", "work"),
    [
        ("sft.run", "wait()"),
        ("cli.spare_loopback", "exec('wait()')"),  # as in the making of a dataclass: Python left as if killed
        ("sft.run", "caught(AttributeError)"),  # by a library, which fails at something else then
        ("sft.run", "caught(ClearError)"),
    ],
)
def test_an_interruption_says_how_to_go_on(project, signum, place, work):
    (project / "typed.py").write_text(f"""if True:
        import sys, time, types
        from clear import cli
        from clear.errors import ClearError
        def wait():
            print("started", flush=True)
            time.sleep(60)
        def caught(kind):
            try:
                wait()
            except BaseException:
                raise kind("no such key")
        sft = sys.modules["clear.stages.sft"] = types.ModuleType("clear.stages.sft")
        {place} = lambda *_: {work}
        sys.argv = ["clear", "sft"]
        cli.main()""")
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-m", "typed"], text=True, env=environment, **pipes) as run:
        assert run.stdout.readline() == "started\n"
        run.send_signal(signum)
        _, stderr = run.communicate(timeout=20)
    assert run.returncode == 130
    assert stderr == "interrupted; run the same command again to resume from the last checkpoint\n"


def test_an_interruption_that_a_callback_swallows_comes_again(project):
    script = """if True:
        import os, signal, sys, types, weakref
        stage = types.ModuleType("clear.stages.sft")
        def run(config):
            class Thing: pass
            thing = Thing()
            reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGTERM))
            del thing
            os.read(os.pipe()[0], 1)  # for ever, unless the second one wakes it
            print("went on")
        stage.run = run
        sys.modules[stage.__name__] = stage
        sys.argv = ["clear", "sft"]
        from clear.cli import main
        main()"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=60)
    assert (run.returncode, run.stdout) == (130, "")
    assert run.stderr == "interrupted; run the same command again to resume from the last checkpoint\n"


def test_an_interruption_after_the_end_changes_nothing(tmp_path):
    """A command that had done its work ended as killed by SIGTERM, or with a traceback, while Python was leaving."""
    script = """if True:
        import atexit, os, signal, sys, time
        def leave():
            me, (ready, begun) = os.getpid(), os.pipe()
            if os.fork():
                os.read(ready, 1)  # from here on it is signalled until it is gone
                return
            while os.getppid() == me:
                for number in (signal.SIGINT, signal.SIGTERM):
                    os.kill(me, number)
                os.write(begun, b"1")
                time.sleep(0.0005)
            os._exit(0)
        atexit.register(leave)
        sys.argv = ["clear", "params"]
        from clear.cli import main
        main()"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (0, "params.yaml written.\n", "")
