"""Small random models and calibration text for the compression tests."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from deltadock.artifacts.reader import Artifact
from deltadock.compression.checkpoints import CheckpointReader, ResizedSource, align
from deltadock.compression.model.forward import BlockwiseModel
from deltadock.compression.quality import MergedSource, base_model, measure
from deltadock.compression.report import Quality

SAMPLES = Path(__file__).parents[2] / "samples"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    # The matrices are too small for a second thread.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    # Benchmarks measure the gain of distillation; tests only run it.
    monkeypatch.setattr("deltadock.compression.distillation.STEPS", 3)


@pytest.fixture(autouse=True)
def _short_texts_vouch(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tests of bounds have little text.
    monkeypatch.setattr("deltadock.compression.confidence.LEAST_TOKENS", 16)


def save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 256 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


class MemoryStore:
    """A block store in memory that counts its hits."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}
        self.hits = 0

    def get(self, key: str) -> bytes | None:
        self.hits += key in self.kept
        return self.kept.get(key)

    def put(self, key: str, data: bytes) -> None:
        self.kept[key] = data


Pair = tuple[Path, Path]


@pytest.fixture(scope="session")
def built_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """Builds each random Qwen2 pair once; `make_pair` returns copies."""

    @cache
    def build(*, tied: bool, scale: float, seed: int) -> Pair:
        folder = tmp_path_factory.mktemp("pair")
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
            tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config).bfloat16()
        base, finetuned = folder / "base", folder / "tuned"
        model.save_pretrained(base)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(scale * torch.randn_like(parameter))
        model.save_pretrained(finetuned)
        for checkpoint in (base, finetuned):
            save_tokenizer(checkpoint)
        return base, finetuned

    return build


@pytest.fixture
def make_pair(tmp_path: Path, built_pair: Callable[..., Pair]) -> Callable[..., Pair]:
    """Returns a random Qwen2 base and a fine-tune in which every tensor differs."""

    def make(*, tied: bool = True, scale: float = 0.02, seed: int = 0) -> Pair:
        built = built_pair(tied=tied, scale=scale, seed=seed)
        base, finetuned = tmp_path / f"base-{tied}-{seed}", tmp_path / f"tuned-{tied}-{seed}"
        for source, copy in zip(built, (base, finetuned), strict=True):
            shutil.copytree(source, copy)
        return base, finetuned

    return make


@pytest.fixture
def pair(make_pair: Callable[..., Pair]) -> Pair:
    return make_pair()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """About 4,000 tokens of calibration text for the byte-level tokenizer."""
    path = tmp_path / "calibration.txt"
    path.write_text("".join(f"{n} squared is {n * n}.\n" for n in range(200)), encoding="utf-8")
    return path


def delta_quality(pair: tuple[Path, Path], delta: Path, windows: Tensor) -> Quality:
    """The figures of a delta file on `windows`."""
    base, finetuned = (CheckpointReader(folder) for folder in pair)
    align(base, finetuned)
    model = BlockwiseModel(pair[1], "cpu", finetuned.entries)
    with Artifact(delta) as artifact:
        return measure(
            model,
            base_model(model, base, finetuned),
            windows,
            base=ResizedSource(base, finetuned.shapes),
            finetuned=finetuned,
            delta=MergedSource(base, artifact, model.device),
        )
