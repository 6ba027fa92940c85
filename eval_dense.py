"""Judge frozen features: linear probes of classes, depth and whole pictures; and Scenes, a world.

    python eval_dense.py runs/NAME                       # all tasks on Scenes; writes eval.json
    python eval_dense.py runs/a runs/b                   # a table, and b - a over the same pictures
    python eval_dense.py runs/NAME --network untrained   # the same network at step 0
    python eval_dense.py runs/NAME --data voc --root path/to/VOC --tasks seg
    python eval_dense.py --sheet scenes.png              # what Scenes look like

Protocol: DINOv2's linear segmentation and classification, DINOv3's linear depth, DINO's k-NN.
Features  patches of the last block (--layer: of another) after the final norm, no [CLS] (--cat-cls:
          beside every patch); the backbone is frozen, in eval mode, fp32 on a CPU and bf16 on CUDA.
Pictures  resized, with antialias, to --image-size on the shorter side (0: as they are), then to the
          nearest multiple of the patch on both; labels are not. With --crop, heads are trained on
          crops of pictures and labels: scale 0.5 to 2 (1 where there is depth), flip, padded with
          black, 255, no depth. The sides of crops and windows are multiples of the patch, too.
Heads     BatchNorm and one linear layer, N(0, 0.01), bias 0. seg: to classes. depth: to 256 uniform
          bins from 0.001 m to the set's largest depth; relu + 0.1, normalised, weighs them to a
          depth. Both are upsampled bilinearly (corners not aligned) to the label's size.
Losses    seg: cross-entropy, 255 ignored. depth: scale-invariant log loss, sqrt(var(g) + 0.15
          mean(g)^2), g = log prediction - log truth, valid pixels only. Each iteration looks at
          every (patch / 2)th row and column of the labels, from a random first one.
Training  AdamW, weight decay 1e-4, betas 0.9 and 0.999; linear warm-up, then linearly to 0; batches
          are drawn with replacement. Of several --lr, each head's is chosen on a tenth of the
          training pictures, which it has not seen.
Test      whole pictures, or --window with logits and depth averaged where windows overlap; --flip:
          averaged with the mirrored picture's.
cls       [CLS], or [CLS] beside the mean patch, into softmax regression: SGD, momentum 0.9, batch
          128, ten epochs but at least 2000 iterations, cosine to 0; input and learning rate (12,
          0.001 to 5) by five-fold cross-validation in the training set, then trained on all of it.
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
from PIL import Image  # comes with torchvision
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import save_image
from tqdm import tqdm

import clsspec
from clsspec import ViT

TASKS, DENSE = ("seg", "depth", "cls", "knn"), ("seg", "depth")
METRICS = {"miou": "{:.2f} %", "rmse": "{:.3f} m", "absrel": "{:.4f}", "delta1": "{:.2f} %",
           "linear": "{:.2f} %", "knn": "{:.2f} %"}
SPLITS = ("train", "probe", "test", "val")
SCENE_CLASSES = ("sky", "grass", "sand", "paving",
                 "ball", "bush", "crate", "house", "drum", "trunk")
# Materials. Each comes in three paints, a third of the circle of hues apart and between those of
# others: the mean colour of all is the same grey. So a linear read-out of colours cannot name them;
# shape and texture can, or knowing which paints there are. Hue, in turns, is of the first paint.
# Half the width and the period of an object are in metres, for one 4 m away; aspect is height by
# width.
KINDS = torch.tensor([
    # width lo, hi   aspect lo, hi   period   hue     sat  value
    [0.50, 0.80,     1.00, 1.00,     0.72,    3 / 18, 0.66, 0.86],   # ball: dots
    [0.58, 0.95,     0.75, 1.05,     0.90,    5 / 18, 0.58, 0.64],   # bush: leaves
    [0.46, 0.72,     0.75, 1.10,     0.44,    2 / 18, 0.56, 0.80],   # crate: slanted planks
    [0.62, 0.92,     1.00, 1.45,     0.62,    0 / 18, 0.54, 0.76],   # house: bricks
    [0.40, 0.60,     1.10, 1.50,     0.46,    4 / 18, 0.62, 0.78],   # drum: rings
    [0.27, 0.40,     3.00, 4.20,     0.28,    1 / 18, 0.48, 0.66]])  # trunk: upright grain
GROUNDS = torch.tensor([
    # period  hue    sat
    [0.9,     2 / 9, 0.40],    # grass
    [0.8,     1 / 9, 0.36],    # sand, in ripples
    [1.7,     0 / 9, 0.28]])   # paving, a checkerboard
MOODS = torch.tensor([     # RGB of horizon, zenith, sunlight and shade; a scene mixes the three
    [.74, .86, .95,   .24, .47, .84,   .82, .77, .66,   .40, .45, .54],   # clear day
    [.98, .64, .42,   .27, .25, .50,   .88, .68, .56,   .44, .41, .47],   # dusk
    [.83, .85, .87,   .58, .62, .68,   .38, .38, .38,   .62, .64, .67]])  # overcast


def scramble(z: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64, any shape: products wrap around, shifts are logical."""
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * (0x94D049BB133111EB - (1 << 64))
    return z ^ (z >> 31 & (1 << 33) - 1)


def uniforms(seed: int, index: Tensor, n: int) -> Tensor:
    """(B,) int64 -> (B, n) float64 in [0, 1), each a function of (seed, index, column) alone."""
    golden = 0x9E3779B97F4A7C15 - (1 << 64)
    key = scramble(scramble(torch.full_like(index, seed) + golden) ^ index)
    z = scramble(key[:, None] + golden * torch.arange(1, n + 1))
    return (z >> 11 & (1 << 53) - 1).double() / (1 << 53)


def hsv(hue: Tensor, sat: Tensor, value: Tensor) -> Tensor:
    """Hue in turns, saturation and value in [0, 1], each (...) -> RGB (3, ...) in [0, 1]."""
    k = torch.stack([(hue * 6 + n) % 6 for n in (5, 3, 1)])
    return value * (1 - sat * torch.minimum(k, 4 - k).clamp(0, 1))


def turn(v, cos: Tensor, sin: Tensor) -> list[Tensor]:
    """Turn the vectors v (three tensors: x, y, z) about the upright axis; -sin turns them back."""
    return [v[0] * cos - v[2] * sin, v[1], v[0] * sin + v[2] * cos]


