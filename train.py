"""Train a plain or a specialised ViT by self-distillation, on one CPU, one GPU or many.

    python train.py --spec norms,qkv --spec-blocks 8           # a laptop: minutes; a GPU: ViT-S
    python train.py --out runs/plain                           # the control, with the same seed
    python train.py --recipe dino --data path/to/pictures      # DINO v1 on any folder of pictures
    python train.py --recipe deit3 --data path/to/train        # supervised, a folder for each class
    python train.py --scale large --spec norms,qkv --dry-run   # what the paper's run would be
    python train.py --spec norms,qkv --bench 20                # what a step takes on this machine
    torchrun --nproc-per-node 8 train.py --scale large --spec norms,qkv --data list.txt --compile

Self-distillation: a student network sees crops of a picture and learns to say what the teacher says
of other crops of it. The teacher is a moving average of students. No label is used; there is one
thing to learn: crops of one picture should look alike, and different pictures should not.

What keeps all pictures from looking alike: the teacher's targets use all prototypes equally
(`sinkhorn`) or have their mean taken off (`ema_centre`), and are sharper than the student's answers
(its temperature is lower); heads compare directions, not lengths; [CLS] is pushed off its nearest
neighbour (`koleo`).

Three recipes, each a set of defaults for one loop: `dinov2` (arXiv 2304.07193), [CLS] and masked
patches; `dino` (arXiv 2104.14294), [CLS] alone; `deit3` (arXiv 2204.07118), labels instead.
Below `--scale large` the scale replaces most of a recipe: `dino` and `dinov2` then differ in iBOT,
KoLeo, the patches' head, the area of local views, how fast weight decay grows, how long prototypes
are frozen and how the learning rate grows with the batch.

The global batch is a function of (seed, step) alone, and each rank takes its slice of it. So the
number of workers changes nothing, nor does that of ranks if the global batch stays the same, except
for what each rank draws by itself (skipped branches, mixup) and the meters `usage` and `cls_std`.
On a CPU, with equal --steps, ranks, threads and --compile, the weights of a resumed run equal an
unbroken one's to the bit; a GPU adds up gradients in no fixed order.
In shapes: B pictures of side S, 2 global and L local views of each, V = 2 + L; N patches a view, M
masked in all, width D, K prototypes; n stands for any number of rows.
"""

import argparse
import atexit
import copy
import json
import math
import os
import statistics
import sys
import time
import zlib
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from signal import SIGTERM

# Threads that wait for each other should not spin for long. Beside a busy program on two cores
# Scenes are made at 5 pictures/s with GNU OpenMP's default and at 498 with this; on an otherwise
# idle machine at 628 and 725.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import clsspec
import eval_dense
from clsspec import need, normalise, whole_patches
from eval_dense import (Stopped, bar, from_disk, need_memory, need_writable, one_line, signals,
                        within)
from scenes import Scenes

# --------------------------------------------------------------------------------------------------
# Defaults: the recipe's at the paper's scale, then what the scale changes, then your own flags.

RECIPES = {
    # The official vitl14.yaml of DINOv2: 500 "epochs" of 1250 steps of 3072 pictures.
    "dinov2": dict(
        ibot=1.0, koleo=0.1, centring="sinkhorn", separate_head=True, prototypes=131072,
        bottleneck=384, patch_bottleneck=256, lr=2e-4, lr_batch=1024, lr_scaling="sqrt",
        patch_embed_lr=0.2, wd=0.04, wd_end=0.2, warmup=80 / 500, ema=0.994, temp_end=0.07,
        temp_warmup=30 / 500, freeze_last=1 / 500, global_scale=(0.32, 1.0),
        local_scale=(0.05, 0.32), drop_path=0.4, layerscale=1e-5, steps=625_000),
    # The defaults of DINO's main_dino.py: 100 epochs of ImageNet-1k at batch 1024.
    "dino": dict(
        ibot=0.0, koleo=0.0, centring="ema", separate_head=False, prototypes=65536,
        bottleneck=256, patch_bottleneck=256, lr=5e-4, lr_batch=256, lr_scaling="linear",
        patch_embed_lr=1.0, wd=0.04, wd_end=0.4, warmup=10 / 100, ema=0.996, temp_end=0.04,
        temp_warmup=0.0, freeze_last=1 / 100, global_scale=(0.4, 1.0), local_scale=(0.05, 0.4),
        drop_path=0.1, layerscale=0.0, steps=125_100),
    # DeiT-III, 800 epochs of ImageNet-1k at batch 2048; drop path .05 (S), .2 (B), .45 (L).
    # It uses LAMB at 3e-3; the rate here is DeiT's (arXiv 2012.12877) for AdamW.
    "deit3": dict(
        supervised=True, lr=5e-4, lr_batch=512, lr_scaling="linear",
        wd=0.05, wd_end=0.05, warmup=5 / 800, clip=1.0, ema=0.99996, ema_end=0.99996,
        global_scale=(0.08, 1.0), drop_path=0.45, layerscale=1e-4, steps=500_000),
}
SCALES = {
    "large": dict(size="large", source_size=256, image_size=224, local_size=98, local_crops=8,
                  batch_size=32, probe_every=12_500, save_every=2500),
    "small": dict(size="small", source_size=160, image_size=128, local_size=64, local_crops=4,
                  batch_size=256, pictures=50_000, steps=2500, global_scale=(0.4, 1.0), colour=0.2,
                  prototypes=512, head_layers=1, bottleneck=256, patch_bottleneck=256,
                  head_norm="batch", centring="sinkhorn", lr=1e-3, lr_batch=256, warmup=0.1,
                  patch_embed_lr=1.0, drop_path=0.0, layerscale=0.1, ema=0.98, ema_end=0.995,
                  temp_end=0.04),
    # A CPU can take some 40,000 looks at pictures; the paper's run takes two billion. So nano has
    # small pictures, few tokens, and losses that fall at once: mild colours (with DINO's, the [CLS]
    # loss stays at ln K for a thousand steps), no more prototypes than a batch can fill, a head of
    # one layer with batch normalisation (a deeper one solves the task alone, and the backbone stays
    # as it was), a high learning rate, a teacher that follows closely; and no moving centre, even
    # for `dino`, as it lags: 8 of 128 prototypes were in use. An MLP half as wide as usual learns
    # as much in a fifth less time. `small`: in between.
    "nano": dict(size="nano", source_size=64, image_size=48, local_size=24, local_crops=2,
                 batch_size=32, pictures=4096, steps=1250, mlp_ratio=2.0, global_scale=(0.4, 1.0),
                 colour=0.2, prototypes=128, head_layers=1, bottleneck=64, patch_bottleneck=64,
                 head_norm="batch", centring="sinkhorn", lr=4e-3, lr_batch=32, warmup=0.1,
                 patch_embed_lr=1.0, drop_path=0.0, layerscale=0.0, ema=0.97, ema_end=0.99,
                 temp_end=0.04),
}
# Labels at nano: with these settings 48 % of pictures are named right; without LayerScale, with
# mixing, or with smaller crops, which often miss what the label names, it was 26 to 30 %, after 700
# to 1500 steps.
LABELS_AT_NANO = dict(lr=1e-3, layerscale=0.1, mixup=0.0, cutmix=0.0, global_scale=(0.6, 1.0),
                      steps=3000)

