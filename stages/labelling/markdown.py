"""Instructions for annotators: render Markdown as HTML without raw HTML, without images, and only with web, mail and in-page links."""

from __future__ import annotations

from collections.abc import Sequence

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict


def render(text: str) -> str:
    """Convert Markdown to HTML. Raw HTML is shown as text, links open in a new tab, and images are replaced by their description."""
    if not text.strip():
        return ""

    parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    parser.validateLink = lambda url: url.lower().startswith(("http://", "https://", "mailto:", "#"))  # type: ignore[method-assign]
    parser.add_render_rule("link_open", _link_open)
    parser.add_render_rule("image", _image)
    parser.add_render_rule("heading_open", _lower_heading)
    parser.add_render_rule("heading_close", _lower_heading)
    return str(parser.render(text))


def _link_open(self: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType) -> str:
    tokens[index].attrSet("target", "_blank")
    tokens[index].attrSet("rel", "noopener noreferrer")
    return str(self.renderToken(tokens, index, options, env))


def _image(self: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType) -> str:
    return escapeHtml(f"[picture: {tokens[index].content}]")


def _lower_heading(self: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType) -> str:
    """Lower a heading by two levels, because the page has its own h1 and h2."""
    tokens[index].tag = f"h{min(6, int(tokens[index].tag[1]) + 2)}"
    return str(self.renderToken(tokens, index, options, env))
