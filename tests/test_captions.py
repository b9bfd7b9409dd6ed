"""Captions: what is told and asked of a clip, and the training that learns it."""

import random

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from videoalign.cli import main
from videoalign.miniature.networks.captions import drawn, place_of
from videoalign.miniature.networks.qwen import make_qwen
from videoalign.miniature.world.rendered_sets import WorldSize, write_world
from videoalign.miniature.world.sprites import SCENES
from videoalign.models.frame_sampling import FrameSampling
from videoalign.models.processor import RewardProcessor
from videoalign.models.template import Template

RECORD = {
    "prompt": "a red bar moves upwards",
    "negatives": ["a blue bar moves upwards", "a red pole moves upwards"],
    "details": [["a red", "a blue"], [" bar", " pole"], [" moves upwards", " moves downwards"]],
    "track": [[2.0 * i, 30.0 - i] for i in range(9)],
    "fps": 8,
    "num_frames": 9,
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A world of captioned clips and a random backbone."""
    root = tmp_path_factory.mktemp("captions")
    size = WorldSize(train=1, val=1, benchmark_videos=8, benchmark_pairs=3, captions=30, clips=1)
    for _ in write_world(root / "world", size):
        pass
    make_qwen(root / "random", corpus=[scene.prompt for scene in SCENES])
    return root


@pytest.fixture(scope="module")
def processor(places):
    return RewardProcessor(places / "random", Template.load("plain"), FrameSampling(fps=8.0, min_pixels=0))


def test_texts_are_details_or_sentences():
    """In half of the texts every piece is true, whichever kind they are."""
    texts = [drawn(RECORD, "x", 0.5, random.Random(seed)) for seed in range(400)]
    details = [text for text in texts if len(text) == 3]
    assert 150 < len(details) < 250
    for text in details:
        for (piece, true), (right, wrong) in zip(text, RECORD["details"]):
            assert piece == (right if true else wrong)
    assert 0.4 < sum(true for text in details for _, true in text) / (3 * len(details)) < 0.6
    sentences = [text[0] for text in texts if len(text) == 1]
    assert {text for text, true in sentences if true} == {RECORD["prompt"]}
    assert {text for text, true in sentences if not true} == {*RECORD["negatives"]}
    assert len(details) + len(sentences) == 400
    assert all(len(drawn(RECORD, "x", 0.0, random.Random(seed))) == 1 for seed in range(50))
    assert drawn({"prompt": "a dog"}, "x", 1.0, random.Random(0)) == [("a dog", True)]


def test_places_are_means_over_the_frames_of_a_patch(processor):
    """Of nine frames eight are shown, two in a patch."""
    shown = processor.sampling.indices(9, 8)
    pairs = [[RECORD["track"][i] for i in shown[k : k + 2]] for k in range(0, len(shown), 2)]
    want = "".join(f" {round((a[0] + b[0]) / 2):02d}{round((a[1] + b[1]) / 2):02d}" for a, b in pairs)
    assert place_of(RECORD, processor) == [(want, None)]
    assert place_of({"prompt": "a dog"}, processor) == []


def test_words_that_are_true_are_told_and_questions_are_answered(processor):
    text = [("a red", True), (" pole", False), (" 0716", None)]
    video = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    batch = processor.captions([video, video], [text, [("a red pole moves upwards", True)]])
    first = batch["input_ids"][0]

    def words(mask):
        return processor.tokenizer.decode(first[batch[mask][0]])

    assert words("caption_mask") == " a red 0716"
    assert words("answer_mask") == " yes no"
    whole = processor.tokenizer.decode(first[batch["attention_mask"][0].bool()])
    assert "a red yes pole no 0716" in whole and whole.endswith("assistant\n")
    # a sentence stands where a prompt will stand for the reward model
    row = processor([video], ["a red pole moves upwards"])["input_ids"][0].tolist()
    second = batch["input_ids"][1][batch["attention_mask"][1].bool()].tolist()
    asked = second[: second.index(processor.answers[0])]
    assert [i for i in row if i not in processor.reward_ids][: len(asked)] == asked


def test_training_measures_on_clips_that_are_held_out(places, tmp_path):
    """Every held-out clip counts once, also where they do not fill the last batch."""
    settings = {
        "trainer.max_steps": 2,
        "data.data": places / "world/captions",
        "data.batch_size": 8,
        "data.held_out": 11,
        "data.workers": 0,
        "model.backbone": places / "random",
        "model.out": tmp_path / "backbone",
        "trainer.logger.save_dir": tmp_path,
    }
    main(["fit", "--config", "experiments/sprites/captions.yaml", *(f"--{k}={v}" for k, v in settings.items())])
    assert (tmp_path / "backbone/model.safetensors").exists()
    found = EventAccumulator(str(tmp_path / "captions/version_0"))
    found.Reload()
    (describes,), (answers,) = (found.Scalars(f"val/{name}") for name in ("describes", "answers"))
    assert (describes.value * 33) == pytest.approx(round(describes.value * 33), abs=1e-4)
    assert (answers.value * 44) == pytest.approx(round(answers.value * 44), abs=1e-4)


def test_clips_must_be_left_to_train_on(places, tmp_path, capsys):
    settings = {
        "data.data": places / "world/captions",
        "data.held_out": 30,
        "model.backbone": places / "random",
        "model.out": tmp_path / "backbone",
        "trainer.logger.save_dir": tmp_path,
    }
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "experiments/sprites/captions.yaml", *(f"--{k}={v}" for k, v in settings.items())])
    assert stop.value.code == 2 and "data.held_out is 30" in capsys.readouterr().err
    assert not (tmp_path / "backbone").exists()
