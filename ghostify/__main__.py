"""`python -m ghostify`, which launchers of several processes need."""

from ghostify.command.cli import main

main()
