"""Judge frozen features: linear probes of classes and depth, k-NN and linear classes of pictures.

    python eval_dense.py runs/NAME                       # all tasks on Scenes; writes eval.json
    python eval_dense.py runs/a runs/b                   # a table, and b - a over the same pictures
    python eval_dense.py runs/NAME --network untrained   # the same network at step 0
    python eval_dense.py runs/NAME --data voc --root path/to/VOC --tasks seg

Protocol: DINOv2's linear segmentation and DINOv3's linear depth, DINO's k-NN, logistic regression.
Features  patches of the last block (--layer: of another) after the final norm, no [CLS] (--cat-cls:
          beside every patch); the backbone is frozen, in eval mode, fp32 on a CPU and bf16 on CUDA.
Pictures  resized, with antialias, to --image-size on the shorter side (0: as they are), then to the
          nearest multiple of the patch on both; labels are not. With --crop, heads are trained on
          crops of pictures and labels: scale 0.5 to 2 (1 where there is depth), flip, padded with
          black, 255, no depth. The sides of crops and windows are multiples of the patch, too.
Heads     BatchNorm and one linear layer, N(0, 0.01), bias 0. seg: to classes. depth: to 256 uniform
          bins from 0.001 m to the set's largest depth; relu + 0.1, normalised, weighs them to a
          depth. Both are upsampled bilinearly (corners not aligned) to the label's size.
Losses    seg: cross-entropy, 255 ignored. depth: scale-invariant log loss (`silog`), valid pixels.
          Each iteration looks at every (patch / 2)th row and column of the labels, from a random
          first one.
Training  AdamW, weight decay 1e-4; linear warm-up, then linearly to 0; batches are drawn with
          replacement. Of several --lr, each head's is chosen on a tenth of the training pictures,
          which it has not seen.
Test      whole pictures, or --window with logits and depth averaged where windows overlap; --flip:
          averaged with the mirrored picture's.
cls       [CLS], or [CLS] beside the mean patch, standardised, into softmax regression with an L2
          penalty, by L-BFGS; input and penalty are chosen on a fifth of the training pictures,
          then it is trained on all of them.
knn       [CLS], cosine, k = 20, votes weigh exp(cosine / 0.07).
Metrics   miou: mean over classes of intersection / union summed over the set, classes that neither
          truth nor prediction has left out. rmse (m), absrel = mean(|p - t| / t), delta1 = share
          with max(p / t, t / p) < 1.25: per picture over valid pixels, then the mean. linear, knn:
          accuracy. In % but rmse and absrel.

               shorter side  crop, window  iterations x batch  --lr              warm-up  classes
  scenes       8 patches     -             2000 x 128          3e-2              0.1      10
  pairs        as it is      -             1000 x 32           1e-2              0.1      its own
  voc, ade20k  512           512           40000 x 16          1e-3              1500     21, 150
  cityscapes   1024          512           40000 x 16          1e-3              1500     19
  nyu, sunrgbd 480           -; flip       38400 x 16          3e-4, 1e-3, 5e-3  a third  -
  kitti        352           -; flip       38400 x 16          3e-4, 1e-3, 5e-3  a third  -
  imagefolder  256, of which the middle 224; cls and knn only

Largest depth: scenes 20 m, nyu 10, kitti 80, pairs that of its training pictures; what is farther
is not valid. nyu is judged in Eigen's crop, kitti in Garg's of the lower 352 x 1216; sunrgbd with
heads trained on nyu, in Eigen's crop, truth and prediction cut off at 8 m. Scenes: 2000 of split
"probe", 1000 of "test".

Ours, not the papers': the sampled rows and columns; whole pictures without augmentation for depth
(DINOv2 and v3 crop, flip, turn and colour them), crops for classes not coloured; linear decay
everywhere; no limit on a class's share of a crop; the rate for nyu is chosen on frames of the same
videos; [CLS] and mean patch of one block, without augmentation, for cls.
"""

import argparse
import copy
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from itertools import product
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as in train.py

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps  # comes with torchvision
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import clsspec
import scenes
from clsspec import ViT
from scenes import Scenes

TASKS, DENSE = ("seg", "depth", "cls", "knn"), ("seg", "depth")
METRICS = {"miou": "{:.2f} %", "rmse": "{:.3f} m", "absrel": "{:.4f}", "delta1": "{:.2f} %",
           "linear": "{:.2f} %", "knn": "{:.2f} %"}
LOWER = {"rmse", "absrel"}  # are better when they are lower

# --------------------------------------------------------------------------------------------------
# Doors: how flags, pictures and JSON come in, and how results go out. All scripts use these.


class Parser(argparse.ArgumentParser):
    """argparse, but what is wrong is one line."""

    def error(self, message: str):
        self.exit(2, f"error: {message}; {Path(self.prog).name} --help lists all flags\n")


def span(low, high) -> str:
    return f"{low:,} to {high:,}" if isinstance(low, int) else f"{low:g} to {high:g}"


def within(kind, low, high):
    """A flag's reader: a number of this kind (int, float), from low to high, both allowed."""

    def number(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} "
                                             "number") from None
        if not low <= value <= high:  # so is nan
            raise argparse.ArgumentTypeError(f"{text} is outside {span(low, high)}")
        return value

    return number


def names(text: str) -> tuple[str, ...]:
    """A flag's reader: a comma list, each name once."""
    if not (found := tuple(dict.fromkeys(filter(None, text.split(","))))):
        raise argparse.ArgumentTypeError("names nothing; leave it out, or give a comma list")
    return found


KINDS = ".jpg", ".jpeg", ".png", ".webp"


def picture_files(data) -> list[str]:
    """Paths of the pictures below a folder, sorted; of those that a text file names, a path a line,
    from the file's own folder or from here; or of one picture. ValueError: there is none."""
    at = Path(data)
    if at.is_dir():
        files = []
        for folder, folders, found in os.walk(at, followlinks=True):
            folders[:] = [name for name in folders if not name.startswith(".")]
            files += [os.path.join(folder, name) for name in found
                      if name.lower().endswith(KINDS) and not name.startswith(".")]
        files = sorted(file for file in files if os.path.isfile(file))  # no pipes, no lost links
    elif at.is_file() and at.suffix.lower() in KINDS:
        files = [str(at)]
    elif at.is_file():
        try:
            lines = at.read_text("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise ValueError(f"--data {data}: neither a picture ({', '.join(KINDS)}) nor a text "
                             "file with a path a line") from None
        lines = [line.strip() for line in lines if line.strip()]
        files = [str(at.parent / line) if (at.parent / line).exists() else line for line in lines]
    else:
        raise ValueError(f"--data {data}: neither 'scenes', nor a folder, nor a file of paths")
    if not files:
        raise ValueError(f"--data {data}: no picture ({', '.join(KINDS)}) in it or below it")
    return files


