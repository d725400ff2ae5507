"""A delta's way from the store into a slot: disk, host memory, device."""
