"""Reward models that are shown the image which a video begins with, beside its prompt."""

import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import call, flags, json_lines, plain_clip
from reward_network_kit import PROMPTS, SIZES, build, clips, rewards  # noqa: F401  fixtures
from videoalign import VideoAlignError
from videoalign.commands.reward_judge import RewardJudge
from videoalign.datamodules.contents import ShardError
from videoalign.datamodules.frames import FrameReader, load_image
from videoalign.datamodules.pairs import PairDecoder, VideoCollate
from videoalign.datamodules.sample_images import SampleImage
from videoalign.datamodules.shards import ShardSet, ShardWriter
from videoalign.datamodules.video import decode
from videoalign.datamodules.video_list import videos_of
from videoalign.miniature.networks.qwen import make_qwen
from videoalign.models import VideoReward
from videoalign.models.backbone import FAMILIES
from videoalign.models.patch_projection import PatchProjection
from videoalign.models.template import Template


def images(count: int = 3, height: int = 32, width: int = 48, seed: int = 5) -> list[torch.Tensor]:
    """Random images, uint8."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator) for _ in range(count)]


def shown(network: VideoReward, videos: list, prompts: list, pictures: list) -> torch.Tensor:
    with torch.no_grad():
        return network(**network.processor(videos, prompts, pictures))


@pytest.fixture(scope="session", params=FAMILIES)
def family_network(request, tmp_path_factory, sampling) -> VideoReward:
    """A network of each family whose template shows images."""
    folder = tmp_path_factory.mktemp("image_backbones") / request.param
    make_qwen(folder, request.param, corpus=PROMPTS, hidden=32, layers=2, vision_layers=2)
    torch.manual_seed(0)
    return VideoReward(folder, template="plain_image", sampling=sampling).eval()


# --- templates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "rubrics", "shared", "plain_shared"])
def test_shipped_templates_show_the_image_behind_the_prompt(name):
    plain, template = Template.load(name), Template.load(f"{name}_image")
    assert not plain.image and template.image
    assert template.text.replace("\nIt was to begin with this picture: <image>", "") == plain.text
    marks = template.marks
    assert marks.index("<image>") == marks.index("<prompt>") + 1 < len(marks) - 1
    assert Template(template.text) == Template(template.text, "template")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<video><image><reward:VQ><reward:MQ><prompt><reward:TA>", "must stand behind the same reward marks"),
        ("<video><reward:VQ><image><reward:MQ><prompt><reward:TA>", "must stand behind the same reward marks"),
        ("<video><reward:VQ><reward:MQ><prompt><reward:TA><image>", "must stand behind the same reward marks"),
        ("<video><reward:VQ><reward:MQ><prompt><image><image><reward:TA>", "<image> occurs more than once"),
    ],
)
def test_images_that_other_rewards_would_see_are_refused(text, message):
    with pytest.raises(VideoAlignError, match=message):
        Template(text)


# --- inputs and rewards -----------------------------------------------------------------------------------------------


def test_patches_of_an_image_are_those_of_transformers(family_network):
    processor, (picture,) = family_network.processor, images(1)
    batch = processor(clips(SIZES[:1]), PROMPTS[:1], [picture])
    want = processor.huggingface.image_processor([picture], return_tensors="pt", do_resize=False)
    torch.testing.assert_close(processor.geometry.pixels(batch["image_patches"]), want["pixel_values"])
    assert batch["image_grid_thw"].tolist() == want["image_grid_thw"].tolist() == [[1, 4, 6]]
    tokens = (batch["input_ids"] == family_network.config.image_token_id).sum()
    assert tokens == 4 * 6 // processor.geometry.merge**2


def test_only_text_alignment_depends_on_the_image(family_network):
    videos, prompts = clips(SIZES[:1]) * 3, PROMPTS[:1] * 3
    got = shown(family_network, videos, prompts, images())
    torch.testing.assert_close(got[1:, :2], got[:1, :2].expand(2, 2), rtol=0, atol=1e-5)
    assert (got[1:, 2] - got[0, 2]).abs().min() > 1e-4


def test_images_change_nothing_before_them(family_network):
    """VQ and MQ are those of the same network without the image."""
    plain = VideoReward(family_network.backbone_name, template="plain", sampling=family_network.processor.sampling)
    plain.load_state_dict(family_network.state_dict())
    got = shown(family_network, clips(), PROMPTS, images())
    want = rewards(plain.eval(), clips(), PROMPTS)
    torch.testing.assert_close(got[:, :2], want[:, :2], rtol=0, atol=1e-5)
    assert (got[:, 2] - want[:, 2]).abs().min() > 1e-4


@pytest.mark.parametrize("positions", ["mrope", "1d"])
def test_a_batch_with_images_gives_what_one_at_a_time_gives(build, positions):  # noqa: F811
    network = build(template="rubrics_image", positions=positions)
    pictures = [*images(2), *images(1, 16, 64)]
    single = torch.cat(
        [shown(network, [video], [prompt], [one]) for video, prompt, one in zip(clips(), PROMPTS, pictures)]
    )
    torch.testing.assert_close(shown(network, clips(), PROMPTS, pictures), single, rtol=0, atol=1e-5)


def test_every_backbone_projects_patches_by_a_product(family_network):
    assert isinstance(family_network.backbone.visual.patch_embed.proj, PatchProjection)


def test_positions_are_those_of_transformers(family_network):
    """The network's positions are those that transformers computes of image and video itself, row by row."""
    videos, pictures = clips([*SIZES, SIZES[1], SIZES[0]]), images(5)
    batch = family_network.processor(videos, [*PROMPTS, PROMPTS[1], PROMPTS[1]], pictures)
    ids, mask, config = batch["input_ids"], batch["attention_mask"], family_network.config
    kinds = torch.where(ids == config.image_token_id, 1, torch.where(ids == config.video_token_id, 2, 0))
    grids = {"image_grid_thw": batch["image_grid_thw"], "video_grid_thw": batch["video_grid_thw"]}
    want = family_network.backbone.get_rope_index(ids, mm_token_type_ids=kinds, attention_mask=mask, **grids)[0]
    found = family_network._position_ids(ids, mask, batch["video_grid_thw"], batch["image_grid_thw"])
    assert torch.equal(found, want)
    (places,) = (ids[0] == config.image_token_id).nonzero(as_tuple=True)
    rows, columns = found[1, 0, places], found[2, 0, places]
    assert {int(b - a) for a, b in pairwise(sorted({*columns.tolist()}))} == {1} and len({*rows.tolist()}) == 2


