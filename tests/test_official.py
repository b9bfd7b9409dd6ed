"""The official layouts of VideoReward: what loads, scores, converts and trains on, and what is refused.

The official folders are put together from a backbone's own tensors by their official names, and what they must reward
is computed by transformers alone: adapters merged by hand, the embedding grown, positions that count tokens.
"""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import lightning  # noqa: F401  its logger keeps the stderr of the moment: the session's, not one test's
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from videoalign import VideoAlignError
from videoalign.cli import main
from videoalign.datamodules.shards import ShardWriter
from videoalign.datamodules.video import decode, encode
from videoalign.miniature.networks.qwen import make_qwen
from videoalign.models import FrameSampling, Template, VideoReward, load_reward

DIMENSIONS = ("VQ", "MQ", "TA")
TOKENS = [f"<|{d}_reward|>" for d in DIMENSIONS]
TEXT = """
Look at the clip.
How good does it look? <|VQ_reward|>
How well does it move? <|MQ_reward|>
Wanted was: "{text_prompt}".
Is it that? <|TA_reward|>
"""
"""In the official notation, with newlines around it that must stay."""
PROMPTS = ["a red circle moves left to right", "a blue square", "a yellow circle moves downwards, very, very slowly"]
RANK, ALPHA = 4, 12
MEAN, STD = torch.tensor([1.0, -2.0, 0.25]), torch.tensor([2.0, 0.5, 4.0])
EMBEDDING = "model.language_model.embed_tokens.weight"
P = "base_model.model."


