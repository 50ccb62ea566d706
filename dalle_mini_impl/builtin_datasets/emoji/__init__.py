"""Emoji in four styles, with English and Korean captions."""
