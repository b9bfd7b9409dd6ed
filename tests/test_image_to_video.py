"""Image-to-video from end to end on miniatures: encoding, training, reference errors, sampling, pairs and rounds."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from generator_kit import CALLBACKS, CLIP, SIZE, encode_config, flow_config, node, reference_config, samples_of
from helpers import call, flags, noise_clip, write_latents
from videoalign import VideoAlignError
from videoalign.alignment.generation import Generate
from videoalign.annotation.beginning import begin
from videoalign.annotation.shown import shown_by
from videoalign.callbacks.prompt_sampler import Sampling
from videoalign.commands.arms import Arm, sample_arm
from videoalign.commands.lightning_cli import run as experiment
from videoalign.commands.preference_pairs import _choose
from videoalign.datamodules.encode_list import ClipSize
from videoalign.datamodules.judgements import Judgements, Weights
from videoalign.datamodules.latent_files import load_latents
from videoalign.datamodules.sample_images import image_of, read_image
from videoalign.datamodules.shards import ShardSet, ShardWriter
from videoalign.datamodules.video import decode, encode
from videoalign.models.generator_folder import load_generator

CUT = ClipSize(**CLIP)
VIDEO = ClipSize(num_frames=5, height=32, width=32)


def write_png(path: Path, seed: int, height: int = 40, width: int = 64) -> Path:
    """An image of coarse random blocks, of another aspect ratio than the clips."""
    blocks = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)).save(path, "PNG")
    return path


def clip_from(start: int, rest: int, noise: int = 0) -> bytes:
    """Nine frames: grey at first, brightened by ``noise``; then of another grey."""
    frames = np.full((9, 32, 32, 3), rest, np.uint8)
    frames[0] = start + noise
    return encode(frames, 8)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory, generators) -> Path:
    """Miniatures whose videos begin with an image: LTX's, which needs one, and Wan2.2-TI2V's, which may have one."""
    folder = tmp_path_factory.mktemp("image_to_video")
    changes = {"ltx": {"_class_name": "LTXImageToVideoPipeline"}, "wan": {"expand_timesteps": True}}
    for name, change in changes.items():
        shutil.copytree(generators / name, folder / name)
        index = folder / name / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | change))
    return folder


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Path:
    """*pairs* and *videos* with an image each, of two prompts; and pairs without, one of which begins differently."""
    folder = tmp_path_factory.mktemp("image_samples")
    images = [read_image(write_png(folder / f"{i}.png", i), "image") for i in range(2)]
    labels = {"VQ": "A", "MQ": "A", "TA": "B"}
    with ShardWriter(folder / "pairs", "pairs") as writer:
        for i in range(4):
            record = {"prompt": f"video {i % 2}", "labels": labels}
            writer.write(f"p{i}", {s: noise_clip(2 * i + n, 9) for n, s in enumerate("ab")}, record, images[i % 2])
    with ShardWriter(folder / "videos", "videos") as writer:
        for i in range(6):
            record = {"prompt": "a video", "source": f"model{i % 3}", "fps": 8, "num_frames": 9}
            writer.write(f"v{i}", {"": noise_clip(i, 9)}, record, images[i // 3])
    with ShardWriter(folder / "bare", "pairs") as writer:
        for key, noise in (("same", 0), ("close", 6), ("other", 40)):
            videos = {"a": clip_from(100, 10), "b": clip_from(100, 200, noise)}
            writer.write(key, videos, {"prompt": "a video", "labels": labels})
    with ShardWriter(folder / "mixed", "videos") as writer:
        for i in range(3):
            record = {"prompt": "a video", "source": "m"}
            writer.write(f"m{i}", {"": noise_clip(i, 9)}, record, images[0] if i == 1 else None)
    return folder


def encoded(folder: Path, generator: Path, data: Path, **options) -> Path:
    out = folder / "latents"
    assert call("predict", "--config", encode_config(folder / "e.yaml", generator, data, out, **options)) == 0
    return out


@pytest.fixture(scope="module")
def latents(tmp_path_factory, pipelines, samples) -> Path:
    """Pairs with their images, encoded for the miniature that needs them."""
    return encoded(tmp_path_factory.mktemp("encoded"), pipelines / "ltx", samples / "pairs", batch_size=3)


# --- encoding ---------------------------------------------------------------------------------------------------------


def test_images_of_samples_are_encoded_once_beside_both_sides(latents, pipelines, samples):
    index = ShardSet(latents).index.latents
    assert (index["of"], index["images"]) == ("pairs", "file")
    generator = load_generator(pipelines / "ltx", parts=("vae", "text_encoder"))
    found, contents = samples_of(latents), ShardSet(samples / "pairs").contents()
    for content in contents:
        record, tensors = found[content.key]
        image = image_of(content)
        assert record["image"] == {"file": f"{content.key}.png", "sha256": image.sha256}
        picture = CUT.image(image.content, "image")
        assert picture.shape == (3, 32, 32) and picture.dtype == torch.uint8
        (want,) = generator.encode_images(picture[None], CUT.num_frames)
        assert tensors.keys() == {"a", "b", "prompt", "image"}
        torch.testing.assert_close(tensors["image"], want["image"], rtol=0, atol=1e-4)
        assert tensors["image"].shape[1:] == (1, *tensors["a"].shape[2:])
    assert call("shards", "verify", latents) == 0 and call("shards", "info", latents) == 0


def test_images_are_scaled_to_cover_the_frame_and_cut_in_the_middle(tmp_path):
    picture = np.zeros((20, 60, 3), np.uint8)
    picture[:, 20:40] = 200  # the middle third is what a square keeps
    Image.fromarray(picture).save(tmp_path / "wide.png")
    found = VIDEO.image((tmp_path / "wide.png").read_bytes(), "image")
    assert found.shape == (3, 32, 32) and (found[..., 4:-4] > 190).all()


def test_images_that_are_too_narrow_are_refused(tmp_path):
    Image.new("RGB", (1, 500)).save(tmp_path / "thin.png")
    with pytest.raises(VideoAlignError, match=r"thin\.png: its picture is 1x500: an aspect ratio above 200"):
        VIDEO.image((tmp_path / "thin.png").read_bytes(), "thin.png")


def test_first_frames_stand_in_for_images_that_both_videos_begin_with(pipelines, samples, tmp_path, capfd):
    config = encode_config(tmp_path / "e.yaml", pipelines / "ltx", samples / "bare", tmp_path / "latents")
    assert call("predict", "--config", config) == 2
    message = capfd.readouterr().err
    assert "1 samples could not be used" in message and "key 'other': the first frames of its two videos" in message
    shutil.rmtree(tmp_path / ".latents.parts")
    out = encoded(tmp_path, pipelines / "ltx", samples / "bare", max_dropped=0.4)
    assert ShardSet(out).index.latents["images"] == "first_frame"
    generator = load_generator(pipelines / "ltx", parts=("vae", "text_encoder"))
    found = samples_of(out)
    assert found.keys() == {"same", "close"}
    first = CUT.cut(decode(clip_from(100, 10), CUT, 1))[0]
    (want,) = generator.encode_images(first[None], CUT.num_frames)
    for record, tensors in found.values():
        torch.testing.assert_close(tensors["image"], want["image"], rtol=0, atol=1e-4)
        assert "image" not in record


@pytest.mark.parametrize(
    ("family", "data", "images", "source"),
    [("wan", "pairs", "auto", None), ("wan", "videos", "file", "file"), ("wan", "mixed", "first_frame", "first_frame")],
)
def test_generators_that_may_have_an_image_are_asked_explicitly(
    family, data, images, source, pipelines, samples, tmp_path
):
    out = encoded(tmp_path, pipelines / family, samples / data, images=images)
    assert ShardSet(out).index.latents.get("images") == source
    assert all(("image" in tensors) == bool(source) for _, tensors in samples_of(out).values())


@pytest.mark.parametrize(
    ("generator", "data", "images", "message"),
    [
        ("image/ltx", "pairs", "none", r"data\.images: none, but this generator begins every video with an image"),
        ("text/wan", "pairs", "file", r"data\.images: file, but this generator makes videos of prompts alone"),
        ("text/wan", "pairs", "first_frame", r"data\.images: first_frame, but this generator"),
        ("image/ltx", "mixed", "auto", "2 of 3 samples hold no image, the first of them 'm0'"),
        ("image/wan", "bare", "file", "3 of 3 samples hold no image"),
    ],
)
def test_images_that_generator_or_set_do_not_fit_are_refused(
    generator, data, images, message, pipelines, generators, samples, tmp_path, capfd
):
    kind, name = generator.split("/")
    folder = {"image": pipelines, "text": generators}[kind] / name
    config = encode_config(tmp_path / "e.yaml", folder, samples / data, tmp_path / "out", images=images)
    assert call("predict", "--config", config) == 2
    assert re.search(message, capfd.readouterr().err)
    assert not (tmp_path / "out").exists()


# --- latents ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["FlowDPO", "FlowSFT"])
def test_training_takes_the_image_of_a_pair(algorithm, latents, pipelines, tmp_path):
    config = flow_config(tmp_path / "f.yaml", pipelines / "ltx", latents)
    cli = experiment(["fit", "--config", str(config), "--model", f"videoalign.alignment.{algorithm}"])
    batch = next(iter(cli.datamodule.val_dataloader()[0]))
    assert [one.keys() for one in batch["conditions"]] == [{"prompt", "image"}] * 2
    stored = samples_of(latents)
    for key, condition in zip(batch["keys"], batch["conditions"]):
        assert torch.equal(condition["image"], stored[key][1]["image"])
    assert cli.datamodule.null.keys() == {"prompt"}


def test_reference_errors_are_of_the_same_images(latents, pipelines, tmp_path):
    config = reference_config(tmp_path / "r.yaml", pipelines / "ltx", latents, tmp_path / "cache")
    assert call("predict", "--config", config) == 0
    options = {"data": {"reference": tmp_path / "cache"}, "trainer": {"max_steps": 1}}
    cli = experiment(["fit", "--config", str(flow_config(tmp_path / "f.yaml", pipelines / "ltx", latents, **options))])
    loss = float(cli.trainer.logged_metrics["train/loss"])
    assert loss == pytest.approx(np.log(2), abs=1e-5)  # the policy is still the reference


def test_latents_and_generators_that_do_not_fit_are_refused(latents, pipelines, generators, samples, tmp_path, capfd):
    text = encoded(tmp_path, generators / "ltx", samples / "pairs")
    identity = {**ShardSet(text).index.latents}
    for folder, generator, message in (
        (relabelled(latents, tmp_path / "as_text", identity["family"]), generators / "ltx", "prompts alone"),
        (relabelled(text, tmp_path / "as_image", "LTXImage"), pipelines / "ltx", "begins every video with one"),
    ):
        assert call("fit", "--config", flow_config(tmp_path / "f.yaml", generator, folder)) == 2
        assert message in capfd.readouterr().err
        config = reference_config(tmp_path / "r.yaml", generator, folder, tmp_path / "cache")
        assert call("predict", "--config", config) == 2
        assert message in capfd.readouterr().err


def relabelled(source: Path, out: Path, family: str) -> Path:
    """A copy of a latents set that says that it is of another family."""
    shutil.copytree(source, out)
    index = json.loads((out / "index.json").read_text())
    index["latents"]["family"] = family
    (out / "index.json").write_text(json.dumps(index))
    return out


GOOD = {"a": torch.ones(4, 2, 8, 8), "b": torch.ones(4, 2, 8, 8), "prompt": torch.ones(3, 5)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"image": torch.ones(4, 1, 8, 8)}, None),
        ({"image": torch.ones(4, 2, 8, 8), "image_embeds": torch.ones(7, 5), "prompt_2": torch.ones(2, 9)}, None),
        ({"image": torch.ones(4, 1, 4, 8)}, r"its image has the shape \(4, 1, 4, 8\), which does not fit"),
        ({"image": torch.ones(4, 8, 8)}, "its image has the shape"),
        ({"image": torch.full((4, 1, 8, 8), torch.nan)}, "holds NaN"),
        ({"picture": torch.ones(4, 1, 8, 8)}, "not latents of a pair"),
        ({"prompt": None, "prompt_2": torch.ones(2, 9)}, "not latents of a pair"),
    ],
)
def test_tensors_of_a_sample(change, message):
    tensors = {name: tensor for name, tensor in {**GOOD, **change}.items() if tensor is not None}
    content = safetensors.torch.save(tensors)
    if message is None:
        assert load_latents(content, "sample").keys() == tensors.keys()
        return
    with pytest.raises(VideoAlignError, match=message):
        load_latents(content, "sample")


def test_samples_that_lack_the_images_of_their_set_are_left_out(pipelines, tmp_path, capfd):
    generator = load_generator(pipelines / "ltx", parts=("vae",))
    shape = generator.latent_shape(5, 32, 32)

    def tensors(i: int, made: dict) -> dict:
        return made if i == 2 else {**made, "image": torch.zeros(shape[0], 1, *shape[2:])}

    labels = {"prompt": "p", "labels": {"VQ": "A", "MQ": "A", "TA": "A"}}
    options = {"tensors": tensors, "images": "file"}
    out = write_latents(tmp_path / "set", generator.identity(), shape, lambda i: labels, count=4, **options)
    assert call("fit", "--config", flow_config(tmp_path / "f.yaml", pipelines / "ltx", out)) == 2
    assert "key 'k2' holds no image, unlike what the set's index says" in capfd.readouterr().err


def test_rewards_are_compared_within_prompt_and_image():
    rewards = {"VQ": 1.0, "MQ": 0.0, "TA": 0.0}
    records = [{"prompt": "p", "rewards": rewards, "image": {"file": "x", "sha256": c}} for c in "aab"]
    records.append({"prompt": "p", "rewards": rewards})
    prompts = Judgements([(record, "r") for record in records], "videos", Weights()).prompts
    assert prompts[0] == prompts[1] and len(set(prompts)) == 3 and prompts[3] == "p"


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """Two prompts with two images, three items."""
    folder = tmp_path_factory.mktemp("image_prompts")
    for i, name in enumerate(("x.png", "y.png")):
        write_png(folder / name, 10 + i)
    with open(folder / "prompts.csv", "w", newline="") as file:
        csv.writer(file).writerows([("prompt", "image"), ("p", "x.png"), ("p", "y.png"), ("q", "y.png")])
    return folder / "prompts.csv"


def generate(generator: Path, prompts: Path, out: Path, *options) -> int:
    given = {"generator": generator, "prompts": prompts, "out": out, "samples": 2, **SIZE, "device": "cpu"}
    return call("generate", *flags(**given), *options)


@pytest.fixture(scope="module")
def generated(tmp_path_factory, pipelines, prompts) -> Path:
    out = tmp_path_factory.mktemp("from_images") / "set"
    assert generate(pipelines / "ltx", prompts, out, "--batch-size", 4) == 0
    return out


def test_generated_videos_hold_their_image_and_name_it(generated, prompts):
    found = {content.key: content for content in ShardSet(generated).contents()}
    assert len(found) == 6
    for item, name in enumerate(("x.png", "y.png", "y.png")):
        for number in range(2):
            content = found[f"{item:05d}-{number:03d}"]
            image = image_of(content)
            assert image.content == (prompts.parent / name).read_bytes()
            assert content.record["image"] == {"file": name, "sha256": image.sha256}
    assert len({content.record["seed"] for content in found.values()}) == 6
    assert call("shards", "verify", generated) == 0


def test_generated_videos_depend_on_their_image_alone(generated, pipelines, prompts, tmp_path):
    """A batch of another size, and another order of rows, give the same videos."""
    for name in ("x.png", "y.png"):
        shutil.copy(prompts.parent / name, tmp_path / f"copy of {name}")
    rows = [("prompt", "image"), ("q", "copy of y.png"), ("p", "copy of x.png")]
    with open(tmp_path / "p.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    assert generate(pipelines / "ltx", tmp_path / "p.csv", tmp_path / "set") == 0
    before, after = (
        {(r.record()["prompt"], r.record()["seed"]): decode(r.members["mp4"], VIDEO, 1) for r in ShardSet(folder)}
        for folder in (generated, tmp_path / "set")
    )
    assert len(after) == 4
    for item, video in after.items():
        assert float((video.int() - before[item].int()).abs().float().mean()) < 0.2


def test_generated_videos_are_encoded_with_their_images(generated, pipelines, tmp_path):
    out = encoded(tmp_path, pipelines / "ltx", generated, clip={**CLIP, "fps": None})
    assert ShardSet(out).index.latents["images"] == "file" and len(samples_of(out)) == 6


def test_interrupted_sampling_goes_on_only_with_the_same_images(pipelines, prompts, tmp_path, capfd, monkeypatch):
    for path in prompts.parent.iterdir():
        shutil.copy(path, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Generate, "extra_files", lambda self: 1 / 0)
        assert generate(pipelines / "ltx", tmp_path / "prompts.csv", tmp_path / "set") == 1
    capfd.readouterr()
    write_png(tmp_path / "y.png", 99)
    assert generate(pipelines / "ltx", tmp_path / "prompts.csv", tmp_path / "set") == 2
    assert "images differ" in capfd.readouterr().err


def test_arms_of_a_comparison_belong_to_their_images(pipelines, prompts, tmp_path):
    for path in prompts.parent.iterdir():
        shutil.copy(path, tmp_path)
    given = ("base", Arm(), str(pipelines / "ltx"), str(tmp_path / "prompts.csv"), Sampling(**SIZE), 1, "cpu")
    sample_arm(tmp_path / "compared", *given)
    kept = json.loads((tmp_path / "compared/videos/base.json").read_text())
    assert kept["prompts"] == ["p", "p", "q"] and len(set(kept["images"])) == 2
    assert len(ShardSet(tmp_path / "compared/videos/base")) == 3
    sample_arm(tmp_path / "compared", *given)
    write_png(tmp_path / "y.png", 99)
    with pytest.raises(VideoAlignError, match="holds videos of other settings"):
        sample_arm(tmp_path / "compared", *given)


@pytest.mark.parametrize(
    ("text", "needs", "message"),
    [
        ("prompt,image\np,x.png\n", "text", "names images, but this generator makes videos of prompts alone"),
        ("prompt\np\n", "image", "names no images, but this generator begins every video with one"),
    ],
)
def test_prompts_and_generators_that_do_not_fit_are_refused(
    text, needs, message, pipelines, generators, tmp_path, capfd
):
    write_png(tmp_path / "x.png", 0)
    (tmp_path / "p.csv").write_text(text)
    folder = {"text": generators, "image": pipelines}[needs] / "ltx"
    assert generate(folder, tmp_path / "p.csv", tmp_path / "out") == 2
    assert message in capfd.readouterr().err and not (tmp_path / "out").exists()


def test_callbacks_sample_from_images(latents, pipelines, prompts, judge, tmp_path):
    callbacks = [
        node(f"{CALLBACKS}.SideBySide", prompts=str(prompts), sampling={**SIZE}),
        node(f"{CALLBACKS}.WinRate", reward_model=judge, prompts=str(prompts), samples=1, sampling={**SIZE}),
    ]
    config = flow_config(tmp_path / "f.yaml", pipelines / "ltx", latents, callbacks, fps=8.0)
    cli = experiment(["fit", "--config", str(config)])
    sampler = next(c for c in cli.trainer.callbacks if type(c).__name__ == "SideBySide").sampler
    assert [one.keys() for one in sampler.encoded] == [{"prompt", "image"}] * 3 + [{"prompt"}]
    first, second = sampler.both([(0, 0), (1, 0)])[0]
    assert torch.equal(first[:, :1], sampler.encoded[0]["image"])
    assert torch.equal(second[:, :1], sampler.encoded[1]["image"])


def test_callbacks_without_images_are_refused_before_training(latents, pipelines, tmp_path, capfd):
    callback = node(f"{CALLBACKS}.SideBySide", prompts=["p"], sampling={**SIZE})
    assert call("fit", "--config", flow_config(tmp_path / "f.yaml", pipelines / "ltx", latents, [callback])) == 2
    assert "callbacks.SideBySide.prompts names no images" in capfd.readouterr().err


# --- pairs and rounds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["best-worst", "margin"])
def test_only_videos_of_one_image_are_paired(mode, samples):
    contents = {content.key: content for content in ShardSet(samples / "videos").contents()}
    rewards = {key: torch.tensor([float(i), 0.0, 0.0]) for i, key in enumerate(sorted(contents))}
    chosen = _choose(contents, rewards, Weights(), mode, 0.0)
    pairs = {frozenset((a.key, b.key)) for (a, _), (b, _) in chosen}
    assert all(contents[a].image_id == contents[b].image_id for a, b in map(tuple, pairs))
    assert len(pairs) == {"best-worst": 2, "margin": 6}[mode]


def test_pairs_from_rewards_keep_the_image(samples, judge, tmp_path):
    given = flags(model=judge, device="cpu", workers=0, batch_size=3)
    for data, mode in (("videos", "best-worst"), ("pairs", "relabel")):
        out = tmp_path / data
        status = call("shards", "pairs-from-rewards", *given, *flags(data=samples / data, out=out), "--mode", mode)
        assert status == 0
        images = {image_of(content).sha256 for content in ShardSet(samples / data).contents()}
        assert {image_of(content).sha256 for content in ShardSet(out).contents()} == images


def test_rounds_show_the_images_of_the_set(samples, tmp_path):
    store = begin(str(samples / "videos"), str(tmp_path / "votes.db"), validation=0.0, benchmark=0.0)
    shown = shown_by(store, ShardSet(samples / "videos"))
    assert len(shown.images) == 6 and len({*shown.images.values()}) == 2
    for content in ShardSet(samples / "videos").contents():
        assert shown.images[content.key].read_bytes() == image_of(content).content
    images = {content.key: content.image_id for content in ShardSet(samples / "videos").contents()}
    pairs = [(pair.key_a, pair.key_b) for pair in store.round().pairs]
    assert pairs and all(images[a] == images[b] for a, b in pairs)


def test_rounds_of_sets_without_images_show_none(generated, clips, tmp_path):
    store = begin(str(clips / "videos"), str(tmp_path / "votes.db"), validation=0.0, benchmark=0.0)
    assert not shown_by(store, ShardSet(clips / "videos")).images
