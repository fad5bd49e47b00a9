"""`python -m transformer COMMAND ...`."""

from transformer.cli.main import main

main()
