"""Forward and backward passes of every method, alone and under SANM: ``python -m benchmarks.forward_passes``.

Writes ``results/forward_passes.json``; ``make tables`` then writes the table of ``docs/cost.md``.
"""

import logging
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sanm_lightning.cost import BACKWARD_COST, EpochPasses, count_passes
from sanm_lightning.run.record import write_json
from scripts.gpu.cases import TINY, Case, cases, data

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "forward_passes.json"

ONE = (1, 1, 0)
LEAST: dict[str, tuple[float, float, int]] = {
    "CoTeaching": (2, 2, 0), "CoTeachingPlus": (2, 2, 0), "ELRPlus": (4, 2, 0), "MCorrection": (2, 1, 1),
    "DivideMix": (10, 4, 2), "C2D": (10, 4, 2), "SSR": (4, 3, 1), "SimCLR": (2, 2, 0),
    "SMP": (1, 1, 1), "CREMA": (1, 1, 1), "INCV": (2, 2, 0), "NestedCoTeaching": (1.5, 0.5, 0), "REED": (4, 2, 0),
    "RRL": (4, 4, 1), "MOIT": (3, 2, 1), "SelCL": (6, 5, 1), "MLNT": (4, 5, 0), "IEG": (7, 7, 0),
}  # fmt: skip
"""Forward and backward passes in steps, and forward passes between steps, that the algorithm of a paper needs per epoch
after the warm-up: :data:`ONE` for methods that are not listed. ELR+: two networks and two teachers. M-correction: losses of
the set, predictions of unmixed images, mixed images. DivideMix: losses under two networks; per network, two views of all
samples to refine and guess, two of the unlabeled half by its peer, and two mixed views. SSR: features of the set, two mixed
views, the weak and the strong view of the consistency. SMP, CREMA: features or losses of the set. Nested Co-teaching: each
network ranks half of a batch, and is trained on the selected half of the other half. REED: one network of DivideMix, without
the peer. RRL, MOIT, Sel-CL: features of the set; the views of the contrasts, for Sel-CL one of them by the averaged network,
and the mixed views. MLNT: the batch by the network and by its teacher, and one pass at each of two look-ahead points, with
one backward pass more for each step. IEG: guesses of two views, the look-ahead pass with its derivative, the probe set, and
the views of the sum of losses."""

MASKED: dict[str, tuple[float, float]] = {
    "CoTeaching": (2, 0), "CoTeachingPlus": (2, 0), "ELRPlus": (2, 0), "SSR": (2, 0), "INCV": (2, 0),
    "NestedCoTeaching": (0.5, 0), "MCorrection": (0, 0), "DivideMix": (0, 0), "C2D": (0, 0), "REED": (0, 0), "IEG": (0, 0),
    "RRL": (1, 1), "MOIT": (1, 1), "SelCL": (1, 1), "MLNT": (1, 0),
}  # fmt: skip
"""Forward and backward passes that SANM adds at least, (1, 0) for methods that are not listed: a pass of each view that is
masked, for the position of the mask, none if the method classifies these views without gradient anyway; and a pass of the
masked view with gradient where the other losses of a method use the unmasked one."""

DECODER = "the decoder needs features of masked views that are not mixed"
STATISTICS = "predictions use batch statistics, and losses running statistics, as in the authors' code"
POSITION = "the pass for the position of the mask is not shared with that of the unmasked view, which has a gradient"
REASONS = {
    **dict.fromkeys(("C2D", "DivideMix", "ELRPlus", "Mixup", "SSR", "REED"), DECODER),
    "MCorrection": f"{DECODER}; {STATISTICS}",
    **dict.fromkeys(("RRL", "SelCL", "MLNT"), POSITION),
    **dict.fromkeys(("MOIT", "IEG"), f"{DECODER}; {POSITION}"),
}
"""Why a method needs more passes under SANM than the least."""
REASONS_ALONE = {"MCorrection": STATISTICS}
"""Why a method needs more passes alone than the least."""


def least(case: Case) -> tuple[float, float, int]:
    """Return the passes that the algorithms need: forward, backward, between steps."""
    forward, backward, between = LEAST.get(case.method, ONE)
    further, trained = MASKED.get(case.method, (1, 0)) if case.under_sanm else (0, 0)
    return forward + further, backward + trained, between


def measure(case: Case) -> dict[str, Any]:
    """Count the passes of a case on toy data, in the first epoch (the warm-up) and in the third."""
    with tempfile.TemporaryDirectory() as folder:
        epochs = count_passes(case.build(TINY, Path(folder)), data(TINY), 4)
    later = epochs[2]
    return {
        "first_epoch": list(epochs[0][2:]),
        "passes": list(later[2:]), "least": list(least(case)), "cost": later.cost,
        "reason": (REASONS if case.under_sanm else REASONS_ALONE).get(case.method),
    }  # fmt: skip


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the Markdown table."""
    base = EpochPasses("train", False, *ONE).cost
    lines = [
        "| method | alone | least | cost | under SANM | least | cost |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, alone in rows.items():
        if not name.startswith("SANM("):
            under = rows.get(f"SANM({name})")
            cells = [cell for row in (alone, under) for cell in _cells(row, base)]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(row: dict[str, Any] | None, base: float) -> list[str]:
    if row is None:
        return ["", "", ""]
    return [_triple(row["passes"]), _triple(row["least"]), f"{row['cost'] / base:.1f}"]


def _triple(passes: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in passes)


def main() -> None:
    """Count, write the results and print the table."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = {case.label: measure(case) for case in cases()}
    write_json(RESULTS, {"backward_cost": BACKWARD_COST, "methods": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
