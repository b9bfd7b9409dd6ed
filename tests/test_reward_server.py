"""`videoalign serve-reward`: what it answers, to whom, how requests share batches, and how it ends."""

import concurrent.futures
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
import torch

from helpers import call
from videoalign import VideoAlignError
from videoalign.commands.reward_server import reward_app
from videoalign.commands.web_server import web_server
from videoalign.models.http_scores import HTTPScores
from videoalign.models.reward_messages import CHECK, INFO, MEDIA, SCORE, Samples
from videoalign.models.scoring import scored

TOKEN = "a-token-of-some-length"


class Brightness:
    """A reward whose numbers can be computed by hand; it can be held up.

    Attributes:
        batches: Prompts of each batch.
        go: While it is not set, ratings wait.
    """

    name, needs = "brightness", "videos"

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.go = threading.Event()
        self.go.set()

    def check(self, prompts) -> None:
        if "forbidden" in prompts:
            raise VideoAlignError("prompt 'forbidden' is not rated")

    def __call__(self, videos, prompts):
        self.batches.append(list(prompts))
        assert self.go.wait(20)
        if "bug" in prompts:
            raise RuntimeError("a bug")
        if "nan" in prompts:
            return {"light": torch.full((len(videos),), float("nan"))}
        self.check(prompts)
        return {"light": videos.float().mean((1, 2, 3, 4)), "words": torch.tensor([len(p) / 3 for p in prompts])}

    def place(self, device) -> None:
        """Nothing is moved."""


def clip(shade, count=1, frames=2):
    return torch.full((count, frames, 3, 4, 4), shade, dtype=torch.uint8)


class Served:
    """A running server of a reward.

    Attributes:
        reward: The reward.
        url: The server's address.
        app: The web application.
    """

    def __init__(self, reward, **options) -> None:
        self.reward, self.app = reward, reward_app(reward, **options)
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        self.server = web_server(self.app, timeout_graceful_shutdown=1)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listening]}, daemon=True)
        self.thread.start()

    def client(self, **options) -> HTTPScores:
        return HTTPScores(self.url, **{"retries": 0, "timeout": 20.0, **options})

    def ask(self, path, body=None, **headers):
        """Status and content of an answer."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as answer:
            return answer.code, answer.read().decode()

    def present(self, count) -> None:
        """Wait until so many requests are there."""
        late = time.monotonic() + 60
        while self.app.state.desk.present != count:
            assert time.monotonic() < late
            time.sleep(0.005)

    def stop(self) -> None:
        self.reward.go.set()
        self.server.should_exit = True
        self.thread.join(60)
        self.listening.close()
        assert not self.thread.is_alive()


@pytest.fixture
def serve():
    running = []

    def start(**options):
        running.append(Served(Brightness(), **options))
        return running[-1]

    yield start
    for served in running:
        served.stop()


# --- answers ----------------------------------------------------------------------------------------------------------


def test_rewards_are_those_of_the_reward_to_the_last_bit(serve):
    served = serve()
    videos = torch.randint(0, 256, (5, 3, 3, 8, 8), dtype=torch.uint8)
    prompts = ["a", "bb", 'a "quoted" Würfel', "", "e"]
    names = list("abcde")
    far = scored({"x": served.client(batch_size=2)}, videos, None, prompts, names)
    near = scored({"x": Brightness()}, videos, None, prompts, names)
    assert far.keys() == near.keys() and all(torch.equal(far[name], near[name]) for name in near)


def test_pages_describe_the_server(serve):
    served = serve(fps=8.0, largest=1000)
    assert served.ask("/health") == (200, '{"status":"ok"}')
    about = {"name": "brightness", "needs": "videos", "fps": 8.0, "largest": 1000}
    assert json.loads(served.ask(INFO)[1]) == about
    served.client(fps=8.0).check(["a"])
    with pytest.raises(VideoAlignError, match="422, prompt 'forbidden' is not rated"):
        served.client().check(["a", "forbidden"])
    for path in ("/docs", "/openapi.json", "/", SCORE):
        assert served.ask(path)[0] in (404, 405)


def test_metrics_count_what_happened(serve):
    served = serve()
    served.client()(clip(7, 3), ["a", "b", "c"])
    with pytest.raises(VideoAlignError):
        served.client()(clip(7), ["bug"])
    status, text = served.ask("/metrics")
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert status == 200 and lines['videoalign_requests_total{status="200"}'] == "1"
    assert lines['videoalign_requests_total{status="500"}'] == "1" and lines["videoalign_requests_waiting"] == "0"
    assert lines["videoalign_samples_total"] == "3" and lines["videoalign_failures_total"] == "1"
    assert float(lines["videoalign_seconds_total"]) >= 0
    kinds = re.findall(r"# TYPE (\S+)", text)
    assert len(kinds) == len(set(kinds)) and {line.partition("{")[0] for line in lines} == set(kinds)


@pytest.mark.parametrize(
    ("prompt", "status", "words"),
    [("forbidden", 422, "is not rated"), ("bug", 500, "RuntimeError: a bug"), ("nan", 500, "NaN or infinity")],
)
def test_a_sample_that_cannot_be_rated_is_no_number(serve, prompt, status, words):
    served = serve()
    found, said = served.ask(SCORE, Samples("videos", clip(1), [prompt]).dump(), content_type=MEDIA)
    assert found == status and re.search(words, json.loads(said)["error"])
    assert served.client()(clip(1), ["fine"])["light"].tolist() == [1]  # and the server goes on


# --- what is let in ---------------------------------------------------------------------------------------------------

BODY = Samples("videos", clip(1), ["a"]).dump()


class Planted:
    """Would write a file if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_is_unpickled(serve, tmp_path):
    served = serve()
    for body in (pickle.dumps(Planted(tmp_path / "x")), pickle.dumps({"videos": Planted(tmp_path / "x")})):
        assert served.ask(SCORE, body, content_type=MEDIA)[0] == 400
    assert not (tmp_path / "x").exists() and not served.reward.batches


