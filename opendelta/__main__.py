"""`python -m opendelta` is the command `opendelta`."""

from .cli import main

main()
