"""Parts that methods share: batches of a set, epochs of a stage and of a run, the default label quality."""

import pytest
import torch

from sanm_lightning import methods
from sanm_lightning.batch import EpochPlan
from sanm_lightning.callbacks import Stage
from sanm_lightning.functional import repeated_draw
from sanm_lightning.methods import CrossEntropy, NoisyLabelModule
from sanm_lightning.methods.batches import permuted_batches
from sanm_lightning.per_sample import LabelStore
from tests.methods.reference import SMALL, batch, ready
from tests.methods.test_every_method import METHODS


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("size", "world_size"), [(2, 1), (2, 3), (9, 2)])
def test_processes_share_the_permutations_of_a_set(size, world_size):
    """Step by step, process by process, one position at a time."""
    members, steps = torch.tensor([3, 5, 7, 11, 13]), 4
    plans = [EpochPlan(0, steps, 99, 20, rank, world_size, lambda _: members) for rank in range(world_size)]
    rows = [permuted_batches(plan, members, size, seeded()) for plan in plans]
    order = repeated_draw(members, world_size * steps * size, seeded()).tolist()
    for rank, found in enumerate(rows):
        assert found.shape == (steps, size)
        for step in range(steps):
            for place in range(size):
                assert int(found[step, place]) == order[(step * size + place) * world_size + rank]
    assert set(order[:5]) == set(members.tolist())


class Two(CrossEntropy):
    def stages(self):
        return [Stage("warmup", 2), Stage("main")]


def test_epochs_are_counted_from_the_beginning_of_the_stage():
    module = Two(**SMALL)
    assert [ready(module, epoch).stage_epoch for epoch in range(5)] == [0, 1, 0, 1, 2]


def test_a_run_without_an_end_has_no_number_of_epochs():
    module = CrossEntropy(**SMALL, warmup_epochs=4)
    assert module.total_epochs is None
    assert ready(module, max_epochs=-1).total_epochs is None
    assert module.fraction_of_run(130, 250) == 130
    assert ready(module, max_epochs=20).total_epochs == 20


@pytest.mark.parametrize(("after", "epochs"), [(None, 8), (10, 5), (30, 0)])
def test_a_fraction_of_a_run_is_that_of_the_epochs_after_the_warm_up_or_a_number(after, epochs):
    module = ready(CrossEntropy(**SMALL, warmup_epochs=4), max_epochs=20)
    assert module.fraction_of_run(1, 2, after) == epochs


class Judging(CrossEntropy):
    def __init__(self, **options):
        super().__init__(**options)
        self.judged = LabelStore()


def test_the_label_quality_is_that_of_the_label_store_once_it_is_written():
    module = ready(Judging(**SMALL))
    module.judged.write("given_quality", torch.tensor([2, 3]), torch.tensor([0.25, 0.5]))
    assert module.label_quality() is None  # of a method that estimates none
    module = ready(Judging(**SMALL))
    module.estimates_quality = True
    assert module.label_quality() is None
    module.judged.write("given_quality", torch.tensor([2, 3]), torch.tensor([0.25, 0.5]))
    assert module.label_quality()[:5].tolist() == [1.0, 1.0, 0.25, 0.5, 1.0]


@pytest.mark.parametrize(
    "name", [n for n in METHODS if getattr(methods, n).label_quality is NoisyLabelModule.label_quality]
)
def test_a_method_with_the_default_label_quality_has_one_label_store_or_estimates_none(name):
    options = {key: value for key, value in METHODS[name].items() if key != "pretrained"}
    module = getattr(methods, name)(**{**SMALL, **options})
    stores = [part for part in module.children() if isinstance(part, LabelStore)]
    assert len(stores) == (1 if module.estimates_quality else 0)


def test_the_unmasked_logits_have_no_gradient():
    module, given = ready(CrossEntropy(**SMALL)), batch()
    out = module.learn(given, module.one_hot(given.labels))
    assert out.logits.requires_grad
    assert not out.unmasked_logits().requires_grad
    assert torch.equal(out.unmasked_logits(), out.logits.detach())
