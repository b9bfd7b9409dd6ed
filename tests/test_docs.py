"""What README and docs say: commands run or parse, links lead somewhere, every experiment is mentioned."""

import contextlib
import io
import re
import runpy
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

import videoalign
from videoalign import cli

ROOT = Path(videoalign.__file__).parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONFIGURED = ("fit", "validate", "test", "predict", "compare")
FENCE = re.compile(r"(?:^<!-- (?P<mark>[^\n]*?) -->\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
GENERATED = {"reference/commands.md", "reference/keys.md", "all_results.md", "contributing.md", "changelog.md"}
GENERATED |= {"all_on_policy_results.md"}
"""Pages that hooks of MkDocs make."""


@dataclass
class Block:
    """A fenced block of a page.

    Attributes:
        page: File that it stands in.
        kind: Language of the fence.
        text: What it holds.
        mark: Comment before it, as (word, rest); empty where there is none.
    """

    page: Path
    kind: str
    text: str
    mark: tuple[str, str]

    def commands(self) -> list[str]:
        """Commands as a shell takes them: lines continued, heredocs whole."""
        found, lines = [], iter(self.text.replace("\\\n", " ").splitlines())
        for line in lines:
            if heredoc := re.search(r"<<'(\w+)'", line):
                body = [line]
                for more in lines:
                    body.append(more)
                    if more == heredoc[1]:
                        break
                found.append("\n".join(body))
            elif line.strip() and not line.startswith("#"):
                found += line.strip().split(" && ")
        return found


def blocks(page):
    for match in FENCE.finditer(page.read_text(encoding="utf-8")):
        word, _, rest = (match["mark"] or "").partition(": ")
        yield Block(page, match["kind"], match["text"], (word, rest))


def name_of(page):
    return str(page.relative_to(ROOT))


BLOCKS = [block for page in PAGES for block in blocks(page) if block.kind == "bash"]
RUN = sorted({block.page for block in BLOCKS if block.mark[0] in ("", "tested with")})
PARSED = sorted(
    {
        (name_of(block.page), command)
        for block in BLOCKS
        if block.mark[0] == "needs"
        for command in block.commands()
        if command.startswith("videoalign ")
    }
)


def with_options(command, mark):
    """A command with the options of its block's mark: `fit --x 1; sprites --y 2`, or `--z 3` for every command."""
    for part in mark[1].split("; ") if mark[0] == "tested with" else ():
        name, dashes, options = part.partition("--")
        if dashes and (not name or command.startswith(f"videoalign {name}")):
            command = f"{command} --{options}"
    return command


def call(command):
    """Run a `videoalign` line in this process; what it said, if it fails, is in the message."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            cli.main(shlex.split(command)[1:])
    except SystemExit as stop:
        assert not stop.code, f"{command}\n{said.getvalue()[-3000:]}"
    return said.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_commands_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in (block for block in BLOCKS if block.page == page and block.mark[0] in ("", "tested with")):
        for command in block.commands():
            if command.startswith("videoalign "):
                call(with_options(command, block.mark))
            elif script := re.fullmatch(r"python (\w+\.py)", command):
                runpy.run_path(script[1])
            else:
                subprocess.run(["bash", "-euc", command], check=True)


def test_some_pages_run():
    assert {name_of(page) for page in RUN} >= {"README.md", "docs/index.md", "docs/howto/align.md"}


@pytest.mark.parametrize("page, command", PARSED, ids=lambda value: value[:60])
def test_a_command_that_cannot_run_here_parses(page, command, capsys):
    words = shlex.split(command.partition(" > ")[0])[1:]
    with pytest.raises(SystemExit) as done:
        if words[0] in CONFIGURED:
            for path in re.findall(r"--config (\S+)", command):
                assert (ROOT / path).is_file(), f"{page}: there is no {path}"
            cli.main([*words, "--print_config"])
        else:
            cli.parser().parse_args(words)
            raise SystemExit(0)
    assert not done.value.code, f"{page}: {command}\n{capsys.readouterr().err}"


def test_marks_are_known():
    for block in BLOCKS:
        assert block.mark[0] in ("", "needs", "shown", "tested with"), f"{name_of(block.page)}: {block.mark}"


# --- pages ----------------------------------------------------------------------------------------------------------


def anchors(page):
    """Anchors of a page's headings, as GitHub and MkDocs make them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        yield re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() and file.is_relative_to(ROOT / "docs"):
            assert str(file.relative_to(ROOT / "docs")) in GENERATED, f"{name_of(page)}: {target}"
            continue
        assert file.exists(), f"{name_of(page)}: {target}"
        if anchor and file.suffix == ".md":
            assert anchor in set(anchors(file)), f"{name_of(page)}: {target}"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


def test_every_experiment_is_mentioned():
    said = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))
    for path in sorted((ROOT / "experiments").rglob("*.yaml")):
        assert f"`experiments/{path.relative_to(ROOT / 'experiments')}`" in said, f"{path} is on no page"


def test_every_experiment_that_is_mentioned_exists():
    for page in PAGES:
        for path in re.findall(r"experiments/[\w/]+\.yaml", page.read_text(encoding="utf-8")):
            assert (ROOT / path).is_file(), f"{name_of(page)}: there is no {path}"


def test_every_class_that_is_mentioned_exists():
    for page in PAGES:
        for path in re.findall(r"class_path: (videoalign\.[\w.]+)", page.read_text(encoding="utf-8")):
            module, _, name = path.rpartition(".")
            if path.startswith("videoalign.alignment.margin"):  # the reader's own
                continue
            assert hasattr(__import__(module, fromlist=[name]), name), f"{name_of(page)}: there is no {path}"


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert str(page.relative_to(ROOT / "docs")) in nav, f"mkdocs.yml does not name {page}"


def test_snippets_of_python_work():
    for block in blocks(ROOT / "CONTRIBUTING.md"):
        if block.kind == "python":
            exec(compile(block.text, "CONTRIBUTING.md", "exec"), {"__name__": "snippet"})