@pytest.mark.parametrize(
    ("path", "body", "kind", "status"),
    [
        (SCORE, BODY[:-3], MEDIA, 400),
        (SCORE, b"", MEDIA, 400),
        (SCORE, Samples("latents", torch.zeros(1, 4, 1, 2, 2), ["a"]).dump(), MEDIA, 400),
        (SCORE, Samples("videos", clip(1), ["a", "b"]).dump(), MEDIA, 400),
        (SCORE, BODY, "application/octet-stream", 415),
        (SCORE, BODY, "text/plain", 415),  # what a page of another site may send without asking
        (SCORE, BODY + b" " * 2000, MEDIA, 413),
        (CHECK, b"{", "application/json", 422),
        (CHECK, b'{"prompts": "abc"}', "application/json", 422),
        (CHECK, b'{"prompts": [1]}', "application/json", 422),
        (CHECK, b"[]", "application/json", 422),
    ],
)
def test_bad_requests_are_answered_with_a_sentence(serve, path, body, kind, status):
    served = serve(largest=2000)
    found, said = served.ask(path, body, content_type=kind)
    assert found == status and json.loads(said)["error"]
    assert not served.reward.batches


def test_a_body_without_a_length_is_refused(serve):
    served = serve()
    head = f"POST {SCORE} HTTP/1.1\r\nHost: x\r\nContent-Type: {MEDIA}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), 10) as one:
        one.sendall(head.encode())
        assert one.recv(100).startswith(b"HTTP/1.1 411")


def test_only_who_has_the_token_is_served(serve, monkeypatch):
    served = serve(token=TOKEN)
    assert served.ask("/health")[0] == 200
    for path, body in ((INFO, None), ("/metrics", None), (CHECK, b"{}"), (SCORE, BODY)):
        for sent in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {TOKEN}"}):
            assert served.ask(path, body, content_type=MEDIA, **sent)[0] == 401, (path, sent)
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    client = served.client(token="MY_TOKEN")
    client.check(["a"])
    assert client(clip(3), ["a"])["light"].tolist() == [3]


# --- many at a time ---------------------------------------------------------------------------------------------------


def together(served, requests):
    """Answers to requests that wait for each other; the first one is being rated while the others come."""
    served.reward.go.clear()
    with concurrent.futures.ThreadPoolExecutor(len(requests)) as pool:
        coming = []
        for number, (videos, prompts) in enumerate(requests, 1):
            coming.append(pool.submit(served.client(batch_size=99), videos, prompts))
            served.present(number)
            time.sleep(0.05)
        served.reward.go.set()
        return [one.exception() or one.result()["light"].tolist() for one in coming]


def test_requests_that_wait_share_a_batch(serve):
    served = serve(batch_size=4)
    requests = [(clip(s), [f"p{s}"]) for s in range(4)] + [(clip(9, 3), ["q", "r", "s"])]
    assert together(served, requests) == [[0], [1], [2], [3], [9, 9, 9]]
    assert served.reward.batches == [["p0"], ["p1", "p2", "p3"], ["q", "r", "s"]]


