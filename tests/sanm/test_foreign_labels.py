"""Labels and losses of third-party modules: unchanged before the first mask, and what is refused before the first update."""

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from sanm_lightning.sanm import SANM
from sanm_lightning.sanm.callback import SANMCallback
from sanm_lightning.sanm.checks import LabelCheck
from tests.sanm.test_callback import CLASSES, SANMMixin, Small, Stranger, assert_same, fit, pairs, served, weights

WEIGHT = torch.tensor([0.002, 0.01, 0.05])


def weighted(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, weight=WEIGHT)


def weighted_sum(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, weight=WEIGHT, reduction="sum") / len(y)


def weighted_exactly(logits: Tensor, y: Tensor) -> Tensor:
    hard = y if y.ndim == 1 else y.argmax(1)
    return F.cross_entropy(logits, y, weight=WEIGHT, reduction="none").sum() / WEIGHT[hard].sum()


def smoothed(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, label_smoothing=0.2)


def any_integer(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y.long() if y.ndim == 1 else y)


def ignoring(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, ignore_index=-1)


def weighted_from_one(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, weight=torch.tensor([1.0, 5.0, 5.0]))


def one_logit(logits: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits[:, 0], (y > 0).float())


class Losing(Stranger):
    """A module with a given loss that notes losses and labels of its training steps."""

    def __init__(self, loss: Any) -> None:
        super().__init__(0.0)
        self.loss = loss
        self.losses: list[float] = []
        self.labels: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(self.net(batch[0]), batch[1])
        if isinstance(self.trainer, L.Trainer):  # not in the rehearsal
            self.losses.append(float(loss.detach()))
            self.labels.append(batch[1])
        return loss


class MixedLosing(SANMMixin, Losing):
    pass


def labeled(change: Any) -> Any:
    return served([[x, change(y)] for x, y in pairs()])


def trained(kind: str, loss: Any, data: Any = None, epochs: int = 2, **options: Any) -> Any:
    torch.manual_seed(3)
    sanm = SANM(seed=0, ratio="fixed", **options)
    module = MixedLosing(loss, sanm=sanm) if kind == "mixin" else Losing(loss)  # type: ignore[call-arg]
    torch.manual_seed(3)
    module.net = Small(0.0)
    fit(module, *([SANMCallback(sanm)] if kind == "callback" else []), data=data, epochs=epochs)
    return module


class TestBeforeTheFirstMask:
    @pytest.mark.parametrize("loss", [weighted, weighted_sum, weighted_exactly, smoothed, ignoring])
    @pytest.mark.parametrize("kind", ["callback", "mixin"])
    def test_losses_and_weights_are_those_without_sanm(self, kind: str, loss: Any) -> None:
        """``max_epochs`` ends before the first mask, so that no loss is refused."""
        plain, wrapped = trained("none", loss), trained(kind, loss, warmup_epochs=2)
        assert wrapped.losses == plain.losses
        assert_same(weights(plain), weights(wrapped))

    @pytest.mark.parametrize("loss", [weighted, ignoring])
    def test_so_are_those_of_a_longer_run_that_leaves_labels_alone(self, loss: Any) -> None:
        plain = trained("none", loss, epochs=1)
        wrapped = trained("callback", loss, labels=False)
        assert wrapped.losses[:4] == plain.losses
        assert wrapped.losses[4:] != trained("none", loss).losses[4:]

    @pytest.mark.parametrize("loss", [weighted_sum, weighted_exactly, smoothed])
    def test_and_those_of_a_longer_run_whose_loss_is_the_same_for_rows(self, loss: Any) -> None:
        wrapped = trained("callback", loss)
        assert wrapped.losses[:4] == trained("none", loss, epochs=1).losses
        assert [labels.ndim for labels in wrapped.labels] == [1] * 4 + [2] * 4

    def test_nothing_to_mask_leaves_the_labels_alone(self) -> None:
        module = Losing(weighted)
        fit(module, SANMCallback(SANM(mu=0.0)), epochs=2)
        assert [labels.ndim for labels in module.labels] == [1] * 8


