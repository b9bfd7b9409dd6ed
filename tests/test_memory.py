"""How weights are held and computed: every option reaches its library, computes the same, or is refused."""

import contextlib
import functools
import importlib.util
import json
import re
from types import SimpleNamespace

import pytest
import torch
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from flow_kit import PROMPTS, SMALL, data, fit, make
from generator_kit import encode_config, samples_of
from helpers import FEW_TOKENS, call, randn
from test_experiments import configuration
from videoalign import VideoAlignError
from videoalign.alignment import EncodeLatents, FlowDPO, FlowSFT, Generate
from videoalign.alignment.text_first import embed_first
from videoalign.callbacks import ExportGenerator
from videoalign.datamodules.shards import ShardSet
from videoalign.miniature.networks.pipelines import make_generator
from videoalign.models.adapters import apply_loras
from videoalign.models.fingerprint import fingerprint
from videoalign.models.finite import is_finite, plain
from videoalign.models.generator_folder import load_generator
from videoalign.models.memory import Memory

needs_torchao = pytest.mark.skipif(not importlib.util.find_spec("torchao"), reason="torchao is not installed")


@pytest.fixture(autouse=True)
def no_backend_is_left():
    """diffusers makes the backend of one model the default of all others."""
    before = _AttentionBackendRegistry.get_active_backend()[0]
    yield
    _AttentionBackendRegistry.set_active_backend(before)


# --- YAML -----------------------------------------------------------------------------------------

OPTIONS = {
    "attention": "_native_cudnn",
    "compile": "true",
    "quantization": "nf4",
    "layerwise_casting": "float8_e4m3fn",
    "group_offload": "[vae]",
    "tiling": "true",
    "slicing": "true",
    "text_first": "true",
}


def test_every_option_is_known_here():
    assert OPTIONS.keys() == set(Memory.__dataclass_fields__)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("words", ["fit --model FlowDPO", "predict --model EncodeLatents"], ids=["train", "encode"])
def test_every_option_is_parsed(name, words, capsys):
    line = f"{words} --model.generator x --model.memory.{name} {OPTIONS[name]}"
    assert configuration(*line.split()) in (0, None)
    value = OPTIONS[name].strip("[]")
    assert re.search(rf"memory:(\n .*)*{name}:\s+(- )?{value}\n", capsys.readouterr().out)


# --- training -------------------------------------------------------------------------------------

HELD = {  # and how far the first loss may be from the one of weights as they are loaded
    "native": (Memory(attention="native"), 0.0),
    "math": (Memory(attention="_native_math"), 1e-5),
    "float8": (Memory(layerwise_casting="float8_e4m3fn"), 5e-3),
    "offloaded": (Memory(group_offload=("vae",), tiling=True, slicing=True), 0.0),
    "torchao_int8": (Memory(quantization="torchao_int8"), 5e-3),
    "torchao_float8": (Memory(quantization="torchao_float8"), 2e-2),
}


@pytest.fixture(scope="module")
def plain_step(folders, pairs):
    """Loss and gradients of a plain step of each family."""

    @functools.cache
    def of(family):
        watch = fit(make(FlowSFT, folders[family]), data(pairs[family]))
        return watch.steps[0]["train/loss"], watch.gradients

    return of


@pytest.mark.parametrize("name", [pytest.param(n, marks=needs_torchao) if "torchao" in n else n for n in HELD])
def test_a_step_is_that_of_weights_as_they_are_loaded(name, family, folders, pairs, plain_step):
    memory, tolerance = HELD[name]
    model = make(FlowSFT, folders[family], memory=memory, gradient_checkpointing=True)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    watch = fit(model, data(pairs[family]))
    loss, gradients = plain_step(family)
    assert watch.steps[0]["train/loss"] == pytest.approx(loss, rel=tolerance, abs=1e-7)
    assert watch.gradients.keys() == gradients.keys()
    difference = sum((g - gradients[n]).square().sum() for n, g in watch.gradients.items()).sqrt()
    size = sum(g.square().sum() for g in gradients.values()).sqrt()
    assert 0 <= difference / size <= 10 * tolerance + 1e-5
    if memory.group_offload:
        assert _is_group_offload_enabled(model.generator.vae) and "vae" not in model.generator._modules
        assert model.generator.vae.use_tiling and model.generator.vae.use_slicing


