"""A team's own benchmark: how its videos are read, which columns it rates, and numbers to stand beside one's own."""

from videoalign.models.benchmark_protocols import BenchmarkProtocol
from videoalign.models.frame_sampling import FrameSampling

TEAM = BenchmarkProtocol(
    title="Our team's benchmark",
    sampling=FrameSampling(fps=4.0, max_pixels=320 * 320),
    overall="TA",
    columns=("TA", "Overall"),
    published={"Overall": {"last year's model": (61.5, 48.0)}},  # without and with ties, in per cent
    source="Numbers of last year: the team's report of March.",
)
