"""What the two papers measure, of your own models or of public weights, as numbers and pictures.

    python analyze.py runs/plain runs/spec                     # everything, both in one plot
    python analyze.py dino_deitsmall16_pretrain.pth            # the same of public weights
    python analyze.py runs/spec --what cosines,pca --data path/to/pictures
    python analyze.py --compare "runs/plain-*" "runs/spec-*"   # two groups, paired over seeds

Numbers go to analysis.json in --out, pictures to NAME.png beside it; all but pca.png and maps.png
need matplotlib. By default --out is the first model's folder (another model's numbers then go to
its own folder, too), runs/FILE for a file of weights, and for --compare the folder that all runs
are in. P1: arXiv 2602.08626, P2: arXiv 2605.23868. "Ours": we know of no formula in them.

cosines      Mean cosine, in [-1, 1], of [CLS] with patches and of patches with other patches, at
             four points of a block: `before norm`, what enters it; `after norm`, what leaves norm1;
             `attention`, the branch after out-projection and LayerScale; `after attention`, the
             residual stream with it. The last row is the final norm. (P1; where exactly: ours)
             Of a block's patches after the final norm: `shared`, length of the mean of a picture's
             unit patches, 1 if all are alike; `neighbours`, mean cosine of adjacent patches minus
             that of all pairs, raw and with the picture's mean patch subtracted (ours)
dimensions   Mean |activation| of each dimension, of [CLS] and of patches, before and after norm1.
             `overlap`: sum_d min(a_d, b_d), both scaled to sum 1: 1 if they are equally large, 0 if
             no dimension is shared (ours). `gain`: mean |gain| of norm1 for [CLS] (for patches), on
             the tenth of the dimensions in which [CLS] (patches) are largest; `gains_cosine`: of
             the two gain vectors. gains.png: both, dimension by dimension, in one block. (P1)
norms        L2 norm of patches that leave a block; `outliers`: % of patches above three medians,
             `on_border`: % of those in the outermost ring, by chance 23 of 16 x 16 patches (ours;
             P1's rows with registers and attention bias are about them). A sentence names the block
             with most of them
attention    Of patches as queries: `entropy`, nats; `support`, number of keys with weight above 0;
             `distance` to the patches looked at, in patches; `to_cls`, `to_registers`, `to_bias`, %
             of the weight. Of [CLS]: `cls_entropy`, `cls_support`. There is a number for each head;
             tables and plots show means. Only models on equal grids can be compared. (P2)
foreground   How well each block's patches, after the final norm, tell foreground from background:
             area under the ROC curve (0.5: not at all), mean over pictures, of cos(patch, [CLS]),
             `auc_cls`, and of the first principal component of all pictures' patches, with the
             better of its two signs, `auc_pc`.
             Colour alone can do that, so look at --network untrained, too; and a block that does it
             well may be worse in a linear probe, `eval_dense.py RUN --tasks seg --layers BLOCK`.
             Needs masks: scenes, voc, pairs; --background says what is not foreground. (P2;
             formulas ours)
degradation  The teacher's online probe in log.jsonl: each metric over steps, its best, its last,
             and what was lost since the best, in its unit. (P2, dense degradation)
pca          A column for each picture, a row for each model: three principal components of the last
             block's (or --block's) patches as RGB, fitted to all --pictures, in the order and with
             the signs that fit the first model's best. `share`: % of the variance. (P1, P2)
maps         A column for each picture. For each model and head of --block: where [CLS] looks, each
             patch as bright as its weight, brightest the head's largest on that picture; the table
             says how much weight is on patches, on [CLS] itself, registers and bias. Then how much
             the block's patches are like one of them, --patch, framed: brightest is cosine 1, black
             0 or less
"""

import argparse
import glob
import math
import os
import sys
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from itertools import permutations, zip_longest
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as in train.py

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import draw_bounding_boxes

try:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullFormatter
except ImportError:  # numbers alone
    Figure = None

import clsspec
import eval_dense
import scenes
from clsspec import ViT, need, whole_patches
from eval_dense import (LOWER, METRICS, forward_gib, intact, need_memory, need_writable, one_line,
                        read_json, read_log, read_picture, scenes_gib, strict, within)

WHAT = ("cosines", "dimensions", "norms", "attention", "foreground", "degradation", "pca", "maps")
# These have numbers before and after norm1, whose lists end with one more, of the final norm.
FINAL = "cosines", "dimensions"
POINTS = ("before norm", "after norm", "attention", "after attention")

# --------------------------------------------------------------------------------------------------
# The walk: a forward pass, block by block, that shows what is inside.


@dataclass
class Step:
    """One block (or the final norm, without `attention`) on B pictures. Tokens are (B, T, D), rows
    [CLS, registers, patches]; in CaiT [CLS] is missing at first, and later it alone is updated."""

    points: dict[str, Tensor]  # tokens at POINTS
    out: Tensor  # tokens that leave the block
    final: Tensor  # the same after the model's final norm
    attention: Tensor | None  # (B, H, queries, keys)
    first: int  # row of the first patch
    cls: bool  # row 0 is [CLS]
    bias: int  # 1: key 0 is the attention bias
    grid: tuple[int, int]  # patches: rows, columns


