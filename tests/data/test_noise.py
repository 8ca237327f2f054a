"""Label noise: exact counts, frozen copies, files."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from sanm_lightning.data import Digits
from sanm_lightning.data.instance_noise import Pixels, instance_dependent, truncated_normal
from sanm_lightning.data.noise import (
    CIFAR10_MAP,
    CIFAR100_SUPERCLASSES,
    Noise,
    asymmetric,
    asymmetric_sequential,
    cifar100_superclass_map,
    class_map,
    pair_flip,
    read_labels,
    symmetric,
    symmetric_exclusive,
    transition,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_labels(size: int, classes: int, seed: int = 0) -> Tensor:
    return torch.randint(classes, (size,), generator=generator(seed + 1))


sizes = st.integers(0, 200)
rates = st.floats(0, 1)
classes = st.integers(2, 12)
seeds = st.integers(0, 2**32)
quick = settings(max_examples=40, deadline=None)


class TestSymmetric:
    @quick
    @given(sizes, rates, classes, seeds)
    def test_touches_at_most_the_asked_number_and_stays_in_range(
        self, size: int, rate: float, c: int, seed: int
    ) -> None:
        labels = some_labels(size, c)
        noisy = symmetric(labels, rate, c, generator(seed))
        assert (noisy != labels).sum() <= round(rate * size)
        assert ((noisy >= 0) & (noisy < c)).all()

    def test_may_keep_a_label_so_that_a_share_of_one_in_c_stays_right(self) -> None:
        labels = some_labels(20_000, 4)
        kept = (symmetric(labels, 1.0, 4, generator()) == labels).double().mean().item()
        assert kept == pytest.approx(0.25, abs=0.02)

    def test_draws_every_class_from_every_class(self) -> None:
        labels = some_labels(4_000, 5)
        noisy = symmetric(labels, 1.0, 5, generator())
        assert ((labels * 5 + noisy).bincount(minlength=25) > 0).all()


class TestSymmetricExclusive:
    @quick
    @given(sizes, rates, classes, seeds)
    def test_flips_exactly_the_asked_number(self, size: int, rate: float, c: int, seed: int) -> None:
        labels = some_labels(size, c)
        noisy = symmetric_exclusive(labels, rate, c, generator(seed))
        assert (noisy != labels).sum() == round(rate * size)
        assert ((noisy >= 0) & (noisy < c)).all()

    def test_reaches_every_other_class(self) -> None:
        labels = some_labels(4_000, 5)
        counts = (labels * 5 + symmetric_exclusive(labels, 1.0, 5, generator())).bincount(minlength=25).view(5, 5)
        assert ((counts > 0) == ~torch.eye(5, dtype=torch.bool)).all()

    def test_refuses_a_single_class(self) -> None:
        with pytest.raises(ValueError, match="2 or more classes"):
            symmetric_exclusive(torch.zeros(3, dtype=torch.int64), 0.5, 1, generator())


class TestAsymmetric:
    @quick
    @given(sizes, rates, seeds)
    def test_every_changed_label_follows_the_map_once(self, size: int, rate: float, seed: int) -> None:
        labels = some_labels(size, 10)
        noisy = asymmetric(labels, rate, 10, generator(seed), CIFAR10_MAP)
        changed = noisy != labels
        assert changed.sum() <= round(rate * size)
        expected = torch.tensor([CIFAR10_MAP.get(int(c), int(c)) for c in labels], dtype=torch.int64)
        assert torch.equal(noisy[changed], expected[changed])

    def test_sends_everything_through_the_map_at_rate_1_without_a_way_back(self) -> None:
        # Class by class in place, cats would become dogs, and then all dogs cats.
        labels = torch.tensor([3, 5, 3, 5, 0])
        assert asymmetric(labels, 1.0, 10, generator(), CIFAR10_MAP).tolist() == [5, 3, 5, 3, 0]

    def test_half_of_balanced_cifar10_can_change(self) -> None:
        labels = torch.arange(10).repeat(1_000)
        rate = (asymmetric(labels, 0.4, 10, generator(), CIFAR10_MAP) != labels).double().mean().item()
        assert rate == pytest.approx(0.2, abs=0.01)

    def test_refuses_a_map_of_other_classes(self) -> None:
        with pytest.raises(ValueError, match=r"classes in 0 to 5, got classes \[7, 9\]"):
            asymmetric(some_labels(9, 6), 0.5, 6, generator(), {1: 7, 9: 1})


class TestAsymmetricSequential:
    """The map class by class in place, as in the released codes of ELR and CDR."""

    @pytest.mark.parametrize("rate", [0.2, 0.4])
    def test_on_balanced_cifar10_relabelled_cats_can_become_cats_again(self, rate: float) -> None:
        size = 500
        labels = torch.arange(10).repeat_interleave(size)
        noisy = asymmetric_sequential(labels, rate, 10, generator(), CIFAR10_MAP)
        to = torch.zeros(10, 10).index_put_((labels, noisy), torch.ones(10 * size), accumulate=True) / size
        for source, target in ((9, 1), (2, 0), (4, 7)):
            assert to[source, target] == pytest.approx(rate)
        assert to[3, 5] == pytest.approx(rate * (1 - rate), abs=0.03)
        assert to[5, 3] == pytest.approx(rate, abs=0.03)
        assert int((noisy == 5).sum()) == size + rate * size - rate * (size + rate * size)
        assert float((noisy != labels).float().mean()) == pytest.approx((4 * rate + rate * (1 - rate)) / 10, abs=0.005)

    @quick
    @given(st.integers(0, 60), rates, seeds)
    def test_is_the_loop_over_classes(self, size: int, rate: float, seed: int) -> None:
        """The number relabeled at the turn of a class is the rate of those that have its label then, rounded up."""
        labels, mapping = some_labels(size, 4, seed % 100), {0: 1, 1: 2, 3: 0}
        noisy = asymmetric_sequential(labels, rate, 4, generator(seed), mapping)
        count = labels.bincount(minlength=4).tolist()
        for label in range(4):
            if label in mapping:
                moved = math.ceil(rate * count[label])
                count[label] -= moved
                count[mapping[label]] += moved
        assert noisy.bincount(minlength=4).tolist() == count
        assert bool((noisy[labels == 2] == 2).all())

    def test_refuses_a_map_of_other_classes(self) -> None:
        with pytest.raises(ValueError, match=r"mapping of classes in 0 to 2, got classes \[3\]"):
            asymmetric_sequential(some_labels(9, 3), 0.4, 3, generator(), {0: 3})


class TestPairFlip:
    @quick
    @given(sizes, rates, classes, seeds)
    def test_moves_exactly_the_asked_number_to_the_next_class(self, size: int, rate: float, c: int, seed: int) -> None:
        labels = some_labels(size, c)
        noisy = pair_flip(labels, rate, c, generator(seed))
        changed = noisy != labels
        assert changed.sum() == round(rate * size)
        assert torch.equal(noisy[changed], (labels[changed] + 1) % c)


class TestTransition:
    matrix = torch.tensor([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0], [1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64)

    @quick
    @given(sizes, seeds)
    def test_every_count_is_that_of_the_matrix_up_to_one_sample(self, size: int, seed: int) -> None:
        labels = some_labels(size, 3, seed % 100)
        noisy = transition(labels, self.matrix, generator(seed))
        counts = (labels * 3 + noisy).bincount(minlength=9).view(3, 3)
        assert torch.equal(counts.sum(1), labels.bincount(minlength=3))
        assert bool(((counts - self.matrix * counts.sum(1, keepdim=True)).abs() < 1).all())

    @pytest.mark.parametrize("ending", ["npy", "csv"])
    def test_a_matrix_from_a_file_is_that_of_the_rows(self, tmp_path, ending) -> None:  # type: ignore[no-untyped-def]
        path = tmp_path / f"m.{ending}"
        if ending == "npy":
            np.save(path, self.matrix.numpy())
        else:
            np.savetxt(path, self.matrix.numpy(), delimiter=",", fmt="%.17g")
        labels = some_labels(60, 3)
        read, given_rows = Noise("transition", matrix=str(path)), Noise("transition", matrix=self.matrix.tolist())
        assert torch.equal(read.apply(labels, 3, 0), given_rows.apply(labels, 3, 0))

    @pytest.mark.parametrize(
        ("matrix", "match"),
        [
            ([[1.0, 0.0], [0.0, 1.0]], r"a transition matrix \(3, 3\), one row per class, got \(2, 2\); use"),
            ([[1.0, 0.0], [0.0]], "got rows of different lengths; use"),
            ([[1.0, 0, 0], [0.5, 0.4, 0], [0, 0, 1.0]], r"got 1 others \(first: row 1, \[0\.5, 0\.4, 0\.0\]\); make"),
            ([[1.0, 0, 0], [1.5, -0.5, 0], [0, 0, 1.0]], r"got 1 others \(first: row 1"),
            ("matrix.txt", r"in a \.npy or \.csv file, got 'matrix\.txt'; convert"),
            (
                "words.csv",
                r"a table of numbers in '.*words\.csv', got a file that cannot be read \(.*\); write one row",
            ),
        ],
    )
    def test_refuses_with_one_sentence(self, tmp_path, monkeypatch, matrix, match) -> None:  # type: ignore[no-untyped-def]
        monkeypatch.chdir(tmp_path)
        (tmp_path / "words.csv").write_text("a,b\nc,d\n")
        with pytest.raises(ValueError, match=match) as error:
            Noise("transition", matrix=matrix).apply(some_labels(9, 3), 3, 0)
        assert "\n" not in str(error.value)

    def test_says_that_the_file_is_missing(self) -> None:
        with pytest.raises(FileNotFoundError, match=r"got no such file; check noise\.matrix"):
            Noise("transition", matrix="none.csv").apply(some_labels(9, 3), 3, 0)


class TestInstanceDependent:
    """On digits, real images that need no download."""

    @pytest.mark.parametrize("scale", ["raw", "normalized"])
    @pytest.mark.parametrize("rate", [0.2, 0.5])
    def test_the_rate_is_that_asked_and_similar_images_get_the_same_wrong_class(self, rate: float, scale: Any) -> None:
        labels, images, *_ = Digits(image_size=8).load_train()
        assert isinstance(images, Tensor)
        pixels = Pixels(images, (0.3, 0.3, 0.3), (0.35, 0.35, 0.35))
        noisy = instance_dependent(labels, rate, 10, generator(), pixels, scale)
        wrong = (noisy != labels).nonzero()[:, 0]
        assert len(wrong) / len(labels) == pytest.approx(rate, abs=0.04)
        # the nearest neighbor of the same class with a wrong label has the same wrong label more often than by chance
        flat = images[wrong].flatten(1).double()
        distance = torch.cdist(flat, flat).fill_diagonal_(torch.inf)
        distance[labels[wrong][:, None] != labels[wrong]] = torch.inf
        near = float((noisy[wrong][distance.argmin(1)] == noisy[wrong]).double().mean())
        shuffled = noisy[wrong].clone()
        for label in range(10):
            own = (labels[wrong] == label).nonzero()[:, 0]
            shuffled[own] = shuffled[own[torch.randperm(len(own), generator=generator(label))]]
        chance = float((shuffled[distance.argmin(1)] == noisy[wrong]).double().mean())
        assert near > chance + 0.1

    def test_is_the_loop_over_samples(self) -> None:
        """One sample at a time: a flip rate, the scores of the class's weights, a draw from the mixture of both."""
        labels, images = (
            torch.tensor([1, 0, 1, 2]),
            torch.randint(256, (4, 3, 2, 2), generator=generator(), dtype=torch.uint8),
        )
        drawn = generator(5)
        flip = truncated_normal(4, 0.5, drawn)
        expected = labels.clone()
        for label in range(3):
            weight = torch.randn(12, 3, generator=drawn).double()
            rows = (labels == label).nonzero()[:, 0].tolist()
            probs = []
            for row in rows:
                score = [float(images[row].double().flatten() @ weight[:, c]) for c in range(3)]
                top = max(score[c] for c in range(3) if c != label)
                other = [0.0 if c == label else math.exp(score[c] - top) for c in range(3)]
                share = [float(flip[row]) * value / sum(other) for value in other]
                share[label] = 1 - float(flip[row])
                probs.append(share)
            expected[rows] = torch.multinomial(torch.tensor(probs, dtype=torch.float64), 1, generator=drawn)[:, 0]
        assert torch.equal(instance_dependent(labels, 0.5, 3, generator(5), images), expected)

    def test_flip_rates_are_those_of_a_truncated_normal_distribution(self) -> None:
        drawn = truncated_normal(20_000, 0.1, generator()).numpy()
        assert drawn.min() >= 0 and drawn.max() <= 1
        reference = stats.truncnorm(-1, 9, loc=0.1, scale=0.1)
        assert stats.kstest(drawn, reference.cdf).pvalue > 0.01
        assert drawn.mean() == pytest.approx(0.129, abs=0.002)

    def test_refuses_labels_without_images_and_normalized_pixels_without_statistics(self) -> None:
        labels = some_labels(9, 3)
        with pytest.raises(
            ValueError, match="expected images for instance-dependent noise, got labels only; pass images"
        ):
            Noise("instance", 0.4).apply(labels, 3, 0)
        with pytest.raises(ValueError, match=r"one image per label .* got 4 images and 9 labels; pass"):
            Noise("instance", 0.4).apply(labels, 3, 0, torch.zeros(4, 3, 2, 2, dtype=torch.uint8))
        with pytest.raises(
            ValueError, match="statistics of the data for noise with pixels 'normalized', got none; set"
        ):
            Noise("instance", 0.4, pixels="normalized").apply(labels, 3, 0, torch.zeros(9, 3, 2, 2, dtype=torch.uint8))

    def test_a_data_module_passes_the_images_of_its_subset(self) -> None:
        data = Digits(image_size=8, noise=Noise("instance", 0.5), max_train_samples=50, seed=0)
        table, source = data.table("train"), Digits(image_size=8).load_train()
        assert isinstance(source.images, Tensor) and table.true_labels is not None
        alone = Noise("instance", 0.5).apply(table.true_labels, 10, 0, source.images[table.origin])
        assert torch.equal(table.labels, alone)
        assert data.noise_rate == 0.5 and 0.2 < (data.measured_noise_rate or 0) < 0.8


