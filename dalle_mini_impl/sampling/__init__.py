"""From a decoder's logits to image tokens and picture files."""