def test_compiled_blocks_are_the_same(folders, pairs, plain_step, monkeypatch):
    """Traced and split as always; no machine code is made of it, which would take minutes. Both keys mean the same."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    for options in ({"compile": True}, {"memory": Memory(compile=True)}):
        model = make(FlowSFT, folders["wan"], **options)
        assert all(block._compiled_call_impl for block in model.policy.blocks)
        assert fit(model, data(pairs["wan"])).steps[0]["train/loss"] == pytest.approx(plain_step("wan")[0], rel=1e-5)


@needs_torchao
@pytest.mark.parametrize("quantization", ["torchao_int8", "torchao_float8"])
def test_adapters_learn_on_a_quantised_base(quantization, folders, pairs, tmp_path):
    """The base stays as it is, no checkpoint holds it, and the adapters load into the generator as it is."""
    options = {"lora": SMALL, "memory": Memory(quantization=quantization), "dtype": "bfloat16"}
    model = make(FlowDPO, folders["wan"], trained=False, **options)
    base = {n: p for n, p in model.policy.named_parameters() if ".lora_" not in n}
    before = fingerprint(base)
    quantised = [n for n, p in base.items() if type(p.data) is not torch.Tensor]
    assert len(quantised) > 20 and not any(n.startswith("proj_out") for n in quantised)
    export = ExportGenerator(str(tmp_path / "export"))
    steps = fit(model, data(pairs["wan"]), steps=3, callbacks=[export]).steps
    assert steps[0]["train/rewards/margins"] == 0.0 and steps[2]["train/rewards/margins"] != 0.0
    assert fingerprint(base) == before != fingerprint(load_generator(folders["wan"]).transformer)
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    assert all(".lora_" in name for name in checkpoint["state_dict"])
    apply_loras(load_generator(folders["wan"]), str(tmp_path / "export"))
    sampled = Generate(
        folders["wan"], 5, 32, 32, lora=str(tmp_path / "export"), memory=Memory(quantization=quantization)
    )
    assert sampled.generator.transformer.peft_config.keys() == {"default"}


@needs_torchao
def test_quantised_weights_are_digested_and_checked_as_numbers_and_scales(folders):
    def load():
        return load_generator(folders["wan"], parts=("transformer",), memory=Memory(quantization="torchao_int8"))

    weight = load().transformer.blocks[0].attn1.to_q.weight
    assert {part.dtype for part in plain(weight)} == {torch.int8, torch.float32}
    assert fingerprint(load().transformer) == fingerprint(load().transformer)
    assert is_finite(weight)
    next(part for part in plain(weight) if part.dtype == torch.float32)[0] = torch.nan
    assert not is_finite(weight)


def test_bitsandbytes_weights_are_digested_with_their_scales():
    from bitsandbytes.nn import Params4bit

    def quantised(scale):
        return Params4bit(scale * randn(64, 64), requires_grad=False, quant_type="nf4").to("cpu")

    one, other = ({"w": quantised(scale)} for scale in (1.0, 2.0))
    assert torch.equal(one["w"].data, other["w"].data)  # the same numbers of 4 bits
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) == fingerprint({"w": quantised(1.0)})
    assert is_finite(one["w"])


# --- encoding and sampling ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Generators whose autoencoders work in tiles of 32 pixels."""
    root = tmp_path_factory.mktemp("large")
    for family in ("wan", "ltx"):
        make_generator(root / family, family, hidden=48, heads=4, max_tokens=FEW_TOKENS)
    return root


def cut_into(vae, size):
    """Let an autoencoder work in tiles of so many pixels, which overlap by half."""
    for name in ("height", "width"):
        setattr(vae, f"tile_sample_min_{name}", size)
        setattr(vae, f"tile_sample_stride_{name}", size // 2)


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]


@pytest.mark.parametrize("of", ["wan", "ltx"])
def test_tiles_are_videos_of_their_own_that_are_blended(of, large):
    """The corner that no other tile reaches is that of the first tile alone; all is like the whole.

    Not close to it: every pixel of these small autoencoders sees the whole frame, and their weights are random.
    """
    whole, tiled = (load_generator(large / of, parts=("vae",), memory=Memory(tiling=t)) for t in (False, True))
    patch = tiled.vae.config.patch_size if of == "wan" else 1  # Wan's autoencoder encodes tiles of patches
    cut_into(tiled.vae, 32 // (patch or 1))
    video = (127 + 60 * randn(1, 3, 3, 5, 5)).clamp(0, 255).repeat_interleave(13, 3).repeat_interleave(13, 4)
    video = video[:, :, :, :64, :64].transpose(1, 2).repeat_interleave(3, 1).to(torch.uint8)  # (1, 9, 3, 64, 64)
    latents, want = tiled.encode_video(video), whole.encode_video(video)
    corner = whole.encode_video(video[..., :32, :32])
    free = latents.shape[-1] // 4  # of the first tile, the half that is not blended
    torch.testing.assert_close(latents[..., :free, :free], corner[..., :free, :free], rtol=1e-4, atol=1e-4)
    assert 0.6 < correlation(latents, want) < 1
    cut_into(tiled.vae, 32)
    frames, same = (g.decode(want).float() for g in (tiled, whole))
    assert frames.shape == same.shape == video.shape
    assert 0.6 < correlation(frames, same) < 1


def test_slices_are_the_whole_batch(wan, folders):
    sliced = load_generator(folders["wan"], parts=("vae",), memory=Memory(slicing=True))
    video = (127 + 60 * randn(3, 5, 3, 32, 32)).clamp(0, 255).to(torch.uint8)
    torch.testing.assert_close(sliced.encode_video(video), wan.encode_video(video), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "memory",
    [
        {"text_first": True},
        {"group_offload": ["text_encoder", "vae"], "slicing": True},
    ],
    ids=["first", "offloaded"],
)
def test_encoding_in_other_ways_gives_the_same_latents(memory, latents, generators, clips, tmp_path, capsys):
    config = encode_config(
        tmp_path / "e.yaml", generators / "wan", clips / "pairs", tmp_path / "out", model={"memory": memory}
    )
    assert call("predict", "--config", config) == 0, capsys.readouterr().err
    found, want = samples_of(tmp_path / "out"), samples_of(latents / "wan")
    assert found.keys() == want.keys()
    for key, (record, tensors) in found.items():
        assert record == want[key][0]
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, want[key][1][name], rtol=0, atol=1e-4)
    assert ShardSet(tmp_path / "out", "latents").index.latents == ShardSet(latents / "wan", "latents").index.latents


