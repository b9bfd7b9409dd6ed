"""Groups of parameters: who is in them, what torch computes with them, what a checkpoint says of them."""

import math
from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from forked import forked
from helpers import QUIET
from videoalign import VideoAlignError
from videoalign.alignment import FlowDPO, NoisyRewardModel, RewardModel
from videoalign.alignment.parameter_groups import ParameterGroup, assign, build_optimizer
from videoalign.alignment.training import Training
from videoalign.callbacks import EMA, Checkpoint
from videoalign.miniature.networks.muon import MuonAdamW
from videoalign.miniature.networks.qwen import make_qwen
from videoalign.models import LoRA, VideoReward
from videoalign.models.noisy_reward import NoisyRewardShape
from videoalign.models.reward_tokens import TokenRows

NAMES = [
    "net.head.weight",
    "net.vision.0.weight",
    "net.vision.0.bias",
    "net.layers.0.q.weight",
    "net.layers.1.q.weight",
]
OWN = {"head": ("*.head.*",), "vision": ("*.vision.*",), "tokens": ("*.rows",), "language": ("*",)}
ADAM = partial(torch.optim.AdamW, lr=0.1, weight_decay=0.05)


class Small(Training):
    """A token table, a norm and two matrices that train, and one that does not."""

    own_groups = {"head": ("head.*",), "tokens": ("*.rows",), "rest": ("*",)}

    def __init__(self, optimizer=ADAM, groups=None, warmup=0.0, decay="constant"):
        super().__init__(optimizer, warmup, decay, groups)
        torch.manual_seed(0)
        self.tokens = TokenRows(nn.Embedding(5, 4), [3, 4]).requires_grad_(False)
        self.tokens.rows.requires_grad_(True)
        self.norm, self.body, self.head = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 1)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, ids):
        return self.head(self.frozen(self.body(self.norm(self.tokens(ids))))).mean()

    def training_step(self, batch, batch_idx):
        loss = self(batch).square()
        self.step_means.add("loss", loss[None])
        return loss


BATCHES = [torch.tensor([0, 3, 4])] * 2  # equal ones, because a plain loader does not know its place after a resumption


def fit(model, steps=3, path=None, callbacks=(), **options):
    options = {**QUIET, "max_steps": steps, "callbacks": list(callbacks), **options}
    options["enable_checkpointing"] = any(isinstance(c, Checkpoint) for c in callbacks)
    loader = torch.utils.data.DataLoader(BATCHES, batch_size=None)
    L.Trainer(**options).fit(model, loader, ckpt_path=path, weights_only=True if path else None)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# --- who is in a group ------------------------------------------------------------------------------------------------


def test_own_groups_hold_every_parameter_once_and_empty_ones_are_left_out():
    found = assign(NAMES, OWN, {})
    assert found == {"head": NAMES[:1], "vision": NAMES[1:3], "language": NAMES[3:]}


def test_patterns_come_before_own_groups():
    found = assign(NAMES, OWN, {"first": ParameterGroup(match="*.layers.0.*"), "vision": 1e-6})
    assert found == {"head": NAMES[:1], "vision": NAMES[1:3], "language": NAMES[4:], "first": NAMES[3:4]}
    several = ParameterGroup(match=["net.head.weight", "*.bias"])
    assert assign(NAMES, OWN, {"x": several})["x"] == [NAMES[0], NAMES[2]]


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ({"x": ParameterGroup(match="*.blocks.*")}, r"'\*\.blocks\.\*' matches none of the 5 .*net\.head\.weight"),
        ({"x": ParameterGroup(match=["*.q.*", "q"])}, r"groups\.x\.match: 'q' matches none .* such as net\.layers"),
        ({"x": ParameterGroup(match=[])}, r"model\.groups\.x\.match is empty"),
        (
            {"a": ParameterGroup(match="*.q.*"), "b": ParameterGroup(match="*.1.q.*")},
            r"groups\.a and model\.groups\.b both match net\.layers\.1\.q\.weight",
        ),
        (
            {"visoin": 1.0},
            r"groups\.visoin: there is no such group; this module has head, vision, language.*mean vision",
        ),
        ({"tokens": 1.0}, r"groups\.tokens holds no parameter that trains; this module has head, vision, language"),
        ({"vision": ParameterGroup(match="*.vision.*")}, r"groups\.vision: vision is one of this module's own"),
        ({"vision": 1.0, "all": ParameterGroup(match="*")}, r"groups\.vision holds no .*other groups match all"),
    ],
)
def test_groups_that_cannot_be_are_refused(groups, said):
    with pytest.raises(VideoAlignError, match=said):
        assign(NAMES, OWN, groups)


