"""Scripts that measure a machine."""
