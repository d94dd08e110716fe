"""Training habits: Lightning drives the optimizers as it drives those of torch."""

import copy
from typing import Any

import pytest
import torch
from optimizers import Mixed, copied, each_optimizer, first_factor, is_fresh
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, TensorDataset

lightning = pytest.importorskip("lightning", reason="lightning is not installed")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*logging interval",
    "ignore:.*exists and is not empty",
    "ignore:.*checkpoint.*mid-epoch",
    "ignore:.*LeafSpec.*:FutureWarning",
    "ignore:.*treespec.*:FutureWarning",
)
SIZE = 8


class Classifier(lightning.LightningModule):
    """A user's module: nothing in it knows which optimizer it gets."""

    def __init__(self, net: nn.Module, make: Any, schedule: bool = False) -> None:
        super().__init__()
        self.net, self.make, self.schedule = net, make, schedule
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self)
        if not self.schedule:
            return optimizer
        step = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        return [optimizer], [{"scheduler": step, "interval": "step"}]


def _loader(digits, batches: int) -> DataLoader:
    count = batches * SIZE
    return DataLoader(TensorDataset(digits[0][:count].float(), digits[1][:count]), SIZE)


def _trainer(folder, **options) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "max_epochs": 1, "accelerator": "cpu"}
    return lightning.Trainer(default_root_dir=folder, **(quiet | {"devices": 1} | options))


def _plain(net: nn.Module, optimizer, loader, m: int = 1, clip: float = 0.0, decay: float = 1.0):
    """The loop that Lightning stands for; returns the losses."""
    losses, batches = [], list(loader)
    for at, (x, y) in enumerate(batches):
        if at % m == 0:
            optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        (loss / m).backward()
        losses.append(loss.item())
        if (at + 1) % m == 0 or at + 1 == len(batches):
            if clip:
                clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            for group in optimizer.param_groups:
                group["lr"] *= decay
    return losses


@each_optimizer
@pytest.mark.parametrize(
    ("m", "clip", "schedule"), [(1, 0.0, False), (1, 0.1, True), (3, 0.0, False), (2, 0.1, True)]
)
@pytest.mark.parametrize("fallback", ["sgd", "adamw"])
def test_fit_is_the_plain_loop(digits, build, tmp_path, m, clip, schedule, fallback):
    """Automatic optimization with accumulation, clipping, a schedule and validation."""
    net = Mixed()
    twin = copy.deepcopy(net)
    optimizer = build(twin, T=2, fallback=fallback)
    module = Classifier(net, lambda model: build(model, T=2, fallback=fallback), schedule)
    trainer = _trainer(
        tmp_path, accumulate_grad_batches=m, gradient_clip_val=clip or None, val_check_interval=2
    )
    trainer.fit(module, _loader(digits, 7), _loader(digits, 2))
    expected = _plain(twin, optimizer, _loader(digits, 7), m, clip, 0.8 if schedule else 1.0)
    assert module.losses == pytest.approx(expected, rel=1e-4)
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=lambda s, n=name: f"{n}: {s}")
    state = trainer.optimizers[0].state[net.head.weight]
    assert state["step"] == optimizer.state[twin.head.weight]["step"] == -(-7 // m)
    assert not is_fresh(first_factor(state))


@each_optimizer
@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("fallback", ["sgd", "adamw"])
def test_resumed_fit_is_the_uninterrupted_one(digits, build, tmp_path, epochs, fallback):
    """save_checkpoint after an epoch or two, then fit(ckpt_path=...) with new objects."""
    start = Mixed()

    def module() -> Classifier:
        make = lambda model: build(model, T=2, fallback=fallback)  # noqa: E731
        return Classifier(copy.deepcopy(start), make, schedule=True)

    whole, first, second = module(), module(), module()
    with torch.no_grad():
        for p in second.parameters():
            p.add_(1.0)  # the checkpoint has to bring its own
    trainer = _trainer(tmp_path, max_epochs=3)
    trainer.fit(whole, _loader(digits, 3), _loader(digits, 1))
    short = _trainer(tmp_path, max_epochs=epochs)
    short.fit(first, _loader(digits, 3), _loader(digits, 1))
    short.save_checkpoint(tmp_path / "stop.ckpt")
    resumed = _trainer(tmp_path, max_epochs=3)
    resumed.fit(second, _loader(digits, 3), _loader(digits, 1), ckpt_path=tmp_path / "stop.ckpt")
    assert len(second.losses) == 3 * (3 - epochs)
    assert first.losses + second.losses == whole.losses
    assert all(map(torch.equal, second.parameters(), whole.parameters()))
    for p, q in zip(second.parameters(), whole.parameters(), strict=True):
        ours, theirs = resumed.optimizers[0].state[p], trainer.optimizers[0].state[q]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(*map(torch.as_tensor, (ours[k], theirs[k]))) for k in ours)


