"""Training habits: transformers.Trainer and accelerate drive the optimizers as torch's own."""

import copy
from typing import Any

import pytest
import torch
from optimizers import Mixed, each_optimizer, factors_of, first_factor, is_fresh
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, TensorDataset

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")
SIZE = 8


@pytest.fixture(autouse=True)
def _fresh_state():
    """Accelerate keeps its settings for the whole process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


class Labelled(nn.Module):
    """A user's model as the Trainer wants it: labels in, loss out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Mixed()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def _bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=12, num_labels=10,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_layer=1, n_embd=16, n_head=2, vocab_size=20, n_positions=12, embd_pdrop=0.0,
        resid_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def _examples(kind: str, digits, count: int) -> list[dict[str, Tensor]]:
    images, labels = digits[0][:count], digits[1][:count]
    if kind == "own":
        return [{"x": x, "labels": y} for x, y in zip(images, labels, strict=True)]
    tokens = (16 * images[:, 0, 2:4]).long().flatten(1)[:, :10]
    if kind == "gpt2":  # the first label is never predicted, so the Trainer must not count it
        shifted = torch.where(torch.arange(tokens.shape[1]) == 0, -100, tokens)
        pairs = zip(tokens, shifted, strict=True)
        return [{"input_ids": row, "labels": labels} for row, labels in pairs]
    return [{"input_ids": row, "labels": y} for row, y in zip(tokens, labels, strict=True)]


MODELS = {"own": Labelled, "bert": _bert, "gpt2": _gpt2}


def _arguments(folder, m: int, **options) -> Any:
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    quiet |= {"logging_strategy": "no", "dataloader_pin_memory": False, "max_grad_norm": 0.0}
    return transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=SIZE, gradient_accumulation_steps=m,
        train_sampling_strategy="sequential", **({"num_train_epochs": 1} | quiet | options),
    )  # fmt: skip


def _trainer(folder, model: nn.Module, data, optimizers, m: int = 1, **options) -> Any:
    arguments = _arguments(folder, m, **options)
    return transformers.Trainer(model, arguments, train_dataset=data, optimizers=optimizers)


def _pair(build, model: nn.Module, kind: str, **options) -> tuple[Any, Any]:
    average = "batch+sequence" if kind == "gpt2" else "batch"
    small = {"lr": 0.01, "T": 2, "gentle": True, "loss_average": average}
    optimizer = build(model, **(small | options))
    return optimizer, ExponentialLR(optimizer, 0.9)


def _plain(model, optimizer, schedule, examples, m: int = 1, clip: float = 0.0) -> None:
    """The loop that the Trainer stands for."""
    model.train()
    for at in range(0, len(examples), SIZE * m):
        optimizer.zero_grad()
        for low in range(at, at + SIZE * m, SIZE):
            rows = examples[low : low + SIZE]
            batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
            loss = model(**batch)["loss"]
            (loss / m).backward()
        if clip:
            clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()


def _assert_close(model: nn.Module, twin: nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert p.dtype == torch.float64
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9, msg=lambda s, n=name: f"{n}: {s}")


@each_optimizer
@pytest.mark.parametrize(
    ("kind", "m", "clip"),
    [("own", 1, 0.0), ("own", 3, 0.0), ("own", 2, 0.1), ("bert", 1, 0.1), ("gpt2", 1, 0.0),
     ("gpt2", 2, 0.1)],
)  # fmt: skip
def test_trainer_is_the_plain_loop(digits, build, tmp_path, kind, m, clip):
    """Trainer(optimizers=(ours, a schedule)), with accumulation and clipping.

    (No accumulation for "bert": the Trainer does not divide that model's losses, whoever steps.)
    """
    model = MODELS[kind]().double()
    twin = copy.deepcopy(model)
    before = [p.detach().clone() for p in model.parameters()]
    examples = _examples(kind, digits, 6 * SIZE)
    optimizer, schedule = _pair(build, model, kind)
    oracle, other = _pair(build, twin, kind)
    trainer = _trainer(tmp_path, model, examples, (optimizer, schedule), m, max_grad_norm=clip)
    result = trainer.train()
    _plain(twin, oracle, other, examples, m, clip)
    assert result.global_step == 6 // m
    _assert_close(model, twin)
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert sum(moved) > 0.8 * len(moved)
    owner = next(b.parameters[0] for b in optimizer._bindings)
    assert optimizer.state[owner]["step"] == 6 // m
    assert not is_fresh(first_factor(optimizer.state[owner]))
    assert schedule.get_last_lr() == pytest.approx(other.get_last_lr())


