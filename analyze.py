"""What the two papers measure, of your own models or of public weights, as numbers and pictures.

    python analyze.py runs/plain runs/spec                     # everything, both in one plot
    python analyze.py dino_deitsmall16_pretrain.pth            # the same of public weights
    python analyze.py runs/spec --what cosines,pca --data path/to/pictures
    python analyze.py runs/spec --what cost --seconds 120      # the price of every variant
    python analyze.py --compare "runs/plain-*" "runs/spec-*"   # two groups, paired over seeds

Numbers go to analysis.json in --out, pictures beside it, to NAME.png; all but pca.png want
matplotlib. --out is the first model's folder (what is of another model then goes to its own, too),
of weights runs/FILE, of --compare the folder that all runs are in. P1: arXiv 2602.08626, P2: arXiv
2605.23868. "Ours": a paper's formula is unknown.

cosines      Mean cosine, in [-1, 1], of [CLS] with patches and of patches with other patches, at
             four points of a block: `before norm`, what enters it; `after norm`, what leaves norm1;
             `attention`, the branch after out-projection and LayerScale; `after attention`, the
             residual stream with it. The last row is the final norm. (P1; where exactly: ours)
dimensions   Mean |activation| of each dimension, of [CLS] and of patches, before and after norm1.
             `overlap`: sum_d min(a_d, b_d), both scaled to sum 1; 1 the same dimensions, 0 disjoint
             ones (ours). `gain`: mean |gain| of norm1 on the tenth of the dimensions in which [CLS]
             (patches) are largest, of the gains that [CLS] (patches) pass; `gains_cosine`: of the
             two gain vectors. gains.png: both, dimension by dimension, in one block. (P1)
norms        L2 norm of patches that leave a block; `outliers`: % of patches above three medians,
             `on_border`: % of those in the outermost ring, `map`: where they are (ours; P1's rows
             with registers and attention bias are about them)
attention    Of patches as queries: `entropy`, nats; `support`, number of keys with weight above 0;
             `distance` to the patches looked at, in patches; `to_cls`, `to_registers`, `to_bias`, %
             of the weight. Of [CLS]: `cls_entropy`, `cls_support`. A number a head; tables and
             lines are means over heads. Models on grids of other sizes do not compare. (P2)
foreground   How well each block's patches, after the final norm, tell foreground from background:
             area under the ROC curve, 0.5 not at all, mean over pictures, of cos(patch, [CLS]),
             `auc_cls`, and of the first principal component, the better of its two signs, `auc_pc`.
             Colour alone can do it: look at --network untrained, too. `miou`, %: the block's linear
             probe, from eval.json, where `eval_dense.py RUN --tasks seg --layer BLOCK` was run.
             Wants masks: scenes, voc, pairs; --background says what is not foreground. (P2;
             formulas ours)
degradation  The teacher's online probe in log.jsonl: each metric over steps, best, last, and what
             was lost since the best, in its unit. (P2, dense degradation)
pca          Eight pictures, then a column a model: three principal components of the last block's
             patches as RGB, fitted to all --pictures, in the order and with the signs that are most
             like the first model's. --foreground: fitted to the patches on that side of 0 of the
             first component that the border has less of; others are black. `share`: % of the
             variance. (P1, P2)
cost         Each model, and every variant of its size: parameters; GFLOPs of a picture, by torch's
             counter and by formula; time of a forward pass and of a training step (forward,
             backward) over plain's in the same round; what the forward pass keeps for the backward
             one, MiB a picture, in fp32; on a GPU, where times are of bf16, also the peak of a
             step. (P1: +8 % parameters, +0 % FLOPs)
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
from itertools import permutations, product
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as in train.py

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import ImageDraw  # comes with torchvision
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid

try:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
except ImportError:  # numbers alone
    Figure = None

import clsspec
import eval_dense
from clsspec import ViT
from eval_dense import Scenes, bar, normalise, versions

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
        asking = 1 if isinstance(block, clsspec.ClassBlock) else None
        q, k, v = block.attn.queries_keys_values(normed, asking)
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
    nothing = torch.full_like(entropy[:, :, 0], math.nan)  # where there is no [CLS]
    kept["cls_entropy"] = entropy[:, :, 0] if step.cls else nothing
    kept["cls_support"] = support[:, :, 0] if step.cls else nothing
    w = w[:, :, step.first:]  # patches ask; in CaiT's last blocks none does: NaN
    at = torch.cartesian_prod(*(torch.arange(n, device=w.device) for n in step.grid)).float()
    seen, far = w[..., start:], torch.cdist(at, at)[: w.shape[2]]
    kept |= {"entropy": entropy[:, :, step.first:].mean(-1),
             "support": support[:, :, step.first:].mean(-1),
             "distance": ((seen * far).sum(-1) / seen.sum(-1)).nanmean(-1)}
    mass = 100 * w.mean(2)  # (B, H, keys)
    kept["to_bias"] = mass[..., : step.bias].sum(-1)
    kept["to_cls"] = mass[..., step.bias] if step.cls else nothing
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
    parts = img.split(batch)
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
    out["gains_cosine"] = [F.cosine_similarity(*pair, dim=0).item() for pair in gains]
    for who, gain in zip(("cls", "patch"), zip(*gains)):
        out[f"{who} gain"] = [g.tolist() for g in gain]
        out[f"gain on {who} dims"] = []
        for g, size in zip(gain, map(torch.tensor, out[f"before norm {who}"])):
            top = size.topk(max(len(size) // 10, 1)).indices
            known = size.isfinite().all()  # CaiT has no [CLS] at first
            out[f"gain on {who} dims"].append(g.abs()[top].mean().item() if known else math.nan)
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


def patch_labels(mask: Tensor, grid, classes: int) -> Tensor:
    """Class maps (P, H, W), 255 ignored -> the commonest class of each patch (P, N), 255: none."""
    patches = rearrange(mask.long(), "p (h a) (w b) -> p (h w) (a b)", h=grid[0], w=grid[1])
    pixels = torch.stack([(patches == c).sum(-1) for c in range(classes)], dim=-1)
    return torch.where(pixels.sum(-1) > 0, pixels.argmax(-1), 255)


def foreground_numbers(kept: dict, labels: Tensor, background: tuple) -> dict[str, list]:
    """See `foreground` at the top. labels: (P, N) classes, 255 ignored. Pictures with only one of
    foreground and background do not count; NaN if none is left."""
    known = labels != 255
    front = known & ~torch.isin(labels, torch.tensor(background))
    both = [i for i in range(len(labels)) if front[i].any() and (known & ~front)[i].any()]

    def mean(score):
        aucs = [auc(score[i][known[i]], front[i][known[i]]) for i in both]
        return sum(aucs) / len(aucs) if aucs and not score.isnan().any() else math.nan

    pcs = [mean(components(x, 1)[0][..., 0]) for x in kept["patches"]]
    return {"auc_cls": list(map(mean, kept["cosine"])), "auc_pc": [max(p, 1 - p) for p in pcs]}


def probes(folder: Path, network: str, data: str, root: str, depth: int) -> list[float]:
    """mIoU of each block's linear probe in eval.json, with the data set's own protocol but for the
    layer; NaN where there is none."""
    out, wanted = [math.nan] * depth, eval_dense.title(network, data, root)
    for name, result in read_json(folder / "eval.json").items():
        said = [w for w in name.split(" ") if not w.startswith(("tasks=", "layer="))]
        if " ".join(said) == wanted and "miou" in result:
            out[(result["protocol"]["layer"] or depth) - 1] = result["miou"]
    return out


def read_json(file: Path) -> dict:
    """{} if there is no such file. ValueError: damaged."""
    try:
        return json.loads(file.read_text()) if file.exists() else {}
    except ValueError as err:
        raise ValueError(f"{file} is damaged ({err}); make it anew") from None


def degradation(run: Path) -> dict[str, dict]:
    """Metrics of the online probe in a run's log.jsonl: steps and values, best, last, and what was
    lost since the best (in the metric's unit, 0 or more). ValueError: no log, no probe in it."""
    log = run / "log.jsonl"
    try:
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    except ValueError as err:
        raise ValueError(f"{log} is damaged ({err})") from None
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
    each as colours (P, 3, h, w) in [0, 1], in the order and with the signs that are most like the
    first model's (its own: skewed towards the positive); and their shares of the variance, %."""
    colours, shares, like = [], [], None
    for x, (h, w) in zip(models, grids):
        keep = foreground(x, h, w) if front else torch.ones(x.shape[:2], dtype=torch.bool)
        pc, share = components(x, 3, keep)
        pc = rearrange(pc, "p (h w) c -> c p h w", h=h)
        if like is None:
            like = pc * (pc**3).sum((1, 2, 3), keepdim=True).sign()
        a, b = (F.normalize(v.flatten(1), dim=1) for v in (F.interpolate(like, (h, w)), pc))
        cosine = a @ b.T  # (3, 3)
        order = list(max(permutations(range(3)), key=lambda o: cosine[range(3), o].abs().sum()))
        pc = pc[order] * cosine[range(3), order].sign()[:, None, None, None]
        low, high = pc.flatten(2)[:, keep.view(len(x), -1)].quantile(
            torch.tensor([0.01, 0.99]).double(), dim=1)[..., None, None, None]
        colour = ((pc - low) / (high - low).clamp(min=1e-9)).clamp(0, 1) * keep.view(len(x), h, w)
        colours.append(colour.transpose(0, 1).float())
        shares.append([share[i] for i in order])
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


def cost(given: dict[str, clsspec.Config], side: int, batch: int, seconds: float, device: str,
         compiled: bool) -> dict[str, dict]:
    """Models of one size, and every variant of it. Round after round, until the time is used, each
    takes its turn; a ratio is of times in one round, and is given with its quartiles."""
    given = {name: replace(c, drop_path=0.0) for name, c in given.items()}
    plain = replace(next(iter(given.values())), **clsspec.PLAIN)
    img, cuda = torch.randn(batch, 3, side, side, device=device), device != "cpu"
    out, models, times = {}, {}, defaultdict(list)
    variants = {name: clsspec.checked(replace(plain, **v)) for name, v in VARIANTS.items()}
    for name, variant in (variants | given).items():
        models[name] = ViT(variant).to(device)  # and then shares plain's weights: less memory
        models[name].load_state_dict(models["plain"].state_dict(), strict=False, assign=True)
        out[name] = counts(variant, side) | {"kept_mib": kept_mib(models[name], img) / batch}
        if compiled:
            torch._dynamo.config.recompile_limit = 100  # all models share one forward, one count
            models[name].compile(dynamic=False)
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


def numbers_of(run: Path) -> dict[str, dict[str, float]]:
    """{result: {metric: number}} of a run: its eval.json, and means over blocks of what is in its
    analysis.json."""
    out = {name: {k: result[k] for k in eval_dense.METRICS if k in result}
           for name, result in read_json(run / "eval.json").items()}
    for name, found in read_json(run / "analysis.json").items():
        what, models = name.split()[0], found.get("models", {})  # others may be beside it
        model = models.get(run.name) or models.get("/".join(run.parts[-2:]), {})
        flat = {k: [v for block in model.get(k, ()) for v in
                    (block if isinstance(block, list) else [block]) if v is not None]
                for k in BLOCKS.get(what, ())}
        if any(flat.values()):
            n = max(found["made"]["pictures"].values())
            out[f"{name}, mean over blocks of {n} pictures"] = {
                k: sum(v) / len(v) for k, v in flat.items() if v}
    return out


def compare(a: str, b: str) -> dict[str, dict]:
    """Two patterns of run folders -> for every number that all runs have, the mean of b - a over
    pairs of equal seeds, with a 95 % interval (Student's t); and the flags and versions in which a
    pair differs. ValueError: no pairs, nothing shared."""
    groups, how = [], ({}, {})
    for pattern, configs in zip((a, b), how):
        runs = {}
        for folder in filter(Path.is_dir, map(Path, sorted(glob.glob(pattern)))):
            config = read_json(folder / "config.json")
            seed = config.get("args", {}).get("seed")
            if seed is None:
                raise ValueError(f"{folder}/config.json names no seed: not a run of train.py")
            if seed in runs:
                raise ValueError(f"{pattern!r} has two runs of seed {seed}; a pair needs one each")
            runs[seed] = numbers_of(folder)
            configs[seed] = config["args"] | {k: config.get(k) for k in SETTING}
        groups.append(runs)
    seeds = sorted(groups[0].keys() & groups[1].keys())
    if not seeds:
        raise ValueError(f"no pairs: seeds of {a!r} are {sorted(groups[0])}, of {b!r} "
                         f"{sorted(groups[1])}; quote the patterns, train both with equal --seed")
    every = [group[seed] for group in groups for seed in seeds]
    differ = {k for s in seeds for k, v in how[0][s].items() if v != how[1][s].get(k)}
    differ -= {"out", "resume", "overwrite"}
    out = {"seeds": seeds, "left out": sorted(groups[0].keys() ^ groups[1].keys()),
           "differ in": sorted(differ), "results": {}}
    for name in every[0]:
        for metric in every[0][name]:
            if all(metric in run.get(name, ()) for run in every):
                x, y = (torch.tensor([g[s][name][metric] for s in seeds]).double() for g in groups)
                out["results"].setdefault(name, {})[metric] = interval(x, y)
    if not out["results"]:
        has = [", ".join(run) or "nothing" for run in every]
        raise ValueError(f"the {len(every)} runs share no number: in eval.json the first has "
                         f"{has[0]}, the last {has[-1]}; judge all in the same way: "
                         "python eval_dense.py RUN")
    return out


def interval(a: Tensor, b: Tensor) -> dict:
    """Values of n pairs -> means, mean difference b - a and its 95 % interval; none if n = 1."""
    d, n = b - a, len(a)
    half = T95[min(n - 1, 30) - 1] * (d.std() / n**0.5).item() if n > 1 else math.nan
    mean = d.mean().item()
    return {"a": a.mean().item(), "b": b.mean().item(), "difference": mean, "n": n,
            "low": mean - half, "high": mean + half}


SETTING = "git", "torch", "device", "threads"  # in config.json: what may differ beside the flags
# Student's t, two-sided 95 %, 1 to 30 degrees of freedom; the last serves for more, a little wide.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
       2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
       2.052, 2.048, 2.045, 2.042)

