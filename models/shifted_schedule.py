"""Schedules of sampling with another shift, which gives more steps near the noise."""

import math

from diffusers import SchedulerMixin

from .. import VideoAlignError


def shifted(scheduler: SchedulerMixin, shift: float) -> SchedulerMixin:
    """A scheduler like another, but for the shift of its time steps.

    Raises:
        VideoAlignError: Where it has none.
    """
    name = next((name for name in ("flow_shift", "shift") if name in scheduler.config), None)
    if name is None or not (shift > 0 and math.isfinite(shift)):
        why = "it has no such setting" if name is None else "it must be positive and finite"
        raise VideoAlignError(f"the shift of {type(scheduler).__name__}'s time steps cannot be {shift}: {why}")
    fixed = {"use_dynamic_shifting": False} if "use_dynamic_shifting" in scheduler.config else {}
    return type(scheduler).from_config(scheduler.config, **{name: shift}, **fixed)
