"""A world of things in all colors, with an exact checker."""

# Here, since --help names them and must not wait for torch.
KINDS = ("large", "single", "count", "pair")
DEFAULT_KINDS = KINDS[1:]