def clips() -> list[Tensor]:
    """Random videos of three lengths and sizes, uint8."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(4, 3, 32, 48), (2, 3, 16, 64), (6, 3, 32, 32)]
    return [torch.randint(0, 256, size, dtype=torch.uint8, generator=generator) for size in sizes]


@dataclass
class Official:
    """A reward model as its official code holds it, by the names of transformers >= 4.52.

    Attributes:
        backbone: folder that it stands on. state: the backbone's tensors as training left them, the embedding with a row
            for each reward token behind the tokenizer's. adapters: A and B by linear layer. head: (rows, E).
    """

    backbone: Path
    state: dict[str, Tensor]
    adapters: dict[str, tuple[Tensor, Tensor]]
    head: Tensor

    @classmethod
    def make(cls, backbone: Path, rows: int = 1, moved: bool = False, lora: bool = True, seed: int = 0) -> "Official":
        """Random training of the vision tower, the adapters, the new rows and the head.

        Args:
            moved: the rest differs from the backbone's too. lora: whether the language model trained through adapters.
        """
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape: int, scale: float) -> Tensor:
            return scale * torch.randn(shape, generator=generator)

        model = AutoModelForImageTextToText.from_pretrained(backbone)
        state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        for name in state:
            if moved or name.startswith("model.visual."):
                state[name] += noise(*state[name].shape, scale=0.05)
        words = AutoProcessor.from_pretrained(backbone).tokenizer.get_vocab().keys() - set(TOKENS)
        hidden = state[EMBEDDING].shape[1]
        state[EMBEDDING] = torch.cat([state[EMBEDDING][: len(words)], noise(3, hidden, scale=0.5)])
        state["lm_head.weight"] = state[EMBEDDING]
        adapters = {
            name: (noise(RANK, m.in_features, scale=0.2), noise(m.out_features, RANK, scale=0.2))
            for name, m in model.named_modules()
            if lora and isinstance(m, nn.Linear) and "language_model" in name
        }
        return cls(backbone, state, adapters, noise(rows, hidden, scale=hidden**-0.5))

    def tensors(self, era: str = "4.45") -> dict[str, Tensor]:
        """Every tensor by its official name, of the given version of transformers."""
        result = {"rm_head.weight": self.head}
        for name, tensor in self.state.items():
            layer, _, last = name.rpartition(".")
            result[f"{layer}.base_layer.{last}" if layer in self.adapters else name] = tensor
        for layer, (a, b) in self.adapters.items():
            result |= {f"{layer}.lora_A.default.weight": a, f"{layer}.lora_B.default.weight": b}
        if era == "4.45":
            result = {
                n.replace("model.visual.", "visual.").replace("language_model.", ""): t for n, t in result.items()
            }
        return {(P if self.adapters else "") + name: tensor for name, tensor in result.items()}  # the prefix is peft's

    def write(
        self,
        folder: Path,
        form: str = "whole",
        era: str = "4.45",
        step: int = 7,
        config: Mapping[str, object] | None = None,
    ) -> Path:
        """An official folder; returns it.

        Args:
            form: ``whole``, or ``pair`` of files. config: changes of model_config.json, by section.key.
        """
        record: dict = {
            "data_config": {
                "meta_data": "train.csv",
                "data_dir": "videos",
                "eval_dim": list(DIMENSIONS),
                "fps": 4.0,
                "num_frames": None,
                "max_frame_pixels": 4096,
                "sample_type": "uniform",
                "prompt_template_type": "detailed_special",
            },
            "training_args": {"learning_rate": 2e-6, "output_dir": "out"},
            "model_config": {
                "model_name_or_path": str(self.backbone),
                "output_dim": len(self.head),
                "use_special_tokens": True,
                "reward_token": "special",
                "freeze_vision_tower": False,
                "freeze_llm": False,
                "tune_merger": True,
                "torch_dtype": "float32",
            },
            "peft_lora_config": {
                "lora_enable": True,
                "vision_lora": False,
                "lora_r": RANK,
                "lora_alpha": ALPHA,
                "lora_dropout": 0.05,
                "lora_target_modules": None,
                "lora_namespan_exclude": ["lm_head", "rm_head", "embed_tokens"],
            },
            "inference_config": {
                f"{d}_{kind}": value.item()
                for kind, values in (("mean", MEAN), ("std", STD))
                for d, value in zip(DIMENSIONS, values)
            },
        }
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (folder / "model_config.json").write_text(json.dumps(record))
        for key, value in (config or {}).items():
            change(key, value)(folder)
        tensors = self.tensors(era)
        if form == "whole":
            torch.save(tensors, checkpoint / "model.pth")
        else:  # as peft and the official script write them: what trained, the adapter's name left out
            lora = {n.replace(".default.", "."): t for n, t in tensors.items() if ".lora_" in n}
            save_file(lora, checkpoint / "adapter_model.safetensors", metadata={"format": "pt"})
            rest = {n: t for n, t in tensors.items() if re.search(r"visual|embed_tokens|rm_head", n)}
            torch.save(rest, checkpoint / "non_lora_state_dict.pth")
        return folder

    def rewards(self, videos: list[Tensor], prompts: list[str]) -> Tensor:
        """(B, 3) raw rewards, one video at a time, by transformers alone."""
        processor = AutoProcessor.from_pretrained(self.backbone)
        processor.tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
        model = AutoModelForImageTextToText.from_pretrained(self.backbone)
        model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
        merged = {
            f"{n}.weight": self.state[f"{n}.weight"] + ALPHA / RANK * b @ a for n, (a, b) in self.adapters.items()
        }
        model.load_state_dict({**self.state, **merged})
        result = []
        for video, prompt in zip(videos, prompts):
            user = [{"type": "video"}, {"type": "text", "text": TEXT.format(text_prompt=prompt)}]
            chat = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": user}]
            text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            inputs = processor(text=[text], videos=[video], do_resize=False, return_tensors="pt")
            ids = inputs["input_ids"]
            with torch.no_grad():
                states = model.model(
                    input_ids=ids,
                    pixel_values_videos=inputs["pixel_values_videos"],
                    use_cache=False,
                    video_grid_thw=inputs["video_grid_thw"],
                    position_ids=torch.arange(ids.shape[1]).expand(3, 1, -1),
                ).last_hidden_state[0]
            at = [ids[0].tolist().index(i) for i in processor.tokenizer.convert_tokens_to_ids(TOKENS)]
            rewards = states[at] @ self.head.T  # (3, rows)
            result.append(rewards.diagonal() if len(self.head) == 3 else rewards[:, 0])
        return torch.stack(result)


REMOVE = object()


def change(key: str, value: object) -> Callable[[Path], None]:
    """Sets, or removes, a section or a section.key of a folder's model_config.json."""

    def do(folder: Path) -> None:
        file = folder / "model_config.json"
        record = json.loads(file.read_text())
        *section, last = key.split(".")
        place = record[section[0]] if section else record
        place.pop(last) if value is REMOVE else place.__setitem__(last, value)
        file.write_text(json.dumps(record))

    return do


