"""Every tensor that is loaded is accounted for: pipelines, backbones, adapters and rewards, whole or refused with one sentence."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from videoalign import VideoAlignError
from videoalign.alignment.generate import Generate
from videoalign.cli import main
from videoalign.miniature.networks.pipelines import make_generator
from videoalign.models import LoRA, VideoReward
from videoalign.models.adapter_files import METADATA
from videoalign.models.adapters import load_adapters
from videoalign.models.backbone import load_backbone
from videoalign.models.checksums import check_seal, seal
from videoalign.models.generator_folder import load_generator
from videoalign.models.noisy_reward import NoisyReward, NoisyRewardShape
from videoalign.models.reward_statistics import Statistics
from videoalign.models.win_rates import best_of, win_rates

NAN, LAYERS = float("nan"), ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")


@pytest.fixture(scope="module")
def kit(tmp_path_factory, backbone):
    """Pipelines of both families, a deeper and a wider one, and a backbone. Read only."""
    root = tmp_path_factory.mktemp("kit")
    for name, family, more in (
        ("wan", "wan", {}),
        ("ltx", "ltx", {}),
        ("deep", "wan", {"layers": 3}),
        ("wide", "wan", {"hidden": 128}),
    ):
        make_generator(root / name, family, **more)
    shutil.copytree(backbone, root / "qwen")
    return root


# --- pipelines and backbones ----------------------------------------------------------------------------------------------


def first(tensors, least=1):
    return next(name for name in sorted(tensors) if tensors[name].ndim >= least)


def fp8(tensors):
    return {name: t.to(torch.float8_e4m3fn) if t.ndim >= 2 else t for name, t in tensors.items()}


def scaled(tensors):
    return fp8(tensors) | {
        name.replace(".weight", ".scale_weight"): torch.ones(()) for name in tensors if name.endswith(".weight")
    }


def with_value(value):
    def change(tensors):
        return tensors | {first(tensors): torch.full_like(tensors[first(tensors)], value)}

    return change


SPOILT = {
    "foreign prefix": (lambda t: {f"module.{n}": v for n, v in t.items()}, r"tensors in its files are not the model's \(such as 'module\..*of the model are not"),
    "one more": (lambda t: t | {"other.scale_weight": torch.ones(())}, "1 tensors in its files are not the model's .such as 'other.scale_weight'"),
    "one missing": (lambda t: {n: v for n, v in t.items() if n != first(t)}, "[12] tensors of the model are not in its files"),
    "another shape": (lambda t: t | {first(t): torch.zeros(*t[first(t)].shape, 2)}, "shape"),
    "fp8": (fp8, r"quantised or no weights, such as '.*F8_E4M3"),
    "fp8 with scales": (scaled, "quantised or no weights"),
    "int8": (lambda t: {n: v.to(torch.int8) for n, v in t.items()}, "quantised or no weights.*I8"),
    "int64": (lambda t: t | {first(t): t[first(t)].long()}, "1 of the .*quantised or no weights.*I64"),
    "no tensors": (lambda t: {}, "tensors of the model are not in its files"),
    "NaN": (with_value(NAN), "not finite: [12] tensors hold NaN or infinity"),
    "infinity": (with_value(-float("inf")), "not finite: [12] tensors hold NaN or infinity"),
}  # fmt: skip
PARTS = [("wan", "transformer"), ("wan", "vae"), ("wan", "text_encoder"), ("ltx", "transformer"), ("qwen", "")]


def weights_of(folder):
    return next(Path(folder).glob("*.safetensors"))


def load(folder, part):
    return load_generator(folder, parts=(part,)) if part else load_backbone(folder)


def spoil(kit, name, part, tmp_path):
    """A copy of a model in whose part something can be spoilt."""
    shutil.copytree(kit / name, tmp_path / name)
    return tmp_path / name, tmp_path / name / part


@pytest.mark.parametrize("what", SPOILT)
@pytest.mark.parametrize(("name", "part"), PARTS)
def test_files_that_do_not_fit_their_model_are_refused(name, part, what, kit, tmp_path):
    whole, folder = spoil(kit, name, part, tmp_path)
    change, words = SPOILT[what]
    path = weights_of(folder)
    tensors = load_file(path)
    if part == "vae" and "fp8" in what:
        tensors = {n: t.flatten(1) if t.ndim > 2 else t for n, t in tensors.items()}
    save_file({n: t.contiguous() for n, t in change(tensors).items()}, path, metadata={"format": "pt"})
    with pytest.raises(VideoAlignError, match=words) as error:
        load(whole, part)
    assert (part or "backbone") in str(error.value) and "\n" not in str(error.value)


def split(path):
    """One file as two shards with an index; returns the index's path and its content."""
    tensors = load_file(path)
    names, stem = sorted(tensors), path.name.removesuffix(".safetensors")
    shards = {f"{stem}-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for shard, held in shards.items():
        save_file({n: tensors[n] for n in held}, path.with_name(shard), metadata={"format": "pt"})
    path.unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": {n: shard for shard, held in shards.items() for n in held}}
    place = path.with_name(f"{path.name}.index.json")
    place.write_text(json.dumps(index))
    return place, index


def without_shard(index, content):
    next(index.parent.glob("*-00002-of-00002.safetensors")).unlink()


def listed_elsewhere(index, content):
    content["weight_map"]["other.weight"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))


