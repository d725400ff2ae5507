"""A model's real shapes with few blocks, compressed whole: each block's time, and a projection."""

import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.synthetic import write_pair, write_text
from deltadock.compression.pipeline import compress
from deltadock.compression.run import CompressOptions, Progress

MODELS: Final[dict[str, dict[str, Any]]] = {
    "qwen2.5-0.5b": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152_064,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 256,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Qwen2 configurations by name."""


@dataclass(slots=True)
class Timeline:
    """When a run reached what: seconds of each stage, and of each block within `compressing`."""

    stages: dict[str, float] = field(default_factory=dict)
    blocks: list[float] = field(default_factory=list)
    _stage: str = ""
    _block: int = 0
    _stage_began: float = field(default_factory=time.perf_counter)
    _block_began: float = 0.0

    def __call__(self, progress: Progress) -> None:
        """Note where the run is."""
        now = time.perf_counter()
        if progress.stage != self._stage:
            self._close(now)
            self._stage, self._block, self._block_began = progress.stage, 0, now
            print(f"{progress.stage} ...", flush=True)
        if progress.stage == "compressing" and progress.block > self._block:
            self.blocks.append(now - self._block_began)
            name = f"block {progress.block} of {progress.blocks}"
            print(f"  {name}: {self.blocks[-1]:.2f} s", flush=True)
            self._block, self._block_began = progress.block, now

    def _close(self, now: float) -> None:
        if self._stage:
            self.stages[self._stage] = self.stages.get(self._stage, 0.0) + now - self._stage_began
        self._stage_began = now

    def end(self) -> None:
        """Close the last stage."""
        self._close(time.perf_counter())


PER_BLOCK: Final = ("validating", "calibrating", "assembling", "verifying")
"""Stages that are taken to grow with the blocks, distillation in `assembling`; the embeddings' part
of them does not."""


def project(timeline: Timeline, blocks: int, whole: int) -> float:
    """Seconds of `whole` blocks, from a run of `blocks`.

    The output head, where it is compressed, is one more block in the timeline and is counted once.
    """
    decoder, head = timeline.blocks[:blocks], sum(timeline.blocks[blocks:])
    # The first block also pays for warm-up.
    steady = decoder[1:] or decoder
    rest = timeline.stages["compressing"] - sum(timeline.blocks)
    seconds = sum(steady) / len(steady) * whole + head + rest
    for stage, spent in timeline.stages.items():
        if stage != "compressing":
            seconds += spent * (whole / blocks if stage in PER_BLOCK else 1.0)
    return seconds


def time_model(
    name: str, blocks: int, method: str, bits: float, tokens: int, device: str
) -> Timeline:
    """Compress a synthetic pair of a model's shapes, print every block's time and a projection."""
    from transformers import Qwen2Config

    values = MODELS[name]
    whole = values["num_hidden_layers"]
    config = Qwen2Config(
        **{**values, "num_hidden_layers": blocks}, max_position_embeddings=32_768,
        bos_token_id=0, eos_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        base, tuned = write_pair(config, Path(folder), lambda tensor: True, device=device)
        # A tenth of the windows is held out.
        text = write_text(Path(folder) / "calibration.txt", tokens + tokens // 8)
        print(f"{name} with {blocks} of {whole} blocks, {method}, {bits:g} bits, {tokens} tokens; "
              f"pair written in {time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip
        timeline = Timeline()
        options = CompressOptions(method=method, bits=bits)
        report = compress(
            base, tuned, Path(folder) / "out.delta", options,
            calibration=text, progress=timeline, device=device,
        )  # fmt: skip
        timeline.end()
    for stage, seconds in timeline.stages.items():
        print(f"{stage:12} {seconds:8.2f} s")
    print(f"{'total':12} {sum(timeline.stages.values()):8.2f} s; ratio {report.ratio:.2f}, "
          f"KL {report.kl}")  # fmt: skip
    projected = project(timeline, blocks, whole)
    print(f"projected to {whole} blocks: {projected:.0f} s ({projected / 60:.1f} minutes)")
    return timeline
