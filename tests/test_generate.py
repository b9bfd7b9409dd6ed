"""`videoalign generate` and its files of prompts."""

import json
import shutil
from functools import partial
from itertools import combinations

import pytest
import safetensors.torch
import torch

from generator_kit import PROMPTS, SIZE, alike, apart, failing_after, generate, videos_of
from helpers import call
from videoalign import VideoAlignError
from videoalign.datamodules.encode_list import ClipSize
from videoalign.datamodules.prompts import read_prompts
from videoalign.datamodules.shards import ShardSet
from videoalign.datamodules.video import decode, encode
from videoalign.models.flow import draw_seed
from videoalign.models.generator import Generator
from videoalign.models.generator_folder import load_generator

# --- generate -------------------------------------------------------------------------------------


def test_generated_videos_are_recorded_and_made_from_their_seeds(generated, generators):
    generator, found = load_generator(generators / "wan", fps=8), list(ShardSet(generated, "videos"))
    names = list(dict.fromkeys(PROMPTS))
    assert [raw.key for raw in found] == [f"{i:05d}-{n:03d}" for i in range(3) for n in range(2)]
    for raw, (i, n) in zip(found, [(i, n) for i in range(3) for n in range(2)]):
        record = raw.record()
        assert record.pop("seconds") > 0 and record.pop("evaluations") == SIZE["steps"]
        assert record == {
            "prompt": names[i],
            "source": "mine",
            "seed": draw_seed(7, names[i], n),
            "guidance": 1.0,
            **SIZE,
        }
        source = torch.Generator().manual_seed(record["seed"])
        torch.rand((), generator=source)  # a draw is of a time and its noise
        noise = torch.randn(1, 16, 2, 4, 4, generator=source)
        condition = generator.condition(generator.encode_prompts([names[i]]))
        video = generator.decode(generator.sample(condition, noise, 2))[0]
        want = decode(encode(video.permute(0, 2, 3, 1).numpy(), 8, 10), ClipSize(num_frames=5, height=32, width=32), 1)
        have = decode(raw.members["mp4"], ClipSize(num_frames=5, height=32, width=32), 1)
        assert apart(want, have) < 0.2
    videos = list(videos_of(generated).values())
    assert all(apart(a, b) > 2 for a, b in combinations(videos, 2))
    assert call("shards", "verify", generated) == 0 and call("shards", "info", generated) == 0


def test_a_video_depends_on_seed_prompt_and_number_alone(generated, generators, prompts, tmp_path):
    turned = tmp_path / "p.csv"
    turned.write_text("id,prompt\n" + "".join(f'{i},"{p}"\n' for i, p in enumerate(reversed(read_prompts(prompts)))))
    assert generate(generators, tmp_path / "out", turned, "--seed", 7, "--batch-size", 1) == 0
    alike(videos_of(tmp_path / "out"), videos_of(generated))
    assert generate(generators, tmp_path / "other", prompts, "--seed", 8, "--batch-size", 6) == 0
    assert not videos_of(tmp_path / "other").keys() & videos_of(generated).keys()


@pytest.mark.parametrize(
    ("options", "null"),
    [([], None), (["--cfg-scale", 3], ""), (["--cfg-scale", 3, "--negative", "a video"], "a video")],
)
def test_guidance_steers_away_from_the_empty_prompt(options, null, generators, prompts, tmp_path, monkeypatch):
    sample, seen = Generator.sample, []
    monkeypatch.setattr(
        Generator,
        "sample",
        lambda self, *args, **options: (seen.append((self, options)), sample(self, *args, **options))[1],
    )
    assert generate(generators, tmp_path / "out", prompts, *options, "--batch-size", 6, family="ltx") == 0
    ((generator, settings),) = seen
    guidance, given = settings["cfg_scale"], settings["null"]
    assert guidance == (3 if options else 1)
    if null is None:
        assert given is None
    else:
        want = generator.condition(generator.encode_prompts([null]))
        assert all(torch.equal(given[name], want[name]) for name in want)
    assert {raw.record()["guidance"] for raw in ShardSet(tmp_path / "out")} == {guidance}


def test_interrupted_generation_goes_on_where_it_stopped(generated, generators, prompts, tmp_path, monkeypatch, capfd):
    again = partial(generate, generators, tmp_path / "out", prompts, "--seed", 7, "--batch-size")
    with monkeypatch.context() as patch:
        failing_after(patch, Generator, "sample", 1)
        assert again(4) == 1  # a fault of the program
    assert generate(generators, tmp_path / "out", prompts, "--seed", 8) == 2
    assert "holds parts of another run (seed differ)" in capfd.readouterr().err
    sample, sizes = Generator.sample, []

    def sized(self, condition, noise, *args, **options):
        sizes.append(len(noise))
        return sample(self, condition, noise, *args, **options)

    monkeypatch.setattr(Generator, "sample", sized)
    assert again(5) == 0  # the batch size may change
    assert sizes == [1, 1]
    assert call("shards", "verify", tmp_path / "out") == 0
    alike(videos_of(tmp_path / "out"), videos_of(generated))
    assert again(4) == 2 and "exists already" in capfd.readouterr().err


