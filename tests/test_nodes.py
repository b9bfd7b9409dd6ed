"""Two nodes, as two agents of torchrun on this machine, share what one process does; tests/test_cluster.py trains."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bench_kit import BATCH, Run, lines
from generator_kit import SIZE, alike, encode_config, node, same, samples_of, save_yaml, videos_of
from helpers import call, flags
from videoalign import VideoAlignError
from videoalign.commands.predicting import predicting

pytestmark = pytest.mark.slow


def on_two_nodes(*arguments: object) -> list[str]:
    """What the two agents print; each starts one process of the command."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meet = ["--rdzv-backend", "c10d", "--rdzv-id", port, "--rdzv-endpoint", f"127.0.0.1:{port}"]
    agent = ["--nnodes", 2, "--nproc-per-node", 1, *meet, "--local-addr", "127.0.0.1", "-m", "videoalign"]
    command = [str(word) for word in (Path(sys.executable).with_name("torchrun"), *agent, *arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    nodes = [subprocess.Popen(command, env=environment, **pipes) for _ in range(2)]
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    return said


def test_nodes_share_a_benchmark(kit, finished, tmp_path):
    given = flags(model=kit / "model", data=kit / "world", out=tmp_path, device="cpu", workers=0, batch_size=BATCH)
    said = on_two_nodes("bench", *given)
    assert sum(text.count("21 pairs of 7 videos") for text in said) == 1
    shares = [(tmp_path / "world" / f"rewards.{rank}.jsonl").read_text().splitlines() for rank in range(2)]
    assert sorted(map(len, shares)) == [3, 4]
    assert lines(tmp_path / "world") == lines(finished().out / "world")
    assert Run(tmp_path, "").result == finished().result


def test_nodes_share_an_encoding(generators, clips, latents, tmp_path):
    config = encode_config(tmp_path / "e.yaml", generators / "wan", clips / "pairs", tmp_path / "latents")
    on_two_nodes("predict", "--config", config, "--trainer.num_nodes", 2, "--trainer.devices", 1)
    assert same(samples_of(tmp_path / "latents"), samples_of(latents / "wan"))
    assert call("shards", "verify", tmp_path / "latents") == 0


def test_nodes_share_sampling(generators, prompts, generated, tmp_path):
    sampling = {**SIZE, "samples": 2, "seed": 7, "batch_size": 2, "device": "cpu"}
    places = {"generator": generators / "wan", "prompts": prompts, "out": tmp_path / "v"}
    said = on_two_nodes("generate", *flags(**places, **sampling))
    assert sum(text.count("videos in") for text in said) == 1
    alike(videos_of(tmp_path / "v"), videos_of(generated))


@pytest.mark.parametrize("command", ["score", "compare"])
def test_a_command_of_one_process_refuses_several(command, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = {"generator": "g", "prompts": "p", "out": str(tmp_path / "o"), "sampling": SIZE}
    config |= {"judges": {"reward model": node("videoalign.commands.reward_judge.RewardJudge", model="m")}}
    given = {"score": ["--model", "m"], "compare": ["--config", save_yaml(tmp_path / "c.yaml", config)]}
    assert call(command, *given[command]) == 2
    assert f"{command} works in one process, and torchrun has started 2" in capsys.readouterr().err


def test_another_number_of_devices_than_torchruns_is_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(VideoAlignError, match="devices is 3, but torchrun has started 4 on each node"):
        predicting("cpu", [], False, devices=3)
