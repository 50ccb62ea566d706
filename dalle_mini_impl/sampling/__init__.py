"""From a decoder's logits to image tokens and image files."""
