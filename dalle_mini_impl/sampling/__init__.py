"""From a decoder's logits to tokens, likelihoods and rankings."""
