"""Whether the full matrix of methods, variants of SANM and precisions is tested (``make test-all``), or one case of each."""

import os

FULL = os.environ.get("SANM_TESTS") == "all"
