"""A vision transformer whose [CLS] and patches may have weights of their own, in one attention.

    python clsspec.py              # parameters and GFLOPs of every size, plain and specialised

    import torch, clsspec
    model = clsspec.ViT(clsspec.config("small", spec=("norms", "qkv"), spec_blocks=4))
    out = model(torch.rand(2, 3, 224, 224))
    out["cls"].shape, out["patches"].shape     # (2, 384), (2, 196, 384)

    model = clsspec.load_weights("dinov2_vits14_pretrain.pth")    # or DINO's, DeiT-III's, timm's
    clsspec.specialize(model, ("norms", "qkv"), blocks=4)         # same outputs, more freedom

Source: "Revisiting [CLS] and Patch Token Interaction in Vision Transformers", arXiv 2602.08626.
With x = [CLS, registers, patches], the tokens of one picture, what differs from a plain ViT is:

    1. norms   LN(x) -> [LN_cls(x_cls), LN_patch(x_patch)]   norm1, norm2, LayerScale of every block
    2. qkv     W x   -> [W_cls x_cls,   W_patch x_patch]     the fused projection of the first third
    3. nothing else: attention, out-projection and MLP stay shared. Each token meets one set of
       weights, so FLOPs do not change. (`proj`, `mlp`, `final` are components for ablations.)

Variants of both papers, each one word of the Config: registers, attention bias, entmax-1.5 in place
of softmax ("Vision Transformers Need Better Token Interaction", arXiv 2605.23868), CaiT.

Letters: B pictures, N = h w patches, R registers, T = 1 + R + N tokens, D width, H heads, each
d = D / H wide. A plain model has the state-dict names of DINO and DINOv2; a specialised layer is
`name.cls` and `name.patch`.
"""

import argparse
import copy
import math
import re
import zipfile
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

COMPONENTS = ("norms", "qkv", "proj", "mlp", "final")

# size: (width D, depth, heads H, patch), of DeiT and ViT; nano is this project's own.
SIZES = {
    "nano": (64, 12, 2, 8),
    "tiny": (192, 12, 3, 16),
    "small": (384, 12, 6, 16),
    "base": (768, 12, 12, 16),
    "large": (1024, 24, 16, 14),
    "huge": (1280, 32, 16, 14),
}


@dataclass(frozen=True)
class Config:
    """All that fixes the model's shape. It is in every checkpoint: later commands need no flags."""

    width: int  # D
    depth: int  # number of blocks
    heads: int  # H
    patch: int  # side of a patch, in pixels
    image_size: int = 224  # side of the pictures that pos_embed is made for, in pixels
    mlp_ratio: float = 4.0  # hidden width of the MLP / D
    layerscale: float = 1e-5  # LayerScale's start; 0: no LayerScale (DINO v1)
    drop_path: float = 0.0  # stochastic depth: chance to skip a residual branch, in every block
    pos_antialias: bool = False  # how positions are resampled: see ViT.positions
    registers: int = 0  # R, tokens without a position (arXiv 2309.16588)
    registers_path: str = "patch"  # whose weights they pass, where specialised: "patch", "cls"
    attn: str = "softmax"  # or "entmax15"
    attn_bias: bool = False  # a learnable key and value per head and block: see Attention
    class_attn: int = 0  # CaiT: the last N blocks are ClassBlocks, [CLS] joins there
    spec: tuple[str, ...] = ()  # specialised components, from COMPONENTS
    spec_blocks: int | None = None  # qkv, proj, mlp: in how many blocks; None: a third, the paper's
    spec_where: str = "first"  # ... counted from the "first" or the "last" block
    spec_rank: int = 0  # 0: qkv gets a full [CLS] copy; r > 0: a rank-r update of the patches' copy


def config(size: str = "small", **changes) -> Config:
    """The Config of a named size, checked."""
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; choose from {', '.join(SIZES)}")
    return checked(Config(**dict(zip(("width", "depth", "heads", "patch"), SIZES[size])) | changes))


# What makes a config that of a plain ViT.
PLAIN = dict(spec=(), spec_blocks=None, spec_where="first", spec_rank=0, registers_path="patch",
             registers=0, attn="softmax", attn_bias=False, class_attn=0)