MANY = 10**9
# Title: rows of (name, default, range, help). A range is (from, to) for numbers, a list of choices
# for words, None for a switch or free text; a default of two numbers makes a flag that takes two.
# Recipe and scale replace many of these defaults: `--help` shows those in force.
FLAGS = {
    "what to run": [
        ("recipe", "dinov2", list(RECIPES), "losses and their defaults"),
        ("scale", None, list(SCALES), "size of everything; small on a GPU, nano on a CPU"),
        ("init", None, None, "start from these weights, a run's last.pt or public ones; --lr is "
         "1e-4 then, --head-lr 10"),
        ("data", "scenes", None, "'scenes', a folder of pictures, a text file of their paths, one "
         "picture, or the training split of a set by name: " + ", ".join(eval_dense.OPEN)),
        ("root", "", None, "folder of such a set; default: data/NAME"),
        ("download", False, None, "fetch a set that is not there: " +
         ", ".join(f"{name}, {size}" for name, size in eval_dense.FETCHED.items())),
        ("out", None, None, "run folder; default: runs/ and recipe, scale, data, spec, seed"),
        ("seed", 0, (0, 10**10), "of weights, order of pictures, views and masks"),
        ("resume", False, None, "go on from the checkpoint in --out"),
        ("overwrite", False, None, "start anew in an --out that holds a run"),
        ("dry-run", False, None, "print what the run would do, and stop"),
        ("bench", None, (1, MANY), "time this many steps, against a plain model's, and stop")],
    "model": [
        ("size", "small", list(clsspec.SIZES), "width, depth and heads; --lr is made for the "
         "scale's own: at three times nano's width a third of it learnt more"),
        ("patch", None, (1, 512), "side of a patch, pixels; default: the size's"),
        ("mlp-ratio", 4.0, (0.1, 64.0), "hidden width of the MLP / width"),
        ("registers", 0, (0, 4096), "number of register tokens"),
        ("attn", "softmax", ["softmax", "entmax15"], "normalisation of attention"),
        ("attn-bias", False, None, "a learnable key and value for every head"),
        ("class-attn", 0, (0, 99), "CaiT: the last blocks are class-attention, this many"),
        ("spec", "", None, "comma list of what is specialised: " + ",".join(clsspec.COMPONENTS)),
        ("spec-blocks", None, (0, 99), "how many blocks get qkv, proj, mlp; default: depth // 3"),
        ("spec-where", "first", ["first", "last"], "the first or the last blocks"),
        ("spec-rank", 0, (0, 4096), "rank of [CLS]'s update of qkv; 0: a full copy"),
        ("spec-init", "equal", ["equal", "fresh"], "[CLS]'s copies start as the patches', or anew"),
        ("registers-path", "patch", ["patch", "cls"], "whose weights registers pass"),
        ("drop-path", 0.0, (0.0, 0.99), "stochastic depth: chance to skip a branch"),
        ("layerscale", 0.0, (0.0, 10.0), "start of LayerScale; 0: none")],
    "pictures and views": [
        ("pictures", 4096, (1, MANY), "how many Scenes to train on"),
        ("source-size", 256, (1, 16_384), "side of the pictures that views are cut from, pixels"),
        ("image-size", 224, (1, 16_384), "side of a global view, pixels"),
        ("local-size", 96, (1, 16_384), "side of a local view, pixels"),
        ("local-crops", 8, (0, 64), "local views a picture"),
        ("global-scale", (0.4, 1.0), (1e-3, 1.0), "share of the picture in a global view"),
        ("local-scale", (0.05, 0.4), (1e-3, 1.0), "share of the picture in a local view"),
        ("colour", 1.0, (0.0, 2.0), "strength of colour jitter, grey and solarise; 1: DINO's"),
        ("workers", None, (0, 256), "processes that decode files")],
    "labels": [
        ("supervised", False, None, "learn labels by binary cross-entropy, and nothing else"),
        ("mixup", 0.8, (0.0, 100.0), "parameter of mixup's beta distribution; 0: none"),
        ("cutmix", 1.0, (0.0, 100.0), "of CutMix's; with both, a batch has one or the other")],
    "heads and losses": [
        ("ibot", 1.0, (0.0, 1e3), "weight of the masked-patch loss"),
        ("koleo", 0.1, (0.0, 1e3), "weight of KoLeo"),
        ("centring", "sinkhorn", ["sinkhorn", "ema"], "of the teacher's logits"),
        ("prototypes", 65536, (2, 2**24), "K, outputs of each head"),
        ("head-layers", 3, (1, 16), "linear layers before the prototypes"),
        ("hidden", 2048, (1, 2**17), "width between them"),
        ("bottleneck", 256, (1, 2**17), "width before the prototypes, [CLS] head"),
        ("patch-bottleneck", 256, (1, 2**17), "width before the prototypes, patch head"),
        ("head-norm", "none", ["none", "batch"], "normalisation in the heads"),
        ("separate-head", True, None, "patches have a head of their own"),
        ("mask-share", 0.5, (0.0, 1.0), "share of global views that get a mask"),
        ("mask-ratio", (0.1, 0.5), (0.0, 1.0), "share of patches hidden in those"),
        # At less than 0.01 Sinkhorn-Knopp's exponentials are 0 in fp32, and all targets with them.
        ("student-temp", 0.1, (0.01, 10.0), "temperature of the student's softmax"),
        ("temp-start", 0.04, (0.01, 10.0), "temperature of the teacher's softmax at first"),
        ("temp-end", 0.07, (0.01, 10.0), "... and after its warm-up"),
        ("temp-warmup", 0.06, (0.0, 1.0), "share of the steps until then")],
    "optimisation": [
        ("steps", 1000, (1, MANY), "optimiser steps"),
        ("batch-size", 64, (1, 2**20), "pictures a step, of each process"),
        ("lr", 5e-4, (0.0, 10.0), "peak learning rate at a global batch of --lr-batch"),
        ("lr-batch", 256, (1, 2**24), "global batch that --lr is meant for"),
        ("lr-scaling", "sqrt", ["sqrt", "linear"], "how it grows with the batch"),
        ("lr-end", 1e-6, (0.0, 10.0), "learning rate at the end"),
        ("patch-embed-lr", 1.0, (0.0, 100.0), "factor on the patch embedding's learning rate"),
        ("cls-lr", 1.0, (0.0, 100.0), "factor on the learning rate of [CLS]'s copies"),
        ("head-lr", 1.0, (0.0, 1e4), "factor on that of projection heads, which --init leaves at "
         "random"),
        ("warmup", 0.1, (0.0, 1.0), "share of the steps until the peak"),
        ("wd", 0.04, (0.0, 10.0), "weight decay at first; none on biases, norms, LayerScale"),
        ("wd-end", 0.4, (0.0, 10.0), "... and at the end"),
        ("clip", 3.0, (0.0, 1e9), "largest norm of the gradient; 0: no limit"),
        ("ema", 0.996, (0.0, 1.0), "the teacher's momentum at first"),
        ("ema-end", 1.0, (0.0, 1.0), "... and at the end"),
        ("freeze-last", 0.01, (0.0, 1.0), "share of the steps before the prototypes learn")],
    "machine and log": [
        ("device", None, list(eval_dense.DEVICES), "CUDA_VISIBLE_DEVICES says which"),
        ("precision", None, ["bf16", "fp32"], "of matrix products; default: bf16 on a GPU that "
         "has it (CUDA), and from width 384 on on a CPU that computes with it (avx512_bf16, AMX)"),
        ("compile", False, None, "torch.compile the networks"),
        ("checkpointing", False, None, "recompute activations to save memory"),
        ("log-every", 10, (1, MANY), "steps between log lines"),
        ("save-every", 200, (1, MANY), "steps between checkpoints"),
        ("probe-every", 500, (0, MANY), "steps between short probes on Scenes; 0: none"),
        ("probe", True, None, "judge the network at the end: k-NN where --data has class folders "
         "and no labels were learnt, else on Scenes")]}
SHAPE = "size", "patch", "layerscale", "mlp_ratio", "registers", "attn", "attn_bias", "class_attn"
SPEC = tuple(clsspec.NO_SPEC)


def short(path) -> str:
    """A short name for a file or folder; with its parent's, where the name alone says little."""
    path = Path(path).absolute()
    common = path.stem in ("train", "images", "pictures", "data")
    return f"{path.parent.name}-{path.stem}" if common else eval_dense.name_of(path)


def parse(argv) -> argparse.Namespace:
    """The flags. What is wrong with one of them is said in one line, before anything is read."""
    p = eval_dense.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = [row for some in FLAGS.values() for row in some]
    for title, some in FLAGS.items():
        group = p.add_argument_group(title)
        for name, default, span, text in some:
            if isinstance(default, bool):
                how = dict(action=argparse.BooleanOptionalAction)
            elif isinstance(span, list):
                how = dict(choices=span)
            elif span is None:
                how = dict(type=str)
            else:
                how = dict(type=within(type(span[0]), *span))
                text += f"; {eval_dense.span(*span)}"
            if isinstance(default, tuple):
                how |= dict(nargs=2, metavar=("FROM", "TO"))
            group.add_argument(f"--{name}", default=default, help=text + " (default: %(default)s)",
                               **how)

    cuda = torch.cuda.is_available()
    p.set_defaults(device="cuda" if cuda else "cpu", workers=8 if cuda else 2)
    # Recipe and scale are parsed first, as they set the other defaults.
    chosen, _ = p.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    scale = chosen.scale or ("small" if chosen.device == "cuda" else "nano")
    p.set_defaults(scale=scale)
    p.set_defaults(**RECIPES[chosen.recipe] | SCALES[scale])
    if chosen.supervised or chosen.recipe == "deit3":  # one view a picture, and one loss
        p.set_defaults(local_crops=0, ibot=0.0, koleo=0.0)
        p.set_defaults(**LABELS_AT_NANO if scale == "nano" else {})
    if chosen.init:  # the backbone is trained, the heads are not; trials: results/STUDY.md
        p.set_defaults(lr=1e-4, head_lr=10.0)
    args = p.parse_args(argv)

    for name, default, _, _ in rows:
        value = getattr(args, name.replace("-", "_"))
        if isinstance(default, tuple) and value[0] > value[1]:
            p.error(f"argument --{name}: {value[0]} {value[1]} are the wrong way round")
    for flag in ("init", "data", "out"):  # as an unset variable of a shell gives it
        if getattr(args, flag) == "":
            p.error(f"argument --{flag}: is empty; name something, or leave it out")
    if args.resume and args.overwrite:
        p.error("argument --resume: --overwrite starts anew; give one of them")
    if args.root and args.data not in eval_dense.OPEN:
        p.error(f"argument --root: is for sets by name, {', '.join(eval_dense.OPEN)}; leave it out")
    if args.bench and (args.resume or args.download):
        p.error("argument --bench: times steps of noise and keeps nothing; leave out --resume and "
                "--download")
    for name in SHAPE if args.init else ():
        if getattr(args, name) != p.get_default(name):
            p.error(f"argument --{name.replace('_', '-')}: --init has a shape; leave this out")
        setattr(args, name, None)  # the scale's shape is not this network's
    for name in ("ibot", "koleo", "local_crops") if args.supervised else ():
        if getattr(args, name):
            p.error(f"argument --{name.replace('_', '-')}: --supervised has one view a picture and "
                    "one loss, of labels; leave this out")
    try:
        given = eval_dense.names(args.spec) if args.spec else ()
    except argparse.ArgumentTypeError as err:
        p.error(f"argument --spec: {err}")
    # In a fixed order, however they were given; unknown ones are refused later.
    args.spec = tuple(sorted(given, key=lambda name: [*clsspec.COMPONENTS, name].index(name)))
    if not args.out:
        blocks = "" if args.spec_blocks is None else f"{args.spec_blocks}blocks"
        given = [short(x) for x in (args.init, args.data) if x not in (None, "scenes")]
        # Weights of --init may be specialised already.
        spec = args.spec or ([] if args.init else ["plain"])
        words = [args.recipe, args.scale, *given, *spec, blocks, f"s{args.seed}"]
        args.out = "runs/" + "-".join(filter(None, words))
    args.out = Path(args.out).expanduser()
    return args


# --------------------------------------------------------------------------------------------------
# Pictures: batches of uint8 on the device, in an order that depends on (seed, step) alone.


