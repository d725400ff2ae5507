"""A decode step of every family by the kernels of the layer loop, against transformers."""

import copy
import os

import pytest
import torch

from deltadock.inference.engine.model_runner import DecodeRow, GraphDecoder
from deltadock.inference.model import attention, decoder, layers
from deltadock.inference.model.attention import Span, make_attention_metadata
from deltadock.inference.model.model import DeltaModel
from deltadock.inference.model.routing import DeltaLimits
from deltadock.kernels.decode_attention import triton as attention_kernels
from deltadock.kernels.decoder import triton as decoder_kernels
from tests.inference.conftest import random_model
from tests.inference.families import CASES

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="the interpreter's; test_interpreter.py runs this in a process of its own",
)
SEQUENCES = [[5, 6, 7, 8, 9, 10, 11], [9, 8, 7, 6, 5, 4, 3]]
"""Longer than the windows."""


@pytest.mark.parametrize("case", CASES)
def test_a_decode_step(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, settings = CASES[case]
    reference = random_model(family, **settings, initializer_range=0.2)
    model = DeltaModel(copy.deepcopy(reference), DeltaLimits(slots=2, rows=16))
    cache, last = model.make_cache(2, 16), len(SEQUENCES[0]) - 1
    prompts = torch.tensor([sequence[:last] for sequence in SEQUENCES]).flatten()
    spans = [Span(slot, slot * last, slot * last + last, 0) for slot in range(len(SEQUENCES))]
    with torch.inference_mode():
        model.forward(prompts, make_attention_metadata(cache, spans), [0] * len(prompts))
        for name in ("gated", "rotate_and_store"):
            monkeypatch.setattr(decoder, name, getattr(decoder_kernels, name))
        for name in ("rms_norm", "add_rms_norm"):
            monkeypatch.setattr(layers, name, getattr(decoder_kernels, name))
        monkeypatch.setattr(attention, "decode_attention", attention_kernels.decode_attention)
        rows = [DecodeRow(tokens[last], last, slot, 0) for slot, tokens in enumerate(SEQUENCES)]
        hidden = GraphDecoder(model, cache, 2).hidden(rows)
        assert hidden is not None
        logits = model.logits(hidden, [0, 0]).values
        expected = reference(torch.tensor(SEQUENCES)).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