def crossings(o, d, surfaces: Tensor) -> tuple[Tensor, Tensor]:
    """The t at which rays o + t d enter each of the six objects, and whether they do: (B, 6, S, S).

    o, d: x, y, z of origin and direction, each broadcastable to (B, 1, S, S). In its own frame, in
    half sizes, an object is the unit sphere, a cube (what three slabs share) or a cylinder (what a
    slab and a column share), so what it shares with a ray is an interval of t, maybe an empty one.
    """
    x, y, z, cos, sin, *half_sizes = surfaces[1:9, :, 2:, None, None]
    o = [p / h for p, h in zip(turn([o[0] - x, o[1] - y, o[2] - z], cos, sin), half_sizes)]
    d = [p / h for p, h in zip(turn(d, cos, sin), half_sizes)]

    def slab(i, k):                      # |o_i + t d_i| < 1, for the objects k
        middle, half = -o[i][:, k] / d[i][:, k], 1 / d[i][:, k].abs()
        return middle - half, middle + half

    def round_solid(axes, k):            # sum of (o_i + t d_i)^2 < 1; a miss is NaN, so False below
        dd = sum(d[i][:, k] ** 2 for i in axes)
        middle = -sum(o[i][:, k] * d[i][:, k] for i in axes) / dd
        half = (middle ** 2 - (sum(o[i][:, k] ** 2 for i in axes) - 1) / dd).sqrt()
        return middle - half, middle + half

    def shared(p, q):
        return torch.maximum(p[0], q[0]), torch.minimum(p[1], q[1])

    ball, box, can = slice(0, 2), slice(2, 4), slice(4, 6)
    parts = (round_solid((0, 1, 2), ball), shared(shared(slab(0, box), slab(1, box)), slab(2, box)),
             shared(round_solid((0, 2), can), slab(1, can)))
    enter, leave = (torch.cat(p, 1) for p in zip(*parts))
    return enter, (enter < leave) & (enter > 0)


