"""`clear`, and `python -m clear`."""

import sys

from clear import interruption


def run() -> None:
    """Run the command line (clear/cli). It takes most of a second to import, in which one may be interrupted too."""
    interruption.watch()
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
