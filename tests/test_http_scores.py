"""The client of reward servers, against servers that are slow, gone, busy, or answer garbage."""

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from videoalign import VideoAlignError
from videoalign.models.http_scores import LARGEST_ANSWER, LONGEST_PAUSE, HTTPScores
from videoalign.models.reward_messages import INFO, SCORE, Samples
from videoalign.models.scoring import scored

VIDEOS = torch.arange(3 * 2 * 3 * 4 * 4).view(3, 2, 3, 4, 4).to(torch.uint8)
PROMPTS = ["a circle", 'a "square"', "ein Würfel"]
QUICK = {"retries": 2, "pause": 0.01, "timeout": 5.0}
GOOD = {"rewards": {"VQ": [1.5, -2.0, 0.25]}}


class Scripted:
    """A server that answers requests one after the other as it is told; the last answer stays.

    Attributes:
        answers: (status, body, headers) of each answer; a number in place of one is slept for.
        seen: (path, headers, body) of each request.
    """

    def __init__(self) -> None:
        self.answers: list = []
        self.seen: list = []
        script = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                script.seen.append((self.path, dict(self.headers), body))
                answer = script.answers.pop(0) if len(script.answers) > 1 else script.answers[0]
                if callable(answer):
                    return answer(self)
                status, said, headers = answer
                said = said if isinstance(said, bytes) else json.dumps(said).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(said)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(said)

            do_GET = do_POST

            def log_message(self, *args):
                """Nothing is printed."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def answer(self, *answers) -> None:
        self.answers = [(*one, {})[:3] if isinstance(one, tuple) else one for one in answers]


@pytest.fixture
def script():
    found = Scripted()
    yield found
    found.server.shutdown()
    found.server.server_close()


def rate(script, **options):
    reward = HTTPScores(script.url, **{**QUICK, **options})
    return scored({"far": reward}, VIDEOS, VIDEOS.float(), PROMPTS, ["a", "b", "c"])


# --- what is sent, and what comes back --------------------------------------------------------------------------------


@pytest.mark.parametrize("needs", ["videos", "latents"])
def test_samples_and_prompts_arrive_as_they_are(script, needs):
    script.answer((200, GOOD))
    assert rate(script, needs=needs)["far/VQ"].tolist() == [1.5, -2.0, 0.25]
    ((path, headers, body),) = script.seen
    found = Samples.load(body)
    assert path == SCORE and headers["Content-Type"] == "application/vnd.safetensors" and "Authorization" not in headers
    assert (found.kind, found.prompts) == (needs, PROMPTS)
    assert torch.equal(found.values, VIDEOS if needs == "videos" else VIDEOS.float())


def test_batches_are_put_together_in_order(script):
    script.answer((200, {"rewards": {"VQ": [1, 2], "x": [3, 4]}}), (200, {"rewards": {"x": [7.5], "VQ": [5]}}))
    found = rate(script, batch_size=2)
    assert found["far/VQ"].tolist() == [1, 2, 5] and found["far/x"].tolist() == [3, 4, 7.5]
    assert [Samples.load(body).prompts for _, _, body in script.seen] == [PROMPTS[:2], PROMPTS[2:]]


def test_the_token_is_sent_and_never_shown(script, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "open-sesame-open-sesame")
    script.answer((200, GOOD))
    rate(script, token="MY_TOKEN")
    assert script.seen[0][1]["Authorization"] == "Bearer open-sesame-open-sesame"
    script.answer((401, {"error": "no"}))
    with pytest.raises(VideoAlignError, match="401, no; name the environment variable") as error:
        rate(script, token="MY_TOKEN")
    assert "sesame" not in str(error.value)
    with pytest.raises(VideoAlignError, match="variable NO_TOKEN, which token names, is not set"):
        rate(script, token="NO_TOKEN")


# --- servers that do not work -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"<html>hello</html>", "answered /score with no JSON .*'<html>hello</html>'; is it a reward server"),
        (b"", "no JSON .*nothing"),
        (b"\xff\xfe\x00", "no JSON"),
        (b"[1, 2, 3]", "no JSON object"),
        (b'{"rewards": {"VQ": [NaN, 1, 2]}}', "NaN is no number"),
        (b'{"rewards": {"VQ": [Infinity, 1, 2]}}', "Infinity is no number"),
        (b'{"rewards": {"VQ": [1e999, 1, 2]}}', "NaN or infinity under VQ for a;"),
        ({}, "without rewards"),
        ({"rewards": {}}, "without rewards"),
        ({"rewards": [1, 2, 3]}, "without rewards"),
        ({"rewards": {"VQ": [1, 2]}}, r"\[1, 2\] under VQ for 3 samples"),
        ({"rewards": {"VQ": 1}}, "1 under VQ for 3 samples"),
        ({"rewards": {"VQ": [1, None, 2]}}, "null.* under VQ"),
        ({"rewards": {"VQ": [1, "2", 3]}}, "under VQ for 3"),
        ({"rewards": {"VQ": [True, 1, 2]}}, "true.* under VQ"),
        ({"rewards": {"VQ": [[1], [2], [3]]}}, "under VQ for 3"),
        ({"rewards": {"V/Q": [1, 2, 3]}}, "without slashes"),
        (b'{"rewards": ' + b"[" * 100_000, "no JSON"),
    ],
    ids=str,
)
def test_garbage_is_no_number_and_not_asked_for_again(script, said, words):
    script.answer((200, said))
    with pytest.raises(VideoAlignError, match=rf"^reward far \(reward server {script.url}\) .*" + words):
        rate(script)
    assert len(script.seen) == 1


def test_names_must_not_change_from_request_to_request(script):
    script.answer((200, {"rewards": {"VQ": [1, 2]}}), (200, {"rewards": {"MQ": [1]}}))
    with pytest.raises(VideoAlignError, match="other names from request to request"):
        rate(script, batch_size=2)


@pytest.mark.parametrize(
    ("status", "words"),
    [(400, "400, bad"), (413, "413, bad; make batch_size smaller"), (404, "is it a reward server"), (500, "500, bad")],
)
def test_a_refusal_is_told_and_not_repeated(script, status, words):
    script.answer((status, {"error": "bad"}))
    with pytest.raises(VideoAlignError, match=words):
        rate(script)
    assert len(script.seen) == 1


def test_a_redirection_is_not_followed(script):
    """It would carry samples and the token to an address that nobody named."""
    script.answer((307, b"", {"Location": "http://127.0.0.1:9/score"}))
    with pytest.raises(VideoAlignError, match="answered /score with 307"):
        rate(script)


def hang_up(handler):
    """Close the connection without an answer."""
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def cut(handler):
    """Send half of what was promised."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"rewards": {')
    hang_up(handler)