@pytest.mark.parametrize("rates", [{"lr": -1.0}, {"lr": float("nan")}, {"weight_decay": float("inf")}])
def test_rates_are_numbers_of_at_least_0(rates):
    with pytest.raises(VideoAlignError, match="must be a number of at least 0"):
        ParameterGroup(**rates)


def test_an_infinite_rate_is_refused():
    with pytest.raises(VideoAlignError, match=r"model\.optimizer\.init_args\.lr is inf; it must be a finite number"):
        fit(Small(partial(torch.optim.AdamW, lr=math.inf)))


def test_weights_that_are_not_finite_are_not_saved_over_those_that_are(tmp_path):
    """The last update overflows, which no loss shows any more: the checkpoint before it stays the last one."""

    class Overflowing(Small):
        def on_train_batch_end(self, *rest):
            if self.global_step == 3:
                self.body.weight.data[0, 0] = math.inf

    save = Checkpoint(tmp_path, every_n_train_steps=2)
    with pytest.raises(VideoAlignError, match=r"not finite at step 3, such as body\.weight: this checkpoint is not"):
        fit(Overflowing(), callbacks=[save])
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content["global_step"] == 2 and content["state_dict"]["body.weight"].isfinite().all()


VISION = {"qwen2_vl": "merger", "qwen2_5_vl": "merger", "qwen3_vl": "deepstack_merger_list"}


@pytest.mark.parametrize("family", VISION)
@pytest.mark.parametrize("language", ["lora", "full"])
def test_groups_of_a_reward_model(family, language, tmp_path):
    make_qwen(tmp_path / family, family, hidden=32, layers=2, vision_layers=2)
    network = VideoReward(tmp_path / family, "plain", language=language)
    model = RewardModel(network, groups={"vision": 1e-6})
    found = model.members()
    assert list(found) == ["head", "tokens", "merger", "vision", "language"]
    assert sorted(name for names in found.values() for name in names) == sorted(model.trained())
    assert found["head"] == ["network.head.weight"]
    assert found["tokens"] == ["network.backbone.language_model.embed_tokens.rows"]
    assert all(".visual." in name for name in found["vision"] + found["merger"])
    assert {name.split(".")[3] for name in found["merger"]} >= {"merger", VISION[family]}
    assert not any("merger" in name for name in found["vision"])
    assert all(".language_model." in name and (".lora_" in name) == (language == "lora") for name in found["language"])
    frozen = RewardModel(VideoReward(tmp_path / family, "plain", vision="frozen", train_merger=False))
    assert list(frozen.members()) == ["head", "tokens", "language"]


def test_groups_of_generators(folders):
    model = FlowDPO(generator=folders["wan"], groups={"cross": ParameterGroup(lr=1.0, match="*.attn2.*")})
    found = model.members()
    assert list(found) == ["adapters", "cross"]
    assert {".attn2." in name for name in found["cross"]} == {True}
    assert list(FlowDPO(generator=folders["ltx"], lora=None).members()) == ["transformer"]
    noisy = partial(NoisyRewardModel, generator=folders["wan"], shape=NoisyRewardShape(blocks=2))
    assert list(noisy().members()) == ["blocks", "head"]
    adapted = noisy(lora=LoRA(rank=2, alpha=4, targets=["to_q"])).members()
    assert list(adapted) == ["adapters", "head"]
    assert all(".lora_" in name for name in adapted["adapters"])


# --- what torch computes ----------------------------------------------------------------------------------------------