@each_optimizer
@pytest.mark.parametrize("kind", ["own", "bert"])
def test_trainer_resumes(digits, build, tmp_path, kind):
    """train(resume_from_checkpoint=...) with new objects is the uninterrupted run."""
    whole = MODELS[kind]().double()
    resumed = copy.deepcopy(whole)
    examples = _examples(kind, digits, 6 * SIZE)
    saving = {"save_strategy": "steps", "save_steps": 3}
    pairs = [_pair(build, model, kind) for model in (whole, resumed)]
    _trainer(tmp_path, whole, examples, pairs[0], **saving).train()
    with torch.no_grad():
        for p in resumed.parameters():
            p.add_(1.0)  # the checkpoint has to bring its own
    trainer = _trainer(tmp_path / "again", resumed, examples, pairs[1])
    result = trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert result.global_step == 6
    assert all(map(torch.equal, resumed.parameters(), whole.parameters()))
    for p, q in zip(resumed.parameters(), whole.parameters(), strict=True):
        state, expected = pairs[1][0].state[p], pairs[0][0].state[q]
        assert state.keys() == expected.keys()
        assert all(torch.equal(*map(torch.as_tensor, (state[k], expected[k]))) for k in state)


@each_optimizer
def test_trainer_evaluates_in_between(digits, build, tmp_path):
    """Evaluation between steps changes nothing, and a subclass makes its own optimizer."""

    class Ours(transformers.Trainer):
        def create_optimizer(self, *_: Any) -> Any:
            if self.optimizer is None:
                self.optimizer = build(self.model, lr=0.01, gentle=True)
            return self.optimizer

    model = Labelled().double()
    twin = copy.deepcopy(model)
    examples = _examples("own", digits, 6 * SIZE)
    evaluating = {"eval_strategy": "steps", "eval_steps": 2, "lr_scheduler_type": "constant"}
    arguments = _arguments(tmp_path, 1, **evaluating)
    trainer = Ours(model, arguments, train_dataset=examples, eval_dataset=examples[:SIZE])
    trainer.train()
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 3
    oracle = build(twin, lr=0.01, gentle=True)
    _plain(twin, oracle, ExponentialLR(oracle, 1.0), examples)
    _assert_close(model, twin)


def _loader(digits, batches: int, dtype: torch.dtype = torch.float64) -> DataLoader:
    count = batches * SIZE
    return DataLoader(TensorDataset(digits[0][:count].to(dtype), digits[1][:count]), SIZE)


def _accelerated(accelerator, model, optimizer, schedule, loader, clip: float = 0.0) -> None:
    """The loop of accelerate's documentation."""
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            if clip and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


@each_optimizer
@pytest.mark.parametrize(("m", "clip"), [(1, 0.0), (3, 0.0), (2, 0.1)])
@pytest.mark.parametrize("fallback", ["sgd", "adamw"])
def test_accelerate_is_the_plain_loop(digits, build, m, clip, fallback):
    """prepare(model, optimizer, loader, schedule), with accumulation and clipping."""
    net, twin = Labelled().double(), Labelled().double()
    twin.load_state_dict(net.state_dict())
    examples = _examples("own", digits, 6 * SIZE)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=m)
    own = _pair(
        build,
        net.net,
        "own",
        fallback=fallback,
        **{build.scheduled: lambda step: 0.02 / (1 + step)},
    )
    model, optimizer, schedule, loader = accelerator.prepare(net.net, *own, _loader(digits, 6))
    _accelerated(accelerator, model, optimizer, schedule, loader, clip)
    other = _pair(
        build, twin, "own", fallback=fallback, **{build.scheduled: lambda step: 0.02 / (1 + step)}
    )
    _plain(twin, *other, examples, m, clip)
    _assert_close(net, twin)
    state = own[0].state[net.net.head.weight]
    assert state["step"] == 6 // m and not is_fresh(first_factor(state))


@each_optimizer
def test_accelerate_saves_and_loads(digits, build, tmp_path):
    """save_state, then load_state into other objects: the run goes on bit by bit."""
    nets = Mixed().double(), Mixed().double()
    prepared = []
    for net in nets:
        accelerator = accelerate.Accelerator(cpu=True)
        own = _pair(build, net, "own")
        prepared.append((accelerator, *accelerator.prepare(net, *own)))
    _accelerated(*prepared[0], _loader(digits, 3))
    prepared[0][0].save_state(str(tmp_path / "state"))
    prepared[1][0].load_state(str(tmp_path / "state"))
    assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))
    for objects in prepared:
        _accelerated(*objects, _loader(digits, 4))
    assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))
    state = prepared[1][2].optimizer.state[nets[1].head.weight]
    assert state["step"] == 7 and not is_fresh(first_factor(state))


@each_optimizer
def test_accelerate_in_bfloat16(digits, build):
    """mixed_precision="bf16" wraps forward; weights and factors stay float32, losses fall."""
    net = Mixed()
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    own = _pair(build, net, "own", lr=0.05)
    model, optimizer, schedule = accelerator.prepare(net, *own)
    x, y = digits[0][:64].float(), digits[1][:64]
    loss = nn.functional.cross_entropy
    before = loss(model(x), y).item()
    for _ in range(8):
        _accelerated(accelerator, model, optimizer, schedule, _loader(digits, 8, x.dtype))
    assert loss(model(x), y).item() < 0.9 * before
    state = own[0].state[net.head.weight]
    held = (*factors_of(state), state["momentum_buffer"])
    assert {tensor.dtype for tensor in held} == {torch.float32}
    assert not is_fresh(first_factor(state)) and first_factor(state).isfinite().all()