def rewards(network: VideoReward) -> Tensor:
    with torch.no_grad():
        return network(**network.processor(clips(), PROMPTS))


@dataclass
class Kit:
    """Sound inputs: ``folder`` has a folder of each form, one of ours, clips, pairs, the text and other backbones."""

    folder: Path
    official: Official
    template: Template

    def score(self, model: Path, *options: object) -> list[str]:
        videos = [
            x for i, prompt in enumerate(PROMPTS) for x in ("--video", self.folder / f"{i}.mp4", "--prompt", prompt)
        ]
        return [str(x) for x in ("score", "--model", model, *videos, "--device", "cpu", "--workers", 0, *options)]

    @property
    def text(self) -> tuple[str, Path]:
        return "--template", self.folder / "text.txt"


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory, backbone: Path) -> Kit:
    folder = tmp_path_factory.mktemp("kit")
    (folder / "text.txt").write_text(TEXT)
    (folder / "repo").mkdir()
    (folder / "repo" / "prompt_template.py").write_text(
        f"import os\n\nos.mkdir('ran')\nSIMPLE = 'Judge: {{text_prompt}}'\n"
        f"DETAILED_PROMPT_WITH_SPECIAL_TOKEN = '''{TEXT}'''\n\n\ndef build_prompt(text):\n    return SIMPLE\n"
    )
    official = Official.make(backbone)
    official.write(folder / "whole")
    official.write(folder / "pair", "pair")
    make_qwen(folder / "wide", corpus=PROMPTS, hidden=48, layers=2, vision_layers=1)
    make_qwen(folder / "words", corpus=["zebras play xylophones"], hidden=32, layers=2, vision_layers=1)
    rng = np.random.default_rng(0)
    films = [encode(rng.integers(0, 255, (9, 80, 80, 3), dtype=np.uint8), 8) for _ in range(4)]
    for i, film in enumerate(films):
        (folder / f"{i}.mp4").write_bytes(film)
    with ShardWriter(folder / "pairs", "pairs") as writer:
        for i in range(4):
            labels = {"VQ": "AB"[i % 2], "MQ": "same", "TA": "A"}
            writer.write(f"{i}", {"a": films[i], "b": films[i - 1]}, {"prompt": PROMPTS[0], "labels": labels})
    template = Template.load(folder / "text.txt")
    load_reward(folder / "pair", template=template).save_pretrained(folder / "own")
    return Kit(folder, official, template)


def lines(capsys: pytest.CaptureFixture) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


def values(printed: list[dict]) -> Tensor:
    return torch.tensor([[line[d] for d in DIMENSIONS] for line in printed])


# --- template -------------------------------------------------------------------------------------


def test_the_official_notation_stands_behind_the_video_and_keeps_its_newlines(kit: Kit) -> None:
    want = '<video>\nLook at the clip.\nHow good does it look? <reward:VQ>\nHow well does it move? <reward:MQ>\nWanted was: "<prompt>".\nIs it that? <reward:TA>\n'
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
    torch.testing.assert_close(values(lines(capsys)), want, rtol=0, atol=1e-5)
    main(kit.score(kit.folder / "pair", "--official-repo", kit.folder / "repo", "--batch-size", 1))
    normal = lines(capsys)
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
    raw = lines(capsys)
    main(kit.score(folder, *kit.text))
    assert lines(capsys) == raw
    said = [r.getMessage() for r in caplog.records]
    assert sum("o/model_config.json has no inference_config" in message for message in said) == 2  # two runs
    assert sum("is not the official one word for word" in message for message in said) == 2


