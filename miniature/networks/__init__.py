"""Tiny models in transformers' and diffusers' own folder formats, and how they are pre-trained."""