class Scenes:
    """A small world made by formula: balls, bushes, crates, houses, drums and trunks under a sky.

    Scenes(split, size S, seed)(index), index (B,) int64 on any device, renders there and returns
      image: uint8 (B, 3, S, S), RGB
      mask:  uint8 (B, S, S), positions in `classes`
      depth: float32 (B, S, S), metres along the optical axis; 0 = not valid (sky, beyond max_depth)
      label: int64 (B,), position in `labels`: the kind of the main object, whose centre has the
             least depth, near the middle of the picture; the six kinds are equally likely
    Scene i is a function of (seed, split, i) alone; S only says how finely it is sampled. Splits
    are disjoint ranges of 2^40 numbers in one hash. World: x right, y up, z ahead, in metres.
    Raises ValueError for an unknown split or a number outside [0, 2^40).
    """
    classes, labels, max_depth, span = SCENE_CLASSES, SCENE_CLASSES[4:], 20.0, 1 << 40

    def __init__(self, split: str = "train", size: int = 64, seed: int = 0):
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
        self.split, self.size, self.seed = split, size, seed

    def __call__(self, index: Tensor) -> dict[str, Tensor]:
        if len(bad := index[(index < 0) | (index >= self.span)]):
            raise ValueError(f"scene numbers must be in [0, 2^40); got {bad[0].item()}")
        pixels = 1 << (16 if index.device.type == "cpu" else 22)       # at a time: little memory
        parts = []
        for part in index.split(max(1, pixels // self.size ** 2)):
            scene, surfaces = self.design(part.cpu() + SPLITS.index(self.split) * self.span)
            scene = {k: v.to(index.device) for k, v in scene.items()}
            parts.append(self.render(scene, surfaces.to(index.device)))
        return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}

    def design(self, index: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """(B,) -> a scene's own numbers, (..., B) each, and its eight surfaces, (17, B, 8).

        On the CPU and in float64 up to the last step: no batch or device rounds differently.
        """
        u = uniforms(self.seed, index, 24 + 6 * 17)
        one, each = iter(u[:, :24].unbind(1)), iter(u[:, 24:].unflatten(1, (6, 17)).unbind(2))
        pick = lambda low, high: low + (high - low) * next(one)           # (B,), for a scene
        draw = lambda low, high: low + (high - low) * next(each)          # (B, 6), for its objects
        # Camera: tangent of half the field of view; pitch, by the horizon's height in the picture.
        tan = pick(0.40, 0.56)
        pitch, roll, height = (tan * pick(0.05, 0.55)).atan(), pick(-0.1, 0.1), pick(0.8, 2.5)
        # Light: a mixture of moods, and the direction of the sun.
        mood = torch.stack([pick(0.1, 1) ** 3 for _ in MOODS])
        mood = (mood / mood.sum(0))[:, None] * MOODS[..., None]
        horizon, zenith, sun, shade = mood.sum(0).unflatten(0, (4, 3))    # (3, B) each
        rise = pick(0.45, 1.05)
        light = turn([rise.cos(), rise.sin(), 0 * rise], *((w := pick(0, math.tau)).cos(), w.sin()))

        # Objects: two spheres, two boxes, two cylinders, each of either kind; 3 to 6 are there, in
        # a random order from near to far. The first, the main one, stands near the middle.
        kind = torch.tensor([0, 0, 2, 2, 4, 4]) + draw(0, 2).long()
        order, column = (draw(0, 1).argsort(1).argsort(1) for _ in range(2))
        count = pick(3, 7).long()[:, None]
        near = (1.1 * height / (pitch + tan.atan()).tan()).clamp(min=2.6)[:, None]
        z = near + (13 - near) * (order + draw(0, 0.6)) / count
        x = torch.where(order == 0, draw(-0.4, 0.4), (column + draw(0, 1)) / 3 - 1)
        x = x * z * tan[:, None]
        wide, wider, low, high, period, hue, sat, value = KINDS[kind].unbind(2)
        # Far ones are larger, so that they can be seen; half the gap to a neighbour is the limit.
        there, grow = order < count, (z / 4) ** 0.65
        gap = ((x[:, :, None] - x[:, None]) ** 2 + (z[:, :, None] - z[:, None]) ** 2).sqrt()
        apart = there[:, :, None] & there[:, None] & ~torch.eye(6).bool()
        a = torch.minimum(grow * draw(wide, wider), torch.where(apart, gap, 99).amin(2) / 3)
        box = kind // 2 == 1
        b, c = a * draw(low, high), a * torch.where(box, draw(0.8, 1.1), 1)
        y = torch.where(there, torch.where(kind < 2, 0.88, 1) * b, -999)       # absent: deep down
        k = math.tau / (period * grow * draw(0.85, 1.15))              # radians per metre
        k = torch.where(box, k, (k * a).round().clamp(min=3) / a)              # whole turns around
        paint = draw(0, 3).floor() / 3 + draw(-0.015, 0.015)
        first = hsv(hue + paint, sat * draw(0.9, 1.1), value * draw(0.9, 1.1))
        w = draw(0, math.tau)
        objects = [kind + 4, x, y, z, w.cos(), w.sin(), a, b, c, k, draw(0, 9), *first,
                   *(first * draw(0.4, 0.6))]

        # Surfaces, in columns: sky (a ceiling of clouds, 1 km up), ground, objects. In rows: class,
        # centre, yaw (cos, sin), half sizes, texture (radians per metre, phase), two RGB colours.
        soil = pick(0, 3).long()
        period, hue, sat = GROUNDS[soil].unbind(1)
        paint = pick(0, 3).floor() / 3 + pick(-0.02, 0.02)
        first = hsv(hue + paint, sat * pick(0.9, 1.1), pick(0.68, 0.84))
        surfaces = torch.zeros(17, len(index), 8)
        surfaces[[4, 6, 7, 8]], surfaces[0, :, 1] = 1, 1.0 + soil
        surfaces[9:, :, 0] = torch.stack([pick(0.003, 0.005), pick(0, 99), *horizon, *zenith])
        surfaces[9:, :, 1] = torch.stack([math.tau / period / pick(0.8, 1.3), pick(0, 9), *first,
                                          *(first * pick(0.55, 0.8))])
        surfaces[:, :, 2:] = torch.stack(objects)
        label = kind.gather(1, order.argmin(1, keepdim=True))[:, 0]
        scene = dict(tan=tan, pitch=pitch, roll=roll, height=height, light=torch.stack(light),
                     sun=sun, shade=shade, horizon=horizon, clouds=pick(-1.2, 1.2),
                     haze=pick(0.03, 0.08))
        return {k: v.float() for k, v in scene.items()} | dict(label=label), surfaces

    def render(self, scene: dict[str, Tensor], surfaces: Tensor) -> dict[str, Tensor]:
        """One ray a pixel: the nearest surface gives mask and depth, and is shaded once."""
        s = {k: v[..., None, None] for k, v in scene.items()}            # (B, 1, 1) or (3, B, 1, 1)
        # Rays go one metre forward per unit of t, so t is depth along the optical axis.
        grid = (torch.arange(self.size, device=surfaces.device) + 0.5) * 2 / self.size - 1
        right, up = grid * s["tan"], -grid[:, None] * s["tan"]
        cos, sin = s["roll"].cos(), s["roll"].sin()
        right, up = right * cos - up * sin, right * sin + up * cos
        cos, sin = s["pitch"].cos(), s["pitch"].sin()
        d = torch.stack([right, up * cos - sin, up * sin + cos])         # (3, B, S, S)
        eye = torch.stack([0 * s["height"], s["height"], 0 * s["height"]])
        enter, hit = crossings(eye[:, :, None], d[:, :, None], surfaces)
        t, slot = torch.cat([torch.where(d[1] >= 0, 1e3 / (d[1] + 0.1), math.inf)[:, None],
                             torch.where(d[1] < 0, -eye[1] / d[1], math.inf)[:, None],
                             torch.where(hit, enter, math.inf)], 1).min(1)
        # The winner's numbers, all (B, S, S), and what they make of the point: in the world, in the
        # frame of its surface, and in half sizes; then the normal.
        row = 8 * torch.arange(len(slot), device=slot.device)[:, None, None]
        mask, x, y, z, cos, sin, a, b, c, k, phase, *colours = surfaces.flatten(1)[:, slot + row]
        mask = mask.long()
        sky, flat, ball, box, can = (mask == 0, mask < 4, *(mask // 2 == i for i in (2, 3, 4)))
        point = eye + t * d
        own = turn([point[0] - x, point[1] - y, point[2] - z], cos, sin)
        q = own[0] / a, own[1] / b, own[2] / c
        ax, ay, az = (v.abs() for v in q)
        ring = (q[0] ** 2 + q[2] ** 2).sqrt()
        top = flat | box & (ay > ax) & (ay > az) | can & (ay > ring)
        side = box & (ax > az)                                           # the x face, else z
        n = torch.stack([q[0] / a * ~(top | box & ~side), torch.where(top, 1, q[1] / b * ball),
                         q[2] / c * ~(top | side)])
        n = torch.stack(turn(n / (n ** 2).sum(0).sqrt(), cos, -sin))

        # Texture: every class its own pattern of u and v, in [-1, 1]; the ground's blurs far away.
        u = torch.where(side, own[2], own[0])
        u = torch.where(ball | can, torch.atan2(q[0], q[2]) * a, u) * k
        v = torch.where(top, torch.where(can, ring * a, own[2]), own[1]) * k + phase
        crisp = lambda wave: (4 * wave).clamp(-1, 1)
        sin, cos = torch.sin, torch.cos
        rough = (sin(u + phase + 2 * sin(0.8 * v)) * sin(v + 2 * sin(0.7 * u))
                 + 0.7 * sin(2.3 * u - 2 * sin(1.7 * v)) * sin(2.1 * v + sin(1.9 * u)))
        frame = torch.maximum(torch.where(side, az, ax), torch.where(top, az, ay)) > 0.8
        joint = torch.maximum(cos(2 * v), cos(u + math.pi * (v / math.pi).floor()))
        tone = torch.stack([
            rough,                                                       # sky: clouds
            rough,                                                       # grass
            sin(v + 2 * sin(0.4 * u)),                                   # sand
            crisp(sin(u) * sin(v)),                                      # paving
            crisp(cos(u) * cos(v) - 0.25),                               # ball: dots
            crisp(rough),                                                # bush: leaves
            torch.where(frame, -0.5, crisp(cos(u + v) + 0.5)),           # crate: planks in a frame
            crisp(0.8 - joint),                                          # house: bricks
            crisp(sin(v)),                                               # drum: rings
            sin(u + sin(0.3 * v + 2 * sin(0.5 * u))),                    # trunk: grain
        ]).gather(0, mask[None])[0]
        blur = torch.where(flat, 1 / (1 + (k * t ** 2 / (90 * s["height"])) ** 2), 1)

        # Light: shade from all around, and the sun where no object is in its way; then mist.
        _, hit = crossings((point + 0.004 * t * n)[:, :, None], s["light"][:, :, None], surfaces)
        facing = (n * s["light"]).sum(0).clamp(min=0) * ~hit.any(1)
        first, second = torch.stack(colours).unflatten(0, (2, 3))        # each (3, B, S, S)
        lit = torch.lerp(second, first, 0.5 + 0.5 * tone * blur)
        lit = lit * (s["shade"] * (0.8 + 0.2 * n[1]) + s["sun"] * facing)
        lit = torch.lerp(s["horizon"], lit, torch.exp(-s["haze"] * t))
        air = torch.lerp(first, second, (d[1] / (0.15 + d[1].abs())).clamp(0, 1))
        air = torch.lerp(air, 0.4 + 0.6 * s["horizon"], (0.6 * (rough + s["clouds"])).clamp(0, 0.8))
        image = (torch.where(sky, air, lit).clamp(0, 1) * 255 + 0.5).to(torch.uint8)
        return dict(image=image.transpose(0, 1), mask=mask.to(torch.uint8), label=scene["label"],
                    depth=torch.where(sky | (t > self.max_depth), 0, t))


# --------------------------------------------------------------------------------------------------
# Labelled pictures: how each data set lies on a disk, and its protocol.


def decode(file, *modes: str) -> Tensor:
    """A picture (channels, H, W), as stored, or as RGB. ValueError: unreadable, or another mode."""
    try:
        with Image.open(file) as img:
            mode = img.mode
            pixels = TF.pil_to_tensor(img.convert("RGB") if modes == ("RGB",) else img)
    except Exception as err:  # whatever a decoder makes of a broken file
        why = (str(err) or type(err).__name__).splitlines()[0]
        raise ValueError(f"cannot read {file} ({why}); mend it or take it out") from None
    if modes != ("RGB",) and mode not in modes:
        need = "an 8-bit index PNG" if "P" in modes else "a 16-bit grey PNG"
        raise ValueError(f"{file} must be {need}, but its mode is {mode}; convert it")
    return pixels


def random_crop(item: dict, u, size: int, crop: int) -> dict:
    """An item's crop: (crop, crop), by four uniform numbers u: scale, top, left, flip."""
    h, w = item["image"].shape[-2:]
    scale = (size / min(h, w) if size else 1) * (1 if "depth" in item else 0.5 + 1.5 * u[0])
    h, w = max(round(h * scale), 1), max(round(w * scale), 1)
    right, bottom = max(crop - w, 0), max(crop - h, 0)
    top, left = int(u[1] * (h + bottom - crop + 1)), int(u[2] * (w + right - crop + 1))
    out = {}
    for kind, x in item.items():
        how = InterpolationMode.BILINEAR if kind == "image" else InterpolationMode.NEAREST_EXACT
        x = TF.resize(x if kind == "image" else x[None], [h, w], how, antialias=True)
        x = F.pad(x, (0, right, 0, bottom), value=255 if kind == "mask" else 0)
        x = x[:, top : top + crop, left : left + crop]
        out[kind] = x.flip(2) if u[3] < 0.5 else x
    return {k: v if k == "image" else v[0] for k, v in out.items()}


def stack(items: list[dict]) -> dict[str, Tensor]:
    """Items -> one dict of stacked tensors. ValueError where pictures have several sizes."""
    for item in items:
        for kind in item.keys() - {"name", "label"}:
            a, b = (tuple(x[kind].shape[-2:]) for x in (item, items[0]))
            if a != b:
                raise ValueError(f"{item['name']}: its {kind} has {a} pixels (rows, columns), that "
                                 f"of {items[0]['name']} {b}; for several sizes give --crop")
    return {k: torch.stack([x[k] for x in items]) for k in items[0].keys() - {"name"}}


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
        at = lambda i: torch.as_tensor(i, device=self.memory["image"].device)
        return ({k: v[at(i)] for k, v in self.memory.items()} for i in order)

    def __getitem__(self, key) -> dict:
        i, u = key if isinstance(key, tuple) else (key, None)
        row, item = self.rows[i], {"image": decode(self.rows[i]["image"], "RGB")}
        if "label" in row:  # the middle of the picture
            img = TF.resize(item["image"], [self.size * 8 // 7], antialias=True)
            return {"image": TF.center_crop(img, [self.size]), "label": torch.tensor(row["label"])}
        if "mask" in row:
            item["mask"] = self.mask(row["mask"])
        if "depth" in row:
            count = decode(row["depth"], "I;16", "I")[0].int()
            depth = (count >> 3 | count << 13 & 0xFFFF if self.rotated else count) * self.unit
            near = depth <= self.max_depth
            item["depth"] = torch.where(near, depth, self.max_depth if self.cut else 0)
        h, w = item["image"].shape[-2:]
        for kind, x in item.items():
            if x.shape[-2:] != (h, w):
                raise ValueError(f"{row[kind]} has {tuple(x.shape[-2:])} pixels (rows, columns), "
                                 f"{row['image']} has {(h, w)}; make them equal")
        if self.frame:
            top, left = h - min(self.frame[0], h), (w - min(self.frame[1], w)) // 2
            item = {k: x[..., top:, left : left + self.frame[1]] for k, x in item.items()}
            h, w = item["image"].shape[-2:]
        if u:
            return random_crop(item, u, self.size, self.crop) | {"name": row["image"]}
        if self.region:
            judged = torch.zeros_like(item["depth"])
            judged[self.region] = item["depth"][self.region]
            item["depth"] = judged
        scale = self.size / min(h, w) if self.size else 1
        fitted = [max(round(n * scale / self.patch), 1) * self.patch for n in (h, w)]
        item["image"] = TF.resize(item["image"], fitted, antialias=True)
        return item | {"name": row["image"]}

    def mask(self, file) -> Tensor:
        """A file's classes (H, W) uint8; ValueError where it is no map of this set's classes."""
        mask = decode(file, "P", "L")[0]
        mask = mask if self.ids is None else self.ids[mask.long()]
        beyond = mask[(mask >= len(self.classes)) & (mask != 255)]
        if len(beyond):
            raise ValueError(f"{file} has class {beyond.max()}, but the set has only "
                             f"{len(self.classes)}, from 0 on; mend the mask or classes.txt")
        return mask


# How a set is opened: (folder, split "train" or "val") -> Pictures. The first lines say what is
# expected in the folder and where it is had, to readers and in error messages.


def pairs(at: Path, split: str) -> Pictures:
    """images/{train,val}/NAME.jpg (or png), and one or both of masks/{train,val}/NAME.png (8-bit
    index, 255: ignored) and depth/{train,val}/NAME.png (16-bit millimetres, 0: none); if you like,
    classes.txt, lines "CLASS" or "NUMBER<tab>CLASS", from 0 on"""
    folders = {"mask": at / "masks" / split, "depth": at / "depth" / split}
    folders = {k: folder for k, folder in folders.items() if folder.is_dir()}
    if not folders:
        raise OSError(f"neither masks/{split} nor depth/{split} is there")
    files = sorted((at / "images" / split).iterdir())
    rows = [{"image": str(f)} | {k: str(d / f"{f.stem}.png") for k, d in folders.items()}
            for f in files if f.suffix.lower() in (".jpg", ".jpeg", ".png")]
    classes, file, far = (), at / "classes.txt", 0.0
    if "depth" in folders:
        depths = (decode(f, "I;16", "I").int() for f in (at / "depth/train").glob("*.png"))
        far = max((depth.max().item() for depth in depths), default=0) / 1000
    if "mask" in folders and file.exists():
        lines = [line.strip().split("\t") for line in file.read_text().splitlines()]
        classes = [line[len(line) > 1] for line in lines if line[0] and line[0][0] != "#"]
    elif "mask" in folders:
        every = Pictures(classes=range(255))
        most = (every.mask(f) for f in sorted((at / "masks/train").glob("*.png")))
        classes = range(1 + max((m[m != 255].max().item() for m in most if (m != 255).any()),
                                default=0))
    return Pictures(rows, classes=tuple(map(str, classes)), max_depth=far)


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
    found = torchvision.datasets.ImageFolder(at / split)
    rows = [{"image": file, "label": label} for file, label in found.samples]
    return Pictures(rows, labels=tuple(found.classes))


@lru_cache(maxsize=4)
def rendered(split: str, size: int, n: int, device: torch.device) -> Pictures:
    memory = Scenes(split, size)(torch.arange(n, device=device))
    return Pictures(memory=memory, classes=Scenes.classes, labels=Scenes.labels,
                    max_depth=Scenes.max_depth)


def count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return int(text)


def side(text: str) -> int:
    return 0 if text == "0" else count(text)


def rates(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


def names(text: str) -> tuple[str, ...]:
    if not (found := tuple(dict.fromkeys(filter(None, text.split(","))))):
        raise argparse.ArgumentTypeError("names nothing; leave it out, or give a comma list")
    return found


def flag(kind, default, help: str):
    """A field of Protocol that is a flag of the same name, read by `kind`."""
    return field(default=default, metadata={"kind": kind, "help": help})


@dataclass(frozen=True)
class Protocol:
    """What is measured and how, see the top of this file. PROTOCOLS has one for every data set."""

    tasks: tuple = flag(names, TASKS, "comma list of seg, depth, cls, knn")
    image_size: int = flag(side, 0, "shorter side of the pictures, pixels; 0: as they are")
    crop: int = flag(side, 0, "side of the crops that heads are trained on; 0: whole pictures")
    window: int = flag(side, 0, "side of the windows to test in; 0: whole pictures")
    flip: bool = flag(bool, False, "test on the mirrored picture, too, and average")
    layer: int | None = flag(count, None, "number of blocks that features come from; all")
    cat_cls: bool = flag(bool, False, "[CLS] beside every patch")
    iterations: int = flag(count, 1000, "of the dense heads")
    batch_size: int = flag(count, 32, "pictures an iteration")
    lr: tuple = flag(rates, (1e-2,), "of the dense heads; of a comma list the best is chosen")
    warmup: float = flag(float, 0.1, "share of the iterations in which it rises")
    train: int = flag(count, 2000, "number of Scenes to train heads on")
    test: int = flag(count, 1000, "number of Scenes to test on")
    split: str = flag(str, "test", "split of Scenes to test on")
    seed: int = flag(int, 0, "of the heads and their batches")


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
OPEN = {f.__name__: f for f in (pairs, voc, ade20k, cityscapes, nyu, kitti, sunrgbd, imagefolder)}


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
        if missing or not files:
            what = f"{len(missing)} of {len(files)} files are missing, as {missing[0]}" if files \
                else f"no picture in split {split}"
            raise ValueError(f"{what}; {wanted}")
        sets.append(replace(found, size=p.image_size, crop=p.crop, patch=patch))
    if data == "imagefolder" and not p.image_size:
        raise ValueError("--image-size 0: imagefolder cuts all pictures to one side; give it")
    if sets[0].labels != sets[1].labels:
        raise ValueError(f"train/ and val/ of {at} have other classes; {wanted}")
    return sets


# --------------------------------------------------------------------------------------------------
# Frozen features and linear heads.

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
    x = torch.cat([x, cls[:, None].expand_as(x)], 2) if p.cat_cls else x
    return x.unflatten(1, (img.shape[-2] // model.config.patch, -1)), image


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
        x = self.linear(self.norm(x.flatten(0, 2))).unflatten(0, x.shape[:3])
        if self.task == "depth":
            bins = torch.stack([self.bins, torch.ones_like(self.bins)], 1)  # (256, 2)
            total = x.relu() @ bins + 0.1 * bins.sum(0)  # weights are relu + 0.1
            x = total[..., :1] / total[..., 1:]
        x = rows @ x.movedim(-1, 1) @ columns.T
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
    return total / (batch["mask"] != 255).sum().clamp(min=1)


def train_heads(model: ViT, data: Pictures, index: Tensor, cache: dict, p: Protocol,
                workers: int) -> list[list[Head]]:
    """Train on the pictures `index` of a split, from cached features (x, mask, depth) or, without a
    cache, with the backbone in the loop. All at once: for every p.lr a list of one head a task."""
    device, patch = next(model.parameters()).device, model.config.patch
    draw, width = torch.Generator().manual_seed(p.seed), model.config.width * (1 + p.cat_cls)
    with torch.random.fork_rng(devices=[]):  # heads are made on the CPU
        torch.manual_seed(p.seed)
        one = [Head(t, width, len(data.classes), data.max_depth) for t in p.tasks if t in DENSE]
    heads = [nn.ModuleList(copy.deepcopy(one)).to(device) for _ in p.lr]
    groups = [{"params": h.parameters(), "lr": lr} for h, lr in zip(heads, p.lr)]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
    rise, n = max(p.warmup * p.iterations, 1), p.iterations
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / rise, (n - t) / max(n - rise, 1), 1))

    drawn = (index[torch.randint(len(index), (p.batch_size,), generator=draw)] for _ in range(n))
    if cache:
        stream = ({k: v[i.to(device)] for k, v in cache.items()} for i in drawn)
    else:
        crops = lambda i: [*zip(i.tolist(), torch.rand(len(i), 4, generator=draw).tolist())]
        stream = data.batches((crops(i) if p.crop else i.tolist() for i in drawn), workers)
    phase, s = torch.Generator().manual_seed(p.seed), max(patch // 2, 1)
    for batch in bar(stream, "training heads", n):
        batch = {k: v.to(device) for k, v in batch.items()}
        x = batch.pop("x") if cache else tokens(model, batch["image"], p)[0]
        # The loss looks at every s-th row and column, from a random first one: in the mean the same
        # as at all of them, for a part of the work.
        top, left = torch.randint(s, (2,), generator=phase).tolist()
        batch = {k: v for k, v in batch.items() if k in ("mask", "depth")}
        h, w = next(iter(batch.values())).shape[1:]
        batch = {k: v[:, top::s, left::s] for k, v in batch.items()}
        rows = bilinear(x.shape[1], h, device)[top::s]
        columns = bilinear(x.shape[2], w, device)[left::s]
        loss = sum(head_loss(head.task, head(x, rows, columns), batch)
                   for some in heads for head in some)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return [list(some.eval()) for some in heads]


@torch.no_grad()
def predict(model: ViT, heads: list[Head], img: Tensor, size, p: Protocol) -> dict[str, Tensor]:
    """uint8 (B, 3, H', W') -> logits and depth at `size` (H, W), in windows and mirrored as the
    protocol says."""
    (h, w), win = img.shape[-2:], p.window or max(img.shape[-2:])
    tops, lefts = ([*range(0, n - win, max(win * 2 // 3, 1)), max(n - win, 0)] for n in (h, w))
    total, times = {}, torch.zeros(h, w, device=img.device)
    for top, left in product(tops, lefts):
        at = ..., slice(top, top + win), slice(left, left + win)
        lines = [bilinear(n // model.config.patch, n, img.device) for n in img[at].shape[-2:]]
        x = tokens(model, img[at], p)[0]
        mirrored = tokens(model, img[at].flip(-1), p)[0] if p.flip else None
        for head in heads:
            out = head(x, *lines)
            out = (out + head(mirrored, *lines).flip(-1)) / 2 if p.flip else out
            total.setdefault(head.task, out.new_zeros(*out.shape[:-2], h, w))[at] += out
        times[at] += 1
    rows, columns = (bilinear(n, m, img.device) for n, m in zip((h, w), size))
    up = lambda v: v if (h, w) == tuple(size) else rows @ v @ columns.T
    return {task: up(v / times) for task, v in total.items()}


def knn(x: Tensor, labels: Tensor, test: Tensor, classes: int, k: int = 20) -> Tensor:
    """DINO's weighted k-NN: [CLS] (n, D), labels (n,), [CLS] (m, D) -> classes (m,). The k nearest
    by cosine vote, with weight exp(cosine / 0.07)."""
    x, out = F.normalize(x, dim=1), []
    for part in F.normalize(test, dim=1).split(256):
        cosine, near = (part @ x.T).topk(min(k, len(x)), dim=1)
        votes = F.one_hot(labels[near], classes) * torch.exp(cosine / 0.07)[..., None]
        out.append(votes.sum(1).argmax(1))
    return torch.cat(out)


RATES = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


def classify(x: Tensor, weight: Tensor, parts: Tensor) -> Tensor:
    """x (m, D), weight (P, D, R, classes), factors of the input (P, D) -> classes (P, m, R)."""
    return torch.cat([torch.einsum("pmd,pdrc->pmrc", part * parts[:, None], weight).argmax(-1)
                      for part in x.split(1000)], 1)


def softmax_regression(x: Tensor, labels: Tensor, folds: list[Tensor], classes: int, parts: Tensor,
                       rates: Tensor, seed: int, iterations: int, batch: int = 128):
    """Linear layers on x (n, D), all at once: one for each of F folds (numbers of the pictures it
    sees), P parts (P, D) (factors of the input), R rates. -> weights (F, P, D, R, classes)."""
    draw, shape = torch.Generator().manual_seed(seed), (len(folds), len(parts))
    weight = (0.01 * torch.randn(x.shape[1], classes, generator=draw)).to(x.device)
    weight = weight.repeat(*shape, 1, len(rates)).requires_grad_()  # (F, P, D, R classes)
    optimizer = torch.optim.SGD([weight], lr=1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        i = [fold[torch.randint(len(fold), (batch,), generator=draw)] for fold in folds]
        i = torch.stack(i)[:, None].to(x.device)  # (F, 1, batch)
        out = ((x[i] * parts[:, None]) @ weight).unflatten(-1, (-1, classes))
        truth = labels[i][..., None].expand(out.shape[:-1])  # (F, P, batch, R)
        loss = F.cross_entropy(out.movedim(-1, 1), truth, reduction="none").mean(2)
        optimizer.zero_grad()
        (loss * rates).sum().backward()  # a rate is a factor on its own layer's gradient
        optimizer.step()
        schedule.step()
    return weight.detach().unflatten(-1, (-1, classes))


def linear(x: Tensor, labels: Tensor, test: Tensor, classes: int, seed: int) -> tuple[Tensor, str]:
    """[CLS] beside the mean patch, (n, 2 D) and (m, 2 D) -> classes (m,), and the input and rate
    that five-fold cross-validation in the training set chose."""
    x, test = (F.pad(v, (0, 1), value=1) for v in (x, test))  # the bias
    parts, rates = torch.ones(2, x.shape[1], device=x.device), x.new_tensor(RATES)
    parts[0, x.shape[1] // 2 : -1] = 0  # [CLS] alone
    every, right, iterations = torch.arange(len(x)), 0, max(2000, 10 * len(x) // 128)
    seen = [every[every % 5 != k] for k in range(5)]
    weight = softmax_regression(x, labels, seen, classes, parts, rates, seed, iterations)
    for k in range(5):
        held = (every % 5 == k).to(x.device)
        right = right + (classify(x[held], weight[k], parts) == labels[held][:, None]).sum(1)
    part, rate = divmod(right.argmax().item(), len(rates))
    parts, rates = parts[part, None], rates[rate, None]
    weight = softmax_regression(x, labels, [every], classes, parts, rates, seed, iterations)
    guess = classify(test, weight[0], parts)[0, :, 0]
    return guess, f"{('[CLS]', '[CLS] and mean patch')[part]}, lr {RATES[rate]:g}"


# --------------------------------------------------------------------------------------------------
# Metrics.


def confusion(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Class maps (B, H, W) -> counts (B, classes, classes), row = truth; truth 255 is ignored."""
    pair = torch.where(truth == 255, classes**2, truth.long() * classes + predicted)
    pair = pair + torch.arange(len(pair), device=pair.device)[:, None, None] * (classes**2 + 1)
    counts = torch.bincount(pair.flatten(), minlength=len(truth) * (classes**2 + 1))
    return counts.view(len(truth), -1)[:, :-1].unflatten(1, (classes, classes))


def class_iou(counts: Tensor) -> Tensor:
    """(..., C, C) -> intersection over union per class (..., C), in [0, 1]; NaN: nobody has it."""
    hit = counts.diagonal(dim1=-2, dim2=-1).double()
    return hit / (counts.sum(-1) + counts.sum(-2) - hit)


def depth_errors(predicted: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Depths p, t (B, H, W) in metres -> per picture (B,), over its valid pixels, t > 0: rmse
    sqrt(mean((p - t)^2)), metres; absrel mean(|p - t| / t); delta1, % of max(p / t, t / p) < 1.25.
    NaN where none is valid."""
    valid = truth > 0
    mean = lambda v: (v * valid).flatten(1).sum(1) / valid.flatten(1).sum(1)
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
    once, many = ([scores(s, w) for s in (a, b)] for w in (None, weight))
    for k in once[0]:
        interval = (many[1][k] - many[0][k]).quantile(torch.tensor([0.025, 0.975]).double())
        out[k] = ((once[1][k] - once[0][k]).item(), *interval.tolist())
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
        shown = {"image": batch["image"]}
        for task, kind in zip(DENSE, ("mask", "depth")):
            if task in out:
                shown |= {f"true {task}": batch[kind], f"predicted {task}": out[task]}
        for i in range(min(len(batch["image"]), keep - len(shots))):
            shots.append({k: v[i].cpu() for k, v in shown.items()})
    stats = {k: torch.cat(v) for k, v in stats.items()}
    if "counts" in stats and not stats["counts"].any():
        raise ValueError("no picture has a pixel with a class: all masks are 255, ignored")
    if "rmse" in stats and stats["rmse"].isnan().all():
        raise ValueError(f"no picture has valid depth, above 0 and up to {data.max_depth:g} m; the "
                         f"first is {data.rows[index[0]]['depth']}")
    return stats, shots


def evaluate(model: ViT, data: str = "scenes", root: str = "", p: Protocol | None = None,
             workers: int = 0, keep: int = 0, cache_gib: float = 4.0) -> tuple[dict, dict, list]:
    """All tasks of a protocol, on a frozen model in eval mode, on its device.

    Returns the result (metrics as in `scores`, IoU per class in %, protocol, seconds), the numbers
    of every test picture, and pictures with predictions. Features of whole pictures are computed
    once if they and their labels take no more than cache_gib. ValueError: whatever is wrong with
    the data or the protocol.
    """
    start, p, patch = time.time(), p or PROTOCOLS[data], model.config.patch
    device = next(model.parameters()).device
    if p.layer is not None and not 1 <= p.layer <= model.config.depth:
        raise ValueError(f"--layer {p.layer} is outside 1 to {model.config.depth}, the depth here")
    whole = lambda side: side and max(round(side / patch), 1) * patch
    p = replace(p, crop=whole(p.crop), window=whole(p.window))
    train, test = open_set(data, root, p, patch, device)
    kinds = set.intersection(*(set(s.memory or s.rows[0]) for s in (train, test)))
    has = [t for t, k in zip(TASKS, ("mask", "depth", "label", "label")) if k in kinds]
    if p.tasks != PROTOCOLS[data].tasks and set(p.tasks) - set(has):
        raise ValueError(f"--tasks {','.join(p.tasks)}: here {data} has what it takes for "
                         f"{','.join(has)} only")
    p = replace(p, tasks=tuple(t for t in p.tasks if t in has))
    if len(train) < 2 and ("cls" in p.tasks or len(p.lr) > 1):
        raise ValueError("one training picture is too few to choose a learning rate by; give more")
    dense, image = (set(p.tasks) & set(kind) for kind in (DENSE, ("cls", "knn")))

    every, known, chosen, heads = torch.arange(len(train)), {}, {}, []
    h, w = (train.memory["image"][0] if train.memory else train[0]["image"]).shape[-2:]
    bytes_each = h * w * (4 * model.config.width * (1 + p.cat_cls) / patch**2 + 5)
    once = dense and not p.crop and len(train) * bytes_each <= cache_gib * 2**30
    if once or image:
        order = [i.tolist() for i in every.split(50)]
        stream = bar(train.batches(order, workers), "frozen features", len(order))
        for i, batch in zip(order, stream):
            x, y = tokens(model, batch["image"].to(device), p)
            for k, v in (batch | {"x": x, "y": y}).items():
                if k in ("y", "label") or (once and k in ("x", "mask", "depth")):
                    if k not in known:
                        known[k] = v.new_empty(len(train), *v.shape[1:], device=device)
                    known[k][i] = v.to(device)
    if dense:
        held = every % 10 == 0 if len(p.lr) > 1 else every < 0
        cache = {k: known.pop(k) for k in ("x", "mask", "depth") if k in known}
        tried = train_heads(model, train, every[~held], cache, p, workers)
        sound = [all(v.isfinite().all() for h in some for v in h.parameters()) for some in tried]
        tried = [(lr, some) for lr, some, ok in zip(p.lr, tried, sound) if ok]
        if not tried:
            raise ValueError(f"the heads diverged with --lr {','.join(map(str, p.lr))}; lower it")
        only = replace(p, tasks=tuple(dense))
        won = [scores(judge(model, some, train, every[held], only, workers)[0])
               for _, some in tried if held.any()] or [{}]
        for task in (h.task for h in tried[0][1]):  # the rate that is best on those held back
            loss = [-s.get("miou", 0) if task == "seg" else s.get("rmse", 0) for s in won]
            lr, some = tried[loss.index(min(loss))]
            heads += [h for h in some if h.task == task]
            chosen[task] = f"lr {lr:g}"
    stats, shots = judge(model, heads, test, torch.arange(len(test)), p, workers, keep)
    if "cls" in p.tasks:
        sets, n = (known["y"], known["label"], stats["image"]), len(train.labels)
        guess, chosen["cls"] = linear(*sets, n, p.seed)
        stats["linear"] = 100.0 * (guess == stats["label"])
    if "knn" in p.tasks:
        cls, test_cls = (y[:, : model.config.width] for y in (known["y"], stats["image"]))
        guess = knn(cls, known["label"], test_cls, len(train.labels))
        stats["knn"] = 100.0 * (guess == stats["label"])
    result = {k: v.item() for k, v in scores(stats).items()}
    if "counts" in stats:
        result["iou"] = dict(zip(test.classes, (100 * class_iou(stats["counts"].sum(0))).tolist()))
    protocol = asdict(replace(p, train=len(train), test=len(test))) | {"height": h, "width": w}
    result |= {"chosen": chosen, "protocol": protocol, "versions": versions(),
               "device": str(device), "seconds": round(time.time() - start, 1)}
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


def record(file: Path, key: str, result: dict) -> None:
    """Write a result to a JSON file; what is there under other names stays."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(".tmp")
    try:
        results = json.loads(file.read_text()) if file.exists() else {}
    except ValueError:
        raise ValueError(f"{file} is damaged, this result is not in it; move it away") from None
    beside.write_text(json.dumps(results | {key: result}, indent=1))
    os.replace(beside, file)


def home(path: Path) -> Path:
    """Where the results of a checkpoint go: its run folder; runs/FILE, if it has none."""
    return path.parent if path.name == "last.pt" else Path("runs") / path.stem


def title(network: str, data: str, root: str) -> str:
    """The first words of a result's name in eval.json; then come the options that were changed."""
    place = [Path(root).name] if data in ("pairs", "imagefolder") and root else []
    return " ".join([network, data, *place])


def line(result: dict) -> str:
    return "  ".join(f"{k} {text.format(result[k])}" for k, text in METRICS.items() if k in result)


def sheet(path, shots: list[dict], classes: int) -> None:
    """A column a picture, as a PNG: picture; classes, true and predicted; depth, the same.
    Ignored classes and missing depth are black; near is bright, far is dark."""
    k = torch.arange(256)
    colours = hsv(k * 0.381966 % 1, 0.4 + 0.2 * (k % 3), 0.95 - 0.18 * (k % 4)).T
    colours[classes:] = 0
    ramp = torch.tensor([[1, 0.96, 0.68], [0.99, 0.62, 0.36], [0.80, 0.26, 0.43],
                         [0.42, 0.16, 0.50], [0.15, 0.12, 0.38], [0.15, 0.12, 0.38]])

    def paint(kind, x, near, far):
        if kind == "image":
            return x / 255
        if "depth" not in kind:
            return colours[x.long()].movedim(-1, 0)
        at = 4 * ((x - near) / (far - near + 1e-6)).clamp(0, 1)
        colour = torch.lerp(ramp[at.long()], ramp[at.long() + 1], at.frac()[..., None])
        return (colour * (x > 0)[..., None]).movedim(-1, 0)

    tiles, size = [], list(shots[0]["image"].shape[-2:])
    for kind, shot in product(shots[0], shots):
        depth = shot.get("true depth", torch.ones(1))
        depth = depth[depth > 0] if (depth > 0).any() else torch.ones(1)
        tile = paint(kind, shot[kind], depth.min(), depth.max())
        tiles.append(TF.resize(tile, size, InterpolationMode.NEAREST_EXACT))
    save_image(torch.stack(tiles), path, nrow=len(shots))


def parse(argv) -> argparse.Namespace:
    raw, cuda = argparse.RawDescriptionHelpFormatter, torch.cuda.is_available()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("runs", nargs="*", help="run folders, or checkpoints in them")
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
    g.add_argument("--workers", type=int, default=8 if cuda else 2, help="processes to read files")
    g.add_argument("--save-pictures", type=int, default=0, metavar="N",
                   help="draw N test pictures, truth and prediction, into the run folder")
    g.add_argument("--sheet", metavar="PNG", help="draw Scenes into this file, and stop")
    return p.parse_args(argv)


def run(args) -> None:
    if args.sheet:
        scenes = Scenes("test", 96)(torch.arange(8))
        names = {"image": "image", "mask": "true seg", "depth": "true depth"}
        shots = [{name: scenes[k][i] for k, name in names.items()} for i in range(8)]
        return sheet(args.sheet, shots, len(SCENE_CLASSES))
    if not args.runs:
        raise ValueError("give a run folder, as in: python eval_dense.py runs/NAME")
    if args.tasks and (unknown := set(args.tasks) - set(TASKS)):
        raise ValueError(f"--tasks: unknown {', '.join(unknown)}; choose from {', '.join(TASKS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: torch sees no GPU here; give --device cpu")
    p, first, sizes = PROTOCOLS[args.data], None, []
    changed = {f.name: getattr(args, f.name) for f in fields(p)}
    changed = {k: v for k, v in changed.items() if v is not None and v != getattr(p, k)}
    idle = {"scenes": {"crop"}}.get(args.data, {"train", "test", "split"})
    if args.data == "imagefolder":
        idle = changed.keys() - {"tasks", "image_size", "layer", "seed"}
    if unused := changed.keys() & idle:
        raise ValueError(f"--data {args.data} has no use for --{min(unused).replace('_', '-')}")
    text = lambda v: ",".join(map(str, v)) if isinstance(v, tuple) else str(v)
    options = [f"{k}={text(v)}" for k, v in changed.items()]
    key = " ".join([title(args.network, args.data, args.root), *options])
    paths = [Path(name) / "last.pt" if Path(name).is_dir() else Path(name) for name in args.runs]
    models = [clsspec.load(path, args.network) for path in paths]
    for out in map(home, paths):  # before hours of work
        if not os.access(next(p for p in (out, *out.parents) if p.exists()), os.W_OK):
            raise ValueError(f"{out} cannot be written to, and results would go there")
    for name, path, model in zip(args.runs, paths, models):
        result, stats, shots = evaluate(model.to(args.device), args.data, args.root,
                                        replace(p, **changed), args.workers, args.save_pictures)
        print(f"{name}: {key}, {result['seconds']:.0f} s\n  {line(result)}")
        record(home(path) / "eval.json", key, result)
        sizes.append("{height} x {width} px".format(**result["protocol"]))
        if shots:
            file = home(path) / f"{key.replace(' ', '-')}.png"
            sheet(file, shots, len(result.get("iou", ())))
            print(f"  {file}")
        if first:
            print(f"  minus {args.runs[0]}, with 95 % intervals over test pictures"
                  + (f", which it saw at {sizes[0]}, this one at {sizes[-1]}:"
                     if sizes[-1] != sizes[0] else ":"))
            for k, (d, low, high) in difference(first, stats).items():
                print(f"    {k:7}{d:+9.4f}   [{low:+.4f}, {high:+.4f}]")
        first = first or stats


def main(argv=None) -> None:
    try:
        run(parse(argv))
    except (ValueError, OSError) as err:
        sys.exit(f"error: {str(err).strip().splitlines()[-1].removeprefix('ValueError: ')}")


if __name__ == "__main__":
    main()
