"""Judge frozen features: linear probes for classes and depth, k-NN and linear classes of pictures.

    python eval_dense.py runs/NAME                       # all tasks on Scenes; writes eval.json
    python eval_dense.py runs/a runs/b                   # a table, and b - a over the same pictures
    python eval_dense.py runs/NAME --network untrained   # the same network at step 0
    python eval_dense.py runs/NAME --data voc --root path/to/VOC --tasks seg

Protocol: DINOv2's linear segmentation and DINOv3's linear depth, DINO's k-NN, logistic regression.
Features  patches (and [CLS]) of the last block after the final norm, or with --layers 3,6,9,12 of
          several blocks, concatenated; --cat-cls: each patch concatenated with [CLS].
          The backbone is frozen, in eval mode, in bf16 on a CUDA GPU that has it, else in fp32.
Pictures  resized with antialias to --image-size on the shorter side (0: as they are), then to the
          nearest multiple of the patch on both sides; labels are not resized. --crop: train on
          crops of picture and labels: scale 0.5 to 2 (1 if there is depth), flip, padding of black,
          255 or no depth. Crops and windows are multiples of the patch, too.
Heads     BatchNorm and one linear layer, N(0, 0.01), bias 0; to classes, or to 256 uniform bins of
          depth from 0.001 m to the set's largest, whose mean weighted by relu + 0.1 is the depth.
          The output is upsampled bilinearly (corners not aligned) to the label's size.
Losses    cross-entropy, 255 ignored; scale-invariant log loss (`silog`) of valid pixels. Each step
          looks at every (patch / 2)th row and column of the labels, from a random first one.
Training  AdamW, weight decay 1e-4; linear warm-up, then linearly to 0; batches with replacement. Of
          several --lr each head gets the one that is best on a tenth of the pictures, held out.
Test      whole pictures, or --window, averaged where windows overlap; --flip: mirrored ones, too.
cls       [CLS], or [CLS] beside the mean patch, standardised, into softmax regression with an L2
          penalty, by L-BFGS; input and penalty chosen on a fifth, then trained on all.
knn       [CLS], cosine, k = 20, votes weigh exp(cosine / 0.07).
Metrics   miou: intersection / union over the whole set, mean over classes that truth or prediction
          has. rmse (m), absrel = mean(|p - t| / t), delta1 = share with max(p / t, t / p) < 1.25:
          per picture, then the mean. linear, knn: accuracy. In %, except rmse and absrel.

               shorter side  crop, window  iterations x batch  --lr              warm-up  classes
  scenes       8 patches     -             2000 x 128          3e-2              0.1      10
  pairs        as it is      -             1000 x 32           1e-2              0.1      its own
  voc, ade20k  512           512           40000 x 16          1e-3              1500     21, 150
  cityscapes   1024          512           40000 x 16          1e-3              1500     19
  nyu, sunrgbd 480           -; flip       38400 x 16          3e-4, 1e-3, 5e-3  a third  -
  kitti        352           -; flip       38400 x 16          3e-4, 1e-3, 5e-3  a third  -
  pets         224           224; -        1000 x 32           1e-2              0.1      2, and 37
  imagefolder, imagenette, cifar10: 256, of which the middle 224; cls and knn only
Scenes: 2000 of split "probe", 1000 of "test". Depth is valid to 20 m in scenes, 10 in nyu, 80 in
kitti, the training pictures' largest in pairs. nyu: in Eigen's crop; kitti: in Garg's, of the lower
352 x 1216; sunrgbd: with nyu's heads, in Eigen's crop, both depths cut off at 8 m. pets: seg of pet
and background, the border ignored; cls and knn of breeds, in the middle 224 of 256. --download
fetches voc, pets, imagenette and cifar10.
Unlike the papers: labels are sampled in rows and columns; for depth, pictures are not rescaled at
random; colours are not jittered; crops have no limit on a class's share; learning rates fall
linearly, and nyu's and kitti's are chosen on frames of the same videos, without Eigen's or Garg's
crop; cls reads one block, and its pictures are not augmented.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from itertools import product
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as in train.py
for stream in ("stdout", "stderr"):
    if getattr(sys, stream) is None:  # closed, as some job systems do
        setattr(sys, stream, open(os.devnull, "w"))

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps  # comes with torchvision
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import clsspec
import scenes
from clsspec import ViT, need, normalise, whole_patches

TASKS = ("seg", "depth", "cls", "knn")
DENSE = ("seg", "depth")  # these say something of every pixel, the others of a whole picture
FULL = 2**16 - 1  # the largest number of 16 bits; in a depth file it means no depth
LABEL = {"seg": "mask", "depth": "depth", "cls": "label", "knn": "label"}  # what a task needs
METRICS = {"miou": "{:.2f} %", "rmse": "{:.3f} m", "absrel": "{:.4f}", "delta1": "{:.2f} %",
           "linear": "{:.2f} %", "knn": "{:.2f} %"}
LOWER = {"rmse", "absrel"}  # of METRICS: better when they are lower

# --------------------------------------------------------------------------------------------------
# Doors, in and out: flags, pictures, JSON, results, and how a command ends. All scripts use these.
# To see how features are judged, read on from "Labelled pictures".


class Parser(argparse.ArgumentParser):
    """argparse, except that an error is one line."""

    def error(self, message: str):  # argparse's own prints the usage, half a screen of it, first
        start, _, stray = message.partition("arguments: ")
        if start == "unrecognized " and not stray.startswith("-"):  # a word, not a flag
            message += " (a list is joined by commas; a switch takes no value)"
        self.exit(2, f"error: {message}; {Path(self.prog).name} --help lists all flags\n")


def span(low, high) -> str:
    return f"{low:,} to {high:,}" if isinstance(low, int) else f"{low:g} to {high:g}"


def within(kind, low, high):
    """Makes a flag's reader: a number of this kind (int, float) from low to high, both included."""

    def number(text: str):
        try:
            value = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
        if not low <= value <= high:  # this way round, nan is outside, too
            raise argparse.ArgumentTypeError(f"{text} is outside {span(low, high)}")
        return value

    return number


def names(text: str) -> tuple[str, ...]:
    """A flag's reader: a comma list, each name once."""
    found = dict.fromkeys(filter(None, map(str.strip, text.split(","))))  # keeps the order
    if not found:
        raise argparse.ArgumentTypeError("names nothing; leave it out, or give a comma list")
    return tuple(found)


KINDS = (".jpg", ".jpeg", ".png", ".webp")


def is_picture(file) -> bool:
    """Judged by the file's name; hidden files are none."""
    name = Path(file).name.lower()
    return name.endswith(KINDS) and not name.startswith(".")


def picture_files(data) -> list[str]:
    """Paths of all pictures below a folder, sorted; or of those in a text file, one path a line,
    all relative to the file's folder, or all to the current one; or of one picture. ValueError:
    there is none."""
    at = Path(data)
    need(at.is_dir() or at.is_file(),
         f"--data {data}: neither 'scenes', nor a folder, nor a file of paths, nor a set by name "
         f"({', '.join(OPEN)})")
    if at.is_dir():
        files, been = [], set()
        for folder, inside, found in os.walk(at, followlinks=True):
            if os.path.realpath(folder) in been:  # by a link that leads back up, say
                inside.clear()
                continue
            been.add(os.path.realpath(folder))
            # Sorted, so that every machine takes the same one of a folder and a link to it.
            inside[:] = sorted(name for name in inside if not name.startswith("."))
            files += [os.path.join(folder, name) for name in found]
        files = [file for file in sorted(files) if is_picture(file) and os.path.isfile(file)]
    elif at.suffix.lower() in KINDS:
        files = [str(at)]
    else:
        try:
            lines = at.read_text("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise ValueError(f"--data {data}: neither a picture ({', '.join(KINDS)}) nor a text "
                             "file with a path a line") from None
        files = [line.strip() for line in lines if line.strip()]
        # The first hundred show what paths are relative to; millions on a distant disk take hours.
        if any((at.parent / file).exists() for file in files[:100]):
            files = [os.path.join(at.parent, file) for file in files]
    need(files, f"--data {data}: no picture ({', '.join(KINDS)}) in it or below it")
    return files


def open_picture(file, kind: str = "RGB", upright: bool = False, side: int = 0) -> Image.Image:
    """A picture as RGB, or with kind "as it is" in its own mode. upright: turned as its EXIF says.
    side: a JPEG is decoded no finer than that needs. ValueError: which file, and what is wrong."""
    if isinstance(file, Tensor):  # uint8 (3, H, W), of a set that has no file for each picture
        return TF.to_pil_image(file)
    try:
        need(os.path.isfile(file), "it is not there, or no file")
        with Image.open(file) as img:
            if side:
                img.draft("RGB", (side, side))  # at 1/2, 1/4 or 1/8, before it is decoded
            if upright:
                img = ImageOps.exif_transpose(img)  # as viewers show it
            if kind == "RGB" and img.mode.startswith("I"):  # 16 bits: scaled, not cut off at 255
                img = img.convert("I").point(lambda value: value * (1 / 256)).convert("L")
            if kind == "RGB":
                img = img.convert("RGB")
            img.load()  # now, so that an error names this file
            return img
    except Exception as err:  # whatever a decoder makes of a broken file
        why = (str(err) or type(err).__name__).splitlines()[0]
        raise ValueError(f"cannot read {file} ({why}); mend it or take it out") from None


