"""Parser of the command line, search path of the config files, and errors in one sentence."""
