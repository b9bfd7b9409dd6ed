"""Adapters in the forms of other tools: what diffusers' own converters read back is what was written."""

import re
import shutil

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers import call
from lora_kit import ATTENTION, random_updates, skeleton, write_updates
from videoalign import VideoAlignError
from videoalign.models.adapter_files import EXPERT, linear_layers
from videoalign.models.adapters import read_updates
from videoalign.models.lora_dialects import check_read_by_diffusers, written
from videoalign.models.lora_names import original_name
from videoalign.models.lora_specs import LoraSpec, parse, specs_of

WAN = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 16, "num_layers": 2, "text_dim": 8, "freq_dim": 8}
IMAGE = {**WAN, "image_dim": 8, "added_kv_proj_dim": 24}
LTX = {"num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16, "num_layers": 2}
LTX |= {"caption_channels": 8, "in_channels": 4, "out_channels": 4}
AUDIO = {"audio_num_attention_heads": 2, "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16}
LTX2 = {**LTX, **AUDIO, "audio_in_channels": 4, "audio_out_channels": 4}
KINDS = {
    "wan": ("WanTransformer3DModel", "WanPipeline", WAN),
    "wan with images": ("WanTransformer3DModel", "WanImageToVideoPipeline", IMAGE),
    "ltx": ("LTXVideoTransformer3DModel", "LTXPipeline", LTX),
    "ltx2": ("LTX2VideoTransformer3DModel", "LTX2Pipeline", LTX2),
}


def model(kind):
    name, pipeline, config = KINDS[kind]
    with torch.device("meta"):
        return getattr(diffusers, name).from_config(config), getattr(diffusers, pipeline)


def adapted(kind, transformer):
    """Names of all layers that both ComfyUI and diffusers know by what is written for ComfyUI."""
    every = linear_layers(transformer)
    return [n for n in every if kind != "ltx" or not n.startswith(("proj_in", "time_embed"))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bake", [True, False])
def test_every_layer_comes_back_from_comfyuis_names(kind, bake):
    transformer, pipeline = model(kind)
    updates = random_updates(transformer, adapted(kind, transformer), alpha=3.0 if bake else 7.0)
    if bake:
        updates = {layer: update.baked() for layer, update in updates.items()}
    tensors, _ = written(updates, "comfyui", transformer)
    assert all(name.startswith("diffusion_model.") for name in tensors)
    if not bake and "ltx" in kind:  # their converters hand alphas on under names that nobody reads
        with pytest.raises(VideoAlignError, match=r"such as '.*alpha'.*--alpha baked"):
            check_read_by_diffusers(tensors, updates, pipeline, "comfyui")
        return
    check_read_by_diffusers(tensors, updates, pipeline, "comfyui")
    found = pipeline.lora_state_dict({name: tensor.clone() for name, tensor in tensors.items()})
    assert found.keys() == {f"transformer.{layer}.lora_{side}.weight" for layer in updates for side in "AB"}
    for layer, update in updates.items():
        a, b = (found[f"transformer.{layer}.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(b @ a, update.scale * update.b @ update.a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["wan", "wan with images"])
@pytest.mark.parametrize("ends", [ATTENTION, ("attn1.to_q",), ("0.ffn.net.2", "add_k_proj", "add_v_proj")])
def test_some_layers_of_blocks_come_back_from_musubis_names(kind, ends):
    transformer, pipeline = model(kind)
    updates = random_updates(transformer, ends, alpha=7.0)
    tensors, _ = written(updates, "musubi", transformer)
    assert all(name.startswith("lora_unet_blocks_") and "." not in name.split(".")[0] for name in tensors)
    check_read_by_diffusers(tensors, updates, pipeline, "musubi")


@pytest.mark.parametrize("kind", KINDS)
def test_original_names_are_those_of_one_layer(kind):
    transformer, _ = model(kind)
    layers = linear_layers(transformer)
    names = [original_name(layer, type(transformer).__name__) for layer in layers]
    assert len(set(names)) == len(layers)
    both = set(names) & set(layers)  # one name never means two layers
    assert all(original_name(name, type(transformer).__name__) == name for name in both)


UNREADABLE = {
    "musubi for LTX": ("ltx", ATTENTION, "musubi", "LTXPipeline does not read .* such as 'transformer.transformer_blo"),
    "musubi for LTX-2": ("ltx2", ATTENTION, "musubi", "LTX2Pipeline does not read"),
    "musubi outside of blocks": ("wan", ("proj_out",), "musubi", "WanPipeline does not read them .IndexError"),
    "ComfyUI without a block": ("wan", ("proj_out",), "comfyui", "WanPipeline does not read them .ValueError"),
    "half of the image's": ("wan with images", ("add_k_proj",), "comfyui", "does not read them .*k_img"),
    "LTX's input": ("ltx", ("proj_in", "to_q"), "comfyui", "does not read 2 .* 'transformer.proj_in.lora_A.weight'"),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_what_diffusers_does_not_read_back_is_not_written(what):
    kind, ends, dialect, words = UNREADABLE[what]
    transformer, pipeline = model(kind)
    updates = random_updates(transformer, ends)
    with pytest.raises(VideoAlignError, match=words) as error:
        check_read_by_diffusers(written(updates, dialect, transformer)[0], updates, pipeline, dialect)
    assert "--to diffusers" in str(error.value) and "\n" not in str(error.value)


def test_a_pipeline_without_a_converter_has_diffusers_names_only():
    transformer, _ = model("wan")
    updates, pipeline = random_updates(transformer), diffusers.HunyuanVideo15Pipeline
    check_read_by_diffusers(written(updates, "diffusers", transformer)[0], updates, pipeline, "diffusers")
    with pytest.raises(VideoAlignError, match="HunyuanVideo15Pipeline reads no files of adapters"):
        check_read_by_diffusers(written(updates, "comfyui", transformer)[0], updates, pipeline, "comfyui")


# --- the command ------------------------------------------------------------------------------------------------------


def convert(source, to, out, generator, *more):
    return call("convert-lora", source, "--to", to, "--out", out, "--generator", generator, *more)


def output(folder, file):
    """What plain diffusers' transformer gives with adapters."""
    pipe = diffusers.WanPipeline.from_pretrained(folder, vae=None, text_encoder=None, tokenizer=None)
    if file:
        pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    source = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 16, 2, 4, 4, generator=source), torch.randn(1, 5, 32, generator=source)
    with torch.no_grad():
        return pipe.transformer(x, torch.tensor([500.0]), text, return_dict=False)[0]


FORMS = [("comfyui", ()), ("comfyui", ("--alpha", "written")), ("musubi", ()), ("musubi", ("--alpha", "baked"))]
FORMS += [("diffusers", ()), ("diffusers", ("--alpha", "baked"))]


@pytest.fixture(scope="module")
def folder(pipelines):
    return pipelines / "wan"


@pytest.fixture
def source(folder, tmp_path):
    return write_updates(tmp_path / "own.safetensors", random_updates(skeleton(folder), alpha=7.5))


@pytest.mark.parametrize(("to", "more"), FORMS)
def test_plain_diffusers_gives_the_same_output_with_every_form_and_we_read_it_back(to, more, folder, source, tmp_path):
    out = tmp_path / "new" / "out.safetensors"
    assert convert(source, to, out, folder, *more) == 0
    want = output(folder, source)
    torch.testing.assert_close(output(folder, out), want, rtol=1e-5, atol=1e-6)
    assert (want - output(folder, None)).abs().max() > 0.1
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    transformer = skeleton(folder)
    ours, theirs = read_updates(transformer, source)[0], read_updates(transformer, out)[0]
    assert ours.keys() == theirs.keys()
    for layer, update in ours.items():
        assert torch.equal(theirs[layer].a, update.a)
        torch.testing.assert_close(theirs[layer].scale * theirs[layer].b, update.scale * update.b)
    back = tmp_path / "back.safetensors"
    assert convert(out, "diffusers", back, folder) == 0
    torch.testing.assert_close(output(folder, back), want, rtol=1e-5, atol=1e-6)


def test_half_precision_a_scale_and_the_expert_are_kept(experts, tmp_path):
    updates = random_updates(skeleton(experts), alpha=3.0)
    source = write_updates(tmp_path / "own.safetensors", updates, "low")
    half = {name: tensor.bfloat16() for name, tensor in load_file(source).items()}
    with safe_open(source, "pt") as content:
        stated = {name: value for name, value in content.metadata().items() if "sha" not in name}
    save_file(half, source, metadata=stated)
    assert convert(f"{source},scale=2,expert=low", "comfyui", tmp_path / "out.safetensors", experts) == 0
    found = load_file(tmp_path / "out.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    name = "blocks.0.attn1.to_q.lora_B.weight"
    assert torch.equal(found["diffusion_model.blocks.0.self_attn.q.lora_B.weight"], 2 * half[f"transformer.{name}"])
    with safe_open(tmp_path / "out.safetensors", "pt") as content:
        assert content.metadata()[EXPERT] == "low"
    assert convert(f"{source},scale=0.7", "comfyui", tmp_path / "third.safetensors", experts) == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "third.safetensors").values()} == {torch.float32}


def test_no_weights_are_read(folder, source, tmp_path):
    shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    assert convert(source, "musubi", tmp_path / "out.safetensors", tmp_path / "bare") == 0


REFUSED = {
    "another generator's": (
        lambda s, k: (s, "comfyui", k / "ltx"),
        "32 of their 32 tensors do not belong .* and 29 more; a name that does is 'transformer.transformer_bl",
    ),
    "a wider generator's": (lambda s, k: (s, "comfyui", k / "wide"), "lora_A and lora_B of .* have the shapes"),
    "an expert of none": (lambda s, k: (f"{s},expert=high", "comfyui", k / "wan"), "has a single transformer"),
    "no generator": (lambda s, k: (s, "comfyui", k / "none"), "no such folder of a generator"),
    "no pipeline": (lambda s, k: (s, "comfyui", k / "qwen"), "model_index.json"),
    "no adapters": (lambda s, k: (k / "none", "comfyui", k / "wan"), "no such folder or file of adapters"),
    "a scale that is no number": (lambda s, k: (f"{s},scale=x", "comfyui", k / "wan"), "scale=x is no finite number"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_adapters_that_cannot_be_converted_are_refused_and_nothing_is_written(what, pipelines, source, tmp_path, capfd):
    build, words = REFUSED[what]
    adapters, to, generator = build(source, pipelines)
    assert convert(adapters, to, tmp_path / "new" / "out.safetensors", generator) == 2
    message = capfd.readouterr().err.strip()
    assert re.search(words, message), message
    assert "Traceback" not in message
    assert not list(tmp_path.rglob("out*"))


def test_nothing_is_overwritten_and_the_name_says_what_it_is(folder, source, tmp_path, capfd):
    (tmp_path / "out.safetensors").write_text("precious")
    assert convert(source, "comfyui", tmp_path / "out.safetensors", folder) == 2
    assert "exists already" in capfd.readouterr().err
    assert (tmp_path / "out.safetensors").read_text() == "precious"
    assert convert(source, "comfyui", tmp_path / "out", folder) == 2
    assert "ends in .safetensors" in capfd.readouterr().err


# --- words ------------------------------------------------------------------------------------------------------------

SPECS = {
    "a/b": LoraSpec("a/b"),
    "a,b": LoraSpec("a,b"),
    "a,scale=0.5": LoraSpec("a", 0.5),
    "a,expert=low,scale=-2e-1": LoraSpec("a", -0.2, "low"),
    "a,b,expert=high": LoraSpec("a,b", 1.0, "high"),
    "hf://models/x/y@main": LoraSpec("hf://models/x/y@main"),
}
WRONG = {
    "a,scale=": "scale= is no finite",
    "a,scale=nan": "no finite",
    "a,scale=1,scale=2": "twice",
    ",scale=1": "path is empty",
    "": "path is empty",
    "a,expert=middle": "expert=middle is unknown",
}


@pytest.mark.parametrize("text", SPECS)
def test_adapters_are_named_with_scale_and_expert(text):
    assert parse(text) == SPECS[text]
    assert specs_of([text, "b"]) == [SPECS[text], LoraSpec("b")]


@pytest.mark.parametrize("text", WRONG)
def test_words_that_name_no_adapters_are_refused(text):
    with pytest.raises(VideoAlignError, match=WRONG[text]):
        parse(text)
