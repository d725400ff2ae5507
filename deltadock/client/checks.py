"""What `push` refuses before hours of upload, as the server would after them."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from deltadock.artifacts.checkpoint import ADAPTER_TYPE, TOKENIZER, CheckpointManifest
from deltadock.artifacts.compatibility import check_same_architecture
from deltadock.artifacts.folder import scan_folder
from deltadock.client.routes import GoalOptions
from deltadock.compression.checks import check_compressible
from deltadock.compression.options import (
    METHODS,
    Goal,
    check_text_bytes,
    check_text_tokens,
    default_method,
    goal_for,
)
from deltadock.compression.preview import carried_bytes, preview_size
from deltadock.compression.shapes import read_shapes, shapes_of
from deltadock.errors import InvalidGoal, NotFound

LONG_TEXT_BYTES: Final = 1 << 16
"""A text of so many bytes has enough tokens for calibration."""


def check_method(
    base: CheckpointManifest,
    finetuned: CheckpointManifest,
    method: str | None,
    goal: GoalOptions,
    *,
    has_text: bool,
    known: Callable[[], Iterable[str]],
) -> tuple[str, Goal | None]:
    """The method and its goal, None if it has none or only the server knows the method.

    Args:
        known: the names of the server's methods.

    Raises:
        InvalidInput, Conflict: what the server would about them and the two checkpoints.
    """
    is_adapter = finetuned.config["model_type"] == ADAPTER_TYPE
    name = method or default_method(is_adapter=is_adapter).name
    if name not in METHODS and name in known():
        return name, None  # a newer server's
    info, wanted = goal_for(name, **goal)
    check_compressible(base.config, finetuned.config, info, wanted, has_text=has_text)
    if not is_adapter:
        check_same_architecture(base, finetuned)
    return name, wanted


def check_size(folder: Path, base: CheckpointManifest, method: str, goal: Goal) -> None:
    """Raise InvalidGoal if no artifact of this fine-tune is as small.

    Tensors that equal the base's take no room, but finding them reads the whole checkpoint:
    only where the size would be out of reach without them.
    """
    try:
        preview_size(read_shapes(folder), method, goal)
    except InvalidGoal:
        finetuned = scan_folder(folder)
        shapes, carried = shapes_of(finetuned, base), carried_bytes(finetuned, base)
        preview_size(shapes, method, goal, carried=carried)


def check_text(path: Path, folder: Path) -> None:
    """Refuse a calibration text that is too short, as far as it can be told here.

    Its tokens are counted where the fine-tune has a tokenizer, and `tokenizers` is installed.

    Raises:
        NotFound: there is no such file.
        InvalidCalibration: it is too short.
    """
    if not path.is_file():
        raise NotFound(f"There is no calibration file {path}.")
    size = path.stat().st_size
    check_text_bytes(path.name, size)
    if path.suffix == ".txt" and size < LONG_TEXT_BYTES and (folder / TOKENIZER).is_file():
        try:
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
            # Saved with it, of training; neither is calibration's.
            tokenizer.no_truncation()
            tokenizer.no_padding()
            text = path.read_text(encoding="utf-8-sig")
            tokens = len(tokenizer.encode(text, add_special_tokens=False).ids)
        except Exception:  # noqa: BLE001 (of no narrower class; the server says what is wrong)
            return
        check_text_tokens(tokens)
