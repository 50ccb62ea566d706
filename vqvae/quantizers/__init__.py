"""The three quantizers, with one interface: forward, features, encode, decode."""

from vqvae.quantizers.fsq import FiniteScalarQuantizer
from vqvae.quantizers.gumbel import GumbelQuantizer
from vqvae.quantizers.output import QuantizerOutput
from vqvae.quantizers.vector_quantizer import VectorQuantizer

__all__ = ["FiniteScalarQuantizer", "GumbelQuantizer", "QuantizerOutput", "VectorQuantizer"]
