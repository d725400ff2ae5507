"""Text that the fine-tuned model writes: from its own distribution, the same for the same seed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from deltadock.compression.calibration.sampling import TextSampler
from deltadock.compression.calibration.sources import encode, load_tokenizer
from deltadock.compression.calibration.windows import load_calibration
from deltadock.compression.options import CalibrationOptions, Source
from deltadock.errors import Cancelled, InvalidCalibration, UnsupportedModel

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


def without_ends(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"bos_token_id": None, "eos_token_id": None}
    (checkpoint / "config.json").write_text(json.dumps(config))


def found_in(tokens: Tensor, text: Tensor) -> bool:
    windows = tokens.unfold(0, text.numel(), 1)
    return bool((windows == text).all(dim=1).any())


def test_the_default_is_text_of_the_models_own(finetuned: Path) -> None:
    shown: list[float] = []
    found = load_calibration(
        [], finetuned, 128, 0, OPTIONS, progress=lambda message, done: shown.append(done)
    )
    assert (found.train.shape, found.held_out.shape) == ((32, 64), (4, 64))
    assert found.train[0, 0] == 0, "documents begin with the start token"
    assert found.sources == [
        {"kind": "sampled", "sha256": None, "weight": 1.0, "tokens": 2048, "held_out": 256}
    ]
    assert shown == sorted(shown)
    assert shown[0] == 0.0
    assert 0.5 < shown[-1] <= 1.0
    assert len(shown) > 64


def test_the_seed_decides_and_nothing_else(finetuned: Path) -> None:
    torch.manual_seed(1)
    first = load_calibration([], finetuned, 128, 0, OPTIONS)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = load_calibration([], finetuned, 128, 0, OPTIONS)
    assert torch.equal(state, torch.get_rng_state())
    assert first.sha256 == again.sha256
    assert load_calibration([], finetuned, 128, 1, OPTIONS).sha256 != first.sha256


def test_windows_are_no_longer_than_the_model_reads(finetuned: Path) -> None:
    options = CalibrationOptions(tokens=2048)
    assert load_calibration([], finetuned, 128, 0, options).train.shape == (16, 128)


def test_tokens_are_drawn_from_the_full_distribution(finetuned: Path) -> None:
    """What the checkpoint recommends for chatting is not asked for."""
    recommend(finetuned, do_sample=True, top_k=1, temperature=0.1)
    without_ends(finetuned)
    begin = torch.tensor([7])
    drawn, _ = sampler(finetuned).sample([begin], 3, 18_000, 3)
    assert (drawn[0::3] == 7).all()
    counts = torch.bincount(drawn[1::3], minlength=256).double()
    model = AutoModelForCausalLM.from_pretrained(finetuned, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = torch.softmax(model(begin[None]).logits[0, -1].double(), dim=-1)
    # Pearson's statistic over tokens that are expected often enough, against its mean and spread.
    often = expected * counts.sum() > 5
    assert often.sum() > 50, "a flat distribution, which top-k would have cut"
    means = expected[often] * counts.sum()
    statistic = float(((counts[often] - means).square() / means).sum())
    freedom = int(often.sum())
    assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5


def test_documents_end_where_the_model_ends_them(finetuned: Path) -> None:
    recommend(finetuned, eos_token_id=list(range(128)))
    tokens, _ = sampler(finetuned).sample([torch.tensor([200])], 64, 4096, 64)
    ends = (tokens < 128).nonzero().flatten()[:-1]
    assert len(ends) > 500
    assert (tokens[ends + 1] == 200).all(), "every end is followed by the next beginning"


def test_a_model_that_says_nothing_is_refused(finetuned: Path) -> None:
    recommend(finetuned, eos_token_id=list(range(256)))
    with pytest.raises(InvalidCalibration, match="ends its text at once"):
        load_calibration([], finetuned, 128, 0, OPTIONS)


def test_prompts_begin_the_text_and_are_not_shared_with_what_is_held_out(
    finetuned: Path, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    prompts = [f"prompt {n:02d}:" for n in range(20)]
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    found = load_calibration([Source(path)], finetuned, 128, 0, OPTIONS)
    assert found.sources[0]["kind"] == "sampled"
    assert found.sources[0]["sha256"] is not None
    tokenizer = load_tokenizer(finetuned)
    train, held = (
        {
            prompt
            for prompt in prompts
            if found_in(windows.flatten(), encode(tokenizer, prompt))
        }
        for windows in (found.train, found.held_out)
    )  # fmt: skip
    assert len(train) > 10
    assert held
    assert not train & held


def test_a_chat_model_asks_itself(finetuned: Path) -> None:
    (finetuned / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    recommend(finetuned, eos_token_id=list(range(64)))
    options = CalibrationOptions(tokens=2048, length=128)
    found = load_calibration([], finetuned, 128, 0, options)
    text = load_tokenizer(finetuned).decode(found.train.flatten())
    assert text.startswith("<user>")
    assert text.count("<user>") == text.count("</><assistant>") > 16
    again = load_calibration([], finetuned, 128, 0, options)
    assert found.sha256 == again.sha256


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "constant", "{{ messages[9] }}"]
)
def test_a_template_without_a_place_for_questions_is_passed_over(
    finetuned: Path, template: str
) -> None:
    (finetuned / "chat_template.jinja").write_text(template)
    assert load_calibration([], finetuned, 128, 0, OPTIONS).train[0, 0] == 0


def test_sampled_text_and_a_file_mix(finetuned: Path, text: Path) -> None:
    found = load_calibration([Source(text), Source(None, 1.0)], finetuned, 128, 0, OPTIONS)
    assert [source["kind"] for source in found.sources] == ["text", "sampled"]
    assert [source["tokens"] for source in found.sources] == [1024, 1024]


def test_sampling_can_be_cancelled(finetuned: Path) -> None:
    def stop(_message: str, done: float) -> None:
        if done > 0.2:
            raise Cancelled("enough")

    with pytest.raises(Cancelled, match="enough"):
        load_calibration([], finetuned, 128, 0, OPTIONS, progress=stop)


def test_a_model_that_cannot_be_sampled_from_is_refused(finetuned: Path) -> None:
    (finetuned / "config.json").write_text('{"model_type": "abacus"}')
    with pytest.raises(UnsupportedModel, match="give a calibration text"):
        load_calibration([], finetuned, 128, 0, OPTIONS)


def test_a_model_without_a_start_token_is_refused(finetuned: Path) -> None:
    without_ends(finetuned)
    (finetuned / "generation_config.json").unlink()
    with pytest.raises(InvalidCalibration, match="no start token"):
        load_calibration([], finetuned, 128, 0, OPTIONS)
