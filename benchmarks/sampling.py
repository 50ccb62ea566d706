"""Generating images' tokens: seconds an image, with and without guidance, at several batches.

DALLE-pytorch's own switches do not do what they say, verified on release 1.6.6:
- `use_cache=True` is dropped when `cond_scale` is 1 (dalle_pytorch.py, `forward_with_cond_scale`
  calls itself without the cache), so that every token goes through the whole sequence;
- with guidance and cache, the null pass works on a shallow copy of the conditional cache: both
  write into the same token-shift queues, and the guided logits are wrong.
"Cache mended" passes the cache on, the one line that the first needs. Its guided row is as shipped.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import ours, peers
from benchmarks.ceilings import bytes_of
from benchmarks.config import BenchmarkConfig
from benchmarks.sizes import Size, random_pairs
from benchmarks.timing import Job, Precision, Result, Variant, interleave
from dalle_mini_impl.native.decoder import NativeWeights

MOST_ROUNDS = {1: 9, 4: 2, 16: 1, 64: 1}  # a round of many images takes minutes
SLOW_PEERS_UP_TO = 16  # images at once: more would take a quarter of an hour
NATIVE: dict[NativeWeights, str] = {"float32": "ours, native float32", "int8": "ours, native int8"}
# Which one is faster depends on the processor: twice as fast on some, half as fast on others.
BOTH_PRODUCTS = (("", "highest"), (', matmul "medium"', "medium"))
VERIFIED_ROWS = 2  # images generated before timing


def run(config: BenchmarkConfig, size: Size, batches: Sequence[int]) -> list[Result]:
    """Compare generation at some batches, each first without and then with guidance.

    Args:
        config: Of the run.
        size: Of the decoder.
        batches: Images generated at once, of `MOST_ROUNDS`.

    Returns:
        Rows in seconds per image.
    """
    makers = Makers(size, tuple(config.precisions()))
    results = []
    for batch in batches[:1] if config.quick else batches:
        for guided in (False, True):
            results += interleave(
                f"generate {size.name}, batch {batch}, {'guidance 3' if guided else 'no guidance'}",
                [
                    one
                    for one in makers.variants(batch, guided=guided)
                    if not (config.quick and "compiled" in one.name)
                ],
                unit="s",
                rounds=min(config.rounds, MOST_ROUNDS[batch]),
            )
    return results


class Makers:
    """The models of all contestants, each built when it is first expected."""

    def __init__(self, size: Size, precisions: tuple[Precision, ...]) -> None:
        """Prepare to build.

        Args:
            size: Of the decoders.
            precisions: Expected ones.
        """
        self.size, self.precisions = size, precisions
        self.own = functools.cache(functools.partial(ours.decoder_sampler, size))
        self.llama = functools.cache(lambda: peers.build_language_model(peers.LLAMA, size).eval())
        self.llama_bf16 = functools.cache(
            lambda: peers.build_language_model(peers.LLAMA, size).eval().to(torch.bfloat16)
        )
        self.x_transformers = functools.cache(
            lambda: peers.build_language_model(peers.X_TRANSFORMERS, size).eval()
        )
        self.dalle = functools.cache(lambda: peers.build_dalle(size).eval())

    def variants(self, batch: int, *, guided: bool) -> Iterator[Variant]:
        """Name the rows of one table.

        Args:
            batch: Images generated at once.
            guided: With guidance.

        Yields:
            Contestants.
        """
        for precision in self.precisions:
            yield Variant(
                name=f"ours, {precision}",
                build=functools.partial(self._own_job, precision, batch, guided),
                is_ours=True,
                precision=precision,
                matmul=ours.matmul_setting(),
            )
            if precision == "float32":
                for weights, name in NATIVE.items():
                    yield Variant(
                        name=name,
                        build=functools.partial(self._own_job, precision, batch, guided, weights),
                        is_ours=True,
                        precision=precision,
                        matmul=ours.matmul_setting(),
                    )
            llama = self.llama if precision == "float32" else self.llama_bf16
            ways = {"dynamic cache": "highest"}
            if precision == "float32":
                ways['dynamic cache, matmul "medium"'] = "medium"
            if batch == 1 and not guided:  # compiling pays most where a step does least
                ways["static cache, compiled"] = "highest"
                ways['static cache, compiled, matmul "medium"'] = "medium"
            for words, matmul in ways.items():
                yield Variant(
                    name=f"{peers.LLAMA}, {precision}, {words}",
                    build=functools.partial(
                        llama_job, llama, self.size, batch, guided, "compiled" in words
                    ),
                    precision=precision,
                    matmul=matmul,
                )
        if batch > SLOW_PEERS_UP_TO:
            return
        for words, matmul in BOTH_PRODUCTS if not guided else ():
            yield Variant(
                name=f"x-transformers, float32{words}",
                build=functools.partial(x_transformers_job, self.x_transformers, self.size, batch),
                matmul=matmul,
            )
        yield from self._dalle(batch, guided=guided)

    def _own_job(
        self,
        precision: Precision,
        batch: int,
        guided: bool,
        native: NativeWeights | None = None,
    ) -> Job:
        return self.own(precision, native)(batch=batch, guided=guided)

    def _dalle(self, batch: int, *, guided: bool) -> Iterator[Variant]:
        if guided:
            ways = {"cache, as shipped": {"use_cache": True, "cond_scale": 3.0}}
        else:
            ways = {"cache mended": {"use_cache": True}}
            if batch == 1:
                ways["as shipped"] = {}
        for name, options in ways.items():
            for words, matmul in BOTH_PRODUCTS if guided or "mended" in name else BOTH_PRODUCTS[:1]:
                yield Variant(
                    name=f"{peers.DALLE}, {name}{words}",
                    build=functools.partial(
                        dalle_job, self.dalle, self.size, batch, options, mended="mended" in name
                    ),
                    matmul=matmul,
                    rounds=1 if name == "as shipped" else None,
                )


def llama_job(
    model: Callable[[], Any], size: Size, batch: int, guided: bool, compiled: bool
) -> Job:
    """Generate with ``generate`` of transformers.

    Args:
        model: Builds or returns the model.
        size: Its size.
        batch: Images.
        guided: With ``guidance_scale=3``, whose null prompt is a caption of zeros.
        compiled: Static cache and the compilation that ``generate`` keeps for GPUs.

    Returns:
        The job; items are images.
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
        attended = torch.ones_like(prompts)
        return net.generate(prompts, attention_mask=attended, generation_config=config, **null)[
            :, size.text_length :
        ]

    return _verified(generate, text, net, size, passes=1 + guided)


