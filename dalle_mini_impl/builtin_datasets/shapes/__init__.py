"""A world of shapes with an exact checker."""
