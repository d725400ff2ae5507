"""Whether an engine can serve a delta with merged weights, checked before anything is loaded."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

from deltadock.artifacts.checkpoint import CONFIG, MODEL_FILES, CheckpointManifest
from deltadock.artifacts.compatibility import quantization, tied_head
from deltadock.artifacts.configs import check_same_forward
from deltadock.artifacts.folder import scan_folder
from deltadock.artifacts.reader import Artifact
from deltadock.errors import InvalidArtifact, UnsupportedModel

GENERATION: Final = "generation_config.json"
TEMPLATE: Final = "chat_template.jinja"
TOKENIZER: Final = "tokenizer_config.json"
"""Older checkpoints have the template in it, as `chat_template`."""
MERGE: Final = "Write its checkpoint with `deltadock merge` and serve that."


class EngineFiles(NamedTuple):
    """The folders that an engine was started with."""

    base: Path
    """Of the checkpoint, as it was before it was quantized."""
    tokenizer: Path
    generation_config: Path | None
    """None: vLLM's own defaults."""

    def folder(self, name: str) -> Path | None:
        """Where the engine took a file of the model from."""
        return self.generation_config if name == GENERATION else self.tokenizer


@cache
def base_manifest(folder: Path) -> CheckpointManifest:
    """The base's tensors and digests; its files are hashed once a process."""
    return scan_folder(folder)


def check_servable(
    artifact: Artifact, files: EngineFiles, *, own_template: bool = False
) -> str | None:
    """Refuse a delta that this engine would not answer for as its fine-tune does.

    Args:
        own_template: whether conversations can be rendered with another chat template than that of
            the engine's tokenizer.

    Returns:
        The delta's chat template, if it is another.

    Raises:
        BaseMismatch: it is of another base.
        InvalidArtifact: it is damaged, or does not fit the base's tensors.
        ArchitectureMismatch: its config.json uses the weights differently.
        UnsupportedModel: the engine's base is stored quantized; the delta adds tokens, unties the
            head, or has a tokenizer, template, generation defaults or rotary embeddings that the
            engine was not started with.
    """
    manifest = base_manifest(files.base)
    if method := quantization(manifest):
        raise UnsupportedModel(
            f"This engine's base is stored quantized ({method}), and deltas are of what it was "
            "before. Serve that with --quantization, which quantizes at load; or, with "
            "--enable-lora, name its folder: "
            """--additional-config '{"deltadock": {"base": "FOLDER"}}'."""
        )
    artifact.check_base(manifest.weights_digest)
    artifact.check_intact()
    _check_tensors(artifact, manifest)
    _check_config(artifact, files.base)
    own: Mapping[str, str | bytes | None] = {**artifact.files, **artifact.binary_files}
    wanted: dict[str, bytes | None] = {}
    started: dict[str, bytes | None] = {}
    for name in sorted(MODEL_FILES - {CONFIG}):
        if (folder := files.folder(name)) is not None:
            content = own[name] if name in own else _content(files.base / name)
            wanted[name] = content.encode() if isinstance(content, str) else content
            started[name] = _content(folder / name)
    template, wanted_rest = _template(wanted)
    other, started_rest = _template(started)
    if not own_template or template is None or template == other:
        template, wanted_rest, started_rest = None, wanted, started
    for name, content in wanted_rest.items():
        if content != started_rest[name]:
            folder = files.folder(name)
            raise UnsupportedModel(
                f"The delta's {name} is not the one that this engine was started with, in "
                f"{folder}. {MERGE} Or start vLLM with --tokenizer and --generation-config "
                "of a folder that has the fine-tune's files."
            )
    return template


def _template(
    files: Mapping[str, bytes | None],
) -> tuple[str | None, Mapping[str, Any]]:
    """The chat template, as `transformers` finds it, and the files without it."""
    rest: dict[str, Any] = dict(files)
    own_file = rest.pop(TEMPLATE, None)
    try:
        rest[TOKENIZER] = json.loads(rest[TOKENIZER] or b"{}")
        in_config = rest[TOKENIZER].pop("chat_template", None)
        template = in_config if own_file is None else own_file.decode()
    except (ValueError, AttributeError, RecursionError) as error:
        raise InvalidArtifact(f"A {TOKENIZER} or {TEMPLATE} is invalid.") from error
    return (template if isinstance(template, str) else None), rest


def _check_tensors(artifact: Artifact, manifest: CheckpointManifest) -> None:
    entries = {entry.name: entry for entry in manifest.tensors}
    tied = tied_head(manifest)
    for name in artifact.records:
        record = artifact.resolved(name).record
        if name in tied and name not in entries:
            if artifact.records[name]["kind"] != "alias":
                raise UnsupportedModel(
                    f"The fine-tune's {name} is not tied to its embedding as the base's is. {MERGE}"
                )
        elif name not in entries:
            raise InvalidArtifact(f"The delta changes {name!r}, which the base lacks.")
        elif record["kind"] == "new-rows" or list(entries[name].shape) != record["shape"]:
            raise UnsupportedModel(f"The fine-tune has added tokens, by {name!r}. {MERGE}")


def _check_config(artifact: Artifact, base: Path) -> None:
    text = artifact.files.get(CONFIG)
    if text is None:
        return
    try:
        own = json.loads(text)
        different = check_same_forward(json.loads((base / CONFIG).read_bytes()), own)
    except (ValueError, AttributeError, RecursionError) as error:
        raise InvalidArtifact(f"The delta's {CONFIG} is invalid.") from error
    if different:
        keys = ", ".join(one.key for one in different)
        raise UnsupportedModel(f"The fine-tune's config.json has its own {keys}. {MERGE}")


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
