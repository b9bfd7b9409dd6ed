"""A dress rehearsal at real size, on a CPU: a released generator's configuration with random weights, trained for a step.

    python benchmarks/real_size.py FOLDER [--name Wan-AI/Wan2.1-T2V-1.3B-Diffusers] [--frames 1] [--side 64]

Writes the transformer in bf16 as sharded safetensors, tensor by tensor; loads it through ``load_generator``, takes one
LoRA-DPO step on a small clip, and exports. Prints the peak memory of every stage beside what must be held then. Real
tokenizers and text encoders are not part of it: prompts are random embeddings of the real width. The autoencoder has the
real configuration as well; a step does not call it.
"""

SHARD = 2**30
"""Bytes of a shard."""
