"""Image tokenizers that others trained."""
