"""Results that the paper publishes, each once: "Improving Video Generation with Human Feedback" (arXiv 2501.13918).

Tables are named after those of version 2; its numbers and those of version 1 agree cell by cell. All numbers are in per
cent: accuracies on pairs that people rated, or the share of a tuned generator's videos that beat the untuned one's at
the same noise, by the authors' reward model. Figures 2 and 6 have no readable values.
"""

VIDEOREWARD = "VideoReward (2B), as published"
"""Name of the paper's reward model in :data:`TABLE_2`."""

TABLE_2 = {
    "videogen-rewardbench": {
        "Overall": {VIDEOREWARD: (73.59, 61.26), "VisionReward": (67.59, 56.77), "LiFT": (57.26, 39.08),
                    "VideoScore": (50.22, 41.80), "random": (50.30, 41.86)},
        "VQ": {VIDEOREWARD: (75.66, 59.68), "VisionReward": (59.03, 47.43), "LiFT": (55.97, 47.53),
               "VideoScore": (47.72, 47.41), "random": (49.86, 47.42)},
        "MQ": {VIDEOREWARD: (74.70, 66.03), "VisionReward": (60.98, 59.03), "LiFT": (54.91, 59.04),
               "VideoScore": (51.09, 59.05), "random": (49.64, 59.07)},
        "TA": {VIDEOREWARD: (72.20, 53.80), "VisionReward": (61.15, 46.56), "LiFT": (55.43, 33.79),
               "VideoScore": (50.34, 37.24), "random": (50.40, 37.25)},
    },
    "genai-bench": {
        "Overall": {VIDEOREWARD: (72.89, 49.41), "VisionReward": (72.41, 51.56), "LiFT": (58.39, 37.06),
                    "VideoScore": (71.69, 49.03), "random": (49.84, 33.67)},
    },
}  # fmt: skip
"""Table 2: accuracies of reward models (without ties, with ties), by benchmark, column and model."""

TABLE_3 = {
    "sft": (61.27, 76.13, 46.35), "rwr": (59.05, 69.70, 48.35),
    "dpo-time": (88.44, 91.23, 28.14), "dpo": (90.95, 81.01, 68.26),
}  # fmt: skip
"""Table 3, VideoGen-Eval's prompts: wins in VQ, MQ and TA after alignment to all three, by algorithm.

``sft`` is supervised fine-tuning, ``rwr`` Flow-RWR, ``dpo`` Flow-DPO with a constant beta, ``dpo-time`` Flow-DPO with
beta (1 - t)^2.
"""

TABLE_4 = {"sft": 53.81, "rwr": 49.50, "dpo-time": 55.95, "dpo": 65.49}
"""Table 4, VideoGen-Eval's prompts: wins in TA after alignment to TA alone, by algorithm as in :data:`TABLE_3`."""

TABLE_5 = {
    (0.0, 0.0, 1.0): (60.56, 46.48, 70.42),
    (0.1, 0.1, 0.8): (66.50, 63.73, 60.86),
    (0.1, 0.1, 0.6): (68.94, 67.59, 53.28),
    (0.5, 0.5, 0.0): (86.43, 93.23, 26.65),
}
"""Table 5, VideoGen-Eval's prompts: wins in VQ, MQ and TA under Flow-NRG of strength 100, by its three weights."""

TABLE_6 = {
    "reg": {"Overall": (70.16, 58.39), "VQ": (73.61, 54.23), "MQ": (65.56, 61.16), "TA": (70.95, 52.60),
            "GenAI-Bench": (71.13, 48.28)},
    "bt": {"Overall": (72.58, 61.22), "VQ": (77.10, 52.33), "MQ": (73.50, 59.43), "TA": (71.62, 53.06),
           "GenAI-Bench": (71.21, 47.74)},
    "btt": {"Overall": (73.39, 61.50), "VQ": (76.31, 60.52), "MQ": (72.40, 64.64), "TA": (72.12, 53.55),
            "GenAI-Bench": (70.89, 48.27)},
    "separate": {"Overall": (73.59, 61.26), "VQ": (75.66, 59.68), "MQ": (74.70, 66.03), "TA": (72.20, 53.80),
                 "GenAI-Bench": (72.89, 49.41)},
}  # fmt: skip
"""Table 6: accuracies of the paper's reward model (without ties, with ties), by variant and column.

``reg`` (regression), ``bt`` (Bradley-Terry) and ``btt`` (Bradley-Terry with ties) read all rewards at one shared token;
``separate`` is ``btt`` with a token for each dimension. Columns are those of VideoGen-RewardBench, and GenAI-Bench.
"""

TABLE_7_OF_V1 = {"clean": (37.1, 38.6, 52.9), "noisy": (66.2, 74.6, 32.4)}
"""Table 7 of version 1, TA-Hard's prompts: wins in VQ, MQ and TA under Flow-NRG by MQ alone, with a reward that was
trained on clean or on noisy latents."""
