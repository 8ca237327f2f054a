"""Miniature copies of the field's data sets in their official layouts: trained, tested, predicted and audited, streamed too."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from sanm_lightning import CIFAR10N, CIFAR100N, Animal10N, Clothing1M, CrossEntropy, Food101N, Noise, WebVision
from sanm_lightning.audit import LabelAudit, audit_set_of
from sanm_lightning.data import list_files
from sanm_lightning.data.cifar_n import coarse_of
from sanm_lightning.predictions import PredictionRecord
from sanm_lightning.run.record import RunRecord
from sanm_lightning.run.summary import summary_lines
from tests.methods.toy import same, trainer

SIDE = 16
SMALL = {"image_size": SIDE, "crop_padding": 1, "batch_size": 4, "eval_batch_size": 8, "seed": 3}


def draw(path: Path, gray: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, SIDE + 2), (gray % 256,) * 3).save(path)


def write(path: Path, *lines: str, end: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((end.join(lines) + end).encode())


def clothing(
    root: Path, images: str = "images/", prefix: tuple[str, str] = ("images/", "images/")
) -> dict[str, list[int]]:
    """Write the official lists, with Windows line ends and a space in every path; return the labels of each split."""
    labels = {"noisy_train": [n % 14 for n in range(28)], "clean_val": list(range(14)), "clean_test": list(range(14))}
    tables: dict[str, list[str]] = {"noisy": ["9/not used.jpg 3"], "clean": []}
    for number, (split, own) in enumerate(labels.items()):
        names = [f"{number}/{n % 3}/cloth {n}.jpg" for n in range(len(own))]
        for n, name in enumerate(names):
            draw(root / images / name, 8 * n)
        write(root / f"{split}_key_list.txt", *(prefix[0] + name for name in names), "", end="\r\n")
        rows = [f"{prefix[1]}{name} {label}" for name, label in zip(names, own, strict=True)]
        tables[split.partition("_")[0]] += rows[::-1]
    for kind, rows in tables.items():
        write(root / f"{kind}_label_kv.txt", *rows, end="\r\n")
    return labels


def animals(root: Path) -> None:
    for folder, count in (("training", 20), ("testing", 10)):
        for n in range(count):
            draw(root / folder / f"{n % 10}_my animal {n}.jpg", 10 * n)


def webvision(root: Path) -> None:
    ids = [f"n0144{n:04d}" for n in range(1000)]
    write(root / "info" / "synsets.txt", *(f"{name} thing {n}, other" for n, name in enumerate(ids)))
    train = [f"google/q{n:04d}/pic {n}.jpg {n % 8}" for n in range(24)]
    test = [f"val{n:06d}.jpg {n % 8}" for n in range(16)]
    write(root / "info" / "train_filelist_google.txt", *train, end="\r\n")
    write(root / "info" / "val_filelist.txt", *test)
    for line in train:
        if int(line.split()[-1]) < 7:
            draw(root / line.rpartition(" ")[0])
    for line in test:
        draw(root / "val_images_256" / line.split()[0])
    for label, name in enumerate(ids[:7]):
        draw(root / "imagenet" / "val" / (name if label % 2 else str(label)) / f"ILSVRC2012_val_{label:08d}.JPEG")


def food(root: Path) -> None:
    names = ["apple_pie", "baklava", "churros"]
    noisy, clean = root / "Food-101N_release", root / "food-101"
    write(noisy / "meta" / "classes.txt", "class_name", *names)
    keys = [f"{names[n % 3]}/web {n}.jpg" for n in range(15)]
    write(noisy / "meta" / "imagelist.tsv", "class_name/key", *keys)
    for name, rows in (("verified_train", keys[:4]), ("verified_val", keys[10:])):
        verdicts = [f"{key}\t{int(n != 1)}" for n, key in enumerate(rows)]
        write(noisy / "meta" / f"{name}.tsv", "class_name/key\tverification_label", *verdicts)
    for n, key in enumerate(keys):
        draw(noisy / "images" / key, 10 * n)
    test = [f"{name}/{n}" for n in range(2) for name in names]
    write(clean / "meta" / "test.txt", *test)
    for key in test:
        draw(clean / "images" / f"{key}.jpg")


def human(path: Path, **arrays: Any) -> None:
    torch.save(
        {name: values if isinstance(values, list) else np.asarray(values) for name, values in arrays.items()}, path
    )


def cifar10n(root: Path) -> None:
    clean = np.repeat(np.arange(10), 3)
    for label, name in enumerate(CIFAR10N.names):
        for n in range(3):
            draw(root / "train" / name / f"{n:04d}.jpg", 10 * label + n)
        draw(root / "test" / name / "0000.jpg")
    arrays = {
        key: np.where(np.arange(30) % 5 == n, (clean + 1) % 10, clean) for n, key in enumerate(CIFAR10N.keys.values())
    }
    np.savez(root / "cifar10n.npz", clean_label=clean, **{key: value.astype(np.uint8) for key, value in arrays.items()})


def official(root: Path, kind: Any) -> tuple[Any, dict[str, Any]]:
    """Write CIFAR in torchvision's layout, and the human labels as numpy arrays and lists; return clean and noisy."""
    folder, classes = root / kind.base_folder, 10 if kind is torchvision.datasets.CIFAR10 else 100
    folder.mkdir(parents=True)
    key, names = ("labels", "label_names") if classes == 10 else ("fine_labels", "fine_label_names")
    for name, _ in (*kind.train_list, *kind.test_list):
        content = {"data": np.zeros((classes, 3072), np.uint8), key: list(range(classes))}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({names: [str(c) for c in range(classes)]}))
    clean = np.tile(np.arange(classes), len(kind.train_list))
    coarse = coarse_of().numpy()[clean] if classes == 100 else clean
    arrays = {"clean_label": clean, "worse_label": (clean + 1) % 10, "noisy_label": (clean + 1) % 100}
    arrays |= {"clean_coarse_label": coarse.tolist(), "noisy_coarse_label": ((coarse + 1) % 20).tolist()}
    human(root / f"CIFAR-{classes}_human.pt", **arrays)
    return clean, arrays


