"""The miniature world: a coloured shape moves across a small picture, more or less well.

It stands in for text-to-video generators wherever none can be downloaded: prompts such as "a red circle moves upwards",
clips of known quality in each dimension, and flaws that a small autoencoder keeps (fading, stains, freezing,
jumping, wrong attributes), because a generator is trained on this world too.
"""

from dataclasses import dataclass

import numpy as np

SIZE, FRAMES, FPS = 32, 9, 8
"""Pixels a side, frames (4k + 1, as video autoencoders take) and frames per second."""
COLOURS = {
    "red": (225, 45, 45), "green": (50, 200, 70), "blue": (60, 95, 240), "yellow": (235, 215, 50),
    "purple": (150, 60, 200), "orange": (240, 140, 40), "cyan": (60, 215, 225), "white": (240, 240, 240),
}  # fmt: skip
SHAPES = ("circle", "bar", "pole")
DIRECTIONS = {"to the right": (1, 0), "to the left": (-1, 0), "upwards": (0, -1), "downwards": (0, 1)}
RADIUS, TRAVEL = 7.0, 8.5
"""Radius of a circle, and distance from the middle of the picture to each end of a sprite's path, in pixels."""
TA_WEIGHTS = np.array([0.4, 0.3, 0.3])
"""What a wrong colour, shape or direction takes off the quality of text alignment."""


@dataclass(frozen=True)
class Scene:
    """What a clip shows, or what its prompt asks for.

    Attributes:
        colour: Colour of the sprite, a key of :data:`COLOURS`.
        shape: Shape of the sprite, one of :data:`SHAPES`.
        direction: Direction of its path, a key of :data:`DIRECTIONS`.
    """

    colour: str
    shape: str
    direction: str

    @property
    def details(self) -> tuple[str, str, str]:
        """The words of colour, shape and direction, which make the prompt."""
        return f"a {self.colour}", f" {self.shape}", f" moves {self.direction}"

    @property
    def prompt(self) -> str:
        """The scene in words."""
        return "".join(self.details)


SCENES = [Scene(c, s, d) for c in COLOURS for s in SHAPES for d in DIRECTIONS]
"""Everything that can be shown."""
BY_PROMPT = {scene.prompt: scene for scene in SCENES}
"""Scenes by their prompts."""


@dataclass(frozen=True)
class Flaws:
    """How a rendering falls short; every strength is in [0, 1], 0 is flawless.

    Attributes:
        fade: Contrast that is lost; lowers visual quality.
        stain: Size of grey blots over the picture; lowers visual quality.
        freeze: Share of the path that is never travelled; lowers motion quality.
        jump: Length of leaps to the side; lowers motion quality.
        wrong: Which of colour, shape and direction differ from the prompt.
    """

    fade: float = 0.0
    stain: float = 0.0
    freeze: float = 0.0
    jump: float = 0.0
    wrong: tuple[bool, bool, bool] = (False, False, False)

    @property
    def quality(self) -> np.ndarray:
        """(3,) true quality of VQ, MQ and TA in [0, 1]."""
        return np.array([1 - max(self.fade, self.stain), 1 - max(self.freeze, self.jump), 1 - TA_WEIGHTS @ self.wrong])


@dataclass(frozen=True)
class Source:
    """A simulated generator.

    Attributes:
        name: Name of the generator in the records.
        recent: Whether it belongs to the newer generation.
        flaws: Mean strength of its flaws in VQ and in MQ, and how often it gets an attribute of the prompt wrong.
        habits: Probability that it fades rather than stains, and that it freezes rather than jumps.
    """

    name: str
    recent: bool
    flaws: tuple[float, float, float]
    habits: tuple[float, float] = (0.5, 0.5)

    def sample(self, rng: np.random.Generator) -> Flaws:
        """Draws the flaws of one clip."""
        vq, mq = np.clip(rng.normal(self.flaws[:2], 0.28), 0, 1)
        fades, freezes = rng.random(2) < self.habits
        return Flaws(
            fade=vq if fades else 0.0,
            stain=0.0 if fades else vq,
            freeze=mq if freezes else 0.0,
            jump=0.0 if freezes else mq,
            wrong=tuple(bool(w) for w in rng.random(3) < self.flaws[2]),
        )


