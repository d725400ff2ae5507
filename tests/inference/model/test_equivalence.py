"""Every method's delta on the node is its merged checkpoint in plain transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from artifacts.checkpoint import scan_folder
from artifacts.export import merge
from artifacts.reader import Artifact
from compression.calibration.options import Source
from compression.catalogue import METHODS
from compression.pipeline import compress
from compression.run import CompressOptions
from inference.deltas.reading import ArtifactSource, place_delta, read_delta
from inference.engine.passes import Passes
from inference.engine.scheduler import Work
from inference.model.layers import DeltaLimits
from inference.model.model import load_base
from inference.prompts.tokens import Tokenizer, read_tokenizer_files
from tests.inference.scheduling import make_sequence

PROMPTS = ([1, 2, 3], list(range(30, 70)), [5] * 9)
CONTINUED = [7, 8]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("equivalence")


@pytest.fixture(scope="module")
def base(home: Path, make_model: Any, save_checkpoint: Any) -> Path:
    model = make_model("qwen2", initializer_range=0.1)
    folder: Path = save_checkpoint(model, home / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_checkpoint(model, home / "tuned")
    (home / "lora").mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}
    (home / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    factors = {
        f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight": torch.randn(shape)
        * 0.1
        for name, parameter in model.named_parameters()
        if "proj.weight" in name
        for side, shape in (("A", (4, parameter.shape[1])), ("B", (parameter.shape[0], 4)))
    }
    save_file(factors, home / "lora" / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def artifacts(base: Path, home: Path) -> dict[str, Path]:
    """An artifact of every method."""
    text = home / "calibration.txt"
    text.write_text("".join(f"{n} squared is {n * n}.\n" for n in range(100)))
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compression.distillation.training.STEPS", 3)
        for name, method in METHODS.items():
            made[name] = home / f"{name}.delta"
            options = CompressOptions(name, bits=None if method.bits_min is None else 1.0)
            tuned = home / ("lora" if method.imports_adapter else "tuned")
            compress(base, tuned, made[name], options, calibration=[Source(text)])
    return made


def test_every_method_in_one_batch_has_the_logits_of_its_merged_checkpoint(
    base: Path, home: Path, artifacts: dict[str, Path], tokenizer: Tokenizer
) -> None:
    manifest = scan_folder(base)
    limits = DeltaLimits(slots=len(artifacts) + 1, rows=1024)
    model = load_base(base, manifest, torch.device("cpu"), limits)
    references: list[Any] = [None]
    for slot, (name, path) in enumerate(artifacts.items(), 1):
        with Artifact.open(path) as artifact:
            source = ArtifactSource(artifact)
            files = read_tokenizer_files(base)
            loaded = read_delta(source, model, manifest.weights_digest, files)
        place_delta(model, slot, loaded)
        merge(base, path, home / f"merged-{name}")
        references.append(home / f"merged-{name}")
    references[0] = base
    sequences = [
        make_sequence(tokenizer, prompt, slot)
        for slot in range(len(references))
        for prompt in PROMPTS
    ]
    for place, sequence in enumerate(sequences):
        sequence.kv_slot = place
    passes = Passes(model, model.make_cache(len(sequences), 64), len(sequences))
    with torch.inference_mode():
        found = [passes.logits([Work(item, 0, len(item.tokens)) for item in sequences])]
        for token in CONTINUED:
            for item in sequences:
                item.tokens.append(token)
            work = [Work(item, len(item.tokens) - 1, len(item.tokens)) for item in sequences]
            found.append(passes.logits(work))
    logits = torch.stack(found, 1).unflatten(0, (-1, len(PROMPTS)))
    for folder, slot_logits in zip(references, logits, strict=True):
        check(folder, slot_logits)
    bare = logits[0]
    for slot, name in enumerate(artifacts, 1):
        assert (logits[slot] - bare).abs().max() > 1e-2, f"{name} changes nothing"


def check(folder: Path, logits: torch.Tensor) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt, found in zip(PROMPTS, logits, strict=True):
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt + CONTINUED])).logits[0]
        torch.testing.assert_close(found, expected[len(prompt) - 1 :], rtol=1e-4, atol=1e-4)
