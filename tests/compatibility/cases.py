"""Checkpoints and adapters as people have them, with the model that transformers or PEFT makes.

`docs/compatibility.md` is printed from this table by `python -m tests.compatibility.table`.
"""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Qwen2Config,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from deltadock.errors import (
    ArchitectureMismatch,
    DeltadockError,
    InvalidAdapter,
    InvalidCheckpoint,
    NonFiniteWeights,
    UnsafeFile,
    UnsupportedModel,
)
from tests.compression.conftest import save_tokenizer
from tests.compression.family_cases import CASES as FAMILIES
from tests.compression.family_cases import save as save_family

WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"
PADDED = 260
"""Rows of the embedding; the tokenizer has 256 tokens."""
EMBEDDING = "model.embed_tokens.weight"

TRAINED = ("lora_", "modules_to_save", "ia3", "trainable_tokens_delta")
"""Parts of the names of an adapter's parameters."""

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")

Tensors = dict[str, Tensor]
Rename = Callable[[str], str]


class Made(NamedTuple):
    """A base, a fine-tune or adapter of it, and the model that transformers or PEFT makes."""

    base: Path
    tuned: Path
    model: Any = None
    method: str = "exact"


class Case(NamedTuple):
    """One input; `error` and `words` of its message if it is refused."""

    trainer: str
    given: str
    make: Callable[[Path], Made]
    note: str = ""
    error: type[DeltadockError] | None = None
    words: str = ""
    served: bool = True


def build(*, tied: bool = False, rows: int = PADDED) -> Any:
    """A Qwen2 model of two layers with random weights."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=rows, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def moved(model: Any) -> Any:
    """A fine-tune of the model: every weight has moved."""
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tuned


def pair(home: Path, *, tied: bool = False) -> Made:
    """Both as `save_pretrained` writes them."""
    base = build(tied=tied)
    tuned = moved(base)
    for name, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(home / name)
        save_tokenizer(home / name)
    return Made(home / "base", home / "tuned", tuned)


def rewrite(folder: Path, change: Callable[[Tensors], Tensors], name: str = WEIGHTS) -> None:
    """Save a folder's tensors changed."""
    tensors = change(load_file(folder / name))
    kept = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
    save_file(kept, folder / name, metadata={"format": "pt"})


def without_tokenizer(home: Path) -> Made:
    """A fine-tune whose tokenizer was not saved."""
    made = pair(home)
    for path in made.tuned.glob("tokenizer*"):
        path.unlink()
    return made


def edited(
    *steps: tuple[str, Callable[[Tensors], Tensors]], tied: bool = False
) -> Callable[[Path], Made]:
    """A pair in which the tensors of `base` or `tuned` are changed on disk."""

    def make(home: Path) -> Made:
        made = pair(home, tied=tied)
        for which, change in steps:
            rewrite(home / which, change)
        return made

    return make


def renamed(rename: Rename) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {rename(name): tensor for name, tensor in tensors.items()}


def plus(**added: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, **{k.replace("__", "."): v for k, v in added.items()}}


def with_head(tensors: Tensors) -> Tensors:
    return {**tensors, "lm_head.weight": tensors[EMBEDDING]}


def with_frequencies(tensors: Tensors) -> Tensors:
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    return {**tensors, **{name.format(layer): torch.ones(4) for layer in range(2)}}


def without_prefix(name: str) -> str:
    return name.removeprefix("model.")


def files(write: Callable[[Made], None]) -> Callable[[Path], Made]:
    """A pair with more files."""

    def make(home: Path) -> Made:
        made = pair(home)
        write(made)
        return made

    return make


def sharded(made: Made) -> None:
    """Shards with an index, and a second set of the same weights in another layout."""
    whole = load_file(made.tuned / WEIGHTS)
    (made.tuned / WEIGHTS).unlink()
    made.model.save_pretrained(made.tuned, max_shard_size="20KB")
    junk = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    save_file(junk, made.tuned / "consolidated.safetensors")
    (made.tuned / "original").mkdir()
    save_file(junk, made.tuned / "original" / WEIGHTS)


def leftover_adapter(made: Made) -> None:
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, made.tuned / ADAPTER)


