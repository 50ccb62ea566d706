"""Captioned pictures: reading, drawing, tokenizing and ordering them."""
