"""Training on a generator's own samples: loop, draws, resumption and ranks, and each algorithm against its equation."""

import math
import warnings
from dataclasses import replace
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from flow_kit import PROMPTS, SMALL, close, data, fit, make
from helpers import QUIET
from videoalign import VideoAlignError
from videoalign.alignment import AWM, DiffusionNFT, FlowDPO, FlowGRPO, FlowSFT, OnlineDPO
from videoalign.alignment.behaviour import Trailing
from videoalign.callbacks import EMA, SideBySide
from videoalign.callbacks.prompt_sampler import PromptSampler, Sampling
from videoalign.datamodules.prompt_groups import IterationLoader, PromptGroups, Rounds
from videoalign.models.advantages import Advantages
from videoalign.models.flow import TimeLaw
from videoalign.models.flow_losses import ConstantBeta
from videoalign.models.memory import Memory
from videoalign.models.rows_on_disk import Rows
from videoalign.models.sde import CoefficientPreserving, EarlySteps

SIZE = Sampling(num_frames=5, height=32, width=32, steps=3, batch_size=3)
KINDS = {"dpo": OnlineDPO, "nft": DiffusionNFT, "awm": AWM, "grpo": FlowGRPO}


class Bright:
    """Rewards latents whose first channel is large; knows a second number, too."""

    name, needs = "bright", "latents"

    def check(self, prompts):
        self.checked = list(prompts)

    def __call__(self, videos, prompts):
        return {"first": videos[:, 0].flatten(1).mean(1), "second": videos[:, 1].flatten(1).mean(1)}

    def place(self, device):
        pass


class Same(Bright):
    """Finds every sample equally good."""

    def __call__(self, videos, prompts):
        return {"first": torch.ones(len(videos))}


class Pixels(Bright):
    """Rewards bright videos."""

    needs = "videos"

    def __call__(self, videos, prompts):
        assert videos.dtype == torch.uint8 and videos.shape[1:] == (5, 3, 32, 32)
        return {"light": videos.float().flatten(1).mean(1)}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return str(path)


def groups(prompts, **options):
    return PromptGroups(prompts, **{"groups": 2, "samples": 4, "batch_size": 3, **options})


def policy(kind, folders, family="wan", rewards=None, trained=True, **options):
    only = Advantages(weights={"r/first": 1.0})
    rewards = rewards or {"r": Bright()}
    return make(kind, folders[family], trained, **{"rewards": rewards, "sampling": SIZE, "advantages": only, **options})


def state(model):
    return {name: parameter.detach().clone() for name, parameter in model.trained().items()}


# --- draws and places -------------------------------------------------------------------------------------------------


def test_every_prompt_has_its_turn_and_every_sample_a_seed_of_its_own(prompts):
    drawer, seen, seeds = groups(prompts), [], set()
    for iteration in range(6):
        drawn = drawer.drawn(iteration)
        assert [one.group for one in drawn] == [0] * 4 + [1] * 4 and [one.number for one in drawn] == [0, 1, 2, 3] * 2
        assert drawn == groups(prompts).drawn(iteration)
        seen += [drawn[0].item, drawn[4].item]
        seeds |= {one.seed for one in drawn}
    assert len(seeds) == 48
    for turn in range(0, 12, 3):
        assert sorted(seen[turn : turn + 3]) == [0, 1, 2]
    assert groups(prompts, seed=1).drawn(0)[0].seed not in seeds


