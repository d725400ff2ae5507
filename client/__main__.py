"""`python -m client`: the `deltadock` command where its script is not on the path."""

from client.cli import main

main()
