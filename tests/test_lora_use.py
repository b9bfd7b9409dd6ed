"""Adapters in use: several at once, of two experts, folded into a pipeline, and as the start of a training."""

import json
import math
import shutil
from functools import partial

import diffusers
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flow_kit import LN2, SMALL, data, fit, make
from generator_kit import alike, apart, videos_of
from helpers import QUIET, call, flags, randn
from lora_kit import ATTENTION, random_updates, skeleton, write_updates
from videoalign import VideoAlignError
from videoalign.alignment import FlowDPO, FlowSFT
from videoalign.callbacks import ExportGenerator
from videoalign.commands.arms import Arm, Sweep
from videoalign.models.adapter_files import EXPERT
from videoalign.models.adapters import apply_loras, load_adapters, read_updates
from videoalign.models.generator_folder import load_generator
from videoalign.models.lora import LoRA, add_lora


@pytest.fixture(scope="module")
def folder(pipelines):
    return pipelines / "wan"


@pytest.fixture(scope="module")
def files(folder, tmp_path_factory):
    """Two files of adapters: on attention, and on the feed-forward layers with another rank."""
    root, transformer = tmp_path_factory.mktemp("files"), skeleton(folder)
    one = write_updates(root / "one.safetensors", random_updates(transformer, alpha=7.5))
    more = random_updates(transformer, ("to_q", "ffn.net.2"), rank=2, alpha=1.0, seed=1)
    return one, write_updates(root / "two.safetensors", more)


def weights(transformer):
    """Weights of all linear layers with their active adapters, in fp64."""
    found = {}
    for name, module in transformer.named_modules():
        if isinstance(module, BaseTunerLayer):
            found[name] = module.base_layer.weight.double()
            for adapter in module.active_adapters:
                if adapter in module.lora_A and not module.disable_adapters:
                    found[name] = found[name] + module.get_delta_weight(adapter).double()
        elif isinstance(module, torch.nn.Linear) and ".lora_" not in name and not name.endswith("base_layer"):
            found[name] = module.weight.double()
    return found


def expected(folder, *scaled, part="transformer"):
    """Weights of a pipeline's linear layers with files of adapters at scales, by an own sum."""
    transformer = diffusers.WanTransformer3DModel.from_pretrained(folder, subfolder=part)
    found = weights(transformer)
    for file, scale in scaled:
        for name, update in read_updates(transformer, file)[0].items():
            found[name] = found[name] + scale * update.alpha / update.rank * (update.b.double() @ update.a.double())
    return found


def equal(found, want, **tolerance):
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(found[name], tensor, **{"rtol": 1e-5, "atol": 1e-6, **tolerance})


# --- several ----------------------------------------------------------------------------------------------------------


def test_several_adapters_add_up_at_their_scales(folder, files):
    generator = load_generator(folder, parts=("transformer",))
    apply_loras(generator, [f"{files[0]},scale=0.5", f"{files[1]},scale=-2"])
    want = expected(folder, (files[0], 0.5), (files[1], -2))
    equal(weights(generator.transformer), want)
    assert not any(parameter.requires_grad for parameter in generator.parameters())
    plain = diffusers.WanPipeline.from_pretrained(folder, vae=None, text_encoder=None, tokenizer=None)
    for name, file in zip("ab", files):
        plain.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    plain.set_adapters(["a", "b"], [0.5, -2.0])
    x, text = randn(1, 16, 2, 4, 4), randn(1, 5, 32)
    t = torch.tensor([500.0])
    with torch.no_grad():
        assert torch.equal(plain.transformer(x, t, text)[0], generator.transformer(x, t, text)[0])


def test_one_word_or_none_is_enough(folder, files):
    generator = load_generator(folder, parts=("transformer",))
    apply_loras(generator, None)
    equal(weights(generator.transformer), expected(folder))
    apply_loras(generator, str(files[1]))
    equal(weights(generator.transformer), expected(folder, (files[1], 1)))


