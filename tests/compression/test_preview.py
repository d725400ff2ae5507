"""Predicted sizes against real artifacts."""

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from benchmarks.sizes_7b import qwen2_5_7b
from deltadock.artifacts.folder import scan_folder
from deltadock.compression.checkpoints import open_pair
from deltadock.compression.options import (
    METHODS,
    CalibrationOptions,
    CompressOptions,
    Goal,
    Source,
    goal_for,
)
from deltadock.compression.pipeline import compress, pair_shapes
from deltadock.compression.preview import RUNS_PADDING, SIZE_ESTIMATES, carried_bytes, preview_size
from deltadock.compression.scratch import Scratch
from deltadock.compression.session import CompressionSession
from deltadock.compression.shapes import TensorShape, read_shapes, shapes_of
from deltadock.errors import InvalidCheckpoint, InvalidGoal, MalformedSafetensors

Pair = tuple[Path, Path]
SAMPLES = Path(__file__).parents[2] / "samples"
ONE_BIT = Goal("bits", 1.0)


@pytest.mark.parametrize(
    ("name", "shape", "role"),
    [
        ("model.embed_tokens.weight", (100, 8), "embeddings"),
        ("transformer.wte.weight", (100, 8), "embeddings"),
        ("transformer.wpe.weight", (100, 8), "other tensors"),
        ("lm_head.weight", (100, 8), "output head"),
        ("model.layers.3.self_attn.q_proj.weight", (8, 8), "linear layers"),
        ("model.layers.3.self_attn.q_proj.bias", (8,), "other tensors"),
        ("model.layers.3.self_attn.q_norm.weight", (8, 8), "other tensors"),
        ("transformer.h.0.mlp.c_fc.weight", (8, 32), "linear layers"),
        ("model.layers.0.mlp.experts.gate_up_proj", (4, 8, 16), "linear layers"),
        ("model.layers.0.mlp.experts.2.w1.weight", (8, 16), "linear layers"),
        ("model.layers.0.block_sparse_moe.router.weight", (4, 16), "other tensors"),
        ("model.norm.weight", (8,), "other tensors"),
        ("visual.blocks.0.attn.qkv.weight", (24, 8), "other tensors"),
        ("vision_tower.encoder.layers.1.fc1.weight", (24, 8), "other tensors"),
        ("model.patch.conv.weight", (8, 3, 14, 14), "other tensors"),
    ],
)
def test_roles_from_tensor_names(name: str, shape: tuple[int, ...], role: str) -> None:
    assert TensorShape(name, "BF16", shape).role == role
    assert TensorShape(name, "I8", shape).role == "other tensors"


def test_every_method_has_an_estimate() -> None:
    assert SIZE_ESTIMATES.keys() == METHODS.keys()


