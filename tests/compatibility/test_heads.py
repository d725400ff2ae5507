"""Tied and untied heads: every method's delta is one model in node, client, merge and report."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from deltadock.artifacts.export import merge
from deltadock.client.loading import load_delta
from deltadock.compression.options import CompressOptions, Goal, Source
from deltadock.compression.pipeline import compress
from tests.compatibility.cases import (
    PADDED,
    Made,
    configured,
    lora,
    own_head,
    pair,
    reloaded,
    retied,
)
from tests.compatibility.test_cases import TOKENIZED, logits_of, served_logits

ADDED = 3


def grown(home: Path) -> Made:
    """A tied base; the fine-tune has a head of its own and more tokens."""
    made = pair(home, tied=True)
    model = made.model
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.all_tied_weights_keys = {}
    model.resize_token_embeddings(PADDED + ADDED, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight.add_(0.2 * torch.randn_like(model.lm_head.weight))
    model.save_pretrained(made.tuned)
    return reloaded(made)


PAIRS = {
    "tied base, own head, more tokens": grown,
    "tied base, own head": own_head(tied=False, base_tied=True),
    "tied base, own head, config says tied": own_head(tied=True, base_tied=True),
    "both untied, config says tied": own_head(tied=True, base_tied=False),
    "untied base, tied fine-tune": retied,
    "another rotary embedding and epsilon": configured(rope_theta=50.0, rms_norm_eps=0.05),
}
ADAPTERS = {
    "embedding saved": lora(
        r=4, tied=True, target_modules=["q_proj"], modules_to_save=["embed_tokens"]
    ),
    "embedding and head": lora(r=4, tied=True, target_modules=["embed_tokens", "lm_head"]),
}


def kl(target: torch.Tensor, other: torch.Tensor) -> float:
    logs = (F.log_softmax(one[:, :TOKENIZED], dim=-1) for one in (other, target))
    return float(F.kl_div(*logs, reduction="batchmean", log_target=True))


@pytest.mark.parametrize("method", ["exact", "adamix", "optimix"])
@pytest.mark.parametrize("given", PAIRS)
def test_all_agree_on_a_fine_tune(
    given: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltadock.compression.distillation.STEPS", 2)
    check(PAIRS[given](tmp_path), method, tmp_path)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_all_agree_on_an_adapter(adapter: str, tmp_path: Path) -> None:
    check(ADAPTERS[adapter](tmp_path), "lora", tmp_path)


def check(made: Made, method: str, home: Path) -> None:
    text, out = home / "text.txt", home / "a.delta"
    text.write_text("".join(f"{n} squared is {n * n}.\n" for n in range(60)))
    options = CompressOptions(
        method, goal=Goal("bits", 4.0) if method in {"adamix", "optimix"} else None
    )
    report = compress(made.base, made.tuned, out, options, calibration=[Source(text)])
    merge(made.base, out, home / "merged")
    merged = AutoModelForCausalLM.from_pretrained(home / "merged", dtype=torch.float32).eval()
    expected = logits_of(merged)
    base = AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32).eval()
    target, before = logits_of(made.model), logits_of(base)
    for hot in (False, True):
        served = served_logits(made.base, out, merged=hot)
        torch.testing.assert_close(served, expected, rtol=1e-3, atol=2e-4)
    with load_delta(base, out, base=made.base):
        torch.testing.assert_close(logits_of(base), expected, rtol=1e-3, atol=2e-4)
    assert torch.equal(logits_of(base), before)
    assert report.quality is not None
    share = 1e-5 if method in {"exact", "lora"} else 0.6
    assert kl(target, expected) < share * kl(target, before)
    assert report.quality.kl < share * report.quality.kl_base
