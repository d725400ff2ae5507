"""Moments collected block by block, against hooks and autograd in plain transformers."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from deltadock.compression import statistics
from deltadock.compression.calibration.windows import CalibrationSet
from deltadock.compression.checkpoints import CheckpointPair, open_pair
from deltadock.compression.matrices import changed_matrices
from deltadock.compression.model.forward import BlockwiseModel
from deltadock.compression.progress import ProgressReporter
from deltadock.compression.scratch import Scratch
from deltadock.compression.statistics import Statistics, collect
from tests.compression.family_cases import CASES, TOKENS, save

TRAIN, HELD = TOKENS, TOKENS.flip(1)[:2]
UNSEEN = torch.full((1, 4), 1 << 20)
"""Choosing windows; no tokens of any vocabulary, as statistics must not read them."""
SEEN = TRAIN[[0, 2, 4]]
"""What gradients are taken on: three sequences from all over the text."""


Drawn = tuple[Tensor, Tensor]
"""Labels and weights."""


class Collected(NamedTuple):
    """Moments, with the model and data that they come from."""

    statistics: Statistics
    model: BlockwiseModel
    pair: CheckpointPair
    whole: Any
    drawn: Drawn


@pytest.fixture
def scratch() -> Iterator[Scratch]:
    with Scratch(10_000) as found:  # most of it on disk
        yield found


def collected(
    family: str,
    folder: Path,
    scratch: Scratch,
    monkeypatch: pytest.MonkeyPatch,
    train: Tensor = TRAIN,
    zero_row: int | None = None,
) -> Collected:
    save(CASES[family], folder / "base")
    whole = save(CASES[family], folder / "tuned", scale=0.02)
    if zero_row is not None:
        with torch.no_grad():
            whole.get_input_embeddings().weight[zero_row] = 0
        whole.save_pretrained(folder / "tuned")
    monkeypatch.setattr(statistics, "GRADIENT_TOKENS", SEEN.numel() + 5)
    drawn, draw = [], statistics.draw

    def kept(*args: Any, **kwargs: Any) -> Drawn:
        drawn.append(draw(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(statistics, "draw", kept)
    pair = open_pair(folder / "base", folder / "tuned")
    model = BlockwiseModel(folder / "tuned")
    data = CalibrationSet(train, UNSEEN, HELD, "", [])
    seen: list[str] = []
    found = collect(
        pair,
        model,
        data,
        scratch,
        gradients=True,
        seed=3,
        progress=ProgressReporter(lambda progress: seen.append(progress.message)),
    )
    blocks = [f"block {k + 1} of {len(model.blocks)}" for k in range(len(model.blocks))]
    assert seen == [
        *(f"{part}, inputs" for part in [*blocks, "output head"]),
        *(f"{part}, gradients" for part in ["output head", *reversed(blocks)]),
    ]
    labels, weights = map(torch.cat, zip(*drawn, strict=True))
    return Collected(found, model, pair, whole, (labels, weights))


def second_moment(rows: Tensor) -> Tensor:
    flat = rows.detach().flatten(0, -2).double()
    return flat.T @ flat / len(flat)


def weighted_loss(logits: Tensor, drawn: Drawn, piece: slice = slice(None)) -> Tensor:
    labels, weights = (one[piece] for one in drawn)
    return (weights * F.cross_entropy(logits, labels, reduction="none")).sum()


def run_whole(whole: Any, tokens: Tensor, drawn: Drawn | None) -> tuple[dict[str, Tensor], ...]:
    """Each module's inputs, with labels the gradients at its outputs, and the logits."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def keep(_module: Any, args: tuple[Any, ...], result: Any) -> None:
            inputs[name], outputs[name] = args[0], result
            if drawn is not None:
                result.retain_grad()

        return keep

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in whole.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
    ]
    logits = whole(tokens).logits.float().flatten(0, 1)
    gradients = {}
    if drawn is not None:
        torch.autograd.backward([weighted_loss(logits, drawn)])
        gradients = {name: out.grad for name, out in outputs.items() if out.grad is not None}
    for handle in handles:
        handle.remove()
    return inputs, gradients, {"logits": logits.detach()}


def close(found: Tensor, expected: Tensor) -> None:
    size = float(expected.abs().max())
    torch.testing.assert_close(found, expected.double(), rtol=1e-3, atol=1e-4 * size)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