def test_the_text_encoder_is_gone_when_sampling_begins(generators, tmp_path, monkeypatch):
    sampled, predict = {}, Generate.predict_step

    def watched(self, *batch):
        assert (self.generator.text_encoder is None) == self.memory.text_first
        assert (self.generator.pipeline.text_encoder is None) == self.memory.text_first
        return predict(self, *batch)

    from videoalign.commands.generating import generate

    monkeypatch.setattr(Generate, "predict_step", watched)
    (tmp_path / "p.txt").write_text("a red circle\na blue square\n")
    model = {"generator": str(generators / "wan"), "num_frames": 5, "height": 32, "width": 32, "steps": 2}
    model |= {"cfg_scale": 3.0}
    ways = {
        "plain": Memory(),
        "first": Memory(text_first=True),
        "offloaded": Memory(group_offload=("text_encoder", "vae", "transformer")),
    }
    for name, memory in ways.items():
        out = tmp_path / name
        generate({**model, "memory": memory}, {"prompts": str(tmp_path / "p.txt"), "out": str(out)}, "cpu", 1)
        sampled[name] = {c.key: c.read("mp4") for c in ShardSet(out).contents()}
    assert sampled["first"] == sampled["plain"] == sampled["offloaded"] and len(sampled["plain"]) == 2


@pytest.mark.parametrize("name", ["ltx2", "hunyuan15-i2v"])
def test_every_encoder_of_prompts_is_gone_and_that_of_images_stays(name, miniatures):
    generator = load_generator(miniatures[name], parts=("text_encoder",))
    want = generator.encode_prompts(PROMPTS)
    strategy, context = SimpleNamespace(root_device=torch.device("cpu")), contextlib.nullcontext
    trainer = SimpleNamespace(
        datamodule=SimpleNamespace(all_prompts=lambda: PROMPTS),
        strategy=strategy,
        is_global_zero=True,
        precision_plugin=SimpleNamespace(forward_context=context),
    )
    found = embed_first(SimpleNamespace(trainer=trainer, generator=generator), ["a third"])
    assert list(found) == [*dict.fromkeys(PROMPTS), "a third"]
    for prompt, parts in zip(PROMPTS, want):
        assert found[prompt].keys() == parts.keys()
        for part, tensor in parts.items():
            torch.testing.assert_close(found[prompt][part], tensor, rtol=1e-4, atol=1e-4)
    left = {part for part, module in generator.named_children() if module is not None}
    assert left == ({"image_encoder"} if name == "hunyuan15-i2v" else set())


def test_samples_of_other_weights_are_not_gone_on_with(folders):
    def made(**options):
        return Generate(folders["wan"], 5, 32, 32, memory=Memory(**options)).making()

    assert "memory" not in made()
    assert json.loads(json.dumps(made(layerwise_casting="float8_e5m2")))["memory"]["layerwise_casting"] == "float8_e5m2"


