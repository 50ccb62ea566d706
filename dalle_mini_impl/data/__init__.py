"""Captioned images: reading, generation, tokenizing and ordering them."""
