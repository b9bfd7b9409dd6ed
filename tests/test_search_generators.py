"""Search with generators: candidates are plain samples; memory and costs; `generate` and `compare`."""

import functools
from pathlib import Path

import pytest
import torch
import yaml

import videoalign
from compare_kit import PROMPTS, compare, frames, generation, records, settings, videos
from helpers import FEW_TOKENS, call, flags, strict_json
from videoalign import VideoAlignError
from videoalign.commands import arms
from videoalign.miniature.networks.pipelines import make_generator
from videoalign.models import searcher as module
from videoalign.models.candidates import Candidates
from videoalign.models.evaluations import Evaluations
from videoalign.models.generator_folder import load_generator
from videoalign.models.guidance import Guidance, steering
from videoalign.models.noisy_reward import NoisyReward, NoisyRewardShape
from videoalign.models.particles import Particles
from videoalign.models.sde import FlowSDE
from videoalign.models.search import BestOfN, Pruning
from videoalign.models.searcher import Searcher

STEPS = 5
SHAPE = (16, 2, 4, 4)


@pytest.fixture(scope="module", params=["wan", "ltx"])
def family(request, tmp_path_factory):
    """A generator with a solver of several steps (UniPC) or of one (Euler), its reward, and what samples need."""
    folder = tmp_path_factory.mktemp("generator") / request.param
    make_generator(folder, request.param, hidden=48, layers=3, max_tokens=FEW_TOKENS)
    generator = load_generator(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reward = NoisyReward(generator, NoisyRewardShape(blocks=1, hidden=16)).eval().requires_grad_(False)
    condition = generator.condition(generator.encode_prompts([PROMPTS[0]]))
    null = generator.null_condition(generator.encode_prompts([""])[0])
    return generator, reward, condition, null


def noise(count=4):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))


def plain(family, start, scale=2.0):
    generator, _, condition, null = family
    return torch.cat([generator.sample(condition, one, STEPS, scale, null) for one in start.split(1)])


def candidates(family, start, **options):
    generator, _, condition, null = family
    return Candidates(generator, condition, start, STEPS, **{"cfg_scale": 2.0, "null": null, **options})


def run(path, begin=0, end=STEPS):
    for number in range(begin, end):
        path.step(number, path.velocity(number))
    return path.x


@pytest.mark.parametrize("at_once", [None, 3])
def test_candidates_are_the_samples_of_their_noises(family, at_once):
    path = candidates(family, noise(), at_once=at_once)
    torch.testing.assert_close(run(path), plain(family, noise()), rtol=1e-4, atol=1e-4)
    assert len(path.times) == STEPS + 1 and path.times[-1] == 0.0
    assert path.times == sorted(path.times, reverse=True)


def test_what_is_left_goes_on_as_it_would_have(family):
    """The solvers remember earlier velocities; those of the candidates that are left stay theirs."""
    path = candidates(family, noise())
    run(path, end=3)
    path.keep([3, 1, 1])
    torch.testing.assert_close(run(path, 3), plain(family, noise())[[3, 1, 1]], rtol=1e-4, atol=1e-4)


def test_after_a_jump_the_past_is_forgotten(family):
    one, other = (candidates(family, noise()[rows]) for rows in ([0, 1], [2, 3]))
    for path in (one, other):
        run(path, end=2)
        path.jump(2, noise()[:2] * 0.5)
    assert torch.equal(run(one, 3), run(other, 3))
    assert one.x.isfinite().all()


def searcher(family, search, guide=None, **scales):
    generator, reward, _, _ = family
    return Searcher(search, generator, reward, guide or Guidance(strength=0.0), STEPS, {"cfg_scale": 2.0, **scales})


@pytest.mark.parametrize(
    "search",
    [BestOfN(candidates=3), Pruning(candidates=4, spread=1.0), Particles(candidates=3, threshold=1.0, strength=50.0)],
    ids=lambda search: type(search).__name__,
)
def test_a_search_gives_one_video_that_belongs_to_its_seed(family, search):
    _, reward, condition, null = family
    found = [searcher(family, search)(condition, null, seed, noise(1), "key") for seed in (5, 5, 6)]
    latents, chosen = found[0]
    assert latents.shape == (1, *SHAPE) and latents.isfinite().all()
    assert torch.equal(latents, found[1][0]) and not torch.equal(latents, found[2][0])
    if isinstance(search, BestOfN):
        every = plain(family, search.noises(5, SHAPE, torch.device("cpu")))
        with torch.no_grad():
            values = search.scalar(
                reward.normalise(
                    reward(every, torch.zeros(3), {n: p.expand(3, *p.shape[1:]) for n, p in condition.items()})
                )
            )
        torch.testing.assert_close(latents[0], every[values.argmax()], rtol=1e-3, atol=1e-3)
        assert chosen.reward == pytest.approx(float(values.max()), rel=1e-3)
    if isinstance(search, Particles):
        assert min(chosen.left) < 3  # resampled


