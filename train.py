"""Train a plain or a specialised ViT by self-distillation, on one CPU, one GPU or many.

    python train.py --spec norms,qkv --spec-blocks 8           # a laptop: minutes; a GPU: ViT-S
    python train.py --out runs/plain                           # the control, with the same seed
    python train.py --recipe dino --data path/to/pictures      # DINO v1 on any folder of pictures
    python train.py --recipe deit3 --data path/to/train        # supervised, a folder for each class
    python train.py --scale large --spec norms,qkv --dry-run   # what the paper's run would be
    python train.py --spec norms,qkv --bench 20                # what a step takes on this machine
    torchrun --nproc-per-node 8 train.py --scale large --spec norms,qkv --data list.txt --compile

Three recipes, all sets of defaults of one loop. `dinov2` (arXiv 2304.07193): DINO loss on [CLS],
iBOT loss on masked patches, KoLeo, Sinkhorn-Knopp. `dino` (arXiv 2104.14294): the [CLS] loss with a
moving centre (at nano and small Sinkhorn-Knopp). `deit3` (arXiv 2204.07118): labels; the teacher is
then only an average of weights.

The global batch is a function of (seed, step) alone and each rank takes its slice of it: workers
change nothing, nor do ranks, but for what each draws by itself (skipped branches, mixup); a resumed
run equals an unbroken one. In shapes, V views of B pictures
have N patches each, of which M in all are masked; D is the width, K the number of prototypes.
"""

import argparse
import copy
import json
import math
import os
import signal
import statistics
import sys
import time
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

# Threads that wait for each other should not spin for long: beside a busy program on two cores,
# Scenes are made at 5 pictures/s with GNU OpenMP's default, at 498 with this; alone at 628, 725.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps  # comes with torchvision
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import clsspec
import eval_dense
from eval_dense import Scenes, bar, normalise

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
        supervised=True, ibot=0.0, koleo=0.0, lr=5e-4, lr_batch=512, lr_scaling="linear",
        wd=0.05, wd_end=0.05, warmup=5 / 800, clip=1.0, ema=0.99996, ema_end=0.99996,
        global_scale=(0.08, 1.0), local_crops=0, drop_path=0.45, layerscale=1e-4, steps=500_000),
}
SCALES = {
    "large": dict(size="large", source_size=256, image_size=224, local_size=98, local_crops=8,
                  batch_size=32, probe_every=12_500),
    "small": dict(size="small", source_size=160, image_size=128, local_size=64, local_crops=4,
                  batch_size=256, pictures=50_000, steps=2500, global_scale=(0.4, 1.0), colour=0.2,
                  prototypes=512, head_layers=1, bottleneck=256, patch_bottleneck=256,
                  head_norm="batch", centring="sinkhorn", lr=1e-3, lr_batch=256, warmup=0.1,
                  patch_embed_lr=1.0, drop_path=0.0, layerscale=0.1, ema=0.98, ema_end=0.995,
                  temp_end=0.04),
    # A CPU affords some 50,000 looks at pictures; the paper's run has two billion. So nano takes
    # small pictures, few tokens, and objectives that fall at once: mild colours (with DINO's, the
    # [CLS] loss stays at ln K for a thousand steps), no more prototypes than a batch can fill, one
    # layer with batch normalisation as a head (a deeper one solves the task alone, the backbone
    # stays as it was), a high learning rate, a teacher that follows closely; for `dino`, too, no
    # moving centre, which comes too late: 8 of 128 prototypes were in use. `small`: in between.
    "nano": dict(size="nano", source_size=64, image_size=48, local_size=24, local_crops=2,
                 batch_size=32, pictures=4096, steps=1500, global_scale=(0.4, 1.0), colour=0.2,
                 prototypes=128, head_layers=1, bottleneck=64, patch_bottleneck=64,
                 head_norm="batch", centring="sinkhorn", lr=4e-3, lr_batch=32, warmup=0.1,
                 patch_embed_lr=1.0, drop_path=0.0, layerscale=0.0, ema=0.97, ema_end=0.99,
                 temp_end=0.04),
}
# Labels at nano: without LayerScale, with mixing, or with smaller crops, which often miss what the
# label names, 26 to 30 % of pictures were named right after 700 to 1500 steps, with these 48 %.
LABELS_AT_NANO = dict(lr=1e-3, layerscale=0.1, mixup=0.0, cutmix=0.0, global_scale=(0.6, 1.0),
                      steps=3000)


SHAPE = "size", "patch", "layerscale", "mlp_ratio", "registers", "attn", "attn_bias", "class_attn"
SPEC = "spec", "spec_blocks", "spec_where", "spec_rank", "registers_path"


