"""`python -m clear`, the same command line as `clear`."""

import signal
import sys

signal.signal(signal.SIGTERM, signal.default_int_handler)
try:
    from clear.cli import main
except KeyboardInterrupt:
    print("interrupted before anything began", file=sys.stderr)
    sys.exit(130)

main()
