"""Image tokenizers trained elsewhere, behind the interface of our own."""
