"""Peak memory of compressing a checkpoint several times larger than the memory limit.

    python -m benchmarks.memory [--blocks 160] [--hidden 1024] [--intermediate 4096] \
        [--method adamix] [--bits 1] [--overhead-gb 2]

Writes a synthetic Llama-like pair block by block, compresses it in a fresh process and compares
that process's peak resident memory (mapped file pages included) with

    largest block's weights + its moments + activations + overhead,

where the base's and the fine-tune's weights count once in float32, each distinct input's moment
once in float64, and the hidden states of every calibration token once in float32. Exits with status
1 if the peak exceeds the limit.
"""

import argparse
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.harness import describe_machine
from benchmarks.synthetic import block_of, shapes_of, write_pair, write_text
from deltadock.compression.options import CompressOptions, Goal

GB: Final = 1e9


@dataclass(frozen=True, slots=True)
class MemoryPeak:
    """Resident memory of the compressing process, bytes, and its result.

    Attributes:
        start: after importing the libraries.
        peak: maximum.
        ratio: checkpoint bytes over artifact bytes.
        seconds: of the compression.
    """

    start: int
    peak: int
    ratio: float
    seconds: float


def resident(field: str) -> int:
    """A field of /proc/self/status, bytes.

    Raises:
        OSError: the field is missing.
    """
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/self/status has no {field}; this benchmark needs Linux.")


def compress_here(
    base: Path, tuned: Path, text: Path, out: Path, options: CompressOptions, threads: int
) -> MemoryPeak:
    """Compress in this process, which must be fresh, and return its peak."""
    import torch

    from deltadock.compression.pipeline import compress

    torch.set_num_threads(threads)
    start = resident("VmRSS")
    report = compress(base, tuned, out, options, calibration=text)
    return MemoryPeak(start, resident("VmHWM"), report.ratio, report.seconds)


def llama(blocks: int, hidden: int, intermediate: int) -> Any:
    """Configuration of a Llama with a byte vocabulary."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )


def allowance(config: Any, tokens: int) -> dict[str, float]:
    """Bytes of the largest block's weights, of its moments and of the activations."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    blocks: dict[str, int] = {}
    for name, shape in shapes_of(config).items():
        if group := block_of(name):
            blocks[group] = blocks.get(group, 0) + shape.numel()
    heads = config.num_attention_heads * config.head_dim
    # q, k and v share an input, as do gate and up.
    moments = 2 * hidden**2 + heads**2 + intermediate**2
    return {
        "block's weights, base and fine-tune, float32": 2 * 4 * max(blocks.values()),
        "its moments, float64": 8 * moments,
        "activations, float32": 4 * tokens * hidden,
    }


def run(arguments: argparse.Namespace) -> tuple[float, float]:
    """Write and compress the pair and print the accounting; returns peak and limit, bytes."""
    config = llama(arguments.blocks, arguments.hidden, arguments.intermediate)
    step = max(1, arguments.blocks // arguments.changed)
    chosen = {f"model.layers.{k}" for k in range(step // 2, arguments.blocks, step)}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        base, tuned = write_pair(
            config, folder, lambda tensor: block_of(tensor) in chosen, identical_blocks=True
        )
        text = write_text(folder / "calibration.txt", arguments.tokens)
        size = sum(path.stat().st_size for path in tuned.glob("*.safetensors"))
        options = CompressOptions(arguments.method, Goal("bits", arguments.bits))
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
            peak = pool.submit(
                compress_here, base, tuned, text, folder / "out.delta", options, arguments.threads
            ).result()
    parts = allowance(config, arguments.tokens)
    limit = sum(parts.values()) + arguments.overhead_gb * GB
    print(f"Machine: {describe_machine()}")
    print(f"{arguments.method}, {arguments.bits:g} bits, {arguments.blocks} blocks, of which "
          f"{len(chosen)} are compressed, {arguments.tokens} tokens")  # fmt: skip
    for part, number in (*parts.items(), ("overhead", arguments.overhead_gb * GB)):
        print(f"  {part:45} {number / GB:7.3f} GB")
    print(f"  {'limit':45} {limit / GB:7.3f} GB")
    print(f"  {'process at start':45} {peak.start / GB:7.3f} GB")
    print(f"  {'peak resident memory':45} {peak.peak / GB:7.3f} GB")
    print(f"  {'checkpoint (the base is as large)':45} {size / GB:7.3f} GB")
    print(f"Checkpoint over limit {size / limit:.2f}, checkpoint over peak {size / peak.peak:.2f}, "
          f"peak over limit {peak.peak / limit:.2f}; {peak.seconds:.0f} s")  # fmt: skip
    return peak.peak, limit


def verdict(peak: float, limit: float) -> int:
    """Print whether the peak is within the limit; 0 if so, else 1."""
    print("PASS: within the limit" if peak <= limit else "FAIL: over the limit")
    return 0 if peak <= limit else 1


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 if the peak is within the limit, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=160)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=4096)
    parser.add_argument("--changed", type=int, default=1, help="number of blocks that differ")
    parser.add_argument("--tokens", type=int, default=1024, help="calibration tokens")
    parser.add_argument("--method", default="adamix")
    parser.add_argument("--bits", type=float, default=1.0)
    parser.add_argument("--overhead-gb", type=float, default=2.0)
    parser.add_argument(
        "--threads", type=int, default=2, help="torch threads of the measured process"
    )
    parser.add_argument("--folder", type=Path, help="parent folder of the temporary pair")
    return verdict(*run(parser.parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
