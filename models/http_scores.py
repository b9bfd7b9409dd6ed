"""A reward that another process computes: the client of `videoalign serve-reward`, or of any server like it.

A model whose libraries do not fit those of this package, or that needs a GPU of its own, is served from where it runs.
"""

import http.client
import json
import logging
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
from torch import Tensor

from .. import VideoAlignError
from .number_checks import at_least, positive
from .reward_messages import CHECK, INFO, MEDIA, SCORE, Samples, beginning, parsed
from .scoring import NEEDS, as_rewards

AGAIN = (408, 425, 429, 502, 503, 504)
"""Statuses after which the same request may succeed a little later."""
LONGEST_PAUSE = 30.0
"""Seconds that are waited at most between two attempts."""
LARGEST_ANSWER = 1 << 24
"""Bytes of an answer above which it is no answer of a reward server."""


LONGEST_WAIT = 86_400
"""Largest ``timeout``, in seconds: a day."""


class HTTPScores:
    """A reward by HTTP.

    Samples are sent as safetensors and rewards come back as JSON (:mod:`.reward_messages`). A server that is busy, gone
    or slow is asked again after growing pauses; then the run ends with a message, because a failure never becomes a
    number. A server may rate samples in other batches than the same model here would, so that rewards differ by
    rounding.

    Args:
        url: Address of the server, such as ``http://127.0.0.1:8100``.
        needs: What is sent: decoded ``videos`` or clean ``latents``.
        fps: Frame rate of the videos, in frames per second; where it is given, a server that reads another rate is
            refused.
        token: Name of the environment variable that holds the server's token; empty for none. The token itself does not
            belong into a configuration.
        timeout: Seconds within which the server must have answered, above 0.
        retries: Number of further attempts after a failed one, at least 0.
        pause: Seconds before the second attempt; they double from attempt to attempt, up to 30.
        batch_size: Number of samples in a request, at least 1.
    """

    def __init__(
        self,
        url: str,
        needs: Literal["videos", "latents"] = "videos",
        fps: float | None = None,
        token: str = "",
        timeout: float = 600.0,
        retries: int = 5,
        pause: float = 1.0,
        batch_size: int = 4,
    ) -> None:
        try:
            parts = urlsplit(url)
            parts.port  # noqa: B018  refuses what is no number
        except ValueError as error:
            raise VideoAlignError(f"url {url!r} of a reward server: {error}") from None
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or parts.query
            or parts.fragment
            or parts.username
        ):
            raise VideoAlignError(
                f"url {url!r} of a reward server must be like http://HOST:PORT, without a query and a password"
            )
        if not (url.isascii() and url.isprintable()) or " " in url or not _is_host(parts.hostname):
            raise VideoAlignError(f"url {url!r} of a reward server holds characters or a host that no address has")
        who = f"reward server {url}: "
        positive(who, timeout=timeout, fps=fps)
        at_least(0, who, retries=retries, pause=pause)
        at_least(1, who, batch_size=batch_size)
        if timeout > LONGEST_WAIT:
            raise VideoAlignError(f"{who}timeout must be at most {LONGEST_WAIT} seconds; got {timeout}")
        if needs not in NEEDS:
            raise VideoAlignError(f"{who}needs must be videos or latents; got {needs}")
        self.url, self.needs, self.video_fps, self.token = url.rstrip("/"), needs, fps, token
        self.timeout, self.retries, self.pause, self.batch_size = timeout, retries, pause, batch_size

        # a proxy cannot reach this machine's own servers
        direct = [urllib.request.ProxyHandler({})] if parts.hostname in ("localhost", "127.0.0.1", "::1") else []
        self._opener = urllib.request.build_opener(_NoRedirection, *direct)

    @property
    def name(self) -> str:
        """The server's address."""
        return f"reward server {self.url}"

    def check(self, prompts: Sequence[str]) -> None:
        """Ask the server whether it rates such samples of these prompts.

        Args:
            prompts: Prompts of all samples that there will be.

        Raises:
            VideoAlignError: Where the server is not there, reads something else, or refuses a prompt.
        """
        info = self._ask(INFO)
        if info.get("needs") != self.needs:
            raise VideoAlignError(f"{self.name} reads {info.get('needs')!r}, but needs is {self.needs!r}")
        if self.video_fps and info.get("fps") not in (None, self.video_fps):
            raise VideoAlignError(
                f"{self.name} reads videos as {info['fps']} frames per second, but fps is {self.video_fps}; serve it "
                f"with --fps {self.video_fps:g}"
            )
        self._ask(CHECK, json.dumps({"prompts": list(dict.fromkeys(prompts))}).encode(), "application/json")

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Send samples, and wait for their rewards.

        Args:
            videos: Samples as ``needs`` says.
            prompts: Prompt of each sample.

        Returns:
            Rewards (B,) by the names that the server gives.

        Raises:
            VideoAlignError: Where the server cannot be reached, refuses, fails, or does not answer with one number a
                sample.
        """
        answers = []
        for start in range(0, len(videos), self.batch_size):
            part = slice(start, start + self.batch_size)
            samples = Samples(self.needs, videos[part], list(prompts[part])).checked()
            answers.append(self._rewards(self._ask(SCORE, samples.dump(), MEDIA), len(samples.prompts)))
        if len({frozenset(answer) for answer in answers}) > 1:
            raise VideoAlignError("it gave rewards of other names from request to request")
        return {name: torch.cat([answer[name] for answer in answers]) for name in answers[0]}

    def place(self, device: torch.device | None) -> None:
        """A client holds nothing to move; the server's model stays where it is.

        Args:
            device: Device that the run computes on; None releases memory.
        """

    # --- requests ---------------------------------------------------------------------------------------------

    def _rewards(self, answer: Mapping[str, Any], count: int) -> dict[str, Tensor]:
        rewards = answer.get("rewards")
        if not isinstance(rewards, dict) or not rewards:
            raise VideoAlignError(f"it answered without rewards: {json.dumps(dict(answer))[:200]}")
        for name, values in rewards.items():
            numbers = isinstance(values, list) and all(type(value) in (int, float) for value in values)
            if not numbers or len(values) != count:
                raise VideoAlignError(f"it answered {json.dumps(values)[:100]} under {name} for {count} samples")
        return as_rewards(rewards, count)

    def _ask(self, path: str, body: bytes | None = None, kind: str = "") -> Mapping[str, Any]:
        """The server's answer to a request, after as many attempts as it takes."""
        headers = {"Accept": "application/json"} | ({"Content-Type": kind} if kind else {}) | self._authorization()
        for attempt in range(self.retries + 1):
            pause = min(self.pause * 2.0 ** min(attempt, 60), LONGEST_PAUSE) * random.uniform(0.75, 1.25)
            try:
                status, found, wanted = self._once(path, body, headers)
                if status == 200:
                    return self._parsed(path, found)
                why = f"{status}, {_said(found)}"
                if status not in AGAIN:
                    raise VideoAlignError(f"{self.name} answered {path} with {why}{_hint(status)}")
                pause = max(pause, min(wanted, LONGEST_PAUSE))
            except (OSError, http.client.HTTPException) as error:
                why = _reason(error, self.timeout)
            if attempt < self.retries:
                note = "%s: attempt %d of %d failed (%s); again in %.1f s"
                logging.getLogger(__name__).warning(note, self.name, attempt + 1, self.retries + 1, why, pause)
                time.sleep(pause)
        raise VideoAlignError(
            f"{self.name} could not be used in {self.retries + 1} attempts, at last: {why}. See whether it runs and "
            "can be reached from here; a slow one needs a larger timeout or a smaller batch_size"
        )

    def _parsed(self, path: str, found: bytes) -> Mapping[str, Any]:
        try:
            return parsed(found)
        except VideoAlignError as error:
            raise VideoAlignError(f"{self.name} answered {path} with {error}; is it a reward server?") from None

    def _once(self, path: str, body: bytes | None, headers: Mapping[str, str]) -> tuple[int, bytes, float]:
        """Status and body of one answer, and the seconds after which the server wants to be asked again."""
        request = urllib.request.Request(self.url + path, body, dict(headers))
        late = time.monotonic() + self.timeout
        try:
            with self._opener.open(request, timeout=self.timeout) as answer:
                return answer.status, _whole(answer, late), 0.0
        except urllib.error.HTTPError as answer:
            with answer:
                wanted = answer.headers.get("Retry-After", "")
                return answer.code, _whole(answer, late), float(wanted) if wanted.isdigit() else 0.0

    def _authorization(self) -> dict[str, str]:
        if not self.token:
            return {}
        if not (token := os.environ.get(self.token)):
            raise VideoAlignError(
                f"{self.name}: the environment variable {self.token}, which token names, is not set; put the server's "
                "token there"
            )
        if not (token.isascii() and token.isprintable() and " " not in token):
            raise VideoAlignError(
                f"{self.name}: the token in the environment variable {self.token} must consist of printable ASCII "
                "characters without spaces; is there a line's end behind it?"
            )
        return {"Authorization": f"Bearer {token}"}


