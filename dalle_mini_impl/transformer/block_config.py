"""How a Transformer block is built: its sizes, its options, and the options of three papers."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """How a block is built, apart from its sizes."""

    norm: Literal["pre", "post"] = "pre"
    """Before each branch (Xiong et al. 2020, arXiv:2002.04745), or after each sum (Vaswani et al.
    2017, arXiv:1706.03762, section 3.1)."""
    feed_forward: Literal["swiglu", "relu", "gelu"] = "swiglu"
    """SwiGLU (Shazeer 2020, arXiv:2002.05202), ReLU (Vaswani et al. 2017, equation 2) or GELU
    (Hendrycks & Gimpel 2016, arXiv:1606.08415; in GPT-2, Radford et al. 2019, in DALL-E and in ViT,
    Dosovitskiy et al. 2021)."""
    use_bias: bool = False
    """Biases in projections and norms, as in the papers of 2017 and 2021."""
    use_qk_norm: bool = True
    """Normalize queries and keys per head (Henry et al. 2020, arXiv:2010.04245)."""
    has_cross_attention: bool = False
    """Attend to an encoder's output between the two branches (Vaswani et al. 2017, section 3.2.3,
    encoder-decoder attention)."""


DEFAULT_OPTIONS = BlockOptions()
VASWANI_2017 = BlockOptions(norm="post", feed_forward="relu", use_bias=True, use_qk_norm=False)
RADFORD_2019 = BlockOptions(feed_forward="gelu", use_bias=True, use_qk_norm=False)  # DALL-E's too
DOSOVITSKIY_2021 = BlockOptions(feed_forward="gelu", use_bias=True, use_qk_norm=False)


@runtime_checkable  # so that the tests can check types
class BlockSizes(Protocol):
    """The sizes that every model's config has."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""

    @property
    def num_heads(self) -> int:
        """Attention heads per block."""

    @property
    def intermediate_size(self) -> int:
        """Width inside the feed-forward network."""

    @property
    def dropout_probability(self) -> float:
        """Fraction of each branch's channels dropped in training."""


def require_positive(config: Any, names: Iterable[str], *, prefix: str = "") -> None:
    """Raise ValueError for a field that is below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{prefix}{name}: got {getattr(config, name)}, expected at least 1")


def require_dropout_probability(sizes: BlockSizes, *, prefix: str = "") -> None:
    """Raise ValueError for a probability outside [0, 1)."""
    if not 0 <= sizes.dropout_probability < 1:
        raise ValueError(
            f"{prefix}dropout_probability: got {sizes.dropout_probability}, expected 0 to below 1"
        )
