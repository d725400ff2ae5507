"""Artifact sizes at the shapes of Qwen2.5-7B, from the size preview.

    python -m benchmarks.sizes_7b [--bits 1.0]

For every method, with all tensors changed and with only the linear layers of the decoder blocks
changed. No weights are needed: sizes follow from shapes.
"""

import argparse

from deltadock.compression.options import METHODS, Goal
from deltadock.compression.preview import SizePreview, preview_size
from deltadock.compression.shapes import TensorShape

VOCABULARY, HIDDEN, INTERMEDIATE, LAYERS = 152064, 3584, 18944, 28
KEY_VALUE = 4 * HIDDEN // 28
"""4 key/value heads for 28 query heads."""


def qwen2_5_7b(*, only_linear: bool = False) -> list[TensorShape]:
    """Every tensor of the model; with `only_linear`, only the blocks' matrices are changed."""
    block = {
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.q_proj.bias": (HIDDEN,),
        "self_attn.k_proj.weight": (KEY_VALUE, HIDDEN),
        "self_attn.k_proj.bias": (KEY_VALUE,),
        "self_attn.v_proj.weight": (KEY_VALUE, HIDDEN),
        "self_attn.v_proj.bias": (KEY_VALUE,),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
    }
    shapes = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "lm_head.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        **{
            f"model.layers.{layer}.{name}": shape
            for layer in range(LAYERS)
            for name, shape in block.items()
        },
    }
    tensors = [TensorShape(name, "BF16", shape) for name, shape in shapes.items()]
    if not only_linear:
        return tensors
    return [tensor._replace(changed=tensor.role == "linear layers") for tensor in tensors]


def study(bits: float) -> list[tuple[str, bool, SizePreview]]:
    """(method, whether only linear layers changed, preview) for every method."""
    return [
        (method, only_linear, preview_size(qwen2_5_7b(only_linear=only_linear), method, goal))
        for method, info in METHODS.items()
        if not info.imports_adapter
        for goal in [None if info.bits_min is None else Goal("bits", bits)]
        for only_linear in (False, True)
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bits", type=float, default=1.0)
    arguments = parser.parse_args()
    print(f"Qwen2.5-7B's shapes at {arguments.bits:g} bit")
    print(f"{'method':18} {'changed':12} {'artifact':>12} {'ratio':>7} {'true bits':>9}")
    for method, only_linear, size in study(arguments.bits):
        changed = "linear only" if only_linear else "everything"
        megabytes = f"{size.artifact_bytes / 1e6:,.1f} MB"
        print(f"{method:18} {changed:12} {megabytes:>12} {size.ratio:7.2f} {size.true_bits:9.3f}")


if __name__ == "__main__":
    main()
