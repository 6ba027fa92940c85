"""What the two papers measure, of your own models or of public weights, as numbers and pictures.

    python analyze.py runs/plain runs/spec                     # everything, both in one plot
    python analyze.py dino_deitsmall16_pretrain.pth            # the same of public weights
    python analyze.py runs/spec --what cosines,pca --data path/to/pictures
    python analyze.py runs/spec --what cost --seconds 120      # the price of every variant
    python analyze.py --compare "runs/plain-*" "runs/spec-*"   # eval.json, paired over seeds

Numbers go to analysis.json in --out (default: the first model's folder), pictures beside it, to
NAME.png; all but pca.png want matplotlib. P1: arXiv 2602.08626, P2: arXiv 2605.23868. "Ours" is
said where a paper's formula is not public.

cosines      Mean cosine, in [-1, 1], of [CLS] with patches and of patches with other patches, at
             four points of a block: `before norm`, what enters it; `after norm`, what leaves norm1;
             `attention`, the branch after out-projection and LayerScale; `after attention`, the
             residual stream with it. The row after the last block is the final norm. (P1)
dimensions   Mean |activation| of each dimension, of [CLS] and of patches, before and after norm1.
             `overlap`: sum_d min(a_d, b_d), both scaled to sum 1; 1 the same dimensions, 0 disjoint
             ones (ours). Mean |gain| of norm1 on the tenth of the dimensions in which [CLS], or
             patches, are largest; `gains_cosine`: of the two gains of a specialised norm. (P1)
norms        L2 norm of patches that leave a block; `outliers`: % of patches above three medians,
             `on_border`: % of those in the outermost ring (ours). What registers and attention bias
             are for. (P1)
attention    Of patches as queries: `entropy`, nats; `support`, number of keys with weight above 0;
             `distance` to the patches looked at, in patches; `to_cls`, `to_registers`, `to_bias`, %
             of the weight. Of [CLS]: `cls_entropy`, `cls_support`. A number a head. (P2, selective
             attention)
foreground   How well each block's patches, after the final norm, tell foreground from background:
             area under the ROC curve, 0.5 not at all, mean over pictures, of cos(patch, [CLS]),
             `auc_cls`, and of the first principal component, either sign, `auc_pc`. `miou`, %, of
             ridge regression from patch to class, from one half of the pictures to the other and
             back. (P2; formulas ours.) Wants masks: Scenes (objects), voc, pairs (all but class 0).
degradation  The online probe in log.jsonl: each metric over steps, best, last, and what was lost
             since the best, in its unit. (P2, dense degradation)
pca          Pictures, then a column a model: the first three principal components of the last
             block's patches as RGB, fitted to all pictures, with the first model's signs.
             --foreground: fitted to the patches on that side of 0 of the first component that the
             border has less of; the others are black. `share`: % of the variance. (P1, P2)
cost         Of the model's size, every variant: parameters; GFLOPs of a picture, by torch's counter
             and by formula; time of a forward pass and of a training step (forward, backward) over
             plain's in the same round; what the forward pass keeps for the backward one, MiB a
             picture, and on a GPU the peak of a step. (P1: +8 % parameters, +0 % FLOPs)
"""

import argparse
import glob
import json
import math
import os
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as in train.py

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import save_image

import clsspec
import eval_dense
from clsspec import ViT
from eval_dense import Scenes, bar, class_iou, confusion, normalise, versions