class TestEveryKind:
    kinds = (
        Noise("symmetric", 0.7),
        Noise("symmetric_exclusive", 0.7),
        Noise("asymmetric", 0.7, mapping="cifar10"),
        Noise("asymmetric_sequential", 0.7, mapping="cifar10"),
        Noise("pair", 0.7),
        Noise("transition", matrix=[[0.5 if i in (j, (j + 1) % 10) else 0.0 for i in range(10)] for j in range(10)]),
        Noise("instance", 0.7),
    )
    images = torch.randint(256, (100, 3, 4, 4), generator=generator(7), dtype=torch.uint8)

    @pytest.mark.parametrize("noise", (*kinds, Noise()), ids=lambda n: n.kind)
    def test_leaves_the_given_labels_alone(self, noise: Noise) -> None:
        labels = some_labels(100, 10)
        before = labels.clone()
        noise.apply(labels, 10, 0, self.images).fill_(-1)
        assert torch.equal(labels, before)

    @pytest.mark.parametrize("noise", kinds, ids=lambda n: n.kind)
    def test_is_a_function_of_the_seed_and_of_nothing_else(self, noise: Noise) -> None:
        labels = some_labels(100, 10)
        first = noise.apply(labels, 10, 3, self.images)
        torch.rand(5)
        assert torch.equal(first, noise.apply(labels, 10, 3, self.images))
        assert not torch.equal(first, noise.apply(labels, 10, 4, self.images))

    def test_prefers_its_own_seed(self) -> None:
        labels = some_labels(100, 10)
        assert torch.equal(Noise("pair", 0.5, seed=9).apply(labels, 10, 1), Noise("pair", 0.5).apply(labels, 10, 9))

    def test_at_rate_0_nothing_changes(self) -> None:
        labels = some_labels(50, 10)
        for kind in ("symmetric", "symmetric_exclusive", "pair"):
            assert torch.equal(Noise(kind).apply(labels, 10, 0), labels)  # type: ignore[arg-type]