def test_arms_take_several_and_refuse_words_that_cannot_be_read():
    assert Arm(lora=["a,scale=2", "b"]).lora == ["a,scale=2", "b"]
    assert Sweep(noisy_reward="r", strengths=[1.0], lora=["a"]).arms("x")["x@1"].lora == ["a"]
    with pytest.raises(VideoAlignError, match="scale=x"):
        Arm(lora=["a", "b,scale=x"])


# --- two experts ------------------------------------------------------------------------------------------------------


@pytest.fixture
def both(experts):
    """The generator with both experts, until its family loads them."""
    generator = load_generator(experts, parts=("transformer",))
    return generator


def expert_file(experts, path, expert, seed=0):
    return write_updates(path, random_updates(skeleton(experts), alpha=4.0, seed=seed), expert)


def test_a_file_goes_to_the_expert_that_it_states_or_that_is_named(both, experts, tmp_path):
    low = expert_file(experts, tmp_path / "low.safetensors", "low")
    any_ = expert_file(experts, tmp_path / "any.safetensors", None, seed=1)
    apply_loras(both, [str(low), f"{any_},expert=high,scale=3", f"{any_},expert=low"])
    equal(weights(both.transformer), expected(experts, (any_, 3)))
    equal(weights(both.other), expected(experts, (low, 1), (any_, 1), part="transformer_2"))


WRONG = {
    "nobody says": (None, None, "two experts, high and low, and the file states none; say .*,expert=high or "),
    "both say": ("low", "high", "of the expert 'low', as their file states, but expert=high was asked for"),
}


@pytest.mark.parametrize("what", WRONG)
def test_adapters_of_no_or_of_the_wrong_expert_are_refused(what, both, experts, tmp_path):
    said, asked, words = WRONG[what]
    file = expert_file(experts, tmp_path / "a.safetensors", said)
    with pytest.raises(VideoAlignError, match=words):
        load_adapters(both, file, expert=asked)
    for transformer in (both.transformer, both.other):
        assert not any(isinstance(module, BaseTunerLayer) for module in transformer.modules())


def test_adapters_of_an_expert_are_refused_where_it_is_not_loaded(experts, folder, tmp_path):
    file = expert_file(experts, tmp_path / "a.safetensors", "low")
    alone = load_generator(experts, parts=("transformer",), expert="high")
    with pytest.raises(VideoAlignError, match="the expert 'low', but the generator was loaded with 'high' alone"):
        load_adapters(alone, file)
    wan = write_updates(tmp_path / "b.safetensors", random_updates(skeleton(folder)), "low")
    with pytest.raises(VideoAlignError, match=r"the expert .low. of two, but this generator has a single"):
        load_adapters(load_generator(folder, parts=("transformer",)), wan)


# --- fuse -------------------------------------------------------------------------------------------------------------


def fused(folder, out, *loras, more=()):
    options = [word for lora in loras for word in ("--lora", lora)]
    return call("fuse", "--generator", folder, "--out", out, *options, *more)