def trainer_files(made: Made) -> None:
    for name in ("trainer_state.json", "all_results.json", "train_results.json", "wandb-a.json"):
        (made.tuned / name).write_text('{"api_key": "secret"}')
    (made.tuned / "training_args.bin").write_bytes(b"\x80\x04")
    inner = made.tuned / "checkpoint-2"
    inner.mkdir()
    save_file({"x": torch.ones(1)}, inner / WEIGHTS)
    (inner / "optimizer.pt").write_bytes(b"\x80\x04")


def configured(**settings: Any) -> Callable[[Path], Made]:
    """A pair whose fine-tune's config.json has other settings, spelled as trainers do."""

    def make(home: Path) -> Made:
        made = pair(home)
        path = made.tuned / "config.json"
        config = json.loads(path.read_text())
        if settings.keys() & {"rope_scaling", "rope_theta"}:
            del config["rope_parameters"]
        path.write_text(json.dumps(config))
        return reloaded(made, **settings)

    return make


def other_head(tensors: Tensors) -> Tensors:
    head = tensors[EMBEDDING] + 0.2 * torch.randn_like(tensors[EMBEDDING])
    return {**tensors, "lm_head.weight": head}


def own_head(*, tied: bool, base_tied: bool) -> Callable[[Path], Made]:
    """A pair whose fine-tune, or both, have a head of their own; `tied`: what its config says."""

    def make(home: Path) -> Made:
        made = pair(home, tied=True)
        rewrite(made.tuned, other_head)
        if not base_tied:
            rewrite(made.base, other_head)
        return reloaded(made, tie_word_embeddings=tied)

    return make


def retied(home: Path) -> Made:
    made = pair(home)
    rewrite(made.tuned, without_head)
    return reloaded(made, tie_word_embeddings=True)


def reconfigured(home: Path, **settings: Any) -> Made:
    """A tied pair with other settings in the fine-tune's config.json."""
    made = pair(home, tied=True)
    path = made.tuned / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return made


def reloaded(made: Made, **settings: Any) -> Made:
    """The pair with other settings in the fine-tune's config.json, as transformers loads it."""
    path = made.tuned / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    model = AutoModelForCausalLM.from_pretrained(made.tuned, dtype=torch.float32)
    return made._replace(model=model.eval())


def nan_rows(row: int) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        tensors[EMBEDDING][row:] = torch.nan
        return tensors

    return change


def nan_row(tensors: Tensors) -> Tensors:
    tensors[EMBEDDING][40] = torch.inf
    return tensors


def nan_padding(home: Path) -> Made:
    """NaN in the rows of the embedding that the tokenizer has no token for."""
    return edited(("tuned", nan_rows(256)))(home)


def lora(
    *, tied: bool = False, stored: bool = False, added: int = 0, wrap: Rename | None = None,
    config: bool = False, kind: Any = LoraConfig, **settings: Any,
) -> Callable[[Path], Made]:  # fmt: skip
    """An adapter with random factors, as PEFT saves it; `stored`: the base has its tied head."""

    def make(home: Path) -> Made:
        model = build(tied=tied)
        model.save_pretrained(home / "base")
        save_tokenizer(home / "base")
        if stored:
            rewrite(home / "base", with_head)
        if added:  # which PEFT notices by the base's config.json
            model = AutoModelForCausalLM.from_pretrained(home / "base")
            model.resize_token_embeddings(PADDED + added, mean_resizing=False)
        return save_adapter(home, model, wrap, config, kind, settings)

    return make


