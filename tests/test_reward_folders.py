"""Folders of VideoReward, its templates, and backbones that are none."""

import json
import shutil

import pytest
import torch

from reward_network_kit import FROZEN, PROMPTS, ROWS, clip_and_prompts, clips, rewards, train
from videoalign import VideoAlignError
from videoalign.miniature.networks.qwen import make_qwen
from videoalign.models import LoRA, Template, VideoReward
from videoalign.models.video_reward import Statistics

# --- folders --------------------------------------------------------------------------------------

TRAINED = {
    "full": {"language": "full", "vision": "full"},
    "lora": {"language": "lora", "vision": "lora", "lora": LoRA(rank=3, alpha=5)},
    "rows": {"head_rows": 1, "positions": "1d", **FROZEN},
    "shared": {"template": "shared", "dtype": "bfloat16"},
}


@pytest.mark.parametrize("kind", TRAINED)
def test_saved_networks_give_identical_rewards(build, tmp_path, kind):
    network = build(**TRAINED[kind], max_prompt_tokens=999)
    train(network, 1)
    network.statistics = Statistics([1.0, 2.0, 3.0], [0.1, 0.2, 0.3])
    network.save_pretrained(tmp_path / "reward")
    loaded = VideoReward.from_pretrained(tmp_path / "reward").eval()
    assert torch.equal(rewards(loaded, clips(), PROMPTS), rewards(network.eval(), clips(), PROMPTS))
    assert not torch.equal(rewards(loaded, clips(), PROMPTS), rewards(build(**TRAINED[kind]), clips(), PROMPTS))
    assert loaded.settings == network.settings and loaded.statistics == network.statistics
    assert loaded.processor.sampling == network.processor.sampling
    assert loaded.processor.template.text == network.processor.template.text
    assert loaded.trained_names() == network.trained_names()
    assert (tmp_path / "reward" / "adapter").exists() == any(".lora_" in name for name in network.trained_names())