@lru_cache(maxsize=1)
def permutation(n: int, seed: int, epoch: int) -> Tensor:
    """The order of n pictures in an epoch."""
    # Seeds are a million apart, so that two runs of usual length share no random numbers. Within a
    # run the order of epoch e is drawn from the same seed as the views of step e; no harm in that.
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def batch_index(n: int, batch: int, seed: int, step: int) -> Tensor:
    """Which of n pictures make the global batch of a step: (batch,)."""
    epoch, at = divmod(step, n // batch)  # a new order every epoch; an unfilled batch is left out
    return permutation(n, seed, epoch)[at * batch : (at + 1) * batch]


def epoch_size(args, folder, batch: int) -> int:
    """How many pictures an epoch has. If they are too few to fill a batch, some are repeated."""
    return max(len(folder), batch) if folder else args.pictures


class Folder(torch.utils.data.Dataset):
    """Pictures on disk (see `eval_dense.picture_files`), or the training split of one of its sets,
    as uint8 (3, side, side), RGB: the shorter side is resized, the middle cut out. With each come
    its label, and what is wrong with the files that could not be read."""

    def __init__(self, data: str, side: int, root: str = "", download: bool = False):
        self.data, self.side = data, side
        if data in eval_dense.OPEN:
            split = eval_dense.open_split(data, root, "train", download)
            self.files = [row["image"] for row in split.rows]
            self.labels = [row.get("label", 0) for row in split.rows]
            self.classes = {name: i for i, name in enumerate(split.labels or ("",))}
            return
        self.files = eval_dense.picture_files(data)
        # Each subfolder is a class; "" is for pictures in none.
        names = [""] * len(self.files)
        if os.path.isdir(data):
            parts = [os.path.relpath(file, data).split(os.sep) for file in self.files]
            names = [part[0] if len(part) > 1 else "" for part in parts]
        self.classes = {name: i for i, name in enumerate(sorted(set(names)))}
        self.labels = [self.classes[name] for name in names]

    def __len__(self) -> int:
        return len(self.files)

    def found(self) -> str:
        """How many files there are, and a checksum of their names, in order, and of some sizes."""
        files = [file for file in self.files if isinstance(file, str)]
        names = "\n".join(map(os.path.basename, files))
        some = files[:: len(files) // 100 + 1]  # frames of two films may have the same names
        names += "".join(f" {os.path.getsize(file)}" for file in some if os.path.exists(file))
        return f"{len(self)} files ({zlib.crc32(names.encode(errors='replace')):08x})"

    def __getitem__(self, i: int) -> tuple[Tensor, int, list[str]]:
        bad = []
        for k in range(i, i + len(self.files)):
            # A file that cannot be read is replaced by the next one that can. i may be beyond the
            # last file, where there are too few for a batch.
            k %= len(self.files)
            try:
                img = eval_dense.open_picture(self.files[k], upright=True, side=self.side)
            except ValueError as err:
                bad.append(str(err))
                continue
            img = TF.center_crop(TF.resize(img, self.side), self.side)
            return TF.pil_to_tensor(img), self.labels[k], bad
        raise ValueError(f"--data {self.data}: none of its {len(bad)} files is a readable picture; "
                         f"the first: {bad[0]}")


def collate(items: list) -> tuple[Tensor, Tensor, list[str]]:
    """A list of what Folder returns -> uint8 (B, 3, S, S), labels (B,), and what is wrong with
    unreadable files."""
    img, labels, bad = zip(*items)
    return torch.stack(img), torch.tensor(labels), sum(bad, [])


def move(x: Tensor, device) -> Tensor:
    """To the device, without waiting for it on CUDA, which reads pinned memory in the background.
    (A Mac's GPU reads it too late, when the memory may hold something else.)"""
    cuda = torch.device(device).type == "cuda"
    return (x.pin_memory() if cuda else x).to(device, non_blocking=cuda)


def batches(args, folder: Folder | None, first: int, rank: int, ranks: int):
    """Yield uint8 (B, 3, S, S) and labels (B,), on the device, and what is wrong with unreadable
    files, from step `first` on."""
    batch = args.batch_size * ranks
    n = epoch_size(args, folder, batch)
    # Every rank knows the whole batch and takes its slice.
    mine = slice(rank * args.batch_size, (rank + 1) * args.batch_size)
    order = (batch_index(n, batch, args.seed, step)[mine] for step in range(first, args.steps))
    if folder:
        # Pinned memory goes to a GPU while it computes.
        stream = from_disk(folder, (i.tolist() for i in order), args.workers, collate,
                           pin_memory=args.device == "cuda")
        for img, labels, bad in stream:
            yield move(img, args.device), move(labels, args.device), bad
        return
    # Scenes fit into memory, so they are made once, on the device, and then only indexed.
    world, parts = Scenes("train", args.source_size), torch.arange(n, device=args.device).split(256)
    images, labels = [], []  # without masks and depths, which are twice as many bytes
    for part in bar(parts, "rendering Scenes", len(parts)) if rank == 0 else parts:
        made = world(part)
        images.append(made["image"])
        labels.append(made["label"])
    images, labels = torch.cat(images), torch.cat(labels)
    for i in order:
        i = move(i, args.device)
        yield images[i], labels[i], []


# --------------------------------------------------------------------------------------------------
# Views. A view is a picture times three small matrices: for rows, columns and colours.


def resample(low: Tensor, high: Tensor, n_in: int, n_out: int) -> Tensor:
    """Weights (B, n_out, n_in) that resize pixels low..high (B,) of a line to n_out pixels:
    bilinear with antialias, like torchvision's."""
    at = torch.arange(n_out, device=low.device) + 0.5
    scale = ((high - low) / n_out)[:, None, None]
    centre = low[:, None, None] + at[None, :, None] * scale
    pixel = torch.arange(n_in, device=low.device) + 0.5
    # A triangle as wide as an output pixel, but no less than an input pixel.
    weight = (1 - (pixel - centre).abs() / scale.clamp(min=1)).clamp(min=0)
    return weight / weight.sum(-1, keepdim=True)


def blurring(sigma: Tensor, size: int) -> Tensor:
    """Weights (B, size, size) that blur a line by a Gaussian of sigma (B,), pixels."""
    line = torch.arange(size, device=sigma.device)
    gauss = (line[:, None] - line) ** 2 / (-2 * sigma[:, None, None] ** 2)
    gauss = gauss.clamp(min=-30).exp()  # smaller ones do not count, and denormal numbers are slow
    return gauss / gauss.sum(-1, keepdim=True)


# How bright the eye finds red, green and blue (ITU-R BT.601); the matrix of v -> (1, 1, 1) x v.
LUMA, CROSS = (0.299, 0.587, 0.114), ((0, -1, 1), (1, 0, -1), (-1, 1, 0))


def colouring(saturation: Tensor, hue: Tensor, grey: Tensor) -> Tensor:
    """Factors (B,), turns (B,), bools for grey (B,) -> matrices (B, 3, 3) that act on RGB."""
    luma, cross = (clsspec.constant(x, hue.device, hue.dtype) for x in (LUMA, CROSS))
    eye = torch.eye(3, device=hue.device)
    third, cross = torch.full_like(eye, 1 / 3), cross / math.sqrt(3)
    turn = (2 * math.pi * hue)[:, None, None]
    # Hue turns colours around the grey axis: Rodrigues' formula.
    turned = third + turn.cos() * (eye - third) + turn.sin() * cross
    matrix = turned @ torch.lerp(luma.expand(3, 3), eye, saturation[:, None, None])
    return torch.where(grey[:, None, None], luma, matrix)


# What the uniform numbers of a view decide: TRIES areas and TRIES aspects of the crop, of which the
# first pair that fits is taken, and one number for each of these:
TRIES = 5
RANDOM = ("top", "left", "flip", "blur", "sigma", "jitter", "brightness", "contrast", "saturation",
          "hue", "grey", "solarise")
DRAWN = 2 * TRIES + len(RANDOM)


def view(img: Tensor, u: Tensor, size: int, area, blur: float, solarise: float, reach: float,
         strength: float = 1.0, three: bool = False) -> Tensor:
    """One random view of each picture: crop, flip, colours, blur, solarise, as in DINO and DINOv2;
    with `three`, DeiT-III's 3-Augment: one of grey, solarise and blur, and a milder jitter.

    img: (B, 3, H, W) in [0, 1]; u: (B, DRAWN) uniform numbers, the only randomness; area: (from,
    to), the crop's share of the picture; blur, solarise: their chances; reach: the largest sigma,
    pixels; strength: of the colour changes, 1 is DINO's. Returns (B, 3, size, size), normalised.
    """
    h, w = img.shape[-2:]
    u_share, u_ratio, others = u.split((TRIES, TRIES, len(RANDOM)), dim=1)
    u = dict(zip(RANDOM, others.unbind(1)))  # {name: (B,)}

    # The choices. The crop's aspect is 3/4 to 4/3, uniform in its logarithm.
    share = area[0] + (area[1] - area[0]) * u_share
    ratio = torch.exp(math.log(4 / 3) * (2 * u_ratio - 1))
    crop_h, crop_w = (h * w * share / ratio).sqrt(), (h * w * share * ratio).sqrt()  # (B, TRIES)
    # Of several draws the first that fits into the picture; if none does, the first, cut off.
    first = ((crop_h <= h) & (crop_w <= w)).float().argmax(1, keepdim=True)
    crop_h = crop_h.gather(1, first)[:, 0].clamp(max=h)
    crop_w = crop_w.gather(1, first)[:, 0].clamp(max=w)
    top, left = (h - crop_h) * u["top"], (w - crop_w) * u["left"]
    if three:
        one = (3 * u["grey"]).floor()
        grey, solarised, blurred = one == 0, one == 1, one == 2
        chance, most = 1.0, (0.3, 0.3, 0.3, 0.0)
    else:
        grey, solarised = u["grey"] < 0.2 * strength, u["solarise"] < solarise * strength
        blurred = u["blur"] < blur
        chance, most = 0.8, (0.4, 0.4, 0.2, 0.1)
    # A share `chance` of pictures changes in brightness, contrast, saturation, hue, up to `most`.
    jittered = u["jitter"] < chance
    # DINO's are 0.1 to 2 px; 1e-2 blurs nothing; not 0, as `blurring` divides by sigma.
    sigma = torch.where(blurred, reach * (0.05 + 0.95 * u["sigma"]), 1e-2)
    change = [torch.where(jittered, strength * limit * (2 * u[name] - 1), 0.0)
              for name, limit in zip(("brightness", "contrast", "saturation", "hue"), most)]
    bright, contrast, saturation, hue = 1 + change[0], 1 + change[1], 1 + change[2], change[3]

    # Crop, resize, blur and flip are one matrix for rows and one for columns.
    gauss = blurring(sigma, size)
    rows = gauss @ resample(top, top + crop_h, h, size)  # (B, size, h)
    columns = gauss @ resample(left, left + crop_w, w, size)  # (B, size, w)
    columns = torch.where((u["flip"] < 0.5)[:, None, None], columns.flip(1), columns)
    x = rearrange(img.flatten(1, 2) @ columns.mT, "b (c h) w -> b c h w", c=3)  # (B, 3, h, size)
    x = rows[:, None] @ x  # (B, 3, size, size)

    # Brightness, contrast, saturation, hue and grey are one linear map of colours, and an offset.
    luma = clsspec.constant(LUMA, img.device, img.dtype)
    offset = (1 - contrast) * bright * (x.mean((2, 3)) @ luma)
    colour = (bright * contrast)[:, None, None] * colouring(saturation, hue, grey)
    x = (colour @ x.flatten(2) + offset[:, None, None]).clamp(0, 1)
    x = torch.where(solarised[:, None, None] & (x > 0.5), 1 - x, x)
    return normalise(x.unflatten(2, (size, size)))


def make_views(args, img: Tensor, step: int, rank: int, ranks: int) -> tuple[Tensor, Tensor | None]:
    """uint8 (B, 3, S, S) -> global views (2 B, 3, ..) and local ones (L B, 3, ..) or None, view
    after view."""
    draw, b = torch.Generator().manual_seed(args.seed * 1_000_003 + step), len(img)
    # Drawn for the global batch, on the CPU: the same numbers on any ranks and any device.
    u = torch.rand(b * ranks, 2 + args.local_crops, DRAWN, generator=draw)
    u = move(u[rank * b : (rank + 1) * b], img.device)
    # Global views show most of a picture. Local ones are cheap, and teach what a part belongs to:
    # the student has to say of the part what the teacher says of the whole.
    # These are DINO's two kinds of global view, and its local one.
    whole = dict(size=args.image_size, area=args.global_scale)
    part = dict(size=args.local_size, area=args.local_scale)
    kinds = [whole | dict(blur=1.0, solarise=0.0), whole | dict(blur=0.1, solarise=0.2)]
    kinds += [part | dict(blur=0.5, solarise=0.0)] * args.local_crops
    img, reach = img / 255, 2 * args.image_size / 224  # DINO blurs by 2 px at the most, at 224 px
    views = [view(img, u[:, i], **kind, reach=reach, strength=args.colour)
             for i, kind in enumerate(kinds)]
    return torch.cat(views[:2]), (torch.cat(views[2:]) if args.local_crops else None)


def labelled_views(args, img: Tensor, labels: Tensor, step: int, rank: int, ranks: int):
    """uint8 (B, 3, S, S), labels (B,) -> views by 3-Augment, mixed by mixup or CutMix, (B, 3, ..);
    their targets (B, classes), 1 for every class in the mixture; the pictures without changes."""
    draw, b = torch.Generator().manual_seed(args.seed * 1_000_003 + step), len(img)
    u = torch.rand(b * ranks, DRAWN, generator=draw)[rank * b : (rank + 1) * b]
    u = move(u, img.device)
    size, n, img = args.image_size, args.classes, img / 255
    views = view(img, u, size, args.global_scale, blur=0, solarise=0, reach=2 * size / 224,
                 strength=args.colour, three=True)
    # Mixtures differ in every epoch, so labels cannot be learnt by heart.
    ways = [way(alpha=alpha, num_classes=n)
            for way, alpha in ((v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)) if alpha]
    views, targets = v2.RandomChoice(ways)(views, labels) if ways else (views, F.one_hot(labels, n))
    # Without changes, for `top1`: a mixture has no single right class.
    clean = F.interpolate(img, (size, size), mode="bilinear", antialias=True)
    # As in DeiT-III, each class is a yes or no of its own, and both of a mixture are yes.
    return views, (targets > 0).float(), normalise(clean)


def block_masks(wanted: Tensor, side: int, u: Tensor) -> Tensor:
    """Hide random rectangles among side x side patches, as BEiT and DINOv2 do: single patches could
    be guessed from their neighbours.

    wanted: (B,) how many patches to hide at most; u: (B, tries, 4) uniform numbers.
    Returns (B, side^2) bool.
    """
    mask, line = torch.zeros(len(wanted), side, side, dtype=torch.bool), torch.arange(side)

    def inside(low: Tensor, n: Tensor) -> Tensor:  # (B,), (B,) -> (B, side)
        return (line >= low[:, None]) & (line < (low + n)[:, None])

    for u_area, u_aspect, u_y, u_x in u.permute(1, 2, 0):  # one rectangle in every view at a time
        missing = wanted - mask.sum((1, 2))  # (B,), still to be hidden
        # Before rounding, the area is from 4 patches to all that are missing, the aspect from 0.3
        # to 1 / 0.3.
        area = 4 + u_area * (missing - 4)
        aspect = torch.exp(math.log(0.3) * (2 * u_aspect - 1))
        h, w = ((area * a).sqrt().round().clamp(1, side) for a in (aspect, 1 / aspect))
        rows = inside((u_y * (side - h + 1)).floor(), h)
        columns = inside((u_x * (side - w + 1)).floor(), w)
        box = rows[:, :, None] & columns[:, None]
        fits = (box & ~mask).sum((1, 2)) <= missing  # one that would hide too many is dropped
        mask |= box & fits[:, None, None]
    return mask.flatten(1)


def make_masks(args, b: int, patch: int, step: int, rank: int, ranks: int) -> Tensor:
    """Masks for the global views of a rank, (2 b, N); as in DINOv2, a share of views has one."""
    # A seed far from that of the step's views: masks must not depend on crops.
    draw = torch.Generator().manual_seed(args.seed * 1_000_003 + step + 500_000_000)
    side, views, (low, high) = args.image_size // patch, 2 * b * ranks, args.mask_ratio
    number, masked = torch.arange(views), int(views * args.mask_share)
    # Each mask draws from an equal part of --mask-ratio of its own, so that no batch is all easy.
    ratio = low + (high - low) * (number + torch.rand(views, generator=draw)) / max(masked, 1)
    wanted = torch.where(number < masked, (ratio * side * side).long(), 0)
    wanted = wanted[torch.randperm(views, generator=draw)]
    # Some rectangles are dropped; with 20 of them 96 % of masks hide as much as is wanted.
    u = torch.rand(views, 20, 4, generator=draw)
    mine = number.view(2, ranks, b)[:, rank].flatten()  # this rank's pictures, in both views
    return block_masks(wanted[mine], side, u[mine])


def inputs(args, img: Tensor, labels: Tensor, patch: int, step: int, rank: int, ranks: int):
    """What both networks are given in a step: global views, local views and masks. Supervised:
    mixed views, their targets, the pictures without changes, and labels."""
    if args.supervised:
        return *labelled_views(args, img, labels, step, rank, ranks), labels
    mask = make_masks(args, len(img), patch, step, rank, ranks) if args.ibot else None
    return *make_views(args, img, step, rank, ranks), mask


# --------------------------------------------------------------------------------------------------
# Heads and losses.


class AllSum(torch.autograd.Function):
    """The sum of every rank's x, on all ranks; its gradient is the sum of all ranks' gradients.
    (torch.distributed.nn has the same, deprecated.)"""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return AllSum.forward(ctx, grad)


def all_sum(x: Tensor) -> Tensor:
    """Sum over all ranks, differentiable; without torchrun: x itself."""
    return AllSum.apply(x) if dist.is_initialized() else x


class BatchNorm(nn.Module):
    """(n, D) -> mean 0, variance 1 over the batch of all ranks; no affine, no running averages.
    (torch's SyncBatchNorm is the same, but refuses to work on a CPU.)"""

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        sums = all_sum(torch.cat([x.sum(0), x.square().sum(0), x.new_full((1,), len(x))]))
        mean, square = (sums[:-1] / sums[-1]).chunk(2)
        # The mean square less the squared mean: rounding can leave it a little below 0.
        return (x - mean) * ((square - mean**2).clamp(min=0) + 1e-5).rsqrt()


class Head(nn.Module):
    """Tokens (n, D) -> logits (n, K) in [-1, 1] over prototypes: an MLP, then the cosine with each.
    """

    def __init__(self, width: int, bottleneck: int, prototypes: int, layers: int, hidden: int,
                 norm: str):
        super().__init__()
        # These layers are thrown away afterwards; they can learn what serves this task alone.
        widths, parts = [width, *[hidden] * (layers - 1), bottleneck], []
        for i, o in zip(widths, widths[1:]):
            parts.append(nn.Linear(i, o, bias=norm == "none"))  # a norm would undo a bias
            parts += [BatchNorm()] if norm == "batch" else []
            parts.append(nn.GELU())
        self.mlp = nn.Sequential(*parts[:-1])  # no GELU at the end: a cosine wants both signs
        self.last = nn.Parameter(torch.empty(prototypes, bottleneck))
        for name, p in self.named_parameters():
            nn.init.zeros_(p) if name.endswith("bias") else nn.init.trunc_normal_(p, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        # Both get unit length, so that neither a picture nor a prototype wins by its length.
        x = F.normalize(self.mlp(x).float(), dim=-1)
        # The operator behind weight_norm does F.normalize(self.last) in half the time, which saves
        # 6 % of a ViT-S step of 4 pictures.
        last = torch._weight_norm(self.last, self.last.new_ones(len(self.last), 1), 0)
        return F.linear(x, last).float()


@torch.no_grad()
def sinkhorn(logits: Tensor, temp: float, iterations: int = 3) -> Tensor:
    """Teacher logits (n, K), cosines, of all global views or all masked patches -> targets (n, K):
    rows sum to 1, prototypes are used equally. Sinkhorn-Knopp over the batches of all ranks, as in
    SwAV (arXiv 2006.09882) and DINOv2."""
    # Without it one prototype could get all pictures, and the student's task would be trivial.
    q = torch.exp((logits - 1) / temp)  # at most 1
    for _ in range(iterations):  # each line undoes a little of the other's work, ever less
        q = q / all_sum(q.sum(0)).clamp(min=1e-30)  # every prototype gets the same weight ...
        q = q / q.sum(1, keepdim=True).clamp(min=1e-30)  # ... and every token too
    return q


@torch.no_grad()
def ema_centre(logits: Tensor, temp: float, centre: Tensor) -> Tensor:
    """Teacher logits (n, K) -> softmax((logits - centre) / temp), DINO's earlier way to keep one
    prototype from getting all pictures. arXiv 2104.14294, equation 4."""
    out = F.softmax((logits - centre) / temp, dim=-1)
    # `centre` (K,) moves a tenth of the way to the mean of all ranks' logits, if there are any: the
    # mean of one batch alone is noisy.
    sums = all_sum(torch.cat([logits.sum(0), logits.new_full((1,), len(logits))]))
    centre.lerp_(sums[:-1] / sums[-1].clamp(min=1), 0.1 * (sums[-1] > 0))
    return out


def dino_loss(student: Tensor, teacher: Tensor, temp: float) -> Tensor:
    """Cross-entropy of every student view with the targets of every other global view, in nats:
    mean over pairs t != v and pictures of -sum_k teacher_tk log softmax(student_v / temp)_k.

    student: (V, B, K) logits, the two global views first; teacher: (2, B, K) targets.
    """
    student = student / temp
    # log softmax = student - logsumexp, term by term, which saves a tensor (V, B, K).
    dots = torch.einsum("tbk,vbk->tvb", teacher, student)
    # A row of targets sums to 1, unless Sinkhorn's underflowed to 0.
    loss = (teacher.sum(-1)[:, None] * student.logsumexp(-1) - dots).mean(-1)  # (2, V)
    other = 1 - torch.eye(*loss.shape, device=loss.device)  # a view does not learn from itself
    return (other * loss).sum() / other.sum()


def ibot_loss(student: Tensor, teacher: Tensor, weight: Tensor, temp: float, views: int) -> Tensor:
    """Cross-entropy on masked patches, nats: mean over a view's masked patches, then over `views`.
    The student sees the picture with patches hidden, the teacher all of it (arXiv 2111.07832).

    student: (M, K) logits; teacher: (M, K) targets; weight: (M,), 1 / masked patches of that view.
    A view without a mask counts as 0, as in DINOv2.
    """
    entropy = -(teacher * F.log_softmax(student / temp, dim=-1)).sum(-1)  # (M,)
    return (entropy * weight).sum() / views


def koleo(z: Tensor) -> Tensor:
    """Push embeddings off their nearest neighbour: -mean_i log(min_j |z_i - z_j| + 1e-8), in nats.

    z: (B, D), scaled to unit norm here; of one view, as two views of a picture should be close.
    Neighbours are looked for on all ranks. arXiv 1806.03198.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    z = F.normalize(z.float(), dim=-1)
    # Each rank puts its rows among zeros; the sum over ranks has all rows, with gradients.
    everyone = all_sum(F.pad(z, (0, 0, rank * len(z), (ranks - 1 - rank) * len(z))))
    with torch.no_grad():
        dots = z @ everyone.T
        dots.diagonal(rank * len(z)).fill_(-2)  # not itself: -1 is the least of all cosines
        near = dots.argmax(1)  # of unit vectors, the largest product is the smallest distance
    # The log pushes those with the closest neighbours hardest. 1e-8, as two may be equal.
    return -torch.log((z - everyone[near]).norm(dim=1) + 1e-8).mean()


def precision_for(device: str, width: int) -> str:
    """bf16 where it is faster. On one thread of a CPU with avx512_bf16 a ViT-S step took 0.71 of
    the time in bf16, and one of nano 1.23; hardware without bf16 emulates it, many times slower."""
    if device == "cuda":
        return "bf16" if eval_dense.gpu_has_bf16() else "fp32"
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # no public name says it
    cpu = any(getattr(torch.cpu, name, lambda: False)() for name in asked)
    return "bf16" if device == "cpu" and cpu and width >= 384 else "fp32"


class Network(nn.Module):
    """A ViT and its heads: the student is one, the teacher another. It computes in bf16 or fp32, as
    `precision` says; all its outputs, and so every loss, are fp32."""

    def __init__(self, args):
        super().__init__()
        spec = {k: getattr(args, k) for k in SPEC}
        if args.init:
            self.backbone = clsspec.start(args.init, args.drop_path, spec)
        else:
            shape = {k: getattr(args, k) for k in SHAPE if getattr(args, k) is not None}
            self.backbone = clsspec.ViT(clsspec.config(
                **shape, **spec, image_size=args.image_size, drop_path=args.drop_path))
        cfg = self.backbone.config
        self.backbone.checkpointing = args.checkpointing
        # DistributedDataParallel would wait for the gradient of a token that no loss reaches.
        self.backbone.mask_token.requires_grad = args.ibot > 0
        self.supervised = args.supervised
        self.precision = args.precision or precision_for(args.device, cfg.width)
        self.cast = args.device, torch.bfloat16, self.precision == "bf16"
        if args.supervised:
            self.cls_head = nn.Linear(cfg.width, args.classes)
            nn.init.trunc_normal_(self.cls_head.weight, std=0.02)
            nn.init.zeros_(self.cls_head.bias)
            return
        shape = args.prototypes, args.head_layers, args.hidden, args.head_norm
        self.cls_head = self.patch_head = Head(cfg.width, args.bottleneck, *shape)
        if args.ibot and args.separate_head:
            self.patch_head = Head(cfg.width, args.patch_bottleneck, *shape)
        for name in ("cls_centre", "patch_centre"):  # of the teacher, with EMA centring
            self.register_buffer(name, torch.zeros(args.prototypes))

    def forward(self, global_views: Tensor, local_views=None, mask=None, chosen=None):
        """Views (2 B, ..), (L B, ..) or None; mask: (2 B, N); chosen: (M,) indices into all 2 B N
        patches.

        Returns cls (2 B, D) of the global views, [CLS] logits (V, B, K), patch logits (M, K).
        Supervised: takes views (B, ..), returns logits of classes (B, classes).
        """
        with torch.autocast(*self.cast):
            out = self.backbone(global_views, mask, cls_only=chosen is None)
            if self.supervised:
                return self.cls_head(out["cls"]).float()
            cls = [out["cls"]]
            if local_views is not None:
                cls.append(self.backbone(local_views, cls_only=True)["cls"])
            logits = self.cls_head(torch.cat(cls))
            logits = rearrange(logits, "(v b) k -> v b k", b=len(global_views) // 2)
            if chosen is None:
                return cls[0], logits, None
            patches = out["patches"].flatten(0, 1).index_select(0, chosen)  # (M, D)
            return cls[0], logits, self.patch_head(patches)


def distil(args, student, teacher: Network, global_views: Tensor, local_views, mask, temp):
    """Self-distillation, one pass of both networks: weighted terms of the loss, and meters of
    collapse; all scalars. mask: (2 B, N) bool on the CPU, or None without iBOT."""
    chosen, device = None, global_views.device
    # The mask is on the CPU, so how many patches are hidden is known without waiting for a GPU.
    if mask is not None:
        chosen = move(mask.flatten().nonzero()[:, 0], device)
        # A view counts once, however many of its patches are hidden.
        weight = (1 / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(mask)[mask]
        weight, mask = move(weight, device), move(mask, device)

    def targets(logits: Tensor, centre: Tensor) -> Tensor:
        ema = args.centring == "ema"
        return ema_centre(logits, temp, centre) if ema else sinkhorn(logits, temp)

    # The teacher sees global views only, with nothing hidden: it knows more than the student.
    with torch.no_grad():
        cls, logits, patch_logits = teacher(global_views, chosen=chosen)
        cls_target = targets(logits.flatten(0, 1), teacher.cls_centre).view_as(logits)
    student_cls, student_logits, student_patch = student(global_views, local_views, mask, chosen)
    terms = {"dino": dino_loss(student_logits, cls_target, args.student_temp)}
    if mask is not None:
        patch_target = targets(patch_logits, teacher.patch_centre)
        ibot = ibot_loss(student_patch, patch_target, weight, args.student_temp, len(mask))
        terms["ibot"] = args.ibot * ibot
    if args.koleo:
        terms["koleo"] = args.koleo * sum(koleo(one) for one in student_cls.chunk(2))

    # Meters. As shares of ln K, the entropy of knowing nothing: `entropy`, of the targets (1: they
    # say nothing); `usage`, of their mean (1: prototypes are used equally; as low as `entropy`: all
    # pictures have the same target). `cls_std`, over the batch (0: all pictures look alike, 1: they
    # are spread all over the sphere). `kl`, from the targets to the student, nats.
    mean = cls_target.mean((0, 1))  # (K,)
    entropy, usage = (-torch.xlogy(p, p).sum(-1).mean() for p in (cls_target, mean))
    spread = F.normalize(cls.float(), dim=-1).std(0).mean() * cls.shape[1] ** 0.5
    full = math.log(args.prototypes)
    meters = {"entropy": entropy / full, "usage": usage / full, "cls_std": spread,
              "kl": terms["dino"].detach() - entropy}
    return terms, meters


def supervise(student, teacher: Network, views: Tensor, targets: Tensor, clean: Tensor, labels):
    """Binary cross-entropy of mixed views, nats, mean over classes. The meter `top1`, %, is how
    often the averaged network names this batch's unmixed pictures right, which is no test."""
    loss = F.binary_cross_entropy_with_logits(student(views), targets)
    with torch.no_grad():
        right = teacher(clean).argmax(1) == labels
    return {"bce": loss}, {"top1": 100 * right.float().mean()}


# --------------------------------------------------------------------------------------------------
# Schedules, teacher, optimiser.


def cosine(step: int, steps: int, start: float, end: float, warmup: int = 0) -> float:
    """From `start` to `end` along half a cosine, after `warmup` steps of a linear rise from 0 to
    `start`."""
    if step < warmup:
        return start * step / (warmup - 1) if warmup > 1 else start
    share = (step - warmup) / max(steps - warmup, 1)
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def schedule(args, step: int, ranks: int) -> dict[str, float]:
    """Learning rate, weight decay, teacher momentum and temperature of a step (counted from 0)."""
    # A larger batch has a less noisy gradient, which allows larger steps.
    growth = args.batch_size * ranks / args.lr_batch
    peak = args.lr * (growth**0.5 if args.lr_scaling == "sqrt" else growth)
    # Lower at first: DINO collapses above 0.06, unless it begins below (arXiv 2104.14294).
    rise = min(step / max(args.temp_warmup * args.steps, 1e-9), 1)
    return {"lr": cosine(step, args.steps, peak, args.lr_end, int(args.warmup * args.steps)),
            # Little at first, when there is all to learn; more later, when little is left.
            "wd": cosine(step, args.steps, args.wd, args.wd_end),
            "ema": cosine(step, args.steps, args.ema, args.ema_end),
            "temp": args.temp_start + (args.temp_end - args.temp_start) * rise}


def make_teacher(student: Network) -> Network:
    """A copy of the student that takes no gradient and skips no branch."""
    # If it, too, learnt by gradients, both could settle on one answer for all pictures.
    return copy.deepcopy(student).requires_grad_(False).eval()


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum teacher + (1 - momentum) student, in place."""
    # Parameters only: the buffers are centres, and the teacher has its own. One call for all, as
    # hundreds of small ones would take longer to start than to compute.
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


def make_optimizer(args, student: Network) -> torch.optim.AdamW:
    """AdamW in groups; `set_rates` tells each its learning rate and weight decay."""
    # Pulling a gain or a bias towards 0 makes no network simpler: those are `free` of decay.
    # `kinds` are parts of a name, of which the first that fits counts; each may have a learning
    # rate of its own. "cls" are [CLS]'s copies in clsspec.Specialised, "last" the prototypes.
    groups, kinds = {}, ("last", "patch_embed", "cls", "cls_head", "patch_head")
    for name, p in student.named_parameters():
        free = name.endswith(".bias") or "norm" in name or "gamma" in name
        if args.supervised:  # DeiT's are free, DINO's and DINOv2's are not
            free |= name.endswith(("pos_embed", "cls_token"))
        kind = next((kind for kind in kinds if kind in name.split(".")), "rest")
        group = groups.setdefault((kind, free), {"params": [], "kind": kind, "free": free})
        group["params"].append(p)
    return torch.optim.AdamW(groups.values(), lr=0.0, fused=True)  # fused: one pass over all


def set_rates(args, optimizer, now: dict[str, float], step: int) -> None:
    """Give each group its learning rate and weight decay of this step."""
    # Why the factors: a fast patch embedding makes a ViT unstable (MoCo v3, arXiv 2104.02057);
    # [CLS]'s copies learn from one token a view, the patches' from dozens; and heads, which --init
    # leaves at random, have farther to go than the backbone.
    factors = {"patch_embed": args.patch_embed_lr, "cls": args.cls_lr,
               **dict.fromkeys(("cls_head", "patch_head", "last"), args.head_lr)}
    for group in optimizer.param_groups:
        factor = factors.get(group["kind"], 1)
        if group["kind"] == "last" and step < args.freeze_last * args.steps:
            factor = 0  # early on prototypes would move fast, and the backbone chase them
        group["lr"] = factor * now["lr"]
        group["weight_decay"] = 0 if group["free"] else now["wd"]


def wrap(args, student: Network, teacher: Network, ranks: int):
    """Compile both, if asked to; returns what takes the student's steps, on one rank or on many."""
    if args.compile:
        for network in (student, teacher):  # dynamic shapes gain nothing, and fail with antialias
            network.backbone.compile(dynamic=False)
        # Otherwise each bucket of gradients, some 50 in a ViT-L, would be compiled by itself.
        torch._dynamo.config.optimize_ddp = False
    if ranks == 1:
        return student
    # The student's buffers are not used; gradients are kept once, in the buckets.
    return nn.parallel.DistributedDataParallel(student, broadcast_buffers=False,
                                               gradient_as_bucket_view=True)


def train_step(args, learner, teacher: Network, optimizer, img: Tensor, labels: Tensor, step: int,
               rank: int = 0, ranks: int = 1) -> tuple[dict, dict]:
    """One step on pictures uint8 (B, 3, S, S): views, loss, gradient, AdamW, teacher.

    learner: the student, or DistributedDataParallel around it. Returns the schedules' numbers, and
    scalars to log, which stay on the device: reading one would wait for the GPU.
    """
    student, now = getattr(learner, "module", learner), schedule(args, step, ranks)
    # Large steps first, small ones to settle; and a teacher that follows ever more slowly.
    set_rates(args, optimizer, now, step)
    # Stochastic depth and mixup draw from torch's own generator. It is seeded by the step, so that
    # runs can be resumed, and by the rank, as each rank has other pictures.
    torch.manual_seed((args.seed * 1_000_003 + step) * 1024 + rank)
    # Views and masks; what both networks say, and the loss; one step of the optimiser.
    given = inputs(args, img, labels, student.backbone.config.patch, step, rank, ranks)
    if args.supervised:
        terms, meters = supervise(learner, teacher, *given)
    else:
        terms, meters = distil(args, learner, teacher, *given, now["temp"])
    loss = sum(terms.values())
    optimizer.zero_grad()
    loss.backward()
    # One odd batch must not undo what many have taught. With --clip 0 the norm is only logged.
    norm = nn.utils.clip_grad_norm_(student.parameters(), args.clip or math.inf)
    optimizer.step()
    # The teacher follows. An average of many students is usually better than the last of them.
    update_teacher(teacher, student, now["ema"])
    values = {"loss": loss, **terms, **meters, "grad_norm": norm}
    return now, {name: value.detach() for name, value in values.items()}


# --------------------------------------------------------------------------------------------------
# The run folder: what is kept, and how a run goes on.


# Files of a run: a folder that has one of these holds a run.
LEFT = "config.json", "log.jsonl", "last.pt", "eval.json", "analysis.json"


class RunFolder:
    """The folder --out, owned by this process until it ends. Of several ranks the first has it.

    A run that is already there is not touched until the new one has a checkpoint; until then the
    new one's files have names that end in `.new`.
    """

    def __init__(self, args):
        """ValueError: another process owns it, or it holds a run that is not to be replaced."""
        self.path, self.begun = args.out, False  # begun: there are files of this run
        self.saved = None  # the step of the last checkpoint
        held = [name for name in LEFT if (self.path / name).exists()]
        more = "--resume to go on, " if "last.pt" in held else ""
        need(not held or args.resume or args.overwrite, f"{self.path} holds a run already "
             f"({', '.join(held)}): give {more}--overwrite to start anew, or another --out")
        self.new = ".new" if held and not args.resume else ""
        self.path.mkdir(parents=True, exist_ok=True)
        self.claim()

    def claim(self) -> None:
        """Take a lock that is freed when the process ends, however it ends."""
        self.lock = open(self.path / ".lock", "a+")
        try:
            import fcntl  # not on Windows, where nothing is claimed
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except BlockingIOError:
            self.lock.seek(0)
            raise ValueError(f"{self.path} is in use by process {self.lock.read().strip()}; wait "
                             "for its end, or give another --out") from None
        self.lock.truncate(0)
        self.lock.write(f"{os.getpid()}\n")
        self.lock.flush()

    def close(self) -> None:
        """Remove what is of no use without a checkpoint, and the folder, if it is then empty."""
        if self.begun and self.saved is None:
            for name in ("config.json", "log.jsonl"):
                (self.path / f"{name}{self.new}").unlink(missing_ok=True)
        for leave in ((self.path / ".lock").unlink, self.lock.close, self.path.rmdir):
            with suppress(OSError):  # a folder that has something in it, as it should, stays
                leave()

    def begin(self, args, config: clsspec.Config, first: int, ranks: int) -> int:
        """Write config.json, and cut log.jsonl off at the step where this run begins. Returns how
        many unreadable files the run had met by then."""
        self.begun, self.saved = True, first or None
        log = self.path / "log.jsonl"
        lines = eval_dense.read_log(log) if first and log.exists() else []
        kept = [line for line in lines if line["step"] <= first]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        eval_dense.write(self.path / f"log.jsonl{self.new}", text)
        cuda = args.device == "cuda"
        eval_dense.write(self.path / f"config.json{self.new}", json.dumps({
            "command": "python " + " ".join(sys.argv), "args": as_json(args),
            "model": asdict(config), **eval_dense.versions(), "processes": ranks,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if cuda else args.device}, indent=1))
        return kept[-1].get("skipped", 0) if kept else 0

    def log(self, line: dict) -> None:
        try:
            with open(self.path / f"log.jsonl{self.new}", "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as err:
            raise ValueError(f"could not write {self.path / 'log.jsonl'}: {err.strerror}; "
                             f"{self.kept()}; free some space, then go on with --resume") from None

    def save(self, state: dict) -> None:
        """Write last.pt beside the old one, then move it into place: it is always whole. Weights
        that are not finite are refused."""
        step, file = state["step"], self.path / "last.pt"
        for network in ("student", "teacher"):
            odd = clsspec.not_finite(state[network])
            need(not odd, f"{odd} of the {network} is not finite at step {step}, which is not "
                 f"saved; {self.kept()}; start anew with a lower --lr or --clip")
        beside = file.with_suffix(".tmp")
        try:
            with open(beside, "wb") as out:
                torch.save(state, out)
                out.flush()
                os.fsync(out.fileno())  # on the disk before the old one is given up
            self.put_away(step)
            os.replace(beside, file)
        except (OSError, RuntimeError) as err:
            why = getattr(err, "strerror", None) or str(err).splitlines()[0]
            raise ValueError(f"could not save {file} at step {step}: {why}; {self.kept()}; free "
                             "some space, then go on with --resume") from None
        finally:
            beside.unlink(missing_ok=True)
        if self.new:
            for name in ("config.json", "log.jsonl"):
                os.replace(self.path / f"{name}.new", self.path / name)
            self.new = ""
        self.saved = step

    def put_away(self, step: int) -> None:
        """Delete an old run's results, or rename this run's: they are of another network than
        that of this step."""
        if self.new:  # they are an old run's, and from here on the folder is the new one's
            for name in ("eval.json", "eval.step*.json", "analysis.json", "analysis.step*.json",
                         "pictures.png"):
                for file in self.path.glob(name):
                    file.unlink()
        elif step != self.saved:  # they are this run's, of its last checkpoint
            for name in ("eval", "analysis"):
                if (self.path / f"{name}.json").exists():
                    os.replace(self.path / f"{name}.json",
                               self.path / f"{name}.step{self.saved}.json")

    def kept(self) -> str:
        """What is safe, in words, for a message."""
        if self.saved is None:
            old = self.new and (self.path / "last.pt").exists()
            return "the old run is as it was" if old else "there is no checkpoint yet"
        return f"the checkpoint of step {self.saved} is intact"


# Flags that may differ when a run is resumed; --batch-size only if the global batch stays the same.
MAY_DIFFER = {"resume", "overwrite", "download", "dry_run", "out", "workers", "device", "compile",
              "checkpointing", "log_every", "save_every", "probe_every", "probe", "batch_size",
              "steps"}


def as_json(args) -> dict:
    """The flags as values that JSON and torch.load(weights_only=True) can hold."""
    return json.loads(json.dumps(vars(args), default=str))


def resume(args, student: Network, teacher: Network, optimizer, ranks: int) -> tuple[int, int]:
    """Load --out/last.pt into all three. Returns its step, and the --steps that it was made with.
    ValueError: it is missing, or of another run."""
    path = args.out / "last.pt"
    need(path.exists(), f"--resume: there is no {path}; start anew with --overwrite in place of "
         "--resume, or correct --out")
    state = clsspec.read(path)
    wanted = {"args": dict, "step": int, "global_batch": int, "student": dict, "teacher": dict,
              "optimizer": dict}
    need(all(isinstance(state.get(key), kind) for key, kind in wanted.items()),
         f"--resume: {path} is not a checkpoint of train.py; correct --out")
    theirs = state["args"] | {"global_batch": state["global_batch"]}
    ours, step = as_json(args) | {"global_batch": args.batch_size * ranks}, state["step"]
    differ = {name for name in ours.keys() - MAY_DIFFER
              if theirs.get(name, ours[name]) != ours[name]}
    if ours["found"] and ours["found"] == theirs.get("found"):
        differ -= {"data", "root"}  # the same pictures in another place
    flag = {name: f"--{name.replace('_', '-')}" for name in differ}
    flag |= {"found": "--data with", "classes": "classes:",
             "global_batch": "a global batch (--batch-size x processes) of"}
    odd = [f"{flag[name]} {theirs[name]} (now {ours[name]})" for name in sorted(differ)]
    need(not odd, f"--resume: {path} is of another run: it has {', '.join(odd)}; give its flags, "
         "or another --out")
    need(step <= args.steps, f"--resume: {path} is at step {step}, beyond --steps {args.steps}")
    try:
        student.load_state_dict(state["student"])
        teacher.load_state_dict(state["teacher"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as err:
        why = " ".join(str(err).split())[:200]
        raise ValueError(f"--resume: {path} is not a checkpoint of this run ({why})") from None
    odd = clsspec.not_finite(state["student"]) or clsspec.not_finite(state["teacher"])
    need(not odd, f"--resume: {odd} in {path} is not finite; start anew with a lower --lr")
    return step, theirs["steps"]


# --------------------------------------------------------------------------------------------------
# What a run would cost: --dry-run and --bench.


def peak_mb(cuda: bool) -> float:
    """Peak memory so far, MiB: the GPU's, or this process's (0 where the system does not say)."""
    if cuda:
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource  # not on Windows
    except ImportError:
        return 0.0
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def memory_gib(args, network: Network) -> dict[str, float]:
    """An estimate of what a process will hold in memory, GiB, by kind."""
    cfg, number = network.backbone.config, 2 if args.precision == "bf16" else 4  # bytes
    patches, local = ((side // cfg.patch) ** 2 for side in (args.image_size, args.local_size))
    views, more = 1 if args.supervised else 2, 1 + cfg.registers
    tokens = views * (patches + more) + args.local_crops * (local + more)
    pairs = views * (patches + more) ** 2 + args.local_crops * (local + more) ** 2
    pairs *= cfg.heads if cfg.attn == "entmax15" and not args.checkpointing else 0
    scenes = args.pictures if args.data == "scenes" and not args.bench else 0
    # Kept for the backward pass: 13 or 15 vectors of D numbers a token and block, with an MLP four
    # times as wide; with checkpointing only the block's input. entmax keeps attention's weights.
    each = 1 if args.checkpointing else (13 + 2 * bool(cfg.layerscale)) * (1 - args.drop_path)
    masked = 2 * args.mask_share * sum(args.mask_ratio) / 2 * patches if args.ibot else 0
    rows = args.batch_size * (2 * views + args.local_crops + 2 * masked)
    return {  # weights: student, teacher, gradient, AdamW's two moments; logits: softmax, gradient
        "weights and optimiser": 5 * 4 * clsspec.parameters(network)[0] / 2**30,
        "activations": args.batch_size * cfg.depth * (tokens * cfg.width * each + pairs) * number
        / 2**30,
        "logits": 3 * 4 * rows * (args.classes if args.supervised else args.prototypes) / 2**30,
        "pictures": 3 * args.source_size**2 * (scenes + 5 * args.batch_size) / 2**30}


def describe(args, network: Network, ranks: int) -> None:
    """--dry-run: say what a run would do, without doing it."""
    cfg, batch = network.backbone.config, args.batch_size * ranks
    total, copies = clsspec.parameters(network.backbone)
    wider = copies / (cfg.depth * cfg.width * (2 * cfg.width + 1))
    warmup, memory = int(args.warmup * args.steps), memory_gib(args, network)
    heads = clsspec.parameters(network)[0] - total
    print(f"  backbone          {total / 1e6:10.3f} M parameters, of them {copies / 1e6:.3f} M "
          f"[CLS] copies\n  which is           {clsspec.described(network.backbone)}")
    if args.found:
        print(f"  pictures           {args.found.partition(' (')[0]}")  # not their checksum
    if copies and not args.init:  # --init fixes the shape
        print(f"  plain, as many    --mlp-ratio {cfg.mlp_ratio + wider:.3f}")
    outputs = f"{args.classes} classes" if args.supervised else f"K = {args.prototypes}"
    print(f"  heads             {heads / 1e6:10.3f} M parameters, {outputs}\n"
          f"  one picture       {clsspec.flops(cfg, args.image_size, args.image_size) / 1e9:10.2f} "
          f"GFLOPs forward, at {args.image_size} px\n"
          f"  global batch      {batch:10} pictures = {args.batch_size} x {ranks} process(es); "
          f"{args.steps} steps, {args.steps * batch / 1e6:.3g} M pictures in all\n"
          f"  learning rate     {schedule(args, warmup, ranks)['lr']:10.3g} at its peak, step "
          f"{warmup}: {args.lr:g} at batch {args.lr_batch}, {args.lr_scaling} scaling; heads x "
          f"{args.head_lr:g}, [CLS] copies x {args.cls_lr:g}\n"
          f"  memory            {sum(memory.values()):10.1f} GiB a process, about, of "
          f"{eval_dense.machine_gib(args.device):.1f} here: "
          + ", ".join(f"{name} {gib:.1f}" for name, gib in memory.items()))


def bench(args, rank: int, ranks: int) -> None:
    """--bench: time steps of the network as given and of a plain one, in turns, on noise pictures.

    It prints medians, and ratios of times of the same round with their quartiles. `plain again` is
    the same network as `plain`: they differ by the noise of the machine alone.
    """
    cuda, draw = args.device == "cuda", torch.Generator().manual_seed(0)
    shape = args.batch_size, 3, args.source_size, args.source_size
    img = torch.randint(256, shape, dtype=torch.uint8, generator=draw).to(args.device)
    labels = torch.zeros(len(img), dtype=torch.long, device=args.device)
    first = 4 + int(args.warmup * args.steps)  # 4 steps for the caches, at the rate's peak

    def stepper(args):
        """A function that takes a step with a new network, after some steps that compile and fill
        caches; and the network's patch."""
        torch.manual_seed(args.seed)
        student = Network(args).to(args.device)
        need(args.spec or not student.backbone.config.spec, f"--bench: the weights in {args.init} "
             "are specialised, there is no plain network of them; give plain ones, or none")
        teacher, optimizer = make_teacher(student), make_optimizer(args, student)
        learner = wrap(args, student, teacher, ranks)

        def take(step: int) -> None:
            train_step(args, learner, teacher, optimizer, img, labels, step, rank, ranks)

        for step in range(first - 4, first):
            take(step)
        return take, student.backbone.config.patch

    # Plain has the scale's own MLP. So if a wider one is given, to have as many parameters as a
    # specialised network, that is compared with plain.
    usual = {"mlp_ratio": SCALES[args.scale].get("mlp_ratio", 4.0)}
    bare = clsspec.NO_SPEC if args.init else clsspec.PLAIN | usual
    given, patch = stepper(args)
    memory = peak_mb(cuda)  # now, while there is no second network
    plain, _ = stepper(argparse.Namespace(**vars(args) | bare))
    calls = {"as given": given, "plain": plain, "plain again": plain,
             "views alone": lambda step: inputs(args, img, labels, patch, step, rank, ranks)}
    side = 8192 if cuda else 2048  # one large product shows what the machine can do at best
    a = torch.randn(side, side, device=args.device)
    a = a.bfloat16() if args.precision == "bf16" else a
    calls["product"] = lambda step: a @ a
    times = {name: [] for name in calls}
    for step in range(first, first + args.bench):  # all take the same step, in random order
        # Random, so that slow moments of the machine meet all of them equally often.
        for i in torch.randperm(len(calls), generator=draw).tolist():
            name, start = list(calls)[i], time.perf_counter()
            calls[name](step)
            if args.device != "cpu":
                getattr(torch, args.device).synchronize()
            times[name].append(time.perf_counter() - start)
    # torch counts eager operations only, and of attention only the plain form.
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), \
            FlopCounterMode(display=False) as counter:
        given(first + args.bench)
    if rank:
        return
    peak = 2 * side**3 / min(times.pop("product"))
    rate = counter.get_total_flops() / statistics.median(times["as given"])
    print(f"\n{'':14}{'ms':>9}{'pictures/s':>12}   time / plain [quartiles of {args.bench} rounds]")
    for name, taken in times.items():
        ratio = torch.tensor([x / y for x, y in zip(taken, times["plain"])])
        low, mid, high = ratio.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        seconds = statistics.median(taken)
        print(f"{name:14}{1e3 * seconds:9.1f}{len(img) * ranks / seconds:12.1f}   {mid:.3f} "
              f"[{low:.3f}, {high:.3f}]")
    print(f"as given: {rate / 1e12:.3g} TFLOP/s, {rate / peak:.0%} of the {peak / 1e12:.3g} of a "
          f"product of two {side} x {side} matrices, {args.precision}; memory {memory:.0f} MiB")


# --------------------------------------------------------------------------------------------------
# The run.


def check(args, folder: Folder | None, shape: Network, ranks: int) -> None:
    """Refuse what cannot run, before anything is written. shape: the network, used for its shapes
    alone."""
    cfg = shape.backbone.config
    idle = {} if cfg.spec else {"cls_lr": (1.0,)}  # {flag without effect: values it may have}
    if not args.spec:  # weights of --init that are specialised stay as they are
        idle |= {"spec_init": ("equal",), "spec_rank": (0,), "registers_path": ("patch",)}
    if not {"qkv", "proj", "mlp"} & set(args.spec):
        idle |= {"spec_blocks": (None, 0), "spec_where": ("first",)}
    wrong = [f"--{name.replace('_', '-')}" for name, usual in idle.items()
             if getattr(args, name) not in usual]
    need(not wrong, f"{' and '.join(wrong)}: of no use where --spec is "
         f"{','.join(args.spec) or 'left out'}; see what can be specialised in --help")
    sides = {"image": args.image_size} | ({"local": args.local_size} if args.local_crops else {})
    odd = [f"--{name}-size {side} (try {whole_patches(side, cfg.patch)})"
           for name, side in sides.items() if side % cfg.patch]
    need(not odd, f"{' and '.join(odd)}: no multiple of the patch, {cfg.patch} px")
    need(args.source_size >= args.image_size, f"--source-size {args.source_size} is less than "
         f"--image-size {args.image_size}: even a view of a whole picture would be blown up; "
         "raise it to that or more")
    need(not args.koleo or args.batch_size > 1, "KoLeo needs a neighbour for every picture: give "
         "--batch-size 2 or more, or --koleo 0")
    if args.dry_run:
        return
    memory = memory_gib(args, shape)
    largest = max(memory, key=memory.get)
    advice = {"weights and optimiser": "take a smaller --size", "logits": "lower --prototypes",
              "activations": "lower --batch-size, or give --checkpointing",
              "pictures": "lower --pictures, --source-size or --batch-size"}[largest]
    need_memory(sum(memory.values()), args.device, "this", f"{largest} are {memory[largest]:,.0f} "
                f"of it: {advice}; --dry-run shows all")
    if args.bench:
        return
    need_writable(args.out)
    n, batch = args.pictures, args.batch_size * ranks
    need(folder or n >= batch, f"a global batch of {batch} pictures is larger than the set: --data "
         f"scenes has {n}; lower --batch-size or raise --pictures")
    need(not args.init or clsspec.weights_file(args.init).resolve()
         != (args.out / "last.pt").resolve(), f"--init {args.init} is what --out {args.out} would "
         "replace; give another --out")


def check_finite(rows: Tensor, names: list[str], first: int, kept: str) -> None:
    """rows: (steps, values) from step `first` on. ValueError: the first bad step and its terms."""
    bad = (~rows.isfinite().all(1)).nonzero()[:, 0].tolist()
    if bad:
        terms = ", ".join(f"{k} {v:.4g}" for k, v in zip(names, rows[bad[0]].tolist()))
        raise ValueError(f"not finite at step {first + bad[0]}: {terms}; {kept}; start anew with a "
                         "lower --lr or --clip, which a resumed run cannot change")


# The online probe: eval_dense's protocol for Scenes, shorter, with k-NN for pictures as a whole.
ONLINE = replace(eval_dense.PROTOCOLS["scenes"], tasks=("seg", "depth", "knn"), iterations=200,
                 train=500, test=250, split="val")


def probe(vit: clsspec.ViT) -> dict[str, float]:
    """Metrics of a network's features on Scenes; a compiled network is used uncompiled."""
    with torch.compiler.set_stance("force_eager"):
        result = eval_dense.evaluate(vit, p=ONLINE)[0]
    return {k: result[k] for k in eval_dense.METRICS if k in result}


STAGES = {"untrained": "before training", "teacher": "after training"}


def final_table(args) -> None:
    """Linear probes on Scenes of the network of step 0 and of the teacher in last.pt, and pictures
    of what they read."""
    protocol = replace(eval_dense.PROTOCOLS["scenes"], tasks=eval_dense.DENSE)
    other = "" if args.data == "scenes" else f", another world than {args.data}"
    print(f"\nWhat a linear layer reads from frozen patches (Scenes{other}):\n"
          f"{'':18}classes, mIoU % (higher is better)   depth, RMSE m (lower is better)")
    # The untrained network is there because a linear layer reads two thirds of nano's mIoU from
    # features that have learnt nothing; only the rest is what training adds.
    read = {}
    for name, title in STAGES.items():
        model = clsspec.load(args.out / "last.pt", name).to(args.device)
        result, _, shots = eval_dense.evaluate(model, p=protocol, keep=6)
        eval_dense.record(args.out / "eval.json", f"{name} scenes tasks=seg,depth", result)
        print(f"{title:18}{result['miou']:22.2f}{result['rmse']:35.3f}", flush=True)
        read[title] = result, shots
    (start, _), (end, shots) = read.values()
    # A point of mIoU may be chance.
    better = end["miou"] > start["miou"] + 1 and end["rmse"] < start["rmse"]
    look = "`bce`" if args.supervised else "`dino`, `entropy` and `cls_std`"
    print("It has learnt: both are better than before." if better else
          f"It has learnt little: train longer, or look at {look} in log.jsonl.")
    rows = {"picture": shots["picture"]}
    for task in eval_dense.DENSE:
        rows[f"true {task}"] = shots[f"true {task}"]
        for title, (_, theirs) in read.items():
            rows[f"{title}: {task}"] = theirs[f"predicted {task}"]
    eval_dense.draw(args.out / "pictures.png", rows, Scenes.classes)
    print(f"What it reads, as pictures: {args.out / 'pictures.png'}")


def readable(file) -> bool:
    """Whether training can use a file; others it leaves out."""
    with suppress(ValueError):
        return bool(eval_dense.open_picture(file, side=1))  # a JPEG at an eighth, which is faster
    return False


def own_table(args, folder: Folder) -> None:
    """k-NN by [CLS] on pictures of --data, whose folders are classes, as at step 0 and now."""
    # Up to 10,000, evenly over the list, which may be sorted by class.
    some = range(0, len(folder), max(len(folder) // 5000, 1))
    rows = [{"image": folder.files[i], "label": folder.labels[i]} for i in some
            if readable(folder.files[i])]
    print(f"\nk-NN by [CLS]: every tenth of {len(rows)} pictures of {args.data}, its class named "
          f"by the others', of {args.classes}\n(the network has seen all of them, without labels):"
          f"\n{'':18}right, % (higher is better)")
    for name, title in STAGES.items():
        model = clsspec.load(args.out / "last.pt", name).to(args.device)
        every = eval_dense.Pictures(rows, size=args.image_size, middle=True,
                                    device=torch.device(args.device))
        p = eval_dense.PROTOCOLS["imagefolder"]
        found = eval_dense.features(model, every, p, args.workers)
        x, label = found["whole"][:, : model.config.width], found["label"]
        asked = torch.arange(len(rows), device=x.device) % 10 == 0
        guess = eval_dense.knn(x[~asked], label[~asked], x[asked], args.classes)
        right = 100 * (guess == label[asked]).float().mean().item()
        key = f"{name} {short(args.data)} trained on"  # eval_dense.py has pictures not trained on
        eval_dense.record(args.out / "eval.json", key, {"knn": right})
        print(f"{title:18}{right:22.2f}", flush=True)


def run(args, rank: int, ranks: int) -> None:
    """Set up, train and judge. Only rank 0 prints and writes files."""
    start, first_rank, cuda = time.time(), rank == 0, args.device == "cuda"
    say = print if first_rank else lambda *_, **__: None
    eval_dense.check_device(args)
    scenes = args.data == "scenes"
    eval_dense.check_download(args)
    need(ranks == 1 or not args.download, "--download: each process would fetch the set; fetch it "
         "with one, as by eval_dense.py, and leave it out here")
    folder = None
    if not (scenes or args.bench):
        # A dry run fetches nothing; its message says how large the set is.
        fetch = args.download and not args.dry_run
        folder = Folder(args.data, args.source_size, args.root, fetch)
    # Three values that are no flags are kept with them, so that they are in checkpoints and
    # `resume` compares them: the pictures found, the number of classes, the precision.
    args.found = folder.found() if folder else None
    if folder:
        args.classes = len(folder.classes)
    else:  # --bench's noise has as many as ImageNet
        args.classes = len(Scenes.labels) if scenes else 1000
    sorted_out = args.classes > 1 and not (folder and "" in folder.classes)
    need(sorted_out or not args.supervised, f"--supervised: --data {args.data} must be a folder "
         "that has a folder of pictures for each class, two or more, and no pictures beside them")
    # Only shapes, without memory (but for --init): whether there is enough is not known yet.
    with torch.device("cpu" if args.init else "meta"):
        shape = Network(args)
    args.precision = shape.precision
    machine = torch.cuda.get_device_name() if cuda else args.device
    machine = "no GPU in use" if machine == "cpu" else machine
    what = f"{args.init}: {shape.backbone.origin};" if args.init else f"scale {args.scale}"
    say(f"{what} ({machine}, {args.precision}), recipe {args.recipe}, data {args.data}, spec "
        f"{','.join(shape.backbone.config.spec) or 'none'}", flush=True)
    check(args, folder, shape, ranks)
    if folder and len(folder) < args.batch_size * ranks:
        say(f"note: {len(folder)} picture(s) are less than a batch of {args.batch_size * ranks}; "
            "some are in it several times")
    if args.dry_run:
        return describe(args, shape, ranks) if first_rank else None
    if args.bench:
        return bench(args, rank, ranks)
    del shape

    torch.manual_seed(args.seed)
    with closing(RunFolder(args)) if first_rank else nullcontext() as out:
        if ranks > 1:
            dist.barrier()  # the others begin when the first one has the folder
        student = Network(args).to(args.device)
        teacher, optimizer = make_teacher(student), make_optimizer(args, student)
        first, skipped = 0, 0
        if args.resume:
            first, before = resume(args, student, teacher, optimizer, ranks)
            if before != args.steps:
                say(f"--steps was {before} and is {args.steps} now: learning rate, decay and "
                    "teacher go on by the schedules of the new length")
        if first_rank:
            skipped = out.begin(args, student.backbone.config, first, ranks)
        uniform = f"; `dino` begins near ln {args.prototypes} = {math.log(args.prototypes):.2f}, " \
                  "and falls as the network learns"
        say(f"run folder {args.out}{'' if args.supervised else uniform}", flush=True)
        # Several ranks stop together, at a logged step; until then a signal waits.
        with signals.held() if ranks > 1 else nullcontext():
            loop(args, folder, out, student, teacher, optimizer, first, skipped, rank, ranks)
        if first_rank and args.probe:
            # A tenth of fewer than 20 pictures says nothing.
            if folder and sorted_out and not args.supervised and len(folder) >= 20:
                own_table(args, folder)
            else:
                final_table(args)
    judged = f"{args.init} {args.out} --data pairs --root LABELLED (before and after" if args.init \
        else f"{args.out} (judge more"
    say(f"{(time.time() - start) / 60:.1f} minutes; checkpoint {args.out / 'last.pt'}\n"
        f"next: python eval_dense.py {judged}), python analyze.py {args.out} (look inside)"
        + ("; the control: without --spec, another --out" if args.spec else ""))


def loop(args, folder, out: RunFolder | None, student, teacher, optimizer, first: int,
         skipped: int, rank: int, ranks: int) -> None:
    """Steps from `first` on, with log lines, probes and checkpoints where they are due. out: None
    on all ranks but the first. skipped: how many files could not be read so far."""
    batch, learner = args.batch_size * ranks, wrap(args, student, teacher, ranks)
    cuda = args.device == "cuda"
    n = epoch_size(args, folder, batch)
    done, window, tick = first, [], 0.0
    # warned: the message on other programs has been printed, or is not needed.
    cpu, threads, warned = 0.0, torch.get_num_threads(), args.device != "cpu" or folder is not None
    progress = tqdm(total=args.steps, initial=first, unit="step", disable=out is None,
                    dynamic_ncols=True, mininterval=eval_dense.REDRAW)

    def log(found: dict) -> None:
        """Write a line of means over all ranks and all steps since the last line."""
        nonlocal window, tick, cpu, warned
        rows = all_sum(torch.stack(window)).cpu() / ranks  # waits for the GPU, as no step does
        kept = out.kept() if out else "as on all ranks"
        check_finite(rows, list(values), done - len(rows) + 1, kept)
        line = {"step": done, "epoch": (done - 1) // (n // batch)}
        line |= dict(zip(values, rows.mean(0).tolist())) | now
        line |= {"img_per_s": len(rows) * batch / (time.time() - tick), "skipped": skipped,
                 "peak_mb": peak_mb(cuda)} | found
        shown = "bce" if args.supervised else "dino"
        progress.set_postfix_str(f"{shown} {line[shown]:.3f}, {line['img_per_s']:.0f} img/s")
        if out:
            out.log(line)
        hundredth = done - len(rows) < first + 100 <= done  # it is among this line's steps
        if out and hundredth and not args.supervised and args.steps - first >= 200:
            left = (args.steps - done) * batch / line["img_per_s"] / 60
            knows = f"{line['dino']:.2f}; knowing nothing it is {math.log(args.prototypes):.2f}"
            progress.write(f"step {done}: `dino`, how badly one crop's [CLS] foretells another's, "
                           f"is {knows}. About {left:.0f} minutes to go")
        had = (time.process_time() - cpu) / (time.time() - tick)  # CPUs, on average
        if threads > 1 and had < 0.6 * threads and len(window) > 1 and not warned:
            warned = True  # two runs on two cores: 3 s a step with two threads each, 0.35 with one
            progress.write(f"other programs are at work: {threads} threads get {had:.1f} CPUs and "
                           "wait for each other; stop, put OMP_NUM_THREADS=1 before the command, "
                           "and go on with --resume")
        window, tick, cpu = [], time.time(), time.process_time()

    def save() -> None:
        if out:
            out.save({
                "model": asdict(student.backbone.config), "args": as_json(args), "step": done,
                "global_batch": batch, "student": student.state_dict(),
                "teacher": teacher.state_dict(), "optimizer": optimizer.state_dict()})

    # A signal interrupts whatever takes long, but not a step or a save, unless it is the second.
    pictures = batches(args, folder, first, rank, ranks)
    try:
        while done < args.steps:
            img, labels, bad = next(pictures)
            if not tick:  # time counts from the first pictures on
                tick, cpu = time.time(), time.process_time()
            with signals.held():
                now, values = train_step(args, learner, teacher, optimizer, img, labels, done, rank,
                                         ranks)
                window.append(torch.stack(list(values.values())))
                skipped, done = skipped + len(bad), done + 1
            for why in bad:
                progress.write(f"left out: {why}")
            progress.update()
            logging = done % args.log_every == 0
            probing = args.probe_every and done % args.probe_every == 0
            saving = done == args.steps or done % args.save_every == 0
            if cuda and probing:
                torch.cuda.synchronize()  # steps still under way count as training
            began = time.time()
            found = probe(teacher.backbone) if out and probing else {}
            tick += time.time() - began  # neither probes nor saves count in img_per_s
            with signals.held():
                # Logging comes first: it finds what is not finite before that could be saved.
                if logging or probing or saving:
                    log(found)
                if saving:
                    save()
                    tick = time.time()
            if ranks > 1 and logging:  # ranks agree on whether to stop
                came = torch.tensor(float(signals.came), device=args.device)
                if all_sum(came).item():
                    raise Stopped(signals.came or SIGTERM, False)
    except Stopped as stopped:
        stopped.text = f"; {out.kept() if out else ''}"
        if done > first and not stopped.at_once:
            if window:
                log({})
            save()
            if ranks > 1:
                dist.barrier()  # if one exits, torchrun ends the one that saves
            stopped.text = f"; step {done} is saved, go on with --resume"
            if not out:
                sys.exit(128 + stopped.number)  # the first rank says it
        raise
    progress.close()


def leave_group(device: str) -> None:
    """End the work of several ranks together, after success or failure."""
    err = sys.exc_info()[1]
    if device == "cuda" and err:  # NCCL would wait for ranks that wait for this one
        code = err.code if isinstance(err, SystemExit) else 1
        code = 128 + err.number if isinstance(err, Stopped) else code
        atexit.register(lambda: sys.stdout.flush() or os._exit(code))  # once all is printed
        return
    time.sleep(0.1)  # gloo's threads let go of their last tensors, or torch 2.6 hangs
    dist.destroy_process_group()


def main(argv=None) -> None:
    args = parse(sys.argv[1:] if argv is None else argv)
    with one_line():
        rank, ranks = (int(os.environ.get(name) or default)
                       for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        need(0 <= rank < ranks, f"RANK {rank} of WORLD_SIZE {ranks}: left over from torchrun? "
             "unset both")
        need(ranks == 1 or args.device != "mps", "--device mps: several processes cannot work "
             "together there; run one, or give --device cpu")
        try:
            if ranks > 1 and not args.dry_run:
                if args.device == "cuda":
                    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
                dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
            run(args, rank, ranks)
        finally:
            if dist.is_initialized():
                leave_group(args.device)


if __name__ == "__main__":
    main()
