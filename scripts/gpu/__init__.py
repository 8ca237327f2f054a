"""The parts of ``scripts/on_gpu.py``."""
