"""Held-out prompts scored by the trained rewards and by others, while a policy trains."""

import lightning as L
import pytest
import torch

from flow_kit import data, fit, folders, make, pairs  # noqa: F401  fixtures
from helpers import QUIET
from test_on_policy import SIZE, Bright, Pixels, Same, groups, policy, prompts  # noqa: F401  fixtures
from videoalign import VideoAlignError
from videoalign.alignment import DiffusionNFT, FlowDPO
from videoalign.callbacks import EMA, HeldOutPrompts
from videoalign.callbacks.prompt_sampler import PromptSampler
from videoalign.models.intervals import interval_text, mean_interval

HELD_OUT = ["a green square", "snow at dusk"]


@pytest.fixture
def held(tmp_path):
    (tmp_path / "held.txt").write_text("\n".join(HELD_OUT))
    return str(tmp_path / "held.txt")


class Kept(L.Callback):
    """Keeps what is logged at the end of each iteration."""

    def __init__(self):
        self.rows = []

    def on_train_epoch_end(self, trainer, module):
        self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items()})


@pytest.fixture
def tables(monkeypatch):
    """Tables that the callback shows, in place of a logger."""
    shown = []

    class Media:
        def table(self, tag, head, rows):
            shown.append((tag, rows))

    monkeypatch.setattr("videoalign.callbacks.held_out_prompts.media_of", lambda trainer: Media())
    return shown


def test_policy_and_reference_are_scored_by_every_reward(folders, prompts, held, tables):  # noqa: F811
    """Against samples and means computed here; the trained reward scores held-out prompts too."""
    model, kept = policy(DiffusionNFT, folders), Kept()
    look = HeldOutPrompts(held, SIZE, {"p": Pixels()}, samples=2, every=2)
    fit(model, groups(prompts), 3, [look, kept])
    logged = kept.rows[-1]  # the callback logs after iterations 0 and 2
    sampler, brightness = PromptSampler(model, SIZE, look.items), {}
    for item in [(p, n) for p in range(2) for n in range(2)]:
        for side, latents in zip(("policy", "reference"), sampler.both([item])):
            light = model.generator.decode(latents, ["a"]).float().mean().item()
            brightness[(*item, side)] = latents[:, 0].mean().item(), light
    for place, name in enumerate(("r/first", "p/light")):
        ours, theirs = (
            torch.tensor([brightness[p, n, side][place] for p in range(2) for n in range(2)])
            for side in ("policy", "reference")
        )
        wins = (ours > theirs).double()
        assert logged[f"held_out/win_rate/{name}"] == pytest.approx(wins.mean().item())
        assert logged[f"held_out/reward/policy/{name}"] == pytest.approx(ours.mean().item(), rel=1e-4)
        assert logged[f"held_out/reward/reference/{name}"] == pytest.approx(theirs.mean().item(), rel=1e-4)
        (row,) = [row for row in tables[-1][1] if row[0] == name]
        assert row[1] == f"{wins.mean():.3f}"
        assert row[2] == interval_text(mean_interval(wins.view(2, 2).mean(1)))
    assert logged["held_out/drift"] > 0 and len(tables) == 2
    assert {row[0] for row in tables[0][1]} == {"r/first", "r/second", "p/light"}


def test_equal_rewards_are_half_a_win_and_a_fixed_reference_is_scored_once(folders, prompts, held, tables):  # noqa: F811
    class Counts(Same):
        asked = 0

        def __call__(self, videos, prompts):
            self.asked += len(videos)
            return super().__call__(videos, prompts)

    counts = Counts()
    fit(policy(DiffusionNFT, folders), groups(prompts), 3, [HeldOutPrompts(held, SIZE, {"s": counts}, every=1)])
    assert counts.asked == 2 + 3 * 2
    assert [row[1:3] for row in tables[-1][1] if row[0] == "s/first"] == [["0.500", "0.500-0.500"]]


