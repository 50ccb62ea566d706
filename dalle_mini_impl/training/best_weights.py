"""The best weights of a run, kept until its end: the last ones may only know their training set.

The held-out loss alone would choose too early: on emoji it rose from 1.26 to 1.47 nats per token
while the fraction of right combinations rose from 80 to 92 % (docs/log.md). What tells a model that
learns from one that memorizes is whether held-out captions still help.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)
NUM_WORSE_BEFORE_WARNING = 2


class BestWeights:
    """The weights of the latest evaluation that scored 0 or more, else of the highest."""

    def __init__(self) -> None:
        self.step = -1
        """Of these weights; -1 before the first evaluation."""
        self.metrics: dict[str, float] = {}
        """What was measured then."""
        self.num_worse = 0
        """Evaluations since then, all of them below 0."""
        self.weights: dict[str, Tensor] = {}

    @torch.no_grad()
    def offer(
        self, model: nn.Module, metrics: Mapping[str, float], *, name: str, step: int
    ) -> None:
        """Take a copy if ``metrics[name]`` is 0 or more, or higher than before, or the first."""
        if self.step >= 0 and not (metrics[name] >= 0 or metrics[name] > self.metrics[name]):
            self.num_worse += 1
            if self.num_worse == NUM_WORSE_BEFORE_WARNING:
                logger.info(
                    f"step {step}: since step {self.step} held-out captions make their images less "
                    "likely: the run only memorizes its training images. The model folder gets the "
                    "weights of that step; more images help, or longer captions, not a longer run"
                )
            return
        self.step, self.metrics, self.num_worse = step, dict(metrics), 0
        state = model.state_dict()
        if not self.weights:
            self.weights = {key: value.clone() for key, value in state.items()}
        for key, value in state.items():
            self.weights[key].copy_(value)

    def position(self) -> dict[str, Any]:
        """Return what JSON can hold, for a checkpoint."""
        return {"step": self.step, "metrics": self.metrics, "num_worse": self.num_worse}

    def load(self, weights: Mapping[str, Tensor], position: Mapping[str, Any]) -> None:
        """Continue with what a checkpoint holds."""
        self.weights = {key: value.clone() for key, value in weights.items()}
        self.step, self.num_worse = int(position["step"]), int(position["num_worse"])
        self.metrics = dict(position["metrics"])
