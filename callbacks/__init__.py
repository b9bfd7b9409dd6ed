"""What happens around training: benchmarks, pictures, export."""

from .example_pairs import ExamplePairs
from .export import ExportReward
from .reliability import ReliabilityDiagram
from .reward_bench import RewardBench

__all__ = ["ExamplePairs", "ExportReward", "ReliabilityDiagram", "RewardBench"]
