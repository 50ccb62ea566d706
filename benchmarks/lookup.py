"""The nearest of K codes for 2,048 vectors: the inner step of every VQ tokenizer."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import ours, ours_pictures
from benchmarks.config import BenchmarkConfig
from benchmarks.timing import Job, NotMeasuredError, Result, Variant, interleave

VECTORS, WIDTH = 2048, 32
LEAST_AGREEMENT = 0.999  # ties in the last bit may fall either way


def run(config: BenchmarkConfig) -> list[Result]:
    """Compare look-ups in a small and a large codebook.

    Args:
        config: Of the run.

    Returns:
        Rows in milliseconds per look-up.
    """
    results = []
    for codes in (64,) if config.quick else (1024, 8192):
        generator = torch.Generator().manual_seed(0)
        vectors = torch.randn(VECTORS, WIDTH, generator=generator)
        codebook = F.normalize(torch.randn(codes, WIDTH, generator=generator), dim=1)
        rows = [
            Variant(
                name="ours, cosine",
                build=_builder(own_lookup, vectors, codebook),
                is_ours=True,
                matmul=ours.matmul_setting(),
            ),
            *(
                Variant(
                    name=f"vector-quantize-pytorch, {'cosine' if cosine else 'Euclidean'}, {words}",
                    build=_builder(peer_lookup, vectors, codebook, cosine=cosine),
                    matmul=matmul,
                )
                for cosine in (True, False)
                for words, matmul in (("as shipped", "highest"), ('matmul "medium"', "medium"))
            ),
        ]
        work = f"look-up of {VECTORS:,} vectors of {WIDTH} among {codes:,} codes"
        results += interleave(work, rows, unit="ms", rounds=config.rounds)
    return results


def _builder(
    build: Callable[..., Callable[[], Tensor]], vectors: Tensor, codebook: Tensor, **options: bool
) -> Callable[[], Job]:
    def verified() -> Job:
        find = build(vectors, codebook, **options)
        # The codes have length 1, so that the nearest by angle is the nearest by distance too.
        expected = (vectors.double() @ codebook.double().T).argmax(dim=1)
        agreement = (find() == expected).float().mean().item()
        if agreement < LEAST_AGREEMENT:
            raise ValueError(f"only {agreement:.1%} of the codes are the nearest ones")
        return Job(run=find, flops=2.0 * vectors.shape[0] * codebook.numel())

    return verified


def own_lookup(vectors: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    """Prepare our look-up; see `ours_pictures.code_lookup`."""
    return ours_pictures.code_lookup(vectors, codebook)


def peer_lookup(vectors: Tensor, codebook: Tensor, *, cosine: bool) -> Callable[[], Tensor]:
    """Prepare the look-up of vector-quantize-pytorch.

    Args:
        vectors: (count, width).
        codebook: (codes, width), rows of length 1.
        cosine: By angle, else by distance.

    Returns:
        A function that returns the indices.
    """
    try:
        from vector_quantize_pytorch import VectorQuantize
    except ImportError:
        raise NotMeasuredError("vector-quantize-pytorch is not installed") from None
    codes, width = codebook.shape
    quantizer = VectorQuantize(dim=width, codebook_size=codes, use_cosine_sim=cosine).eval()
    quantizer._codebook.embed.data.copy_(codebook)
    rows = vectors[None]

    def find() -> Tensor:
        with torch.no_grad():
            _, indices, _ = quantizer(rows)
        return indices[0]

    return find
