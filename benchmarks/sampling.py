"""Sampling image tokens: seconds per image, with and without guidance, at several batch sizes.

Two comparisons. Random weights at size M: every program, but Jacobi decoding looks better than it
is, since a decoder that knows nothing accepts nearly every draft token. Trained weights: our
`checkpoints/emoji-64` beside transformers' Llama of its size, whose time depends on no weights.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import ours, peers
from benchmarks.parts import BenchmarkConfig
from benchmarks.sizes import EMOJI_64, Size, random_pairs
from benchmarks.timing import Job, Precision, Result, Variant, interleave
from dalle_mini_impl.models.text_to_image import TextToImageModel
from dalle_mini_impl.native.decoder import NativeDecoder, NativeWeights
from dalle_mini_impl.pipeline import TextToImagePipeline
from dalle_mini_impl.sampling.jacobi import best_window, jacobi_decode

MOST_ROUNDS = {1: 9, 4: 2, 16: 1, 64: 1}  # by batch size; a round of many images takes minutes
SLOW_PEERS_UP_TO = 16  # images at once: more would take a quarter of an hour
NATIVE: dict[NativeWeights, str] = {"float32": "ours, native float32", "int8": "ours, native int8"}
# Which one is faster depends on the processor: twice as fast on some, half as fast on others.
BOTH_PRODUCTS = (("", "highest"), (', matmul "medium"', "medium"))
VERIFIED_ROWS = 2  # images generated before timing
Generate = Callable[[Tensor], Tensor]  # prompts (batch, text_length) to (batch, image_length)
MODEL = Path("checkpoints/emoji-64")
PROMPTS = (
    "red heart, Twemoji style",
    "a dog face, Noto style",
    "pizza, Twemoji style",
    "woman firefighter with medium skin tone, Noto style",
    "빨간색 하트",
    "green apple",
    "man teacher with dark skin tone, Twemoji style",
    "rocket, Noto style",
)


def compare_random_weights(
    config: BenchmarkConfig, size: Size, *, batches: Sequence[int]
) -> list[Result]:
    """Compare seconds per image at some batch sizes of `MOST_ROUNDS`, without and with guidance."""
    results = []
    for batch in batches[:1] if config.quick else batches:
        rounds = min(config.rounds, MOST_ROUNDS[batch])
        for guided in (False, True):
            rows = [*own_variants(size, config, batch, guided=guided)]
            rows += peer_variants(size, batch, guided=guided)
            # Compiling takes a minute a row.
            if config.quick:
                rows = [one for one in rows if "compiled" not in one.name]
            words = "guidance 3" if guided else "no guidance"
            work = f"generate {size.name}, batch {batch}, {words}"
            results += interleave(work, rows, "s", rounds)
    return results


# Each model is built once, when its first row needs it.
_sampler = functools.cache(ours.decoder_sampler)


@functools.cache
def _peer(name: str, size: Size, dtype: torch.dtype = torch.float32) -> Any:
    build = peers.build_dalle if name == peers.DALLE else partial(peers.build_language_model, name)
    return build(size).eval().to(dtype)


def own_variants(
    size: Size, config: BenchmarkConfig, batch: int, *, guided: bool
) -> Iterator[Variant]:
    """Yield our rows and Llama's of one table, in each precision."""

    def own_job(precision: Precision, native: NativeWeights | None = None) -> Job:
        return _sampler(size, precision, native)(batch=batch, guided=guided)

    for precision in config.precisions():
        yield ours.variant(f"ours, {precision}", partial(own_job, precision), precision=precision)
        ways = {"dynamic cache": "highest"}
        if precision == "float32":
            for weights, name in NATIVE.items():
                yield ours.variant(name, partial(own_job, precision, weights))
            ways['dynamic cache, matmul "medium"'] = "medium"
        # Compiling pays most where a step does least.
        if batch == 1 and not guided:
            ways["static cache, compiled"] = "highest"
            ways['static cache, compiled, matmul "medium"'] = "medium"
        model = partial(_peer, peers.LLAMA, size, getattr(torch, precision))
        for words, matmul in ways.items():
            program = partial(llama, guided=guided, compiled="compiled" in words)
            yield Variant(
                f"{peers.LLAMA}, {precision}, {words}",
                partial(peer_job, program, model, size, batch, guided=guided),
                precision=precision,
                matmul=matmul,
            )


