"""`videoalign serve-reward`: a reward for other processes, by HTTP."""

import argparse
import os
from typing import TYPE_CHECKING

from .. import VideoAlignError
from ..models.number_checks import positive
from .host_names import bracketed, is_loopback
from .parsing import Commands, add_batch, add_weights_source, command, count, needs_extra

if TYPE_CHECKING:
    import torch

    from ..models.scoring import ScoresVideos

EXTRA = ("fastapi", "pydantic", "starlette", "uvicorn")
"""Libraries that only `pip install 'videoalign[serve]'` installs."""
KEPT = "requests that wait are not answered; their clients ask again when the same command serves"
TOKEN = "VIDEOALIGN_REWARD_TOKEN"
"""Environment variable that holds the token."""
SHORTEST = 16
"""Least number of characters of a token that others than this machine could guess at."""


def register(commands: Commands) -> None:
    """Add the command."""
    text = "serve a reward to other processes by HTTP, for rewards of the class HTTPScores"
    parser = command(commands, "serve-reward", _serve, text, KEPT)
    add = parser.add_argument
    add("--model", help="folder or hub id (ORG/NAME@REVISION) of a reward model, of this package or an official one")
    add("--fps", type=float, help="frame rate of clients' videos, in frames per second; needed by --model")
    add("--raw", action="store_true", help="do not normalise by the model's statistics")
    add(
        "--function",
        metavar="MODULE:FUNCTION",
        help="function of videos and prompts that is served in place of a reward model",
    )
    add("--host", default="127.0.0.1", help="address to listen at; with the default only this machine can ask")
    add("--port", type=count(1, 65535), default=8100, help="port to listen at")
    add(
        "--token",
        help=f"secret that clients must send, at least {SHORTEST} characters; needed where --host lets others in. "
        "Other users of this machine can read command lines: a better place for it is the environment variable "
        f"{TOKEN}, which is read without this option",
    )
    add(
        "--waiting",
        type=count(1),
        default=64,
        help="number of requests that may wait or be computed at a time; further ones are told to come again (503)",
    )
    add("--max-megabytes", type=count(1), default=1024, help="largest request, in MB")
    add_weights_source(parser)
    add_batch(parser, 8)


@needs_extra("serve-reward", "serve", EXTRA)
def _serve(o: argparse.Namespace) -> None:
    token = o.token or os.environ.get(TOKEN, "")
    _check(o, token)  # before anything heavy is imported
    from ..models.scoring import failing_as
    from .quiet import quiet
    from .reward_server import reward_app
    from .web_server import serve_until_signal, web_server

    quiet()
    reward = _reward(o)
    reward.place(_device(o.device))
    with failing_as(f"reward {reward.name} failed in check"):
        reward.check([])
    fps = o.fps if reward.needs == "videos" else None
    app = reward_app(reward, o.batch_size, o.waiting, o.max_megabytes * 10**6, fps, token)
    said = f"{reward.name} at http://{bracketed(o.host)}:{o.port} (/health, /info, /metrics)"
    serve_until_signal(web_server(app, timeout_keep_alive=30, timeout_graceful_shutdown=30), o.host, o.port, said)


def _check(o: argparse.Namespace, token: str) -> None:
    """Refuse options that do not fit each other."""
    if (o.model is None) == (o.function is None):
        raise VideoAlignError("name what is served: either --model or --function")
    positive("--", fps=o.fps)
    if o.model and not o.fps:
        raise VideoAlignError("--model needs --fps, the frame rate at which clients' videos are meant to be played")
    if not is_loopback(o.host) and not token:
        raise VideoAlignError(
            f"--host {o.host} lets other machines ask: set a token that they must send, in the environment variable "
            f"{TOKEN} or by --token"
        )
    if token and len(token) < SHORTEST:
        raise VideoAlignError(f"the token has {len(token)} characters; make it at least {SHORTEST}")
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise VideoAlignError("the token must consist of ASCII characters without spaces, as an HTTP header does")


def _reward(o: argparse.Namespace) -> "ScoresVideos":
    if o.function:
        from ..models.function_scores import FunctionScores

        return FunctionScores(o.function)
    from ..datamodules.video_scores import VideoRewardScores

    source = (o.backbone, o.template, o.official_repo, o.checkpoint_step, o.dtype)
    return VideoRewardScores(o.model, o.fps, *source, batch_size=o.batch_size, raw=o.raw)


def _device(name: str) -> "torch.device":
    """The device that ``--device`` means."""
    import torch

    there = torch.cuda.is_available()
    if name in ("gpu", "cuda") and not there:
        raise VideoAlignError(f"--device {name}: there is no GPU here; compute on the CPU with --device cpu")
    return torch.device("cuda" if there and name != "cpu" else "cpu")
