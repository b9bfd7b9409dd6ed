"""What `videoalign compare` asks of whoever rates videos."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from ..callbacks.prompt_sampler import Sampling
from ..datamodules.shards import ShardSet


class Judge(Protocol):
    """Rates videos of prompts, in numbers that have names.

    Any class with these three methods and a ``name`` is a judge; it need not inherit from this one. In YAML a judge is
    given by its ``class_path`` and ``init_args``, so the types of its methods' arguments must be those that are written
    here. A judge that cannot rate a video raises; no number stands for a failure. It should load its model when
    it is first asked, not when it is constructed: a configuration may be read where nothing is rated.
    """

    @property
    def name(self) -> str:
        """A few words for messages that say who rates, such as the model's folder."""

    def check(self, prompts: Sequence[str], sampling: Sampling) -> None:
        """Refuse what this judge cannot rate, before the long work begins.

        Args:
            prompts: Prompts of all videos that there will be.
            sampling: Size and length of the videos.

        Raises:
            VideoAlignError: Where prompts, sizes or the judge's own settings do not fit.
        """

    def rate_set(self, videos: ShardSet, keys: Sequence[str], folder: Path) -> dict[str, Tensor]:
        """Rate videos of a set; a second call does not repeat what an interrupted one has kept in ``folder``.

        Args:
            videos: Set of kind *videos* that holds them.
            keys: Keys of the videos.
            folder: Folder that this judge alone may write into, for what it has computed.

        Returns:
            A number per video (N,), in the order of ``keys``, under each name. A comparison needs the names VQ, MQ and
            TA; higher is better.
        """
