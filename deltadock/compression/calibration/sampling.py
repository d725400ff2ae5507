"""Sample calibration text from the fine-tuned model: temperature 1, full distribution.

Documents begin with the start token, with given prompts, or, if the tokenizer has a chat template,
with questions that the model generates in the user's place. A document ends with an end token or
with the window.

Unlike the rest of calibration, this holds the whole model in memory.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, LogitsProcessor
from transformers.utils import logging

from deltadock.compression.calibration.sources import encode
from deltadock.compression.model.families import auto_class
from deltadock.errors import InvalidCalibration, UnsupportedModel
from deltadock.host_memory import free_memory
from deltadock.words import size

CACHE_BYTES: Final = {"cpu": 1 << 30, "cuda": 8 << 30}
"""Memory for keys and values of one batch."""
MAX_ROWS: Final = 128
QUESTION: Final = "\N{WHITE MEDIUM STAR}question\N{WHITE MEDIUM STAR}"
"""Placeholder for the user's message in a rendered template."""
QUESTIONS: Final = 256
"""Largest number of questions that a chat model generates."""
ENOUGH_DOCUMENTS: Final = 32
"""Documents after which a mean length of about one token counts as an empty model."""

Watcher = Callable[[str, float], None]
"""Called with a message and the fraction done; whatever it raises ends the calibration."""


