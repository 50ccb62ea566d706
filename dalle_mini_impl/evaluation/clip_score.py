"""Do generated images fit their captions, by a CLIP that somebody has at hand?"""

from collections.abc import Mapping, Sequence

from dalle_mini_impl.evaluation.bootstrap import Estimate, bootstrap_mean
from dalle_mini_impl.evaluation.likelihood import shuffled
from dalle_mini_impl.evaluation.report import FLOOR, Section, Table, number
from dalle_mini_impl.evaluation.samples import Pixels, to_images
from dalle_mini_impl.sampling.rerank import ImageRanker

TRUE = "true images"


def measure_clip_score(
    ranker: ImageRanker,
    ways: Mapping[str, Pixels],
    reference: Pixels,
    captions: Sequence[str],
    *,
    seed: int,
) -> Section:
    """Average the cosines of images and captions, beside true images and wrong captions.

    Args:
        ranker: Compares them; its scores are cosines.
        ways: CandidateTokens of the captions, by how they were chosen.
        reference: The images that the captions belong to.
        captions: One per image.
        seed: Of the shuffling and the intervals.

    Returns:
        The section.

    Source: Hessel et al. 2021, arXiv:2104.08718, equation 1, with a weight of 100, as is usual
        since, where they have 2.5.
    """
    others = [captions[index] for index in shuffled(len(captions), seed=seed).tolist()]

    def score(pixels: Pixels, texts: Sequence[str]) -> Estimate:
        cosines = ranker.score(to_images(pixels), texts)
        return bootstrap_mean((100 * cosines.clamp(min=0)).tolist(), seed=seed)

    found = {name: score(pixels, captions) for name, pixels in {**ways, TRUE: reference}.items()}
    found[FLOOR] = score(next(iter(ways.values())), others)
    rows = [(name, number(estimate, 2)) for name, estimate in found.items()]
    text = (
        "100 times the cosine of image and caption, or 0 where it is negative (Hessel et al. "
        "2021). Scores of different CLIPs cannot be compared."
    )
    return Section("CLIP score", text, dict(found), [Table("clip score", ("set", "score"), rows)])
