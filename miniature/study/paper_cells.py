"""All cells of the page and their claims. A cell of its own is one entry of each list here.

A module of claims has a function ``claims``; what a claim reads is named in :data:`.paper_findings.FILES`, tables and
figures are entries of :mod:`.paper_tables` and :mod:`.paper_figures`.
"""

from . import claims_aligned, claims_guided, claims_reward, judge_claims, rater_claims
from .paper_claims import Claim

CELLS = {
    "a": "Losses and tokens of the reward model (Table 6)",
    "b": "Accuracy over the share of training pairs, mean of VQ, MQ and TA without ties (Figure 2)",
    "c": "Do rewards change with the prompt? (section 3.2)",
    "d": "SFT, Flow-RWR and Flow-DPO (Table 3)",
    "e": "Text alignment alone (Table 4)",
    "f": "Sweep of beta, text alignment alone (Figure 6)",
    "g": "Flow-NRG: weights and strengths, noisy and clean rewards, best-of-N (Table 5; Table 7 of v1)",
    "h": "Adapters against full training (section 5.2)",
    "i": "Under which conditions the order of the algorithms holds",
    "j": "Does a judge of rendered clips judge generated ones?",
    "k": "What keeps the judge from seeing motion? (on the seeds that settings are chosen on)",
    "l": "From which rater bias on do comparisons teach more than scores?",
    "m": "How well does the judge judge what it was used for?",
}
"""Titles of the page's parts, by their letters."""
MODULES = (claims_reward, claims_aligned, claims_guided, judge_claims, rater_claims)
"""Modules of claims."""
CLAIMS: list[Claim] = sorted((claim for module in MODULES for claim in module.claims()), key=lambda claim: claim.cell)
"""All claims, in the order of the cells."""
