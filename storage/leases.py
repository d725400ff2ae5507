"""Who holds a lease: a process, which may have died."""

import os
import platform
import uuid


def new_owner() -> str:
    """A name for a lease of this process: its machine, its process id, and a random part."""
    return f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:12]}"


def died_here(owner: str) -> bool:
    """Whether the owner was a process of this machine, and is no more."""
    machine, pid, _ = owner.rsplit("-", 2)
    if machine != platform.node():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it is another user's
        pass
    return False