def test_exported_models_keep_the_image(build, tmp_path):  # noqa: F811
    network = build(template="plain_image")
    network.save_pretrained(tmp_path / "model")
    loaded = VideoReward.from_pretrained(tmp_path / "model")
    assert loaded.processor.template.image
    want = shown(network, clips(), PROMPTS, images())
    torch.testing.assert_close(shown(loaded, clips(), PROMPTS, images()), want, rtol=0, atol=1e-5)


def test_images_that_a_template_does_not_show_are_left_out(build):  # noqa: F811
    processor = build().processor
    with_images, without = processor(clips(), PROMPTS, images()), processor(clips(), PROMPTS)
    assert with_images.keys() == without.keys()
    assert all(torch.equal(with_images[name], without[name]) for name in without)


@pytest.mark.parametrize("pictures", [[], [None, None, None]])
def test_videos_without_images_are_refused(build, pictures):  # noqa: F811
    with pytest.raises(VideoAlignError, match="template 'plain_image' shows the image that a video begins with"):
        build(template="plain_image").processor(clips(), PROMPTS, pictures)


# --- data -------------------------------------------------------------------------------------------------------------


def write_set(folder, kind: str, with_images=(0, 1, 2)):
    labels = {"labels": {"VQ": "A", "MQ": "B", "TA": "same"}}
    with ShardWriter(folder, kind) as writer:
        for i in range(3):
            buffer = io.BytesIO()
            values = np.random.default_rng(i).integers(0, 255, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(values).save(buffer, "PNG")
            image = SampleImage("png", buffer.getvalue()) if i in with_images else None
            sides = ("a", "b") if kind == "pairs" else ("",)
            videos = {side: plain_clip(30 * i + 20 * n + 20) for n, side in enumerate(sides)}
            writer.write(f"k{i}", videos, {"prompt": PROMPTS[i], **(labels if kind == "pairs" else {})}, image)
    return ShardSet(folder)


def test_pairs_are_batched_with_their_image(build, tmp_path):  # noqa: F811
    shards, processor = write_set(tmp_path / "pairs", "pairs"), build(template="plain_image").processor
    decode = PairDecoder(FrameReader(shards, processor.sampling, processor.factor, True), 1)
    pairs = [decode(raw, 0) for raw in shards]
    for raw, pair in zip(shards, pairs):
        assert torch.equal(pair.image, load_image(raw.members["png"], processor.sampling, processor.factor, "image"))
        assert torch.equal(pair.swapped().image, pair.image)
    inputs = VideoCollate(processor).tensors(pairs)["inputs"]
    both = [pair.image for pair in pairs] * 2
    want = processor([v for s in (0, 1) for v in (p.videos[s] for p in pairs)], PROMPTS * 2, both)
    assert all(torch.equal(inputs[name], want[name]) for name in want)


def test_sets_that_lack_images_are_refused(build, tmp_path):  # noqa: F811
    shards, processor = write_set(tmp_path / "set", "videos", (0, 2)), build(template="plain_image").processor
    with pytest.raises(ShardError, match="1 of 3 samples hold no image, the first of them 'k1'"):
        FrameReader(shards, processor.sampling, processor.factor, True)
    with pytest.raises(ShardError, match="1 of 3 samples hold no image"):
        videos_of(shards, processor)


def test_scoring_shows_each_video_its_image(build, tmp_path):  # noqa: F811
    network = build(template="plain_image")
    network.save_pretrained(tmp_path / "model")
    shards, processor = write_set(tmp_path / "set", "videos"), network.processor
    judge = RewardJudge(model=str(tmp_path / "model"), batch_size=2, workers=0, device="cpu")
    found = judge.score_set(shards, ["k0", "k1", "k2"], tmp_path / "rewards")
    for row, video in zip(found, videos_of(shards, processor).values()):
        want = shown(network, [video.frames(processor)], [video.prompt], [video.image(processor)])[0]
        torch.testing.assert_close(row, want, rtol=0, atol=1e-4)
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_files_are_scored_with_their_images(build, tmp_path, capsys):  # noqa: F811
    network = build(template="plain_image")
    network.save_pretrained(tmp_path / "model")
    (tmp_path / "v.mp4").write_bytes(plain_clip(90))
    for i, picture in enumerate(images(2)):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    (tmp_path / "list.csv").write_text("path,prompt,image\nv.mp4,a red circle,1.png\n")
    given = flags(model=tmp_path / "model", device="cpu", workers=0)
    one = flags(video=tmp_path / "v.mp4", prompt="a red circle", image=tmp_path / "0.png")
    assert call("score", *given, "--raw", *one, *flags(csv=tmp_path / "list.csv")) == 0
    rows, processor = json_lines(capsys), network.processor
    frames = decode(tmp_path / "v.mp4", processor.sampling, processor.factor)
    for number, row in enumerate(rows):
        same = load_image((tmp_path / f"{number}.png").read_bytes(), processor.sampling, processor.factor, "i")
        want = shown(network, [frames], ["a red circle"], [same])[0]
        assert [row[d] for d in ("VQ", "MQ", "TA")] == pytest.approx(want.tolist(), abs=1e-4)
    assert rows[0]["VQ"] == pytest.approx(rows[1]["VQ"], abs=1e-5) and abs(rows[0]["TA"] - rows[1]["TA"]) > 1e-4
    assert call("score", *given, "--raw", *one[:2]) == 1
    assert "comes without an image, which the reward model's template shows" in capsys.readouterr().err
    assert call("score", *given, *one[:2], "--image", tmp_path / "none.png") == 2
    assert "1 images are not there" in capsys.readouterr().err
