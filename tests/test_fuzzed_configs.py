"""Some of the edits of ``fuzz_configs.py``, which makes hundreds."""

import lightning as L

from tests.full import FULL
from tests.fuzz_configs import attempt, field_recipes, fuzz, merged, names_the_key, recipes
from tests.test_configs import slim


def test_an_edited_config_can_run_or_is_refused_by_the_key(monkeypatch):
    slim(monkeypatch)
    monkeypatch.setattr(L.Trainer, "_fit_impl", lambda *args, **options: None)
    for recipe in recipes()[:: 80 if FULL else 240]:
        assert attempt(merged(recipe), "whole.yaml") == ("made", "")
    ends, wrong = fuzz(200 if FULL else 32, seed=14)
    assert not wrong, wrong[0]
    assert ends["refused"] > 3
    assert ends["made"] >= 3


def test_an_edited_config_of_a_data_set_with_real_noise_can_run_or_is_refused_by_the_key(monkeypatch):
    slim(monkeypatch)
    monkeypatch.setattr(L.Trainer, "_fit_impl", lambda *args, **options: None)
    assert {recipe[1].stem for recipe in field_recipes()} == {"animal10n", "clothing1m", "webvision"}
    for recipe in field_recipes()[::6]:
        assert attempt(merged(recipe), "whole.yaml") == ("made", "")
    ends, wrong = fuzz(8, seed=5, every=field_recipes())
    assert not wrong, wrong[0]
    assert ends["refused"] + ends["made"] == 8


def test_a_sentence_about_something_else_would_be_found():
    edit = "value model.init_args.sanm.init_args.mu = 7"
    assert names_the_key(edit, "sanm: expected mu in [0, 1], got 7")
    assert not names_the_key(edit, "sanm: something went wrong")
    assert not names_the_key("value data.init_args.flip = 7", "error: wrong\n  Given value: {'flip': 7}")


def test_what_no_class_says_itself_is_said_by_the_line(monkeypatch):
    """Types that the parser lets through, and errors that constructors of others raise."""
    monkeypatch.setattr(L.Trainer, "_fit_impl", lambda *args, **options: None)
    recipe = recipes()[0]
    for path, value, said in (
        (("trainer",), [1, 2], "expected options under 'trainer', got [1, 2]"),
        (("data", "init_args", "noise"), [1], "expected valid settings under 'data', got "),
        (("model", "init_args", "network_args"), {"wide": 4}, "network_args {'wide': 4}"),
        (("model", "init_args", "network"), None, "expected a network"),
        (("data", "init_args", "num_classes"), 10**18, "num_classes 1000000000000000000"),
        (("model", "init_args", "std"), [1.0, 1.0, float("nan")], "std (1.0, 1.0, nan)"),
    ):
        content = merged(recipe)
        holder = content
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = value
        end, sentence = attempt(content, "edited.yaml")
        assert end == "refused"
        assert said in sentence
        assert "Traceback" not in sentence
