"""MkDocs hook: files of the repository's root as pages, with the links between them and `docs/` kept whole."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "RESULTS.md": "all_results.md",
    "ON_POLICY.md": "all_on_policy_results.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Pages by the name of their file in the root."""
_SOURCE = re.compile(
    r"\]\((?:\.\./)+((?:models|datamodules|callbacks|alignment|commands|miniature|annotation)/[\w/]+)\.py\)"
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages; links into `docs/` become links beside them."""
    for name, page in PAGES.items():
        text = re.sub(r"\]\(docs/", "](", (ROOT / name).read_text(encoding="utf-8"))
        for other, target in PAGES.items():
            text = text.replace(f"]({other}", f"]({target}")
        # what is not on the site is named, not linked
        text = re.sub(r"\[([^\]]*)\]\((?!http|#)[^)\s]*\.json\)", r"\1", text)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links that leave `docs/` at pages of the site.

    Links to source files lead to the API's pages; files that are not on the site are named without a link.
    """
    depth = page.file.src_uri.count("/")
    for name, target in PAGES.items():
        markdown = markdown.replace(f"]({'../' * (depth + 1)}{name}", f"]({'../' * depth}{target}")
    markdown = _SOURCE.sub(lambda m: f"]({'../' * depth}reference/api/{m[1].replace('/', '.')}.md)", markdown)
    return re.sub(r"\[([^\]]*)\]\((?!http|#)[^)\s]*\.(?:json|yaml|cff|py|sbatch)\)", r"\1", markdown)
