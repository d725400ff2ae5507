"""Offsets of tokens in the text of a completion."""

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from deltadock.inference.engine.sampler import SampledToken
from deltadock.inference.http.replies import _LogprobsWriter
from deltadock.inference.prompts.tokenizer import Tokenizer
from deltadock.openai.completions import CompletionLogprobs

PIECES = ["<unk>", "\u2581", "a", "b", "\u2581a", "\u2581b"]


@pytest.mark.parametrize("as_tokens", [False, True])
def test_offsets_where_the_first_space_is_dropped(as_tokens: bool) -> None:
    model = models.BPE(
        {piece: number for number, piece in enumerate(PIECES)},
        [("\u2581", "a"), ("\u2581", "b")],
        unk_token="<unk>",
    )
    fast = FastTokenizer(model)
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = Tokenizer({"tokenizer.json": fast.to_str()})
    prompt = tokenizer.encode("ab a")
    writer, scores = _LogprobsWriter(tokenizer, hidden=True), CompletionLogprobs()
    writer.add_prompt(scores, [*map(SampledToken, prompt)], prompt if as_tokens else "ab a")
    writer.add(scores, [SampledToken(5)])
    assert scores.tokens == [" a", "b", " a", " b"]
    assert scores.text_offset == [0, 1, 2, 4]
