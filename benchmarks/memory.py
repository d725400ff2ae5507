"""Peak memory of compressing a checkpoint several times larger than the limit it is held to.

    python -m benchmarks.memory [--blocks 160] [--hidden 1024] [--intermediate 4096] \
        [--method adamix] [--bits 1] [--overhead-gb 2]

Writes a synthetic Llama-like pair block by block, compresses it in a process of its own and holds
that process's peak resident memory (mapped file pages included) against

    largest block's weights + its moments + activations + overhead,

with the base's and the fine-tune's weights once in float32, each distinct input's moment once in
float64, and the hidden states of every calibration token once in float32. Ends with status 1 if
the peak is over it.
"""

import argparse
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.harness import describe_machine
from benchmarks.synthetic import group_of, shapes_of, write_pair, write_text

GB: Final = 1e9


@dataclass(frozen=True, slots=True)
class Peak:
    """Resident memory of the compressing process, bytes, and what it made.

    Attributes:
        start: with the libraries imported.
        peak: the most at any time.
        ratio: checkpoint over artifact.
        seconds: that compressing took.
    """

    start: int
    peak: int
    ratio: float
    seconds: float


def resident(field: str) -> int:
    """A field of this process's memory status, bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"The system does not tell {field}; this benchmark needs Linux.")


def compress_here(
    base: Path, tuned: Path, text: Path, out: Path, options: dict[str, Any], threads: int
) -> Peak:
    """Compress in this process, which must be a fresh one, and tell its peak."""
    import torch

    from deltadock.compression.pipeline import compress
    from deltadock.compression.run import CompressOptions

    torch.set_num_threads(threads)
    start = resident("VmRSS")
    report = compress(base, tuned, out, CompressOptions(**options), calibration=text)
    return Peak(start, resident("VmHWM"), report.ratio, report.seconds)


def llama(blocks: int, hidden: int, intermediate: int) -> Any:
    """The configuration of a Llama with a vocabulary of 256 bytes."""
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
    """Bytes of the largest block's weights, its moments and the activations."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    blocks: dict[str, int] = {}
    for name, shape in shapes_of(config).items():
        if group := group_of(name):
            blocks[group] = blocks.get(group, 0) + shape.numel()
    heads = config.num_attention_heads * config.head_dim
    # q, k and v share their input, and so do gate and up.
    moments = 2 * hidden**2 + heads**2 + intermediate**2
    return {
        "block's weights, base and fine-tune, float32": 2 * 4 * max(blocks.values()),
        "its moments, float64": 8 * moments,
        "activations, float32": 4 * tokens * hidden,
    }


def run(arguments: argparse.Namespace) -> tuple[float, float]:
    """Make the pair, compress it and print the account: the peak and the limit, bytes."""
    config = llama(arguments.blocks, arguments.hidden, arguments.intermediate)
    step = max(1, arguments.blocks // arguments.changed)
    chosen = {f"model.layers.{k}" for k in range(step // 2, arguments.blocks, step)}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        base, tuned = write_pair(
            config, folder, lambda tensor: group_of(tensor) in chosen, alike=True
        )
        text = write_text(folder / "calibration.txt", arguments.tokens)
        size = sum(path.stat().st_size for path in tuned.glob("*.safetensors"))
        options = {"method": arguments.method, "bits": arguments.bits}
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
    print(f"  {'process before it starts':45} {peak.start / GB:7.3f} GB")
    print(f"  {'peak resident memory':45} {peak.peak / GB:7.3f} GB")
    print(f"  {'checkpoint (the base is as large)':45} {size / GB:7.3f} GB")
    print(f"Checkpoint over limit {size / limit:.2f}, checkpoint over peak {size / peak.peak:.2f}, "
          f"peak over limit {peak.peak / limit:.2f}; {peak.seconds:.0f} s")  # fmt: skip
    return peak.peak, limit


def verdict(peak: float, limit: float) -> int:
    """Say whether the peak is within the limit: 0 if it is, 1 if not."""
    print("PASS: within the limit" if peak <= limit else "FAIL: over the limit")
    return 0 if peak <= limit else 1


def main(argv: list[str] | None = None) -> int:
    """Read the command line; 0 if the peak is within the limit, 1 if not."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=160)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=4096)
    parser.add_argument("--changed", type=int, default=1, help="blocks that the fine-tune changes")
    parser.add_argument("--tokens", type=int, default=1024, help="of calibration")
    parser.add_argument("--method", default="adamix")
    parser.add_argument("--bits", type=float, default=1.0)
    parser.add_argument("--overhead-gb", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=2, help="torch's, in the measured process")
    parser.add_argument("--folder", type=Path, help="where there is room for the pair")
    return verdict(*run(parser.parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
