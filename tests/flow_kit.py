"""What the tests of generator alignment share: generators, latents sets, trainings of a few steps."""

from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch

from helpers import QUIET, randn, write_latents
from videoalign.datamodules.latents import LatentPairs
from videoalign.miniature.networks.pipelines import make_generator
from videoalign.models.generator_folder import load_generator
from videoalign.models.lora import LoRA

LN2 = -torch.nn.functional.logsigmoid(torch.zeros(())).item()
SHAPE = (16, 2, 4, 4)
FAMILIES = ("wan", "ltx")
PROMPTS = ["a red circle moves", "a blue square", "a video of the same scene, top to bottom"]
SMALL = LoRA(rank=4, alpha=8, targets=["to_q", "to_k", "to_v", "to_out.0"])


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("generators")
    for family in FAMILIES:
        make_generator(root / family, family, hidden=48, heads=4)
    return {family: str(root / family) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def generator(family, folders):
    return load_generator(folders[family])


def graded(i):
    """A record whose rewards prefer A or B by a margin of its own; its labels say the opposite and do not count."""
    a, b = {"VQ": 0.5 * i, "MQ": 1.0, "TA": -0.25}, {"VQ": 0.2, "MQ": 0.3 * i, "TA": 0.5 + i % 2}
    labels = dict.fromkeys(a, "B" if sum(a.values()) > sum(b.values()) else "A")
    return {"prompt": PROMPTS[i % 3], "rewards": {"A": a, "B": b}, "labels": labels}


def write(out, generator, count=8, of="pairs", record=graded, **options):
    """A latents set of random content for a generator; see :func:`helpers.write_latents`."""
    return write_latents(out, generator.identity(), SHAPE, record, count, of, **options)


def spoiled(place, i, tensors):
    """Damages sample ``place``; for ``tensors`` of :func:`write`."""
    return {**tensors, "a": torch.full(SHAPE, torch.nan)} if i == place else tensors


@pytest.fixture(scope="session")
def pairs(folders, tmp_path_factory):
    root = tmp_path_factory.mktemp("latents")
    return {f: write(root / f, load_generator(folders[f])) for f in FAMILIES}


@pytest.fixture(scope="session")
def wan(folders):
    """The Wan generator. Read only."""
    return load_generator(folders["wan"])


@pytest.fixture(scope="session")
def videos(wan, tmp_path_factory):
    """Eight single videos with rewards, seven of three prompts and one of its own."""

    def record(i):
        return {
            "prompt": PROMPTS[i % 3] if i < 7 else "alone",
            "rewards": {"VQ": float(i), "MQ": -0.5 * i * i, "TA": float(i % 2)},
        }

    return write(tmp_path_factory.mktemp("videos") / "set", wan, of="videos", record=record)


def data(train, batch_size=4, **options):
    return LatentPairs(train, **{"batch_size": batch_size, "workers": 0, "shuffle_buffer": 0, **options})


def make(kind, folder, trained=True, **options):
    """A module, the same for the same arguments; where it is ``trained``, policy and reference differ."""
    torch.manual_seed(0)
    options = {"lora": SMALL, "optimizer": partial(torch.optim.SGD, lr=0.1), **options}
    model = kind(generator=folder, **options)
    if trained:
        with torch.no_grad():
            for i, (name, parameter) in enumerate(model.policy.named_parameters()):
                if parameter.requires_grad and ".lora_A" not in name:
                    parameter += 0.03 * randn(*parameter.shape, seed=i)
    return model


class Watch(L.Callback):
    """Keeps the gradients of the first step and what each step logs."""

    def on_after_backward(self, trainer, module):
        if trainer.global_step == 0:
            self.gradients = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}

    def on_train_batch_end(self, trainer, module, *rest):
        self.steps = [*getattr(self, "steps", []), {k: float(v) for k, v in trainer.callback_metrics.items()}]


def fit(model, datamodule, steps=1, callbacks=(), checkpoint=None, **trainer):
    watch = Watch()
    settings = {**QUIET, "max_steps": steps, "limit_val_batches": 0, "callbacks": [watch, *callbacks], **trainer}
    if any(isinstance(c, L.pytorch.callbacks.ModelCheckpoint) for c in callbacks):
        settings["enable_checkpointing"] = True
    L.Trainer(**settings).fit(model, datamodule, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    return watch


def loaded(datamodule, model, stage="fit", world=1, rank=0):
    """The datamodule, set up without Lightning's trainer."""
    root = SimpleNamespace(root_device=torch.device("cpu"))
    datamodule.trainer = SimpleNamespace(
        world_size=world,
        accumulate_grad_batches=1,
        val_check_interval=1.0,
        global_rank=rank,
        lightning_module=model,
        strategy=root,
    )
    datamodule.setup(stage)
    return datamodule


def close(found, want, **tolerance):
    assert found.keys() == want.keys()
    assert found
    for name, tensor in want.items():
        torch.testing.assert_close(found[name], tensor, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


def kept(path, folder, **options):
    """The pairs of a set that are used: (A is preferred, margin) by key."""
    datamodule = loaded(data(path, **options), SimpleNamespace(generator=load_generator(folder)))
    opened = datamodule.sets["train"]
    return dict(zip(opened.contents.keys(), zip((~opened.judged.swapped).tolist(), opened.judged.margins.tolist())))
