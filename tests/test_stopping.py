"""Signals end every command between two steps; what is whole is kept, and one line says how to go on."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from videoalign import cli, stopping
from videoalign.alignment import RewardModel
from videoalign.cli import main
from videoalign.datamodules.shards import ShardWriter
from videoalign.datamodules.video import encode

TINY = Path(cli.__file__).parent / "experiments/debug/tiny.yaml"
SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


def status(args: list[object]) -> int:
    """Exit status of a command in this process."""
    try:
        main([str(arg) for arg in args])
    except SystemExit as stop:
        return stop.code or 0
    return 0


# --- in this process ------------------------------------------------------------------------------


@pytest.mark.parametrize("signum, code", SIGNALS)
@pytest.mark.parametrize(
    "command",
    [["bench"], ["annotate", "serve"], ["shards", "import-csv"], ["paper"], ["convert"], ["score"]],
    ids=" ".join,
)
def test_a_signal_ends_any_command_with_one_line(command, signum, code, monkeypatch, capfd):
    left = []

    def work(args: list[str]) -> None:
        try:
            signal.raise_signal(signum)
        finally:
            left.append("tidied up")

    monkeypatch.setattr(cli, "_run", work)
    before = signal.getsignal(signum)
    assert status(command) == code
    assert left == ["tidied up"]
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith(f"videoalign: stopped by {signum.name}: ")
    assert cli.kept(command) in err
    assert signal.getsignal(signum) is before
    assert stopping.asked() is None


def test_a_signal_that_a_destructor_swallowed_counts_at_the_next_look(monkeypatch, capfd):
    """A Ctrl-C was lost now and then because a loader's workers are joined in its destructor."""

    class Loader:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def work(args: list[str]) -> None:
        del Loader.kept
        stopping.check()
        raise AssertionError("not reached")

    Loader.kept = Loader()
    monkeypatch.setattr(cli, "_run", work)
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    assert status(["x"]) == 130


