"""The command line: one command per pipeline stage, named as in dvc.yaml, and the commands a person uses.

A command is a function of one of these modules: its signature with the help texts, and a few lines that call the
library. Everything heavy is imported inside the command that needs it, so `clear --help` answers at once. A ClearError
is one line on stderr; Ctrl-C and SIGTERM end with a remedy, because every long stage resumes from its checkpoint.
"""

import atexit
import locale
import os
import sys
import traceback
from typing import NoReturn

import typer

from clear import interruption
from clear.cli import benchmark, incoming, pipeline, project, registry, review, use
from clear.cli import watch as watching
from clear.data.ports import spare_loopback
from clear.errors import UNDECIDED, ClearError, fail, refusal, say

TOOLS, PIPELINE = "Commands", "Pipeline stages (normally run by `dvc repro`)"

app = typer.Typer(
    help="Teach a multimodal model to restore a degraded image when it needs to. Start with `make repro`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# In the order of `clear --help`.
for _command in (
    project.results,
    review.check,
    review.compare,
    review.gate,
    project.params,
    project.memory,
    project.scratch,
    use.ask,
    use.answer,
    use.serve,
    use.browse,
    benchmark.score,
    benchmark.mmd_bench,
    use.merge,
    use.quantise,
    use.export,
    use.decision,
    registry.release,
    registry.lineage,
    registry.tidy,
    watching.watch,
):
    app.command(rich_help_panel=TOOLS)(_command)
app.add_typer(incoming.app, name="incoming", rich_help_panel=TOOLS)
for _name, _summary in pipeline.STAGES.items():
    app.command(_name, help=_summary, rich_help_panel=PIPELINE)(pipeline.stage(_name))
app.command(rich_help_panel=PIPELINE)(pipeline.evaluate)
app.command(rich_help_panel=PIPELINE)(pipeline.seeds)
app.command(rich_help_panel=PIPELINE)(pipeline.ablations)
app.command("report", help=pipeline.REPORT, rich_help_panel=PIPELINE)(pipeline.stage("report"))


def main() -> None:
    """Run the command line and exit: 0 done, 1 refused with a reason, 2 misused or undecided, 130 interrupted."""
    try:
        interruption.watch()
        _in_utf8()
        spare_loopback()
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a file name may not be valid text
        app()
    except BaseException as error:
        if interruption.came(error):
            _interrupted()
        if (refused := refusal(error)) is not None:
            _refuse(refused)
        if not getattr(error, "undecided", False):
            raise
        traceback.print_exc()
        sys.exit(UNDECIDED)
    finally:
        atexit.register(interruption.ignore)


def _in_utf8() -> None:
    """Begin again in UTF-8 mode if the locale has another encoding, in which Python would read and write files."""
    if not sys.flags.utf8_mode and locale.getencoding().lower() not in ("utf-8", "utf8"):
        os.execve(sys.executable, sys.orig_argv, os.environ | {"PYTHONUTF8": "1"})


def _close_bars() -> None:
    """End the progress bars that an exception has left open in its frames: what is said next has a line of its own."""
    if bars := sys.modules.get("tqdm"):
        for bar in [*getattr(bars.tqdm, "_instances", ())]:
            bar.close()


def _interrupted() -> NoReturn:
    interruption.ignore()
    _close_bars()
    say("interrupted; run the same command again to resume from the last checkpoint", sys.stderr)
    sys.exit(interruption.STATUS)


def _refuse(error: ClearError) -> NoReturn:
    _close_bars()
    sys.exit(fail(error))
