"""The study file and its cells: configs in their order, options, folders, and one sentence for each mistake."""

from pathlib import Path

import pytest

from sanm_lightning.cli import FitParser
from sanm_lightning.command_line import config_paths
from sanm_lightning.command_line.config_paths import packaged
from sanm_lightning.study.cells import Cell, cells_of, settings_of
from sanm_lightning.study.schema import read_study
from tests.full import FULL


@pytest.fixture
def cells(write):
    return lambda **keys: cells_of(read_study(write(**keys)))


def configs(cell: Cell) -> list[str]:
    return [str(Path(path).relative_to("configs").with_suffix("")) for path in cell.configs]


class TestCells:
    def test_one_cell_per_combination_and_seed(self, cells):
        found = cells(noise=["sym50", "sym80"])
        assert len(found) == len({cell.folder for cell in found}) == 2 * 2 * 2 * 2
        assert found[0].folder == "cross_entropy/base/cifar10/sym50/seed1"

    def test_configs_are_in_the_documented_order(self, cells):
        found = cells(methods=["dividemix"], noise=["sym90"], sanm=["features"], overlays=["views/released"], seeds=[7])
        order = ["method/dividemix", "data/cifar10", "setting/dividemix/cifar10-sym90", "noise/sym90", "sanm/features"]
        assert configs(found[0]) == [*order, "views/released"]
        words = found[0].command(Path("out"))
        assert words[:3] == ["fit", "--config", "configs/method/dividemix.yaml"]
        assert words[words.index("--seed_everything") + 1] == "7"
        assert words[words.index("--trainer.default_root_dir") + 1] == f"out/{found[0].folder}"

    def test_the_setting_of_the_noise_precedes_that_of_the_set(self, cells):
        for noise, name in (("sym20", "cifar100-sym20"), ("sym80", "cifar100"), ("none", "cifar100")):
            (cell,) = cells(methods=["dividemix"], data=["cifar100"], noise=[noise], sanm=["base"], seeds=[1])
            assert f"setting/dividemix/{name}" in configs(cell)

    def test_options_of_grid_and_method_replace_those_of_the_study(self, cells):
        grid = {"options": {"trainer.max_epochs": 5}, "name": "longer"}
        found = cells(grids=[{}, grid], method_options={"elr": {"model.weight": 2.0}})
        assert [cell.epochs for cell in found if cell.seed == 1] == [3] * 4 + [5] * 4
        assert {cell.method for cell in found if cell.options.get("model.weight") == 2.0} == {"elr"}
        assert all(("longer/seed" in cell.folder) == (cell.epochs == 5) for cell in found)

    def test_epochs_are_those_of_the_configs_without_an_option(self, cells):
        (cell,) = cells(methods=["elr_plus"], data=["cifar100"], sanm=["base"], seeds=[1], options={})
        assert cell.epochs == 250

    def test_the_known_rate_is_that_of_the_noise(self, cells):
        found = cells(methods=["cdr", "elr"], noise=["sym20", "asym40"], known_rate=["cdr"])
        rates = {(cell.method, cell.noise): cell.options.get("model.noise_rate") for cell in found}
        assert rates == {("cdr", "sym20"): 0.2, ("cdr", "asym40"): 0.4, ("elr", "sym20"): None, ("elr", "asym40"): None}

    def test_the_known_rate_is_that_of_an_option_or_an_overlay(self, cells, tmp_path):
        keys = {"methods": ["cdr"], "known_rate": ["cdr"], "sanm": ["base"], "seeds": [1]}
        (found,) = cells(**keys, options={"data.noise.rate": 0.3})
        assert found.options["model.noise_rate"] == 0.3
        assert found.differences == ("other noise (data.noise.rate 0.3)",)
        (tmp_path / "rate.yaml").write_text("data: {init_args: {noise: {rate: 0.1}}}")
        (found,) = cells(**keys, options={}, overlays=[str(tmp_path / "rate.yaml")])
        assert found.options["model.noise_rate"] == 0.1
        with pytest.raises(ValueError, match="expected noise with a rate for the method 'cdr'"):
            cells(**keys, options={"data.noise": {"kind": "symmetric", "rate": 0.3}})

    def test_pretraining_of_own_configs_is_with_these_configs(self, cells, tmp_path):
        method, data = tmp_path / "mine.yaml", tmp_path / "cifar10.yaml"
        for path, kind in ((method, "method/c2d"), (data, "data/cifar10")):
            path.write_text((packaged() / f"configs/{kind}.yaml").read_text())
        keys = {"sanm": ["base"], "seeds": [1], "data": [str(data)]}
        first, second = cells(methods=[str(method)], pretraining={str(method): "simclr"}, **keys)
        assert first.folder == second.after == "simclr/base/cifar10/none/seed1"
        assert str(data) in first.configs and str(data) in second.configs and str(method) in second.configs

    def test_a_run_that_is_listed_and_provides_a_network_is_one_cell_in_any_order(self, cells):
        for methods in (["c2d", "simclr"], ["simclr", "c2d"]):
            found = cells(methods=methods, noise=["none"], pretraining={"c2d": "simclr"}, sanm=["base"], seeds=[1])
            assert sorted(cell.method for cell in found) == ["c2d", "simclr"]
            assert all(cell.listed for cell in found)
            assert found[0].method == "simclr"

    def test_pretraining_without_entries_is_none(self, cells):
        assert all(cell.after is None for cell in cells(pretraining=None))

    def test_pretraining_is_one_cell_per_data_before_those_that_use_it(self, cells):
        found = cells(methods=["c2d"], data=["cifar10", "cifar100"], pretraining={"c2d": "simclr"})
        first = [cell for cell in found if cell.method == "simclr"]
        assert [cell.folder for cell in first] == ["simclr/base/cifar10/none/seed1", "simclr/base/cifar100/none/seed1"]
        assert "setting/simclr/cifar10" in configs(first[0])
        for cell in found:
            if cell.method == "c2d":
                assert cell.after == f"simclr/base/{cell.data}/none/seed1"
                assert found.index(cell) > [other.folder for other in found].index(cell.after)
                assert f"out/{cell.after}/checkpoints/last.ckpt" in cell.command(Path("out"))

    def test_configs_of_the_user_are_named_by_their_stem(self, cells, tmp_path):
        own = tmp_path / "mine.yaml"
        own.write_text("{data: {class_path: CIFAR10, init_args: {batch_size: 64}}}")
        (cell,) = cells(methods=["elr"], data=[str(own)], sanm=["base"], seeds=[1])
        assert cell.folder == "elr/base/mine/sym50/seed1"
        assert cell.configs[1] == str(own)


