"""What holds for every family of generators when it trains: encoded sets, losses, what has gradients, exports."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from families_kit import BEGINNING, EXPERTS, FAMILIES, PROMPTS, SHAPES, encoded, plain, plainly, shorten, without_ftfy
from flow_kit import LN2, data, fit, loaded, make
from generator_kit import encode_config
from helpers import randn
from videoalign import VideoAlignError
from videoalign.alignment import FlowDPO, FlowSFT
from videoalign.callbacks import ExportGenerator
from videoalign.callbacks.export_generator import LORA_FILE
from videoalign.commands.lightning_cli import run as experiment
from videoalign.datamodules.shards import ShardWriter
from videoalign.datamodules.video import encode
from videoalign.models.flow import draw, interpolate
from videoalign.models.generator_folder import load_generator

every_family = pytest.mark.parametrize("name", FAMILIES)
every_transformer = pytest.mark.parametrize(
    ("name", "expert"), [(n, e) for n in FAMILIES for e in (("high", "low") if n in EXPERTS else (None,))]
)


@pytest.fixture(scope="module")
def alike_pairs(tmp_path_factory):
    """Rated pairs whose videos begin with the same frame."""
    folder, random = tmp_path_factory.mktemp("alike") / "pairs", np.random.default_rng(0)
    with ShardWriter(folder, "pairs") as writer:
        for i in range(4):
            first, *others = random.integers(0, 255, (17, 5, 6, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
            a, b = (encode(np.stack([first, *later]), 8) for later in (others[:8], others[8:]))
            labels = {"VQ": "A", "MQ": "B", "TA": "A"}
            rates = {"fps": {"A": 8, "B": 8}, "num_frames": {"A": 9, "B": 9}}
            record = {"prompt": PROMPTS[i % 2], "labels": labels, "sources": {"A": "one", "B": "two"}, **rates}
            writer.write(f"pair{i}", {"a": a, "b": b}, record)
    return folder


@pytest.fixture(scope="module")
def encoded_pairs(miniatures, alike_pairs, tmp_path_factory):
    """A function that gives the latents set of four pairs that a family encodes, encoded once."""
    root, made = tmp_path_factory.mktemp("pairs"), set()

    def find(name):
        if name not in made:
            config = encode_config(root / "e.yaml", miniatures[name], alike_pairs, root / name)
            experiment(["predict", "--config", str(config)])
            made.add(name)
        return str(root / name)

    return find


def trained(kind, name, expert, folder, pairs, out, **options):
    """A module after one step, what it logged and its gradients, and its export in a folder."""
    model = make(kind, folder, trained=False, expert=expert, **options)
    shorten(model.generator.pipeline)
    watch = fit(model, data(pairs, batch_size=2), callbacks=[ExportGenerator(str(out))])
    loss = watch.steps[0]["train/loss" + (f"/{expert}" if expert else "")]
    with_gradients = {key.removeprefix("generator.transformer.") for key in watch.gradients}
    return SimpleNamespace(model=model.eval(), loss=loss, with_gradients=with_gradients)


def sampled(name, expert, generator, policy, noise):
    """Latents that a generator samples with another transformer in the place of one of its own."""
    if expert == "low":
        generator.other, policy = policy, generator.transformer
    return generator.sample(generator.condition(encoded(generator)), noise, 3, transformer=policy)


def differs_from_plain(found, pipeline, name, noise, start):
    """Largest difference between our samples and plain diffusers'."""
    return float((found - plainly(pipeline, name, noise, start)).abs().max())


@every_family
def test_an_encoded_set_holds_what_the_family_is_conditioned_on(name, encoded_pairs, of_family):
    generator = of_family(name)
    datamodule = loaded(data(encoded_pairs(name), batch_size=4), SimpleNamespace(generator=generator))
    batch = next(iter(datamodule.train_dataloader()))
    assert batch["latents"].shape == (2, 4, *SHAPES[name])
    condition = generator.condition(batch["conditions"])
    assert condition.keys() == generator.condition(encoded(generator)).keys()
    null = generator.null_condition(datamodule.null)
    assert null.keys() == {key for part in generator.prompt_shapes() for key in (part, f"{part}_mask")}


@every_family
def test_latents_of_another_family_are_refused(name, encoded_pairs, of_family):
    other = encoded_pairs("wan" if name.startswith("ltx") else "ltx")
    with pytest.raises(VideoAlignError, match="holds latents of another generator"):
        loaded(data(other), SimpleNamespace(generator=of_family(name)))


