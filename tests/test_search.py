"""Search at sampling time: exactness of the particles on a Gaussian, and the bookkeeping of every kind of search."""

import itertools
import math
import random

import pytest
import torch

from videoalign import VideoAlignError
from videoalign.models.particles import Particles, Weighed, systematic
from videoalign.models.sde import DanceSDE
from videoalign.models.search import BestOfN, Pruning, Search, read_after

# --- particles of a Gaussian ----------------------------------------------------------------------


class Gaussian:
    """Samples of N(0, 1) along its flow, in float64, with the velocity in closed form and Euler's steps.

    They begin at quantiles of the noise, so that what a test sees is not the luck of a draw.
    """

    def __init__(self, count, steps):
        self.times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
        self.x = torch.special.ndtri((torch.arange(count, dtype=torch.float64)[:, None] + 0.5) / count)
        self.copies = []

    def velocity(self, number):
        t = self.times[number]
        return (t - (1 - t)) / ((1 - t) ** 2 + t**2) * self.x

    def step(self, number, velocity):
        self.x = self.x + (self.times[number + 1] - self.times[number]) * velocity

    def jump(self, number, x):
        self.x = x

    def keep(self, rows):
        self.x = self.x[rows]
        self.copies.append(len(rows) - len(set(rows)))


def exact(x, t):
    """ln E[exp(x_0) | x_t], which a noise-aware reward would learn; see the tests of Flow-NRG."""
    s = (1 - t) ** 2 + t**2
    return ((1 - t) * x / s + t**2 / (2 * s)).squeeze(1)


def crude(x, t):
    """A reward that is right at t = 0 only: the last potential must correct all others."""
    return (1 - t) * x.squeeze(1) + 0.5 * t * torch.sin(3 * x.squeeze(1))


@pytest.mark.parametrize("potential", ["difference", "maximum"])
@pytest.mark.parametrize("reward", [exact, crude], ids=["exact", "crude"])
def test_particles_reach_the_tilted_mean(reward, potential):
    """N(0, 1) tilted by exp(x_0) is N(1, 1)."""
    path = Gaussian(20000, 200)
    particles = Particles(candidates=20000, strength=1.0, threshold=0.9, potential=potential)
    weighed, left = particles.weigh(path, reward, 0)
    shares, x = weighed.logs.softmax(0), path.x.squeeze(1)
    mean = float((shares * x).sum())
    assert mean == pytest.approx(1.0, rel=0.02)
    assert float((shares * (x - mean) ** 2).sum()) == pytest.approx(1.0, abs=0.05)
    assert path.copies and min(left) < 20000
    torch.testing.assert_close(weighed.spent, x)  # whatever was read in between, potentials multiply to exp(r(x_0))


def test_particles_whose_steps_are_all_stochastic_do_too():
    path = Gaussian(2000, 25)
    particles = Particles(candidates=2000, strength=1.0, sde=DanceSDE(level=0.5), stochastic="always", at=(0.5, 0.9))
    weighed, _ = particles.weigh(path, exact, 0)
    shares, x = weighed.logs.softmax(0), path.x.squeeze(1)
    mean = float((shares * x).sum())
    assert mean == pytest.approx(1.0, rel=0.05)
    assert float((shares * (x - mean) ** 2).sum()) == pytest.approx(1.0, abs=0.15)


def test_copies_part_in_the_step_after_resampling_and_only_there():
    path, moved = Gaussian(6, 5), []
    jump = path.jump
    path.jump = lambda number, x: (moved.append(number), jump(number, x))
    rewards = iter([torch.tensor([9.0, 0, 0, 0, 0, 0]), torch.zeros(6), torch.zeros(6)])
    particles = Particles(candidates=6, at=(0.2, 0.4))
    weighed, left = particles.weigh(path, lambda x, t: next(rewards), 3)
    assert left == [1, 6, 6]
    assert moved == [1]
    assert len(path.x.unique()) == 6
    again = Gaussian(6, 5)
    rewards = iter([torch.tensor([9.0, 0, 0, 0, 0, 0]), torch.zeros(6), torch.zeros(6)])
    particles.weigh(again, lambda x, t: next(rewards), 3)
    assert torch.equal(again.x, path.x)  # what is drawn belongs to the seed
    assert weighed.effective() == pytest.approx(6)  # all copies lost as much when the reading was taken back


