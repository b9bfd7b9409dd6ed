"""A reward server for a judge in an environment of its own: it needs numpy and safetensors, and not videoalign.

python reward_server.py MODULE:FUNCTION [--port 8100] [--host 127.0.0.1]

FUNCTION(videos, prompts) takes uint8 videos (B, T, H, W, 3) and B texts, and returns B numbers by name, higher being
better. With --host the environment variable REWARD_TOKEN must hold the token that clients send.
"""

import argparse
import hmac
import importlib
import json
import math
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import safetensors.numpy

LARGEST = 1 << 30
"""Largest number of bytes of a request."""
TOKEN = os.environ.get("REWARD_TOKEN", "")


class Refused(Exception):
    """A request that cannot be answered: status and sentence."""


class Handler(BaseHTTPRequestHandler):
    """Answers as `videoalign serve-reward` does; one batch is rated at a time."""

    function = None
    name = ""
    busy = threading.Lock()

    def do_GET(self):
        pages = {"/health": {"status": "ok"}, "/info": {"name": self.name, "needs": "videos", "fps": None}}
        self.answer(lambda: self.page(pages))

    def do_POST(self):
        # read first: a client that is still sending would not see the answer
        length = int(self.headers.get("Content-Length") or -1)
        body = self.rfile.read(length) if 0 <= length <= LARGEST else None
        pages = {"/score": self.score, "/check": lambda body: {}}
        self.answer(lambda: self.page(pages)(body))

    def page(self, pages):
        if self.path not in pages:
            raise Refused(404, f"there is no {self.path}")
        return pages[self.path]

    def answer(self, page):
        sent = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        try:
            if TOKEN and self.path != "/health" and not hmac.compare_digest(sent.encode(), TOKEN.encode()):
                raise Refused(401, "this server wants its token")
            status, said = 200, page()
        except Refused as error:
            status, said = error.args[0], {"error": error.args[1]}
        except Exception as error:  # a failure must never become a number
            status, said = 500, {"error": f"{type(error).__name__}: {error}"}
        content = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def score(self, body):
        if body is None:
            raise Refused(413, f"the body must state its length, at most {LARGEST} bytes")
        try:
            (videos,) = safetensors.numpy.load(body).values()
            header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
            prompts = json.loads(header["__metadata__"]["prompts"])
            assert videos.dtype == "uint8" and videos.ndim == 5 and videos.shape[2] == 3 and len(videos) == len(prompts)
        except Exception as error:
            raise Refused(400, f"the body holds no videos and prompts ({type(error).__name__})") from None
        with self.busy:
            rewards = type(self).function(videos.transpose(0, 1, 3, 4, 2), prompts)
        rewards = {name: [float(value) for value in values] for name, values in rewards.items()}
        if wrong := [n for n, v in rewards.items() if len(v) != len(prompts) or not all(map(math.isfinite, v))]:
            raise Refused(500, f"{wrong[0]} has not one finite number a video: {rewards[wrong[0]]}")
        return {"rewards": rewards}

    def log_message(self, *args):
        """Print no line a request."""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("function", metavar="MODULE:FUNCTION")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8100)
    options = parser.parse_args()
    if options.host not in ("127.0.0.1", "localhost") and len(TOKEN) < 16:
        parser.error("--host lets other machines ask: set REWARD_TOKEN, at least 16 characters")
    sys.path.insert(0, os.getcwd())
    module, _, function = options.function.partition(":")
    Handler.name, Handler.function = options.function, staticmethod(getattr(importlib.import_module(module), function))
    server = ThreadingHTTPServer((options.host, options.port), Handler)
    print(f"{options.function} at http://{options.host}:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
