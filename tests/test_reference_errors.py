"""Cached errors of the reference model."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch

from generator_kit import (
    ALIGNMENT,
    counting,
    encode_config,
    flow_config,
    in_the_way,
    node,
    reference_config,
    samples_of,
)
from helpers import call
from videoalign.alignment import CacheReference, FlowDPO
from videoalign.commands.lightning_cli import run as experiment
from videoalign.datamodules.reference_errors import ReferenceDraws, ReferenceErrors
from videoalign.models.generator_folder import load_generator

# --- cached reference errors ----------------------------------------------------------------------


def test_cached_errors_are_the_live_ones(cache, generators, latents):
    tensors, record = (
        safetensors.torch.load_file(cache / "reference.safetensors"),
        json.loads((cache / "reference.json").read_text()),
    )
    module, encoded = FlowDPO(generator=str(generators / "wan")), samples_of(latents / "wan")
    assert record["keys"] == list(encoded)
    assert tensors["errors"].shape == (2, 4, 2)
    assert len(set(tensors["seeds"].flatten().tolist())) == 8  # every draw is of its own noise and time
    for k in range(2):
        for i, key in enumerate(record["keys"]):
            sides, seed = torch.stack([encoded[key][1][s] for s in "ab"])[:, None], tensors["seeds"][k, i : i + 1]
            with module.as_reference() as net:
                live, _ = module.errors(sides, seed, [{"prompt": encoded[key][1]["prompt"]}], net)
            torch.testing.assert_close(tensors["errors"][k, i], live[:, 0], rtol=0, atol=1e-6)


def test_epochs_cycle_through_the_draws(cache):
    record = json.loads((cache / "reference.json").read_text())
    cached, tensors = (
        ReferenceErrors(cache, record["made"]["data"], {}),
        safetensors.torch.load_file(cache / "reference.safetensors"),
    )
    for epoch, draw in enumerate((0, 1, 0, 1, 0)):
        for i, key in enumerate(record["keys"]):
            seed, errors = cached(key, epoch)
            assert seed == tensors["seeds"][draw, i]
            assert torch.equal(errors, tensors["errors"][draw, i])


def test_training_with_the_cache_is_training_without(cache, generators, latents, tmp_path, monkeypatch):
    """In three epochs of two steps, losses and reference errors agree at the same draws."""
    losses = {}
    before_step = FlowDPO.on_before_optimizer_step

    def recording(self, optimizer):
        before_step(self, optimizer)
        logged = self.trainer.callback_metrics
        names = ("loss", "velocity_error/chosen/reference", "velocity_error/rejected/reference")
        losses.setdefault(which, []).append([logged[f"train/{name}"].item() for name in names])

    monkeypatch.setattr(FlowDPO, "on_before_optimizer_step", recording)
    config = flow_config(
        tmp_path / "f.yaml",
        generators / "wan",
        latents / "wan",
        data={"reference": cache, "val": None},
        trainer={"max_steps": 6, "limit_val_batches": 0},
        beta=node(f"{ALIGNMENT}.ConstantBeta", beta=10.0),
    )
    calls = counting(monkeypatch, FlowDPO, "errors")
    which = "cached"
    experiment(["fit", "--config", str(config)])
    assert len(calls) == 6  # no forward of the reference
    monkeypatch.setattr(
        ReferenceErrors,
        "__call__",
        lambda self, key, epoch, old=ReferenceErrors.__call__: (old(self, key, epoch)[0], torch.full((2,), torch.nan)),
    )
    which = "live"
    experiment(["fit", "--config", str(config)])
    assert len(calls) == 6 + 12
    assert losses["cached"][0][0] == pytest.approx(losses["live"][0][0], abs=1e-6)
    np.testing.assert_allclose(losses["cached"], losses["live"], rtol=0, atol=1e-5)
    assert losses["live"][0][0] == pytest.approx(math.log(2), abs=1e-5) and losses["live"][2][0] != losses["live"][0][0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latents": "videos"}, "other data"),
        ({"times": {"law": "logit_normal"}}, "other times"),
        ({"generator": "wan_other", "vae": "wan"}, "other transformer"),
        ({"dtype": "bfloat16"}, "other dtype"),
        ({"fps": 16.0}, "other fps"),
        pytest.param({"precision": "bf16-mixed"}, "precision"),
    ],
)
def test_errors_of_another_training_are_refused(change, words, cache, generators, latents, clips, tmp_path, capfd):
    generator, data = generators / "wan", latents / "wan"
    if "vae" in change:  # the same autoencoder, another transformer
        shutil.copytree(generators / "wan", generator := tmp_path / "wan")
        shutil.rmtree(generator / "transformer")
        shutil.copytree(generators / "wan_other" / "transformer", generator / "transformer")
    if change.get("latents"):
        data = tmp_path / "again"
        config = encode_config(tmp_path / "e.yaml", generator, clips / "pairs", data, precision="float16")
        experiment(["predict", "--config", str(config)])
    model = {k: v for k, v in change.items() if k in ("times", "dtype", "fps")}
    config = flow_config(
        tmp_path / "f.yaml",
        generator,
        data,
        data={"reference": cache},
        **model,
        trainer={"precision": change.get("precision", "32-true"), "max_steps": 1, "limit_val_batches": 0},
    )
    assert call("fit", "--config", config) == 2
    assert words in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"draws": 0}, "data.draws must be at least 1"),
        pytest.param({"workers": -1}, "workers"),
        ({"data": "pairs"}, "holds pairs, but latents are needed"),
        ({"data": "ltx"}, "holds latents of another generator"),
    ],
)
def test_reference_run_refuses(options, words, generators, latents, clips, tmp_path, capfd):
    options = {"data": latents / "wan", **options}
    options["data"] = {"pairs": clips / "pairs", "ltx": latents / "ltx"}.get(options["data"], options["data"])
    config = reference_config(tmp_path / "r.yaml", generators / "wan", out=tmp_path / "out", **options)
    assert call("predict", "--config", config) == 2
    assert words in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_reference_run_refuses_an_output_in_the_way_before_the_work(generators, latents, tmp_path, capfd, monkeypatch):
    calls = counting(monkeypatch, CacheReference, "errors")
    config = reference_config(tmp_path / "r.yaml", generators / "wan", latents / "wan", in_the_way(tmp_path))
    assert call("predict", "--config", config) == 2
    assert "exists already" in capfd.readouterr().err
    assert (tmp_path / "out" / "notes.txt").exists()
    assert not calls


def test_every_process_of_a_reference_run_has_a_batch(generators, latents):
    data = ReferenceDraws(str(latents / "wan"), "none", batch_size=8, workers=0)
    module = SimpleNamespace(generator=load_generator(generators / "wan", parts=("transformer", "vae")))
    data.trainer = SimpleNamespace(global_rank=1, world_size=2, lightning_module=module)
    data.setup("predict")
    assert len(data.predict_dataloader()) >= 1  # as EncodeList, Prompts and VideoList see to