def test_an_error_is_not_taken_for_a_stop_and_an_ignored_signal_stays_ignored(monkeypatch):
    monkeypatch.setattr(cli, "_run", lambda args: signal.raise_signal(signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        assert status(["x"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_deferred_work_is_told_and_ends_behind_its_block():
    told = []
    with pytest.raises(stopping.Stopped), stopping.listening():
        with stopping.deferred(lambda: told.append(1)):
            signal.raise_signal(signal.SIGTERM)
            told.append(2)
    assert told == [1, 2]


# --- training -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, backbone: Path) -> Path:
    """A set of 6 pairs and the tiny recipe for it: 3 steps an epoch, a validation after each second step."""
    folder = tmp_path_factory.mktemp("stopping")
    rng = np.random.default_rng(0)
    with ShardWriter(folder / "pairs", "pairs") as writer:
        for i in range(6):
            clips = {side: encode(rng.integers(0, 255, (9, 48, 64, 3), dtype=np.uint8), 8) for side in "ab"}
            writer.write(f"{i}", clips, {"prompt": f"a red circle {i}", "labels": {"VQ": "A", "MQ": "B", "TA": "same"}})
    config = yaml.safe_load(TINY.read_text())
    config["trainer"] |= {
        "max_steps": 5,
        "check_val_every_n_epoch": None,
        "val_check_interval": 2,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(folder),
        "logger": False,
        "callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"save_last": True, "every_n_train_steps": 1}}],
    }
    config["model"]["init_args"]["network"]["init_args"]["backbone"] = str(backbone)
    config["data"]["init_args"] |= {"train": str(folder / "pairs"), "val": str(folder / "pairs"), "workers": 0}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    return folder


def fit(project: Path, out: Path, *more: object) -> int:
    return status(["fit", "--config", project / "tiny.yaml", f"--trainer.default_root_dir={out}", *more])


def weights(out: Path) -> dict[str, torch.Tensor]:
    saved = torch.load(out / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 5
    return saved["state_dict"]


@pytest.fixture(scope="module")
def unstopped(project: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    out = tmp_path_factory.mktemp("unstopped")
    assert fit(project, out) == 0
    return weights(out)


@pytest.mark.parametrize(
    "hook, call, step",
    [("training_step", 1, 1), ("training_step", 3, 3), ("training_step", 2, 2), ("validation_step", 2, 2)],
    ids=["mid-epoch", "end of the epoch", "where a validation is due", "within a validation"],
)
def test_training_goes_on_exactly_from_the_checkpoint_of_a_stop(
    hook, call, step, project, unstopped, tmp_path, monkeypatch, capfd
):
    method, calls, validated = getattr(RewardModel, hook), [], []

    def counting(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return method(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RewardModel, hook, counting)
        assert fit(project, tmp_path) == 143
    err = capfd.readouterr().err
    path = tmp_path / f"checkpoints/stopped-step={step}.ckpt"
    said = [line for line in err.splitlines() if line.startswith("videoalign:")]
    assert len(said) == 1
    assert f"at step {step}: {path} holds all of it" in said[0]
    assert f"--ckpt_path {path}" in said[0]
    assert "Traceback" not in err
    assert path.exists()
    start = RewardModel.on_validation_epoch_start
    monkeypatch.setattr(
        RewardModel, "on_validation_epoch_start", lambda self: (validated.append(self.global_step), start(self))[1]
    )
    assert fit(project, tmp_path, f"--ckpt_path={path}") == 0
    found = weights(tmp_path)
    assert found.keys() == unstopped.keys() and all(torch.equal(found[name], unstopped[name]) for name in found)
    assert validated == [at for at in (2, 4) if at > step or (at == step and step == 2)]


# --- real processes -------------------------------------------------------------------------------


def start(code: str, *args: object, **options: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def gone(pids: list[int], seconds: float = 5.0) -> bool:
    """Whether processes end in time; a zombie counts as ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        states = [Path(f"/proc/{pid}/stat") for pid in pids]
        if not any(path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z" for path in states):
            return True
        time.sleep(0.05)
    return False


POOL = """
    import os, sys, time
    from videoalign import cli
    from videoalign.datamodules.parallel import in_order, pool
    def work(args):
        with pool(2) as workers:
            for pid in in_order(workers, nap, range(1000)):
                print(pid, flush=True)
    def nap(number):
        time.sleep(0.1)
        return os.getpid()
    cli._run = work
    cli.main(["shards", "import-csv"])
"""


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("group", [False, True], ids=["main", "group"])
def test_pool_workers_end_with_their_command_and_say_nothing(signum, group):
    if signum == signal.SIGKILL and group:
        pytest.skip("nothing is left to look at")
    process = start(POOL)
    pids = [int(process.stdout.readline()) for _ in range(6)]
    assert len({*pids}) == 2
    (os.killpg if group else os.kill)(process.pid, signum)
    _, err = process.communicate(timeout=30)
    assert gone([*{*pids}])
    if signum != signal.SIGKILL:
        assert process.returncode == 128 + signum
        assert err.count("\n") == 1 and "nothing half-written is left" in err, err


SECOND = """
    import hashlib, sys, time
    from videoalign import cli, stopping
    def work(args):
        with stopping.deferred(lambda: None):
            print("begun", flush=True)
            time.sleep(60) if sys.argv[1] == "sleep" else hashlib.pbkdf2_hmac("sha256", b"x", b"y", 10**9)
    cli._run = work
    cli.main(["x"])
"""


@pytest.mark.parametrize("how", ["sleep", "compute"])
def test_a_second_signal_ends_at_once_whatever_the_process_does(how):
    process = start(SECOND, how)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # as `timeout` does: the same one twice
    time.sleep(0.6)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130


RANKS = """
    import os, signal, sys
    from videoalign import alignment
    from videoalign.cli import main
    kind, rank, step = sys.argv[1], os.environ.get("LOCAL_RANK", "0"), alignment.RewardModel.training_step
    def failing(self, *args, **kwargs):
        if self.global_step == 2 and rank == sys.argv[2]:
            if kind == "signal":
                signal.raise_signal(signal.SIGTERM)
            else:
                raise FloatingPointError("the loss is not finite")
        return step(self, *args, **kwargs)
    alignment.RewardModel.training_step = failing
    main(["fit", *sys.argv[3:]])
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind, rank, code", [("signal", 1, 143), ("error", 1, 1), ("error", 0, 1)])
def test_two_processes_end_together_and_one_says_why(kind, rank, code, project, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(RANKS))
    options = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.init_args.batch_size=1"]
    args = ["--config", project / "tiny.yaml", f"--trainer.default_root_dir={tmp_path / 'out'}", *options]
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "MASTER_PORT", "WORLD_SIZE")}
    process = subprocess.Popen(
        [sys.executable, script, kind, str(rank), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment,
    )
    _, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    said = [line for line in err.splitlines() if line.startswith("videoalign:")]
    assert len(said) == 1 and err.splitlines()[-1] == said[0], err
    if kind == "signal":
        assert "stopped by SIGTERM at step 3" in said[0]
        assert (tmp_path / "out/checkpoints/stopped-step=3.ckpt").exists()
        assert "Traceback" not in err
    else:
        assert f"error: rank {rank}: FloatingPointError: the loss is not finite" in said[0]
        assert err.count("Traceback (most recent call last)") == 1
