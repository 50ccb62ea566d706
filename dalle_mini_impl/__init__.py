"""Text-to-image in the line of DALL-E; start reading at ``models/dalle.py``."""
