"""Two processes encode, cache, generate and compare as one does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml

from forked import started
from generator_kit import (
    COLUMNS,
    SIZE,
    alike,
    encode_config,
    logger,
    noise_video,
    reference_config,
    same,
    samples_of,
    save_yaml,
    videos_of,
)
from helpers import call, flags
from videoalign.datamodules.shards import ShardSet, ShardWriter

# --- two processes --------------------------------------------------------------------------------

SCRIPT = """
import json, sys
import torch
from videoalign.cli import main
torch.set_num_threads(1)
for args in json.loads(sys.argv[1]):
    print("command", args[0], flush=True)
    main(args)
"""


def two_processes(folder: Path, *commands: list, timeout: int = 300) -> subprocess.CompletedProcess:
    """Run commands one after the other in the same two processes, which the first command starts."""
    (folder / "script.py").write_text(SCRIPT)
    text = json.dumps([[str(a) for a in command] for command in commands])
    return started(sys.executable, folder / "script.py", text, timeout=timeout)


DDP = ["--trainer.devices", 2, "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu"]
SHARED = [*DDP, "--trainer.use_distributed_sampler", "false"]  # the DataModules share the batches themselves


@pytest.fixture(scope="module")
def two(tmp_path_factory, generators, clips, latents, prompts, won, trained) -> Path:
    """Latents, reference errors, samples and win rates, made by two processes."""
    folder = tmp_path_factory.mktemp("two")
    encoding = encode_config(folder / "e.yaml", generators / "wan", clips / "pairs", folder / "latents")
    errors = reference_config(folder / "r.yaml", generators / "wan", latents / "wan", folder / "errors", batch_size=3)
    sampling = {**SIZE, "samples": 2, "seed": 7, "batch_size": 2, "device": "cpu", "devices": 2}
    config = yaml.safe_load(won.config.read_text())
    config["trainer"]["logger"] = logger(folder)
    done = two_processes(
        folder,
        ["predict", "--config", encoding, *SHARED],
        ["predict", "--config", encoding, *DDP, "--data.out", folder / "as_shipped"],
        ["predict", "--config", errors, *SHARED],
        ["generate", *flags(generator=generators / "wan", prompts=prompts, out=folder / "videos", **sampling)],
        ["test", "--config", save_yaml(folder / "w.yaml", config), "--ckpt_path", trained["wan"].checkpoint, *DDP],
    )
    assert done.returncode == 0, done.stderr[-20000:]
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


@pytest.mark.slow
def test_two_processes_encode_the_same_samples(two, latents):
    assert same(samples_of(two / "latents"), samples_of(latents / "wan"))
    assert [shard.name for shard in ShardSet(two / "latents").index.shards] == ["r0000-00000.tar", "r0001-00000.tar"]
    assert [shard.samples for shard in ShardSet(two / "latents").index.shards] == [2, 2]
    assert call("shards", "verify", two / "latents") == 0


@pytest.mark.slow
def test_two_processes_encode_every_sample_as_the_experiments_are(two, latents):
    """Here use_distributed_sampler is left true, as in the experiments."""
    assert samples_of(two / "as_shipped").keys() == samples_of(latents / "wan").keys()


@pytest.mark.slow
def test_two_processes_find_the_same_reference_errors(two, cache):
    one, other = (safetensors.torch.load_file(folder / "reference.safetensors") for folder in (cache, two / "errors"))
    assert torch.equal(one["seeds"], other["seeds"])
    torch.testing.assert_close(one["errors"], other["errors"], rtol=0, atol=1e-6)
    assert json.loads((cache / "reference.json").read_text()) == json.loads(
        (two / "errors" / "reference.json").read_text()
    )


@pytest.mark.slow
def test_two_processes_generate_the_same_videos(two, generated):
    alike(videos_of(two / "videos"), videos_of(generated))
    assert call("shards", "verify", two / "videos") == 0


@pytest.mark.slow
def test_a_mistake_met_by_the_second_process_is_told(generators, tmp_path):
    with ShardWriter(tmp_path / "videos", "videos") as writer:
        for key, frames in (("good", 9), ("short", 5)):
            writer.write(key, {"": noise_video(frames, frames)}, {"prompt": "a video"})
    config = encode_config(tmp_path / "e.yaml", generators / "ltx", tmp_path / "videos", tmp_path / "out")
    done = two_processes(tmp_path, ["predict", "--config", config, *SHARED])
    assert done.returncode
    assert done.stderr.count("key 'short'") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_two_processes_say_once_where_the_videos_are(two):
    assert (two / "stdout.txt").read_text().count("videos in") == 1


@pytest.mark.slow
def test_two_processes_find_the_same_win_rates(two, won):
    one, other = (json.loads((run / "win_rate.json").read_text()) for run in (won.run, two / "run" / "version_0"))
    assert one["drift"] == pytest.approx(other["drift"], rel=1e-4)
    for column in COLUMNS:
        for key, value in one["columns"][column].items():
            assert other["columns"][column][key] == pytest.approx(value, abs=1e-4), (column, key)
