"""Who sends a request and what it may do, decided from the headers before the body is read."""

from deltadock.api.access.caller import Caller, CallerDep

__all__ = ["Caller", "CallerDep"]