def save_adapter(
    home: Path, model: Any, wrap: Rename | None, config: bool, kind: Any, settings: dict[str, Any]
) -> Made:
    """Save an adapter of `model`; names are changed by `wrap`, and `config` adds a config.json."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(model, kind(task_type="CAUSAL_LM", **settings)).eval()
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if any(part in name for part in TRAINED):
                    parameter.add_(0.1 * torch.randn_like(parameter))
        tuned.save_pretrained(home / "tuned")
    if wrap is not None:
        rewrite(home / "tuned", renamed(wrap), ADAPTER)
    if config:
        model.config.save_pretrained(home / "tuned")
    return Made(home / "base", home / "tuned", tuned, "lora")


def vision_lora(home: Path) -> Made:
    """LoRA on the language part of a Qwen2.5-VL."""
    model = save_family(FAMILIES["qwen2.5-vl"], home / "base").float()
    settings = {"r": 4, "target_modules": r".*language_model.*\.(q_proj|v_proj|up_proj)"}
    return save_adapter(home, model, None, False, LoraConfig, settings)


def text_lora(home: Path) -> Made:
    """LoRA on the text model that `AutoModelForCausalLM` makes of a Qwen3.5 that sees."""
    text = {
        "vocab_size": PADDED, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }  # fmt: skip
    sight = {
        "depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32,
        "out_hidden_size": 32,
    }  # fmt: skip
    whole = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=sight))
    whole.save_pretrained(home / "base")
    save_tokenizer(home / "base")
    rewrite(home / "base", with_mtp)
    model = AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.float32)
    settings = {"r": 4, "target_modules": ["q_proj", "in_proj_qkv", "up_proj"]}
    return save_adapter(home, model, None, False, LoraConfig, settings)


def smaller(*, tied: bool) -> Callable[[Path], Made]:
    """A pair whose fine-tune's vocabulary was resized to its tokenizer's size."""

    def make(home: Path) -> Made:
        made = pair(home, tied=tied)
        tuned = copy.deepcopy(made.model)
        tuned.resize_token_embeddings(256)
        tuned.save_pretrained(made.tuned)
        return made._replace(model=tuned)

    return make


def prediction_layers(*, stored: bool) -> Callable[[Path], Made]:
    """A base with a layer that predicts a further token; `stored`: the fine-tune has it too."""

    def make(home: Path) -> Made:
        model = save_family(FAMILIES["deepseek-v3"], home / "base").float()
        tuned = moved(model)
        tuned.save_pretrained(home / "tuned")
        for name in ("base", "tuned") if stored else ("base",):
            rewrite(home / name, with_prediction_layer)
        return Made(home / "base", home / "tuned", tuned)

    return make


def with_prediction_layer(tensors: Tensors) -> Tensors:
    """A layer past the model's two, with the embedding and the head once more, as DeepSeek's."""
    again = {
        name.replace("layers.1.", "layers.2."): 1.5 * tensor
        for name, tensor in tensors.items()
        if "layers.1." in name
    }
    own = {
        "eh_proj": torch.randn(32, 64), "enorm": torch.ones(32), "embed_tokens": tensors[EMBEDDING],
        "shared_head.head": tensors["lm_head.weight"], "shared_head.norm": torch.ones(32),
    }  # fmt: skip
    return {**tensors, **again, **{f"model.layers.2.{k}.weight": t for k, t in own.items()}}


def with_mtp(tensors: Tensors) -> Tensors:
    """A module that predicts a further token, as Qwen3.5's."""
    own = {"fc": torch.randn(32, 64), "layers.0.mlp.up_proj": torch.randn(48, 32)}
    return {**tensors, **{f"mtp.{k}.weight": t for k, t in own.items()}}


def gpt2_lora(home: Path) -> Made:
    """LoRA on GPT-2's square Conv1D layer and on its head, which is a linear layer."""
    model = save_family(FAMILIES["gpt2"], home / "base").float()
    settings = {"r": 4, "target_modules": ["c_proj", "lm_head"]}
    return save_adapter(home, model, None, False, LoraConfig, settings)


def expert_lora(family: str) -> Callable[[Path], Made]:
    """LoRA on the stacked experts of a mixture, with ranks of their own, and on a projection."""

    def make(home: Path) -> Made:
        model = save_family(FAMILIES[family], home / "base").float()
        settings = {
            "r": 4, "target_modules": ["q_proj"], "rank_pattern": {"experts.down_proj": 3},
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        }  # fmt: skip
        return save_adapter(home, model, None, False, LoraConfig, settings)

    return make


def quantized(method: str, part: str, dtype: torch.dtype = torch.uint8) -> Callable[[Path], Made]:
    """A fine-tune whose up projection is quantized."""

    def make(home: Path) -> Made:
        made = pair(home)
        name = "model.layers.0.mlp.up_proj"

        def change(tensors: Tensors) -> Tensors:
            tensors[f"{name}.weight"] = torch.ones(768, 1).to(dtype)
            return {**tensors, f"{name}.{part}": torch.ones(2)}

        rewrite(made.tuned, change)
        config = json.loads((made.tuned / "config.json").read_text())
        config["quantization_config"] = {"quant_method": method}
        (made.tuned / "config.json").write_text(json.dumps(config))
        return made

    return make


def published_mxfp4(home: Path) -> Made:
    """A fine-tune of gpt-oss whose base is quantized as it is published."""
    return gpt_oss(home, quantize_experts)


