"""What the tests of official reward models share: official folders of every form, and what they must reward.

The official folders are put together from a backbone's own tensors by their official names, and what they must reward
is computed by transformers alone: adapters merged by hand, the embedding grown, positions that count tokens.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from videoalign.datamodules.shards import ShardWriter
from videoalign.datamodules.video import encode
from videoalign.miniature.networks.qwen import make_qwen
from videoalign.models import Template, VideoReward, load_reward

DIMENSIONS = ("VQ", "MQ", "TA")
TOKENS = [f"<|{d}_reward|>" for d in DIMENSIONS]
TEXT = """
Look at the clip.
How good does it look? <|VQ_reward|>
How well does it move? <|MQ_reward|>
Wanted was: "{text_prompt}".
Is it that? <|TA_reward|>
"""
"""A template in the official notation; the newlines around it must stay."""
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
        backbone: Folder of the backbone.
        state: The backbone's tensors after training. The embedding has a row for each reward token behind the
            tokenizer's.
        adapters: Matrices A and B of each linear layer.
        head: Weight of the reward head, (rows, E).
    """

    backbone: Path
    state: dict[str, Tensor]
    adapters: dict[str, tuple[Tensor, Tensor]]
    head: Tensor

    @classmethod
    def make(cls, backbone: Path, rows: int = 1, moved: bool = False, lora: bool = True, seed: int = 0) -> "Official":
        """Random training of the vision tower, the adapters, the new rows and the head.

        Args:
            backbone: Folder of the backbone.
            rows: Rows of the reward head: 1, or 3 for one per dimension.
            moved: Whether the other tensors differ from the backbone's too.
            lora: Whether the language model trained through adapters.
            seed: Seed of the random training.
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
            folder: Where it is written.
            form: ``whole`` for one file, ``pair`` for two.
            era: Version of transformers whose names the tensors have.
            step: Number of the checkpoint.
            config: Changes of model_config.json, by section.key.
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


@pytest.fixture(scope="session")
def official_kit(tmp_path_factory: pytest.TempPathFactory, backbone: Path) -> Kit:
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


def values(printed: list[dict]) -> Tensor:
    return torch.tensor([[line[d] for d in DIMENSIONS] for line in printed])


Change = Callable[[Path], object]


def pth(write: Callable[[Path], object], name: str = "model.pth") -> Change:
    return lambda folder: write(folder / "checkpoint-7" / name)


def edit_adapters(do: Callable[[dict[str, Tensor]], object]) -> Change:
    def write(path: Path) -> None:
        tensors = load_file(path)
        do(tensors)
        save_file(tensors, path)

    return pth(write, "adapter_model.safetensors")