class TestDifferences:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"trainer.max_epochs": 60}, ("60 epochs instead of 150",)),
            ({"trainer.max_epochs": 150}, ()),
            ({"data.max_train_samples": 5000}, ("5000 training images",)),
            ({"data.val_fraction": 0.2}, ("other selection split (data.val_fraction 0.2)",)),
            ({"data.noise.kind": "file"}, ("other noise (data.noise.kind file)",)),
            ({"model.network": "small_cnn"}, ("other network (model.network small_cnn)",)),
            ({"data.image_size": 16}, ("other data (data.image_size 16)",)),
            ({"model.weight": 9.0}, ("model.weight 9.0",)),
            ({"trainer.accelerator": "cpu", "data.num_workers": 2, "data.root": "here"}, ()),
        ],
    )
    def test_of_the_options_from_the_published_run(self, cells, options, said):
        cell = cells(methods=["elr"], options=options)[0]
        assert cell.differences == said

    def test_a_known_rate_is_none_and_another_rate_is_one(self, cells):
        told = cells(methods=["cdr"], known_rate=["cdr"], options={})[0]
        assert told.options["model.noise_rate"] == 0.5 and told.differences == ()
        other = cells(methods=["cdr"], options={"model.noise_rate": 0.9})[0]
        assert other.differences == ("model.noise_rate 0.9",)

    def test_more_devices_are_one(self, cells):
        assert cells(methods=["elr"], options={"trainer.devices": 8})[0].differences == ("trainer.devices 8",)

    def test_an_overlay_is_one(self, cells):
        assert cells(overlays=["views/released"], options={})[0].differences == ("overlay views/released",)

    def test_an_own_config_is_one_even_with_the_name_of_a_packaged_config(self, cells, tmp_path):
        packaged_text = (packaged() / "configs/method/elr.yaml").read_text()
        own = tmp_path / "elr.yaml"
        own.write_text(packaged_text.replace("max_epochs:", "max_epochs: 9 #"))
        (cell,) = cells(methods=[str(own)], sanm=["base"], seeds=[1], options={})
        assert (cell.method, cell.epochs, cell.differences) == ("elr", 9, (f"own config {own}",))
        local = Path("configs/method/elr.yaml")  # precedes that of the package
        local.parent.mkdir(parents=True)
        for text, differences in ((packaged_text, ()), (own.read_text(), (f"own config {local}",))):
            local.write_text(text)
            (cell,) = cells(methods=["elr"], sanm=["base"], seeds=[1], options={})
            assert cell.differences == differences

    def test_the_digest_ignores_the_machine_only(self, cells):
        def digest(**options):
            return cells(options=options)[0].digest

        assert digest() == digest(**{"data.root": "elsewhere", "trainer.accelerator": "cpu"})
        assert len({digest(), digest(**{"model.noise_rate": 0.1}), digest(**{"trainer.max_epochs": 4})}) == 3

    def test_the_digest_covers_the_content_of_configs(self, cells, tmp_path):
        own, seen = tmp_path / "mine.yaml", set()
        for size in (64, 32):
            own.write_text(f"{{data: {{class_path: CIFAR10, init_args: {{batch_size: {size}}}}}}}")
            seen.add(cells(data=[str(own)])[0].digest)
        assert len(seen) == 2