def read_picture(file, upright: bool = True) -> Tensor:
    """uint8 (3, H, W), RGB. ValueError as in `open_picture`."""
    return TF.pil_to_tensor(open_picture(file, upright=upright))


def read_map(file, bits: int) -> Tensor:
    """A map of classes (8 bits) or of depth as stored (16), int (H, W). ValueError: other bits."""
    img = open_picture(file, "as it is")
    modes, wanted = {8: (("P", "L"), "an 8-bit index PNG"),
                     16: (("I;16", "I"), "a 16-bit grey PNG")}[bits]
    need(img.mode in modes, f"{file} must be {wanted}, but its mode is {img.mode}; convert it")
    img = img if bits == 8 else img.convert("I")  # int32: torch computes little on uint16
    return TF.pil_to_tensor(img)[0]


@contextmanager
def intact(file: Path):
    """Around code that reads a file of ours: if it holds something else, the error names it."""
    try:
        yield
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as err:
        raise ValueError(f"{file} is damaged, or not of this project ({type(err).__name__}); move "
                         "it away") from None


def read_json(file: Path) -> dict:
    """{} if there is no such file. ValueError: damaged."""
    if not file.exists():
        return {}
    with intact(file):
        return json.loads(file.read_text()) | {}  # a TypeError if it is no dict


def read_log(file: Path) -> list[dict]:
    """The lines of a log.jsonl, without a last one that a full disk cut off. ValueError: damaged.
    """
    with intact(file):
        lines = file.read_text().splitlines(keepends=True)
        found = [json.loads(line) for line in lines if line.endswith("\n") and line.strip()]
        return [line | {"step": int(line["step"])} for line in found]


def strict(x, digits: int = 17):
    """The same without nan and inf, which JSON does not have, and with so many significant digits.
    """
    return json.loads(json.dumps(x), parse_constant=lambda name: None,  # of NaN and Infinity
                      parse_float=lambda number: float(f"{float(number):.{digits}g}"))


def write(file: Path, text: str) -> None:
    """Write a file beside the old one, then move it into place, so that it is always whole.
    ValueError: a full disk, say."""
    beside = file.with_name(f"{file.name}.tmp")  # on the same disk, so that the move is one step
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text)
        os.replace(beside, file)
    except OSError as err:
        with suppress(OSError):
            beside.unlink(missing_ok=True)  # half a file helps nobody
        raise ValueError(f"could not write {file}: {err.strerror}; what was there is as it was; "
                         "free some space, or choose a folder that can be written to") from None


def need_writable(folder: Path) -> None:
    """ValueError if results could not be written there, before hours of work."""
    nearest = next(at for at in (folder, *folder.parents) if at.exists())
    need(nearest.is_dir() and os.access(nearest, os.W_OK), f"{folder} cannot be written to, or is "
         "no folder, and results would go there; give another")


def record(file: Path, key: str, result: dict) -> None:
    """Put a result into a JSON file under this key; other keys stay."""
    write(file, json.dumps(read_json(file) | {key: strict(result)}, indent=1, allow_nan=False))


# Where Linux says how much memory a container may use: cgroups version 2, and version 1.
CONTAINER = "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"


def machine_gib(device: str) -> float:
    """The memory of the GPU, or of the machine, GiB; inf where the system does not say."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory / 2**30
    found = [math.inf]
    with suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for file in CONTAINER:
        with suppress(ValueError, OSError):  # no container, or "max", no limit
            found.append(int(Path(file).read_text()))
    return min(found) / 2**30


def need_memory(gib: float, device, what: str, advice: str) -> None:
    """ValueError if the machine has less memory, before hours, or the whole machine, are lost.
    gib: an estimate of what must be held at once."""
    there = machine_gib(torch.device(device).type)
    need(gib <= there, f"{what} would take about {gib:,.0f} GiB, and there are {there:.0f}; "
         f"{advice}")


def gpu_has_bf16() -> bool:
    """Whether the GPU computes in bf16 itself, as NVIDIA's do from Ampere on. Without a GPU: True,
    as most would."""
    cuda = torch.cuda
    return not cuda.is_available() or cuda.is_bf16_supported(including_emulation=False)


def forward_gib(config: clsspec.Config, b: int, h: int, w: int, attention: bool = False) -> float:
    """An estimate of what a forward pass of b pictures holds, without gradients, GiB. attention:
    its weights are held, too, as entmax-1.5 does; fused softmax does not."""
    tokens = (h // config.patch) * (w // config.patch)
    numbers = 4 * h * w + tokens * config.width * (6 + config.mlp_ratio)
    if attention or config.attn == "entmax15":
        numbers += 3 * config.heads * tokens**2
    return 4 * b * numbers / 2**30


class Stopped(BaseException):  # no `except Exception` on the way may swallow it
    """A signal asks this process to end. at_once: it is the second one, so nothing is saved first.
    text: what is kept, for the message."""

    text = "; what was finished is kept"

    def __init__(self, number: int, at_once: bool):
        super().__init__(signal.Signals(number).name)
        self.number, self.at_once = number, at_once


class Signals:
    """Ctrl-C (SIGINT), a scheduler's SIGTERM, a closed terminal's SIGHUP. They raise Stopped; the
    first one waits for the end of a block that must not be cut in two, `with signals.held():`."""

    holding, came, at = False, 0, 0.0  # came: the signal's number, 0: none; at: when it came

    def handle(self, number: int, frame) -> None:
        if self.came and time.monotonic() < self.at + 1:
            return  # the same signal: torchrun passes on what the terminal sent to all processes
        again = self.came != 0
        self.came, self.at = number, time.monotonic()
        if again or not self.holding:
            raise Stopped(number, again)

    @contextmanager
    def held(self):
        before, self.holding = self.holding, True
        try:
            yield
        finally:
            self.holding = before
        if self.came and not before:
            raise Stopped(self.came, False)


signals = Signals()


def patient(worker: int) -> None:
    """Run in processes that read files. A terminal's or a scheduler's signals reach them too, but
    the main process ends them, once it has saved; if it does not, they end half a minute later,
    without an error, which would interrupt a step of the main process that takes longer."""
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(30))


# Part of a message of torch's -> what it means. Any other RuntimeError is a fault of ours.
FAULTS = {
    "DataLoader worker": "a process that reads files has died, often for want of memory; lower "
                         "--workers",
    **dict.fromkeys(("out of memory", "allocate memory", "not enough memory"), "out of memory; "
                    "lower the batch, the pictures' size or their number"),
    "gloo": "another process of this run has ended; its own message says why",
    "NCCL": "another process of this run has ended, or a GPU failed; its own message says why"}


def quiet() -> None:
    """Drop what stdout did not take: Python would try again at its end, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def one_line():
    """Around a command. An error of the user or the machine ends in one line and an exit code other
    than 0; a fault of the program shows its traceback."""
    with suppress(AttributeError):  # a file may have a name that this terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    numbers = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
    before = {n: signal.getsignal(n) for n in numbers if n is not None}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # under `nohup` SIGHUP stays ignored
            signal.signal(number, signals.handle)
    try:
        yield
        sys.stdout.flush()  # here, so that a failure is still one line
        return
    except Stopped as stopped:
        line, code, cause = f"stopped by {stopped}{stopped.text}", 128 + stopped.number, stopped
    except BrokenPipeError:  # `| head` has seen enough
        quiet()
        sys.exit(1)
    except OSError as err:
        at = f": {err.filename}" if err.filename else ""
        line, code, cause = f"error: {err.strerror or err}{at}", 1, err
        quiet()
    except ValueError as err:  # a worker's traceback comes before its message
        text = str(err).strip() or type(err).__name__
        text = text.splitlines()[-1].removeprefix("ValueError: ")
        line, code, cause = f"error: {text}", 1, err
    except (RuntimeError, MemoryError) as err:
        text = str(err).strip() or "out of memory"
        meaning = next((words for part, words in FAULTS.items() if part in text), None)
        if meaning is None:
            raise
        line, code, cause = f"error: {meaning} ({text.splitlines()[0][:160]})", 1, err
    finally:
        signals.came = 0
        for number, handler in before.items():
            signal.signal(number, handler)
    # Its frames keep alive the processes that read files; Python would wait for those.
    traceback.clear_frames(cause.__traceback__)
    for shown in list(tqdm._instances):  # otherwise a bar would be drawn again after the line
        shown.close()
    if code == 1:
        sys.exit(line)  # which prints it
    print(line, file=sys.stderr)
    sys.exit(code)


# --------------------------------------------------------------------------------------------------
# Labelled pictures: how each data set is laid out on disk.


def random_crop(item: dict, u, size: int, crop: int) -> dict:
    """A crop (crop, crop) of an item. u: four uniform numbers, for scale, top, left and flip."""
    h, w = item["image"].shape[-2:]
    scale = size / min(h, w) if size else 1
    if "depth" not in item:  # an enlarged picture would be a nearer one, with other depths
        scale *= 0.5 + 1.5 * u[0]  # 0.5 to 2
    h, w = max(round(h * scale), 1), max(round(w * scale), 1)
    below, right = max(crop - h, 0), max(crop - w, 0)  # padding, where the picture is too small
    top, left = int(u[1] * (h + below - crop + 1)), int(u[2] * (w + right - crop + 1))
    out = {}
    for kind, x in item.items():
        smooth = kind == "image"  # classes and depths must not be interpolated
        how = TF.InterpolationMode.BILINEAR if smooth else TF.InterpolationMode.NEAREST_EXACT
        x = TF.resize(x if smooth else x[None], [h, w], how, antialias=True)  # (C, h, w)
        x = F.pad(x, (0, right, 0, below), value=255 if kind == "mask" else 0)
        x = x[:, top : top + crop, left : left + crop]  # (C, crop, crop)
        x = x.flip(2) if u[3] < 0.5 else x
        out[kind] = x if smooth else x[0]
    return out


