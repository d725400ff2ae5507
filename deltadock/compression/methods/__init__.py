"""One module a method; `registry` finds them by name."""
