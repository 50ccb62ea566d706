"""The image tokenizer: encoding, decoding, training.

Two comparisons. By default: our tokenizer as `train_vqvae.py` builds it beside DALLE-pytorch's
discrete VAE with as many tokens an image; networks and objectives differ, so a speed here says
nothing of quality. Same mathematics: DALLE-pytorch's own networks around our Gumbel quantizer,
at the vocabulary of DALL-E, where the quantizer is most of the work.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks import ours, ours_pictures, peers
from benchmarks.ceilings import count_flops
from benchmarks.config import BenchmarkConfig
from benchmarks.timing import (
    Job,
    Precision,
    Result,
    Variant,
    interleave,
    require_training,
)

Work = Literal["encode", "decode", "train"]
WORKS: tuple[Work, ...] = ("encode", "decode", "train")


def run(config: BenchmarkConfig) -> list[Result]:
    """Compare tokenizers.

    Args:
        config: Of the run.

    Returns:
        Rows in images per second.
    """
    results = []
    for precision in config.precisions():
        pixels = random_images(2, 32) if config.quick else random_images(16, 64)
        for work in WORKS:
            results += interleave(
                f"tokenizer by default, {pixels.shape[-1]} px, {work}, {precision}",
                list(default_rows(work, pixels, precision, with_compiled=not config.quick)),
                unit="images/s",
                rounds=config.rounds,
            )
        pixels = random_images(2, 32) if config.quick else random_images(8, 128)
        codes = 64 if config.quick else 8192
        results += interleave(
            f"Gumbel dVAE, {codes:,} codes, {pixels.shape[-1]} px, same mathematics, {precision}",
            list(gumbel_rows(pixels, codes, precision, with_compiled=not config.quick)),
            unit="images/s",
            rounds=config.rounds,
        )
    return results


def random_images(batch: int, side: int) -> Tensor:
    """Make up smooth images in [-1, 1], (batch, 3, side, side)."""
    coarse = torch.rand(batch, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, side, mode="bilinear").clamp(-1, 1)


def default_rows(
    work: Work, pixels: Tensor, precision: Precision, *, with_compiled: bool = True
) -> Iterator[Variant]:
    """Name the rows of the comparison by default.

    Args:
        work: Encode, decode or train.
        pixels: Images.
        precision: bf16 is autocast.
        with_compiled: Whether training is also compiled.

    Yields:
        Contestants.
    """
    for words, compiled in _own_ways(work, with_compiled=with_compiled):
        yield Variant(
            name=f"ours (FSQ){words}",
            build=functools.partial(
                ours_pictures.tokenizer_job, work, pixels, precision, compiled=compiled
            ),
            is_ours=True,
            precision=precision,
            matmul=ours.matmul_setting(),
            keeps_memory=work == "train",
        )
    sizes = {"num_layers": 3, "num_tokens": 1024, "codebook_dim": 512, "hidden_dim": 64}
    build = functools.partial(build_dvae, pixels, **sizes)
    yield from _dvae_rows(work, pixels, precision, build, with_compiled=with_compiled)


def gumbel_rows(
    pixels: Tensor, codes: int, precision: Precision, *, with_compiled: bool = True
) -> Iterator[Variant]:
    """Name the rows of the comparison with the same mathematics.

    Args:
        pixels: Images.
        codes: Number of codes.
        precision: bf16 is autocast.
        with_compiled: Whether all are also compiled.

    Yields:
        Contestants.
    """
    sizes: dict[str, Any] = {
        "num_layers": 3,
        "num_tokens": codes,
        "codebook_dim": 512,
        "hidden_dim": 64,
        "num_resnet_blocks": 1,
    }
    build = functools.partial(build_dvae, pixels, **sizes)

    def own_job(*, compiled: bool) -> Job:
        vae = build()
        loss = vae((pixels + 1) / 2, return_loss=True)
        loss.backward()
        theirs = ours_pictures.FirstStep(
            float(loss.detach()), float(vae.codebook.weight.grad.norm())
        )
        vae.zero_grad()
        return ours_pictures.gumbel_training(
            vae.encoder,
            vae.decoder,
            vae.codebook.weight.detach().clone(),
            pixels,
            precision,
            expected_first_step=theirs,
            compiled=compiled,
        )

    for words, compiled in _own_ways("train", with_compiled=with_compiled):
        yield Variant(
            name=f"ours{words}",
            build=functools.partial(own_job, compiled=compiled),
            is_ours=True,
            precision=precision,
            matmul=ours.matmul_setting(),
            keeps_memory=True,
        )
    yield from _dvae_rows("train", pixels, precision, build, with_compiled=with_compiled)


def _own_ways(work: Work, *, with_compiled: bool) -> Iterator[tuple[str, bool]]:
    yield "", False
    if work == "train" and with_compiled:
        yield ", compiled", True


def _dvae_rows(
    work: Work,
    pixels: Tensor,
    precision: Precision,
    build: Callable[[], Any],
    *,
    with_compiled: bool,
) -> Iterator[Variant]:
    shipped = ("as shipped", "highest", torch.contiguous_format, False)
    ways = [
        shipped,
        ("channels last", "highest", torch.channels_last, False),
        ('channels last, matmul "medium"', "medium", torch.channels_last, False),
    ]
    if work == "train" and with_compiled:
        ways += [
            ("channels last, compiled", "highest", torch.channels_last, True),
            ('channels last, compiled, matmul "medium"', "medium", torch.channels_last, True),
        ]
    for words, matmul, layout, compiled in ways:
        yield Variant(
            name=f"{peers.DALLE}, {words}",
            build=functools.partial(
                dvae_job, work, build, pixels, precision, layout, compiled=compiled
            ),
            precision=precision,
            matmul=matmul,
            keeps_memory=work == "train" and words != shipped[0],
        )


def build_dvae(pixels: Tensor, **sizes: Any) -> Any:
    """Build DALLE-pytorch's discrete VAE, with its default loss."""
    torch.manual_seed(0)
    return peers.import_dalle_pytorch().DiscreteVAE(image_size=pixels.shape[-1], **sizes)


def dvae_job(
    work: Work,
    build: Callable[[], Any],
    pixels: Tensor,
    precision: Precision,
    layout: torch.memory_format,
    *,
    compiled: bool = False,
) -> Job:
    """Encode, decode or train DALLE-pytorch's discrete VAE.

    Args:
        work: Which of the three.
        build: Makes the model.
        pixels: Images in [-1, 1]; its own range is [0, 1].
        precision: bf16 is autocast.
        layout: Order of axes in memory.
        compiled: Whether torch.compile makes the training pass.

    Returns:
        One batch; items are images.
    """
    vae = build().to(memory_format=layout)
    images = ((pixels + 1) / 2).contiguous(memory_format=layout)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-4, betas=(0.9, 0.99), fused=True)
    token_ids = vae.get_codebook_indices(images)

    def step(net: Callable[..., Tensor] = vae) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = net(images, return_loss=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    def infer() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            if work == "encode":
                return vae.get_codebook_indices(images)
            with torch.no_grad():
                return vae.decode(token_ids)

    eager: Callable[[], object] = step if work == "train" else infer
    flops = count_flops(eager, with_batched=True)
    net = torch.compile(vae, dynamic=False) if compiled else vae
    run = functools.partial(step, net) if work == "train" else infer
    if work == "train":
        require_training(run, steps=5, compiled=compiled)
    elif len(infer()) != len(pixels):
        raise ValueError("the tokenizer returns another number of images")
    return Job(run=run, items=len(pixels), flops=flops)
