"""What is trained: a network, its loss, an optimizer and a learning rate."""

# No `from __future__ import annotations`: jsonargparse reads these types.
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.plugins.precision import DoublePrecision, MixedPrecision
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchvision.transforms.v2 import CutMix, MixUp, RandomChoice

from training import models, optimizers
from training.optimizers import OptimizerChoice
from training.schedules import Schedule
from training.seeds import mix
from training.types import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveInt

SGD, COSINE = OptimizerChoice(), Schedule()


class Classifier(LightningModule):
    """A classifier of images.

    Args:
        name: "torchvision/resnet18", "timm/vit_small_patch16_224", "small/cnn", "small/mlp", ….
        options: Further arguments of the network's constructor.
        optimizer: Which one, and its arguments.
        schedule: How its learning rate changes, step by step.
        label_smoothing: Share of a target that is spread over all classes.
        mixup: α of mixup; 0 is none. With `cutmix`, each batch takes one of the two.
        cutmix: α of cutmix; 0 is none.
        channels_last: Store images and weights with channels last (fast on GPUs).
        compile: Compile the network with torch.compile.
        num_classes: Given by the data.
        in_channels: Given by the data.
        seed: Of initial weights, dropout, mixup; `seed_everything` unless given.
    """

    def __init__(
        self,
        name: str,
        options: dict[str, Any] = {},  # noqa: B006
        optimizer: OptimizerChoice = SGD,
        schedule: Schedule = COSINE,
        label_smoothing: ClosedUnitInterval = 0.0,
        mixup: NonNegativeFloat = 0.0,
        cutmix: NonNegativeFloat = 0.0,
        channels_last: bool = False,
        compile: bool = False,
        num_classes: PositiveInt = 10,
        in_channels: PositiveInt = 3,
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        self.name, self.choice, self.schedule, self.seed = name, optimizer, schedule, seed
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix(seed))
            self.network = models.build(name, num_classes, in_channels, options)
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.network.to(memory_format=self.layout)  # type: ignore[call-overload]
        if compile:
            self.network.compile()
        self.loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        mixes = [
            kind(alpha=a, num_classes=num_classes)
            for kind, a in ((MixUp, mixup), (CutMix, cutmix))
            if a
        ]
        self.mix_images = RandomChoice(mixes) if mixes else None
        self.to_measure: tuple[Tensor, Tensor] | None = None
        self.sums = torch.zeros(4, dtype=torch.float64)  # loss, top-1, top-5, images

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed dropout, mixup and drawn labels by the position in training."""
        torch.manual_seed(mix(self.seed, self.global_rank, self.trainer.fit_loop.total_batch_idx))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        images, targets = self.mix_images(images, labels) if self.mix_images else (images, labels)
        logits = self(images.contiguous(memory_format=self.layout))
        loss = self.loss(_widened(logits), targets)
        if self.choice.wants_outputs:
            self.to_measure = (logits, targets)
        accuracy = (logits.detach().argmax(1) == labels).float().mean()
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log("train/top1", accuracy, prog_bar=True)
        return loss

    def on_before_backward(self, loss: Tensor) -> None:
        """Measure curvature: not earlier, for Lightning zeroes gradients after the forward pass."""
        if self.to_measure is not None:
            logits, targets = self.to_measure
            self.trainer.optimizers[0].curvature(logits, self.loss, targets)  # type: ignore[attr-defined]
            self.to_measure = None

    def on_validation_epoch_start(self) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = _widened(self(images.contiguous(memory_format=self.layout)))
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        sums = [loss, best[:, 0].sum(), best.any(1).sum(), torch.tensor(float(len(labels)))]
        self.sums += torch.stack([value.to("cpu", torch.float64) for value in sums])

    def on_validation_epoch_end(self) -> None:
        sums = self.trainer.strategy.reduce(
            self.sums.to(self.device, torch.float32), reduce_op="sum"
        )
        loss, top1, top5, images = torch.as_tensor(sums).tolist()
        part = "test" if self.trainer.testing else "val"
        self.log_dict(
            {
                f"{part}/loss": loss / images,
                f"{part}/top1": top1 / images,
                f"{part}/top5": top5 / images,
            },
            prog_bar=True,
            rank_zero_only=False,
            sync_dist=False,
        )

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """As Lightning, which refuses to clip in mixed precision for optimizers that can unscale.

        SINGD and KFAC can, but need not: `GradScaler.unscale_` before them is understood.
        """
        precision = self.trainer.precision_plugin
        own = getattr(optimizer, "_step_supports_amp_scaling", False)
        if not (gradient_clip_val and own and isinstance(precision, MixedPrecision)):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        if precision.scaler is not None:
            precision.scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        by_value = gradient_clip_algorithm == "value"
        clip = nn.utils.clip_grad_value_ if by_value else nn.utils.clip_grad_norm_
        clip(parameters, gradient_clip_val)

    def configure_optimizers(self) -> Any:
        optimizer = optimizers.build(self.choice, self.network)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = LambdaLR(optimizer, lambda step: self.schedule.factor(step, steps))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tn_kfac"] = {"model": self.name, "optimizer": self.choice.name}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another run.

        Raises:
            ValueError: If it holds another network or, when training, another optimizer.
        """
        written, shapes = checkpoint["tn_kfac"], _shapes(self.state_dict())
        own = {"model": self.name, "optimizer": self.choice.name}
        keys = ("model", "optimizer") if self.trainer.training else ("model",)
        for key in keys:
            if written[key] != own[key]:
                raise ValueError(
                    f"ckpt_path: the checkpoint holds the {key} {written[key]!r}, not "
                    f"{own[key]!r}; give the configuration that it was written with"
                )
        if _shapes(checkpoint["state_dict"]) != shapes:
            raise ValueError(
                f"ckpt_path: the checkpoint's {self.name} has other sizes; give the "
                "configuration that it was written with"
            )
        if isinstance(self.trainer.precision_plugin, DoublePrecision):
            self.double()  # as Lightning does, but after it has rounded the weights to float32


def _widened(logits: Tensor) -> Tensor:
    """In float32 at least, for the loss."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}
