"""The miniature generator: short prompts, its autoencoder, prompts that are left out, and its export."""

import csv
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch

from helpers import CLIP, QUIET, clips_world, randn, same_tensors, write_latents
from videoalign import VideoAlignError
from videoalign.alignment import FlowDPO, FlowRWR, FlowSFT
from videoalign.callbacks import ExportGenerator
from videoalign.cli import main
from videoalign.datamodules.latents import LatentPairs
from videoalign.datamodules.shards import ShardSet, ShardWriter
from videoalign.datamodules.video import decode
from videoalign.miniature.networks.autoencoding import Autoencoding
from videoalign.miniature.networks.clips import Clips
from videoalign.miniature.networks.pipelines import make_generator
from videoalign.miniature.world.rendered_sets import GENERATED
from videoalign.miniature.world.sprites import FRAMES, SIZE
from videoalign.models.flow import draw
from videoalign.models.generator_folder import load_generator
from videoalign.models.lora import LoRA

LATENT = (16, 3, 4, 4)
SHORT = 16


# --- generators with short prompts ----------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders by family and length of prompts; None is the family's own length."""
    root = tmp_path_factory.mktemp("generators")
    for family in ("wan", "ltx"):
        for length in (None, SHORT):
            make_generator(
                root / f"{family}-{length}",
                family,
                hidden=48,
                layers=1,
                max_tokens=length,
                corpus=[content.prompt for content in GENERATED],
            )
    return {(f, n): str(root / f"{f}-{n}") for f in ("wan", "ltx") for n in (None, SHORT)}


@pytest.mark.parametrize(("family", "own"), [("wan", 512), ("ltx", 128)])
def test_prompts_are_padded_to_max_tokens(family, own, folders):
    for length in (None, SHORT):
        generator = load_generator(folders[family, length])
        assert generator.max_tokens == (length or own)
        encoded = generator.encode_prompts([content.prompt for content in GENERATED])
        condition, embeds = generator.condition(encoded), [one["prompt"] for one in encoded]
        assert condition["prompt"].shape == (len(GENERATED), length or own, 32)
        assert condition["prompt_mask"].sum(1).tolist() == [len(e) for e in embeds]
        assert all(
            torch.equal(row[: len(e)], e) and not row[len(e) :].any() for row, e in zip(condition["prompt"], embeds)
        )


@pytest.mark.parametrize("family", ["wan", "ltx"])
def test_longer_prompts_are_refused(family, folders):
    generator, long = load_generator(folders[family, SHORT]), "a red bar " * 40
    with pytest.raises(VideoAlignError, match=f"at most {SHORT}"):
        generator.encode_prompts([long])
    (cut,) = generator.encode_prompts([long], truncate=True)
    assert len(cut["prompt"]) == SHORT
    with pytest.raises(VideoAlignError, match=f"at most {SHORT} x 32"):
        generator.condition([{"prompt": randn(SHORT + 1, 32)}])
    generator.condition([{"prompt": randn(SHORT, 32)}])


@pytest.mark.parametrize("family", ["wan", "ltx"])
def test_max_tokens_changes_no_weight_and_nothing_where_padding_is_masked(family, folders):
    """Wan's text encoder masks the padding, LTX's does not; its transformer does, and Wan's does not."""
    own, short = (load_generator(folders[family, length]) for length in (None, SHORT))
    assert same_tensors(short.transformer.state_dict(), own.transformer.state_dict())
    prompts = [content.prompt for content in GENERATED[:3]]
    if family == "wan":
        for a, b in zip(own.encode_prompts(prompts), short.encode_prompts(prompts)):
            torch.testing.assert_close(a["prompt"], b["prompt"], rtol=1e-4, atol=1e-5)
    else:
        x, t = randn(3, *LATENT), torch.tensor([0.2, 0.5, 0.8])
        embeds = own.encode_prompts(prompts)
        with torch.no_grad():
            velocities = [generator.velocity(x, t, generator.condition(embeds)) for generator in (own, short)]
        torch.testing.assert_close(*velocities, rtol=1e-4, atol=1e-5)


def test_more_tokens_than_the_family_takes_are_not_promised(tmp_path):
    make_generator(tmp_path / "wan", "wan", hidden=48, layers=1, max_tokens=4096)
    assert load_generator(tmp_path / "wan").max_tokens == 512


