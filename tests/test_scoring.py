"""Rewards by name: what is asked of them, and that nothing but one finite number a sample passes."""

from collections.abc import Mapping

import jsonargparse
import numpy as np
import pytest
import torch

from videoalign import VideoAlignError
from videoalign.datamodules.contracts import ScoresVideos, missing, require
from videoalign.models.scoring import as_rewards, needed, rated_latents, scored

NAMES = ["p0-s0", "p0-s1", "p1-s0"]
PROMPTS = ["a circle", "a circle", "a square"]
VIDEOS = torch.arange(3).view(3, 1, 1, 1, 1).expand(3, 2, 3, 4, 4).to(torch.uint8)


class Given:
    """A reward that gives what it was given.

    Args:
        answer: What it gives, or the error that it raises.
        needs: What it reads.
    """

    def __init__(self, answer: object = None, needs: str = "videos") -> None:
        self.answer, self.needs = answer, needs
        self.seen: list = []

    @property
    def name(self) -> str:
        return "a stand-in"

    def check(self, prompts: "list[str]") -> None:
        """Any prompt will do."""

    def __call__(self, videos, prompts):
        self.seen.append((videos, prompts, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    def place(self, device) -> None:
        """Nothing is moved."""


def rate(reward, videos=VIDEOS, latents=None, key="mine"):
    return scored({key: reward}, videos, latents, PROMPTS, NAMES)


def test_names_are_those_of_the_mapping_and_of_the_reward():
    first = Given({"VQ": torch.tensor([1.0, 2.0, 3.0], requires_grad=True), "TA": torch.tensor([1, 2, 3])})
    second, latents = Given({"VQ": torch.ones(3).double()}, "latents"), torch.zeros(3, 4, 1, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = scored({"a": first, "b": second}, VIDEOS, latents, PROMPTS, NAMES)
    assert list(found) == ["a/VQ", "a/TA", "b/VQ"]
    assert found["a/TA"].tolist() == [1, 2, 3]
    assert all(v.dtype == torch.float32 and not v.requires_grad for v in found.values())
    assert torch.equal(first.seen[0][0], VIDEOS) and torch.equal(second.seen[0][0], latents)
    assert first.seen[0][1:] == (PROMPTS, False, False)  # neither gradients nor another precision
    assert needed({"a": first, "b": second}) == {"videos", "latents"}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "gave a NoneType for p0-s0, p0-s1, p1-s0"),
        ({}, "gave an empty dictionary"),
        (torch.zeros(3), "gave a Tensor"),
        ({"VQ": torch.zeros(2)}, r"gave torch.float32 \(2,\) under VQ for 3 samples"),
        ({"VQ": torch.zeros(3, 1)}, r"\(3, 1\) under VQ"),
        ({"VQ": [1.0, 2.0, 3.0]}, "gave list under VQ"),
        ({"VQ": torch.zeros(3, dtype=torch.complex64)}, "complex64"),
        ({"VQ": torch.tensor([0.0, float("nan"), 1.0])}, "NaN or infinity under VQ for p0-s1;"),
        ({"VQ": torch.tensor([0.0, 1.0, float("-inf")])}, "infinity under VQ for p1-s0;"),
        ({"VQ": torch.tensor([1e300] * 3, dtype=torch.float64)}, "infinity under VQ for p0-s0, p0-s1, p1-s0"),
        ({"VQ": torch.zeros(3).to_sparse()}, r"\(3,\) \(torch.sparse_coo, on cpu\) under VQ"),
        ({"VQ": torch.zeros(3, device="meta")}, "on meta"),
        ({"a/b": torch.zeros(3)}, "'a/b'; a name is a printable text without slashes"),
        ({"\ud800": torch.zeros(3)}, "a name is a printable text"),
        ({"a\nb": torch.zeros(3)}, "a name is a printable text"),
        (SystemExit(0), r"failed on p0-s0, p0-s1, p1-s0: SystemExit: 0 "),
        ({"": torch.zeros(3)}, "''; a name"),
        ({3: torch.zeros(3)}, "3; a name"),
        (VideoAlignError("too long"), "cannot rate p0-s0, p0-s1, p1-s0: too long"),
        (ValueError("odd\nmore"), r"failed on p0-s0, p0-s1, p1-s0: ValueError: odd \(.*test_scoring.py, line"),
        (torch.OutOfMemoryError("CUDA out of memory"), "failed on .*OutOfMemoryError: CUDA out of memory"),
    ],
    ids=str,
)
def test_what_is_no_rating_is_refused_with_the_reward_and_the_samples(answer, words):
    with pytest.raises(VideoAlignError, match=r"^reward mine \(a stand-in\) .*" + words):
        rate(Given(answer))


