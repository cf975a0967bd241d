"""The one exception a user is meant to read.

Anything wrong with the user's data, configuration or workspace is raised as `ClearError` with a message that
names the file, the row, the value and the remedy; the command line prints it as one line without a trace.
Programming errors stay ordinary exceptions.
"""


class ClearError(Exception):
    """Bad input or workspace state. `str(error)` is a complete sentence with the remedy."""
