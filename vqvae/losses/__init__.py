"""What only the training of an image tokenizer needs."""
