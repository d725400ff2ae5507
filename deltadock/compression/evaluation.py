"""Measuring a stored delta against its fine-tune on any text."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

from deltadock.artifacts.compatibility import check_same_architecture
from deltadock.artifacts.reader import Artifact
from deltadock.compression.calibration.windows import read_windows
from deltadock.compression.model.forward import BlockwiseModel
from deltadock.compression.model.weights import Checkpoint, Grown
from deltadock.compression.quality import MergedSource, Quality, measure

WINDOW: Final = 256
"""Tokens of a window by default: about what a prompt and its answer take together."""


def evaluate(
    base: Path,
    finetuned: Path,
    delta: Path,
    text: Path,
    *,
    window: int = WINDOW,
    progress: Callable[[int, int], None] = lambda done, total: None,
    device: str = "cpu",
) -> Quality:
    """Compare the delta's model with its fine-tune and its base on a text.

    Args:
        base, finetuned: checkpoint folders.
        delta: the delta file.
        text: .txt or .jsonl file, as for calibration.
        window: tokens that are run together; each window begins without context.
        progress: told how many of how many block passes are done.
        device: torch device.

    Raises:
        BaseMismatch: the delta belongs to another base.
        InvalidInput: a subclass names what cannot be used.
    """
    with Artifact(delta) as artifact:
        source = Checkpoint(base)
        artifact.check_base(source.manifest.weights_digest)
        artifact.check_intact()
        tuned = Checkpoint(finetuned)
        check_same_architecture(source.manifest, tuned.manifest)
        model = BlockwiseModel(finetuned, device)
        shapes = {name: entry.shape for name, entry in tuned.entries.items()}
        model.check(shapes)
        longest = getattr(model.config, "max_position_embeddings", None) or window
        windows = read_windows(text, finetuned, min(window, longest))
        return measure(
            model,
            windows,
            base=Grown(source, shapes),
            finetuned=tuned,
            delta=MergedSource(source, artifact),
            progress=progress,
        )
