"""The image tokenizer: encoding, decoding, training; its look-up; and seconds until a quality.

Four comparisons:

- By default: our tokenizer as `train_vqvae.py` builds it beside DALLE-pytorch's discrete VAE with
  the same number of tokens; networks and objectives differ, so a speed says nothing of quality.
- Same mathematics: DALLE-pytorch's own networks around our Gumbel quantizer, at the vocabulary of
  DALL-E, where the quantizer is most of the work.
- Look-up: the nearest of K codes for 2,048 vectors, the inner step of every VQ tokenizer.
- Quality: seconds of training until held-out emoji are reconstructed from 256 tokens with 22 dB.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import ours, peers, timing
from benchmarks.data import read_pixels, read_rows, to_bytes
from benchmarks.parts import BenchmarkConfig
from benchmarks.timing import Job, Precision, Result, Variant, interleave
from dalle_mini_impl.data.images import bytes_to_pixels
from dalle_mini_impl.hardware import has_fast_bf16, medium_is_float32
from dalle_mini_impl.training.optimizer import build_optimizers
from dalle_mini_impl.training.trainer import Trainer
from dalle_mini_impl.training.vqvae import VQVAETask, VQVAETaskConfig
from vqvae import VQVAE, VQVAEConfig
from vqvae.metrics import psnr
from vqvae.quantizers import GumbelQuantizer, VectorQuantizer

Work = Literal["encode", "decode", "train"]
WORKS: tuple[Work, ...] = ("encode", "decode", "train")
OWN_WAYS = (("", False), (", compiled", True))
BY_DEFAULT = {"num_layers": 3, "num_tokens": 1024, "codebook_dim": 512, "hidden_dim": 64}

NUM_VECTORS, WIDTH = 2048, 32
LEAST_AGREEMENT = 0.999  # ties in the last bit may fall either way

# Time to quality. Both sides make 16 x 16 tokens of a 64 px Twemoji. They train in turns of equal
# time, on images in memory, each by its own preset: ours at a rate that decays over a number of
# steps chosen beforehand, DALLE-pytorch's as its train_vae.py trains (Adam, no KL term). Quality is
# that of hard codes, as a decoder generates them, over the images of `test_compose`; it is measured
# while the clock stands. A program that has not reached the goal in six times our time is stopped.
GOAL_DB = 22.0
TURN_SECONDS = 5.0
MOST_TIMES_OURS = 6.0
MOST_SECONDS = 1200.0
QUALITY_STEPS = 200  # of ours, over which the rate decays
# Defaults of train_vae.py at commit 58c1e1a of lucidrains/DALLE-pytorch, but for 16 x 16 tokens.
DEFAULT_DVAE = {"num_tokens": 8192, "codebook_dim": 512, "hidden_dim": 256, "num_resnet_blocks": 2}
SMALL_DVAE = {"num_tokens": 1024, "codebook_dim": 512, "hidden_dim": 64, "num_resnet_blocks": 1}
DVAE_BATCH, DVAE_RATE, DVAE_TEMPERATURE = 8, 1e-3, 1.0


def compare_tokenizers(config: BenchmarkConfig) -> list[Result]:
    """Compare tokenizers by default and with the same mathematics, in images per second."""
    small, large = random_images(16, 64), random_images(8, 128)
    codes, with_compiled = 8192, not config.quick
    if config.quick:
        small = large = random_images(2, 32)
        codes = 64
    results = []
    for precision in config.precisions():
        for kind in WORKS:
            work = f"tokenizer by default, {small.shape[-1]} px, {kind}, {precision}"
            rows = default_variants(kind, small, precision, with_compiled=with_compiled)
            results += interleave(work, rows, "images/s", config.rounds)
        sizes = f"{codes:,} codes, {large.shape[-1]} px"
        work = f"Gumbel dVAE, {sizes}, same mathematics, {precision}"
        rows = gumbel_variants(large, codes, precision, with_compiled=with_compiled)
        results += interleave(work, rows, "images/s", config.rounds)
    return results


def random_images(batch: int, side: int) -> Tensor:
    """Make smooth images in [-1, 1], (batch, 3, side, side)."""
    # Noise has no structure to compress: a loss on it would hardly fall.
    coarse = torch.rand(batch, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return F.interpolate(coarse, side, mode="bilinear").clamp(-1, 1)


def default_variants(
    work: Work, pixels: Tensor, precision: Precision, *, with_compiled: bool
) -> Iterator[Variant]:
    """Yield the rows of the comparison by default; training is compiled too on request."""
    for words, compiled in OWN_WAYS[: 1 + (with_compiled and work == "train")]:
        build = partial(own_job, work, pixels, precision, compiled=compiled)
        options: dict[str, Any] = {"precision": precision, "keeps_memory": work == "train"}
        yield ours.variant(f"ours (FSQ){words}", build, **options)
    build_vae = partial(build_dvae, pixels.shape[-1], **BY_DEFAULT)
    yield from _dvae_variants(work, pixels, precision, build_vae, with_compiled=with_compiled)


def gumbel_variants(
    pixels: Tensor, codes: int, precision: Precision, *, with_compiled: bool
) -> Iterator[Variant]:
    """Yield the rows of the comparison with the same mathematics."""
    sizes = BY_DEFAULT | {"num_tokens": codes, "num_resnet_blocks": 1}
    build_vae = partial(build_dvae, pixels.shape[-1], **sizes)

    def own_training(*, compiled: bool) -> Job:
        vae = build_vae()
        loss = vae((pixels + 1) / 2, return_loss=True)
        loss.backward()
        peer_first_step = FirstStep(float(loss.detach()), float(vae.codebook.weight.grad.norm()))
        vae.zero_grad()
        codebook = vae.codebook.weight.detach().clone()
        expected: dict[str, Any] = {"peer_first_step": peer_first_step, "compiled": compiled}
        return gumbel_training(vae.encoder, vae.decoder, codebook, pixels, precision, **expected)

    for words, compiled in OWN_WAYS[: 1 + with_compiled]:
        build = partial(own_training, compiled=compiled)
        yield ours.variant(f"ours{words}", build, precision=precision, keeps_memory=True)
    yield from _dvae_variants("train", pixels, precision, build_vae, with_compiled=with_compiled)


def own_job(work: Work, pixels: Tensor, precision: Precision, *, compiled: bool = False) -> Job:
    """Encode, decode or train the default image tokenizer on pixels in [-1, 1].

    Items are images; bf16 is autocast, as in training.
    """
    torch.manual_seed(0)
    vqvae = VQVAE(VQVAEConfig(image_size=pixels.shape[-1]))
    vqvae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if work == "train":
        trainer = build_vqvae_trainer(
            vqvae, to_bytes(pixels), batch=len(pixels), precision=precision, compile=compiled
        )
        step = ours.trainer_step(trainer)
        flops = ours.count_trainer_flops(trainer, with_batched=True)
        timing.require_training(step, steps=5, compiled=compiled)
        return Job(run=step, items=len(pixels), flops=flops)
    vqvae.eval()
    token_ids = vqvae.encode_to_token_ids(pixels)
    if vqvae.decode_from_token_ids(token_ids).shape != pixels.shape:
        raise ValueError("the tokenizer returns images of another size")

    def infer() -> Tensor:
        with timing.autocast(precision):
            if work == "encode":
                return vqvae.encode_to_token_ids(pixels)
            return vqvae.decode_from_token_ids(token_ids)

    return Job(run=infer, items=len(pixels), flops=timing.count_flops(infer, with_batched=True))


def build_vqvae_trainer(vqvae: VQVAE, images: Tensor, **options: Any) -> Trainer:
    """Build the trainer of a tokenizer on images as bytes, (images, 3, side, side)."""
    task = VQVAETask(images, images, VQVAETaskConfig(), sample_weights=None, vqvae=vqvae)
    return ours.build_trainer(task, **options)


@dataclass(frozen=True)
class FirstStep:
    """The first step of a discrete VAE, to be compared with that of another program."""

    loss: float
    # Its norm; without it any mixture of fresh codes would pass, since they average to nothing.
    codebook_gradient: float

    def is_like(self, other: "FirstStep") -> bool:
        """Tell whether both may be one computation with different noise."""
        same_loss = abs(self.loss / other.loss - 1) < 0.05
        return same_loss and abs(self.codebook_gradient / other.codebook_gradient - 1) < 0.2


def gumbel_training(
    encoder: nn.Module,
    decoder: nn.Module,
    codebook: Tensor,
    pixels: Tensor,
    precision: Precision,
    *,
    peer_first_step: FirstStep | None = None,
    compiled: bool = False,
) -> Job:
    """Train a discrete VAE with our Gumbel quantizer between given networks; items are images.

    The mathematics is that of DALLE-pytorch's DiscreteVAE by default: squared error, temperature
    0.9, no KL term. The encoder makes logits over the codes, whose initial rows are ``codebook``. A
    ValueError if our first step differs from ``peer_first_step`` by more than its noise.
    """
    codes, width = codebook.shape
    quantizer = GumbelQuantizer(codebook_size=codes, code_dim=width, kl_weight=0.0)
    quantizer.codebook.data.copy_(codebook)
    quantizer.temperature.fill_(0.9)  # DiscreteVAE's default
    model = nn.Sequential(encoder, quantizer, decoder)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    [optimizer] = build_optimizers(
        model, kind="adamw", learning_rate=3e-4, weight_decay=0.0, betas=(0.9, 0.99)
    )

    def eager_loss() -> Tensor:
        with timing.autocast(precision):
            reconstructions = decoder(quantizer(encoder(pixels)).quantized_latents)
            return F.mse_loss(reconstructions.float(), pixels)

    # Our first step must be the peer's: only then are both the same mathematics.
    first: list[Tensor] = []

    def first_step() -> None:
        first.append(eager_loss())
        first[0].backward()

    flops = timing.count_flops(first_step, with_batched=True)
    gradient = quantizer.codebook.grad
    assert gradient is not None
    found = FirstStep(float(first[0].detach()), float(gradient.norm()))
    if peer_first_step and not found.is_like(peer_first_step):
        raise ValueError(f"first step: got {found}, expected the peer's {peer_first_step}")
    optimizer.zero_grad()
    compute_loss = torch.compile(eager_loss, dynamic=False) if compiled else eager_loss

    def step() -> float:
        return timing.update(compute_loss(), optimizer)

    timing.require_training(step, steps=5, compiled=compiled)
    return Job(run=step, items=len(pixels), flops=flops)


def _dvae_variants(
    work: Work,
    pixels: Tensor,
    precision: Precision,
    build: Callable[[], Any],
    *,
    with_compiled: bool,
) -> Iterator[Variant]:
    ways = ["as shipped", "channels last", 'channels last, matmul "medium"']
    if work == "train" and with_compiled:
        ways += ["channels last, compiled", 'channels last, compiled, matmul "medium"']
    for words in ways:
        layout = torch.channels_last if "channels last" in words else torch.contiguous_format
        yield Variant(
            f"{peers.DALLE}, {words}",
            partial(dvae_job, work, build, pixels, precision, layout, compiled="compiled" in words),
            precision=precision,
            matmul="medium" if "medium" in words else "highest",
            keeps_memory=work == "train" and words != "as shipped",
        )


def build_dvae(image_size: int, **sizes: Any) -> Any:
    """Build DALLE-pytorch's discrete VAE, with its default loss."""
    torch.manual_seed(0)
    return peers.import_dalle_pytorch().DiscreteVAE(image_size=image_size, **sizes)


