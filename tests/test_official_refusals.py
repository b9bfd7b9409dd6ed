"""Damaged official folders: one message each, and nothing is written."""

import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers import tree
from official_kit import REMOVE, TEXT, Change, Kit, P, change, edit_adapters, pth
from videoalign.cli import main


@pytest.fixture
def kit(official_kit: Kit) -> Kit:
    return official_kit


# --- bad input ------------------------------------------------------------------------------------


@dataclass
class Place:
    """Where a case happens: ``tmp`` is the current folder, which must stay as the preparation left it."""

    tmp: Path
    kit: Kit

    def copy(self, name: str) -> Path:
        """A copy of a part of the kit, to be damaged."""
        return shutil.copytree(self.kit.folder / name, self.tmp / name)

    def tree(self) -> dict[str, bytes | None]:
        return tree(self.tmp)


Prepare = Callable[[Place], list]


@dataclass
class Case:
    """A mistake: ``args`` prepares the place and gives the command line; the message must match ``words``."""

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


def nothing(folder: Path) -> None:
    """Leave the copy as it is."""


def both(*changes: Change) -> Change:
    """Several changes of one copy."""
    return lambda folder: [do(folder) for do in changes]


def pair(do: Change) -> Prepare:
    """Conversion of a damaged copy that has two files."""
    return converting(do, form="pair")


def configured(key: str, value: object) -> Prepare:
    """Conversion with another value in model_config.json."""
    return converting(change(key, value))


def command(line: str) -> Prepare:
    """A command line as it is typed; {kit} stands for the kit's folder."""
    return lambda place: [word.replace("{kit}", str(place.kit.folder)) for word in line.split()]


def scoring(model: str, *options: str) -> Prepare:
    """Scoring with a sound folder."""
    return lambda place: place.kit.score(
        place.kit.folder / model, *(option.replace("{kit}", str(place.kit.folder)) for option in options)
    )


def text(content: str) -> Prepare:
    """Conversion with another text in the official notation."""

    def args(place: Place) -> list:
        (place.tmp / "t.txt").write_text(content)
        return converting(nothing, "--template", "t.txt")(place)

    return args


def repository(source: str | None) -> Prepare:
    """Conversion with another prompt_template.py, or none."""

    def args(place: Place) -> list:
        (place.tmp / "repo").mkdir()
        if source is not None:
            (place.tmp / "repo" / "prompt_template.py").write_text(source)
        return converting(nothing, "--official-repo", "repo")(place)

    return args


