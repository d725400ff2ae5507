"""A PEFT adapter as a delta file: imported as it is, beside what is compressed."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from deltadock.artifacts.checkpoint import CONFIG
from deltadock.artifacts.compatibility import VOCABULARY
from deltadock.artifacts.reader import Artifact
from deltadock.artifacts.writer import write_artifact
from deltadock.compression.assembly.assembling import CarriedFiles, read_carried
from deltadock.compression.calibration.options import Source
from deltadock.compression.calibration.windows import load_calibration
from deltadock.compression.methods.lora import adapter_digest, import_adapter
from deltadock.compression.model.forward import BlockwiseModel
from deltadock.compression.model.weights import Checkpoint, Grown
from deltadock.compression.quality import MergedSource, measure
from deltadock.compression.report import Report, TensorReport
from deltadock.compression.run import CompressOptions, Progress
from deltadock.version import __version__

TOKENIZER_FILES: Final = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
"""What of an adapter's folder is for serving; a trainer leaves much else there."""


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

    The tokenizer and chat template that were saved with the adapter travel along.
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
    shapes = {name: entry.shape for name, entry in source.entries.items()}
    shapes |= {name: tuple(one.record["shape"]) for name, one in encoded.items()}
    texts, others = _carried(source, adapter, shapes)
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
        "files": texts,
        "binary_files": others,
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
                    base=Grown(source, shapes),
                    finetuned=merged,
                    delta=merged,
                    progress=lambda k, n: progress(
                        Progress("verifying", k, n, 0.6 + 0.4 * k / n, "comparing outputs")
                    ),
                )
            )
    report.seconds = time.monotonic() - started
    return report


def _carried(
    base: Checkpoint, adapter: Path, shapes: Mapping[str, tuple[int, ...]]
) -> CarriedFiles:
    """Tokenizer files of the adapter's folder that differ from the base's, and a config.json that
    tells of tokens which the adapter adds."""
    before = {file.path: file.sha256 for file in base.manifest.files}
    found = [
        name
        for name in TOKENIZER_FILES
        if (path := adapter / name).is_file()
        and hashlib.sha256(path.read_bytes()).hexdigest() != before.get(name)
    ]
    texts, others = read_carried(adapter, found)
    rows = max(
        (shape[0] for name, shape in shapes.items() if shape > base.entries[name].shape), default=0
    )
    if rows and VOCABULARY in base.manifest.config:
        config = dict(base.manifest.config) | {VOCABULARY: rows}
        texts[CONFIG] = json.dumps(config, indent=2)
    return texts, others