def dvae_job(
    work: Work,
    build: Callable[[], Any],
    pixels: Tensor,
    precision: Precision,
    layout: torch.memory_format,
    *,
    compiled: bool,
) -> Job:
    """Encode, decode or train DALLE-pytorch's discrete VAE; see `own_job`."""
    vae = build().to(memory_format=layout)
    images = ((pixels + 1) / 2).contiguous(memory_format=layout)  # its range is [0, 1]
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-4, betas=(0.9, 0.99), fused=True)
    token_ids = vae.get_codebook_indices(images)

    def step(net: Callable[..., Tensor] = vae) -> float:
        with timing.autocast(precision):
            loss = net(images, return_loss=True)
        return timing.update(loss, optimizer)

    def infer() -> Tensor:
        with timing.autocast(precision):
            if work == "encode":
                return vae.get_codebook_indices(images)
            with torch.no_grad():
                return vae.decode(token_ids)

    eager: Callable[[], object] = step if work == "train" else infer
    flops = timing.count_flops(eager, with_batched=True)
    net = torch.compile(vae, dynamic=False) if compiled else vae
    run = partial(step, net) if work == "train" else infer
    if work == "train":
        timing.require_training(run, steps=5, compiled=compiled)
    elif len(infer()) != len(pixels):
        raise ValueError("the tokenizer returns another number of images")
    return Job(run=run, items=len(pixels), flops=flops)


