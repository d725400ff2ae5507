"""Further fine-tunes of the sample base, trained on Python's standard library, to measure methods.

    python -m benchmarks.pairs --out DIR [code] [mild] [embeddings]

Each pair is a folder with `base`, `finetuned`, `calibration.txt` and `heldout.txt`; training,
calibration and held-out text come from disjoint modules of the standard library. The text is that
of the running interpreter; everything else depends only on the seed.
"""

import argparse
import ast
import random
import shutil
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import AutoModelForCausalLM

from deltadock.artifacts.tokenizers import open_tokenizer

SAMPLE_BASE: Final = Path(__file__).parents[1] / "samples" / "base"
SEED: Final = 2_025
DOCUMENTED: Final = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
SKIPPED: Final = {"site-packages", "dist-packages", "test", "tests", "pydoc_data", "idlelib"}
LONGEST_MODULE: Final = 12_000
"""Characters taken from one module, so that a few long ones do not fill a text."""
HELD_OUT_CHARACTERS: Final = 60_000
CALIBRATION_CHARACTERS: Final = 250_000
QUICK_MODULES: Final = 60
ROWS: Final = 8
LENGTH: Final = 128


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a pair's fine-tune is trained.

    Attributes:
        steps: AdamW steps.
        rate: peak learning rate, with linear warm-up over a tenth of the steps, then linear decay.
        embedding_rate: peak learning rate of the embedding.
        decay: weight decay of the matrices.
        about: purpose of the pair.
    """

    steps: int
    rate: float
    embedding_rate: float
    decay: float
    about: str


def code_of(tree: ast.Module) -> str:
    """The module's code without its docstrings, as the sample base was trained on those."""
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body[:1] = [ast.Pass()] if len(node.body) == 1 else []
    return ast.unparse(tree)


def docstrings_of(tree: ast.Module) -> str:
    """The module's docstrings, the kind of text that the sample base was trained on."""
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, DOCUMENTED))
    return "\n\n".join(text for text in found if text)


def standard_library(text_of: Callable[[ast.Module], str]) -> Iterator[str]:
    """One text per module of the running interpreter's standard library, ordered by path."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if SKIPPED.intersection(path.relative_to(library).parts):
            continue
        try:
            text = text_of(ast.parse(path.read_text(encoding="utf-8")))
        except (SyntaxError, UnicodeDecodeError):
            continue
        if len(text) > 200:
            yield text[:LONGEST_MODULE] + "\n\n"


RECIPES: Final = {
    "code": Recipe(350, 1e-3, 1e-3, 0.0, "language modelling on another kind of text"),
    "mild": Recipe(60, 2e-4, 2e-4, 0.0, "a little more of the base's own text"),
    "embeddings": Recipe(350, 5e-4, 5e-3, 0.3, "every embedding row moved far"),
}
TEXTS: Final = {"code": code_of, "mild": docstrings_of, "embeddings": code_of}
"""What each pair is trained on: extracts the text from a module."""


@cache
def split_modules(
    text_of: Callable[[ast.Module], str], limit: int | None = None
) -> tuple[list[str], list[str], list[str]]:
    """Split the first `limit` modules' texts into training, calibration and held-out."""
    modules = sorted(set(islice(standard_library(text_of), limit)))
    random.Random(SEED).shuffle(modules)
    parts = []
    for size in (HELD_OUT_CHARACTERS, CALIBRATION_CHARACTERS):
        taken: list[str] = []
        while modules and sum(map(len, taken)) < size:
            taken.append(modules.pop())
        parts.append(taken)
    held_out, calibration = parts
    return modules, calibration, held_out


