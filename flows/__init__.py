"""Prefect flows over the DVC pipeline. The library does the work; DVC is the only cache."""

import logging

from clear.errors import ClearError, one_line, refusal


def in_words(error: BaseException | None) -> ClearError | None:
    """An error that says by itself what is wrong and what to do: a ClearError, what the operating system refused, or a
    Prefect API that does not answer; None for any other, which is a bug."""
    if isinstance(error, ClearError | OSError):
        return refusal(error)
    from httpx import HTTPStatusError, TransportError

    unreached = isinstance(error, RuntimeError) and str(error).startswith("Failed to reach API")  # as a run begins
    failing = isinstance(error, HTTPStatusError) and error.response.status_code >= 500
    if not (unreached or failing or isinstance(error, TransportError)):
        return None
    from prefect.settings import get_current_settings

    return ClearError(
        f"the Prefect API at {get_current_settings().api.url} does not answer "
        f"({one_line(error) or type(error).__name__}); start it, or set PREFECT_API_URL, then run the same command "
        "again: what was made is kept."
    )


def _in_one_line(record: logging.LogRecord) -> bool:
    """Strip the trace from an error that needs none."""
    error = record.exc_info[1] if record.exc_info else None
    if (said := in_words(error)) is not None:
        record.msg, record.args, record.exc_info = str(said), (), None
    return True


RUN_LOGS = ("prefect.flow_runs", "prefect.task_runs")
"""Where Prefect's engine logs whatever a flow or a task raises, with its trace, to the console and to its server."""

for _name in RUN_LOGS:
    logging.getLogger(_name).addFilter(_in_one_line)
