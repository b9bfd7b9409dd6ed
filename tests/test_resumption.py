"""Stopped and resumed, or run through: the same weights, bit for bit, under the shipped recipes' own trainer settings.

Only what a test cannot have is changed: the model's folder, the data, the device and bf16, and how often a checkpoint
is kept.
"""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import videoalign.commands.lightning_cli as experiment
from forked import forked
from helpers import FEW_TOKENS
from videoalign.alignment import training
from videoalign.datamodules.latent_files import NULL
from videoalign.datamodules.shards import Index, ShardWriter, sha256
from videoalign.datamodules.video import encode
from videoalign.miniature.networks.pipelines import make_generator
from videoalign.miniature.networks.qwen import make_qwen
from videoalign.models.generator_folder import load_generator

RECIPES = Path(experiment.__file__).parents[1] / "experiments"
DIMENSIONS = ("VQ", "MQ", "TA")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Miniature models, 14 rated pairs with many labels missing, and latents of 38 judged pairs."""
    folder, rng = tmp_path_factory.mktemp("made"), np.random.default_rng(0)
    make_qwen(folder / "qwen", corpus=["a red circle 0"], hidden=32, layers=1)
    make_generator(folder / "wan", "wan", hidden=48, layers=2, max_tokens=FEW_TOKENS)
    with ShardWriter(folder / "pairs", "pairs", per_shard=5) as writer:
        for number in range(14):
            clips = {side: encode(rng.integers(0, 255, (4, 32, 32, 3), np.uint8), 4) for side in "ab"}
            labels = {d: str(rng.choice(["A", "B", "same", "invalid"])) for d in DIMENSIONS}
            writer.write(f"{number}", clips, {"prompt": f"a red circle {number % 3}", "labels": labels})
    generator = load_generator(folder / "wan")
    shape, width = generator.latent_shape(5, 32, 32), generator.text_width
    noise = torch.Generator().manual_seed(0)
    with ShardWriter(folder / "latents", "latents", "safetensors", per_shard=10) as writer:
        writer.index = Index("latents", media="safetensors", latents={**generator.identity(), "of": "pairs"})
        for number in range(38):
            tensors = {side: torch.randn(shape, generator=noise) for side in "ab"}
            tensors["prompt"] = torch.randn(3, width, generator=noise)
            rewards = {side: dict(zip(DIMENSIONS, rng.normal(size=3))) for side in "AB"}
            labels = {d: str(rng.choice(["A", "B", "same", "invalid"])) for d in DIMENSIONS}
            record = {"prompt": f"a red circle {number % 3}", "labels": labels, "rewards": rewards}
            writer.write(f"{number}", {"": safetensors.torch.save(tensors)}, record)
        (writer.path / NULL).write_bytes(safetensors.torch.save({"prompt": torch.zeros(1, width)}))
        writer.index.tables[NULL] = sha256(writer.path / NULL)
    return folder


REWARD = [
    "--model.network.backbone={made}/qwen",
    "--model.network.sampling={fps: 4.0, min_pixels: 0}",
    "--data.train={made}/pairs",
    "--data.val={made}/pairs",
    "--trainer.callbacks=[]",
]
FLOW = [
    "--model.generator={made}/wan",
    "--data.train={made}/latents",
    "--data.val={made}/latents",
    "--trainer.callbacks=[]",
]
SHIPPED = {
    "videoreward": (["videoreward/qwen2vl_2b"], REWARD, 6),
    "videoreward, bt": (["videoreward/qwen2vl_2b", "videoreward/bt"], REWARD, 6),
    "wan_dpo": (["flow/wan_sft", "flow/wan_dpo"], FLOW, 4),
    "nrg": (["nrg/wan"], [*FLOW, "--model.shape.blocks=1"], 4),
}
"""Recipes, what they are run on here, and the steps of the whole run."""
HERE = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto", "--trainer.precision=32-true",
        "--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=1"]  # fmt: skip


def arguments(made: Path, name: str, out: Path, *more: str) -> list[str]:
    recipes, options, _ = SHIPPED[name]
    return [
        "fit",
        *(f"--config={RECIPES}/{recipe}.yaml" for recipe in recipes),
        *(o.replace("{made}", str(made)) for o in options),
        *HERE,
        "--trainer.callbacks+=videoalign.callbacks.Checkpoint",
        f"--trainer.callbacks.dirpath={out}/checkpoints",
        "--trainer.callbacks.every_n_train_steps=1",
        "--trainer.callbacks.save_top_k=-1",
        "--trainer.callbacks.filename={step}",
        "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
        f"--trainer.logger.save_dir={out}",
        "--trainer.log_every_n_steps=1",
        *more,
    ]


def train(made: Path, name: str, out: Path, *more: str) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """The trained weights at the end, and what each step logged."""
    cli = experiment.run(arguments(made, name, out, *more))
    return {n: p.detach().clone() for n, p in cli.trainer.lightning_module.trained().items()}, steps_of(out)


def steps_of(out: Path) -> list[dict]:
    """What a run logged in each step."""
    (metrics,) = out.rglob("metrics.csv")
    with open(metrics, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    return [{k: v for k, v in row.items() if k == "step" or k.startswith("train/")} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "workers"), [("videoreward", 0), ("wan_dpo", 2), ("nrg", 2)])
def test_resumption_is_exact_under_the_recipes_own_settings(made, name, workers, tmp_path, monkeypatch):
    """It is exact in the middle of an epoch and at its end, with schedules and accumulated micro-batches."""
    monkeypatch.chdir(tmp_path)
    steps, more = SHIPPED[name][2], [f"--data.workers={workers}", "--model.warmup=0.3", "--model.decay=cosine"]
    weights, logged = train(made, name, tmp_path / "whole", *more)
    assert [int(row["step"]) for row in logged] == list(range(steps))
    for step in (1, steps // 2):  # in an epoch, and at the end of the first of two
        checkpoint = tmp_path / "whole" / "checkpoints" / f"step={step}.ckpt"
        again, rest = train(made, name, tmp_path / f"from{step}", *more, f"--ckpt_path={checkpoint}")
        assert again.keys() == weights.keys()
        different = [n for n in weights if not torch.equal(weights[n], again[n])]
        assert not different, f"resumed at step {step}: {len(different)} of {len(weights)} tensors differ"
        assert rest == logged[step:], f"resumed at step {step}"


def test_a_loader_that_was_built_before_the_checkpoint_gets_its_place(tmp_path):
    """Asking for the number of steps builds it, and Lightning alone then gives it no place (its issue 20550)."""
    import lightning as L

    class Asks(training.Training):
        def __init__(self):
            super().__init__(lambda parameters: torch.optim.SGD(parameters, 0.1), 0.0, "constant")
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def training_step(self, batch, batch_idx):
            self.seen = [*getattr(self, "seen", []), batch.item()]
            return self.weight.sum() * 0

    class Loader:
        """A loader that knows its place."""

        def __init__(self):
            self.place = 0

        def __len__(self):
            return 4

        def __iter__(self):
            while self.place < 4:
                self.place += 1
                yield torch.tensor(self.place)
            self.place = 0

        def state_dict(self):
            return {"place": self.place}

        def load_state_dict(self, state):
            self.place = state["place"]

    def run(checkpoint=None):
        save = L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        module = Asks()
        trainer = L.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            callbacks=[save],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, Loader(), ckpt_path=checkpoint, weights_only=True if checkpoint else None)
        return module.seen

    assert run() == [1, 2, 3, 4]
    assert run(tmp_path / "step=2.ckpt") == [3, 4]


RANKS = """
import json, os, sys, torch
from forked import on_ranks
from videoalign.commands import lightning_cli as experiment
torch.set_num_threads(1)

