"""The image tokenizer's config: derived sizes, and what it refuses."""

from typing import Any

import pytest

from vqvae.config import VQVAEConfig


def test_derived_sizes() -> None:
    config = VQVAEConfig(image_size=96, patch_size=4, channels=(8, 8, 8), fsq_levels=(8, 5, 5))
    assert config.downsampling == 16
    assert (config.pixel_size, config.image_grid_size) == ((96, 96), (6, 6))
    wide = VQVAEConfig(image_size=(32, 48))
    assert (wide.pixel_size, wide.image_grid_size) == ((32, 48), (4, 6))
    assert (config.codebook_size, config.codebook_levels) == (200, (8, 5, 5))
    for quantizer in ("vq", "gumbel"):
        codes = VQVAEConfig(quantizer=quantizer, vq_codebook_size=77)  # type: ignore[arg-type]
        assert (codes.codebook_size, codes.codebook_levels) == (77, (77,))


DALLE = {"architecture": "dalle", "patch_size": 1, "channels": (8, 12, 16), "image_size": 16}
IMPOSSIBLE = [
    ({"image_size": 60}, r"image_size: got 60, expected a multiple of 8 \(patch_size 4, halved 1"),
    ({"image_size": 0}, "image_size: got 0"),
    ({"image_size": (32, 44)}, r"image_size: got \(32, 44\), expected a multiple of 8"),
    ({"image_size": (44, 32)}, r"image_size: got \(44, 32\), expected a multiple of 8"),
    ({"image_size": (32, 0)}, r"image_size: got \(32, 0\), expected a multiple of 8"),
    ({"patch_size": 0}, "patch_size: got 0"),
    ({"channels": ()}, r"channels: got \(\)"),
    ({"channels": (8, 0)}, r"channels: got \(8, 0\)"),
    ({"num_encoder_blocks": -1}, "num_encoder_blocks: got -1, expected 0 or more"),
    ({"num_decoder_blocks": -1}, "num_decoder_blocks: got -1, expected 0 or more"),
    ({"fsq_levels": ()}, r"fsq_levels: got \(\)"),
    ({"fsq_levels": (5, 1)}, r"fsq_levels: got \(5, 1\)"),
    ({"fsq_levels": (2**21,) * 3}, "fsq_levels: got 3 of them, whose codes do not fit into 64"),
    ({"fsq_levels": (2,) * 10**6}, "fsq_levels: got 1000000 of them"),
    ({"vq_codebook_size": 1}, "vq_codebook_size: got 1, expected at least 2"),
    ({"vq_code_dim": 0}, "vq_code_dim: got 0, expected at least 1"),
    ({"encoder_kernel_size": 2}, "encoder_kernel_size: got 2, expected one of 1, 3"),
    ({"quantizer": "lfq"}, "quantizer: got 'lfq', expected one of fsq, vq, gumbel"),
    ({**DALLE, "patch_size": 2}, "patch_size: got 2, expected 1 for dalle"),
    ({**DALLE, "channels": (8, 10)}, r"channels: got \(8, 10\), expected multiples of 4"),
    ({**DALLE, "image_size": 30}, "image_size: got 30, expected a multiple of 4"),
    ({"architecture": "unet"}, "architecture: got 'unet', expected one of patches, dalle"),
    ({"decoder_output": "l2"}, "decoder_output: got 'l2', expected one of pixels, logit_l"),
]


@pytest.mark.parametrize(("changes", "message"), IMPOSSIBLE)
@pytest.mark.usefixtures("unchecked")
def test_impossible_sizes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VQVAEConfig(**changes)
