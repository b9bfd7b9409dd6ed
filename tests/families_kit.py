"""What the tests of all generator families share: a miniature of each, a batch's conditions, and plain diffusers."""

import contextlib
import importlib

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from helpers import randn
from videoalign.miniature.networks.pipelines import BUILDERS, make_generator
from videoalign.models.generator_folder import load_generator

FAMILIES = tuple(BUILDERS)
WITH_IMAGE = tuple(name for name in FAMILIES if name.endswith("-i2v"))
BEGINNING = ("wan22-5b-i2v", "ltx-i2v", "ltx2-i2v")
"""Families whose first latent frame is the image itself."""
EXPERTS = ("wan22-a14b", "wan22-a14b-i2v")
OFFICIAL = {"wan22-5b": 5.0, "wan22-5b-i2v": 5.0, "wan22-a14b": 12.0, "wan22-a14b-i2v": 5.0}
"""Shifts of the authors, where the folders have others."""
SHAPES = dict.fromkeys(FAMILIES, (16, 2, 4, 4))
SHAPES |= dict.fromkeys(("wan22-5b", "wan22-5b-i2v"), (24, 2, 2, 2))
SHAPES |= dict.fromkeys(("hunyuan15", "hunyuan15-i2v"), (8, 2, 2, 2))
"""Shapes of the latents of 5 frames of 32 x 32 pixels."""
TOKENS = 16
PROMPTS = ["a  red circle ", 'a blue square says "go"']
FRAMES, SIDE = 5, 32


@pytest.fixture(scope="session")
def miniatures(tmp_path_factory):
    """A folder of each family."""
    root = tmp_path_factory.mktemp("miniatures")
    for name in FAMILIES:
        make_generator(root / name, name, hidden=48, layers=2, max_tokens=TOKENS)
    return {name: str(root / name) for name in FAMILIES}


@pytest.fixture(scope="session")
def of_family(miniatures):
    """A function that gives the generator of a family, loaded once. Read only."""
    loaded = {}

    def find(name):
        if name not in loaded:
            loaded[name] = load_generator(miniatures[name])
            shorten(loaded[name].pipeline)
        return loaded[name]

    return find


def shorten(pipeline):
    """Fewer tokens of quoted words, and of a missing image, than HunyuanVideo's 256 and 729, which take long."""
    if hasattr(pipeline, "vision_num_semantic_tokens"):
        pipeline.tokenizer_max_length = pipeline.tokenizer_2_max_length = TOKENS
        pipeline.vision_num_semantic_tokens = 4


def picture(seed=0):
    """An image (1, 3, H, W), uint8."""
    shape, random = (1, 3, SIDE, SIDE), torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)


def encoded(generator, prompts=PROMPTS, seed=0):
    """What samples of some prompts are conditioned on, all with the same image where the family takes one."""
    image = generator.encode_images(picture(seed), FRAMES)[0] if generator.image == "required" else {}
    return [one | image for one in generator.encode_prompts(prompts)]


def nothing(generator):
    """Condition of a negative prompt, with a batch size of 1; encoded beside another, as pipelines do it."""
    return generator.null_condition(generator.encode_prompts(["a blue"] * len(PROMPTS))[0])


def forward_of_truth(truth, seen):
    """A transformer's forward that knows the data: (x_t - data) / t, which on the path is noise - data.

    Args:
        truth: The data (B, C, F, H, W).
        seen: Times in each call are added to this list.
    """

    def forward(hidden_states, *args, timestep=None, **kwargs):
        timestep = next(a for a in args if a.is_floating_point() and a.ndim < 3) if timestep is None else timestep
        seen.append(timestep)
        t = timestep if timestep.ndim == 1 else timestep.amax(1)  # of the tokens that are noised
        data = truth
        if hidden_states.ndim == 3:
            data = truth.flatten(2).transpose(1, 2)
        x = hidden_states[:, : truth.shape[1]] if hidden_states.ndim == 5 else hidden_states
        return ((x - data) / (t / 1000).view(-1, *[1] * (x.ndim - 1)),)

    return forward


