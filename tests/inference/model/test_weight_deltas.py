"""Weight deltas of every encoding match their merged checkpoint and stay compact in memory."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.operators import OperatorCounter
from deltadock.artifacts.encodings import (
    Encoded,
    decode_dense,
    deflate,
    encode_alias,
    encode_exact,
    encode_low_rank,
    encode_new_rows,
    encode_rows,
    encode_sparse,
    encode_sum,
    stored_array,
)
from deltadock.artifacts.export import merge
from deltadock.artifacts.folder import scan_folder
from deltadock.artifacts.reader import Artifact
from deltadock.artifacts.tensors import packed_delta
from deltadock.artifacts.writer import write_artifact
from deltadock.errors import InvalidArtifact
from deltadock.inference.deltas.reading import place_delta, read_delta
from deltadock.inference.deltas.tensors import read_tensor_delta
from deltadock.inference.model import layers
from deltadock.inference.model.attention import Span, make_attention_metadata
from deltadock.inference.model.loading import load_base
from deltadock.inference.model.model import DeltaModel
from deltadock.inference.model.routing import DeltaLimits
from deltadock.inference.model.weight_deltas import (
    EncodedDelta,
    LowRank,
    NewRows,
    RowsDelta,
    TensorDelta,
    WeightDelta,
    in_one_buffer,
    placed,
)
from deltadock.kernels.svd_delta import PackedDelta
from deltadock.kernels.svd_delta.layout import SLACK_WORDS
from deltadock.kernels.svd_delta.reference import unpack
from tests.artifacts.samples import rows_sample
from tests.inference.conftest import VOCABULARY
from tests.kernels.svd_delta.support import encode

MANIFEST = {
    "base_digest": "base",
    "method": "test",
    "files": {},
    "nominal_bits": None,
    "checkpoint_bytes": 0,
    "parameters": 0,
}
ADDED = 3
"""Tokens that a fine-tune adds."""
WIDTHS = [(2, 5, 4), (4, 3, 2), (6, 2, 1)]


def svd(shape: tuple[int, int], seed: int, *, midrise: bool = False) -> Encoded:
    scaled = {"midrise": True, "row_scale": True, "column_scale": True} if midrise else {}
    return encode(shape, WIDTHS, seed, dtype="F32", **scaled)


def rows(shape: tuple[int, int], seed: int) -> Encoded:
    rng = np.random.default_rng(seed)
    widths = rng.integers(0, 5, shape[0])
    codes = (rng.integers(0, 256, shape) % 2 ** widths[:, None]).astype(np.uint8)
    return encode_rows(codes, widths, rng.uniform(0.01, 0.05, shape[0]), "F32")


def low_rank(shape: tuple[int, int], seed: int) -> Encoded:
    rng = np.random.default_rng(seed)
    u, v = rng.normal(size=(shape[0], 3)), rng.normal(size=(3, shape[1]))
    return encode_low_rank(u, v, 0.05, "F32", {}, "F32")


def sparse(shape: tuple[int, int], seed: int) -> Encoded:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, shape).astype(np.uint8)
    scale = rng.uniform(0.01, 0.05, (shape[0], -(-shape[1] // 8)))
    return encode_sparse(codes, rng.random(shape) < 0.3, scale, 4, 8, "F32")


def exact(tensor: Tensor, seed: int) -> Encoded:
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
    return encode_exact((tensor + 0.1 * noise).numpy(), "F32", tuple(tensor.shape))


KINDS: dict[str, Callable[[tuple[int, int], int], Encoded]] = {
    "svd": svd,
    "svd with scales": lambda shape, seed: svd(shape, seed, midrise=True),
    "svd deflated": lambda shape, seed: deflate(svd(shape, seed)),
    "rows": rows,
    "rows deflated": lambda shape, seed: deflate(rows(shape, seed)),
    "low-rank": low_rank,
    "sparse": lambda shape, seed: deflate(sparse(shape, seed)),
    "sum": lambda shape, seed: encode_sum([low_rank(shape, seed), rows(shape, seed)]),
}


def write(path: Path, encoded: Mapping[str, Encoded], **manifest: Any) -> Path:
    write_artifact(path, dict(encoded), {**MANIFEST, **manifest})
    return path


def logits_of(model: DeltaModel, prompts: list[tuple[list[int], int]]) -> list[Tensor]:
    """Logits (tokens, the slot's vocabulary) of each prompt on its slot, all in one pass."""
    spans, begin = [], 0
    for number, (prompt, _) in enumerate(prompts):
        spans.append(Span(number, begin, begin + len(prompt), 0))
        begin += len(prompt)
    slots = [slot for prompt, slot in prompts for _ in prompt]
    tokens = torch.tensor([token for prompt, _ in prompts for token in prompt])
    with torch.inference_mode():
        step = make_attention_metadata(model.make_cache(len(prompts), 32), spans)
        rows = model.logits(model.forward(tokens, step, slots), slots).rows()
    return [torch.stack(rows[span.begin : span.end]) for span in spans]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base_folder(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., Any],
    save_checkpoint: Callable[..., Path],
) -> Path:
    """A float32 model with biases and norms of queries and keys, or with tied embeddings."""
    family = "qwen3" if request.param else "qwen2"
    model = make_model(family, tie_word_embeddings=request.param)
    return save_checkpoint(model, tmp_path_factory.mktemp("base") / "model")


