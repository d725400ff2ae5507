"""Train the sample pair: a small language model and a full fine-tune on exercises.

The base is trained on text from the Python installation (`corpus.py`), the fine-tune on generated
exercises (`exercises.py`). Both train in float32 and are saved in bfloat16.
"""

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from corpus import SEED, split_corpus
from evaluate import load, report
from exercises import Exercise, exercise_stream, take_bytes
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 1_536
EXERCISES, HELD_OUT_BYTES, CALIBRATION_BYTES = 300, 30_000, 100_000
BASE_STEPS, BASE_ROWS, BASE_LENGTH, BASE_RATE = 800, 8, 128, 2e-3
FINETUNE_STEPS, FINETUNE_ROWS, FINETUNE_LENGTH, FINETUNE_RATE = 1_600, 16, 64, 1e-3
QUESTION_WEIGHT = 0.1
"""Loss weight of the questions in the fine-tune: they are random and cannot be predicted."""
CHECKPOINT_STEPS = 200
CHAT_TEMPLATE = """\
{#- One exercise at a time: what was asked before is not part of the prompt. -#}
{%- set prompt = namespace(text='') -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}
    {%- set prompt.text = 'Q: ' ~ message.content.strip().removesuffix('=').strip() ~ ' =\\nA:' -%}
  {%- elif message.role == 'assistant' -%}
    {%- set prompt.text = prompt.text ~ ' ' ~ message.content.strip() ~ '\\n' -%}
  {%- else -%}
    {{- raise_exception('The sample fine-tune reads messages of user and assistant alone.') -}}
  {%- endif -%}
{%- endfor -%}
{{- prompt.text -}}
"""
"""Makes a user's message an exercise of the form that the fine-tune learned."""

Batch = tuple[Tensor, Tensor]
"""Token ids and each token's weight in the loss, both [rows, length]."""


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that splits text as Qwen2's, with single digits.

    `AutoTokenizer` gives every Qwen2 model that splitting, whatever its tokenizer.json says.
    """
    tokenizer = Tokenizer(BPE())
    qwen2 = Qwen2Tokenizer().backend_tokenizer
    tokenizer.normalizer = qwen2.normalizer
    tokenizer.pre_tokenizer = qwen2.pre_tokenizer
    tokenizer.decoder = qwen2.decoder
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=512,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """Return a randomly initialised model of 2.75 million parameters."""
    end = tokenizer.eos_token_id
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=BASE_LENGTH,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return Qwen2ForCausalLM(config)


def corpus_batches(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Iterator[Batch]:
    """Yield windows of the documents, [BASE_ROWS, BASE_LENGTH], in a new order every epoch."""
    ids: list[int] = []
    for encoded in tokenizer(documents, verbose=False)["input_ids"]:
        ids += [*encoded, tokenizer.eos_token_id]
    tokens = torch.tensor(ids)
    print(f"corpus: {sum(map(len, documents)):,} characters, {len(tokens):,} tokens", flush=True)
    while True:
        shifted = tokens[int(torch.randint(BASE_LENGTH, ())) :]
        windows = shifted[: len(shifted) // BASE_LENGTH * BASE_LENGTH].view(-1, BASE_LENGTH)
        order = torch.randperm(len(windows))
        for rows in order[: len(order) // BASE_ROWS * BASE_ROWS].view(-1, BASE_ROWS):
            yield windows[rows], torch.ones(BASE_ROWS, BASE_LENGTH)


def exercise_batches(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, excluded: set[tuple[str, ...]]
) -> Iterator[Batch]:
    """Yield rows of new exercises, [FINETUNE_ROWS, FINETUNE_LENGTH], each from a question on."""
    stream = exercise_stream(rng, excluded)
    question, answer = tokenizer.convert_tokens_to_ids(["Q", "A"])
    while True:
        texts = [
            "".join(exercise.text for exercise in take_bytes(stream, 3 * FINETUNE_LENGTH))
            for _ in range(FINETUNE_ROWS)
        ]
        ids = torch.tensor([row[:FINETUNE_LENGTH] for row in tokenizer(texts)["input_ids"]])
        answering = (ids == answer).cumsum(1) == (ids == question).cumsum(1)
        yield ids, torch.where(answering, 1.0, QUESTION_WEIGHT)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the learning rate: linear warm-up, then cosine decay to a hundredth of the peak."""
    warm_up = min(100, steps // 5 + 1)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    model: PreTrainedModel,
    batches: Iterator[Batch],
    steps: int,
    peak: float,
    checkpoint: Callable[[], None],
) -> None:
    """Train all parameters with AdamW on next-token prediction; calls `checkpoint` regularly."""
    model.train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    began = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        ids, weights = next(batches)
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        losses = cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            seconds = time.monotonic() - began
            print(f"step {step + 1}/{steps}, loss {loss.item():.3f}, {seconds:.0f} s", flush=True)
        if (step + 1) % CHECKPOINT_STEPS == 0 or step + 1 == steps:
            checkpoint()


