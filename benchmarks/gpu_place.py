"""Folders of models and sets that the rows of the GPU benchmark need: real configurations, or miniatures on a CPU."""

from dataclasses import dataclass
from pathlib import Path

from gpu_rows import GENERATORS, Clip

# what writes models and sets is imported where it is called: it takes ten seconds

TEXT = 512
"""Number of tokens that Wan's prompts are padded to."""
TEXT_TINY = 96
"""The same of the miniatures, whose tokens are shorter."""
RATED = {"frames": 81, "height": 480, "width": 832, "fps": 16}
"""Size of the videos that the reward model sees: five seconds, as Wan makes them."""
RATED_TINY = {"frames": 9, "height": 56, "width": 56, "fps": 8}


@dataclass(frozen=True)
class Place:
    """Where the models and sets are, which are written when they are first asked for.

    Attributes:
        folder: Folder that holds them.
        toy: Whether they are miniatures, for a run on a CPU.
    """

    folder: Path
    toy: bool = False

    def generator(self, name: str) -> str:
        """Folder of a generator.

        Args:
            name: One of :data:`.gpu_rows.GENERATORS`.
        """
        from random_weights import write_generator

        from videoalign.miniature.networks.pipelines import make_generator

        path, released = self.folder / name, GENERATORS[name]
        if not self.toy:
            write_generator(path, released.name, tokens=TEXT)
        elif not path.exists():
            make_generator(path, released.family, max_tokens=TEXT_TINY)
        return str(path)

    def latents(self, name: str, clip: Clip) -> str:
        """A latents set of eight pairs for a generator.

        Args:
            name: One of :data:`.gpu_rows.GENERATORS`.
            clip: Size of its videos.
        """
        from random_weights import write_latents

        from videoalign.models.generator_folder import load_generator

        path = self.folder / f"{name}_latents_{clip.frames}"
        if not path.exists():
            generator = load_generator(self.generator(name), parts=("vae",))
            write_latents(path, generator, generator.latent_shape(clip.frames, clip.height, clip.width), 8)
        return str(path)

    def backbone(self) -> str:
        """Folder of a Qwen2-VL-2B."""
        from random_weights import QWEN2_VL_2B, QWEN_TINY, write_backbone

        path = self.folder / "qwen2vl"
        write_backbone(path, QWEN_TINY if self.toy else QWEN2_VL_2B)
        return str(path)

    def videos(self, kind: str, count: int) -> str:
        """A set of mp4 files.

        Args:
            kind: ``pairs`` or ``videos``.
            count: Number of samples.
        """
        from random_weights import write_videos

        path = self.folder / f"{kind}_{count}"
        write_videos(path, kind, count, **(RATED_TINY if self.toy else RATED))
        return str(path)

    def files(self) -> list[str]:
        """Two mp4 files."""
        from random_weights import clip

        paths = [self.folder / f"clip{seed}.mp4" for seed in range(2)]
        for seed, path in enumerate(paths):
            if not path.exists():
                path.write_bytes(clip(**(RATED_TINY if self.toy else RATED), seed=seed))
        return [str(path) for path in paths]
