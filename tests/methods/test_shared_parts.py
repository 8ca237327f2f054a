"""Parts that methods share: batches of a set, epochs of a stage and of a run, the default label quality."""

import pytest
import torch

from sanm_lightning import methods
from sanm_lightning.batch import EpochPlan
from sanm_lightning.callbacks import Stage
from sanm_lightning.functional import repeated_draw
from sanm_lightning.methods import CrossEntropy, NoisyLabelModule
from sanm_lightning.methods.batches import permuted_batches, selected_batches
from sanm_lightning.per_sample import LabelStore
from sanm_lightning.sanm.inference import infer
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


@pytest.mark.parametrize(("batch_size", "world_size", "size"), [(4, 1, 4), (4, 2, 3), (9, 1, 5), (9, 3, 2)])
def test_a_small_pool_is_shared_by_the_processes(batch_size, world_size, size):
    plan = EpochPlan(0, 2, batch_size, 20, 0, world_size, lambda _: torch.arange(5))
    assert plan.step_size(plan.pool(0)) == size


@pytest.mark.parametrize("some", [True, False])
def test_selected_samples_of_the_pool_come_in_rounds_and_all_of_it_without_any(some):
    plan = EpochPlan(0, 3, 2, 20, 0, 1, lambda _: torch.tensor([3, 5, 7, 11]))
    selected = torch.zeros(20, dtype=torch.bool)
    selected[2 if not some else 3], selected[9], selected[11] = True, True, some
    rows = selected_batches(plan, selected, seeded())
    wanted = torch.tensor([3, 11] if some else [3, 5, 7, 11])
    assert torch.equal(rows, permuted_batches(plan, wanted, 2, seeded()))


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


def test_the_elapsed_epochs_count_the_steps_of_the_current_one():
    module = ready(Two(**SMALL), 3)
    module.trainer.fit_loop.max_batches = 8
    assert [module.elapsed_epochs(step) for step in (0, 2, 7)] == [1.0, 1.25, 1.875]


def test_the_streams_of_an_epoch_are_those_of_the_first_one_with_a_fixed_order():
    module = ready(Two(**SMALL))
    first, fourth = (EpochPlan(epoch, 2, 4, 20, 0, 1, lambda _: torch.arange(5)) for epoch in (0, 3))
    drawn = [torch.rand(9, generator=module.epoch_stream(plan, "draw")).tolist() for plan in (first, first, fourth)]
    assert drawn[0] == drawn[1] != drawn[2]
    fixed = module.epoch_stream(fourth._replace(fixed_order=True), "draw")
    assert torch.rand(9, generator=fixed).tolist() == drawn[0]
    assert torch.rand(9, generator=module.epoch_stream(first, "draw", 1)).tolist() != drawn[0]
    assert torch.rand(9, generator=module.epoch_stream(first, "other")).tolist() != drawn[0]


def test_batches_of_other_forms_are_converted_and_need_an_index():
    module, given = ready(Two(**SMALL)), batch()
    read, index = module.indexed({"image": given.images, "y": given.labels, "index": given.index})
    assert torch.equal(read.images, given.images)
    assert torch.equal(index, given.index)
    with pytest.raises(ValueError, match=r"expected batches with an index for Two, .* got none; use a data module"):
        module.indexed((given.images, given.labels))


def test_a_network_infers_in_evaluation_mode_without_gradient():
    module, given = ready(CrossEntropy(**SMALL)), batch()
    expected = module.network(given.images).detach()
    module.train()
    maps, logits = infer(module.network, given.images)
    assert not logits.requires_grad
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(module.network.eval().forward_head(maps), expected)
    module.train()
    together = infer(module.network, given.images, batch_statistics=True)[1]
    assert not torch.allclose(together, expected)
    torch.testing.assert_close(together, module.network(given.images).detach())


def test_the_unmasked_logits_have_no_gradient():
    module, given = ready(CrossEntropy(**SMALL)), batch()
    out = module.learn(given, module.one_hot(given.labels))
    assert out.logits.requires_grad
    assert not out.unmasked_logits().requires_grad
    assert torch.equal(out.unmasked_logits(), out.logits.detach())


def test_features_of_unmasked_images_are_those_of_a_pass_that_was_asked_for_them():
    module, given = ready(CrossEntropy(**SMALL)), batch()
    out = module.learn(given, module.one_hot(given.labels), unmasked=True)
    assert torch.equal(out.unmasked_maps(), out.features)
    plain = module.learn(given, module.one_hot(given.labels))
    with pytest.raises(
        ValueError, match=r"expected a pass with features of unmasked images, .*; call learn\(\) with unmasked"
    ):
        plain.unmasked_maps()