@torch.no_grad()
def walk(model: ViT, img: Tensor):
    """Yield a Step for every block, and one for the final norm. img: (B, 3, H, W), normalised."""
    c = model.config
    grid = (img.shape[-2] // c.patch, img.shape[-1] // c.patch)
    cls, x = model.embed(img)  # (B, 1, D), (B, R + N, D)
    # The same as ViT.forward and Block.forward, step by step, so that each can be looked at.
    for i, block in enumerate(model.blocks):
        joined = i >= model.join
        if i == model.join:
            x = torch.cat([cls, x], dim=1)  # (B, T, D)
        normed = block.norm1(x)
        q, k, v = block.attn.queries_keys_values(normed)  # (B, H, T, d)
        if isinstance(block, clsspec.ClassBlock):
            q = q[:, :, :1]  # only [CLS] has a query
        # Fused attention, which training uses where it pays, would not show the weights.
        weights = block.attn.weights(q, k)  # (B, H, queries, keys)
        mixed = rearrange(weights @ v, "b h t d -> b t (h d)")
        branch = block.ls1(block.attn.proj(mixed))
        n, after = branch.shape[1], x.clone()  # (B, T, D); rows without a query stay as they are
        after[:, :n] += branch
        out = after.clone()
        out[:, :n] += block.ls2(block.mlp(block.norm2(after[:, :n])))
        points = dict(zip(POINTS, (x, normed, branch, after)))
        yield Step(points, out, model.norm(out), weights, c.registers + joined, joined,
                   int(c.attn_bias), grid)
        x = out
    normed = model.norm(x)
    points = dict(zip(POINTS, (x, normed)))
    yield Step(points, normed, normed, None, 1 + c.registers, True, 0, grid)


# What is kept of a step: numbers for each picture, (B, ...); NaN where there is no [CLS].


def patch_cosine(unit: Tensor) -> Tensor:
    """Mean cosine of two different patches of a picture, of (B, N, D) of length 1: (B,)."""
    n = unit.shape[1]
    # The sum of all N^2 cosines is the squared length of the sum of unit vectors, so no N x N
    # matrix is needed. The N cosines of a patch with itself, 1 each, are taken off.
    return (unit.sum(1).square().sum(1) - n) / (n * (n - 1))


def cosines(step: Step) -> dict[str, Tensor]:
    """Mean cosine of [CLS] with patches, and of patches with other patches, at each point: (B,)."""
    kept = {}
    # Four points: do [CLS] and patches drift apart in the norm, in attention, or in the residual?
    for point, x in step.points.items():
        unit = F.normalize(x.float(), dim=-1)
        patches = unit[:, step.first :]
        cls = unit[:, 0] if step.cls else math.nan
        kept[f"{point} cls_patch"] = (cls * patches.sum(1)).sum(1) / patches.shape[1]
        kept[f"{point} patch_patch"] = patch_cosine(patches)
    if step.attention is None:  # the final norm's step: the last block's `final` is the same
        return kept
    patches = F.normalize(step.final[:, step.first :].float(), dim=-1)
    kept["shared"] = patches.mean(1).norm(dim=-1)
    kept["neighbours"] = neighbour_excess(patches, step.grid)
    # Once more without what all patches share, which makes any two of them alike.
    centred = patches - patches.mean(1, keepdim=True)
    kept["neighbours centred"] = neighbour_excess(centred, step.grid)
    return kept


def neighbour_excess(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches (B, N, D) -> how much more alike neighbours are than any two, in cosine: (B,)."""
    unit = F.normalize(x, dim=-1)
    # Subtracted below: if all patches are alike, it says nothing that neighbours are.
    every = patch_cosine(unit)
    unit = unit.unflatten(1, grid)  # (B, h, w, D)
    beside = (unit[:, :, 1:] * unit[:, :, :-1]).sum(-1).flatten(1)
    below = (unit[:, 1:] * unit[:, :-1]).sum(-1).flatten(1)
    return torch.cat([beside, below], dim=1).mean(1) - every


def dimensions(step: Step) -> dict[str, Tensor]:
    """Mean |activation| of every dimension before and after norm1, of [CLS] and patches: (B, D)."""
    kept = {}
    for point in POINTS[:2]:
        x = step.points[point].float().abs()
        kept[f"{point} cls"] = x[:, 0] if step.cls else torch.full_like(x[:, 0], math.nan)
        kept[f"{point} patch"] = x[:, step.first :].mean(1)
    return kept


def norms(step: Step) -> dict[str, Tensor]:
    """L2 norm of the patches that leave the block: (B, N)."""
    return {"norm": step.out[:, step.first :].float().norm(dim=-1)}


def attention(step: Step) -> dict[str, Tensor]:
    """Entropy (nats), support (keys), distance (patches) and mass (%) of attention: (B, H)."""
    w = step.attention.float()  # (B, H, queries, keys); keys are [bias, CLS, registers, patches]
    seen = step.first + step.bias  # the first patch among the keys
    # -w log w, and 0 where w is 0, as entmax makes many.
    entropy = -torch.xlogy(w, w).sum(-1)  # (B, H, queries)
    support = (w > 0).float().sum(-1)
    nothing = torch.full_like(entropy[:, :, 0], math.nan)
    kept = {"cls_entropy": entropy[:, :, 0] if step.cls else nothing,
            "cls_support": support[:, :, 0] if step.cls else nothing,
            "entropy": entropy[:, :, step.first :].mean(-1),
            "support": support[:, :, step.first :].mean(-1)}

    w = w[:, :, step.first :]  # patches as queries; CaiT's last blocks have none: NaN
    rows, columns = (torch.arange(n, device=w.device) for n in step.grid)
    at = torch.cartesian_prod(rows, columns).float()  # (N, 2)
    far = torch.cdist(at, at)[: w.shape[2]]  # (N, N)
    to_patches = w[..., seen:]
    # Other tokens are in no place, so distances are weighted by what patches get.
    distance = (to_patches * far).sum(-1) / to_patches.sum(-1)
    kept["distance"] = distance.nanmean(-1)  # with entmax patches may get nothing
    mass = 100 * w.mean(2)  # (B, H, keys)
    kept["to_bias"] = mass[..., : step.bias].sum(-1)
    kept["to_cls"] = mass[..., step.bias] if step.cls else nothing
    kept["to_registers"] = mass[..., step.bias + step.cls : seen].sum(-1)
    return kept


def features(step: Step) -> dict[str, Tensor]:
    """Patches after the final norm (B, N, D), in half precision; their cosine with [CLS], (B, N);
    and [CLS]'s attention weights in each head, (B, H, keys). NaN where there is no [CLS]."""
    patches, cls = step.final[:, step.first :], step.final[:, :1]
    looks = step.attention[:, :, 0].float()
    if not step.cls:
        cls, looks = torch.full_like(cls, math.nan), torch.full_like(looks, math.nan)
    # Half precision, as features of all blocks and pictures are held at once.
    return {"patches": patches.half(), "cosine": F.cosine_similarity(patches, cls, dim=-1),
            "looks": looks}


def survey(model: ViT, img: Tensor, keeps, batch: int = 8) -> dict[str, dict]:
    """Walk uint8 pictures (P, 3, H, W) through a model, and keep what the functions `keeps` make of
    each step -> {function: {name: [a tensor (P, ...) for each block]}}."""
    device = next(model.parameters()).device
    kept = defaultdict(lambda: defaultdict(list))  # {(function, name): {block: [of each batch]}}
    parts = img.split(batch)  # few at once: a step holds all heads' attention
    for part in eval_dense.bar(parts, "walking", len(parts)):
        for i, step in enumerate(walk(model, clsspec.normalise(part.to(device) / 255))):
            for keep in keeps:
                if step.attention is None and keep.__name__ not in FINAL:
                    continue  # the final norm is no block
                for name, value in keep(step).items():
                    # Off the GPU, to make room for the next batch; and a copy, as a slice would
                    # keep the whole step in memory.
                    kept[keep.__name__, name][i].append(value.cpu().clone())
    out = defaultdict(dict)
    for (function, name), blocks in kept.items():
        # Popped one by one, as the features of all blocks are large.
        out[function][name] = [torch.cat(blocks.pop(i)) for i in sorted(blocks)]
    return out


# --------------------------------------------------------------------------------------------------
# From what was kept to the numbers of analysis.json: lists with one number for each block.


@dataclass
class Subject:
    """A model that is analysed, and the pictures it sees."""

    name: str
    home: Path  # folder of its results
    model: ViT
    img: Tensor  # uint8 (P, 3, S, S)
    mask: Tensor | None  # classes (P, S, S), 255 ignored
    grid: tuple[int, int]  # patches: rows, columns
    args: argparse.Namespace


def means(kept: dict[str, list[Tensor]], s=None) -> dict[str, list]:
    """Means over pictures: for each block a number, or a list of one for each head or dimension."""
    return {name: [v.double().mean(0).tolist() for v in blocks] for name, blocks in kept.items()}


def dimension_numbers(kept: dict, s: Subject) -> dict[str, list]:
    """See `dimensions` at the top."""
    out = means(kept)
    layers = [block.norm1 for block in s.model.blocks] + [s.model.norm]
    for point in POINTS[:2]:
        cls, patch = (torch.tensor(out[f"{point} {who}"]) for who in ("cls", "patch"))
        # Scaled to sum 1: the question is which dimensions are large, not how large all are.
        cls, patch = (x / x.sum(1, keepdim=True) for x in (cls, patch))  # (blocks + 1, D)
        out[f"{point} overlap"] = torch.minimum(cls, patch).sum(1).tolist()
    for who in ("cls", "patch"):
        # A plain norm has one gain vector for both.
        own = [getattr(n, who) if isinstance(n, clsspec.Specialised) else n for n in layers]
        gain = torch.stack([norm.weight.detach().float().cpu() for norm in own])  # (blocks + 1, D)
        size = torch.tensor(out[f"before norm {who}"])
        top = size.topk(max(size.shape[1] // 10, 1), dim=1).indices
        known = size.isfinite().all(1)  # CaiT has no [CLS] at first
        out[f"{who} gain"] = gain.tolist()
        mean = gain.abs().gather(1, top).mean(1)
        out[f"gain on {who} dims"] = mean.where(known, math.nan).tolist()
    gains = torch.tensor(out["cls gain"]), torch.tensor(out["patch gain"])
    out["gains_cosine"] = F.cosine_similarity(*gains, dim=1).tolist()
    return out


def norm_numbers(kept: dict, s: Subject) -> dict[str, list]:
    """See `norms` at the top."""
    border = torch.ones(s.grid, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    out = defaultdict(list)
    for v in kept["norm"]:  # (P, N)
        # A model that stores global information in some patches makes those far longer. Lengths are
        # measured in medians, as they grow from block to block, and outliers would move a mean.
        odd = v > 3 * v.median()  # of all pictures together
        out["median"].append(v.median().item())
        # The largest of thousands of patches may be a single odd one; a hundredth is a group.
        out["p99"].append(v.quantile(0.99).item())
        out["largest"].append(v.max().item())
        out["outliers"].append(100 * odd.double().mean().item())
        out["on_border"].append((100 * (odd & border.flatten()).sum() / odd.sum()).item())
    return dict(out)


def auc(score: Tensor, truth: Tensor) -> float:
    """Area under the ROC curve: how often a true one scores above a false one; ties count half."""
    # Over all pairs, so no threshold is needed, and it does not matter how many are true.
    a, b = score[truth][:, None], score[~truth]
    return ((a > b).double() + (a == b).double() / 2).mean().item()


def components(x: Tensor, k: int) -> tuple[Tensor, list[float]]:
    """The first k principal components (P, N, k) of features (P, N, D), fitted to all patches; and
    the % of the variance that each has."""
    x = x.double() - x.double().mean((0, 1))
    patches = x.flatten(0, 1)
    # The D x D matrix has the same axes as the one of patches by dimensions, and is far smaller.
    size, axes = torch.linalg.eigh(patches.T @ patches)  # from the smallest to the largest
    return x @ axes.flip(1)[:, :k], (100 * size.flip(0)[:k] / size.sum()).tolist()


def patch_labels(mask: Tensor, grid) -> Tensor:
    """Class maps (P, H, W), 255 ignored -> the commonest class of each patch (P, N), 255: none."""
    patches = rearrange(mask.long(), "p (h a) (w b) -> p (h w) (a b)", h=grid[0], w=grid[1])
    # A patch has one feature vector, so it gets one class, by a vote of its pixels.
    classes = range(1 + int(mask[mask != 255].max()))
    pixels = torch.stack([(patches == c).sum(-1) for c in classes], dim=-1)
    return torch.where(pixels.sum(-1) > 0, pixels.argmax(-1), 255)


def foreground_numbers(kept: dict, s: Subject) -> dict[str, list]:
    """See `foreground` at the top. Pictures of foreground or background alone do not count; NaN if
    no other is left. ValueError: there are no masks."""
    need(s.mask is not None and s.mask.min() < 255, "it wants masks: --data scenes, voc or pairs")
    labels = patch_labels(s.mask, s.grid)  # (P, N)
    usual = (0, 1, 2, 3) if s.args.data == "scenes" else (0,)
    behind = torch.isin(labels, torch.tensor(s.args.background or usual))
    known = labels != 255
    front = known & ~behind
    # Picture by picture, as scores of patches in different pictures need not be comparable.
    both = [i for i in range(len(labels)) if front[i].any() and behind[i].any()]

    def mean(score: Tensor) -> float:  # (P, N)
        if score.isnan().any() or not both:
            return math.nan
        return sum(auc(score[i][known[i]], front[i][known[i]]) for i in both) / len(both)

    first = [mean(components(x, 1)[0][..., 0]) for x in kept["patches"]]
    return {"auc_cls": [mean(cosine) for cosine in kept["cosine"]],
            "auc_pc": [max(found, 1 - found) for found in first]}  # a component has no sign


def degradation(kept: dict, s: Subject) -> dict[str, dict]:
    """{metric of the online probe: steps and values, best, last, and what was lost since the best}.
    ValueError: no log, no probe in it."""
    log = s.home / "log.jsonl"
    need(log.exists(), "only runs of train.py have a log, public weights have none")
    lines, out = read_log(log), {}
    for name in METRICS:
        with intact(log):
            found = {line["step"]: float(line[name]) for line in lines if name in line}
        if found:
            best_step = (min if name in LOWER else max)(found, key=found.get)
            # Compared with the best, not the first: patches may get better and then worse.
            best, last = found[best_step], [*found.values()][-1]
            out[name] = {"steps": [*found], "values": [*found.values()], "best": best,
                         "best_step": best_step, "last": last, "lost": abs(last - best)}
    need(out, f"{log} has no online probe; train with --probe-every 500")
    return out


# --------------------------------------------------------------------------------------------------
# The table of measures: numbers, printed tables and figures all come from it.

WORDS = {"miou": "segmentation, mIoU", "rmse": "depth, RMSE", "absrel": "depth, relative error",
         "delta1": "depth, within a factor of 1.25", "linear": "classes, linear probe",
         "knn": "classes, k-NN"}
UNITS = {name: text.split("}")[1].strip() or "ratio" for name, text in METRICS.items()}

# For each output: a function that returns what is kept of a Step; one that sums that up over all
# pictures of a Subject; and panels of its figure, which are also columns of its table: title, unit,
# decimals in the table, {what a line is called: its name in analysis.json}.
MEASURES = {
    "cosines": (cosines, means, [
        (point, "mean cosine", 3,
         {"[CLS]-patch": f"{point} cls_patch", "patch-patch": f"{point} patch_patch"})
        for point in POINTS] + [
        ("patches share", "length of the mean unit patch", 3, {"shared part": "shared"}),
        ("neighbour excess", "cosine minus that of all pairs", 3,
         {"raw": "neighbours", "centred": "neighbours centred"})]),
    "dimensions": (dimensions, dimension_numbers, [
        ("shared dimensions", "overlap: 1 the same, 0 disjoint", 3,
         {"before norm": "before norm overlap", "after norm": "after norm overlap"}),
        ("gain on largest tenth", "mean |gain| of norm1", 3,
         {"of [CLS]": "gain on cls dims", "of patches": "gain on patch dims"}),
        ("gains of norm1", "cosine", 3, {"[CLS]-patch": "gains_cosine"})]),
    "norms": (norms, norm_numbers, [
        ("patches", "L2 norm", 3, {"median": "median", "99th perc.": "p99", "largest": "largest"}),
        ("outliers", "% of patches", 2, {"> 3 medians": "outliers"}),
        ("outliers", "% of outliers", 1, {"on border": "on_border"})]),
    "attention": (attention, means, [
        ("entropy of attention", "nats, mean over heads", 3,
         {"patches": "entropy", "[CLS]": "cls_entropy"}),
        ("support of attention", "keys with a weight, mean over heads", 0,
         {"patches": "support", "[CLS]": "cls_support"}),
        ("patches look", "distance in patches, mean over heads", 2, {"how far": "distance"}),
        ("patches look at", "% of their weight, mean over heads", 2,
         {"[CLS]": "to_cls", "registers": "to_registers", "bias": "to_bias"})]),
    "foreground": (features, foreground_numbers, [
        ("foreground by", "area under ROC, 0.5: chance", 3,
         {"cos to [CLS]": "auc_cls", "first PC": "auc_pc"})]),
    "degradation": (None, degradation, [
        ("teacher's online probe", UNITS[name], 3, {WORDS[name]: name}) for name in METRICS]),
}
# {output: names of its numbers, each a list of one a block}
BLOCKS = {what: [key for *_, lines in panels for key in lines.values()]
          for what, (*_, panels) in MEASURES.items() if what != "degradation"}


def level(value) -> float:
    """A block's number; if it is a list of one for each head, their mean. NaN for None."""
    values = value if isinstance(value, list) else [value]
    return math.nan if None in values else sum(values) / len(values)


# --------------------------------------------------------------------------------------------------
# PCA: features as colours.


def rgb(models: list[Tensor], grids: list) -> tuple[list[Tensor], list[list[float]]]:
    """Features (P, N, D) of the same P pictures by several models -> three principal components of
    each as colours (P, 3, h, w) in [0, 1]; and their shares of the variance, %."""
    colours, shares, like = [], [], None
    for x, (h, w) in zip(models, grids):
        pc, share = components(x, 3)
        pc = rearrange(pc, "p (h w) c -> c p h w", h=h)
        if like is None:  # the first model's signs: the longer tail is bright
            like = pc * (pc**3).sum((1, 2, 3), keepdim=True).sign()
        # Order and sign of components are arbitrary: take those that fit the first model's best.
        a = F.normalize(F.interpolate(like, (h, w)).flatten(1), dim=1)
        b = F.normalize(pc.flatten(1), dim=1)
        cosine = a @ b.T  # (3, 3)
        fits = {order: cosine[range(3), order].abs().sum() for order in permutations(range(3))}
        order = list(max(fits, key=fits.get))
        pc = pc[order] * cosine[range(3), order].sign()[:, None, None, None]
        # Cut off at the outermost hundredths, as a few extreme patches would make all others grey.
        ends = pc.flatten(1).quantile(torch.tensor([0.01, 0.99]).double(), dim=1)  # (2, 3)
        low, high = ends[..., None, None, None]
        colour = ((pc - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)
        colours.append(rearrange(colour, "c p h w -> p c h w").float())
        shares.append([share[i] for i in order])
    return colours, shares


def pca(path: Path, models: list[Tensor], subjects: list[Subject]) -> dict[str, dict]:
    """Draw the components of each model's features (P, N, D) -> {model: shares of the variance}."""
    colours, shares = rgb(models, [s.grid for s in subjects])
    rows = {"picture": list(subjects[0].img[:8] / 255)}  # at most eight pictures on a sheet
    for s, colour in zip(subjects, colours):
        title = " ".join(textwrap.wrap(s.name, 14))  # what fits into the margin
        rows[title] = list(colour[:8])
    scenes.sheet(path, rows)
    return {s.name: {"share": share} for s, share in zip(subjects, shares)}


def maps(path: Path, seen: list[dict[str, Tensor]], subjects: list[Subject]) -> dict[str, dict]:
    """Draw where [CLS] looks, and which patches are like one. seen: what `features` keeps of one
    block of each model, for P pictures. -> {model: {kind of key: % a head}}."""
    out, rows = {}, {"picture": list(subjects[0].img[:8] / 255)}
    for s, found in zip(subjects, seen):
        weights, patches = found["looks"], found["patches"]  # (P, H, keys), (P, N, D)
        c, (h, w) = s.model.config, s.grid
        need(not weights.isnan().any(), f"block {s.args.block} of {s.name} has no [CLS] yet")
        row, column = s.args.patch or (h // 2, w // 2)
        bias = int(c.attn_bias)
        parts = weights.mean(0).split([bias, 1, c.registers, h * w], dim=1)  # (H, keys of a kind)
        out[s.name] = {kind: (100 * part.sum(1)).tolist()
                       for kind, part in zip(("bias", "[CLS]", "registers", "patches"), parts)
                       if part.shape[1]}
        shown = weights[:8, :, -h * w :]  # (8, H, N)
        # Each head is scaled to its own largest, so that one that looks everywhere shows, too.
        shown = shown / shown.amax(-1, keepdim=True).clamp(min=1e-12)
        img = s.img[:8] / 255
        for head in range(c.heads):
            title = " ".join([*textwrap.wrap(s.name, 14), f"head {head + 1}"])
            rows[title] = over(img, shown[:, head].view(-1, h, w))
        unit = F.normalize(patches[:8].float(), dim=-1)
        alike = (unit * unit[:, row * w + column, None]).sum(-1).view(-1, h, w)
        left, top = column * c.patch, row * c.patch
        box = torch.tensor([[left, top, left + c.patch - 1, top + c.patch - 1]])
        wide = -(-img.shape[-2] // 112)  # so that the frame is one pixel wide on the sheet
        tiles = [draw_bounding_boxes(tile, box, colors="red", width=wide)
                 for tile in over(img, alike.clamp(0, 1))]
        rows[" ".join([*textwrap.wrap(s.name, 14), "like red"])] = tiles
    scenes.sheet(path, rows)
    return out


def over(img: Tensor, light: Tensor) -> list[Tensor]:
    """Pictures (P, 3, H, W) in [0, 1] -> in grey, times light (P, h, w); mixed with white by half,
    so that a dark object shows, too."""
    light = F.interpolate(light[:, None], img.shape[-2:], mode="nearest")
    grey = img.mean(1, keepdim=True)
    return list((light * (0.5 + 0.5 * grey)).expand(-1, 3, -1, -1))


def outlier_sentence(numbers: dict[str, list[float]]) -> str:
    """What the norms say, in words: outliers are patches longer than three medians."""
    most = max(range(len(numbers["outliers"])), key=numbers["outliers"].__getitem__)
    share = numbers["outliers"][most]
    if share < 0.05:
        return "no outliers: no block has more than 1 patch in 2,000 above three medians"
    times = numbers["largest"][most] / numbers["median"][most]
    return (f"outliers: block {most + 1} has most, {share:.1f} % of its patches are longer than "
            f"three medians, the longest {times:.1f} medians")


# --------------------------------------------------------------------------------------------------
# Two groups of runs.

SETTING = "git", "torch", "device", "threads"  # in config.json: may differ, beside the flags
# Student's t, two-sided 95 %, for 1 to 30 degrees of freedom; the last, for more, is a little wide.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
       2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
       2.052, 2.048, 2.045, 2.042)


def interval(a: Tensor, b: Tensor) -> dict:
    """Values of n pairs -> means, mean difference b - a and its 95 % interval; NaN if n = 1."""
    d, n = b - a, len(a)  # what a pair shares, first weights and order of pictures, cancels
    half = T95[min(n - 1, 30) - 1] * (d.std() / n**0.5).item() if n > 1 else math.nan
    mean = d.mean().item()
    return {"a": a.mean().item(), "b": b.mean().item(), "difference": mean, "n": n,
            "low": mean - half, "high": mean + half}


def numbers_of(run: Path) -> dict[str, dict[str, float]]:
    """{result: {metric: number}} of a run: from its eval.json, and means over blocks from its
    analysis.json."""
    judged, analysed = run / "eval.json", run / "analysis.json"
    with intact(judged):  # None stands for a metric that was NaN
        out = {name: {k: float(result[k]) for k in METRICS if result.get(k) is not None}
               for name, result in read_json(judged).items()}
    with intact(analysed):
        for name, found in read_json(analysed).items():
            models = found.get("models", {})  # of this run, and maybe of others
            # The name has a folder before it if two models of one call had the same name.
            own = models.get(run.name) or models.get("/".join(run.parts[-2:]), {})
            # Alone there, it is this run, renamed since, unless --out put another's results here.
            if len(models) == 1 and " --out" not in found["made"].get("command", ""):
                (own,) = models.values()
            flat = {}
            for key in BLOCKS.get(name.partition(" ")[0], ()):
                # Blocks without the number do not count: CaiT's first have no [CLS], and without
                # outliers there are none on the border. The final norm's number counts, too.
                known = [level(v) for v in own.get(key, ()) if not math.isnan(level(v))]
                if known:
                    flat[key] = sum(known) / len(known)
            if flat:
                n = max(found["made"]["pictures"].values())
                out[f"{name}, mean over blocks of {n} pictures"] = flat
    return {name: {k: v for k, v in found.items() if math.isfinite(v)}
            for name, found in out.items()}


def runs_of(pattern: str) -> dict[int, tuple[dict, dict]]:
    """The run folders that match a pattern: {seed: (its numbers, its flags and versions)}."""
    runs = {}
    for folder in filter(Path.is_dir, map(Path, sorted(glob.glob(pattern)))):
        config = read_json(folder / "config.json")
        seed = config["args"].get("seed") if isinstance(config.get("args"), dict) else None
        need(isinstance(seed, int), f"{folder}/config.json names no seed: not a run of train.py")
        need(seed not in runs, f"{pattern!r} has two runs of seed {seed}; a pair needs one each")
        runs[seed] = numbers_of(folder), config["args"] | {k: config.get(k) for k in SETTING}
    return runs


def compare(a: str, b: str) -> dict[str, dict]:
    """Two patterns of run folders -> for every number that all runs have, the mean of b - a over
    pairs of equal seeds, with a 95 % interval (Student's t); and the flags and versions in which a
    pair differs. ValueError: there are no pairs, or they share no number."""
    first, second = runs_of(a), runs_of(b)
    seeds = sorted(first.keys() & second.keys())
    for pattern, found in ((a, first), (b, second)):
        need(found, f"--compare: no run folder matches {pattern!r}")
    both = [{*map(os.path.realpath, glob.glob(pattern))} for pattern in (a, b)]
    need(both[0].isdisjoint(both[1]), f"--compare: {a!r} and {b!r} have runs in common; name two "
         "groups of runs")
    need(seeds, f"no pairs: seeds of {a!r} are {sorted(first)}, of {b!r} {sorted(second)}; quote "
         "the patterns, train both with equal --seed")
    differ = set()  # printed with the result: it should be what is compared, and nothing else
    for seed in seeds:
        one, other = first[seed][1], second[seed][1]
        differ |= {flag for flag in one.keys() | other.keys() if one.get(flag) != other.get(flag)}
    differ -= {"out", "resume", "overwrite"}  # they change no number

    every = [group[seed][0] for group in (first, second) for seed in seeds]
    results = defaultdict(dict)
    for name, metrics in every[0].items():
        for metric in metrics:
            if all(metric in numbers.get(name, ()) for numbers in every):
                values = [numbers[name][metric] for numbers in every]
                x, y = torch.tensor(values).double().view(2, len(seeds))  # a pair a column
                results[name][metric] = interval(x, y)
    has = [", ".join(numbers) or "nothing" for numbers in every]
    need(results, f"the {len(every)} runs share no number: in eval.json the first has {has[0]}, "
         f"the last {has[-1]}; judge all in the same way: python eval_dense.py RUN")
    return {"seeds": seeds, "left out": sorted(first.keys() ^ second.keys()),
            "differ in": sorted(differ), "results": dict(results)}


def verdict(metric: str, r: dict) -> str:
    if r["n"] == 1:
        return "one pair: no interval"
    if r["low"] <= 0 <= r["high"]:
        return "no difference measured: the interval contains zero"
    if metric not in METRICS:  # of a cosine, say, neither direction is better
        return "a difference"
    return "better" if (r["difference"] < 0) == (metric in LOWER) else "worse"


# --------------------------------------------------------------------------------------------------
# Tables and pictures.


def show(columns: list[list[str]]) -> None:
    """Print columns of texts: the first one aligned to the left, all others to the right."""
    widths = [2 + max(map(len, column)) for column in columns]
    for first, *row in zip_longest(*columns, fillvalue=""):
        cells = [text.rjust(width) for text, width in zip(row, widths[1:])]
        print(f"  {first.ljust(widths[0])}{''.join(cells)}")


def table(what: str, model: str, numbers: dict) -> None:
    """Print a line for each block; for `degradation` for each metric, for pca and maps each share.
    """
    print(f"\n{what}: {model}")
    columns = [["", *numbers]]
    if what == "degradation":
        for key, title in (("best", "best"), ("last", "last"), ("lost", "lost since")):
            columns.append([title, *(f"{n[key]:.3f}" for n in numbers.values())])
        columns.append(["step of the best", *(str(n["best_step"]) for n in numbers.values())])
    elif what in ("pca", "maps"):
        title = "component" if what == "pca" else "head"
        for i, shares in enumerate(zip(*numbers.values())):
            columns.append([f"{title} {i + 1}", *(f"{share:.1f} %" for share in shares)])
    else:
        columns = [["", "", *(f"block {i + 1}" for i in range(len(numbers[BLOCKS[what][0]])))]]
        if what in FINAL:
            columns[0][-1] = "final norm"
        for title, _, decimals, lines in MEASURES[what][2]:
            for label, key in lines.items():
                cells = [f"{level(v):.{decimals}f}".replace("nan", "-") for v in numbers[key]]
                columns.append([title, label, *cells])
    show(columns)
    if what == "norms":
        print(f"  {outlier_sentence(numbers)}")


def comparison_table(a: str, b: str, found: dict) -> None:
    print(f"{b} minus {a}, paired over seeds {found['seeds']}"
          + (f", without {found['left out']}" if found["left out"] else "")
          + f"; runs differ in: {', '.join(found['differ in']) or 'nothing'}")
    for name, metrics in found["results"].items():
        print(f"  {name}")
        for metric, r in metrics.items():
            low, high = (f"{r[k]:+.3f}".replace("+nan", "-") for k in ("low", "high"))
            print(f"    {metric:28}{r['a']:9.3f} -> {r['b']:8.3f}  {r['difference']:+8.3f} "
                  f"[{low}, {high}]  {verdict(metric, r)}")


def style(i: int) -> dict:
    """How the line of model i looks: 4 dashes and 5 colours make 20 styles, of which the first four
    differ without colour, too."""
    colours = "#0072B2", "#D55E00", "#009E73", "#444444", "#CC79A7"
    return {"linestyle": ("-", "--", ":", "-.")[i % 4], "color": colours[i % 5]}


def canvas(panels: int, columns: int, **more):
    """A figure of matplotlib and its axes."""
    rows = math.ceil(panels / columns)
    fig = Figure(figsize=(5.2 * columns, 3.2 * rows + 0.7), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False, **more).flatten()
    for ax in axes[panels:]:
        ax.set_visible(False)
    return fig, axes


def curves(keys: list[str], results: dict[str, dict]) -> list[tuple]:
    """The lines of a panel: (number of the model, number of the quantity, x, y). No lines if all
    are flat and at one height, as without outliers, since the table says that already."""
    lines, every = [], []
    for i, numbers in enumerate(results.values()):
        for j, key in enumerate(keys):
            values = numbers.get(key, [])
            x = range(1, 1 + len(values))
            if isinstance(values, dict):  # of degradation
                x, values = values["steps"], values["values"]
            y = [level(value) for value in values]
            known = [value for value in y if math.isfinite(value)]
            # Zeros of a second or third quantity, such as registers, mean that the model has none.
            if any(known) or (known and j == 0):
                every += known
                lines.append((i, j, x, y))
    # With a tolerance, as rounding makes even a cosine of 1 or a support of 257 keys vary a little.
    if not every or max(every) - min(every) <= 1e-3 * max(map(abs, every)):
        return []
    return lines


def draw(path: Path, what: str, results: dict[str, dict]) -> None:
    """The table as a PNG: a colour is a model, a marker a quantity."""
    panels = []
    for title, unit, _, labels in MEASURES[what][2]:
        lines = curves(labels.values(), results)
        panels += [(title, unit, labels, lines)] if lines else []
    if not panels:
        return
    fig, axes = canvas(len(panels), min(len(panels), 2), sharey=what == "cosines")
    last = max(len(y) for *_, lines in panels for *_, y in lines)
    for ax, (title, unit, labels, lines) in zip(axes, panels):
        for i, j, x, y in lines:
            face = "white" if j else style(i)["color"]
            ax.plot(x, y, marker="os^"[j], markersize=5, markerfacecolor=face, **style(i))
        there = {j for _, j, *_ in lines}
        marks = [f"{'●□△'[j]} {label}" for j, label in enumerate(labels) if j in there]
        ax.set_title(f"{title}:  {'   '.join(marks)}", fontsize=10)  # which is the legend, too
        final = what in FINAL and len(lines[0][3]) == last
        blocks = f"block; {last} is the final norm" if final else "block"
        ax.set(ylabel=unit, xlabel="step" if what == "degradation" else blocks)
        ax.ticklabel_format(axis="y", useOffset=False)
        ax.grid(alpha=0.3)
        if unit.startswith("% of"):
            ax.set_ylim(bottom=0)
    fig.legend(loc="outside lower center", ncols=4, fontsize=8, handles=[
        Line2D([], [], label=name, **style(i)) for i, name in enumerate(results)])
    fig.savefig(path, dpi=110)


def draw_gains(path: Path, results: dict[str, dict]) -> None:
    """A column for each model, a dot for each dimension, in the last block of the first third (in
    CaiT the first with a [CLS]): where [CLS] and patches are large, and norm1's gains there."""
    n = len(results)
    fig, axes = canvas(2 * n, n)
    for (model, numbers), above, below in zip(results.items(), axes[:n], axes[n:]):
        known = [math.isfinite(v) for v in numbers["before norm overlap"]]
        # The last block in which the paper's [CLS] has a QKV of its own.
        i = max((len(known) - 1) // 3 - 1, known.index(True))
        cls, patch = (torch.tensor(numbers[f"before norm {who}"][i]) for who in ("cls", "patch"))
        ends = [patch.min(), patch.max()]
        above.loglog(patch, cls, ".", color="#444444", alpha=0.6, label="a dimension")
        above.loglog(ends, ends, "--", color="#009E73", label="equally large")
        above.set(title=f"{model}, block {i + 1}:\nmean |activation| before norm1",
                  xlabel="of patches", ylabel="of [CLS]")
        gains = {"patches": numbers["patch gain"][i], "[CLS]": numbers["cls gain"][i]}
        if gains["patches"] == gains["[CLS]"]:
            gains = {"[CLS] and patches alike": gains["[CLS]"]}
        for look, colour, who in zip(".x", ("#0072B2", "#D55E00"), gains):
            below.semilogx(cls / patch, gains[who], look, color=colour, alpha=0.6, markersize=5,
                           label=f"gain for {who}")
        below.axvline(1, color="#009E73", linestyle="--", label="equally large")
        below.set(title=f"{model}, block {i + 1}:\ngain of norm1, dimension by dimension",
                  xlabel="|activation| of [CLS] / that of patches", ylabel="gain")
        for ax in (above, below):
            ax.title.set_size(10)
            ax.legend(fontsize=7)
        for axis in (above.xaxis, above.yaxis, below.xaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
    fig.savefig(path, dpi=110)


# --------------------------------------------------------------------------------------------------
# The command.


def middle(x: Tensor, size: int, how=TF.InterpolationMode.BILINEAR) -> Tensor:
    """(C, H, W) -> its middle, (C, size, size)."""
    return TF.center_crop(TF.resize(x, [size], how, antialias=True), [size])


def pictures(args, size: int) -> tuple[Tensor, Tensor | None]:
    """uint8 (P, 3, size, size), and class masks (P, size, size), 255 ignored, if there are any."""
    n = args.pictures
    if args.data == "scenes":
        made = scenes.Scenes("test", size)(torch.arange(n))
        return made["image"], made["mask"]
    if args.data in eval_dense.OPEN:
        test = eval_dense.open_split(args.data, args.root, "val")
    else:
        rows = [{"image": file} for file in eval_dense.picture_files(args.data)]
        test = eval_dense.Pictures(rows)
    rows = test.rows[:: max(len(test.rows) // n, 1)][:n]  # from all over the folder
    # A mask fits the stored pixels, whatever EXIF says, so its picture must not be turned.
    alone = rows[0].keys() <= {"image", "label"}
    img = torch.stack([middle(read_picture(row["image"], upright=alone), size) for row in rows])
    nearest = TF.InterpolationMode.NEAREST_EXACT
    masks = [middle(test.mask(row["mask"])[None], size, nearest)[0] for row in rows
             if "mask" in row]
    return img, torch.stack(masks) if masks else None


def survey_gib(config: clsspec.Config, args, size: int) -> float:
    """An estimate of what a survey holds, GiB: pictures, attention of a batch, features."""
    patches = (size // config.patch) ** 2
    kept = config.depth * patches * config.width * 2  # bytes, in half precision
    if {"pca", "foreground"} & set(args.what):  # of one block, in double precision
        kept += 3 * 8 * patches * config.width
    made = scenes_gib(args.pictures, size) if args.data == "scenes" else 0
    walked = forward_gib(config, min(args.pictures, 8), size, size, attention=True)
    return made + args.pictures * (3 * size**2 + kept) / 2**30 + walked


def subjects_of(args) -> list[Subject]:
    """The models, each with its pictures. ValueError: one is there twice, or a flag does not fit.
    """
    files = [clsspec.weights_file(name) for name in args.models]
    names = [eval_dense.name_of(file) for file in files]
    if len(set(names)) < len(names):  # seeds in folders of their own: a/run, b/run
        names = ["/".join(file.parts[-3:]).removesuffix("/last.pt") for file in files]
    need(len(set(names)) == len(names), f"{', '.join(args.models)}: two models of one name; name "
         "each once, or rename a folder")
    out = []
    for name, file in zip(names, files):
        model = clsspec.load(file, args.network).to(args.device)
        print(f"{name}: {model.origin}")
        patch, side = model.config.patch, model.config.image_size // model.config.patch
        # 8 to 16 patches a side: enough to see shapes, few enough for a CPU.
        size = args.image_size or max(8, min(16, side)) * patch
        need(size % patch == 0, f"--image-size {size} is no multiple of {patch}, the patch of "
             f"{name}; try {whole_patches(size, patch)}")
        need((args.block or 1) <= model.config.depth, f"--block {args.block}: {name} has "
             f"{model.config.depth} blocks")
        h, w = grid = size // patch, size // patch
        row, column = args.patch or (0, 0)
        need(row < h and column < w, f"--patch {row},{column} is outside the {h} rows and {w} "
             f"columns of {name}")
        need_memory(survey_gib(model.config, args, size), args.device, f"{args.pictures} pictures "
                    f"of {size} px", "lower --pictures or --image-size")
        out.append(Subject(name, eval_dense.home(file), model, *pictures(args, size), grid, args))
    return out


def key_of(what: str, args) -> str:
    """A result's name in analysis.json: with network, pictures and options if not the usual ones.
    """
    if what == "degradation":
        return what
    words = [what] if args.network == "teacher" else [what, args.network]
    words += [Path(p).absolute().name for p in (args.data, args.root) if p not in ("scenes", "")]
    if args.image_size:
        words.append(f"image_size={args.image_size}")
    if what == "foreground" and args.background:
        words.append(f"background={','.join(map(str, args.background))}")
    if what in ("pca", "maps") and args.block:
        words.append(f"block={args.block}")
    return " ".join(words)


def write(key: str, how: dict, models: dict, folder: Path) -> None:
    """Put a result into a folder's analysis.json."""
    made = {"command": "python " + " ".join(sys.argv), "versions": eval_dense.versions()}
    result = {"made": made | how, **strict(models, digits=5)}
    eval_dense.record(folder / "analysis.json", key, result)


def run(args) -> Path:
    """Measure every model, then print, write and draw one measure after the other."""
    eval_dense.check_device(args)
    subjects = subjects_of(args)
    homes = {s.name: s.home for s in subjects}
    out = Path(args.out or subjects[0].home)
    for folder in {out, *homes.values()}:  # before hours of work
        need_writable(folder)
        read_json(folder / "analysis.json")  # it may be damaged
    out.mkdir(parents=True, exist_ok=True)
    how = {name: getattr(args, name) for name in ("data", "root", "network", "device")}
    how["pictures"] = {s.name: len(s.img) for s in subjects}
    how["pixels"] = {s.name: s.img.shape[-1] for s in subjects}
    how["grids"] = {s.name: s.grid for s in subjects}
    if len(set(how["grids"].values())) > 1:
        print(f"note: patches lie on other grids, {how['grids']}: attention does not compare")

    measures = {what: measure for what, measure in MEASURES.items() if what in args.what}
    keeps = {keep for keep, *_ in measures.values()} - {None}
    drawn = {"pca", "maps"} & set(args.what)
    keeps |= {features} if drawn else set()
    results, seen = defaultdict(dict), []
    for s in subjects:
        kept = survey(s.model, s.img, keeps) if keeps else {}
        for what, (keep, numbers, _) in measures.items():
            try:
                results[what][s.name] = numbers(kept[keep.__name__] if keep else {}, s)
            except ValueError as err:  # other measures may still have what they need
                print(f"{what}: left out of {s.name}, {err}")
        if drawn:
            block = (args.block or s.model.config.depth) - 1
            seen.append({name: blocks[block] for name, blocks in kept["features"].items()})
        del kept  # makes room for the next model's
    if "pca" in drawn:  # all models together, so that colours mean the same
        results["pca"] = pca(out / "pca.png", [one["patches"] for one in seen], subjects)
    if "maps" in drawn:
        try:
            results["maps"] = maps(out / "maps.png", seen, subjects)
        except ValueError as err:
            need(any(results.values()), str(err))  # an error if there is no other result
            print(f"maps: left out, {err}")

    for what in WHAT:
        found = results[what]
        for name, numbers in found.items():
            table(what, name, numbers)
        for folder in {out} if args.out else {out, *homes.values()}:
            mine = {name: n for name, n in found.items() if folder in (out, homes[name])}
            if mine:
                write(key_of(what, args), how, {"models": mine}, folder)
        if Figure and found and what in MEASURES:
            draw(out / f"{what}.png", what, found)
    if Figure and results["dimensions"]:
        draw_gains(out / "gains.png", results["dimensions"])
    need(any(results.values()), "nothing was measured")
    return out


def run_compare(args) -> Path:
    """Print and write the difference of two groups of runs."""
    a, b = args.compare
    found = compare(a, b)
    folders = [os.path.dirname(os.path.abspath(run)) for pattern in (a, b)
               for run in glob.glob(pattern)]
    out = Path(args.out or os.path.commonpath(folders))
    need_writable(out)
    comparison_table(a, b, found)
    write(f"compare {a} {b}", {}, found, out)
    return out


def classes(text: str) -> tuple[int, ...]:
    """--background: numbers of classes, a comma list."""
    return tuple(map(within(int, 0, 254), eval_dense.names(text)))


def place(text: str) -> tuple[int, ...]:
    """--patch: a row and a column."""
    numbers = tuple(map(within(int, 0, 4096), text.split(",")))
    if len(numbers) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not ROW,COLUMN, as in 3,5")
    return numbers


def parse(argv) -> argparse.Namespace:
    raw, cuda = argparse.RawDescriptionHelpFormatter, torch.cuda.is_available()
    p = eval_dense.Parser(description=__doc__, formatter_class=raw)
    p.add_argument("models", nargs="*", help="run folders, checkpoints, files of public weights")
    p.add_argument("--compare", nargs=2, metavar=("A", "B"), help="patterns of run folders; quote")
    p.add_argument("--what", type=eval_dense.names, default=WHAT, metavar="LIST",
                   help="comma list of the above; default: all")
    p.add_argument("--network", default="teacher", choices=["teacher", "student", "untrained"],
                   help="(default: teacher)")
    g = p.add_argument_group("pictures")
    g.add_argument("--data", default="scenes", help="scenes, a set of eval_dense.py, a folder of "
                   "pictures, a text file of their paths, or one picture (default: scenes)")
    g.add_argument("--root", default="", help="folder of such a set")
    g.add_argument("--pictures", type=within(int, 1, 10_000), default=64, metavar="N",
                   help="how many (default: 64)")
    g.add_argument("--image-size", type=within(int, 1, 4096), metavar="S", help="side, pixels; "
                   "default: the model's own, but at least 8 and at most 16 patches")
    g.add_argument("--background", type=classes, metavar="LIST", help="numbers of classes, comma "
                   "list; default: 0, of scenes 0,1,2,3: sky and grounds")
    g.add_argument("--block", type=within(int, 1, 999), help="pca, maps: of which block, 1 is the "
                   "first; default: the last")
    g.add_argument("--patch", type=place, metavar="ROW,COLUMN", help="maps: the patch that others "
                   "are compared with, from 0 on; default: the middle")
    g = p.add_argument_group("machine and output")
    g.add_argument("--device", default="cuda" if cuda else "cpu", choices=eval_dense.DEVICES,
                   help="CUDA_VISIBLE_DEVICES says which (default: %(default)s)")
    g.add_argument("--out", help="folder; default: see above")
    args = p.parse_args(argv)
    if unknown := [what for what in args.what if what not in WHAT]:
        p.error(f"--what: unknown {', '.join(unknown)}; choose from {', '.join(WHAT)}")
    if bool(args.compare) == bool(args.models):
        p.error("give run folders or weights, as in: python analyze.py runs/NAME; or --compare and "
                "nothing else")
    if args.root and args.data not in eval_dense.OPEN:
        p.error(f"--root is for sets by name, {', '.join(eval_dense.OPEN)}; leave it out")
    idle = [f"--{name.replace('_', '-')}" for name in vars(args)
            if name not in ("models", "compare", "out", "device")
            and getattr(args, name) != p.get_default(name)]
    if args.compare and idle:
        p.error(f"--compare reads results that are there, and has no use for {' '.join(idle)}")
    return args


def main(argv=None) -> None:
    args = parse(argv)
    with one_line():
        out = run_compare(args) if args.compare else run(args)
        more = "" if Figure else "; no plots without matplotlib: python -m pip install matplotlib"
        print(f"\nresults are in {out}{more}")


if __name__ == "__main__":
    main()