def test_settings_have_the_names_of_the_command_line():
    found = settings_of(["configs/method/elr.yaml", "configs/setting/elr/cifar100.yaml", "configs/noise/sym50.yaml"])
    assert found["model"] == "ELR" and found["model.optimizer"] == "torch.optim.SGD"
    assert found["data.noise.rate"] == 0.5
    assert isinstance(found["model.optimizer.lr"], float)


class TestMistakes:
    @pytest.mark.parametrize(
        ("keys", "sentence"),
        [
            ({"methods": ["elr_pls"]}, "expected method of a study to be one of configs/method, got 'elr_pls'; near: elr_plus"),
            ({"data": ["cifar"]}, "expected data of a study to be one of configs/data, got 'cifar'; near: cifar10"),
            ({"noise": ["sym51"]}, "expected noise of a study to be one of configs/noise, got 'sym51'; near: sym50"),
            ({"sanm": ["oracel"]}, "expected sanm of a study to be one of configs/sanm, got 'oracel'; near: oracle"),
            ({"overlays": ["view/released"]}, "expected overlay of a study .* got 'view/released'; near: views/released"),
            ({"data": ["no.yaml"]}, "expected an existing config, got 'no.yaml'; check the path"),
            ({"methods": []}, "expected one or more methods in .*own.yaml', got none; add them"),
            ({"seeds": []}, "expected one or more seeds in .*own.yaml', got none; add them"),
            ({"grids": [{"noise": []}]}, "expected one or more noise in .*own.yaml', got none; add them"),
            ({"seeds": ["1"]}, r"expected a list of integers for seeds in .*, got \['1'\]; write \[A, B\]"),
            ({"methods": "elr"}, r"expected a list of names for methods in .*, got 'elr'; write \[A, B\]"),
            ({"method": ["elr"]}, "expected a key of a study in .*, got 'method'; near: methods"),
            ({"options": ["a"]}, r"expected a mapping for options in .*, got \['a'\]; write name: value"),
            ({"options": {"seed_everything": 3}}, "expected options that a study does not set itself .*'seed_everything'"),
            ({"grids": [{}, {"methods": ["elr"]}]}, "expected one cell per folder, got two for 'elr/base/cifar10/sym50/seed1'"),
            ({"known_rate": ["co_teachng"]}, "expected methods of the study for known_rate in .*, got 'co_teachng'; choose"),
            ({"method_options": {"elrr": {}}}, "expected methods of the study for method_options in .* got 'elrr'; near: elr"),
            ({"grids": []}, r"expected a list of one or more grids in .*, got \[\]; write one entry per grid"),
            ({"published": ["a"]}, r"expected the name of a table for published in .*, got \['a'\]; write one name"),
            ({"name": "../x"}, "expected a name of letters, digits, .* got '../x'; correct it"),
            ({"methods": ["cdr"], "known_rate": ["cdr"], "noise": ["none"]}, "expected noise with a rate for the method 'cdr'"),
            ({"methods": ["../data/digits"]}, "expected method of a study to be one of configs/method, got '../data/digits';"),
            ({"options": {3: 4}}, r"expected options by their names on the command line .* got {3: 4}; write trainer.NAME:"),
            (
                {"options": {"trainer": {"max_epochs": 3}}},
                r"expected options by their names .*, got {'trainer': {'max_epochs': 3}}; write trainer\.NAME: value",
            ),
            ({"options": {"help": True}}, "expected options that a study does not set itself in .*, got 'help'"),
            ({"methods": ["c2d"], "pretraining": {"c2d": ["simclr"]}}, r"expected one method for each method of pretraining"),
            ({"seeds": [1, -1]}, r"expected seeds from 0 to 4294967295 in .*, got -1; choose other seeds"),
        ],
    )  # fmt: skip
    def test_are_answered_in_one_sentence(self, cells, keys, sentence):
        with pytest.raises(ValueError, match=sentence):
            cells(**keys)

    def test_a_missing_file(self):
        with pytest.raises(FileNotFoundError, match=r"expected an existing study, got 'no\.yaml'; check the path"):
            read_study("no.yaml")

    def test_a_file_that_is_not_yaml(self, tmp_path):
        (tmp_path / "bad.yaml").write_text("methods: [")
        with pytest.raises(ValueError, match=r"expected a study in valid YAML, got .*; correct the file"):
            read_study(tmp_path / "bad.yaml")

    @pytest.mark.parametrize(
        ("text", "got"),
        [
            ("methods: [elr]\nseeds: [1]\ndata: [digits]\nseeds: [1, 2]\n", "'seeds' in lines 2 and 4"),
            ("grids:\n- options:\n    data.root: a\n    data.root: b\n", r"'data\.root' in lines 3 and 4"),
        ],
    )  # fmt: skip
    def test_a_repeated_key(self, tmp_path, text, got):
        (tmp_path / "twice.yaml").write_text(text)
        with pytest.raises(
            ValueError, match=rf"expected each key of a mapping once in .*, got {got}; remove one of them"
        ):
            read_study(tmp_path / "twice.yaml")

    def test_two_pretrainings_in_one_folder(self, cells):
        grids = [{"sanm": ["base"]}, {"sanm": ["sanm"], "method_options": {"simclr": {"trainer.max_epochs": 9}}}]
        with pytest.raises(ValueError, match="got two for 'simclr/base/cifar10/none/seed1'"):
            cells(methods=["c2d"], pretraining={"c2d": "simclr"}, grids=grids)


