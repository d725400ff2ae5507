"""The wheel, installed in a separate environment, with packages and modules of similar names.

The environment sees the test environment's dependencies, but not its editable Deltadock. Commands
run in a folder full of modules with which a bare import, or one from the working directory, would
collide: the user's `api/`, `client.py`, `redis.py`; Hugging Face's `kernels`; and `compression`,
which is in Python's standard library from 3.14 on.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

import deltadock

ROOT = Path(__file__).parents[1]
SHADOWS = ("api/__init__", "client", "redis", "storage", "torch", "workers/__init__")
HF_KERNELS = "kernels==0.17.2"


@dataclass(frozen=True)
class Installation:
    """A virtual environment with the wheel, and the folder that its commands run in."""

    bin: Path
    folder: Path
    variables: Mapping[str, str]

    def run(self, *command: str | Path, timeout: float = 60) -> str:
        """The output of a command of this environment."""
        result = subprocess.run(
            [self.bin / command[0], *command[1:]],
            cwd=self.folder,
            env=self.variables,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, named as Git names it: setuptools writes into it."""
    sources = tmp_path_factory.mktemp("sources") / "deltadock"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.splitlines():
        if name.startswith(("tests/", "docs/", "benchmarks/")) or not (ROOT / name).exists():
            continue
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, sources / name, follow_symlinks=False)
    return sources


@pytest.fixture(scope="session")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", out, clone], check=True)
    [wheel] = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def installation(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    packages = sysconfig.get_path("purelib", vars={"base": str(environment)})
    Path(packages, "dependencies.pth").write_text(f"{Path(httpx.__file__).parents[1]}\n")
    install = [sys.executable, "-m", "pip", "--quiet", "--python", python, "install", "--no-deps"]
    subprocess.run([*install, "--disable-pip-version-check", wheel, HF_KERNELS], check=True)

    # As in 3.14: takes precedence over installed packages.
    library = tmp_path_factory.mktemp("library")
    (library / "compression").mkdir()
    (library / "compression" / "__init__.py").write_text("STANDARD_LIBRARY = True\n")

    folder = tmp_path_factory.mktemp("project")
    for name in SHADOWS:
        path = folder / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'raise ImportError("the user\'s {name} was imported")\n')
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return Installation(
        environment / "bin",
        folder,
        variables
        | {"PYTHONPATH": str(library), "DELTADOCK_DEVICE": "cpu", "COLUMNS": "200", "TERM": "dumb"},
    )


def test_it_installs_one_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"deltadock"}
    assert "deltadock/py.typed" in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    suffixes = {".py", ".html", ".js", ".css", ".mako"}
    linked = {link.name for link in (ROOT / "deltadock").iterdir() if link.is_symlink()}
    sources = [
        str(path.relative_to(ROOT))
        for folder in (linked - {"samples"}) | {"deltadock"}
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes and "__pycache__" not in path.parts
    ]
    assert {Path(source).suffix for source in sources} == suffixes
    assert {source.split("/")[0] for source in sources} == (linked - {"samples"}) | {"deltadock"}
    for source in sources:
        assert (source if source.startswith("deltadock/") else f"deltadock/{source}") in names


def test_an_editable_install_is_found_from_the_folder_above_the_clone(
    clone: Path, tmp_path: Path
) -> None:
    """There `deltadock/`, which is no package, must not hide it; nor does it add other names."""
    build = f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})"
    built = subprocess.run(
        [sys.executable, "-c", build], cwd=clone, capture_output=True, text=True, check=True
    )
    assert "warning" not in built.stderr.lower()
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        f"import site; site.addsitedir({str(tmp_path)!r}); import deltadock;"
        "from importlib.util import find_spec;"
        "print(deltadock.__version__, [find_spec(n) for n in ('api', 'kernels', 'storage')])"
    )
    found = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=clone.parent, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert found.stdout == f"{deltadock.__version__} [None, None, None]\n"


def test_packages_with_similar_names_stay_importable(installation: Installation) -> None:
    code = (
        "import compression, json, kernels, deltadock.kernels, deltadock.compression;"
        "print(json.dumps([compression.STANDARD_LIBRARY, hasattr(kernels, 'get_kernel'),"
        "deltadock.__version__, deltadock.__file__, deltadock.kernels.__file__]))"
    )
    *facts, package, kernels = json.loads(installation.run("python", "-P", "-c", code))
    assert facts == [True, True, deltadock.__version__]
    environment = str(installation.bin.parent)
    assert package.startswith(environment)
    assert kernels.startswith(environment)


@pytest.mark.timeout(900)
def test_demo_runs_api_worker_and_node(installation: Installation) -> None:
    # A third of the time.
    [package] = installation.bin.parent.glob("lib/*/site-packages/deltadock")
    text, distillation = (
        package / "samples/calibration.txt",
        package / "compression/distillation.py",
    )
    text.write_text(text.read_text()[:4_000])
    code, steps = distillation.read_text(), "\nSTEPS: Final = "
    assert f"{steps}80\n" in code
    distillation.write_text(code.replace(f"{steps}80\n", f"{steps}8\n"))
    said = installation.run("deltadock", "demo", timeout=800)
    found = re.search(r"delta +(\d+) of 60 held-out exercises right", said)
    assert found is not None, said
    assert int(found[1]) >= 55
    assert sorted(path.name for path in installation.folder.iterdir()) == sorted(
        {f"{name}.py".split("/")[0] for name in SHADOWS}
    )
