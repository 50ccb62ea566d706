"""Spherical k-means and its parts: clusters of unit vectors under cosine similarity."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

SIMILARITIES = 2**22  # computed at once, 16 MiB: larger blocks leave the caches
KMEANS_STEPS = 10


def nearest_codes(
    vectors: Float[Tensor, "count code_dim"], codebook: Float[Tensor, "codebook_size code_dim"]
) -> Int[Tensor, " count"]:
    """Find the code with the highest cosine similarity; the first one where several tie.

    Args:
        vectors: Rows of length 1.
        codebook: Rows of length 1.

    Returns:
        The index of each vector's code.
    """
    # In blocks, so that the similarities never need count x codebook_size memory; with `max`,
    # which finds the place twice as fast as `argmax` on a CPU.
    blocks = vectors.split(max(1, SIMILARITIES // len(codebook)))
    return torch.cat([(block @ codebook.T).max(dim=1).indices for block in blocks])


def code_statistics(
    vectors: Float[Tensor, "count code_dim"],
    weights: Float[Tensor, "count 1"],
    ids: Int[Tensor, " count"],
    codebook_size: int,
) -> tuple[Float[Tensor, "codebook_size code_dim"], Float[Tensor, " codebook_size"]]:
    """Sum and count the vectors that chose each code.

    Args:
        vectors: Rows to sum.
        weights: What each row counts for; 0 leaves it out.
        ids: The code that each vector chose.
        codebook_size: Number of codes.

    Returns:
        The sums and the counts.
    """
    sums = vectors.new_zeros(codebook_size, vectors.shape[1])
    counts = vectors.new_zeros(codebook_size)
    return sums.index_add_(0, ids, vectors * weights), counts.index_add_(0, ids, weights[:, 0])


def sample_by_error(
    vectors: Float[Tensor, "count code_dim"],
    codes: Float[Tensor, "count code_dim"],
    sample_count: int,
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "sample_count code_dim"]:
    """Generate vectors, with replacement, as often as they are badly served by their code.

    Most cells of a typical image are background that some code fits already; generation evenly would
    place nearly every new code there.

    Args:
        vectors: Rows of length 1, or of zeros, which are generated only if nothing else is there.
        codes: The code that each vector has now.
        sample_count: Number of rows to generate.
        generator: Source of randomness, on any device.

    Returns:
        The generated rows.
    """
    present = vectors.any(dim=1).double()
    error = ((vectors - codes).square().sum(dim=1).double() + 1e-6) * present
    cumulative = error.cumsum(dim=0)
    device = vectors.device if generator is None else generator.device
    uniform = torch.rand(sample_count, generator=generator, device=device, dtype=torch.float64)
    positions = torch.searchsorted(cumulative, uniform.to(vectors.device) * cumulative[-1])
    return vectors[positions.clamp(max=len(vectors) - 1)]


def spherical_kmeans(
    vectors: Float[Tensor, "count code_dim"],
    codebook_size: int,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "codebook_size code_dim"], Float[Tensor, " codebook_size"]]:
    """Cluster unit vectors; a cluster that runs empty moves to a badly served vector.

    Args:
        vectors: Rows of length 1, at least one.
        codebook_size: Number of clusters; may exceed the number of vectors.
        generator: Source of randomness, on any device.

    Returns:
        The centres, rows of length 1, and how many vectors chose each.
    """
    weights = torch.ones_like(vectors[:, :1])
    codebook = sample_by_error(
        vectors, torch.zeros_like(vectors), codebook_size, generator=generator
    )
    for _ in range(KMEANS_STEPS):
        ids = nearest_codes(vectors, codebook)
        sums, counts = code_statistics(vectors, weights, ids, codebook_size)
        fresh = sample_by_error(vectors, codebook[ids], codebook_size, generator=generator)
        codebook = torch.where(counts[:, None] > 0, F.normalize(sums, dim=1), fresh)
    _, counts = code_statistics(vectors, weights, nearest_codes(vectors, codebook), codebook_size)
    return codebook, counts
