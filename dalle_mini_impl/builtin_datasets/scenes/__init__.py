"""A world of things in all colors, with an exact checker."""
