"""Speed and memory beside other programs of the same kind: python -m benchmarks --help."""
