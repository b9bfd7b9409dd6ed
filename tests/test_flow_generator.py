"""What single families of generators do in their own way, errors, and pipelines that cannot be loaded."""

import json

import pytest
import torch
from diffusers import (
    AutoencoderKLLTXVideo,
)

from flow_kit import SHAPE
from helpers import randn
from videoalign import VideoAlignError
from videoalign.models.flow import squared_error
from videoalign.models.generator_folder import load_generator

# --- families of their own ------------------------------------------------------------------------


def test_squared_error_is_a_mean_in_fp32():
    v, x0, x1 = (randn(2, *SHAPE, seed=s).bfloat16() for s in range(3))
    want = (v.double() - (x1.double() - x0.double())).pow(2).reshape(2, -1).mean(1)
    found = squared_error(v, x0, x1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), want, rtol=1e-6, atol=0)


def test_mask_hides_what_stands_behind_a_prompt_of_ltx(folders):
    ltx = load_generator(folders["ltx"])
    condition = ltx.condition([{"prompt": randn(3, 32)}])
    x, t = randn(1, *SHAPE), torch.tensor([0.4])
    want = ltx.velocity(x, t, condition)
    garbage = condition["prompt"].clone()
    garbage[:, 3:] = 50.0
    torch.testing.assert_close(ltx.velocity(x, t, {**condition, "prompt": garbage}), want, rtol=0, atol=0)
    garbage[:, 2] = 50.0
    assert not torch.equal(ltx.velocity(x, t, {**condition, "prompt": garbage}), want)


def test_frame_rate_reaches_the_positions_of_ltx(folders):
    x, t = randn(1, *SHAPE), torch.tensor([0.4])
    slow, fast = (load_generator(folders["ltx"], fps=fps) for fps in (8.0, 25.0))
    condition = slow.condition([{"prompt": randn(3, 32)}])
    assert not torch.equal(slow.velocity(x, t, condition), fast.velocity(x, t, condition))


def test_decoder_of_ltx_that_takes_a_time_is_told_a_clean_one(folders):
    ltx = load_generator(folders["ltx"])
    torch.manual_seed(0)
    # one width throughout: diffusers' own blocks that change it take no time
    options = {"timestep_conditioning": True, "decoder_block_out_channels": (16, 16, 16)}
    vae = AutoencoderKLLTXVideo.from_config({**ltx.vae.config, **options}).eval()
    ltx.vae = ltx.pipeline.vae = vae
    latents = randn(1, *SHAPE)
    with torch.no_grad():
        want = vae.decode(latents, torch.zeros(1), return_dict=False)[0]
    want = ((want / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).transpose(1, 2)
    assert torch.equal(ltx.decode(latents), want)


# --- what a generator cannot take -----------------------------------------------------------------


def test_whitespace_that_wan_removes_does_not_make_a_prompt_too_long(wan):
    (found,) = wan.encode_prompts(["a red" + "\n \t" * 600 + " circle"], truncate=False)
    (want,) = wan.encode_prompts(["a red circle"])
    torch.testing.assert_close(found["prompt"], want["prompt"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "states no boundary_ratio"),
        ({"boundary_ratio": 0.9}, "states no transformer_2"),
        ({"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 9}, "boundary_ratio is 9, not a"),
        ({"_class_name": "CogVideoXPipeline"}, "CogVideoXPipeline.*WanPipeline, WanImageToVideoPipeline, LTXPipeline"),
    ],
)
def test_foreign_pipelines_are_refused(change, words, folders, tmp_path):
    index = json.loads(open(f"{folders['wan']}/model_index.json").read())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, **change}))
    with pytest.raises(VideoAlignError, match=words):
        load_generator(tmp_path)


def test_a_missing_pipeline_part_or_folder_is_named(folders, tmp_path):
    with pytest.raises(VideoAlignError, match="none: there is no such folder of a generator"):
        load_generator(tmp_path / "none")
    with pytest.raises(VideoAlignError, match=r"'unet'.*transformer, vae"):
        load_generator(folders["wan"], parts=["unet"])
    part = load_generator(folders["wan"], parts=["transformer"])
    with pytest.raises(VideoAlignError, match="without its vae"):
        part.identity()
    with pytest.raises(VideoAlignError, match="without its text_encoder"):
        part.encode_prompts(["a"])
