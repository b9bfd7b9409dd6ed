"""Pages from Jinja templates, which are beside this file in templates/."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
"""Templates by file name. HTML is escaped; a name that a template lacks is an error."""


def render(template: str, **values: Any) -> str:
    """Fill in a template.

    Args:
        template: File name in templates/.
        values: Values by the names that the template uses.
    """
    return PAGES.get_template(template).render(**values)
