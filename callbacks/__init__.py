"""What happens around training: benchmarks, pictures, export."""

from .example_pairs import ExamplePairs
from .export import ExportReward
from .reliability import ReliabilityDiagram
from .reward_bench import RewardBench
from .write_parts import WriteParts

__all__ = ["ExamplePairs", "ExportReward", "ReliabilityDiagram", "RewardBench", "WriteParts"]
