"""Write a PEFT adapter as a delta file, and measure deltas against adapters."""

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import torch

from deltadock import words
from deltadock.artifacts.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CHAT_TEMPLATE,
    CONFIG,
    TOKENIZER_CONFIG,
    configures_chat,
)
from deltadock.artifacts.compatibility import TIED, is_tied, with_vocabulary
from deltadock.artifacts.encodings import (
    Encoded,
)
from deltadock.artifacts.folder import folder_files, ignored_files
from deltadock.artifacts.names import is_head
from deltadock.artifacts.reader import Artifact
from deltadock.artifacts.writer import write_artifact
from deltadock.compression.adapters.config import model_name, read_config
from deltadock.compression.adapters.encoding import adapter_digest, encode_adapter
from deltadock.compression.assembly import CarriedFiles, build_manifest, read_carried
from deltadock.compression.calibration.windows import (
    MEASURED_TOKENS,
    load_calibration,
    read_windows,
    sample_windows,
)
from deltadock.compression.checkpoints import CheckpointReader, ResizedSource
from deltadock.compression.model.forward import BlockwiseModel
from deltadock.compression.options import CompressOptions, Source
from deltadock.compression.progress import ProgressReporter
from deltadock.compression.quality import WINDOW, MergedSource, measure
from deltadock.compression.report import Quality, Report, TensorReport, not_measured
from deltadock.compression.work import comparing, measuring
from deltadock.errors import (
    InvalidInput,
)

_HUB_NAME: Final = re.compile(r"(\w[\w.-]{0,95}/)?\w[\w.-]{0,95}", re.ASCII)
_HUB_CACHE: Final = re.compile(r"models--([^/\\]+)[/\\]snapshots[/\\]")


def import_adapter(
    base: Path,
    adapter: Path,
    out: Path,
    options: CompressOptions,
    *,
    calibration: Sequence[Source],
    progress: ProgressReporter,
    device: str = "cpu",
    base_name: str = "",
) -> Report:
    """Write a PEFT adapter as a delta file, with the tokenizer files that were saved with it.

    The fine-tune is the base with the adapter: the report has the KL of the base to it, and a KL
    of zero for the delta.

    Args:
        base: checkpoint folder that the adapter was trained on.
        adapter: folder of adapter_config.json and adapter_model.safetensors.
        out: the delta file.
        options: only the seed and the amount of text are used.
        calibration: optional text, read with the base's tokenizer; without any, the figures are of
            text sampled from the base with the adapter.
        progress: reports every step.
        device: torch device.
        base_name: what the base is called, by default as its folder is; where the adapter names
            another, the report asks if it is the adapter's.

    Raises:
        InvalidInput: a subclass names what cannot be imported.
    """
    progress.report("reading", 0, 1, "reading the base")
    reader = CheckpointReader(base)
    encoded = encode_adapter(reader, adapter)
    progress.report("writing", 0, 1, "writing the artifact")
    shapes = _write(out, reader, adapter, encoded, options)
    report = Report(
        method=options.method,
        nominal_bits=None,
        artifact_bytes=out.stat().st_size,
        checkpoint_bytes=reader.bf16_bytes,
        parameters=reader.parameters,
        base_digest=reader.manifest.weights_digest,
        calibration=None,
        other_tensors=[
            TensorReport(name, one.record["kind"], list(one.record["shape"]), one.nbytes)
            for name, one in encoded.items()
        ],
        notes=[
            *_other_base(
                read_config(adapter).base, base_name or model_name(base).rpartition("/")[2]
            ),
            *_mostly_whole(encoded, reader),
            *ignored_files(adapter, folder_files(adapter, adapter=True)),
        ],
    )
    progress.expect(comparing(MEASURED_TOKENS) if calibration else measuring(MEASURED_TOKENS))
    with Artifact(out) as artifact:
        merged = MergedSource(reader, artifact, torch.device(device))
        try:
            model = BlockwiseModel(base, device, reader.entries)
            if calibration:
                data = load_calibration(
                    calibration, base, model.max_length, options.seed, options.calibration, device,
                    lambda text, done: progress.report("sampling", 0, 1, text, done),
                )  # fmt: skip
                windows, measured_on, notes = data.report, data.measured_on, data.notes
            else:
                windows, measured_on, notes = sample_windows(
                    reader, model.max_length, options, device,
                    lambda text, done: progress.report("sampling", 0, 1, text, done),
                    changes={name: merged.tensor(name) for name in encoded if name in merged},
                )  # fmt: skip
            quality = measure(
                model,
                model,
                windows,
                base=ResizedSource(reader, shapes),
                finetuned=merged,
                delta=merged,
                progress=lambda k, n: progress.report("comparing", k, n, "comparing outputs"),
            )
        except InvalidInput as error:
            if calibration:  # a text that cannot be used is the caller's mistake
                raise
            report.notes.append(not_measured(error))
        else:
            report.notes += notes
            report.set_quality(quality, measured_on)
    return report


