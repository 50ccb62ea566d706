"""Losses and networks that only the training of an image tokenizer needs."""
