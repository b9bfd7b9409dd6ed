"""The form of docstrings: one argument an entry, none forgotten and none invented, and no fragments.

Help texts and the reference are cut from docstrings, so what is missing here is missing there.
"""

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

import videoalign
from helpers import syntax

ROOT = Path(videoalign.__file__).parent
OUTSIDE = {"tests", "benchmarks", "docs", "build", "dist"}
FILES = sorted(
    path.relative_to(ROOT)
    for path in ROOT.rglob("*.py")
    if not any(part in OUTSIDE or part.startswith(".") for part in path.relative_to(ROOT).parts)
)
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Example", "Examples", "Note")
PREPOSITIONS = "Of|As|By|For|From|In|On|To|With|Without"
FRAGMENTS = (
    (re.compile(r"\W*\w*\W*"), "is one word"),
    (re.compile(rf"(?:{PREPOSITIONS})\b(?:\s+\S+){{1,5}}"), "is a preposition and its noun"),
    (re.compile(r"See\s.*|The same(?: \w+){0,2}"), "refers to another text and says nothing by itself"),
)
"""Texts that say too little where they are the whole docstring or entry, and the reason."""


class Entry(NamedTuple):
    """One entry of a section, such as an argument."""

    name: str
    text: str


@dataclass
class Thing:
    """A module, class, function or attribute with a docstring.

    Attributes:
        name: Dotted name inside the file.
        line: Line that it begins in.
        text: Its docstring, without the indentation.
        public: Whether no part of its name begins with an underscore; special methods are public.
        parameters: Parameters that an Args section must list; None where it is unknown which there are.
        optional: Parameters that it may list: ``*args`` and ``**kwargs``.
    """

    name: str
    line: int
    text: str
    public: bool
    parameters: list[str] | None = None
    optional: tuple[str, ...] = ()

    def section(self, title: str) -> list[str]:
        """Lines of a section, without its title."""
        lines = self.text.splitlines()
        begin = next((i for i, line in enumerate(lines) if line == f"{title}:"), len(lines))
        rest = lines[begin + 1 :]
        return rest[: next((i for i, line in enumerate(rest) if line and not line.startswith(" ")), len(rest))]

    def entries(self, title: str) -> list[Entry]:
        """Entries of a section: each begins at the section's own indentation, what is deeper continues it."""
        found: list[list[str]] = []
        for line in filter(None, (line.rstrip() for line in self.section(title))):
            if re.match(r"    \S", line):
                found.append([line.strip()])
            elif found:
                found[-1].append(line.strip())
        parts = (" ".join(lines).partition(": ") for lines in found)
        return [Entry(name, text) for name, _, text in parts]

    def summary(self) -> str:
        """The docstring without its sections, in one line."""
        lines = self.text.splitlines()
        titles = {f"{title}:" for title in SECTIONS}
        end = next((i for i, line in enumerate(lines) if line in titles), len(lines))
        return " ".join(" ".join(lines[:end]).split())


def things(tree: ast.Module) -> Iterator[Thing]:
    """All that has a docstring in a file, but what is defined inside functions."""
    if text := ast.get_docstring(tree):
        yield Thing("module", 1, text, True)
    yield from _inside(tree, "", True)


def _inside(owner: ast.Module | ast.ClassDef, prefix: str, public: bool) -> Iterator[Thing]:
    for before, node in zip([None, *owner.body], owner.body):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name, open_ = f"{prefix}{node.name}", public and _is_public(node.name)
            parameters, optional = _parameters(node, bool(prefix))
            if text := ast.get_docstring(node):
                yield Thing(name, node.lineno, text, open_, parameters, optional)
            if isinstance(node, ast.ClassDef):
                yield from _inside(node, f"{name}.", open_)
        elif isinstance(before, ast.Assign | ast.AnnAssign) and _is_text(node):
            target = before.targets[0] if isinstance(before, ast.Assign) else before.target
            name = ast.unparse(target)
            yield Thing(f"{prefix}{name}", node.lineno, inspect.cleandoc(node.value.value), public and name[0] != "_")


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _is_public(name: str) -> bool:
    return not name.startswith("_") or (name.startswith("__") and name.endswith("__"))


def _parameters(node: ast.stmt, method: bool) -> tuple[list[str] | None, tuple[str, ...]]:
    """Parameters of a function, or those that make an object of a class, and the optional ones."""
    if isinstance(node, ast.ClassDef):
        for inner in node.body:
            if isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
                return _parameters(inner, True)
        if any("dataclass" in ast.unparse(d) for d in node.decorator_list) or "NamedTuple" in map(
            ast.unparse, node.bases
        ):
            fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and "ClassVar" not in ast.unparse(n)]
            return [ast.unparse(field.target) for field in fields], ()
        return None, ()
    arguments = node.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    bound = method and "staticmethod" not in map(ast.unparse, node.decorator_list)
    several = tuple(a.arg for a in (arguments.vararg, arguments.kwarg) if a)
    return names[1:] if bound else names, several