def peer_variants(size: Size, batch: int, *, guided: bool) -> Iterator[Variant]:
    """Yield the rows of x-transformers and DALLE-pytorch of one table."""
    if batch > SLOW_PEERS_UP_TO:
        return
    for words, matmul in BOTH_PRODUCTS if not guided else ():
        model = partial(_peer, peers.X_TRANSFORMERS, size)
        build = partial(peer_job, x_transformers, model, size, batch)
        yield Variant(f"x-transformers, float32{words}", build, matmul=matmul)
    ways: dict[str, dict[str, Any]] = {"cache mended": {"use_cache": True}}
    if guided:
        ways = {"cache, as shipped": {"use_cache": True, "cond_scale": 3.0}}
    elif batch == 1:
        ways["as shipped"] = {}
    for name, options in ways.items():
        mended = "mended" in name
        for words, matmul in BOTH_PRODUCTS if guided or mended else BOTH_PRODUCTS[:1]:
            program = partial(dalle, mended=mended, **options)
            build = partial(peer_job, program, partial(_peer, peers.DALLE, size), size, batch)
            # Without a cache an image takes a minute, and the code that returns it is the same: one
            # round, not verified.
            build = partial(build, guided=guided, verify=bool(options))
            rounds = None if options else 1
            yield Variant(f"{peers.DALLE}, {name}{words}", build, matmul=matmul, rounds=rounds)


def peer_job(
    program: Callable[[Any, Size], Generate],
    model: Callable[[], Any],
    size: Size,
    batch: int,
    *,
    guided: bool = False,
    verify: bool = True,
) -> Job:
    """Generate with a peer's program around its model; items are images."""
    net = model()
    generate, text = program(net, size), random_pairs(size, batch=batch)[0]
    some = text[:VERIFIED_ROWS]
    if verify and (shape := generate(some).shape) != (len(some), size.image_length):
        raise ValueError(f"generated {tuple(shape)}, expected {len(some)} x {size.image_length}")
    # Each token multiplies every weight once per row, and reads it once for all rows.
    weights = peers.linear_weights(net)
    tokens = batch * (1 + guided) * size.image_length
    return Job(
        run=lambda: generate(text),
        items=batch,
        flops=2.0 * sum(map(torch.numel, weights)) * tokens,
        bytes=float(sum(weight.nbytes for weight in weights)) * size.image_length,
    )


def llama(net: Any, size: Size, *, guided: bool, compiled: bool = False) -> Generate:
    """Use ``generate`` of transformers; compiled, with a static cache."""
    from transformers import CompileConfig, GenerationConfig

    length = {"max_new_tokens": size.image_length, "min_new_tokens": size.image_length}
    config = GenerationConfig(do_sample=True, top_k=0, pad_token_id=0, **length)
    if compiled:
        # generate() keeps its compilation for GPUs, unless this private switch is set.
        config.cache_implementation = "static"
        config.compile_config = CompileConfig(fullgraph=False, mode="default")
        config.compile_config._compile_all_devices = True
    if guided:
        config.guidance_scale = ours.GUIDANCE_SCALE

    def generate(prompts: Tensor) -> Tensor:
        # The null prompt is a caption of zeros.
        options = {"negative_prompt_ids": torch.zeros_like(prompts)} if guided else {}
        options["attention_mask"] = torch.ones_like(prompts)
        return net.generate(prompts, generation_config=config, **options)[:, size.text_length :]

    return generate


def x_transformers(net: Any, size: Size) -> Generate:
    """Use x-transformers' wrapper and its cache."""
    from x_transformers import AutoregressiveWrapper

    generate = AutoregressiveWrapper(net).generate
    # Sampled from all logits, as ours: its default filter keeps a tenth of them.
    options: dict[str, Any] = {"cache_kv": True, "filter_logits_fn": lambda logits: logits}
    return lambda prompts: generate(prompts, size.image_length, **options)