def unlisted(index, content):
    content["weight_map"].pop(sorted(content["weight_map"])[0])
    index.write_text(json.dumps(content))


def both(index, content):
    shutil.copy(next(index.parent.glob("*-00001-of-*")), index.with_name(index.name.removesuffix(".index.json")))


def stray(index, content):
    shutil.copy(
        next(index.parent.glob("*-00001-of-*")),
        index.with_name(index.name.replace(".safetensors.index.json", "-00003-of-00003.safetensors")),
    )


SHARDS = {
    "a shard is missing": (without_shard, "1 of its 2 weights files are missing, such as .*00002-of-00002"),
    "a tensor is listed that no shard holds": (listed_elsewhere, "differ in 1 tensors, such as 'other.weight'"),
    "a shard holds a tensor that is not listed": (unlisted, "differ in 1 tensors"),
    "one file beside the shards": (both, "holds both"),
    "a shard of another save": (stray, "does not list it|does not list; "),
    "an index that is no JSON": (lambda index, content: index.write_text("{"), "no index of shards"),
    "an index without a map": (lambda index, content: index.write_text("{}"), "no index of shards"),
    "a shard is cut short": (lambda index, content: (p := next(index.parent.glob("*-00001-of-*"))).write_bytes(p.read_bytes()[:-9]), "damaged"),
    "adapters beside it": (lambda index, content: (index.parent / "adapter_config.json").write_text("{}"), "holds adapters"),
}  # fmt: skip


@pytest.mark.parametrize("what", SHARDS)
@pytest.mark.parametrize(("name", "part"), [("wan", "transformer"), ("qwen", "")])
def test_shards_that_do_not_belong_together_are_refused(name, part, what, kit, tmp_path):
    whole, folder = spoil(kit, name, part, tmp_path)
    SHARDS[what][0](*split(weights_of(folder)))
    with pytest.raises(VideoAlignError, match=SHARDS[what][1]) as error:
        load(whole, part)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "part"), [("wan", "transformer"), ("wan", "text_encoder"), ("qwen", "")])
def test_sound_shards_are_the_same_model(name, part, kit, tmp_path):
    whole, folder = spoil(kit, name, part, tmp_path)
    split(weights_of(folder))
    want, found = (load(place, part).state_dict() for place in (kit / name, whole))
    assert want.keys() == found.keys() and all(torch.equal(found[n], t) for n, t in want.items())


@pytest.mark.parametrize("entry", ["a word", ["os", "system"], ["diffusers", "NoSuchModel"], ["transformers"], 3])
def test_a_part_of_an_unknown_class_is_refused(entry, kit, tmp_path):
    whole, _ = spoil(kit, "wan", "", tmp_path)
    index = json.loads((whole / "model_index.json").read_text())
    (whole / "model_index.json").write_text(json.dumps(index | {"transformer": entry}))
    with pytest.raises(VideoAlignError, match="transformer"):
        load_generator(whole, parts=("transformer",))