def no_http(handler):
    handler.wfile.write(b"220 mail.example ESMTP\r\n")
    hang_up(handler)


@pytest.mark.parametrize(
    "trouble", [(503, {"error": "busy"}), (502, b"bad gateway"), (429, b""), hang_up, cut, no_http]
)
def test_what_may_pass_is_tried_again(script, trouble):
    script.answer(trouble, trouble, (200, GOOD))
    assert rate(script)["far/VQ"].tolist() == [1.5, -2.0, 0.25]
    assert len(script.seen) == 3 and len({body for _, _, body in script.seen}) == 1


@pytest.mark.parametrize("trouble", [(503, {"error": "busy"}), hang_up, cut, no_http])
def test_what_does_not_pass_is_told_in_the_end(script, trouble):
    script.answer(trouble)
    with pytest.raises(VideoAlignError, match=r"could not be used in 3 attempts, at last: .+\. See whether it runs"):
        rate(script)
    assert len(script.seen) == 3


def test_the_server_says_when_to_come_again(script):
    script.answer((503, {"error": "busy"}, {"Retry-After": "1"}), (200, GOOD))
    begun = time.monotonic()
    rate(script)
    assert time.monotonic() - begun > 0.9


def test_a_server_that_is_gone():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        reward = HTTPScores(f"http://127.0.0.1:{free.getsockname()[1]}", **QUICK)
    with pytest.raises(VideoAlignError, match=r"in 3 attempts, at last: .*refused"):
        reward.check(["a"])


def test_a_server_may_be_waited_for_a_whole_night(monkeypatch):
    """Pauses double until they are as long as they get, also behind the thousandth attempt."""
    pauses = []
    monkeypatch.setattr("videoalign.models.http_scores.time.sleep", pauses.append)
    reward = HTTPScores("http://127.0.0.1:9", retries=1100, pause=1.0)
    monkeypatch.setattr(reward, "_once", lambda *given: (503, b"{}", 0.0))
    with pytest.raises(VideoAlignError, match="in 1101 attempts"):
        reward.check(["a"])
    assert len(pauses) == 1100 and max(pauses) <= 1.25 * LONGEST_PAUSE


