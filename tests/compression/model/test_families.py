"""Every supported family: blocks against plain `transformers`, and a compressed checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from deltadock.artifacts.export import merge
from deltadock.artifacts.reader import Artifact
from deltadock.client.loading import load_delta
from deltadock.compression.calibration.windows import load_calibration
from deltadock.compression.checkpoints import CheckpointReader
from deltadock.compression.model import forward
from deltadock.compression.model.forward import BlockwiseModel
from deltadock.compression.options import CompressOptions, Source
from deltadock.compression.pipeline import compress
from deltadock.compression.statistics import MomentCollector
from tests.compression.family_cases import CASES, TOKENS, Case, save

ADAMIX = CompressOptions(method="adamix")
families = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def grams(case: Case, model: Any) -> dict[str, Tensor]:
    """Second moments of the inputs of the decoder's linear maps, by the checkpoint's names."""
    found: dict[str, Tensor] = {}

    def add(name: str, rows: Tensor) -> None:
        for module, checkpoint in case.renamed:
            name = name.replace(module, checkpoint)
        rows = rows.reshape(-1, rows.shape[-1]).double()
        found[name] = found.get(name, torch.zeros(())) + rows.T @ rows

    def linear(name: str) -> Any:
        return lambda _module, args, _output: add(name, args[0])

    def mixture(name: str) -> Any:
        gate, up, down = ("w1", "w3", "w2") if "sparse" in str(case.renamed) else (
            "gate_proj", "up_proj", "down_proj"
        )  # fmt: skip

        def hook(module: Any, args: tuple[Tensor, ...], _output: Tensor) -> None:
            hidden, index, _ = args
            for expert in range(len(module.down_proj)):
                rows = hidden[(index == expert).any(dim=1)]
                weight = module.gate_up_proj[expert]
                if module.is_transposed:
                    inner = module._apply_gate(rows @ weight + module.gate_up_proj_bias[expert])
                    add(f"{name}.gate_up_proj[{expert}]", rows)
                    add(f"{name}.down_proj[{expert}]", inner)
                    continue
                left, right = (rows @ weight.T).chunk(2, dim=1)
                inner = torch.nn.functional.silu(left) * right
                for piece, inputs in ((gate, rows), (up, rows), (down, inner)):
                    add(f"{name}.{expert}.{piece}.weight", inputs)

        return hook

    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    for name, module in decoder.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            module.register_forward_hook(linear(f"{prefix}.{name}.weight"))
        elif name.endswith(".experts"):
            module.register_forward_hook(mixture(f"{prefix}.{name}"))
    return found


@families
def test_blocks_and_moments_equal_plain_transformers(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(forward.TOKENS_PER_STEP, "cpu", 50)
    plain = save(case, tmp_path)
    expected_moments = grams(case, plain)
    with torch.inference_mode():
        expected = plain(TOKENS).logits.flatten(0, 1)
    model, source = BlockwiseModel(tmp_path), CheckpointReader(tmp_path)
    model.check({name: entry.shape for name, entry in source.entries.items()})
    moments = MomentCollector()
    hidden = model.embed(TOKENS, source)
    for index in range(len(model.blocks)):
        hidden = model.run_block(index, hidden, source, moments)
    logits = torch.cat(list(model.logits(model.final_hidden(hidden, source).flatten(0, 1), source)))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert logits.std() > 0.1

    refs = [ref for refs in model.matrices.values() for ref in refs]
    assert {ref.key for ref in refs} == expected_moments.keys()
    for ref in refs:
        gram = expected_moments[ref.key]
        assert len(gram) == source.matrix(ref).shape[1]
        torch.testing.assert_close(moments.moment(ref.key), gram, rtol=1e-3, atol=1e-4)


@families
def test_the_whole_checkpoint_is_compressed(case: Case, text: Path, tmp_path: Path) -> None:
    base, tuned, out = tmp_path / "base", tmp_path / "tuned", tmp_path / "a.delta"
    save(case, base)
    save(case, tuned, scale=0.02)
    report = compress(base, tuned, out, ADAMIX, calibration=[Source(text)])
    before = load_file(base / "model.safetensors")
    weights = {
        name: tensor
        for name, tensor in load_file(tuned / "model.safetensors").items()
        if not torch.equal(tensor, before[name])  # some buffers are stored
    }
    model = BlockwiseModel(tuned)
    maps = {ref.name for refs in model.matrices.values() for ref in refs}
    if model.head is not None:
        maps.add(model.head.name)
    with Artifact(out) as artifact:
        kinds = {name: record["kind"] for name, record in artifact.records.items()}
    assert kinds.keys() == weights.keys()
    for name, kind in kinds.items():
        small = name in maps and min(weights[name].shape) < 4
        if name in maps and not small:
            assert kind in ("svd", "transposed", "stack"), name
        elif name == model.embedding:
            assert kind == "rows"
        else:
            assert kind == "exact", name
    named = {matrix.name for matrix in report.matrices}
    others = {tensor.name for tensor in report.other_tensors}
    assert {name.partition("[")[0] for name in named} | others == weights.keys()
    # Every matrix of the decoder's blocks is compressed, except routers, norms of heads and the
    # biases of stacked experts.
    for name, tensor in weights.items():
        inside = ".layers." in name or ".h." in name
        seeing = "vision" in name or "visual" in name
        if tensor.ndim >= 2 and inside and not seeing and name not in maps:
            kept = ("gate.weight", "router.weight", "norm.weight", "proj_bias")
            assert name.endswith(kept), name

    # What the report says is what transformers measures.
    merge(base, out, tmp_path / "merged")
    merged, info = case.auto.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    fine = case.auto.from_pretrained(tuned, dtype=torch.float32).eval()
    bare = case.auto.from_pretrained(base, dtype=torch.float32).eval()
    windows = load_calibration([Source(text)], tuned, model.max_length, ADAMIX.seed).report
    with torch.inference_mode():
        logits = [each.eval()(windows).logits for each in (fine, merged, bare)]
        with load_delta(bare, out):
            assert torch.equal(bare(windows).logits, logits[1])
    target, *others = (torch.log_softmax(each, dim=-1) for each in logits)
    kl = [float((target.exp() * (target - each)).sum(-1).mean()) for each in others]
    assert [report.quality.kl, report.quality.kl_base] == pytest.approx(kl, rel=1e-3)
    assert 0 < kl[0] < 0.7 * kl[1]