def test_pickled_weights_are_not_read(kit, tmp_path):
    whole, folder = spoil(kit, "wan", "transformer", tmp_path)
    path = weights_of(folder)
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    with pytest.raises(VideoAlignError, match=r"no file named .*safetensors"):
        load(whole, "transformer")


def test_the_libraries_still_only_warn(kit, tmp_path):
    """When this fails, diffusers refuses foreign names by itself, and models/whole.py need not count them."""
    _, folder = spoil(kit, "wan", "transformer", tmp_path)
    tensors = load_file(weights_of(folder))
    save_file(tensors | {"other.scale_weight": torch.ones(())}, weights_of(folder), metadata={"format": "pt"})
    WanTransformer3DModel.from_pretrained(folder)


# --- adapters -------------------------------------------------------------------------------------------------------------

ORIGINAL = {
    "attn1.to_q": "self_attn.q", "attn1.to_k": "self_attn.k", "attn1.to_v": "self_attn.v", "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q", "attn2.to_k": "cross_attn.k", "attn2.to_v": "cross_attn.v", "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2",
}  # fmt: skip


def adapters(folder, rank=4, layers=LAYERS):
    """Random adapters by the transformer's own names."""
    source, tensors = torch.Generator().manual_seed(0), {}
    for name, module in load_generator(folder, parts=("transformer",)).transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(layers) and "blocks." in name:
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, module.in_features, generator=source) * 0.3
            tensors[f"{name}.lora_B.weight"] = torch.randn(module.out_features, rank, generator=source) * 0.3
    return tensors


@pytest.fixture(scope="module")
def own(kit):
    return {name: adapters(kit / name) for name in ("wan", "ltx", "deep", "wide")}


def renamed(tensors, *changes):
    for old, new in changes:
        tensors = {re.sub(old, new, name): t for name, t in tensors.items()}
    return tensors


def prefixed(prefix, tensors):
    return renamed(tensors, ("^", prefix))


def original(tensors):
    return renamed(tensors, *((re.escape(old), new) for old, new in ORIGINAL.items()))


def alphas(tensors, alpha):
    return tensors | {
        re.sub(r"lora_(A|down)\.weight", "alpha", n): torch.tensor(float(alpha))
        for n in tensors
        if re.search(r"lora_(A|down)", n)
    }


def downwards(tensors):
    return renamed(tensors, ("lora_A", "lora_down"), ("lora_B", "lora_up"))


def kohya(tensors, alpha=4):
    parts = [(name, *name.partition(".lora_")) for name in downwards(original(tensors))]
    names = {name: f"lora_unet_{stem.replace('.', '_')}{dot}{rest}" for name, stem, dot, rest in parts}
    return alphas({names[n]: t for n, t in downwards(original(tensors)).items()}, alpha)


def default(tensors):
    return renamed(tensors, (r"\.weight$", ".default.weight"))


DIALECTS = {  # the file's tensors, and the scale of the update
    "diffusers": (lambda t: prefixed("transformer.", t), 1),
    "no prefix": (lambda t: t, 1),
    "peft": (lambda t: prefixed("base_model.model.", t), 1),
    "peft of a pipeline": (lambda t: prefixed("base_model.model.transformer.", t), 1),
    "plain peft": (default, 1),
    "diffusers with alphas": (lambda t: alphas(prefixed("transformer.", t), 8), 2),
    "ComfyUI": (lambda t: prefixed("diffusion_model.", original(t)), 1),
    "ComfyUI, down and up": (lambda t: prefixed("diffusion_model.", downwards(original(t))), 1),
    "ComfyUI with alphas": (lambda t: alphas(prefixed("diffusion_model.", original(t)), 2), 0.5),
    "DiffSynth": (lambda t: default(original(t)), 1),
    "original names": (original, 1),
    "kohya": (kohya, 1),
    "kohya with another alpha": (lambda t: kohya(t, 12), 3),
}


def write(folder, tensors, name="pytorch_lora_weights.safetensors", metadata=None):
    folder.mkdir(exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / name, metadata=metadata)
    return folder