def test_a_step_sees_every_row_once_a_pass_and_a_loader_goes_on_in_the_middle():
    rounds = Rounds(rows=7, batch_size=3, updates=2, passes=2, seed=0)
    drawn = {"seed": 0, "groups": 1, "samples": 7}
    loader = IterationLoader(rounds, drawn)
    first = list(loader)
    assert len(first) == len(loader) == 12 and rounds.accumulated == 6
    for start in range(0, 12, 3):
        assert sorted(row for places in first[start : start + 3] for row in places.rows) == list(range(7))
    assert [places.first for places in first] == [True] + [False] * 11
    assert loader.state_dict() == {"iteration": 1, "done": 0, "length": 12, "drawn": drawn}
    second = list(loader)
    assert {places.iteration for places in second} == {1}
    assert [places.rows for places in second] != [places.rows for places in first]
    again = IterationLoader(rounds, drawn)
    again.load_state_dict({"iteration": 1, "done": 5, "length": 12})
    assert list(again) == second[5:]
    with pytest.raises(VideoAlignError, match="middle of an iteration of 12 batches, but now they are 8"):
        IterationLoader(Rounds(rows=4, batch_size=2, updates=2, passes=2, seed=0), drawn).load_state_dict(
            {"iteration": 1, "done": 5, "length": 12}
        )
    with pytest.raises(VideoAlignError, match=r"other samples \(data.seed 3, now 0\)"):
        again.load_state_dict({"iteration": 1, "done": 5, "length": 12, "drawn": drawn | {"seed": 3}})