@each_optimizer
def test_checkpoint_callback_and_averaging_callback(digits, build, tmp_path):
    """ModelCheckpoint each step and WeightAveraging leave training as it is."""
    from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

    net = Mixed()
    twin = copy.deepcopy(net)
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, save_last=True)
    module = Classifier(net, build)
    trainer = _trainer(
        tmp_path, enable_checkpointing=True, callbacks=[saving, EMAWeightAveraging(decay=0.5)]
    )
    trainer.fit(module, _loader(digits, 6), _loader(digits, 1))
    expected = _plain(twin, build(twin), _loader(digits, 6))
    assert module.losses == expected
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["optimizer_states"][0]
    assert saved["state"].keys() == trainer.optimizers[0].state_dict()["state"].keys()
    assert not all(map(torch.equal, net.parameters(), twin.parameters())), "these are averages"


class Adversaries(lightning.LightningModule):
    """A generator and a critic, optimized by hand with toggling, as Lightning's GAN example."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.make = make
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 64))
        self.critic = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 1))

    def losses(self, images: Tensor, noise: Tensor) -> tuple[Any, Any]:
        """What the generator and what the critic minimise."""
        score = nn.functional.binary_cross_entropy_with_logits
        ones = torch.ones(len(images), 1)
        fool = lambda: score(self.critic(self.generator(noise)), ones)  # noqa: E731

        def tell() -> Tensor:
            fake = self.critic(self.generator(noise).detach())
            return (score(self.critic(images), ones) + score(fake, 0 * ones)) / 2

        return fool, tell

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images = batch[0].flatten(1)
        noise = torch.sin(torch.arange(4.0 * len(images))).view(-1, 4)
        for optimizer, loss in zip(self.optimizers(), self.losses(images, noise), strict=True):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss())
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> list[Any]:
        return [self.make(self.generator), self.make(self.critic)]


@each_optimizer
def test_two_optimizers_by_hand(digits, build, tmp_path):
    """Each net sees the curvature of its own turn only."""
    make = lambda model: build(model, lr=0.01, gentle=True)  # noqa: E731
    module = Adversaries(make)
    twin = copy.deepcopy(module)
    before = copied(module)
    _trainer(tmp_path).fit(module, _loader(digits, 4))
    pairs = [make(twin.generator), make(twin.critic)]
    for x, _ in _loader(digits, 4):
        images = x.flatten(1)
        noise = torch.sin(torch.arange(4.0 * len(images))).view(-1, 4)
        for optimizer, loss in zip(pairs, twin.losses(images, noise), strict=True):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
    assert all(map(torch.equal, module.parameters(), twin.parameters()))
    assert not any(torch.equal(p, before[name]) for name, p in module.named_parameters())


@each_optimizer
@pytest.mark.parametrize("m", [1, 2])
def test_float16_with_a_loss_scale(digits, build, tmp_path, m):
    """Lightning's MixedPrecision hands its GradScaler over; an overflowing start is skipped."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**28)

    module = Classifier(Mixed(), build)
    twin = copy.deepcopy(module.net)
    plugin = MixedPrecision("16-mixed", "cpu", scaler())
    trainer = _trainer(tmp_path, plugins=[plugin], accumulate_grad_batches=m)
    trainer.fit(module, _loader(digits, 40), _loader(digits, 1))
    optimizer, own, losses = build(twin), scaler(), []
    for at, (x, y) in enumerate(_loader(digits, 40)):
        with torch.autocast("cpu", torch.float16):
            loss = nn.functional.cross_entropy(twin(x), y)
        if at % m == 0:
            optimizer.zero_grad()
        own.scale(loss / m).backward()
        losses.append(loss.item())
        if (at + 1) % m == 0:
            own.step(optimizer)
            own.update()
    assert module.losses == losses
    assert all(map(torch.equal, module.net.parameters(), twin.parameters()))
    assert all(p.isfinite().all() for p in twin.parameters())
    steps = trainer.optimizers[0].state[module.net.head.weight]["step"]
    assert 0 < steps < 40 // m, "some steps are skipped"
    assert plugin.scaler.get_scale() == own.get_scale() < 2.0**28


@each_optimizer
def test_fabric_is_the_plain_loop(digits, build, tmp_path):
    """fabric.setup(model, optimizer), with clipping; then fabric.save and fabric.load."""
    net = Mixed().double()
    twin = copy.deepcopy(net)
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(net, build(net, T=2))

    def go() -> list[float]:
        losses = []
        for x, y in fabric.setup_dataloaders(_loader(digits, 5)):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x.double()), y)
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=0.1)
            optimizer.step()
            losses.append(loss.item())
        return losses

    loader = [(x.double(), y) for x, y in _loader(digits, 5)]
    assert go() == pytest.approx(_plain(twin, build(twin, T=2), loader, clip=0.1), rel=1e-9)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)
    fabric.save(tmp_path / "fabric.ckpt", {"model": model, "optimizer": optimizer})
    expected = go()
    fabric.load(tmp_path / "fabric.ckpt", {"model": model, "optimizer": optimizer})
    assert go() == expected
