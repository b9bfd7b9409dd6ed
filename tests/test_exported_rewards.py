"""Exported rewards and sealed files: nothing that is not finite is written, and no flipped byte passes."""

import json
import re
import shutil
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from forked import started
from loading_kit import NAN, flip
from videoalign import VideoAlignError
from videoalign.alignment.generation import Generate
from videoalign.models import LoRA, VideoReward
from videoalign.models.checksums import check_seal, seal
from videoalign.models.generator_folder import load_generator
from videoalign.models.noisy_reward import NoisyReward, NoisyRewardShape
from videoalign.models.reward_statistics import Statistics
from videoalign.models.win_rates import best_of, win_rates


@pytest.fixture(scope="module")
def kit(pipelines):
    return pipelines


# --- nothing that is not finite is written --------------------------------------------------------


def test_latents_and_frames_that_are_not_finite_are_no_videos(kit):
    generator = load_generator(kit / "wan", parts=("transformer", "vae"))
    latents = torch.zeros(2, *generator.latent_shape(5, 32, 32))
    assert generator.decode(latents).shape[0] == 2
    latents[1, 0, 0, 0, 0] = NAN
    with pytest.raises(VideoAlignError, match=r"latents of sampled videos are not finite: 1 .*such as \['second'\]"):
        generator.decode(latents, ["first", "second"])
    generator.vae.decoder.conv_out.bias.data.fill_(NAN)
    with pytest.raises(VideoAlignError, match="frames decoded from finite latents are not finite: 2 "):
        generator.decode(torch.zeros_like(latents))


def test_embeddings_that_are_not_finite_are_refused(kit):
    generator = load_generator(kit / "wan", parts=("text_encoder",))
    generator.text_encoder.encoder.final_layer_norm.weight.data.fill_(NAN)
    with pytest.raises(VideoAlignError, match=r"embeddings of prompts are not finite: 1 .*'a red circle'"):
        generator.encode_prompts(["a red circle"])


def test_a_sampler_that_breaks_names_its_keys(kit, monkeypatch):
    module = Generate(str(kit / "wan"), 5, 32, 32, steps=2)
    monkeypatch.setattr(module.generator, "sample", lambda condition, noise, *rest, **options: noise * NAN)
    batch = {"keys": ["00000-000", "00000-001"], "prompts": ["a red circle"] * 2, "seeds": [1, 2]}
    with pytest.raises(VideoAlignError, match=r"2 tensors .*\['00000-000', '00000-001'\]"):
        module.predict_step(batch, 0)


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_rewards_that_are_not_finite_are_not_compared(value):
    good = torch.rand(3, 2, 4)
    bad = good.clone()
    bad[1, 1, 2] = value
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(VideoAlignError, match="rewards to compare are not finite"):
            win_rates(*pair)
    with pytest.raises(VideoAlignError, match="not finite"):
        best_of(good[..., 0], bad, 1)


# --- exported rewards -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward(backbone, sampling, tmp_path_factory):
    """Folder of a reward model with adapters, statistics and its backbone. Read only."""
    network = VideoReward(backbone, "plain", sampling, lora=LoRA(rank=2))
    network.statistics = Statistics([0.1, 0.2, 0.3], [1.0, 2.0, 3.0])
    folder = tmp_path_factory.mktemp("reward") / "reward"
    network.save_pretrained(folder, backbone=True)
    return folder


@pytest.fixture(scope="module")
def noisy(kit, tmp_path_factory):
    """A generator and the folder of a noisy reward of it. Read only."""
    generator = load_generator(kit / "wan", parts=("transformer", "vae"))
    network = NoisyReward(generator, NoisyRewardShape(blocks=1, hidden=16))
    network.statistics = Statistics([0.1, 0.2, 0.3], [1.0, 2.0, 3.0])
    folder = tmp_path_factory.mktemp("noisy") / "reward"
    network.save_pretrained(folder)
    return generator, folder


