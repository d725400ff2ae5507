"""Model cards: Markdown to HTML that is safe to show."""

from typing import Final

import nh3
from markdown_it import MarkdownIt
from markupsafe import Markup

_PARSER: Final = MarkdownIt("js-default", {"html": False, "linkify": False})
_TAGS: Final = {
    "a", "blockquote", "br", "code", "em", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre",
    "s", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
}  # fmt: skip
_HEADINGS: Final = 2
"""Levels by which a card's headings are lowered: the page has an `h1` and the section an `h2`."""


def markdown(text: str) -> Markup:
    """The text as HTML: no raw HTML, no images, links to http, https and mailto alone."""
    tokens = _PARSER.parse(text)
    for token in tokens:
        if token.type in {"heading_open", "heading_close"}:
            token.tag = f"h{min(int(token.tag[1:]) + _HEADINGS, 6)}"
    html = _PARSER.renderer.render(tokens, _PARSER.options, {})
    # Safe: nh3 keeps nothing but these tags.
    return Markup(
        nh3.clean(
            html, tags=_TAGS, attributes={"a": {"href"}}, url_schemes={"http", "https", "mailto"}
        )
    )