class TestClassMaps:
    def test_blocks_of_five_are_cycles_of_consecutive_ids(self) -> None:
        mapping = class_map("cifar100_blocks_of_five")
        assert sorted(mapping) == sorted(mapping.values()) == list(range(100))
        assert [mapping[label] for label in (0, 3, 4, 95, 99)] == [1, 4, 0, 96, 95]
        assert mapping != class_map("cifar100_superclass")

    def test_cifar100_classes_stay_in_their_super_class_and_form_cycles_of_five(self) -> None:
        names = sorted(name for members in CIFAR100_SUPERCLASSES.values() for name in members)
        group = {name: parent for parent, members in CIFAR100_SUPERCLASSES.items() for name in members}
        mapping = cifar100_superclass_map()
        assert len(set(names)) == len(mapping) == len(set(mapping.values())) == 100
        for start in range(100):
            assert group[names[start]] == group[names[mapping[start]]]
            walk = [start]
            while mapping[walk[-1]] != start:
                walk.append(mapping[walk[-1]])
            assert len(walk) == 5

    def test_known_steps_of_cifar100(self) -> None:
        # beaver 4, dolphin 30, otter 55, seal 72, whale 95, in the order of torchvision's fine ids
        mapping = cifar100_superclass_map()
        assert [mapping[c] for c in (4, 30, 55, 72, 95)] == [30, 55, 72, 95, 4]

    def test_a_map_is_a_fresh_copy(self) -> None:
        class_map("cifar10").clear()
        assert class_map("cifar10") == CIFAR10_MAP