def updates(transformer):
    return {n: m.get_delta_weight("default") for n, m in transformer.named_modules() if isinstance(m, BaseTunerLayer)}


def assert_applied(folder, generator, tensors, scale):
    load_adapters(generator, folder)
    found = updates(generator.transformer)
    stems = {n.rpartition(".lora_")[0] for n in tensors}
    assert found.keys() == stems
    for name in stems:
        want = scale * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        torch.testing.assert_close(found[name], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_adapters_of_every_dialect_are_applied_whole(dialect, kit, own, tmp_path):
    form, scale = DIALECTS[dialect]
    folder = write(tmp_path / "lora", form(own["wan"]))
    assert_applied(folder, load_generator(kit / "wan", parts=("transformer",)), own["wan"], scale)


@pytest.mark.parametrize(
    "form", [lambda t: prefixed("transformer.", t), lambda t: prefixed("diffusion_model.", t), lambda t: t]
)
def test_adapters_of_ltx_are_applied_whole(form, kit, own, tmp_path):
    folder = write(tmp_path / "lora", form(own["ltx"]))
    assert_applied(folder, load_generator(kit / "ltx", parts=("transformer",)), own["ltx"], 1)


def test_rank_and_alpha_are_read_from_pefts_configuration(kit, own, tmp_path):
    folder = write(tmp_path / "lora", prefixed("base_model.model.", own["wan"]), "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "target_modules": ["to_q"]}))
    assert_applied(folder, load_generator(kit / "wan", parts=("transformer",)), own["wan"], 2)


def test_rank_and_alpha_are_read_from_the_metadata_and_a_file_may_be_named(kit, own, tmp_path):
    stated = {
        METADATA: json.dumps({"transformer.r": 4, "transformer.lora_alpha": 16, "transformer.target_modules": ["to_q"]})
    }
    folder = write(tmp_path / "lora", prefixed("transformer.", own["wan"]), "any.safetensors", stated)
    assert_applied(folder / "any.safetensors", load_generator(kit / "wan", parts=("transformer",)), own["wan"], 4)


def test_layers_may_have_ranks_of_their_own(kit, tmp_path):
    tensors = adapters(kit / "wan", 4, ("to_q",)) | adapters(kit / "wan", 2, ("to_k", "ffn.net.2"))
    assert_applied(
        write(tmp_path / "lora", prefixed("transformer.", tensors)),
        load_generator(kit / "wan", parts=("transformer",)),
        tensors,
        1,
    )


def test_a_bfloat16_transformer_holds_the_rounded_adapters(kit, own, tmp_path):
    generator = load_generator(kit / "wan", "bfloat16", ("transformer",))
    load_adapters(generator, write(tmp_path / "lora", prefixed("transformer.", own["wan"])))
    layer = generator.transformer.get_submodule("blocks.1.attn2.to_k")
    weight = layer.lora_A["default"].weight
    assert torch.equal(weight, own["wan"]["blocks.1.attn2.to_k.lora_A.weight"].to(weight))


QUERY = "transformer.blocks.0.attn1.to_q"


def cut(side):
    name = f"{QUERY}.lora_{side}.weight"
    return lambda own: (
        (t := prefixed("transformer.", own["wan"])) | {name: t[name][:2] if side == "A" else t[name][:, :2]}
    )


def plus(name, tensor=None):
    return lambda own: prefixed("transformer.", own["wan"]) | {name: torch.ones(4, 64) if tensor is None else tensor}


def less(*names):
    return lambda own: {n: t for n, t in prefixed("transformer.", own["wan"]).items() if n not in names}


BELONG = "{} of their {} tensors do not belong to this transformer, such as '{}.*; a name that does is 'transformer\\.blocks\\.0\\.attn1\\.to_q\\.lora_A\\.weight'"
REFUSED = {
    "a deeper model's": (lambda own: prefixed("transformer.", own["deep"]), BELONG.format(20, 60, r"transformer\.blocks\.2\.")),
    "a deeper model's of peft": (lambda own: prefixed("base_model.model.", own["deep"]), BELONG.format(20, 60, r"base_model\.model\.blocks\.2\.")),
    "a deeper model's of ComfyUI": (lambda own: prefixed("diffusion_model.", original(own["deep"])), BELONG.format(20, 60, "")),
    "a deeper model's of kohya": (lambda own: kohya(own["deep"]), BELONG.format(20, 60, "")),
    "a wider model's": (lambda own: prefixed("transformer.", own["wide"]), r"shapes \(4, 128\) and \(128, 4\), but this transformer takes \(rank, 64\) and \(64, rank\)"),
    "another architecture's": (lambda own: prefixed("transformer.", own["ltx"]), "do not belong to this transformer, such as 'transformer.transformer_blocks"),
    "no lora_B": (less(f"{QUERY}.lora_B.weight"), r"blocks\.0\.attn1\.to_q has no lora_B"),
    "no lora_A": (less(f"{QUERY}.lora_A.weight"), r"blocks\.0\.attn1\.to_q has no lora_A"),
    "ranks of A and B differ": (cut("A"), r"shapes \(2, 64\) and \(64, 4\)"),
    "ranks of B and A differ": (cut("B"), r"shapes \(4, 64\) and \(64, 2\)"),
    "one more layer": (plus("transformer.blocks.0.other.lora_A.weight"), BELONG.format(1, 41, r"transformer\.blocks\.0\.other")),
    "a layer that is not linear": (plus("transformer.blocks.0.norm2.lora_A.weight"), "do not belong"),
    "a whole weight": (plus("transformer.blocks.0.attn1.to_q.weight"), "do not belong"),
    "a trained bias": (plus(f"{QUERY}.lora_B.bias", torch.ones(64)), "do not belong"),
    "DoRA of peft": (plus(f"{QUERY}.lora_magnitude_vector", torch.ones(64)), "1 of 41 tensors are DoRA"),
    "DoRA of kohya": (plus(f"{QUERY}.dora_scale", torch.ones(64)), "DoRA"),
    "LoKr": (lambda own: {f"{QUERY}.lokr_w1": torch.ones(4, 4), f"{QUERY}.lokr_w2": torch.ones(16, 16)}, "2 of 2 tensors are LoKr"),
    "LoHa": (lambda own: {f"{QUERY}.hada_w1_a": torch.ones(4, 4)}, "LoHa"),
    "differences of norms": (lambda own: prefixed("diffusion_model.", original(own["wan"])) | {"diffusion_model.blocks.0.norm3.diff": torch.ones(64)}, "full differences"),
    "differences of biases": (lambda own: prefixed("diffusion_model.", original(own["wan"])) | {"diffusion_model.blocks.0.self_attn.q.diff_b": torch.ones(64)}, "full differences"),
    "the text encoder's": (plus("text_encoder.block.0.lora_A.weight"), "text encoder's, such as 'text_encoder"),
    "the text encoder's of kohya": (lambda own: kohya(own["wan"]) | {"lora_te_block_0.lora_down.weight": torch.ones(4, 64)}, "text encoder's"),
    "two dialects": (lambda own: {n if "blocks.0" in n else f"transformer.{n}": t for n, t in own["wan"].items()}, "20 of 40 names begin with 'transformer.'"),
    "an alpha that is no number": (lambda own: prefixed("transformer.", own["wan"]) | {f"{QUERY}.alpha": torch.ones(2)}, "alpha"),
    "kohya without an alpha": (lambda own: {n: t for n, t in kohya(own["wan"]).items() if "alpha" not in n}, "cannot convert their 40 tensors"),
    "kohya of some layers": (lambda own: {n: t for n, t in kohya(own["wan"]).items() if "ffn" not in n}, "cannot convert"),
    "ComfyUI with a foreign layer": (lambda own: prefixed("diffusion_model.", original(own["wan"]) | {"blocks.0.other.lora_A.weight": torch.ones(4, 64)}), "cannot convert|do not belong"),
    "NaN": (plus(f"{QUERY}.lora_A.weight", torch.full((4, 64), NAN)), "1 tensors hold NaN or infinity, such as .*to_q.lora_A"),
    "fp8": (lambda own: {n: t.to(torch.float8_e4m3fn) for n, t in own["wan"].items()}, "quantised or no weights"),
    "integers": (lambda own: {n: t.long() for n, t in own["wan"].items()}, "quantised or no weights"),
    "nothing": (lambda own: {}, "holds no tensor"),
}  # fmt: skip


@pytest.fixture(scope="module")
def wan(kit):
    """A generator to which no adapter may ever get."""
    return load_generator(kit / "wan", parts=("transformer",))


@pytest.mark.parametrize("what", REFUSED)
def test_adapters_that_do_not_fit_are_refused_whole(what, wan, own, tmp_path):
    content, words = REFUSED[what]
    with pytest.raises(VideoAlignError, match=words) as error:
        load_adapters(wan, write(tmp_path / "lora", content(own)))
    assert "\n" not in str(error.value) and str(tmp_path / "lora") in str(error.value)
    assert not any(isinstance(module, BaseTunerLayer) for module in wan.transformer.modules())


CONFIG = {"r": 4, "lora_alpha": 8}
STATED = {
    "another rank": ({"r": 8, "lora_alpha": 8}, "state rank 8, but the tensors of .* have rank 4"),
    "no alpha": ({"r": 4}, "state no rank .r. and alpha"),
    "a word": ({"r": "four", "lora_alpha": 8}, "state no rank"),
    "DoRA": (CONFIG | {"use_dora": True}, "use_dora: True"),
    "rank-stabilised": (CONFIG | {"use_rslora": True}, "use_rslora: True"),
    "biases": (CONFIG | {"bias": "all"}, "bias: all"),
    "whole modules": (CONFIG | {"modules_to_save": ["proj_out"]}, "modules_to_save"),
    "a list": ([], "no configuration of peft"),
    "another alpha than the metadata": (CONFIG | {"lora_alpha": 4}, "different ranks or alphas"),
}  # fmt: skip


@pytest.mark.parametrize("what", STATED)
def test_ranks_and_alphas_that_contradict_are_refused(what, wan, own, tmp_path):
    stated, words = STATED[what]
    metadata = {METADATA: json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})} if "metadata" in what else None
    folder = write(tmp_path / "lora", prefixed("base_model.model.", own["wan"]), "adapter_model.safetensors", metadata)
    (folder / "adapter_config.json").write_text(json.dumps(stated))
    with pytest.raises(VideoAlignError, match=words):
        load_adapters(wan, folder)
    assert not any(isinstance(module, BaseTunerLayer) for module in wan.transformer.modules())


