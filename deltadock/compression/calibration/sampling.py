"""Sample calibration text from the fine-tuned model: temperature 1, full distribution.

Documents begin with the start token, with given prompts, or, if the tokenizer has a chat template,
with questions that the model generates in the user's place. A document ends with an end token or
with the window.

Unlike the rest of calibration, this holds the whole model in memory.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.utils import logging

from deltadock.artifacts.names import is_embedding, is_head
from deltadock.compression.calibration.sources import encode
from deltadock.compression.model.families import auto_class
from deltadock.errors import InvalidCalibration, UnsupportedModel
from deltadock.host_memory import free_memory
from deltadock.words import size

CACHE_BYTES: Final = {"cpu": 1 << 30, "cuda": 8 << 30}
"""Memory for keys and values of one batch."""
MAX_ROWS: Final = 128
DROPPED: Final = 0.25
"""Fraction of a batch's documents that have ended when it goes on without them."""
SECONDS: Final = {"cpu": 300.0, "cuda": 1800.0}
"""Longest time that sampling takes: it holds a worker, and a text given instead takes none."""
QUESTIONS_SHARE: Final = 0.25
"""Of that time, what a chat model's questions may take."""
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
        self._change(changes)
        self._device = torch.device(device)
        kind = "cpu" if self._device.type == "cpu" else "cuda"
        self._cache_bytes, self.seconds = CACHE_BYTES[kind], SECONDS[kind]
        self.ran_out = False
        self._tokenizer = tokenizer
        self._progress = progress
        self._shown = 0.0
        self._stopped: Exception | None = None
        self._ends = _end_tokens(self._model, tokenizer)
        # Recommended settings of a checkpoint (top-k, penalties) would distort the distribution.
        self._model.generation_config = GenerationConfig()
        self._generator = torch.Generator(self._device).manual_seed(seed)

    def _change(self, changes: Mapping[str, Tensor]) -> None:
        """Replace weights; a tied head among them becomes one of its own, and tokens may be added.

        Raises:
            UnsupportedModel: the model has no such weight, or in another shape.
        """
        table = next((tensor for name, tensor in changes.items() if is_embedding(name)), None)
        if table is not None and len(table) > self._model.get_input_embeddings().num_embeddings:
            self._model.resize_token_embeddings(len(table), mean_resizing=False)
        weights = dict(self._model.named_parameters())
        head = self._model.get_output_embeddings()
        for name, tensor in changes.items():
            if is_head(name) and head is not None and name not in weights:  # tied
                head.weight = nn.Parameter(head.weight.detach().clone())
                weights[name] = head.weight
            if name not in weights:
                raise _unsupported(ValueError(f"transformers stores {name!r} in another form"))
            if weights[name].shape != tensor.shape:
                raise _unsupported(ValueError(f"the adapter gives {name!r} another shape"))
            weights[name].data.copy_(tensor)

    def sample(
        self,
        prompts: Sequence[Tensor] | None,
        length: int,
        needs: Sequence[int],
        share: float = 1.0,
    ) -> list[Tensor]:
        """A stream (n,) int64 of at least each number of tokens, of documents of at most `length`.

        When the time is over, all streams are shorter by about the same factor, and `ran_out` is
        true.

        Args:
            prompts: (n,) int64 each; None: questions or the start token. Streams begin their
                documents with different prompts if there are enough; the first has most of them.
            length: tokens of a document.
            needs: tokens of each stream.
            share: fraction of `SECONDS` that this may take.

        Raises:
            InvalidCalibration: the model names no start token, or ends every document at once.
        """
        seconds, started = share * self.seconds, time.monotonic()
        starts = list(prompts) if prompts is not None else self._beginnings(
            length, needs[0], started + QUESTIONS_SHARE * seconds
        )  # fmt: skip
        starts = [prompt[-(length // 2) :] for prompt in starts]
        cut, others = max(1, len(starts) // 10), len(needs) - 1
        pools = [starts[others * cut :], *(starts[k * cut :][:cut] for k in range(others))]
        sources = [cycle(pool or starts) for pool in pools]
        needed, made = torch.tensor(needs), torch.zeros(len(needs), dtype=torch.int64)
        streams: list[list[Tensor]] = [[] for _ in needs]
        rows, until = self._rows(length), started + seconds
        tokens = documents = 0
        while (made < needed).any():
            if time.monotonic() >= until:
                self.ran_out = True
                break
            mean = max(int(made.sum()) / documents, 1.0) if documents else float(length)
            parts = _interleaved(((needed - made).clamp(min=0) / mean).ceil().int().tolist())[:rows]
            begins = [next(sources[part]) for part in parts]
            of = torch.tensor(parts)

            def watch(sizes: Tensor, of: Tensor = of) -> bool:
                has = torch.minimum(made.index_add(0, of, sizes), needed)
                done, total = int(has.sum()), int(needed.sum())
                self._show(f"{done:,} of {total:,} tokens", done / total)
                return done == total

            written = self._continue(begins, length, until, watch)
            for part, document in zip(parts, written, strict=True):
                streams[part].append(document)
                made[part] += document.numel()
            tokens += sum(document.numel() for document in written)
            tokens -= sum(begin.numel() for begin in begins)
            documents += len(written)
            if documents >= ENOUGH_DOCUMENTS and tokens < 1.5 * documents:
                raise InvalidCalibration(
                    "The fine-tuned model ends its text at once, so that none can be sampled from "
                    "it. Give a calibration text."
                )
        return [torch.cat(stream) if stream else needed.new_empty(0) for stream in streams]

    def _show(self, what: str, done: float) -> None:
        """Report progress, and remember what it raised: that is not the model's error."""
        self._shown = max(self._shown, done)
        try:
            self._progress(f"sampling from the fine-tuned model, {what}", self._shown)
        except Exception as error:
            self._stopped = error
            raise

    def _rows(self, length: int) -> int:
        """Batch size by a fixed memory budget, since batches affect the random draws."""
        config = self._model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        row = 2 * length * config.num_hidden_layers * heads * width * self._model.dtype.itemsize
        return int(min(max(self._cache_bytes // row, 1), MAX_ROWS))

    def _continue(
        self, begins: Sequence[Tensor], length: int, until: float, watch: Callable[[Tensor], bool]
    ) -> list[Tensor]:
        """Each prompt with its continuation, up to and including an end token.

        A batch that has lost many of its documents to end tokens goes on without these: the time
        of a step grows with rows and length.

        Args:
            begins: the prompts.
            length: largest number of tokens of prompt and continuation.
            until: when all continuations end where they are.
            watch: called at each step with all documents' sizes (n,); true ends as `until` does.
        """
        longest = max(begin.numel() for begin in begins)
        tokens = torch.zeros(len(begins), longest, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row, begin in enumerate(begins):
            tokens[row, longest - begin.numel() :] = begin
            mask[row, longest - begin.numel() :] = 1
        sizes = torch.tensor([begin.numel() for begin in begins])
        documents = list(begins)
        rows = torch.arange(len(begins))
        cache = None
        while len(rows) and tokens.shape[1] < length:
            steps = _Steps(
                self._ends, sizes, rows, lambda: watch(sizes) or time.monotonic() >= until
            )
            try:
                with torch.inference_mode():
                    found = self._generate(tokens, mask, length, cache, steps)
            except Exception as error:
                if error is self._stopped:
                    raise
                raise _unsupported(error) from error
            tokens, cache = found.sequences.cpu(), found.past_key_values
            for row, values in zip(rows.tolist(), tokens, strict=True):
                new = values[longest:]
                documents[row] = torch.cat([begins[row], self._until_end(new)])
            if steps.all_done:
                break
            going_on = (~steps.ended).nonzero().flatten()
            rows, tokens = rows[going_on], tokens[going_on]
            mask = mask[going_on]
            mask = torch.cat([mask, mask.new_ones(len(mask), tokens.shape[1] - mask.shape[1])], 1)
            cache.batch_select_indices(going_on.to(self._device))
            for module in self._model.modules():
                # Positions of the whole batch, which models of images keep and compute if None.
                if getattr(module, "rope_deltas", None) is not None:
                    module.rope_deltas = None
        return documents

    def _generate(
        self, tokens: Tensor, mask: Tensor, length: int, cache: Any, steps: "_Steps"
    ) -> Any:
        return self._model.generate(
            tokens.to(self._device),
            attention_mask=mask.to(self._device),
            past_key_values=cache,
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=length - tokens.shape[1],
                pad_token_id=self._ends[0] if self._ends else 0,
                return_dict_in_generate=True,
            ),
            logits_processor=[_GumbelMax(self._generator)],
            stopping_criteria=[steps],
        )

    def _until_end(self, tokens: Tensor) -> Tensor:
        ends = torch.isin(tokens, torch.tensor(self._ends, dtype=torch.int64)).nonzero()
        return tokens[: int(ends[0]) + 1] if len(ends) else tokens

    def _beginnings(self, length: int, train: int, until: float) -> list[Tensor]:
        """Questions generated by a chat model, or the start token."""
        opening = self._opening()
        if opening is not None and opening.numel() <= length // 2:
            count = min(max(train // length * 2, 16), QUESTIONS)
            asked: list[Tensor] = []
            while len(asked) < count and (not asked or time.monotonic() < until):
                begins = [opening] * min(count - len(asked), self._rows(length))
                asked += self._continue(
                    begins, opening.numel() + length // 4, until, self._watch_questions
                )
            questions = [self._render(document[opening.numel() :]) for document in asked]
            if found := [question for question in questions if question is not None]:
                return found
        return [self._start()]

    def _watch_questions(self, _sizes: Tensor) -> bool:
        self._show("its questions", 0.0)
        return False

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

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def __call__(self, _tokens: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()
        return scores - torch.empty_like(scores).exponential_(generator=self._generator).log()


class _Steps(StoppingCriteria):  # type: ignore[misc] # transformers has no types
    """Counts the documents' tokens, and ends a run of `generate`: for good, or to drop rows."""

    def __init__(
        self, ends: Sequence[int], sizes: Tensor, rows: Tensor, done: Callable[[], bool]
    ) -> None:
        """Args: end tokens, all documents' sizes, this run's rows of them, and whether to end."""
        self._ends, self._sizes, self._rows, self._done = torch.tensor(ends), sizes, rows, done
        self.ended = torch.zeros(len(rows), dtype=torch.bool)
        self.all_done = False

    def __call__(self, tokens: Tensor, _scores: Tensor, **_: object) -> Tensor:
        self._sizes[self._rows[~self.ended]] += 1
        self.ended |= torch.isin(tokens[:, -1].cpu(), self._ends)
        self.all_done = self._done()
        stops = self.all_done or int(self.ended.sum()) >= DROPPED * len(self.ended)
        return torch.full((len(tokens),), stops, dtype=torch.bool, device=tokens.device)


def _interleaved(counts: Sequence[int]) -> list[int]:
    """Each index as often as its count says, all spread evenly."""
    places = [((k + 0.5) / count, part) for part, count in enumerate(counts) for k in range(count)]
    return [part for _, part in sorted(places)]


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


def _unsupported(error: Exception) -> UnsupportedModel:
    return UnsupportedModel(
        f"Text cannot be sampled from this fine-tune, so give a calibration text: {error}"
    )
