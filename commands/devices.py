"""Where commands compute."""

DEVICES = ("auto", "cpu", "gpu", "cuda")
"""What ``--device`` takes."""
