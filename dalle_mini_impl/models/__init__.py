"""The models: they see integers, never pictures or text."""