def windows(tokenizer: object, text: str, length: int = LENGTH) -> Tensor:
    """The text's tokens in windows, (n, length) int64."""
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])  # type: ignore[operator]
    return tokens[: len(tokens) // length * length].view(-1, length)


def train(
    model: torch.nn.Module,
    data: Tensor,
    recipe: Recipe,
    steps: int,
    rows: int = ROWS,
    *,
    bf16: bool = False,
) -> None:
    """Train every parameter on next-token prediction, `rows` windows of `data` a step.

    The model is float32, on the device of `data`; `bf16` computes its products in bf16.
    """
    embedding = [p for name, p in model.named_parameters() if "embed_tokens" in name]
    known = {id(p) for p in embedding}
    matrices = [p for p in model.parameters() if p.ndim > 1 and id(p) not in known]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": embedding, "weight_decay": recipe.decay, "peak": recipe.embedding_rate},
        {"params": matrices, "weight_decay": recipe.decay, "peak": recipe.rate},
        {"params": vectors, "weight_decay": 0.0, "peak": recipe.rate},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(SEED)
    warm_up = max(1, steps // 10)
    for step in range(steps):
        share = min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
        batch = data[torch.randint(len(data), (rows,), generator=generator)]
        with torch.autocast(data.device.type, torch.bfloat16, enabled=bf16):
            logits = model(batch).logits[:, :-1].flatten(0, 1)
        loss = cross_entropy(logits.float(), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"  step {step + 1}/{steps}, loss {loss.item():.3f}", flush=True)


@torch.inference_mode()
def divergence(finetuned: torch.nn.Module, base: torch.nn.Module, data: Tensor) -> float:
    """KL(fine-tuned || base) in nats per token over windows (n, LENGTH)."""
    total = 0.0
    for rows in torch.split(data, 16):
        target, other = (log_softmax(m(rows).logits.float(), dim=-1) for m in (finetuned, base))
        total += float(kl_div(other, target, reduction="sum", log_target=True))
    return total / data.numel()


def make(name: str, out: Path, base: Path, quick: bool) -> None:
    """Write the pair `name` to `out`/`name` and print its figures."""
    recipe = RECIPES[name]
    folder = out / name
    tuned = folder / "finetuned"
    tuned.mkdir(parents=True, exist_ok=True)
    shutil.copytree(base, folder / "base", dirs_exist_ok=True)
    training, calibration, held_out = map(
        "".join, split_modules(TEXTS[name], QUICK_MODULES if quick else None)
    )
    (folder / "calibration.txt").write_text(calibration, encoding="utf-8")
    (folder / "heldout.txt").write_text(held_out, encoding="utf-8")
    tokenizer = open_tokenizer(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    started = time.monotonic()
    data = windows(tokenizer, training)
    model.train()
    train(model, data, recipe, 2 if quick else recipe.steps)
    model.to(torch.bfloat16).save_pretrained(tuned)
    for path in base.glob("tokenizer*.json"):
        shutil.copy(path, tuned)
    seconds = time.monotonic() - started
    tuned_model, base_model = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (tuned, base)
    )
    after, before = (m.get_input_embeddings().weight for m in (tuned_model, base_model))
    moved = ((after - before).norm(dim=1) / before.norm(dim=1)).detach()
    rows = windows(tokenizer, held_out)
    kl = divergence(tuned_model, base_model, rows[:4] if quick else rows)
    print(
        f"{name} ({recipe.about}): KL of the base {kl:.4f} nats per token on heldout.txt; "
        f"embedding rows moved by {moved.min():.2f} to {moved.max():.2f} of their norm, median "
        f"{moved.median():.2f}; {seconds:.0f} s",
        flush=True,
    )


def main() -> None:
    """Write the named pairs, by default all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(RECIPES))
    parser.add_argument("--out", type=Path, required=True, help="folder to write the pairs into")
    parser.add_argument("--base", type=Path, default=SAMPLE_BASE, help="the checkpoint to tune")
    parser.add_argument("--quick", action="store_true", help="a smoke run of two steps")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - RECIPES.keys()
    if unknown:
        parser.error(f"no pair {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}")
    torch.set_num_threads(1)
    for name in arguments.names or RECIPES:
        make(name, arguments.out, arguments.base, arguments.quick)


if __name__ == "__main__":
    main()
