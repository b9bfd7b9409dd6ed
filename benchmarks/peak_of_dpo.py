"""Takes three DPO steps of 65 million parameters, and prints the process's peak memory in KiB.

Arguments: the folder of all benchmarks, and how the reference is kept: ``adapters off`` or ``a second copy``.
"""

import copy
import sys
from pathlib import Path

import torch
from timing import own_peak

from videoalign.alignment import FlowDPO
from videoalign.miniature.networks.pipelines import make_generator

folder = Path(sys.argv[1]) / "large"
if not folder.exists():
    make_generator(folder, "wan", hidden=768, layers=8)
torch.set_num_threads(1)
module = FlowDPO(generator=str(folder))
if sys.argv[2] == "a second copy":
    module.reference = copy.deepcopy(module.policy)
latents, conditions, seeds = torch.randn(2, 1, 16, 3, 8, 8), [{"prompt": torch.randn(12, 32)}], torch.tensor([1])
batch = {"reference": torch.full((2, 1), torch.nan), "seeds": seeds, "conditions": conditions}
optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad])
for _ in range(3):
    reference = module.reference_errors(batch, latents)
    errors, t = module.errors(latents, seeds, conditions)
    module.loss(batch, errors, reference, t)[0].mean().backward()
    optimizer.step()
    optimizer.zero_grad()
print(own_peak())
