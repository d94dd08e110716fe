"""scripts/train.py on WebDataset shards: the same images in the same order, whoever reads them."""

import io
import sys
import tarfile

import pytest
import torch

from tests.train.common import QUIETLY, interrupted, last, logged
from tests.train.test_refused import one_line

pytest.importorskip("lightning", reason="lightning is not installed")

pytestmark = QUIETLY
SMALL = ["--data.size=32", "--data.resize=36", "--data.classes=3", "--data.workers=0"]
SMALL += ["--data.batch_size=4", "--model.name=torchvision/resnet18"]


def png(seed):
    from PIL import Image

    noise = torch.randint(256, (40, 36, 3), generator=torch.Generator().manual_seed(seed))
    file = io.BytesIO()
    Image.fromarray(noise.byte().numpy()).save(file, "png")
    return file.getvalue()


def tar(path, files):
    """Write the files (name: bytes) as a tar file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def samples(*numbers):
    return {k: v for n in numbers for k, v in ((f"{n}.png", png(n)), (f"{n}.cls", b"%d" % (n % 3)))}


@pytest.fixture
def shards(tmp_path):
    """Four shards of four images to train, two of three to evaluate; the options that give them."""
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    for shard in range(4):
        tar(tmp_path / "data" / f"train-{shard}.tar", samples(*range(4 * shard, 4 * shard + 4)))
    for shard in range(2):
        tar(tmp_path / "data" / f"val-{shard}.tar", samples(*range(90 + 3 * shard, 93 + 3 * shard)))
    patterns = (f"--data.train={tmp_path}/data/train-{{0..3}}.tar", "--data.mixed=2")
    return ["--data=Shards", *patterns, f"--data.val={tmp_path}/data/val-*.tar", *SMALL]


def test_a_resumed_run_is_the_whole_one(shards, run, tmp_path):
    steps = ["--trainer.max_epochs=2"]  # of four steps
    assert run("fit", *steps, data=shards, folder="whole") == 0
    assert logged(tmp_path / "whole")["val/top5"] == [1.0, 1.0]
    assert len(list((tmp_path / "cache").glob("shards-*.npz"))) == 2
    assert interrupted(run, steps, at=7, data=shards) == "interrupted"
    assert last(tmp_path / "part")["global_step"] == 6
    assert run("fit", *steps, "--ckpt_path=last", data=shards, folder="part") == 0
    whole, resumed = (last(tmp_path / name)["state_dict"] for name in ("whole", "part"))
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def loader(images, rank=0, ranks=1, done=0, workers=0):
    from training.loader import Loader

    options = {"order": images.order, "num_workers": workers}
    made = Loader(images.seeded(images.parts[0], 0), 4, rank, ranks, **options)
    made.load_state_dict({"batches": done, "batch_size": 4})
    return [batch for _ in range(2) for batch in made]  # of two epochs


def test_order_depends_on_neither_ranks_nor_workers_nor_interruptions(shards, tmp_path):
    from training.shards import Shards

    data = tmp_path / "data"
    images = Shards(f"{data}/train-{{0..3}}.tar", [f"{data}/val-0.tar"], 3, mixed=2, size=32)
    images.setup("fit")
    whole = loader(images)
    assert len(whole) == 8
    for epoch in (whole[:4], whole[4:]):
        counts = torch.cat([labels for _, labels in epoch]).bincount()
        assert counts.tolist() == [6, 5, 5]
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(whole[:4], whole[4:], strict=True))
    halves = [loader(images, rank, 2, workers=rank) for rank in (0, 1)]
    for batch, even, odd in zip(whole, *halves, strict=True):
        assert torch.equal(batch[0][0::2], even[0]) and torch.equal(batch[0][1::2], odd[0])
    for late, batch in zip(loader(images, done=3), whole[3:], strict=False):
        assert torch.equal(late[0], batch[0])
    shard = images.parts[0].table["shard"][images.order(torch.Generator().manual_seed(1))]
    assert not set(shard[:8]) & set(shard[8:])  # two shards at a time


def test_images_are_those_of_a_folder(shards, tmp_path):
    from training.folder import Folder
    from training.shards import Shards

    for part, numbers in (("train", range(16)), ("val", range(90, 96))):
        for n in numbers:
            path = tmp_path / "folder" / part / str(n % 3) / f"{n:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(n))
    data = tmp_path / "data"
    sets = (
        Shards(f"{data}/train-*.tar", f"{data}/val-*.tar", 3, size=32, resize=36),
        Folder(str(tmp_path / "folder"), size=32, resize=36),
    )
    (tars, evaluated), (files, expected) = (images.load() for images in sets)
    label = {path.rsplit("/", 1)[-1]: n for n, (path, _) in enumerate(expected.imgs)}
    for n in range(6):
        image, number = evaluated[n]
        assert torch.equal(image, expected[label[f"{90 + n}.png"]][0]) and number == n % 3
    torch.manual_seed(0)
    drawn = tars[0][0]
    torch.manual_seed(0)
    assert torch.equal(drawn, files[0][0])


MALFORMED = {
    "there is no file": None,
    "has the files png;": {"a.png": b"x"},
    "has the files cls;": {"a.cls": b"1"},
    "has the files cls, png, jpg;": {"a.cls": b"1", "a.png": b"x", "a.jpg": b"x"},
    "b'cat'": {"a.png": b"x", "a.cls": b"cat"},
    "no number from 0 to 2": {"a.png": b"x", "a.cls": b"3"},
    "hold no sample": {"readme": b"x"},
    "cannot be read": {**samples(*range(7)), "8.png": b"x", "8.cls": b"1"},
}


@pytest.mark.parametrize("named", MALFORMED)
def test_malformed_shards_are_one_line(named, shards, run, tmp_path, capsys):
    path = tmp_path / "data" / "train-2.tar"
    if MALFORMED[named] is None:
        path.unlink()
    else:
        tar(path, MALFORMED[named])
        shards = [*shards, f"--data.train=[{path}]"]
    assert run("fit", data=shards) == 2
    line = one_line(capsys, named)
    assert "train-2.tar" in line
    assert "expected uncompressed tar files" in line or "cannot be read" in line


@pytest.mark.parametrize("share", [0, 0.3, 0.5, 0.99])
def test_shards_that_are_cut_off_are_one_line(share, shards, run, tmp_path, capsys):
    path = tmp_path / "data" / "val-1.tar"
    content = path.read_bytes().rstrip(b"\0")
    path.write_bytes(content[: int(share * len(content))])
    assert run("fit", data=shards) == 2
    assert "expected uncompressed tar files" in one_line(capsys, "val-1.tar")


def test_absent_webdataset_is_one_line(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    assert run("fit", data=["--data=Shards", "--data.train=a.tar", "--data.val=b.tar", *SMALL]) == 2
    one_line(capsys, "pip install webdataset")
