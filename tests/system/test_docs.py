"""The docs' commands and snippets, run page after page against one system; the site builds.

The folder `samples` that they name holds a tiny random pair here, so that every compression takes
a second. The output that a page shows is compared with the figures, identifiers and times masked.
"""

import gc
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from mkdocs.commands.build import build
from mkdocs.config import load_config
from safetensors.torch import save_file
from typer.testing import CliRunner

from deltadock.cli.app import app
from deltadock.settings import get_settings
from tests.cli.support import save_model
from tests.system.conftest import SAMPLES, System

ROOT = Path(__file__).parents[2]
PAGES = (  # in the order in which they can be followed
    "docs/tutorial.md",
    "docs/python.md",
    "docs/cli.md",
    "docs/how-to/base.md",
    "docs/how-to/fidelity.md",
    "docs/how-to/calibration.md",
    "docs/names.md",
    "docs/how-to/ci.md",
    "docs/how-to/offline.md",
    "docs/how-to/curl.md",
    "docs/how-to/nodes.md",
    "docs/how-to/vllm.md",
    "docs/how-to/keys.md",
    "docs/operate/index.md",
    "docs/operate/keys.md",
    "docs/operate/nodes.md",
    "docs/how-to/backup.md",
    "README.md",
)
NOT_RUN = {
    "make demo": "tests/test_wheel.py runs it",
    "make up": "the system runs already",
    ". .venv/bin/activate": "the environment is active already",
    "deltadock push samples/finetuned --base sample --name demo/faithful": "a search takes 40 s; "
    "tests/compression/test_search.py",
    "deltadock login": "asks for a key; tests/cli/test_verbs.py answers",
    "deltadock node": "runs until it is stopped; tests/cli/test_node.py starts nodes",
    "install -m 600": "needs Docker; tests/test_compose.py reads the file",
    "export DELTADOCK_NODE_SECRET": "needs another machine",
    "curl --oauth2-bearer": "needs the Hub",
    "pip install": "needs vLLM; integrations/vllm/tests",
    "vllm serve": "needs vLLM; integrations/vllm/tests",
}
"""Blocks that are not run, by how they begin, and why."""
NOT_COMPARED = {
    "deltadock doctor": "the system has bases of other tests",
    "deltadock run": "random models answer otherwise",
    "deltadock ps": "the base has several names here",
}
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = re.compile(r"[|<>&;`]|\$[({\w]|^set |^cp |^mkdir |^python |\w\(\) \{", re.MULTILINE)
ID = re.compile(r"\b(?:dlt|job|key|ddk)_\w+|\b[0-9a-f]{64}\b")


@dataclass
class Block:
    """A fenced block, and the output that the page shows after it."""

    language: str
    code: str
    shown: str = ""

    def listed(self, names: dict[str, str]) -> bool:
        return any(self.code.startswith(name) for name in names)


def blocks(page: str) -> list[Block]:
    found: list[Block] = []
    for language, code in FENCE.findall((ROOT / page).read_text()):
        if language == "text" and found:
            found[-1].shown += code
        elif language in ("sh", "python"):
            found.append(Block(language, code))
    return found


