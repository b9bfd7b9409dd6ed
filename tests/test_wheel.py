"""The wheel: what it holds, and that its commands run from an empty folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FOLDERS = "alignment annotation callbacks commands datamodules miniature models experiments"
EXTRAS = {"annotate", "dev", "docs", "gpu", "gs", "mlflow", "s3", "serve", "wandb"}
"""What users may ask for beside the package itself."""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources."""
    tree = tmp_path_factory.mktemp("sources") / "tree"
    ignored = shutil.ignore_patterns(".*", "runs", "build", "dist", "site", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=ignored)
    return tree


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    """The wheel that is built from them."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tree.parent, tree]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = tree.parent.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of programs of an environment that has the wheel; what the wheel requires is this environment's."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", folder / "bin/python", "install", "--quiet", "--no-deps", wheel]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "bin"


def test_it_holds_all_code_experiments_and_templates(wheel, tree):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in FOLDERS.split():
        for file in (tree / folder).rglob("*"):
            if file.is_file():
                assert f"videoalign/{file.relative_to(tree)}" in names, file
    assert {"videoalign/__init__.py", "videoalign/cli.py", "videoalign/py.typed"} <= names
    assert all(name.startswith(("videoalign/", "videoalign-")) for name in names), "something leaks into site-packages"


def test_it_offers_every_extra(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    assert {*metadata.get_all("Provides-Extra")} == EXTRAS


def test_its_commands_run_from_an_empty_folder(installed, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words: str) -> str:
        command = [installed / "videoalign", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert run("--version").startswith("videoalign ")
    assert "--port" in run("annotate", "serve", "--help")
    recipe = yaml.safe_load(run("fit", "--config", "experiments/videoreward/qwen2vl_2b.yaml", "--print_config"))
    assert recipe["model"]["class_path"].endswith("RewardModel")
    command = [installed / "python", "-c", "import videoalign; print(videoalign.__file__)"]
    where = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert Path(where.stdout.strip()).is_relative_to(installed.parent), "these were not the wheel's commands"
    assert not list(tmp_path.iterdir()), "a command that only prints has written something"
