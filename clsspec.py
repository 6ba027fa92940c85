"""A vision transformer in which [CLS] and patches have weights of their own, in one attention.

[CLS] sums up a picture, a patch describes one place of it, yet in a plain ViT both pass the same
weights. "Revisiting [CLS] and Patch Token Interaction in Vision Transformers" (arXiv 2602.08626)
separates them where that pays. With x = [CLS, registers, patches], the tokens of one picture:

    1. norms   LN(x) -> [LN_cls(x_cls), LN_patch(x_patch)]   norm1, norm2, LayerScale of every block
    2. qkv     W x   -> [W_cls x_cls,   W_patch x_patch]     the fused projection, the first third
    3. nothing else: attention, out-projection, MLP and the last norm stay shared (the components
       proj, mlp and final separate those too, for the paper's ablations). Each token still passes
       one set of weights, so the method's FLOPs are those of a plain ViT.

`Specialised`, the first class below, is the whole idea; `specialize` puts it into a network. Both
papers' variants are fields of Config: registers, attention bias, class attention (CaiT), and
entmax-1.5 in place of softmax ("Vision Transformers Need Better Token Interaction", 2605.23868).

    model = clsspec.ViT(clsspec.config("small", spec=("norms", "qkv"), spec_blocks=4))
    out = model(torch.rand(2, 3, 224, 224))       # cls (2, 384), patches (2, 196, 384)
    model = clsspec.load_weights("dinov2_vits14_pretrain.pth")    # or DINO's, DeiT-III's, timm's
    clsspec.specialize(model, ("norms", "qkv"), blocks=4)         # same outputs, more freedom

Letters: B pictures, N = h w patches, R registers, T = 1 + R + N tokens, D width, H heads, each
d = D / H wide. State-dict names of a plain model are those of DINO and DINOv2.
"""

import argparse
import copy
import json
import math
import pickle
import re
import zipfile
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

# --------------------------------------------------------------------------------------------------
# The idea: one layer twice, a copy for [CLS] and a copy for the patches.