def slow(handler):
    time.sleep(1.5)
    hang_up(handler)


def dribbling(handler):
    """Send a byte now and then, so that no single read takes long."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(30):
        handler.wfile.write(b" ")
        time.sleep(0.1)


@pytest.mark.parametrize("trouble", [slow, dribbling])
def test_a_slow_server_is_not_waited_for_longer_than_it_was_said(script, trouble):
    script.answer(trouble)
    begun = time.monotonic()
    with pytest.raises(VideoAlignError, match=r"no whole answer within 0\.3 s"):
        rate(script, timeout=0.3, retries=1)
    assert time.monotonic() - begun < 1.4


def test_an_answer_without_end_is_given_up(script):
    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(LARGEST_ANSWER // (1 << 20) + 2):
            handler.wfile.write(b" " * (1 << 20))

    script.answer(endless)
    with pytest.raises(VideoAlignError, match=f"over {LARGEST_ANSWER} bytes"):
        rate(script, retries=0)


# --- before the work begins -------------------------------------------------------------------------------------------


def test_the_check_asks_for_what_the_server_reads_and_shows_it_the_prompts(script):
    script.answer((200, {"needs": "videos", "fps": 8}), (200, {"prompts": 2}))
    HTTPScores(script.url, fps=8.0, **QUICK).check(["b", "a", "b"])
    assert [path for path, _, _ in script.seen] == [INFO, "/check"]
    assert json.loads(script.seen[1][2]) == {"prompts": ["b", "a"]}


@pytest.mark.parametrize(
    ("info", "check", "words"),
    [
        ({"needs": "latents"}, {}, "reads 'latents', but needs is 'videos'"),
        ({}, {}, "reads None"),
        ({"needs": "videos", "fps": 16.0}, {}, "as 16.0 frames per second, but fps is 8.0; serve it with --fps 8"),
        ({"needs": "videos", "fps": "x"}, {}, "as x frames per second"),
        ({"needs": "videos"}, {"status": 422}, "answered /check with 422, too long"),
    ],
)
def test_a_server_that_does_not_fit_is_refused(script, info, check, words):
    script.answer((200, info), (check.get("status", 200), {"error": "too long"}))
    with pytest.raises(VideoAlignError, match=words):
        HTTPScores(script.url, fps=8.0, **QUICK).check(["a"])


@pytest.mark.parametrize(
    "settings",
    [
        {"url": "127.0.0.1:8100"}, {"url": "ftp://host"}, {"url": "http://"}, {"url": "file:///etc/passwd"},
        {"url": "http://me:secret@host"}, {"url": "http://[::1"}, {"url": "http://host:x"}, {"url": "http://host?token=1"},
        {"timeout": 0}, {"retries": -1}, {"pause": -1.0}, {"batch_size": 0}, {"needs": "frames"},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(VideoAlignError, match="reward server") as error:
        HTTPScores(**{"url": "http://host", **settings})
    assert settings.get("url") or all(name in str(error.value) for name in settings)


# --- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "no safetensors file"),
        (b"\x80\x04\x95", "no safetensors file"),
        (Samples("videos", VIDEOS, PROMPTS).dump()[:-1], "no safetensors file"),
        ((1 << 60).to_bytes(8, "little") + b"{}", "no safetensors file"),
        (Samples("frames", VIDEOS, PROMPTS).dump(), r"holds \['frames'\], not one tensor"),
        (Samples("videos", VIDEOS.float(), PROMPTS).dump(), r"videos are torch.float32 .*, not uint8"),
        (Samples("latents", VIDEOS, PROMPTS).dump(), "latents are torch.uint8"),
        (Samples("videos", VIDEOS[0], PROMPTS).dump(), r"\(2, 3, 4, 4\), not uint8 \(B, T"),
        (Samples("videos", VIDEOS[:0], []).dump(), r"\(0, 2, 3, 4, 4\), not"),
        (Samples("videos", VIDEOS.transpose(1, 2), PROMPTS).dump(), r"\(3, 3, 2, 4, 4\), not"),
        (Samples("videos", VIDEOS, PROMPTS[:2]).dump(), "3 videos and 2 prompts"),
        (Samples("videos", VIDEOS, "abc").dump(), "no JSON list of texts"),
        (Samples("videos", VIDEOS, [1, 2, 3]).dump(), "no JSON list of texts"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,
)
def test_bodies_that_hold_no_samples_are_refused(body, words):
    with pytest.raises(VideoAlignError, match=words):
        Samples.load(body)