def two(folder):
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x": torch.ones(1)}, folder / name)


PLACES = {
    "no file": (lambda folder: None, "holds no safetensors file"),
    "two files": (two, "holds a.safetensors, b.safetensors; name the one"),
    "no safetensors file": (
        lambda folder: (folder / "a.safetensors").write_text("<html>"),
        "damaged or no safetensors file",
    ),
    "an empty file": (lambda folder: (folder / "a.safetensors").write_bytes(b""), "damaged or no safetensors file"),
    "a pickle": (lambda folder: torch.save({}, folder / "pytorch_lora_weights.bin"), "holds no safetensors file"),
}


@pytest.mark.parametrize("what", PLACES)
def test_places_without_adapters_are_refused(what, wan, tmp_path):
    PLACES[what][0](tmp_path)
    with pytest.raises(VideoAlignError, match=PLACES[what][1]):
        load_adapters(wan, tmp_path)


def test_a_pickle_is_never_read_as_adapters(wan, tmp_path):
    torch.save({}, tmp_path / "a.bin")
    with pytest.raises(VideoAlignError, match="nothing is unpickled"):
        load_adapters(wan, tmp_path / "a.bin")


def test_generate_refuses_and_leaves_nothing(kit, own, tmp_path, capfd):
    (tmp_path / "p.txt").write_text("a red circle\n")
    lora = write(tmp_path / "lora", prefixed("transformer.", own["deep"]))
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "generate",
                "--generator",
                str(kit / "wan"),
                "--prompts",
                str(tmp_path / "p.txt"),
                "--num-frames",
                "5",
                "--height",
                "32",
                "--width",
                "32",
                "--fps",
                "8",
                "--steps",
                "2",
                "--device",
                "cpu",
                "--lora",
                str(lora),
                "--out",
                str(tmp_path / "out"),
            ]
        )
    err = capfd.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in err
    assert [line for line in err.splitlines() if "error" in line] == [
        err.splitlines()[-1]
    ] and "20 of their 60 tensors" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora", "p.txt"]


