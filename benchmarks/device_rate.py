"""Share of the card's matrix rate that training reaches (MFU): needs a GPU."""

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import medians
from benchmarks.step import batch_of, network_of
from sanm_lightning import SANM


def matrix_rate(size: int = 8192) -> float:
    """Return floating-point operations per second of a product of two bf16 matrices."""
    one, other = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / medians({"product": lambda: one @ other}, 30, warm=5)["product"]


def run(repeats: int) -> dict[str, float]:
    """Return the measured matrix rate and the share of it in cross-entropy and SANM, by batch size, compiled or not."""
    rate = matrix_rate()
    rows = {"matrix_flop_per_s": rate}
    for batch_size in (128, 512):
        images, targets, quality = batch_of(batch_size)
        for mode in (None, "default", "max-autotune"):  # the last one captures graphs
            for masked in (False, True):
                network, sanm = network_of(64), SANM(seed=0) if masked else SANM.off()
                sanm.build(network, (32, 32))
                sanm.to("cuda")
                optimizer = torch.optim.SGD([*network.parameters(), *sanm.parameters()], lr=1e-4, momentum=0.9)
                if mode is not None:
                    for half in ("forward_features", "forward_head"):
                        setattr(network, half, torch.compile(getattr(network, half), mode=mode))

                def step(network=network, sanm=sanm, optimizer=optimizer, batch=(images, targets, quality)) -> None:
                    given, wanted, known = batch
                    torch.compiler.cudagraph_mark_step_begin()
                    optimizer.zero_grad()
                    with torch.autocast("cuda", dtype=torch.bfloat16):
                        views = sanm(network, given, wanted, lambda logits: known)
                        features = network.forward_features(views.images)
                        loss = F.cross_entropy(network.forward_head(features), views.targets)
                        loss = loss + sanm.reconstruction(features, given)
                    loss.backward()
                    optimizer.step()

                name = f"{'sanm' if masked else 'cross_entropy'}_{batch_size}_{mode or 'eager'}"
                if mode is None:
                    with FlopCounterMode(display=False) as counter:
                        step()
                    flop = {**rows}.get(f"_flop_{masked}_{batch_size}") or counter.get_total_flops()
                    rows[f"_flop_{masked}_{batch_size}"] = flop
                taken = medians({"step": step}, 10 * repeats, warm=10)["step"]
                rows[f"mfu_{name}"] = rows[f"_flop_{masked}_{batch_size}"] / taken / rate
    return {name: value for name, value in rows.items() if not name.startswith("_")}