SOURCES = [
    Source("blot-1", False, (0.75, 0.60, 0.40), (0.2, 0.5)),
    Source("stutter-1", False, (0.50, 0.80, 0.35), (0.5, 0.3)),
    Source("mist-1", False, (0.80, 0.55, 0.45), (0.9, 0.7)),
    Source("stutter-2", False, (0.45, 0.70, 0.40), (0.5, 0.5)),
    Source("drift-3", True, (0.30, 0.45, 0.30), (0.5, 0.6)),
    Source("mist-3", True, (0.50, 0.25, 0.40), (0.9, 0.5)),
    Source("clear-4", True, (0.20, 0.35, 0.25), (0.4, 0.4)),
    Source("clear-5", True, (0.25, 0.20, 0.15), (0.6, 0.6)),
]
"""Older ones first. Newer ones are better, but none is best at everything."""


def shown(scene: Scene, wrong: tuple[bool, bool, bool], rng: np.random.Generator) -> Scene:
    """The scene of a clip that gets some attributes wrong.

    Args:
        scene: What the prompt asks for.
        wrong: Which of colour, shape and direction are replaced by others.
        rng: Draws the replacements.
    """

    def other(value: str, values: list[str]) -> str:
        return str(rng.choice([v for v in values if v != value]))

    return Scene(
        other(scene.colour, list(COLOURS)) if wrong[0] else scene.colour,
        other(scene.shape, list(SHAPES)) if wrong[1] else scene.shape,
        other(scene.direction, list(DIRECTIONS)) if wrong[2] else scene.direction,
    )


def render(scene: Scene, flaws: Flaws, rng: np.random.Generator, spread: float = 4.0) -> np.ndarray:
    """A clip, uint8 (FRAMES, SIZE, SIZE, 3), see :func:`tracked`."""
    return tracked(scene, flaws, rng, spread)[0]


def tracked(scene: Scene, flaws: Flaws, rng: np.random.Generator, spread: float = 4.0) -> tuple[np.ndarray, np.ndarray]:
    """A clip, uint8 (FRAMES, SIZE, SIZE, 3), and the middle of its sprite as x and y (FRAMES, 2), in pixels.

    Args:
        scene: What is shown, which is not always what the prompt asks for.
        flaws: Flaws of the rendering; ``wrong`` is not read here, see :func:`shown`.
        rng: Draws what the scene leaves open: background, path, places of stains and jumps.
        spread: Largest distance of the path from the middle, in pixels.
    """
    along = np.array(DIRECTIONS[scene.direction], float)
    across = along[::-1]
    progress = np.linspace(-1, 1, FRAMES)
    stop = 1 - 2 * 0.85 * flaws.freeze  # frozen from here on
    path = np.minimum(progress, stop)[:, None] * along * TRAVEL + across * rng.uniform(-spread, spread)  # (T, 2)
    leaps = rng.choice([-1.0, 1.0], FRAMES) * (rng.random(FRAMES) < 0.6)
    leaps[rng.integers(1, FRAMES - 1)] = rng.choice([-1.0, 1.0])  # at least one
    path = path + leaps[:, None] * across * 8 * flaws.jump
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    background = rng.uniform(30, 45) + 12 * y / SIZE  # (H, W)
    dx = x - SIZE / 2 - path[:, 0, None, None]
    dy = y - SIZE / 2 - path[:, 1, None, None]  # (T, H, W)
    inside = np.clip(RADIUS + 0.5 - distance(scene.shape, dx, dy), 0, 1)[..., None] * (1 - 0.8 * flaws.fade)
    video = background[None, ..., None] * (1 - inside) + np.array(COLOURS[scene.colour]) * inside
    if flaws.stain:
        for centre in rng.uniform(6, SIZE - 6, (3, 2)):
            blot = np.clip(2 + 5 * flaws.stain - np.hypot(x - centre[0], y - centre[1]), 0, 1) * 0.75
            video = video * (1 - blot[..., None]) + 150 * blot[..., None]
    return video.round().astype(np.uint8), path + SIZE / 2


def distance(shape: str, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """A distance whose level at RADIUS is the edge of the shape; all shapes are about equally large."""
    if shape == "circle":
        return np.hypot(dx, dy)
    long, across = (dx, dy) if shape == "bar" else (dy, dx)
    return np.maximum(np.abs(long) - 1.0, np.abs(across) + 3.0)  # 16 x 8 pixels
