"""MkDocs hook: a page for each module of the package, in the order of the packages, with mkdocstrings.

The root of the repository is the package, and holds folders that are no part of it (`.venv`, `runs`, `build`). So the
package's own files are copied to `build/api/videoalign`, where mkdocstrings looks (`paths` in mkdocs.yml).
"""

import configparser
import shutil
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
COPY = ROOT / "build" / "api" / "videoalign"
ORDER = ("models", "datamodules", "callbacks", "alignment", "commands", "miniature", "annotation")
SECTION = "API"


def _modules() -> list[str]:
    """Dotted names below the package, of every module that a reader may import."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    packages = [name.split(".")[1:] for name in setup["options"]["packages"].split()]
    packages.sort(key=lambda parts: (ORDER.index(parts[0]) if parts else len(ORDER), parts))
    found = [""]  # the package itself
    for parts in packages:
        folder = ROOT.joinpath(*parts)
        found += [".".join(parts)] if parts else []
        stems = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
        found += [".".join([*parts, stem]) for stem in stems]
    return found


def _page(module: str) -> str:
    return f"reference/api/{module or 'videoalign'}.md"


def on_startup(*, command: str, dirty: bool) -> None:
    """Copy the package's files before mkdocstrings looks which of its paths exist."""
    shutil.rmtree(COPY, ignore_errors=True)
    for module in _modules():
        source = ROOT.joinpath(*module.split(".")) if module else ROOT
        source = source / "__init__.py" if source.is_dir() else source.with_suffix(".py")
        target = COPY / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the package's modules into the navigation."""
    tree: dict[str, list] = {}
    for module in _modules():
        top = module.split(".")[0]
        tree.setdefault(top if top in ORDER else "videoalign", []).append({module or "videoalign": _page(module)})
    reference = next(entry for entry in config.nav if "Reference" in entry)["Reference"]
    reference.append({SECTION: [{name: pages} for name, pages in tree.items()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Generate the pages."""
    for module in _modules():
        # mkdocstrings makes no heading of its own for a module, so the anchor that links lead to is set here
        path = f"videoalign.{module}" if module else "videoalign"
        text = f"# {module or 'videoalign'} {{ #{path} }}\n\n::: {path}\n"
        files.append(File.generated(config, _page(module), content=text))
    return files