def _is_host(name: str) -> bool:
    try:
        return bool(name.encode("idna"))
    except UnicodeError:
        return False


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    """Refuses redirections: they would send samples and the token to an address that nobody named."""

    def redirect_request(self, *args: Any) -> None:
        """Follow none; the status is an error."""


def _whole(answer: Any, late: float) -> bytes:
    """An answer's body; one that comes too slowly or never ends is refused."""
    parts, size = [], 0
    while part := answer.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if size > LARGEST_ANSWER:
            raise http.client.HTTPException(f"its answer has over {LARGEST_ANSWER} bytes")
        if time.monotonic() > late:
            raise TimeoutError
    if answer.length:  # what the server said it would still send
        raise http.client.IncompleteRead(b"", answer.length)
    return b"".join(parts)


def _said(body: bytes) -> str:
    """The sentence under ``error`` of an answer, or how the answer begins."""
    try:
        text = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return beginning(body)
    return "".join(c if c.isprintable() else " " for c in str(text)[:400])


def _hint(status: int) -> str:
    hints = {
        401: "; name the environment variable of its token under token",
        404: "; is it a reward server?",
        413: "; make batch_size smaller, or the server's --max-megabytes larger",
    }
    return hints.get(status, "")


def _reason(error: Exception, timeout: float) -> str:
    """Why an attempt failed, in the words of the operating system."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return f"no whole answer within {timeout:g} s"
    text = " ".join(str(cause).split())[:200]
    kind = type(cause).__name__
    return f"no answer in HTTP ({kind}: {text})" if isinstance(cause, http.client.HTTPException) else text or kind