class Specialised(nn.Module):
    """A layer with two sets of weights: the first `rows` tokens pass `cls`, all others `patch`.

    `patch` is `layer` itself, which must return a new tensor, as its output is written to; `cls`
    starts as a copy of it, so at first nothing changes. Each learns from its own tokens alone, so
    they drift apart. State-dict names are `name.cls.*` and `name.patch.*`. `rows` is 1 for [CLS]
    alone, more if registers go with it. rank > 0, linear layers only: W_cls = W_patch + up @ down,
    up = 0 at first (LoRA, 2106.09685); the bias is then shared, and W_patch learns from [CLS] too.
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
        y_cls = self.cls(x[:, : self.rows])
        # All tokens pass `patch`, then its first rows are overwritten, so they send it no gradient.
        # That computes those rows twice, but copies nothing. The obvious way,
        #     torch.cat([self.cls(x[:, :rows]), self.patch(x[:, rows:])], dim=1)
        # gives the same, and makes a nano step 8 % longer than a plain one; this makes it 4 %
        # longer (`train.py --spec norms,qkv --bench 40`, one thread of an AMD EPYC).
        y = self.patch(x)
        if self.rank:
            y_cls = y_cls + y[:, : self.rows]
        y[:, : self.rows] = y_cls
        return y


# --------------------------------------------------------------------------------------------------
# The shape of a model.

# What can be specialised. norms: norm1, norm2, and LayerScale where there is one; final: the norm
# after the last block.
COMPONENTS = ("norms", "qkv", "proj", "mlp", "final")

# size: (width D, depth, heads H, patch), of DeiT and ViT, large with DINOv2's patch; nano is this
# project's own, which train.py gives an MLP half as wide.
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
    pos_offset: float = 0.1  # the same
    registers: int = 0  # R, tokens without a position (arXiv 2309.16588)
    registers_path: str = "patch"  # whose weights they pass, where specialised: "patch", "cls"
    attn: str = "softmax"  # or "entmax15"
    attn_bias: bool = False  # a learnable key and value per head and block: see Attention
    class_attn: int = 0  # CaiT: the last N blocks are ClassBlocks, [CLS] joins there
    spec: tuple[str, ...] = ()  # specialised components, from COMPONENTS
    spec_blocks: int | None = None  # qkv, proj, mlp: in how many blocks; None: a third, the paper's
    spec_where: str = "first"  # ... counted from the "first" or the "last" block
    spec_rank: int = 0  # 0: qkv gets a full [CLS] copy; r > 0: a rank-r update of the patches' copy
    spec_init: str = "equal"  # [CLS]'s copies start as the patches' do; "fresh": linear ones anew


# Changes to a Config that undo specialisation, in the order of specialize's arguments (`start`
# relies on it). PLAIN undoes the papers' other variants as well.
NO_SPEC = dict(spec=(), spec_blocks=0, spec_where="first", spec_rank=0, registers_path="patch",
               spec_init="equal")
PLAIN = NO_SPEC | dict(registers=0, attn="softmax", attn_bias=False, class_attn=0)


def need(fine, text: str) -> None:
    """Raise ValueError(text) unless `fine`. A command prints that text as its one line."""
    if not fine:
        raise ValueError(text)


def whole_patches(pixels: float, patch: int) -> int:
    """The nearest multiple of the patch."""
    return max(round(pixels / patch), 1) * patch


def config(size: str = "small", **changes) -> Config:
    """The Config of a named size, with changes, checked."""
    need(size in SIZES, f"unknown size {size!r}; choose from {', '.join(SIZES)}")
    shape = dict(zip(("width", "depth", "heads", "patch"), SIZES[size]))
    return checked(Config(**shape | changes))


def checked(c: Config) -> Config:
    """The same Config with spec_blocks as a number, 0 where no component of spec goes by blocks.
    ValueError: what is impossible, and what to do."""
    need(c.width % c.heads == 0, f"width {c.width} is not a multiple of {c.heads} heads")
    need(c.image_size > 0 and c.image_size % c.patch == 0,
         f"image size {c.image_size} is no multiple of the patch, {c.patch} px; try "
         f"{whole_patches(c.image_size, c.patch)}")
    need(c.attn in ("softmax", "entmax15"), f"attention {c.attn!r} is not 'softmax' or 'entmax15'")
    need(c.registers >= 0, f"{c.registers} registers: give 0 or more")
    need(0 <= c.drop_path < 1, f"drop path {c.drop_path} is not from 0 to less than 1")
    need(0 <= c.class_attn < c.depth,
         f"{c.class_attn} class-attention blocks are outside 0 to {c.depth - 1}, depth less one")
    need(not (c.class_attn and c.spec),
         "class attention keeps [CLS] from patches, nothing is left to specialise; drop either")

    unknown = [name for name in c.spec if name not in COMPONENTS]
    need(not unknown, f"unknown component {unknown} in spec; choose from {', '.join(COMPONENTS)}")
    blocks = c.depth // 3 if c.spec_blocks is None else c.spec_blocks
    need(0 <= blocks <= c.depth, f"spec blocks {blocks} is outside 0 to {c.depth}, the depth")
    need(c.spec_where in ("first", "last"), f"spec where {c.spec_where!r} is not 'first' or 'last'")
    need(c.spec_rank >= 0, f"spec rank {c.spec_rank} is below 0")
    need(not c.spec_rank or "qkv" in c.spec, f"spec rank {c.spec_rank} needs qkv in spec")
    need(c.registers_path in ("cls", "patch"),
         f"registers path {c.registers_path!r} is not 'cls' or 'patch'")
    need(c.registers_path == "patch" or (c.registers and c.spec),
         "registers path 'cls' needs registers, and a spec")
    need(c.spec_init in ("equal", "fresh"), f"spec init {c.spec_init!r} is not 'equal' or 'fresh'")
    need(c.spec_init == "equal" or not c.spec_rank, "spec init 'fresh' has no use for a spec rank: "
         "[CLS]'s update of a low rank starts at 0")
    by_block = {"qkv", "proj", "mlp"} & set(c.spec)
    return replace(c, spec_blocks=blocks if by_block else 0)


# --------------------------------------------------------------------------------------------------
# The transformer around it.


class PatchEmbed(nn.Module):
    """Cut a picture into patches and project each to D."""

    def __init__(self, patch: int, width: int):
        super().__init__()
        # The kernel is as wide as its stride, so this is one linear layer, applied to every patch.
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)

    def forward(self, img: Tensor) -> Tensor:
        return rearrange(self.proj(img), "b d h w -> b (h w) d")  # (B, 3, h p, w p) -> (B, N, D)


def in_parts(function, *x: Tensor) -> Tensor:
    """function(*x), for a function that treats each row (last dimension) by itself. On a CPU it
    gets as many rows at a time as the cache can hold: entmax passes over them many times, and so
    takes 0.7 of the time that it takes with all rows at once."""
    if x[0].device.type != "cpu":
        return function(*x)
    out = torch.empty_like(x[0], memory_format=torch.contiguous_format)
    rows = max(2**18 // x[0].shape[-1], 1)
    for to, *part in zip(*(v.flatten(0, -2).split(rows) for v in (out, *x))):
        to.copy_(function(*part))
    return out


class Entmax15(torch.autograd.Function):
    """p = max(x / 2 - tau, 0)^2 along the last dimension, tau such that each row sums to 1: like
    softmax, but a score well below the largest gets exactly 0 (arXiv 1905.05702)."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        p = in_parts(Entmax15.solve, x)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def solve(x: Tensor) -> Tensor:
        """Newton's method for |g| = 1, g = sqrt(p) = max(x / 2 - tau, 0). |g| is convex in tau and
        falls, so from tau = max(x / 2) - 1, where it is 1 or more, every step stays on that side.
        Measured: after 2 + log4(T) steps no p is off by more than 3e-7, in the worst rows of T
        scores that a search found."""
        z = x if x.dtype == torch.float64 else x.float()
        z = (z - z.amax(-1, keepdim=True)).div_(2)  # the largest is 0, so tau is in [-1, 0)
        tau = -1.0
        for _ in range(2 + math.ceil(math.log(x.shape[-1], 4))):
            g = (z - tau).clamp_(min=0)
            norm = torch.linalg.vector_norm(g, dim=-1, keepdim=True)
            tau = tau + norm * (norm - 1) / g.sum(-1, keepdim=True)
        return (z - tau).clamp_(min=0).square_().to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dp: Tensor) -> Tensor:
        return in_parts(Entmax15.slope, *ctx.saved_tensors, dp)

    @staticmethod
    def slope(p: Tensor, dp: Tensor) -> Tensor:
        """dx = g (dp - mean of dp in the row, weighted by g)."""
        p = p.to(torch.promote_types(dp.dtype, torch.float32))
        g = p * p.clamp(min=1e-37).rsqrt()  # p.sqrt(), which is slow at 0 on a CPU
        mean = torch.linalg.vecdot(g, dp.to(g.dtype)) / g.sum(-1)
        return (dp - mean[..., None]).mul_(g).to(dp.dtype)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens: the place where [CLS] and patches meet.

    Attention bias: every query can also attend to a learnt key with a learnt value, the same in all
    pictures, both (1, H, 1, d) (Sun et al., Massive Activations, arXiv 2402.17762).
    """

    def __init__(self, c: Config):
        super().__init__()
        self.heads, self.kind = c.heads, c.attn
        self.qkv = nn.Linear(c.width, 3 * c.width)
        self.proj = nn.Linear(c.width, c.width)
        if c.attn_bias:
            shape = 1, c.heads, 1, c.width // c.heads
            self.bias_k = nn.Parameter(torch.zeros(shape))
            self.bias_v = nn.Parameter(torch.zeros(shape))

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) -> q, k, v, each (B, H, T, d); with an attention bias k and v have T + 1 rows,
        the bias first."""
        q, k, v = rearrange(self.qkv(x), "b t (s h d) -> s b h t d", s=3, h=self.heads)
        if hasattr(self, "bias_k"):
            bias_k, bias_v = (bias.to(k.dtype).expand(len(k), -1, -1, -1)
                              for bias in (self.bias_k, self.bias_v))
            k, v = torch.cat([bias_k, k], dim=2), torch.cat([bias_v, v], dim=2)
        return q, k, v

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """(B, H, T, d), (B, H, T', d) -> attention (B, H, T, T'), rows sum to 1."""
        # A sum of d products grows with sqrt(d), and the softmax of large scores is saturated, with
        # hardly a gradient. k is scaled rather than the scores, as it has fewer numbers.
        scores = q @ (k * k.shape[-1] ** -0.5).mT
        return Entmax15.apply(scores) if self.kind == "entmax15" else scores.softmax(-1)

    def forward(self, x: Tensor, asking: int | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D). asking = n: only the first n tokens have queries: (B, n, D)."""
        q, k, v = self.queries_keys_values(x)
        q = q[:, :, :asking]  # a loss on [CLS] alone needs no patches of the last block
        # On a CPU fused attention of few tokens is no faster on two threads than on one. Without
        # it a step of nano, which has 37 tokens, is 10 % shorter.
        few = k.shape[2] < 64 and x.device.type == "cpu"
        if self.kind == "entmax15" or few:
            out = self.weights(q, k) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(out, "b h t d -> b t (h d)"))


class Mlp(nn.Module):
    """GELU between two linear layers.

    gelu(x) is not kept for the backward pass but computed again from x, which is kept: 22 % less
    memory for a ViT-S, in the same time. Narrow models would take 7 % longer, and need no saving.
    """

    recompute_from = 192  # the smallest D at which this is done

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def out(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if not x.requires_grad or self.fc1.in_features < self.recompute_from:
            return self.out(x)
        return checkpoint(self.out, x, use_reentrant=False, preserve_rng_state=False)


class LayerScale(nn.Module):
    """A learnable gain per dimension at the end of a residual branch (CaiT, arXiv 2103.17239)."""

    def __init__(self, width: int, start: float):
        super().__init__()
        # Small at first: a block hardly changes its input, however deep the network.
        self.gamma = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block: x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x)))."""

    def __init__(self, c: Config):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.width, eps=1e-6)  # DINO's and DINOv2's; torch's is 1e-5
        self.attn = Attention(c)
        self.ls1 = LayerScale(c.width, c.layerscale) if c.layerscale else nn.Identity()
        self.norm2 = nn.LayerNorm(c.width, eps=1e-6)
        self.mlp = Mlp(c.width, round(c.width * c.mlp_ratio))
        self.ls2 = LayerScale(c.width, c.layerscale) if c.layerscale else nn.Identity()
        self.drop_path = c.drop_path

    def forward(self, x: Tensor, asking: int | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); asking = n: only the first n tokens are needed, (B, n, D)."""
        # A branch reads normed tokens and adds to raw ones, so x has a path through all blocks
        # without any norm, and so has its gradient.
        x = self.add(x, lambda x: self.ls1(self.attn(self.norm1(x), asking)), asking)
        return self.add(x, lambda x: self.ls2(self.mlp(self.norm2(x))))

    def add(self, x: Tensor, branch, asking: int | None = None) -> Tensor:
        """x + branch(x). Stochastic depth, in training: a share of the pictures, drawn at random
        and rounded to whole ones, skips the branch: it is not computed for them, as in DINOv2."""
        if not (self.training and self.drop_path):
            return x[:, :asking] + branch(x)
        n = max(round(len(x) * (1 - self.drop_path)), 1)
        kept = torch.randperm(len(x), device=x.device)[:n]
        y = branch(x.index_select(0, kept))
        # The pictures that are kept count for more, so that the expected output is the same.
        return x[:, :asking].index_add(0, kept, y.to(x.dtype), alpha=len(x) / n)


class ClassBlock(Block):
    """CaiT's class-attention block (arXiv 2103.17239): only [CLS] has a query, and is updated."""

    def forward(self, x: Tensor, asking: int | None = None) -> Tensor:
        return torch.cat([super().forward(x, 1), x[:, 1:asking]], dim=1)


