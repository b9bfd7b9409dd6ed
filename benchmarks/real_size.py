"""A dress rehearsal at real size, on a CPU: a released generator's configuration with random weights, trained for a step.

    python benchmarks/real_size.py FOLDER [--name Wan-AI/Wan2.1-T2V-1.3B-Diffusers] [--frames 1] [--side 64]

Writes the transformer in bf16 as sharded safetensors, tensor by tensor; loads it through ``load_generator``, takes one
LoRA-DPO step on a small clip, and exports. Prints the peak memory of every stage beside what must be held then. Real
tokenizers and text encoders are not part of it: prompts are random embeddings of the real width. The autoencoder has the
real configuration as well; a step does not call it.
"""

import argparse
import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import lightning as L
import safetensors.torch
import torch
from diffusers import AutoModel
from torch import Tensor, nn

from videoalign.alignment import FlowDPO
from videoalign.callbacks import ExportGenerator
from videoalign.datamodules.latents import LatentPairs
from videoalign.models.known_generators import KNOWN, write_configs
from videoalign.models.live_memory import size_of
from videoalign.models.whole import load_whole, shapes_only

SHARD = 2**30
"""Bytes of a shard."""