@every_transformer
def test_dpo_of_adapters_begins_at_ln_2_and_is_exported(name, expert, miniatures, encoded_pairs, tmp_path, monkeypatch):
    without_ftfy(monkeypatch)
    folder, noise = miniatures[name], randn(2, *SHAPES[name])
    run = trained(FlowDPO, name, expert, folder, encoded_pairs(name), tmp_path / "out")
    policy = run.model.policy
    assert run.loss == pytest.approx(LN2, abs=1e-6)
    assert run.with_gradients == {key for key, p in policy.named_parameters() if p.requires_grad}
    assert all(".lora_" in key for key in run.with_gradients)
    with torch.no_grad():  # one step changes little
        for i, (key, parameter) in enumerate(policy.named_parameters()):
            if ".lora_B" in key:
                parameter += 0.1 * randn(*parameter.shape, seed=i)
    export = ExportGenerator(str(tmp_path / "out"))
    export._write(run.model, policy.state_dict(), tmp_path / "out")
    generator = load_generator(folder)
    shorten(generator.pipeline)
    start = generator.with_image(noise, generator.condition(encoded(generator)))
    base = generator.sample(generator.condition(encoded(generator)), noise, 3)
    found, pipeline = sampled(name, expert, generator, policy, noise), plain(folder, name)
    if name.startswith("hunyuan15"):  # whose pipelines have no load_lora_weights
        pipeline.transformer.load_lora_adapter(tmp_path / "out", weight_name=LORA_FILE)
    else:
        pipeline.load_lora_weights(tmp_path / "out", **{"load_into_transformer_2": True} if expert == "low" else {})
    assert differs_from_plain(found, pipeline, name, noise, start) < 5e-6
    assert (found - base).abs().max() > 1e-3  # there is something to export


@every_transformer
def test_sft_trains_what_takes_part_and_is_exported(name, expert, miniatures, encoded_pairs, tmp_path, monkeypatch):
    without_ftfy(monkeypatch)
    folder, noise = miniatures[name], randn(2, *SHAPES[name])
    generator = load_generator(folder)
    shorten(generator.pipeline)
    before = generator.other if expert == "low" else generator.transformer
    run = trained(FlowSFT, name, expert, folder, encoded_pairs(name), tmp_path / "out", lora=None)
    after = dict(run.model.policy.named_parameters())
    takes_part = {key for key in after if run.model.generator.adaptable(key)}
    assert run.with_gradients == takes_part
    moved = {key for key, p in before.named_parameters() if not torch.equal(p, after[key])}
    assert moved <= takes_part and len(moved) > 0.5 * len(takes_part)
    library = importlib.import_module(type(before).__module__)
    whole = getattr(library, type(before).__name__).from_pretrained(tmp_path / "out")
    assert all(torch.equal(p, after[key]) for key, p in whole.named_parameters())
    pipeline = plain(folder, name, **{"transformer_2" if expert == "low" else "transformer": whole})
    start = generator.with_image(noise, generator.condition(encoded(generator)))
    found = sampled(name, expert, generator, run.model.policy, noise)
    assert differs_from_plain(found, pipeline, name, noise, start) < 1e-5


@every_family
def test_a_frame_that_is_the_image_is_neither_noised_nor_counted(name, miniatures, encoded_pairs, monkeypatch):
    model = make(FlowSFT, miniatures[name], trained=False, expert="high" if name in EXPERTS else None)
    shorten(model.generator.pipeline)
    batch = next(iter(loaded(data(encoded_pairs(name), batch_size=2), model).train_dataloader()))
    latents, seeds, conditions = batch["latents"], batch["seeds"], batch["conditions"]
    other = latents.clone()
    other[:, :, :, 0] += 3.0
    with torch.no_grad():
        errors, t = model.errors(latents, seeds, conditions)
        changed = model.errors(other, seeds, conditions)[0]
        assert torch.equal(changed, errors) == (name in BEGINNING)
        _, noise = draw(seeds, latents.shape[2:], torch.device("cpu"))
        clean = int(name in BEGINNING)
        for side, found in zip(latents, errors):
            x = interpolate(side, noise, t)
            for row, one in zip(x, conditions):
                if clean:
                    row[:, :1] = one["image"]
            v = model.generator.velocity(x, t, model.generator.condition(conditions))
            want = (v - (noise - side))[:, :, clean:].square().mean((1, 2, 3, 4))
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