# --- the autoencoder ------------------------------------------------------------------------------


def experiment(path, generator, data, out, steps, optimizer, batch_size=4):
    """A YAML file as a user writes it."""
    path.write_text(f"""
seed_everything: 0
trainer:
  accelerator: cpu
  devices: 1
  max_steps: {steps}
  log_every_n_steps: 1
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  logger:
    class_path: lightning.pytorch.loggers.CSVLogger
    init_args: {{save_dir: {path.parent}, name: log}}
model:
  class_path: videoalign.miniature.networks.autoencoding.Autoencoding
  init_args:
    generator: {generator}
    out: {out}
    optimizer: {optimizer}
data:
  class_path: videoalign.miniature.networks.clips.Clips
  init_args:
    data: {data}
    clip: {{num_frames: {FRAMES}, height: {SIZE}, width: {SIZE}}}
    batch_size: {batch_size}
    workers: 0
""")
    return ["fit", "--config", str(path)]


MUON = (
    "{class_path: videoalign.miniature.networks.muon.MuonAdamW, "
    "init_args: {lr: 0.02, rest_lr: 2.0e-3, weight_decay: 0.0}}"
)
STILL = "{class_path: torch.optim.SGD, init_args: {lr: 0.0}}"


def metrics(folder):
    """The logged loss of each step."""
    (path,) = Path(folder).glob("log/*/metrics.csv")
    return [float(row["train/loss"]) for row in csv.DictReader(path.open()) if row["train/loss"]]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Folder of sixteen clips."""
    return clips_world(tmp_path_factory.mktemp("small") / "world", clips=16) / "clips"


@pytest.fixture(scope="module")
def encoder(folders, small, tmp_path_factory):
    """A run's folder, with the pipeline that it wrote under ``out``."""
    root = tmp_path_factory.mktemp("encoder")
    main(experiment(root / "ae.yaml", folders["wan", SHORT], small, root / "out", 16, MUON))
    return root


def frames(folder):
    return torch.stack([decode(raw.members["mp4"], CLIP, 1, raw.name) for raw in ShardSet(folder)])


def deviations(generator, videos):
    rows = generator.encode_video(videos).transpose(0, 1).flatten(1)  # (C, numbers)
    return rows.mean(1), rows.std(1, correction=0)


def error(generator, videos):
    return (generator.decode(generator.encode_video(videos)).float() - videos.float()).square().mean().item()


def test_an_autoencoder_learns_and_is_written_as_a_pipeline(encoder, folders, small):
    losses = metrics(encoder)
    assert len(losses) == 16
    assert sum(losses[-5:]) < 0.5 * sum(losses[:2]) * 5 / 2
    before, after = load_generator(folders["wan", SHORT]), load_generator(encoder / "out")
    videos = frames(small)
    assert error(after, videos) < 0.5 * error(before, videos)
    assert same_tensors(after.transformer.state_dict(), before.transformer.state_dict())
    assert after.max_tokens == SHORT
    assert same_tensors(after.encode_prompts(["a red bar"])[0], before.encode_prompts(["a red bar"])[0])
    _, deviation = deviations(after, videos)  # weights moved while the moments were taken
    assert 0.3 < deviation.min()
    assert deviation.max() < 3
    assert 0.7 < deviation.mean() < 1.5


def test_latents_have_mean_0_and_deviation_1_where_nothing_moves(folders, small, tmp_path):
    """This is exact over one whole epoch at a learning rate of 0, where the weights stay the generator's own."""
    main(experiment(tmp_path / "ae.yaml", folders["wan", SHORT], small, tmp_path / "out", 4, STILL))
    before, after = load_generator(folders["wan", SHORT]), load_generator(tmp_path / "out")
    assert same_tensors(after.vae.state_dict(), before.vae.state_dict())
    mean, deviation = deviations(after, frames(small))
    torch.testing.assert_close(mean, torch.zeros(16), rtol=0, atol=1e-3)
    torch.testing.assert_close(deviation, torch.ones(16), rtol=0, atol=1e-3)
    assert deviations(before, frames(small))[1].max() < 0.5


