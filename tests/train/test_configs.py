"""configs/: every file parses, its network can be made, and it takes a step."""

import pytest
import torch
import torchvision
import yaml

from tests.train.common import QUIETLY, ROOT, last, logged

pytest.importorskip("lightning", reason="lightning is not installed")

from training import models
from training.cli import main

pytestmark = [
    QUIETLY,  # and: torchvision's ViT has attention whose projections are no layers
    pytest.mark.filterwarnings("ignore:trained without Kronecker factors"),
    pytest.mark.filterwarnings("ignore:.*more than max_dim"),
]
CONFIGS = sorted((ROOT / "configs").glob("*/*.yaml"))


def tiny(name, weights, num_classes):
    """A network of the same family and layers, narrow and shallow."""
    zoo = torchvision.models
    if name.startswith("resnet"):
        block = zoo.resnet.BasicBlock if name == "resnet18" else zoo.resnet.Bottleneck
        return zoo.ResNet(block, [1, 1, 1, 1], num_classes)
    if name == "vgg19":
        network = zoo.VGG(zoo.vgg.make_layers([8, "M", 8, "M", 8, "M", 8, "M", 8, "M"]), 10)
        dense = (torch.nn.Linear(8 * 49, 16), torch.nn.ReLU(True), torch.nn.Dropout())
        network.classifier = torch.nn.Sequential(*dense, torch.nn.Linear(16, num_classes))
        return network
    if name == "convnext_base":
        blocks = [zoo.convnext.CNBlockConfig(8, 16, 1), zoo.convnext.CNBlockConfig(16, None, 1)]
        return zoo.ConvNeXt(blocks, num_classes=num_classes)
    return zoo.VisionTransformer(224, 32, 2, 2, 48, 64, num_classes=num_classes)


GLYPHS = [
    "--data.init_args.train_images=2", "--data.init_args.validation_images=2",
    "--data.init_args.batch_size=2", "--data.init_args.workers=0", "--trainer.precision=32",
    "--trainer.max_epochs=1", "--trainer.log_every_n_steps=1", "--diagnostics.every_n_steps=1",
]  # fmt: skip
NARROW = [f"--model.options.{key}={n}" for key, n in
          {"embed_dim": 24, "depth": 1, "num_heads": 2}.items()]  # fmt: skip


def steps_once(path, run, tmp_path, small=False):
    more = ["--trainer.num_sanity_val_steps=0", "--trainer.logger=null"]
    configs = [f"--config={path}", f"--config={ROOT / 'configs' / 'one_step.yaml'}"]
    if path.parent.name == "glyphs":  # its data need no stand-in
        more += GLYPHS + (NARROW if small and path.stem.startswith("vit") else [])
        configs = configs[:1]
    assert run("fit", *more, data=configs) == 0
    assert last(tmp_path / "run")["global_step"] == 1
    values = logged(tmp_path / "run")
    assert values["update/norm"][0] > 0
    assert ("curvature/K_norm_max" in values) == ("singd" in path.stem)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_step_of_a_small_relative(path, run, tmp_path, monkeypatch):
    content = yaml.safe_load(path.read_text())
    if content["model"]["name"].startswith("timm/"):
        pytest.importorskip("timm", reason="timm is not installed")
    with torch.device("meta"):  # the network itself
        models.build(content["model"]["name"], 1000, 3, content["model"].get("options", {}))
    monkeypatch.setattr(torchvision.models, "get_model", tiny)
    steps_once(path, run, tmp_path, small=True)


@pytest.mark.nightly
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_step(path, run, tmp_path):
    steps_once(path, run, tmp_path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_parse(path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", f"--config={path}", "--print_config"])
    assert end.value.code in (0, None), capsys.readouterr().err
