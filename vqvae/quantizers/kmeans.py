"""Spherical k-means and its parts: clusters of unit vectors under cosine similarity."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

MAX_SIMILARITIES = 2**22  # per block, 16 MiB: larger blocks do not fit the caches
KMEANS_STEPS = 10


def nearest_codes(
    vectors: Float[Tensor, "count code_dim"], codebook: Float[Tensor, "codebook_size code_dim"]
) -> Int[Tensor, " count"]:
    """Return the index of the code with the highest cosine similarity, the first one at a tie.

    All rows have length 1.
    """
    # In blocks: count x codebook_size similarities may not fit into memory. On a CPU `max` finds
    # the index twice as fast as `argmax`.
    blocks = vectors.split(max(1, MAX_SIMILARITIES // len(codebook)))
    return torch.cat([(block @ codebook.T).max(dim=1).indices for block in blocks])


def code_statistics(
    vectors: Float[Tensor, "count code_dim"],
    weights: Float[Tensor, "count 1"],
    ids: Int[Tensor, " count"],
    codebook_size: int,
) -> tuple[Float[Tensor, "codebook_size code_dim"], Float[Tensor, " codebook_size"]]:
    """Return the weighted sum and the weighted count of the vectors assigned to each code."""
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
    """Sample vectors, with replacement, in proportion to the squared distance from their code.

    `vectors` have length 1, or 0: rows of zeros are sampled only if there are no others.
    """
    # Not uniformly: most cells of a typical image are background that some code fits already, and
    # nearly every new code would land there.
    present = vectors.any(dim=1).double()
    error = ((vectors - codes).square().sum(dim=1).double() + 1e-6) * present
    cumulative = error.cumsum(dim=0)
    device = vectors.device if generator is None else generator.device
    uniform = torch.rand(sample_count, generator=generator, device=device, dtype=torch.float64)
    positions = torch.searchsorted(cumulative, uniform.to(vectors.device) * cumulative[-1])
    return vectors[positions.clamp(max=len(vectors) - 1)]


def first_of_equal(
    codebook: Float[Tensor, "codebook_size code_dim"],
) -> Int[Tensor, " codebook_size"]:
    """Return for each code the index of the first one that equals it."""
    _, group = torch.unique(codebook, dim=0, return_inverse=True)
    first = torch.full_like(group, len(codebook))
    places = torch.arange(len(codebook), device=codebook.device)
    return first.scatter_reduce(0, group, places, reduce="amin")[group]


def spherical_kmeans(
    vectors: Float[Tensor, "count code_dim"],
    codebook_size: int,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "codebook_size code_dim"], Float[Tensor, " codebook_size"]]:
    """Cluster at least one unit vector; return the centers, of length 1, and their counts.

    There may be more clusters than vectors.
    """
    weights = torch.ones_like(vectors[:, :1])
    codebook = sample_by_error(
        vectors, torch.zeros_like(vectors), codebook_size, generator=generator
    )
    for _ in range(KMEANS_STEPS):
        # Equal codes, which sampling with replacement gives, must not split a cluster: the others
        # have to be empty to move. Their similarities may be rounded apart (another column of the
        # product), so the first one takes all.
        ids = first_of_equal(codebook)[nearest_codes(vectors, codebook)]
        sums, counts = code_statistics(vectors, weights, ids, codebook_size)
        # An empty cluster moves to a vector far from its center.
        fresh = sample_by_error(vectors, codebook[ids], codebook_size, generator=generator)
        codebook = torch.where(counts[:, None] > 0, F.normalize(sums, dim=1), fresh)
    ids = first_of_equal(codebook)[nearest_codes(vectors, codebook)]
    _, counts = code_statistics(vectors, weights, ids, codebook_size)
    return codebook, counts