def test_an_output_in_the_way_is_refused_before_training(folders, small, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        main(experiment(tmp_path / "ae.yaml", folders["wan", SHORT], small, tmp_path / "out", 1, STILL))
    assert stop.value.code == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    assert not list(tmp_path.glob("log/*/metrics.csv"))


def test_an_earlier_autoencoder_is_replaced(encoder, folders, small, tmp_path):
    make_generator(tmp_path / "out", "wan", hidden=48, layers=1)
    (tmp_path / "out" / "stale").write_text("")
    main(experiment(tmp_path / "ae.yaml", str(encoder / "out"), small, tmp_path / "out", 1, STILL))
    assert same_tensors(
        load_generator(tmp_path / "out").vae.state_dict(), load_generator(encoder / "out").vae.state_dict()
    )
    assert not (tmp_path / "out" / "stale").exists()
    assert not list(tmp_path.glob(".out*"))


def test_an_autoencoder_of_another_kind_is_refused(folders, tmp_path):
    with pytest.raises(VideoAlignError, match="only autoencoders of Wan's kind"):
        Autoencoding(folders["ltx", None], str(tmp_path / "out"))


def test_damaged_clips_stop_the_training(folders, tmp_path, capsys):
    with ShardWriter(tmp_path / "clips", "videos", per_shard=4) as writer:
        for i in range(4):
            writer.write(
                f"k{i}", {"": b"no video"}, {"prompt": "a red bar moves upwards", "fps": 8, "num_frames": FRAMES}
            )
    with pytest.raises(SystemExit) as stop:
        main(experiment(tmp_path / "ae.yaml", folders["wan", SHORT], tmp_path / "clips", tmp_path / "out", 1, STILL))
    assert stop.value.code == 2
    assert "could not be used" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_finished_training_that_is_resumed_stays_finished(folders, small, tmp_path):
    data = {"clip": CLIP, "batch_size": 4, "workers": 0}

    def made():
        return Autoencoding(folders["wan", SHORT], str(tmp_path / "out"))

    trainer = L.Trainer(**QUIET, max_steps=1)
    trainer.fit(made(), Clips(str(small), **data))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    L.Trainer(**QUIET, max_steps=1).fit(
        made(), Clips(str(small), **data), ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )
    assert load_generator(tmp_path / "out").vae is not None


# --- prompts that are left out --------------------------------------------------------------------


@pytest.fixture(scope="module")
def latents(folders, tmp_path_factory):
    root, generator = tmp_path_factory.mktemp("latents"), load_generator(folders["wan", SHORT])
    video = {"prompt": "a red bar"}
    pair = {**video, "labels": dict.fromkeys(("VQ", "MQ", "TA"), "A")}
    return {
        "videos": write_latents(root / "videos", generator.identity(), LATENT, lambda i: video, of="videos"),
        "pairs": write_latents(root / "pairs", generator.identity(), LATENT, lambda i: pair),
    }


def sft(folder, kind=FlowSFT, **options):
    torch.manual_seed(0)
    return kind(generator=folder, **{"lora": None, "optimizer": partial(torch.optim.SGD, lr=0.1), **options})


class Watch(L.Callback):
    """Keeps the prompts that the transformer is asked with, by their samples' seeds, and the losses."""

    def on_fit_start(self, trainer, module):
        self.null, self.asked, self.given, self.losses = trainer.datamodule.null, {}, {}, []
        errors = module.errors

        def spy(latents, seeds, prompts, net=None):
            self.asked |= dict(zip(seeds.tolist(), prompts))
            return errors(latents, seeds, prompts, net)

        module.errors = spy

    def on_train_batch_start(self, trainer, module, batch, *rest):
        self.given |= dict(zip(batch["seeds"].tolist(), batch["conditions"]))

    def on_train_batch_end(self, trainer, module, *rest):
        self.losses.append(trainer.callback_metrics["train/loss"].item())

    @property
    def without(self):
        """Seeds of the samples whose prompt was the empty one; all others had their own."""
        without = {seed for seed, prompt in self.asked.items() if same_tensors(prompt, self.null)}
        assert all(same_tensors(self.asked[s], self.given[s]) for s in self.asked.keys() - without)
        return without


def fit(model, data, steps=2, callbacks=(), batch_size=4, seed=0, **trainer):
    watch = Watch()
    module = LatentPairs(data, batch_size=batch_size, workers=0, shuffle_buffer=0, seed=seed)
    settings = {**QUIET, "limit_val_batches": 0, "max_steps": steps, "callbacks": [watch, *callbacks], **trainer}
    L.Trainer(**settings).fit(model, module)
    return watch


def test_samples_seeds_alone_say_which_prompts_are_left_out(folders, latents):
    """Neither the batch that they are in decides it, nor the random state, nor the order."""
    folder = folders["wan", SHORT]
    watches = [
        fit(sft(folder, null_share=0.5), latents["videos"], steps, batch_size=size)
        for size, steps in ((4, 6), (2, 12), (8, 3))
    ]
    assert watches[0].asked.keys() == watches[1].asked.keys() == watches[2].asked.keys()
    assert watches[0].without == watches[1].without == watches[2].without
    assert 4 <= len(watches[0].without) <= 20 and len(watches[0].asked) == 24  # each epoch anew
    other = fit(sft(folder, null_share=0.5), latents["videos"], 6, seed=1)
    assert not other.asked.keys() & watches[0].asked.keys()


@pytest.fixture(scope="module")
def large(folders):
    """Which of 4,000 samples lose their prompts, by share."""
    model, null = sft(folders["wan", SHORT]), {"prompt": randn(1, 32)}
    model.trainer = SimpleNamespace(datamodule=SimpleNamespace(null=null))
    prompts = [{"prompt": randn(3, 32)}] * 4000
    seeds = torch.randint(0, 2**62, (4000,), generator=torch.Generator().manual_seed(0))

    def without(share):
        model.null_share = share
        return {i for i, prompt in enumerate(model._some_without(prompts, seeds)) if prompt["prompt"] is null["prompt"]}

    return without


def test_about_the_share_of_the_prompts_is_left_out(large):
    for share in (0.01, 0.1, 0.25, 0.5, 0.9):
        spread = (share * (1 - share) / 4000) ** 0.5
        assert len(large(share)) / 4000 == pytest.approx(share, abs=4 * spread)
    assert large(0.1) < large(0.25) < large(0.9)  # the same samples and more
    assert not large(0.0)


def test_left_out_prompts_do_not_follow_the_times(folders, latents, large):
    """Its draw is independent of the noise and the time: early and late times lose as many prompts."""
    model = sft(folders["wan", SHORT])
    seeds = torch.randint(0, 2**62, (4000,), generator=torch.Generator().manual_seed(0))
    uniform, _ = draw(seeds, (1, 1, 1, 1), torch.device("cpu"))
    early = (model.times(uniform) < 0.5).tolist()
    lost = large(0.5)
    share = sum(early[i] for i in lost) / len(lost)
    assert share == pytest.approx(sum(early) / 4000, abs=0.045)


def test_no_share_changes_nothing(folders, latents):
    """The prompts are the batch's own, and what is trained is what was trained before there was a share."""
    models = [sft(folders["wan", SHORT], **options) for options in ({}, {"null_share": 0.0}, {"null_share": 0.5})]
    watches = [fit(model, latents["videos"]) for model in models]
    assert not watches[0].without
    assert not watches[1].without
    assert watches[2].without
    assert same_tensors(models[1].policy.state_dict(), models[0].policy.state_dict())
    assert not same_tensors(models[2].policy.state_dict(), models[0].policy.state_dict())


def test_the_loss_is_that_of_the_empty_prompt(folders, latents):
    """Times and noise stay as they were: a step's loss equals the errors at the prompts, computed apart."""
    model, twin = sft(folders["wan", SHORT], null_share=0.5), sft(folders["wan", SHORT])
    module = LatentPairs(latents["videos"], batch_size=8, workers=0, shuffle_buffer=0)

    class Keep(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, *rest):
            self.batch = batch

    keep, watch = Keep(), Watch()
    L.Trainer(**QUIET, limit_val_batches=0, max_steps=1, callbacks=[watch, keep]).fit(model, module)
    batch = keep.batch
    prompts = [watch.null if s in watch.without else p for s, p in zip(batch["seeds"].tolist(), batch["conditions"])]
    assert 0 < len(watch.without) < 8
    with torch.no_grad():
        errors, _ = twin.errors(batch["latents"][:1], batch["seeds"], prompts)
        own, _ = twin.errors(batch["latents"][:1], batch["seeds"], batch["conditions"])
    assert watch.losses[0] == pytest.approx(errors.mean().item(), rel=1e-5)
    assert abs(watch.losses[0] - own.mean().item()) > 1e-6


def test_validation_keeps_every_prompt(folders, latents):
    values = []
    for share in (0.0, 0.9):
        trainer = L.Trainer(**QUIET)
        module = LatentPairs(latents["videos"], latents["videos"], batch_size=4, workers=0)
        (row,) = trainer.validate(sft(folders["wan", SHORT], null_share=share), module, verbose=False)
        values.append(row)
    assert values[0] == values[1] and values[0]["val/loss"] > 0


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5, float("nan")])
@pytest.mark.parametrize("kind", [FlowSFT, FlowRWR, FlowDPO])
def test_what_is_no_share_is_refused(kind, share, folders):
    with pytest.raises(VideoAlignError, match=r"null_share is a share .*\[0, 1\)"):
        sft(folders["wan", SHORT], kind, null_share=share)