def x_transformers_job(model: Callable[[], Any], size: Size, batch: int) -> Job:
    """Generate with x-transformers' wrapper and its cache.

    Args:
        model: Builds or returns the model.
        size: Its size.
        batch: Images.

    Returns:
        The job; items are images.
    """
    from x_transformers import AutoregressiveWrapper

    wrapper = AutoregressiveWrapper(model())
    text, _ = random_pairs(size, batch=batch)

    def generate(prompts: Tensor) -> Tensor:
        return wrapper.generate(
            prompts, size.image_length, cache_kv=True, filter_logits_fn=lambda logits: logits
        )

    return _verified(generate, text, wrapper, size)


def dalle_job(
    model: Callable[[], Any], size: Size, batch: int, options: dict[str, Any], *, mended: bool
) -> Job:
    """Generate with DALLE-pytorch; its tiny discrete VAE's decoding is part of it.

    Args:
        model: Builds or returns the model.
        size: Its size.
        batch: Images.
        options: Of ``generate_images``.
        mended: Whether the cache is passed on without guidance.

    Returns:
        The job; items are images.
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

    # Without a cache an image takes a minute, and what returns it is the same code: not checked.
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
    """Prove that every token is generated, and count what one call must compute and read."""
    some = text[:VERIFIED_ROWS]
    if verify and (shape := generate(some).shape) != (len(some), size.image_length):
        raise ValueError(f"generated {tuple(shape)}, expected {len(some)} x {size.image_length}")
    weights = peers.linear_weights(net)
    return Job(
        run=lambda: generate(text),
        items=len(text),
        flops=2.0 * sum(map(torch.numel, weights)) * len(text) * passes * size.image_length,
        bytes=bytes_of(*weights) * size.image_length,
    )
