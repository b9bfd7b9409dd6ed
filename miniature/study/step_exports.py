"""Export of adapters after chosen optimizer steps of a training, each with what it had cost until then."""

import lightning as L
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ...callbacks.export_generator import ExportGenerator
from ...callbacks.run_folder import folder_of
from ...datamodules.contracts import TrainsTransformer, require
from ...models.evaluations import Evaluations
from ...models.files import write_json
from ...models.reward_gradients import NoisyRewards

COUNTED = "evaluations.json"
"""File beside the adapters: evaluations until then, as they were counted, and the optimizer steps."""


class ExportAtSteps(ExportGenerator):
    """Writes LoRA adapters into ``export/NAME`` of the run's folder after chosen optimizer steps.

    Beside them it writes the evaluations of the transformer that the training had made until then, its own samples
    among them, as :class:`~videoalign.models.evaluations.Evaluations` counts them.

    Args:
        at: Number of the optimizer step by the name of the folder.
    """

    def __init__(self, at: dict[str, int]) -> None:
        super().__init__()
        self.at = at
        self._counting: Evaluations | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count."""
        reward = getattr(pl_module, "reward", None)
        noisy = reward.reward if isinstance(reward, NoisyRewards) else None
        module = require(pl_module, TrainsTransformer, "study.ExportAtSteps")
        self._counting = Evaluations(module.generator, noisy)
        self._counting.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: object) -> None:
        """Write the adapters where it is time to. Collective."""
        due = [name for name, step in self.at.items() if step == trainer.global_step]
        run = folder_of(trainer) if due else None
        for name in due:
            out = run / "export" / name
            if (out / COUNTED).exists():  # further micro-batches of the next step
                continue
            module = require(pl_module, TrainsTransformer, "study.ExportAtSteps")
            options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
            self._write(module, get_model_state_dict(module.policy, options=options), out)
            self._written = out
            write_json(out / COUNTED, {"evaluations": self._counting.total, "steps": trainer.global_step})

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop counting; all is written."""
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stop counting."""
        super().on_exception(trainer, pl_module, exception)
        self._stop()

    def _stop(self) -> None:
        if self._counting:
            self._counting.__exit__()
            self._counting = None
