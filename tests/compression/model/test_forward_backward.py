"""Block-by-block backward passes against autograd through the whole model."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from deltadock.compression.checkpoints import CheckpointReader
from deltadock.compression.model import forward
from deltadock.compression.model.forward import BlockwiseModel
from tests.compression.family_cases import CASES, SIZES, Case

TOKENS = torch.randint(0, 200, (5, 20), generator=torch.Generator().manual_seed(1))


def loss(logits: Tensor, rows: slice) -> Tensor:
    """Cross entropy with arbitrary labels."""
    return F.cross_entropy(logits, TOKENS.flatten().roll(3)[rows], reduction="sum")


class GradSource:
    """A checkpoint whose tensors are computed from leaves that accumulate gradients."""

    def __init__(self, folder: Path, *, plain: bool = False) -> None:
        self.plain = plain
        checkpoint = CheckpointReader(folder)
        self.leaves = {
            name: (checkpoint.tensor(name).float() / 2).requires_grad_()
            for name in checkpoint.entries
        }

    def __contains__(self, name: object) -> bool:
        return name in self.leaves

    def tensor(self, name: str) -> Tensor:
        leaf = self.leaves[name]
        return leaf if self.plain else 2 * leaf


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    # Several batches of sequences, the last one smaller, and several pieces of logits.
    monkeypatch.setitem(forward.TOKENS_PER_STEP, "cpu", 40)
    monkeypatch.setattr(forward, "LOGITS_PER_STEP", 200 * 30)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_gradients_equal_whole_model_autograd(case: Case, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = case.auto.from_config(case.make(), experts_implementation="eager").float().eval()
    whole.save_pretrained(tmp_path)
    states: list[Tensor] = []

    def keep_input(_module: Any, args: tuple[Tensor, ...]) -> None:
        args[0].retain_grad()
        states.append(args[0])

    model, source = BlockwiseModel(tmp_path), GradSource(tmp_path)
    for name in model.blocks:
        whole.get_submodule(name).register_forward_pre_hook(keep_input)
    whole_loss = loss(whole(TOKENS).logits.flatten(0, 1), slice(None))
    whole_loss.backward()

    hidden = [model.embed(TOKENS, source)]
    for index in range(len(model.blocks)):
        hidden.append(model.run_block(index, hidden[-1], source))
    inputs: dict[str, list[Tensor]] = defaultdict(list)
    gradients: dict[str, list[Tensor]] = defaultdict(list)
    total, gradient = model.backward_head(hidden[-1], source, loss)
    assert total == pytest.approx(float(whole_loss.detach()), rel=1e-5)
    for index in reversed(range(len(model.blocks))):
        gradient = model.backward_block(
            index, hidden[index], gradient, source,
            lambda name, x: inputs[name].append(x),
            lambda name, g: gradients[name].append(g),
        )  # fmt: skip
        torch.testing.assert_close(gradient, states[index].grad, rtol=1e-4, atol=1e-6)
    model.embed_backward(TOKENS, gradient, source)

    # Gradients saved as if they were weights have the checkpoint's names and shapes.
    with torch.no_grad():
        for parameter in whole.parameters():
            grad = parameter.grad
            parameter.copy_(torch.zeros_like(parameter) if grad is None else grad)
    whole.save_pretrained(tmp_path / "gradients")
    expected = load_file(tmp_path / "gradients" / "model.safetensors")
    buffers = dict(whole.named_buffers())
    reached = [
        name
        for name in expected
        if "vision" not in name and "visual" not in name and name not in buffers
    ]
    for name in reached:
        leaf = source.leaves[name]
        if "multi_modal" not in name:
            assert leaf.grad is not None, name
            torch.testing.assert_close(leaf.grad, 2 * expected[name], rtol=1e-3, atol=1e-5)
    refs = [ref for refs in model.matrices.values() for ref in refs]
    assert inputs.keys() == gradients.keys() == {ref.key for ref in refs}
    for ref in refs:
        # A linear layer's output gradients and inputs give its weight's gradient.
        pairs = zip(gradients[ref.key], inputs[ref.key], strict=True)
        made = sum(g.flatten(0, -2).T @ x.flatten(0, -2) for g, x in pairs)
        weight = expected[ref.name] if ref.part is None else expected[ref.name][ref.part]
        weight = weight.T if ref.transposed else weight
        torch.testing.assert_close(made, weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("plain", [True, False], ids=["leaves", "computed"])
def test_only_tensors_that_require_gradients_get_them(tmp_path: Path, plain: bool) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    model, source = BlockwiseModel(tmp_path), GradSource(tmp_path, plain=plain)
    wanted = "model.layers.1.self_attn.k_proj.weight"
    for name, leaf in source.leaves.items():
        leaf.requires_grad_(name == wanted)
    hidden = model.run_block(0, model.embed(TOKENS, source), source)
    gradient = model.backward_block(1, hidden, torch.ones_like(hidden), source)
    model.embed_backward(TOKENS, gradient, source)
    assert [name for name, leaf in source.leaves.items() if leaf.grad is not None] == [wanted]


def test_inputs_are_observed_in_the_backward_pass(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    model, source = BlockwiseModel(tmp_path), CheckpointReader(tmp_path)
    hidden = model.embed(TOKENS, source)
    seen: list[dict[str, list[Tensor]]] = [defaultdict(list), defaultdict(list)]
    model.run_block(0, hidden, source, lambda name, x: seen[0][name].append(x))
    model.backward_block(
        0, hidden, torch.ones_like(hidden), source, lambda name, x: seen[1][name].append(x)
    )
    assert seen[0].keys() == seen[1].keys()
    for name, inputs in seen[0].items():
        torch.testing.assert_close(torch.cat(seen[1][name]), torch.cat(inputs))


def test_states_may_be_memory_mapped_and_replaced_in_place(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    model, source = BlockwiseModel(tmp_path), CheckpointReader(tmp_path)
    hidden = model.embed(TOKENS, source)
    mapped = torch.from_file(
        str(tmp_path / "states"), shared=True, size=hidden.numel(), dtype=torch.bfloat16
    ).view(hidden.shape)
    mapped.copy_(hidden)
    expected = model.run_block(0, mapped.float(), source)
    assert model.run_block(0, mapped, source, out=mapped) is mapped
    torch.testing.assert_close(mapped, expected.bfloat16())


def test_the_backward_pass_accepts_inference_tensors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    model, source = BlockwiseModel(tmp_path), CheckpointReader(tmp_path)
    with torch.inference_mode():
        hidden = model.embed(TOKENS, source)
    gradient = model.backward_block(0, hidden, torch.ones_like(hidden), source)
    assert torch.isfinite(gradient).all()