def test_interrupted_generation_goes_on_with_the_same_weights_alone(generators, prompts, tmp_path, monkeypatch, capfd):
    """Two models in one set would look like one; parts of earlier releases do not say what made them."""
    shutil.copytree(generators / "wan", tmp_path / "wan")
    again = partial(generate, tmp_path, tmp_path / "out", prompts, "--batch-size", 4)
    with monkeypatch.context() as patch:
        failing_after(patch, Generator, "sample", 1)
        assert again() == 1
    file = next((tmp_path / "wan" / "transformer").glob("*.safetensors"))
    tensors = safetensors.torch.load_file(file)
    name = next(iter(tensors))
    safetensors.torch.save_file({**tensors, name: tensors[name] + 1e-3}, file, {"format": "pt"})
    assert again() == 2
    assert "holds parts of another run (weights of generator differ)" in capfd.readouterr().err
    making = tmp_path / ".out.parts" / "making.json"
    making.write_text(json.dumps({k: v for k, v in json.loads(making.read_text()).items() if k != "weights"}))
    assert again() == 0


def test_a_refused_run_leaves_its_name_free(generators, prompts, tmp_path, capfd):
    (tmp_path / "long.txt").write_text("short\n" * 5 + "word " * 5000)  # before the first batch is sampled
    assert generate(generators, tmp_path / "out", tmp_path / "long.txt") == 2
    err = capfd.readouterr().err
    assert "has 25000 tokens" in err and "batch:" not in err
    assert generate(generators, tmp_path / "out", prompts, "--steps", 3) == 0  # other settings: nothing was made yet


GENERATE_REFUSED = {
    "no prompts": (["--prompts", "none.txt"], "none.txt"),
    "prompts in a folder": (["--prompts", "."], "cannot be read"),
    "number of frames": (["--num-frames", 6], "num_frames is 6"),
    "width": (["--width", 40], "multiples of 16"),
    "negative": (["--negative", "blurry"], "negative: classifier-free guidance alone reads a negative prompt"),
    "guidance": (["--cfg-scale", 0.5], "cfg_scale must be at least 1, got 0.5"),
    "guidance nan": (["--cfg-scale", "nan"], "cfg_scale must be at least 1 and finite, got nan"),
    "guidance infinite": (["--cfg-scale", "inf"], "cfg_scale must be at least 1 and finite, got inf"),
    "shift": (["--shift", "inf"], "shift must be above 0 and finite, got inf"),
    "an empty variable": (["--noisy-reward", ""], "--noisy-reward is empty; is a variable of the shell not set?"),
    "a seed too large": (["--seed", 2**32], "must be a whole number from 0 to 4294967295"),
    "no generator": (["--generator", "none/at/all"], "none/at/all"),
    "no adapters": (["--lora", "none/at/all"], "none/at/all: there is no such folder or file of adapters"),
    "steps": (["--steps", 0], "must be a whole number from 1 on"),
    "samples": (["--samples", 0], "must be a whole number from 1 on"),
}


@pytest.mark.parametrize("name", GENERATE_REFUSED)
def test_generate_refuses(name, generators, prompts, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options, words = GENERATE_REFUSED[name]
    assert generate(generators, tmp_path / "out", prompts, *options) == 2
    out, err = capfd.readouterr()
    assert words in err
    assert "Traceback" not in out + err
    assert not list(tmp_path.iterdir())


def test_adapters_of_another_architecture_are_refused(generators, prompts, trained, tmp_path, capfd):
    assert generate(generators, tmp_path / "out", prompts, "--lora", trained["ltx"].out) == 2
    assert "cannot be loaded into this generator" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "want"),
    [
        ("p.txt", "one\n\n two \none\n", ["one", "two"]),
        ("p.txt", "\ufeffa, b\n", ["a, b"]),
        ("p.csv", '\ufeffid,prompt\n1,"a, b"\n2,\n3\n4,ü\n', ["a, b", "ü"]),
    ],
)
def test_prompts_are_read_in_order_and_once(name, content, want, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_prompts(tmp_path / name) == want


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", b"", "holds no prompt"),
        ("p.txt", b"\n  \n", "holds no prompt"),
        ("p.csv", b"prompt\n", "at least one row"),
        ("p.csv", b"text\na\n", "needs a column prompt"),
        ("p.csv", b'prompt\n""\n', "holds no prompt"),
        ("p.txt", b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_files_without_prompts_are_refused(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VideoAlignError, match=words):
        read_prompts(tmp_path / name)
