"""The GPU benchmark: its rows on a CPU with miniatures, what it counts, and what a failing row does to the others."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu
import gpu_flops
import gpu_training
from gpu_place import Place
from gpu_record import Record
from gpu_rows import KEPT, ROWS, Row

from videoalign.alignment import FlowDPO
from videoalign.commands import lightning_cli
from videoalign.models.frame_sampling import FrameSampling
from videoalign.models.generator_folder import load_generator
from videoalign.models.lora import LoRA
from videoalign.models.video_reward import VideoReward


def rows(*functions: str) -> list[Row]:
    """Rows of functions of this file."""
    given = {"works": {"note": "x"}}
    return [Row(f"r{n}", f"row {n}", f"gpu_bench_kit:{f}", given.get(f, {})) for n, f in enumerate(functions)]


def measured(tmp_path: Path, wanted: list[Row], minutes: float = 10.0) -> Record:
    """The record after the rows ran."""
    record = Record(tmp_path, wanted, Place(tmp_path / "scratch", True))
    record.machine = {"device": "CPU", "measured_peak": 1e12, "published_peak": 4e12, "matmul": 8, "packages": {}}
    gpu.measure(wanted, record, record.place, minutes, planned=False)
    return record


# --- what failing rows do -------------------------------------------------------------------------------------------


def test_a_failing_row_is_recorded_and_stops_no_other(tmp_path):
    wanted = rows("works", "raises", "out_of_memory", "dies", "works")
    record = measured(tmp_path, wanted)
    errors = [record.results[row.name].get("error", "") for row in wanted]
    assert [bool(error) for error in errors] == [False, True, True, True, False]
    assert errors[1] == "ValueError: no such kernel in detail" and "status 9" in errors[3]
    assert [record.results[row.name].get("out_of_memory", False) for row in wanted] == [
        False,
        False,
        True,
        False,
        False,
    ]
    text = (tmp_path / "gpu.md").read_text()
    line = next(line for line in text.splitlines() if "`r0`" in line)
    assert "1.000 (0.500-2.000, 5)" in line and "50.0%" in line and "200.0%" in line and "100.0%" in line
    assert "out of memory" in text and "no such kernel" in text
    assert "ValueError: no such kernel\nin detail" in (tmp_path / "gpu.log").read_text()


def test_the_same_command_goes_on(tmp_path):
    wanted = rows("works", "out_of_memory", "raises", "works")
    measured(tmp_path, wanted[:2])
    before = json.loads((tmp_path / "gpu.json").read_text())
    record = measured(tmp_path, wanted)
    assert (tmp_path / "scratch" / "ran").read_text() == "x\nx\n"  # each of the two rows once
    assert record.results["r0"] == before["rows"]["r0"] and record.results["r1"] == before["rows"]["r1"]
    assert not record.done(wanted[2]) and record.done(wanted[3])


def test_no_row_begins_when_the_time_is_used_up(tmp_path):
    assert measured(tmp_path, rows("works"), minutes=0).results == {}


def test_a_row_waits_for_the_one_that_it_needs(tmp_path):
    first, second = rows("raises", "works")
    second = Row(second.name, second.title, second.function, second.given, needs=first.name)
    record = measured(tmp_path, [first, second])
    assert record.results["r1"]["error"] == "needs the row r0, which was not measured"


# --- rows as data ---------------------------------------------------------------------------------------------------


def test_rows_are_sound():
    assert len({row.name for row in ROWS}) == len(ROWS)
    names = [row.name for row in ROWS]
    assert all(row.needs is None or names.index(row.needs) < names.index(row.name) for row in ROWS)
    plans = {row.name: row.plan(Path("/m"), False) for row in ROWS}
    assert plans["reward"] is None and plans["sample_cfg"] is None
    assert plans["dpo"] == [
        *("--config", "experiments/flow/wan_sft.yaml", "--config", "experiments/flow/wan_dpo.yaml"),
        *(
            "--model.generator=Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            "--num-frames",
            "81",
            "--height",
            "480",
            "--width",
            "832",
        ),
    ]
    assert plans["dpo_short"] == plans["dpo_short_kept"]  # one count has both
    assert KEPT in next(row for row in ROWS if row.name == "dpo_short_kept").given["options"]


class Parsed(lightning_cli.ExperimentCLI):
    """Parses an experiment and makes nothing."""

    def instantiate_classes(self) -> None:
        """Leave everything as it was parsed."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing runs."""


def test_a_rows_options_change_the_recipe_and_nothing_else():
    def settings(name: str) -> dict:
        row = next(row for row in ROWS if row.name == name)
        files = [word for recipe in row.given["recipes"] for word in ("--config", f"experiments/{recipe}.yaml")]
        given = [*gpu_training.ONE_DEVICE, *gpu_training.BARE, "--data.train=SET", *row.given["options"]]
        given += [] if "generator" in row.given else ["--model.network.backbone=FOLDER"]
        return lightning_cli.run(["fit", *files, *given], Parsed).config.fit.as_dict()

    dpo, changed = settings("dpo"), settings("dpo_bf16_cudnn")
    trainer = dpo["trainer"]
    assert (trainer["precision"], trainer["accumulate_grad_batches"]) == ("bf16-mixed", 8)
    assert trainer["gradient_clip_val"] == 1.0
    changed["model"]["init_args"]["dtype"] = "float32"
    changed["model"]["init_args"]["memory"]["attention"] = None
    assert changed == dpo
    reward, changed = settings("reward"), settings("reward_bf16_kept")
    network = changed["model"]["init_args"]["network"]["init_args"]
    assert (network["dtype"], network["gradient_checkpointing"]) == ("bfloat16", False)
    network |= {"dtype": "float32", "gradient_checkpointing": True}
    assert changed == reward