@pytest.fixture(scope="module")
def saved(backbone, sampling, tmp_path_factory):
    """Folder of a network with adapters. Read only."""
    folder = tmp_path_factory.mktemp("saved") / "reward"
    VideoReward(backbone, "plain", sampling, lora=LoRA(rank=2)).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of ``saved`` to spoil."""
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def test_folders_hold_no_pickle(build, saved, tmp_path):
    build(language="full").save_pretrained(tmp_path / "reward", backbone=True)
    files = [p for folder in (saved, tmp_path / "reward") for p in folder.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".txt", ".jinja", ".md"}
    assert sum(p.suffix == ".safetensors" for p in files) == 4
    assert not any(p.read_bytes().startswith((b"\x80\x02", b"\x80\x04", b"PK\x03\x04")) for p in files)


def test_folders_hold_what_trained_and_no_more(saved, backbone):
    size = sum(p.stat().st_size for p in saved.rglob("*.safetensors"))
    assert size < (backbone / "model.safetensors").stat().st_size
    assert sorted(p.name for p in saved.iterdir()) == [
        "adapter",
        "processor",
        "reward.json",
        "template.txt",
        "trained.safetensors",
    ]


def test_saving_again_replaces_the_folder_whole(build, tmp_path):
    build().save_pretrained(tmp_path / "reward")
    network = build(**FROZEN)
    network.save_pretrained(tmp_path / "reward")
    assert not (tmp_path / "reward" / "adapter").exists()
    assert VideoReward.from_pretrained(tmp_path / "reward").trained_names() == [ROWS, "head.weight"]
    assert [p.name for p in tmp_path.iterdir()] == ["reward"]


def test_a_failed_save_leaves_the_folder_as_it_was(build, copy):
    network = build()
    with pytest.raises(KeyError):
        network.save_pretrained(copy, state={})
    assert VideoReward.from_pretrained(copy).trained_names() == network.trained_names()
    assert [p.name for p in copy.parent.iterdir()] == ["copy"]


def test_a_folder_with_its_backbone_needs_no_other(backbone, sampling, tmp_path):
    shutil.copytree(backbone, tmp_path / "backbone")
    network = VideoReward(tmp_path / "backbone", "plain", sampling, vision="frozen").eval()
    want = rewards(network, clips(), PROMPTS)
    network.save_pretrained(tmp_path / "reward", backbone=True)
    shutil.rmtree(tmp_path / "backbone")
    (tmp_path / "reward").rename(tmp_path / "moved")
    assert json.loads((tmp_path / "moved" / "reward.json").read_text())["backbone"] is None
    assert torch.equal(rewards(VideoReward.from_pretrained(tmp_path / "moved").eval(), clips(), PROMPTS), want)


def test_backbone_that_moved_can_be_named(backbone, sampling, copy, tmp_path):
    record = json.loads((copy / "reward.json").read_text())
    (copy / "reward.json").write_text(json.dumps({**record, "backbone": str(tmp_path / "gone")}))
    with pytest.raises(VideoAlignError, match="gone"):
        VideoReward.from_pretrained(copy)
    assert VideoReward.from_pretrained(copy, backbone=backbone).backbone_name == str(backbone)


def test_a_model_that_was_trained_with_flash_attention_is_loaded_without(copy):
    """FlashAttention computes in no fp32, in which videos are scored."""
    record = json.loads((copy / "reward.json").read_text())
    record["settings"]["attention"] = "flash_attention_2"
    (copy / "reward.json").write_text(json.dumps(record))
    assert VideoReward.from_pretrained(copy).settings["attention"] == "sdpa"


def test_settings_can_change_on_loading(saved):
    network = VideoReward.from_pretrained(saved, attention="eager", gradient_checkpointing=True, dtype="bfloat16")
    assert any(getattr(module, "gradient_checkpointing", False) for module in network.backbone.modules())
    assert network.settings["attention"] == network.config._attn_implementation == "eager"
    kinds = {name: p.dtype for name, p in network.named_parameters()}
    assert {kinds[name] for name in network.trained_names()} == {torch.float32}
    assert kinds["backbone.language_model.layers.0.mlp.up_proj.base_layer.weight"] == torch.bfloat16


@pytest.mark.parametrize(
    "name", ["reward.json", "template.txt", "trained.safetensors", "processor", "adapter/adapter_model.safetensors"]
)
def test_missing_file_is_named(copy, name):
    (shutil.rmtree if (copy / name).is_dir() else type(copy).unlink)(copy / name)
    with pytest.raises(VideoAlignError, match=name):
        VideoReward.from_pretrained(copy)


@pytest.mark.parametrize("name", ["trained.safetensors", "adapter/adapter_model.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.9])
def test_truncated_tensors_are_named(copy, name, share):
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(VideoAlignError, match=name):
        VideoReward.from_pretrained(copy)


@pytest.mark.parametrize(
    "content", ['{"format": "another"}', '{"format": "videoalign-reward", "version": 99}', "[]", "{", ""]
)
def test_foreign_records_are_refused(copy, content):
    (copy / "reward.json").write_text(content)
    with pytest.raises(VideoAlignError, match=r"reward\.json"):
        VideoReward.from_pretrained(copy)


def test_spoiled_template_is_named(copy):
    (copy / "template.txt").write_text("<video> <prompt>")
    with pytest.raises(VideoAlignError, match=r"template\.txt"):
        VideoReward.from_pretrained(copy)


def test_a_folder_of_something_else_is_refused(backbone, tmp_path):
    nothing, other = "there is no such folder of a reward model", r"not a reward model's folder: it has no reward\.json"
    for folder, why in ((backbone, other), (tmp_path, other), (tmp_path / "nothing", nothing)):
        with pytest.raises(VideoAlignError, match=why):
            VideoReward.from_pretrained(folder)


@pytest.mark.parametrize("shape", [{"hidden": 48}, {"layers": 3}, {"vision_layers": 2}, {"layers": 1}])
def test_another_backbone_is_refused(saved, tmp_path, shape):
    make_qwen(tmp_path / "other", **{"corpus": PROMPTS, "hidden": 32, "layers": 2, "vision_layers": 1} | shape)
    with pytest.raises(VideoAlignError, match=r"do not fit backbone .*other"):
        VideoReward.from_pretrained(saved, backbone=tmp_path / "other")


# --- templates ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "rubrics", "shared"])
def test_shipped_templates_parse(name):
    template = Template.load(name)
    assert "".join(template.parts) == template.text
    assert template.separate == (name != "shared")
    assert len(template.tokens) == (1 if name == "shared" else 3)
    assert template.marks[0] == "<video>"
    assert template.marks[-2] == "<prompt>"  # the prompt before the last reward alone


def test_templates_of_ones_own(tmp_path, build):
    text = "Watch: <video>\n<prompt>? Überall\n<reward:VQ> <reward:MQ> <reward:TA>"
    (tmp_path / "mine.txt").write_text(text + "\n", encoding="utf-8")
    template = Template.load(tmp_path / "mine.txt")
    assert template.text == text and template.marks[:2] == ["<video>", "<prompt>"]
    got = rewards(build(template=str(tmp_path / "mine.txt")), *clip_and_prompts(*PROMPTS))
    assert (got[1:] - got[0]).abs().min() > 1e-4  # with the prompt in front, every reward sees it


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "<video> occurs 0 times"),
        ("<prompt><reward:VQ><reward:MQ><reward:TA>", "<video> occurs 0 times"),
        ("<video><video><prompt><reward:VQ><reward:MQ><reward:TA>", "<video> occurs 2 times"),
        ("<video><reward:VQ><reward:MQ><reward:TA>", "<prompt> occurs 0 times"),
        ("<video><prompt><prompt><reward:VQ><reward:MQ><reward:TA>", "<prompt> occurs 2 times"),
        ("<video><prompt>", r"reward marks are \[\]"),
        ("<video><prompt><reward:VQ><reward:MQ>", "reward marks are"),
        ("<video><prompt><reward:MQ><reward:VQ><reward:TA>", "in this order"),
        ("<video><prompt><reward:VQ><reward:MQ><reward:TA><reward:TA>", "each once"),
        ("<video><prompt><reward:VQ><reward:MQ><reward:XX>", "XX"),
        ("<video><prompt><reward:VQ,MQ><reward:TA>", "neither all apart nor all in one"),
        ("<reward:VQ><video><prompt><reward:MQ><reward:TA>", "<video> stands behind"),
        ("<video><reward:VQ><reward:MQ><reward:TA><prompt>", "<prompt> stands behind"),
        ("<video><reward:VQ,MQ,TA><prompt>", "<prompt> stands behind"),
    ],
)
def test_bad_templates_are_refused(text, message):
    with pytest.raises(VideoAlignError, match=f"template 'bad'.*{message}"):
        Template(text, "bad")


def test_templates_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes("Qualität <video>".encode("latin-1"))
    for name in ("nowhere", tmp_path / "latin.txt", tmp_path):
        with pytest.raises(VideoAlignError, match="plain, plain_shared, rubrics, shared"):
            Template.load(name)


# --- backbones that are none ----------------------------------------------------------------------


def test_folders_that_are_no_backbone_are_refused(backbone, build, tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(VideoAlignError, match=folder.name):
            build(folder)
        with pytest.raises(VideoAlignError, match=folder.name):
            build(folder, processor=backbone)


def test_other_models_are_refused(backbone, build, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(VideoAlignError, match="'bert' is not one of qwen2_vl, qwen2_5_vl"):
        build(tmp_path, processor=backbone)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_spoiled_backbones_are_refused(backbone, build, tmp_path, name):
    folder = shutil.copytree(backbone, tmp_path / "spoiled")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(VideoAlignError, match="spoiled"):
        build(folder)


@pytest.mark.parametrize("patch", [4, 14])
def test_patches_that_the_tower_does_not_take_are_refused(build, backbone, tmp_path, patch):
    folder = tmp_path / "processor"
    huggingface = build().processor.huggingface
    huggingface.video_processor.patch_size = patch
    huggingface.save_pretrained(folder)
    with pytest.raises(VideoAlignError, match="do not belong together"):
        build(processor=folder)