def test_backbone_of_the_option_goes_before_the_configurations(
    kit: Kit, backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    main(kit.score(kit.folder / "whole", *kit.text))
    want = lines(capsys)
    for i, name in enumerate(("none/at/all", str(kit.folder / "wide"), REMOVE)):
        folder = kit.official.write(tmp_path / f"{i}", config={"model_config.model_name_or_path": name})
        main(kit.score(folder, *kit.text, "--backbone", backbone))
        assert lines(capsys) == want


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
    want = values(lines(capsys))
    for name in ("out", "again"):
        main(kit.score(tmp_path / name))
        torch.testing.assert_close(values(lines(capsys)), want, rtol=0, atol=1e-6)


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


# --- bad input ------------------------------------------------------------------------------------


@dataclass
class Place:
    """Where a case happens: the current folder ``tmp``, which must stay as the preparation left it."""

    tmp: Path
    kit: Kit

    def copy(self, name: str) -> Path:
        """A copy of a part of the kit, to be damaged."""
        return shutil.copytree(self.kit.folder / name, self.tmp / name)

    def tree(self) -> dict[str, bytes | None]:
        return {
            str(p.relative_to(self.tmp)): p.read_bytes() if p.is_file() else None for p in sorted(self.tmp.rglob("*"))
        }


Prepare = Callable[[Place], list]
Change = Callable[[Path], object]


@dataclass
class Case:
    """``args`` prepares the place and gives the command line; the message must match ``words``."""

    args: Prepare
    words: str


def converting(do: Change = lambda folder: None, *options: str, form: str = "whole") -> Prepare:
    """Conversion of a damaged copy; {kit} stands for the kit's folder."""

    def args(place: Place) -> list:
        do(place.copy(form))
        given = [option.replace("{kit}", str(place.kit.folder)) for option in options]
        text = [] if {"--template", "--official-repo"} & set(given) else place.kit.text
        return ["convert", "--from", form, "--out", "out", *text, *given]

    return args


def scoring(model: str, *options: str) -> Prepare:
    """Scoring with a sound folder."""
    return lambda place: place.kit.score(
        place.kit.folder / model, *(option.replace("{kit}", str(place.kit.folder)) for option in options)
    )


def text(content: str) -> Prepare:
    """Conversion with another text in the official notation."""

    def args(place: Place) -> list:
        (place.tmp / "t.txt").write_text(content)
        return converting(lambda folder: None, "--template", "t.txt")(place)

    return args


def repository(source: str | None) -> Prepare:
    """Conversion with another prompt_template.py, or none."""

    def args(place: Place) -> list:
        (place.tmp / "repo").mkdir()
        if source is not None:
            (place.tmp / "repo" / "prompt_template.py").write_text(source)
        return converting(lambda folder: None, "--official-repo", "repo")(place)

    return args


class Code:
    """Unpickled, it makes a folder."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("ran",)


def pth(write: Callable[[Path], object], name: str = "model.pth") -> Change:
    return lambda folder: write(folder / "checkpoint-7" / name)


def saved(value: object) -> Change:
    return pth(lambda path: torch.save(value, path))


def shorten(share: float) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def edit(do: Callable[[dict[str, Tensor]], object], name: str = "model.pth") -> Change:
    """Another content of a .pth file."""

    def write(path: Path) -> None:
        tensors = torch.load(path, weights_only=True)
        do(tensors)
        torch.save(tensors, path)

    return pth(write, name)


def edit_adapters(do: Callable[[dict[str, Tensor]], object]) -> Change:
    def write(path: Path) -> None:
        tensors = load_file(path)
        do(tensors)
        save_file(tensors, path)

    return pth(write, "adapter_model.safetensors")


def spoil(name: str) -> Callable[[dict[str, Tensor]], None]:
    """One value of a tensor becomes NaN."""

    def do(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name].flatten()[-1] = torch.nan

    return do


def three_misfits(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{P}model.norm.weight"]
    tensors[f"{P}visual.bias"] = torch.ones(1)
    tensors[f"{P}model.layers.1.mlp.up_proj.lora_A.default.weight"] = torch.ones(2, 2)


def config_text(content: str | bytes) -> Change:
    return lambda folder: (folder / "model_config.json").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )


def in_the_way(*path: str) -> Prepare:
    def args(place: Place) -> list:
        (file := place.tmp.joinpath("out", *path)).parent.mkdir(exist_ok=True)
        file.write_text("precious")
        return converting()(place)

    return args


LAYER = f"{P}model.layers.0.self_attn.q_proj"
OWN = "holds its own template"
SOURCES = {
    "folder missing": Case(lambda p: ["convert", "--from", "none", "--out", "out"], "none: there is no such folder"),
    "folder a file": Case(lambda p: ["convert", "--from", p.kit.folder / "0.mp4", "--out", "out"], r"0\.mp4: there is no such folder"),
    "folder of another layout": Case(lambda p: ["convert", "--from", p.copy("pairs"), "--out", "out", *p.kit.text],
                                     r"is no reward model: it holds neither reward\.json .*nor model_config\.json"),
    "no template": Case(scoring("whole"), "'detailed_special'.*--template FILE.*--official-repo DIR"),
    "two templates": Case(scoring("whole", "--template", "{kit}/text.txt", "--official-repo", "{kit}/repo"), "--template and --official-repo both"),
    "own folder, template": Case(scoring("own", "--template", "{kit}/text.txt"), OWN),
    "own folder, repository": Case(scoring("own", "--official-repo", "{kit}/repo"), OWN),
    "own folder, step": Case(scoring("own", "--checkpoint-step", "7"), OWN),
    "step absent": Case(scoring("whole", "--template", "{kit}/text.txt", "--checkpoint-step", "3"), "has no checkpoint-3; there are: 7"),
    "output a folder in use": Case(in_the_way("notes.txt"), "output out exists already"),
    "output a reward model": Case(in_the_way("reward.json"), "output out exists already"),
    "output a file": Case(in_the_way(), "output out exists already"),
}  # fmt: skip
TEMPLATES = {
    "prompt twice": Case(text(TEXT + "{text_prompt}"), "<prompt> occurs 2 times"),
    "no tokens": Case(text("Wanted was: {text_prompt}"), r"the reward marks are \[\]"),
    "tokens in another order": Case(text(TEXT.replace("VQ", "XX").replace("MQ", "VQ").replace("XX", "MQ")), "in this order"),
    "no repository": Case(converting(lambda folder: None, "--official-repo", "none"), r"--official-repo none: prompt_template\.py cannot be read"),
    "repository without the file": Case(repository(None), r"prompt_template\.py cannot be read in it"),
    "repository without the constant": Case(repository("SIMPLE = 'x'"), "assigns no text to DETAILED_PROMPT_WITH_SPECIAL_TOKEN"),
    "repository whose constant is computed": Case(repository("import os\nDETAILED_PROMPT_WITH_SPECIAL_TOKEN = os.mkdir('ran') or 'x'"), "assigns no text"),
    "repository whose constant is a number": Case(repository("DETAILED_PROMPT_WITH_SPECIAL_TOKEN = 3"), "assigns no text"),
    "repository no Python": Case(repository("DETAILED_PROMPT_WITH_SPECIAL_TOKEN = ("), "cannot be read in it"),
    "repository whose text lacks a token": Case(repository("DETAILED_PROMPT_WITH_SPECIAL_TOKEN = '{text_prompt} <|VQ_reward|>'"), r"the reward marks are \['VQ'\]"),
}  # fmt: skip
BACKBONES = {
    "backbone of another width": Case(converting(lambda folder: None, "--backbone", "{kit}/wide"), r"embedding is \(\d+, 32\), but backbone .*wide.* \(\d+, 48\)"),
    "backbone of other words": Case(converting(lambda folder: None, "--backbone", "{kit}/words"), r"embedding is \(\d+, 32\), but backbone .*words"),
    "backbone gone": Case(converting(change("model_config.model_name_or_path", "none/at/all")), "none/at/all"),
    "backbone not named": Case(converting(change("model_config.model_name_or_path", REMOVE)), "names no backbone .* --backbone"),
}  # fmt: skip
TENSORS = {
    "no checkpoint": Case(converting(lambda f: shutil.rmtree(f / "checkpoint-7")), "has no checkpoint-N folder"),
    "checkpoint empty": Case(converting(pth(Path.unlink)), r"neither model\.pth nor adapter_model\.safetensors and non_lora_state_dict\.pth"),
    "adapters alone": Case(converting(pth(Path.unlink, "non_lora_state_dict.pth"), form="pair"), r"neither model\.pth nor non_lora_state_dict\.pth"),
    "adapters missing": Case(converting(pth(Path.unlink, "adapter_model.safetensors"), form="pair"), r"neither model\.pth nor adapter_model\.safetensors"),
    "pth empty": Case(converting(pth(shorten(0))), r"model\.pth was cut short"),
    "pth cut at once": Case(converting(pth(shorten(0.001))), r"model\.pth was cut short"),
    "pth cut near its end": Case(converting(pth(shorten(0.99))), r"model\.pth was cut short"),
    "pth of the pair cut": Case(converting(pth(shorten(0.5), "non_lora_state_dict.pth"), form="pair"), r"non_lora_state_dict\.pth was cut short"),
    "pth text": Case(converting(pth(lambda path: path.write_text("version https://git-lfs"))), r"model\.pth .*damaged"),
    "pth with code": Case(converting(saved({"x": Code()})), r"model\.pth holds posix\.mkdir, which is no tensor.*was not read"),
    "pth a plain pickle of code": Case(converting(pth(lambda path: path.write_bytes(pickle.dumps({"x": Code()})))), r"model\.pth is damaged, or no file of torch"),
    "pth with code in the pair": Case(converting(pth(lambda path: torch.save([Code()], path), "non_lora_state_dict.pth"), form="pair"), r"holds posix\.mkdir, which is no tensor"),
    "pth a list": Case(converting(saved([torch.ones(1)])), r"model\.pth is no dictionary of tensors"),
    "pth with a number": Case(converting(edit(lambda t: t.update(step=3))), r"model\.pth is no dictionary of tensors"),
    "pth nested": Case(converting(saved({"state_dict": {"x": torch.ones(1)}})), r"model\.pth is no dictionary of tensors"),
    "pth with a number for a name": Case(converting(edit(lambda t: t.update({1: torch.ones(1)}))), r"model\.pth is no dictionary of tensors by name"),
    "misfits": Case(converting(edit(three_misfits)), r"3 tensors do not fit backbone .*layers\.1\.mlp\.up_proj\.lora_A\.default\.weight is \(2, 2\), "
                    r"not \(4, 32\); missing backbone\.language_model\.norm\.weight; unexpected backbone\.visual\.bias\."),
    "head of other rows": Case(converting(change("model_config.output_dim", 3)), r"the reward head has 1 rows, but model_config\.json says 3"),
    "head of two rows": Case(converting(lambda f: (change("model_config.output_dim", 2)(f), edit(lambda t: t.update({f"{P}rm_head.weight": torch.ones(2, 32)}))(f))),
                             "output_dim is 2, not 1 or 3"),
    "adapters of another rank": Case(converting(change("peft_lora_config.lora_r", 8)), r"28 tensors do not fit .*lora_A\.default\.weight is \(4, \d+\), not \(8"),
    "adapter missing": Case(converting(edit_adapters(lambda t: t.pop(f"{LAYER}.lora_A.weight")), form="pair"), r"1 tensors do not fit .*missing .*q_proj\.lora_A"),
    "adapter unexpected": Case(converting(edit_adapters(lambda t: t.update({f"{P}visual.x.lora_A.weight": torch.ones(1)})), form="pair"), r"unexpected .*visual\.x"),
    "adapters cut": Case(converting(pth(shorten(0.5), "adapter_model.safetensors"), form="pair"), r"adapter_model\.safetensors is damaged"),
    "adapters empty": Case(converting(pth(shorten(0), "adapter_model.safetensors"), form="pair"), r"adapter_model\.safetensors is damaged"),
    "adapters text": Case(converting(pth(lambda path: path.write_text("no tensors"), "adapter_model.safetensors"), form="pair"), r"adapter_model\.safetensors is damaged"),
    "embedding in both, unlike": Case(converting(edit_adapters(lambda t: t.update({f"{P}model.embed_tokens.weight": torch.ones(3, 3)})), form="pair"),
                                      r"the two files hold different values for .*embed_tokens"),
    "embedding missing": Case(converting(edit(lambda t: t.pop(f"{P}model.embed_tokens.weight"))), "the token embedding is missing"),
    "embedding without the new rows": Case(converting(edit(lambda t: t.update({f"{P}model.embed_tokens.weight": t[f"{P}model.embed_tokens.weight"][:-3]}))),
                                           r"the embedding is \(\d+, 32\), but .* three reward tokens"),
    "names of two eras": Case(converting(edit(lambda t: t.update({f"{P}model.visual.merger.ln_q.bias": torch.ones(32)}))), r"two tensors would both be .*merger\.ln_q\.bias"),
    "NaN in a tensor": Case(converting(edit(spoil(f"{P}visual.merger.ln_q.bias"))), r"1 tensors hold NaN or infinity.*merger\.ln_q\.bias"),
    "NaN in a new row": Case(converting(edit(spoil(f"{P}model.embed_tokens.weight"), "non_lora_state_dict.pth"), form="pair"), "hold NaN or infinity"),
    "NaN in an adapter": Case(converting(edit_adapters(spoil(f"{LAYER}.lora_B.weight")), form="pair"), r"1 tensors hold NaN or infinity.*lora_B"),
}  # fmt: skip
CONFIGS = {
    "config cut": Case(converting(config_text('{"data_config": {')), r"model_config\.json: .*cannot be read"),
    "config binary": Case(converting(config_text(b"\xff\xfe\x00")), r"model_config\.json: .*cannot be read"),
    "config a list": Case(converting(config_text("[]")), r"model_config\.json is no configuration"),
    **{f"no {section}": Case(converting(change(section, REMOVE)), rf"model_config\.json is no configuration .*{section}")
       for section in ("data_config", "model_config", "peft_lora_config")},
    "section null": Case(converting(change("data_config", None)), r"model_config\.json is no configuration"),
    **{f"{key} {value!r}": Case(converting(change(key, value)), rf"{key} is .*{re.escape(repr(value))}.*Only models of the released kind")
       for key, value in (("data_config.prompt_template_type", "simple"), ("data_config.eval_dim", ["VQ", "TA"]), ("data_config.sample_type", "random"),
                          ("model_config.reward_token", "last"), ("model_config.use_special_tokens", False))},
    "two foreign settings": Case(converting(lambda f: (change("data_config.eval_dim", "VQ")(f), change("model_config.reward_token", "mean")(f))),
                                 r"eval_dim is 'VQ'.*reward_token is 'mean'"),
    **{f"no {key}": Case(converting(change(key, REMOVE)), rf"model_config\.json lacks a setting.*{key.partition('.')[2]}")
       for key in ("model_config.output_dim", "model_config.tune_merger", "peft_lora_config.lora_r", "peft_lora_config.lora_enable")},
    "output_dim a word": Case(converting(change("model_config.output_dim", "one")), "output_dim is one, not 1 or 3"),
    "no max_frame_pixels": Case(converting(change("data_config.max_frame_pixels", REMOVE)), "max_frame_pixels of data_config must be numbers"),
    "endless max_frame_pixels": Case(converting(change("data_config.max_frame_pixels", float("inf"))), "max_frame_pixels"),
    "no fps": Case(converting(change("data_config.fps", None)), "fps, num_frames and max_frame_pixels of data_config must be numbers"),
    "odd num_frames": Case(converting(change("data_config.num_frames", 3)), "num_frames must be an even number"),
    "rank-stabilised adapters": Case(converting(change("peft_lora_config.use_rslora", True)), "use_rslora is True, not False"),
    "statistics incomplete": Case(converting(change("inference_config.TA_std", REMOVE)), r"inference_config lacks a number \(KeyError: 'TA_std'\)"),
    "statistics a word": Case(converting(change("inference_config.VQ_mean", "high")), "inference_config"),
    "statistics a number": Case(converting(change("inference_config", 5)), r"model_config\.json is no configuration"),
    "no spread": Case(converting(change("inference_config.VQ_std", 0.0)), "inference_config"),
    "spread NaN": Case(converting(change("inference_config.VQ_std", float("nan"))), "inference_config"),
}  # fmt: skip
CASES = {**SOURCES, **TEMPLATES, **BACKBONES, **TENSORS, **CONFIGS}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(
    name: str, kit: Kit, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, place = CASES[name], Place(tmp_path, kit)
    monkeypatch.chdir(tmp_path)
    args = [str(arg) for arg in case.args(place)]
    before = place.tree()
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(args)
    out, err = capfd.readouterr()
    assert stop.value.code == 2 and out == ""
    assert re.fullmatch(r"videoalign: error: [^\n]+\n", err), err
    assert re.search(case.words, err), err
    assert place.tree() == before