def compare_lookups(config: BenchmarkConfig) -> list[Result]:
    """Compare look-ups in a small and a large codebook, in milliseconds."""
    results = []
    for codes in (64,) if config.quick else (1024, 8192):
        generator = torch.Generator().manual_seed(0)
        vectors = torch.randn(NUM_VECTORS, WIDTH, generator=generator)
        codebook = F.normalize(torch.randn(codes, WIDTH, generator=generator), dim=1)
        own = partial(lookup_job, own_lookup, vectors, codebook)
        rows = [ours.variant("ours, cosine", own)]
        for cosine in (True, False):
            lookup = partial(peer_lookup, cosine=cosine)
            build = partial(lookup_job, lookup, vectors, codebook)
            name = f"vector-quantize-pytorch, {'cosine' if cosine else 'Euclidean'}"
            rows.append(Variant(f"{name}, as shipped", build))
            rows.append(Variant(f'{name}, matmul "medium"', build, matmul="medium"))
        work = f"look-up of {NUM_VECTORS:,} vectors of {WIDTH} among {codes:,} codes"
        results += interleave(work, rows, "ms", config.rounds)
    return results


def lookup_job(
    build: Callable[[Tensor, Tensor], Callable[[], Tensor]], vectors: Tensor, codebook: Tensor
) -> Job:
    """Verify a look-up, which returns indices (vectors,) of codes of length 1."""
    find = build(vectors, codebook)
    # The codes have length 1, so that the nearest by angle is the nearest by distance too.
    expected = (vectors.double() @ codebook.double().T).argmax(dim=1)
    agreement = (find() == expected).float().mean().item()
    if agreement < LEAST_AGREEMENT:
        raise ValueError(f"only {agreement:.1%} of the codes are the nearest ones")
    return Job(run=find, flops=2.0 * vectors.shape[0] * codebook.numel())


