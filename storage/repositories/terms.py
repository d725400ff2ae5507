"""Words and tags that models are found by."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from sqlalchemy import ColumnElement, and_, exists, select
from sqlalchemy.orm import InstrumentedAttribute, Session, aliased

from deltadock.storage.tables import ModelTermRow, TermKind

RARE: Final = 500
"""Rows that are sorted rather than found in order."""
FEW: Final = 2000
"""Models with several common terms that are sorted: few of many have them, and a walk by name would
be long."""
MAX_WORDS: Final = 500
"""Words of one model that it is found by."""
_WORD: Final = re.compile(r"[^\W_]{1,64}")


def words_of(*texts: str) -> list[str]:
    """The words that a model with these texts is found by, in lower case, without repetition."""
    found = (word for text in texts for word in _WORD.findall(text.lower()))
    return list(dict.fromkeys(found))[:MAX_WORDS]


class TermFilter:
    """Which models have a tag, and words that begin as those of a text.

    Of terms that few models have, the first drives the statement (`few`): SQLite has no statistics
    by which it could choose one. `conditions` are for the others. If few models have all of several
    common terms, these models do.
    """

    def __init__(
        self, session: Session, tenant_id: str, *, tag: str | None, text: str | None
    ) -> None:
        self._terms = [partial(_is_word, word) for word in words_of(text or "")]
        if tag is not None:
            self._terms.append(partial(_is_tag, tag))
        self.few: Sequence[str] | None = None
        """The models with one or all of the terms, if they are few."""
        driver = aliased(ModelTermRow)

        def find(limit: int, term: _Term, *others: ColumnElement[bool]) -> Sequence[str]:
            query = select(driver.model_id).where(driver.tenant_id == tenant_id, term(driver))
            return session.scalars(query.where(*others).distinct().limit(limit)).all()

        for term in self._terms:
            if len(some := find(RARE + 1, term)) <= RARE:
                self.few = some
                self._terms.remove(term)
                return
        if len(self._terms) > 1:
            some = find(FEW + 1, self._terms[0], *self.conditions(driver.model_id)[1:])
            if len(some) <= FEW:
                self.few, self._terms = some, []

    def conditions(self, model_id: InstrumentedAttribute[str]) -> list[ColumnElement[bool]]:
        """That the model has the other terms; each is looked up among the model's own."""
        return [
            exists().where(ModelTermRow.model_id == model_id, term(ModelTermRow))
            for term in self._terms
        ]


_Term = Callable[[type[ModelTermRow]], ColumnElement[bool]]
"""Whether a row is of a term."""


def _is_word(beginning: str, row: type[ModelTermRow]) -> ColumnElement[bool]:
    return and_(
        row.kind == TermKind.WORD, row.term >= beginning, row.term < beginning + chr(0x10FFFF)
    )


def _is_tag(tag: str, row: type[ModelTermRow]) -> ColumnElement[bool]:
    return and_(row.kind == TermKind.TAG, row.term == tag)
