"""Fixtures that every test may ask for."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import lightning  # noqa: F401  its logger keeps the stderr of the moment: the session's, not one test's
import pytest
import torch
import transformers

from videoalign.miniature.networks.qwen import make_qwen
from videoalign.models.frame_sampling import FrameSampling

sys.path.insert(0, str(Path(__file__).parent))  # test files import their neighbours by name, spawned processes too
pytest.register_assert_rewrite("helpers", "container_kit")
pytest_plugins = [
    "bench_kit", "compare_kit", "families_kit", "flow_kit", "generator_kit", "hub_kit", "import_kit", "loading_kit",
    "lora_kit", "official_kit", "output_kit", "reward_network_kit", "shard_kit", "store_kit",
]  # fmt: skip
"""Modules beside this one whose fixtures several test files share; each is built once in a process."""

CORPUS = [
    "a red circle moves left to right",
    "a blue square moves right to left",
    "a green triangle moves upwards",
    "a yellow circle moves downwards",
]


def pytest_configure(config: pytest.Config) -> None:
    """Use one thread: the models are too small for more, and results then do not depend on the machine's cores."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a device that is not there."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


DISTRIBUTED = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")
"""Variables of the environment by which processes of a group find each other."""


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a miniature Qwen2-VL: two layers of width 32, patches of 8 pixels. Read only."""
    folder = tmp_path_factory.mktemp("backbones") / "qwen2_vl"
    make_qwen(folder, corpus=CORPUS, hidden=32, layers=2, vision_layers=1)
    return folder


@pytest.fixture(scope="session")
def sampling() -> FrameSampling:
    """Sampling of every frame of the miniature world's clips, at their own size."""
    return FrameSampling(fps=8.0, min_pixels=0)


@pytest.fixture(autouse=True)
def quiet_and_clean() -> Iterator[None]:
    """No progress bars are shown; every test leaves the default dtype and the random state as they were.

    Lightning leaves the port of a process group in the environment, where another process would find it taken.
    """
    transformers.utils.logging.disable_progress_bar()
    before = {name: os.environ.get(name) for name in DISTRIBUTED}
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_default_dtype(torch.float32)
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
