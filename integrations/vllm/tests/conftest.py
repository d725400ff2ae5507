"""Deltas of the sample fine-tune by several methods, and what their merged checkpoints answer.

These tests run in an environment with vLLM (`make test-vllm`). Compression, merging and the
registry run in the repository's own, `.venv`.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

os.environ |= {
    "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_HOST_IP": "127.0.0.1", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engines of one rank start in seconds
}  # fmt: skip

from deltadock.artifacts.reader import Artifact
from deltadock.artifacts.writer import write_artifact
from integrations.vllm.tests.engine import BASE, ROOT, Answers

FINETUNED = ROOT / "samples/finetuned"
OWN_FILES = ("chat_template.jinja", "generation_config.json")
METHODS = ("adamix", "optimix", "bitdelta", "lora")


def deltadock(*arguments: str | Path) -> None:
    """Run a command of the repository's environment."""
    command = [ROOT / ".venv/bin/deltadock", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def write_adapter(folder: Path) -> Path:
    """A PEFT adapter of rank 8 of some of the sample base's projections, as PEFT saves it."""
    folder.mkdir()
    torch.manual_seed(0)
    tensors = {}
    for layer in range(4):
        for name, h_out in (("self_attn.q_proj", 256), ("mlp.up_proj", 512)):
            full = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{full}.lora_A.weight"] = 0.1 * torch.randn(8, 256)
            tensors[f"{full}.lora_B.weight"] = 0.1 * torch.randn(h_out, 8)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": 8, "lora_alpha": 8, "bias": "none",
        "target_modules": ["q_proj", "up_proj"],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_finetune(folder: Path) -> Path:
    """The sample fine-tune with its base's template and generation defaults, as an engine has one
    of each for all deltas."""
    shutil.copytree(FINETUNED, folder)
    for name in OWN_FILES:
        (folder / name).unlink(missing_ok=True)
        if (BASE / name).exists():
            shutil.copy(BASE / name, folder)
    return folder


def digest_of(folder: Path) -> str:
    """SHA-256 of a folder's files and their names."""
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        found.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return found.hexdigest()


@pytest.fixture(scope="session")
def deltas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sample fine-tune as a delta of each method; `lora` is an adapter.

    They are kept in the environment's folder by what they are made of: compressing takes minutes.
    """
    finetune = write_finetune(tmp_path_factory.mktemp("finetune") / "copy")
    folder = Path(sys.prefix) / "deltas" / digest_of(finetune)[:16]
    folder.mkdir(parents=True, exist_ok=True)
    adapter = write_adapter(tmp_path_factory.mktemp("lora") / "adapter")
    for method in METHODS:
        if (folder / f"{method}.delta").exists():
            continue
        deltadock(
            "compress", "--base", BASE, "--finetuned", adapter if method == "lora" else finetune,
            "--method", method, "--calibration", ROOT / "samples/calibration.txt",
            "--calibration-tokens", "8192", "--out", folder / f"{method}.delta",
        )  # fmt: skip
    return {method: folder / f"{method}.delta" for method in METHODS}


@pytest.fixture(scope="session")
def expected(
    deltas: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Answers]:
    """What plain vLLM answers with the base and each delta's merged checkpoint.

    The answers are kept beside the deltas. A process of its own asks for them: an engine that ends
    takes along what the others of its process share.
    """
    kept = {name: deltas["adamix"].with_name(f"{name}.json") for name in ("base", *METHODS)}
    asked: list[str | Path] = []
    for name, path in kept.items():
        if not path.exists():
            model = BASE
            if name != "base":
                model = tmp_path_factory.mktemp("merged") / name
                deltadock("merge", "--base", BASE, "--delta", deltas[name], "--out", model)
            asked += [model, path]
    if asked:
        command = [sys.executable, "-m", "integrations.vllm.tests.engine", *map(str, asked)]
        subprocess.run(command, cwd=ROOT, check=True)
    return {name: json.loads(path.read_text()) for name, path in kept.items()}


def write_with_template(delta: Path, path: Path) -> None:
    """A delta with the sample fine-tune's chat template."""
    template = (FINETUNED / "chat_template.jinja").read_text()
    with Artifact(delta) as artifact:
        manifest = {key: value for key, value in artifact.manifest.items() if key != "tensors"}
        files = {**manifest["files"], "chat_template.jinja": template}
        tensors = {name: artifact.encoded(name) for name in artifact.records}
        write_artifact(path, tensors, {**manifest, "files": files})


@dataclass(frozen=True)
class Registry:
    """A running api with `maths/skills`: version 1 is adamix's delta, 2 bitdelta's, 3 optimix's.

    `maths/lora` is the adapter's, `maths/damaged` bitdelta's with a flipped bit, and
    `maths/chat` bitdelta's with the sample fine-tune's chat template.
    """

    url: str
    key: str
    process: subprocess.Popen[str]

    def make_default(self, name: str, version: int) -> None:
        """Let the bare name mean another version."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{name} {version}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "moved\n"


@pytest.fixture(scope="session")
def registry(
    deltas: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Registry]:
    """The registry, to which the environment leads, with a cache of its own."""
    folder = tmp_path_factory.mktemp("registry")
    damaged = bytearray(deltas["bitdelta"].read_bytes())
    damaged[-1000] ^= 1
    (folder / "damaged.delta").write_bytes(damaged)
    write_with_template(deltas["bitdelta"], folder / "chat.delta")
    skills = ",".join(str(deltas[method]) for method in ("adamix", "bitdelta", "optimix"))
    command = [
        ROOT / ".venv/bin/python", "-m", "integrations.vllm.tests.registry",
        folder, f"maths/skills={skills}", f"maths/lora={deltas['lora']}",
        f"maths/damaged={folder / 'damaged.delta'}", f"maths/chat={folder / 'chat.delta'}",
    ]  # fmt: skip
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        found = Registry(**json.loads(process.stdout.readline()), process=process)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DELTADOCK_API_URL", found.url)
            patch.setenv("DELTADOCK_API_KEY", found.key)
            patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
            yield found
        process.communicate()
