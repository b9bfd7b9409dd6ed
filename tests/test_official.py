"""The official layouts of VideoReward: what loads, scores, converts and trains on."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from helpers import json_lines
from official_kit import (
    MEAN,
    PROMPTS,
    REMOVE,
    STD,
    TEXT,
    TOKENS,
    Kit,
    Official,
    clips,
    edit_adapters,
    rewards,
    values,
)
from videoalign import VideoAlignError
from videoalign.cli import main
from videoalign.datamodules.video import decode
from videoalign.models import FrameSampling, Template, VideoReward, load_reward


@pytest.fixture
def kit(official_kit: Kit) -> Kit:
    return official_kit


# --- template -------------------------------------------------------------------------------------


def test_the_official_notation_stands_behind_the_video_and_keeps_its_newlines(kit: Kit) -> None:
    want = (
        "<video>\nLook at the clip.\nHow good does it look? <reward:VQ>\nHow well does it move? <reward:MQ>\n"
        'Wanted was: "<prompt>".\nIs it that? <reward:TA>\n'
    )
    assert kit.template.text == want and kit.template.tokens == TOKENS


@pytest.mark.parametrize(
    "source",
    [
        f"DETAILED_PROMPT_WITH_SPECIAL_TOKEN = '''{TEXT}'''",
        f"A = B = DETAILED_PROMPT_WITH_SPECIAL_TOKEN = {TEXT!r}",
        "DETAILED_PROMPT_WITH_SPECIAL_TOKEN = (\n" + "\n".join(map(repr, TEXT.splitlines(keepends=True))) + ")",
        f"DETAILED_PROMPT = 'x'\nDETAILED_PROMPT_WITH_SPECIAL_TOKEN = {TEXT!r}\nSIMPLE_PROMPT_WITH_SPECIAL_TOKEN = 'y'",
    ],
    ids=["triple quotes", "chained", "in pieces", "among others"],
)
def test_the_text_is_read_from_the_repository(kit: Kit, tmp_path: Path, source: str) -> None:
    (tmp_path / "prompt_template.py").write_text(source)
    assert Template.from_repository(tmp_path).text == kit.template.text


# --- loading --------------------------------------------------------------------------------------

NO_LORA = {"peft_lora_config.lora_enable": False}


@pytest.mark.parametrize(
    ("form", "rows", "era", "made", "config"),
    [
        ("whole", 1, "4.45", {}, {}),
        ("whole", 3, "4.45", {}, {}),
        ("whole", 1, "4.52", {"moved": True}, {}),
        ("pair", 1, "4.45", {}, {}),
        ("pair", 3, "4.52", {}, {}),
        ("whole", 3, "4.45", {"moved": True, "lora": False}, NO_LORA),
    ],
)
def test_rewards_are_those_of_the_official_model(
    kit: Kit, backbone: Path, tmp_path: Path, form: str, rows: int, era: str, made: dict, config: dict
) -> None:
    official = Official.make(backbone, rows, **made)
    network = load_reward(official.write(tmp_path / "o", form, era, config=config), template=kit.template)
    got, want = rewards(network), official.rewards(clips(), PROMPTS)  # a batch, and one at a time
    assert want.std(0).min() > 1e-3  # rewards that are all alike would prove nothing
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_tokenizer_may_know_the_reward_tokens(kit: Kit, backbone: Path, tmp_path: Path) -> None:
    shutil.copytree(backbone, tmp_path / "knows")
    processor = AutoProcessor.from_pretrained(backbone)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
    processor.save_pretrained(tmp_path / "knows")
    official = Official.make(tmp_path / "knows")
    network = load_reward(official.write(tmp_path / "o"), template=kit.template)
    torch.testing.assert_close(rewards(network), official.rewards(clips(), PROMPTS), rtol=0, atol=1e-5)


@pytest.fixture
def padded(backbone: Path, tmp_path: Path) -> Path:
    """A backbone whose embedding has more rows than its tokenizer has words, as the real one's."""
    folder = shutil.copytree(backbone, tmp_path / "padded")
    model = AutoModelForImageTextToText.from_pretrained(backbone)
    model.resize_token_embeddings(model.config.text_config.vocab_size + 16, mean_resizing=False)
    model.save_pretrained(folder)
    return folder


