"""The kit of "Attention Is All You Need": attention, blocks, masks, positions and a cache."""
