"""Every tensor of pipelines and backbones that is loaded is accounted for, or one sentence refuses the files."""

import json
import shutil

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from loading_kit import NAN, load, spoil, weights_of
from videoalign import VideoAlignError
from videoalign.models.generator_folder import load_generator


@pytest.fixture(scope="module")
def kit(pipelines):
    return pipelines


# --- pipelines and backbones ----------------------------------------------------------------------


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
    "foreign prefix": (
        lambda t: {f"module.{n}": v for n, v in t.items()},
        r"tensors in its files are not the model's \(such as 'module\..*of the model are not",
    ),
    "one more": (
        lambda t: t | {"other.scale_weight": torch.ones(())},
        "1 tensors in its files are not the model's .such as 'other.scale_weight'",
    ),
    "one missing": (
        lambda t: {n: v for n, v in t.items() if n != first(t)},
        "[12] tensors of the model are not in its files",
    ),
    "another shape": (lambda t: t | {first(t): torch.zeros(*t[first(t)].shape, 2)}, "shape"),
    "fp8": (fp8, r"quantised or no weights, such as '.*F8_E4M3"),
    "fp8 with scales": (scaled, "quantised or no weights"),
    "int8": (lambda t: {n: v.to(torch.int8) for n, v in t.items()}, "quantised or no weights.*I8"),
    "int64": (lambda t: t | {first(t): t[first(t)].long()}, "1 of the .*quantised or no weights.*I64"),
    "no tensors": (lambda t: {}, "tensors of the model are not in its files"),
    "NaN": (with_value(NAN), "not finite: [12] tensors hold NaN or infinity"),
    "infinity": (with_value(-float("inf")), "not finite: [12] tensors hold NaN or infinity"),
}
PARTS = [("wan", "transformer"), ("wan", "vae"), ("wan", "text_encoder"), ("ltx", "transformer"), ("qwen", "")]


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
    assert (part or "backbone") in str(error.value)
    assert "\n" not in str(error.value)


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
    "a shard is cut short": (
        lambda index, content: (p := next(index.parent.glob("*-00001-of-*"))).write_bytes(p.read_bytes()[:-9]),
        "damaged",
    ),
    "adapters beside it": (
        lambda index, content: (index.parent / "adapter_config.json").write_text("{}"),
        "holds adapters",
    ),
}


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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: [], "is no table of a pipeline's parts"),
        (lambda index: index | {"vae": None}, "class of its vae"),
    ],
    ids=["a list", "no entry"],
)
def test_an_index_of_another_kind_is_refused(change, words, kit, tmp_path):
    whole, _ = spoil(kit, "wan", "", tmp_path)
    index = json.loads((whole / "model_index.json").read_text())
    (whole / "model_index.json").write_text(json.dumps(change(index)))
    with pytest.raises(VideoAlignError, match=words):
        load_generator(whole)


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