def test_a_fused_pipeline_samples_as_with_adapters_and_its_other_parts_are_copies(folder, files, tmp_path):
    out = tmp_path / "fused"
    assert fused(folder, out, f"{files[0]},scale=0.5", files[1]) == 0
    equal(
        weights(diffusers.WanTransformer3DModel.from_pretrained(out / "transformer")),
        expected(folder, (files[0], 0.5), (files[1], 1)),
    )
    ours, merged = (load_generator(path) for path in (folder, out))
    condition = ours.condition(ours.encode_prompts(["a red circle"]))
    before = ours.sample(condition, randn(1, 16, 2, 4, 4), 3)
    apply_loras(ours, [f"{files[0]},scale=0.5", str(files[1])])
    with_adapters, without = (g.sample(condition, randn(1, 16, 2, 4, 4), 3) for g in (ours, merged))
    torch.testing.assert_close(without, with_adapters, rtol=1e-5, atol=1e-5)
    assert (before - without).abs().max() > 1e-2
    ones = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    assert ones == {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
    changed = {str(path) for path in ones if (folder / path).read_bytes() != (out / path).read_bytes()}
    assert changed == {"transformer/diffusion_pytorch_model.safetensors"}


def test_both_experts_are_fused_each_with_its_own_in_shards_and_another_dtype(experts, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(experts, source)
    for name in ("transformer", "transformer_2"):
        model = diffusers.WanTransformer3DModel.from_pretrained(source, subfolder=name)
        shutil.rmtree(source / name)
        model.save_pretrained(source / name, max_shard_size="100KB")
    (source / "transformer" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"of the old weights")
    low = expert_file(experts, tmp_path / "low.safetensors", "low")
    high = expert_file(experts, tmp_path / "high.safetensors", "high", seed=1)
    assert fused(source, tmp_path / "out", low, f"{high},scale=2", more=["--dtype", "bfloat16"]) == 0
    for name, scaled in (("transformer", (high, 2)), ("transformer_2", (low, 1))):
        shards = sorted(path.name for path in (source / name).glob("*-of-*.safetensors"))
        assert len(shards) > 1 and shards == sorted(p.name for p in (tmp_path / "out" / name).glob("*.safetensors"))
        index = json.loads((tmp_path / "out" / name / "diffusion_pytorch_model.safetensors.index.json").read_text())
        held = {n: t for shard in shards for n, t in load_file(tmp_path / "out" / name / shard).items()}
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in held.values())
        assert {tensor.dtype for tensor in held.values()} == {torch.bfloat16}
        for layer, want in expected(experts, scaled, part=name).items():
            assert torch.equal(held[f"{layer}.weight"], want.float().bfloat16()) or torch.allclose(
                held[f"{layer}.weight"].double(), want, rtol=2**-8
            )


FUSED = {
    "no expert": (lambda e, w, f: (e, f), "two experts"),
    "no adapters": (lambda e, w, f: (w, "none"), "no such folder or file of adapters"),
    "another model": (lambda e, w, f: (w.parent / "ltx", f), "do not belong"),
    "infinite": (lambda e, w, f: (w, f"{f},scale=1e39"), "fused weights are not finite"),
    "a part that is missing": (lambda e, w, f: (without_text(w, f.parent), f), "model_index.json lists 'text_encoder'"),
}


def without_text(folder, root):
    shutil.copytree(folder, root / "part", ignore=shutil.ignore_patterns("text_encoder"))
    return root / "part"


@pytest.mark.parametrize("what", FUSED)
def test_what_cannot_be_fused_is_refused_and_nothing_is_left(what, experts, folder, tmp_path, capfd):
    build, words = FUSED[what]
    updates = random_updates(skeleton(experts if what == "no expert" else folder))
    generator, lora = build(experts, folder, write_updates(tmp_path / "a.safetensors", updates))
    assert fused(generator, tmp_path / "out", lora) == 2
    assert words in capfd.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} <= {"a.safetensors", "part"}


# --- the start of a training ------------------------------------------------------------------------------------------


@pytest.fixture
def begun(folders, tmp_path):
    """Adapters that a training goes on from: the layers, rank and alpha of SMALL."""
    updates = random_updates(skeleton(folders["wan"]), ATTENTION, rank=4, alpha=8.0)
    return write_updates(tmp_path / "begun.safetensors", updates)


def started(kind, folders, begun, **options):
    lora = LoRA(**{**vars(SMALL), "start": str(begun), **options})
    return make(kind, folders["wan"], trained=False, lora=lora, optimizer=partial(torch.optim.SGD, lr=0.05))


