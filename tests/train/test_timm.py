"""scripts/train.py: networks of timm, by name."""

import pytest

from tests.train.common import QUIETLY, last, logged, optimizer

pytest.importorskip("lightning", reason="lightning is not installed")
pytest.importorskip("timm", reason="timm is not installed: no network of it can be trained")

pytestmark = QUIETLY
NOISE = ["--data=Synthetic", "--data.size=32", "--data.train_images=8", "--data.batch_size=4"]
NOISE += ["--data.validation_images=4", "--data.classes=7", "--data.channels=1"]
NETWORKS = {
    "vit_tiny_patch16_224": "{img_size: 32, patch_size: 8, depth: 2}",
    "convnext_atto": "{depths: [1, 1, 1, 1], dims: [8, 16, 24, 32]}",
    "resnet10t": "{}",
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_timm_train_with_singd(name, run, tmp_path):
    network = [f"--model.name=timm/{name}", f"--model.options={NETWORKS[name]}"]
    diagnostics = ["--diagnostics.every_n_steps=2", "--trainer.log_every_n_steps=1"]
    assert run("fit", *optimizer("SINGD"), *network, *diagnostics, data=NOISE) == 0
    assert last(tmp_path / "run")["global_step"] == 2
    values = logged(tmp_path / "run")
    assert values["update/norm"][-1] > 0 and values["curvature/K_norm_max"][-1] > 0


def test_wrong_names_and_options_of_timm_are_one_line(run, capsys):
    for arguments, named in (
        (["--model.name=timm/vit_tiny_patch16_225"], "vit_tiny_patch16_224"),
        (["--model.name=timm/resnet10t", "--model.options.wings=2"], "wings"),
    ):
        assert run("fit", *arguments, data=NOISE) == 2
        assert named in capsys.readouterr().err
