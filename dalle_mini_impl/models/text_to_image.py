"""The models that generate images from captions; ``decoder.architecture`` chooses one."""

from typing import TypeAlias

from dalle_mini_impl.models.dalle import Dalle
from dalle_mini_impl.models.dalle_config import DalleConfig
from dalle_mini_impl.models.dalle_encoder_decoder import DalleEncoderDecoder

TextToImageModel: TypeAlias = Dalle | DalleEncoderDecoder


def build_text_to_image(config: DalleConfig) -> TextToImageModel:
    """Build the model of a config with fresh weights, in training mode."""
    return DalleEncoderDecoder(config) if config.decoder.has_encoder else Dalle(config)
