"""Quality figures equal those of whole models, for any split of the vocabulary."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from deltadock.compression.checkpoints import CheckpointReader
from deltadock.compression.model import forward
from deltadock.compression.model.forward import BlockwiseModel
from deltadock.compression.quality import base_model, measure
from deltadock.errors import InvalidCalibration


@pytest.mark.parametrize("rope", [None, {"rope_type": "linear", "factor": 4.0}])
@pytest.mark.parametrize("tied", [True, False])
def test_figures_equal_those_of_whole_models(
    make_pair: Callable[..., tuple[Path, Path]],
    monkeypatch: pytest.MonkeyPatch,
    tied: bool,
    rope: dict[str, Any] | None,
) -> None:
    base, tuned = make_pair(tied=tied, scale=0.05)
    config = json.loads((tuned / "config.json").read_text())
    if rope is not None:
        config["rope_parameters"] |= rope
        (tuned / "config.json").write_text(json.dumps(config))
    windows = torch.randint(256, (6, 40), generator=torch.Generator().manual_seed(0))
    sources = CheckpointReader(base), CheckpointReader(tuned)

    model = BlockwiseModel(tuned)

    def figures(
        known: Tensor | None = None, delta: CheckpointReader = sources[1]
    ) -> dict[str, float]:
        return asdict(
            measure(
                model,
                base_model(model, *sources),
                windows,
                base=sources[0],
                finetuned=sources[1],
                delta=delta,
                known=known,
            )
        )

    whole = figures()
    states = model.embed(windows, sources[1])
    for index in range(len(model.blocks)):
        states = model.run_block(index, states, sources[1])
    assert figures(states) == whole
    # The heads of the three models are read alternately, piece by piece.
    monkeypatch.setattr(forward, "LOGITS_PER_STEP", 256 * 50)
    assert figures() == pytest.approx(whole, rel=1e-5, abs=1e-9)

    with torch.inference_mode():
        other, target = (
            F.log_softmax(
                AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(windows).logits,
                dim=-1,
            ).flatten(0, 1)
            for folder in (base, tuned)
        )
    kl = float(F.kl_div(other, target, reduction="batchmean", log_target=True))
    assert kl > 0.001
    assert whole["kl_base"] == pytest.approx(kl, rel=1e-4)
    assert whole["kl"] == pytest.approx(0, abs=1e-9)
    assert whole["agreement"] == 1
    if rope is None:  # the fine-tune's settings, with which a delta runs, are the base's
        kls = F.kl_div(other, target, reduction="none", log_target=True).sum(-1)
        error = float(kls.std(correction=0)) / math.sqrt(windows.numel())
        assert figures(delta=sources[0])["kl_error"] == pytest.approx(error, rel=1e-3)
        assert figures(delta=sources[0])["kl_max"] == pytest.approx(float(kls.max()), rel=1e-3)
    assert whole["kl_error"] == pytest.approx(0, abs=1e-9)


class Overflowing:
    """A checkpoint whose outputs are NaN in windows with the token `TOKEN`."""

    TOKEN = 7

    def __init__(self, source: CheckpointReader) -> None:
        self._source = source

    def __contains__(self, name: object) -> bool:
        return name in self._source

    def tensor(self, name: str) -> Tensor:
        tensor = self._source.tensor(name)
        if name == "model.embed_tokens.weight":
            tensor[self.TOKEN] = math.inf
        return tensor


def test_outputs_that_are_not_finite_agree_with_nothing(
    make_pair: Callable[..., tuple[Path, Path]],
) -> None:
    base, tuned = make_pair(tied=False)
    model, source = BlockwiseModel(tuned), CheckpointReader(tuned)
    windows = torch.randint(8, 256, (6, 40), generator=torch.Generator().manual_seed(0))
    windows[2, 30] = Overflowing.TOKEN
    sources = {"base": CheckpointReader(base), "finetuned": source, "delta": Overflowing(source)}
    quality = measure(model, model, windows, **sources)
    assert quality.agreement == pytest.approx(5 / 6)
    assert math.isnan(quality.kl)
    sources["finetuned"] = sources["delta"]
    with pytest.raises(InvalidCalibration, match="hold NaN or an infinity"):
        measure(model, model, windows, **sources)
