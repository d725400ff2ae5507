"""Models of the registry: cards, versions, aliases and their history."""