@pytest.fixture
def other_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision read files of CIFAR with other check sums than those of the published ones."""
    for kind in (torchvision.datasets.CIFAR10, torchvision.datasets.CIFAR100):
        monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *args: True)


SETS = {
    "Animal10N": (animals, lambda root, **options: Animal10N(str(root), **SMALL, **options)),
    "Clothing1M": (
        clothing,
        lambda root, **options: Clothing1M(str(root), decode_size=18, samples_per_epoch=28, **SMALL, **options),
    ),
    "WebVision": (webvision, lambda root, **options: WebVision(str(root), 7, decode_size=18, **SMALL, **options)),
    "Food101N": (food, lambda root, **options: Food101N(str(root), decode_size=18, **SMALL, **options)),
    "CIFAR10N": (
        cifar10n,
        lambda root, **options: CIFAR10N(str(root), **{k: v for k, v in SMALL.items() if k != "image_size"}, **options),
    ),
    "CIFAR100N": (
        lambda root: official(root, torchvision.datasets.CIFAR100),
        lambda root, **options: CIFAR100N(
            str(root), **{k: v for k, v in SMALL.items() if k != "image_size"}, **options
        ),
    ),
}


def one_step(data: Any, folder: Path) -> tuple[CrossEntropy, Any]:
    torch.manual_seed(0)
    size = data.image_size[0]
    module = CrossEntropy(data.num_classes, (size, size), "small_cnn", {"width": 4}, warmup_epochs=0)
    callbacks = [LabelAudit(), PredictionRecord()]
    run = trainer(1, limit_train_batches=1, default_root_dir=str(folder), callbacks=callbacks)
    run.fit(module, data)
    return module, run


@pytest.mark.parametrize("name", SETS)
@pytest.mark.usefixtures("other_files")
def test_an_official_layout_is_trained_tested_predicted_and_audited_also_streamed(name: str, tmp_path: Path) -> None:
    create, make = SETS[name]
    create(tmp_path / "data")
    resident, _ = one_step(make(tmp_path / "data"), tmp_path / "resident")
    data = make(tmp_path / "data", resident_bytes=0, num_workers=2)
    module, run = one_step(data, tmp_path / "streamed")
    assert run.global_step == 1 and data.store("train").resident is None
    assert same(module.network, resident.network)
    found = {key for result in run.test(module, data, verbose=False) for key in result}
    tops = ("acc", "acc_top5") if name == "WebVision" else ("acc",)
    assert found == {f"{split}/{top}" for split in data.test_names for top in tops}
    run.predict(module, data)
    rows = (tmp_path / "streamed" / "predictions.csv").read_text().splitlines()[1:]
    assert len(rows) == sum(data.split_size(split) for split in data.test_names)
    issues = (tmp_path / "streamed" / "label_issues.csv").read_text().splitlines()
    audited = audit_set_of(data)
    assert len(issues) == data.num_samples + 1 and len(audited.labels) == data.num_samples
    if name == "CIFAR100N":
        assert issues[0].startswith("index,") and audited.paths is None
    else:
        assert issues[0].startswith("path,") and (tmp_path / "data" / audited.paths[0]).is_file()


class TestClothing1M:
    @pytest.mark.parametrize("prefix", [("images/", "images/"), ("", "images/"), ("images/", "")], ids="".join)
    @pytest.mark.parametrize("images", ["images/", ""])
    def test_official_lists_with_and_without_the_prefix(self, tmp_path: Path, prefix: Any, images: str) -> None:
        labels = clothing(tmp_path, images, prefix)
        data = Clothing1M(str(tmp_path), decode_size=18, **SMALL)
        data.setup()
        assert data.labels.tolist() == labels["noisy_train"] and data.true_labels is None
        assert data.table("val").labels.tolist() == labels["clean_val"]
        assert data.table("test").labels.tolist() == labels["clean_test"]
        assert data.sample_paths()[4] == f"{images}0/1/cloth 4.jpg"
        assert (data.batch("train", torch.tensor([4])).images[0, :, 8, 8] * 255).round().tolist() == [32, 32, 32]

    def test_lists_of_paths_with_labels(self, tmp_path: Path) -> None:
        clothing(tmp_path)
        for old in tmp_path.glob("*.txt"):
            old.unlink()
        for split, number in (("noisy_train", 0), ("clean_val", 1), ("clean_test", 2)):
            write(
                tmp_path / "annotations" / f"{split}.txt", *(f"images/{number}/{n}/cloth {n}.jpg {n}" for n in range(3))
            )
        data = Clothing1M(str(tmp_path), decode_size=18, **SMALL)
        data.setup()
        assert data.labels.tolist() == [0, 1, 2] and data.own_splits == ("val", "test")

    def test_each_network_samples_a_balanced_subset_of_its_own_anew(self, tmp_path: Path) -> None:
        clothing(tmp_path)
        data = Clothing1M(str(tmp_path), decode_size=18, samples_per_epoch=14, **SMALL)
        pools = [data.epoch_pool(epoch, peer) for epoch in (0, 1) for peer in (0, 1)]
        assert all(sorted(data.labels[pool].tolist()) == list(range(14)) for pool in pools)
        assert len({tuple(pool.tolist()) for pool in pools}) == 4

    @pytest.mark.parametrize(
        ("file", "line", "match"),
        [
            (
                "noisy_label_kv.txt",
                "images/a b.jpg",
                r"lines 'path label' in .*, got another line 30, 'images/a b\.jpg'; corr",
            ),
            ("noisy_label_kv.txt", "images/a.jpg 14", r"labels in 0 to 13 in .*, got 14 for 'images/a\.jpg'; correct"),
            (
                "clean_label_kv.txt",
                "1/0/cloth 0.jpg 9",
                r"one label per path in .*kv\.txt', got two for '1/0/cloth 0\.jpg'",
            ),
            (
                "noisy_train_key_list.txt",
                "images/new.jpg",
                r"each of the 29 paths .* got 1 without one \(first: 'new\.jpg'\)",
            ),
        ],
    )
    def test_refuses_a_damaged_list(self, tmp_path: Path, file: str, line: str, match: str) -> None:
        clothing(tmp_path)
        with (tmp_path / file).open("a") as list_file:
            list_file.write(line + "\n")
        with pytest.raises(ValueError, match=match) as error:
            Clothing1M(str(tmp_path), decode_size=18, **SMALL).setup()
        assert "\n" not in str(error.value)

    def test_missing_images_are_refused_or_left_out(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        clothing(tmp_path)
        (tmp_path / "images" / "0" / "1" / "cloth 4.jpg").unlink()
        with pytest.raises(
            FileNotFoundError,
            match=r"the 28 images of the train split .* got 1 missing files \(first: 'images/0/1/cloth 4\.jpg'\); unpack the",
        ):
            Clothing1M(str(tmp_path), decode_size=18, **SMALL).setup()
        data = Clothing1M(str(tmp_path), decode_size=18, skip_missing=True, **SMALL)
        with caplog.at_level("INFO", "lightning.pytorch"):
            assert data.num_samples == 27
        assert "1 missing files left out (first: 'images/0/1/cloth 4.jpg')" in caplog.text

    def test_a_path_that_is_listed_twice_is_used_once(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        labels = clothing(tmp_path)["noisy_train"]
        with (tmp_path / "noisy_train_key_list.txt").open("a") as file:
            file.write("images/0/1/cloth 4.jpg\n")
        data = Clothing1M(str(tmp_path), decode_size=18, **SMALL)
        with caplog.at_level("INFO", "lightning.pytorch"):
            assert data.labels.tolist() == labels
        assert "1 paths listed again left out (first: 'images/0/1/cloth 4.jpg')" in caplog.text

    def test_a_path_that_leaves_the_root_is_refused(self, tmp_path: Path) -> None:
        clothing(tmp_path, "", ("", ""))
        for file in (tmp_path / "noisy_train_key_list.txt", tmp_path / "noisy_label_kv.txt"):
            file.write_bytes(file.read_bytes().replace(b"0/1/cloth 4", b"../cloth 4"))
        with pytest.raises(ValueError, match=r"expected paths inside of .*, got one in '\.\.'; correct the list"):
            Clothing1M(str(tmp_path), decode_size=18, **SMALL).setup()

    def test_says_which_list_is_missing_and_where_to_get_it(self, tmp_path: Path) -> None:
        clothing(tmp_path)
        (tmp_path / "clean_label_kv.txt").unlink()
        with pytest.raises(
            FileNotFoundError, match=r"expected the lists .*missing: clean_label_kv\.txt\).*Cysu/noisy_label"
        ):
            Clothing1M(str(tmp_path), **SMALL).setup()


class TestLists:
    """Files that are longer than the part that is parsed at once."""

    @pytest.fixture(autouse=True)
    def _short_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(list_files, "LINES_AT_ONCE", 3)

    def test_every_line_is_read_in_its_order(self, tmp_path: Path) -> None:
        write(tmp_path / "pairs.txt", *(f"a b/{n}.jpg\t{n % 5}" if n % 4 else "" for n in range(20)), end="\r\n")
        listed = list_files.read_pairs(tmp_path / "pairs.txt", 5)
        assert [path.decode() for path in listed.paths.tolist()] == [f"a b/{n}.jpg" for n in range(20) if n % 4]
        assert listed.labels.tolist() == [n % 5 for n in range(20) if n % 4]
        below = list_files.read_pairs(tmp_path / "pairs.txt", 3, below=True)
        assert below.labels.tolist() == [n % 5 for n in range(20) if n % 4 and n % 5 < 3]

    def test_a_broken_line_is_named_by_its_number_in_the_file(self, tmp_path: Path) -> None:
        for label in ("zero", "--1"):
            write(tmp_path / "pairs.txt", *(f"{n}.jpg 0" for n in range(7)), f"8.jpg {label}")
            with pytest.raises(ValueError, match=rf"got another line 8, '8\.jpg {label}'; correct or remove it"):
                list_files.read_pairs(tmp_path / "pairs.txt", 5)

    def test_a_byte_order_mark_is_no_part_of_a_path(self, tmp_path: Path) -> None:
        write(tmp_path / "keys.txt", "\ufeffa.jpg", "b.jpg")
        assert list_files.read_keys(tmp_path / "keys.txt").tolist() == [b"a.jpg", b"b.jpg"]

    def test_an_empty_file_is_refused(self, tmp_path: Path) -> None:
        write(tmp_path / "keys.txt", "", " ")
        with pytest.raises(ValueError, match=r"expected one image per line in .*keys\.txt', got none; check the file"):
            list_files.read_keys(tmp_path / "keys.txt")


class TestAnimal10N:
    def test_labels_are_in_the_file_names(self, tmp_path: Path) -> None:
        animals(tmp_path)
        data = Animal10N(str(tmp_path), **SMALL)
        assert data.labels.tolist() == [n for n in range(10) for _ in (0, 1)]
        assert data.class_names[9] == "guinea_pig" and data.table("test").labels.tolist() == list(range(10))

    @pytest.mark.parametrize("name", ["10_x.jpg", "cat.jpg", "_3.jpg"])
    def test_refuses_a_name_without_a_label(self, tmp_path: Path, name: str) -> None:
        animals(tmp_path)
        draw(tmp_path / "training" / name)
        with pytest.raises(
            ValueError, match=rf"labels 0 to 9 in .*, got 1 others \(first: 'training/{name}'\); unpack"
        ):
            Animal10N(str(tmp_path), **SMALL).setup()

    def test_says_what_is_missing_and_where_to_get_it(self, tmp_path: Path) -> None:
        draw(tmp_path / "training" / "0_a.jpg")
        with pytest.raises(
            FileNotFoundError, match=r"expected training, testing in .*, got none .*'testing'; unpack .*https"
        ):
            Animal10N(str(tmp_path), **SMALL).setup()


class TestWebVision:
    def test_the_first_classes_and_two_test_sets(self, tmp_path: Path) -> None:
        webvision(tmp_path)
        data = WebVision(str(tmp_path), 7, decode_size=18, **SMALL)
        data.setup()
        assert data.labels.tolist() == [n % 8 for n in range(24) if n % 8 < 7]
        assert data.test_names == ["test", "imagenet"] == data.eval_names
        assert data.table("imagenet").labels.tolist() == list(range(7)) and data.split_size("test") == 14
        assert data.class_names[1] == "n01440001 thing 1, other" and data.num_classes == 7

    def test_results_have_the_accuracies_on_both_test_sets_also_after_resuming(self, tmp_path: Path) -> None:
        webvision(tmp_path / "data")
        data = WebVision(str(tmp_path / "data"), 7, decode_size=18, **SMALL)
        torch.manual_seed(0)
        record, module = RunRecord(), CrossEntropy(7, (SIDE, SIDE), "small_cnn", {"width": 4}, warmup_epochs=0)
        run = trainer(2, limit_train_batches=1, default_root_dir=str(tmp_path), callbacks=[record])
        run.fit(module, data)
        results = json.loads((tmp_path / "results.json").read_text())
        for split in ("test", "imagenet"):
            for key, name in (("accuracy", "acc"), ("accuracy_top5", "acc_top5")):
                found = float(run.callback_metrics[f"{split}/{name}"])
                series = record.accuracies if (split, name) == ("test", "acc") else record.further[f"{split}/{name}"]
                assert results[f"{split}_{key}_last"] == found == series[1]
                assert results[f"{split}_{key}_best"] == max(series.values())
        again = RunRecord()
        again.load_state_dict(record.state_dict())
        assert again.further == record.further and len(again.further["imagenet/acc_top5"]) == 2
        said = summary_lines(run, module, tmp_path, results)
        assert [line.partition(":")[0] for line in said[:2]] == ["accuracy, test set", "accuracy, test set imagenet"]

    def test_the_second_test_set_is_served_by_position_and_audited(self, tmp_path: Path) -> None:
        webvision(tmp_path)
        data = WebVision(str(tmp_path), 7, decode_size=18, resident_bytes=0, **SMALL)
        batch = data.batch("imagenet", torch.tensor([5, 2]))
        assert batch.labels.tolist() == [5, 2] and batch.images.shape == (2, 3, SIDE, SIDE)
        assert batch.true_labels is None
        audited = audit_set_of(data, "imagenet")
        assert audited.splits == ["imagenet"] * 7 and audited.labels.tolist() == list(range(7))
        assert audited.paths is not None and (tmp_path / audited.paths[3]).is_file()
        for unknown in (lambda: data.batch("imagenot", torch.tensor([0])), lambda: audit_set_of(data, "imagenot")):
            with pytest.raises(
                ValueError, match=r"the split 'train', 'val', 'test' or 'imagenet', got 'imagenot'; choose"
            ):
                unknown()

    def test_top_5_counts_labels_among_the_five_most_probable(self, tmp_path: Path) -> None:
        webvision(tmp_path)
        data = WebVision(str(tmp_path), 7, decode_size=18, resident_bytes=2**30, **SMALL)

        class Fixed(CrossEntropy):
            def forward(self, images: torch.Tensor) -> torch.Tensor:
                return torch.arange(7.0, device=images.device).flip(0).expand(len(images), 7)

        module = Fixed(7, (SIDE, SIDE), "small_cnn", {"width": 4})
        results = trainer(1).test(module, data, verbose=False)
        assert results[1] == {"imagenet/acc": pytest.approx(1 / 7), "imagenet/acc_top5": pytest.approx(5 / 7)}

    def test_imagenet_may_be_left_out_but_not_be_incomplete(self, tmp_path: Path) -> None:
        webvision(tmp_path)
        assert WebVision(str(tmp_path), 7, imagenet=None).own_splits == ("test",)
        with pytest.raises(
            FileNotFoundError, match=r"a folder 'n01440007' or '7' .* got none; .* --data\.imagenet null"
        ):
            WebVision(str(tmp_path), 8, skip_missing=True, decode_size=18, **SMALL).setup("test")

    def test_says_what_is_missing_and_where_to_get_it(self, tmp_path: Path) -> None:
        webvision(tmp_path)
        (tmp_path / "info" / "val_filelist.txt").unlink()
        with pytest.raises(
            FileNotFoundError, match=r"got none of the name 'info/val_filelist\.txt'; unpack .*WebVision 1\.0"
        ):
            WebVision(str(tmp_path), 7, decode_size=18, **SMALL).setup()


class TestFood101N:
    def test_verified_images_are_held_out_and_correct_ones_validate(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        food(tmp_path)
        data = Food101N(str(tmp_path), decode_size=18, **SMALL)
        with caplog.at_level("INFO", "lightning.pytorch"):
            data.setup()
        assert data.labels.tolist() == [n % 3 for n in range(10)]
        assert data.table("val").labels.tolist() == [n % 3 for n in (10, 12, 13, 14)]
        assert data.table("test").labels.tolist() == [0, 1, 2, 0, 1, 2]
        assert data.sample_paths("test")[0] == "food-101/images/apple_pie/0.jpg"
        assert "25.00% of 4 verified training labels are wrong" in caplog.text
        whole = Food101N(str(tmp_path), verified_val=False, decode_size=18, **SMALL)
        assert whole.num_samples == 15 and whole.own_splits == ("test",)

    def test_refuses_an_unknown_class_and_says_what_is_missing(self, tmp_path: Path) -> None:
        food(tmp_path)
        listing = tmp_path / "Food-101N_release" / "meta" / "imagelist.tsv"
        listing.write_text(listing.read_text() + "pizza/1.jpg\n")
        with pytest.raises(ValueError, match=r"the 3 classes of .* got 1 others \(first: 'pizza/1\.jpg'\); correct"):
            Food101N(str(tmp_path), decode_size=18, **SMALL).setup()
        (tmp_path / "food-101" / "meta" / "test.txt").unlink()
        with pytest.raises(
            FileNotFoundError, match=r"got none of the name 'food-101/meta/test\.txt'; unpack Food-101N_rel"
        ):
            Food101N(str(tmp_path), decode_size=18, **SMALL).setup()


class TestCIFARN:
    @pytest.mark.parametrize("labels", CIFAR10N.keys)
    def test_jpeg_files_with_the_labels_of_the_npz(self, tmp_path: Path, labels: Any) -> None:
        cifar10n(tmp_path)
        data = CIFAR10N(str(tmp_path), labels, seed=0)
        arrays = np.load(tmp_path / "cifar10n.npz")
        assert data.labels.tolist() == arrays[CIFAR10N.keys[labels]].tolist()
        assert data.true_labels.tolist() == arrays["clean_label"].tolist()
        assert data.measured_noise_rate == 0.2 and data.noise_kind == f"human_{labels}"

    @pytest.mark.usefixtures("other_files")
    def test_the_official_files(self, tmp_path: Path) -> None:
        clean, arrays = official(tmp_path, torchvision.datasets.CIFAR10)
        data = CIFAR10N(str(tmp_path))
        assert data.labels.tolist() == arrays["worse_label"].tolist() and data.true_labels.tolist() == clean.tolist()
        clean, arrays = official(tmp_path, torchvision.datasets.CIFAR100)
        fine, coarse = CIFAR100N(str(tmp_path)), CIFAR100N(str(tmp_path), "noisy_coarse")
        assert fine.labels.tolist() == arrays["noisy_label"].tolist() and fine.num_classes == 100
        assert coarse.labels.tolist() == arrays["noisy_coarse_label"] and coarse.num_classes == 20
        assert coarse.true_labels.tolist() == arrays["clean_coarse_label"]
        assert coarse.table("test").labels.tolist() == coarse_of().tolist()

    def test_labels_of_other_images_or_of_another_order_are_refused(self, tmp_path: Path) -> None:
        cifar10n(tmp_path)
        arrays = dict(np.load(tmp_path / "cifar10n.npz"))
        arrays["clean_label"][[0, 29]] = arrays["clean_label"][[29, 0]]
        np.savez(tmp_path / "other.npz", **arrays)
        with pytest.raises(
            ValueError, match=r"expected the true labels in .*other\.npz' .* got 2 different ones of 30; use"
        ):
            CIFAR10N(str(tmp_path), file=str(tmp_path / "other.npz")).setup()

    def test_pickled_code_is_not_run(self, tmp_path: Path) -> None:
        class Bomb:
            def __reduce__(self) -> Any:
                return (exec, ("raise SystemExit('unpickled')",))

        cifar10n(tmp_path)
        torch.save({"clean_label": Bomb()}, tmp_path / "CIFAR-10_human.pt")
        with pytest.raises(
            ValueError, match=r"got a file that contains other objects, none of which was loaded; save it"
        ):
            CIFAR10N(str(tmp_path)).setup()

    def test_refuses_other_noise_unknown_labels_and_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(
            ValueError, match=r"expected no noise in addition to .*CIFAR10N, got noise of kind 'pair'; omit"
        ):
            CIFAR10N(str(tmp_path), noise=Noise("pair", 0.5))
        with pytest.raises(ValueError, match=r"expected labels among \['noisy', 'noisy_coarse'\], got 'worst'; choose"):
            CIFAR100N(str(tmp_path), "worst")  # type: ignore[arg-type]
        with pytest.raises(
            FileNotFoundError, match=r"human labels of CIFAR10N .* got no such file; copy .* --data\.file"
        ):
            CIFAR10N(str(tmp_path)).setup()
