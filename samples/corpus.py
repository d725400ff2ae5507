"""Text from the Python installation: the language reference's topics and all docstrings.

The text is read from the running interpreter's standard library, so it differs slightly between
Python versions.
"""

import ast
import random
import sysconfig
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from pydoc_data.topics import topics

SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "ensurepip",
    "pydoc_data",
    "turtledemo",
    "__pycache__",
}
SEED = 2_024
HELD_OUT_BYTES = 60_000
LONGEST_HELD_OUT_TOPIC = 8_000
"""Characters; longer topics repeat shorter ones and would dominate the held-out text."""


def module_docstrings() -> Iterator[str]:
    """Yield each standard library module's docstrings as one document, ordered by path."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if SKIPPED_FOLDERS.intersection(path.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docstrings = [ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, documented)]
        if text := "\n\n".join(d for d in docstrings if d):
            yield text


def unseen_paragraphs(document: str, seen: set[str]) -> str:
    """Return the document without the paragraphs in `seen`, and add its paragraphs to `seen`."""
    kept = []
    for paragraph in document.split("\n\n"):
        key = " ".join(paragraph.split())
        if key and key not in seen:
            seen.add(key)
            kept.append(paragraph.strip("\n"))
    return "\n\n".join(kept)


def general_text() -> str:
    """Return the held-out text: text of the base's domain that it was not trained on."""
    return split_corpus(limit=0)[1]


def split_corpus(limit: int | None = None) -> tuple[list[str], str]:
    """Return the training documents, at most `limit`, and a held-out text of `HELD_OUT_BYTES`.

    The held-out text is drawn from the topics. No paragraph occurs twice in or across the two.
    """
    names = sorted(topics)
    random.Random(SEED).shuffle(names)
    seen: set[str] = set()
    held_out, size = [], 0
    for name in names:
        if size < HELD_OUT_BYTES and len(topics[name]) <= LONGEST_HELD_OUT_TOPIC:
            held_out.append(unseen_paragraphs(topics[name], seen))
            size += len(held_out[-1].encode())
    sources = chain((topics[name] for name in sorted(topics)), module_docstrings())
    documents = [
        text for source in islice(sources, limit) if (text := unseen_paragraphs(source, seen))
    ]
    return documents, "\n\n".join(text for text in held_out if text) + "\n"