def test_moments_equal_plain_transformers(
    family: str, tmp_path: Path, scratch: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, model, pair, whole, drawn = collected(family, tmp_path, scratch, monkeypatch)
    inputs, _, _ = run_whole(whole, TRAIN, None)
    held, _, held_scores = run_whole(whole, HELD, None)
    _, gradients, scores = run_whole(whole, SEEN, drawn)
    linear = [matrix for matrix in found.matrices if matrix.role == "linear"]
    assert [matrix.ref for matrix in linear] == [
        ref for name in model.blocks for ref in model.matrices[name]
    ]
    for matrix in linear:
        key, path = matrix.ref.key, matrix.ref.name.removesuffix(".weight")
        close(found.inputs(key), second_moment(inputs[path]))
        held_moment = found.held_inputs(key)
        assert held_moment is not None
        close(held_moment, second_moment(held[path]))
        close(found.outputs(key), second_moment(gradients[path]))
        assert found.notes[key] == []

    final = model.final_hidden(found.held_last_states(), pair.finetuned).flatten(0, 1)
    close(torch.cat([*model.logits(final, pair.finetuned)]).double(), held_scores["logits"])
    known = found.last_states()
    assert known is not None
    assert torch.equal(known[0], SEEN)
    final = model.final_hidden(known[1], pair.finetuned).flatten(0, 1)
    close(torch.cat([*model.logits(final, pair.finetuned)]).double(), scores["logits"])

    chances = scores["logits"].softmax(-1).double()
    spread = (chances * (1 - chances)).mean(0)
    embedding = found.matrices[-1]
    assert (embedding.role, embedding.ref.name) == ("embedding", model.embedding)
    assert found.held_inputs(model.embedding) is None
    name = model.embedding.removesuffix(".weight")
    frequency = torch.bincount(SEEN.flatten(), minlength=256) / SEEN.numel()
    # If the module scales its rows, a row's gradient is taken before the scaling.
    module = whole.get_submodule(name)
    row = module.weight[TRAIN[0, 0]]
    factor = float((module(TRAIN[:1, :1])[0, 0] / row).detach().median())
    assert factor == pytest.approx(32**0.5 if family == "gemma" else 1)
    lookup = second_moment(gradients[name]) * factor**2
    if model.head is not None:
        head = found.matrices[-2]
        assert (head.role, head.ref) == ("head", model.head)
        close(found.inputs(head.ref.key), second_moment(inputs["lm_head"]))
        close(found.outputs(head.ref.key), spread)
        close(found.outputs(embedding.ref.key), frequency)
        close(found.inputs(embedding.ref.key), lookup)
        return
    as_head = second_moment(inputs["lm_head"])
    # The Kronecker product with equal traces: along each side, and overall.
    rows = frequency * lookup.trace() + spread * as_head.trace()
    columns = frequency.sum() * lookup + spread.sum() * as_head
    close(
        found.outputs(embedding.ref.key).outer(found.inputs(embedding.ref.key).flatten()),
        rows.outer((columns / columns.trace()).flatten()),
    )


def test_a_state_of_zeros_does_not_decide_the_moments(
    tmp_path: Path, scratch: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without biases, an initial token whose row is zero has states of zeros in every block.
    train = TRAIN.clone()
    train[:, 0] = 3
    found, _, _, whole, drawn = collected(
        "llama", tmp_path, scratch, monkeypatch, train=train, zero_row=3
    )
    _, gradients, _ = run_whole(whole, train[[0, 2, 4]], drawn)
    for matrix in found.matrices:
        path = matrix.ref.name.removesuffix(".weight")
        if path.endswith(("o_proj", "down_proj")):
            without = gradients[path].index_fill(1, torch.tensor(0), 0.0)
            assert gradients[path].norm() > 10 * without.norm()
            close(found.outputs(matrix.ref.key), second_moment(without))
    table = found.matrices[-1]
    assert table.role == "embedding"
    without = gradients["model.embed_tokens"].index_fill(1, torch.tensor(0), 0.0)
    close(found.inputs(table.ref.key), second_moment(without))


def test_only_the_gradients_at_short_states_are_bounded() -> None:
    states = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    gradient = torch.ones(2, 8, 16)
    states[1, 3], states[0, 2] = 0, states[0, 2] / 1e3
    statistics.bound_gradient(gradient, states)
    length = states.norm(dim=-1)
    factors = gradient[..., 0].clone()
    assert factors[1, 3] == 0
    assert factors[0, 2] == pytest.approx(float(10 * length[0, 2] / length.median()))
    factors[1, 3] = factors[0, 2] = 1
    assert (factors == 1).all()
    zeros = torch.ones(1, 2, 4)
    statistics.bound_gradient(zeros, torch.zeros(1, 2, 4))
    assert (zeros == 0).all()


def test_labels_are_drawn_by_the_models_own_predictions(
    tmp_path: Path, scratch: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, _, whole, (labels, weights) = collected("qwen2", tmp_path, scratch, monkeypatch)
    p = run_whole(whole, SEEN, None)[2]["logits"].softmax(-1)
    assert len(labels) == SEEN.numel()
    lengths = (p - F.one_hot(labels, p.shape[1])).norm(dim=1)
    # Of any label, as its weight makes up for its length.
    torch.testing.assert_close(weights * lengths, (1 - p.square().sum(1)).sqrt())
    assert not torch.equal(labels, p.argmax(-1))


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_experts_moments_are_weighted_by_routed_tokens(
    family: str, tmp_path: Path, scratch: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, model, pair, _, drawn = collected(family, tmp_path, scratch, monkeypatch)
    tokens, source = SEEN, pair.finetuned
    inputs: dict[str, list[Tensor]] = defaultdict(list)
    gradients: dict[str, list[Tensor]] = defaultdict(list)
    whole = model.embed(TRAIN, source)
    states = [model.embed(tokens, source)]
    for index in range(len(model.blocks)):
        whole = model.run_block(index, whole, source, lambda key, x: inputs[key].append(x))
        states.append(model.run_block(index, states[-1], source))
    _, gradient = model.backward_head(
        states[-1],
        source,
        lambda logits, piece: weighted_loss(logits, drawn, piece),
    )
    for index in reversed(range(len(model.blocks))):
        gradient = model.backward_block(
            index, states[index], gradient, source,
            observe_gradients=lambda key, g: gradients[key].append(g),
        )  # fmt: skip
    refs = [ref for name in model.blocks for ref in model.matrices[name]]
    experts = [ref for ref in refs if ref.mixture is not None]
    assert experts
    for ref in experts:
        peers = [peer.key for peer in experts if peer.mixture == ref.mixture]
        for samples, count, moment in (
            (inputs, TRAIN.numel(), found.inputs(ref.key)),
            (gradients, None, found.outputs(ref.key)),
        ):
            own = _rows(samples[ref.key], len(moment))
            mean = second_moment(torch.cat([_rows(samples[key], len(moment)) for key in peers]))
            lacking = max(0, len(moment) - len(own))
            total = own.T @ own + lacking * mean
            # Inputs per token of the text, gradients per token routed to the expert.
            close(moment, total / (count or max(len(own), len(moment))))


def _rows(pieces: list[Tensor], width: int) -> Tensor:
    rows = [piece.detach().reshape(-1, width).double() for piece in pieces]
    return torch.cat(rows) if rows else torch.zeros(0, width, dtype=torch.float64)


def test_only_changed_tensors_are_observed(tmp_path: Path) -> None:
    save(CASES["llama"], tmp_path / "base")
    save(CASES["llama"], tmp_path / "tuned")
    (tmp_path / "tuned" / "chat_template.jinja").write_text("another")
    pair = open_pair(tmp_path / "base", tmp_path / "tuned")
    assert changed_matrices(pair, BlockwiseModel(tmp_path / "tuned"), with_embedding=True) == []


def test_without_gradients_only_input_moments_are_collected(
    tmp_path: Path, scratch: Scratch
) -> None:
    save(CASES["qwen2"], tmp_path / "base")
    save(CASES["qwen2"], tmp_path / "tuned", scale=0.02)
    pair = open_pair(tmp_path / "base", tmp_path / "tuned")
    found = collect(
        pair, BlockwiseModel(tmp_path / "tuned"), CalibrationSet(TRAIN, UNSEEN, HELD, "", []),
        scratch, gradients=False, seed=0, progress=ProgressReporter(),
    )  # fmt: skip
    assert {matrix.role for matrix in found.matrices} == {"linear"}
    key = found.matrices[0].ref.key
    assert found.inputs(key).shape == (32, 32)
    assert found.last_states() is None
    with pytest.raises(KeyError):
        found.outputs(key)


@pytest.mark.parametrize("size", [1, 64, 130, 513])
def test_gram_equals_the_whole_product(size: int) -> None:
    rows = torch.randn(32, size, generator=torch.Generator().manual_seed(0))
    found = statistics.gram(rows)
    assert torch.equal(found, found.t())
    torch.testing.assert_close(found, rows.t() @ rows)


def drawn_gradients(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Labels (count,), and the weighted gradients (count, vocabulary) at equal logits."""
    p = logits.softmax(-1).repeat(count, 1)
    labels, weights = statistics.draw(p, torch.Generator().manual_seed(0))
    return labels, weights[:, None] * (p - F.one_hot(labels, p.shape[1]))


@pytest.mark.parametrize(
    "logits", [[0.0, 0.0], [0.0, 1.0, -1.0, 2.0], [9.0, 0.0, 1.0], [0.0, -12.0, -9.0]]
)
def test_weighted_gradients_have_the_fisher_information_as_second_moment(
    logits: list[float],
) -> None:
    _, gradients = drawn_gradients(torch.tensor(logits), 20_000)
    p = torch.tensor(logits).double().softmax(-1)
    fisher = p.diag() - p.outer(p)
    error = (second_moment(gradients) - fisher).norm() / fisher.norm()
    assert error < 0.02
    # What is rare is no longer than the rest; float32 rounds the lengths of likely labels.
    lengths = gradients.norm(dim=1).double()
    torch.testing.assert_close(lengths, fisher.trace().sqrt().expand(20_000), rtol=0.05, atol=0)


def test_draw_never_takes_what_has_no_probability() -> None:
    labels, _ = drawn_gradients(torch.tensor([0.0, 2.0, 0.0, 3.0, 0.0]).log(), 4000)
    found = labels.bincount(minlength=5)
    assert found[[0, 2, 4]].sum() == 0
    # Of two labels, each is drawn as often as the other is likely.
    assert abs(int(found[1]) - 2400) < 4 * (4000 * 0.6 * 0.4) ** 0.5


def test_a_certain_prediction_has_no_gradient() -> None:
    for logits in ([200.0, 0.0, 0.0], [0.0, 0.0, 200.0]):
        _, gradients = drawn_gradients(torch.tensor(logits), 8)
        assert (gradients == 0).all()