def parse(argv) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    cuda = torch.cuda.is_available()

    def group(title, *flags):
        g = p.add_argument_group(title)
        for name, default, text, *kind in flags:
            kind = kind[0] if kind else type(default)
            if kind is bool:
                more = dict(action=argparse.BooleanOptionalAction)
            elif isinstance(kind, list):
                more = dict(choices=kind)
            else:
                more = dict(type=kind) if kind is not tuple else dict(type=float, nargs=2)
            text += " (default: %(default)s)"
            g.add_argument(f"--{name}", default=default, help=text, **more)

    group("what to run",
          ("recipe", "dinov2", "losses and their defaults", list(RECIPES)),
          ("scale", None, "size of everything; small on a GPU, nano on a CPU", list(SCALES)),
          ("init", None, "start from these weights: a run's last.pt, or public ones", str),
          ("data", "scenes", "'scenes', a folder of pictures, or a text file with a path a line"),
          ("out", None, "run folder; default: runs/ and recipe, scale, data, spec, seed", str),
          ("seed", 0, "of weights, order of pictures, views and masks"),
          ("resume", False, "go on from the checkpoint in --out"),
          ("overwrite", False, "start anew in an --out that holds a run"),
          ("dry-run", False, "print what the run would do, and stop"),
          ("bench", None, "time this many steps, against a plain model's in turns, and stop", int))
    group("model",
          ("size", "small", "width, depth and heads", list(clsspec.SIZES)),
          ("patch", None, "side of a patch, pixels; default: the size's", int),
          ("mlp-ratio", 4.0, "hidden width of the MLP / width"),
          ("registers", 0, "number of register tokens"),
          ("attn", "softmax", "normalisation of attention", ["softmax", "entmax15"]),
          ("attn-bias", False, "a learnable key and value for every head"),
          ("class-attn", 0, "CaiT: the last blocks are class-attention, this many"),
          ("spec", "", f"comma list of specialised components: {','.join(clsspec.COMPONENTS)}"),
          ("spec-blocks", None, "how many blocks get qkv, proj, mlp; default: depth // 3", int),
          ("spec-where", "first", "the first or the last blocks", ["first", "last"]),
          ("spec-rank", 0, "rank of [CLS]'s update of qkv; 0: a full copy"),
          ("registers-path", "patch", "whose weights registers pass", ["patch", "cls"]),
          ("drop-path", 0.0, "stochastic depth: chance to skip a branch"),
          ("layerscale", 0.0, "start of LayerScale; 0: none"))
    group("pictures and views",
          ("pictures", 4096, "how many Scenes to train on"),
          ("source-size", 256, "side of the pictures that views are cut from, pixels"),
          ("image-size", 224, "side of a global view, pixels"),
          ("local-size", 96, "side of a local view, pixels"),
          ("local-crops", 8, "local views a picture"),
          ("global-scale", (0.4, 1.0), "share of the picture in a global view: from, to"),
          ("local-scale", (0.05, 0.4), "share of the picture in a local view: from, to"),
          ("colour", 1.0, "strength of colour jitter, grey and solarise; 1: DINO's"),
          ("workers", 8 if cuda else 2, "processes that decode files"))
    group("labels",
          ("supervised", False, "learn labels by binary cross-entropy, and nothing else"),
          ("mixup", 0.8, "parameter of mixup's beta distribution; 0: none"),
          ("cutmix", 1.0, "of CutMix's; with both, each batch has one or the other"))
    group("heads and losses",
          ("ibot", 1.0, "weight of the masked-patch loss"),
          ("koleo", 0.1, "weight of KoLeo"),
          ("centring", "sinkhorn", "of the teacher's logits", ["sinkhorn", "ema"]),
          ("prototypes", 65536, "K, outputs of each head"),
          ("head-layers", 3, "linear layers before the prototypes"),
          ("hidden", 2048, "width between them"),
          ("bottleneck", 256, "width before the prototypes, [CLS] head"),
          ("patch-bottleneck", 256, "width before the prototypes, patch head"),
          ("head-norm", "none", "normalisation in the heads", ["none", "batch"]),
          ("separate-head", True, "patches have a head of their own"),
          ("mask-share", 0.5, "share of global views that get a mask"),
          ("mask-ratio", (0.1, 0.5), "share of patches hidden in those: from, to"),
          ("student-temp", 0.1, "temperature of the student's softmax"),
          ("temp-start", 0.04, "temperature of the teacher's softmax at first"),
          ("temp-end", 0.07, "... and after its warm-up"),
          ("temp-warmup", 0.06, "share of the steps until then"))
    group("optimisation",
          ("steps", 1000, "optimiser steps"),
          ("batch-size", 64, "pictures a step, of each process"),
          ("lr", 5e-4, "peak learning rate at a global batch of --lr-batch"),
          ("lr-batch", 256, "global batch that --lr is meant for"),
          ("lr-scaling", "sqrt", "how it grows with the batch", ["sqrt", "linear"]),
          ("lr-end", 1e-6, "learning rate at the end"),
          ("patch-embed-lr", 1.0, "factor on the patch embedding's learning rate"),
          ("warmup", 0.1, "share of the steps until the peak"),
          ("wd", 0.04, "weight decay at first; none on biases, norms, LayerScale"),
          ("wd-end", 0.4, "... and at the end"),
          ("clip", 3.0, "largest norm of the gradient; 0: no limit"),
          ("ema", 0.996, "the teacher's momentum at first"),
          ("ema-end", 1.0, "... and at the end"),
          ("freeze-last", 0.01, "share of the steps before the prototypes learn"))
    group("machine and log",
          ("device", "cuda" if cuda else "cpu", "CUDA_VISIBLE_DEVICES says which", ["cpu", "cuda"]),
          ("precision", None, "of matrix products; bf16 on a GPU", ["bf16", "fp32"]),
          ("compile", False, "torch.compile the networks"),
          ("checkpointing", False, "recompute activations to save memory"),
          ("log-every", 10, "steps between log lines"),
          ("save-every", 200, "steps between checkpoints"),
          ("probe-every", 500, "steps between short probes of the teacher on Scenes; 0: none"),
          ("probe", True, "judge the network on Scenes at the end"))

    chosen, _ = p.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    cuda = chosen.device == "cuda"
    scale = chosen.scale or ("small" if cuda else "nano")
    p.set_defaults(scale=scale, precision="bf16" if cuda else "fp32")
    p.set_defaults(**RECIPES[chosen.recipe] | SCALES[scale])
    if (chosen.recipe, scale) == ("deit3", "nano"):
        p.set_defaults(**LABELS_AT_NANO)
    args = p.parse_args(argv)
    for name in "steps", "batch_size", "pictures", "prototypes", "log_every", "save_every", "bench":
        if getattr(args, name) is not None and getattr(args, name) < 1:
            flag = name.replace("_", "-")
            p.error(f"argument --{flag}: must be 1 or more, not {getattr(args, name)}")
    if args.bench and args.resume:
        p.error("argument --bench: times steps of noise and keeps nothing; leave out --resume")
    for name in SHAPE if args.init else ():
        if getattr(args, name) != p.get_default(name):
            p.error(f"argument --{name.replace('_', '-')}: --init has a shape; leave this out")
    if args.supervised:  # one view a picture, and one loss
        args.local_crops, args.ibot, args.koleo = 0, 0.0, 0.0
    args.spec = tuple(filter(None, args.spec.split(",")))
    blocks = "" if args.spec_blocks is None else f"{args.spec_blocks}blocks"
    given = [Path(x).stem for x in (args.init, args.data) if x not in (None, "scenes")]
    name = [args.recipe, args.scale, *given, *(args.spec or ["plain"]), blocks, f"s{args.seed}"]
    args.out = Path(args.out or "runs/" + "-".join(filter(None, name)))
    return args


# --------------------------------------------------------------------------------------------------
# Pictures: batches of uint8 on the device, in an order that depends on (seed, step) alone.