@pytest.mark.parametrize(
    "name", ["trained.safetensors", "adapter/adapter_model.safetensors", "backbone/model.safetensors"]
)
@pytest.mark.parametrize("place", [-1, -2, -1001])
def test_one_flipped_byte_of_a_reward_is_told(name, place, reward, tmp_path):
    shutil.copytree(reward, tmp_path / "copy")
    flip(tmp_path / "copy" / name, place)
    with pytest.raises(VideoAlignError, match=f"{re.escape(name)} is not the file that was exported: its SHA-256"):
        VideoReward.from_pretrained(tmp_path / "copy")


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (("statistics", "mean", 0), 0.5, "statistics are not those that were exported"),
        (("statistics", "std", 2), 30.0, "statistics"),
        (("sampling", "fps"), 9.0, "sampling"),
        (("settings", "lora", "alpha"), 129.0, "lora"),
        (("sha256", "files", "trained.safetensors"), "0" * 64, "not the file that was exported"),
        (("sha256", "files"), 3, "sha256 does not hold checksums"),
        (("sha256",), [], "sha256 does not hold checksums"),
        (("sha256", "files", "gone.safetensors"), "0" * 64, r"gone\.safetensors is missing"),
        (("settings", "positions"), "2d", "positions: '2d' is none of"),
        (("settings", "dtype"), "float33", "dtype: 'float33' is none of"),
        (("settings", "language"), "half", "language: 'half'"),
    ],
)
def test_a_changed_number_of_a_record_is_told(keys, value, words, reward, tmp_path):
    shutil.copytree(reward, tmp_path / "copy")
    record = json.loads((tmp_path / "copy/reward.json").read_text())
    place = record
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (tmp_path / "copy/reward.json").write_text(json.dumps(record))
    with pytest.raises(VideoAlignError, match=words):
        VideoReward.from_pretrained(tmp_path / "copy")


@pytest.mark.parametrize(("key", "value"), [("settings", []), ("backbone", 7), ("statistics", "none"), ("sampling", 2)])
def test_entries_of_another_kind_are_named(key, value, reward, tmp_path):
    shutil.copytree(reward, tmp_path / "copy")
    record = json.loads((tmp_path / "copy/reward.json").read_text())
    (tmp_path / "copy/reward.json").write_text(json.dumps(record | {key: value}))
    with pytest.raises(VideoAlignError, match=rf"reward\.json: {key} are not what"):
        VideoReward.from_pretrained(tmp_path / "copy")


def test_a_template_that_is_no_text_is_named(reward, tmp_path):
    shutil.copytree(reward, tmp_path / "copy")
    (tmp_path / "copy/template.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(VideoAlignError, match=r"template\.txt is no text in UTF-8"):
        VideoReward.from_pretrained(tmp_path / "copy")


def test_rewards_of_earlier_releases_have_no_checksums(reward, noisy, tmp_path):
    for folder, name in ((reward, "reward.json"), (noisy[1], "noisy_reward.json")):
        shutil.copytree(folder, tmp_path / name.removesuffix(".json"))
        path = tmp_path / name.removesuffix(".json") / name
        record = json.loads(path.read_text())
        assert record.pop("sha256")
        path.write_text(json.dumps(record))
    assert VideoReward.from_pretrained(tmp_path / "reward").statistics.std == [1.0, 2.0, 3.0]
    assert NoisyReward.from_pretrained(tmp_path / "noisy_reward", noisy[0]).statistics.std == [1.0, 2.0, 3.0]


TENSORS = {
    "unexpected": (lambda t: t | {"other": torch.ones(1)}, "1 tensors .*unexpected other"),
    "missing": (lambda t: {n: v for n, v in t.items() if n != "head.3.weight"}, r"missing head\.3\.weight"),
    "misshapen": (lambda t: t | {"head.3.weight": torch.ones(2, 16)}, r"head\.3\.weight is torch.float32 \(2, 16\)"),
    "fp8": (lambda t: t | {"head.3.weight": t["head.3.weight"].to(torch.float8_e4m3fn)}, "float8_e4m3fn"),
    "NaN": (lambda t: t | {"head.3.weight": t["head.3.weight"] * NAN}, "not finite"),
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_of_a_noisy_reward_are_accounted_for(what, noisy, tmp_path):
    generator, folder = noisy
    shutil.copytree(folder, tmp_path / "copy")
    record = json.loads((tmp_path / "copy/noisy_reward.json").read_text())
    record.pop("sha256")
    (tmp_path / "copy/noisy_reward.json").write_text(json.dumps(record))
    change, words = TENSORS[what]
    save_file(change(load_file(folder / "model.safetensors")), tmp_path / "copy/model.safetensors")
    with pytest.raises(VideoAlignError, match=words):
        NoisyReward.from_pretrained(tmp_path / "copy", generator)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: flip(folder / "model.safetensors"), r"model\.safetensors is not the file that was exported"),
        (
            lambda folder: flip(folder / "model.safetensors", 200),
            r"model\.safetensors is not the file that was exported",
        ),
        (
            lambda folder: (p := folder / "noisy_reward.json").write_text(p.read_text().replace("3.0", "3.5")),
            "shape and statistics are not those",
        ),
    ],
)
def test_one_flipped_byte_of_a_noisy_reward_is_told(change, words, noisy, tmp_path):
    generator, folder = noisy
    shutil.copytree(folder, tmp_path / "copy")
    change(tmp_path / "copy")
    with pytest.raises(VideoAlignError, match=words):
        NoisyReward.from_pretrained(tmp_path / "copy", generator)