def evaluations(family, search, guide=None, **scales):
    generator, reward, condition, null = family
    with Evaluations(generator, reward) as counted:
        searcher(family, search, guide, **scales)(condition, null, 5, noise(1), "key")
    return counted.total


def test_costs_are_counted_in_evaluations(family):
    """The reward copies one of three blocks."""
    generator, reward, condition, null = family
    assert evaluations(family, BestOfN(candidates=3)) == pytest.approx(3 * STEPS * 2 + 3 / 3)
    assert evaluations(family, BestOfN(candidates=3, at_once=2), cfg_scale=1.0) == pytest.approx(3 * STEPS + 1)
    particles = Particles(candidates=3, at=(0.2, 0.4))
    assert evaluations(family, particles, cfg_scale=1.0) == pytest.approx(3 * STEPS + 3 * 3 / 3)
    pruned = evaluations(family, Pruning(candidates=6, at=(0.2, 0.4)), cfg_scale=1.0)
    assert 6 + 3 + 6 / 3 < pruned < 6 * 2 + 3 + 12 / 3
    guide = Guidance(strength=1.0)
    with Evaluations(generator, reward) as counted:
        generator.sample(condition, noise(2)[:1], STEPS, 2.0, null, steer=steering(reward, guide, condition))
    guided = (STEPS - 1) * 3 / 3  # all steps but the first, each with a gradient
    assert counted.total == pytest.approx(STEPS * 2 + guided)
    assert evaluations(family, BestOfN(candidates=2), guide) == pytest.approx(2 * (STEPS * 2 + guided) + 2 / 3)
    generator.sample(condition, noise(1), 1)
    assert counted.total == pytest.approx(STEPS * 2 + guided)  # nothing is counted after the block


def test_more_candidates_than_memory_are_refused_beforehand(family, monkeypatch):
    condition, null = family[2:]
    with pytest.raises(VideoAlignError, match="take fewer candidates"):  # whatever this machine has
        searcher(family, BestOfN(candidates=10**10)).check_memory(condition, null, noise(1))
    monkeypatch.setattr(module, "free_memory", lambda device: 4_000_000)
    searcher(family, BestOfN(candidates=2)).check_memory(condition, null, noise(1))
    with pytest.raises(VideoAlignError, match=r"set search\.at_once to") as refused:
        searcher(family, BestOfN(candidates=100)).check_memory(condition, null, noise(1))
    most = int(str(refused.value).rpartition("at_once to ")[2].split()[0])
    searcher(family, BestOfN(candidates=100, at_once=most)).check_memory(condition, null, noise(1))
    with pytest.raises(VideoAlignError, match=f"{most + 1} of them computed at once"):
        searcher(family, BestOfN(candidates=100, at_once=most + 1)).check_memory(condition, null, noise(1))


def test_a_reward_that_is_not_finite_is_refused(family):
    generator, _, condition, null = family
    broken = NoisyReward(generator, NoisyRewardShape(blocks=1, hidden=16)).eval().requires_grad_(False)
    broken.head[-1].weight.data.fill_(float("nan"))
    with pytest.raises(VideoAlignError, match=r"views of candidates are not finite.*key, candidate"):
        Searcher(BestOfN(candidates=2), generator, broken, Guidance(strength=0.0), STEPS, {})(
            condition, null, 0, noise(1), "key"
        )


# --- commands -------------------------------------------------------------------------------------

PARTICLES = (
    "{class_path: Particles, init_args: {candidates: 3, at: [0.4], threshold: 1.0, sde: {class_path: DanceSDE}}}"
)


def generate(world, out, **options):
    given = generation(world, out) | {"noisy_reward": world / "nrg"} | options
    return call("generate", *flags(**{name: value for name, value in given.items() if value is not None}))


