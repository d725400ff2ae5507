"""Every part of the GPU benchmark needs torch, triton, transformers, safetensors and numpy only.

Without a GPU: at tiny sizes, the kernels in Triton's interpreter.
"""

import os
import subprocess
import sys

import pytest

HIDE = """
import importlib, os, re, sys
from importlib.metadata import distribution, packages_distributions

wanted, allowed = ["torch", "triton", "transformers", "safetensors", "numpy"], set()
while wanted:
    name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
    if name in allowed:
        continue
    try:
        needs = distribution(name).requires or []
    except importlib.metadata.PackageNotFoundError:
        continue
    allowed.add(name)
    needs = [need for need in needs if not re.search("extra *==", need)]
    wanted += [re.match(r"[\\w.-]+", need)[0] for need in needs]
allowed.add("deltadock")  # the checkout itself
owners = packages_distributions()


class HidingFinder:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        found = [re.sub(r"[-_.]+", "-", owner).lower() for owner in owners.get(name, [])]
        if found and allowed.isdisjoint(found):
            return None  # as if it were not installed
        return self.finder.find_spec(name, path, target)


sys.meta_path[:] = map(HidingFinder, sys.meta_path)
for absent in ("fastapi", "pytest", "pydantic_settings"):
    try:
        importlib.import_module(absent)
    except ImportError:
        continue
    raise SystemExit(f"{absent} is not hidden")
import tests.kernels.quick_interpreter
from benchmarks.gpu import PARTS

importlib.import_module("benchmarks.smollm")
for name, part in PARTS.items():
    if part.tiny:
        if name == "node":  # its logits would take a minute in the interpreter
            del os.environ["TRITON_INTERPRET"]
        print("==", name, flush=True)
        module, *arguments = part.tiny
        if importlib.import_module(module).main(arguments):
            raise SystemExit(name)
"""

PRINTED = {
    "cases": ["1 of 1 cases passed"],
    "kernel": ["of the base's products", "All results are correct"],
    "sweep": ["variant, us a layer", "8x80x64"],
    "decoder": ["gated activation, 2 rows", "2 rows, "],
    "linear": ["a layer, 1 rows: cuBLAS", "down, 1 rows"],
    "sampler": ["x"],
    "node": [
        "relative error of the logits",
        "of the roofline",
        "merged over packed",
        "cold swap",
        "6 deltas resident",
        "first token, p99",
    ],
    "adamix": ["48 x 64", "total"],
}


@pytest.mark.timeout(900)
def test_every_part_runs_on_a_bare_checkout() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HIDE],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    parts = dict(part.split("\n", 1) for part in run.stdout.split("== ")[1:])
    assert parts.keys() == PRINTED.keys()
    for name, lines in PRINTED.items():
        for line in lines:
            assert line in parts[name], parts[name]
