"""`python -m deltadock`: the `deltadock` command."""

from deltadock.cli.main import main

main()
