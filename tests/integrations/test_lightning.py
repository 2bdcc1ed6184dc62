"""One-shot training inside a Lightning trainer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import anyprec

lightning = pytest.importorskip("lightning", reason="needs the extra 'lightning'")
OneShotCallback = pytest.importorskip("anyprec.integrations.lightning").OneShotCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning has advice for everyone


class Classifier(lightning.LightningModule):
    def __init__(self, model: anyprec.ConvertedModel, oneshot: Any) -> None:
        super().__init__()
        self.model, self.oneshot = model, oneshot
        self.automatic_optimization = False
        self.losses: list[float] = []

    def training_step(self, batch: Any, _: int) -> None:
        self.losses.append(float(self.oneshot.run_step(self, *batch)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(anyprec.param_groups(self.model, lr=0.1), lr=0.1)


def fit(
    module: Classifier, loader: Any, folder: Path, *, epochs: int, resume: Path | None = None
) -> Any:
    trainer = lightning.Trainer(
        callbacks=[module.oneshot], max_epochs=epochs, accelerator="cpu", devices=1, logger=False,
        default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, loader, ckpt_path=resume, weights_only=False)
    return trainer


def loader(images: Tensor, labels: Tensor) -> DataLoader:
    return DataLoader(TensorDataset(images, labels), batch_size=4)


def test_the_callback_takes_the_steps_of_ones_own_loop(
    net: anyprec.ConvertedModel, images: Tensor, labels: Tensor, tmp_path: Path
) -> None:
    other = copy.deepcopy(net.train())
    recipe = anyprec.Recipe(feature_weight=0.1)
    module = Classifier(net, OneShotCallback(net, recipe=recipe, seed=3))
    fit(module, loader(images, labels), tmp_path, epochs=2)
    oneshot = anyprec.OneShot(other, total_steps=4, seed=3, recipe=recipe)
    optimizer = torch.optim.SGD(anyprec.param_groups(other, lr=0.1), lr=0.1)
    for _ in range(2):
        for part, targets in zip(images.split(4), labels.split(4), strict=True):
            oneshot.remember(part)
            for path in oneshot.paths():
                path.loss(other(part), targets, F.cross_entropy).backward()
            torch.nn.utils.clip_grad_value_(other.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            oneshot.step()
    with oneshot.evaluating():
        pass  # the callback ends with norm statistics
    for name, value in other.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, equal_nan=True)
    assert len(module.losses) == 4


def test_a_lightning_checkpoint_continues_the_draws(
    net: anyprec.ConvertedModel, images: Tensor, labels: Tensor, tmp_path: Path
) -> None:
    module = Classifier(net, OneShotCallback(net, seed=3))
    fit(module, loader(images, labels), tmp_path, epochs=1).save_checkpoint(tmp_path / "last.ckpt")
    expected = module.oneshot.oneshot.random_configs(2)
    resumed = Classifier(copy.deepcopy(net), OneShotCallback(net, seed=9))
    resumed.oneshot = OneShotCallback(resumed.model, seed=9)
    drawn = []
    resumed.on_train_epoch_start = lambda: drawn.extend(resumed.oneshot.oneshot.random_configs(2))
    fit(resumed, loader(images, labels), tmp_path, epochs=2, resume=tmp_path / "last.ckpt")
    assert drawn == expected


def test_what_is_no_recipe_is_refused(net: anyprec.ConvertedModel) -> None:
    with pytest.raises(ValueError, match="recipe='paper' is not a recipe"):
        OneShotCallback(net, recipe="paper")


def test_automatic_optimization_is_refused(
    net: anyprec.ConvertedModel, images: Tensor, labels: Tensor, tmp_path: Path
) -> None:
    module = Classifier(net, OneShotCallback(net))
    with pytest.raises(
        anyprec.TrainingError, match="knows the length of the training once the trainer fits"
    ):
        module.oneshot.oneshot.step()
    module.automatic_optimization = True
    with pytest.raises(
        anyprec.TrainingError, match="set automatic_optimization = False in Classifier"
    ):
        fit(module, loader(images, labels), tmp_path, epochs=1)


class Validated(Classifier):
    """Notes what it predicts in validation, and what updated statistics would have given."""

    def __init__(self, model: anyprec.ConvertedModel, oneshot: Any, images: Tensor) -> None:
        super().__init__(model, oneshot)
        self.images, self.predicted, self.expected = images, [], []

    def validation_step(self, batch: Any, _: int) -> None:
        if self.trainer.sanity_checking:
            return
        reference = copy.deepcopy(self.model)
        anyprec.update_norms(reference, [self.images] * len(self.losses), include_float=True)
        for bits in (None, 2, 8):
            with self.model.using_bits(bits), reference.eval().using_bits(bits):
                self.predicted.append(self.model(batch[0]))
                self.expected.append(reference(batch[0]))


@pytest.mark.filterwarnings("error::anyprec.StaleNormsWarning")
def test_validation_and_the_end_have_norm_statistics_of_the_weights(
    net: anyprec.ConvertedModel, images: Tensor, labels: Tensor, tmp_path: Path
) -> None:
    module = Validated(net.train(), OneShotCallback(net), images)
    batches = DataLoader(TensorDataset(images, labels), batch_size=8)
    trainer = lightning.Trainer(
        callbacks=[module.oneshot], max_epochs=3, accelerator="cpu", devices=1, logger=False,
        default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, check_val_every_n_epoch=2,
    )  # fmt: skip
    trainer.fit(module, batches, batches)
    assert len(module.predicted) == 3
    for found, expected in zip(module.predicted, module.expected, strict=True):
        torch.testing.assert_close(found, expected)
    for bits in (None, 2, 8):  # the last epoch was not validated
        with net.eval().using_bits(bits), torch.no_grad():
            net(images)