@contextlib.contextmanager
def drawing(pipeline, noise):
    """Let a pipeline of diffusers begin with a given noise during a block."""
    module, drawn = importlib.import_module(type(pipeline).__module__), None

    def randn_tensor(shape, **kwargs):
        return noise.clone() if tuple(shape) == tuple(noise.shape) else randn(*shape)

    drawn, module.randn_tensor = module.randn_tensor, randn_tensor
    try:
        yield
    finally:
        module.randn_tensor = drawn


def plain(folder, name, **parts):
    """The pipeline as diffusers loads it, with the authors' shift, and of LTX-2 without reading between its streams.

    Args:
        folder: Folder of the pipeline.
        name: Name of its family.
        parts: Parts in the place of its own.
    """
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.register_modules(**parts)
    pipeline.set_progress_bar_config(disable=True)
    shorten(pipeline)
    if name in OFFICIAL:
        kind, config = type(pipeline.scheduler), pipeline.scheduler.config
        pipeline.scheduler = kind.from_config(config, flow_shift=OFFICIAL[name])
    if name.startswith("ltx2"):
        forward = pipeline.transformer.forward
        pipeline.transformer.forward = lambda *args, **kwargs: forward(*args, **{**kwargs, "isolate_modalities": True})
    return pipeline


def plainly(pipeline, name, noise, start, prompts=PROMPTS, guidance=1.0, steps=3, output="latent", seed=0):
    """What plain diffusers samples from a noise: latents (B, C, F, H, W), or frames.

    Args:
        pipeline: Pipeline of :func:`plain`.
        name: Name of the family.
        noise: Noise (B, C, F, H, W).
        start: The same, with the image as first frame where the family begins with it.
        prompts: Prompts of the batch.
        guidance: Scale of classifier-free guidance; of a low expert it is smaller by 1.
        steps: Number of steps.
        output: Type of the output.
        seed: Seed of the image.
    """
    options = {"num_frames": FRAMES, "height": SIDE, "width": SIDE, "num_inference_steps": steps}
    options |= {"prompt": prompts, "negative_prompt": ["a blue"] * len(prompts), "output_type": output}
    if name in WITH_IMAGE:
        options["image"] = Image.fromarray(picture(seed)[0].permute(1, 2, 0).numpy())
    if name.startswith("hunyuan15"):
        pipeline.guider = pipeline.guider.new(guidance_scale=guidance)
    else:
        options |= {"guidance_scale": guidance, "max_sequence_length": TOKENS}
    if name == "hunyuan15-i2v":  # its size is the image's
        del options["height"], options["width"]
    if name in EXPERTS and guidance > 1:
        options["guidance_scale_2"] = guidance - 1
    if name.startswith("ltx"):
        options["frame_rate"] = 25
    if name.startswith("ltx2"):  # of its several kinds of guidance the classifier-free one alone
        options |= {"stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0, "audio_stg_scale": 0.0}
        options |= {"audio_modality_scale": 1.0, "audio_guidance_scale": guidance}
    if name == "ltx2-i2v":  # nor is the image compressed first, as a frame of a video would be
        options["image_crf"] = 0
    if name == "ltx-i2v":  # which draws from the autoencoder's posterior of the image, and does not take its mode
        options["latents"] = start.flatten(2).transpose(1, 2)
    with drawing(pipeline, noise):
        found = pipeline(**options).frames
    found = torch.as_tensor(np.asarray(found) if output != "latent" else found)
    return found.transpose(1, 2).unflatten(2, noise.shape[2:]) if found.ndim == 3 else found


def without_ftfy(monkeypatch):
    """Make up for a library that WanImageToVideoPipeline alone needs: it mends broken Unicode; we have none."""
    module = diffusers.pipelines.wan.pipeline_wan_i2v
    monkeypatch.setattr(module, "ftfy", type("ftfy", (), {"fix_text": staticmethod(str)}), raising=False)
