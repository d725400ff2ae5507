"""Hooks of `benchmarks.contract`: no case may take away the key that all cases use."""

import os
from typing import Any

import schemathesis

OWN_TENANT = ("local", "ten_local")


@schemathesis.hook
def before_call(_context: Any, case: Any, _kwargs: Any) -> None:
    """Aim what would revoke the run's key, or limit its tenant, at others."""
    parameters = case.path_parameters or {}
    if parameters.get("key_id") == os.environ["CONTRACT_KEY"]:
        parameters["key_id"] = "key_another"
    if case.method == "PATCH" and parameters.get("tenant") in OWN_TENANT:
        parameters["tenant"] = "another"
