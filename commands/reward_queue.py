"""The queue of a reward server: samples of concurrent requests are rated together, by one thread."""

import queue
import threading
import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import VideoAlignError
from ..models.reward_messages import Samples
from ..models.scoring import ScoresVideos, failing_as, scored

SERVED = "served"
"""What the reward is called in messages to clients."""


@dataclass
class Job:
    """Samples of one request, and their rewards when there are some.

    Attributes:
        samples: What is rated.
        rewards: Rewards (B,) by name; a client that has left cancels it.
    """

    samples: Samples
    rewards: "Future[dict[str, Tensor]]" = field(default_factory=Future)

    @property
    def kind(self) -> tuple:
        """What samples must share to be rated in one batch."""
        values = self.samples.values
        return self.samples.kind, values.dtype, tuple(values.shape[1:])


class RewardQueue:
    """Rates the samples of requests in the order in which they came, those of several requests in one batch.

    Args:
        reward: The reward.
        batch_size: Largest number of samples of requests that are put together; a larger request is a batch by itself.

    Attributes:
        counts: Number of ``samples`` and ``batches`` that were rated, of ``failures`` of the reward, and ``seconds``
            that it took.
    """

    def __init__(self, reward: ScoresVideos, batch_size: int) -> None:
        self.reward, self.batch_size = reward, batch_size
        self.counts: Counter[str] = Counter(samples=0, batches=0, failures=0, seconds=0)
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._next: Job | None = None
        self._asked = threading.Lock()  # a reward's tokenizer, and others of its parts, are not for two threads
        threading.Thread(target=self._work, name="rewards", daemon=True).start()

    def put(self, samples: Samples) -> "Future[dict[str, Tensor]]":
        """Add samples to the end of the queue.

        Args:
            samples: What is rated.

        Returns:
            Rewards (B,) by name, when they are there.
        """
        job = Job(samples)
        self._jobs.put(job)
        return job.rewards

    def check(self, prompts: list[str]) -> None:
        """Let the reward look at prompts, between two batches.

        Args:
            prompts: Prompts of samples that will come.

        Raises:
            VideoAlignError: Where it refuses one.
        """
        with self._asked:
            with failing_as(f"reward {self.reward.name} failed in check"):
                self.reward.check(prompts)

    def _work(self) -> None:
        while True:
            jobs = [job for job in self._together() if job.rewards.set_running_or_notify_cancel()]
            if len(jobs) > 1 and not self._rated(jobs, alone=False):
                for job in jobs:  # one of them cannot be rated; the others can
                    self._rated([job])
            elif len(jobs) == 1:
                self._rated(jobs)

    def _together(self) -> list[Job]:
        """The first job, and those behind it that can share its batch."""
        jobs = [self._next or self._jobs.get()]
        self._next, size = None, len(jobs[0].samples.prompts)
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return jobs
            size += len(job.samples.prompts)
            if size > self.batch_size or job.kind != jobs[0].kind:
                self._next = job
                return jobs
            jobs.append(job)

    def _rated(self, jobs: list[Job], alone: bool = True) -> bool:
        """Rate jobs in one batch, and say whether that worked; only a job alone is told of a failure."""
        begun = time.monotonic()
        try:
            rated = self._rewards([job.samples for job in jobs])
        except BaseException as error:  # whatever it was, this thread must go on, and the client must hear of it
            if alone:
                self.counts["failures"] += 1
                jobs[0].rewards.set_exception(error)
            return False
        self.counts["batches"] += 1
        self.counts["samples"] += sum(len(job.samples.prompts) for job in jobs)
        self.counts["seconds"] += time.monotonic() - begun
        for job, rewards in zip(jobs, rated, strict=True):
            job.rewards.set_result(rewards)
        return True

    def _rewards(self, requests: list[Samples]) -> list[dict[str, Tensor]]:
        """Rewards of the samples of each request."""
        kind, values = requests[0].kind, torch.cat([samples.values for samples in requests])
        if kind != self.reward.needs:
            raise VideoAlignError(f"{self.reward.name} reads {self.reward.needs}, not {kind}")
        given = {"videos": None, "latents": None, kind: values}
        prompts = [prompt for samples in requests for prompt in samples.prompts]
        names = [f"sample {number}" for samples in requests for number in range(1, len(samples.prompts) + 1)]
        with self._asked:
            found = scored({SERVED: self.reward}, given["videos"], given["latents"], prompts, names)
        parts = {n.removeprefix(f"{SERVED}/"): v.split([len(s.prompts) for s in requests]) for n, v in found.items()}
        return [{name: part[number] for name, part in parts.items()} for number in range(len(requests))]
