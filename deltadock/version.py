"""The version, which artifacts and reports name, and where its docs are."""

from typing import Final

__version__: Final = "0.1.0"
DOCS: Final = "https://github.com/deltadock/deltadock/blob/main/docs"
