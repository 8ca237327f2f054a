"""Speed of every part, as ratios measured in one process: ``python -m benchmarks``."""