def _other_base(named: str, given: str) -> list[str]:
    """A note if the base that an adapter names is called otherwise than the given one.

    Names are all that can be compared: the factors fit every model of the same shapes. A folder of
    the trainer's machine has a name of its own, and its path is nobody else's business; one in the
    Hub's cache has the model's.
    """
    cached = _HUB_CACHE.search(named)
    name = cached[1].replace("--", "/", 1) if cached else named
    is_same = name.rpartition("/")[2].casefold() == given.casefold()
    if is_same or not _HUB_NAME.fullmatch(name):
        return []
    return [
        f"Is {given!r} the base that the adapter was trained on? Its {ADAPTER_CONFIG} names "
        f"{name!r}."
    ]


def _mostly_whole(encoded: Mapping[str, Encoded], base: CheckpointReader) -> list[str]:
    """A note if most of the adapter's bytes are of tensors that it holds whole."""
    whole = {
        name: one for name, one in encoded.items() if one.record["kind"] in ("exact", "new-rows")
    }
    taken = sum(one.nbytes for one in whole.values())
    total = sum(one.nbytes for one in encoded.values())
    if 2 * taken <= total:
        return []
    largest = max(whole, key=lambda name: whole[name].nbytes)
    dtype = whole[largest].record["dtype"]
    before = base.entries[largest].dtype
    wider = f", in {dtype} where the base has {before}" if dtype != before else ""
    return [
        f"{words.size(taken)} of {words.size(total)} are tensors that the adapter holds whole, as "
        f"modules_to_save does ({largest}{wider}), and they are kept exactly. For a smaller delta "
        "merge the adapter into its base with PEFT's merge_and_unload, save it in the base's "
        "dtype, and push that."
    ]


def evaluate_adapter(
    base: Path,
    adapter: Path,
    delta: Path,
    text: Path,
    *,
    window: int = WINDOW,
    progress: Callable[[int, int], None] = lambda done, total: None,
    device: str = "cpu",
) -> Quality:
    """As `quality.evaluate`, of a fine-tune that is its base with a PEFT adapter.

    Args:
        base, adapter: folders.
        delta, text, window, progress, device: as for `quality.evaluate`.

    Raises:
        BaseMismatch: the delta belongs to another base.
        InvalidInput: a subclass names what cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix="deltadock-adapter-") as name, Artifact(delta) as found:
        reader, exact = CheckpointReader(base), Path(name, "adapter.delta")
        found.check_base(reader.manifest.weights_digest)
        found.check_intact()
        encoded = encode_adapter(reader, adapter)
        shapes = _write(exact, reader, adapter, encoded, CompressOptions("lora"))
        model = BlockwiseModel(base, device, reader.entries)
        with Artifact(exact) as finetuned:
            return measure(
                model,
                model,
                read_windows(text, base, min(window, model.max_length)),
                base=ResizedSource(reader, shapes),
                finetuned=MergedSource(reader, finetuned, model.device),
                delta=MergedSource(reader, found, model.device),
                progress=progress,
            )


def _write(
    out: Path,
    base: CheckpointReader,
    adapter: Path,
    encoded: Mapping[str, Encoded],
    options: CompressOptions,
) -> dict[str, tuple[int, ...]]:
    """Write the delta file of an encoded adapter; returns the shapes of its model's tensors."""
    untied = is_tied(base.manifest) and any(
        is_head(name) and one.record["kind"] != "alias" for name, one in encoded.items()
    )
    shapes = base.shapes | {name: tuple(one.record["shape"]) for name, one in encoded.items()}
    manifest = build_manifest(
        base,
        options,
        _carried(base, adapter, shapes, untied=untied),
        finetuned_digest=adapter_digest(adapter),
        parameters=base.parameters,
    )
    write_artifact(out, encoded, manifest)
    return shapes


def _carried(
    base: CheckpointReader,
    adapter: Path,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    untied: bool,
) -> CarriedFiles:
    """Tokenizer files that differ from the base's, and a config.json if the adapter adds tokens or
    unties the head.

    A chat template in the adapter's tokenizer_config.json removes the base's chat_template.jinja,
    which would override it.
    """
    before = {file.path: file.sha256 for file in base.manifest.files}
    found = [
        name
        for name in sorted(folder_files(adapter, adapter=True) - {ADAPTER_CONFIG, ADAPTER_WEIGHTS})
        if (path := adapter / name).is_file()
        and hashlib.sha256(path.read_bytes()).hexdigest() != before.get(name)
    ]
    texts, others = read_carried(adapter, found)
    if (
        CHAT_TEMPLATE in before
        and not (adapter / CHAT_TEMPLATE).is_file()
        and configures_chat(texts.get(TOKENIZER_CONFIG))
    ):
        texts[CHAT_TEMPLATE] = None
    rows = max(
        (shape[0] for name, shape in shapes.items() if shape > base.entries[name].shape), default=0
    )
    config = base.manifest.config
    if rows:
        config = with_vocabulary(config, rows)
    if untied:
        config = config | {TIED: False}
    if rows or untied:
        texts[CONFIG] = json.dumps(config, indent=2)
    return texts, others