def test_dpo_from_adapters_begins_at_ln_2_and_its_reference_is_the_start(folders, pairs, begun, tmp_path):
    module = started(FlowDPO, folders, begun)
    start = expected(folders["wan"], (begun, 1))
    equal(weights(module.policy), start)
    trained = [name for name, parameter in module.policy.named_parameters() if parameter.requires_grad]
    assert trained and all(".default." in name for name in trained)
    export, keep = (
        ExportGenerator(out=str(tmp_path / "export")),
        ModelCheckpoint(tmp_path, "end", every_n_train_steps=3),
    )
    steps = fit(module, data(pairs["wan"]), 3, [export, keep]).steps
    assert steps[0]["train/loss"] == LN2 and steps[0]["train/rewards/margins"] == 0.0
    assert steps[1]["train/rewards/margins"] != 0.0 and math.isfinite(steps[2]["train/loss"])
    moved = weights(module.policy)
    assert max(float((moved[name] - start[name]).abs().max()) for name in start) > 1e-5
    with module.as_reference() as net:
        equal(weights(net), start)
    equal(weights(module.policy), moved)  # what trains is active again
    plain = diffusers.WanPipeline.from_pretrained(folders["wan"], vae=None, text_encoder=None, tokenizer=None)
    plain.load_lora_weights(str(tmp_path / "export"))
    equal(weights(plain.transformer), moved)
    held = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    assert held.keys() == {f"generator.transformer.{name}" for name in trained}
    resumed = started(FlowDPO, folders, begun)
    fit(resumed, data(pairs["wan"]), 4, checkpoint=str(tmp_path / "end.ckpt"))
    with resumed.as_reference() as net:
        equal(weights(net), start)


@pytest.mark.parametrize("lora", [SMALL, None], ids=["adapters", "all weights"])
def test_a_checkpoint_is_not_continued_on_another_base(lora, folders, pairs, tmp_path):
    """The base of adapters, or the reference of a training of all weights, was replaced at the same path."""
    shutil.copytree(folders["wan"], tmp_path / "wan")
    keep = ModelCheckpoint(tmp_path, "end", every_n_train_steps=1)
    fit(make(FlowDPO, str(tmp_path / "wan"), False, lora=lora), data(pairs["wan"]), 1, [keep])
    path = str(tmp_path / "end.ckpt")
    fit(make(FlowDPO, str(tmp_path / "wan"), False, lora=lora), data(pairs["wan"]), 2, checkpoint=path)
    if lora:  # its digest is of bfloat16, so that a run may go on in that precision
        low = make(FlowDPO, str(tmp_path / "wan"), False, lora=lora, dtype="bfloat16")
        fit(low, data(pairs["wan"]), 2, checkpoint=path)
    file = next((tmp_path / "wan" / "transformer").glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("weight"))
    save_file({**tensors, name: tensors[name] * 1.5}, file, {"format": "pt"})
    with pytest.raises(VideoAlignError, match=r"was trained on another (transformer|reference) than"):
        fit(make(FlowDPO, str(tmp_path / "wan"), False, lora=lora), data(pairs["wan"]), 2, checkpoint=path)
    with pytest.warns(UserWarning, match=r"was trained on another (transformer|reference) than"):
        L.Trainer(**QUIET).validate(
            make(FlowDPO, str(tmp_path / "wan"), False, lora=lora), data(pairs["wan"], val=pairs["wan"]), path
        )
    held = torch.load(path, weights_only=True)
    del held["base"]  # of an earlier release
    torch.save(held, path)
    fit(make(FlowDPO, str(tmp_path / "wan"), False, lora=lora), data(pairs["wan"]), 2, checkpoint=path)


def test_a_bfloat16_generator_holds_both_copies_in_fp32(folders, pairs, begun):
    module = started(FlowDPO, folders, begun)
    low = make(FlowDPO, folders["wan"], False, lora=LoRA(**{**vars(SMALL), "start": str(begun)}), dtype="bfloat16")
    for name, parameter in low.policy.named_parameters():
        if ".lora_" in name:
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, module.policy.get_parameter(name)), name
    steps = fit(low, data(pairs["wan"]), 2).steps
    assert steps[0]["train/loss"] == LN2


def test_a_cache_of_reference_errors_knows_the_start(folders, pairs, begun, tmp_path):
    plain, one = make(FlowDPO, folders["wan"], False), started(FlowDPO, folders, begun)
    updates = random_updates(skeleton(folders["wan"]), ATTENTION, rank=4, alpha=8.0, seed=3)
    other = started(FlowDPO, folders, write_updates(tmp_path / "other.safetensors", updates))
    for module in (plain, one, other):
        fit(module, data(pairs["wan"]), 1)
    made = [module.reference_made()["transformer"] for module in (plain, one, other)]
    assert len(set(made)) == 3