def test_weights_of_a_maximum_are_corrected_at_the_end():
    particles = Particles(strength=2.0, potential="maximum")
    weighed = Weighed.equal(torch.zeros(2, 1))
    for rewards in ([1.0, 0.5], [0.0, 3.0]):
        weighed = weighed.after(torch.tensor(rewards), particles, False)
    assert weighed.logs.tolist() == [4.0, 7.0]  # 2 (1 + 1) and 2 (0.5 + 3)
    weighed = weighed.kept([1, 1]).after(torch.tensor([1.0, 2.0]), particles, True)
    assert weighed.logs.tolist() == [2.0 - 7.0, 4.0 - 7.0]


def test_the_best_particle_or_a_draw_by_weight():
    rewards = torch.tensor([0.0, 1.0, 1.1, -1.0])
    best = Particles(strength=1.0, at=(0.5,))
    assert best(Gaussian(4, 2), lambda x, t: rewards, 0)[::2] == (2, pytest.approx(1.1))
    draw = Particles(strength=1.0, at=(0.5,), choose="draw")
    drawn = [draw(Gaussian(4, 2), lambda x, t: rewards, seed).row for seed in range(600)]
    shares = rewards.softmax(0).tolist()
    assert [drawn.count(k) / 600 for k in range(4)] == pytest.approx(shares, abs=0.06)


def test_systematic_resampling_draws_each_row_its_share():
    source = random.Random(0)
    for count in (2, 5, 64):
        shares = torch.tensor([source.random() ** 4 for _ in range(count)], dtype=torch.float64)
        shares[-1] = 0.0
        shares /= shares.sum()
        for u in (0.0, 0.3, 0.999999):
            rows = systematic(shares, u)
            assert len(rows) == count and rows == sorted(rows)
            for k, share in enumerate(shares.tolist()):
                assert math.floor(count * share - 1e-9) <= rows.count(k) <= math.ceil(count * share + 1e-9)
    assert systematic(torch.full((4,), 0.25), 0.5) == [0, 1, 2, 3]
    expected = sum(systematic(shares, u / 500).count(3) for u in range(500)) / 500
    assert expected == pytest.approx(64 * float(shares[3]), abs=0.01)  # unbiased over u


# --- other searches, on a stub --------------------------------------------------------------------


class Stub:
    """Candidates that are their own numbers, and do not move."""

    def __init__(self, count, steps):
        self.times = [1 - n / steps for n in range(steps + 1)]
        self.x, self.velocities = torch.arange(count).double(), []

    def velocity(self, number):
        self.velocities.append(len(self.x))
        return self.x

    def step(self, number, velocity):
        pass

    def keep(self, rows):
        self.x = self.x[rows]


def test_best_of_n_reads_the_end_once():
    read = []

    def reward(x, t):
        read.append(t)
        return -((x - 2) ** 2)

    path = Stub(4, 3)
    assert BestOfN()(path, reward, 0) == (2, [4], 0.0)
    assert read == [0.0]
    assert path.velocities == [4, 4, 4]


@pytest.mark.parametrize("seed", range(5))
def test_pruning_leaves_those_that_are_drawn_and_then_one(seed):
    table = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    read = []

    def reward(x, t):
        read.append((t, x.long().tolist()))
        return table[len(read) - 1, x.long()]

    path = Stub(6, 10)
    chosen = Pruning(temperature=0.5)(path, reward, seed)
    assert [t for t, _ in read] == pytest.approx([0.8, 0.7, 0.6])  # after 2, 3 and 4 of 10 steps
    alive = [found for _, found in read]
    assert alive[0] == [0, 1, 2, 3, 4, 5]
    assert all(set(after) <= set(before) for before, after in itertools.pairwise(alive))
    total = dict.fromkeys(range(6), 0.0)
    for row, found in zip(table, alive):
        for k, share in zip(found, (row[found] / 0.5).softmax(0).tolist()):
            total[k] += share
    best = max(alive[-1], key=total.get)
    assert path.x.tolist() == [best]
    assert chosen.left == [len(alive[1]), len(alive[2]), 1]
    assert chosen.reward == pytest.approx(float(table[2, best]))
    assert path.velocities == [6, 6, len(alive[1]), len(alive[2]), 1, 1, 1, 1, 1, 1]
    assert len(alive[1]) < 6  # six different ones in six draws happen once in 65


def test_candidates_begin_at_noises_of_their_own():
    shape, device = (2, 3, 4, 4), torch.device("cpu")
    whole, more = (BestOfN(candidates=k).noises(5, shape, device) for k in (2, 4))
    assert torch.equal(whole, more[:2])  # a candidate's noise does not depend on how many there are
    assert len(more.flatten(1).unique(dim=0)) == 4
    near = Pruning(candidates=4, spread=0.1).noises(5, shape, device)
    assert torch.equal(near[0], more[0])
    torch.testing.assert_close(near[1:], math.sqrt(0.99) * more[:1] + 0.1 * more[1:])
    torch.testing.assert_close(Pruning(candidates=4, spread=1.0).noises(5, shape, device), more)


