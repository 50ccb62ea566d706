"""The image tokenizer: a discrete VAE that knows nothing of text or files of images."""

from vqvae.config import VQVAEConfig
from vqvae.model import VQVAE

__all__ = ["VQVAE", "VQVAEConfig"]
