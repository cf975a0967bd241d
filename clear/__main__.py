"""`clear`, and `python -m clear`."""

import os
import sys

from clear import interruption


def run() -> None:
    """Run the command line (clear/cli). It takes most of a second to import, in which one may be interrupted too."""
    interruption.watch()
    for number, (stream, mode) in enumerate({"stdin": "r", "stdout": "w", "stderr": "w"}.items()):
        if getattr(sys, stream) is None:  # closed by whoever called: the next file would get its number, and its text
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, stream, os.fdopen(number, mode))
    try:
        from clear.cli import main
    except BaseException as error:
        if not interruption.came(error):
            raise
        interruption.ignore()
        print("interrupted before anything began", file=sys.stderr)
        sys.exit(interruption.STATUS)
    main()


if __name__ == "__main__":
    run()