def test_generate_reads_options_as_yaml(generators, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a red circle\n")
    words = ["--num-frames=5", "--height=32", "--width=32", "--steps=1", "--out", tmp_path / "out", "--device=cpu"]
    words = ["generate", "--generator", generators / "wan", "--prompts", tmp_path / "p.txt", *words]
    for text, said in (
        ("{tilling: true}", "tilling"),
        ("{quantization: int3}", "nf4"),
        ("[1", "--memory"),
        ("{attention: flesh}", "memory.attention 'flesh' is no attention backend"),
    ):
        assert call(*words, "--memory", text) == 2
        assert said in capsys.readouterr().err
    assert call(*words, "--memory", "{text_first: true, slicing: true}") == 0
    assert len(ShardSet(tmp_path / "out").contents()) == 1


# --- refusals -------------------------------------------------------------------------------------

FULL = {"lora": None}


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        ({"attention": "flesh"}, "memory.attention 'flesh' is no attention backend"),
        ({"group_offload": ("vae", "head")}, r"memory.group_offload \['head'\] are no parts"),
        ({"quantization": "nf4", "layerwise_casting": "float8_e5m2"}, "both say how the same weights are stored"),
        ({"compile": True, "layerwise_casting": "float8_e5m2"}, "do not go together"),
        ({"quantization": "nf4", "group_offload": ("transformer",)}, "use memory.layerwise_casting instead"),
        ({"text_first": True, "group_offload": ("text_encoder",)}, "leave one of them out"),
    ],
)
def test_options_that_do_not_go_together_are_refused(memory, said):
    with pytest.raises(VideoAlignError, match=said):
        Memory(**memory)


@pytest.mark.parametrize(
    ("memory", "options", "said"),
    [
        ({"attention": "sage"}, {}, "memory.attention sage has no backward pass"),
        ({"attention": "flash"}, {}, "memory.attention flash: .*install"),
        ({"quantization": "torchao_int8"}, FULL, "memory.quantization torchao_int8 .* model.lora: null trains them"),
        ({"layerwise_casting": "float8_e5m2"}, {}, "saves nothing here: .* set model.gradient_checkpointing: true"),
        ({"layerwise_casting": "float8_e5m2"}, FULL, "memory.layerwise_casting float8_e5m2 .* train LoRA adapters"),
        ({"group_offload": ("transformer",)}, {}, "group_offload of the transformer is for sampling"),
        ({"group_offload": ("text_encoder",)}, {}, "text_encoder, which this training does not load"),
        ({"text_first": True}, {}, "memory.text_first is for encoding and sampling"),
        ({"quantization": "nf4"}, {}, "memory.quantization nf4 needs a GPU"),
        ({"quantization": "bnb_int8"}, {}, "memory.quantization bnb_int8 needs a GPU"),
    ],
)
def test_what_training_cannot_take_is_refused(memory, options, said, folders):
    if torch.cuda.is_available() and "GPU" in said:
        pytest.skip("there is a GPU")
    with pytest.raises(VideoAlignError, match=said):
        make(FlowSFT, folders["wan"], memory=Memory(**memory), **options)


def test_a_missing_torchao_is_named(folders, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    with pytest.raises(VideoAlignError, match=r"memory\.quantization torchao_int8 needs torchao: pip install torchao"):
        make(FlowSFT, folders["wan"], memory=Memory(quantization="torchao_int8"))


@pytest.mark.parametrize("memory", [{"compile": True}, {"quantization": "nf4"}, {"group_offload": ("transformer",)}])
def test_what_encoding_never_calls_is_refused(memory, folders):
    with pytest.raises(VideoAlignError, match="encoding never calls"):
        EncodeLatents(folders["wan"], memory=Memory(**memory))


@pytest.mark.parametrize(
    "memory", [{"group_offload": ("vae",)}, {"quantization": "nf4"}, {"layerwise_casting": "float8_e5m2"}]
)
def test_what_fsdp_cannot_take_is_refused(memory, wan):
    (name,) = memory
    with pytest.raises(VideoAlignError, match=rf"memory\.{name} .* does not go together with ModelParallelStrategy"):
        Memory(**memory).place(wan, torch.device("cpu"), mesh=object())


def test_offloading_beside_fsdp_ends_with_a_message(folders, pairs, tmp_path, capsys):
    """From YAML, before the first step."""
    strategy = "lightning.pytorch.strategies.ModelParallelStrategy"
    done = call(
        "fit", "--model", "FlowSFT", "--data", "LatentPairs", "--trainer.strategy", strategy,
        "--trainer.strategy.data_parallel_size=1", "--trainer.strategy.tensor_parallel_size=1",
        "--trainer.accelerator=cpu", "--trainer.devices=1", f"--trainer.default_root_dir={tmp_path}",
        "--model.generator", folders["wan"], "--model.memory.group_offload", "[vae]",
        "--data.train", pairs["wan"], "--data.val", pairs["wan"],
    )  # fmt: skip
    assert done == 2
    assert "memory.group_offload moves weights between devices that FSDP" in capsys.readouterr().err


def test_names_are_those_of_diffusers():
    assert {"native", "flash", "_native_cudnn", "sage", "flash_hub"} <= {b.value for b in AttentionBackendName}
