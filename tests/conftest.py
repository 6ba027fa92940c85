"""Lets the tests import the scripts, however pytest is started."""

import hashlib
import os
import pickle
import signal
import sys
from pathlib import Path

# Set before torch is imported, or it is not read. The tests' tensors are small: more threads gain a tenth, and beside
# other programs they wait for each other, three to ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import torchvision
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# Under `nohup`, or behind a shell's `&`, signals that the tests send would be ignored.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# A run of seconds: every part of the default, small.
QUICK = ["--scale", "nano", "--device", "cpu", "--pictures", "16", "--batch-size", "4", "--image-size", "32",
         "--source-size", "32", "--local-size", "16", "--local-crops", "1", "--prototypes", "16",
         "--hidden", "16", "--log-every", "1",
         "--no-probe", "--steps", "4"]


def save_map(file: Path, values, mode="L", size=(16, 16)):
    """A picture of one value, or of the given rows. 16-bit for mode I;16."""
    file.parent.mkdir(parents=True, exist_ok=True)
    t = torch.as_tensor(values)
    t = t.expand(size) if t.ndim == 0 else t
    img = Image.fromarray(t.to(torch.uint16 if mode == "I;16" else torch.uint8).numpy().copy())
    img.convert(mode).save(file) if mode in ("P", "RGB") else img.save(file)


@pytest.fixture
def fetched_sets(tmp_path, monkeypatch):
    """A folder with the sets that torchvision fetches, tiny, as they lie on a disk; their pictures are all dark or all bright."""
    at = tmp_path / "sets"
    for split, names in (("train", ("a", "b")), ("val", ("c", "d"))):
        for name in names:
            save_map(at / f"VOCdevkit/VOC2012/JPEGImages/{name}.jpg", 7, "RGB")
            save_map(at / f"VOCdevkit/VOC2012/SegmentationClass/{name}.png", 20)
        (at / "VOCdevkit/VOC2012/ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (at / f"VOCdevkit/VOC2012/ImageSets/Segmentation/{split}.txt").write_text("\n".join(names) + "\n")

    trimap = torch.full((16, 24), 2)  # 2: background, 1: pet, 3: border
    trimap[:, :8], trimap[0] = 1, 3
    for split, n in (("trainval", 20), ("test", 6)):
        lines = ""
        for i in range(n):
            name = f"{('Abyssinian', 'great_pyrenees')[i % 2]}_{split}{i}"
            save_map(at / f"oxford-iiit-pet/images/{name}.jpg", torch.where(trimap == 1, 50, 200) - 40 * (i % 2), "RGB")
            save_map(at / f"oxford-iiit-pet/annotations/trimaps/{name}.png", trimap)
            lines += f"{name} {i % 2 + 1} {i % 2 + 1} 1\n"
        (at / f"oxford-iiit-pet/annotations/{split}.txt").write_text(lines)

    for split, n in (("train", 20), ("val", 6)):
        for c, wnid in enumerate(("n01440764", "n02102040")):
            for i in range(n):
                save_map(at / f"imagenette2-320/{split}/{wnid}/{i}.JPEG", 100 * c + 50, "RGB", (20, 30 + i))

    cifar = torchvision.datasets.CIFAR10
    (at / cifar.base_folder).mkdir()

    def pickled(name: str, found: dict) -> str:
        raw = pickle.dumps(found)
        (at / cifar.base_folder / name).write_bytes(raw)
        return hashlib.md5(raw).hexdigest()

    rows = torch.tensor([[50] * 3072, [150] * 3072] * 4, dtype=torch.uint8).numpy()
    for which in ("train_list", "test_list"):
        files = [[name, pickled(name, {"data": rows, "labels": [0, 1] * 4})] for name, _ in getattr(cifar, which)]
        monkeypatch.setattr(cifar, which, files)
    meta = cifar.meta | {"md5": pickled(cifar.meta["filename"], {"label_names": ["dark", "bright"]})}
    monkeypatch.setattr(cifar, "meta", meta)
    return at