def checked(c: Config) -> Config:
    """The same, with spec_blocks as a number. ValueError: what cannot be, and what to do."""
    blocks = c.depth // 3 if c.spec_blocks is None else c.spec_blocks
    unknown, side = set(c.spec) - set(COMPONENTS), max(round(c.image_size / c.patch), 1) * c.patch
    wrong = {
        f"width {c.width} is not a multiple of {c.heads} heads; change either": c.width % c.heads,
        f"image size {c.image_size} is no multiple of the patch, {c.patch} px; try {side}":
            c.image_size <= 0 or c.image_size % c.patch,
        f"unknown component {min(unknown, default='')!r} in spec; choose from "
        f"{', '.join(COMPONENTS)}": unknown,
        f"spec blocks {blocks} is outside 0 to {c.depth}, the depth of this model":
            not 0 <= blocks <= c.depth,
        f"spec where {c.spec_where!r} is not 'first' or 'last'":
            c.spec_where not in ("first", "last"),
        f"spec rank {c.spec_rank} must be >= 0 and needs component qkv; spec is {c.spec}":
            c.spec_rank < 0 or (c.spec_rank and "qkv" not in c.spec),
        f"attention {c.attn!r} is not 'softmax' or 'entmax15'":
            c.attn not in ("softmax", "entmax15"),
        f"drop path {c.drop_path} is outside 0 to 1; 1 itself would leave nothing to learn":
            not 0 <= c.drop_path < 1,
        f"{c.registers} registers: give 0 or more": c.registers < 0,
        f"registers path {c.registers_path!r} must be 'patch', or 'cls' where there are registers "
        f"and a spec; here are {c.registers}, spec is {c.spec}": c.registers_path != "patch" and not
            (c.registers_path == "cls" and c.registers and c.spec),
        f"{c.class_attn} class-attention blocks are outside 0 to {c.depth - 1}, one less than the "
        "depth": not 0 <= c.class_attn < c.depth,
        "class attention keeps [CLS] from patches, nothing is left to specialise; leave out either":
            c.spec and c.class_attn}
    for text, found in wrong.items():
        if found:
            raise ValueError(text)
    return replace(c, spec_blocks=blocks if {"qkv", "proj", "mlp"} & set(c.spec) else 0)


# --------------------------------------------------------------------------------------------------
# The idea of this repository: one layer twice, a copy for [CLS] and a copy for the patches.


class Fork(torch.autograd.Function):
    """x (B, T, D) -> x and a copy of its first rows. The gradient of a slice would be a (B, T, D)
    of zeros around them; here they are added into the gradient that the layer has just made."""

    @staticmethod
    def forward(ctx, x, rows):
        ctx.rows = rows
        return x.view_as(x), x[:, :rows].clone()

    @staticmethod
    def backward(ctx, grad, grad_cls):
        grad[:, : ctx.rows] += grad_cls
        return grad, None


class Specialised(nn.Module):
    """The first rows, [CLS] or [CLS] and registers, pass `cls`, every other token passes `patch`;
    both start as copies of one layer.

    All tokens pass `patch` in one call and the rows are then overwritten, which costs one copy of
    the gradient: a ViT-S took 1 to 3 % longer for it on a CPU, and 8 % with two slices and a cat.
    rank > 0 (linear layers): W_cls = W_patch + up down, `up` = 0 at first (LoRA, arXiv 2106.09685).
    """

    def __init__(self, layer: nn.Module, rows: int = 1, rank: int = 0):
        super().__init__()
        self.rows, self.rank = rows, rank
        self.patch = layer
        if rank:
            down = nn.Linear(layer.in_features, rank, bias=False)
            up = nn.Linear(rank, layer.out_features, bias=False)
            nn.init.zeros_(up.weight)
            self.cls = nn.Sequential(down, up).to(layer.weight)
        else:
            self.cls = copy.deepcopy(layer)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D')
        x, x_cls = Fork.apply(x, self.rows)
        y, rows = self.patch(x), slice(self.rows)
        y[:, rows] = y[:, rows] + self.cls(x_cls) if self.rank else self.cls(x_cls)
        return y