def test_a_signal_is_no_failure():
    with pytest.raises(KeyboardInterrupt):
        rate(Given(KeyboardInterrupt()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reward": Given({"x": torch.zeros(3)}, "latents")}, "reads latents, but there are only videos"),
        ({"reward": Given({"x": torch.zeros(3)}, "frames")}, "needs 'frames'; .*videos or latents"),
        ({"key": "a/b"}, "rewards: 'a/b' cannot be a name"),
        ({"videos": VIDEOS[:2]}, "2 samples, 3 prompts and 3 names"),
    ],
)
def test_what_cannot_be_rated_is_not_asked(change, words):
    reward = change.get("reward", Given({"x": torch.zeros(3)}))
    with pytest.raises(VideoAlignError, match=words):
        rate(**{"reward": reward, **change})
    assert not reward.seen


class Vandal(Given):
    """Writes to what it is given, and to torch's settings."""

    def __call__(self, videos, prompts):
        videos.zero_()
        prompts.clear()
        torch.set_default_dtype(torch.bfloat16)
        return super().__call__(videos, prompts)


def test_what_a_reward_writes_reaches_nobody_else():
    videos, prompts, next_one = VIDEOS.clone(), list(PROMPTS), Given({"x": torch.ones(3)})
    scored({"vandal": Vandal({"x": torch.ones(3)}), "next": next_one}, videos, None, prompts, NAMES)
    assert torch.equal(videos, VIDEOS) and prompts == PROMPTS and torch.get_default_dtype() == torch.float32
    ((seen, texts, *_),) = next_one.seen
    assert torch.equal(seen, VIDEOS) and texts == PROMPTS


class Changing(Given):
    """Gives other names, or other features, from its second call on."""

    features = None

    def __init__(self, names=("x", "x"), widths=(None, None)):
        super().__init__()
        self.names, self.widths, self.calls = names, widths, 0

    def __call__(self, videos, prompts):
        turn = min(self.calls, 1)
        self.calls, width = self.calls + 1, self.widths[turn]
        self.features = None if width is None else torch.zeros(len(videos), width)
        return {self.names[turn]: torch.zeros(len(videos))}


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (Changing(names=("x", "y")), "of c there are rewards r/y, of samples before r/x"),
        (Changing(widths=(None, 3)), r"of c there are features r \(3,\), of samples before none"),
        (Changing(widths=(3, 2)), r"features r \(2,\), of samples before r \(3,\)"),
    ],
)
def test_a_reward_gives_the_same_for_all_samples(reward, words):
    given = torch.zeros(3, 4, 1, 2, 2), ["p"] * 3, ["a", "b", "c"]
    with pytest.raises(VideoAlignError, match=words):
        rated_latents({"r": reward}, lambda x, names: VIDEOS[: len(x)], *given, 2, torch.device("cpu"))


class Nameless(Given):
    """Cannot say its name."""

    name = property(lambda self: 1 / 0)


def test_a_property_that_fails_is_told_whose_it_is():
    with pytest.raises(VideoAlignError, match=r"^reward mine cannot say its name.*ZeroDivisionError"):
        rate(Nameless({"x": torch.zeros(3)}))


def test_many_samples_are_not_all_listed():
    names = [f"s{i}" for i in range(9)]
    with pytest.raises(VideoAlignError, match="for s0, s1, s2, s3 and 5 more, but"):
        scored({"mine": Given()}, VIDEOS[:1].expand(9, -1, -1, -1, -1), None, ["p"] * 9, names)


def test_numbers_of_any_kind_become_tensors():
    assert as_rewards([1, 2.5], 2)["score"].tolist() == [1, 2.5]
    assert as_rewards({"VQ": np.array([3, 4])}, 2)["VQ"].dtype == torch.float32
    assert as_rewards(0.5, 1)["score"].shape == (1,) and as_rewards(0.5, 2)["score"].shape == ()
    for wrong in ("text", {"VQ": ["a"]}, {"VQ": None}, [[1], [1, 2]]):
        with pytest.raises(VideoAlignError, match="is no list of numbers"):
            as_rewards(wrong, 2)


# --- as a contract ----------------------------------------------------------------------------------------------------


class NoReward:
    """Has some of the members."""

    name = "x"

    def check(self, prompts):
        """Any prompt will do."""


def test_what_is_no_reward_is_told_what_it_lacks():
    assert not missing(Given(), ScoresVideos)
    with pytest.raises(VideoAlignError, match=r"model.rewards.x needs a reward .*; NoReward has no needs, place\(\)"):
        require(NoReward(), ScoresVideos, "model.rewards.x")


def test_a_reward_is_named_by_its_class_path_in_yaml():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--rewards", type=Mapping[str, ScoresVideos])
    path = "videoalign.models.function_scores.FunctionScores"
    text = f"{{a: {{class_path: {path}, init_args: {{function: 'math:sqrt'}}}}}}"
    found = parser.instantiate(parser.parse_args(["--rewards", text]))
    assert type(found.rewards["a"]).__name__ == "FunctionScores"
    with pytest.raises(jsonargparse.ArgumentError):
        parser.parse_args(["--rewards", "{a: {class_path: torch.nn.Identity}}"])