# --- nothing that is not finite is written --------------------------------------------------------------------------------


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
    monkeypatch.setattr(module.generator, "sample", lambda condition, noise, *rest: noise * NAN)
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


# --- exported rewards -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward(backbone, sampling, tmp_path_factory):
    """Folder of a reward model with adapters, statistics and its backbone. Read only."""
    network = VideoReward(backbone, "plain", sampling, lora=LoRA(rank=2))
    network.statistics = Statistics([0.1, 0.2, 0.3], [1.0, 2.0, 3.0])
    folder = tmp_path_factory.mktemp("reward") / "reward"
    network.save_pretrained(folder, backbone=True)
    return folder


@pytest.fixture(scope="module")
def noisy(wan, kit, tmp_path_factory):
    """A generator and the folder of a noisy reward of it. Read only."""
    generator = load_generator(kit / "wan", parts=("transformer", "vae"))
    network = NoisyReward(generator, NoisyRewardShape(blocks=1, hidden=16))
    network.statistics = Statistics([0.1, 0.2, 0.3], [1.0, 2.0, 3.0])
    folder = tmp_path_factory.mktemp("noisy") / "reward"
    network.save_pretrained(folder)
    return generator, folder


def flip(path, place=-3):
    """Change one byte, the exponent of a weight."""
    content = bytearray(path.read_bytes())
    content[place] ^= 0x40
    path.write_bytes(content)


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
    assert str(tmp_path / "reward") in said and "data.val" in said
    again = VideoReward.from_pretrained(tmp_path / "reward")
    assert not again.has_statistics
    with pytest.raises(VideoAlignError, match="no statistics"):
        again.need_statistics("it")


