"""The on-policy study: equal evaluations, units that fit together, a judge that nothing is trained against, the page."""

import json
from pathlib import Path

import pytest

from videoalign import VideoAlignError
from videoalign.miniature.study.loop_size import LoopSize
from videoalign.miniature.study.on_policy_study import on_policy, units
from videoalign.miniature.study.policy_recipes import RECIPES, spent, steps_of
from videoalign.miniature.study.policy_searches import WAYS
from videoalign.miniature.study.policy_size import SHARES, PolicySize
from videoalign.miniature.study.policy_tuning import TUNED, choose, compared, grid
from videoalign.miniature.study.policy_units import HELD_FOLDER, PLACE
from videoalign.miniature.study.tuning_rounds import TUNING_SEEDS, tuning_place
from videoalign.miniature.study.units import Board
from videoalign.miniature.world.rendered_sets import WorldSize
from videoalign.models.files import write_json

CHOSEN = {name: tried[0] for name, tried in grid(PolicySize()).items()}
TOY_WORLD = WorldSize(train=72, val=12, benchmark_videos=32, benchmark_pairs=16, captions=64, clips=64)
TOY = LoopSize(
    world=TOY_WORLD, captions=2, reward=4, generated=2, autoencoder=6, generator=4, noisy=4, align=2, samples=4, rated=24,
    benchmark=2, benchmark_pairs=8, fresh=2, judged=2, calibrated=12, checked=24,
)  # fmt: skip
TOY_POLICIES = PolicySize(budget=2400, noises=2, groups=1, samples=2, batch=8)
"""Its pairs cost 576 evaluations, an iteration of GRPO 112."""


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    out = tmp_path_factory.mktemp("planned")
    write_json(out / TUNED, CHOSEN)
    return out, units(out, LoopSize(), PolicySize(), range(2))


# --- what is spent ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_an_algorithm_spends_what_every_other_does(name):
    """At each place of the curves, all but what one more step would cost."""
    size = PolicySize()
    for share, evaluations in spent(name, size, fresh=8).items():
        assert 0.93 * SHARES[share] * size.budget < evaluations <= SHARES[share] * size.budget


@pytest.mark.parametrize("name", [name for name in WAYS if name != "nrg"])
def test_a_search_spends_as_much_on_the_judged_videos(name):
    size = PolicySize()
    for share in SHARES.values():
        each = WAYS[name].candidates(size, share) * WAYS[name].each
        assert each <= size.of_video(share) < each + WAYS[name].each
    assert 8 * 16 * (size.of_video() - 24) == size.budget


def test_a_budget_that_buys_no_step_is_refused():
    with pytest.raises(VideoAlignError, match=r"a budget of 480 evaluations gives grpo the steps .* must be larger"):
        steps_of("grpo", PolicySize(budget=480), fresh=8)
