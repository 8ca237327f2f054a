"""``sanm noise``: what it prints, and that its files are read back bit for bit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sanm_lightning.commands import run
from sanm_lightning.commands.noise import label_transition
from sanm_lightning.data import CSVImages, Digits, ImageFolder, Noise


def folder(root: Path) -> None:
    for number in range(12):
        path = root / "train" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (20 * number,) * 3).save(path)
    rows = [f"train/{('cat', 'dog')[n % 2]}/{n}.png,{('cat', 'dog')[n % 2]}" for n in range(12)]
    (root / "images.csv").write_text("\n".join(["path,label", *rows]) + "\n")


WORDS = {
    "Digits": [],
    "ImageFolder": ["--data.root", "."],
    "CSVImages": ["--data.file", "images.csv"],
}
MADE = {
    "Digits": lambda noise: Digits(noise=noise, seed=0),
    "ImageFolder": lambda noise: ImageFolder(".", image_size=8, noise=noise, seed=0),
    "CSVImages": lambda noise: CSVImages("images.csv", image_size=8, noise=noise, seed=0),
}


@pytest.mark.parametrize("kind", [["pair", "0.5"], ["instance", "0.5"]], ids=lambda kind: kind[0])
@pytest.mark.parametrize("name", WORDS)
def test_the_written_labels_are_read_back_bit_for_bit(name, kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path)
    words = [*WORDS[name], *([] if name == "Digits" else ["--data.image_size", "8"])]
    noise = ["--data.noise.kind", kind[0], "--data.noise.rate", kind[1]]
    assert run(["noise", "--data", name, *words, *noise, "--out", "labels.npz", "--matrix", "matrix.npy"]) == 0
    said = capsys.readouterr().out
    fresh = MADE[name](Noise(kind[0], 0.5)).original_labels()
    assert (
        f"{kind[0]}: requested rate 0.5000, actual rate {fresh.noise_rate:.4f} of {len(fresh.labels):,} labels" in said
    )
    data = MADE[name](Noise("file", path="labels.npz"))
    assert torch.equal(data.original_labels().labels, fresh.labels)
    assert torch.equal(data.labels, fresh.labels[data.table("train").origin])
    matrix = torch.from_numpy(np.load("matrix.npy"))
    assert torch.equal(matrix, label_transition(fresh.true_labels, fresh.labels, data.num_classes))


def test_the_written_matrix_gives_the_rate_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(["noise", "--data", "Digits", "--data.noise.kind", "pair", "--data.noise.rate", "0.3", "--matrix", "m.csv"])
    first = capsys.readouterr().out
    run(["noise", "--data", "Digits", "--data.noise.kind", "transition", "--data.noise.matrix", "m.csv"])
    second = capsys.readouterr().out
    rate = first.partition("actual rate ")[2].split()[0]
    assert f"transition: requested rate none, actual rate {rate} of 1,297 labels" in second
    rows = [[line.split() for line in said.splitlines() if line.split()[:2] == ["9", "9"]] for said in (first, second)]
    assert rows[0] == rows[1] != []
    assert len(rows[0][0]) == 4  # number, name, and the two fractions of pair noise


def test_a_row_of_the_transition_is_what_became_of_a_class():
    found = label_transition(torch.tensor([0, 0, 0, 0, 2]), torch.tensor([0, 1, 1, 2, 2]), 3)
    assert found.tolist() == [[0.25, 0.5, 0.25], [0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--data", "Digits", "--out", "labels.csv"], r"extension \.npz, got 'labels\.csv'; rename it"),
        (["--data", "Digits", "--matrix", "m.npz"], r"extension \.csv or \.npy, got 'm\.npz'; rename it"),
        (
            ["--data", "Digits", "--out", "old.npz"],
            r"expected a new file, got 'old\.npz', which exists; choose another name",
        ),
        (
            ["--data", "ImageFolder", "--data.root", "."],
            "expected known true labels, got ImageFolder without noise of a kind",
        ),
    ],
)
def test_refuses_with_one_sentence(words, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path)
    (tmp_path / "old.npz").touch()
    with pytest.raises((ValueError, OSError), match=match) as error:
        run(["noise", *words])
    assert "\n" not in str(error.value)