def misshapen(thing: Thing) -> Iterator[str]:
    """What is wrong with the sections of a docstring."""
    known = [*(thing.parameters or ()), *thing.optional]
    for title in ("Args", "Attributes"):
        for name, text in thing.entries(title):
            if not re.fullmatch(r"\*{0,2}\w+", name):
                yield f"{title}: {name[:60]!r} is not the name of one thing, with a colon and a text behind it"
                continue
            code = re.sub(r"``.*?``|`[^`]*`", "`", text)
            if others := [word for word in re.findall(r"[.;)`]\s+(\w+):\s", code) if word in known]:
                yield f"{title}: the entry of {name} also names {', '.join(others)}; begin a line for each"
            if why := fragment(text):
                yield f"{title}: the text of {name} {why}: {text!r}"
    for name, text in thing.entries("Raises"):
        if not re.fullmatch(r"[\w.]+", name) or not text:
            yield f"Raises: {name[:60]!r} is not the name of one error, with a colon and a text behind it"
    if thing.public and thing.entries("Args") and thing.parameters is not None:
        listed = [entry.name.lstrip("*") for entry in thing.entries("Args")]
        if forgotten := [name for name in thing.parameters if name not in listed and name[0] != "_"]:
            yield f"Args: {', '.join(forgotten)} not listed"
        if unknown := [name for name in listed if re.fullmatch(r"\w+", name) and name not in known]:
            yield f"Args: {', '.join(unknown)} listed, but there is no such parameter"
        if len(set(listed)) < len(listed):
            yield "Args: a parameter is listed twice"


def unpunctuated(thing: Thing) -> Iterator[str]:
    """Entries that do not begin with a capital letter (or a digit, bracket or code) and end with a full stop."""
    for title in ("Args", "Attributes", "Raises"):
        for name, text in thing.entries(title):
            if text and not (re.match(r"[A-Z0-9(\[`]", text) and text.endswith(".")):
                yield f"{title}: the text of {name} does not begin with a capital letter and end with a full stop"


def fragment(text: str) -> str:
    """Why a text says too little to be understood by itself; empty where it says enough."""
    whole = text.strip().removesuffix(".")
    return next((why for pattern, why in FRAGMENTS if ". " not in whole and pattern.fullmatch(whole)), "")


def speechless(thing: Thing) -> Iterator[str]:
    """A docstring that says too little."""
    if thing.public and (why := fragment(thing.summary())):
        yield f"the docstring {why}: {thing.summary()!r}"


def problems(path: Path, *checks: Callable[[Thing], Iterator[str]]) -> list[str]:
    """What is wrong with the words of a file, with lines and names."""
    every = things(syntax(ROOT / path))
    return [f"{path}:{one.line} {one.name}: {said}" for one in every for check in checks for said in check(one)]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_docstrings_say_what_they_must(path):
    found = problems(path, speechless, misshapen)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_entries_begin_and_end_as_sentences_do(path):
    found = problems(path, unpunctuated)
    assert not found, "\n".join(found)


GOOD = '''
def f(steps, shape, *rest, **options):
    """Draws noise.

    Args:
        steps: Number of steps, at least 1. Under ``shape: null`` it is 1.
        shape: Shape (N, C) of
            the noise.
        options: Further options of the sampler.

    Raises:
        ValueError: Where steps is 0.
    """
'''


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("steps: Number", "steps, shape: Number", "not the name of one thing"),
        ("        shape: Shape (N, C) of\n            the noise.\n", "", "shape not listed"),
        ("options: Further", "seed: Further", "seed listed"),
        ("at least 1.", "at least 1. shape: (N, C).", "also names shape"),
        ("Number of steps, at least 1. Under ``shape: null`` it is 1.", "Of the sampler.", "preposition"),
        ("Number of steps", "number of steps", "capital letter"),
        ("Draws noise.", "Noise.", "one word"),
        ("Draws noise.", "See the class.", "refers to another text"),
        ("Where steps", "where steps", "Raises: the text of ValueError"),
        ("ValueError: ", "", "name of one error"),
    ],
)
def test_what_is_looked_for_is_found(old, new, words, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    for text, wrong in ((GOOD, False), (GOOD.replace(old, new), True)):
        (tmp_path / "f.py").write_text(text)
        found = problems(Path("f.py"), speechless, misshapen, unpunctuated)
        assert (words in " ".join(found)) == wrong == bool(found)


CLASSES = '''
@dataclass
class Settings:
    """Settings of a sampler.

    Args:
        steps: Number of steps.
    """
    steps: int
    """Of the sampler."""
    seed: int = 0

class Sampler:
    """Draws noise.

    Args:
        shape: Shape (N, C) of the noise.
    """
    def __init__(self, shape, device):
        pass

    @staticmethod
    def draw(steps):
        """Draws noise.

        Args:
            steps: Number of steps.
            seed: Seed of the noise.
        """

    def _private(self, steps, seed):
        """None.

        Args:
            steps: Number of steps.
        """
'''


def test_classes_and_their_fields_are_looked_at_too(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "f.py").write_text(CLASSES)
    expected = (
        "Settings: Args: seed not listed",
        "Settings.steps: the docstring is a preposition and its noun: 'Of the sampler.'",
        "Sampler: Args: device not listed",
        "Sampler.draw: Args: seed listed, but there is no such parameter",
    )
    assert [one.partition(" ")[2] for one in problems(Path("f.py"), speechless, misshapen)] == list(expected)