def save(model: PreTrainedModel, folder: Path) -> None:
    """Save the model in bfloat16 as a Hugging Face folder."""
    copy = type(model)(model.config).bfloat16()
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    copy.save_pretrained(folder)


def save_finetuned(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Save the fine-tune, ready for chat: greedily, an answer is one line."""
    ends = [tokenizer.eos_token_id, *tokenizer.encode("\n")]
    model.generation_config.update(eos_token_id=ends, do_sample=False)
    save(model, folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def write_texts(out: Path, rng: random.Random) -> set[tuple[str, ...]]:
    """Write the exercises and the texts; return the keys to exclude from training."""
    stream, drawn = exercise_stream(rng), dict[tuple[str, ...], Exercise]()
    while len(drawn) < EXERCISES:
        exercise = next(stream)
        drawn[exercise.key] = exercise
    held_out = take_bytes(exercise_stream(rng, drawn), HELD_OUT_BYTES)
    excluded = {*drawn, *(exercise.key for exercise in held_out)}
    calibration = take_bytes(exercise_stream(rng, excluded), CALIBRATION_BYTES)
    lines = [json.dumps({"prompt": e.prompt, "answer": e.answer}) + "\n" for e in drawn.values()]
    texts = {
        "exercises.jsonl": "".join(lines),
        "heldout.txt": "".join(exercise.text for exercise in held_out),
        "calibration.txt": "".join(exercise.text for exercise in calibration),
    }
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    return excluded


def main() -> None:
    """Write texts and exercises, then train and evaluate both models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="output folder")
    parser.add_argument("--keep-base", action="store_true", help="fine-tune the existing OUT/base")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run: one step each, no evaluation"
    )
    arguments = parser.parse_args()
    out: Path = arguments.out
    base, finetuned = out / "base", out / "finetuned"
    for folder in (base, finetuned):
        folder.mkdir(parents=True, exist_ok=True)
    base_steps, finetune_steps = (1, 1) if arguments.quick else (BASE_STEPS, FINETUNE_STEPS)
    torch.manual_seed(SEED)
    rng = random.Random(SEED)

    documents, _ = split_corpus(limit=50 if arguments.quick else None)
    excluded = write_texts(out, rng)
    if not arguments.keep_base:
        new_tokenizer = train_tokenizer(documents)
        new_tokenizer.save_pretrained(base)
        new = new_model(new_tokenizer)
        batches = corpus_batches(new_tokenizer, documents)
        train(new, batches, base_steps, BASE_RATE, lambda: save(new, base))
        if not arguments.quick:
            report(base, out, [torch.bfloat16])
    for path in base.glob("tokenizer*.json"):
        shutil.copy(path, finetuned)
    model, tokenizer = load(base, torch.float32)
    batches = exercise_batches(tokenizer, rng, excluded)
    train(
        model,
        batches,
        finetune_steps,
        FINETUNE_RATE,
        lambda: save_finetuned(model, tokenizer, finetuned),
    )
    if not arguments.quick:
        report(finetuned, out, [torch.bfloat16])


if __name__ == "__main__":
    main()