class TestReadLabels:
    def test_reads_every_format(self, tmp_path) -> None:  # type: ignore[no-untyped-def]
        labels = np.array([2, 0, 1, 1])
        np.save(tmp_path / "a.npy", labels)
        np.savez(tmp_path / "one.npz", labels)
        np.savez(tmp_path / "two.npz", clean=labels * 0, worse=labels.astype(np.float32))
        torch.save({"clean": labels * 0, "worse": labels.tolist()}, tmp_path / "two.pt")
        torch.save({"worse": torch.from_numpy(labels)}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
        (tmp_path / "list.json").write_text("[2, 0, 1, 1]")  # as DivideMix writes it
        (tmp_path / "two.json").write_text('{"clean": [0, 0, 0, 0], "worse": [2, 0, 1, 1]}')
        files = {
            "column.csv": "2\n0\n1\n1\n",
            "header.csv": "label\n2\n0\n1\n1\n",
            "pairs.csv": "3,1\n0,2\n2,1\n1,0\n",
            "pairs_header.csv": "index,label\r\n3,1\r\n0,2\r\n2,1\r\n1,0\r\n",
            "named.csv": "\ufefffile,clean,worse\na,0,2\nb,0,0\nc,0,1\nd,0,1\n",
            "named_index.csv": "worse,index,clean\n1,3,0\n2,0,0\n1,2,0\n0,1,0\n",
        }
        for name, text in files.items():
            (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        for name in (
            "a.npy",
            "one.npz",
            "list.json",
            "legacy.pt",
            "column.csv",
            "header.csv",
            "pairs.csv",
            "pairs_header.csv",
        ):
            assert read_labels(tmp_path / name, 4, 3).tolist() == [2, 0, 1, 1], name
        for name in ("two.npz", "two.json", "two.pt", "named.csv", "named_index.csv"):
            read = read_labels(tmp_path / name, 4, 3, key="worse")
            assert read.tolist() == [2, 0, 1, 1] and read.dtype == torch.int64, name

    def test_never_unpickles(self, tmp_path) -> None:  # type: ignore[no-untyped-def]
        class Bomb:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return (exec, ("raise SystemExit('unpickled')",))

        np.save(tmp_path / "a.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
        np.savez(tmp_path / "a.npz", labels=np.array([Bomb()], dtype=object))
        for name in ("a.npy", "a.npz"):
            with pytest.raises(ValueError, match="cannot be read"):
                read_labels(tmp_path / name, 1, 2)
        for content in ({"labels": Bomb()}, {"labels": np.array([Bomb()], dtype=object)}):
            torch.save(content, tmp_path / "a.pt")
            with pytest.raises(ValueError, match="contains other objects, none of which was loaded; save it as"):
                read_labels(tmp_path / "a.pt", 1, 2)

    @pytest.mark.parametrize(
        ("name", "content", "key", "match"),
        [
            ("a.npy", np.zeros(3, int), None, r"expected 4 labels.*\(3,\)"),
            ("a.npy", np.zeros((4, 2), int), None, r"expected 4 labels.*\(4, 2\)"),
            ("a.npy", np.array([0, 1, 2, 3]), None, "expected labels in 0 to 2 in .*, got 0 to 3"),
            ("a.npy", np.array([0, 1, -1, 2]), None, "expected labels in 0 to 2 in .*, got -1"),
            ("a.npy", np.array([0, 1, 0.5, 2]), None, "whole numbers"),
            ("a.npy", np.array([0, 1, np.nan, 2]), None, "whole numbers"),
            ("a.npy", np.array(["0", "1", "1", "1"]), None, "whole numbers"),
            ("a.npz", {"x": np.zeros(4, int), "y": np.zeros(4, int)}, None, r"got arrays \['x', 'y'\]; set key"),
            ("a.npz", {"x": np.zeros(4, int)}, "z", r"expected an array 'z' in .*, got arrays \['x'\]"),
            ("a.npy", b"not an array", None, "cannot be read"),
            ("a.csv", b"", None, "expected 4 labels"),
            ("a.csv", b"0\n1\nx\n1\n", None, "expected numeric labels in .*, got 'x'"),
            ("a.csv", b"0\n1\n", "label", "got no header"),
            ("a.csv", b"a,b,c\n0,1,2\n", None, "3 columns"),
            ("a.csv", b"a,b\n0,1\n", "c", r"expected a column 'c' in .*, got columns \['a', 'b'\]"),
            ("a.csv", b"0,1\n0,2\n1,1\n2,1\n", None, "each once"),
            ("a.csv", b"0,1\n1\n", None, "expected 2 columns in every row of .*, got 1 in row 1"),
            ("a.json", b'{"x": [0], "y": [0]}', None, r"got arrays \['x', 'y'\]; set key"),
            ("a.json", b"[0, 1,", None, "cannot be read"),
            ("a.json", b'["cat", "dog", "cat", "dog"]', None, "whole numbers"),
            ("a.pt", b"no zip", None, "cannot be read|other objects"),
            ("a.txt", b"0\n", None, r"extension \.csv, \.json, \.npy, \.npz, \.pt, got"),
        ],
    )
    def test_refuses_with_one_sentence(self, tmp_path, name, content, key, match) -> None:  # type: ignore[no-untyped-def]
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, dict):
            np.savez(path, **content)
        else:
            np.save(path, content)
        with pytest.raises(ValueError, match=match) as error:
            read_labels(path, 4, 3, key)
        assert "\n" not in str(error.value)

    def test_says_that_the_file_is_missing(self, tmp_path) -> None:  # type: ignore[no-untyped-def]
        with pytest.raises(FileNotFoundError, match="got no such file"):
            read_labels(tmp_path / "a.npy", 4, 3)


class TestNoise:
    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"kind": "symetric"}, "expected a noise kind among .*, got 'symetric'"),
            ({"kind": "symmetric", "rate": 1.5}, r"\[0, 1\], got 1.5"),
            ({"kind": "symmetric", "rate": float("nan")}, "got nan"),
            ({"kind": "none", "rate": 0.5}, "expected no rate for noise of kind 'none', got 0.5"),
            ({"kind": "asymmetric", "rate": 0.5}, "expected a mapping for noise of kind 'asymmetric', got None"),
            (
                {"kind": "asymmetric", "rate": 0.5, "mapping": "cifar"},
                r"among \['cifar10', 'cifar100_blocks_of_five', 'cifar100_superclass'\], got 'cifar'",
            ),
            ({"kind": "file"}, "expected the path of a label file"),
            ({"kind": "transition"}, "expected a transition matrix for noise of kind 'transition' .* got none; set"),
            ({"kind": "transition", "rate": 0.2, "matrix": "a.csv"}, "no rate for noise of kind 'transition', got 0.2"),
            ({"kind": "pair", "matrix": "a.csv"}, "and for no other, got one for kind 'pair'; set"),
            ({"kind": "instance", "pixels": "bytes"}, "expected pixels 'raw' or 'normalized', got 'bytes'; choose"),
            ({"seed": -1}, "0 or more"),
        ],
    )
    def test_refuses(self, arguments, match) -> None:  # type: ignore[no-untyped-def]
        with pytest.raises(ValueError, match=match):
            Noise(**arguments)

    @pytest.mark.parametrize("labels", [torch.zeros(3), torch.zeros(3, 1).long(), torch.tensor([0, 10])], ids=str)
    def test_refuses_labels_that_are_none(self, labels: Tensor) -> None:
        with pytest.raises(ValueError, match=r"expected labels (in 0 to 9|of shape)"):
            Noise("pair", 0.5).apply(labels, 10, 0)