class Code:
    """An object that makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("ran",)


def saved(value: object) -> Change:
    return pth(lambda path: torch.save(value, path))


def shorten(share: float) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def edit(do: Callable[[dict[str, Tensor]], object], name: str = "model.pth") -> Change:
    """Change the tensors of a .pth file."""

    def write(path: Path) -> None:
        tensors = torch.load(path, weights_only=True)
        do(tensors)
        torch.save(tensors, path)

    return pth(write, name)


def put(name: str, value: Tensor) -> Change:
    """Another tensor of this name in model.pth."""
    return edit(lambda tensors: tensors.update({name: value}))


def spoil(name: str) -> Callable[[dict[str, Tensor]], None]:
    """Set one value of a tensor to NaN."""

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


LAYER, EMBEDDING = f"{P}model.layers.0.self_attn.q_proj", f"{P}model.embed_tokens.weight"
ADAPTERS, REST = "adapter_model.safetensors", "non_lora_state_dict.pth"
CUT, NO_TENSORS = r"model\.pth was cut short", r"model\.pth is no dictionary of tensors"
DAMAGED = r"adapter_model\.safetensors is damaged"
OWN = "holds its own template"
SOURCES = {
    "folder missing": Case(command("convert --from none --out out"), "none: there is no such folder"),
    "folder a file": Case(command("convert --from {kit}/0.mp4 --out out"), r"0\.mp4: there is no such folder"),
    "folder of another layout": Case(
        lambda p: ["convert", "--from", p.copy("pairs"), "--out", "out", *p.kit.text],
        r"is no reward model: it holds neither reward\.json .*nor model_config\.json",
    ),
    "no template": Case(scoring("whole"), "'detailed_special'.*--template FILE.*--official-repo DIR"),
    "two templates": Case(
        scoring("whole", "--template", "{kit}/text.txt", "--official-repo", "{kit}/repo"),
        "--template and --official-repo both",
    ),
    "own folder, template": Case(scoring("own", "--template", "{kit}/text.txt"), OWN),
    "own folder, repository": Case(scoring("own", "--official-repo", "{kit}/repo"), OWN),
    "own folder, step": Case(scoring("own", "--checkpoint-step", "7"), OWN),
    "step absent": Case(
        scoring("whole", "--template", "{kit}/text.txt", "--checkpoint-step", "3"), "has no checkpoint-3; there are: 7"
    ),
    "output a folder in use": Case(in_the_way("notes.txt"), "output out exists already"),
    "output a reward model": Case(in_the_way("reward.json"), "output out exists already"),
    "output a file": Case(in_the_way(), "output out exists already"),
}
TEMPLATES = {
    "prompt twice": Case(text(TEXT + "{text_prompt}"), "<prompt> occurs 2 times"),
    "no tokens": Case(text("Wanted was: {text_prompt}"), r"the reward marks are \[\]"),
    "tokens in another order": Case(
        text(TEXT.replace("VQ", "XX").replace("MQ", "VQ").replace("XX", "MQ")), "in this order"
    ),
    "no repository": Case(
        converting(nothing, "--official-repo", "none"), r"--official-repo none: prompt_template\.py cannot be read"
    ),
    "repository without the file": Case(repository(None), r"prompt_template\.py cannot be read in it"),
    "repository without the constant": Case(
        repository("SIMPLE = 'x'"), "assigns no text to DETAILED_PROMPT_WITH_SPECIAL_TOKEN"
    ),
    "repository whose constant is computed": Case(
        repository("import os\nDETAILED_PROMPT_WITH_SPECIAL_TOKEN = os.mkdir('ran') or 'x'"), "assigns no text"
    ),
    "repository whose constant is a number": Case(
        repository("DETAILED_PROMPT_WITH_SPECIAL_TOKEN = 3"), "assigns no text"
    ),
    "repository no Python": Case(repository("DETAILED_PROMPT_WITH_SPECIAL_TOKEN = ("), "cannot be read in it"),
    "repository whose text lacks a token": Case(
        repository("DETAILED_PROMPT_WITH_SPECIAL_TOKEN = '{text_prompt} <|VQ_reward|>'"),
        r"the reward marks are \['VQ'\]",
    ),
}
BACKBONES = {
    "backbone of another width": Case(
        converting(nothing, "--backbone", "{kit}/wide"), r"embedding is \(\d+, 32\), but backbone .*wide.* \(\d+, 48\)"
    ),
    "backbone of other words": Case(
        converting(nothing, "--backbone", "{kit}/words"), r"embedding is \(\d+, 32\), but backbone .*words"
    ),
    "backbone gone": Case(configured("model_config.model_name_or_path", "none/at/all"), "none/at/all"),
    "backbone not named": Case(
        configured("model_config.model_name_or_path", REMOVE), "names no backbone .* --backbone"
    ),
}
TENSORS = {
    "no checkpoint": Case(converting(lambda f: shutil.rmtree(f / "checkpoint-7")), "has no checkpoint-N folder"),
    "checkpoint empty": Case(
        converting(pth(Path.unlink)), r"neither model\.pth nor adapter_model\.safetensors and non_lora_state_dict\.pth"
    ),
    "adapters alone": Case(pair(pth(Path.unlink, REST)), r"neither model\.pth nor non_lora_state_dict\.pth"),
    "adapters missing": Case(pair(pth(Path.unlink, ADAPTERS)), r"neither model\.pth nor adapter_model\.safetensors"),
    "pth empty": Case(converting(pth(shorten(0))), CUT),
    "pth cut at once": Case(converting(pth(shorten(0.001))), CUT),
    "pth cut near its end": Case(converting(pth(shorten(0.99))), CUT),
    "pth of the pair cut": Case(pair(pth(shorten(0.5), REST)), r"non_lora_state_dict\.pth was cut short"),
    "pth text": Case(converting(pth(lambda path: path.write_text("version https://git-lfs"))), r"model\.pth .*damaged"),
    "pth with code": Case(
        converting(saved({"x": Code()})), r"model\.pth holds posix\.mkdir, which is no tensor.*was not read"
    ),
    "pth a plain pickle of code": Case(
        converting(pth(lambda path: path.write_bytes(pickle.dumps({"x": Code()})))),
        r"model\.pth is damaged, or no file of torch",
    ),
    "pth with code in the pair": Case(
        pair(pth(lambda path: torch.save([Code()], path), REST)), r"holds posix\.mkdir, which is no tensor"
    ),
    "pth a list": Case(converting(saved([torch.ones(1)])), NO_TENSORS),
    "pth with a number": Case(converting(edit(lambda t: t.update(step=3))), NO_TENSORS),
    "pth nested": Case(converting(saved({"state_dict": {"x": torch.ones(1)}})), NO_TENSORS),
    "pth with a number for a name": Case(
        converting(edit(lambda t: t.update({1: torch.ones(1)}))), r"model\.pth is no dictionary of tensors by name"
    ),
    "misfits": Case(
        converting(edit(three_misfits)),
        r"3 tensors do not fit backbone .*layers\.1\.mlp\.up_proj\.lora_A\.default\.weight is \(2, 2\), "
        r"not \(4, 32\); missing backbone\.language_model\.norm\.weight; unexpected backbone\.visual\.bias\.",
    ),
    "head of other rows": Case(
        configured("model_config.output_dim", 3), r"the reward head has 1 rows, but model_config\.json says 3"
    ),
    "head of two rows": Case(
        converting(both(change("model_config.output_dim", 2), put(f"{P}rm_head.weight", torch.ones(2, 32)))),
        "output_dim is 2, not 1 or 3",
    ),
    "adapters of another rank": Case(
        configured("peft_lora_config.lora_r", 8),
        r"28 tensors do not fit .*lora_A\.default\.weight is \(4, \d+\), not \(8",
    ),
    "adapter missing": Case(
        pair(edit_adapters(lambda t: t.pop(f"{LAYER}.lora_A.weight"))),
        r"1 tensors do not fit .*missing .*q_proj\.lora_A",
    ),
    "adapter unexpected": Case(
        pair(edit_adapters(lambda t: t.update({f"{P}visual.x.lora_A.weight": torch.ones(1)}))),
        r"unexpected .*visual\.x",
    ),
    "adapters cut": Case(pair(pth(shorten(0.5), ADAPTERS)), DAMAGED),
    "adapters empty": Case(pair(pth(shorten(0), ADAPTERS)), DAMAGED),
    "adapters text": Case(pair(pth(lambda path: path.write_text("no tensors"), ADAPTERS)), DAMAGED),
    "embedding in both, unlike": Case(
        pair(edit_adapters(lambda t: t.update({EMBEDDING: torch.ones(3, 3)}))),
        r"the two files hold different values for .*embed_tokens",
    ),
    "embedding missing": Case(converting(edit(lambda t: t.pop(EMBEDDING))), "the token embedding is missing"),
    "embedding without the new rows": Case(
        converting(edit(lambda t: t.update({EMBEDDING: t[EMBEDDING][:-3]}))),
        r"the embedding is \(\d+, 32\), but .* three reward tokens",
    ),
    "names of two eras": Case(
        converting(put(f"{P}model.visual.merger.ln_q.bias", torch.ones(32))),
        r"two tensors would both be .*merger\.ln_q\.bias",
    ),
    "NaN in a tensor": Case(
        converting(edit(spoil(f"{P}visual.merger.ln_q.bias"))), r"1 tensors hold NaN or infinity.*merger\.ln_q\.bias"
    ),
    "NaN in a new row": Case(pair(edit(spoil(EMBEDDING), REST)), "hold NaN or infinity"),
    "NaN in an adapter": Case(
        pair(edit_adapters(spoil(f"{LAYER}.lora_B.weight"))), r"1 tensors hold NaN or infinity.*lora_B"
    ),
}
CONFIGS = {
    "config cut": Case(converting(config_text('{"data_config": {')), r"model_config\.json: .*cannot be read"),
    "config binary": Case(converting(config_text(b"\xff\xfe\x00")), r"model_config\.json: .*cannot be read"),
    "config a list": Case(converting(config_text("[]")), r"model_config\.json is no configuration"),
    **{
        f"no {section}": Case(configured(section, REMOVE), rf"model_config\.json is no configuration .*{section}")
        for section in ("data_config", "model_config", "peft_lora_config")
    },
    "section null": Case(configured("data_config", None), r"model_config\.json is no configuration"),
    **{
        f"{key} {value!r}": Case(
            configured(key, value), rf"{key} is .*{re.escape(repr(value))}.*Only models of the released kind"
        )
        for key, value in (
            ("data_config.prompt_template_type", "simple"),
            ("data_config.eval_dim", ["VQ", "TA"]),
            ("data_config.sample_type", "random"),
            ("model_config.reward_token", "last"),
            ("model_config.use_special_tokens", False),
        )
    },
    "two foreign settings": Case(
        converting(both(change("data_config.eval_dim", "VQ"), change("model_config.reward_token", "mean"))),
        r"eval_dim is 'VQ'.*reward_token is 'mean'",
    ),
    **{
        f"no {key}": Case(configured(key, REMOVE), rf"model_config\.json lacks a setting.*{key.partition('.')[2]}")
        for key in (
            "model_config.output_dim",
            "model_config.tune_merger",
            "peft_lora_config.lora_r",
            "peft_lora_config.lora_enable",
        )
    },
    "output_dim a word": Case(configured("model_config.output_dim", "one"), "output_dim is one, not 1 or 3"),
    "no max_frame_pixels": Case(
        configured("data_config.max_frame_pixels", REMOVE), "max_frame_pixels of data_config must be numbers"
    ),
    "endless max_frame_pixels": Case(configured("data_config.max_frame_pixels", float("inf")), "max_frame_pixels"),
    "no fps": Case(
        configured("data_config.fps", None), "fps, num_frames and max_frame_pixels of data_config must be numbers"
    ),
    "odd num_frames": Case(configured("data_config.num_frames", 3), "num_frames must be an even number"),
    "rank-stabilised adapters": Case(configured("peft_lora_config.use_rslora", True), "use_rslora is True, not False"),
    "statistics incomplete": Case(
        configured("inference_config.TA_std", REMOVE), r"inference_config lacks a number \(KeyError: 'TA_std'\)"
    ),
    "statistics a word": Case(configured("inference_config.VQ_mean", "high"), "inference_config"),
    "statistics a number": Case(configured("inference_config", 5), r"model_config\.json is no configuration"),
    "no spread": Case(configured("inference_config.VQ_std", 0.0), "inference_config"),
    "spread NaN": Case(configured("inference_config.VQ_std", float("nan")), "inference_config"),
}
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
    assert stop.value.code == 2
    assert out == ""
    assert re.fullmatch(r"videoalign: error: [^\n]+\n", err), err
    assert re.search(case.words, err), err
    assert place.tree() == before