def open_picture(file, kind: str = "RGB", upright: bool = False, side: int = 0) -> Image.Image:
    """A picture as RGB, or with kind "as it is" in its own mode. upright: turned as its EXIF says.
    side: a JPEG is decoded no finer than this needs. ValueError: which file, and why not."""
    try:
        if not os.path.isfile(file):
            raise OSError("there is no such file" if not os.path.exists(file) else "it is no file")
        with Image.open(file) as img:
            if side:
                img.draft("RGB", (side, side))
            if upright:
                img = ImageOps.exif_transpose(img)
            if kind == "RGB" and img.mode.startswith("I"):  # 16 bits: scaled, not cut off at 255
                img = img.convert("I").point(lambda value: value * (1 / 256)).convert("L")
            img = img.convert("RGB") if kind == "RGB" else img
            img.load()
            return img
    except Exception as err:  # whatever a decoder makes of a broken file
        why = (str(err) or type(err).__name__).splitlines()[0]
        raise ValueError(f"cannot read {file} ({why}); mend it or take it out") from None


def read_picture(file, upright: bool = True) -> Tensor:
    """uint8 (3, H, W), RGB. ValueError as in `open_picture`."""
    return TF.pil_to_tensor(open_picture(file, upright=upright))


def read_numbers(file, *modes: str) -> Tensor:
    """A map (H, W) of classes (mode P, L) or depth (16-bit, I;16, I). ValueError: another mode."""
    img = open_picture(file, "as it is")
    if img.mode not in modes:
        need = "an 8-bit index PNG" if "P" in modes else "a 16-bit grey PNG"
        raise ValueError(f"{file} must be {need}, but its mode is {img.mode}; convert it")
    return TF.pil_to_tensor(img if "P" in modes else img.convert("I"))[0]


def read_json(file: Path) -> dict:
    """{} if there is no such file. ValueError: damaged."""
    try:
        found = json.loads(file.read_text()) if file.exists() else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{file} is damaged, or not of this project; move it away")
    return found