def specialize(model: "ViT", spec, blocks: int | None = None, where: str = "first", rank: int = 0,
               registers_path: str = "patch") -> "ViT":
    """Give a plain model, new or trained, separate [CLS] and patch weights, in place; returns it.

    spec: names from COMPONENTS; blocks: how many blocks get qkv, proj and mlp (None: a third of the
    depth), from the `first` or the `last` one; registers_path: whose weights registers pass. The
    copies start equal: outputs do not change.
    """
    if model.config.spec:
        raise ValueError(f"this model has {', '.join(model.config.spec)} already; give a plain one")
    c = checked(replace(model.config, spec=tuple(spec), spec_blocks=blocks, spec_where=where,
                        spec_rank=rank, registers_path=registers_path))
    model.config, first = c, 0 if where == "first" else c.depth - c.spec_blocks
    rows = 1 + (c.registers if registers_path == "cls" else 0)
    for i, block in enumerate(model.blocks):
        if "norms" in spec:
            names = ("norm1", "norm2", "ls1", "ls2") if c.layerscale else ("norm1", "norm2")
            for name in names:
                setattr(block, name, Specialised(getattr(block, name), rows))
        if not first <= i < first + c.spec_blocks:
            continue
        if "qkv" in spec:
            block.attn.qkv = Specialised(block.attn.qkv, rows, rank)
        if "proj" in spec:
            block.attn.proj = Specialised(block.attn.proj, rows)
        if "mlp" in spec:
            block.mlp = Specialised(block.mlp, rows)
    if "final" in spec:
        model.norm = Specialised(model.norm, rows)
    return model


# --------------------------------------------------------------------------------------------------
# The transformer around it.


class PatchEmbed(nn.Module):
    """Cut a picture into patches and project each to D."""

    def __init__(self, patch: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)

    def forward(self, img: Tensor) -> Tensor:  # (B, 3, h p, w p) -> (B, h w, D)
        return self.proj(img).flatten(2).transpose(1, 2)


