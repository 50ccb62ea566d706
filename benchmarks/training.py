"""Training steps of a decoder: made-up tokens, so that nothing but the step is timed."""

import functools
from collections.abc import Iterator

from benchmarks import ours, peers
from benchmarks.config import BenchmarkConfig
from benchmarks.sizes import Size
from benchmarks.timing import Job, Precision, Result, Variant, interleave

# Peers' names in the table, and how they run: (words, compiled, float32 matrix product).
WAYS = (
    ("as shipped", False, "highest"),
    ('matmul "medium"', False, "medium"),
    ("compiled", True, "highest"),
    ('compiled, matmul "medium"', True, "medium"),
)


def run(config: BenchmarkConfig, size: Size) -> list[Result]:
    """Compare one training step in each precision.

    Args:
        config: Of the run.
        size: Of the decoder.

    Returns:
        Rows in tokens per second.
    """
    results = []
    for precision in config.precisions():
        results += interleave(
            f"train {size.name}, {precision}",
            list(variants(size, precision, with_compiled=not config.quick)),
            unit="tokens/s",
            rounds=config.rounds,
        )
    return results


def variants(size: Size, precision: Precision, *, with_compiled: bool = True) -> Iterator[Variant]:
    """Name the rows of a table: ours, and every peer in every way it can run.

    Args:
        size: Of the decoder.
        precision: Float32, or bf16 autocast, where the float32 product does not matter.
        with_compiled: Whether all are also compiled, which takes a minute each.

    Yields:
        Contestants.
    """
    for name, compiled in (("ours", False), ("ours, training.compile", True)):
        if with_compiled or not compiled:
            yield Variant(
                name=name,
                build=functools.partial(ours.decoder_training, size, precision, compiled=compiled),
                is_ours=True,
                precision=precision,
                matmul=ours.matmul_setting(),
                keeps_memory=True,
            )
    for name in peers.DECODERS:
        base = functools.cache(functools.partial(peers.build_decoder, name, size))
        for words, compiled, matmul in WAYS:
            if precision == "bfloat16" and matmul != "highest":
                continue
            if compiled and not with_compiled:
                continue
            yield Variant(
                name=f"{name}, {words}",
                build=functools.partial(_job, base, size, precision, compiled),
                precision=precision,
                matmul=matmul,
                keeps_memory=words != WAYS[0][0],
            )


def _job(
    base: "functools._lru_cache_wrapper[peers.Decoder]",
    size: Size,
    precision: Precision,
    compiled: bool,
) -> Job:
    return peers.decoder_training(base(), size, precision, compiled=compiled)
