"""The compose file and the Dockerfile."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deltadock.cli.services import Service
from deltadock.cli.system import topology_settings
from deltadock.settings import Settings

ROOT = Path(__file__).parent.parent
APPLICATION = {"migrate", "api", "worker", "worker-cpu", "node", "node-cpu"}
SERVERS = {"postgres", "valkey", "seaweedfs"}


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    compose: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    found: dict[str, Any] = compose["services"]
    return found


def test_the_file_follows_the_compose_specification() -> None:
    check = shutil.which("check-jsonschema", path=str(Path(sys.executable).parent))
    assert check is not None
    command = [check, "--builtin-schema", "vendor.compose-spec", ROOT / "docker-compose.yml"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stdout


def test_the_services_of_each_profile(services: dict[str, Any]) -> None:
    assert services.keys() == APPLICATION | SERVERS
    by_profile = {
        profile: {name for name in services if profile in services[name].get("profiles", [profile])}
        for profile in ("gpu", "cpu")
    }
    always = SERVERS | {"migrate", "api"}
    assert by_profile == {
        "gpu": always | {"worker", "node"},
        "cpu": always | {"worker-cpu", "node-cpu"},
    }
    for name in services.keys() - {"migrate"}:  # which exits when done
        assert "healthcheck" in services[name], name


def test_variables_are_the_topologys_settings(
    services: dict[str, Any],
    postgres_service: Service,
    valkey_service: Service,
    seaweedfs_service: Service,
    tmp_path: Path,
) -> None:
    servers = (postgres_service, valkey_service, seaweedfs_service)
    topology = topology_settings(tmp_path, 8100, *(server.settings for server in servers))
    expected = {f"DELTADOCK_{field.upper()}" for field in topology}
    assert topology.keys() <= Settings.model_fields.keys()
    for name in APPLICATION:
        assert services[name]["environment"].keys() == expected, name


def test_the_docs_make_the_secrets_that_the_file_demands() -> None:
    demanded = set(re.findall(r"\$\{(\w+):\?", (ROOT / "docker-compose.yml").read_text()))
    page = (ROOT / "docs" / "operate" / "index.md").read_text()
    loop = re.search(r"^for name in (.*); do$", page, re.MULTILINE)
    assert loop is not None
    assert set(loop[1].split()) == demanded


def test_dependencies_exist_and_have_healthchecks(services: dict[str, Any]) -> None:
    for name, service in services.items():
        for other, dependency in service.get("depends_on", {}).items():
            assert "profiles" not in services[other], name
            if dependency["condition"] == "service_healthy":
                assert "healthcheck" in services[other], name


def test_the_build_context_equals_the_copied_files() -> None:
    sent = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = {
        word
        for line in (ROOT / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY") and "--from" not in line
        for word in line.split()[1:-1]
    }
    assert copied - {"deltadock/version.py"} == sent
    links = {path.name for path in (ROOT / "deltadock").iterdir() if path.is_symlink()}
    assert {*links, "deltadock"} <= copied


def test_the_images_run_unprivileged() -> None:
    stages: dict[str, str] = {}
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line.startswith("FROM"):
            _, parent, _, stage = line.split()
            stages[stage] = stages.get(parent, "root")
        elif line.startswith("USER"):
            stages[stage] = line.split()[1]
    assert {stages["api"], stages["torch"]} == {"deltadock"}