WHAT = ("cosines", "dimensions", "norms", "attention", "foreground", "degradation", "pca", "cost")
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
    cls, x = model.embed(img)
    grid, c = tuple(side // model.config.patch for side in img.shape[-2:]), model.config
    for i, block in enumerate(model.blocks):
        x = torch.cat([cls, x], dim=1) if i == model.join else x
        first = c.registers + (i >= model.join)
        normed = block.norm1(x)
        q, k, v = block.attn.queries_keys_values(normed)
        weights = block.attn.weights(q, k)
        mixed = rearrange(weights @ v, "b h t d -> b t (h d)")
        branch = block.ls1(block.attn.proj(mixed))
        n = branch.shape[1]  # rows that are updated: all, or [CLS] alone
        after = x[:, :n] + branch
        out = after + block.ls2(block.mlp(block.norm2(after)))
        after, out = (torch.cat([y, x[:, n:]], dim=1) for y in (after, out))
        points = dict(zip(POINTS, (x, normed, branch, after)))
        yield Step(points, out, model.norm(out), weights, first, i >= model.join,
                   int(c.attn_bias), grid)
        x = out
    normed = model.norm(x)
    yield Step(dict(zip(POINTS, (x, normed))), normed, normed, None, first, True, 0, grid)


# What is kept of a step, numbers of each picture, (B, ...).


def cosines(step: Step) -> dict[str, Tensor]:
    """Mean cosine of [CLS] with patches, and of patches with other patches, at each point: (B,)."""
    kept = {}
    for point, x in step.points.items():
        unit = F.normalize(x.float(), dim=-1)
        patches = unit[:, step.first:]
        total, n = patches.sum(1), patches.shape[1]
        cls = unit[:, 0] if step.cls else math.nan
        kept[f"{point} cls_patch"] = (cls * total).sum(1) / n
        kept[f"{point} patch_patch"] = (total.square().sum(1) - n) / (n * (n - 1))
    return kept


def dimensions(step: Step) -> dict[str, Tensor]:
    """Mean |activation| of every dimension before and after norm1, of [CLS] and patches: (B, D)."""
    kept = {}
    for point in POINTS[:2]:
        x = step.points[point].float().abs()
        kept[f"{point} cls"] = x[:, 0] if step.cls else torch.full_like(x[:, 0], math.nan)
        kept[f"{point} patch"] = x[:, step.first:].mean(1)
    return kept


def norms(step: Step) -> dict[str, Tensor]:
    """L2 norm of the patches that leave the block: (B, N)."""
    if step.attention is None:
        return {}
    return {"norm": step.out[:, step.first:].float().norm(dim=-1)}


def attention(step: Step) -> dict[str, Tensor]:
    """Entropy (nats), support (keys), distance (patches) and mass (%) of attention: (B, H)."""
    if step.attention is None:
        return {}
    kept, w, start = {}, step.attention.float(), step.first + step.bias
    entropy, support = torch.special.entr(w).sum(-1), (w > 0).float().sum(-1)  # (B, H, queries)
    if step.cls:
        kept |= {"cls_entropy": entropy[:, :, 0], "cls_support": support[:, :, 0]}
    w = w[:, :, step.first:]  # patches ask; in CaiT's last blocks none does: NaN
    at = torch.cartesian_prod(*(torch.arange(n, device=w.device) for n in step.grid)).float()
    seen, far = w[..., start:], torch.cdist(at, at)[: w.shape[2]]
    kept |= {"entropy": entropy[:, :, step.first:].mean(-1),
             "support": support[:, :, step.first:].mean(-1),
             "distance": ((seen * far).sum(-1) / seen.sum(-1)).nanmean(-1)}
    mass = 100 * w.mean(2)  # (B, H, keys)
    kept["to_bias"] = mass[..., : step.bias].sum(-1)
    kept["to_cls"] = mass[..., step.bias] if step.cls else mass[..., 0] * math.nan
    kept["to_registers"] = mass[..., step.bias + step.cls : start].sum(-1)
    return kept


def features(step: Step) -> dict[str, Tensor]:
    """Patches after the final norm (B, N, D), in half precision, and their cosine with [CLS]."""
    if step.attention is None:
        return {}
    patches = step.final[:, step.first:]
    cls = step.final[:, :1] if step.cls else torch.full_like(patches[:, :1], math.nan)
    return {"patches": patches.half(), "cosine": F.cosine_similarity(patches, cls, dim=-1)}


# --------------------------------------------------------------------------------------------------
# One function a figure: from what was kept of all pictures, {name: [a tensor a block]}, to numbers.


def survey(model: ViT, img: Tensor, measures, batch: int = 8) -> dict[str, dict]:
    """Walk uint8 pictures (n, 3, H, W) through a model -> {measure: {name: [a tensor a block]}}."""
    kept, device = defaultdict(lambda: defaultdict(list)), next(model.parameters()).device
    parts = img.split(batch) if measures else ()
    for part in bar(parts, "walking", len(parts)):
        for i, step in enumerate(walk(model, normalise(part.to(device) / 255))):
            for measure in measures:
                for name, value in measure(step).items():
                    kept[measure.__name__, name][i].append(value.cpu())
    out = defaultdict(dict)
    for (measure, name), blocks in kept.items():
        out[measure][name] = [torch.cat(blocks.pop(i)) for i in sorted(blocks)]  # one at a time
    return out


def means(kept: dict[str, list[Tensor]]) -> dict[str, list]:
    """Means over pictures: a number a block, or a list of one a head or dimension."""
    return {name: [v.double().mean(0).tolist() for v in blocks] for name, blocks in kept.items()}


def overlap(a: Tensor, b: Tensor) -> float:
    """sum_d min(a_d, b_d), both (D,) scaled to sum 1: 1, the same dimensions; 0, disjoint ones."""
    return torch.minimum(a / a.sum(), b / b.sum()).sum().item()


def dimension_numbers(model: ViT, kept: dict) -> dict[str, list]:
    out = means(kept)
    for point in POINTS[:2]:
        pairs = zip(out[f"{point} cls"], out[f"{point} patch"])
        out[f"{point} overlap"] = [overlap(torch.tensor(a), torch.tensor(b)) for a, b in pairs]
    layers = [block.norm1 for block in model.blocks] + [model.norm]
    both = [(n.cls, n.patch) if isinstance(n, clsspec.Specialised) else (n, n) for n in layers]
    gains = [[n.weight.detach().float().cpu() for n in pair] for pair in both]
    out["cls gain"], out["patch gain"] = ([g.tolist() for g in side] for side in zip(*gains))
    out["gains_cosine"] = [F.cosine_similarity(*pair, dim=0).item() for pair in gains]
    for i, who in enumerate(("cls", "patch")):
        for whose in ("cls", "patch"):
            top = [torch.tensor(v).topk(max(len(v) // 10, 1)).indices
                   for v in out[f"before norm {whose}"]]
            out[f"{who} gain on {whose} dims"] = [pair[i].abs()[t].mean().item()
                                                  for pair, t in zip(gains, top)]
    return out


def norm_numbers(kept: dict, grid) -> dict[str, list]:
    """See `norms` at the top; `map`: % of the pictures with an outlier at each place (h, w)."""
    border = torch.ones(grid, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    out = defaultdict(list)
    for v in kept["norm"]:
        odd = v > 3 * v.median()
        out["quantiles"].append(v.quantile(torch.tensor([.01, .05, .25, .5, .75, .95])).tolist())
        out["median"].append(v.median().item())
        out["p99"].append(v.quantile(0.99).item())
        out["largest"].append(v.max().item())
        out["outliers"].append(100 * odd.double().mean().item())
        out["on_border"].append((100 * (odd & border.flatten()).sum() / odd.sum()).item())
        out["map"].append((100 * odd.double().mean(0)).view(grid).tolist())
    return dict(out)


def auc(score: Tensor, truth: Tensor) -> float:
    """Area under the ROC curve: how often a true one scores above a false one; ties count half."""
    a, b = score[truth][:, None], score[~truth]
    return ((a > b).double() + (a == b).double() / 2).mean().item()


def components(x: Tensor, k: int, keep: Tensor | None = None) -> tuple[Tensor, list[float]]:
    """The first k principal components (P, N, k) of features (P, N, D), fitted to all of them or to
    keep (P, N); and the % of the variance that each has."""
    x = x.double()
    fit = x.flatten(0, 1) if keep is None else x[keep]
    x, fit = x - fit.mean(0), fit - fit.mean(0)
    size, axes = torch.linalg.eigh(fit.T @ fit)
    return x @ axes.flip(1)[:, :k], (100 * size.flip(0)[:k] / size.sum()).tolist()


def ridge(x: Tensor, labels: Tensor, classes: int) -> float:
    """mIoU, %, of patches (P, N, D) with labels (P, N), 255 ignored: least squares to one-hot
    classes, from even pictures to odd ones and back."""
    table = torch.zeros(classes, classes)
    for fold in (0, 1):
        test = torch.arange(len(x)) % 2 == fold
        seen = x[~test][labels[~test] != 255].double()
        scale = lambda v: F.pad((v - seen.mean(0)) / (seen.std(0) + 1e-6), (0, 1), value=1)
        a, y = scale(seen), F.one_hot(labels[~test][labels[~test] != 255], classes).double()
        damping = 0.001 * len(a) * torch.eye(a.shape[1], dtype=a.dtype)
        weight = torch.linalg.solve(a.T @ a + damping, a.T @ y)
        guess = (scale(x[test].double()) @ weight).argmax(-1)
        table += confusion(guess[:, None], labels[test][:, None], classes).sum(0)
    return 100 * class_iou(table).nanmean().item()


def patch_labels(mask: Tensor, grid, classes: int) -> Tensor:
    """Class maps (P, H, W), 255 ignored -> the commonest class of each patch (P, N), 255: none."""
    patches = rearrange(mask.long(), "p (h a) (w b) -> p (h w) (a b)", h=grid[0], w=grid[1])
    pixels = torch.stack([(patches == c).sum(-1) for c in range(classes)], dim=-1)
    return torch.where(pixels.sum(-1) > 0, pixels.argmax(-1), 255)


def foreground_numbers(kept: dict, labels: Tensor, objects: int) -> dict[str, list]:
    """See `foreground` at the top. labels: (P, N), 255 ignored; classes from `objects` on are in
    front. Pictures that have only one of both count for miou alone."""
    out, front, known = defaultdict(list), labels >= objects, labels != 255
    both = [i for i in range(len(labels)) if len(front[i][known[i]].unique()) == 2]

    def mean(score):
        aucs = [auc(score[i][known[i]], front[i][known[i]]) for i in both]
        return sum(aucs) / len(aucs) if aucs and not score.isnan().any() else math.nan

    for x, cosine in zip(kept["patches"], kept["cosine"]):
        pc = mean(components(x, 1)[0][..., 0])
        out["auc_cls"].append(mean(cosine))
        out["auc_pc"].append(max(pc, 1 - pc))
        out["miou"].append(ridge(x, labels, int(labels[known].max()) + 1))
    return dict(out)


def degradation(run: Path) -> dict[str, dict]:
    """Metrics of the online probe in a run's log.jsonl: steps and values, best, last, and what was
    lost since the best (in the metric's unit, 0 or more). ValueError: no log, no probe in it."""
    log = run / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    out = {}
    for name in eval_dense.METRICS:
        found = [(line["step"], line[name]) for line in lines if name in line]
        if found:
            low = name in LOWER
            step, best = (min if low else max)(found, key=lambda f: f[1])
            last = found[-1][1]
            out[name] = {"steps": [s for s, _ in found], "values": [v for _, v in found],
                         "best": best, "best_step": step, "last": last,
                         "lost": last - best if low else best - last}
    if not out:
        raise ValueError(f"{log} has no online probe; train with --probe-every 500")
    return out


LOWER = {"rmse", "absrel"}  # metrics that are better when they are lower


def foreground(x: Tensor, h: int, w: int) -> Tensor:
    """Features (P, h w, D) -> (P, h w) bool: the side of the first component that the border of
    the pictures has less of."""
    positive = components(x, 1)[0].view(-1, h, w) > 0
    inner = positive[:, 1:-1, 1:-1].double().mean()
    return (positive == (inner > positive.double().mean())).flatten(1)


def rgb(models: list[Tensor], grids: list, front: bool) -> tuple[list[Tensor], list[list[float]]]:
    """Features (P, N, D) of the same P pictures by several models -> three principal components of
    each as colours (P, 3, h, w) in [0, 1], with the first model's signs; and their shares."""
    colours, shares, like = [], [], None
    for x, (h, w) in zip(models, grids):
        keep = foreground(x, h, w) if front else torch.ones(x.shape[:2], dtype=torch.bool)
        pc, share = components(x, 3, keep)
        pc = rearrange(pc, "p (h w) c -> c p h w", h=h)
        like = pc**3 if like is None else like  # the first's: skewed towards the positive
        pc = pc * (pc * F.interpolate(like, (h, w))).sum((1, 2, 3), keepdim=True).sign()
        like = pc if not colours else like
        low, high = pc.flatten(2)[:, keep.view(len(x), -1)].quantile(
            torch.tensor([0.01, 0.99]).double(), dim=1)[..., None, None, None]
        colour = ((pc - low) / (high - low)).clamp(0, 1) * keep.view(len(x), h, w)
        colours.append(colour.transpose(0, 1).float())
        shares.append(share)
    return colours, shares


# --------------------------------------------------------------------------------------------------
# Cost.

VARIANTS = {"plain": {}, "norms": dict(spec=("norms",)),
            "norms, qkv in a third": dict(spec=("norms", "qkv")), "4 registers": dict(registers=4),
            "attention bias": dict(attn_bias=True), "entmax15": dict(attn="entmax15"),
            "class attention, 2 blocks": dict(class_attn=2)}


def counts(cfg: clsspec.Config, side: int) -> dict[str, float]:
    """Parameters, and GFLOPs of one picture of side x side pixels: counted by torch in a forward
    pass, and by clsspec.flops."""
    fused = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)  # countable
    with torch.device("meta"), FlopCounterMode(display=False) as counter, fused:
        model = ViT(cfg)
        model(torch.empty(1, 3, side, side))
    return {"parameters": clsspec.parameters_by_component(model)["total"],
            "gflops_counted": counter.get_total_flops() / 1e9,
            "gflops": clsspec.flops(cfg, side, side) / 1e9}


def kept_mib(model: ViT, img: Tensor) -> float:
    """What a forward pass keeps for the backward pass, without the weights, MiB."""
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(x):  # keeps the storage alive, so that no memory is counted twice; not the graph
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(img)
    return sum(kept[at].nbytes() for at in kept.keys() - weights) / 2**20


def cost(cfg: clsspec.Config, side: int, batch: int, seconds: float, device: str,
         compiled: bool) -> dict[str, dict]:
    """Every variant of a size. Round after round, until the time is used, each takes its turn; a
    ratio is of times in one round, and is given with its quartiles."""
    plain = replace(cfg, spec=(), spec_blocks=None, spec_rank=0, registers=0, attn="softmax",
                    registers_path="patch", attn_bias=False, class_attn=0, drop_path=0.0)
    img, cuda = torch.randn(batch, 3, side, side, device=device), device != "cpu"
    out, models, times = {}, {}, defaultdict(list)
    for name, changes in VARIANTS.items():
        variant = clsspec.checked(replace(plain, **changes))
        models[name] = ViT(variant).to(device)  # and then shares plain's weights: less memory
        models[name].load_state_dict(models["plain"].state_dict(), strict=False, assign=True)
        out[name] = counts(variant, side) | {"kept_mib": kept_mib(models[name], img) / batch}
        if compiled:
            models[name].compile()
    models["plain again"], out["plain again"] = models["plain"], dict(out["plain"])  # the noise

    def clock(model, backward):
        start, kind = time.perf_counter(), img.device.type
        with torch.autocast(kind, torch.bfloat16, cuda), torch.set_grad_enabled(backward):
            tokens = model(img)
            loss = sum(tokens[k].float().square().mean() for k in ("cls", "patches"))
        if backward:
            loss.backward()
        if cuda:
            torch.cuda.synchronize()
        taken = time.perf_counter() - start
        model.zero_grad()
        return taken

    end = math.inf
    while time.time() < end or len(times["plain", True]) < 4:
        turns = list(product(models.items(), (False, True)))
        for i in torch.randperm(len(turns)).tolist():  # whose turn comes after whose must not count
            (name, model), backward = turns[i]
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            times[name, backward].append(clock(model, backward))
            if cuda and backward:
                out[name]["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        end = min(end, time.time() + seconds)  # from the end of a first round, which is not counted
    for (name, backward), taken in times.items():
        what, plain = "step" if backward else "forward", times["plain", backward]
        ratios = torch.tensor([a / b for a, b in zip(taken[1:], plain[1:])])
        out[name][f"{what}_ratio"] = ratios.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        out[name][f"{what}_ms"] = 1e3 * torch.tensor(taken[1:]).median().item() / batch
        out[name]["rounds"] = len(ratios)
    return out


# --------------------------------------------------------------------------------------------------
# Two groups of runs.


def compare(a: str, b: str) -> dict[str, dict]:
    """Two patterns of run folders -> for every result in all their eval.json and every metric: mean
    of b - a over pairs of equal seeds, with a 95 % interval (Student's t). ValueError: no pairs."""
    groups = []
    for pattern in (a, b):
        runs = {}
        for folder in map(Path, sorted(glob.glob(pattern))):
            if not (folder / "eval.json").exists():
                raise ValueError(f"no {folder}/eval.json; make it: python eval_dense.py {folder}")
            seed = json.loads((folder / "config.json").read_text())["args"]["seed"]
            if seed in runs:
                raise ValueError(f"{pattern!r} has two runs of seed {seed}; a pair needs one each")
            runs[seed] = json.loads((folder / "eval.json").read_text())
        groups.append(runs)
    seeds = sorted(groups[0].keys() & groups[1].keys())
    if not seeds:
        raise ValueError(f"no pairs: seeds of {a!r} are {sorted(groups[0])}, of {b!r} "
                         f"{sorted(groups[1])}; quote the patterns, train both with equal --seed")
    out = {"seeds": seeds, "left out": sorted(groups[0].keys() ^ groups[1].keys()), "results": {}}
    names = set.intersection(*(set(group[s]) for group in groups for s in seeds))
    for name in sorted(names):
        for metric in eval_dense.METRICS:
            if all(metric in group[s][name] for group in groups for s in seeds):
                x, y = (torch.tensor([g[s][name][metric] for s in seeds]).double() for g in groups)
                out["results"].setdefault(name, {})[metric] = interval(x, y)
    return out


def interval(a: Tensor, b: Tensor) -> dict:
    """Values of n pairs -> means, mean difference b - a and its 95 % interval; none if n = 1."""
    d, n = b - a, len(a)
    half = T95[min(n - 1, 31) - 1] * (d.std() / n**0.5).item() if n > 1 else math.nan
    mean = d.mean().item()
    return {"a": a.mean().item(), "b": b.mean().item(), "difference": mean, "n": n,
            "low": mean - half, "high": mean + half}


# Student's t, two-sided 95 %, 1 to 30 degrees of freedom; then the limit, which is a little wide.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
       2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
       2.052, 2.048, 2.045, 2.042, 2.042)

# --------------------------------------------------------------------------------------------------
# Tables and pictures. A group is one panel of a figure and a few columns of a table: title, unit,
# {what a line is called: its name in analysis.json}.

GROUPS = {
    "cosines": [(point, "cosine", {"[CLS]-patch": f"{point} cls_patch",
                                   "patch-patch": f"{point} patch_patch"}) for point in POINTS],
    "dimensions": [
        ("dimensions shared by [CLS] and patches", "overlap", {
            "before norm": "before norm overlap", "after norm": "after norm overlap"}),
        ("gain of norm1, on whose largest dimensions", "mean |gain|", {
            "[CLS], own": "cls gain on cls dims", "[CLS], patch": "cls gain on patch dims",
            "patch, [CLS]": "patch gain on cls dims", "patch, own": "patch gain on patch dims"})],
    "norms": [("norm of patches", "L2 norm", {"median": "median", "99th perc.": "p99",
                                              "largest": "largest"}),
              ("outliers, above 3 medians", "%", {"of patches": "outliers",
                                                  "on border": "on_border"})],
    "attention": [
        ("entropy", "nats", {"patches": "entropy", "[CLS]": "cls_entropy"}),
        ("support", "keys with a weight", {"patches": "support", "[CLS]": "cls_support"}),
        ("distance", "patches", {"patches": "distance"}),
        ("what patches give", "% of weight", {"to [CLS]": "to_cls", "to registers": "to_registers",
                                              "to bias": "to_bias"})],
    "foreground": [("foreground or background", "area under ROC", {"cos to [CLS]": "auc_cls",
                                                                   "first PC": "auc_pc"}),
                   ("classes, ridge regression", "mIoU, %", {"patches": "miou"})],
    "degradation": [(name, text.split()[-1] if " " in text else "share", {name: name})
                    for name, text in eval_dense.METRICS.items()]}


def level(value) -> float:
    """A block's number; of a list, one a head, the mean."""
    return sum(value) / len(value) if isinstance(value, list) else value


def table(what: str, results: dict[str, dict]) -> None:
    """Print a line a block (of `degradation`, a metric) for every model."""
    for model, numbers in results.items():
        print(f"\n{what}: {model}")
        if what == "degradation":
            for name, n in numbers.items():
                print(f"  {name:8} best {n['best']:8.3f} at step {n['best_step']}, last "
                      f"{n['last']:8.3f}: {n['lost']:.3f} lost")
            continue
        titles, labels, columns = "", "", []
        for title, _, lines in GROUPS[what]:
            titles += f"  {title[: 12 * len(lines) - 2]:{12 * len(lines) - 2}}"
            labels += "".join(f"{label[:11]:>12}" for label in lines)
            columns += [numbers[key] for key in lines.values()]
        print(f"  block{titles}\n       {labels}")
        for i in range(max(map(len, columns))):
            cells = [f"{level(v[i]):12.3f}" if i < len(v) else " " * 12 for v in columns]
            print(f"  {i + 1:5}{''.join(cells)}")


COLOURS, LINES = ("#0072B2", "#D55E00", "#009E73", "#444444"), ("-", "--", ":", "-.")


def canvas(panels: int, columns: int):
    """A figure and its axes; None, None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None, None
    rows = -(-panels // columns)
    fig = Figure(figsize=(5.2 * columns, 3.4 * rows), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes[panels:]:
        ax.set_visible(False)
    return fig, axes


def draw(path: Path, what: str, results: dict[str, dict]) -> bool:
    """The table as a PNG: a model is a style of line, a quantity a marker, a head a dot; then, for
    `dimensions`, two panels a model. False without matplotlib."""
    there = set().union(*results.values())
    groups = [group for group in GROUPS[what] if there & set(group[2].values())]
    profiles = [*product(PROFILES, results.items())] if what == "dimensions" else []
    fig, axes = canvas(len(groups) + len(profiles), max(2, len(results) if profiles else 0))
    if not fig:
        return False
    for ax, (title, unit, lines) in zip(axes, groups):
        for (i, (model, numbers)), (j, (label, key)) in product(
                enumerate(results.items()), enumerate(lines.items())):
            y = numbers.get(key, ())
            x, y = (y["steps"], y["values"]) if "steps" in y else (range(1, 1 + len(y)), y)
            if not len(y) or (j and not any(map(level, y))):  # no registers, no bias
                continue
            label = f"{model}: {label}" if len(lines) > 1 else model
            ax.plot(x, list(map(level, y)), LINES[i % 4], color=COLOURS[i % 4], marker="os^D"[j],
                    label=label, markersize=4, markerfacecolor="white" if j else None)
            heads = [(at, v) for at, block in zip(x, y) if isinstance(block, list) for v in block]
            ax.scatter([at for at, _ in heads], [v for _, v in heads], s=3, color=COLOURS[i % 4])
        last = ", then final norm" if what in ("cosines", "dimensions") else ""
        ax.set(title=title, ylabel=unit, xlabel="step" if what == "degradation" else "block" + last)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    for ax, ((kind, title, scale), (model, n)) in zip(axes[len(groups):], profiles):
        i = max((len(n["gains_cosine"]) - 1) // 3 - 1, 0)  # the last block of the first third
        order = torch.tensor(n["before norm patch"][i]).argsort(descending=True).tolist()
        for who, label, style in (("cls", "[CLS]", ":k."), ("patch", "patches", "-")):
            values = n[kind.format(who)][i]
            ax.plot([values[d] for d in order], style, linewidth=1, markersize=4, label=label)
        ax.set(title=f"{model}, block {i + 1}", ylabel=title, yscale=scale,
               xlabel="dimension, in the order of patches' activation")
        ax.legend(fontsize=7)
    fig.savefig(path, dpi=110)
    return True


PROFILES = (("before norm {}", "mean |activation| before norm1", "log"),
            ("{} gain", "gain of norm1", "linear"))


def intervals(path: Path, panels: dict[str, list], mark: float) -> bool:
    """A PNG of intervals: {title with unit: [(name, low, middle, high)]}, a line at `mark`."""
    fig, axes = canvas(len(panels), min(len(panels), 2))
    for ax, (title, rows) in zip(axes, panels.items()) if fig else ():
        names, low, middle, high = zip(*rows[::-1])
        y, middle = range(len(names)), torch.tensor(middle)
        spread = torch.stack([middle - torch.tensor(low), torch.tensor(high) - middle])
        ax.errorbar(middle, y, xerr=spread.nan_to_num(), fmt="ko", capsize=4)
        ax.axvline(mark, color="#0072B2", linestyle="--")
        ax.set(yticks=y, yticklabels=names, xlabel=title, ylim=(-0.7, len(names) - 0.3))
    if fig:
        fig.savefig(path, dpi=110)
    return bool(fig)


def cost_table(model: str, numbers: dict[str, dict]) -> None:
    base = numbers["plain"]
    print(f"\ncost: the size of {model}; times are of a picture, then the ratio to plain's in the "
          f"same round, median [quartiles] of {base['rounds']} rounds")
    print(f"  {'':26}{'M parameters':>19}{'GFLOPs, counted':>19}{'formula':>9}{'kept MiB':>10}"
          f"{'peak MiB':>10}{'forward, ms':>32}{'training step, ms':>32}")
    for name, n in numbers.items():
        more = [f"{n[k] / base[k] - 1:+.2%}" for k in ("parameters", "gflops_counted", "gflops")]
        times = [f"{n[f'{k}_ms']:.2f}  {mid:.3f} [{low:.3f}, {high:.3f}]"
                 for k in ("forward", "step") for low, mid, high in [n[f"{k}_ratio"]]]
        print(f"  {name:26}{n['parameters'] / 1e6:9.2f} {more[0]:>9}{n['gflops_counted']:9.2f} "
              f"{more[1]:>9}{more[2]:>9}{n['kept_mib']:10.1f}{n.get('peak_mib', math.nan):10.0f}"
              f"{times[0]:>32}{times[1]:>32}")


def paper_setting() -> str:
    plain, ours = (counts(clsspec.config("large", image_size=518, spec=spec), 224)
                   for spec in ((), ("norms", "qkv")))
    more = {k: ours[k] / plain[k] - 1 for k in plain}
    return (f"\ncost: the paper's ViT-L, norms everywhere and qkv in 8 of 24 blocks: "
            f"{more['parameters']:+.1%} parameters, {more['gflops']:+.1%} FLOPs by formula, "
            f"{more['gflops_counted']:+.2%} counted (here row 0 passes both copies)")


def comparison_table(a: str, b: str, found: dict) -> None:
    print(f"{b} minus {a}, {len(found['seeds'])} pairs, seeds {found['seeds']}"
          + (f", without {found['left out']}" if found["left out"] else ""))
    for name, metrics in found["results"].items():
        print(f"  {name}")
        for metric, r in metrics.items():
            if r["n"] == 1:
                verdict = "one pair: no interval"
            elif r["low"] <= 0 <= r["high"]:
                verdict = "no difference measured: the interval contains zero"
            else:
                verdict = "better" if (r["difference"] < 0) == (metric in LOWER) else "worse"
            print(f"    {metric:7}{r['a']:9.3f} -> {r['b']:8.3f}  {r['difference']:+8.3f} "
                  f"[{r['low']:+.3f}, {r['high']:+.3f}]  {verdict}")


# --------------------------------------------------------------------------------------------------
# The command.


NEAREST = TF.InterpolationMode.NEAREST_EXACT


def fit(x: Tensor, size: int, how=TF.InterpolationMode.BILINEAR) -> Tensor:
    """(C, H, W) -> its middle, (C, size, size)."""
    return TF.center_crop(TF.resize(x, [size], how, antialias=True), [size])


def pictures(args, size: int):
    """uint8 (n, 3, size, size), class masks (n, size, size) or None, and the first class that is
    foreground. ValueError: what is missing."""
    n = args.pictures
    if args.data == "scenes":
        scenes = Scenes("test", size)(torch.arange(n))
        return scenes["image"], scenes["mask"], 4  # after sky and grounds
    if args.data in ("voc", "pairs"):
        protocol = replace(eval_dense.PROTOCOLS[args.data], tasks=("seg",))
        data = eval_dense.open_set(args.data, args.root, protocol, 1, "cpu")[1]
        rows = data.rows[:: max(len(data.rows) // n, 1)][:n]
        img = torch.stack([fit(eval_dense.decode(row["image"], "RGB"), size) for row in rows])
        masks = [data.mask(row["mask"])[None] for row in rows if "mask" in row]
        masks = torch.stack([fit(m, size, NEAREST)[0] for m in masks]) if masks else None
        return img, None if masks is None or masks.min() == 255 else masks, 1
    kinds = (".jpg", ".jpeg", ".png", ".webp")
    files = sorted(f for f in Path(args.data).rglob("*") if f.suffix.lower() in kinds)
    if not files:
        raise ValueError(f"--data {args.data}: neither scenes, voc or pairs, nor a folder with "
                         "pictures (jpg, png, webp)")
    files = files[:: max(len(files) // n, 1)][:n]
    return torch.stack([fit(eval_dense.decode(f, "RGB"), size) for f in files]), None, 1


def default_size(c: clsspec.Config) -> int:
    return max(8, min(16, c.image_size // c.patch)) * c.patch


def parse(argv) -> argparse.Namespace:
    raw, cuda = argparse.RawDescriptionHelpFormatter, torch.cuda.is_available()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("models", nargs="*", help="run folders, checkpoints, files of public weights")
    p.add_argument("--compare", nargs=2, metavar=("A", "B"), help="patterns of run folders; quote")
    p.add_argument("--what", default=",".join(WHAT), help="comma list (default: %(default)s)")
    p.add_argument("--network", default="teacher", choices=["teacher", "student", "untrained"],
                   help="(default: teacher)")
    g = p.add_argument_group("pictures")
    g.add_argument("--data", default="scenes",
                   help="scenes, voc, pairs, or a folder of pictures (default: scenes)")
    g.add_argument("--root", default="", help="folder of voc or pairs")
    g.add_argument("--pictures", type=eval_dense.count, default=64, help="how many (default: 64)")
    g.add_argument("--image-size", type=eval_dense.count, help="side, pixels; default: the model's "
                   "own, but at least 8 and at most 16 patches")
    g.add_argument("--foreground", action="store_true", help="pca: of the foreground alone")
    g = p.add_argument_group("cost")
    g.add_argument("--batch-size", type=eval_dense.count,
                   help="pictures a step; default: 32, on a CPU as many as take 20 GFLOPs")
    g.add_argument("--seconds", type=float, default=15, help="time for it (default: 15)")
    g.add_argument("--compile", action="store_true", help="torch.compile the networks")
    g = p.add_argument_group("machine and output")
    g.add_argument("--device", default="cuda" if cuda else "cpu", help="cpu or cuda")
    g.add_argument("--out", help="folder; default: the first model's")
    return p.parse_args(argv)


def tidy(x):
    """Numbers of five digits, and None for NaN, which JSON does not know."""
    if isinstance(x, dict):
        return {k: tidy(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [tidy(v) for v in x]
    return x if not isinstance(x, float) else float(f"{x:.5g}") if math.isfinite(x) else None


def run(args) -> None:
    made = {"command": "python " + " ".join(sys.argv), "versions": versions()}
    note = "no matplotlib here, so no plots; python -m pip install matplotlib for them"
    if args.compare:
        found, file = compare(*args.compare), Path(args.compare[1]).parent / "analysis.json"
        comparison_table(*args.compare, found)
        file = Path(args.out) / "analysis.json" if args.out else file
        file.parent.mkdir(parents=True, exist_ok=True)
        eval_dense.record(file, "compare " + " ".join(args.compare), tidy(found | {"made": made}))
        panels = {f"{metric}, second minus first": [
            (name, *(found["results"][name][metric][k] for k in ("low", "difference", "high")))
            for name in found["results"] if metric in found["results"][name]]
            for metric in eval_dense.METRICS}
        panels = {title: rows for title, rows in panels.items() if rows}
        return print("" if intervals(file.with_name("compare.png"), panels, 0) else note)

    what = set(args.what.split(","))
    if unknown := what - set(WHAT):
        raise ValueError(f"--what: unknown {', '.join(unknown)}; choose from {', '.join(WHAT)}")
    if not args.models:
        raise ValueError("give a run folder or weights, as in: python analyze.py runs/NAME")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: torch sees no GPU here; give --device cpu")
    files = [Path(m) / "last.pt" if Path(m).is_dir() else Path(m) for m in args.models]
    names = [f.parent.name if f.name == "last.pt" else f.stem for f in files]
    names = names if len(set(names)) == len(names) else args.models
    models = {n: clsspec.load(f, args.network).to(args.device) for n, f in zip(names, files)}
    out, results, sheets, plotted = Path(args.out or files[0].parent), defaultdict(dict), {}, True
    out.mkdir(parents=True, exist_ok=True)
    made |= {k: getattr(args, k) for k in ("data", "pictures", "network", "device")}

    def keep(w):
        eval_dense.record(out / "analysis.json", w, {"made": made, "models": tidy(results[w])})

    measures = [m for m in (cosines, dimensions, norms, attention) if m.__name__ in what]
    measures += [features] if what & {"foreground", "pca"} else []
    for (name, model), file in zip(models.items(), files):
        size = args.image_size or default_size(model.config)
        grid = size // model.config.patch, size // model.config.patch
        img, mask, objects = pictures(args, size) if measures else (None, None, 0)
        kept = survey(model, img, measures)
        for w in ("cosines", "attention"):
            if w in what:
                results[w][name] = means(kept[w])
        if "dimensions" in what:
            results["dimensions"][name] = dimension_numbers(model, kept["dimensions"])
        if "norms" in what:
            results["norms"][name] = norm_numbers(kept["norms"], grid)
        if "foreground" in what and mask is None:
            print("foreground: left out, it wants masks: --data scenes, voc or pairs")
        elif "foreground" in what:
            labels = patch_labels(mask, grid, 1 + int(mask[mask != 255].max()))
            results["foreground"][name] = foreground_numbers(kept["features"], labels, objects)
        if "degradation" in what:
            try:
                results["degradation"][name] = degradation(file.parent)
            except ValueError as err:
                print(f"degradation: left out, {err}")
        if "pca" in what:
            sheets[name] = img[:8], kept["features"]["patches"][-1][:8], grid
        del kept

    for w in (w for w in WHAT if results[w]):
        table(w, results[w])
        keep(w)
        plotted &= draw(out / f"{w}.png", w, results[w])
    if sheets:
        imgs, x, grids = zip(*sheets.values())
        colours, shares = rgb(x, grids, args.foreground)
        tiles = [TF.resize(c[i], [128, 128], NEAREST) for i in range(len(imgs[0]))
                 for c in (imgs[0] / 255, *colours)]
        save_image(torch.stack(tiles), out / "pca.png", nrow=1 + len(colours))
        results["pca"] = {name: {"share": share} for name, share in zip(sheets, shares)}
        keep("pca")
        print("\npca: columns of pca.png are the picture, then, with the share of its components, "
              + ", ".join(f"{k} {sum(v):.0f} %" for k, v in zip(sheets, shares)))
    if "cost" in what:
        print(paper_setting())
        sizes = {}
        for name, model in models.items():
            c = model.config
            sizes.setdefault((c.width, c.depth, c.heads, c.patch, c.mlp_ratio), (name, c))
        for name, c in sizes.values():
            size = args.image_size or default_size(c)
            most = 32 if args.device != "cpu" else 20e9 / clsspec.flops(c, size, size)
            batch = args.batch_size or min(32, max(1, int(most)))
            found = cost(c, size, batch, args.seconds, args.device, args.compile)
            cost_table(f"{name} at {size} px, batch {batch}", found)
            results["cost"][name] = found
            rows = [(variant, *n["step_ratio"]) for variant, n in found.items()]
            title = {f"time of a training step / plain's, size of {name}": rows}
            plotted &= intervals(out / "cost.png", title, 1)
        keep("cost")
    print(f"\nnumbers and pictures: {out}" + ("" if plotted else f"; {note}"))


def main(argv=None) -> None:
    try:
        run(parse(argv))
    except (ValueError, OSError) as err:
        sys.exit(f"error: {str(err).strip().splitlines()[-1].removeprefix('ValueError: ')}")


if __name__ == "__main__":
    main()
