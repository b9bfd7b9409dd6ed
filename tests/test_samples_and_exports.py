"""What a training of a generator leaves: samples beside those of the reference, and exports."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, LTXPipeline, WanPipeline, WanTransformer3DModel

from generator_kit import (
    CALLBACKS,
    FAMILIES,
    PROMPTS,
    SIZE,
    apart,
    counting,
    events,
    flow_config,
    generate,
    in_the_way,
    logger,
    node,
)
from helpers import call
from videoalign import VideoAlignError
from videoalign.alignment import FlowDPO
from videoalign.callbacks import SideBySide
from videoalign.callbacks.prompt_sampler import Sampling
from videoalign.commands.lightning_cli import run as experiment
from videoalign.datamodules.encode_list import ClipSize
from videoalign.datamodules.shards import ShardSet
from videoalign.datamodules.video import decode, encode
from videoalign.models.generator_folder import load_generator

# --- training: averages, samples, export ----------------------------------------------------------


def plain(folder: Path, **parts) -> DiffusionPipeline:
    kind = {"wan": WanPipeline, "ltx": LTXPipeline}[folder.name]  # DiffusionPipeline's own ignores transformer=
    pipe = kind.from_pretrained(folder, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plain_sample(pipe, family: str, prompt: str, noise: torch.Tensor) -> torch.Tensor:
    """Latents that plain diffusers samples for a prompt."""
    more = {"frame_rate": 25.0} if family == "ltx" else {}
    latents = noise.flatten(2).transpose(1, 2) if family == "ltx" else noise
    size = {"num_frames": 5, "height": 32, "width": 32}
    steps = {"num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "latent"}
    tokens = 128 if family == "ltx" else 512
    found = pipe(prompt, latents=latents, max_sequence_length=tokens, **size, **steps, **more).frames
    return found.transpose(1, 2).unflatten(2, noise.shape[2:]) if family == "ltx" else found


def our_sample(module, folder: Path, prompt: str, noise: torch.Tensor, net=None) -> torch.Tensor:
    encoder = load_generator(folder, parts=("text_encoder",))
    module.eval()
    return module.generator.sample(
        module.generator.condition(encoder.encode_prompts([prompt])), noise, 3, transformer=net
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_exported_adapters_give_the_policy_in_plain_diffusers(family, trained, generators):
    """They agree bit for bit; at rank 4 and alpha 16 a scale of 1 would be wrong."""
    module, folder = trained[family].module, generators / family
    noise = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    policy = our_sample(module, folder, PROMPTS[0], noise)
    pipe = plain(folder)
    before = plain_sample(pipe, family, PROMPTS[0], noise)
    pipe.load_lora_weights(trained[family].out)
    assert torch.equal(plain_sample(pipe, family, PROMPTS[0], noise), policy)
    with module.as_reference():
        assert torch.equal(before, our_sample(module, folder, PROMPTS[0], noise))
    assert (before - policy).abs().max() > 1e-3  # there is something to export
    assert [p.name for p in trained[family].out.iterdir()] == ["pytorch_lora_weights.safetensors"]


def test_exported_adapters_are_loaded_by_generate(trained, generators, prompts, tmp_path):
    assert generate(generators, tmp_path / "out", prompts, "--lora", trained["wan"].out, "--seed", 7) == 0
    module = trained["wan"].module.eval()
    raw = next(iter(ShardSet(tmp_path / "out")))
    source = torch.Generator().manual_seed(raw.record()["seed"])
    torch.rand((), generator=source)
    noise = torch.randn(1, 16, 2, 4, 4, generator=source)
    encoder = load_generator(generators / "wan", parts=("text_encoder",))
    condition = module.generator.condition(encoder.encode_prompts([raw.record()["prompt"]]))
    whole = ClipSize(num_frames=5, height=32, width=32)

    def through_codec(latents):
        return decode(encode(module.generator.decode(latents)[0].permute(0, 2, 3, 1).numpy(), 8, 10), whole, 1)

    have = decode(raw.members["mp4"], whole, 1)
    assert apart(have, through_codec(module.generator.sample(condition, noise, 2))) < 0.2
    with module.as_reference():
        assert apart(have, through_codec(module.generator.sample(condition, noise, 2))) > 1


def test_a_fully_trained_transformer_is_exported_whole(generators, latents, tmp_path):
    export = node(f"{CALLBACKS}.ExportGenerator", out=tmp_path / "export")
    config = flow_config(
        tmp_path / "f.yaml", generators / "wan", latents / "wan", [export], lora=False, trainer={"limit_val_batches": 0}
    )
    cli = experiment(["fit", "--config", str(config)])
    noise = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    transformer = WanTransformer3DModel.from_pretrained(tmp_path / "export")
    found = plain_sample(plain(generators / "wan", transformer=transformer), "wan", PROMPTS[0], noise)
    ours = our_sample(cli.model, generators / "wan", PROMPTS[0], noise)
    weights = dict(cli.model.policy.named_parameters())
    assert all(torch.equal(weights[name], p) for name, p in transformer.named_parameters())
    torch.testing.assert_close(found, ours, rtol=0, atol=1e-5)  # where weights lie in memory changes the last bit
    assert not torch.equal(found, our_sample(cli.model, generators / "wan", PROMPTS[0], noise, cli.model.reference))
    # an earlier export is replaced, by one of the same kind only
    assert call("fit", "--config", config) == 0


@pytest.mark.parametrize("lora", [True, False])
def test_an_export_in_the_way_is_refused_before_training(lora, generators, latents, tmp_path, capfd, monkeypatch):
    export = node(f"{CALLBACKS}.ExportGenerator", out=in_the_way(tmp_path))
    config = flow_config(tmp_path / "f.yaml", generators / "ltx", latents / "ltx", [export], lora=lora)
    calls = counting(monkeypatch, FlowDPO, "training_step")
    assert call("fit", "--config", config) == 2
    assert "exists already" in capfd.readouterr().err
    assert not calls
    assert (tmp_path / "out" / "notes.txt").read_text() == "precious"


def filmed(run: Path, step: int) -> list[dict[str, np.ndarray]]:
    """Frames of every clip that a run's page has of a step, by label."""
    folder = run / "samples" / f"{step:06d}"
    assert str(folder.relative_to(run)) in (run / "samples.html").read_text()
    return [
        {side["label"]: frames_in(run / side["file"]) for side in clip["sides"]}
        for clip in json.loads((folder / "clips.json").read_text())
    ]


