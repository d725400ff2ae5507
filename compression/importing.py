"""A PEFT adapter as a delta file: imported as it is, beside what is compressed."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from artifacts.reader import Artifact
from artifacts.writer import write_artifact
from compression.calibration.options import Source
from compression.calibration.windows import load_calibration
from compression.methods.lora import adapter_digest, import_adapter
from compression.model.forward import BlockwiseModel
from compression.model.weights import Checkpoint
from compression.quality import MergedSource, measure
from compression.report import Report, TensorReport
from compression.run import CompressOptions, Progress
from deltadock import __version__


def import_delta(
    base: Path,
    adapter: Path,
    out: Path,
    options: CompressOptions,
    *,
    calibration: Sequence[Source],
    progress: Callable[[Progress], None],
    device: str = "cpu",
) -> Report:
    """Write the delta file that a PEFT adapter stands for, without loss.

    The fine-tune is the base with the adapter: where calibration text is given, the report's KL of
    the base says what the adapter changes, and its own is zero.

    Args:
        base: checkpoint folder that the adapter was trained on.
        adapter: folder of adapter_config.json and adapter_model.safetensors.
        out: the delta file.
        options: only the seed and the amount of text count.
        calibration: optional text, read with the base's tokenizer.
        progress: told of every step.
        device: torch device.

    Raises:
        InvalidInput: a subclass names what cannot be imported.
    """
    started = time.monotonic()
    progress(Progress("validating", 0, 1, 0.0, "hashing the base"))
    source = Checkpoint(base)
    encoded = import_adapter(base, adapter)
    progress(Progress("assembling", 0, 1, 0.5, "writing the artifact"))
    manifest = {
        "base_digest": source.manifest.weights_digest,
        "finetuned_digest": adapter_digest(adapter),
        "model_type": source.manifest.config["model_type"],
        "method": options.method,
        "nominal_bits": None,
        "settings": {},
        "seed": options.seed,
        "calibration": None,
        "checkpoint_bytes": source.bf16_bytes,
        "parameters": source.parameters,
        "version": __version__,
        "files": {},
        "binary_files": {},
        "matrices": {},
    }
    write_artifact(out, encoded, manifest)
    report = Report(
        method=options.method,
        nominal_bits=None,
        artifact_bytes=out.stat().st_size,
        checkpoint_bytes=source.bf16_bytes,
        parameters=source.parameters,
        base_digest=source.manifest.weights_digest,
        calibration=None,
        other_tensors=[
            TensorReport(name, one.record["kind"], list(one.record["shape"]), one.nbytes)
            for name, one in encoded.items()
        ],
    )
    if calibration:
        model = BlockwiseModel(base, device)
        longest = getattr(model.config, "max_position_embeddings", None) or 1 << 30
        data = load_calibration(
            calibration, base, longest, options.seed, options.calibration, device
        )
        with Artifact(out) as artifact:
            merged = MergedSource(source, artifact)
            report.set_quality(
                measure(
                    model,
                    data.held_out,
                    base=source,
                    finetuned=merged,
                    delta=merged,
                    progress=lambda k, n: progress(
                        Progress("verifying", k, n, 0.6 + 0.4 * k / n, "comparing outputs")
                    ),
                )
            )
    report.seconds = time.monotonic() - started
    return report