# --------------------------------------------------------------------------------------------------
# Tables and pictures. A group is one panel of a figure and a few columns of a table: title, unit,
# {what a line is called: its name in analysis.json}.

GROUPS = {
    "cosines": [(point, "cosine", {"[CLS]-patch": f"{point} cls_patch",
                                   "patch-patch": f"{point} patch_patch"}) for point in POINTS],
    "dimensions": [
        ("shared by [CLS] and patches", "overlap", {
            "before norm": "before norm overlap", "after norm": "after norm overlap"}),
        ("gain of norm1 on largest dims", "mean |gain|", {
            "of [CLS]": "gain on cls dims", "of patches": "gain on patch dims"}),
        ("[CLS]'s and patches'", "cosine of gains", {"cosine": "gains_cosine"})],
    "norms": [("norm of patches", "L2 norm", {"median": "median", "99th perc.": "p99",
                                              "largest": "largest"}),
              ("outliers", "% of patches", {"> 3 medians": "outliers"}),
              ("on the border", "% of outliers", {"on border": "on_border"})],
    "attention": [
        ("entropy", "nats", {"patches": "entropy", "[CLS]": "cls_entropy"}),
        ("support", "keys with a weight", {"patches": "support", "[CLS]": "cls_support"}),
        ("distance", "patches", {"patches": "distance"}),
        ("what patches give", "% of weight", {"to [CLS]": "to_cls", "to registers": "to_registers",
                                              "to bias": "to_bias"})],
    "foreground": [("foreground or background", "area under ROC", {"cos to [CLS]": "auc_cls",
                                                                   "first PC": "auc_pc"}),
                   ("linear probe", "mIoU, %", {"mIoU": "miou"})],
    "degradation": [(f"{name} of the teacher", text.split()[-1] if " " in text else "ratio",
                     {name: name}) for name, text in eval_dense.METRICS.items()]}