def test_rates_decay_and_schedule_are_those_of_groups_made_by_hand():
    groups = {"head": ParameterGroup(lr=0.01, weight_decay=0.3), "tokens": 0.5, "body": ParameterGroup(match="body.*")}
    trained = fit(Small(groups=groups, warmup=0.5, decay="linear"))
    model = Small()
    by_hand = [
        {"params": [model.head.weight], "lr": 0.01, "weight_decay": 0.3},
        {"params": [model.head.bias], "lr": 0.01, "weight_decay": 0.0},
        {"params": [model.tokens.rows], "lr": 0.5, "weight_decay": 0.0},
        {"params": [model.norm.weight, model.norm.bias, model.body.bias], "weight_decay": 0.0},
        {"params": [model.body.weight]},
    ]
    optimizer = torch.optim.AdamW(by_hand, lr=0.1, weight_decay=0.05)
    for group in optimizer.param_groups:
        group["initial"] = group["lr"]
    for batch, factor in zip([*BATCHES, BATCHES[0]], (1 / 2.5, 2 / 2.5, 1 - 0.5 / 1.5)):
        for group in optimizer.param_groups:
            group["lr"] = factor * group["initial"]
        optimizer.zero_grad()
        model(batch).square().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(trained[name], parameter), name


def test_without_groups_and_decay_it_is_the_plain_optimizer():
    trained = fit(Small(partial(torch.optim.AdamW, lr=0.1, weight_decay=0.0)))
    model = Small()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.0)
    for batch in [*BATCHES, BATCHES[0]]:
        optimizer.zero_grad()
        model(batch).square().backward()
        optimizer.step()
    assert all(torch.equal(trained[name], parameter) for name, parameter in model.named_parameters())


def test_a_decay_that_reaches_nothing_is_refused():
    model = Small(groups={"tokens": ParameterGroup(weight_decay=0.1)})
    with pytest.raises(
        VideoAlignError, match=r"groups\.tokens\.weight_decay is 0\.1, but norms, biases and token rows"
    ):
        fit(model)


def test_every_group_has_its_rate_in_the_logs(tmp_path):
    logger = CSVLogger(tmp_path, "", "")
    groups = {"head": 0.01, "tokens": 0.0}
    fit(Small(groups=groups), logger=logger, callbacks=[LearningRateMonitor()])
    logger.save()
    head = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"lr/head", "lr/head_undecayed", "lr/tokens", "lr/rest", "lr/rest_undecayed"} <= set(head)


def test_muon_groups_by_shape_and_refuses_rates_of_groups():
    trained = {name: p for name, p in Small().named_parameters() if p.requires_grad}
    members = {"all": list(trained)}
    optimizer, rows = build_optimizer(MuonAdamW, trained, members, {})
    assert [group["name"] for group in optimizer.param_groups] == ["matrices", "rest"]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)
    with pytest.raises(VideoAlignError, match="MuonAdamW has no rates by group, such as all's"):
        build_optimizer(MuonAdamW, trained, members, {"all": 0.1})
    assert {name for row in rows for name in row["parameters"]} == set(trained)


# --- checkpoints ------------------------------------------------------------------------------------------------------

