"""A run of the command line: its checkpoints, settings and results, and how it is resumed."""
