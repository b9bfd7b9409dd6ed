"""Adapters of every dialect are applied whole, or one sentence refuses them."""

import json
import re

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file

from helpers import call, flags
from loading_kit import LAYERS, NAN, flip, load, spoil, weights_of
from videoalign import VideoAlignError
from videoalign.models.adapter_files import METADATA
from videoalign.models.adapters import load_adapters
from videoalign.models.checksums import seal
from videoalign.models.generator_folder import load_generator


@pytest.fixture(scope="module")
def kit(pipelines):
    return pipelines


# --- adapters -------------------------------------------------------------------------------------

ORIGINAL = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}


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


def underscores(tensors):
    parts = [(name, *name.partition(".lora_")) for name in tensors]
    names = {name: f"lora_unet_{stem.replace('.', '_')}{dot}{rest}" for name, stem, dot, rest in parts}
    return {names[n]: t for n, t in tensors.items()}


def kohya(tensors, alpha=4):
    return alphas(underscores(downwards(original(tensors))), alpha)


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
    "kohya without alphas": (lambda t: {n: x for n, x in kohya(t, 12).items() if "alpha" not in n}, 1),
    "kohya with names of diffusers": (lambda t: underscores(downwards(t)), 1),
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


BELONG = (
    "{} of their {} tensors do not belong to this transformer, such as '{}.*; "
    r"a name that does is 'transformer\.blocks\.0\.attn1\.to_q\.lora_A\.weight'"
)
REFUSED = {
    "a deeper model's": (
        lambda own: prefixed("transformer.", own["deep"]),
        BELONG.format(20, 60, r"transformer\.blocks\.2\."),
    ),
    "a deeper model's of peft": (
        lambda own: prefixed("base_model.model.", own["deep"]),
        BELONG.format(20, 60, r"base_model\.model\.blocks\.2\."),
    ),
    "a deeper model's of ComfyUI": (
        lambda own: prefixed("diffusion_model.", original(own["deep"])),
        BELONG.format(20, 60, ""),
    ),
    "a deeper model's of kohya": (
        lambda own: kohya(own["deep"]),
        BELONG.format(30, 90, "lora_unet_blocks_2_.* and 27 more"),
    ),
    "a wider model's": (
        lambda own: prefixed("transformer.", own["wide"]),
        r"shapes \(4, 128\) and \(128, 4\), but this transformer takes \(rank, 64\) and \(64, rank\)",
    ),
    "another architecture's": (
        lambda own: prefixed("transformer.", own["ltx"]),
        "do not belong to this transformer, such as 'transformer.transformer_blocks",
    ),
    "no lora_B": (less(f"{QUERY}.lora_B.weight"), r"blocks\.0\.attn1\.to_q has no lora_B"),
    "no lora_A": (less(f"{QUERY}.lora_A.weight"), r"blocks\.0\.attn1\.to_q has no lora_A"),
    "ranks of A and B differ": (cut("A"), r"shapes \(2, 64\) and \(64, 4\)"),
    "ranks of B and A differ": (cut("B"), r"shapes \(4, 64\) and \(64, 2\)"),
    "one more layer": (
        plus("transformer.blocks.0.other.lora_A.weight"),
        BELONG.format(1, 41, r"transformer\.blocks\.0\.other"),
    ),
    "a layer that is not linear": (plus("transformer.blocks.0.norm2.lora_A.weight"), "do not belong"),
    "a whole weight": (plus("transformer.blocks.0.attn1.to_q.weight"), "do not belong"),
    "a trained bias": (plus(f"{QUERY}.lora_B.bias", torch.ones(64)), "do not belong"),
    "DoRA of peft": (plus(f"{QUERY}.lora_magnitude_vector", torch.ones(64)), "1 of 41 tensors are DoRA"),
    "DoRA of kohya": (plus(f"{QUERY}.dora_scale", torch.ones(64)), "DoRA"),
    "LoKr": (
        lambda own: {f"{QUERY}.lokr_w1": torch.ones(4, 4), f"{QUERY}.lokr_w2": torch.ones(16, 16)},
        "2 of 2 tensors are LoKr",
    ),
    "LoHa": (lambda own: {f"{QUERY}.hada_w1_a": torch.ones(4, 4)}, "LoHa"),
    "differences of norms": (
        lambda own: (
            prefixed("diffusion_model.", original(own["wan"])) | {"diffusion_model.blocks.0.norm3.diff": torch.ones(64)}
        ),
        "full differences",
    ),
    "differences of biases": (
        lambda own: (
            prefixed("diffusion_model.", original(own["wan"]))
            | {"diffusion_model.blocks.0.self_attn.q.diff_b": torch.ones(64)}
        ),
        "full differences",
    ),
    "the text encoder's": (plus("text_encoder.block.0.lora_A.weight"), "text encoder's, such as 'text_encoder"),
    "the text encoder's of kohya": (
        lambda own: kohya(own["wan"]) | {"lora_te_block_0.lora_down.weight": torch.ones(4, 64)},
        "text encoder's",
    ),
    "two dialects": (
        lambda own: {n if "blocks.0" in n else f"transformer.{n}": t for n, t in own["wan"].items()},
        "20 of 40 names begin with 'transformer.'",
    ),
    "an alpha that is no number": (
        lambda own: prefixed("transformer.", own["wan"]) | {f"{QUERY}.alpha": torch.ones(2)},
        "alpha",
    ),
    "an update twice": (
        lambda own: prefixed("diffusion_model.", own["wan"] | {n: t.clone() for n, t in original(own["wan"]).items()}),
        r"they hold blocks\.0\.attn\S* twice, once as 'diff",
    ),
    "zeros": (lambda own: {n: torch.zeros_like(t) for n, t in own["wan"].items()}, "all of their tensors are zero"),
    "ComfyUI with a foreign layer": (
        lambda own: prefixed(
            "diffusion_model.", original(own["wan"]) | {"blocks.0.other.lora_A.weight": torch.ones(4, 64)}
        ),
        BELONG.format(1, 41, r"diffusion_model\.blocks\.0\.other"),
    ),
    "NaN": (
        plus(f"{QUERY}.lora_A.weight", torch.full((4, 64), NAN)),
        "1 tensors hold NaN or infinity, such as .*to_q.lora_A",
    ),
    "fp8": (lambda own: {n: t.to(torch.float8_e4m3fn) for n, t in own["wan"].items()}, "quantised or no weights"),
    "integers": (lambda own: {n: t.long() for n, t in own["wan"].items()}, "quantised or no weights"),
    "nothing": (lambda own: {}, "holds no tensor"),
}


@pytest.fixture(scope="module")
def wan(kit):
    """A generator for adapters that are refused; none of them may reach it."""
    return load_generator(kit / "wan", parts=("transformer",))


@pytest.mark.parametrize("what", REFUSED)
def test_adapters_that_do_not_fit_are_refused_whole(what, wan, own, tmp_path):
    content, words = REFUSED[what]
    with pytest.raises(VideoAlignError, match=words) as error:
        load_adapters(wan, write(tmp_path / "lora", content(own)))
    assert "\n" not in str(error.value)
    assert str(tmp_path / "lora") in str(error.value)
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
}


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
    given = flags(generator=kit / "wan", prompts=tmp_path / "p.txt", lora=lora, out=tmp_path / "out", device="cpu")
    assert call("generate", *given, *flags(num_frames=5, height=32, width=32, fps=8, steps=2)) == 2
    err = capfd.readouterr().err
    assert "Traceback" not in err
    assert [line for line in err.splitlines() if "error" in line] == [err.splitlines()[-1]]
    assert "20 of their 60 tensors" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora", "p.txt"]


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