class Entmax15(torch.autograd.Function):
    """p = max(x / 2 - tau, 0)^2 along the last dimension, tau such that each row sums to 1: like
    softmax, but a score well below the largest gets exactly 0 (arXiv 1905.05702).

    With g = sqrt(p): |g| = 1 is solved for tau by Newton's method. |max(x / 2 - tau, 0)| is convex
    and falls, so from max(x / 2) - 1, where it is 1 or more, every step stays on that side. After
    2 + log4(T) steps no p was off by more than 3e-7 in the worst row of T that a search found.
    Backward: dx = g dp - g sum(g dp) / sum(g).
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        z = x if x.dtype == torch.float64 else x.float()
        z = (z - z.amax(-1, keepdim=True)) / 2
        tau = -1.0
        for _ in range(2 + math.ceil(math.log2(x.shape[-1]) / 2)):
            g = (z - tau).clamp_(min=0)
            norm = torch.linalg.vector_norm(g, dim=-1, keepdim=True)
            tau = tau + norm * (norm - 1) / g.sum(-1, keepdim=True)
        p = (z - tau).clamp_(min=0).square_().to(x.dtype)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx, dp: Tensor):
        g = ctx.saved_tensors[0].to(torch.promote_types(dp.dtype, torch.float32)).sqrt()
        dx = g * dp
        dx = dx - g * (dx.sum(-1, keepdim=True) / g.sum(-1, keepdim=True))
        return dx.to(dp.dtype)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens: the place where [CLS] and patches meet.

    Attention bias: every query can also turn to a learnt key, the same in all pictures, and gets a
    learnt value for it, both (1, H, 1, d) (Sun et al., Massive Activations, arXiv 2402.17762).
    """

    def __init__(self, c: Config):
        super().__init__()
        self.heads, self.kind = c.heads, c.attn
        self.qkv = nn.Linear(c.width, 3 * c.width)
        self.proj = nn.Linear(c.width, c.width)
        if c.attn_bias:
            self.bias_k, self.bias_v = (
                nn.Parameter(torch.zeros(1, c.heads, 1, c.width // c.heads)) for _ in "kv")

    def project(self, x: Tensor, asking: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, T, D) -> q, k, v, each (B, T, D); q of the first `asking` tokens alone."""
        if asking is None or isinstance(self.qkv, Specialised):
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            return q[:, :asking], k, v
        d = x.shape[-1]
        (w, w_kv), (b, b_kv) = (p.split((d, 2 * d)) for p in (self.qkv.weight, self.qkv.bias))
        return F.linear(x[:, :asking], w, b), *F.linear(x, w_kv, b_kv).chunk(2, dim=-1)

    def queries_keys_values(self, x: Tensor, asking: int | None = None) -> list[Tensor]:
        """(B, T, D) -> q (B, H, T or `asking`, d); k, v (B, H, T, d), with a bias T + 1 of them."""
        parts = self.project(x, asking)
        q, k, v = (rearrange(y, "b t (h d) -> b h t d", h=self.heads) for y in parts)
        if hasattr(self, "bias_k"):  # in front: T + 1 keys and values
            k, v = (torch.cat([bias.to(y.dtype).expand(len(y), -1, -1, -1), y], dim=2)
                    for bias, y in ((self.bias_k, k), (self.bias_v, v)))
        return [q, k, v]

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """(B, H, T, d), (B, H, T', d) -> attention (B, H, T, T'), rows sum to 1."""
        scores = q @ (k * k.shape[-1] ** -0.5).mT
        return Entmax15.apply(scores) if self.kind == "entmax15" else scores.softmax(-1)

    def forward(self, x: Tensor, asking: int | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D), or of the first `asking` tokens alone."""
        q, k, v = self.queries_keys_values(x, asking)
        if self.kind == "entmax15":
            out = self.weights(q, k) @ v  # (B, H, T, d)
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(out, "b h t d -> b t (h d)"))


class GeluLinear(torch.autograd.Function):
    """x -> linear(gelu(x)). It keeps x, not gelu(x), which the backward pass makes anew: a quarter
    less is kept of a block, for 1 % of a ViT-S step's time on a CPU, 3 % of nano's."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        dx = torch.ops.aten.gelu_backward(grad @ weight.to(grad.dtype), x)
        grad = grad.flatten(0, -2)
        return dx, grad.mT @ F.gelu(x).flatten(0, -2), grad.sum(0)


class Mlp(nn.Module):
    """GELU between two linear layers. The second's weights are used without calling it."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return GeluLinear.apply(self.fc1(x), self.fc2.weight, self.fc2.bias)


class LayerScale(nn.Module):
    """A learnable gain per dimension at the end of a residual branch (CaiT, arXiv 2103.17239)."""

    def __init__(self, width: int, start: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block: x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x)))."""

    def __init__(self, c: Config):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.width, eps=1e-6)
        self.attn = Attention(c)
        self.ls1 = LayerScale(c.width, c.layerscale) if c.layerscale else nn.Identity()
        self.norm2 = nn.LayerNorm(c.width, eps=1e-6)
        self.mlp = Mlp(c.width, round(c.width * c.mlp_ratio))
        self.ls2 = LayerScale(c.width, c.layerscale) if c.layerscale else nn.Identity()
        self.drop_path = c.drop_path

    def forward(self, x: Tensor, asking: int | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); or the first `asking` tokens alone, if no others are needed."""
        x = self.add(x, lambda x: self.ls1(self.attn(self.norm1(x), asking)), asking)
        return self.add(x, lambda x: self.ls2(self.mlp(self.norm2(x))))

    def add(self, x: Tensor, branch, asking: int | None = None) -> Tensor:
        """x + branch(x). Stochastic depth in training: a random share of the pictures, rounded to
        whole ones, skips it, and it is not computed for them, as in DINOv2."""
        if not (self.training and self.drop_path):
            return x[:, :asking] + branch(x)
        n = max(round(len(x) * (1 - self.drop_path)), 1)
        kept = torch.randperm(len(x), device=x.device)[:n]
        y = branch(x.index_select(0, kept))
        return x[:, :asking].index_add(0, kept, y.to(x.dtype), alpha=len(x) / n)


class ClassBlock(Block):
    """CaiT's class-attention block (arXiv 2103.17239): only [CLS] asks, and is updated."""

    def forward(self, x: Tensor, asking: int | None = None) -> Tensor:
        return torch.cat([super().forward(x, 1), x[:, 1:asking]], dim=1)