def frames_in(path: Path) -> np.ndarray:
    with av.open(path) as film:
        assert film.streams.video[0].codec.name == "h264"
        return np.stack([frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]).astype(int)


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_stand_beside_the_reference_with_the_same_noise(family, trained):
    """Between the validations after steps 2 and 4 the reference's video stays and the policy's moves."""
    run = trained[family].run
    assert [p.name for p in sorted((run / "samples").iterdir())] == ["000002", "000004"]
    first, second = ({side: v.astype(int) for side, v in shown.items()} for shown in trained[family].shown)
    assert np.array_equal(first["reference"], second["reference"])
    assert np.abs(second["policy"] - first["policy"]).mean() > 1 < np.abs(first["policy"] - first["reference"]).mean()
    for step, shown in ((2, first), (4, second)):
        (clip,) = filmed(run, step)
        for side, frames in shown.items():
            assert frames.shape == (5, 32, 32, 3) and clip[side].shape == (5, 128, 128, 3)  # 32 pixels, four times
            assert np.abs(clip[side][:, 2::4, 2::4] - frames).mean() < 6
    (tag,) = events(run).Tags()["images"]
    assert tag.startswith("val/samples/0 a red circle")


def test_before_training_both_videos_are_equal(generators, latents, tmp_path):
    show = node(f"{CALLBACKS}.SideBySide", prompts=PROMPTS[:2], sampling={**SIZE, "cfg_scale": 2.0})
    config = flow_config(
        tmp_path / "f.yaml", generators / "ltx", latents / "ltx", [show], trainer={"logger": logger(tmp_path)}, fps=8.0
    )
    assert call("validate", "--config", config) == 0
    clips = filmed(tmp_path / "run" / "version_0", 0)
    assert len(clips) == 2
    for clip in clips:
        assert np.array_equal(clip["policy"], clip["reference"])
        assert clip["policy"].std() > 0


def test_samples_are_shown_at_every_nth_validation():
    show, seen = SideBySide(["a"], Sampling(num_frames=5, height=32, width=32), every=3), []
    show.sampler = SimpleNamespace(
        sampling_of=lambda *_: nullcontext(), both=lambda items: seen.append(show.count) or (None, None)
    )
    trainer = SimpleNamespace(sanity_checking=False, is_global_zero=False, log_dir=None, loggers=[])
    for _ in range(7):
        show.on_validation_epoch_end(trainer, None)
    trainer.sanity_checking = True
    show.on_validation_epoch_end(trainer, None)
    assert seen == [1, 4, 7]


def test_samples_at_every_validation_but_none_are_refused():
    with pytest.raises(VideoAlignError, match="every"):
        SideBySide(["a"], Sampling(num_frames=5, height=32, width=32), every=0)
