"""Generation by a compiled pass of the decoder, where the machine has a C++ compiler."""
