"""Every method's delta on the node matches its merged checkpoint, added tokens included."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from deltadock.artifacts.export import merge
from deltadock.artifacts.folder import scan_folder
from deltadock.artifacts.reader import Artifact
from deltadock.compression.options import METHODS, CompressOptions, Source
from deltadock.compression.pipeline import compress
from deltadock.inference.deltas.reading import place_delta, read_delta
from deltadock.inference.engine.model_runner import ModelRunner
from deltadock.inference.engine.scheduler import ScheduledChunk
from deltadock.inference.model.loading import load_base
from deltadock.inference.model.routing import DeltaLimits
from deltadock.inference.prompts.tokenizer import Tokenizer, read_tokenizer_files
from tests.inference.conftest import VOCABULARY
from tests.inference.scheduling import make_sequence

ADDED = 5
"""Tokens that the fine-tune adds; the adapter adds none."""
PROMPTS = ([1, 2, 3], list(range(30, 70)), [5] * 9, [9, VOCABULARY, 9, VOCABULARY + 4])
CONTINUED = [7, VOCABULARY + 2]


def known(tokens: list[int], vocabulary: int) -> list[int]:
    """The tokens, with those beyond the vocabulary replaced."""
    return [token if token < vocabulary else token % 7 for token in tokens]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def tied(request: pytest.FixtureRequest) -> bool:
    """Whether embedding and head are tied."""
    results: bool = request.param
    return results


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tied: bool) -> Path:
    return tmp_path_factory.mktemp("tied" if tied else "untied")


@pytest.fixture(scope="module")
def base(home: Path, tied: bool, make_model: Any, save_checkpoint: Any) -> Path:
    model = make_model("qwen2", initializer_range=0.1, tie_word_embeddings=tied)
    folder: Path = save_checkpoint(model, home / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.resize_token_embeddings(VOCABULARY + ADDED, mean_resizing=False)
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
    written = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deltadock.compression.distillation.STEPS", 3)
        for name, method in METHODS.items():
            written[name] = home / f"{name}.delta"
            options = CompressOptions(name)
            tuned = home / ("lora" if method.imports_adapter else "tuned")
            compress(base, tuned, written[name], options, calibration=[Source(text)])
    return written


def test_every_method_in_one_batch_has_the_logits_of_its_merged_checkpoint(
    base: Path, home: Path, artifacts: dict[str, Path], tokenizer: Tokenizer
) -> None:
    manifest = scan_folder(base)
    limits = DeltaLimits(slots=len(artifacts) + 1, rows=1024)
    model = load_base(base, manifest, torch.device("cpu"), limits)
    references: list[Any] = [None]
    for slot, (name, path) in enumerate(artifacts.items(), 1):
        with Artifact(path) as artifact:
            files = read_tokenizer_files(base)
            loaded = read_delta(artifact, model, manifest.weights_digest, files)
        place_delta(model, slot, loaded)
        merge(base, path, home / f"merged-{name}")
        references.append(home / f"merged-{name}")
    references[0] = base
    vocabularies = [model.vocabulary(slot) for slot in range(len(references))]
    assert vocabularies == [
        VOCABULARY + (0 if name in ("base", "lora") else ADDED) for name in ("base", *artifacts)
    ]
    sequences = [
        make_sequence(tokenizer, known(prompt, vocabularies[slot]), slot)
        for slot in range(len(references))
        for prompt in PROMPTS
    ]
    for place, sequence in enumerate(sequences):
        sequence.kv_slot = place
    passes = ModelRunner(model, model.make_cache(len(sequences), 64), len(sequences))
    with torch.inference_mode():
        results = [
            passes.logits([ScheduledChunk(item, 0, len(item.tokens)) for item in sequences]).rows()
        ]
        for token in CONTINUED:
            for item in sequences:
                item.tokens += known([token], vocabularies[item.delta_slot])
            work = [
                ScheduledChunk(item, len(item.tokens) - 1, len(item.tokens)) for item in sequences
            ]
            results.append(passes.logits(work).rows())
    logits = [torch.stack(steps) for steps in zip(*results, strict=True)]
    for slot, folder in enumerate(references):
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for item, own in zip(sequences, logits, strict=True):
            if item.delta_slot == slot:
                check(reference, item.tokens, own)
    bare = torch.stack(logits[: len(PROMPTS)])
    for slot, name in enumerate(artifacts, 1):
        own = torch.stack(logits[slot * len(PROMPTS) :][: len(PROMPTS)])[..., :VOCABULARY]
        assert (own - bare).abs().max() > 1e-2, f"{name} changes nothing"


def check(reference: Any, tokens: list[int], logits: torch.Tensor) -> None:
    with torch.inference_mode():
        expected = reference(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(logits, expected[-len(logits) :], rtol=1e-4, atol=1e-4)
