"""Sampling image tokens: seconds per image, with and without guidance, at several batch sizes.

Two comparisons. Random weights at size M: every program, but Jacobi decoding looks better than it
is, since a decoder that knows nothing accepts nearly every draft token. Trained weights: our
`checkpoints/emoji-64` beside transformers' Llama of its size, whose time depends on no weights.

DALLE-pytorch's own switches do not do what they say, verified on release 1.6.6:
- `use_cache=True` is dropped when `cond_scale` is 1 (dalle_pytorch.py, `forward_with_cond_scale`
  calls itself without the cache), so that every token goes through the whole sequence;
- with guidance and cache, the null pass works on a shallow copy of the conditional cache: both
  write into the same token-shift queues, and the guided logits are wrong.
"Cache mended" passes the cache on, the one line that the first needs. Its guided row is as shipped.
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
            yield Variant(
                f"{peers.LLAMA}, {precision}, {words}",
                partial(llama_job, model, size, batch, guided, "compiled" in words),
                precision=precision,
                matmul=matmul,
            )


def peer_variants(size: Size, batch: int, *, guided: bool) -> Iterator[Variant]:
    """Yield the rows of x-transformers and DALLE-pytorch of one table."""
    if batch > SLOW_PEERS_UP_TO:
        return
    for words, matmul in BOTH_PRODUCTS if not guided else ():
        model = partial(_peer, peers.X_TRANSFORMERS, size)
        build = partial(x_transformers_job, model, size, batch)
        yield Variant(f"x-transformers, float32{words}", build, matmul=matmul)
    ways: dict[str, dict[str, Any]] = {"cache mended": {"use_cache": True}}
    if guided:
        ways = {"cache, as shipped": {"use_cache": True, "cond_scale": 3.0}}
    elif batch == 1:
        ways["as shipped"] = {}
    for name, options in ways.items():
        mended = "mended" in name
        for words, matmul in BOTH_PRODUCTS if guided or mended else BOTH_PRODUCTS[:1]:
            model = partial(_peer, peers.DALLE, size)
            yield Variant(
                f"{peers.DALLE}, {name}{words}",
                partial(dalle_job, model, size, batch, options, mended=mended),
                matmul=matmul,
                rounds=1 if name == "as shipped" else None,
            )


def llama_job(
    model: Callable[[], Any], size: Size, batch: int, guided: bool, compiled: bool
) -> Job:
    """Generate with ``generate`` of transformers; items are images.

    Args:
        model: Builds or returns the model.
        size: Its size.
        batch: Images at once.
        guided: With ``guidance_scale=3``, whose null prompt is a caption of zeros.
        compiled: Static cache, and the compilation that ``generate`` otherwise keeps for GPUs.
    """
    from transformers import CompileConfig, GenerationConfig

    net = model()
    text, _ = random_pairs(size, batch=batch)
    config = GenerationConfig(
        max_new_tokens=size.image_length,
        min_new_tokens=size.image_length,
        do_sample=True,
        top_k=0,
        pad_token_id=0,
        cache_implementation="static" if compiled else None,
    )
    if compiled:
        config.compile_config = CompileConfig(fullgraph=False, mode="default")
        config.compile_config._compile_all_devices = True
    if guided:
        config.guidance_scale = ours.GUIDANCE_SCALE

    def generate(prompts: Tensor) -> Tensor:
        null = {"negative_prompt_ids": torch.zeros_like(prompts)} if guided else {}
        attention_mask = torch.ones_like(prompts)
        tokens = net.generate(
            prompts, attention_mask=attention_mask, generation_config=config, **null
        )
        return tokens[:, size.text_length :]

    return _verified(generate, text, net, size, passes=1 + guided)


def x_transformers_job(model: Callable[[], Any], size: Size, batch: int) -> Job:
    """Generate with x-transformers' wrapper and its cache; items are images."""
    net = model()  # before the import: it reports a missing package
    from x_transformers import AutoregressiveWrapper

    wrapper = AutoregressiveWrapper(net)
    text, _ = random_pairs(size, batch=batch)

    def generate(prompts: Tensor) -> Tensor:
        return wrapper.generate(
            prompts, size.image_length, cache_kv=True, filter_logits_fn=lambda logits: logits
        )

    return _verified(generate, text, wrapper, size)


def dalle_job(
    model: Callable[[], Any], size: Size, batch: int, options: dict[str, Any], *, mended: bool
) -> Job:
    """Generate with DALLE-pytorch, its tiny discrete VAE's decoding included; items are images.

    Args:
        model: Builds or returns the model.
        size: Its size.
        batch: Images at once.
        options: Of ``generate_images``.
        mended: Whether the cache is passed on without guidance.
    """
    net = model()
    text, _ = random_pairs(size, batch=batch)

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
            vars(net).pop("forward_with_cond_scale", None)
        return images[:, 0, ::8, ::8].flatten(1)  # one number per token

    # Without a cache an image takes a minute, and what returns it is the same code: not verified.
    guided = options.get("cond_scale", 1.0) != 1.0
    return _verified(generate, text, net, size, passes=1 + guided, verify=bool(options))


def _verified(
    generate: Callable[[Tensor], Tensor],
    text: Tensor,
    net: torch.nn.Module,
    size: Size,
    *,
    passes: int = 1,
    verify: bool = True,
) -> Job:
    """Verify the number of tokens, and count what one call must compute and read."""
    some = text[:VERIFIED_ROWS]
    if verify and (shape := generate(some).shape) != (len(some), size.image_length):
        raise ValueError(f"generated {tuple(shape)}, expected {len(some)} x {size.image_length}")
    weights = peers.linear_weights(net)
    return Job(
        run=lambda: generate(text),
        items=len(text),
        flops=2.0 * sum(map(torch.numel, weights)) * len(text) * passes * size.image_length,
        bytes=float(sum(weight.nbytes for weight in weights)) * size.image_length,
    )


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

    def build_llama() -> Any:
        return peers.build_language_model(peers.LLAMA, EMOJI_64).eval()

    for words, matmul in BOTH_PRODUCTS:
        yield Variant(
            f"{peers.LLAMA}, dynamic cache{words}",
            partial(llama_job, build_llama, EMOJI_64, 1, guided, compiled=False),
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

    Args:
        pipeline: The trained model.
        guided: With its own guidance scale, or 1.
        weights: Of the compiled pass; None is torch.
        window: Tokens per pass; the fastest number when None.

    Raises:
        ValueError: If several tokens a pass generate another image than one.
    """
    model: TextToImageModel | NativeDecoder = pipeline.dalle
    if weights is not None:
        model = ours.compile_native(pipeline.dalle, weights)
    sampling_config = pipeline.sampling_config.override({} if guided else {"guidance_scale": 1.0})
    text = pipeline.text_tokenizer.encode(PROMPTS)
    window = window or best_window(model, 1)

    def generate(number: int, window: int) -> tuple[Tensor, int]:
        generated = jacobi_decode(
            model,
            text[number : number + 1],
            seeds=torch.tensor([number]),
            sampling_config=sampling_config,
            window=window,
        )
        return generated.image_token_ids, generated.num_passes

    generated = [generate(number, window) for number in range(len(PROMPTS))]
    if not torch.equal(generated[0][0], generate(0, 1)[0]):
        raise ValueError("Jacobi passes generate another image")
    passes = sum(count for _, count in generated) / len(PROMPTS)
    turn = itertools.cycle(range(len(PROMPTS)))
    return Job(
        run=lambda: [generate(next(turn), window) for _ in PROMPTS],
        items=len(PROMPTS),
        note=f"{passes:.1f} passes an image",
    )