GROUPS = {"head": 0.01, "body": ParameterGroup(weight_decay=0.2, match="body.*")}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint after two of four steps."""
    folder = tmp_path_factory.mktemp("groups")
    fit(Small(groups=GROUPS), 2, callbacks=[Checkpoint(folder), EMA(0.5)])
    return folder / "last.ckpt"


def test_resumption_is_exact_with_groups_and_average(checkpoint):
    averages = []
    for path in (None, checkpoint):
        fit(Small(groups=GROUPS), 4, path, [ema := EMA(0.5)])
        averages.append(ema.average)
    assert averages[0].keys() == averages[1].keys()
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in averages[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"groups": {"head": 0.01}}, r"has the parameter groups head, .*body.*, and this run head"),
        (
            {"groups": {**GROUPS, "body": ParameterGroup(weight_decay=0.2, match=["body.*", "norm.weight"])}},
            "has other parameters in the group rest, such as norm.weight",
        ),
        (
            {"optimizer": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.0)},
            "head, head_undecayed, tokens, .*, and this run head, tokens, rest, body, body_undecayed",
        ),
    ],
)
def test_another_grouping_is_refused(checkpoint, change, said):
    with pytest.raises(VideoAlignError, match=rf"this checkpoint cannot be continued: .*{said}"):
        fit(Small(**{"groups": GROUPS, **change}), 4, checkpoint)


def test_rates_that_a_checkpoint_overrules_are_said(checkpoint):
    with pytest.warns(UserWarning, match=r"keeps the learning rates of its checkpoint \(head: 0\.01, not 0\.02"):
        fit(Small(groups={**GROUPS, "head": 0.02}), 4, checkpoint)


def test_a_checkpoint_without_groups_continues_where_there_is_one(tmp_path):
    """Releases before this one had a single group of all parameters, in the module's order."""
    plain = {"optimizer": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.0)}

    class One(Small):
        own_groups = {"weights": ("*",)}

    fit(One(**plain), 2, callbacks=[Checkpoint(tmp_path)])
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    del content["parameter_groups"], content["learning_rates"]
    torch.save(content, tmp_path / "old.ckpt")
    old, new = (fit(One(**plain), 4, tmp_path / f"{name}.ckpt") for name in ("old", "last"))
    assert all(torch.equal(old[name], new[name]) for name in old)
    with pytest.raises(VideoAlignError, match="it is of a release in which all parameters were one group"):
        fit(Small(**plain), 4, tmp_path / "old.ckpt")


def test_rates_of_a_module_without_a_trainer_need_none():
    """A checkpoint is also loaded where nothing trains, such as in `videoalign export`."""
    Small().on_load_checkpoint({"state_dict": Small().state_dict(), "optimizer_states": [SimpleNamespace()]})


FSDP2 = """
import sys, torch, lightning as L
from functools import partial
from pathlib import Path
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from forked import on_ranks
from helpers import QUIET
from test_parameter_groups import BATCHES, GROUPS, Small
from videoalign.callbacks import Checkpoint
from videoalign.commands.lightning_cli import whole_checkpoints
torch.set_num_threads(1)

class Sharded(Small):
    def configure_model(self):
        for part in (self.body, self.head, self):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])

def fit(out, sharded, steps, path=None, groups=GROUPS):
    kind = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=sharded)
    options = {**QUIET, "devices": 2, "strategy": kind, "max_steps": steps, "enable_checkpointing": True}
    model, loader = Sharded(groups=groups), torch.utils.data.DataLoader(BATCHES, batch_size=None)
    trainer = whole_checkpoints(L.Trainer(**options, use_distributed_sampler=False, callbacks=[Checkpoint(out)]))
    trainer.fit(model, loader, ckpt_path=path)
    rates = {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups}
    assert rates["head"] == 0.01 and rates["body"] == 0.1, rates
    return trainer, {name: p.full_tensor().detach() for name, p in model.named_parameters()}

def work(out):
    for sharded in (True, False):
        _, through = fit(f"{out}/{sharded}/a", sharded, 4)
        fit(f"{out}/{sharded}/b", sharded, 2)
        trainer, resumed = fit(f"{out}/{sharded}/c", sharded, 4, f"{out}/{sharded}/b/last.ckpt")
        if trainer.is_global_zero:
            print("equal", all(torch.equal(through[name], value) for name, value in resumed.items()))
        try:
            fit(f"{out}/{sharded}/d", sharded, 4, f"{out}/{sharded}/b/last.ckpt", {"head": 0.01})
        except Exception as error:
            if trainer.is_global_zero:
                print(type(error).__name__, error)
    if trainer.is_global_zero:
        torch.save(through, f"{out}/through.pt")

on_ranks(2, partial(work, sys.argv[1]))
"""


def test_groups_of_a_sharded_model(tmp_path):
    done = forked(FSDP2, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal True") == 2
    assert done.stdout.count("VideoAlignError this checkpoint cannot be continued: it has the parameter groups") == 2
    whole = fit(Small(groups=GROUPS), 4)
    sharded = torch.load(tmp_path / "through.pt", weights_only=True)
    assert whole.keys() == sharded.keys()
    for name, value in whole.items():
        torch.testing.assert_close(sharded[name], value)