def strict(x, digits: int | None = None):
    """The same without nan and inf, which JSON does not know; numbers rounded to so many digits."""
    if isinstance(x, dict):
        return {k: strict(v, digits) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [strict(v, digits) for v in x]
    if not isinstance(x, float):
        return x
    if not math.isfinite(x):
        return None
    return float(f"{x:.{digits}g}") if digits else x


def write(file: Path, text: str) -> None:
    """Write beside, then move into place: whole at any moment. ValueError: a full disk, say."""
    beside = file.with_name(f"{file.name}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text)
        os.replace(beside, file)
    except OSError as err:
        beside.unlink(missing_ok=True)
        raise ValueError(f"could not write {file}: {err.strerror}; what was there is as it was; "
                         "free some space, or choose a folder that can be written to") from None


def record(file: Path, key: str, result: dict) -> None:
    """Put a result into a JSON file; what is there under other names stays."""
    write(file, json.dumps(read_json(file) | {key: strict(result)}, indent=1, allow_nan=False))


# --------------------------------------------------------------------------------------------------
# Labelled pictures: how each data set lies on a disk.


def random_crop(item: dict, u, size: int, crop: int) -> dict:
    """An item's crop: (crop, crop), by four uniform numbers u: scale, top, left, flip."""
    h, w = item["image"].shape[-2:]
    scale = size / min(h, w) if size else 1
    if "depth" not in item:  # a nearer picture would have other depths
        scale *= 0.5 + 1.5 * u[0]
    h, w = max(round(h * scale), 1), max(round(w * scale), 1)
    right, bottom = max(crop - w, 0), max(crop - h, 0)  # padding
    top, left = int(u[1] * (h + bottom - crop + 1)), int(u[2] * (w + right - crop + 1))
    out = {}
    for kind, x in item.items():
        how = InterpolationMode.BILINEAR if kind == "image" else InterpolationMode.NEAREST_EXACT
        x = TF.resize(x if kind == "image" else x[None], [h, w], how, antialias=True)
        x = F.pad(x, (0, right, 0, bottom), value=255 if kind == "mask" else 0)
        x = x[:, top : top + crop, left : left + crop]
        x = x.flip(2) if u[3] < 0.5 else x
        out[kind] = x if kind == "image" else x[0]
    return out


def stack(items: list[dict]) -> dict[str, Tensor]:
    """Items -> one dict of stacked tensors. ValueError where pictures have several sizes."""
    first = items[0]
    for item in items:
        if item["image"].shape != first["image"].shape:
            sizes = [tuple(x["image"].shape[1:]) for x in (item, first)]
            raise ValueError(f"{item['name']} has {sizes[0]} pixels (rows, columns), "
                             f"{first['name']} {sizes[1]}; for several sizes give --crop")
    return {k: torch.stack([x[k] for x in items]) for k in first if k != "name"}


@dataclass
class Pictures(torch.utils.data.Dataset):
    """One split of a data set, on disk (`rows`) or in `memory`. An item has what the set has: image
    uint8 (3, H, W), mask uint8 (H, W), depth float (H, W) in metres, 0: none; label, an int."""

    rows: list[dict] = ()  # paths `image`, `mask`, `depth`, an int `label`
    memory: dict[str, Tensor] | None = None  # the items, stacked
    classes: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    ids: Tensor | None = None  # (256,) number in a mask -> class; None: it is the class
    max_depth: float = 10.0  # metres; what is farther is not valid
    unit: float = 1e-3  # metres, of one count in a depth file
    rotated: bool = False  # SUN RGB-D: the 16 bits are turned by three
    cut: bool = False  # SUN RGB-D: what is farther than max_depth is there, at max_depth
    region: tuple | None = None  # where depth is judged: rows, columns (slices)
    frame: tuple | None = None  # KITTI: rows and columns that are kept, at the bottom in the middle
    size: int = 0  # with crop and patch: see Protocol
    crop: int = 0
    patch: int = 1

    def __len__(self) -> int:
        return len(self.memory["image"]) if self.memory else len(self.rows)

    def batches(self, order, workers: int = 0):
        """Yield dicts of stacked items. order: lists of numbers, or of (number, u) for crops."""
        if not self.memory:
            return torch.utils.data.DataLoader(self, batch_sampler=order, num_workers=workers,
                                               collate_fn=stack, generator=torch.Generator())
        device = self.memory["image"].device
        at = (torch.as_tensor(numbers, device=device) for numbers in order)
        return ({k: v[i] for k, v in self.memory.items()} for i in at)

    def __getitem__(self, key) -> dict:
        i, u = key if isinstance(key, tuple) else (key, None)
        row = self.rows[i]
        # A mask lies as the pixels do, whatever EXIF says, so its picture must not be turned.
        img = read_picture(row["image"], upright="label" in row)
        if "label" in row:  # the middle of the picture
            img = TF.resize(img, [self.size * 8 // 7], antialias=True)
            return {"image": TF.center_crop(img, [self.size]), "label": torch.tensor(row["label"])}
        item = {"image": img}
        if "mask" in row:
            item["mask"] = self.mask(row["mask"])
        if "depth" in row:
            item["depth"] = self.depth(row["depth"])
        for kind, x in item.items():
            if x.shape[-2:] != img.shape[-2:]:
                raise ValueError(f"{row[kind]} has {tuple(x.shape[-2:])} pixels (rows, columns), "
                                 f"{row['image']} has {tuple(img.shape[-2:])}; make them equal")
        if self.frame:
            h, w = img.shape[-2:]
            top, left = h - min(self.frame[0], h), (w - min(self.frame[1], w)) // 2
            item = {k: x[..., top:, left : left + self.frame[1]] for k, x in item.items()}
        if u:
            return random_crop(item, u, self.size, self.crop) | {"name": row["image"]}
        if self.region:
            judged = torch.zeros_like(item["depth"])
            judged[self.region] = item["depth"][self.region]
            item["depth"] = judged
        h, w = item["image"].shape[-2:]
        scale = self.size / min(h, w) if self.size else 1
        fitted = [max(round(n * scale / self.patch), 1) * self.patch for n in (h, w)]
        item["image"] = TF.resize(item["image"], fitted, antialias=True)
        return item | {"name": row["image"]}

    def mask(self, file) -> Tensor:
        """A file's classes (H, W) uint8; ValueError where it is no map of this set's classes."""
        mask = read_numbers(file, "P", "L")
        mask = mask if self.ids is None else self.ids[mask.long()]
        beyond = mask[(mask >= len(self.classes)) & (mask != 255)]
        if len(beyond):
            raise ValueError(f"{file} has class {beyond.max()}, but the set has only "
                             f"{len(self.classes)}, from 0 on; mend the mask or classes.txt")
        return mask

    def depth(self, file) -> Tensor:
        """A file's depth (H, W), metres; 0 where there is none, or none that counts."""
        count = read_numbers(file, "I;16", "I")
        if self.rotated:
            count = count >> 3 | count << 13 & 0xFFFF
        depth = count * self.unit
        return torch.where(depth <= self.max_depth, depth, self.max_depth if self.cut else 0)


# How a set is opened: (folder, split "train" or "val") -> Pictures. The first lines say what is
# expected in the folder and where it is had, to readers and in error messages.


def pairs(at: Path, split: str) -> Pictures:
    """images/{train,val}/NAME.jpg (or png), and one or both of masks/{train,val}/NAME.png (8-bit
    index, 255: ignored) and depth/{train,val}/NAME.png (16-bit millimetres, 0: none); if you like,
    classes.txt, lines "CLASS" or "NUMBER<tab>CLASS", from 0 on"""
    folders = {"mask": at / "masks" / split, "depth": at / "depth" / split}
    folders = {kind: folder for kind, folder in folders.items() if folder.is_dir()}
    if not folders:
        raise OSError(f"neither masks/{split} nor depth/{split} is there")
    files = [f for f in sorted((at / "images" / split).iterdir())
             if f.suffix.lower() in KINDS and not f.name.startswith(".")]
    rows = [{"image": str(f)} | {kind: str(d / f"{f.stem}.png") for kind, d in folders.items()}
            for f in files]
    labels = {kind: sorted(f for f in (at / kind / "train").glob("*.png") if f.name[0] != ".")
              for kind in ("masks", "depth")}

    far = 0.0  # the largest depth of the training pictures
    if "depth" in folders:
        far = max((read_numbers(f, "I;16", "I").max().item() for f in labels["depth"]), default=0)
    names = ()
    if "mask" in folders and (at / "classes.txt").exists():
        lines = (line.strip().split("\t") for line in (at / "classes.txt").read_text().splitlines())
        names = [line[len(line) > 1] for line in lines if line[0] and line[0][0] != "#"]
    elif "mask" in folders:  # numbers, up to the largest of the training pictures
        largest = 0
        for mask in map(Pictures(classes=range(255)).mask, labels["masks"]):
            largest = max(largest, *mask[mask != 255].unique().tolist(), 0)
        names = map(str, range(largest + 1))
    return Pictures(rows, classes=tuple(names), max_depth=far / 1000)


def voc(at: Path, split: str) -> Pictures:
    """VOCdevkit/VOC2012/ with JPEGImages, SegmentationClass and ImageSets/Segmentation, from
    host.robots.ox.ac.uk/pascal/VOC/voc2012"""
    found = torchvision.datasets.VOCSegmentation(at, "2012", split)
    names = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog "
             "horse motorbike person pottedplant sheep sofa train tvmonitor")
    rows = [{"image": a, "mask": b} for a, b in zip(found.images, found.masks)]
    return Pictures(rows, classes=tuple(names.split()))


def ade20k(at: Path, split: str) -> Pictures:
    """ADEChallengeData2016/ with images/{training,validation} and annotations/ the same, from
    data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"""
    at, part = at / "ADEChallengeData2016", {"train": "training", "val": "validation"}[split]
    rows = [{"image": str(f), "mask": str(at / "annotations" / part / f"{f.stem}.png")}
            for f in sorted((at / "images" / part).glob("*.jpg"))]
    ids = (torch.arange(256) + 255).to(torch.uint8)  # class 1 is ours 0; 0, "other", is ignored
    return Pictures(rows, ids=ids, classes=tuple(f"class {i + 1}" for i in range(150)))


def cityscapes(at: Path, split: str) -> Pictures:
    """leftImg8bit/{train,val} and gtFine/{train,val}, from www.cityscapes-dataset.com"""
    found = torchvision.datasets.Cityscapes(str(at), split, target_type="semantic")
    kept = {c.train_id: c for c in found.classes if 0 <= c.train_id < 255}
    ids = torch.full((256,), 255, dtype=torch.uint8)
    for c in kept.values():
        ids[c.id] = c.train_id
    rows = sorted(zip(found.images, (t[0] for t in found.targets)))
    return Pictures([{"image": a, "mask": b} for a, b in rows], ids=ids,
                    classes=tuple(kept[i].name for i in range(19)))


def listed(file: Path, images: Path, depths: Path) -> list[dict]:
    """Lines "PICTURE DEPTH ..." -> rows; pictures without depth ("None") are left out."""
    lines = [line.split() for line in file.read_text().splitlines() if line.strip()]
    if short := [line for line in lines if len(line) < 2]:
        raise OSError(f"{file} has a line {short[0][0]!r} without a second name")
    return [{"image": str(images / a.strip("/")), "depth": str(depths / b.strip("/"))}
            for a, b, *_ in lines if b != "None"]


EIGEN, GARG = (slice(45, 471), slice(41, 601)), (slice(143, 349), slice(43, 1172))


def nyu(at: Path, split: str) -> Pictures:
    """nyu_train.txt and nyu_test.txt, lines "PICTURE DEPTH FOCAL", from the splits of
    github.com/zhyever/Monocular-Depth-Estimation-Toolbox; and what they name, from
    github.com/cleinc/bts"""
    if split == "train":
        return Pictures(listed(at / "nyu_train.txt", at, at))
    return Pictures(listed(at / "nyu_test.txt", at, at), region=EIGEN)


def kitti(at: Path, split: str) -> Pictures:
    """kitti_eigen_train.txt and kitti_eigen_test.txt, lines "PICTURE DEPTH FOCAL", from the splits
    of github.com/zhyever/Monocular-Depth-Estimation-Toolbox; pictures in input/, from
    www.cvlibs.net/datasets/kitti/raw_data.php; depth in gt_depth/, from eval_depth.php there"""
    name = f"kitti_eigen_{'train' if split == 'train' else 'test'}.txt"
    return Pictures(listed(at / name, at / "input", at / "gt_depth"), unit=1 / 256, max_depth=80.0,
                    frame=(352, 1216), region=None if split == "train" else GARG)


def sunrgbd(at: Path, split: str) -> Pictures:
    """nyu/ as --data nyu wants it; SUNRGBD/ with SUNRGBD_val_splits.txt, lines "PICTURE DEPTH",
    from the splits of github.com/zhyever/Monocular-Depth-Estimation-Toolbox, and in it SUNRGBD/kv1
    and the others, from rgbd.cs.princeton.edu"""
    if split == "train":
        return nyu(at / "nyu", split)
    at = at / "SUNRGBD"
    return Pictures(listed(at / "SUNRGBD_val_splits.txt", at, at), rotated=True, max_depth=8.0,
                    cut=True, region=EIGEN)


def imagefolder(at: Path, split: str) -> Pictures:
    """train/CLASS/ and val/CLASS/ with pictures"""
    found = torchvision.datasets.ImageFolder(
        at / split, is_valid_file=lambda f: f.lower().endswith(KINDS) and Path(f).name[0] != ".")
    rows = [{"image": file, "label": label} for file, label in found.samples]
    return Pictures(rows, labels=tuple(found.classes))


OPEN = {f.__name__: f for f in (pairs, voc, ade20k, cityscapes, nyu, kitti, sunrgbd, imagefolder)}


@lru_cache(maxsize=4)
def rendered(split: str, size: int, n: int, device: torch.device) -> Pictures:
    """The first n Scenes of a split; made once in a process."""
    memory = Scenes(split, size)(torch.arange(n, device=device))
    return Pictures(memory=memory, classes=Scenes.classes, labels=Scenes.labels,
                    max_depth=Scenes.max_depth)


# --------------------------------------------------------------------------------------------------
# The protocol: what is measured and how.


def rates(text: str) -> tuple[float, ...]:
    """A flag's reader: a comma list of learning rates."""
    return tuple(map(within(float, 1e-9, 1e3), text.split(",")))


def flag(kind, default, help: str):
    """A field of Protocol that is a flag of the same name, read by `kind`."""
    return field(default=default, metadata={"kind": kind, "help": help})


PIXELS, COUNT = within(int, 0, 16_384), within(int, 1, 10**9)


@dataclass(frozen=True)
class Protocol:
    """What is measured and how, see the top of this file. PROTOCOLS has one for every data set."""

    tasks: tuple = flag(names, TASKS, "comma list of seg, depth, cls, knn")
    image_size: int = flag(PIXELS, 0, "shorter side of the pictures, pixels; 0: as they are")
    crop: int = flag(PIXELS, 0, "side of the crops that heads are trained on; 0: whole pictures")
    window: int = flag(PIXELS, 0, "side of the windows to test in; 0: whole pictures")
    flip: bool = flag(bool, False, "test on the mirrored picture, too, and average")
    layer: int | None = flag(COUNT, None, "number of blocks that features come from; all")
    cat_cls: bool = flag(bool, False, "[CLS] beside every patch")
    iterations: int = flag(COUNT, 1000, "of the dense heads")
    batch_size: int = flag(within(int, 1, 65_536), 32, "pictures an iteration")
    lr: tuple = flag(rates, (1e-2,), "of the dense heads; of a comma list the best is chosen")
    warmup: float = flag(within(float, 0, 1), 0.1, "share of the iterations in which it rises")
    train: int = flag(within(int, 1, 10**6), 2000, "number of Scenes to train heads on")
    test: int = flag(within(int, 1, 10**6), 1000, "number of Scenes to test on")
    split: str = flag(str, "test", "split of Scenes to test on")
    seed: int = flag(within(int, 0, 2**62), 0, "of the heads and their batches")


SEG = Protocol(("seg",), 512, 512, 512, iterations=40_000, batch_size=16, lr=(1e-3,),
               warmup=1500 / 40_000)
DEPTH = Protocol(("depth",), 480, flip=True, iterations=38_400, batch_size=16,
                 lr=(3e-4, 1e-3, 5e-3), warmup=1 / 3)
PROTOCOLS = {
    "scenes": Protocol(TASKS, iterations=2000, batch_size=128, lr=(3e-2,)),
    "pairs": Protocol(DENSE),
    "voc": SEG, "ade20k": SEG, "cityscapes": replace(SEG, image_size=1024),
    "nyu": DEPTH, "kitti": replace(DEPTH, image_size=352), "sunrgbd": DEPTH,
    "imagefolder": Protocol(("cls", "knn"), 224)}


def open_set(data: str, root: str, p: Protocol, patch: int, device) -> list[Pictures]:
    """The training and the test split. ValueError: what is missing, expected, and had where."""
    if data == "scenes":
        if p.split == "probe":
            raise ValueError("--split probe: heads are trained on it; give test, val or train")
        size = max(round(p.image_size / patch), 1) * patch if p.image_size else 8 * patch
        return [rendered("probe", size, p.train, device), rendered(p.split, size, p.test, device)]
    at, sets = Path(root or f"data/{data}"), []
    wanted = f"--data {data} wants in --root {at}: " + " ".join(OPEN[data].__doc__.split())
    for split in ("train", "val"):
        try:
            found = OPEN[data](at, split)
        except (OSError, RuntimeError, KeyError) as err:
            raise ValueError(f"{str(err).splitlines()[0]}; {wanted}") from None
        files = [row[k] for row in found.rows for k in ("image", "mask", "depth") if k in row]
        missing = [file for file in files if not os.path.exists(file)]
        if not files:
            raise ValueError(f"no picture in split {split}; {wanted}")
        if missing:
            raise ValueError(f"{len(missing)} of {len(files)} files are missing, as {missing[0]}; "
                             f"{wanted}")
        sets.append(replace(found, size=p.image_size, crop=p.crop, patch=patch))
    if data == "imagefolder" and not p.image_size:
        raise ValueError("--image-size 0: imagefolder cuts all pictures to one side; give it")
    if sets[0].labels != sets[1].labels:
        raise ValueError(f"train/ and val/ of {at} have other classes; {wanted}")
    return sets


# --------------------------------------------------------------------------------------------------
# Frozen features.

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pictures, RGB in [0, 1]


@lru_cache
def constant(values: tuple, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor of these numbers, made once: copying them waits until a GPU has done its work."""
    return torch.tensor(values, device=device, dtype=dtype)


def normalise(img: Tensor) -> Tensor:
    """Pictures (B, 3, H, W), RGB in [0, 1] -> what every network here is trained on."""
    mean, std = (constant(x, img.device, img.dtype)[:, None, None] for x in (MEAN, STD))
    return (img - mean) / std


QUIET = 0.5 if sys.stderr.isatty() else 20  # seconds between a bar's pictures: files keep them all


def bar(stream, title: str, total: int):
    return tqdm(stream, title, total, leave=False, dynamic_ncols=True, mininterval=QUIET)


@torch.no_grad()
def tokens(model: ViT, img: Tensor, p: Protocol) -> tuple[Tensor, Tensor]:
    """uint8 (B, 3, H, W) -> what dense heads see, (B, h, w, D) or with --cat-cls (B, h, w, 2 D);
    and what `linear` and `knn` see, [CLS] beside the mean patch, (B, 2 D)."""
    with torch.autocast(img.device.type, torch.bfloat16, enabled=img.is_cuda):
        out = model(normalise(img / 255), layer=p.layer)
    cls, x = out["cls"].float(), out["patches"].float()
    image = torch.cat([cls, x.mean(1)], 1)
    if p.cat_cls:
        x = torch.cat([x, cls[:, None].expand_as(x)], 2)
    rows = img.shape[-2] // model.config.patch
    return x.unflatten(1, (rows, -1)), image


def features(model: ViT, data: Pictures, p: Protocol, dense: bool, workers: int) -> dict:
    """Every picture of a split, once: `image` (n, 2 D) and `label`, if it has labels; dense: also
    `x` (n, h, w, D), `mask` and `depth`."""
    device, out = next(model.parameters()).device, {}
    order = [i.tolist() for i in torch.arange(len(data)).split(50)]
    for i, batch in zip(order, bar(data.batches(order, workers), "frozen features", len(order))):
        x, image = tokens(model, batch["image"].to(device), p)
        found = {"image": image} | {k: batch[k] for k in ("label",) if k in batch}
        if dense:
            found |= {"x": x} | {k: batch[k] for k in ("mask", "depth") if k in batch}
        for k, v in found.items():
            if k not in out:  # in place from the start: half the memory of a list that is joined
                out[k] = v.new_empty(len(data), *v.shape[1:], device=device)
            out[k][i] = v.to(device)
    return out


# --------------------------------------------------------------------------------------------------
# Dense heads: one linear layer on every patch.


@lru_cache(maxsize=64)
def bilinear(n_in: int, n_out: int, device: torch.device) -> Tensor:
    """Weights (n_out, n_in) of bilinear resizing along one side, as F.interpolate's."""
    eye = torch.eye(n_in, device=device)[None]
    return F.interpolate(eye, size=n_out, mode="linear", align_corners=False)[0].T.contiguous()


class Head(nn.Module):
    """A linear probe: BatchNorm and one linear layer, to classes or to bins of depth."""

    def __init__(self, task: str, width: int, classes: int, max_depth: float, bins: int = 256):
        super().__init__()
        self.task = task
        self.norm = nn.BatchNorm1d(width)
        self.linear = nn.Linear(width, classes if task == "seg" else bins)
        self.register_buffer("bins", torch.linspace(1e-3, max_depth, bins))  # metres
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """(B, h, w, D), and weights of upsampling, rows (H, h), columns (W, w) -> logits
        (B, classes, H, W), or depth in metres (B, H, W)."""
        x = self.linear(self.norm(x.flatten(0, 2))).unflatten(0, x.shape[:3])  # (B, h, w, classes)
        if self.task == "depth":  # sum of weights x bins / sum of weights, weights relu + 0.1
            bins = torch.stack([self.bins, torch.ones_like(self.bins)], 1)  # (256, 2)
            total = x.relu() @ bins + 0.1 * bins.sum(0)
            x = total[..., :1] / total[..., 1:]  # (B, h, w, 1)
        x = rows @ x.movedim(-1, 1) @ columns.T  # (B, classes, H, W)
        return x if self.task == "seg" else x[:, 0]


def silog(predicted: Tensor, truth: Tensor) -> Tensor:
    """Scale-invariant log loss: sqrt(var(g) + 0.15 mean(g)^2), g = log predicted - log truth, on
    valid pixels (truth > 0, in metres); 0 where there is none."""
    valid = truth > 0
    if not valid.any():
        return predicted.sum() * 0
    g = predicted[valid].log() - truth[valid].log()
    return (g.var(unbiased=False) + 0.15 * g.mean() ** 2 + 1e-8).sqrt()


def head_loss(task: str, out: Tensor, batch: dict[str, Tensor]) -> Tensor:
    if task == "depth":
        return silog(out, batch["depth"])
    total = F.cross_entropy(out, batch["mask"].long(), ignore_index=255, reduction="sum")
    return total / (batch["mask"] != 255).sum().clamp(min=1)  # a batch may be all ignored


def train_heads(model: ViT, data: Pictures, index: Tensor, cache: dict, p: Protocol,
                workers: int) -> dict[tuple[float, str], Head]:
    """Train on the pictures `index` of a split, from cached features (x, mask, depth) or, without a
    cache, with the backbone in the loop. Returns a head for every (rate in p.lr, dense task)."""
    device, patch = next(model.parameters()).device, model.config.patch
    draw, width = torch.Generator().manual_seed(p.seed), model.config.width * (1 + p.cat_cls)
    with torch.random.fork_rng(devices=[]):  # heads are made on the CPU: the same on all devices
        torch.manual_seed(p.seed)
        new = [Head(t, width, len(data.classes), data.max_depth) for t in p.tasks if t in DENSE]
    heads = {(lr, h.task): copy.deepcopy(h).to(device) for lr in p.lr for h in new}
    groups = [{"params": head.parameters(), "lr": lr} for (lr, _), head in heads.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
    rise, n = max(p.warmup * p.iterations, 1), p.iterations
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / rise, (n - t) / max(n - rise, 1), 1))

    drawn = (index[torch.randint(len(index), (p.batch_size,), generator=draw)] for _ in range(n))
    if cache:
        stream = ({k: v[i.to(device)] for k, v in cache.items()} for i in drawn)
    elif p.crop:
        crops = (list(zip(i.tolist(), torch.rand(len(i), 4, generator=draw).tolist()))
                 for i in drawn)
        stream = data.batches(crops, workers)
    else:
        stream = data.batches((i.tolist() for i in drawn), workers)
    phase, s = torch.Generator().manual_seed(p.seed), max(patch // 2, 1)
    for batch in bar(stream, "training heads", n):
        batch = {k: v.to(device) for k, v in batch.items()}
        x = batch["x"] if cache else tokens(model, batch["image"], p)[0]
        # The loss looks at every s-th row and column, from a random first one: in the mean the same
        # as at all of them, for a part of the work.
        top, left = torch.randint(s, (2,), generator=phase).tolist()
        truth = {k: batch[k] for k in ("mask", "depth") if k in batch}
        h, w = next(iter(truth.values())).shape[1:]
        truth = {k: v[:, top::s, left::s] for k, v in truth.items()}
        rows = bilinear(x.shape[1], h, device)[top::s]
        columns = bilinear(x.shape[2], w, device)[left::s]
        losses = [head_loss(h.task, h(x, rows, columns), truth) for h in heads.values()]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        schedule.step()
    return {key: head.eval() for key, head in heads.items()}


@torch.no_grad()
def predict(model: ViT, heads: list[Head], img: Tensor, size, p: Protocol) -> dict[str, Tensor]:
    """uint8 (B, 3, H', W') -> logits and depth at `size` (H, W), in windows and mirrored as the
    protocol says."""
    (h, w), win = img.shape[-2:], p.window or max(img.shape[-2:])
    step = max(win * 2 // 3, 1)
    tops, lefts = ([*range(0, n - win, step), max(n - win, 0)] for n in (h, w))
    total, times = {}, torch.zeros(h, w, device=img.device)
    for top, left in product(tops, lefts):
        at = ..., slice(top, top + win), slice(left, left + win)
        lines = [bilinear(n // model.config.patch, n, img.device) for n in img[at].shape[-2:]]
        x = tokens(model, img[at], p)[0]
        mirrored = tokens(model, img[at].flip(-1), p)[0] if p.flip else None
        for head in heads:
            out = head(x, *lines)
            if p.flip:
                out = (out + head(mirrored, *lines).flip(-1)) / 2
            if head.task not in total:
                total[head.task] = out.new_zeros(*out.shape[:-2], h, w)
            total[head.task][at] += out
        times[at] += 1
    mean = {task: v / times for task, v in total.items()}
    if (h, w) == tuple(size):
        return mean
    rows, columns = (bilinear(n, m, img.device) for n, m in zip((h, w), size))
    return {task: rows @ v @ columns.T for task, v in mean.items()}


# --------------------------------------------------------------------------------------------------
# Pictures as a whole: k-NN and linear classes.


def knn(x: Tensor, labels: Tensor, test: Tensor, classes: int, k: int = 20) -> Tensor:
    """DINO's weighted k-NN: [CLS] (n, D), labels (n,), [CLS] (m, D) -> classes (m,). The k nearest
    by cosine vote, with weight exp(cosine / 0.07)."""
    x, out = F.normalize(x, dim=1), []
    for part in F.normalize(test, dim=1).split(256):
        cosine, near = (part @ x.T).topk(min(k, len(x)), dim=1)
        votes = F.one_hot(labels[near], classes) * torch.exp(cosine / 0.07)[..., None]
        out.append(votes.sum(1).argmax(1))
    return torch.cat(out)


PENALTIES = 1e-1, 1e-2, 1e-3, 1e-4  # of the squared weights / 2, beside the mean cross-entropy


def softmax_regression(x: Tensor, labels: Tensor, classes: int, penalty: float,
                       weight: Tensor | None = None) -> Tensor:
    """x (n, D), the last column 1 -> weight (D, classes) that has the least mean cross-entropy +
    penalty / 2 |weight|^2, the bias (last row) left out; looked for from `weight` on."""
    weight = x.new_zeros(x.shape[1], classes) if weight is None else weight.clone()
    weight.requires_grad_()
    optimizer = torch.optim.LBFGS([weight], max_iter=100, tolerance_grad=1e-4,
                                  line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight, labels) + penalty / 2 * weight[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def linear(x: Tensor, labels: Tensor, test: Tensor, classes: int) -> tuple[Tensor, str]:
    """[CLS] beside the mean patch, (n, 2 D) and (m, 2 D) -> classes (m,), and which input and
    penalty were best on a fifth of the training pictures that the choice was not trained on."""
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    x, test = (F.pad((v - mean) / std, (0, 1), value=1) for v in (x, test))  # the bias
    cls = torch.arange(x.shape[1], device=x.device)
    inputs = {"[CLS]": torch.cat([cls[: x.shape[1] // 2], cls[-1:]]), "[CLS] and mean patch": cls}
    held = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)) % 5 == 0
    held = held.to(x.device)  # in no order that the set may have
    best, chosen = -1, None
    for name, columns in inputs.items():
        weight = None  # the one of a larger penalty is a good start for the next
        for penalty in PENALTIES:
            weight = softmax_regression(x[~held][:, columns], labels[~held], classes, penalty,
                                        weight)
            right = ((x[held][:, columns] @ weight).argmax(1) == labels[held]).sum().item()
            if right > best:
                best, chosen = right, (name, columns, penalty, weight)
    name, columns, penalty, weight = chosen
    weight = softmax_regression(x[:, columns], labels, classes, penalty, weight)
    return (test[:, columns] @ weight).argmax(1), f"{name}, penalty {penalty:g}"


# --------------------------------------------------------------------------------------------------
# Metrics.


def confusion(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Class maps (B, H, W) -> counts (B, classes, classes), row = truth; truth 255 is ignored."""
    bins = classes**2 + 1  # of a picture; the last is for what is ignored
    pair = torch.where(truth == 255, classes**2, truth.long() * classes + predicted)
    pair = pair + bins * torch.arange(len(pair), device=pair.device)[:, None, None]
    counts = torch.bincount(pair.flatten(), minlength=len(truth) * bins)
    return counts.view(len(truth), bins)[:, :-1].unflatten(1, (classes, classes))


def class_iou(counts: Tensor) -> Tensor:
    """(..., C, C) -> intersection over union per class (..., C), in [0, 1]; NaN: nobody has it."""
    hit = counts.diagonal(dim1=-2, dim2=-1).double()
    return hit / (counts.sum(-1) + counts.sum(-2) - hit)


def depth_errors(predicted: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Depths p, t (B, H, W) in metres -> per picture (B,), over its valid pixels, t > 0: rmse
    sqrt(mean((p - t)^2)), metres; absrel mean(|p - t| / t); delta1, % of max(p / t, t / p) < 1.25.
    NaN where none is valid."""
    valid = truth > 0

    def mean(v: Tensor) -> Tensor:
        return (v * valid).flatten(1).sum(1) / valid.flatten(1).sum(1)

    ratio = predicted / torch.where(valid, truth, 1)
    return {"rmse": mean((predicted - truth) ** 2).sqrt(), "absrel": mean((ratio - 1).abs()),
            "delta1": 100 * mean((torch.maximum(ratio, 1 / ratio) < 1.25).float())}


def scores(stats: dict[str, Tensor], weight: Tensor | None = None) -> dict[str, Tensor]:
    """Numbers of n pictures -> metrics of the set, (R,) each.
    weight (R, n): how often each picture counts, in R cases; None: one case, once each."""
    weight = torch.ones(1, len(stats["picture"])).double() if weight is None else weight
    out = {}
    if "counts" in stats:
        counts = weight @ stats["counts"].flatten(1).cpu().double()
        out["miou"] = 100 * class_iou(counts.unflatten(1, stats["counts"].shape[1:])).nanmean(1)
    for name in METRICS.keys() & stats.keys():
        value = stats[name].cpu().double()
        known = ~value.isnan()
        out[name] = weight @ torch.where(known, value, 0) / (weight * known).sum(1)
    return {name: out[name] for name in METRICS if name in out}


def difference(a: dict, b: dict, draws: int = 1000) -> dict[str, tuple[float, float, float]]:
    """Two models' numbers of the same pictures -> b - a of every metric, and its 95 % interval over
    test pictures (paired bootstrap; it knows nothing of another training seed)."""
    n, out = len(a["picture"]), {}
    draw = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(0))
    weight = torch.zeros(draws, n).scatter_add_(1, draw, torch.ones(draws, n)).double()
    (once_a, many_a), (once_b, many_b) = ((scores(s), scores(s, weight)) for s in (a, b))
    for k in once_a:
        interval = (many_b[k] - many_a[k]).quantile(torch.tensor([0.025, 0.975]).double())
        out[k] = ((once_b[k] - once_a[k]).item(), *interval.tolist())
    return out


# --------------------------------------------------------------------------------------------------
# The evaluation.


def judge(model: ViT, heads: list[Head], data: Pictures, index: Tensor, p: Protocol, workers: int,
          keep: int = 0) -> tuple[dict[str, Tensor], list[dict]]:
    """Test on the pictures `index` of a split: numbers of each picture, in rows, and pictures with
    what was predicted, of the first `keep`."""
    device, stats, shots = next(model.parameters()).device, {}, []
    single = heads and not data.memory  # of any size
    order = [i.tolist() for i in index.split(1 if single else 50)]
    for batch in bar(data.batches(order, workers), "testing", len(order)):
        batch = {k: v.to(device) for k, v in batch.items()}
        out, row = {}, {"picture": torch.ones(len(batch["image"]))}
        if heads:
            size = next(batch[k].shape[-2:] for k in ("mask", "depth") if k in batch)
            out = predict(model, heads, batch["image"], size, p)
        if {"cls", "knn"} & set(p.tasks):
            row |= {"image": tokens(model, batch["image"], p)[1], "label": batch["label"]}
        if "seg" in out:
            out["seg"] = out["seg"].argmax(1)
            row["counts"] = confusion(out["seg"], batch["mask"], len(data.classes))
        if "depth" in out:
            out["depth"] = out["depth"].clamp(max=data.max_depth)
            row |= depth_errors(out["depth"], batch["depth"])
        for k, v in row.items():
            stats.setdefault(k, []).append(v)
        for i in range(min(len(batch["image"]), keep - len(shots))):
            shots.append({"picture": batch["image"][i].cpu()}
                         | {f"true {task}": batch[kind][i].cpu()
                            for task, kind in zip(DENSE, ("mask", "depth")) if task in out}
                         | {f"predicted {task}": v[i].cpu() for task, v in out.items()})
    stats = {k: torch.cat(v) for k, v in stats.items()}
    if "counts" in stats and not stats["counts"].any():
        raise ValueError("no picture has a pixel with a class: all masks are 255, ignored")
    if "rmse" in stats and stats["rmse"].isnan().all():
        raise ValueError(f"no picture has valid depth, above 0 and up to {data.max_depth:g} m; the "
                         f"first is {data.rows[index[0]]['depth']}")
    return stats, shots


def best_heads(model: ViT, train: Pictures, cache: dict, p: Protocol, workers: int):
    """A trained head for each dense task, and the rate that each was trained with: of several, the
    one that is best on a tenth of the pictures, which is then held back from training."""
    tasks, every = [t for t in p.tasks if t in DENSE], torch.arange(len(train))
    held = every % 10 == 0 if len(p.lr) > 1 else every < 0
    trained = train_heads(model, train, every[~held], cache, p, workers)
    sound = [lr for lr in p.lr if all(v.isfinite().all() for t in tasks
                                      for v in trained[lr, t].parameters())]
    if not sound:
        raise ValueError(f"the heads diverged with --lr {','.join(map(str, p.lr))}; lower it")
    losses = {}  # {(rate, task): the smaller the better}
    for lr in sound if held.any() else ():
        some = [trained[lr, task] for task in tasks]
        stats, _ = judge(model, some, train, every[held], replace(p, tasks=tuple(tasks)), workers)
        found = scores(stats)
        losses |= {(lr, "seg"): -found.get("miou", 0), (lr, "depth"): found.get("rmse", 0)}
    best = {task: min(sound, key=lambda lr: losses.get((lr, task), 0)) for task in tasks}
    return [trained[best[t], t] for t in tasks], {t: f"lr {best[t]:g}" for t in tasks}


def evaluate(model: ViT, data: str = "scenes", root: str = "", p: Protocol | None = None,
             workers: int = 0, keep: int = 0, cache_gib: float = 4.0) -> tuple[dict, dict, list]:
    """All tasks of a protocol, on a frozen model in eval mode, on its device.

    Returns the result (metrics as in `scores`, IoU per class in %, protocol, seconds), the numbers
    of every test picture, and pictures with predictions. Features of whole pictures are computed
    once if they and their labels take no more than cache_gib. ValueError: whatever is wrong with
    the data or the protocol.
    """
    start, p, patch = time.time(), p or PROTOCOLS[data], model.config.patch
    if p.layer is not None and p.layer > model.config.depth:
        raise ValueError(f"--layer {p.layer} is outside 1 to {model.config.depth}, the depth here")
    crop, window = (side and max(round(side / patch), 1) * patch for side in (p.crop, p.window))
    p = replace(p, crop=crop, window=window)  # whole patches
    train, test = open_set(data, root, p, patch, next(model.parameters()).device)

    kinds = set.intersection(*(set(s.memory or s.rows[0]) for s in (train, test)))
    needs = {"seg": "mask", "depth": "depth", "cls": "label", "knn": "label"}
    able = [task for task in TASKS if needs[task] in kinds]
    if p.tasks != PROTOCOLS[data].tasks and set(p.tasks) - set(able):
        raise ValueError(f"--tasks {','.join(p.tasks)}: here {data} has what it takes for "
                         f"{','.join(able)} only")
    p = replace(p, tasks=tuple(task for task in p.tasks if task in able))
    if len(train) < 2 and ("cls" in p.tasks or len(p.lr) > 1):
        raise ValueError("one training picture is too few to choose a learning rate by; give more")

    # Features, once if they fit; then heads on them; then the test set.
    h, w = (train.memory["image"][0] if train.memory else train[0]["image"]).shape[-2:]
    bytes_each = h * w * (4 * model.config.width * (1 + p.cat_cls) / patch**2 + 5)
    fits = len(train) * bytes_each <= cache_gib * 2**30
    dense, image = set(p.tasks) & set(DENSE), set(p.tasks) & {"cls", "knn"}
    once = bool(dense) and not p.crop and fits
    known = features(model, train, p, once, workers) if once or image else {}
    cache = {k: known.pop(k) for k in ("x", "mask", "depth") if k in known}
    heads, chosen = best_heads(model, train, cache, p, workers) if dense else ([], {})
    stats, shots = judge(model, heads, test, torch.arange(len(test)), p, workers, keep)
    if "cls" in p.tasks:
        guess, chosen["cls"] = linear(known["image"], known["label"], stats["image"],
                                      len(train.labels))
        stats["linear"] = 100.0 * (guess == stats["label"])
    if "knn" in p.tasks:
        cls, test_cls = (v[:, : model.config.width] for v in (known["image"], stats["image"]))
        guess = knn(cls, known["label"], test_cls, len(train.labels))
        stats["knn"] = 100.0 * (guess == stats["label"])

    result = {k: v.item() for k, v in scores(stats).items()}
    if "counts" in stats:
        result["iou"] = dict(zip(test.classes, (100 * class_iou(stats["counts"].sum(0))).tolist()))
    protocol = asdict(replace(p, train=len(train), test=len(test))) | {"height": h, "width": w}
    result |= {"chosen": chosen, "protocol": protocol, "versions": versions(),
               "device": str(next(model.parameters()).device),
               "seconds": round(time.time() - start, 1)}
    return result, stats, shots


def versions() -> dict[str, str]:
    """Of this project (git), Python, torch, torchvision: what a number was made with."""
    git = "git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"
    try:
        git = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        git = ""
    return {"git": git or "unknown", "python": sys.version.split()[0], "torch": torch.__version__,
            "torchvision": torchvision.__version__}


# --------------------------------------------------------------------------------------------------
# The command.


def checkpoint_of(name: str) -> Path:
    """The file of a run folder, or of a checkpoint or weights named as they are."""
    return Path(name) / "last.pt" if Path(name).is_dir() else Path(name)


def home(path: Path) -> Path:
    """Where the results of a checkpoint go: its run folder; runs/FILE, if it has none."""
    return path.parent if path.name == "last.pt" else Path("runs") / path.stem


def title(network: str, data: str, root: str) -> str:
    """The first words of a result's name in eval.json; then come the options that were changed."""
    place = [Path(root).name] if data in ("pairs", "imagefolder") and root else []
    return " ".join([network, data, *place])


def line(result: dict) -> str:
    return "  ".join(f"{k} {text.format(result[k])}" for k, text in METRICS.items() if k in result)


def draw(path: Path, shots: list[dict], classes: tuple[str, ...], far: float) -> None:
    """Test pictures, what is true of them and what heads read from the network, as a PNG."""
    rows = {}
    for kind in shots[0]:
        words = kind.replace("seg", "classes")
        if kind == "picture":
            rows[words] = [shot[kind] / 255 for shot in shots]
        elif kind.endswith("seg"):
            rows[words] = [scenes.paint_classes(shot[kind], len(classes)) for shot in shots]
        else:
            rows[words] = [scenes.paint_depth(shot[kind], far) for shot in shots]
    scenes.sheet(path, rows, classes if "true seg" in shots[0] else (),
                 far if "true depth" in shots[0] else 0.0)


def parse(argv) -> argparse.Namespace:
    raw, cuda = argparse.RawDescriptionHelpFormatter, torch.cuda.is_available()
    p = Parser(description=__doc__, formatter_class=raw)
    p.add_argument("runs", nargs="+", help="run folders, checkpoints in them, or public weights")
    g = p.add_argument_group("what is judged")
    g.add_argument("--network", default="teacher", choices=["teacher", "student", "untrained"],
                   help="untrained: as both were at step 0 (default: teacher)")
    g.add_argument("--data", default="scenes", choices=list(PROTOCOLS), help="(default: scenes)")
    g.add_argument("--root", default="", help="folder of the data set (default: data/NAME)")
    g = p.add_argument_group("protocol (defaults: the data set's, as above)")
    for f in fields(Protocol):
        kind = f.metadata["kind"]
        more = dict(type=kind) if kind is not bool else dict(action=argparse.BooleanOptionalAction)
        g.add_argument(f"--{f.name.replace('_', '-')}", help=f.metadata["help"], **more)
    g = p.add_argument_group("machine and output")
    g.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cpu", "cuda"],
                   help="CUDA_VISIBLE_DEVICES says which (default: %(default)s)")
    g.add_argument("--workers", type=within(int, 0, 256), default=8 if cuda else 2,
                   help="processes to read files (default: %(default)s)")
    g.add_argument("--save-pictures", type=within(int, 0, 64), default=0, metavar="N",
                   help="draw N test pictures, truth and prediction, into the run folder")
    return p.parse_args(argv)


def changes(args) -> dict:
    """The protocol's fields that flags change. ValueError: a flag that means nothing here."""
    p = PROTOCOLS[args.data]
    if unknown := set(args.tasks or ()) - set(TASKS):
        raise ValueError(f"--tasks: unknown {', '.join(unknown)}; choose from {', '.join(TASKS)}")
    given = {f.name: getattr(args, f.name) for f in fields(p)}
    changed = {k: v for k, v in given.items() if v is not None and v != getattr(p, k)}
    if args.data == "imagefolder":
        idle = changed.keys() - {"tasks", "image_size", "layer", "seed"}
    else:
        idle = changed.keys() & ({"crop"} if args.data == "scenes" else {"train", "test", "split"})
    if idle:
        raise ValueError(f"--data {args.data} has no use for --{min(idle).replace('_', '-')}")
    return changed


def check_device(args) -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: torch sees no GPU here; give --device cpu")


def run(args) -> None:
    check_device(args)
    changed = changes(args)
    p = replace(PROTOCOLS[args.data], **changed)
    options = [f"{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}"
               for k, v in changed.items()]
    key = " ".join([title(args.network, args.data, args.root), *options])
    paths = [checkpoint_of(name) for name in args.runs]
    models = [clsspec.load(path, args.network) for path in paths]
    for out in map(home, paths):  # before hours of work
        read_json(out / "eval.json")
        if not os.access(next(at for at in (out, *out.parents) if at.exists()), os.W_OK):
            raise ValueError(f"{out} cannot be written to, and results would go there")
    first = size = None
    for name, path, model in zip(args.runs, paths, models):
        result, stats, shots = evaluate(model.to(args.device), args.data, args.root, p,
                                        args.workers, args.save_pictures)
        record(home(path) / "eval.json", key, result)  # kept first, printed second
        print(f"{name}: {key}, {result['seconds']:.0f} s\n  {line(result)}")
        if shots:
            file = home(path) / f"{key.replace(' ', '-')}.png"
            far = max((shot["true depth"].max().item() for shot in shots if "true depth" in shot),
                      default=0)
            draw(file, shots, tuple(result.get("iou", ())), far)
            print(f"  {file}")
        seen = "{height} x {width} px".format(**result["protocol"])
        if first:
            other = "" if seen == size else f", which it saw at {size}, this one at {seen}"
            print(f"  minus {args.runs[0]}{other}, with 95 % intervals over test pictures:")
            for k, (d, low, high) in difference(first, stats).items():
                print(f"    {k:7}{d:+9.4f}   [{low:+.4f}, {high:+.4f}]")
        else:
            first, size = stats, seen


def main(argv=None) -> None:
    args = parse(argv)
    try:
        run(args)
    except (ValueError, OSError) as err:
        sys.exit(f"error: {str(err).strip().splitlines()[-1].removeprefix('ValueError: ')}")


if __name__ == "__main__":
    main()
