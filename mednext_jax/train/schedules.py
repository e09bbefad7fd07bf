"""Learning-rate schedules, ``step -> learning rate``, and the plateau rule that watches the validation score.

They are computed on the host and given to each step: runs that differ in them share one compiled program.
Steps count from 0 and include skipped ones, so the schedule, the data order and the random keys stay
together.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

NAMES = ("warmup_cosine", "poly", "constant", "plateau")


def make_schedule(config: Mapping[str, Any]) -> Callable[[int], float]:
    """The schedule named by ``config["schedule"]``.

    All rise linearly over ``warmup_steps`` to ``peak_lr``, reached at step ``warmup_steps - 1``; then
      warmup_cosine: half a cosine down to ``peak_lr * final_fraction`` at ``total_steps``;
      poly: ``peak_lr * (1 - t) ** poly_power``, nnU-Net's decay (power 0.9);
      constant, plateau: ``peak_lr`` (times the factor of :class:`Plateau`).

    Raises: ValueError for an unknown name or a warm-up as long as the run.
    """
    name, peak = config["schedule"], config["peak_lr"]
    warmup, total = config["warmup_steps"], config["total_steps"]
    if name not in NAMES:
        raise ValueError(f"config.optim.schedule is {name!r}; it must be one of {', '.join(NAMES)}")
    if not 0 <= warmup < total:
        raise ValueError(f"config.optim.warmup_steps is {warmup}: it must be below total_steps ({total}); "
                         "a run of few steps takes 0")

    def schedule(step: int) -> float:
        progress = min(max((step - warmup) / (total - warmup), 0.0), 1.0)
        if name == "warmup_cosine":
            final = config["final_fraction"]
            decay = final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
        elif name == "poly":
            decay = (1 - progress) ** config["poly_power"]
        else:
            decay = 1.0
        return peak * decay * min(1.0, (step + 1) / max(warmup, 1))

    return schedule


@dataclasses.dataclass
class Plateau:
    """Multiplies the learning rate by ``factor`` when a score that should rise has not for a while.

    The score must exceed the best one by ``threshold``, or the validation counts as one without progress;
    after more than ``patience`` of them the rate falls and counting starts anew. An undefined (NaN) score
    counts as one without progress. Its three last attributes are the state that checkpoints keep.
    """

    factor: float
    patience: int
    threshold: float = 1e-4
    scale: float = 1.0
    best: float = -math.inf
    waited: int = 0

    def update(self, score: float) -> float:
        """Takes one validation score; returns what the learning rate is to be multiplied by from now on."""
        if score > self.best + self.threshold:
            self.best, self.waited = score, 0
        else:
            self.waited += 1
        if self.waited > self.patience:
            self.scale, self.waited = self.scale * self.factor, 0
        return self.scale

    def get_state(self) -> dict[str, float | int | None]:
        """The changing part as plain JSON values (no infinities)."""
        best = self.best if math.isfinite(self.best) else None
        return {"scale": self.scale, "best": best, "waited": self.waited}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`get_state`."""
        self.scale, self.waited = state["scale"], state["waited"]
        self.best = -math.inf if state["best"] is None else state["best"]
