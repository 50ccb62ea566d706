"""The image tokenizer: encoding, decoding, training.

Two comparisons. By default: our tokenizer as `train_vqvae.py` builds it beside DALLE-pytorch's
discrete VAE with as many tokens a picture; networks and objectives differ, so a speed here says
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
from benchmarks.settings import Settings
from benchmarks.timing import Contestant, Job, Precision, Result, interleave, require_falling

Work = Literal["encode", "decode", "train"]
WORKS: tuple[Work, ...] = ("encode", "decode", "train")
MOST_DIFFERENT = 0.05  # of two first losses with the same weights and other noise


def run(settings: Settings) -> list[Result]:
    """Compare tokenizers.

    Args:
        settings: Of the run.

    Returns:
        Rows in images per second.
    """
    results = []
    for precision in settings.precisions():
        pixels = pictures(2, 32) if settings.quick else pictures(16, 64)
        for work in WORKS:
            results += interleave(
                f"tokenizer by default, {pixels.shape[-1]} px, {work}, {precision}",
                list(default_rows(work, pixels, precision)),
                unit="images/s",
                rounds=settings.rounds,
            )
        pixels = pictures(2, 32) if settings.quick else pictures(8, 128)
        codes = 64 if settings.quick else 8192
        results += interleave(
            f"Gumbel dVAE, {codes:,} codes, {pixels.shape[-1]} px, same mathematics, {precision}",
            list(gumbel_rows(pixels, codes, precision)),
            unit="images/s",
            rounds=settings.rounds,
        )
    return results


def pictures(batch: int, side: int) -> Tensor:
    """Make up smooth pictures in [-1, 1], (batch, 3, side, side)."""
    coarse = torch.rand(batch, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, side, mode="bilinear").clamp(-1, 1)


def default_rows(work: Work, pixels: Tensor, precision: Precision) -> Iterator[Contestant]:
    """Name the rows of the comparison by default.

    Args:
        work: Encode, decode or train.
        pixels: Pictures.
        precision: bf16 is autocast.

    Yields:
        Contestants.
    """
    yield Contestant(
        name="ours (FSQ)",
        build=functools.partial(ours_pictures.tokenizer_job, work, pixels, precision),
        is_ours=True,
        precision=precision,
        matmul=ours.matmul_setting(),
    )
    sizes = {"num_layers": 3, "num_tokens": 1024, "codebook_dim": 512, "hidden_dim": 64}
    build = functools.partial(build_dvae, pixels, **sizes)
    yield from _dvae_rows(work, pixels, precision, build)


def gumbel_rows(pixels: Tensor, codes: int, precision: Precision) -> Iterator[Contestant]:
    """Name the rows of the comparison with the same mathematics.

    Args:
        pixels: Pictures.
        codes: Number of codes.
        precision: bf16 is autocast.

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

    def own_job() -> Job:
        vae = build()
        with torch.no_grad():
            theirs = float(vae((pixels + 1) / 2, return_loss=True))
        # With the same weights both must begin at the same loss, but for the noise.
        return ours_pictures.gumbel_training(
            vae.encoder,
            vae.decoder,
            vae.codebook.weight.detach().clone(),
            pixels,
            precision,
            first_loss=(theirs, MOST_DIFFERENT),
        )

    yield Contestant(
        name="ours",
        build=own_job,
        is_ours=True,
        precision=precision,
        matmul=ours.matmul_setting(),
    )
    yield from _dvae_rows("train", pixels, precision, build)


def _dvae_rows(
    work: Work, pixels: Tensor, precision: Precision, build: Callable[[], Any]
) -> Iterator[Contestant]:
    ways = (
        ("as shipped", "highest", torch.contiguous_format),
        ('channels last, matmul "medium"', "medium", torch.channels_last),
    )
    for words, matmul, layout in ways:
        yield Contestant(
            name=f"{peers.DALLE}, {words}",
            build=functools.partial(dvae_job, work, build, pixels, precision, layout),
            precision=precision,
            matmul=matmul,
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
) -> Job:
    """Encode, decode or train DALLE-pytorch's discrete VAE.

    Args:
        work: Which of the three.
        build: Makes the model.
        pixels: Pictures in [-1, 1]; its own range is [0, 1].
        precision: bf16 is autocast.
        layout: Order of axes in memory.

    Returns:
        One batch; items are pictures.
    """
    vae = build().to(memory_format=layout)
    images = ((pixels + 1) / 2).contiguous(memory_format=layout)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-4, betas=(0.9, 0.99), fused=True)
    token_ids = vae.get_codebook_indices(images)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = vae(images, return_loss=True)
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

    run: Callable[[], object] = step if work == "train" else infer
    if work == "train":
        require_falling([step() for _ in range(5)])
    elif len(infer()) != len(pixels):
        raise ValueError("the tokenizer returns another number of pictures")
    return Job(run=run, items=len(pixels), flops=count_flops(run, with_batched=True))