def from_disk(data, order, workers: int, collate, **more):
    """An iterator over batches of a data set, read by processes. order: lists of its keys."""
    loader = torch.utils.data.DataLoader(
        data, batch_sampler=order, num_workers=workers, collate_fn=collate, worker_init_fn=patient,
        generator=torch.Generator(), **more)  # so that it does not draw from torch's own generator
    with signals.held():  # an exception raised while processes start would be lost
        return iter(loader)


def stack(items: list[dict]) -> dict[str, Tensor]:
    """Items -> one dict of stacked tensors. ValueError where pictures have several sizes."""
    files = [item.pop("name", None) for item in items]  # for the message only
    for kind in [kind for kind, x in items[0].items() if isinstance(x, Tensor)]:
        # Each kind is checked, as pictures are resized and their labels are not.
        sizes = [tuple(item[kind].shape[-2:]) for item in items]
        for file, size in zip(files, sizes):
            need(size == sizes[0], f"{file} has {size} pixels (rows, columns; {kind}), {files[0]} "
                 f"{sizes[0]}; for several sizes give --crop")
    return torch.utils.data.default_collate(items)


@dataclass
class Pictures(torch.utils.data.Dataset):
    """One split of a data set, on disk (`rows`) or in `memory`. An item is a dict of what the set
    has: image uint8 (3, H, W), mask uint8 (H, W), depth float (H, W), metres, 0: none; label int.
    From a disk it is a whole picture with its maps, or with `middle` the middle with its label.
    """

    rows: list[dict] = ()  # paths `image`, `mask`, `depth`, an int `label`
    memory: dict[str, Tensor] | None = None  # the items, stacked
    classes: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    ids: Tensor | None = None  # (256,) number in a mask -> class; None: they are equal
    max_depth: float = 10.0  # metres; larger depths are not valid
    unit: float = 1e-3  # metres, of one count in a depth file
    sunrgbd: bool = False  # its 16 bits are rotated by three; larger depths become max_depth
    lower: tuple | None = None  # KITTI: how many rows and columns are kept, at the bottom centre
    region: tuple | None = None  # where depth is judged: rows, columns (slices)
    device: torch.device = torch.device("cpu")  # where batches are wanted
    size: int = 0  # with crop and patch: see Protocol
    crop: int = 0
    patch: int = 1
    middle: bool = False

    def __len__(self) -> int:
        return len(next(iter(self.memory.values()))) if self.memory else len(self.rows)

    def batches(self, order, workers: int = 0):
        """Dicts of stacked items. order: lists of numbers, or of (number, u) for crops."""
        if self.memory:
            for numbers in order:
                numbers = torch.tensor(numbers, device=self.device)
                yield {kind: x.index_select(0, numbers) for kind, x in self.memory.items()}
            return
        for batch in from_disk(self, order, workers, stack):
            yield {kind: x.to(self.device) for kind, x in batch.items()}

    def __getitem__(self, key) -> dict:
        i, u = key if isinstance(key, tuple) else (key, None)
        row = self.rows[i]
        # A mask fits the stored pixels, whatever EXIF says, so its picture must not be turned.
        img = read_picture(row["image"], upright=self.middle)
        if self.middle:
            side = whole_patches(self.size, self.patch)
            img = TF.resize(img, [side * 8 // 7], antialias=True)  # 256 for 224, as usual
            return {"image": TF.center_crop(img, [side]), "label": row["label"]}
        item = {"image": img}
        if "mask" in row:
            item["mask"] = self.mask(row["mask"])
        if "depth" in row:
            item["depth"] = self.depth(row["depth"])
        for kind, x in item.items():  # a mask of another size would be silently misplaced
            need(x.shape[-2:] == img.shape[-2:],
                 f"{row[kind]} has {tuple(x.shape[-2:])} pixels (rows, columns), "
                 f"{row['image']} has {tuple(img.shape[-2:])}; make them equal")
        if self.lower:  # higher up, the lidar saw nothing
            rows, columns = self.lower
            left = max(img.shape[2] - columns, 0) // 2
            item = {kind: x[..., -rows:, left : left + columns] for kind, x in item.items()}
        if u:
            return random_crop(item, u, self.size, self.crop) | {"name": row["image"]}
        if self.region:  # outside of it, depth is not valid
            judged = torch.zeros_like(item["depth"])
            judged[self.region] = item["depth"][self.region]
            item["depth"] = judged
        h, w = item["image"].shape[-2:]
        scale = self.size / min(h, w) if self.size else 1
        fitted = [whole_patches(side * scale, self.patch) for side in (h, w)]
        item["image"] = TF.resize(item["image"], fitted, antialias=True)
        return item | {"name": row["image"]}

    def mask(self, file) -> Tensor:
        """A file's classes (H, W), uint8. ValueError: it has other classes than this set."""
        mask = read_map(file, bits=8)
        if self.ids is not None:
            mask = self.ids[mask.long()]  # (H, W)
        last = torch.where(mask == 255, 0, mask).max().item()
        need(last < len(self.classes), f"{file} has class {last}, but the set has only "
             f"{len(self.classes)}, from 0 on; mend the mask or classes.txt")
        return mask

    def depth(self, file) -> Tensor:
        """A file's depth (H, W), metres; 0 where there is none, or it is not valid."""
        counts = read_map(file, bits=16)
        if self.sunrgbd:
            counts = counts >> 3 | counts << 13 & 0xFFFF  # rotated back
        else:
            counts = torch.where(counts == FULL, 0, counts)  # how cameras write "too far"
        depth = counts.double() * self.unit  # float32 may round the farthest above max_depth
        far = self.max_depth if self.sunrgbd else 0
        return torch.where(depth <= self.max_depth, depth, far).float()


# How a set is opened: (folder, split "train" or "val") -> Pictures. Each docstring says what is
# expected in the folder, and where to get it; error messages quote it.


def same_stems(images: Path, **folders: Path) -> list[dict]:
    """Pictures of a folder, with PNGs of the same stem in other folders (mask, depth) -> rows."""
    rows, seen = [], {}
    for file in sorted(filter(is_picture, images.glob("*"))):
        need(file.stem not in seen, f"{seen.get(file.stem)} and {file.name} in {images} would have "
             "one map; rename one, and its map")
        seen[file.stem] = file.name
        maps = {kind: str(folder / f"{file.stem}.png") for kind, folder in folders.items()}
        rows.append({"image": str(file)} | maps)
    return rows


def class_names(file: Path) -> tuple[str, ...]:
    """Lines "CLASS", numbered from 0 on, or "NUMBER<tab>CLASS" -> names by number."""
    lines = [line.strip() for line in file.read_text("utf-8-sig").splitlines()]
    found = {}
    for line in lines:
        if not line or line.startswith("#"):
            continue
        number, tab, name = line.partition("\t")
        if not tab:
            number, name = str(len(found)), line
        ok = number.isdecimal() and int(number) < 255 and int(number) not in found
        need(ok, f"{file}: in {line!r}, {number} must be a number from 0 to 254, each once")
        need(name not in found.values(), f"{file}: {name!r} is there twice; tell them apart")
        found[int(number)] = name
    return tuple(found.get(i, f"class {i}") for i in range(max(found, default=-1) + 1))


def largest(folder: Path, bits: int) -> int:
    """The largest number in a folder's maps, except 2^bits - 1, which means that there is no value.
    Only one map is in memory at a time."""
    files = [*folder.glob("[!.]*.png")]  # no hidden files
    need(files, f"no .png file in {folder}")
    maps = (read_map(file, bits) for file in files)
    known = (x[x < 2**bits - 1] for x in maps)
    return max((x.max().item() for x in known if len(x)), default=0)


def pairs(at: Path, split: str, unit: float = 1e-3, max_depth: float = 0.0) -> Pictures:
    """images/{train,val}/NAME.jpg (or png), and one or both of masks/{train,val}/NAME.png (8-bit
    index, 255: ignored) and depth/{train,val}/NAME.png (16-bit, millimetres or --unit, 0 and 65535:
    none); if you like, classes.txt, lines "CLASS" or "NUMBER<tab>CLASS", from 0 on"""
    folders = {"mask": at / "masks", "depth": at / "depth"}
    folders = {kind: folder / split for kind, folder in folders.items() if folder.is_dir()}
    if not folders:  # an OSError, to which open_split adds what is wanted
        raise OSError(f"neither masks/{split} nor depth/{split} is there")
    found = Pictures(same_stems(at / "images" / split, **folders))
    if "depth" in folders:
        found.unit, found.max_depth = unit, max_depth
        if not max_depth:  # the largest of the training pictures
            count = largest(at / "depth/train", bits=16)
            need(count, f"no file in {at / 'depth/train'} has a depth, from 1 to {FULL - 1}")
            found.max_depth = count * unit
        need(found.max_depth > 0.01, f"depth up to {found.max_depth:g} m only, and heads begin at "
             "1 mm; correct --unit or --max-depth")
    if "mask" in folders:
        last = largest(at / "masks/train", bits=8)
        need(last, f"no mask in {at / 'masks/train'} has another class than 0, as 255 means "
             "ignored; in black and white masks make 255 a 1")
        # Without names classes are numbers, up to the largest of the training pictures.
        file = at / "classes.txt"
        numbers = tuple(str(i) for i in range(last + 1))
        found.classes = class_names(file) if file.exists() else numbers
    return found


# Sets that torchvision can download, and their sizes.
FETCHED = {"voc": "2 GB", "pets": "0.8 GB", "imagenette": "0.3 GB", "cifar10": "0.2 GB"}


def fetched(make, download: bool, *args):
    """A data set of torchvision's, downloaded if it is not there and that is wanted."""
    try:
        return make(*args)
    except RuntimeError:  # its message names torchvision's flag, not ours
        if not download:
            raise OSError("it is not there, or not whole") from None
    return make(*args, download=True)


def voc(at: Path, split: str, download: bool = False) -> Pictures:
    """VOCdevkit/VOC2012/ with JPEGImages, SegmentationClass and ImageSets/Segmentation, from
    host.robots.ox.ac.uk/pascal/VOC/voc2012"""
    found = fetched(torchvision.datasets.VOCSegmentation, download, at, "2012", split)
    classes = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable "
               "dog horse motorbike person pottedplant sheep sofa train tvmonitor")
    rows = [{"image": image, "mask": mask} for image, mask in zip(found.images, found.masks)]
    return Pictures(rows, classes=tuple(classes.split()))


def pets(at: Path, split: str, download: bool = False) -> Pictures:
    """oxford-iiit-pet/ with images/ and annotations/, from www.robots.ox.ac.uk/~vgg/data/pets"""
    part = {"train": "trainval", "val": "test"}[split]
    found = fetched(torchvision.datasets.OxfordIIITPet, download, at, part)
    rows = [{"image": str(image), "mask": str(mask), "label": label}
            for image, mask, label in zip(found._images, found._segs, found._labels)]
    ids = torch.full((256,), 255, dtype=torch.uint8)  # 3, the border, is "not classified"
    ids[1], ids[2] = 1, 0
    return Pictures(rows, ids=ids, classes=("background", "pet"), labels=tuple(found.classes))


def ade20k(at: Path, split: str) -> Pictures:
    """ADEChallengeData2016/ with images/{training,validation} and annotations/ the same, from
    data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"""
    at, part = at / "ADEChallengeData2016", {"train": "training", "val": "validation"}[split]
    rows = same_stems(at / "images" / part, mask=at / "annotations" / part)
    ids = (torch.arange(256) + 255).to(torch.uint8)  # class 1 is ours 0; 0, "other", is ignored
    return Pictures(rows, ids=ids, classes=tuple(f"class {i + 1}" for i in range(150)))


def cityscapes(at: Path, split: str) -> Pictures:
    """leftImg8bit/{train,val} and gtFine/{train,val}, from www.cityscapes-dataset.com"""
    found = torchvision.datasets.Cityscapes(str(at), split, target_type="semantic")
    classes, ids = {}, torch.full((256,), 255, dtype=torch.uint8)
    for c in found.classes:
        if 0 <= c.train_id < 255:  # the 19 that are judged
            classes[c.train_id] = c.name
            ids[c.id] = c.train_id
    rows = [{"image": image, "mask": mask}  # sorted: they come in the disk's order
            for image, (mask,) in sorted(zip(found.images, found.targets))]
    return Pictures(rows, ids=ids, classes=tuple(classes[i] for i in range(19)))


def listed(file: Path, images: Path, depths: Path) -> list[dict]:
    """Lines "PICTURE DEPTH ..." -> rows; pictures without depth ("None") are left out."""
    rows = []
    for line in file.read_text().splitlines():
        words = line.split()
        if len(words) == 1:
            raise OSError(f"{file} has a line {words[0]!r} without a second name")
        if words and words[1] != "None":
            image, depth = images / words[0].strip("/"), depths / words[1].strip("/")
            rows.append({"image": str(image), "depth": str(depth)})
    return rows


LISTS = {"train": "train", "val": "test"}  # our split -> the word in the names of the lists
EIGEN = slice(45, 471), slice(41, 601)  # rows and columns in which depth is judged
GARG = slice(143, 349), slice(43, 1172)


def nyu(at: Path, split: str) -> Pictures:
    """nyu_train.txt and nyu_test.txt, lines "PICTURE DEPTH FOCAL", from the splits of
    github.com/zhyever/Monocular-Depth-Estimation-Toolbox; and what they name, from
    github.com/cleinc/bts"""
    rows = listed(at / f"nyu_{LISTS[split]}.txt", at, at)
    return Pictures(rows, region=EIGEN if split == "val" else None)


def kitti(at: Path, split: str) -> Pictures:
    """kitti_eigen_train.txt and kitti_eigen_test.txt, lines "PICTURE DEPTH FOCAL", from the splits
    of github.com/zhyever/Monocular-Depth-Estimation-Toolbox; pictures in input/, from
    www.cvlibs.net/datasets/kitti/raw_data.php; depth in gt_depth/, from eval_depth.php there"""
    rows = listed(at / f"kitti_eigen_{LISTS[split]}.txt", at / "input", at / "gt_depth")
    region = GARG if split == "val" else None
    return Pictures(rows, max_depth=80.0, unit=1 / 256, lower=(352, 1216), region=region)


def sunrgbd(at: Path, split: str) -> Pictures:
    """nyu/ as --data nyu wants it; SUNRGBD/ with SUNRGBD_val_splits.txt, lines "PICTURE DEPTH",
    from the splits of github.com/zhyever/Monocular-Depth-Estimation-Toolbox, and in it SUNRGBD/kv1
    and the others, from rgbd.cs.princeton.edu"""
    if split == "train":
        return nyu(at / "nyu", split)
    at = at / "SUNRGBD"
    rows = listed(at / "SUNRGBD_val_splits.txt", at, at)
    return Pictures(rows, sunrgbd=True, max_depth=8.0, region=EIGEN)


def imagefolder(at: Path, split: str) -> Pictures:
    """train/CLASS/ and val/CLASS/ with pictures"""
    found = torchvision.datasets.ImageFolder(at / split, is_valid_file=is_picture)
    rows = [{"image": file, "label": label} for file, label in found.samples]
    return Pictures(rows, labels=tuple(found.classes))


def imagenette(at: Path, split: str, download: bool = False) -> Pictures:
    """imagenette2-320/ with train/ and val/, from github.com/fastai/imagenette"""
    found = fetched(torchvision.datasets.Imagenette, download, at, split, "320px")
    labels = tuple(words[0] for words in found.classes)  # the first of several words for each
    return replace(imagefolder(at / "imagenette2-320", split), labels=labels)


def cifar10(at: Path, split: str, download: bool = False) -> Pictures:
    """cifar-10-batches-py/, from www.cs.toronto.edu/~kriz/cifar.html"""
    # Pickles; torchvision compares each with its checksum before it opens it.
    found = fetched(torchvision.datasets.CIFAR10, download, at, split == "train")
    images = torch.from_numpy(found.data).movedim(3, 1)  # uint8 (n, 3, 32, 32)
    rows = [{"image": img, "label": label} for img, label in zip(images, found.targets)]
    return Pictures(rows, labels=tuple(found.classes))


OPEN = {f.__name__: f for f in (pairs, voc, pets, ade20k, cityscapes, nyu, kitti, sunrgbd,
                                imagefolder, imagenette, cifar10)}


def open_split(data: str, root: str, split: str, download: bool = False, **options) -> Pictures:
    """A split, "train" or "val", of a set on disk, or downloaded. ValueError: what is missing, what
    is expected, and where to get it. options: of the function that opens it."""
    at = Path(root or f"data/{data}")
    wanted = f"--data {data} wants in --root {at}: " + " ".join(OPEN[data].__doc__.split())
    if data in FETCHED:
        options["download"] = download
        wanted += "" if download else f"; --download fetches it, {FETCHED[data]}"
    try:
        found = OPEN[data](at, split, **options)
    except (OSError, RuntimeError, KeyError) as err:  # whatever opening it raises
        why = (str(err).strip() or type(err).__name__).splitlines()[0]
        raise ValueError(f"{why}; {wanted}") from None
    need(found.rows, f"no picture in split {split}; {wanted}")
    files = [x for row in found.rows for x in row.values() if isinstance(x, str)]
    missing = [file for file in files if not os.path.exists(file)]  # now, not hours later
    if missing:
        raise ValueError(f"{len(missing)} of {len(files)} files are missing, as {missing[0]}; "
                         f"{wanted}")
    if data == "pairs" and split == "val":  # read whole, as what people made may have faults
        items = (found[i] for i in range(len(found)))
        deep = [bool(item["depth"].any()) for item in items if "depth" in item]
        need(any(deep) or not deep, f"no file in {at / 'depth/val'} has a depth of at most "
             f"{found.max_depth:g} m; correct --unit or --max-depth")
    return found


def scenes_gib(n: int, size: int) -> float:
    """An estimate of the memory for n Scenes, GiB."""
    return size**2 * (8 * n + 500) / 2**30  # bytes: picture, mask and depth; for making one


@lru_cache(maxsize=4)
def rendered(split: str, size: int, n: int, device: torch.device) -> Pictures:
    """The first n Scenes of a split, made once in a process."""
    world = scenes.Scenes(split, size)
    return Pictures(memory=world(torch.arange(n, device=device)), classes=world.classes,
                    labels=world.labels, max_depth=world.max_depth, device=device)


# --------------------------------------------------------------------------------------------------
# The protocol: what is measured and how.


def rates(text: str) -> tuple[float, ...]:
    """A flag's reader: a comma list of learning rates."""
    return tuple(map(within(float, 1e-9, 1e3), text.split(",")))


def blocks(text: str) -> tuple[int, ...]:
    """A flag's reader: a comma list of blocks, in their order, each once."""
    return tuple(sorted({within(int, 1, 999)(number) for number in names(text)}))


def flag(kind, default, help: str, use: str = "dense"):
    """A field of Protocol, which is also a flag of that name, read by `kind`. use: where it means
    something, see `changes`."""
    return field(default=default, metadata={"kind": kind, "help": help, "use": use})


PIXELS, COUNT = within(int, 0, 16_384), within(int, 1, 10**9)


@dataclass(frozen=True)
class Protocol:
    """What is measured and how, see the top of this file. PROTOCOLS has one for every data set."""

    tasks: tuple = flag(names, TASKS, "comma list of seg, depth, cls, knn", "any")
    image_size: int = flag(PIXELS, 0, "shorter side of the pictures, pixels; 0: as they are", "any")
    crop: int = flag(PIXELS, 0, "side of the crops that heads are trained on; 0: whole pictures",
                     "crops")
    window: int = flag(PIXELS, 0, "side of the windows to test in; 0: whole pictures")
    flip: bool = flag(bool, False, "test on the mirrored picture, too, and average")
    layers: tuple = flag(blocks, (), "comma list of the blocks that features come from, 1 is the "
                         "first; the last", "any")
    cat_cls: bool = flag(bool, False, "[CLS] beside every patch")
    iterations: int = flag(COUNT, 1000, "of the dense heads")
    batch_size: int = flag(within(int, 1, 65_536), 32, "pictures an iteration")
    lr: tuple = flag(rates, (1e-2,), "of the dense heads; of a comma list the best is chosen")
    warmup: float = flag(within(float, 0, 1), 0.1, "share of the iterations in which it rises")
    train: int = flag(within(int, 1, 10**6), 2000, "number of Scenes to train heads on", "scenes")
    test: int = flag(within(int, 1, 10**6), 1000, "number of Scenes to test on", "scenes")
    split: str = flag(str, "test", "split of Scenes to test on", "scenes")
    seed: int = flag(within(int, 0, 2**62), 0, "of the heads and their batches")
    unit: float = flag(within(float, 1e-9, 1e3), 1e-3, "pairs: metres of one count of a depth file",
                       "pairs")
    max_depth: float = flag(within(float, 0, 1e4), 0.0, "pairs: farther is no depth, metres; 0: "
                            "the largest of the training pictures", "pairs")

    @property
    def dense(self) -> list[str]:
        return [task for task in self.tasks if task in DENSE]


SEG = Protocol(("seg",), 512, 512, 512, iterations=40_000, batch_size=16, lr=(1e-3,),
               warmup=1500 / 40_000)
DEPTH = Protocol(("depth",), 480, flip=True, iterations=38_400, batch_size=16,
                 lr=(3e-4, 1e-3, 5e-3), warmup=1 / 3)
PROTOCOLS = {
    "scenes": Protocol(TASKS, iterations=2000, batch_size=128, lr=(3e-2,)),
    "pairs": Protocol(DENSE),
    "pets": Protocol(("seg", "cls", "knn"), 224, crop=224),
    "voc": SEG, "ade20k": SEG, "cityscapes": replace(SEG, image_size=1024),
    "nyu": DEPTH, "kitti": replace(DEPTH, image_size=352), "sunrgbd": DEPTH,
    **dict.fromkeys(("imagefolder", "imagenette", "cifar10"), Protocol(("cls", "knn"), 224))}


def open_set(data: str, root: str, p: Protocol, patch: int, device,
             download: bool = False) -> list[Pictures]:
    """The training and the test split. ValueError: as in `open_split`, or of other classes."""
    if data == "scenes":
        need(p.split != "probe", "--split probe: heads are trained on it; give test, val or train")
        size = whole_patches(p.image_size or 8 * patch, patch)
        need_memory(scenes_gib(p.train + p.test, size), device, f"{p.train + p.test:,} Scenes of "
                    f"{size} px", "lower --train, --test or --image-size")
        return [rendered("probe", size, p.train, device), rendered(p.split, size, p.test, device)]
    options = {"pairs": dict(unit=p.unit, max_depth=p.max_depth)}.get(data, {})
    sets = [open_split(data, root, split, download, **options) for split in ("train", "val")]
    middle = bool(sets[0].labels) and set(p.tasks) & {"cls", "knn"}
    need(p.image_size or not middle,
         f"--image-size 0: {data} cuts pictures to one side for cls and knn; give it")
    same = sets[0].labels == sets[1].labels  # or a label would mean two things
    need(same, f"train/ and val/ of {root or 'data/' + data} have other classes; mend one of them")
    return [replace(one, device=device, size=p.image_size, crop=p.crop, patch=patch)
            for one in sets]


# --------------------------------------------------------------------------------------------------
# Frozen features.

REDRAW = 0.5 if sys.stderr.isatty() else 20  # seconds; in a file every state of a bar stays


def bar(stream, title: str, total: int):
    return tqdm(stream, title, total, leave=False, dynamic_ncols=True, mininterval=REDRAW)


@torch.no_grad()
def tokens(model: ViT, img: Tensor, p: Protocol) -> tuple[Tensor, Tensor]:
    """uint8 (B, 3, H, W) -> what dense heads see, (B, h, w, D) or with --cat-cls (B, h, w, 2 D);
    and what `linear` and `knn` see, [CLS] and the mean patch, concatenated, (B, 2 D). With n layers
    it is n D instead of D."""
    fast = img.is_cuda and gpu_has_bf16()
    with torch.autocast(img.device.type, torch.bfloat16, enabled=fast):
        out = model(normalise(img / 255), layers=p.layers)
    cls, x = out["cls"].float(), out["patches"].float()  # (B, D), (B, N, D)
    whole = torch.cat([cls, x.mean(1)], 1)
    if p.cat_cls:
        x = torch.cat([x, cls[:, None].expand_as(x)], 2)
    rows = img.shape[-2] // model.config.patch
    return x.unflatten(1, (rows, -1)), whole


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Batches of the same kinds, concatenated."""
    for kind in parts[0]:
        need(len({part[kind].shape[1:] for part in parts}) == 1,
             f"pictures have several sizes ({kind}); for several sizes give --crop")
    return {kind: torch.cat([part[kind] for part in parts]) for kind in parts[0]}


def features(model: ViT, data: Pictures, p: Protocol, workers: int) -> dict[str, Tensor]:
    """Of all pictures `whole` (n, 2 D); of their middles with `label`, else with `x` (n, h, w, D)
    and all that the set has."""
    parts = []
    order = [numbers.tolist() for numbers in torch.arange(len(data)).split(50)]
    for batch in bar(data.batches(order, workers), "frozen features", len(order)):
        x, whole = tokens(model, batch.pop("image"), p)
        seen = {"label": batch["label"]} if data.middle else batch | {"x": x}
        parts.append(seen | {"whole": whole})
    return joined(parts)


# --------------------------------------------------------------------------------------------------
# Dense probes: one linear layer on every patch, its losses, its training, its answers.


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
        self.norm = nn.BatchNorm1d(width)  # with it one learning rate suits features of any scale
        self.linear = nn.Linear(width, classes if task == "seg" else bins)
        metres = torch.linspace(1e-3, max_depth, bins)  # not from 0, whose log is -inf
        self.register_buffer("bins", metres)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, up_h: Tensor, up_w: Tensor) -> Tensor:
        """(B, h, w, D), and weights that upsample rows (H, h) and columns (W, w) -> logits
        (B, classes, H, W), or depth in metres (B, H, W)."""
        shape, flat = x.shape[:3], self.norm(x.flatten(0, 2))  # (B h w, D)
        if self.task == "seg":
            x = self.linear(flat).unflatten(0, shape)  # (B, h, w, classes)
        else:  # sum of weights x bins / sum of weights, weights = relu + 0.1
            # Each patch has 256 weights. A thousand patches at a time stay in a CPU's cache: 17 ms
            # an iteration of `scenes` instead of 29.
            weights = (self.linear(part).relu() for part in flat.split(1024))
            sums = torch.cat([torch.stack([w @ self.bins, w.sum(1)], 1) for w in weights])
            metres = (sums[:, 0] + 0.1 * self.bins.sum()) / (sums[:, 1] + 0.1 * len(self.bins))
            x = metres[:, None].unflatten(0, shape)  # (B, h, w, 1)
        x = up_h @ x.movedim(-1, 1) @ up_w.T  # (B, classes, H, W)
        return x if self.task == "seg" else x[:, 0]


def silog(predicted: Tensor, truth: Tensor) -> Tensor:
    """Scale-invariant log loss: sqrt(var(g) + 0.15 mean(g)^2), g = log predicted - log truth, on
    valid pixels (truth > 0, in metres); 0 where there is none."""
    # Valid pixels are not picked out: indexing would take a seventh of a head's time.
    valid = truth > 0
    n = valid.sum().clamp(min=1)
    g = torch.where(valid, predicted.log() - torch.where(valid, truth, 1).log(), 0)
    mean = g.sum() / n
    variance = (torch.where(valid, g - mean, 0) ** 2).sum() / n
    return (variance + 0.15 * mean**2 + 1e-8).sqrt() * valid.any()  # 1e-8: at 0 its slope is inf


def head_loss(task: str, out: Tensor, batch: dict[str, Tensor]) -> Tensor:
    if task == "depth":
        return silog(out, batch["depth"])
    total = F.cross_entropy(out, batch["mask"].long(), ignore_index=255, reduction="sum")
    return total / (batch["mask"] != 255).sum().clamp(min=1)  # a batch may be all ignored


def training_batches(index: Tensor, p: Protocol):
    """Each iteration's pictures, drawn from `index`; for crops with four uniform numbers each."""
    draw = torch.Generator().manual_seed(p.seed)
    for _ in range(p.iterations):
        numbers = index[torch.randint(len(index), (p.batch_size,), generator=draw)].tolist()
        if p.crop:
            numbers = list(zip(numbers, torch.rand(p.batch_size, 4, generator=draw).tolist()))
        yield numbers


def train_heads(model: ViT, data: Pictures, index: Tensor, p: Protocol,
                workers: int) -> dict[tuple[float, str], Head]:
    """Train heads on the pictures `index` of a split: on features `x`, if they are in its memory,
    else with the backbone in the loop. Returns a head for every (rate in p.lr, dense task)."""
    width, heads = model.config.width * max(len(p.layers), 1) * (1 + p.cat_cls), {}
    with torch.random.fork_rng(devices=[]):  # heads are made on the CPU: the same on all devices
        for lr in p.lr:
            torch.manual_seed(p.seed)  # and the same for all rates
            for task in p.dense:
                head = Head(task, width, len(data.classes), data.max_depth)
                heads[lr, task] = head.to(data.device)
    groups = [{"params": head.parameters(), "lr": lr} for (lr, _), head in heads.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4, fused=True)
    rise = max(p.warmup * p.iterations, 1)  # iterations of warm-up
    fall = max(p.iterations - rise, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(  # up, and then down to 0
        optimizer, lambda t: min((t + 1) / rise, (p.iterations - t) / fall, 1))
    # Every s-th row and column, from a random first one: on average this is about the loss of all
    # pixels, s^2 times cheaper.
    phase, s = torch.Generator().manual_seed(p.seed), max(model.config.patch // 2, 1)
    batches = data.batches(training_batches(index, p), workers)
    for batch in bar(batches, "training heads", p.iterations):
        x = batch["x"] if "x" in batch else tokens(model, batch["image"], p)[0]  # (B, h, w, D)
        top, left = torch.randint(s, (2,), generator=phase).tolist()
        need(x.shape[:3].numel() > 1, "a batch of a single patch has no variance, and heads begin "
             "with BatchNorm; raise --batch-size or --image-size")
        truth = {kind: batch[kind] for kind in ("mask", "depth") if kind in batch}
        h, w = next(iter(truth.values())).shape[1:]
        truth = {kind: v[:, top::s, left::s] for kind, v in truth.items()}
        up_h = bilinear(x.shape[1], h, x.device)[top::s]
        up_w = bilinear(x.shape[2], w, x.device)[left::s]
        # Heads share nothing, so their summed loss trains each as if it were alone.
        loss = sum(head_loss(head.task, head(x, up_h, up_w), truth) for head in heads.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {key: head.eval() for key, head in heads.items()}


@torch.no_grad()
def predict_window(model: ViT, heads: list[Head], img: Tensor, p: Protocol) -> dict[str, Tensor]:
    """uint8 (B, 3, H, W), one window -> logits and depth of its pixels."""
    up_h, up_w = (bilinear(n // model.config.patch, n, img.device) for n in img.shape[-2:])
    x, _ = tokens(model, img, p)
    out = {head.task: head(x, up_h, up_w) for head in heads}
    if p.flip:  # what is true of a scene is true of its mirror image
        mirrored = predict_window(model, heads, img.flip(-1), replace(p, flip=False))
        out = {task: (v + mirrored[task].flip(-1)) / 2 for task, v in out.items()}
    return out


def predict(model: ViT, heads: list[Head], img: Tensor, size, p: Protocol) -> dict[str, Tensor]:
    """uint8 (B, 3, H', W') -> logits and depth at `size` (H, W), by windows and mirroring as in the
    protocol."""
    h, w = img.shape[-2:]
    window = p.window or max(h, w)
    step = max(window * 2 // 3, 1)  # windows overlap by a third; the last ends with the picture
    tops, lefts = ([*range(0, n - window, step), max(n - window, 0)] for n in (h, w))
    sums, times = {}, torch.zeros(h, w, device=img.device)
    for top, left in product(tops, lefts):
        at = ..., slice(top, top + window), slice(left, left + window)
        for task, out in predict_window(model, heads, img[at], p).items():
            zeros = out.new_zeros(*out.shape[:-2], h, w)
            sums.setdefault(task, zeros)[at] += out
        times[at] += 1  # (h, w): how many windows see a pixel
    mean = {task: v / times for task, v in sums.items()}
    if (h, w) == tuple(size):  # the label has the picture's size
        return mean
    up_h, up_w = bilinear(h, size[0], img.device), bilinear(w, size[1], img.device)
    return {task: up_h @ v @ up_w.T for task, v in mean.items()}


# --------------------------------------------------------------------------------------------------
# Pictures as a whole: k-NN and linear classes.


def knn(x: Tensor, labels: Tensor, test: Tensor, classes: int, k: int = 20) -> Tensor:
    """DINO's weighted k-NN: [CLS] (n, D), labels (n,), [CLS] (m, D) -> classes (m,). The k nearest
    by cosine vote, with weight exp(cosine / 0.07)."""
    x, out = F.normalize(x, dim=1), []
    for part in F.normalize(test, dim=1).split(256):  # all at once might not fit
        cosine, near = (part @ x.T).topk(min(k, len(x)), dim=1)  # (256, k)
        # With 0.07 a cosine higher by 0.1 counts four times as much: the nearest few decide.
        votes = F.one_hot(labels[near], classes) * torch.exp(cosine / 0.07)[..., None]
        out.append(votes.sum(1).argmax(1))
    return torch.cat(out)


PENALTIES = 1e-1, 1e-2, 1e-3, 1e-4  # times |weight|^2 / 2, added to the mean cross-entropy


def softmax_regression(x: Tensor, labels: Tensor, start: Tensor, penalty: float) -> Tensor:
    """x (n, D), its last column 1 -> the weight (D, classes) with the least mean cross-entropy +
    penalty / 2 |weight|^2, without the bias (last row); the search begins at `start`."""
    weight = start.clone().requires_grad_()
    # The loss is convex, so there is one optimum, which a method without a rate or a schedule finds
    # (nearly, with the smallest penalties, as tolerance or iterations end it early). So differences
    # between two networks are their own, not due to tuning.
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
    """[CLS] and the mean patch, (n, 2 D) and (m, 2 D) -> classes (m,), and which input and penalty
    were best on a held-out fifth of the training pictures."""
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)  # a feature may be constant
    x, test = (F.pad((v - mean) / std, (0, 1), value=1) for v in (x, test))  # 1: for the bias
    inputs = {"[CLS]": [*range(x.shape[1] // 2), -1],  # name -> columns; -1 is the bias
              "[CLS] and mean patch": [*range(x.shape[1])]}
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held = (order % 5 == 0).to(x.device)  # at random, as the set may be sorted
    best, chosen = -1, None
    for name, columns in inputs.items():
        part, weight = x[:, columns], x.new_zeros(len(columns), classes)
        for penalty in PENALTIES:  # the optimum of a larger one is a good start for the next
            weight = softmax_regression(part[~held], labels[~held], weight, penalty)
            guess = (part[held] @ weight).argmax(1)
            right = (guess == labels[held]).sum().item()
            if right > best:
                best, chosen = right, (name, columns, weight, penalty)
    name, columns, weight, penalty = chosen
    weight = softmax_regression(x[:, columns], labels, weight, penalty)  # on all pictures
    return (test[:, columns] @ weight).argmax(1), f"{name}, penalty {penalty:g}"


# --------------------------------------------------------------------------------------------------
# Metrics.


def confusion(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Class maps (B, H, W) -> counts (B, classes, classes), row = truth; truth 255 is ignored."""
    # A table for each picture, as `difference` adds up those of pictures drawn at random.
    b, known = len(predicted), truth != 255
    picture = torch.arange(b, device=truth.device)[:, None, None].expand_as(truth)
    # One number for each pixel's triple (picture, true class, predicted class).
    triple = (picture * classes + truth.long()) * classes + predicted
    return torch.bincount(triple[known], minlength=b * classes**2).view(b, classes, classes)


def class_iou(counts: Tensor) -> Tensor:
    """(..., C, C) -> intersection over union per class (..., C), in [0, 1]; NaN: it is nowhere."""
    hit = counts.diagonal(dim1=-2, dim2=-1).double()  # (..., C)
    return hit / (counts.sum(-1) + counts.sum(-2) - hit)


def depth_errors(predicted: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Depths p, t (B, H, W) in metres -> per picture (B,), of its valid pixels, t > 0: rmse, the
    root of mean (p - t)^2; absrel; delta1 in %; see the top. NaN where no pixel is valid."""
    valid = truth > 0

    def mean(v: Tensor) -> Tensor:
        return (v * valid).flatten(1).sum(1) / valid.flatten(1).sum(1)

    ratio = predicted / torch.where(valid, truth, 1)
    near = torch.maximum(ratio, 1 / ratio) < 1.25
    return {"rmse": mean((predicted - truth) ** 2).sqrt(), "absrel": mean((ratio - 1).abs()),
            "delta1": 100 * mean(near.float())}


def scores(stats: dict[str, Tensor], weight: Tensor | None = None) -> dict[str, Tensor]:
    """Numbers of n pictures -> metrics of the set, (R,) each.
    weight (R, n): how often each picture counts in each of R cases; None: one case, once each."""
    weight = torch.ones(1, len(stats["picture"])).double() if weight is None else weight
    out = {}
    for name in METRICS:
        if name == "miou" and "counts" in stats:
            counts = weight @ stats["counts"].flatten(1).cpu().double()  # (R, C C)
            counts = counts.unflatten(1, stats["counts"].shape[1:])
            out[name] = 100 * class_iou(counts).nanmean(1)
        elif name in stats:
            value = stats[name].cpu().double()
            known = ~value.isnan()  # a picture without valid depth does not count
            out[name] = weight @ torch.where(known, value, 0) / (weight * known).sum(1)
    return out


def difference(a: dict, b: dict, draws: int = 1000) -> dict[str, tuple[float, float, float]]:
    """Two models' numbers of the same pictures -> b - a of every metric, and its 95 % interval over
    test pictures (paired bootstrap, which says nothing about other training seeds)."""
    n = len(a["picture"])
    draw = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(0))
    weight = torch.stack([d.bincount(minlength=n) for d in draw]).double()  # (draws, n)
    once_a, once_b = scores(a), scores(b)
    many_a, many_b = scores(a, weight), scores(b, weight)  # the same draws for both: paired
    ends = torch.tensor([0.025, 0.975]).double()
    out = {}
    for name in once_a:
        # NaN: in that draw no picture has a number. A single picture has no interval.
        low, high = (many_b[name] - many_a[name]).nanquantile(ends).tolist()
        low, high = (low, high) if n > 1 else (math.nan, math.nan)
        out[name] = (once_b[name] - once_a[name]).item(), low, high
    return out


# --------------------------------------------------------------------------------------------------
# The evaluation.


def judge(model: ViT, heads: list[Head], data: Pictures, index: Tensor, p: Protocol, workers: int,
          keep: int = 0) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    """Test on the pictures `index` of a split. Returns numbers of each picture; and of the first
    `keep` the picture, the truth and the prediction."""
    parts, shots = [], {}
    some = 50 if data.memory else 1  # on disk, pictures may have any size
    order = [numbers.tolist() for numbers in index.split(some)]
    for batch in bar(data.batches(order, workers), "testing", len(order)):
        labels = batch["mask"] if "mask" in batch else batch["depth"]
        out = predict(model, heads, batch["image"], labels.shape[-2:], p)
        # `picture` has a 1 for each, so that `scores` knows how many there are.
        part, tiles = {"picture": torch.ones(len(labels))}, {"picture": batch["image"]}
        if "seg" in out:
            out["seg"] = out["seg"].argmax(1)  # (B, H, W)
            part["counts"] = confusion(out["seg"], batch["mask"], len(data.classes))
        if "depth" in out:
            out["depth"] = out["depth"].clamp(max=data.max_depth)
            part |= depth_errors(out["depth"], batch["depth"])
        parts.append(part)
        tiles |= {f"true {task}": batch[LABEL[task]] for task in out}
        tiles |= {f"predicted {task}": v for task, v in out.items()}
        for words, v in tiles.items():
            row = shots.setdefault(words, [])
            row.extend(v[: keep - len(row)].cpu())
    stats = joined(parts)
    need("counts" not in stats or stats["counts"].any(),
         "no picture has a pixel with a class: all masks are 255, ignored")
    if "rmse" in stats and stats["rmse"].isnan().all():
        first = "" if data.memory else f"; the first is {data.rows[index[0]]['depth']}"
        raise ValueError(f"no picture has valid depth, above 0 and up to {data.max_depth:g} m"
                         + first)
    return stats, shots


def best_heads(model: ViT, train: Pictures, seen: Pictures, p: Protocol,
               workers: int) -> dict[str, tuple[float, Head]]:
    """A trained head for each dense task, and its learning rate: of several, the best on a tenth of
    the pictures, which is not trained on. seen: `train`, or its features."""
    several = len(p.lr) > 1
    every = torch.arange(len(train))
    held = every % 10 == 0 if several else every < 0  # with one rate there is nothing to choose
    trained = train_heads(model, seen, every[~held], p, workers)
    best = {}
    for task in p.dense:
        # A rate at which one task's head diverged may still suit the other task.
        heads = {lr: trained[lr, task] for lr in p.lr
                 if all(weight.isfinite().all() for weight in trained[lr, task].parameters())}
        need(heads, f"the {task} heads diverged with --lr {','.join(map(str, p.lr))}; lower it")
        loss = dict.fromkeys(heads, 0.0)  # the smaller the better
        for lr, head in heads.items() if several else ():
            found = scores(judge(model, [head], train, every[held], p, workers)[0])
            loss[lr] = -found["miou"] if task == "seg" else found["rmse"]
        best_lr = min(loss, key=loss.get)
        best[task] = best_lr, heads[best_lr]
    return best


def check_layers(p: Protocol, depth: int, whose: str = "here") -> None:
    """ValueError: --layers names a block that a network of this depth does not have."""
    need(max(p.layers, default=1) <= depth, f"--layers {','.join(map(str, p.layers))} is outside 1 "
         f"to {depth}, the depth {whose}")


def evaluate(model: ViT, data: str = "scenes", root: str = "", p: Protocol | None = None,
             workers: int = 0, keep: int = 0, cache_gib: float = 4.0,
             download: bool = False) -> tuple[dict, dict, dict]:
    """Do all tasks of a protocol with a frozen model in eval mode, on its device.

    Returns the result (metrics, IoU per class in %, protocol, seconds), the numbers of each test
    picture, and `keep` pictures with truth and prediction. Features of whole pictures are computed
    once if they take no more than cache_gib. ValueError: what is wrong with data or protocol."""
    start, p, patch = time.time(), p or PROTOCOLS[data], model.config.patch
    width = model.config.width * max(len(p.layers), 1)
    check_layers(p, model.config.depth)
    p = replace(p, crop=p.crop and whole_patches(p.crop, patch),
                window=p.window and whole_patches(p.window, patch))
    train, test = open_set(data, root, p, patch, next(model.parameters()).device, download)
    kinds = set(train.memory or train.rows[0]) & set(test.memory or test.rows[0])
    able = [task for task in TASKS if LABEL[task] in kinds]
    asked = p.tasks != PROTOCOLS[data].tasks  # the default tasks are cut down to what is there
    need(not asked or set(p.tasks) <= set(able),
         f"--tasks {','.join(p.tasks)}: here {data} has what it takes for {','.join(able)} only")
    p = replace(p, tasks=tuple(task for task in p.tasks if task in able))
    need(len(train) > 1 or ("cls" not in p.tasks and len(p.lr) == 1),
         "one training picture is too few to choose a learning rate or a penalty by; give more")
    dense, of_pictures = p.dense, set(p.tasks) - set(DENSE)
    # k-NN and linear classes see the middles of pictures.
    middles, test_middles = (replace(one, middle=True) for one in (train, test))

    # 1. Features, computed once if they fit, except those of crops, which differ in each iteration.
    first = next((train if dense else middles).batches([[0]]))
    h, w = first.pop("image").shape[-2:]
    bytes_each = 4 * width * (1 + p.cat_cls) * h * w / patch**2
    bytes_each += sum(x.nbytes for x in first.values())  # maps are of the file's size
    once = bool(dense) and not p.crop and len(train) * bytes_each <= cache_gib * 2**30
    # Features are computed for 50 pictures at a time or, while heads train, for a batch; a batch of
    # stored ones takes room, too.
    b = max(p.batch_size, 50) if dense else 50
    rows, columns = (p.crop or h, p.crop or w) if dense else (h, w)
    need_memory(forward_gib(model.config, b, rows, columns), train.device,
                f"a batch of {b} pictures of {rows} x {columns} px",
                "lower --image-size, --crop or --batch-size")
    # The backbone is frozen, so a picture's features are the same in every iteration.
    of_train = features(model, train, p, workers) if once else {}

    # 2. Heads on them, then the test set.
    stats, shots, chosen = {"picture": torch.ones(len(test))}, {}, {}
    if dense:
        seen = replace(train, memory=of_train) if once else train
        best = best_heads(model, train, seen, p, workers)
        chosen = {task: f"lr {lr:g}" for task, (lr, _) in best.items()}
        heads = [head for _, head in best.values()]
        stats, shots = judge(model, heads, test, torch.arange(len(test)), p, workers, keep)
    if of_pictures:
        if "label" not in of_train:  # Scenes' are there already
            of_train = features(model, middles, p, workers)
        of_test = features(model, test_middles, p, workers)
        x, labels, test_x = of_train["whole"], of_train["label"], of_test["whole"]
        classes = len(train.labels)
        if "cls" in p.tasks:
            guess, chosen["cls"] = linear(x, labels, test_x, classes)
            stats["linear"] = 100.0 * (guess == of_test["label"])
        if "knn" in p.tasks:  # of [CLS] alone
            guess = knn(x[:, :width], labels, test_x[:, :width], classes)
            stats["knn"] = 100.0 * (guess == of_test["label"])

    # 3. The result, with all that is needed to make it again.
    result = {name: value.item() for name, value in scores(stats).items()}
    if "counts" in stats:
        iou = 100 * class_iou(stats["counts"].sum(0).cpu())
        result["iou"] = dict(zip(test.classes, iou.tolist()))
    protocol = asdict(replace(p, train=len(train), test=len(test))) | {"height": h, "width": w}
    result |= {"chosen": chosen, "protocol": protocol, "versions": versions(),
               "device": str(test.device), "seconds": round(time.time() - start, 1)}
    return result, stats, shots


def versions() -> dict[str, str]:
    """Versions of this project (git), Python, torch and torchvision that a number was made with."""
    command = "git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"
    try:
        git = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        git = ""
    return {"git": git or "unknown", "python": sys.version.split()[0], "torch": torch.__version__,
            "torchvision": torchvision.__version__}


# --------------------------------------------------------------------------------------------------
# The command.


def name_of(path: Path) -> str:
    """A name for a file of weights: its folder's, if all such files have the same name."""
    return path.absolute().parent.name if path.name in clsspec.KNOWN_FILES else path.stem


def home(path: Path) -> Path:
    """Where the results of a checkpoint go: its run folder; if it has none, runs/NAME, or
    runs/NAME-weights if that is another run's."""
    if path.name == "last.pt":
        return path.parent
    folder = Path("runs") / name_of(path)
    return folder.with_name(f"{folder.name}-weights") if (folder / "last.pt").exists() else folder


def modified(path: Path) -> int | None:
    """When a file was last written, in nanoseconds; None: it is gone."""
    return path.stat().st_mtime_ns if path.exists() else None


def draw(path: Path, shots: dict[str, list[Tensor]], classes: tuple[str, ...]) -> None:
    """Rows of pictures, class maps and depth maps, as a PNG."""
    depths = [depth.max().item() for depth in shots.get("true depth", ())]
    far = max(depths, default=0.0)  # truth and prediction share one scale of colours
    rows = {}
    for words, maps in shots.items():
        if words == "picture":
            rows[words] = [img / 255 for img in maps]
        elif words.endswith("seg"):
            words = words.replace("seg", "classes")
            rows[words] = [scenes.paint_classes(mask, len(classes)) for mask in maps]
        else:
            rows[words] = [scenes.paint_depth(depth, far) for depth in maps]
    scenes.sheet(path, rows, classes, far)


DEVICES = "cpu", "cuda", "mps"  # mps: a Mac's GPU, which knows no float64


def check_device(args) -> None:
    there = {"cpu": True, "cuda": torch.cuda.is_available(),
             "mps": torch.backends.mps.is_available()}
    need(there[args.device],
         f"--device {args.device}: torch sees no GPU here; give --device cpu")


def check_download(args) -> None:
    need(args.data in FETCHED or not args.download,
         f"--data {args.data} cannot be fetched, only {', '.join(FETCHED)}; leave out --download")


def parse(argv) -> argparse.Namespace:
    raw, cuda = argparse.RawDescriptionHelpFormatter, torch.cuda.is_available()
    p = Parser(description=__doc__, formatter_class=raw)
    p.add_argument("runs", nargs="+", help="run folders, checkpoints in them, or public weights")
    g = p.add_argument_group("what is judged")
    g.add_argument("--network", default="teacher", choices=["teacher", "student", "untrained"],
                   help="untrained: as both were at step 0 (default: teacher)")
    g.add_argument("--data", default="scenes", choices=list(PROTOCOLS), help="(default: scenes)")
    g.add_argument("--root", default="", help="folder of the data set (default: data/NAME)")
    g.add_argument("--download", action="store_true", help="fetch what is not there, of "
                   + ", ".join(f"{name} ({size})" for name, size in FETCHED.items()))
    g = p.add_argument_group("protocol (defaults: the data set's, as above)")
    for f in fields(Protocol):
        kind = f.metadata["kind"]
        # No defaults: what stays None is taken from the data set's protocol.
        more = dict(type=kind) if kind is not bool else dict(action=argparse.BooleanOptionalAction)
        g.add_argument(f"--{f.name.replace('_', '-')}", help=f.metadata["help"], **more)
    g = p.add_argument_group("machine and output")
    g.add_argument("--device", default="cuda" if cuda else "cpu", choices=DEVICES,
                   help="CUDA_VISIBLE_DEVICES says which (default: %(default)s)")
    g.add_argument("--workers", type=within(int, 0, 256), default=8 if cuda else 2,
                   help="processes to read files (default: %(default)s)")
    g.add_argument("--save-pictures", type=within(int, 0, 64), default=0, metavar="N",
                   help="draw N test pictures, truth and prediction, into the run folder")
    return p.parse_args(argv)


def changes(args) -> dict:
    """The fields of the protocol that flags change. ValueError: a flag that means nothing here."""
    p = PROTOCOLS[args.data]
    unknown = set(args.tasks or ()) - set(TASKS)
    need(not unknown, f"--tasks: unknown {', '.join(unknown)}; choose from {', '.join(TASKS)}")
    given = {f.name: getattr(args, f.name) for f in fields(p)}  # in the order of the flags
    changed = {k: v for k, v in given.items() if v is not None and v != getattr(p, k)}
    tasks, of_scenes = changed.get("tasks", p.tasks), args.data == "scenes"
    dense = bool(set(tasks) & set(DENSE))
    need(dense or not args.save_pictures, "--save-pictures draws what seg and depth predict; add "
         "one of them to --tasks")
    of_use = {"any": True, "dense": dense, "scenes": of_scenes, "crops": dense and not of_scenes,
              "pairs": args.data == "pairs" and "depth" in tasks}
    wrong = sorted(f.name.replace("_", "-") for f in fields(p)
                   if f.name in changed and not of_use[f.metadata["use"]])
    need(not wrong, f"--data {args.data} has no use for --{' --'.join(wrong)}"
         + (f" with --tasks {','.join(tasks)}" if "tasks" in changed else ""))
    need(args.data != "scenes" or not args.root, "--root: Scenes lie in no folder; give --data")
    return changed


def run(args) -> None:
    check_device(args)
    check_download(args)
    changed = changes(args)
    p = replace(PROTOCOLS[args.data], **changed)
    key = f"{args.network} {args.data}"
    own = args.data in ("pairs", "imagefolder")  # of other sets everybody has the same pictures
    if args.root and own:
        key += f" {Path(args.root).absolute().name}"
    for name, value in changed.items():
        value = ",".join(map(str, value)) if isinstance(value, tuple) else value
        key += f" {name}={value}"
    paths = [clsspec.weights_file(name) for name in args.runs]
    written = list(map(modified, paths))
    models = [clsspec.load(path, args.network) for path in paths]  # all first: one may be missing
    for name, model in zip(args.runs, models):
        check_layers(p, model.config.depth, f"of {name}")
    homes = [home(path) for path in paths]
    root = os.path.abspath(args.root) if args.root else ""
    for out in homes:  # checked before hours of work
        need(homes.count(out) == 1, f"the results of two of these would go to {out}; rename one")
        file = out / "eval.json"
        with intact(file):
            theirs = read_json(file).get(key, {}).get("root", root)
        need(theirs == root or not own, f"{file} has '{key}' of {theirs}, another folder of that "
             "name, already; rename one, or move the file away")
        need_writable(out)
    first = size = None
    for name, path, model, then in zip(args.runs, paths, models, written):
        result, stats, shots = evaluate(model.to(args.device), args.data, args.root, p,
                                        args.workers, args.save_pictures,
                                        download=args.download)
        # A run may train on meanwhile; the weights that are then in its file were not judged.
        late = "" if modified(path) == then else ", has trained on since"
        numbers = [f"{k} {METRICS[k].format(result[k])}" for k in METRICS if k in result]
        try:
            result |= {"model": model.origin, "root": root}
            record(home(path) / "eval.json", key + late, result)
        finally:  # written first; printed even if it could not be written
            print(f"{name}: {key}{late}, {result['seconds']:.0f} s\n  {model.origin}\n  "
                  + "  ".join(numbers))
        if args.save_pictures and shots:
            file = home(path) / f"{key.replace(' ', '-')}.png"
            draw(file, shots, tuple(result.get("iou", ())))
            print(f"  {file}")
        seen = f"{result['protocol']['height']} x {result['protocol']['width']} px"
        if first is None:  # all others are compared with it
            first, size = stats, seen
            continue
        other = "" if seen == size else f", which it saw at {size}, this one at {seen}"
        print(f"  minus {args.runs[0]}{other}, with 95 % intervals over test pictures:")
        for metric, (d, low, high) in difference(first, stats).items():
            note = "  (lower is better)" if metric in LOWER else ""
            ends = f"[{low:+.4f}, {high:+.4f}]" if low == low else "[one picture: no interval]"
            print(f"    {metric:7}{d:+9.4f}   {ends}{note}")


def main(argv=None) -> None:
    args = parse(argv)
    with one_line():
        run(args)


if __name__ == "__main__":
    main()
