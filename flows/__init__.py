"""Prefect flows over the DVC pipeline. The library does the work; DVC is the only cache."""

import logging

from clear.errors import ClearError


def _in_one_line(record: logging.LogRecord) -> bool:
    """Strip the trace from an error that says by itself what is wrong and what to do."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, ClearError):
        record.msg, record.args, record.exc_info = str(error), (), None
    return True


# Prefect's engine logs whatever a flow or a task raises with its trace, to the console and to its server.
for _name in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(_name).addFilter(_in_one_line)
