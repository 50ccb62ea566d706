"""Another processor, acted out: every matrix product and convolution ends in other last digits.

`TEST_ROUNDING=1 pytest` runs the tests so; another number rounds in another way. Libraries that add
up the same numbers in another order differ like this, also from one row of a product to the next.
The same operation on the same shapes is rounded alike every time, as it is on one machine.
"""

import functools
import zlib
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SIZE = 2.0**-21  # at most four units in the last place of a float32
PRODUCTS = {
    *("mm", "addmm", "bmm", "baddbmm", "mv", "dot", "linear", "matmul"),
    *("convolution", "convolution_backward", "conv1d", "conv2d", "conv3d", "conv_transpose2d"),
    *("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu"),
    "_scaled_dot_product_flash_attention_for_cpu_backward",
}


class OtherRounding(TorchDispatchMode):
    """Within it, the products of float32 on a CPU are rounded in the way of a seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in PRODUCTS and not func._schema.is_mutable:
            for part in result if isinstance(result, tuple) else (result,):
                if type(part) is Tensor and part.dtype == torch.float32 and part.is_cpu:
                    part.mul_(factors(self.seed, name, part.shape))
        return result


@functools.lru_cache(maxsize=1000)
def factors(seed: int, name: str, shape: torch.Size) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(repr((seed, name, shape)).encode()))
    return 1 + SIZE * (2 * torch.rand(shape, generator=generator) - 1)