def test_embedding_shrinks_to_the_words_and_the_reward_tokens(kit: Kit, padded: Path, tmp_path: Path) -> None:
    official = Official.make(padded, moved=True)
    network = load_reward(official.write(tmp_path / "o"), template=kit.template)
    torch.testing.assert_close(rewards(network), official.rewards(clips(), PROMPTS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("more", [["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_adapter_file_may_hold_the_embedding_too(kit: Kit, tmp_path: Path, more: list[str]) -> None:
    folder = shutil.copytree(kit.folder / "pair", tmp_path / "pair")
    again = {n: t.clone() for n, t in kit.official.tensors().items() if re.search("|".join(more), n)}
    assert len(again) == len(more)
    edit_adapters(lambda tensors: tensors.update(again))(folder)
    want = rewards(load_reward(kit.folder / "pair", template=kit.template))
    assert torch.equal(rewards(load_reward(folder, template=kit.template)), want)


@pytest.mark.parametrize(
    ("config", "fps", "num_frames", "max_pixels"),
    [
        ({"fps": 3.0, "max_frame_pixels": 200704}, 3.0, None, 200704),
        ({"fps": 3.0, "num_frames": 8}, None, 8, 4096),
        ({"fps": REMOVE, "num_frames": 6}, None, 6, 4096),
        pytest.param({"num_frames": 8.0}, None, 8, 4096, id="a float, as the official option's type has it"),
    ],
)
def test_sampling_is_taken_over(
    kit: Kit, tmp_path: Path, config: dict, fps: float | None, num_frames: int | None, max_pixels: int
) -> None:
    folder = kit.official.write(tmp_path / "o", config={f"data_config.{k}": v for k, v in config.items()})
    sampling = load_reward(folder, template=kit.template).processor.sampling
    want = FrameSampling(fps=fps, num_frames=num_frames, max_pixels=max_pixels)
    assert sampling == want and sampling.indices(48, 8.0) == want.indices(48, 8.0)


@pytest.mark.parametrize(
    ("stated", "asked", "want"),
    [
        ("float32", None, torch.float32),
        ("bfloat16", None, torch.bfloat16),
        (None, None, torch.bfloat16),
        ("float32", "bfloat16", torch.bfloat16),
        ("bfloat16", "float32", torch.float32),
    ],
)
def test_dtype_is_the_folders_or_the_one_asked_for(
    kit: Kit, tmp_path: Path, stated: str | None, asked: str | None, want: torch.dtype
) -> None:
    folder = kit.official.write(tmp_path / "o", config={"model_config.torch_dtype": stated})
    options = ["--dtype", asked] if asked else []
    main(["convert", "--from", str(folder), "--out", str(tmp_path / "out"), *map(str, kit.text), *options])
    network = load_reward(tmp_path / "out")
    trained = set(network.trained_names())
    assert {p.dtype for name, p in network.named_parameters() if name in trained} == {torch.float32}
    assert {p.dtype for name, p in network.named_parameters() if name not in trained} == {want}


# --- score ----------------------------------------------------------------------------------------


def test_score_prints_the_rewards_of_the_official_model(
    kit: Kit, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sampling = FrameSampling(fps=4.0, max_pixels=4096)
    frames = [decode(kit.folder / f"{i}.mp4", sampling, 16) for i in range(3)]
    want = kit.official.rewards(frames, PROMPTS)
    main(kit.score(kit.folder / "whole", *kit.text, "--raw", "--batch-size", 3))
    torch.testing.assert_close(values(json_lines(capsys)), want, rtol=0, atol=1e-5)
    main(kit.score(kit.folder / "pair", "--official-repo", kit.folder / "repo", "--batch-size", 1))
    normal = json_lines(capsys)
    torch.testing.assert_close(values(normal), (want - MEAN) / STD, rtol=0, atol=1e-4)
    assert [line["Overall"] for line in normal] == pytest.approx(((want - MEAN) / STD).sum(1).tolist(), abs=1e-4)
    assert not list(tmp_path.iterdir())  # the repository's code did not run


def test_without_statistics_rewards_stay_raw_and_a_warning_says_so(
    kit: Kit, tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    main(kit.score(kit.folder / "whole", *kit.text))
    assert not [r for r in caplog.records if "inference_config" in r.getMessage()]
    caplog.clear()
    folder = kit.official.write(tmp_path / "o", config={"inference_config": REMOVE})
    capsys.readouterr()
    main(kit.score(folder, *kit.text, "--raw"))
    raw = json_lines(capsys)
    main(kit.score(folder, *kit.text))
    assert json_lines(capsys) == raw
    said = [r.getMessage() for r in caplog.records]
    assert sum("o/model_config.json has no inference_config" in message for message in said) == 2  # two runs
    assert sum("is not the official one word for word" in message for message in said) == 2


def test_backbone_of_the_option_goes_before_the_configurations(
    kit: Kit, backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    main(kit.score(kit.folder / "whole", *kit.text))
    want = json_lines(capsys)
    for i, name in enumerate(("none/at/all", str(kit.folder / "wide"), REMOVE)):
        folder = kit.official.write(tmp_path / f"{i}", config={"model_config.model_name_or_path": name})
        main(kit.score(folder, *kit.text, "--backbone", backbone))
        assert json_lines(capsys) == want


# --- convert --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "want"), [([], 10), (["--checkpoint-step", "2"], 2), (["--checkpoint-step", "10"], 10)]
)
def test_checkpoint_is_the_latest_or_the_one_asked_for(
    kit: Kit, backbone: Path, tmp_path: Path, options: list[str], want: int
) -> None:
    steps = {step: Official.make(backbone, seed=step) for step in (2, 10)}
    for step, official in steps.items():
        official.write(tmp_path / str(step), "pair", step=step)
    shutil.move(tmp_path / "2" / "checkpoint-2", tmp_path / "10" / "checkpoint-2")
    (tmp_path / "10" / "checkpoint-99").write_text("no folder")
    (tmp_path / "10" / "checkpoint-best").mkdir()
    main(["convert", "--from", str(tmp_path / "10"), "--out", str(tmp_path / "out"), *map(str, kit.text), *options])
    assert torch.equal(load_file(tmp_path / "out" / "trained.safetensors")["head.weight"], steps[want].head)


FROZEN_VISION = {"model_config.freeze_vision_tower": True}


@pytest.mark.parametrize(
    ("form", "moved", "config", "options", "carried"),
    [
        ("whole", False, {}, [], False),
        ("pair", False, {}, [], False),
        ("pair", False, {}, ["--with-backbone"], True),
        ("whole", True, {}, [], True),
        ("whole", False, FROZEN_VISION, [], True),
    ],
    ids=["equal", "equal pair", "asked for", "language differs", "frozen vision differs"],
)
def test_convert_keeps_rewards_and_carries_a_backbone_that_is_nowhere_else(
    kit: Kit,
    backbone: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    form: str,
    moved: bool,
    config: dict,
    options: list[str],
    carried: bool,
) -> None:
    below = shutil.copytree(backbone, tmp_path / "below")
    folder = Official.make(below, moved=moved).write(tmp_path / "o", form, config=config)
    want, out = load_reward(folder, template=kit.template), tmp_path / "out"
    main(["convert", "--from", str(folder), "--out", str(out), *map(str, kit.text), *options])
    assert ("note: frozen tensors" in capsys.readouterr().err) == (carried and not options)
    assert (out / "backbone").is_dir() == carried
    assert {p.suffix for p in out.rglob("*") if p.is_file()} <= {".safetensors", ".json", ".txt", ".jinja", ".md"}
    if carried:  # it stands on its own, anywhere
        shutil.rmtree(below)
        out = out.rename(tmp_path / "moved")
    shutil.rmtree(folder)
    got = load_reward(out)
    torch.testing.assert_close(rewards(got), rewards(want), rtol=0, atol=1e-6)
    assert got.statistics == want.statistics and got.processor.sampling == want.processor.sampling
    assert got.settings == want.settings and got.processor.template.text == want.processor.template.text


def test_convert_carries_no_backbone_whose_embedding_is_padded(kit: Kit, padded: Path, tmp_path: Path) -> None:
    folder = Official.make(padded).write(tmp_path / "o")
    main(["convert", "--from", str(folder), "--out", str(tmp_path / "out"), *map(str, kit.text)])
    assert not (tmp_path / "out" / "backbone").exists()


def test_converted_folders_need_no_argument(kit: Kit, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main(["convert", "--from", str(kit.folder / "whole"), "--out", str(tmp_path / "out"), *map(str, kit.text)])
    main(["convert", "--from", str(tmp_path / "out"), "--out", str(tmp_path / "again")])  # ours to ours
    main(kit.score(kit.folder / "whole", *kit.text))
    want = values(json_lines(capsys))
    for name in ("out", "again"):
        main(kit.score(tmp_path / name))
        torch.testing.assert_close(values(json_lines(capsys)), want, rtol=0, atol=1e-6)


def test_a_backbone_that_is_nowhere_else_travels_on_and_is_not_replaced(
    backbone: Path, kit: Kit, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = Official.make(backbone, moved=True).write(tmp_path / "o")
    main(["convert", "--from", str(folder), "--out", str(tmp_path / "out"), *map(str, kit.text)])
    want = rewards(load_reward(tmp_path / "out"))
    main(["convert", "--from", str(tmp_path / "out"), "--out", str(tmp_path / "again")])
    shutil.rmtree(tmp_path / "out")
    torch.testing.assert_close(rewards(load_reward(tmp_path / "again")), want, rtol=0, atol=0)
    with pytest.raises(VideoAlignError, match="leave --backbone out"):
        load_reward(tmp_path / "again", backbone)


def test_files_of_old_torch_versions_are_read(kit: Kit, tmp_path: Path) -> None:
    folder = shutil.copytree(kit.folder / "whole", tmp_path / "o")
    path = folder / "checkpoint-7" / "model.pth"
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    got, want = load_reward(folder, template=kit.template), load_reward(kit.folder / "whole", template=kit.template)
    torch.testing.assert_close(rewards(got), rewards(want), rtol=0, atol=0)


def test_excluded_parts_of_names_get_no_adapters(kit: Kit, tmp_path: Path) -> None:
    folder = shutil.copytree(kit.folder / "pair", tmp_path / "o")
    config = json.loads((folder / "model_config.json").read_text())
    config["peft_lora_config"]["lora_namespan_exclude"].append("mlp")
    (folder / "model_config.json").write_text(json.dumps(config))
    path = folder / "checkpoint-7" / "adapter_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if "mlp" not in name}
    save_file(kept, path)
    network = load_reward(folder, template=kit.template)
    assert network.settings["lora"]["targets"] == ["q_proj", "k_proj", "v_proj", "o_proj"]


# --- training on ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("moved", [False, True], ids=["on the backbone", "on its own backbone"])
def test_training_starts_from_a_converted_folder(kit: Kit, backbone: Path, tmp_path: Path, moved: bool) -> None:
    folder, start = Official.make(backbone, moved=moved).write(tmp_path / "o"), tmp_path / "start"
    main(["convert", "--from", str(folder), "--out", str(start), *map(str, kit.text)])
    assert (start / "backbone").exists() == moved
    config = yaml.safe_load((Path(__file__).parents[1] / "experiments/debug/tiny.yaml").read_text())
    config["trainer"] |= {"max_steps": 2, "enable_progress_bar": False, "default_root_dir": str(tmp_path)}
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path / "runs")
    config["trainer"]["callbacks"] = [
        {"class_path": "videoalign.callbacks.ExportReward"},
        {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 2}},
    ]
    config["model"]["init_args"]["optimizer"]["init_args"] = {"lr": 1e-4, "weight_decay": 0.0}
    network = {"class_path": "videoalign.models.VideoReward.from_pretrained", "init_args": {"folder": str(start)}}
    config["model"]["init_args"]["network"] = network
    pairs = str(kit.folder / "pairs")
    config["data"]["init_args"] |= {"train": pairs, "val": pairs, "workers": 0}
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(tmp_path / "fit.yaml")])

    run = tmp_path / "runs" / "tiny" / "version_0"
    before, after = VideoReward.from_pretrained(start), VideoReward.from_pretrained(run / "export")
    assert before.trained_names() == after.trained_names()
    trained = set(before.trained_names())
    for kind in (".lora_A.", ".lora_B.", ".visual.", ".rows", "head."):
        assert any(kind in name for name in trained), kind
    for name, parameter in after.named_parameters():
        step = (parameter - before.get_parameter(name)).abs().max().item()
        # Adam moves a parameter by the learning rate a step: far less than a start from elsewhere would differ by
        assert (0 < step < 3e-4) if name in trained else step == 0, (name, step)
    assert after.statistics != before.statistics  # measured anew

    (checkpoint,) = run.rglob("*.ckpt")
    main(["export", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "export")])
    assert torch.equal(rewards(load_reward(tmp_path / "export")), rewards(after))