# --- files that carry their own checksum ----------------------------------------------------------------------------------


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
    """But for the key of the checksum itself, without which the file is as one of another program, its content unchanged."""
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
    assert sealed.read_bytes() == before and [path.name for path in sealed.parent.iterdir()] == [sealed.name]


def test_a_flipped_byte_of_a_sealed_pipeline_or_of_sealed_adapters_is_told(kit, own, wan, tmp_path):
    whole, folder = spoil(kit, "wan", "transformer", tmp_path)
    seal(weights_of(folder))
    load(whole, "transformer")
    flip(weights_of(folder))
    lora = write(tmp_path / "lora", prefixed("transformer.", own["wan"])) / "pytorch_lora_weights.safetensors"
    seal(lora)
    flip(lora)
    for broken in (lambda: load(whole, "transformer"), lambda: load_adapters(wan, lora.parent)):
        with pytest.raises(VideoAlignError, match="is not the file that was exported: its SHA-256"):
            broken()


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
VideoReward(backbone, "plain", FrameSampling(fps=8.0, min_pixels=0), lora=LoRA(rank=2)).save_pretrained(out / "reward", backbone=True)
module = FlowSFT(str(wan), parts=("transformer",))
export = ExportGenerator(str(out / "lora"))
export.on_fit_end(SimpleNamespace(is_global_zero=True, loggers=[], logger=None, strategy=None, log_dir=None), module)
"""


def test_two_processes_export_the_same_bytes(kit, backbone, tmp_path):
    files = []
    for seed in ("1", "2"):
        out = tmp_path / seed
        out.mkdir()
        (tmp_path / "write.py").write_text(WRITE)
        subprocess.run(
            [sys.executable, str(tmp_path / "write.py"), str(kit / "wan"), str(backbone), str(out)],
            check=True,
            env={**__import__("os").environ, "PYTHONHASHSEED": seed},
            capture_output=True,
        )
        files.append({path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()})
    assert files[0].keys() == files[1].keys() and len(files[0]) > 8
    assert [name for name in files[0] if files[0][name] != files[1][name]] == []
