"""A pipeline on this machine's best device, and the processes that split the work."""

import os
from typing import Any

import torch

from dalle_mini_impl.hardware import build_accelerator, find_device, use_fast_float32
from dalle_mini_impl.native.decoder import NativeWeights
from dalle_mini_impl.pipeline import TextToImagePipeline


def open_pipeline(
    model: str, *, native: NativeWeights | None = None, device: torch.device | None = None
) -> TextToImagePipeline:
    """Load a model folder onto ``device``, by default the GPU if there is one.

    ``native`` asks for the compiled forward pass, which is used where it is possible.
    """
    use_fast_float32()
    pipeline = TextToImagePipeline.from_pretrained(model).to(device or find_device())
    if native is not None:
        pipeline.use_native(native)
    return pipeline


class Processes:
    """The processes of this call: one, unless a launcher started more."""

    def __init__(self) -> None:
        self._accelerator = None
        # Accelerate takes a second to import, and one process on a CPU has no use for it.
        if "WORLD_SIZE" in os.environ or find_device().type != "cpu":
            # float32: the last bits decide which image it is.
            self._accelerator = build_accelerator("no")
        self.device = self._accelerator.device if self._accelerator else torch.device("cpu")
        self.is_main = self._accelerator is None or self._accelerator.is_main_process

    def split(self, items: list[Any]) -> list[Any]:
        """Return this process's part of a list."""
        if self._accelerator is None:
            return items
        with self._accelerator.split_between_processes(items) as mine:
            return list(mine)

    def gather(self, items: list[Any]) -> list[Any]:
        """Join the lists of all processes."""
        if self._accelerator is None:
            return items
        from accelerate.utils import gather_object

        return list(gather_object(items))
