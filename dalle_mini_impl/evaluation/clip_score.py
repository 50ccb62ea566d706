"""How well generated images fit their captions, by a pretrained CLIP."""

from collections.abc import Mapping, Sequence

from dalle_mini_impl.evaluation.bootstrap import Estimate, bootstrap_mean
from dalle_mini_impl.evaluation.report import FLOOR, REFERENCE, Section, Table, number
from dalle_mini_impl.evaluation.samples import Pixels, derangement, to_images
from dalle_mini_impl.sampling.rerank import ImageRanker

TEXT = (
    "100 times the cosine of image and caption, or 0 where it is negative (Hessel et al. 2021). "
    "Scores of different CLIPs cannot be compared, and a CLIP that has chosen among candidates "
    "favors its own choice."
)


def measure_clip_score(
    ranker: ImageRanker,
    generated: Mapping[str, Pixels],
    reference: Pixels,
    captions: Sequence[str],
    *,
    seed: int,
) -> Section:
    """Average the CLIP scores of generated images (by sampling method) and reference images.

    Source: Hessel et al. 2021, arXiv:2104.08718, equation 1.
    """

    def score(pixels: Pixels, texts: Sequence[str]) -> Estimate:
        # The paper scales by 2.5; 100 is the convention since.
        cosines = ranker.score(to_images(pixels), texts)
        return bootstrap_mean((100 * cosines.clamp(min=0)).tolist(), seed=seed)

    sets = {**generated, REFERENCE: reference}
    found = {name: score(pixels, captions) for name, pixels in sets.items()}
    # The score of wrong captions: what any image of the kind gets.
    others = [captions[index] for index in derangement(len(captions), seed=seed).tolist()]
    found[FLOOR] = score(next(iter(generated.values())), others)
    rows = [(name, number(estimate, 2)) for name, estimate in found.items()]
    return Section("CLIP score", TEXT, dict(found), [Table("clip score", ("set", "score"), rows)])
