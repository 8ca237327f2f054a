"""Files with the known labels of some training samples: formats, positions in the training split, and faults."""

import numpy as np
import pytest
import torch

from sanm_lightning.data import Toy
from sanm_lightning.data.label_rows import read_known_labels

NAMES = ["cat", "dog", "fox"]
PATHS = ["a/1.png", "a/2.png", "b/1.png", "b/2.png"]


@pytest.mark.parametrize(
    ("text", "paths", "expected"),
    [
        ("index,label\n3,0\n1,2\n", None, ([3, 1], [0, 2])),
        ("index,label\n3,cat\n1,fox\n", None, ([3, 1], [0, 2])),
        ("path,label,note\nb/1.png,dog,x\n./a/1.png,cat,y\n", PATHS, ([2, 0], [1, 0])),
        ("path,index,new_label,label\nb/2.png,0,fox,cat\n", PATHS, ([3], [2])),
    ],
)
def test_rows_are_found_by_index_or_path_and_labels_by_name_or_number(text, paths, expected, tmp_path):
    (tmp_path / "known.csv").write_text(text)
    found = read_known_labels(tmp_path / "known.csv", 4, NAMES, paths)
    assert tuple(part.tolist() for part in found) == expected


def test_an_archive_has_the_same_arrays(tmp_path):
    np.savez(tmp_path / "known.npz", index=np.array([2, 0]), labels=np.array([1, 2]))
    positions, labels = read_known_labels(tmp_path / "known.npz", 4, NAMES)
    assert (positions.tolist(), labels.tolist()) == ([2, 0], [1, 2])


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        (
            "a.csv",
            "index,label\n4,cat\n",
            r"one row for some of the 4 training samples in .*, got 1 rows of unknown samples",
        ),
        ("a.csv", "index,label\n1,cat\n1,dog\n", r"got 1 repeated rows \(first: '1'\); keep one"),
        ("a.csv", "index,label\n1,cow\n", "expected labels among the 3 classes .* such as 'cow'"),
        ("a.csv", "index,label\n", "expected known labels in rows of a column 'index' or 'path' .* got no rows; write"),
        ("a.csv", "cat\ndog\n", "expected known labels in rows of a column 'index' or 'path' .* got none; write"),
        ("a.csv", "path,label\na/1.png,cat\n", "got 'path' for a data set without files; write"),
        ("a.csv", "index,label\n1\n", "expected 2 columns in .*, got 1 in row 1; correct it"),
        ("a.npz", "no archive", "expected a readable file of known labels, got .* save it again"),
        ("a.json", "[0]", "expected known labels in rows of a column 'index' or 'path' .* got none; write"),
    ],
)
def test_a_faulty_file_is_refused(name, text, sentence, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_known_labels(tmp_path / name, 4, NAMES)


class TestInADataModule:
    def source(self, **options):
        return Toy(num_samples=20, seed=0, **options)

    def test_positions_are_those_in_the_training_split(self, tmp_path):
        data = self.source(max_train_samples=16, val_fraction=0.25)
        origin = data.table("train").origin
        rows = [f"{position},1" for position in range(20)]
        (tmp_path / "known.csv").write_text("index,label\n" + "\n".join(rows))
        positions, labels = data.known_labels(str(tmp_path / "known.csv"))
        assert sorted(positions.tolist()) == list(range(len(origin)))
        assert torch.equal(origin[positions], origin.sort().values)
        assert labels.tolist() == [1] * len(origin)

    def test_a_file_without_samples_of_the_training_split_is_refused(self, tmp_path):
        data = self.source(val_fraction=0.25)
        held_out = data.table("val").origin.tolist()
        (tmp_path / "known.csv").write_text("index,label\n" + "\n".join(f"{position},1" for position in held_out))
        with pytest.raises(
            ValueError, match=r"samples of the training split in .*, got 5 of samples outside of it; add"
        ):
            data.known_labels(str(tmp_path / "known.csv"))