def run(words, out):
    cli = experiment.run(words)
    if cli.trainer.is_global_zero:
        torch.save({n: p.detach().clone() for n, p in cli.trainer.lightning_module.trained().items()}, out)

for world, words, out in json.loads(sys.argv[1]):
    on_ranks(world, lambda: run(words, out))
"""


SGD = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.init_args.lr=0.1"]
"""SGD is used, since Adam would make full steps from gradients that are rounding errors."""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["videoreward, bt", "wan_dpo"])
def test_one_two_and_four_processes_train_alike(made, name, tmp_path):
    """However the global batch is cut, weights and logged means agree to rounding; two processes resume exactly."""
    batch = {"videoreward, bt": 4, "wan_dpo": 8}[name]

    def job(world: int, out: str, *more: str) -> tuple[int, list[str], str]:
        ranks = [f"--trainer.devices={world}", "--trainer.strategy=ddp"] if world > 1 else []
        options = ["--data.workers=0", *ranks, f"--trainer.accumulate_grad_batches={batch // world}", *SGD]
        return world, arguments(made, name, tmp_path / out, *options, *more), f"{tmp_path}/{out}.pt"

    jobs = [
        job(1, "1"),
        job(2, "2"),
        job(4, "4"),
        job(2, "again", f"--ckpt_path={tmp_path}/2/checkpoints/step=2.ckpt"),
        job(1, "start", "--model.optimizer.init_args.lr=0", "--trainer.max_steps=1"),
    ]
    done = forked(RANKS, json.dumps(jobs))
    assert done.returncode == 0, done.stderr[-3000:]
    weights = {path.stem: torch.load(path, weights_only=True) for path in tmp_path.glob("*.pt")}
    one, logged = weights["1"], steps_of(tmp_path / "1")
    moved = max((one[n] - weights["start"][n]).abs().max().item() for n in one)
    for world in ("2", "4"):
        assert max((one[n] - weights[world][n]).abs().max().item() for n in one) < 1e-3 * moved
        rows = steps_of(tmp_path / world)
        assert len(rows) == len(logged) == SHIPPED[name][2]
        for row, want in zip(rows, logged):
            for key, value in want.items():
                assert float(row[key] or "nan") == pytest.approx(
                    float(value or "nan"), rel=1e-3, abs=1e-5, nan_ok=True
                ), (world, key)
    assert all(torch.equal(weights["again"][n], weights["2"][n]) for n in one)