class TestForms:
    @pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
    def test_integers_of_any_dtype_train_like_int64(self, dtype: torch.dtype) -> None:
        expected = trained("callback", any_integer)
        found = trained("callback", any_integer, labeled(lambda y: y.to(dtype)))
        assert found.labels[0].dtype == dtype
        assert found.losses == expected.losses
        assert_same(weights(expected), weights(found))

    def test_soft_labels_are_unchanged_before_the_first_mask_and_lose_the_ratio_after_it(self) -> None:
        soft = torch.tensor([[0.7, 0.2, 0.1]] * 6)
        module = trained("callback", any_integer, labeled(lambda y: soft), mu=0.3)
        assert torch.equal(module.labels[0], soft)
        torch.testing.assert_close(module.labels[4], torch.tensor([[0.5, 0.3, 0.2]] * 6))

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (
                lambda y: F.one_hot(y, CLASSES).float() + torch.eye(3)[[0, 0, 0, 1, 1, 1]],
                r"rows sum to 1 .*sums of 2 to 2",
            ),
            (lambda y: y[:, None], r"expected labels .* C = 3 logits .*, got \(6, 1\) of torch.int64"),
            (lambda y: y[:, None].float(), r"expected labels .* C = 3 logits .*, got \(6, 1\) of torch.float32"),
            (lambda y: y - 1, r"expected class indices in \[0, 3\) .*, got -1 to 1; remove samples without a class"),
            (lambda y: y + 1, r"expected class indices in \[0, 3\) .*, got 1 to 3"),
        ],
        ids=["multi-hot", "a column of indices", "a column of floats", "no class", "too many classes"],
    )
    @pytest.mark.parametrize("labels", [True, False])
    def test_others_are_refused_before_the_first_update(self, change: Any, match: str, labels: bool) -> None:
        module = Losing(ignoring)
        before = weights(module)
        with pytest.raises(MisconfigurationException, match=match):
            fit(module, SANMCallback(SANM(labels=labels, warmup_epochs=2)), data=labeled(change))
        assert_same(before, weights(module))

    def test_a_label_without_a_class_is_refused_in_its_batch(self) -> None:
        data = served([[x, y if number < 2 else y - 1] for number, (x, y) in enumerate(pairs())])
        module = Losing(ignoring)
        with pytest.raises(MisconfigurationException, match=r"got -1 to 1"):
            fit(module, SANMCallback(SANM(labels=False)), data=data)
        assert len(module.losses) == 2

    def test_one_logit_is_refused(self) -> None:
        module = Losing(one_logit)
        module.net.fc = nn.Linear(8, 1)
        with pytest.raises(MisconfigurationException, match=r"C >= 2 classes for SANM, got one logit in Losing"):
            fit(module, SANMCallback(SANM(labels=False)))

    def test_on_a_device_the_check_waits_for_the_end_of_the_epoch(self) -> None:
        check = LabelCheck()
        with FakeTensorMode():  # reading a value raises an error
            rows = torch.empty(4, 3, device="cuda")
            check(rows, rows)
            check(rows, rows)
        check = LabelCheck()
        check._bad = torch.tensor(True)
        with pytest.raises(MisconfigurationException, match="got other labels in epoch 3"):
            check.report(3)
        check.report(4)


class TestLossesThatDependOnTheForm:
    @pytest.mark.parametrize("kind", ["callback", "mixin"])
    def test_class_weights_are_refused_before_the_first_update(self, kind: str) -> None:
        with pytest.raises(
            MisconfigurationException,
            match=r"a loss of \w+ with the same value .*, got 0\.9\d+ and 0\.019\d+, .*reduction='sum'.*SANM\(labels=False\)",
        ):
            trained(kind, weighted)

    def test_class_weights_are_found_whatever_the_network_predicts(self) -> None:
        """The predicted class may be one of weight 1, for which the two means are the same."""
        module = Losing(weighted_from_one)
        with torch.no_grad():
            module.net.fc.bias[0] += 100
        with pytest.raises(MisconfigurationException, match="expected a loss of Losing with the same value"):
            fit(module, SANMCallback())
        assert module.losses == []

    def test_a_module_that_cannot_be_copied_is_not_checked_and_this_is_said(self) -> None:
        module = Losing(weighted_sum)
        module.numbers = (number for number in range(3))  # generators cannot be copied
        with pytest.warns(UserWarning, match=r"expected Losing to be copyable.*, got TypeError"):
            fit(module, SANMCallback(), epochs=2)
        assert len(module.losses) == 8


class TestLongWarmup:
    WARNING = r"expected max_epochs above {}, the number of epochs before SANM's first mask, got 2, in which nothing is masked"

    @pytest.mark.parametrize(("warmup", "first"), [(2, 2), (5, 5)])
    def test_a_run_that_masks_nothing_is_warned_of(self, warmup: int, first: int) -> None:
        callback = SANMCallback(SANM(warmup_epochs=warmup))
        with pytest.warns(UserWarning, match=self.WARNING.format(first)):
            fit(Stranger(), callback, epochs=2)
        assert callback.masked_steps == 0

    @pytest.mark.parametrize("options", [{"max_steps": 8}, {"max_steps": 4, "accumulate_grad_batches": 2}], ids=str)
    def test_so_is_one_with_too_few_steps(self, options: dict[str, Any]) -> None:
        callback = SANMCallback(SANM(warmup_epochs=2))
        with pytest.warns(
            UserWarning, match="expected max_steps beyond the first 2 epochs, .*, got ., in which nothing is masked"
        ):
            fit(Stranger(), callback, epochs=-1, **options)
        assert callback.masked_steps == 0

    @pytest.mark.filterwarnings("error:expected max_")
    @pytest.mark.parametrize(
        ("epochs", "options"), [(3, {}), (-1, {"max_steps": 9}), (1, {"fast_dev_run": True})], ids=str
    )
    def test_no_other_run_is(self, epochs: int, options: dict[str, Any]) -> None:
        fit(Stranger(), SANMCallback(SANM(warmup_epochs=2)), epochs=epochs, **options)
