"""The evaluation in a web page: `clear browse`. data.py finds what is shown, page.py shows it with Streamlit."""

import os
import sys
from pathlib import Path

from clear.data.ports import HOST, require_free
from clear.errors import ClearError, say


def serve(root: Path, port: int, open_browser: bool) -> None:
    """Become the server of the page for the workspace `root`, until Ctrl-C; it listens on the loopback interface only.

    Raises ClearError where there is nothing to show, the port is taken, or Streamlit is missing.
    """
    from clear.browse.data import evaluated

    evaluated(root)  # raises for none
    require_free(port, " with --port")
    try:
        import streamlit  # noqa: F401
    except ImportError as error:
        raise ClearError("streamlit is not installed; run `make venv`.") from error
    page = str(Path(__file__).with_name("page.py"))
    options = {
        "server.address": HOST,
        "server.port": str(port),
        "server.headless": "false" if open_browser else "true",
        "server.showEmailPrompt": "false",
        "server.fileWatcherType": "none",
        "server.maxUploadSize": "50",
        "browser.gatherUsageStats": "false",
        "logger.hideWelcomeMessage": "true",  # and with it an offer to install things, laid over the page
        "client.toolbarMode": "minimal",
        "runner.magicEnabled": "false",  # it would show docstrings and values of expressions on the page
    }
    given = [part for name, value in options.items() for part in (f"--{name}", value)]
    say(f"http://{HOST}:{port} (Ctrl-C ends it)")
    os.chdir(root)
    os.execv(sys.executable, [sys.executable, "-m", "streamlit", "run", page, *given])
