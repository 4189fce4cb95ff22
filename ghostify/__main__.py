"""`python -m ghostify`, which launchers of several processes need."""

from ghostify.cli.commands import main

main()