@lru_cache(maxsize=1)
def permutation(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def batch_index(n: int, batch: int, seed: int, step: int) -> Tensor:
    """Which of n pictures make the global batch of a step: (batch,). Every epoch anew permuted."""
    epoch, within = divmod(step, n // batch)
    return permutation(n, seed, epoch)[within * batch : (within + 1) * batch]


class Folder(torch.utils.data.Dataset):
    """Pictures below a folder, or of a text file with a path a line: uint8 (3, side, side), RGB.

    The shorter side is resized and the middle cut out. In place of a file that cannot be read comes
    the next one that can; its name is handed on, for the log.
    """

    def __init__(self, data: str, side: int):
        if os.path.isdir(data):
            kinds, walk = (".jpg", ".jpeg", ".png", ".webp"), os.walk(data, followlinks=True)
            self.files = sorted(os.path.join(at, f) for at, _, files in walk for f in files
                                if f.lower().endswith(kinds))
        elif os.path.isfile(data):
            self.files = [line for line in Path(data).read_text().splitlines() if line.strip()]
        else:
            raise ValueError(f"--data {data}: neither 'scenes', nor a folder, nor a file of paths")
        if not self.files:
            raise ValueError(f"--data {data}: no picture (jpg, png, webp) in it or below it")
        # A class is a folder in the folder; "" are pictures in none.
        inside = [file[len(data):].strip(os.sep).split(os.sep) for file in self.files]
        names = [p[0] if len(p) > 1 and os.path.isdir(data) else "" for p in inside]
        self.classes = {name: i for i, name in enumerate(sorted(set(names)))}
        self.labels = [self.classes[name] for name in names]
        self.data, self.side = data, side

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, int, list[str]]:
        bad = []
        for k in range(i, i + len(self.files)):
            file, label = (some[k % len(self.files)] for some in (self.files, self.labels))
            try:
                with Image.open(file) as img:
                    img.draft("RGB", (self.side, self.side))  # JPEG: decode no finer than needed
                    img = TF.resize(ImageOps.exif_transpose(img).convert("RGB"), self.side)
                return TF.pil_to_tensor(TF.center_crop(img, self.side)), label, bad
            except Exception as err:  # whatever a decoder makes of a broken file
                bad.append(f"{file} ({str(err).splitlines()[0]})")
        raise ValueError(f"--data {self.data}: none of its {len(bad)} files is a readable picture; "
                         f"the first: {bad[0]}")


def ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; the main one decides when to leave."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def collate(items: list) -> tuple[Tensor, Tensor, list[str]]:
    """What Folder gives for each picture -> uint8 (B, 3, S, S), labels (B,), unreadable files."""
    img, labels, bad = zip(*items)
    return torch.stack(img), torch.tensor(labels), sum(bad, [])


def batches(args, folder: Folder | None, first: int, rank: int, ranks: int):
    """Yield uint8 (B, 3, S, S) and labels (B,), on the device, and names of unreadable files, from
    step `first` on."""
    n, batch = len(folder) if folder else args.pictures, args.batch_size * ranks
    mine = slice(rank * args.batch_size, (rank + 1) * args.batch_size)
    order = (batch_index(n, batch, args.seed, step)[mine] for step in range(first, args.steps))
    if folder:
        loader = torch.utils.data.DataLoader(
            folder, batch_sampler=(i.tolist() for i in order), num_workers=args.workers,
            collate_fn=collate, worker_init_fn=ignore_interrupt, pin_memory=args.device != "cpu")
        for *made, bad in loader:
            yield *(x.to(args.device, non_blocking=True) for x in made), bad
    else:
        world = Scenes("train", args.source_size)
        parts = torch.arange(n, device=args.device).split(256)
        parts = bar(parts, "rendering Scenes", len(parts)) if rank == 0 else parts
        parts = [[scenes["image"], scenes["label"]] for scenes in map(world, parts)]
        scenes, labels = (torch.cat(some) for some in zip(*parts))
        for i in order:
            i = i.to(args.device, non_blocking=True)
            yield scenes[i], labels[i], []


# --------------------------------------------------------------------------------------------------
# Views. A view is three small matrices a picture: rows, columns and colours.


def resample(low: Tensor, high: Tensor, n_in: int, n_out: int) -> Tensor:
    """Weights (B, n_out, n_in) that resize pixels low..high (B,) of a line to n_out.

    Bilinear with antialias: a triangle as wide as an output pixel, but no less than an input pixel.
    """
    at = torch.arange(n_out, device=low.device) + 0.5
    scale = ((high - low) / n_out)[:, None, None]
    centre = low[:, None, None] + at[None, :, None] * scale
    pixel = torch.arange(n_in, device=low.device) + 0.5
    weight = (1 - (pixel - centre).abs() / scale.clamp(min=1)).clamp(min=0)
    return weight / weight.sum(-1, keepdim=True)


LUMA, CROSS = (0.299, 0.587, 0.114), ((0, -1, 1), (1, 0, -1), (-1, 1, 0))


def view(img: Tensor, u: Tensor, size: int, area, blur: float, solarise: float, reach: float,
         strength: float = 1.0, three: bool = False) -> Tensor:
    """One random view of each picture: crop, flip, colours, blur, solarise, as DINO and DINOv2 do;
    or `three`, DeiT-III's 3-Augment: one of grey, solarise and blur, and a milder jitter.

    img: (B, 3, H, W) in [0, 1]; u: (B, 16) uniform numbers, the only randomness; area: the crop's
    share of the picture, from .. to; blur, solarise: their chances; reach: largest sigma in pixels;
    strength: of the colour changes, 1 is DINO's. Returns (B, 3, size, size), normalised.
    """
    (h, w), u = img.shape[-2:], u.unbind(1)
    share = area[0] + (area[1] - area[0]) * u[0]
    ratio = torch.exp(math.log(4 / 3) * (2 * u[1] - 1))
    ch, cw = (h * w * share / ratio).sqrt(), (h * w * share * ratio).sqrt()
    ch, cw = ch.clamp(max=h), cw.clamp(max=w)
    top, left = (h - ch) * u[2], (w - cw) * u[3]
    if three:
        grey, solarised, blurred = ((3 * u[12]).floor() == k for k in range(3))
        jittered, most = u[7] < 2, (0.3, 0.3, 0.3, 0.0)
    else:
        grey, solarised, blurred = u[12] < 0.2 * strength, u[13] < solarise * strength, u[5] < blur
        jittered, most = u[7] < 0.8, (0.4, 0.4, 0.2, 0.1)
    sigma = torch.where(blurred, reach * (0.05 + 0.95 * u[6]), 1e-2)
    line = torch.arange(size, device=img.device)
    gauss = (line[:, None] - line) ** 2 / (-2 * sigma[:, None, None] ** 2)  # (B, size, size)
    gauss = gauss.clamp(min=-30).exp()  # smaller ones count for nothing, and denormal ones are slow
    gauss = gauss / gauss.sum(-1, keepdim=True)
    rows = gauss @ resample(top, top + ch, h, size)
    columns = gauss @ resample(left, left + cw, w, size)
    columns = torch.where((u[4] < 0.5)[:, None, None], columns.flip(1), columns)
    x = rearrange(img.flatten(1, 2) @ columns.mT, "b (c h) w -> b c h w", c=3)  # (B, 3, h, size)
    x = rows[:, None] @ x  # (B, 3, size, size)

    # Brightness, contrast, saturation, hue (a turn around the grey axis), grey: all are linear.
    bright, contrast, saturation, turn = (
        torch.where(jittered, strength * most[k] * (2 * u[8 + k] - 1), 0.0) for k in range(4))
    bright, contrast, turn = 1 + bright, 1 + contrast, 2 * math.pi * turn
    luma, cross = (eval_dense.constant(x, img.device, img.dtype) for x in (LUMA, CROSS))
    eye = torch.eye(3, device=img.device)
    third, cross = torch.full_like(eye, 1 / 3), cross / math.sqrt(3)
    turn = turn[:, None, None]
    hue = third + turn.cos() * (eye - third) + turn.sin() * cross  # Rodrigues' formula
    colour = hue @ torch.lerp(luma.expand(3, 3), eye, (1 + saturation)[:, None, None])
    colour = torch.where(grey[:, None, None], luma, colour)
    offset = (1 - contrast) * bright * (x.mean((2, 3)) @ luma)
    x = (bright * contrast)[:, None, None] * colour @ x.flatten(2) + offset[:, None, None]
    x = x.clamp(0, 1)
    x = torch.where(solarised[:, None, None] & (x > 0.5), 1 - x, x)
    return normalise(x.unflatten(2, (size, size)))


def make_views(args, img: Tensor, step: int, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """uint8 (B, 3, S, S) -> global views (2 B, 3, ..), local ones (L B, 3, ..), view after view."""
    draw, b = torch.Generator().manual_seed(args.seed * 1_000_003 + step), len(img)
    u = torch.rand(b * ranks, 2 + args.local_crops, 16, generator=draw)  # of the global batch
    u = u[rank * b : (rank + 1) * b].to(img.device, non_blocking=True)
    kinds = [(args.image_size, args.global_scale, 1.0, 0.0),  # size, area, chances: blur, solarise
             (args.image_size, args.global_scale, 0.1, 0.2)]
    kinds += [(args.local_size, args.local_scale, 0.5, 0.0)] * args.local_crops
    img, reach = img / 255, 2 * args.image_size / 224  # DINO blurs by 2 px at the most, at 224 px
    views = [view(img, u[:, i], *kind, reach, args.colour) for i, kind in enumerate(kinds)]
    return torch.cat(views[:2]), torch.cat(views[2:]) if args.local_crops else img[:0]


def labelled_views(args, img: Tensor, labels: Tensor, step: int, rank: int, ranks: int):
    """uint8 (B, 3, S, S), labels (B,) -> views by 3-Augment, mixed by mixup or CutMix, (B, 3, ..);
    their targets (B, classes), 1 for whatever is in the mixture; the pictures as they are."""
    draw, b = torch.Generator().manual_seed(args.seed * 1_000_003 + step), len(img)
    u = torch.rand(b * ranks, 16, generator=draw)[rank * b : (rank + 1) * b]
    u = u.to(img.device, non_blocking=True)
    size, n, img = args.image_size, args.classes, img / 255
    views = view(img, u, size, args.global_scale, 0, 0, 2 * size / 224, args.colour, three=True)
    ways = [way(alpha=alpha, num_classes=n) for way, alpha in (
        (v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)) if alpha]
    views, targets = v2.RandomChoice(ways)(views, labels) if ways else (views, F.one_hot(labels, n))
    clean = F.interpolate(img, (size, size), mode="bilinear", antialias=True)
    return views, (targets > 0).float(), normalise(clean)


def block_masks(wanted: Tensor, side: int, u: Tensor) -> Tensor:
    """Hide random rectangles among side x side patches, as BEiT and DINOv2 do.

    wanted: (B,) patches to hide at the most, 0: none; u: (B, tries, 4) uniform numbers. Before they
    are rounded to whole patches, rectangles have an area of 4 or more and an aspect of 0.3 to
    1 / 0.3; one that would hide too many is dropped.
    Returns (B, side^2) bool.
    """
    mask, line = torch.zeros(len(wanted), side, side, dtype=torch.bool), torch.arange(side)
    inside = lambda low, n: (line >= low[:, None]) & (line < (low + n)[:, None])  # (B, side)
    for area, aspect, y, x in u.permute(1, 2, 0):
        left = wanted - mask.sum((1, 2))
        area = 4 + area * (left - 4).clamp(min=0)
        aspect = torch.exp(math.log(0.3) * (2 * aspect - 1))
        h, w = ((area * a).sqrt().round().clamp(1, side) for a in (aspect, 1 / aspect))
        rows = inside((y * (side - h + 1)).floor(), h)
        columns = inside((x * (side - w + 1)).floor(), w)
        box = rows[:, :, None] & columns[:, None]
        mask |= box & ((box & ~mask).sum((1, 2)) <= left)[:, None, None]
    return mask.flatten(1)


def make_masks(args, b: int, patch: int, step: int, rank: int, ranks: int) -> Tensor:
    """Masks for the global views of a rank, (2 b, N). As in DINOv2, a share of the views has one,
    and their ratios are drawn one from each of equal parts of --mask-ratio."""
    draw = torch.Generator().manual_seed(args.seed * 1_000_003 + step + 500_000_000)
    side, views, (low, high) = args.image_size // patch, 2 * b * ranks, args.mask_ratio
    number, masked = torch.arange(views), int(views * args.mask_share)
    ratio = low + (high - low) * (number + torch.rand(views, generator=draw)) / max(masked, 1)
    wanted = torch.where(number < masked, (ratio * side * side).long(), 0)
    wanted = wanted[torch.randperm(views, generator=draw)]
    u = torch.rand(views, 20, 4, generator=draw)
    mine = number.view(2, ranks, b)[:, rank].flatten()  # this rank's pictures, in both views
    return block_masks(wanted[mine], side, u[mine])


def inputs(args, img: Tensor, labels: Tensor, patch: int, step: int, rank: int, ranks: int):
    """What both networks are given in a step: global views, local views and masks; supervised:
    mixed views, their targets, pictures as they are, and labels."""
    if args.supervised:
        return *labelled_views(args, img, labels, step, rank, ranks), labels
    mask = make_masks(args, len(img), patch, step, rank, ranks) if args.ibot else None
    return *make_views(args, img, step, rank, ranks), mask


# --------------------------------------------------------------------------------------------------
# Heads and losses.


class AllSum(torch.autograd.Function):
    """x of every rank -> their sum, on all; so its gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return AllSum.forward(ctx, grad)


def all_sum(x: Tensor) -> Tensor:
    """Sum over all ranks, differentiable; without torchrun: x itself."""
    return AllSum.apply(x) if dist.is_initialized() else x


class BatchNorm(nn.Module):
    """(B, D) -> mean 0, variance 1 over the batch of all ranks; no affine, no running averages."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        sums = all_sum(torch.cat([x.sum(0), x.square().sum(0), x.new_full((1,), len(x))]))
        mean, square = (sums[:-1] / sums[-1]).chunk(2)
        return (x - mean) * ((square - mean**2).clamp(min=0) + 1e-5).rsqrt()


class Head(nn.Module):
    """Tokens (B, D) -> logits in [-1, 1] over K prototypes: MLP, unit vectors, unit prototypes."""

    def __init__(self, width: int, bottleneck: int, prototypes: int, layers: int, hidden: int,
                 norm: str):
        super().__init__()
        norm = [BatchNorm()] if norm == "batch" else []
        widths = [width, *[hidden] * (layers - 1), bottleneck]
        steps = [[nn.Linear(i, o, bias=not norm), *norm, nn.GELU()]  # the norm would undo a bias
                 for i, o in zip(widths, widths[1:])]
        self.mlp = nn.Sequential(*sum(steps, [])[:-1])  # no GELU at the end
        self.last = nn.Parameter(torch.empty(prototypes, bottleneck))
        for name, p in self.named_parameters():
            nn.init.zeros_(p) if name.endswith("bias") else nn.init.trunc_normal_(p, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(self.mlp(x).float(), dim=-1)
        if len(x) < self.last.shape[1]:  # fewer numbers to divide; 5 % of a step of 4 pictures
            return F.linear(x, self.last).float() / self.last.norm(dim=-1)
        return F.linear(x, F.normalize(self.last, dim=-1)).float()


@torch.no_grad()
def sinkhorn(logits: Tensor, temp: float, iterations: int = 3) -> Tensor:
    """Teacher logits (B, K), cosines -> targets (B, K): rows sum to 1, prototypes are used equally.

    Sinkhorn-Knopp over the batches of all ranks, as in SwAV (arXiv 2006.09882) and DINOv2.
    """
    q = torch.exp((logits - 1) / temp)  # at most 1
    for _ in range(iterations):
        q = q / all_sum(q.sum(0)).clamp(min=1e-30)  # every prototype gets the same weight ...
        q = q / q.sum(1, keepdim=True).clamp(min=1e-30)  # ... and every token too
    return q


@torch.no_grad()
def ema_centre(logits: Tensor, temp: float, centre: Tensor) -> Tensor:
    """Teacher logits (B, K) -> softmax about `centre` (K,), which then goes a tenth of the way to
    the mean of the logits of all ranks, if there are any. arXiv 2104.14294, equation 4."""
    out = F.softmax((logits - centre) / temp, dim=-1)
    sums = all_sum(torch.cat([logits.sum(0), logits.new_full((1,), len(logits))]))
    centre.lerp_(sums[:-1] / sums[-1].clamp(min=1), 0.1 * (sums[-1] > 0))
    return out


def dino_loss(student: Tensor, teacher: Tensor, temp: float) -> Tensor:
    """Cross-entropy of every student view with the targets of every other global view, in nats.

    student: (V, B, K) logits, the two global views first; teacher: (2, B, K) targets.
    """
    student = student / temp
    dots = torch.einsum("tbk,vbk->tvb", teacher, student)  # log p = student - logsumexp
    loss = (teacher.sum(-1)[:, None] * student.logsumexp(-1) - dots).mean(-1)  # (2, V)
    other = 1 - torch.eye(*loss.shape, device=loss.device)
    return (other * loss).sum() / other.sum()


def ibot_loss(student: Tensor, teacher: Tensor, weight: Tensor, temp: float, views: int) -> Tensor:
    """Cross-entropy on masked patches, nats: mean over a view's masked patches, then over `views`.

    student: (M, K) logits; teacher: (M, K) targets; weight: (M,), 1 / masked patches of that view.
    A view without a mask counts as 0, as in DINOv2.
    """
    return -((teacher * F.log_softmax(student / temp, dim=-1)).sum(-1) * weight).sum() / views


def koleo(z: Tensor) -> Tensor:
    """Push embeddings off their nearest neighbour: -mean_i log(min_j |z_i - z_j| + 1e-8), in nats.

    z: (B, D), scaled to unit norm here; neighbours are looked for on all ranks. arXiv 1806.03198.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    z = F.normalize(z.float(), dim=-1)
    everyone = all_sum(F.pad(z, (0, 0, rank * len(z), (ranks - 1 - rank) * len(z))))
    with torch.no_grad():
        dots = z @ everyone.T
        dots.diagonal(rank * len(z)).fill_(-2)  # not itself
        near = dots.argmax(1)
    return -torch.log((z - everyone[near]).norm(dim=1) + 1e-8).mean()


class Network(nn.Module):
    """ViT and heads: what the student and the teacher both are. In bf16 where it is asked for; all
    that comes out, and so every loss, is fp32."""

    def __init__(self, args):
        super().__init__()
        spec = {k: getattr(args, k) for k in SPEC}
        if args.init:
            given = clsspec.load(args.init).config
            spec = {} if given.spec and not args.spec else spec
            cfg = clsspec.checked(replace(given, drop_path=args.drop_path, **spec))
        else:
            shape = {k: getattr(args, k) for k in SHAPE if getattr(args, k) is not None}
            cfg = clsspec.config(**shape, **spec, image_size=args.image_size,
                                 drop_path=args.drop_path)
        self.backbone = clsspec.start(cfg, args.init)
        self.backbone.checkpointing = args.checkpointing
        self.backbone.mask_token.requires_grad = args.ibot > 0
        self.supervised = args.supervised
        self.cast = args.device, torch.bfloat16, args.precision == "bf16"
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
        """Views (2 B, ..), (L B, ..); mask: (2 B, N); chosen: (M,) numbers of patches among 2 B N.

        Returns cls (2 B, D) of the global views, [CLS] logits (2 + L, B, K), patch logits (M, K);
        supervised, of views (B, ..), logits of classes (B, classes).
        """
        with torch.autocast(*self.cast):
            out = self.backbone(global_views, mask, cls_only=chosen is None)
            if self.supervised:
                return self.cls_head(out["cls"]).float()
            cls = [out["cls"]]
            if len(local_views):
                cls.append(self.backbone(local_views, cls_only=True)["cls"])
            logits = self.cls_head(torch.cat(cls))
            logits = rearrange(logits, "(v b) k -> v b k", b=len(global_views) // 2)
            if chosen is None:
                return cls[0], logits, None
            patches = out["patches"].flatten(0, 1).index_select(0, chosen)
            return cls[0], logits, self.patch_head(patches)


def compare(args, student, teacher: Network, global_views: Tensor, local_views: Tensor, mask, temp):
    """One pass of both networks: weighted terms of the loss, and meters of collapse; all scalars.

    mask: (2 B, N) bool on the CPU, or None without iBOT. Meters: `entropy` of the [CLS] targets as
    a share of ln K (1: they say nothing), and of their mean, `usage` (1: prototypes are used
    equally; as low as `entropy`: all pictures have the same); `kl` of the targets to the student,
    nats; `cls_std`, the teacher's [CLS] over the batch (0: all pictures look alike, 1: spread over
    the whole sphere).
    """
    chosen, device = None, global_views.device
    if mask is not None:
        chosen = mask.flatten().nonzero()[:, 0].to(device, non_blocking=True)
        weight = (1 / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(mask)[mask]
        weight, mask = weight.to(device, non_blocking=True), mask.to(device, non_blocking=True)

    def targets(logits, centre):
        ema = args.centring == "ema"
        return ema_centre(logits, temp, centre) if ema else sinkhorn(logits, temp)

    with torch.no_grad():
        cls, logits, patch_logits = teacher(global_views, local_views[:0], None, chosen)
        target = targets(logits.flatten(0, 1), teacher.cls_centre).view_as(logits)
        entropy = torch.special.entr(target).sum(-1).mean()
        usage = torch.special.entr(target.mean((0, 1))).sum()
        spread = F.normalize(cls.float(), dim=-1).std(0).mean() * cls.shape[1] ** 0.5
    student_cls, logits, student_patch = student(global_views, local_views, mask, chosen)
    dino = dino_loss(logits, target, args.student_temp)
    terms = {"dino": dino}
    if mask is not None:
        target = targets(patch_logits, teacher.patch_centre)
        ibot = ibot_loss(student_patch, target, weight, args.student_temp, len(mask))
        terms["ibot"] = args.ibot * ibot
    if args.koleo:
        terms["koleo"] = args.koleo * sum(koleo(one) for one in student_cls.chunk(2))
    full = math.log(args.prototypes)
    return terms, {"entropy": entropy / full, "usage": usage / full, "kl": dino.detach() - entropy,
                   "cls_std": spread}


def supervise(student, teacher: Network, views: Tensor, targets: Tensor, clean: Tensor, labels):
    """Binary cross-entropy of mixed views, nats, mean over classes; and as a meter `top1`, %: how
    often the averaged network is right about the pictures as they are."""
    loss = F.binary_cross_entropy_with_logits(student(views), targets)
    with torch.no_grad():
        right = teacher(clean).argmax(1) == labels
    return {"bce": loss}, {"top1": 100 * right.float().mean()}


# --------------------------------------------------------------------------------------------------
# Schedules, teacher, optimiser, checkpoints.


def cosine(step: int, steps: int, start: float, end: float, warmup: int = 0) -> float:
    """From `start` to `end` along half a cosine, after a linear rise from 0 over `warmup` steps."""
    if step < warmup:
        return start * step / warmup
    share = (step - warmup) / max(steps - warmup, 1)
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def schedule(args, step: int, ranks: int) -> dict[str, float]:
    """Learning rate, weight decay, teacher momentum and temperature of a step (counted from 0)."""
    growth = args.batch_size * ranks / args.lr_batch
    peak = args.lr * (growth**0.5 if args.lr_scaling == "sqrt" else growth)
    rise = min(step / max(args.temp_warmup * args.steps, 1e-9), 1)
    return {"lr": cosine(step, args.steps, peak, args.lr_end, int(args.warmup * args.steps)),
            "wd": cosine(step, args.steps, args.wd, args.wd_end),
            "ema": cosine(step, args.steps, args.ema, args.ema_end),
            "temp": args.temp_start + (args.temp_end - args.temp_start) * rise}


def make_teacher(student: Network) -> Network:
    """A copy of the student that takes no gradient and skips no branch."""
    return copy.deepcopy(student).requires_grad_(False).eval()


def wrap(args, student: Network, teacher: Network, ranks: int):
    """Compile both, if asked to; returns what takes the student's steps, on one rank or on many."""
    if args.compile:
        torch._dynamo.config.optimize_ddp = False  # some versions of it refuse GeluLinear
        for network in (student, teacher):  # dynamic shapes gain nothing, and fail with antialias
            network.backbone.compile(dynamic=False)
    return nn.parallel.DistributedDataParallel(student) if ranks > 1 else student


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum teacher + (1 - momentum) student, in place."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


def make_optimizer(args, student: Network) -> torch.optim.AdamW:
    """AdamW in groups: without weight decay the biases, norms and LayerScale (`free`); prototypes
    (`last`) and patch embedding have learning rates of their own."""
    groups = {}
    for name, p in student.named_parameters():
        free = name.endswith(".bias") or "norm" in name or "gamma" in name
        kind = next((k for k in ("last", "patch_embed") if k in name.split(".")), "rest")
        group = groups.setdefault((kind, free), {"params": [], "kind": kind, "free": free})
        group["params"].append(p)
    return torch.optim.AdamW(groups.values(), lr=0.0, fused=True)


def train_step(args, learner, teacher: Network, optimizer, img: Tensor, labels: Tensor, step: int,
               rank: int = 0, ranks: int = 1) -> tuple[dict, dict]:
    """One step on pictures uint8 (B, 3, S, S): views, loss, gradient, AdamW, teacher.

    learner: the student, or DistributedDataParallel around it. Returns the schedules' numbers and,
    as scalars on the device, so that nothing waits for a GPU, what is to be logged.
    """
    student, now = getattr(learner, "module", learner), schedule(args, step, ranks)
    for group in optimizer.param_groups:
        held = group["kind"] == "last" and step < args.freeze_last * args.steps
        factor = args.patch_embed_lr if group["kind"] == "patch_embed" else 0 if held else 1
        group["lr"] = factor * now["lr"]
        group["weight_decay"] = 0 if group["free"] else now["wd"]
    torch.manual_seed((args.seed * 1_000_003 + step) * 1024 + rank)  # for stochastic depth
    given = inputs(args, img, labels, student.backbone.config.patch, step, rank, ranks)
    if args.supervised:
        terms, meters = supervise(learner, teacher, *given)
    else:
        terms, meters = compare(args, learner, teacher, *given, now["temp"])
    loss = sum(terms.values())
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(student.parameters(), args.clip or math.inf)
    optimizer.step()
    update_teacher(teacher, student, now["ema"])
    values = {"loss": loss, **terms, **meters, "grad_norm": norm}
    return now, {name: value.detach() for name, value in values.items()}


def save(path: Path, state: dict) -> None:
    """Write beside, then move into place: `path` is a whole checkpoint at any moment."""
    beside = path.with_suffix(".tmp")
    try:
        with open(beside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as err:
        beside.unlink(missing_ok=True)
        kept = "the one before is intact" if path.exists() else "there is none yet"
        raise ValueError(f"could not save {path} at step {state['step']}: {err}; {kept}; "
                         "free some space, then go on with --resume") from None


# What may differ between a run and its continuation.
FREE = {"resume", "overwrite", "dry_run", "out", "workers", "device", "compile", "checkpointing",
        "log_every", "save_every", "probe_every", "probe"}


def plain(args) -> dict:
    """The flags as values that JSON and torch.load(weights_only=True) know."""
    return json.loads(json.dumps(vars(args), default=str))


def resume(args, student: Network, teacher: Network, optimizer) -> int:
    """Load --out/last.pt into all three; returns its step. ValueError: missing or foreign."""
    path = args.out / "last.pt"
    if not path.exists():
        raise ValueError(f"--resume: there is no {path}; leave out --resume, or correct --out")
    try:
        state = torch.load(path, map_location=args.device, weights_only=True)
        theirs = state["args"]
    except Exception as err:
        raise ValueError(f"--resume: {path} is not a checkpoint of train.py "
                         f"({type(err).__name__})") from None
    odd = [f"--{k.replace('_', '-')} {theirs.get(k)} (now {v})" for k, v in plain(args).items()
           if k not in FREE and theirs.get(k, v) != v]
    if odd:
        raise ValueError(f"--resume: {path} is of another run: it has {', '.join(odd)}; "
                         "give its flags, or another --out")
    student.load_state_dict(state["student"])
    teacher.load_state_dict(state["teacher"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


# --------------------------------------------------------------------------------------------------
# The run.


def masked(args, patch: int) -> float:
    """How many patches of a picture are masked, in both global views, on average."""
    views = 2 * args.mask_share if args.ibot else 0
    return views * (args.image_size // patch) ** 2 * sum(args.mask_ratio) / 2


def step_flops(args, network: Network) -> float:
    """FLOPs that training needs for a picture, with all its views and heads. A backward pass takes
    two forward ones; the teacher has none, skips no branch and sees the global views only."""
    cfg, views, last = network.backbone.config, 1 if args.supervised else 2, not args.ibot
    one = clsspec.flops(cfg, args.image_size, args.image_size, last)
    local = clsspec.flops(cfg, args.local_size, args.local_size, True) * args.local_crops
    cls, patch = (2 * sum(p.numel() for p in getattr(network, name, nn.Identity()).parameters())
                  for name in ("cls_head", "patch_head"))
    heads = cls * (4 * views + 3 * args.local_crops) + patch * 4 * masked(args, cfg.patch)
    return views * one * (1 + 3 * (1 - args.drop_path)) + 3 * (1 - args.drop_path) * local + heads


def describe(args, network: Network, ranks: int) -> None:
    """What a run would do, without doing it: --dry-run."""
    vit, cfg = network.backbone, network.backbone.config
    table = clsspec.parameters_by_component(vit)
    wider = table["[CLS] copies"] / (cfg.depth * cfg.width * (2 * cfg.width + 1))
    heads = sum(p.numel() for p in network.parameters()) - table["total"]
    one, views = clsspec.flops(cfg, args.image_size, args.image_size), 1 if args.supervised else 2
    tokens = [1 + (s // cfg.patch) ** 2 for s in (args.image_size, args.local_size)]
    tokens = args.batch_size * (views * tokens[0] + args.local_crops * tokens[1])
    number = 2 if args.precision == "bf16" else 4  # bytes
    # Kept for the backward pass, a block and token, in numbers of D; checkpointing: its input.
    each = (13 + 2 * bool(cfg.layerscale)) * (1 - args.drop_path) * number
    kept = tokens * cfg.depth * cfg.width * (4 if args.checkpointing else each)
    weights = (heads + table["total"]) * 4 * 5  # student, teacher, gradient, AdamW's two moments
    k = args.classes if args.supervised else args.prototypes
    rows = args.batch_size * (4 + args.local_crops + 2 * masked(args, cfg.patch))
    logits = 3 * 4 * rows * k  # themselves, their softmax, a gradient or target; fp32
    warmup, batch = int(args.warmup * args.steps), args.batch_size * ranks
    name = f"head, {args.classes} classes" if args.supervised else f"heads, K = {args.prototypes}"
    for name, count in (table | {name: heads}).items():
        print(f"  {name:18}{count / 1e6:10.3f} M parameters")
    if cfg.spec:
        print(f"  plain, with as many parameters: --mlp-ratio {cfg.mlp_ratio + wider:.3f}")
    print(f"  one picture       {one / 1e9:10.2f} GFLOPs forward at {args.image_size} px; "
          f"{step_flops(args, network) / 1e9:.1f} in training, all its views")
    print(f"  global batch      {batch:10} pictures = {args.batch_size} x {ranks} process(es); "
          f"{args.steps} steps, {args.steps * batch / 1e6:.3g} M pictures in all")
    peak = schedule(args, warmup, ranks)["lr"]
    print(f"  learning rate     {peak:10.3g} at its peak, step {warmup}: "
          f"{args.lr:g} at batch {args.lr_batch}, {args.lr_scaling} scaling")
    weights, kept, logits = weights / 2**30, kept / 2**30, logits / 2**30
    print(f"  memory            {weights + kept + logits:10.1f} GiB a process, about: weights and "
          f"optimiser {weights:.1f}, activations {kept:.1f}, logits {logits:.1f}")


def bench(args, rank: int, ranks: int) -> None:
    """--bench: steps of the network as given and of a plain one, in turns, on pictures of noise.

    Printed are medians; ratios are of times in one round, with quartiles. `plain again` is the same
    network as plain: what it differs by is the noise of the machine.
    """
    cuda, draw = args.device == "cuda", torch.Generator().manual_seed(0)
    shape = (args.batch_size, 3, args.source_size, args.source_size)
    img = torch.randint(256, shape, dtype=torch.uint8, generator=draw).to(args.device)
    labels = torch.zeros(len(img), dtype=torch.long, device=args.device)
    bare = {k: v for k, v in clsspec.PLAIN.items() if k in SPEC or not args.init}
    bare |= {} if args.init else {"mlp_ratio": 4.0}

    def clock(call, *step) -> float:
        start = time.perf_counter()
        call(*step)
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def stepper(args):
        torch.manual_seed(args.seed)
        student = Network(args).to(args.device)
        if student.backbone.config.spec and not args.spec:
            raise ValueError(f"--bench: the weights in {args.init} are specialised, there is no "
                             "plain network of them; leave out --init, or give plain weights")
        teacher, optimizer = make_teacher(student), make_optimizer(args, student)
        learner = wrap(args, student, teacher, ranks)
        call = lambda step: train_step(args, learner, teacher, optimizer, img, labels, step, *where)
        for step in range(first - 3, first):  # compiles, and fills caches
            clock(call, step)
        return call, student.backbone.config.patch, step_flops(args, student)

    where, first = (rank, ranks), 3 + int(args.warmup * args.steps)
    given, patch, work = stepper(args)
    memory, (plain, *_) = peak_mb(cuda), stepper(argparse.Namespace(**vars(args) | bare))
    views = lambda step: inputs(args, img, labels, patch, step, *where)
    calls = {"as given": given, "plain": plain, "plain again": plain, "views alone": views}
    times = {name: [] for name in calls}
    for step in range(first, first + args.bench):  # all do the same step, in random order
        for i in torch.randperm(len(calls), generator=draw).tolist():
            name = list(calls)[i]
            times[name].append(clock(calls[name], step))
    side = 8192 if cuda else 2048
    a = torch.randn(side, side, device=args.device)
    a = a.bfloat16() if args.precision == "bf16" else a
    peak = 2 * side**3 / min(clock(a.matmul, a) for _ in range(5))
    if rank:
        return
    print(f"\n{'':14}{'ms':>9}{'pictures/s':>12}   time / plain [quartiles of {args.bench} rounds]")
    for name, taken in times.items():
        ratio = torch.tensor([x / y for x, y in zip(taken, times["plain"])])
        low, mid, high = ratio.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        seconds = statistics.median(taken)
        print(f"{name:14}{1e3 * seconds:9.1f}{len(img) * ranks / seconds:12.1f}   {mid:.3f} "
              f"[{low:.3f}, {high:.3f}]")
    rate = work * len(img) / statistics.median(times["as given"])
    print(f"as given: {rate / 1e12:.3g} TFLOP/s, {rate / peak:.0%} of the {peak / 1e12:.3g} of a "
          f"product of two {side} x {side} matrices, {args.precision}; memory {memory:.0f} MiB")


def prepare(args, folder: Folder | None, student: Network, ranks: int) -> None:
    """Refuse what cannot run, before anything is written."""
    patch = student.backbone.config.patch
    local_size = args.local_size if args.local_crops else 0
    for flag, side in ("image", args.image_size), ("local", local_size):
        if side % patch:
            raise ValueError(f"--{flag}-size {side} is no multiple of the patch, {patch} px; try "
                             f"{max(side // patch, 1) * patch}")
    if args.source_size < args.image_size:
        raise ValueError(f"--source-size {args.source_size} is less than --image-size "
                         f"{args.image_size}: views would be blown up; give --source-size "
                         f"{args.image_size} or more")
    if args.koleo and args.batch_size < 2:
        raise ValueError("KoLeo needs a neighbour for every picture: give --batch-size 2 or more, "
                         "or --koleo 0")
    n, batch = len(folder) if folder else args.pictures, args.batch_size * ranks
    if n < batch and not (args.bench or args.dry_run):
        more = "" if folder else " or raise --pictures"
        raise ValueError(f"a global batch of {batch} pictures is larger than the set: --data "
                         f"{args.data} has {n}; lower --batch-size{more}")
    given = args.resume or args.overwrite or args.bench or args.dry_run
    if (args.out / "last.pt").exists() and not given:
        raise ValueError(f"{args.out} holds a run already: give --resume to go on, --overwrite to "
                         "start anew, or another --out")


def write_config(args, config: clsspec.Config, first: int, ranks: int) -> None:
    """config.json; and a log.jsonl that ends at the step where this run begins."""
    log = args.out / "log.jsonl"
    args.out.mkdir(parents=True, exist_ok=True)
    lines = log.read_text().splitlines(keepends=True) if first and log.exists() else []
    lines = [line for line in lines if line.endswith("\n")]  # the last may be cut by a full disk
    log.write_text("".join(line for line in lines if json.loads(line)["step"] <= first))
    if not first:
        for old in ("last.pt", "eval.json"):
            (args.out / old).unlink(missing_ok=True)
    cuda = args.device == "cuda"
    (args.out / "config.json").write_text(json.dumps({
        "command": "python " + " ".join(sys.argv), "args": plain(args), "model": asdict(config),
        **eval_dense.versions(), "processes": ranks, "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if cuda else "cpu"}, indent=1))


def peak_mb(cuda: bool) -> float:
    """Most memory so far, MiB: the GPU's, or this process's (0 where the system does not say)."""
    if cuda:
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource  # not on Windows
    except ImportError:
        return 0.0
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def check_finite(rows: Tensor, names: list[str], first: int) -> None:
    """rows: (steps, values) from step `first` on. ValueError: the first bad step and its terms."""
    bad = (~rows.isfinite().all(1)).nonzero()[:, 0].tolist()
    if bad:
        terms = ", ".join(f"{k} {v:.4g}" for k, v in zip(names, rows[bad[0]].tolist()))
        raise ValueError(f"not finite at step {first + bad[0]}: {terms}; the last checkpoint is "
                         "intact; start anew with a lower --lr or --clip")


def run(args, rank: int, ranks: int) -> None:
    start, main, cuda = time.time(), rank == 0, args.device == "cuda"
    say = print if main else lambda *_, **__: None
    if cuda and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: torch sees no GPU here; give --device cpu")
    say(f"scale {args.scale} ({torch.cuda.get_device_name() if cuda else 'no GPU in use'}), recipe "
        f"{args.recipe}, data {args.data}, spec {','.join(args.spec) or 'none'}", flush=True)
    scenes = args.data == "scenes"
    folder = None if scenes or args.dry_run or args.bench else Folder(args.data, args.source_size)
    args.classes = len(folder.classes) if folder else len(Scenes.labels) if scenes else 1000
    if args.supervised and (args.classes < 2 or folder and "" in folder.classes):
        raise ValueError(f"--supervised: --data {args.data} must be a folder that has a folder of "
                         "pictures for each class, two or more, and no pictures beside them")
    torch.manual_seed(args.seed)
    with torch.device("meta" if args.dry_run and not args.init else "cpu"):
        student = Network(args)
    prepare(args, folder, student, ranks)
    if args.dry_run:
        return describe(args, student, ranks) if main else None
    if args.bench:
        return bench(args, rank, ranks)
    student = student.to(args.device)
    teacher = make_teacher(student)
    optimizer = make_optimizer(args, student)
    first = resume(args, student, teacher, optimizer) if args.resume else 0
    if main:
        write_config(args, student.backbone.config, first, ranks)
    say(f"run folder {args.out}; " + (f"{args.classes} classes" if args.supervised else f"ln K = "
        f"{math.log(args.prototypes):.3f}: a DINO loss that stays there has learnt nothing"),
        flush=True)

    learner = wrap(args, student, teacher, ranks)
    n, batch = len(folder) if folder else args.pictures, args.batch_size * ranks
    window, skipped, signals, tick = [], 0, [], 0.0
    for number in (signal.SIGTERM, signal.SIGINT):  # save, then leave
        signal.signal(number, lambda number, _: signals.append(number))
    progress = tqdm(total=args.steps, initial=first, unit="step", disable=not main,
                    dynamic_ncols=True, mininterval=eval_dense.QUIET)
    for step, (img, labels, bad) in enumerate(batches(args, folder, first, rank, ranks), first):
        if step == first:
            tick = time.time()  # not before there are pictures
        now, values = train_step(args, learner, teacher, optimizer, img, labels, step, rank, ranks)
        window.append(torch.stack(list(values.values())))
        skipped, done = skipped + len(bad), step + 1
        for name in bad:
            progress.write(f"skipped an unreadable file: {name}")
        progress.update()
        stop = bool(signals)
        if ranks > 1:  # they agree at logged steps, to leave together
            stop = done % args.log_every == 0 and all_sum(
                torch.tensor(float(stop), device=args.device)).item() > 0
        saving = stop or done == args.steps or done % args.save_every == 0
        probing = args.probe_every and done % args.probe_every == 0
        if saving or probing or done % args.log_every == 0:
            rows = torch.stack(window).cpu()
            check_finite(rows, list(values), done - len(rows) + 1)
            line = {"step": done, "epoch": step // (n // batch)}
            line |= dict(zip(values, rows.mean(0).tolist())) | now
            speed = len(rows) * batch / (time.time() - tick)
            line |= {"img_per_s": speed, "peak_mb": peak_mb(cuda), "skipped": skipped}
            if main and probing:
                line |= probe(teacher.backbone)
            window, tick = [], time.time()
            progress.set_postfix_str(f"loss {line['loss']:.3f}, {line['img_per_s']:.0f} img/s")
            if main:
                with open(args.out / "log.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")
        if main and saving:
            save(args.out / "last.pt", {
                "model": asdict(student.backbone.config), "args": plain(args), "step": done,
                "student": student.state_dict(), "teacher": teacher.state_dict(),
                "optimizer": optimizer.state_dict()})
        if stop and done < args.steps:
            progress.close()
            say(f"stopped by a signal: step {done} is saved, go on with --resume")
            sys.exit(128 + (signals or [signal.SIGTERM])[0])
    progress.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if main and args.probe:
        final_table(args)
        print(f"{(time.time() - start) / 60:.1f} minutes; checkpoint {args.out / 'last.pt'}")


# The online probe: eval_dense's protocol for Scenes, shorter, with k-NN for pictures as a whole.
ONLINE = replace(eval_dense.PROTOCOLS["scenes"], tasks=("seg", "depth", "knn"), iterations=200,
                 train=500, test=250, split="val")


def probe(vit: clsspec.ViT) -> dict[str, float]:
    """Metrics of a network's features on Scenes; as it is, if it is compiled."""
    with torch.compiler.set_stance("force_eager"):
        result = eval_dense.evaluate(vit, p=ONLINE)[0]
    return {k: result[k] for k in eval_dense.METRICS if k in result}


def final_table(args) -> None:
    """Linear probes on Scenes of the network as it was at step 0, and of the teacher in last.pt."""
    print("\nlinear probe on Scenes  mIoU %   depth RMSE m")
    for name in ("untrained", "teacher"):
        model = clsspec.load(args.out / "last.pt", name).to(args.device)
        protocol = replace(eval_dense.PROTOCOLS["scenes"], tasks=eval_dense.DENSE)
        result = eval_dense.evaluate(model, p=protocol)[0]
        eval_dense.record(args.out / "eval.json", f"{name} scenes tasks=seg,depth", result)
        print(f"  {name:20} {result['miou']:7.2f} {result['rmse']:14.3f}")


def main(argv=None) -> None:
    args = parse(sys.argv[1:] if argv is None else argv)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        if ranks > 1 and not args.dry_run:
            if args.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
        run(args, rank, ranks)
    except (ValueError, OSError) as err:
        sys.exit(f"error: {str(err).strip().splitlines()[-1].removeprefix('ValueError: ')}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
