"""Forward and backward passes of every method, alone and under SANM: ``python -m benchmarks.forward_passes``.

Writes ``results/forward_passes.json`` and the table of ``docs/cost.md``.
"""

import logging
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sanm_lightning.cost import BACKWARD_COST, EpochPasses, count_passes
from sanm_lightning.run_record import write_json
from scripts.gpu.cases import TINY, Case, cases, data

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "results" / "forward_passes.json", ROOT / "docs" / "cost.md"
BEGIN, END = "<!-- table of benchmarks.forward_passes -->", "<!-- end of table -->"

ONE = (1, 1, 0)
LEAST: dict[str, tuple[int, int, int]] = {
    "CoTeaching": (2, 2, 0), "CoTeachingPlus": (2, 2, 0), "ELRPlus": (4, 2, 0), "MCorrection": (2, 1, 1),
    "DivideMix": (10, 4, 2), "C2D": (10, 4, 2), "SSR": (4, 3, 1), "SimCLR": (2, 2, 0),
}  # fmt: skip
"""Forward and backward passes in steps, and forward passes between steps, that the algorithm of a paper needs per epoch
after the warm-up: :data:`ONE` for methods that are not listed. ELR+: two networks and two teachers. M-correction: losses of
the set, predictions of unmixed images, mixed images. DivideMix: losses under two networks; per network, two views of all
samples to refine and guess, two of the unlabeled half by its peer, and two mixed views. SSR: features of the set, two mixed
views, the weak and the strong view of the consistency."""

UNMASKED: dict[str, int] = {
    "CoTeaching": 2, "CoTeachingPlus": 2, "ELRPlus": 2, "MCorrection": 0, "DivideMix": 0, "C2D": 0, "SSR": 2,
}  # fmt: skip
"""Forward passes of unmasked images that SANM adds, for the position of the mask: one for each view that is masked, none if
the method classifies these views without gradient anyway. 1 for methods that are not listed."""

DECODER = "the decoder needs features of masked views that are not mixed"
REASONS = dict.fromkeys(("C2D", "DivideMix", "ELRPlus", "MCorrection", "Mixup", "SSR"), DECODER)
"""Why a method needs more passes under SANM than the least."""


def least(case: Case) -> tuple[int, int, int]:
    """Return the passes that the algorithms need: forward, backward, between steps."""
    forward, backward, between = LEAST.get(case.method, ONE)
    return forward + case.under_sanm * UNMASKED.get(case.method, 1), backward, between


def measure(case: Case) -> dict[str, Any]:
    """Count the passes of a case on toy data, in the first epoch (the warm-up) and in the third."""
    with tempfile.TemporaryDirectory() as folder:
        epochs = count_passes(case.build(TINY, Path(folder)), data(TINY), 4)
    later = epochs[2]
    return {
        "first_epoch": list(epochs[0][2:]),
        "passes": list(later[2:]), "least": list(least(case)), "cost": later.cost,
        "reason": REASONS.get(case.method) if case.under_sanm else None,
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
    """Count, write the results and the table."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = {case.label: measure(case) for case in cases()}
    write_json(RESULTS, {"backward_cost": BACKWARD_COST, "methods": rows})
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.split(END)[1]}")
    print(table(rows))


if __name__ == "__main__":
    main()