STUDIES = sorted((packaged() / "configs" / "studies").glob("*.yaml"))
METHODS = {path.stem for path in (packaged() / "configs" / "method").glob("*.yaml")}


@pytest.fixture(scope="module")
def parser():
    found = FitParser().parser
    found.exit_on_error = False
    return found


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_packaged_study_names_what_exists(path):
    """It has as many cells as the lists say."""
    study = read_study(path)
    size = sum(
        len(grid.methods) * len(grid.sanm) * len(grid.data) * len(grid.noise) * len(grid.overlays) * len(grid.seeds)
        for grid in study.grids
    )
    cells = cells_of(study)
    assert size > 0
    assert len([cell for cell in cells if cell.folder not in {other.after for other in cells}]) == size
    assert all(cell.epochs for cell in cells)


PARSED = [path for path in STUDIES if FULL or path.stem == "animal10n"]
"""Studies whose commands are parsed: all of them in ``make test-all``."""


@pytest.mark.parametrize("path", PARSED, ids=lambda path: path.stem)
def test_the_commands_of_a_packaged_study_are_parsed(path, parser):
    """Each combination of configs and options, as ``sanm fit`` parses it."""
    commands = {(cell.configs, str(cell.options)): cell.command(Path("out")) for cell in cells_of(read_study(path))}
    for words in commands.values():
        assert words[0] == "fit"
        parser.parse_args(config_paths.resolve(words[1:]))
