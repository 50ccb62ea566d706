"""A world of things in all colors, with an exact checker."""

KINDS = ("single", "count", "pair")  # here, since --help names them and must not wait for torch
