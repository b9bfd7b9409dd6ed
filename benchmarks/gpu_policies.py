"""Rows that train on own samples: an iteration of a shipped recipe, its rollout and its updates timed apart."""

from typing import Any

import lightning as L
from gpu_flops import summary, wan_tokens
from gpu_place import Place
from gpu_timing import StepTimes, finish, peak_gib
from gpu_training import BARE, flow_parts, run
from random_weights import PROMPT

BRIGHT = "{class_path: videoalign.models.function_scores.FunctionScores, init_args: {function: '%s'}}"
REWARD = BRIGHT % "videoalign.miniature.networks.brightness:brightness"
"""A reward that costs nothing, so that what is timed is the generator."""
SAMPLES = 4


class PolicyTimes(StepTimes):
    """Times the updates of an iteration, and its rollout; keeps what the first update logged.

    Attributes:
        rollout: Seconds in which the iteration's samples were drawn, decoded and scored.
        first: Metrics of the first optimizer step.
    """

    rollout: float = 0.0
    first: dict[str, float]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let the rollout be timed."""
        whole, self.first = pl_module.roll_out, {}

        def timed(iteration: int) -> Any:
            begun = finish()
            found = whole(iteration)
            self.rollout = finish() - begun
            return found

        pl_module.roll_out = timed

    def on_train_batch_end(self, trainer: L.Trainer, *given: Any) -> None:
        """Note how long the batch took."""
        super().on_train_batch_end(trainer, *given)
        if trainer.global_step == 1 and not self.first:
            self.first = {name: float(value) for name, value in trainer.callback_metrics.items()}


def policy(place: Place, recipes: list[str], generator: str) -> dict[str, Any]:
    """Time the micro-batches of an on-policy recipe in one iteration, behind its rollout.

    Args:
        place: Where models and sets are.
        recipes: The recipes' files.
        generator: Name of the generator.
    """
    prompts, watch = place.folder / "prompts.txt", PolicyTimes()
    prompts.parent.mkdir(parents=True, exist_ok=True)
    prompts.write_text(PROMPT + "\n", encoding="utf-8")
    given = [
        f"--model.generator={place.generator(generator)}",
        f"--data.prompts={prompts}",
        f"--model.rewards={{judge: {REWARD}}}",
        "--model.advantages={weights: {judge/bright: 1.0}}",
        "--data.groups=1",
        f"--data.samples={SAMPLES}",
        "--model.updates=2",
    ]
    if place.toy:
        given.append("--model.sampling={num_frames: 5, height: 32, width: 32, steps: 4, batch_size: 2}")
    cli = run("fit", recipes, [*given, *BARE], watch)
    module, size = cli.model, cli.trainer.datamodule.batch_size
    shape, s = tuple(module.rollout.latents.shape[1:]), module.sampling
    forwards = 2 if type(module).__name__ == "FlowGRPO" and s.cfg_scale > 1 else 1
    videos = size * forwards
    parts = flow_parts(module, shape, videos, True, True)
    return {
        **watch.result(),
        "flops": summary(parts),
        "peak_gib": peak_gib(),
        "tokens": wan_tokens(module.policy, shape) * videos,
        "token": "video tokens",
        "rollout_seconds_per_sample": watch.rollout / SAMPLES,
        "first_update": watch.first,
        "what": f"micro-batch, latents {' x '.join(map(str, shape))}, {size} sample(s), {forwards} evaluation(s) each; "
        f"before it {watch.rollout / SAMPLES:.2f} s a sample of {s.steps} steps",
        "precision": str(cli.trainer.precision),
    }
