"""The best weights of a run, kept until its end: the last ones may only know their training set."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)
NUM_WORSE_BEFORE_WARNING = 2


class BestWeights:
    """A copy of the weights whose evaluation scored highest, and how many came after it."""

    def __init__(self) -> None:
        self.step = -1
        """Of these weights; -1 before the first evaluation."""
        self.metrics: dict[str, float] = {}
        """What was measured then."""
        self.num_worse = 0
        """Evaluations since then."""
        self.weights: dict[str, Tensor] = {}

    @torch.no_grad()
    def offer(
        self, model: nn.Module, metrics: Mapping[str, float], *, name: str, step: int
    ) -> None:
        """Take a copy if ``metrics[name]`` is higher than before, or the first."""
        if self.step >= 0 and not metrics[name] > self.metrics[name]:
            self.num_worse += 1
            if self.num_worse == NUM_WORSE_BEFORE_WARNING:
                logger.info(
                    f"step {step}: held-out images were followed best at step {self.step}; since "
                    "then the run only memorizes its training images. The model folder gets the "
                    "weights of that step; more images or more captions help, longer runs do not"
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
