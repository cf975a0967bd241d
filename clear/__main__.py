"""`python -m clear`, the same command line as `clear`."""

from clear.cli import main

main()
