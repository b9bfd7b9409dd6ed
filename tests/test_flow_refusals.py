"""What a training of a generator refuses."""

import lightning as L
import pytest
import torch

from flow_kit import SMALL, data, fit, make, write
from videoalign import VideoAlignError
from videoalign.alignment import FlowDPO, FlowIPO, FlowSFT
from videoalign.miniature.networks.pipelines import make_generator
from videoalign.models.lora import LoRA

# --- what is refused in a training ----------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        {"lora": None},
        {"lora": LoRA(rank=4, alpha=8, targets=["to_q"])},
        {"lora": LoRA(rank=2, alpha=8, targets=SMALL.targets)},
    ],
    ids=["full", "fewer", "rank"],
)
def test_checkpoint_of_another_model_is_refused(other, folders, pairs, tmp_path):
    save = L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1)
    fit(make(FlowDPO, folders["wan"]), data(pairs["wan"]), callbacks=[save])
    with pytest.raises(VideoAlignError, match="does not fit"):
        fit(make(FlowDPO, folders["wan"], **other), data(pairs["wan"]), 2, checkpoint=save.best_model_path)


def test_broken_loss_stops_with_the_keys_and_the_last_checkpoint_as_it_was(folders, pairs, tmp_path):
    class Poison(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 3:
                for p in module.parameters():
                    p.data += torch.nan if p.requires_grad else 0.0

    save = L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=1, save_last=True)
    with pytest.raises(VideoAlignError, match=r"loss is nan at step 3, samples \['k6', 'k7'\]"):
        fit(make(FlowDPO, folders["wan"]), data(pairs["wan"], 2), 6, [Poison(), save])
    for path in tmp_path.iterdir():
        content = torch.load(path, weights_only=True)
        assert content["global_step"] == 3
        assert all(t.isfinite().all() for t in content["state_dict"].values())
    fit(make(FlowDPO, folders["wan"]), data(pairs["wan"], 2), 4, checkpoint=str(tmp_path / "last.ckpt"))


@pytest.mark.parametrize("kind", [FlowDPO, FlowIPO])
def test_single_videos_are_no_pairs(kind, folders, videos):
    with pytest.raises(VideoAlignError, match="single videos"):
        fit(make(kind, folders["wan"]), data(videos))


def test_latents_of_another_autoencoder_are_refused(folders, pairs, wan, tmp_path):
    with pytest.raises(VideoAlignError, match=r"another generator.*family: Wan, here LTX"):
        fit(make(FlowDPO, folders["ltx"]), data(pairs["wan"]))
    make_generator(tmp_path / "other", "wan", hidden=48, seed=1)
    with pytest.raises(VideoAlignError, match=r"another generator \(vae: "):
        fit(make(FlowDPO, str(tmp_path / "other")), data(pairs["wan"]))


def test_latents_normalised_with_other_statistics_are_another_autoencoders(generator, family):
    before = generator.identity()
    if family == "wan":
        generator.vae.register_to_config(latents_std=[2.0] * 16)
    else:
        generator.vae.latents_std.fill_(2.0)
    assert generator.identity() != before


def test_two_shapes_do_not_make_a_pair_or_a_batch(folders, wan, tmp_path):
    def one_side(i, t):
        return {**t, "a": t["a"][:, :1].contiguous()} if i == 1 else t

    def both_sides(i, t):
        return {n: v[:, :1].contiguous() if n != "prompt" else v for n, v in t.items()} if i == 1 else t

    inside, between = (write(tmp_path / f.__name__, wan, tensors=f) for f in (one_side, both_sides))
    with pytest.raises(VideoAlignError, match=r"k1.*\(16, 1, 4, 4\), \(16, 2, 4, 4\).*pair"):
        fit(make(FlowDPO, folders["wan"]), data(inside))
    with pytest.raises(VideoAlignError, match=r"several shapes in one batch.*batch_size 1"):
        fit(make(FlowDPO, folders["wan"]), data(between))
    fit(make(FlowDPO, folders["wan"]), data(between, batch_size=1), steps=3)


def test_latents_of_another_text_encoder_are_refused(folders, wan, tmp_path):
    path = write(tmp_path / "set", wan, tensors=lambda i, t: {**t, "prompt": t["prompt"][:, :16].contiguous()})
    with pytest.raises(VideoAlignError, match=r"prompt embeddings of shape \(3, 16\).*another text encoder"):
        fit(make(FlowDPO, folders["wan"]), data(path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora": LoRA(targets=["q_proj"])}, r"'q_proj'.*There are: .*'to_out.0'.*'to_q'"),
        ({"lora": None, "dtype": "bfloat16"}, "model.dtype: float32"),
        ({"warmup": 1.0}, "warmup"),
        ({"warmup": -0.1}, "warmup"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused(options, words, family, folders):
    with pytest.raises(VideoAlignError, match=words):
        make(FlowSFT, folders[family], trained=False, **options)