# --- every algorithm --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["wan", "ltx"], indirect=True)
def test_rewards_of_a_group_that_are_equal_change_nothing(kind, family, folders, prompts):
    model = policy(KINDS[kind], folders, family, {"r": Same()}, fps=16.0)
    before = state(model)
    watch = fit(model, groups(prompts), max_epochs=1, steps=-1)
    close(state(model), before, rtol=0, atol=0)
    assert watch.steps[-1]["groups/equal"] == 1.0 and watch.steps[-1]["train/loss"] == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_stops_within_an_iteration_ends_where_one_that_runs_through_does(kind, folders, prompts, tmp_path):
    """Three iterations of two updates; stopped after the third update, in the middle of the second iteration."""

    def run(steps, folder, checkpoint=None):
        model = policy(KINDS[kind], folders, updates=2, optimizer=partial(torch.optim.AdamW, lr=1e-2))
        save = L.pytorch.callbacks.ModelCheckpoint(folder, every_n_train_steps=3, save_top_k=-1)
        fit(model, groups(prompts), steps, [save], checkpoint)
        return state(model), save

    through, _ = run(6, tmp_path / "a")
    _, save = run(3, tmp_path / "b")
    resumed, _ = run(6, tmp_path / "c", save.best_model_path)
    close(resumed, through, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_training_raises_the_reward_of_the_samples(kind, folders, prompts):
    """By the samples of later iterations: eight iterations of many samples, on a reward that is easy to raise."""
    own = {"grpo": {"clip": 0.9, "sampling": Sampling(num_frames=5, height=32, width=32, steps=4, batch_size=16)}}
    model = policy(
        KINDS[kind], folders, trained=False, optimizer=partial(torch.optim.AdamW, lr=2e-2),
        **{"nft": {"old_decay": 0.0}, "awm": {"clip": 0.5, "kl": 0.0}, **own}.get(kind, {}),
    )  # fmt: skip
    watch = fit(model, groups(prompts, samples=12, batch_size=24), steps=8)
    means = [step["reward/r/first/mean"] for step in watch.steps if "reward/r/first/mean" in step]
    assert means[-1] > means[0] + 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_latents_on_disk_train_the_same_weights_and_leave_no_file(kind, folders, prompts, tmp_path):
    ends = []
    for bound in (None, 0.0):
        model = policy(KINDS[kind], folders, disk_above=bound)
        fit(model, groups(prompts), 2, default_root_dir=tmp_path)
        ends.append(state(model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not list(tmp_path.glob("rollout-*"))


def test_rows_above_a_bound_live_in_a_file(tmp_path):
    rows = Rows(5, 1e-6, tmp_path)  # about a kB
    for part in torch.arange(5.0).split(2):
        rows.add("small", part)
        rows.add("large", part[:, None].expand(-1, 1000))
    assert rows.tensors["small"].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(rows.tensors["large"], torch.arange(5.0)[:, None].expand(-1, 1000))
    maps = [line for line in open("/proc/self/maps") if str(tmp_path) in line]
    assert len(maps) == 1 and "(deleted)" in maps[0] and not list(tmp_path.iterdir())


def test_decoded_videos_are_scored_too(folders, prompts):
    watch = fit(policy(DiffusionNFT, folders, rewards={"p": Pixels(), "r": Bright()}), groups(prompts), max_epochs=1)
    logged = watch.steps[-1]
    assert {"reward/p/light/mean", "reward/r/first/std", "reward/r/second/group_std"} <= logged.keys()
    assert "advantage/r/first" in logged and "advantage/p/light" not in logged  # without a weight it is only shown


def test_an_autoencoder_that_is_offloaded_decodes_the_same_videos(folders, prompts):
    ends = []
    for memory in (Memory(), Memory(group_offload=["vae"])):
        model = policy(DiffusionNFT, folders, rewards={"p": Pixels(), "r": Bright()}, memory=memory)
        watch = fit(model, groups(prompts), 1)
        ends.append(watch.steps[-1]["reward/p/light/mean"])
    assert ends[0] == ends[1]


# --- each algorithm against its equation ------------------------------------------------------------------------------


def test_online_dpo_on_its_pairs_is_flow_dpo(folders, prompts):
    """The losses of a batch are those of FlowDPO on latents of the same pairs, times and noise."""
    model, seen = policy(OnlineDPO, folders, beta=ConstantBeta(60.0)), []
    whole = model.objective

    def objective(rollout, places):
        losses, values = whole(rollout, places)
        best = [model._pairs[row][0] for row in places.rows]
        latents = torch.stack([model._pairs[row][1] for row in places.rows], 1)
        other = make(FlowDPO, folders["wan"], beta=ConstantBeta(60.0))
        seeds, conditions = model.draws(best, places), model.conditions(best)
        reference = other.reference_errors({"reference": torch.full((2, len(best)), torch.nan), "seeds": seeds,
                                            "conditions": conditions}, latents)  # fmt: skip
        errors, t = other.errors(latents, seeds, conditions)
        want, logs = other.loss({}, errors, reference, t)
        torch.testing.assert_close(losses, want, rtol=1e-6, atol=1e-7)
        close(values, logs, rtol=1e-5, atol=1e-6)
        for row in places.rows:
            group = rollout.advantages.view(2, 4)[row]
            ends = [4 * row + int(group.argmax()), 4 * row + int(group.argmin())]
            torch.testing.assert_close(model._pairs[row][1], rollout.latents[ends], rtol=0, atol=0)
        seen.append(len(best))
        return losses, values

    model.objective = objective
    fit(model, groups(prompts), max_epochs=1, steps=-1)
    assert sum(seen) == 2


def one_batch(model, prompts, check):
    """Run one batch, and call a check with (rollout, places) before its objective."""
    whole, calls = model.objective, []

    def objective(rollout, places):
        calls.append(check(rollout, places))
        return whole(rollout, places)

    model.objective = objective
    watch = fit(model, groups(prompts, batch_size=8), steps=1)
    assert len(calls) == model.passes
    return watch


def test_nft_at_the_behaviour_policy_is_flow_matching_times_2p_minus_1(folders, prompts):
    model = policy(DiffusionNFT, folders, weighted=False, kl=0.0, beta=0.3)
    wanted = {}

    def check(rollout, places):
        at, advantages = model.batch(rollout, places)
        p = 0.5 + 0.5 * advantages / 5.0
        errors = (model.velocity(at) - at.target).square().flatten(1).mean(1)
        (5.0 * (2 * p - 1) * errors).mean().backward()
        wanted.update({n: q.grad.clone() for n, q in model.named_parameters() if q.grad is not None})
        model.zero_grad()

    watch = one_batch(model, prompts, check)
    close(watch.gradients, wanted, rtol=1e-3, atol=1e-6)


def test_awm_at_the_behaviour_policy_is_flow_matching_times_the_advantage(folders, prompts):
    model, wanted = policy(AWM, folders, kl=0.0), {}

    def check(rollout, places):
        at, advantages = model.batch(rollout, places)
        (advantages * (model.velocity(at) - at.target).square().flatten(1).mean(1)).mean().backward()
        wanted.update({n: q.grad.clone() for n, q in model.named_parameters() if q.grad is not None})
        model.zero_grad()

    watch = one_batch(model, prompts, check)
    close(watch.gradients, wanted, rtol=1e-3, atol=1e-6)
    assert watch.steps[-1]["train/ratio"] == 1.0 and watch.steps[-1]["train/clipped"] == 0.0


@pytest.mark.parametrize(
    "options", [{}, {"gradient_checkpointing": True}, {"guard": True, "kl": 0.1}, {"dtype": "bfloat16"}]
)
def test_grpo_ratios_are_exactly_one_before_the_first_update(options, folders, prompts):
    model = policy(FlowGRPO, folders, updates=2, **options)
    seen = []
    whole = model.objective

    def objective(rollout, places):
        losses, values = whole(rollout, places)
        seen.append((places.update, (values["ratio"] - 1).abs().max().item()))
        return losses, values

    model.objective = objective
    fit(model, groups(prompts), steps=2)
    assert model.passes == 2  # three steps, but for the last one
    assert all(apart == 0 for update, apart in seen if update == 0)
    assert any(apart > 0 for update, apart in seen if update == 1)


def test_grpo_gradient_is_that_of_log_densities_of_torch(folders, prompts):
    """At ratios of 1 the gradient is minus the advantage times that of the log-density, a mean over elements."""
    model, wanted = policy(FlowGRPO, folders, window=EarlySteps(size=1, share=0.5)), {}

    def check(rollout, places):
        (number,) = model.stochastic(0)
        drawn = [rollout.drawn[row] for row in places.rows]
        condition, noise, _ = model.start(drawn)
        times = model.schedule(noise)
        x, after = (rollout.more[name][places.rows, 0] for name in ("before", "after"))
        t, dt = float(times[number]), float(times[number + 1] - times[number])
        v = model.generator.velocity(x, torch.full((len(x),), t, dtype=torch.float64), condition)
        s = 0.7 * (t / (1 - min(t, float(times[1])))) ** 0.5
        mean = x + v * dt + s**2 / (2 * t) * (x + (1 - t) * v) * dt
        density = torch.distributions.Normal(mean, s * (-dt) ** 0.5).log_prob(after).flatten(1).mean(1)
        advantages = rollout.advantages[[rollout.places[row] for row in places.rows]]
        (-advantages * density).mean().backward()
        wanted.update({n: q.grad.clone() for n, q in model.named_parameters() if q.grad is not None})
        model.zero_grad()

    watch = one_batch(model, prompts, check)
    close(watch.gradients, wanted, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["nft", "awm", "grpo"])
def test_mixed_precision_casts_each_policys_own_weights(kind, folders, prompts):
    """Autocast keeps casts of weights; those of the behaviour policy have no gradient, and other values."""
    watches = {}
    for precision in ("32-true", "bf16-mixed"):
        model = policy(KINDS[kind], folders)
        other = {name: value + 0.01 for name, value in state(model).items()}
        model.follow = lambda iteration, model=model, other=other: model.trailing["behaviour"].tensors.update(other)
        watches[precision] = fit(model, groups(prompts, batch_size=8), precision=precision)
    for name, gradient in watches["32-true"].gradients.items():
        found = watches["bf16-mixed"].gradients[name]
        alike = torch.nn.functional.cosine_similarity(found.flatten(), gradient.flatten(), dim=0)
        assert alike > 0.8, name  # products in bf16 differ by processor


def test_a_reward_that_breaks_is_named_before_anything_is_sampled(folders, prompts):
    class Broken(Bright):
        def check(self, prompts):
            raise RuntimeError("the weights do not load")

    with pytest.raises(VideoAlignError, match=r"reward r \(bright\) failed in check: RuntimeError: the weights .*line"):
        fit(policy(AWM, folders, rewards={"r": Broken()}), groups(prompts))


def test_diversity_is_measured_in_latents_and_in_features(folders, prompts):
    class Featured(Bright):
        def __call__(self, videos, prompts):
            self.features = 3 * videos[:, :2].flatten(1)
            return super().__call__(videos, prompts)

    model = policy(DiffusionNFT, folders, rewards={"r": Featured()})
    logged = fit(model, groups(prompts), 1).steps[-1]
    latents = model.rollout.latents.unflatten(0, (2, 4))  # (G, K, C, F, H, W)
    for name, features in (("", latents.flatten(2)), ("/r", 3 * latents[:, :, :2].flatten(2))):
        apart = [((g[i] - g[j]) ** 2).mean().sqrt() for g in features for i in range(4) for j in range(i)]
        assert logged[f"groups/diversity{name}"] == pytest.approx(float(sum(apart) / len(apart)), rel=1e-4)


def test_ends_are_told_apart_beyond_the_clip():
    rewards = {"a": torch.tensor([0.0, 0.0, 0.0, 0.0, 9.0, 10.0])}
    advantages = Advantages(weights={"a": 100.0})
    groups = torch.zeros(6, dtype=torch.long)
    clipped, order = advantages(rewards, groups)[0], advantages.unclipped(rewards, groups)[0]
    assert clipped[4] == clipped[5] == 5.0 and int(order.argmax()) == 5


def test_a_groups_samples_may_begin_with_the_same_noise(folders, prompts):
    own, shared = groups(prompts).drawn(0), groups(prompts, shared_noise=True).drawn(0)
    assert [one.seed for one in shared] == [one.seed for one in own] == [one.noise for one in own]
    assert [one.noise for one in shared] == [shared[0].seed] * 4 + [shared[4].seed] * 4
    model = policy(FlowGRPO, folders)
    fit(model, groups(prompts, shared_noise=True), max_steps=1)
    before, final = model.rollout.more["before"][:, 0], model.rollout.latents
    assert torch.equal(before[0], before[3]) and not torch.equal(before[0], before[4])
    assert not torch.equal(final[0], final[3])


def test_no_noise_is_left_in_the_samples_by_the_step_before_a_remainder(folders):
    """diffusers' Euler scheduler ends at t = 0.001; all but the last step are stochastic, and the last one is whole."""
    model = policy(FlowGRPO, folders)
    times = model.schedule(torch.zeros(1, 16, 2, 4, 4))
    assert len(times) == SIZE.steps + 1 and times[-1] == 0
    assert times[-2] > 0.5 * (times[-3] - times[-2])


def test_published_schedules_of_the_behaviour_policy():
    """DiffusionNFT's three: on-policy; min(0.001 i, 0.5); and nothing until 75, then min(0.0075 (i - 75), 0.999)."""
    for one, of in (
        (Trailing(0.0), lambda i: 0.0),
        (Trailing(0.5, 0.001), lambda i: min(0.001 * i, 0.5)),
        (Trailing(0.999, 0.0075, 75), lambda i: 0.0 if i < 75 else min(0.0075 * (i - 75), 0.999)),
    ):
        assert [one.share(i) for i in range(800)] == pytest.approx([of(i) for i in range(800)])
    one, policy = Trailing(0.5), torch.zeros(1, dtype=torch.float64)
    for iteration in range(4):  # 0, then halfway to 1, to 2, and to 3
        one.follow(iteration, {"w": policy + iteration})
    assert one.tensors["w"].item() == ((0 + 1) / 2 + 2) / 2 / 2 + 3 / 2


def test_an_average_holds_the_policy_from_the_second_update_on(folders, prompts, tmp_path):
    """Its velocity is that of the tensors that a checkpoint holds for it, and it does not sample."""
    model = policy(AWM, folders, clip=None, kl=0.0, kl_average=0.5, average_rise=None, updates=2, trained=False)
    save = L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    watch = fit(model, groups(prompts, batch_size=8), 4, [save])
    terms = [step["train/kl_average"] for step in watch.steps if "train/kl_average" in step]
    assert terms[0] == 0.0 and min(terms[1:]) > 0 and "train/kl" not in watch.steps[-1]
    further = [
        torch.load(path, weights_only=True)["further_tensors"] for path in sorted(tmp_path.glob("*step=[234].*"))
    ]
    assert all(one.keys() == {"behaviour", "average"} for one in further)
    first, second, _ = further  # after updates 2, 3 and 4: of iterations 0, 1 and 1
    for name in first["average"]:
        moved = first["average"][name].lerp(second["behaviour"][name], 0.7)
        torch.testing.assert_close(second["average"][name], moved)
        assert torch.equal(first["average"][name], first["behaviour"][name])


def test_side_by_side_shows_the_average_that_is_exported(folders, prompts, monkeypatch):
    """And training goes on from the weights, as if nothing had been shown."""
    seen, ends, both = [], [], PromptSampler.both
    monkeypatch.setattr(PromptSampler, "both", lambda own, items: seen.append(state(own.module)) or both(own, items))
    for shown in ([], [SideBySide(["a red circle"], SIZE)]):
        average, model = EMA(0.5), policy(DiffusionNFT, folders)
        fit(model, groups(prompts), 3, [average, *shown])
        ends.append({name: value.clone() for name, value in average.average.items()})
        close(state(model), ends[-1])
    close(ends[0], ends[1], rtol=0, atol=0)
    assert len(seen) == 3
    close(seen[-1], ends[1])


def test_a_checkpoint_of_another_algorithm_is_refused(folders, prompts, tmp_path):
    save = L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1)
    fit(policy(DiffusionNFT, folders), groups(prompts), 1, [save])
    with pytest.raises(VideoAlignError, match="the checkpoint is of DiffusionNFT, and this run trains by AWM"):
        fit(policy(AWM, folders), groups(prompts), 2, [], save.best_model_path)


def test_a_checkpoint_without_the_average_names_the_option(folders, prompts, tmp_path):
    save = L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1)
    fit(policy(AWM, folders), groups(prompts), 1, [save])
    with pytest.raises(VideoAlignError, match=r"keeps behaviour, and this run needs average, behaviour: .*kl_average"):
        fit(policy(AWM, folders, kl_average=1.0), groups(prompts), 2, [], save.best_model_path)


@pytest.mark.parametrize(("features", "said"), [([1, 2], "a list|list for"), (torch.zeros(2, 3), r"\(2, 3\) for 3")])
def test_features_of_another_kind_are_refused_by_name(features, said, folders, prompts):
    class Featured(Bright):
        pass

    Featured.features = features
    with pytest.raises(VideoAlignError, match=rf"reward r \(bright\) has features that are .*({said})"):
        fit(policy(DiffusionNFT, folders, rewards={"r": Featured()}), groups(prompts))


# --- bad input --------------------------------------------------------------------------------------------------------


def test_settings_that_cannot_work_are_refused(folders, pairs, prompts):
    with pytest.raises(VideoAlignError, match=r"data\.samples is 1, but a group is compared with itself"):
        groups(prompts, samples=1)
    with pytest.raises(VideoAlignError, match=r"model\.rewards is empty"):
        make(DiffusionNFT, folders["wan"], rewards={}, sampling=SIZE)
    with pytest.raises(VideoAlignError, match=r"model\.clip is null and model\.kl 0, so that nothing"):
        policy(AWM, folders, clip=None, kl=0.0)
    for wrong in ({"old_decay": 1.0}, {"old_rise": 0.0}, {"old_after": -1}):
        with pytest.raises(VideoAlignError, match=rf"model\.{next(iter(wrong))} "):
            policy(DiffusionNFT, folders, **wrong)
    with pytest.raises(VideoAlignError, match=r"model\.kl_average does from the second of model\.updates on"):
        policy(AWM, folders, clip=None, kl=0.0, kl_average=0.1)
    with pytest.raises(VideoAlignError, match=r"model\.average_decay is a share"):
        policy(AWM, folders, average_decay=-0.1)
    with pytest.raises(VideoAlignError, match=r"model\.passes is the number of the window's steps"):
        policy(FlowGRPO, folders, passes=2)
    with pytest.raises(VideoAlignError, match="window of 3 steps"):
        policy(FlowGRPO, folders, window=EarlySteps(size=3))
    with pytest.raises(VideoAlignError, match=r"advantages\.weights names s/first, but the rewards .* are r"):
        policy(AWM, folders, advantages=Advantages(weights={"s/first": 1.0}))
    with pytest.raises(VideoAlignError, match=r"densities, and those of CoefficientPreserving are not normalised"):
        policy(FlowGRPO, folders, sde=CoefficientPreserving(), guard=True)
    with pytest.raises(VideoAlignError, match=r"lora\.dropout is 0\.1"):
        fit(policy(FlowGRPO, folders, lora=replace(SMALL, dropout=0.1)), groups(prompts))
    with pytest.raises(VideoAlignError, match=r"data\.shared_noise .* alike: AWM"):
        fit(policy(AWM, folders), groups(prompts, shared_noise=True))
    for limit in ({"limit_train_batches": 2}, {"limit_train_batches": 1}, {"overfit_batches": 1}):
        with pytest.raises(VideoAlignError, match=r"limit_train_batches, overfit_batches and fast_dev_run"):
            fit(policy(AWM, folders), groups(prompts), **limit)
    with pytest.raises(VideoAlignError, match=r"reload_dataloaders_every_n_epochs would begin with iteration 0"):
        fit(policy(AWM, folders), groups(prompts), reload_dataloaders_every_n_epochs=1)
    with pytest.raises(VideoAlignError, match=r"has a GradientAccumulationScheduler"):
        fit(policy(AWM, folders), groups(prompts), callbacks=[GradientAccumulationScheduler({0: 2})])
    with pytest.raises(VideoAlignError, match=r"advantages\.weights names r, but .* a weight's name is REWARD/NAME"):
        policy(AWM, folders, advantages=Advantages(weights={"r": 1.0}))
    with pytest.raises(VideoAlignError, match=r"AWM has nothing to be validated"):
        L.Trainer(**QUIET).validate(policy(AWM, folders), groups(prompts))
    with pytest.raises(VideoAlignError, match=r"data\.seed must be a whole number, got None"):
        groups(prompts, seed=None)
    with pytest.raises(VideoAlignError, match=r"sampling\.cfg_scale_2 is the scale of a second expert"):
        fit(policy(AWM, folders, sampling=replace(SIZE, cfg_scale_2=3.0)), groups(prompts))
    for wrong in ({"steps": 0}, {"batch_size": 0}, {"fps": 0}, {"cfg_scale": math.nan}, {"shift": math.inf}):
        with pytest.raises(VideoAlignError, match=f"sampling.{next(iter(wrong))} must be"):
            replace(SIZE, **wrong)
    with pytest.raises(VideoAlignError, match=r"accumulate_grad_batches is 2"):
        fit(policy(AWM, folders), groups(prompts), accumulate_grad_batches=2)
    with pytest.raises(VideoAlignError, match=r"OnPolicy|groups of prompts"):
        L.Trainer(**QUIET, max_steps=1).fit(policy(AWM, folders), data(pairs["wan"]))


class Odd:
    """A window of a user's own.

    Args:
        found: Its steps, or those of each call.
    """

    def __init__(self, found):
        self.found = found

    def steps(self, steps, iteration, seed):
        return self.found(iteration) if callable(self.found) else self.found


@pytest.mark.parametrize("found", [[], [3, 1], [1, 1], [-1], [4, 9], [0.5], ["1"]], ids=str)
def test_a_window_of_ones_own_must_lie_within_the_steps(found, folders):
    with pytest.raises(VideoAlignError, match=r"model\.window \(Odd\) gave .* ascending"):
        policy(FlowGRPO, folders, window=Odd(found))


def test_a_window_of_ones_own_always_gives_as_many_steps(folders, prompts):
    module = policy(FlowGRPO, folders, window=Odd(lambda iteration: list(range(iteration + 1))))
    with pytest.raises(VideoAlignError, match=r"gave 2 steps in iteration 1 and 1 before"):
        fit(module, groups(prompts), steps=2)
    with pytest.raises(VideoAlignError, match=r"model\.window \(Odd\) failed: ZeroDivisionError"):
        policy(FlowGRPO, folders, window=Odd(lambda iteration: 1 / 0))


# --- references, guidance, devices ------------------------------------------------------------------------------------


def test_a_refreshed_reference_is_the_losss_alone(folders, prompts):
    """Callbacks go on to compare with the policy that training started from."""
    model = policy(OnlineDPO, folders, refresh=1)
    begun = state(model)
    fit(model, groups(prompts), max_epochs=2, steps=-1)
    assert model._refreshed and any(not torch.equal(model._refreshed[n], begun[n]) for n in begun)
    with model.as_refreshed() as net:
        inside = {n: p.detach().clone() for n, p in net.named_parameters() if n in model._refreshed}
    assert all(torch.equal(value, model._refreshed[name]) for name, value in inside.items())
    sampler = PromptSampler(model, SIZE, groups(prompts).items)
    with model.as_reference() as net:
        assert net is model.policy and not any(layer.scaling and not layer.disable_adapters for layer in adapted(net))
    assert sampler.aligned is model


def adapted(net):
    return [module for module in net.modules() if hasattr(module, "disable_adapters") and hasattr(module, "lora_A")]


def test_what_a_checkpoint_held_goes_to_the_device_that_trains(folders, monkeypatch):
    """Lightning reads a checkpoint before it moves the module, so that its tensors lie in the main memory."""
    for kind, options in ((DiffusionNFT, {"old_decay": 0.5}), (AWM, {"kl_average": 0.5}), (OnlineDPO, {"refresh": 2})):
        model = policy(kind, folders, **options)
        model.take_further({name: model.kept() for name in model.further_tensors()})
        monkeypatch.setattr(FlowSFT, "on_train_start", lambda self: None)
        model.policy.to("meta")  # stands for a GPU
        model.on_train_start()
        found = [tensor for tensors in model.further_tensors().values() for tensor in tensors.values()]
        assert found and {tensor.device.type for tensor in found} == {"meta"}


def test_guided_samples_are_told_where_the_loss_is_not(folders, prompts):
    words = "cfg_scale is 4, but .* trains the velocity without guidance"
    for kind in (OnlineDPO, DiffusionNFT, AWM):
        with pytest.warns(UserWarning, match=words):
            fit(policy(kind, folders, sampling=replace(SIZE, cfg_scale=4.0)), groups(prompts), 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=words)
        fit(policy(FlowGRPO, folders, sampling=replace(SIZE, cfg_scale=4.0)), groups(prompts), 1)
        fit(policy(DiffusionNFT, folders), groups(prompts), 1)


def test_times_of_training_are_not_grpos(folders):
    with pytest.raises(VideoAlignError, match=r"model\.times is not read: FlowGRPO .* leave model\.times out"):
        policy(FlowGRPO, folders, times=TimeLaw(lowest=0.6))


def test_samples_are_made_for_the_frame_rate_that_is_judged(folders, prompts):
    """The positions of LTX depend on model.fps; those of Wan do not."""
    one = policy(DiffusionNFT, folders, "ltx", fps=25.0)
    with pytest.raises(VideoAlignError, match=r"sampling\.fps is 16, and model\.fps 25"):
        fit(one, groups(prompts), 1)
    with pytest.raises(VideoAlignError, match=r"sampling\.fps is 16, and model\.fps 25"):
        SideBySide(PROMPTS, replace(SIZE, fps=16)).check_size(one)
    SideBySide(PROMPTS, replace(SIZE, fps=25)).check_size(one)
    SideBySide(PROMPTS, SIZE).check_size(policy(DiffusionNFT, folders, fps=25.0))