BLOCKS = {what: [key for *_, lines in groups for key in lines.values()]
          for what, groups in GROUPS.items() if what != "degradation"}


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
            width = max(14 * len(lines), len(title) + 3)
            titles += f"{title:>{width}}"
            labels += "".join(f"{label:>14}" for label in lines).rjust(width)
            columns += [(numbers[key], width - 14 * (len(lines) - 1) if i == 0 else 14)
                        for i, key in enumerate(lines.values())]
        print(f"  block{titles}\n       {labels}")
        for i in range(max(len(v) for v, _ in columns)):
            cells = [f"{level(v[i]):{w}.3f}" if i < len(v) else " " * w for v, w in columns]
            print(f"  {i + 1:5}{''.join(cells)}")


def style(i: int) -> dict:
    """How the line of model i looks: 16 differ, the first four without colour, too."""
    lines, colours = ("-", "--", ":", "-."), ("#0072B2", "#D55E00", "#009E73", "#444444")
    return {"linestyle": lines[(i + i // 4) % 4], "color": colours[i % 4]}


def canvas(panels: int, columns: int, **more):
    """A figure of matplotlib and its axes."""
    rows = -(-panels // columns)
    fig = Figure(figsize=(5.2 * columns, 3.2 * rows + 0.4), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False, **more).flatten()
    for ax in axes[panels:]:
        ax.set_visible(False)
    return fig, axes


def draw(path: Path, what: str, results: dict[str, dict]) -> None:
    """The table as a PNG: a line is a model, a marker a quantity, a dot a head of the first one."""
    there = set().union(*results.values())
    groups = [group for group in GROUPS[what] if there & set(group[2].values())]
    fig, axes = canvas(len(groups), min(len(groups), 2), sharey=what == "cosines")
    for ax, (title, unit, lines) in zip(axes, groups):
        every = product(enumerate(results.values()), enumerate(lines.values()))
        for (i, numbers), (j, key) in every:
            y = numbers.get(key, ())
            x, y = (y["steps"], y["values"]) if "steps" in y else (range(1, 1 + len(y)), y)
            if not len(y) or (j and not any(map(level, y))):  # no registers, no bias
                continue
            ax.plot(x, list(map(level, y)), marker="os^"[j], markersize=4, **style(i),
                    markerfacecolor="white" if j else None)
            heads = [(at, v) for at, block in zip(x, y) if isinstance(block, list) for v in block]
            if not j:
                ax.plot([at for at, _ in heads], [v for _, v in heads], ".", markersize=2,
                        color=style(i)["color"])
        ax.set(title=title, ylabel=unit, xlabel="step" if what == "degradation" else "block")
        if what in ("cosines", "dimensions") and title not in POINTS[2:]:
            norm = max(len(n[key]) for n in results.values())
            ticks = range(1, norm, 2 if norm < 20 else 4)
            ax.set_xticks([*ticks, norm], [*map(str, ticks), "final\nnorm"])
        ax.grid(alpha=0.3)
        if unit.startswith("% of"):
            ax.set_ylim(bottom=0)
        if len(lines) > 1:
            ax.legend(fontsize=7, handles=[
                Line2D([], [], color="black", linestyle="", marker="os^"[j], label=label,
                       markerfacecolor="white" if j else None) for j, label in enumerate(lines)])
    fig.legend(loc="outside lower center", ncols=4, fontsize=8, handles=[
        Line2D([], [], label=name, **style(i)) for i, name in enumerate(results)])
    fig.savefig(path, dpi=110)


def draw_gains(path: Path, results: dict[str, dict]) -> None:
    """A column a model: |activation| and gain, dimension by dimension, in the last block of the
    first third (in CaiT the first with a [CLS])."""
    fig, axes = canvas(2 * len(results), len(results))
    for k, (ax, (model, n)) in enumerate(zip(axes, [*results.items()] * 2)):
        gain, known = k >= len(results), [math.isfinite(v) for v in n["before norm overlap"]]
        i = max((len(known) - 1) // 3 - 1, known.index(True))
        order = torch.tensor(n["before norm patch"][i]).argsort(descending=True).tolist()
        for who, label, look in (("cls", "[CLS]", ":k."), ("patch", "patches", "-")):
            values = n[f"{who} gain" if gain else f"before norm {who}"][i]
            ax.plot([values[d] for d in order], look, linewidth=1, markersize=4, label=label)
        ax.set(title=f"{model}, block {i + 1}", yscale="linear" if gain else "log",
               ylabel="gain of norm1" if gain else "mean |activation| before norm1",
               xlabel="dimension, in the order of patches' activation")
        ax.legend(fontsize=7)
    fig.savefig(path, dpi=110)


def draw_intervals(path: Path, panels: dict[str, list], mark: float, columns: int = 2) -> None:
    """{title with unit: [(name, low, middle, high, single values ..)]} -> a panel each, with a line
    at `mark`."""
    fig, axes = canvas(len(panels), min(len(panels), columns))
    for ax, (title, rows) in zip(axes, panels.items()):
        for y, (_, low, middle, high, *each) in enumerate(rows):
            ax.plot([low, high], [y, y], "k|-", markersize=8)
            ax.plot(middle, y, "ko", markersize=5)
            ax.plot(each, [y] * len(each), "o", color="#D55E00", markersize=3)
        ax.axvline(mark, color="#0072B2", linestyle="--")
        ax.set(yticks=range(len(rows)), yticklabels=[row[0] for row in rows], title=title,
               ylim=(len(rows) - 0.3, -0.7))
        ax.title.set_size(9)
    fig.savefig(path, dpi=110)


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
    print(f"{b} minus {a}, paired over seeds {found['seeds']}"
          + (f", without {found['left out']}" if found["left out"] else "")
          + f"; runs differ in: {', '.join(found['differ in']) or 'nothing'}")
    for name, metrics in found["results"].items():
        print(f"  {name}")
        for metric, r in metrics.items():
            if r["n"] == 1:
                verdict = "one pair: no interval"
            elif r["low"] <= 0 <= r["high"]:
                verdict = "no difference measured: the interval contains zero"
            else:
                better = (r["difference"] < 0) == (metric in LOWER)
                verdict = "better" if better else "worse"
                verdict = verdict if metric in eval_dense.METRICS else "a difference"
            print(f"    {metric:28}{r['a']:9.3f} -> {r['b']:8.3f}  {r['difference']:+8.3f} "
                  f"[{r['low']:+.3f}, {r['high']:+.3f}]  {verdict}")


# --------------------------------------------------------------------------------------------------
# The command.


NEAREST = TF.InterpolationMode.NEAREST_EXACT


def fit(x: Tensor, size: int, how=TF.InterpolationMode.BILINEAR) -> Tensor:
    """(C, H, W) -> its middle, (C, size, size)."""
    return TF.center_crop(TF.resize(x, [size], how, antialias=True), [size])


def pictures(args, size: int) -> tuple[Tensor, Tensor | None]:
    """uint8 (n, 3, size, size), and class masks (n, size, size), 255 ignored, if there are any.
    ValueError: what is missing."""
    n = args.pictures
    if args.data == "scenes":
        scenes = Scenes("test", size)(torch.arange(n))
        return scenes["image"], scenes["mask"]
    if args.data in ("voc", "pairs"):
        protocol = replace(eval_dense.PROTOCOLS[args.data], tasks=("seg",))
        data = eval_dense.open_set(args.data, args.root, protocol, 1, "cpu")[1]
        rows = data.rows[:: max(len(data.rows) // n, 1)][:n]
        masks = [fit(data.mask(r["mask"])[None], size, NEAREST)[0] for r in rows if "mask" in r]
        files, masks = [r["image"] for r in rows], torch.stack(masks) if masks else None
    else:
        kinds = (".jpg", ".jpeg", ".png", ".webp")
        files = sorted(f for f in Path(args.data).rglob("*") if f.suffix.lower() in kinds)
        files, masks = files[:: max(len(files) // n, 1)][:n], None
    if not files:
        raise ValueError(f"--data {args.data}: neither scenes, voc or pairs, nor a folder with "
                         "pictures (jpg, png, webp)")
    return torch.stack([fit(eval_dense.decode(f, "RGB"), size) for f in files]), masks


def picture_size(args, name: str, c: clsspec.Config) -> int:
    size = args.image_size or max(8, min(16, c.image_size // c.patch)) * c.patch
    if size % c.patch:
        fits = max(round(size / c.patch), 1) * c.patch
        raise ValueError(f"--image-size {size} is no multiple of {c.patch}, the patch of {name}; "
                         f"try {fits}")
    return size


def parse(argv) -> argparse.Namespace:
    raw, cuda = argparse.RawDescriptionHelpFormatter, torch.cuda.is_available()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("models", nargs="*", help="run folders, checkpoints, files of public weights")
    p.add_argument("--compare", nargs=2, metavar=("A", "B"), help="patterns of run folders; quote")
    p.add_argument("--what", type=eval_dense.names, default=WHAT,
                   help="comma list of the above; default: all")
    p.add_argument("--network", default="teacher", choices=["teacher", "student", "untrained"],
                   help="(default: teacher)")
    g = p.add_argument_group("pictures")
    g.add_argument("--data", default="scenes",
                   help="scenes, voc, pairs, or a folder of pictures (default: scenes)")
    g.add_argument("--root", default="", help="folder of voc or pairs")
    g.add_argument("--pictures", type=eval_dense.count, default=64, help="how many (default: 64)")
    g.add_argument("--image-size", type=eval_dense.count, help="side, pixels; default: the model's "
                   "own, but at least 8 and at most 16 patches")
    g.add_argument("--background", type=eval_dense.names, help="numbers of classes, comma list; "
                   "default: 0, of scenes 0,1,2,3: sky and grounds")
    g.add_argument("--foreground", action="store_true", help="pca: of the foreground alone")
    g = p.add_argument_group("cost")
    g.add_argument("--batch-size", type=eval_dense.count,
                   help="pictures a step; default: 32, on a CPU as many as take 20 GFLOPs")
    g.add_argument("--seconds", type=float, default=15, help="time for it (default: 15)")
    g.add_argument("--compile", action="store_true", help="torch.compile the networks")
    g = p.add_argument_group("machine and output")
    g.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cpu", "cuda"],
                   help="CUDA_VISIBLE_DEVICES says which (default: %(default)s)")
    g.add_argument("--out", help="folder; default: see above")
    return p.parse_args(argv)


def tidy(x):
    """Numbers of five digits, and None for NaN, which JSON does not know."""
    if isinstance(x, dict):
        return {k: tidy(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [tidy(v) for v in x]
    return x if not isinstance(x, float) else float(f"{x:.5g}") if math.isfinite(x) else None


def sheet(path: Path, columns: dict[str, Tensor]) -> None:
    """{title: pictures (P, 3, ., .)} -> a PNG, a column each, 128 pixels wide."""
    tiles = [TF.resize(c[i], [128, 128], NEAREST)
             for i in range(len(next(iter(columns.values())))) for c in columns.values()]
    img = TF.to_pil_image(F.pad(make_grid(tiles, len(columns)), (0, 0, 14, 0)))
    for i, title in enumerate(columns):
        ImageDraw.Draw(img).text((4 + 130 * i, 1), title[-20:])
    img.save(path)


def run_compare(args) -> None:
    found, (a, b) = compare(*args.compare), args.compare
    comparison_table(a, b, found)
    out = Path(args.out or os.path.commonpath([os.path.dirname(f) for p in (a, b)
                                               for f in glob.glob(p)]) or ".")
    out.mkdir(parents=True, exist_ok=True)
    eval_dense.record(out / "analysis.json", f"compare {a} {b}", tidy(found | made(args)))
    panels = {}
    for name, metrics in found["results"].items():
        for metric, r in metrics.items() if "untrained" not in name else ():
            unit = eval_dense.METRICS.get(metric, "{}").split("}")[1].strip()
            title = f"{metric}{', ' * bool(unit)}{unit}: second minus first, 95 %, n = {r['n']}"
            row = name, r["low"], r["difference"], r["high"]
            if metric in eval_dense.METRICS:
                panels.setdefault(title, []).append(row)
    if Figure and panels:
        draw_intervals(out / "compare.png", panels, 0)
    finish(out)


def made(args) -> dict:
    return {"made": {"command": "python " + " ".join(sys.argv), "versions": versions()}}


def finish(out: Path) -> None:
    more = "; no plots, as there is no matplotlib: python -m pip install matplotlib"
    print(f"\nnumbers and pictures: {out}" + ("" if Figure else more))


def run(args) -> None:
    if args.compare and not args.models:
        return run_compare(args)
    if unknown := set(args.what) - set(WHAT):
        raise ValueError(f"--what: unknown {', '.join(unknown)}; choose from {', '.join(WHAT)}")
    if args.compare or not args.models:
        raise ValueError("give run folders or weights, as in: python analyze.py runs/NAME; or "
                         "--compare and nothing else")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: torch sees no GPU here; give --device cpu")
    files = [Path(m) / "last.pt" if Path(m).is_dir() else Path(m) for m in args.models]
    names = [f.parent.name if f.name == "last.pt" else f.stem for f in files]
    if len(set(names)) < len(names):
        names = ["/".join(f.parts[-3:]).removesuffix("/last.pt") for f in files]
    if len(set(names)) < len(names):
        raise ValueError(f"{', '.join(args.models)}: the same model twice; name each once")
    models = {n: clsspec.load(f, args.network).to(args.device) for n, f in zip(names, files)}
    homes = {n: eval_dense.home(f) for n, f in zip(names, files)}
    sizes = {n: picture_size(args, n, m.config) for n, m in models.items()}
    grids = {n: (sizes[n] // m.config.patch,) * 2 for n, m in models.items()}
    results, imgs, last = defaultdict(dict), {}, {}
    background = tuple(map(int, args.background or "0123"[: 4 if args.data == "scenes" else 1]))

    measures = [m for m in (cosines, dimensions, norms, attention) if m.__name__ in args.what]
    measures += [features] if {"foreground", "pca"} & set(args.what) else []
    for (name, model), file in zip(models.items(), files):
        if measures:
            imgs[name], mask = pictures(args, sizes[name])
            kept = survey(model, imgs[name], measures)
        for what in args.what:
            if what in ("cosines", "attention"):
                results[what][name] = means(kept[what])
            elif what == "dimensions":
                results[what][name] = dimension_numbers(model, kept[what])
            elif what == "norms":
                results[what][name] = norm_numbers(kept[what], grids[name])
            elif what == "foreground" and (mask is None or mask.min() == 255):
                print("foreground: left out, it wants masks: --data scenes, voc or pairs")
            elif what == "foreground":
                labels = patch_labels(mask, grids[name], 1 + int(mask[mask != 255].max()))
                found = foreground_numbers(kept["features"], labels, background)
                depth = model.config.depth
                miou = probes(homes[name], args.network, args.data, args.root, depth)
                results[what][name] = found | {"miou": miou}
            elif what == "degradation":
                try:
                    results[what][name] = degradation(file.parent)
                except ValueError as err:
                    print(f"degradation: left out, {err}")
            elif what == "pca":
                last[name] = kept["features"]["patches"][-1]
        kept = None  # less memory for the next

    out = Path(args.out or homes[names[0]])
    out.mkdir(parents=True, exist_ok=True)
    how = {k: getattr(args, k) for k in ("data", "root", "network", "device", "foreground")}
    how |= {"pictures": {n: len(v) for n, v in imgs.items()}, "pixels": sizes, "grids": grids}

    def title(what):  # what is not as usual stands in the result's name
        if what in ("degradation", "cost"):
            return what
        on = [what, *([args.network] if args.network != "teacher" else ())]
        on += [Path(p).name for p in (args.data, args.root) if p not in ("scenes", "")]
        on += [f"image_size={args.image_size}"] if args.image_size else []
        if what == "foreground" and args.background:
            on += [f"background={','.join(args.background)}"]
        return " ".join(on + ["foreground"] * (what == "pca" and args.foreground))

    def keep(what):  # all in one file; what is of another run, in its folder, too
        for folder in dict.fromkeys([out, *(() if args.out else homes.values())]):
            mine = {n: v for n, v in results[what].items() if folder in (out, homes[n])}
            if mine:
                found = {"made": made(args)["made"] | how, "models": tidy(mine)}
                eval_dense.record(folder / "analysis.json", title(what), found)

    if len(set(grids.values())) > 1:
        print(f"note: patches lie on grids of other sizes, {grids}: attention does not compare")
    for what in (w for w in WHAT if results[w]):
        table(what, results[what])
        keep(what)
        if Figure:
            draw(out / f"{what}.png", what, results[what])
    if Figure and results["dimensions"]:
        draw_gains(out / "gains.png", results["dimensions"])
    if last:
        colours, shares = rgb([*last.values()], [*grids.values()], args.foreground)
        columns = {"picture": imgs[names[0]] / 255} | dict(zip(last, colours))
        sheet(out / "pca.png", {k: v[:8] for k, v in columns.items()})
        results["pca"] = {name: {"share": share} for name, share in zip(last, shares)}
        keep("pca")
        print("\npca: the three components have, of the variance, "
              + ", ".join(f"{sum(v):.0f} % ({k})" for k, v in zip(last, shares)))
    if "cost" in args.what:
        print(paper_setting())
        same, panels = defaultdict(dict), {}
        for name, model in models.items():
            c = model.config
            key = (c.width, c.depth, c.heads, c.patch, c.image_size, c.mlp_ratio,
                   bool(c.layerscale))
            same[key][name] = c
        for given in same.values():
            name, c = next(iter(given.items()))
            most = 32 if args.device != "cpu" else 20e9 / clsspec.flops(c, sizes[name], sizes[name])
            batch = args.batch_size or min(32, max(1, int(most)))
            found = cost(given, sizes[name], batch, args.seconds, args.device, args.compile)
            cost_table(f"{name} at {sizes[name]} px, batch {batch}", found)
            results["cost"][name] = found
            panels[f"time of a training step / plain's, size of {name}:\nmedian, quartiles"] = [
                (variant, *n["step_ratio"]) for variant, n in found.items()]
        keep("cost")
        if Figure:
            draw_intervals(out / "cost.png", panels, 1)
    if not any(results.values()):
        raise ValueError("nothing was measured")
    finish(out)


def main(argv=None) -> None:
    try:
        run(parse(argv))
    except (ValueError, OSError) as err:
        sys.exit(f"error: {str(err).strip().splitlines()[-1].removeprefix('ValueError: ')}")


if __name__ == "__main__":
    main()
