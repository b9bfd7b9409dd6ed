"""Performance, as ratios of two ways measured side by side in one run: `make bench`.

Each row checks first that both ways give the same result. Times are medians of repeated runs with one torch thread;
the range is that of the ratio. Nothing here is asserted in tests. Names of sections as arguments run these alone:
`python benchmarks/ratios.py ties decoding`.
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch
from decoders import decoders
from decoding import decoding, scaling, streaming
from generators import alignment, guidance
from remote import million, stores
from rewards import frames_at_once, one_forward, scoring
from rollouts import rollouts
from starts import starts
from ties import ties

DATA, MODELS = (
    (starts, ties, decoding, decoders, streaming, scaling, stores, million),
    (one_forward, frames_at_once, scoring, alignment, rollouts, guidance),
)
SECTIONS = {section.__name__: section for section in (*DATA, *MODELS)}


def main() -> None:
    """Print the rows of all sections, or of those that are named."""
    parser = argparse.ArgumentParser(description="Performance, as ratios of two ways measured in one run.")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"some of {', '.join(SECTIONS)}; else all")
    chosen = parser.parse_args().sections or list(SECTIONS)
    if unknown := [name for name in chosen if name not in SECTIONS]:
        parser.error(f"{unknown[0]} is no section; choose some of {', '.join(SECTIONS)}")
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, 1 thread; page cache warm")
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            SECTIONS[name](Path(folder))


if __name__ == "__main__":
    main()