class ViT(nn.Module):
    """Pictures to tokens. Built plain, then specialised as the config says, so that a plain and a
    specialised model of one seed start from the same weights."""

    def __init__(self, cfg: Config):
        super().__init__()
        c = self.config = replace(cfg, spec=(), spec_blocks=0, spec_where="first", spec_rank=0,
                                  registers_path="patch")
        grid = c.image_size // c.patch
        self.checkpointing = False  # recompute blocks in the backward pass instead of keeping them
        self.patch_embed = PatchEmbed(c.patch, c.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.width))
        self.mask_token = nn.Parameter(torch.zeros(1, c.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, c.width))
        self.join = c.depth - c.class_attn if c.class_attn else 0  # [CLS] is there from this block
        kinds = [Block] * (c.depth - c.class_attn) + [ClassBlock] * c.class_attn
        self.blocks = nn.ModuleList(kind(c) for kind in kinds)
        self.norm = nn.LayerNorm(c.width, eps=1e-6)
        if c.registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, c.registers, c.width))

        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        # 0.02 is meant for D >= 384; a narrower layer needs larger weights to pass on as much.
        std = 0.02 * max(1.0, (384 / c.width) ** 0.5)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=std)
                nn.init.zeros_(m.bias)
        for name, p in self.named_parameters():  # last, so that all else is as without them
            if name.endswith(("register_tokens", "bias_k", "bias_v")):
                nn.init.normal_(p, std=1e-6 if name == "register_tokens" else 0.02)
        if cfg.spec:
            with torch.random.fork_rng(devices=[]):  # what is built later is as in a plain model
                specialize(self, cfg.spec, cfg.spec_blocks, cfg.spec_where, cfg.spec_rank,
                           cfg.registers_path)

    def positions(self, h: int, w: int) -> Tensor:
        """pos_embed for h x w patches, (1, 1 + h w, D): bicubic if the grid is not the native one.

        pos_antialias False: as DINO and DINOv2, scale factor (h + 0.1) / grid, no antialias;
        True: to the size, with antialias, as DINOv2 with registers and timm.
        """
        grid = math.isqrt(self.pos_embed.shape[1] - 1)
        if (h, w) == (grid, grid):
            return self.pos_embed
        cls, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        patches = rearrange(patches, "1 (h w) c -> 1 c h w", h=grid).float()
        if self.config.pos_antialias:
            patches = F.interpolate(patches, size=(h, w), mode="bicubic", antialias=True)
        else:
            scale = ((h + 0.1) / grid, (w + 0.1) / grid)
            patches = F.interpolate(patches, scale_factor=scale, mode="bicubic")
        return torch.cat([cls, rearrange(patches, "1 c h w -> 1 (h w) c").to(cls.dtype)], dim=1)

    def embed(self, img: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Pictures -> what enters the blocks: [CLS] (B, 1, D), registers and patches (B, R + N, D).
        Arguments and errors as in `forward`."""
        p = self.config.patch
        if img.shape[-2] % p or img.shape[-1] % p:
            raise ValueError(f"picture of {img.shape[-2]} x {img.shape[-1]} px: both sides must be "
                             f"multiples of the patch, {p} px; resize or crop it")
        x = self.patch_embed(img)  # (B, N, D)
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        positions = self.positions(img.shape[-2] // p, img.shape[-1] // p)
        x = x + positions[:, 1:]
        if self.config.registers:
            x = torch.cat([self.register_tokens.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        return (self.cls_token + positions[:, :1]).to(x.dtype).expand(len(x), -1, -1), x

    def forward(self, img: Tensor, mask: Tensor | None = None, layer: int | None = None,
                cls_only: bool = False) -> dict[str, Tensor]:
        """img: (B, 3, h p, w p), normalised pictures; mask: (B, N) bool, True hides a patch.

        layer: go through this many blocks; None: through all. cls_only: the last of them computes
        [CLS] alone, which spares 6 % of a ViT-S. Returns the tokens after the final norm: cls
        (B, D), registers (B, R, D), patches (B, N, D); with cls_only, use cls alone.
        Raises ValueError if a side is not a multiple of the patch p.
        """
        cls, x = self.embed(img, mask)
        last = len(self.blocks) if layer is None else layer
        for i in range(min(self.join, last)):  # CaiT: patches by themselves
            x = self.step(self.blocks[i], x)
        x = torch.cat([cls, x], dim=1)  # (B, T, D)
        for i in range(self.join, last):
            x = self.step(self.blocks[i], x, 1 if cls_only and i == last - 1 else None)
        x, r = self.norm(x), 1 + self.config.registers
        return {"cls": x[:, 0], "registers": x[:, 1:r], "patches": x[:, r:]}

    def step(self, block: Block, x: Tensor, asking: int | None = None) -> Tensor:
        if self.checkpointing and self.training:
            return checkpoint(block, x, asking, use_reentrant=False)
        return block(x, asking)


# --------------------------------------------------------------------------------------------------
# Counting, saving, loading.


def parameters_by_component(model: ViT) -> dict[str, int]:
    """Number of parameters of each component; `[CLS] copies` is what specialisation added."""
    names = "embeddings", "norms", "qkv", "proj", "mlp", "final norm", "[CLS] copies"
    table = dict.fromkeys(names, 0)
    for name, p in model.named_parameters():
        if ".cls." in name:
            key = "[CLS] copies"
        elif name.startswith("norm."):
            key = "final norm"
        elif not name.startswith("blocks."):
            key = "embeddings"
        elif ".bias_" in name:  # attention bias
            key = "qkv"
        else:
            key = next((k for k in ("qkv", "proj", "mlp") if f".{k}." in name), "norms")
        table[key] += p.numel()
    return table | {"total": sum(p.numel() for p in model.parameters())}


def flops(c: Config, h: int, w: int, cls_only: bool = False) -> int:
    """FLOPs that a forward pass on one picture of h x w pixels needs: 2 for a multiply-add of a
    product. Specialised or not makes no difference, but for the low-rank update of spec_rank.
    """
    n = (h // c.patch) * (w // c.patch)
    t, hidden = 1 + c.registers + n, round(c.width * c.mlp_ratio)

    def block(queries, keys):  # q, proj and the MLP of queries; k and v of keys; q k and p v
        linear = queries * (2 * c.width + 2 * hidden) + keys * 2 * c.width
        return 2 * c.width * (linear + 2 * queries * (keys + c.attn_bias))

    early = t - 1 if c.class_attn else t  # CaiT: without [CLS]
    late = c.class_attn or int(cls_only)
    blocks = (c.depth - late) * block(early, early) + late * block(1, t)
    rows = 1 + c.registers * (c.registers_path == "cls")
    low_rank = c.spec_blocks * 2 * rows * c.spec_rank * 4 * c.width
    return 2 * n * 3 * c.patch**2 * c.width + blocks + low_rank


def read(path) -> dict:
    """What torch.save put into a file, on the CPU. ValueError: missing or unreadable."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # DINO keeps its flags so
            mmap = zipfile.is_zipfile(path)  # torch's format since 1.6
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if not isinstance(state, dict):
            raise ValueError(f"it is a {type(state).__name__}, not a dict")
        return state
    except FileNotFoundError:
        raise ValueError(f"no checkpoint at {path}; train one with: python train.py") from None
    except Exception as err:
        why = str(err).splitlines()[0]
        raise ValueError(f"{path} is no checkpoint that torch can load ({why}); save weights with "
                         "torch.save(model.state_dict(), path)") from None


def load(path, network: str = "teacher") -> ViT:
    """The ViT of the "teacher" or "student" in a checkpoint of train.py, or "untrained", as both
    were at step 0; or the one of public weights (`load_weights`). On the CPU, in eval mode."""
    state = read(path)
    if "width" not in state.get("model", ()):
        if network == "untrained":
            raise ValueError(f"{path} holds public weights: nobody knows its untrained network")
        return load_weights(path, network)
    try:
        cfg = Config(**state["model"] | {"spec": tuple(state["model"]["spec"])})
        if network != "untrained":
            parts = ((name.partition("backbone."), value) for name, value in state[network].items())
            weights = {name: value for (_, found, name), value in parts if found}
            model = ViT(cfg)
            model.load_state_dict(weights)
            return model.eval()
        seed, init = state["args"]["seed"], state["args"].get("init")
    except Exception as err:
        why = str(err).splitlines()[0]
        raise ValueError(f"{path} is not a checkpoint of this project ({why})") from None
    torch.manual_seed(seed)
    return start(cfg, init).eval()


def start(cfg: Config, init: str | None = None) -> ViT:
    """A network at step 0: new, or with the weights in the file `init` (of cfg's shape), and then
    specialised as cfg says."""
    if not init:
        return ViT(cfg)
    given = load(init)
    model = ViT(replace(given.config, drop_path=cfg.drop_path))
    model.load_state_dict(given.state_dict())
    if cfg.spec == given.config.spec:
        return model
    return specialize(model, cfg.spec, cfg.spec_blocks, cfg.spec_where, cfg.spec_rank,
                      cfg.registers_path)


HEADS = ("head.", "head_dist.", "dino_head.", "ibot_head.", "linear_head.")  # not ours to load


def load_weights(source, network: str = "teacher", pos_antialias: bool | None = None) -> ViT:
    """The ViT of public weights, plain, its shape read off them: DINO's, DINOv2's with or without
    registers, DeiT-III's, or timm's of the same. On the CPU, in eval mode.

    source: a file, or a state dict; both may be of a whole training, with `network` ("teacher" or
    "student") inside. Heads are left out. pos_antialias: see ViT.positions; None: as the weights'
    own code does (timm's DINO v1 looks like DINO's own: give True). Heads are 64 wide in all.
    Raises ValueError with every key that is left over or missing.
    """
    where = "these weights" if isinstance(source, dict) else str(source)
    state = source if isinstance(source, dict) else read(source)
    for key in (network, "model", "state_dict"):
        state = state[key] if isinstance(state.get(key), dict) else state
    other = "student." if network == "teacher" else "teacher."
    s, names = {}, set(state)
    for name, value in state.items():
        name = re.sub(rf"^(module\.|_orig_mod\.|{network}\.|backbone\.)*", "", name)
        name = re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name)  # DINOv2 in chunks for FSDP
        name = re.sub(r"gamma_([12])$", r"ls\1.gamma", name)  # DeiT-III
        if not name.startswith((*HEADS, other)):
            s["register_tokens" if name == "reg_token" else name] = value
    wanted = "cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"
    if missing := [name for name in wanted if name not in s]:
        raise ValueError(f"{where}: no {', '.join(missing)}, so neither a checkpoint of train.py "
                         "nor a ViT of DINO, DINOv2 (but those with SwiGLU), DeiT-III or timm; it "
                         f"has {', '.join(sorted(map(str, names))[:3])} ...")
    width, n = s["cls_token"].shape[-1], s["pos_embed"].shape[1]
    if math.isqrt(n) ** 2 == n:  # none for [CLS]
        s["pos_embed"] = F.pad(s["pos_embed"], (0, 0, 1, 0))
    scale = "blocks.0.ls1.gamma" in s
    if pos_antialias is None:
        timm_v2 = scale and "mask_token" not in s and not any("gamma_1" in k for k in names)
        pos_antialias = "register_tokens" in s or timm_v2
    s.setdefault("mask_token", torch.zeros(1, width))  # only DINOv2 has one
    patch = s["patch_embed.proj.weight"].shape[-1]
    model = ViT(Config(
        width=width, heads=max(width // 64, 1), patch=patch, pos_antialias=pos_antialias,
        depth=1 + max(int(k.split(".")[1]) for k in s if k.startswith("blocks.")),
        image_size=patch * math.isqrt(n), layerscale=1e-5 if scale else 0.0,
        mlp_ratio=len(s["blocks.0.mlp.fc1.weight"]) / width,
        registers=s["register_tokens"].shape[1] if "register_tokens" in s else 0))
    ours = model.state_dict()
    wrong = [f"{k} is left over" for k in s.keys() - ours]
    wrong += [f"{k} is missing" for k in ours.keys() - s]
    wrong += [f"{k} has shape {tuple(s[k].shape)}, not {tuple(ours[k].shape)}"
              for k in ours.keys() & s if s[k].shape != ours[k].shape]
    if wrong:
        raise ValueError(f"{where}: {'; '.join(sorted(wrong))}")
    model.load_state_dict(s)
    return model.eval()


def main() -> None:
    print("size   patch     plain    norms  + qkv, a third  GFLOPs at 224 px")
    for size, (*_, patch) in SIZES.items():
        with torch.device("meta"):
            specs = (), ("norms",), ("norms", "qkv")
            plain, norms, both = (ViT(config(size, spec=spec)) for spec in specs)
        a, b, c = (parameters_by_component(m)["total"] for m in (plain, norms, both))
        print(f"{size:6} {patch:5} {a / 1e6:7.2f} M {b / a - 1:+8.2%} {c / a - 1:+15.2%} "
              f"{flops(both.config, 224, 224) / 1e9:17.2f}")


if __name__ == "__main__":
    main()