# --- operations -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    """Miniatures of the benchmark's models."""
    return Place(tmp_path_factory.mktemp("gpu"), True)


def counted(function) -> float:
    """Operations by torch's formulas; attention as the products that it consists of."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        function()
    return float(counter.get_total_flops())


def test_operations_of_a_generator_are_those_that_torch_counts(place):
    module = FlowDPO(generator=place.generator("wan"), lora=LoRA(rank=4, targets=["to_q", "to_k", "to_v", "to_out.0"]))
    shape = module.generator.latent_shape(9, 64, 64)
    condition = module.generator.condition([{"prompt": torch.randn(5, 32)}] * 2)
    x, t = torch.randn(2, *shape), torch.tensor([0.3, 0.6])
    own = gpu_flops.wan(module.policy, shape, module.generator.max_tokens, 2)
    policy = counted(lambda: module.generator.velocity(x, t, condition))
    assert policy == pytest.approx(sum(own.values()), rel=0.002)
    with module.as_reference() as net:
        reference = counted(lambda: module.generator.velocity(x, t, condition, net))
    assert reference == pytest.approx(own["weights"] + own["attention"], rel=0.002)
    parts = gpu_flops.summary(gpu_flops.flow_parts(module, shape, 2, live=True, again=True))
    assert parts["needed"] == 3 * own["weights"] + 3 * own["adapters"] + 4 * own["attention"]
    assert parts["executed"] == parts["needed"] + sum(own.values())


def test_operations_of_the_reward_model_are_those_that_torch_counts(place):
    sampling = FrameSampling(fps=2.0, min_pixels=0)
    network = VideoReward(place.backbone(), "rubrics", sampling, "1d", lora=LoRA(rank=4), attention="eager").eval()
    video = torch.randint(0, 255, (4, 3, 56, 84), dtype=torch.uint8)
    inputs = network.processor([video, video[:2]], ["waves", "rain on a window"])
    parts = gpu_flops.reward_parts(network, inputs, training=False, again=False)
    causal = next(part for part in parts if "causal" in part.what)
    wanted = sum(part.needed for part in parts) + causal.needed  # as products, attention computes both halves
    assert counted(lambda: network(**inputs)) == pytest.approx(wanted, rel=0.01)
    trained = gpu_flops.reward_parts(network, inputs, training=True, again=True)
    assert [part.passes for part in trained] == [3, 3, 2, 3, 3]


def test_sampling_with_guidance_needs_the_rewards_gradient(place):
    generator = load_generator(place.generator("wan"), parts=("transformer",))
    whole = gpu_flops.wan(generator.transformer, (16, 3, 8, 8), 8, 1)
    half = gpu_flops.wan(generator.transformer, (16, 3, 8, 8), 8, 1, blocks=1)
    assert half["attention"] * 2 == whole["attention"]


# --- the command ----------------------------------------------------------------------------------------------------

CHOSEN = ("dpo", "reward", "sample_nrg", "reference", "dpo_cached", "dpo_5b", "encode", "score_bf16", "reward_flash2")
"""Rows that together use every function and every kind of set."""


@pytest.mark.slow
def test_every_kind_of_row_runs_on_a_cpu(tmp_path):
    words = [word for name in CHOSEN for word in ("--only", name)]
    command = [sys.executable, Path(gpu.__file__), "--toy", "--out", tmp_path / "out", "--scratch", tmp_path, *words]
    done = subprocess.run([*map(str, command), "--no-plan"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    log = (tmp_path / "out" / "gpu.log").read_text()
    for name in CHOSEN[:-1]:
        row = found["rows"][name]
        assert row.get("error") is None, log[-3000:]
        assert 0 < row["fastest"] <= row["seconds"] <= row["slowest"] and row["steps"] >= 5
        assert row["tokens"] > 0 and 0 < row["flops"]["needed"] <= row["flops"]["executed"]
        assert row["left_gib"] == 0
    assert "flash" in found["rows"]["reward_flash2"]["error"].lower()  # not installed: recorded
    assert found["rows"]["dpo"]["loss"] == pytest.approx(0.6931, abs=0.01)  # ln 2 before the first step
    assert found["rows"]["dpo"]["checkpointing"] and found["rows"]["dpo"]["precision"] == "bf16-mixed"
    assert found["rows"]["dpo_cached"]["flops"]["needed"] < found["rows"]["dpo"]["flops"]["needed"]
    assert 0 <= found["rows"]["reward"]["wait_share"] < 1
    assert (tmp_path / "out" / "dpo_trace.json.gz").stat().st_size == found["rows"]["dpo"]["trace"]
    assert found["machine"]["measured_peak"] > 0
    table = (tmp_path / "out" / "gpu.md").read_text()
    assert all(f"`{name}`" in table for name in CHOSEN)
