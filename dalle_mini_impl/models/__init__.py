"""The models: they see integers, never images or text."""
