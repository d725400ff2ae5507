"""Text sampled from the fine-tuned model, deterministic in its seed."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LogitsProcessor

from deltadock.compression.calibration import sampling
from deltadock.compression.calibration.sampling import TextSampler
from deltadock.compression.calibration.sources import encode, load_tokenizer
from deltadock.compression.calibration.windows import load_calibration
from deltadock.compression.options import CalibrationOptions, Source
from deltadock.errors import Cancelled, InvalidCalibration, UnsupportedModel
from tests.compression.family_cases import CASES, save

OPTIONS = CalibrationOptions(tokens=2048, length=64)
Pair = tuple[Path, Path]


@pytest.fixture
def finetuned(make_pair: Callable[..., Pair]) -> Path:
    """A random model over 256 bytes whose start and end token is 0."""
    return make_pair(scale=0.2)[1]


def sampler(checkpoint: Path, seed: int = 0) -> TextSampler:
    tokenizer = load_tokenizer(checkpoint)
    return TextSampler(checkpoint, tokenizer, seed, "cpu", lambda message, done: None)


def recommend(checkpoint: Path, **fields: object) -> None:
    (checkpoint / "generation_config.json").write_text(json.dumps(fields))


def remove_end_tokens(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"bos_token_id": None, "eos_token_id": None}
    (checkpoint / "config.json").write_text(json.dumps(config))


def contains(tokens: Tensor, text: Tensor) -> bool:
    windows = tokens.unfold(0, text.numel(), 1)
    return bool((windows == text).all(dim=1).any())


def test_by_default_text_is_sampled_from_the_model(finetuned: Path) -> None:
    shown: list[float] = []
    calibration = load_calibration(
        [], finetuned, 128, 0, OPTIONS, progress=lambda message, done: shown.append(done)
    )
    parts = calibration.train, calibration.choose, calibration.report
    assert [part.shape for part in parts] == [(32, 64), (2, 64), (4, 64)]
    assert calibration.train[0, 0] == 0, "documents begin with the start token"
    assert calibration.sources == [
        {
            "kind": "sampled",
            "sha256": None,
            "weight": 1.0,
            "tokens": 2048,
            "choose": 128,
            "report": 256,
        }
    ]
    assert shown == sorted(shown)
    assert shown[0] == 0.0
    assert 0.5 < shown[-1] <= 1.0
    assert len(shown) > 64


def test_samples_depend_on_the_seed_only(finetuned: Path) -> None:
    torch.manual_seed(1)
    first = load_calibration([], finetuned, 128, 0, OPTIONS)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = load_calibration([], finetuned, 128, 0, OPTIONS)
    assert torch.equal(state, torch.get_rng_state())
    assert first.sha256 == again.sha256
    assert load_calibration([], finetuned, 128, 1, OPTIONS).sha256 != first.sha256


def test_windows_are_limited_to_the_context_length(finetuned: Path) -> None:
    options = CalibrationOptions(tokens=2048)
    assert load_calibration([], finetuned, 128, 0, options).train.shape == (16, 128)


def test_tokens_are_drawn_from_the_full_distribution(finetuned: Path) -> None:
    """The checkpoint's generation config is not applied."""
    recommend(finetuned, do_sample=True, top_k=1, temperature=0.1)
    remove_end_tokens(finetuned)
    begin = torch.tensor([7])
    (drawn,) = sampler(finetuned).sample([begin], 3, [18_000])
    assert (drawn[0::3] == 7).all()
    counts = torch.bincount(drawn[1::3], minlength=256).double()
    model = AutoModelForCausalLM.from_pretrained(finetuned, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = torch.softmax(model(begin[None]).logits[0, -1].double(), dim=-1)
    # Pearson's chi-squared over tokens with an expected count above 5.
    frequent = expected * counts.sum() > 5
    assert frequent.sum() > 50, "the distribution is flat, so that top-k would truncate it"
    means = expected[frequent] * counts.sum()
    statistic = float(((counts[frequent] - means).square() / means).sum())
    freedom = int(frequent.sum())
    assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5


def test_documents_end_at_the_models_end_tokens(finetuned: Path) -> None:
    recommend(finetuned, eos_token_id=list(range(128)))
    tokens, _ = sampler(finetuned).sample([torch.tensor([200])], 64, [4096, 64])
    ends = (tokens < 128).nonzero().flatten()[:-1]
    assert len(ends) > 500
    assert (tokens[ends + 1] == 200).all(), "every end token is followed by a start token"


class Determined(LogitsProcessor):  # type: ignore[misc] # transformers has no types
    """Varied text without a random state: a token's noise depends on the one before it."""

    def __init__(self, _generator: torch.Generator) -> None:
        self._noise = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
        self._noise.fill_diagonal_(-math.inf)  # tied embeddings would repeat one token

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        return scores / scores.std(-1, keepdim=True) + self._noise[tokens[:, -1]]


# Windows that slide, positions by ALiBi, learned, and of images.
@pytest.mark.parametrize(
    "family", ["qwen2", "gemma2", "bloom", "opt", "qwen2.5-vl", "gemma3-sight"]
)
def test_documents_that_end_leave_the_batch_and_change_no_other(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each document is what the model writes for its prompt alone."""
    checkpoint = tmp_path / family
    save(CASES[family], checkpoint)
    recommend(checkpoint, eos_token_id=list(range(64)))
    monkeypatch.setattr(sampling, "_GumbelMax", Determined)
    prompts = [torch.arange(20, 20 + k % 5 + 1) * 7 * k % 192 + 64 for k in range(1, 13)]
    alone = sampler(checkpoint)
    expected = [
        alone._continue([prompt], 40, math.inf, lambda sizes: False)[0] for prompt in prompts
    ]
    rows: list[int] = []
    generate = TextSampler._generate

    def generate_watched(self: TextSampler, tokens: Tensor, *rest: Any) -> Any:
        rows.append(len(tokens))
        return generate(self, tokens, *rest)

    monkeypatch.setattr(TextSampler, "_generate", generate_watched)
    found = sampler(checkpoint)._continue(prompts, 40, math.inf, lambda sizes: False)
    assert rows == sorted(rows, reverse=True)
    assert rows[0] == 12 > rows[-1]
    for document, whole, prompt in zip(found, expected, prompts, strict=True):
        # The longest prompt of a batch decides how many tokens follow.
        assert document.tolist() == whole[: prompt.numel() + 35].tolist()


def test_sampling_that_takes_too_long_ends_with_fewer_tokens(
    finetuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(1_000_000))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(sampling, "SECONDS", {"cpu": 30.0})
    calibration = load_calibration([], finetuned, 128, 0, OPTIONS)
    assert 256 <= calibration.tokens < 2048
    assert calibration.choose.numel()
    assert calibration.report.numel()
    (note,) = calibration.notes
    assert "calibration text in 30 s" in note
    assert "`--calibration`" in note
    assert calibration.from_bytes(calibration.to_bytes()).notes == calibration.notes


def test_a_model_that_samples_too_slowly_asks_for_a_text(
    finetuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "SECONDS", {"cpu": 0.0})
    with pytest.raises(InvalidCalibration, match=r"0 tokens of .* too few to calibrate"):
        load_calibration([], finetuned, 128, 0, OPTIONS)


def test_a_model_that_generates_nothing_is_rejected(finetuned: Path) -> None:
    recommend(finetuned, eos_token_id=list(range(256)))
    with pytest.raises(InvalidCalibration, match="ends its text at once"):
        load_calibration([], finetuned, 128, 0, OPTIONS)


def test_prompts_of_held_out_text_are_not_used_for_training(
    finetuned: Path, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    prompts = [f"prompt {n:02d}:" for n in range(20)]
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    calibration = load_calibration([Source(path)], finetuned, 128, 0, OPTIONS)
    assert calibration.sources[0]["kind"] == "sampled"
    assert calibration.sources[0]["sha256"] is not None
    tokenizer = load_tokenizer(finetuned)
    train, choose, report = (
        {
            prompt
            for prompt in prompts
            if contains(windows.flatten(), encode(tokenizer, prompt))
        }
        for windows in (calibration.train, calibration.choose, calibration.report)
    )  # fmt: skip
    assert len(train) > 10
    assert choose
    assert report
    assert not train & choose | train & report | choose & report


def test_a_chat_model_generates_its_own_questions(finetuned: Path) -> None:
    (finetuned / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    recommend(finetuned, eos_token_id=list(range(64)))
    options = CalibrationOptions(tokens=2048, length=128)
    calibration = load_calibration([], finetuned, 128, 0, options)
    text = load_tokenizer(finetuned).decode(calibration.train.flatten())
    assert text.startswith("<user>")
    assert 16 < text.count("</><assistant>") <= text.count("<user>")
    assert text.count("<user>") - text.count("</><assistant>") <= 1, "the last one is cut"
    again = load_calibration([], finetuned, 128, 0, options)
    assert calibration.sha256 == again.sha256


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "constant", "{{ messages[9] }}"]
)
def test_an_unusable_template_is_ignored(finetuned: Path, template: str) -> None:
    (finetuned / "chat_template.jinja").write_text(template)
    assert load_calibration([], finetuned, 128, 0, OPTIONS).train[0, 0] == 0


def test_sampled_text_and_a_file_are_mixed(finetuned: Path, text: Path) -> None:
    calibration = load_calibration([Source(text), Source(None, 1.0)], finetuned, 128, 0, OPTIONS)
    assert [source["kind"] for source in calibration.sources] == ["text", "sampled"]
    assert [source["tokens"] for source in calibration.sources] == [1024, 1024]


def test_sampling_can_be_cancelled(finetuned: Path) -> None:
    def stop(_message: str, done: float) -> None:
        if done > 0.2:
            raise Cancelled("enough")

    with pytest.raises(Cancelled, match="enough"):
        load_calibration([], finetuned, 128, 0, OPTIONS, progress=stop)


def test_an_unsupported_model_is_rejected(finetuned: Path) -> None:
    (finetuned / "config.json").write_text('{"model_type": "abacus"}')
    with pytest.raises(UnsupportedModel, match="give a calibration text"):
        load_calibration([], finetuned, 128, 0, OPTIONS)


def test_a_model_without_a_start_token_is_rejected(finetuned: Path) -> None:
    remove_end_tokens(finetuned)
    (finetuned / "generation_config.json").unlink()
    with pytest.raises(InvalidCalibration, match="no start token"):
        load_calibration([], finetuned, 128, 0, OPTIONS)
