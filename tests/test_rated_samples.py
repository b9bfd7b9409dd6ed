"""Ratings of a generator's samples: which prompts are held out, which pairs are rated, and what is written."""

from collections import Counter

import numpy as np
import pytest

from videoalign import VideoAlignError
from videoalign.datamodules.shards import ShardSet, ShardWriter
from videoalign.datamodules.video import encode
from videoalign.miniature.world.oracle import Oracle
from videoalign.miniature.world.rated_samples import held_out_prompts, rate_pairs
from videoalign.miniature.world.rendered_sets import generator_prompts
from videoalign.miniature.world.sprites import BY_PROMPT, FPS, FRAMES, SIZE, SOURCES, render, shown

PER_PROMPT = 4
SHAPE = {"num_frames": FRAMES, "height": SIZE, "width": SIZE}
SCENES = generator_prompts(0)[0]


def attributes(prompts):
    return {(name, getattr(BY_PROMPT[p], name)) for p in prompts for name in ("colour", "shape", "direction")}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Samples of all the generator's prompts, and rendered pairs of the same prompts."""
    folder, rng = tmp_path_factory.mktemp("samples"), np.random.default_rng(0)
    with ShardWriter(folder / "samples", "videos") as writer:
        for number in range(PER_PROMPT):
            for place, scene in enumerate(SCENES):
                flaws = SOURCES[(number + place) % 8].sample(rng)
                video = encode(render(shown(scene, flaws.wrong, rng), flaws, rng), FPS)
                writer.write(f"{place:02d}-{number}", {"": video}, {"prompt": scene.prompt, **SHAPE})
    with ShardWriter(folder / "rendered", "pairs") as writer:
        for place, scene in enumerate(SCENES):
            record = {"prompt": scene.prompt, "labels": {"VQ": "A"}}
            writer.write(f"{place}", {"a": video, "b": video}, record)
    return ShardSet(folder / "samples"), ShardSet(folder / "rendered")


def contents(folder):
    return list(ShardSet(folder, "pairs").contents())


@pytest.mark.parametrize("seed", range(6))
def test_held_out_prompts_are_unlike_and_leave_everything_to_train_on(seed):
    prompts = [scene.prompt for scene in generator_prompts(seed)[0]]
    kept = held_out_prompts(prompts[::-1] + prompts, 3, seed)
    assert kept == held_out_prompts(prompts, 3, seed) and kept < set(prompts) and len(kept) == 3
    assert attributes(set(prompts) - kept) == attributes(prompts)
    assert len(attributes(kept)) == 3 + 2 + 3  # colours, shapes and directions as different as they can be


def test_the_choice_is_the_seeds_and_an_impossible_one_is_refused():
    prompts = [scene.prompt for scene in SCENES]
    assert len({frozenset(held_out_prompts(prompts, 3, seed)) for seed in range(10)}) > 4
    with pytest.raises(VideoAlignError, match="24 of 24 prompts cannot be held out"):
        held_out_prompts(prompts, 24, 0)
    with pytest.raises(VideoAlignError, match="1 of 1 prompts cannot be held out"):
        held_out_prompts(prompts[:1], 1, 0)


def test_no_prompt_and_no_clip_of_validation_trains(made, tmp_path):
    samples, rendered = made
    rate_pairs(samples, Oracle.calibrated(clips=16), tmp_path, 64, 3, rendered, 100, seed=5)
    train, val = contents(tmp_path / "train"), contents(tmp_path / "val")
    of_train, of_val = ({content.record["prompt"] for content in some} for some in (train, val))
    kept = held_out_prompts([scene.prompt for scene in SCENES], 3, 5)
    assert of_val == kept and not kept & of_train and of_train | kept == {scene.prompt for scene in SCENES}
    assert len(val) == 64 * 3 / 24 and sum(content.key.startswith("g") for content in train) == 56
    assert sum(content.key.startswith("r") for content in train) == 21  # the others are of held-out prompts
    clips = [{content.read(f"{side}.mp4") for content in some for side in "ab"} for some in (train, val)]
    assert not clips[0] & clips[1]
    assert all({"labels", "votes", "scores"} <= content.record.keys() for content in train if content.key[0] == "g")
    assert not any("quality" in content.record for content in val)


def test_fewer_clips_of_each_prompt_are_rated_again_until_labels_are_as_many(made, tmp_path):
    samples, _ = made
    oracle = Oracle.calibrated(clips=16)
    for clips, turns in ((2, {4}), (3, {1, 2})):
        out = tmp_path / str(clips)
        rate_pairs(samples, oracle, out, 96, 3, seed=5, of_prompt=clips)
        train = contents(out / "train")
        assert len(train) == 84 and len(contents(out / "val")) == 12
        pairs = Counter(frozenset(content.read(f"{side}.mp4") for side in "ab") for content in train)
        assert set(pairs.values()) == turns and len(pairs) == 21 * clips * (clips - 1) / 2
    rate_pairs(samples, oracle, tmp_path / "all", 1000, seed=5)  # without a number, each pair once
    assert len(contents(tmp_path / "all")) == 24 * PER_PROMPT * (PER_PROMPT - 1) / 2
