"""What a family of one's own forgets or names wrongly is told when it is first used."""

import pytest
import torch

from videoalign import VideoAlignError
from videoalign.models.generator import Generator
from videoalign.models.generator_folder import load_generator
from videoalign.models.wan import Wan


class Bare(Generator):
    """A family that defines nothing but its pipeline."""

    class_name = "WanPipeline"


class Nameless(Generator):
    """A family that forgets even that."""

    blocks = "blocks"


class Other(Wan):
    """A family whose transformer has other blocks than it says."""

    blocks = "layers"


class Further(Wan):
    """A family that asks for a part that its pipeline does not have."""

    further_parts = {"text_encoder": ("text_encoder_3",)}


class Misplaced(Wan):
    """A family whose further parts come with something that is no part."""

    further_parts = {"text_encoders": ("text_encoder",)}


@pytest.mark.parametrize(
    ("family", "words"),
    [
        (Bare, "Bare does not define blocks, max_tokens, side, ratios, moments, velocity, text_width"),
        (Nameless, "Nameless does not define class_name, max_tokens"),
        (Other, r"has no blocks 'layers'; its lists are \['blocks'\]"),
        (Further, "name text_encoder_3, but a WanPipeline has tokenizer, text_encoder, vae"),
        (Misplaced, "name text_encoders, .*parts come with transformer, vae, text_encoder"),
    ],
)
def test_a_class_that_is_not_whole_is_refused(family, words, folders):
    with pytest.raises(VideoAlignError, match=words):
        load_generator(folders["wan"], family=family)


def test_an_encoder_that_takes_other_arguments_is_named(folders, monkeypatch):
    generator = load_generator(folders["ltx"])
    monkeypatch.setattr(generator.pipeline, "encode_prompt", lambda prompts, device: torch.zeros(1, 4, 32))
    with pytest.raises(VideoAlignError, match=r"family LTX must override _embed\(\).*unexpected keyword"):
        generator.encode_prompts(["a red circle"])
