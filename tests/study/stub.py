"""In place of ``sanm fit``: writes results, fails, sleeps or dies, as its options say."""

import itertools
import json
import sys
import time
from pathlib import Path

words = sys.argv[1:]
options = {word.removeprefix("--"): value for word, value in itertools.pairwise(words) if word.startswith("--")}
run = Path(options["trainer.default_root_dir"])
with (run / "calls.txt").open("a") as file:
    file.write(json.dumps(words) + "\n")
first = len((run / "calls.txt").read_text().splitlines()) == 1
kind = options.get("model.kind", "finishes")
(run / "checkpoints").mkdir(exist_ok=True)
(run / "checkpoints" / "last.ckpt").touch()
accuracy = float(options.get("model.accuracy", 0.5)) + int(options["seed_everything"]) / 100
results = {
    "epochs": int(options["trainer.max_epochs"]), "seconds": 36.0, "noise_kind": "symmetric",
    "test_accuracy_best": accuracy, "test_accuracy_last": accuracy - 0.1, "val_accuracy_best": 0.25, "val_accuracy_last": 0.2,
}  # fmt: skip
if kind == "fails" or (kind == "fails once" and first):
    print(
        "Traceback (most recent call last):\nsanm: expected more memory, got none; buy some\n(SANM_TRACEBACK=1 shows where)"
    )
    sys.exit(2)
if kind == "sleeps once" and first:
    time.sleep(60)
(run / "results.json").write_text(json.dumps(results))