def test_generate_searches_and_records_it(world, tmp_path):
    assert generate(world, tmp_path / "two", search=PARTICLES, steps=6) == 0
    assert generate(world, tmp_path / "one", search=PARTICLES, steps=6, batch_size=1) == 0
    made = records(tmp_path / "two")
    one, two = videos(tmp_path / "one"), videos(tmp_path / "two")
    assert one.keys() == two.keys()
    for key, video in one.items():  # videos are searched one by one; prompts and frames are of batches, and round
        assert (frames(video).float() - frames(two[key]).float()).abs().mean() < 0.5
    for record in made.values():
        found = record["search"]
        assert (found["kind"], found["candidates"], found["sde"]["kind"]) == ("Particles", 3, "DanceSDE")
        assert len(found["left"]) == 2 and isinstance(found["reward"], float)
        assert record["guide"]["strength"] == 0  # the reward searches, and does not guide
        assert record["evaluations"] == pytest.approx(3 * 6 + 2 * 3)  # the reward copies both blocks
    assert generate(world, tmp_path / "plain", noisy_reward=None, steps=6) == 0
    assert {record["evaluations"] for record in records(tmp_path / "plain").values()} == {6.0}
    assert {r["seed"] for r in made.values()} == {r["seed"] for r in records(tmp_path / "plain").values()}
    assert not videos(tmp_path / "plain").items() & two.items()


def test_a_search_may_be_guided_too(world, tmp_path):
    assert generate(world, tmp_path / "out", search="BestOfN", strength=5, samples=1) == 0
    for record in records(tmp_path / "out").values():
        assert record["guide"]["strength"] == 5 and record["search"]["kind"] == "BestOfN"
        assert record["evaluations"] == pytest.approx(4 * (3 + 2 * 3 + 1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"search": "Nothing"}, "Nothing"),
        ({"search": "{class_path: BestOfN, init_args: {candidates: 1}}"}, "needs at least 2"),
        ({"search": "{class_path: BestOfN, init_args: {particles: 3}}"}, "particles"),
        ({"search": "Pruning", "steps": 1}, "steps must be at least 2"),
        ({"search": "BestOfN", "weights": "TA=1.0"}, "--weights are those of guidance"),
        ({"search": "BestOfN", "noisy_reward": None}, "name its folder with --noisy-reward"),
        ({"search": "{class_path: Particles, init_args: {candidates: 10000000000}}"}, "take fewer candidates"),
    ],
)
def test_generate_refuses_a_search(options, words, world, tmp_path, capsys):
    assert generate(world, tmp_path / "out", **options) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("videoalign: error:") == 1 and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_compare_sets_searches_beside_the_base_at_their_cost(world, tmp_path, capsys):
    searched = {"noisy_reward": world / "nrg"}
    ways = {
        "best": searched | {"search": {"class_path": "BestOfN", "init_args": {"candidates": 2}}},
        "pruned": searched
        | {"search": {"class_path": "videoalign.models.search.Pruning", "init_args": {"candidates": 3}}},
    }
    config = settings(world, tmp_path / "out", reward_model=None, samples=1, arms=ways)
    assert compare(tmp_path / "c.yaml", config) == 0
    found = strict_json(tmp_path / "out" / "comparison.json")["arms"]
    assert found["base"]["evaluations"] == 3 and found["base"]["cost"] == 1
    assert found["best"]["cost"] == pytest.approx((2 * 3 + 2) / 3)
    assert found["pruned"]["evaluations"] == pytest.approx(3 + 3 + 2)  # one reading, after which one is left
    assert "own view" in found["pruned"]["means"] and found["best"]["time"] > 0
    assert "| cost | time |" in (tmp_path / "out" / "comparison.md").read_text()
    assert compare(tmp_path / "c.yaml", config) == 0  # nothing has changed
    ways["best"]["search"]["init_args"]["candidates"] = 3
    assert compare(tmp_path / "c.yaml", {**config, "arms": ways}) == 2
    assert "best holds videos of other settings" in capsys.readouterr().err
    lacking = {"a": {"search": {"class_path": "BestOfN"}}}
    assert compare(tmp_path / "c.yaml", settings(world, tmp_path / "other", reward_model=None, arms=lacking)) == 2
    assert "an arm with a search needs a noisy reward" in capsys.readouterr().err


def test_the_default_sde_of_particles_is_flow_grpos():
    assert Particles().sde == FlowSDE(level=0.7)


def test_the_shipped_comparison_of_searches_is_read(monkeypatch):
    seen, path = {}, Path(videoalign.__file__).parent / "experiments/nrg/search.yaml"
    monkeypatch.setattr(arms, "compare", functools.wraps(arms.compare)(lambda **given: seen.update(given)))
    assert call("compare", "--config", path, "--out=o", "--prompts=p.txt") == 0
    told = yaml.safe_load(path.read_text())["arms"]
    assert seen["arms"].keys() == told.keys()
    for name, arm in seen["arms"].items():
        wanted = told[name].get("search")
        assert (arm.search and f"{type(arm.search).__module__}.{type(arm.search).__name__}") == (
            wanted and wanted["class_path"]
        )
    assert seen["arms"]["particles"].search == Particles(at_once=1, at=[0.2, 0.4, 0.6, 0.8])
