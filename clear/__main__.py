"""`python -m clear`, the same command line as `clear`."""

import sys

try:
    from clear.cli import main
except KeyboardInterrupt:  # Ctrl-C before anything began
    sys.exit(130)

main()