def test_samples_of_different_sizes_do_not_share_one(serve):
    served = serve(batch_size=8)
    found = together(served, [(clip(1), ["a"]), (clip(2), ["b"]), (clip(3, 1, 4), ["c"]), (clip(4, 1, 4), ["d"])])
    assert found == [[1], [2], [3], [4]]
    assert served.reward.batches == [["a"], ["b"], ["c", "d"]]


def test_one_bad_sample_does_not_spoil_the_others(serve):
    served = serve(batch_size=8)
    first, good, bad, last = together(served, [(clip(i), [p]) for i, p in enumerate(["a", "b", "forbidden", "d"])])
    assert (first, good, last) == ([0], [1], [3])
    assert "422" in str(bad) and "is not rated" in str(bad)


def test_a_full_queue_tells_to_come_again(serve):
    served = serve(waiting=2)
    served.reward.go.clear()
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        coming = [pool.submit(served.client(), clip(i), ["a"]) for i in range(2)]
        served.present(2)
        request = urllib.request.Request(served.url + SCORE, BODY, {"Content-Type": MEDIA})
        with pytest.raises(urllib.error.HTTPError) as busy:
            urllib.request.urlopen(request, timeout=10)
        assert busy.value.code == 503 and busy.value.headers["Retry-After"] == "1"
        assert served.ask("/health")[0] == 200  # it is busy, not ill
        patient = pool.submit(served.client(retries=5, pause=0.05), clip(7), ["a"])
        time.sleep(0.2)
        served.reward.go.set()
        assert [one.result()["light"].tolist() for one in coming] == [[0], [1]]
        assert patient.result()["light"].tolist() == [7]


def test_who_has_left_is_not_rated(serve, monkeypatch):
    monkeypatch.setattr("videoalign.commands.reward_server.LOOK", 0.05)
    served = serve(batch_size=1)
    served.reward.go.clear()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(served.client(), clip(1), ["first"])
        served.present(1)
        gone = pool.submit(served.client(timeout=0.2), clip(2), ["gone"])
        assert "no whole answer within 0.2 s" in str(gone.exception())
        served.present(1)
        served.reward.go.set()
        assert first.result()["light"].tolist() == [1]
        assert served.client()(clip(3), ["third"])["light"].tolist() == [3]
    assert served.reward.batches == [["first"], ["third"]]


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "either --model or --function"),
        (["--model", "m", "--function", "m:f"], "either --model or --function"),
        (["--model", "m"], "--model needs --fps"),
        (["--model", "m", "--fps", "0"], "--fps must be above 0, got 0.0"),
        (["--function", "m:f", "--fps", "nan"], "--fps must be above 0 and finite, got nan"),
        (["--function", "m:f", "--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines ask: set a token"),
        (["--function", "m:f", "--host", "::"], "set a token"),
        (["--function", "m:f", "--token", "short"], "the token has 5 characters; make it at least 16"),
        (["--function", "m:f", "--token", "with some spaces in it"], "without spaces"),
        (["--function", "no_such_module:f"], "no_such_module:f cannot be imported"),
        (["--model", "nowhere", "--fps", "8"], "nowhere"),
    ],
)
def test_options_that_cannot_work_are_refused(options, words, capsys, monkeypatch):
    monkeypatch.delenv("VIDEOALIGN_REWARD_TOKEN", raising=False)
    assert call("serve-reward", "--device", "cpu", *options) == 2
    assert words in capsys.readouterr().err


def test_a_port_that_is_taken_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "ones.py").write_text("def ones(videos, prompts):\n    return [1.0] * len(prompts)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert call("serve-reward", "--function", "ones:ones", "--device", "cpu", "--port", port) == 2
    assert "another program listens there" in capsys.readouterr().err


@pytest.mark.slow
def test_a_signal_ends_it_after_the_request_that_runs(tmp_path):
    (tmp_path / "late.py").write_text(
        "import time\n\ndef rate(videos, prompts):\n"
        "    time.sleep(1)\n    return {'x': [float(len(p)) for p in prompts]}\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve-reward", "--function", "late:rate", "--device", "cpu", "--port", str(port)]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-m", "videoalign", *words],
        env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert f"http://127.0.0.1:{port}" in process.stdout.readline()
        client = HTTPScores(f"http://127.0.0.1:{port}", retries=8, pause=0.2, timeout=20)
        client.check(["a"])
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            coming = pool.submit(client, clip(1), ["four"])
            time.sleep(0.4)
            process.send_signal(signal.SIGTERM)
            assert coming.result()["x"].tolist() == [4]
        _, said = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 143 and "Traceback" not in said
    assert "stopped by SIGTERM" in said
