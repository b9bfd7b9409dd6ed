"""What a reward server and its clients send each other: samples as safetensors, rewards as JSON, nothing pickled.

A request's body is one safetensors file with the single tensor ``videos`` (B, T, 3, H, W), uint8, or ``latents`` (B,
C, F, H, W), of a floating dtype. Its metadata holds ``prompts``, a JSON list of B texts. An answer is a JSON object:
rewards by name, each a list of B finite numbers, under ``rewards``; or a sentence under ``error``.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from .. import VideoAlignError

SCORE, CHECK, INFO = "/score", "/check", "/info"
"""Paths that rate samples, look at prompts, and describe the server."""
MEDIA = "application/vnd.safetensors"
"""Content type of samples. A page of another site cannot send it without asking first."""
HEADER = 8
"""Number of bytes of a safetensors file that state its header's length."""


@dataclass(frozen=True)
class Samples:
    """Samples to rate.

    Attributes:
        kind: What they are: ``videos`` or ``latents``.
        values: Videos (B, T, 3, H, W), uint8, or latents (B, C, F, H, W).
        prompts: Prompt of each sample.
    """

    kind: str
    values: Tensor
    prompts: list[str]

    def dump(self) -> bytes:
        """The body of a request."""
        metadata = {"prompts": json.dumps(self.prompts)}
        return safetensors.torch.save({self.kind: self.values.detach().cpu().contiguous()}, metadata)

    @classmethod
    def load(cls, body: bytes) -> "Samples":
        """Read the body of a request.

        Args:
            body: The bytes that were sent.

        Raises:
            VideoAlignError: Where they are no such file.
        """
        try:
            tensors = safetensors.torch.load(body)  # checks the header, and sizes against it
            metadata = json.loads(body[HEADER : HEADER + int.from_bytes(body[:HEADER], "little")]).get("__metadata__")
            prompts = json.loads((metadata or {}).get("prompts", "null"))
        except (SafetensorError, ValueError, KeyError, RecursionError, RuntimeError) as error:
            why = next(iter(str(error).splitlines()), type(error).__name__)
            raise VideoAlignError(f"the body is no safetensors file with samples and prompts ({why[:200]})") from None
        if len(tensors) != 1 or not tensors.keys() <= {"videos", "latents"}:
            raise VideoAlignError(f"the body holds {sorted(tensors)[:5]}, not one tensor called videos or latents")
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise VideoAlignError("the metadata's prompts are no JSON list of texts")
        ((kind, values),) = tensors.items()
        return cls(kind, values, prompts).checked()

    def checked(self) -> "Samples":
        """The samples themselves, unless shape, dtype or the number of prompts is wrong.

        Raises:
            VideoAlignError: Where it is.
        """
        shape, dtype = tuple(self.values.shape), self.values.dtype
        fits = dtype == torch.uint8 if self.kind == "videos" else dtype.is_floating_point
        if not fits or len(shape) != 5 or 0 in shape or (self.kind == "videos" and shape[2] != 3):
            wanted = {"videos": "uint8 (B, T, 3, H, W)", "latents": "floats (B, C, F, H, W)"}[self.kind]
            raise VideoAlignError(f"{self.kind} are {dtype} {shape}, not {wanted}")
        if len(self.prompts) != shape[0]:
            raise VideoAlignError(f"there are {shape[0]} {self.kind} and {len(self.prompts)} prompts")
        return self


def parsed(body: bytes) -> Mapping[str, Any]:
    """Read an answer, or another JSON object.

    Args:
        body: The bytes of the answer.

    Raises:
        VideoAlignError: Where they are no JSON object; the message holds their beginning.
    """
    try:
        found = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise VideoAlignError(f"no JSON ({str(error)[:100]}): {beginning(body)}") from None
    if not isinstance(found, dict):
        raise VideoAlignError(f"no JSON object: {beginning(body)}")
    return found


def beginning(body: bytes) -> str:
    """The first characters of what a server answered, for messages."""
    return repr(body[:200].decode(errors="replace")) if body else "nothing"


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")
