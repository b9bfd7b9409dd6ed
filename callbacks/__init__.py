"""What happens around training: benchmarks, pictures, samples, win rates, export."""

from .checkpoint import Checkpoint
from .dashboard import Dashboard
from .ema import EMA
from .example_pairs import ExamplePairs
from .export_generator import ExportGenerator
from .export_reward import ExportReward
from .group_extremes import GroupExtremes
from .held_out_prompts import HeldOutPrompts
from .reliability import ReliabilityDiagram
from .reward_bench import RewardBench
from .reward_report import RewardReport
from .side_by_side import SideBySide
from .win_rate import WinRate
from .write_parts import WriteParts

__all__ = [
    "EMA",
    "Checkpoint",
    "Dashboard",
    "ExamplePairs",
    "ExportGenerator",
    "ExportReward",
    "GroupExtremes",
    "HeldOutPrompts",
    "ReliabilityDiagram",
    "RewardBench",
    "RewardReport",
    "SideBySide",
    "WinRate",
    "WriteParts",
]