def grown(encoded: Encoded, seed: int) -> Encoded:
    """The encoded delta of the old rows, with rows of added tokens."""
    rows_, columns = encoded.record["shape"]
    added = np.random.default_rng(seed).normal(0, 0.3, (ADDED, columns)).astype(np.float32)
    if encoded.record["kind"] != "exact":
        return encode_new_rows(encoded, added, rows_, "F32")
    whole = np.concatenate([stored_array(encoded), added])
    return encode_exact(whole, "F32", whole.shape)


@pytest.mark.parametrize("longer", [False, True], ids=["the base's vocabulary", "a larger one"])
def test_every_encoding_computes_the_logits_of_its_merged_checkpoint(
    base_folder: Path, tmp_path: Path, longer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each slot has matrices of one encoding; even slots leave all other tensors unchanged."""
    manifest = scan_folder(base_folder)
    digest = manifest.weights_digest
    limits = DeltaLimits(slots=len(KINDS) + 2, rows=128, cache_bytes=100_000)
    model = load_base(base_folder, manifest, torch.device("cpu"), limits)
    weights = load_file(base_folder / "model.safetensors")
    files: dict[int, Path] = {}
    for slot, (name, make) in enumerate([*KINDS.items(), ("exact", None)], 1):
        encoded = {}
        for number, tensor in enumerate(manifest.tensors):
            stored = weights[tensor.name]
            if len(tensor.shape) == 1 and slot % 2:
                encoded[tensor.name] = exact(stored, number)
            elif len(tensor.shape) == 2 and not (slot % 3 == 0 and "k_proj" in tensor.name):
                rows_, columns = tensor.shape
                encoded[tensor.name] = (
                    exact(stored, number) if make is None else make((rows_, columns), number)
                )
                if longer and rows_ == VOCABULARY:
                    encoded[tensor.name] = grown(encoded[tensor.name], number)
        config = json.loads((base_folder / "config.json").read_text())
        config["vocab_size"] += ADDED if longer else 0
        carried = {"config.json": json.dumps(config)}
        path = tmp_path / f"{slot}.delta"
        files[slot] = write(path, encoded, base_digest=digest, files=carried)
        with Artifact(files[slot]) as artifact:
            loaded = read_delta(artifact, model, digest, read(base_folder))
        place_delta(model, slot, loaded)
        assert model.vocabulary(slot) == VOCABULARY + (ADDED if longer else 0)
        assert {type(change).__name__ for change in loaded.tensors.values()} >= {
            "PackedDelta" if "svd" in name else "Tensor" if make is None else EXPECTED[name]
        }
    prompt = [5, 9, 200, 33, 7]
    own = {slot: [5, 264, 200, 266, 7] if slot and longer else prompt for slot in (0, *files)}
    order = [0, *files, 0, *reversed(files)]
    found = logits_of(model, [(own[slot], slot) for slot in order])
    # With decoded differences beyond the cache limit, and with rows in another order.
    assert model.cache_bytes <= 100_000
    for slot, logits in zip(order, found, strict=True):
        folder = base_folder
        if slot:
            folder = tmp_path / f"merged-{slot}"
            if not folder.exists():
                merge(base_folder, files[slot], folder)
        merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            expected = merged(torch.tensor([own[slot]])).logits[0]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        known = logits[:, :VOCABULARY]
        assert slot == 0 or (known - found[0]).abs().max() > 0.1, "the delta changes the logits"
    for slot in files:
        model.merge(slot)
        model.use_merged(slot)
        with monkeypatch.context() as patch:
            patch.setattr(layers, "svd_delta", None)  # merged weights are used without the delta
            (alone,) = logits_of(model, [(own[slot], slot)])
        torch.testing.assert_close(alone, found[slot], rtol=1e-4, atol=1e-4)
        beside = logits_of(model, [(own[slot], slot), (prompt, 0)])
        torch.testing.assert_close(beside[0], found[slot], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(beside[1], found[0], rtol=1e-4, atol=1e-4)
        model.remove(slot)
        assert model.merged_slot is None
    assert model.cache_bytes == 0
    assert {model.vocabulary(slot) for slot in files} == {VOCABULARY}
    bare = logits_of(model, [(prompt, slot) for slot in order])
    for logits in bare[1:]:
        torch.testing.assert_close(logits, bare[0], rtol=1e-5, atol=1e-5)


def test_a_replaced_weight_keeps_the_bases_bias(base_folder: Path) -> None:
    model = load_base(base_folder, scan_folder(base_folder), torch.device("cpu"))
    weights = load_file(base_folder / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    assert weights.get("model.layers.0.self_attn.k_proj.bias", torch.ones(1)).abs().max() > 0.01
    model.install(1, model.prepare({name: weights[name].clone()}))
    base, same = logits_of(model, [([5, 9, 200], slot) for slot in (0, 1)])
    torch.testing.assert_close(same, base, rtol=1e-5, atol=1e-5)
    model.merge(1)
    model.use_merged(1)
    torch.testing.assert_close(logits_of(model, [([5, 9, 200], 1)])[0], base, rtol=1e-5, atol=1e-5)


def test_a_failed_merge_leaves_the_base_unchanged(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_base(base_folder, scan_folder(base_folder), torch.device("cpu"))
    name = "model.layers.{}.mlp.up_proj.weight"
    change = {name.format(layer): packed_delta(svd((48, 32), layer)) for layer in range(2)}
    model.install(1, model.prepare(change))
    (before,) = logits_of(model, [([5, 9], 1)])
    made: list[Any] = []

    def until_memory_is_out(*tensors: Any) -> None:
        if made:
            raise RuntimeError("can't allocate memory")
        made.append(tensors)

    with monkeypatch.context() as patch:
        patch.setattr(layers, "FusedLinear", until_memory_is_out)
        with pytest.raises(RuntimeError, match="allocate"):
            model.merge(1)
    assert model.merged_slot is None
    assert torch.equal(logits_of(model, [([5, 9], 1)])[0], before)
    model.merge(1)
    model.use_merged(1)
    assert model.merged_slot == 1


def test_only_packed_deltas_are_captured_in_graphs(base_folder: Path) -> None:
    limits = DeltaLimits(slots=4, rows=16)
    manifest = scan_folder(base_folder)
    model = load_base(base_folder, manifest, torch.device("cpu"), limits)
    name = "model.layers.0.mlp.up_proj.weight"
    shape = tuple(model.base_shape(name))
    quick = model.prepare({name: packed_delta(svd(shape, 0)), "model.norm.weight": torch.ones(32)})
    model.install(1, quick)
    model.install(2, model.prepare({name: LowRank(torch.ones(48, 1), torch.ones(1, 32))}))
    keys = []
    for slots in ([1, 0, 1], [0, 3, 1], [1] * 9, [0, 0], [1, 2]):
        model.route(slots)
        keys.append(model.graph_key)
    assert keys == [(3, 1), (3, 2), (9, 4), (2, 0), None]
    model.remove(2)
    model.route([1, 2])
    assert model.graph_key == (2, 2)
    merged = []
    for _ in range(2):
        model.merge(1)
        model.use_merged(1)
        model.route([1, 1])
        merged.append(model.graph_key)
        model.route([1, 0])
        assert model.graph_key == (2, 1)
        model.remove(1)
        model.install(1, quick)
    assert len({*merged, (2, 1), (2, 2)}) == 4, "a graph holds the addresses of merged weights"


EXPECTED = {
    "rows": "RowsDelta",
    "rows deflated": "RowsDelta",
    "low-rank": "LowRank",
    "sparse": "EncodedDelta",
    "sum": "EncodedDelta",
}


def test_a_delta_is_copied_to_a_device_at_once() -> None:
    """Whatever its tensors are: from one buffer, in which packed words are aligned."""
    encoded = encode((40, 64), [(9, 5, 4)])
    words = torch.arange(5, dtype=torch.int32)
    deltas: dict[str, TensorDelta] = {
        "packed": packed_delta(encoded),
        "norm": torch.randn(7),
        "low rank": LowRank(torch.randn(4, 2), torch.randn(2, 3)),
        "rows": RowsDelta({"shape": [2, 3], "runs": []}, {"codes": words, "scale": torch.ones(3)}),
        "longer": NewRows(packed_delta(encoded), torch.randn(2, 64)),
    }
    together = in_one_buffer(deltas, pin_memory=False)
    with OperatorCounter() as counter:
        moved = placed(together, torch.device("meta"), torch.float32)
    assert counter.by_name == {"empty": 1, "set_": 1, "_to_copy": 1}
    host, device = ([tensor for _, tensor in tensors_of(each)] for each in (together, moved))
    assert len({tensor.untyped_storage().data_ptr() for tensor in host}) == 1
    for (kind, before), own, copied in zip(tensors_of(deltas), host, device, strict=True):
        assert torch.equal(own, before)
        assert (own.dtype, own.shape) == (copied.dtype, copied.shape)
        assert copied.storage_offset() == own.storage_offset()
        assert kind != "words" or own.storage_offset() * 4 % 128 == 0


def tensors_of(deltas: Mapping[str, TensorDelta]) -> list[tuple[str, Tensor]]:
    packed, norm, (u, v), rows, (old, added) = deltas.values()
    words = [("words", one.words) for one in (packed, old)]
    return [*words, *(("", one) for one in (norm, u, v, *rows._tensors.values(), added))]


def read(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in ("tokenizer.json", "config.json")}


def test_a_weight_delta_is_as_compact_as_its_record(tmp_path: Path) -> None:
    shape = (64, 96)
    made = {name: make(shape, 1) for name, make in KINDS.items()}
    base, added = torch.randn(shape), np.ones((2, 96), np.float32)
    whole = np.concatenate([base.numpy(), added])
    path = write(
        tmp_path / "a.delta",
        made
        | {
            "alias": encode_alias("svd", shape, "F32"),
            "new": deflate(encode_new_rows(made["svd"], added, 64, "F32")),
            "long": encode_exact(whole, "F32", whole.shape),
        },
    )
    size = torch.Size(shape)
    with Artifact(path) as artifact:
        changes = {name: read_tensor_delta(artifact, name, size) for name in [*made, "alias"]}
        dense = {name: torch.from_numpy(artifact.dense(name)) for name in changes}
        sizes = {name: artifact.tensor_bytes(name) for name in made}
        longer = [read_tensor_delta(artifact, name, size) for name in ("new", "long")]
    path.unlink()
    for change, old in zip(longer, (changes["svd"], base), strict=True):
        assert isinstance(change, NewRows)
        assert change.old is not None
        assert torch.equal(change.added, torch.ones(2, 96))
        assert change.nbytes == old.nbytes + 2 * 96 * 4
    assert torch.equal(difference(longer[0].old), difference(changes["svd"]))
    assert torch.equal(longer[1].old, base)
    for name, change in changes.items():
        torch.testing.assert_close(difference(change), dense[name], rtol=1e-5, atol=1e-5)
    for name in ("svd", "rows", "low-rank", "sparse", "sum"):
        # Overhead: float32 scales, and the offsets of kernel programs and rows.
        assert changes[name].nbytes <= sizes[name] + 12 * sum(shape) + 4 * SLACK_WORDS


def test_an_undecodable_record_is_refused_at_load(tmp_path: Path) -> None:
    shape = (64, 96)
    doubled, short = rows(shape, 1), sparse(shape, 2)
    doubled.segments["index"][0] = doubled.segments["index"][1]
    short.segments["bitmap"][0] ^= 1
    packed = deflate(short)
    path = write(tmp_path / "a.delta", {"doubled": doubled, "short": short, "packed": packed})
    with Artifact(path) as artifact:
        for name in ("doubled", "short", "packed"):
            with pytest.raises(InvalidArtifact):
                read_tensor_delta(artifact, name, torch.Size(shape))
        with pytest.raises(InvalidArtifact, match="another shape"):
            read_tensor_delta(artifact, "short", torch.Size((96, 64)))


def difference(change: WeightDelta) -> Tensor:
    """The dense difference (h_out, h_in)."""
    if isinstance(change, PackedDelta):
        u, s, v, _ = unpack(change)
        return (u * s) @ v
    if isinstance(change, LowRank):
        return change.u @ change.v
    assert isinstance(change, EncodedDelta | RowsDelta)
    return change.dense()


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 70))
def test_decoded_rows_equal_those_of_the_whole_matrix(seed: int, height: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    encoded = rows_sample((height, width), rng).encoded
    numbers = rng.integers(0, height, 5)
    expected = decode_dense(encoded)
    change = RowsDelta.of(encoded)
    assert torch.equal(change.dense(), torch.from_numpy(expected))
    assert torch.equal(change.rows(torch.from_numpy(numbers)), torch.from_numpy(expected[numbers]))