class TextSampler:
    """Samples from the model in `checkpoint`; reproducible for one seed, version and machine.

    Each `sample` continues with the random state of the last one.
    """

    def __init__(
        self,
        checkpoint: Path,
        tokenizer: Any,
        seed: int,
        device: str,
        progress: Watcher,
        changes: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """Load the model; `changes` replace weights of the checkpoint.

        Raises:
            UnsupportedModel: `transformers` cannot load or run it, or has no weight of a name and
                shape in `changes`.
        """
        progress("loading the model to sample from", 0.0)
        logging.disable_progress_bar()  # `progress` reports the loading
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        try:
            loader = auto_class(AutoConfig.from_pretrained(checkpoint).model_type)
            self._model = loader.from_pretrained(
                checkpoint,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
            ).to(device)
        except Exception as error:
            raise _unsupported(error) from error
        self._model.eval()
        weights = dict(self._model.named_parameters())
        for name, tensor in changes.items():
            if name not in weights or weights[name].shape != tensor.shape:
                raise _unsupported(ValueError(f"the adapter changes {name!r} in another way"))
            weights[name].data.copy_(tensor)
        self._device = torch.device(device)
        self._tokenizer = tokenizer
        self._progress = progress
        self._shown = 0.0
        self._stopped: Exception | None = None
        self._ends = _end_tokens(self._model, tokenizer)
        # Recommended settings of a checkpoint (top-k, penalties) would distort the distribution.
        self._model.generation_config = GenerationConfig()
        self._generator = torch.Generator(self._device).manual_seed(seed)

    def sample(
        self, prompts: Sequence[Tensor] | None, length: int, needs: Sequence[int]
    ) -> list[Tensor]:
        """A stream (n,) int64 of at least each number of tokens, of documents of at most `length`.

        Args:
            prompts: (n,) int64 each; None: questions or the start token. Streams begin their
                documents with different prompts if there are enough; the first has most of them.
            length: tokens of a document.
            needs: tokens of each stream.

        Raises:
            InvalidCalibration: the model names no start token, or ends every document at once.
        """
        starts = list(prompts) if prompts is not None else self._beginnings(length, needs[0])
        starts = [prompt[-(length // 2) :] for prompt in starts]
        cut, others = max(1, len(starts) // 10), len(needs) - 1
        pools = [starts[others * cut :], *(starts[k * cut :][:cut] for k in range(others))]
        sources = [cycle(pool or starts) for pool in pools]
        made = [0] * len(needs)
        streams: list[list[Tensor]] = [[] for _ in needs]
        rows = self._rows(length)
        tokens = 0
        while any(has < need for has, need in zip(made, needs, strict=True)):
            documents = sum(map(len, streams))
            mean = max(sum(made) / documents, 1.0) if documents else float(length)
            parts = [
                part
                for part in range(len(needs))
                for _ in range(_ceil(max(needs[part] - made[part], 0) / mean))
            ][:rows]
            begins = [next(sources[part]) for part in parts]
            written = self._continue(begins, length, sum(made), sum(needs))
            for part, document in zip(parts, written, strict=True):
                streams[part].append(document)
                made[part] += document.numel()
            tokens += sum(document.numel() for document in written)
            tokens -= sum(begin.numel() for begin in begins)
            documents += len(written)
            if documents >= ENOUGH_DOCUMENTS and tokens < 2 * documents:
                raise InvalidCalibration(
                    "The fine-tuned model ends its text at once, so that none can be sampled from "
                    "it. Give a calibration text."
                )
        return [torch.cat(stream) for stream in streams]

    def _rows(self, length: int) -> int:
        """Batch size by a fixed memory budget, since batches affect the random draws."""
        config = self._model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        row = 2 * length * config.num_hidden_layers * heads * width * self._model.dtype.itemsize
        budget = CACHE_BYTES["cpu" if self._device.type == "cpu" else "cuda"]
        return int(min(max(budget // row, 1), MAX_ROWS))

    def _continue(
        self, begins: Sequence[Tensor], length: int, done: int, total: int
    ) -> list[Tensor]:
        """Each prompt with its continuation, up to and including an end token."""
        longest = max(begin.numel() for begin in begins)
        tokens = torch.zeros(len(begins), longest, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row, begin in enumerate(begins):
            tokens[row, longest - begin.numel() :] = begin
            mask[row, longest - begin.numel() :] = 1

        def watch(steps: int) -> None:
            # Documents that end early reduce the fraction; reported progress only rises.
            share = min((done + steps * len(begins)) / max(total, 1), 1.0)
            self._shown = max(self._shown, share)
            try:
                self._progress("sampling from the fine-tuned model", self._shown)
            except Exception as error:
                self._stopped = error
                raise

        try:
            with torch.inference_mode():
                written = self._model.generate(
                    tokens.to(self._device),
                    attention_mask=mask.to(self._device),
                    generation_config=GenerationConfig(
                        do_sample=False,
                        max_new_tokens=length - longest,
                        eos_token_id=self._ends or None,
                        pad_token_id=self._ends[0] if self._ends else 0,
                    ),
                    logits_processor=[_GumbelMax(self._generator, watch)],
                )
        except Exception as error:
            # An error raised by the progress callback is not the model's.
            if error is self._stopped:
                raise
            raise _unsupported(error) from error
        return [
            torch.cat([begin, self._until_end(row[longest:])])
            for begin, row in zip(begins, written.cpu(), strict=True)
        ]

    def _until_end(self, tokens: Tensor) -> Tensor:
        ends = torch.isin(tokens, torch.tensor(self._ends, dtype=torch.int64)).nonzero()
        return tokens[: int(ends[0]) + 1] if len(ends) else tokens

    def _beginnings(self, length: int, train: int) -> list[Tensor]:
        """Questions generated by a chat model, or the start token."""
        opening = self._opening()
        if opening is not None and opening.numel() <= length // 2:
            count = min(max(train // length * 2, 16), QUESTIONS)
            asked: list[Tensor] = []
            while len(asked) < count:
                begins = [opening] * min(count - len(asked), self._rows(length))
                asked += self._continue(begins, opening.numel() + length // 4, 0, train)
            questions = [self._render(document[opening.numel() :]) for document in asked]
            if found := [question for question in questions if question is not None]:
                return found
        return [self._start()]

    def _opening(self) -> Tensor | None:
        """The chat template's tokens before a user's message; None if there are none."""
        if not self._tokenizer.chat_template:
            return None
        try:
            text = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": QUESTION}], tokenize=False
            )
        except Exception:  # noqa: BLE001 - a template may raise anything; then it is not used
            return None
        before, found, _ = str(text).partition(QUESTION)
        tokens = encode(self._tokenizer, before)
        return tokens if found and tokens.numel() else None

    def _render(self, question: Tensor) -> Tensor | None:
        """The question in the template, up to the model's answer; None if it fails."""
        words = self._tokenizer.decode(question, skip_special_tokens=True).strip()
        if not words:
            return None
        try:
            text = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": words}], tokenize=False, add_generation_prompt=True
            )
        except Exception:  # noqa: BLE001 - as above
            return None
        return encode(self._tokenizer, str(text))

    def _start(self) -> Tensor:
        config = self._model.config.get_text_config()
        candidates = (self._tokenizer.bos_token_id, getattr(config, "bos_token_id", None))
        for token in (*candidates, *self._ends[:1]):
            if isinstance(token, int) and 0 <= token < config.vocab_size:
                return torch.tensor([token])
        raise InvalidCalibration(
            "The fine-tune names no start token to sample from. Give a calibration text, or "
            "prompts."
        )


class _GumbelMax(LogitsProcessor):  # type: ignore[misc] # transformers has no types
    """Samples from the softmax by the Gumbel-max trick, as greedy decoding of perturbed logits.

    `generate` would use torch's global random state; this uses a separate generator.
    """

    def __init__(self, generator: torch.Generator, watch: Callable[[int], None]) -> None:
        self._generator = generator
        self._watch = watch
        self._steps = 0

    def __call__(self, _tokens: Tensor, scores: Tensor) -> Tensor:
        self._steps += 1
        self._watch(self._steps)
        scores = scores.float()
        return scores - torch.empty_like(scores).exponential_(generator=self._generator).log()


def check_fits(parameters: int, device: str) -> None:
    """Check that a whole model fits into free memory, in the dtype it samples in.

    Raises:
        UnsupportedModel: it does not.
    """
    on_cpu = torch.device(device).type == "cpu"
    needed = parameters * (4 if on_cpu else 2)
    free = free_memory() if on_cpu else torch.cuda.mem_get_info(device)[0]
    if needed > free:
        raise _unsupported(
            MemoryError(f"the model takes {size(needed)}, and {size(free)} are free")
        )


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """All end tokens that the checkpoint names, sorted."""
    found: set[int] = set()
    named = (
        tokenizer.eos_token_id,
        model.config.get_text_config().eos_token_id,
        model.generation_config.eos_token_id,
    )
    for tokens in named:
        found.update([tokens] if isinstance(tokens, int) else tokens or [])
    return sorted(found)


def _ceil(value: float) -> int:
    return int(-(-value // 1))


def _unsupported(error: Exception) -> UnsupportedModel:
    return UnsupportedModel(
        f"Text cannot be sampled from this fine-tune, so give a calibration text: {error}"
    )
