"""`python -m deltadock`: the `deltadock` command where its script is not on the path."""

from deltadock.cli.main import main

main()