# The artifact has bitdelta's size; only its scales' values differ. `test_adapters` has an adapter.
METHODS_BY_SIZE = sorted(SIZE_ESTIMATES.keys() - {"bitdelta-distilled", "lora"})


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The sample pair's first layer, with its embeddings."""
    folder = tmp_path_factory.mktemp("samples")
    for name in ("base", "finetuned"):
        shutil.copytree(SAMPLES / name, folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        config |= {"num_hidden_layers": 1, "layer_types": config["layer_types"][:1]}
        (folder / name / "config.json").write_text(json.dumps(config))
        weights = load_file(folder / name / "model.safetensors")
        kept = {key: w for key, w in weights.items() if ".layers." not in key or ".0." in key}
        save_file(kept, folder / name / "model.safetensors", metadata={"format": "pt"})
    return folder / "base", folder / "finetuned"


@pytest.mark.parametrize(
    ("method", "bits"), [*((method, 1.0) for method in METHODS_BY_SIZE), ("adamix", 0.5)]
)
def test_the_preview_is_close_to_the_artifacts_size(
    method: str, bits: float, one_layer: Pair, tmp_path: Path
) -> None:
    """Within 3 %."""
    budget = bits if METHODS[method].bits_min is not None else None
    text = tmp_path / "text.txt"
    text.write_text((SAMPLES / "calibration.txt").read_text()[:4_000])
    goal = goal_for(method, bits=budget)[1]
    options = CompressOptions(method, goal, calibration=CalibrationOptions(tokens=512, length=64))
    with Scratch() as scratch:
        pair = open_pair(*one_layer)
        session = CompressionSession(pair, options, [Source(text)], scratch)
        size = session.draft_bytes(budget)
    before, after = pair.base.manifest, pair.finetuned.manifest
    expected = preview_size(
        shapes_of(after, before), method, goal, carried=carried_bytes(after, before)
    )
    assert expected.artifact_bytes == pytest.approx(size, rel=0.03)
    assert (expected.checkpoint_bytes, expected.parameters) == (
        pair.finetuned.bf16_bytes,
        pair.finetuned.parameters,
    )
    assert expected.ratio == pytest.approx(pair.finetuned.bf16_bytes / size, rel=0.03)


def test_files_in_the_manifest_are_counted(pair: Pair, text: Path, tmp_path: Path) -> None:
    base, finetuned = pair
    lines = "".join(f'{{"{n}": "täglich"}}\n' for n in range(4000))
    (finetuned / "chat_template.jinja").write_text(lines)
    (base / "gone.json").write_text(lines)
    options = CompressOptions(method="exact", calibration=CalibrationOptions(256, 32))
    compress(base, finetuned, tmp_path / "a.delta", options, calibration=[])
    before, after = scan_folder(base), scan_folder(finetuned)
    expected = preview_size(
        shapes_of(after, before), "exact", None, carried=carried_bytes(after, before)
    )
    assert expected.artifact_bytes == pytest.approx((tmp_path / "a.delta").stat().st_size, rel=0.15)
    assert carried_bytes(after) == 0


def test_a_binary_tokenizer_is_counted_as_it_is_stored(pair: Pair, tmp_path: Path) -> None:
    base, finetuned = pair
    (finetuned / "tokenizer.model").write_bytes(random.Random(0).randbytes(300_000))
    options = CompressOptions(method="exact", calibration=CalibrationOptions(256, 32))
    compress(base, finetuned, tmp_path / "a.delta", options, calibration=[])
    before, after = scan_folder(base), scan_folder(finetuned)
    expected = preview_size(
        shapes_of(after, before), "exact", None, carried=carried_bytes(after, before)
    )
    assert expected.artifact_bytes == pytest.approx((tmp_path / "a.delta").stat().st_size, rel=0.02)


def test_only_changed_tensors_take_bytes(make_pair: Callable[..., Pair]) -> None:
    base, finetuned = (scan_folder(folder) for folder in make_pair(tied=False))
    assert all(shape.changed for shape in shapes_of(finetuned))
    assert not any(shape.changed for shape in shapes_of(finetuned, finetuned))
    nothing = preview_size(shapes_of(finetuned, finetuned), "optimix", ONE_BIT)
    assert nothing.artifact_bytes < 2_000
    assert [part.kind for part in nothing.parts] == ["manifest"]
    whole = preview_size(shapes_of(finetuned, base), "optimix", ONE_BIT)
    assert [part.kind for part in whole.parts] == [
        "linear layers", "output head", "embeddings", "other tensors", "manifest",
    ]  # fmt: skip
    assert sum(part.weights for part in whole.parts) == whole.parameters


def test_tensors_of_another_dtype_may_be_unchanged(make_pair: Callable[..., Pair]) -> None:
    """Whether they are only their values tell, so that no size is refused on their account."""
    base, finetuned = make_pair(tied=False)
    weights = load_file(base / "model.safetensors")
    save_file({k: w.float() for k, w in weights.items()}, finetuned / "model.safetensors")
    before, after = scan_folder(base), scan_folder(finetuned)
    shapes = shapes_of(after, before)
    assert all(shape.changed and shape.recast for shape in shapes)
    small = Goal("target_bytes", 6_000)
    smallest = preview_size(shapes, "adamix", small).artifact_bytes
    assert smallest > 4 * small.value
    with pytest.raises(InvalidGoal):
        preview_size([shape._replace(recast=False) for shape in shapes], "adamix", small)
    known = pair_shapes(open_pair(base, finetuned))
    assert not any(shape.changed or shape.recast for shape in known)


def test_the_global_budget_covers_all_compressed_tensors() -> None:
    shapes = [
        TensorShape("model.embed_tokens.weight", "BF16", (1000, 64)),
        TensorShape("lm_head.weight", "BF16", (1000, 64)),
        TensorShape("model.layers.0.mlp.experts.down_proj", "BF16", (4, 64, 128)),
        TensorShape("model.layers.0.mlp.up_proj.weight", "BF16", (128, 64), changed=False),
        TensorShape("model.norm.weight", "F32", (64,)),
    ]
    predicted = preview_size(shapes, "optimix", Goal("bits", 2.0))
    sizes = {part.kind: part.bytes for part in predicted.parts}
    assert sizes["embeddings"] == sizes["output head"] == 1000 * 64 / 4 + RUNS_PADDING
    assert sizes["linear layers"] == 4 * (64 * 128 / 4 + RUNS_PADDING)
    assert sizes["other tensors"] == 256
    assert predicted.artifact_bytes == sum(sizes.values())
    assert predicted.to_dict()["ratio"] == predicted.checkpoint_bytes / predicted.artifact_bytes


@pytest.mark.parametrize("method", ["adamix", "delta-come", "topk-2", "topk-32", "low-rank"])
def test_a_size_below_the_smallest_is_refused_by_shapes_alone(method: str) -> None:
    shapes = qwen2_5_7b()
    least = preview_size(shapes, method, Goal("bits", METHODS[method].bits_min or 0.0))
    within = preview_size(shapes, method, Goal("target_bytes", round(0.95 * least.artifact_bytes)))
    assert within == least, "near it the job decides"
    with pytest.raises(InvalidGoal, match="cannot be reached"):
        preview_size(shapes, method, Goal("target_bytes", round(0.9 * least.artifact_bytes)))


@pytest.mark.parametrize("method", ["adamix", "optimix"])
@pytest.mark.parametrize("ratio", [4.0, 8.0, 15.0])
def test_a_size_goal_is_converted_to_a_budget(
    method: str, ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltadock.compression.preview.METHODS", {method: METHODS["adamix"]})
    shapes = qwen2_5_7b(only_linear=True)
    predicted = preview_size(shapes, method, Goal("ratio", ratio))
    assert predicted.ratio == pytest.approx(ratio, rel=0.01)
    assert predicted.ratio >= ratio
    assert predicted.bits is not None
    same = preview_size(shapes, method, Goal("target_bytes", predicted.artifact_bytes))
    assert same.bits == pytest.approx(predicted.bits, rel=0.01)
    assert preview_size(shapes, method, Goal("bits", predicted.bits)) == predicted


@pytest.mark.parametrize("budget", [1.0, 2.0])
def test_the_largest_discrete_budget_that_fits_is_chosen(budget: float) -> None:
    shapes = qwen2_5_7b()
    size = preview_size(shapes, "delta-zip", Goal("bits", budget))
    for more in (0, 1_000_000):
        predicted = preview_size(
            shapes, "delta-zip", Goal("target_bytes", size.artifact_bytes + more)
        )
        assert predicted == size


def test_the_error_of_an_unreachable_size_names_the_smallest() -> None:
    shapes = qwen2_5_7b()
    with pytest.raises(InvalidGoal, match=r"smallest artifact .* takes about 362 MB, a"):
        preview_size(shapes, "adamix", Goal("ratio", 1000))
    largest = preview_size(shapes, "adamix", Goal("target_bytes", 10**12))
    assert largest.bits == METHODS["adamix"].bits_max


@pytest.mark.parametrize("kind", ["max_kl", "min_agreement"])
def test_quality_goals_have_no_preview(kind: str) -> None:
    with pytest.raises(InvalidGoal, match="after the work"):
        preview_size(qwen2_5_7b(), "adamix", Goal(kind, 0.5))  # type: ignore[arg-type]


def test_qwen_7b_has_all_parameters() -> None:
    parameters = sum(tensor.weights for tensor in qwen2_5_7b())
    assert parameters == 7_615_616_512, "7.61 billion according to the model card"


@pytest.mark.parametrize(("only_linear", "bar"), [(False, 13.0), (True, 14.5)])
def test_the_ratio_at_one_bit_on_qwen_7b(only_linear: bool, bar: float) -> None:
    predicted = preview_size(qwen2_5_7b(only_linear=only_linear), "optimix", ONE_BIT)
    assert predicted.ratio >= bar
    assert math.isclose(predicted.true_bits, 16 / predicted.ratio)


def test_shapes_are_read_from_headers_only(make_pair: Callable[..., Pair], tmp_path: Path) -> None:
    _, finetuned = make_pair()
    assert sorted(read_shapes(finetuned)) == sorted(shapes_of(scan_folder(finetuned)))
    folder = tmp_path / "empty"
    folder.mkdir()
    with pytest.raises(InvalidCheckpoint, match=r"no \.safetensors"):
        read_shapes(folder)
    (folder / "model.safetensors").write_bytes(b"\x00" * 16)
    with pytest.raises(MalformedSafetensors):
        read_shapes(folder)