# DALLE-pytorch's own switches do not do what they say, verified on release 1.6.6:
# - `use_cache=True` is dropped when `cond_scale` is 1 (dalle_pytorch.py: `forward_with_cond_scale`
#   calls itself without the cache), so that every token goes through the whole sequence;
# - with guidance and cache, the null pass works on a shallow copy of the conditional cache: both
#   write into the same token-shift queues, and the guided logits are wrong.
# "Cache mended" passes the cache on, the one line that the first needs; guided rows are as shipped.
def dalle(net: Any, size: Size, *, mended: bool, **options: Any) -> Generate:
    """Use ``generate_images`` of DALLE-pytorch, its tiny discrete VAE's decoding included."""

    def pass_cache_on(*arguments: Any, cond_scale: float = 1.0, **others: Any) -> Tensor:
        del cond_scale
        return net(*arguments, **others)

    def generate(prompts: Tensor) -> Tensor:
        if mended:
            net.forward_with_cond_scale = pass_cache_on
        try:
            # A copy, since guidance writes zeros into the caller's captions.
            images = net.generate_images(prompts.clone(), **options)
        finally:
            # The rows of one model share it.
            vars(net).pop("forward_with_cond_scale", None)
        return images[:, 0, ::8, ::8].flatten(1)  # one number per token: (batch, image_length)

    return generate


def compare_trained_weights(config: BenchmarkConfig) -> list[Result]:
    """Compare seconds per image of our trained model, one image at a time."""
    pipeline = TextToImagePipeline.from_pretrained(MODEL)
    results = []
    scale = pipeline.sampling_config.guidance_scale
    for guided in (False, True):
        rows = list(trained_variants(pipeline, guided=guided))
        words = f"guidance {scale:g}" if guided else "no guidance"
        work = f"generate {EMOJI_64.name}, trained, batch 1, {words}"
        results += interleave(work, rows[:2] if config.quick else rows, "s", config.rounds)
    return results


def trained_variants(pipeline: TextToImagePipeline, *, guided: bool) -> Iterator[Variant]:
    """Yield the rows of a table: Jacobi decoding, one token at a time, compiled passes, Llama."""
    ways: dict[str, dict[str, Any]] = {
        "ours, float32": {},
        "ours, float32, one token at a time": {"window": 1},
        **{name: {"weights": weights} for weights, name in NATIVE.items()},
    }
    for name, options in ways.items():
        yield ours.variant(name, partial(trained_job, pipeline, guided=guided, **options))

    build_llama, program = partial(_peer, peers.LLAMA, EMOJI_64), partial(llama, guided=guided)
    for words, matmul in BOTH_PRODUCTS:
        yield Variant(
            f"{peers.LLAMA}, dynamic cache{words}",
            partial(peer_job, program, build_llama, EMOJI_64, 1, guided=guided),
            matmul=matmul,
        )


def trained_job(
    pipeline: TextToImagePipeline,
    *,
    guided: bool,
    weights: NativeWeights | None = None,
    window: int | None = None,
) -> Job:
    """Generate all prompts one after the other; items are images.

    With the native pass if it gets ``weights``, and by default the fastest number of tokens a pass.
    """
    model: TextToImageModel | NativeDecoder = pipeline.dalle
    if weights is not None:
        model = ours.compile_native(pipeline.dalle, weights)
    sampling_config = pipeline.sampling_config.override({} if guided else {"guidance_scale": 1.0})
    text = pipeline.text_tokenizer.encode(PROMPTS)
    window = window or best_window(model, 1)

    def generate(number: int, window: int) -> tuple[Tensor, int]:
        prompt, seeds = text[number : number + 1], torch.tensor([number])
        generated = jacobi_decode(
            model, prompt, seeds=seeds, sampling_config=sampling_config, window=window
        )
        return generated.image_token_ids, generated.num_passes

    generated = [generate(number, window) for number in range(len(PROMPTS))]
    # Jacobi decoding is exact: any window must generate what one token at a time does.
    if not torch.equal(generated[0][0], generate(0, 1)[0]):
        raise ValueError("Jacobi passes generate another image")
    passes = sum(count for _, count in generated) / len(PROMPTS)
    # Passes, and so seconds, differ between prompts: a call runs them all.
    turn = itertools.cycle(range(len(PROMPTS)))
    return Job(
        run=lambda: [generate(next(turn), window) for _ in PROMPTS],
        items=len(PROMPTS),
        note=f"{passes:.1f} passes an image",
    )
