"""Generation on a GPU by captured steps: the same images as on the CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dalle_mini_impl.models.dalle import Dalle
from dalle_mini_impl.sampling.generate import generate_sequentially
from dalle_mini_impl.sampling.sampler import SamplingConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def assert_same_on_gpu(
    build: Callable[[], Dalle], num_rows: int, sampling_config: SamplingConfig
) -> None:
    generator = torch.Generator().manual_seed(0)
    text, seeds = torch.randint(1, 11, (num_rows, 5), generator=generator), torch.arange(num_rows)
    options = {"seeds": seeds, "sampling_config": sampling_config}
    on_cpu = generate_sequentially(build(), text, **options)
    on_gpu = generate_sequentially(build().cuda(), text.cuda(), **options)
    assert torch.equal(on_gpu.image_token_ids.cpu(), on_cpu.image_token_ids)
    torch.testing.assert_close(
        on_gpu.log_likelihood_ratio.cpu(), on_cpu.log_likelihood_ratio, atol=1e-3, rtol=0
    )


@pytest.mark.parametrize(
    "sampling_config",
    [
        SamplingConfig(guidance_scale=1.0),
        SamplingConfig(guidance_scale=3.0, guidance_schedule="cosine", top_k=5),
        SamplingConfig(guidance_scale=2.0, guidance_schedule="constant", top_p=0.8),
    ],
)
@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize(
    "decoder", [{}, {"architecture": "encoder_decoder", "num_encoder_layers": 1}]
)
def test_gpu_and_cpu_generate_the_same(
    build_dalle: Callable[..., Dalle],
    decoder: dict[str, Any],
    sampling_config: SamplingConfig,
    num_rows: int,
) -> None:
    assert_same_on_gpu(lambda: build_dalle(**decoder), num_rows, sampling_config)


@pytest.mark.parametrize("num_cells", [1, 2, 3, 4])
def test_short_images_need_no_capture(build_dalle: Callable[..., Dalle], num_cells: int) -> None:
    sampling_config = SamplingConfig(guidance_scale=2.0)
    assert_same_on_gpu(lambda: build_dalle(image_grid_size=(1, num_cells)), 2, sampling_config)