def own_lookup(vectors: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    """Prepare the look-up of our quantizer, by cosine."""
    quantizer = VectorQuantizer(codebook_size=len(codebook), code_dim=codebook.shape[1]).eval()
    quantizer.codebook.copy_(codebook)
    latents = vectors.T.reshape(1, codebook.shape[1], 1, len(vectors))  # (1, width, 1, vectors)
    return lambda: quantizer.encode(latents).flatten()


def peer_lookup(vectors: Tensor, codebook: Tensor, *, cosine: bool) -> Callable[[], Tensor]:
    """Prepare the look-up of vector-quantize-pytorch, by angle or by distance."""
    peers.require("vector_quantize_pytorch")
    from vector_quantize_pytorch import VectorQuantize

    codes, width = codebook.shape
    quantizer = VectorQuantize(dim=width, codebook_size=codes, use_cosine_sim=cosine).eval()
    quantizer._codebook.embed.data.copy_(codebook)
    rows = vectors[None]

    def find() -> Tensor:
        with torch.no_grad():
            _, indices, _ = quantizer(rows)
        return indices[0]

    return find


Reconstruct = Callable[[Tensor], Tensor]  # sends images in [-1, 1] through hard codes


class Learner:
    """A tokenizer in training, its clock, its quality and the row that it fills."""

    def __init__(
        self, step: Callable[[], object], reconstruct: Reconstruct, result: Result
    ) -> None:
        self.step, self.reconstruct, self.result = step, reconstruct, result
        self.matmul = ours.matmul_setting() if result.is_ours else faster_product(step)
        self.seconds, self.steps, self.db = 0.0, 0, 0.0

    def take_turn(self, held_out: Tensor, *, seconds: float) -> None:
        """Train for some seconds, then measure on held-out images as bytes."""
        load, started = timing.OtherLoad(), time.perf_counter()
        while time.perf_counter() - started < seconds:
            self.step()
            self.steps += 1
        self.seconds += time.perf_counter() - started
        self.result.others.append(load.cores())
        self.db = mean_psnr(self.reconstruct, held_out)


def compare_time_to_quality(config: BenchmarkConfig) -> list[Result]:
    """Train ours and DALLE-pytorch's in turns until the goal, in seconds."""
    goal, turn = (5.0, 0.1) if config.quick else (GOAL_DB, TURN_SECONDS)
    precision = "bf16" if has_fast_bf16() else "float32"
    work = f"training until {goal:g} dB, 64 px, 256 tokens, {precision}"
    with tempfile.TemporaryDirectory() as folder:
        train, held_out = read_emoji(Path(folder), few=config.quick)
    row = Result(work=work, variant="ours (FSQ, 1,000 codes)", is_ours=True, unit="s")
    learners, failed = [Learner(*own_learning(train), row)], []
    for words, sizes in (("1,024 codes, width 64", SMALL_DVAE), ("its defaults", DEFAULT_DVAE)):
        row = Result(work=work, variant=f"{peers.DALLE}, {words}", is_ours=False, unit="s")
        try:
            learners.append(Learner(*dvae_learning(sizes, train), row))
        except Exception as error:  # one that fails must not take the others with it
            row.failure = timing.failure_text(error)
            failed.append(row)
    take_turns(learners, held_out, goal=goal, seconds=turn)
    return [*(learner.result for learner in learners), *failed]


def take_turns(learners: list[Learner], held_out: Tensor, *, goal: float, seconds: float) -> None:
    """Train all in turns until the goal; the first is ours and bounds the time of the others."""
    own, running = learners[0], list(learners)
    while running:
        for learner in list(running):
            timing.set_machine(learner.matmul, keeps_memory=True)
            learner.take_turn(held_out, seconds=seconds)
            # Until ours is done, only a fixed limit bounds the others.
            limit = MOST_SECONDS if own in running else MOST_TIMES_OURS * own.seconds
            reached = f"{learner.db:.2f} dB after {learner.steps} steps"
            if learner.db >= goal:
                learner.result.costs, learner.result.note = [learner.seconds], reached
            elif learner.seconds >= limit:
                learner.result.failure = f"more than {learner.seconds:.0f} s: {reached}"
            else:
                continue
            running.remove(learner)
            print(f"  {learner.result.work} | {learner.result.variant}: {reached}", flush=True)


def read_emoji(folder: Path, *, few: bool) -> tuple[Tensor, Tensor]:
    """Prepare Twemoji of 64 px: the splits train and test_compose as bytes, (images, 3, 64, 64)."""
    from dalle_mini_impl.builtin_datasets.emoji.prepare import prepare_emoji

    prepare_emoji(folder, size=64, styles=["twemoji"], npm_dir=None)
    train, held_out = (
        [row for row in read_rows(folder) if row["split"] == split][: 64 if few else None]
        for split in ("train", "test_compose")
    )
    return to_bytes(read_pixels(folder, train)), to_bytes(read_pixels(folder, held_out))


def faster_product(step: Callable[[], object]) -> str:
    """Return the float32 matrix product with which a step takes less time."""
    names = ("highest", "medium") if medium_is_float32() else ("highest",)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    # In turns, as everywhere: a throttled second hits both.
    for _ in range(5):
        for name in names:
            timing.set_machine(name, keeps_memory=True)
            seconds[name] += timing.call_seconds(step, warm_up=0, repeats=1)
    return min(names, key=lambda name: median(seconds[name]))


@torch.no_grad()
def mean_psnr(reconstruct: Reconstruct, held_out: Tensor) -> float:
    """Measure PSNR in dB as the mean over images, given as bytes."""
    total = 0.0
    for images in held_out.split(64):
        pixels = bytes_to_pixels(images)
        total += float(psnr(reconstruct(pixels), pixels)) * len(images)
    return total / len(held_out)


def own_learning(train: Tensor) -> tuple[Callable[[], object], Reconstruct]:
    """Train a tokenizer of 4 x 4 px patches on images as bytes, with the trainer's own step."""
    torch.manual_seed(0)
    network: dict[str, Any] = {"patch_size": 4, "channels": (128,), "fsq_levels": (8, 5, 5, 5)}
    network |= {"num_encoder_blocks": 2, "num_decoder_blocks": 2}
    vqvae = VQVAE(VQVAEConfig(image_size=train.shape[-1], **network))
    vqvae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    precision: Precision = "bfloat16" if has_fast_bf16() else "float32"
    schedule: dict[str, Any] = {"max_steps": QUALITY_STEPS, "warmup_steps": 30}
    schedule |= {
        "decay_fraction": 0.4,
        "learning_rate": 3e-3,
        "betas": (0.9, 0.99),
        "weight_decay": 0.0,
    }
    trainer = build_vqvae_trainer(vqvae, train, batch=32, precision=precision, **schedule)

    def reconstruct(pixels: Tensor) -> Tensor:
        vqvae.eval()
        return vqvae.decode_from_token_ids(vqvae.encode_to_token_ids(pixels))

    return ours.trainer_step(trainer), reconstruct


def dvae_learning(sizes: dict[str, Any], train: Tensor) -> tuple[Callable[[], object], Reconstruct]:
    """Train DALLE-pytorch's discrete VAE on images as bytes, as its script does."""
    model = build_dvae(train.shape[-1], num_layers=2, **sizes)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=DVAE_RATE)
    generator = torch.Generator().manual_seed(0)

    def step() -> float:
        ids = torch.randint(len(train), (DVAE_BATCH,), generator=generator)
        images = (train[ids].float() / 255).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bf16()):  # as ours
            loss = model(images, return_loss=True, temp=DVAE_TEMPERATURE)
        return timing.update(loss, optimizer)

    def reconstruct(pixels: Tensor) -> Tensor:
        model.eval()
        # It subtracts 0.5 and divides by 0.5 on the way in, and does not undo it on the way out.
        reconstructions = model.decode(model.get_codebook_indices((pixels + 1) / 2))
        model.train()
        return reconstructions

    return step, reconstruct
