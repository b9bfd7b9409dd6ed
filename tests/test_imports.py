"""The structure of the package: imports point one way, and no file is imported in a circle."""

import ast
from pathlib import Path

import pytest

import videoalign
from helpers import syntax

ROOT = Path(videoalign.__file__).parent
ORDER = ("models", "datamodules", "callbacks", "alignment", "commands", "miniature", "annotation", "cli", "__main__")
"""Packages and files from the bottom to the top. What stands beside them at the top level imports none of them."""
FOLDERS = ORDER[:-2]


def modules():
    """Dotted names inside the package and their files."""
    files = [*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))]
    names = (file.relative_to(ROOT).with_suffix("").parts for file in files)
    return {".".join(name[:-1] if name[-1] == "__init__" else name): file for name, file in zip(names, files)}


MODULES = modules()


def imported(module):
    """Modules of the package that a module imports anywhere in its text, local imports included."""
    file = MODULES[module]
    inside = module.split(".") if module else []
    package = inside if file.name == "__init__.py" else inside[:-1]
    for node in ast.walk(syntax(file)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert not alias.name.startswith("videoalign"), f"{file}: import relatively inside the package"
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                yield whole if whole in MODULES else ".".join(base)


GRAPH = {module: set(imported(module)) for module in MODULES}


def height(module):
    """Place in the order; -1 of what stands below all packages."""
    top = module.partition(".")[0]
    return ORDER.index(top) if top in ORDER else -1


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_imports_point_one_way(module):
    wrong = [other for other in GRAPH[module] if height(other) > height(module)]
    assert not wrong, f"{module} imports {', '.join(wrong)}, which stands above it"


def test_no_circle():
    done = set()

    def visit(module, path):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(GRAPH[module]):
                # A package's __init__ names its own files; a file that imports a package wants one of those names.
                if other != module:
                    visit(other, [*path, module])
            done.add(module)

    for module in sorted(GRAPH):
        visit(module, [])


def test_every_file_is_seen():
    assert len(GRAPH) > 120 and {"models.flow", "cli", "errors", "miniature.world.oracle"} <= set(GRAPH)


def test_no_imports_by_name():
    """An editor follows imports; it does not follow strings."""
    named_by_users = {"models.generator_folder", "commands.class_names"}  # a folder's or a YAML's class
    lazy = {"models"}  # its __init__ gives its names when they are first asked for, beside imports that an editor reads
    for module, file in MODULES.items():
        if "import_module" in file.read_text():
            assert module in lazy | named_by_users, f"{file} imports by a string"


def test_only_the_miniature_knows_the_oracle():
    below = [module for module in GRAPH if height(module) < ORDER.index("miniature")]
    for module in below:
        assert "oracle" not in MODULES[module].read_text().lower(), f"{module} speaks of the oracle"


def test_file_names_are_distinct():
    names = sorted(file.name for module, file in MODULES.items() if not file.name.startswith("__"))
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})


def test_files_and_functions_are_short():
    for file in MODULES.values():
        text = file.read_text()
        assert text.count("\n") <= 400, f"{file} has over 400 lines"
        for node in ast.walk(syntax(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{file}: {node.name} has over 60 lines"


def test_every_package_is_listed():
    """`find:` does not work where the root of the repository is the package: setup.cfg names each."""
    listed = {line.strip() for line in (ROOT / "setup.cfg").read_text().splitlines()}
    for module, file in MODULES.items():
        if file.name == "__init__.py" and module:
            assert f"videoalign.{module}" in listed, f"setup.cfg does not list videoalign.{module}"