STARTS = {
    "rank": ({"rank": 8}, r"lora.rank is 8, but lora.start \S+ has rank 4; set lora.rank: 4"),
    "alpha": ({"alpha": 16}, r"lora.alpha is 16, but lora.start \S+ has alpha 8; set lora.alpha: 8"),
    "fewer targets": (
        {"targets": ["to_q"]},
        r"select 4 layers, but .* on 16: it also has .*to_k.* and 9 more; set lora",
    ),
    "more targets": (
        {"targets": ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.2"]},
        r"on 16: it lacks 'blocks.0.ffn.net.2', 'blocks.1.ffn.net.2'; set lora.targets: \[attn1.to_k, attn1",
    ),
    "no file": ({"start": "none"}, "none: there is no such folder or file of adapters"),
}


@pytest.mark.parametrize("what", STARTS)
def test_a_start_that_the_settings_contradict_is_refused(what, folders, begun):
    options, words = STARTS[what]
    with pytest.raises(VideoAlignError, match=words):
        started(FlowSFT, folders, begun, **options)


def test_starts_of_another_expert_or_for_a_reward_are_refused(folders, begun, tmp_path):
    updates = random_updates(skeleton(folders["wan"]), ATTENTION, rank=4, alpha=8.0)
    with pytest.raises(VideoAlignError, match="has a single transformer"):
        started(FlowSFT, folders, write_updates(tmp_path / "a.safetensors", updates, "low"))
    with pytest.raises(VideoAlignError, match=r"lora\.start is for generators"):
        add_lora(torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)}), LoRA(start="x"), ["a"])


@pytest.mark.parametrize("expert", ["high", "low"])
def test_an_expert_is_exported_with_its_name_and_goes_on_from_its_own(expert, experts, tmp_path):
    updates = random_updates(skeleton(experts), ATTENTION, rank=4, alpha=8.0)
    mine = write_updates(tmp_path / "a.safetensors", updates, expert)
    options = {"lora": LoRA(**{**vars(SMALL), "start": str(mine)}), "expert": expert}
    module = make(FlowSFT, str(experts), **options)
    export = ExportGenerator(out=str(tmp_path / "export"))
    export._write(module, module.policy.state_dict(), tmp_path / "export")
    with safe_open(tmp_path / "export" / "pytorch_lora_weights.safetensors", "pt") as content:
        assert content.metadata()[EXPERT] == expert
    plain = diffusers.WanPipeline.from_pretrained(experts, vae=None, text_encoder=None, tokenizer=None)
    plain.load_lora_weights(str(tmp_path / "export"), load_into_transformer_2=expert == "low")
    equal(weights(plain.transformer_2 if expert == "low" else plain.transformer), weights(module.policy))
    with pytest.raises(VideoAlignError, match="was loaded with"):
        other = write_updates(tmp_path / "b.safetensors", updates, "high" if expert == "low" else "low")
        make(FlowSFT, str(experts), **{**options, "lora": LoRA(**{**vars(SMALL), "start": str(other)})})


# --- the command line -------------------------------------------------------------------------------------------------


def test_generate_with_several_adapters_gives_the_videos_of_the_fused_pipeline(folder, files, tmp_path):
    loras = [f"{files[0]},scale=0.5", str(files[1])]
    (tmp_path / "p.txt").write_text("a red circle\n")
    assert fused(folder, tmp_path / "fused", *loras) == 0
    given = {"prompts": tmp_path / "p.txt", "num_frames": 5, "height": 32, "width": 32, "fps": 8, "steps": 2}
    given |= {"device": "cpu", "seed": 3}
    words = [word for lora in loras for word in ("--lora", lora)]
    for name, generator, more in (("a", folder, words), ("b", tmp_path / "fused", []), ("c", folder, words[:2])):
        assert call("generate", *flags(generator=generator, out=tmp_path / name, **given), *more) == 0
    several, merged, single = (videos_of(tmp_path / name) for name in "abc")
    alike(several, merged)
    assert all(apart(video, single[key]) > 1 for key, video in several.items())
