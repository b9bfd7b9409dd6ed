"""MkDocs hook: formulas as MathML, which browsers draw by themselves, so that no script has to be fetched.

Arithmatex marks what stands between dollars; this hook translates it when a page has been rendered. GitHub draws the
same source by itself.
"""

import html
import re

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.S)
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.S)


def on_page_content(text: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Translate the formulas of a page."""
    text = _INLINE.sub(lambda match: convert(html.unescape(match[1])), text)
    return _BLOCK.sub(
        lambda match: f'<div class="formula">{convert(html.unescape(match[1]), display="block")}</div>', text
    )