def test_rewards_are_on_the_device_only_while_they_score(folders, prompts, held, monkeypatch):  # noqa: F811
    """Those of the callback always, the trained ones where the module releases them."""

    class Placed(Bright):
        def __init__(self):
            self.there = False

        def place(self, device):
            self.there = device is not None

        def __call__(self, videos, prompts):
            assert self.there
            return super().__call__(videos, prompts)

    own, other, both, seen = Placed(), Placed(), PromptSampler.both, []
    monkeypatch.setattr(PromptSampler, "both", lambda *args: seen.append(own.there or other.there) or both(*args))
    model = policy(DiffusionNFT, folders, rewards={"r": own}, release=True)
    fit(model, groups(prompts), 2, [HeldOutPrompts(held, SIZE, {"o": other}, samples=3, every=1)])
    assert len(seen) == 4 and not any(seen)
    assert not own.there and not other.there


def test_a_run_that_goes_on_looks_at_its_first_iteration_and_then_where_it_would_have(folders, prompts, held):  # noqa: F811
    seen = []

    class Look(HeldOutPrompts):
        def look(self, trainer, module):
            seen.append(trainer.current_epoch)

    look = Look(held, SIZE, every=3)
    trainer = type("T", (), {"sanity_checking": False, "callbacks": [], "current_epoch": 0})()
    model = policy(DiffusionNFT, folders)
    for trainer.current_epoch in range(7, 14):
        look.on_train_epoch_end(trainer, model)
    assert seen == [7, 9, 12]


def test_the_average_is_what_is_scored(folders, prompts, held):  # noqa: F811
    ends = []
    for callbacks in ([], [EMA(0.5)]):
        kept = Kept()
        fit(policy(DiffusionNFT, folders), groups(prompts), 3, [*callbacks, HeldOutPrompts(held, SIZE, every=1), kept])
        ends.append([row["held_out/reward/policy/r/first"] for row in kept.rows])
    assert ends[0][0] != ends[1][0] and ends[0][2] != ends[1][2]


def test_an_offline_run_scores_at_validations(folders, pairs, held):  # noqa: F811
    sets = data(pairs["wan"], val=pairs["wan"], val_batch_size=4)
    look, model = HeldOutPrompts(held, SIZE, {"r": Bright()}, every=1), make(FlowDPO, folders["wan"])
    trainer = L.Trainer(**QUIET, max_epochs=1, limit_val_batches=1, callbacks=[look])
    trainer.fit(model, sets)
    metrics = trainer.callback_metrics
    assert 0 <= metrics["held_out/win_rate/r/first"] <= 1 and "held_out/drift" in metrics


def test_rewards_that_do_not_fit_are_refused_before_training(folders, pairs, prompts, held):  # noqa: F811
    class Broken(Bright):
        def check(self, prompts):
            assert list(prompts) == HELD_OUT
            raise VideoAlignError("too long")

    with pytest.raises(VideoAlignError, match=r"HeldOutPrompts\.rewards names r, as model\.rewards does"):
        fit(policy(DiffusionNFT, folders), groups(prompts), 1, [HeldOutPrompts(held, SIZE, {"r": Bright()})])
    with pytest.raises(VideoAlignError, match=r"HeldOutPrompts\.rewards is empty"):
        fit(make(FlowDPO, folders["wan"]), data(pairs["wan"]), 1, [HeldOutPrompts(held, SIZE)])
    with pytest.raises(VideoAlignError, match="too long"):
        fit(policy(DiffusionNFT, folders), groups(prompts), 1, [HeldOutPrompts(held, SIZE, {"b": Broken()})])
    for wrong in ({"samples": 0}, {"every": 0}):
        with pytest.raises(VideoAlignError, match=rf"HeldOutPrompts\.{next(iter(wrong))} must be at least 1"):
            HeldOutPrompts(held, SIZE, **wrong)
    rate = Pixels()
    rate.video_fps = 24
    with pytest.raises(VideoAlignError, match=r"reward b \(bright\) takes .* 24 .* HeldOutPrompts.sampling.fps is 16"):
        fit(policy(DiffusionNFT, folders), groups(prompts), 1, [HeldOutPrompts(held, SIZE, {"b": rate})])


def test_rewards_with_other_names_for_other_samples_are_refused(folders, prompts, held):  # noqa: F811
    class Fickle(Bright):
        calls = 0

        def __call__(self, videos, prompts):
            self.calls += 1
            return {f"call {self.calls}": videos.flatten(1).mean(1)}

    with pytest.raises(VideoAlignError, match=r"other names for other samples \(f/call 1.* and f/call 2"):
        fit(policy(DiffusionNFT, folders), groups(prompts), 1, [HeldOutPrompts(held, SIZE, {"f": Fickle()})])
