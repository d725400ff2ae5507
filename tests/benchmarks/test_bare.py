"""The GPU benchmarks need only torch, triton, transformers, safetensors and numpy."""

import subprocess
import sys

HIDE = """
import importlib, re, sys
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
for module in sys.argv[1:]:
    importlib.import_module(module)
"""


MODULES = ("gpu", "kernel", "node", "sampler", "compress_speed", "smollm")


def test_they_import_nothing_else() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HIDE, *(f"benchmarks.{name}" for name in MODULES)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
