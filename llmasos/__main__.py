"""`python -m llmasos` is `llmasos`."""

from llmasos.cli import main

main()