def test_weights_that_are_not_finite_are_not_exported(backbone, sampling, noisy, tmp_path):
    network = VideoReward(backbone, "plain", sampling, lora=LoRA(rank=2))
    network.head.weight.data[0, 0] = NAN
    with pytest.raises(VideoAlignError, match=r"not finite: 1 tensors .*head\.weight.*nothing is written"):
        network.save_pretrained(tmp_path / "reward")
    guide = NoisyReward(noisy[0], NoisyRewardShape(blocks=1, hidden=16))
    guide.head[3].weight.data[0, 0] = float("inf")
    with pytest.raises(VideoAlignError, match=r"not finite: 1 tensors .*head\.3\.weight"):
        guide.save_pretrained(tmp_path / "noisy")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "statistics", [Statistics(), Statistics([0.0] * 3, [0.0] * 3), Statistics([NAN] * 3, [1.0] * 3)]
)
def test_an_export_without_statistics_says_so(statistics, backbone, sampling, tmp_path, caplog):
    network = VideoReward(backbone, "plain", sampling, language="frozen", vision="frozen", train_merger=False)
    network.statistics = statistics
    network.save_pretrained(tmp_path / "reward")
    (said,) = [r.getMessage() for r in caplog.records if "statistics" in r.getMessage()]
    assert str(tmp_path / "reward") in said
    assert "data.val" in said
    again = VideoReward.from_pretrained(tmp_path / "reward")
    assert not again.has_statistics
    with pytest.raises(VideoAlignError, match="no statistics"):
        again.need_statistics("it")


# --- files that carry their own checksum ----------------------------------------------------------


@pytest.fixture
def sealed(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(
        {"a": torch.rand(40, 3), "b": torch.rand(7).bfloat16()}, path, metadata={"format": "pt", "note": 'ä "x"\n'}
    )
    before = load_file(path)
    seal(path)
    after = load_file(path)
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    return path


def test_every_flipped_bit_of_a_sealed_file_is_told_or_makes_it_unreadable(sealed):
    """A flip in the key of the checksum itself is not told: the file then looks like another program's, unchanged."""
    check_seal(sealed)
    good, size = sealed.read_bytes(), sealed.stat().st_size
    want = load_file(sealed)
    for place in range(0, size, 3):
        sealed.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        try:
            check_seal(sealed)
            found = load_file(sealed)
        except Exception:  # told by the checksum, or by the library
            continue
        assert found.keys() == want.keys() and all(torch.equal(found[n], want[n]) for n in want)


def test_a_sealed_file_keeps_its_metadata_and_may_be_sealed_again(sealed):
    with safe_open(sealed, "pt") as file:
        assert file.metadata()["note"] == 'ä "x"\n' and file.metadata()["format"] == "pt"
    before = sealed.read_bytes()
    seal(sealed)
    assert sealed.read_bytes() == before
    assert [path.name for path in sealed.parent.iterdir()] == [sealed.name]


def test_safetensors_still_writes_metadata_in_random_order(tmp_path):
    """When this fails, safetensors/safetensors#584 is mended, and seal need not sort."""
    headers = set()
    for number in range(6):
        save_file({"a": torch.ones(1)}, tmp_path / f"{number}", metadata={str(i): str(i) for i in range(12)})
        headers.add((tmp_path / f"{number}").read_bytes())
    assert len(headers) > 1


WRITE = """
import sys, torch
from pathlib import Path
from types import SimpleNamespace
from videoalign.alignment import FlowSFT
from videoalign.callbacks import ExportGenerator
from videoalign.models import FrameSampling, LoRA, VideoReward
wan, backbone, out = map(Path, sys.argv[1:])
torch.manual_seed(0)
reward = VideoReward(backbone, "plain", FrameSampling(fps=8.0, min_pixels=0), lora=LoRA(rank=2))
reward.save_pretrained(out / "reward", backbone=True)
module = FlowSFT(str(wan), parts=("transformer",))
export = ExportGenerator(str(out / "lora"))
alone = SimpleNamespace(broadcast=lambda value: value)
export.on_fit_end(SimpleNamespace(is_global_zero=True, loggers=[], logger=None, strategy=alone, log_dir=None), module)
"""


def test_two_processes_export_the_same_bytes(kit, backbone, tmp_path):
    files = []
    for seed in ("1", "2"):
        out = tmp_path / seed
        out.mkdir()
        (tmp_path / "write.py").write_text(WRITE)
        started(
            sys.executable, tmp_path / "write.py", kit / "wan", backbone, out, PYTHONHASHSEED=seed
        ).check_returncode()
        files.append({path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()})
    assert files[0].keys() == files[1].keys()
    assert len(files[0]) > 8
    assert [name for name in files[0] if files[0][name] != files[1][name]] == []