def test_the_scalar_reward_is_weighted():
    rewards = torch.tensor([[1.0, 2.0, 4.0], [0.0, 1.0, 0.0]])
    assert BestOfN(weights={"TA": 2.0, "VQ": -1.0}).scalar(rewards).tolist() == [7.0, 0.0]
    assert BestOfN().scalar(rewards).tolist() == pytest.approx([7 / 3, 1 / 3])


@pytest.mark.parametrize(
    ("at", "steps", "want"),
    [
        ((0.2, 0.3, 0.4), 50, [10, 15, 20]),
        ((0.2, 0.4, 0.6, 0.8), 4, [1, 2, 3]),
        ((0.01, 0.99), 2, [1]),
        ((0.5,), 3, [2]),
    ],
)
def test_when_the_reward_is_read(at, steps, want):
    assert read_after(at, steps) == want


def test_settings_name_the_kinds():
    found = Particles(sde=DanceSDE(level=0.2)).settings()
    assert found["kind"] == "Particles" and found["sde"] == {"kind": "DanceSDE", "level": 0.2}
    assert found["at"] == [0.2, 0.4, 0.6, 0.8] and found["candidates"] == 4  # as JSON reads them
    assert found == Particles(sde=DanceSDE(level=0.2), at_once=1).settings()  # a run may go on with another at_once
    assert BestOfN().settings() != Pruning(candidates=4).settings()

    class Own(Search):
        """A search of a user's own, which is no dataclass."""

        def __init__(self) -> None:
            self.candidates, self.weights, self.at_once, self.depth = 2, {"VQ": 1.0}, None, 3

        def __call__(self, path, reward, seed): ...

    assert Own().settings() == {"kind": "Own", "candidates": 2, "weights": {"VQ": 1.0}, "depth": 3}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BestOfN(candidates=1), "BestOfN.candidates is 1"),
        (lambda: Particles(candidates=0), "Particles.candidates is 0"),
        (lambda: BestOfN(at_once=0), "at_once is 0"),
        (lambda: BestOfN(weights={"XX": 1.0}), r"weights \['XX'\] are unknown"),
        (lambda: BestOfN(weights={"TA": 0.0}), "one of them not 0"),
        (lambda: BestOfN(weights={}), "one of them not 0"),
        (lambda: Particles(weights={"TA": math.nan}), "finite"),
        (lambda: Pruning(at=()), "must ascend"),
        (lambda: Pruning(at=(0.4, 0.2)), "must ascend"),
        (lambda: Particles(at=(0.5, 1.0)), "between 0 and 1"),
        (lambda: Pruning(spread=0.0), "spread is 0.0"),
        (lambda: Pruning(temperature=0.0), "temperature is 0.0"),
        (lambda: Particles(strength=-1.0), "strength is -1.0"),
        (lambda: Particles(strength=math.nan), "strength is nan"),
        (lambda: Particles(threshold=1.5), "threshold is 1.5"),
        (lambda: Particles(potential="sum"), "potential 'sum' is unknown"),
        (lambda: Particles(stochastic="never"), "stochastic 'never'"),
        (lambda: Particles(choose="worst"), "choose 'worst'"),
        (lambda: Particles().check(1), "steps must be at least 2, got 1"),
        (lambda: Pruning().check(1), "steps must be at least 2, got 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, words):
    with pytest.raises(VideoAlignError, match=words):
        make()


def test_best_of_n_takes_a_single_step():
    BestOfN().check(1)
    with pytest.raises(TypeError):
        Search()


@pytest.mark.parametrize("scale", [1e-320, 1e308])
def test_rewards_of_any_scale_choose_one(scale):
    """One candidate then has all of the probability."""
    path = Gaussian(3, 4)
    best = int(path.x.squeeze(1).argmax())
    if scale < 1:
        chosen = Pruning(candidates=3, temperature=scale, at=[0.5])(path, lambda x, t: x.squeeze(1), 0)
        assert math.isfinite(chosen.reward) and len(path.x) == 1
    else:
        chosen = Particles(candidates=3, strength=scale, choose="draw")(path, lambda x, t: x.squeeze(1), 0)
        assert 0 <= chosen.row < 3 and math.isfinite(chosen.reward)
    assert best == 2