def test_dpo_leaves_no_prompts_out(folders):
    """Policy and reference would be asked with different prompts, and the loss would not begin at ln 2."""
    with pytest.raises(VideoAlignError, match="null_share: FlowDPO compares with a reference"):
        sft(folders["wan", SHORT], FlowDPO, null_share=0.5)


def test_dpo_with_every_prompt_begins_at_ln_2(folders, latents):
    watch = fit(sft(folders["wan", SHORT], FlowDPO), latents["pairs"], steps=1, batch_size=8)
    assert watch.losses[0] == pytest.approx(np.log(2), abs=1e-6)


# --- the pipeline that a training writes ----------------------------------------------------------


def test_the_exported_pipeline_holds_the_trained_transformer(folders, latents, tmp_path):
    model, before = sft(folders["wan", SHORT], null_share=0.1), load_generator(folders["wan", SHORT])
    fit(model, latents["videos"], callbacks=[ExportGenerator(str(tmp_path / "out"), pipeline=True)])
    after = load_generator(tmp_path / "out")
    assert same_tensors(after.transformer.state_dict(), model.policy.state_dict())
    assert not same_tensors(after.transformer.state_dict(), before.transformer.state_dict())
    assert after.identity() == before.identity() and after.max_tokens == SHORT
    prompts = ["a red bar moves upwards", ""]
    embeds = after.encode_prompts(prompts)
    assert all(map(same_tensors, embeds, before.encode_prompts(prompts)))
    noise, condition = randn(1, *LATENT), after.condition(embeds[:1])
    model.eval()
    sampled = [
        g.sample(condition, noise, 2, 2.0, after.condition(embeds[1:])) for g in (after, model.generator, before)
    ]
    torch.testing.assert_close(sampled[0], sampled[1], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(sampled[0], sampled[2], atol=1e-4)


def test_an_earlier_export_is_replaced_and_nothing_else(folders, latents, tmp_path):
    make_generator(tmp_path / "out", "wan", hidden=48, layers=1, seed=3)
    model = sft(folders["wan", SHORT])
    fit(model, latents["videos"], 1, [ExportGenerator(str(tmp_path / "out"), pipeline=True)])
    assert same_tensors(load_generator(tmp_path / "out").transformer.state_dict(), model.policy.state_dict())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")  # by which a lone transformer's export would be known
    with pytest.raises(VideoAlignError, match="exists already"):
        fit(sft(folders["wan", SHORT]), latents["videos"], 1, [ExportGenerator(str(tmp_path / "mine"), pipeline=True)])


def test_adapters_are_no_pipeline(folders, latents, tmp_path):
    model = sft(folders["wan", SHORT], lora=LoRA(rank=2, alpha=2, targets=["to_q"]))
    with pytest.raises(VideoAlignError, match=r"pipeline writes a fully trained transformer.*lora: null"):
        fit(model, latents["videos"], 1, [ExportGenerator(str(tmp_path / "out"), pipeline=True)])
    assert not (tmp_path / "out").exists()