@pytest.fixture(scope="module")
def folder(system: System, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder as the docs' reader has it, with the home of the running system."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / ".deltadock").symlink_to(system.home)
    samples = folder / "samples"
    samples.mkdir()
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "max_position_embeddings": 128,
    }  # fmt: skip
    save_model(samples / "base", **sizes)
    save_model(samples / "finetuned", noise=0.02, **sizes)
    shutil.copy(SAMPLES / "finetuned/chat_template.jinja", samples / "finetuned")
    for name in ("calibration.txt", "heldout.txt"):
        (samples / name).write_text((SAMPLES / name).read_text()[:1200])
    adapter = folder / "my-adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    query = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    factors = {f"{query}A.weight": torch.ones(2, 32), f"{query}B.weight": torch.ones(32, 2)}
    save_file(factors, adapter / "adapter_model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("DELTADOCK_API_KEY")
        patch.setenv("COLUMNS", "300")
        patch.setenv("NO_COLOR", "1")
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        get_settings.cache_clear()
        yield folder
    get_settings.cache_clear()


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("system", ["up"], indirect=True)
def test_the_page_can_be_followed(page: str, system: System, folder: Path) -> None:
    made = ""
    for block in blocks(page):
        if block.listed(NOT_RUN):
            continue
        code = block.code.replace("http://127.0.0.1:8000", system.url)
        if key := re.search(r"ddk_\w{8}", made):  # the one that the page has just made
            code = re.sub(r"ddk_\w{8}", key[0], code)
        output = python(code) if block.language == "python" else shell(code)
        made += output
        if not block.listed(NOT_COMPARED):
            lines = set(masked(output))
            missing = [line for line in masked(block.shown) if line not in lines]
            assert not missing, f"{page}: {missing} are not in\n{output}"


def test_every_block_of_the_docs_is_on_a_page_that_is_followed() -> None:
    pages = [path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")]
    elsewhere = {page for page in pages if blocks(page) and not page.startswith("docs/adr/")}
    assert elsewhere <= set(PAGES)
    for name in NOT_RUN | NOT_COMPARED:
        assert any(block.code.startswith(name) for page in PAGES for block in blocks(page)), name


def test_the_site_builds_without_a_broken_link(tmp_path: Path) -> None:
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    pages = list(tmp_path.rglob("*.html"))
    assert {"index.html", "commands.html", "routes.html"} <= {page.name for page in pages}
    loaded = re.compile(r"<(?:script|link|img)\b[^>]*?(?:src|href)=.?https?:[^>]*>")
    for page in pages:
        others = [tag for tag in loaded.findall(page.read_text()) if "canonical" not in tag]
        assert not others, f"{page.name} loads {others}"


def shell(code: str) -> str:
    """Run a block: commands of deltadock in this process, anything else by bash."""
    if not SHELL.search(re.sub(r"(?m) # .*$", "", code)):
        return "".join(map(deltadock, statements(code)))
    done = subprocess.run(
        ["bash", "-eu", "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def statements(code: str) -> list[str]:
    """The commands of a block: lines, joined while a quotation or a backslash is open."""
    found, pending = [], ""
    for line in code.splitlines(keepends=True):
        pending += line
        try:
            ends = not pending.endswith("\\\n") and bool(shlex.split(pending, comments=True))
        except ValueError:  # an open quotation
            ends = False
        if ends:
            found.append(pending)
            pending = ""
    return found


def deltadock(command: str) -> str:
    words = shlex.split(command.replace("\\\n", ""), comments=True)
    variables = {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    assert words[0] == "deltadock", command
    get_settings.cache_clear()
    result = CliRunner().invoke(app, words[1:], env=variables)
    assert result.exit_code == 0, f"{command}{result.output}"
    return result.output


def python(code: str) -> str:
    namespace: dict[str, object] = {}
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        # Readers leave clients to be closed at exit.
        warnings.simplefilter("ignore", ResourceWarning)
        printed: list[str] = []
        patch.setitem(
            namespace, "print", lambda *parts, **_: printed.append(" ".join(map(str, parts)))
        )
        exec(compile(code, "<docs>", "exec"), namespace)
        namespace.clear()
        gc.collect()
    return "\n".join(printed)


def masked(text: str) -> list[str]:
    """The lines of a text, with figures, sizes, times and identifiers made equal.

    In no order, since errors and results are two streams; without `...`, which stands for more.
    """
    text = re.sub(r"\S+ \w+ ago|just now", "AGO", ID.sub("ID", text))
    text = re.sub(r"\d+ min (?=\d+ s)", "", text)
    text = re.sub(r"\d[\d.,]*(?: [kMG]?B\b)?", "#", text)
    return [" ".join(line.split()) for line in text.splitlines() if line != "..."]