class ViT(nn.Module):
    """Pictures to tokens. Built plain, then specialised as the config says, so that a plain and a
    specialised model of one seed start from the same weights."""

    origin = ""  # what it is and where it came from, in words; see `load`

    def __init__(self, cfg: Config):
        super().__init__()
        c = self.config = replace(cfg, **NO_SPEC)
        grid = c.image_size // c.patch
        self.checkpointing = False  # recompute blocks in the backward pass instead of keeping them
        self.patch_embed = PatchEmbed(c.patch, c.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.width))
        self.mask_token = nn.Parameter(torch.zeros(1, c.width))
        # Attention does not see the order of tokens, so each patch is told its place.
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, c.width))
        # The block at which [CLS] joins the patches: the first, or in CaiT the first ClassBlock.
        self.join = c.depth - c.class_attn if c.class_attn else 0
        kinds = [Block] * (c.depth - c.class_attn) + [ClassBlock] * c.class_attn
        self.blocks = nn.ModuleList(kind(c) for kind in kinds)
        self.norm = nn.LayerNorm(c.width, eps=1e-6)
        if c.registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, c.registers, c.width))
        self.initialise()
        if cfg.spec:
            # Some copies draw random numbers; the heads, drawn later, must not depend on that.
            with torch.random.fork_rng(devices=[]):
                specialize(self, cfg.spec, cfg.spec_blocks, cfg.spec_where, cfg.spec_rank,
                           cfg.registers_path, cfg.spec_init)

    def initialise(self) -> None:
        """Draw the weights (the patch projection keeps torch's own). Those of variants are drawn
        last, so that all others are the same with and without them."""
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        # 0.02 is meant for D >= 384; a narrower layer needs larger weights for outputs as large.
        std = 0.02 * max(1.0, (384 / self.config.width) ** 0.5)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=std)
                nn.init.zeros_(m.bias)
        for name, p in self.named_parameters():
            if name.endswith("register_tokens"):
                nn.init.normal_(p, std=1e-6)
            elif name.endswith(("bias_k", "bias_v")):
                nn.init.normal_(p, std=0.02)

    def positions(self, h: int, w: int) -> Tensor:
        """pos_embed for h x w patches, (1, 1 + h w, D): bicubic if the grid is not the native one.

        Three ways are in use. DINO and DINOv2: no antialias, by a factor of (h + 0.1) / grid
        (pos_offset 0.1). transformers' DINOv2: no antialias, to the size (pos_offset 0). DINOv2
        with registers, and timm: antialias, to the size (pos_antialias True).
        """
        grid = math.isqrt(self.pos_embed.shape[1] - 1)
        if (h, w) == (grid, grid):
            return self.pos_embed
        cls, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        patches = rearrange(patches, "1 (h w) d -> 1 d h w", h=grid).float()
        antialias, offset = self.config.pos_antialias, self.config.pos_offset
        if offset and not antialias:
            scale = (h + offset) / grid, (w + offset) / grid
            patches = F.interpolate(patches, scale_factor=scale, mode="bicubic")
        else:
            patches = F.interpolate(patches, size=(h, w), mode="bicubic", antialias=antialias)
        return torch.cat([cls, rearrange(patches, "1 d h w -> 1 (h w) d").to(cls.dtype)], dim=1)

    def embed(self, img: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Pictures -> what enters the blocks: [CLS] (B, 1, D), registers and patches (B, R + N, D).
        Arguments and errors as in `forward`."""
        (height, width), p = img.shape[-2:], self.config.patch
        need(height % p == width % p == 0, f"picture of {height} x {width} px: both sides must be "
             f"multiples of the patch, {p} px; resize or crop it")
        x = self.patch_embed(img)  # (B, N, D)
        if mask is not None:  # a hidden patch keeps its position, so that it can be predicted
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        positions = self.positions(height // p, width // p)
        x = x + positions[:, 1:]
        if self.config.registers:  # they stand for no place, so they get no position
            x = torch.cat([self.register_tokens.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        # [CLS] stands for no place either; its position, one more learnt vector, is there because
        # public weights have it.
        cls = (self.cls_token + positions[:, :1]).to(x.dtype)  # the same in every picture
        return cls.expand(len(x), -1, -1), x

    def forward(self, img: Tensor, mask: Tensor | None = None, layers: tuple[int, ...] = (),
                cls_only: bool = False) -> dict[str, Tensor]:
        """img: (B, 3, h p, w p), pictures from `preprocess`; mask: (B, N) bool, True hides a patch.

        layers: the blocks, counted from 1, whose tokens are wanted, concatenated along D from the
        first to the last; none: the last. cls_only, not with layers: the last block computes [CLS]
        alone, which saves 5 % of a ViT-S.
        Returns the tokens after the final norm: cls (B, D), registers (B, R, D), patches (B, N, D),
        with n layers n D instead of D; with cls_only registers and patches are empty.
        Raises ValueError if a side is not a multiple of the patch p.
        """
        assert not (layers and cls_only)
        cls, x = self.embed(img, mask)  # (B, 1, D), (B, R + N, D)
        kept, wanted = [], layers or (len(self.blocks),)
        for i in range(max(wanted)):
            if i == self.join:  # in CaiT patches are on their own until here
                x = torch.cat([cls, x], dim=1)  # (B, T, D)
            asking = 1 if cls_only and i == len(self.blocks) - 1 else None
            if self.checkpointing and self.training:
                x = checkpoint(self.blocks[i], x, asking, use_reentrant=False)
            else:
                x = self.blocks[i](x, asking)
            if i + 1 in wanted:
                kept.append(self.norm(x if i >= self.join else torch.cat([cls, x], dim=1)))
        x = torch.cat(kept, dim=2) if len(kept) > 1 else kept[0]
        first = 1 + self.config.registers  # the first patch
        return {"cls": x[:, 0], "registers": x[:, 1:first], "patches": x[:, first:]}


# --------------------------------------------------------------------------------------------------
# Where the idea goes in it, and what that costs.


def specialize(model: ViT, spec, blocks: int | None = None, where: str = "first", rank: int = 0,
               registers_path: str = "patch", init: str = "equal") -> ViT:
    """Give a plain model, new or trained, separate [CLS] and patch weights, in place; returns it.

    spec: names from COMPONENTS; blocks: how many blocks get qkv, proj and mlp (None: a third of the
    depth), counted from the "first" or the "last"; registers_path: whose weights registers pass.
    The copies start equal, so outputs do not change; with init "fresh" the linear layers among them
    are drawn anew, with the same std. An optimiser made before does not know the copies.
    """
    need(not model.config.spec,
         f"this model has {', '.join(model.config.spec)} already; give a plain one")
    # The config is checked before anything else, so that a refusal changes nothing.
    model.config = c = checked(replace(
        model.config, spec=tuple(spec), spec_blocks=blocks, spec_where=where, spec_rank=rank,
        registers_path=registers_path, spec_init=init))
    first = 0 if c.spec_where == "first" else c.depth - c.spec_blocks
    chosen = range(first, first + c.spec_blocks)  # blocks that get qkv, proj and mlp
    rows = 1 + (c.registers if c.registers_path == "cls" else 0)

    def fork(parent: nn.Module, name: str, rank: int = 0) -> None:
        both = Specialised(getattr(parent, name), rows, rank)
        setattr(parent, name, both)
        if c.spec_init == "fresh":
            for m in both.cls.modules():
                if isinstance(m, nn.Linear):
                    m.weight.data = torch.randn_like(m.weight) * m.weight.data.std()

    for i, block in enumerate(model.blocks):
        # Norms in every block: even a shared norm pulls [CLS] and patches apart, as the two are
        # large in different dimensions (the paper's observation).
        if "norms" in c.spec:
            for name in ("norm1", "norm2", "ls1", "ls2") if c.layerscale else ("norm1", "norm2"):
                fork(block, name)
        for parent, name in ((block.attn, "qkv"), (block.attn, "proj"), (block, "mlp")):
            if name in c.spec and i in chosen:
                fork(parent, name, c.spec_rank if name == "qkv" else 0)
    if "final" in c.spec:
        fork(model, "norm")
    return model


def parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters it has in all, and how many of them specialisation added."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    return sum(sizes.values()), sum(n for name, n in sizes.items() if ".cls." in f".{name}")


def flops(c: Config, height: int, width: int) -> int:
    """FLOPs of a forward pass of the plain model on one picture of height x width pixels, by
    torch's counter, 2 for a multiply-add. The method adds none; `Specialised` computes row 0 twice,
    which adds 1 / T to its layers."""
    formula = sdpa_kernel(SDPBackend.MATH)  # fused attention is not counted
    # On "meta" a tensor has a shape and no numbers: nothing is computed, only counted.
    with torch.device("meta"), FlopCounterMode(display=False) as counter, formula:
        ViT(replace(c, **NO_SPEC))(torch.empty(1, 3, height, width))
    return counter.get_total_flops()


# --------------------------------------------------------------------------------------------------
# Weights in and out.

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pictures, RGB in [0, 1]


@lru_cache
def constant(values: tuple, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor of these numbers, made once: copying them to a GPU waits for its work to end."""
    return torch.tensor(values, device=device, dtype=dtype)


def normalise(img: Tensor) -> Tensor:
    """Pictures (B, 3, H, W), RGB in [0, 1] -> what all networks here, and public ones, expect."""
    mean, std = (constant(x, img.device, img.dtype)[:, None, None] for x in (MEAN, STD))
    return (img - mean) / std


def preprocess(img: Tensor, patch: int, side: int = 0) -> Tensor:
    """uint8 pictures (B, 3, H, W), or one, (3, H, W), RGB -> what a ViT takes, (B, 3, h p, w p).

    side: the length of the shorter side, in pixels; 0: as it is. It is one resize, with antialias,
    of both sides to the nearest multiple of the patch p."""
    need(img.dtype == torch.uint8 and img.ndim in (3, 4) and img.shape[-3] == 3,
         f"preprocess takes uint8 pictures (B, 3, H, W), RGB; got {img.dtype} {tuple(img.shape)}")
    img = img.reshape(-1, *img.shape[-3:]) / 255
    scale = side / min(img.shape[-2:]) if side else 1
    size = [whole_patches(n * scale, patch) for n in img.shape[-2:]]
    return normalise(F.interpolate(img, size, mode="bilinear", antialias=True).clamp(0, 1))


KNOWN_FILES = "last.pt", "model.safetensors", "pytorch_model.bin"  # ours; the Hugging Face Hub's


def weights_file(name) -> Path:
    """The file of weights in a run folder, or in a folder of the Hugging Face Hub; any other name
    as it is. ValueError: a folder without one."""
    path = Path(name)
    if path.is_dir():
        found = [path / file for file in KNOWN_FILES if (path / file).exists()]
        need(found, f"{path} has no {', '.join(KNOWN_FILES)}; name a run folder or a file of "
             "weights")
        return found[0]
    return path


def read(path) -> dict:
    """What torch.save or safetensors put into a file, on the CPU. No code in the file is ever run.
    ValueError: which file, what is wrong, what to do."""
    path = weights_file(path)
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.suffix
    hub = named and not path.parent.exists()  # in a folder that is there, it is a slip in the name
    more = f"; a model of the Hugging Face Hub? hf download {path} --local-dir {path.name}, then " \
           f"give {path.name}" if hub else ""
    need(path.is_file(), f"no checkpoint at {path}; train one with: python train.py{more}")
    need(path.stat().st_size, f"{path} is empty, as a full disk leaves it; copy or make it again")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # DINO's files hold one
            # Mapped, not read: optimiser and heads, most of a checkpoint, are often not wanted.
            mmap = zipfile.is_zipfile(path)  # torch's format since 1.6
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        wrong = "" if isinstance(state, dict) else f"it is a {type(state).__name__}, not a dict"
    except pickle.UnpicklingError:
        wrong = "to open it would run code from it, or it is no such file"
    except Exception as err:  # whatever torch makes of a damaged file
        wrong = f"damaged or of another kind: {type(err).__name__}"
    need(not wrong, f"{path} is no checkpoint that torch can load ({wrong}); take a whole "
         "copy of it, or save weights with torch.save(model.state_dict(), path)")
    return state


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """A .safetensors file: 8 bytes with the length of a JSON text; that text, {name: type, shape,
    where its bytes begin and end in the rest}; the rest. ValueError: it is none, or not whole."""
    data, state, end = bytearray(path.read_bytes()), {}, 0
    start = 8 + int.from_bytes(data[:8], "little")
    try:
        need(8 < start <= len(data), "its header ends beyond the file's end")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        # In the order of their bytes: each begins where the one before it ends.
        for name, one in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            low, high = one["data_offsets"]
            need(end == low < high <= len(data) - start, f"{name}'s bytes are not where they ought "
                 "to be")
            end, part = high, memoryview(data)[start + low : start + high]
            tensor = torch.frombuffer(part, dtype=DTYPES[one["dtype"]])
            state[name] = tensor.view(one["shape"]).clone()
        need(start + end == len(data), "bytes are left over")
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as err:
        raise ValueError(f"{path} is cut short, damaged, or no safetensors file of weights "
                         f"({str(err).splitlines()[0][:100]}); copy it again") from None
    return state


def not_finite(state: dict) -> str:
    """The name of the first tensor with a NaN or an infinity; "" if there is none."""
    return next((name for name, x in state.items() if not x.isfinite().all()), "")


FLOATS = torch.float64, torch.float32, torch.float16, torch.bfloat16


def check_weights(state: dict, name: str) -> None:
    """ValueError unless all are tensors of finite numbers: a quantised one, say, would be copied
    into a network as if its codes were weights."""
    for key, x in state.items():
        need(isinstance(x, Tensor), f"{name}: {key} must be a tensor, and is a {type(x).__name__}")
        plain = x.dtype in FLOATS and x.layout == torch.strided and not x.is_meta
        need(plain, f"{name}: {key} holds no floating-point numbers ({str(x.dtype)[6:]}, "
             f"{str(x.layout)[6:]}); save it in fp32")
    odd = not_finite(state)
    need(not odd, f"{name}: {odd} is not finite; the file is damaged, or its training diverged")


def save(model: ViT, path) -> None:
    """Write a ViT, specialised or not, to a file that `load` and all commands read. (A state dict
    alone does not say how its network attends: `load` would take it for softmax in all blocks.)"""
    torch.save({"model": asdict(model.config), "weights": model.state_dict()}, path)


def load(path, network: str = "teacher") -> ViT:
    """The ViT in any file of weights, on the CPU, in eval mode; `model.origin` says what it is.

    Of a file of `save`: its network. Of a checkpoint of train.py: the "teacher", the "student", or
    "untrained", what both were at step 0, made again from the seed. Of public weights: their
    network, see `load_weights`, which has more options."""
    path = weights_file(path)
    state = read(path)
    ours = isinstance(state.get("model"), dict) and "width" in state["model"]
    from_save = ours and "weights" in state
    if from_save or not ours:
        inside = [] if from_save else [str(key) for key in (*state, *unwrapped(state, network))]
        named = any(re.search(rf"\b{network}(\.|$)", key) for key in inside)
        need(network == "teacher" or named, f"{path} holds weights alone: nobody knows its "
             f"{network} network; leave out --network")
    if not ours:
        return load_weights(state, network, name=str(path))
    try:
        cfg = Config(**state["model"] | {"spec": tuple(state["model"]["spec"])})
        if network == "untrained":
            seed, init = state["args"]["seed"], state["args"].get("init")
        else:
            weights = state["weights"] if from_save else {
                name.removeprefix("backbone."): value for name, value in state[network].items()
                if name.startswith("backbone.")}  # the others are the heads'
            model = ViT(cfg)
            check_weights(weights, network)
            model.load_state_dict(weights)
            at = "" if from_save else f"; {network}, step {state.get('step', 'unknown')}"
            model.origin = described(model) + at
            return model.eval()
    except Exception as err:  # whatever is not as train.py leaves it
        why = " ".join(str(err).split())[:300] or type(err).__name__
        raise ValueError(f"{path} cannot be used as a checkpoint of this project ({why})") from None
    # Outside the try: a missing file `init` is no fault of this one.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        spec = {name: getattr(cfg, name) for name in NO_SPEC}
        model = (start(init, cfg.drop_path, spec) if init else ViT(cfg)).eval()
    model.origin = described(model) + "; untrained, as at step 0"
    return model


def described(model: ViT) -> str:
    """What a network is: "ViT-S/14, 12 blocks, 6 heads, 22.06 M parameters, made for 518 px"."""
    c = model.config
    named = {width: size for size, (width, *_) in SIZES.items()}
    short = {"tiny": "Ti", "small": "S", "base": "B", "large": "L", "huge": "H"}
    size = named.get(c.width, f"{c.width} wide")
    parts = [f"ViT-{short.get(size, size)}/{c.patch}", f"{c.depth} blocks", f"{c.heads} heads",
             f"{parameters(model)[0] / 1e6:.2f} M parameters", f"made for {c.image_size} px"]
    parts += ["LayerScale"] if c.layerscale else []
    parts += [f"{c.registers} registers"] if c.registers else []
    if c.spec:
        where = f" in the {c.spec_where} {c.spec_blocks} blocks" if c.spec_blocks else ""
        parts.append(f"specialised: {' and '.join(c.spec)}{where}")
    return ", ".join(parts)


def start(init, drop_path: float, spec: dict) -> ViT:
    """A network at step 0 that has the shape and weights (the teacher's) of a file, this drop_path,
    and the specialisation `spec`, the fields of NO_SPEC; where that names no component, the file's
    own. ValueError: the file's network is specialised in another way."""
    with torch.random.fork_rng(devices=[]):  # so that the heads, drawn later, stay the same
        given = load(init)
        model = ViT(replace(given.config, drop_path=drop_path))
        model.load_state_dict(given.state_dict())
        model.origin = given.origin
        if given.config.spec and not spec["spec"]:
            return model
        cfg = checked(replace(given.config, **spec))
        has, wanted = ([getattr(c, name) for name in NO_SPEC] for c in (given.config, cfg))
        if has == wanted:
            return model
        need(not given.config.spec, f"{init} is specialised already, in another way: spec, blocks, "
             f"where, rank, registers' path and init are {has}, not {wanted}; ask for the same, or "
             "give a plain one")
        return specialize(model, *wanted)


# In public files, but no part of a backbone.
HEADS = ("head.", "head_dist.", "dino_head.", "ibot_head.", "linear_head.", "classifier.",
         "dino_loss.", "ibot_patch_loss.")
# Other people's names -> ours, one rule after the other, on every name.
RENAMED = (
    # What wrappers put into names, wherever they stand.
    (r"\b(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", ""),
    (r"^blocks\.\d+\.(\d+\.)", r"blocks.\1"),  # DINOv2 in chunks for FSDP
    (r"gamma_([12])$", r"ls\1.gamma"),  # DeiT-III
    (r"^reg_token$", "register_tokens"),  # timm
    # transformers' Dinov2, with and without registers, old and new.
    (r"^dinov2(_with_registers)?\.", ""),
    (r"^embeddings\.", ""),
    (r"^patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^position_embeddings$", "pos_embed"),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.(attention\.)?(query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(attention\.)?(key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(attention\.)?(value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
)


def unwrapped(state: dict, network: str) -> dict:
    """The state dict inside: checkpoints of whole trainings are dicts of dicts."""
    for key in (network, "model", "state_dict"):
        state = state[key] if isinstance(state.get(key), dict) else state
    return state


def our_names(state: dict, network: str) -> dict[str, Tensor]:
    """The backbone's weights in a state dict of DINO, DINOv2, DeiT-III, timm or transformers, under
    our names."""
    other = "student." if network == "teacher" else "teacher."
    out = {}
    for name, value in state.items():
        name = re.sub(*RENAMED[0], str(name))
        name = re.sub(rf"^({network}\.|backbone\.)*", "", name)
        for theirs, ours in RENAMED[1:]:
            name = re.sub(theirs, ours, name)
        if not name.startswith((*HEADS, other)):
            need(name not in out, f"two of the file's tensors are {name}; keep one network in it")
            out[name] = value
    for name in [name for name in out if ".attn.q." in name]:  # three layers are one of ours
        names = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(isinstance(out.get(part), Tensor) for part in names):
            whole = name.replace(".attn.q.", ".attn.qkv.")
            out[whole] = torch.cat([out.pop(part) for part in names])
    return out


def load_weights(source, network: str = "teacher", pos_antialias: bool | None = None,
                 heads: int | None = None, name: str = "these weights") -> ViT:
    """The ViT of public weights, plain, its shape read off them: DINO's, DINOv2's with or without
    registers, in their own layout or transformers', DeiT-III's, or timm's of the same. On the CPU,
    in eval mode; `model.origin` says what it is, and how many tensors of the file it took.

    source: a file, or a state dict; both may be of a whole training, with `network` ("teacher" or
    "student") inside. Classification and projection heads are left out. heads: of attention, which
    files do not say; None: as in the known size of that width. pos_antialias: see ViT.positions;
    None: as the weights' own code does (timm's DINO v1 looks like DINO's own: give True).
    Raises ValueError with every key that is left over or missing.
    """
    if not isinstance(source, dict):
        source, name = read(source), str(source)
    source = unwrapped(source, network)
    s = our_names(source, network)
    taken = len(s)
    wanted = "cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"
    missing = [key for key in wanted if key not in s]
    need(not missing, f"{name}: no {', '.join(missing)}, so neither a checkpoint of train.py nor a "
         "ViT of DINO, DINOv2 (but those with SwiGLU), DeiT-III, timm or transformers' Dinov2; it "
         f"has {', '.join(sorted(map(str, source))[:3])} ...")
    check_weights(s, name)
    dims = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4, "register_tokens": 3,
            "blocks.0.mlp.fc1.weight": 2}
    odd = [key for key, n in dims.items() if key in s and (s[key].ndim != n or not s[key].numel())]
    odd += [key for key in s if key.startswith("blocks.") and not key.split(".")[1].isdecimal()]
    need(not odd, f"{name}: {', '.join(odd)} is of no ViT's shape or name")

    width, tokens = s["cls_token"].shape[-1], s["pos_embed"].shape[1]
    known = {w: h for w, _, h, _ in SIZES.values()}
    need(heads or width in known, f"{name}: {width} wide, and no file says how many heads attention"
         " has; make one that does, in Python: "
         'clsspec.save(clsspec.load_weights(path, heads=...), "weights.pt")')
    if math.isqrt(tokens) ** 2 == tokens:  # a square of patches: none for [CLS]
        s["pos_embed"] = F.pad(s["pos_embed"], (0, 0, 1, 0))
    scale = "blocks.0.ls1.gamma" in s
    theirs = [str(key) for key in source]
    hub = any("embeddings." in key for key in theirs)  # transformers
    if pos_antialias is None:  # what only some weights have, or lack, says whose they are
        deit = any("gamma_1" in key for key in theirs)
        timm_v2 = scale and "mask_token" not in s and not deit and not hub
        pos_antialias = "register_tokens" in s or timm_v2
    s.setdefault("mask_token", torch.zeros(1, width))  # only DINOv2 has one
    patch = s["patch_embed.proj.weight"].shape[-1]
    model = ViT(checked(Config(
        width=width, heads=heads or known[width], patch=patch, pos_antialias=pos_antialias,
        pos_offset=0.0 if hub else 0.1,
        depth=1 + max(int(key.split(".")[1]) for key in s if key.startswith("blocks.")),
        image_size=patch * math.isqrt(tokens), layerscale=1e-5 if scale else 0.0,
        mlp_ratio=len(s["blocks.0.mlp.fc1.weight"]) / width,
        registers=s["register_tokens"].shape[1] if "register_tokens" in s else 0)))

    try:
        model.load_state_dict(s)  # every tensor is used, or the file is refused
    except RuntimeError as err:
        lines = [line.strip() for line in str(err).splitlines()[1:]]
        raise ValueError(f"{name}: {' '.join(lines)}") from None
    model.origin = f"{described(model)}; all {taken} tensors of the backbone used"
    return model.eval()
