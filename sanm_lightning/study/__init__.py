"""Studies: grids of runs with their tables and figures, see ``docs/studies.md``."""
