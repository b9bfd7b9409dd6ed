"""Tables of cells (k) and (m), and the figure of (k)."""

from matplotlib.figure import Figure

from ...callbacks.plots import BARS, curve, markdown_table, panels
from ...models.dimensions import DIMENSIONS
from .judge_causes import CAUSES, CLIPS_OF_PROMPT, accuracy_of
from .judge_claims import JUDGED, drop, further, orders, overstated, won
from .paper_claims import ORACLE, RM, Value
from .paper_findings import Seeds, over_seeds

SIZE = (6.4, 3.8)
"""Width and height of the figure, in inches."""
FURTHER_ARMS = {
    "control": "SFT, unselected samples (control)", "sft-full": "SFT, full training",
    "dpo-full": "Flow-DPO, constant beta, full training",
}  # fmt: skip
"""Arms that are in the table of (m), and in no statement."""


def cause_tables(studied: Seeds) -> str:
    """Judges that differ from the loop's own in one respect, and judges of more or fewer clips; empty without results.

    Args:
        studied: Findings by tuning seed.
    """
    return "\n\n".join(table for table in (_causes(studied), _clips(studied)) if table)


def _causes(studied: Seeds) -> str:
    known = {name: cause.text for name, cause in CAUSES.items() if over_seeds(studied, accuracy_of(name, "MQ"))}
    if not known:
        return ""
    rows = [["the loop's own judge", *(_mean(studied, accuracy_of(None, d)) for d in DIMENSIONS), ""]]
    for name, text in known.items():
        changed = _difference(accuracy_of(name, "MQ"), accuracy_of(None, "MQ"))
        accuracies = (_mean(studied, accuracy_of(name, d)) for d in DIMENSIONS)
        rows.append([text, *accuracies, _mean(studied, changed, signed=True)])
    return markdown_table(["accuracy on generated clips of unseen prompts", *DIMENSIONS, "MQ, change"], rows)


def _clips(studied: Seeds) -> str:
    rows = [
        [str(clips), *(_mean(studied, accuracy_of(f"clips-{clips}", d)) for d in DIMENSIONS)]
        for clips in CLIPS_OF_PROMPT
        if over_seeds(studied, accuracy_of(f"clips-{clips}", "MQ"))
    ]
    if not rows:
        return ""
    table = markdown_table(["rated clips of each prompt", *DIMENSIONS], rows)
    return f"The same number of ratings, spread over more or fewer clips:\n\n{table}"


def clips_figure(studied: Seeds) -> Figure | None:
    """Accuracy over the number of clips that the same ratings are spread over; None without results.

    Args:
        studied: Findings by tuning seed.
    """
    if not _clips(studied):
        return None
    figure, (axis,) = panels(size=SIZE)
    for d in DIMENSIONS:
        every = {clips: over_seeds(studied, accuracy_of(f"clips-{clips}", d)) for clips in CLIPS_OF_PROMPT}
        known = {clips: interval for clips, interval in every.items() if interval}
        curve(axis, list(known), list(known.values()), d, color=BARS[d])
    axis.set(title="Clips against pairs: equally many ratings", xscale="log")
    axis.set(xlabel="rated clips of each prompt", ylabel="accuracy without ties, unseen prompts")
    axis.legend()
    return figure


def output_table(found: Seeds) -> str:
    """The judge's accuracy on every arm's clips, the ceiling, and the wins by judge and oracle.

    Args:
        found: Findings by seed.
    """
    rows = []
    for arm, words in {"base": "base", **JUDGED, **FURTHER_ARMS}.items():
        if not over_seeds(found, orders(arm)):
            continue
        by_dimension = " / ".join(_short(found, orders(arm, d)) for d in DIMENSIONS)
        row = [words, f"{by_dimension}; {_mean(found, orders(arm))}", _mean(found, orders(arm, who="ceiling"))]
        numbers = (drop(arm), further(arm), won(arm, RM), won(arm, ORACLE), overstated(arm))
        signed = (True, True, False, False, True)
        row += [""] * 5 if arm == "base" else [_mean(found, of, s) for of, s in zip(numbers, signed)]
        rows.append(row)
    head = ["accuracy: VQ / MQ / TA; mean", "ceiling", "fall", "beyond the ceiling's fall"]
    return markdown_table(["", *head, "wins by the judge", "by the oracle", "overstated"], rows)


def _difference(a: Value, b: Value) -> Value:
    return lambda found: a(found) - b(found)


def _mean(found: Seeds, of: Value, signed: bool = False) -> str:
    interval = over_seeds(found, of)
    return f"{'+' * (signed and interval.mean >= 0)}{interval}" if interval else "-"


def _short(found: Seeds, of: Value) -> str:
    interval = over_seeds(found, of)
    return f"{interval.mean:.2f}" if interval else "-"