def misnamed_mxfp4(home: Path) -> Made:
    """A base of whole experts, as `save_pretrained` writes a model that was dequantized."""
    rename = renamed(lambda name: f"{name}_blocks" if name.endswith(EXPERTS) else name)
    return gpt_oss(home, lambda base: rewrite(base, rename))


def gpt_oss(home: Path, change: Callable[[Path], None]) -> Made:
    """A pair of gpt-oss models, and a change of the base."""
    model = save_family(FAMILIES["gpt-oss"], home / "base").float()
    moved(model).save_pretrained(home / "tuned")
    change(home / "base")
    return Made(home / "base", home / "tuned")


def quantize_experts(folder: Path) -> None:
    """Replace the experts of a gpt-oss checkpoint by random blocks and scales of MXFP4."""

    def change(tensors: Tensors) -> Tensors:
        made = dict(tensors)
        for name in [name for name in tensors if name.endswith(EXPERTS)]:
            experts, h_in, h_out = made.pop(name).shape
            rows = experts, h_out, -(-h_in // 32)
            made[f"{name}_blocks"] = torch.randint(256, (*rows, 16)).to(torch.uint8)
            made[f"{name}_scales"] = torch.randint(120, 124, rows).to(torch.uint8)
        return made

    rewrite(folder, change)
    config = json.loads((folder / "config.json").read_text())
    kept = [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (folder / "config.json").write_text(json.dumps(config))


def only_inner(home: Path) -> Made:
    made = pair(home)
    inner = made.tuned / "checkpoint-20"
    inner.mkdir()
    (made.tuned / WEIGHTS).rename(inner / WEIGHTS)
    return made


def inner_adapter(home: Path) -> Made:
    made = lora(r=4, target_modules=["q_proj"])(home)
    made.tuned.rename(home / "checkpoint-20")
    made.tuned.mkdir()
    (home / "checkpoint-20").rename(made.tuned / "checkpoint-20")
    return made


def only_pickle(made: Made) -> None:
    (made.tuned / WEIGHTS).rename(made.tuned / "pytorch_model.bin")


def only(name: str) -> Callable[[Path], Made]:
    """A pair whose fine-tune has its weights in one file of another format."""

    def write(made: Made) -> None:
        path = made.tuned / name
        path.parent.mkdir(exist_ok=True)
        (made.tuned / WEIGHTS).rename(path)

    return files(write)


def mlx_adapter(made: Made) -> None:
    (made.tuned / WEIGHTS).rename(made.tuned / "adapters.safetensors")
    (made.tuned / "adapter_config.json").write_text('{"fine_tune_type": "lora"}')


def stacked_experts(home: Path) -> Made:
    model = save_family(FAMILIES["qwen3-moe"], home / "base").float()
    moved(model).save_pretrained(home / "tuned", save_original_format=False)
    return Made(home / "base", home / "tuned")


def text_model(home: Path) -> Made:
    save_family(FAMILIES["gemma3-sight"], home / "base")
    save_family(FAMILIES["gemma3"], home / "tuned")
    return Made(home / "base", home / "tuned")


def both(made: Made) -> None:
    leftover_adapter(made)
    (made.tuned / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def lost_shard(made: Made) -> None:
    sharded(made)
    min(made.tuned.glob("model-*.safetensors")).unlink()


def lost_index(made: Made) -> None:
    sharded(made)
    (made.tuned / "model.safetensors.index.json").unlink()


def emptied(tensors: Tensors) -> Tensors:
    return {name: torch.empty(0) if "proj" in name else t for name, t in tensors.items()}


def without_head(tensors: Tensors) -> Tensors:
    del tensors["lm_head.weight"]
    return tensors


TIED: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ('`modules_to_save=["embed_tokens"]`', "the head stays the base's",
     {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    ('`modules_to_save=["lm_head"]`', "the embedding stays the base's",
     {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ("both in `modules_to_save`", "no longer tied",
     {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    ("LoRA on `embed_tokens`", "the head stays the base's",
     {"target_modules": ["embed_tokens", "q_proj"]}),
    ("LoRA on `lm_head`", "the embedding stays the base's",
     {"target_modules": ["lm_head", "q_proj"]}),
    ("LoRA on `embed_tokens` and `lm_head`", "no longer tied",
     {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    ("`modules_to_save` with `ensure_weight_tying`", "still tied",
     {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"],
      "ensure_weight_tying": True}),
    ("LoRA on `embed_tokens` with `ensure_weight_tying`", "still tied",
     {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    ("added tokens", "still tied", {"target_modules": ["q_proj"], "added": 3}),
    ("added tokens, stored head", "still tied",
     {"target_modules": ["q_proj"], "added": 3, "stored": True}),
    ("added tokens, `modules_to_save` of both", "no longer tied",
     {"target_modules": ["q_proj"], "added": 3, "modules_to_save": ["embed_tokens", "lm_head"]}),
    ("added tokens, LoRA on `embed_tokens`", "the head has no LoRA",
     {"target_modules": ["embed_tokens", "q_proj"], "added": 3}),
    ("added tokens, LoRA on `lm_head`", "the embedding has no LoRA",
     {"target_modules": ["lm_head", "q_proj"], "added": 3}),
    ("stored head, `modules_to_save` with `ensure_weight_tying`", "still tied",
     {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "stored": True,
      "ensure_weight_tying": True}),
    ("`trainable_token_indices`", "still tied",
     {"target_modules": ["q_proj"], "trainable_token_indices": [5, 3, 250]}),
    ("stored head, `trainable_token_indices`", "still tied",
     {"target_modules": ["q_proj"], "trainable_token_indices": [5, 3], "stored": True}),
    ("`trainable_token_indices` of the head", "the embedding stays the base's",
     {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [5, 3]}}),
    ("other `trainable_token_indices` of the head", "no longer tied",
     {"target_modules": ["q_proj"],
      "trainable_token_indices": {"embed_tokens": [5, 3, 250], "lm_head": [5, 3]}}),
    ("added tokens, `trainable_token_indices`", "still tied",
     {"target_modules": ["q_proj"], "added": 3,
      "trainable_token_indices": {"embed_tokens": [5, 261, 260]}}),
    ("added tokens, `trainable_token_indices` of the head", "no longer tied",
     {"target_modules": ["q_proj"], "added": 3,
      "trainable_token_indices": {"lm_head": [5, 261, 260]}}),
    ("a smaller vocabulary than the base's", "still tied",
     {"target_modules": ["q_proj"], "added": -4}),
)  # fmt: skip
ROPES: tuple[dict[str, Any], ...] = (
    {"rope_scaling": {"type": "linear", "factor": 4}},
    {"rope_theta": 500.0},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                      "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
)  # fmt: skip
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DEEP = r"(?:model\.)?layers\.[01]+\.(?:self_attn|mlp)\.[a-z]*?q[a-z_]*.*"
DEQUANTIZE = "the message says how to dequantize"
MERGE = "merge it with PEFT's `merge_and_unload` and compress the merged checkpoint"


def wrapped(prefix: str) -> Rename:
    return lambda name: name.replace("layers.0.", f"layers.0.{prefix}")


CASES: tuple[Case, ...] = (
    Case("transformers, TRL, axolotl, Unsloth", "`save_pretrained`, untied", pair),
    Case("transformers, TRL, axolotl, Unsloth", "`save_pretrained`, tied head",
         lambda home: pair(home, tied=True)),
    Case("transformers, TRL", "shards with an index; a second set of weights beside them "
         "(`consolidated.safetensors`, `original/`)", files(sharded),
         "`model.safetensors`, else the index decides, as in `from_pretrained`; the rest is "
         "ignored"),
    Case("transformers", "a leftover `adapter_model.safetensors`", files(leftover_adapter),
         "ignored"),
    Case("transformers, TRL, axolotl", "`trainer_state.json`, `all_results.json`, `wandb` files, "
         "`training_args.bin`, inner `checkpoint-N/`", files(trainer_files),
         "ignored; never part of an artifact"),
    Case("transformers", "a tied head stored only in the base",
         edited(("base", with_head), tied=True), "the embedding is the head"),
    Case("DeepSpeed, Unsloth", "a tied head stored only in the fine-tune",
         edited(("tuned", with_head), tied=True), "left out if it equals the embedding"),
    Case("older transformers", "rotary `inv_freq` buffers in the fine-tune",
         edited(("tuned", with_frequencies)), "computed by the model, not read"),
    Case("older transformers", "rotary `inv_freq` buffers in the base",
         edited(("base", with_frequencies)), "computed by the model, not read"),
    Case("transformers", "a fine-tune saved as `AutoModel`: names without `model.`",
         edited(("tuned", renamed(without_prefix)), tied=True)),
    Case("transformers", "a base saved as `AutoModel`: names without `model.`",
         edited(("base", renamed(without_prefix)), tied=True)),
    Case("torch.compile", "prefix `_orig_mod.`",
         edited(("tuned", renamed(lambda name: f"_orig_mod.{name}")))),
    Case("FSDP", "prefixes `_fsdp_wrapped_module.` and `_checkpoint_wrapped_module.`",
         edited(("tuned", renamed(wrapped("_fsdp_wrapped_module._checkpoint_wrapped_module."))))),
    Case("DDP, DeepSpeed", "prefix `module.`",
         edited(("tuned", renamed(lambda name: f"module.{name}")))),
    *(
        Case("transformers, TRL, axolotl", f"another rotary embedding: `{json.dumps(settings)}`",
             configured(**settings), "the fine-tune's, per delta")
        for settings in ROPES
    ),
    Case("any", "another epsilon of norms: `rms_norm_eps`", configured(rms_norm_eps=0.05),
         "the fine-tune's, per delta"),
    Case("any", "config.json of another version: `rope_scaling` null, `torch_dtype`",
         configured(rope_scaling=None, torch_dtype="bfloat16", _name_or_path="x",
                    use_cache=False, unsloth_version="2025.1"), "need not match"),
    *(
        Case("PEFT", f"a tied head, {given}", lora(r=4, tied=True, **settings),
             f"as in PEFT: {note}")
        for given, note, settings in TIED
    ),
    *(
        Case("any", f"a tied base, a fine-tune with a head of its own (`tie_word_embeddings` "
             f"{tied})",
             own_head(tied=tied, base_tied=True), "the head is its own")
        for tied in (True, False)
    ),
    Case("any", "both with heads of their own, although `tie_word_embeddings` is true",
         own_head(tied=True, base_tied=False), "not tied, as in `from_pretrained`"),
    Case("any", "an untied base, a fine-tune with a tied head that is not stored",
         retied, "the embedding is the head"),
    Case("any", "weights and config.json only", without_tokenizer,
         "the base's tokenizer, if both have as many tokens, with a note in the report"),
    *(
        Case("transformers, TRL, axolotl", f"a smaller vocabulary than the base's, {head}",
             smaller(tied=tied), "the base's rows are kept beyond it, with a note in the report")
        for head, tied in (("untied", False), ("tied head", True))
    ),
    Case("transformers, TRL, axolotl",
         "DeepSeek-V3 or GLM-4.5 without the layers for predicting further tokens",
         prediction_layers(stored=False),
         "merged, the base's are kept, with a note in the report", served=False),
    Case("any", "DeepSeek-V3 or GLM-4.5 with the layers for predicting further tokens",
         prediction_layers(stored=True), "stored exactly; not part of the measured model",
         served=False),
    Case("transformers, TRL, axolotl", "`mtp` layers (Qwen3.5's) that only the base has",
         edited(("base", with_mtp)), "merged, the base's are kept, with a note in the report"),
    Case("any", "`mtp` layers that only the fine-tune has", edited(("tuned", with_mtp)),
         "left out, with a note in the report"),
    Case("any", "NaN in embedding rows past the tokenizer's size", nan_padding,
         "kept as the base's, with a note in the report"),
    Case("any", "NaN in an input embedding, of base and fine-tune alike",
         edited(("base", nan_row), ("tuned", nan_row)),
         "kept as the base's, with a note in the report"),
    Case("PEFT", "LoRA on all projections", lora(r=4, target_modules=PROJECTIONS)),
    Case("PEFT", "rank-stabilized LoRA (`use_rslora`)",
         lora(r=4, use_rslora=True, target_modules=["q_proj"])),
    Case("PEFT", "`rank_pattern` and `alpha_pattern`",
         lora(r=4, target_modules=PROJECTIONS, rank_pattern={DEEP: 2}, alpha_pattern={DEEP: 5}),
         "any regular expression that is matched within two seconds"),
    Case("PEFT", "LoRA on the embedding",
         lora(r=4, target_modules=["embed_tokens", "q_proj"])),
    Case("PEFT", "`modules_to_save`, untied",
         lora(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])),
    Case("PEFT", "added tokens, `modules_to_save` of embedding and head",
         lora(r=4, added=3, target_modules=["q_proj"],
              modules_to_save=["embed_tokens", "lm_head"])),
    Case("PEFT", "added tokens, LoRA on embedding and head with their saved base layers",
         lora(r=4, added=3, target_modules=["embed_tokens", "lm_head", "q_proj"])),
    Case("PEFT, TRL", "rows of the embedding (`trainable_token_indices`)",
         lora(r=4, target_modules=["q_proj"], trainable_token_indices=[3, 250, 5])),
    Case("PEFT, TRL", "added tokens, `trainable_token_indices`, `modules_to_save` of the head",
         lora(r=4, added=3, target_modules=["q_proj"], modules_to_save=["lm_head"],
              trainable_token_indices={"embed_tokens": [5, 260, 261, 262]})),
    Case("PEFT, TRL", "a smaller vocabulary than the base's, `modules_to_save` of both",
         lora(r=4, added=-4, target_modules=["q_proj"],
              modules_to_save=["embed_tokens", "lm_head"]),
         "the base's rows are kept beyond it"),
    Case("axolotl, TRL", "an adapter's folder with a `config.json`",
         lora(r=4, target_modules=["q_proj"], config=True), "an adapter, over REST too"),
    Case("torch.compile with PEFT", "prefix `_orig_mod.`",
         lora(r=4, target_modules=["q_proj"], wrap=lambda name: name.replace(
             "base_model.model.", "base_model.model._orig_mod."))),
    Case("FSDP with PEFT", "prefix `_fsdp_wrapped_module.`",
         lora(r=4, target_modules=["q_proj"], wrap=wrapped("_fsdp_wrapped_module."))),
    Case("PEFT", "LoRA on the language part of Qwen2.5-VL", vision_lora, served=False),
    Case("PEFT", "LoRA on the text model of a Qwen3.5 that sees", text_lora, served=False),
    Case("PEFT", "LoRA on Conv1D layers and the head of GPT-2", gpt2_lora, served=False),
    Case("PEFT", "LoRA on a mixture's experts (`target_parameters`), Qwen3-MoE",
         expert_lora("qwen3-moe"), served=False),
    Case("PEFT", "LoRA on a mixture's experts (`target_parameters`), Mixtral",
         expert_lora("mixtral"), served=False),
    Case("PEFT", "LoRA on a mixture's experts (`target_parameters`), gpt-oss",
         expert_lora("gpt-oss"), served=False),
    Case("bitsandbytes", "4-bit weights",
         quantized("bitsandbytes", "weight.quant_state.bitsandbytes__nf4"), DEQUANTIZE,
         UnsupportedModel, r"quantized \(bitsandbytes\).*dequantize\(\)"),
    Case("GPTQ", "`qweight`", quantized("gptq", "qweight"), DEQUANTIZE,
         UnsupportedModel, r"quantized \(gptq\).*dequantize"),
    Case("AWQ", "`qweight`", quantized("awq", "qweight"), DEQUANTIZE,
         UnsupportedModel, r"quantized \(awq\).*dequantize"),
    Case("FP8", "`weight_scale_inv`", quantized("fp8", "weight_scale_inv", torch.float8_e4m3fn),
         DEQUANTIZE, UnsupportedModel, r"quantized \(fp8\).*dequantize=True"),
    Case("MXFP4", "a base of gpt-oss as it is published", published_mxfp4, DEQUANTIZE,
         UnsupportedModel, r"base's.*quantized \(mxfp4\).*dequantize=True.*original_format=False"),
    Case("transformers", "gpt-oss, dequantized and saved under the names of MXFP4's blocks",
         misnamed_mxfp4, "save with `save_original_format=False`",
         UnsupportedModel, "base's.*dequantized.*original_format=False"),
    Case("compressed-tensors", "`weight_packed`", quantized("compressed-tensors", "weight_packed"),
         DEQUANTIZE, UnsupportedModel, r"quantized \(compressed-tensors\).*dequantize=True"),
    Case("DeepSpeed ZeRO-3", "empty tensors", edited(("tuned", emptied)),
         "save with `stage3_gather_16bit_weights_on_model_save`", InvalidCheckpoint,
         r"is empty.*ZeRO-3.*zero_to_fp32"),
    Case("any", "NaN where tokens use it", edited(("tuned", nan_rows(7))),
         "training has diverged", NonFiniteWeights, "diverged"),
    Case("any", "an untied head that is missing", edited(("tuned", without_head)),
         "transformers would initialise it at random", ArchitectureMismatch, "lacks"),
    Case("any", "a missing head that `tie_word_embeddings: false` asks for, of a tied base",
         lambda home: reconfigured(home, tie_word_embeddings=False),
         "correct the config.json, or save the model again", ArchitectureMismatch,
         "has no head.*at random"),
    Case("any", "another sliding window",
         configured(use_sliding_window=True, sliding_window=4,
                    layer_types=["sliding_attention"] * 2),
         "train with the base's", ArchitectureMismatch, "layer_types = .*sliding"),
    Case("any", "another activation", configured(hidden_act="gelu"), "train with the base's",
         ArchitectureMismatch, "hidden_act = 'gelu'"),
    Case("older transformers", "weights as `pytorch_model.bin` only", files(only_pickle),
         'load with `from_pretrained(FOLDER, dtype="auto")`, save with '
         "`save_pretrained(NEW_FOLDER)`",
         UnsafeFile, r"save_pretrained\(NEW_FOLDER\)"),
    Case("llama.cpp", "GGUF", only("model-Q4_K_M.gguf"), "take what it was made from",
         InvalidCheckpoint, "model-Q4_K_M.gguf.*made from"),
    Case("FSDP", "sharded weights (`.distcp`)", only("pytorch_model_fsdp_0/__0_0.distcp"),
         "run `accelerate merge-weights`", InvalidCheckpoint, "accelerate merge-weights"),
    Case("DeepSpeed", "sharded weights", only("global_step10/mp_rank_00_model_states.pt"),
         "run `zero_to_fp32.py`", InvalidCheckpoint, "zero_to_fp32.py"),
    Case("Mistral", "`consolidated.safetensors` only", only("consolidated.safetensors"),
         "take the files for transformers", InvalidCheckpoint, "as Mistral does"),
    Case("MLX", "an adapter (`adapters.safetensors`)", files(mlx_adapter), "run `mlx_lm.fuse`",
         InvalidCheckpoint, "mlx_lm.fuse"),
    Case("PEFT", "the state_dict of a model with its adapter",
         edited(("tuned", renamed(lambda name: f"base_model.model.{name}"))),
         "save what `merge_and_unload` returns, or the adapter alone", ArchitectureMismatch,
         "merge_and_unload"),
    Case("TRL", "a head for values or classes",
         edited(("tuned", lambda tensors: {**tensors, "v_head.summary.weight": torch.ones(1, 32)})),
         "save the language model alone", ArchitectureMismatch, "language model alone"),
    Case("transformers", "a mixture whose experts are stacked, and the base's not",
         stacked_experts, "save one of them as the other, by `save_original_format`",
         ArchitectureMismatch, "experts.*save_original_format"),
    Case("transformers", "the text model of a base that sees (Gemma 3, Qwen3.5)", text_model,
         "register the text model as the base", ArchitectureMismatch, "text model.*as the base"),
    Case("transformers, PEFT", "a whole model and an adapter in one folder", files(both),
         "keep only one of them", InvalidCheckpoint, "Keep only"),
    Case("transformers, TRL, axolotl", "weights only in inner `checkpoint-N/` folders", only_inner,
         "the message names the last one", InvalidCheckpoint, "checkpoint-20"),
    Case("PEFT", "adapters only in inner `checkpoint-N/` folders", inner_adapter,
         "the message names them", InvalidAdapter, "checkpoint-20"),
    Case("transformers", "a shard of the index is missing", files(lost_shard), "copy it",
         InvalidCheckpoint, "is not there"),
    Case("transformers", "shards without their index", files(lost_index), "copy it",
         InvalidCheckpoint, "index.json.*Copy it"),
    Case("PEFT", "DoRA", lora(r=4, use_dora=True, target_modules=["q_proj"]), MERGE,
         InvalidAdapter, "use_dora.*merge_and_unload"),
    Case("PEFT", "`trainable_token_indices` of a tied embedding whose head has factors",
         lora(r=4, tied=True, target_modules=["lm_head"], trainable_token_indices=[3, 5]),
         "train one of the two: PEFT itself runs and merges different models", InvalidAdapter,
         "tied.*factors.*Train one"),
    Case("PEFT", "IA3 and other kinds",
         lora(kind=IA3Config, target_modules=["k_proj", "down_proj"],
              feedforward_modules=["down_proj"]), MERGE,
         InvalidAdapter, "IA3.*merge_and_unload"),
    Case("PEFT", "PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA: the base's weights change",
         lora(r=4, target_modules=["q_proj"], init_lora_weights="pissa"),
         "save with `path_initial_model_for_weight_conversion`, or merge", InvalidAdapter, "pissa"),
)  # fmt: skip
