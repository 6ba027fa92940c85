"""A vision transformer whose [CLS] and patches may have weights of their own, in one attention.

    python clsspec.py              # parameters and GFLOPs of every size, plain and specialised

    import torch, clsspec
    model = clsspec.ViT(clsspec.config("small", spec=("norms", "qkv"), spec_blocks=4))
    out = model(torch.rand(2, 3, 224, 224))
    out["cls"].shape, out["patches"].shape     # (2, 384), (2, 196, 384)

    clsspec.specialize(plain_model, ("norms", "qkv"), blocks=4)   # same outputs, more freedom

Source: "Revisiting [CLS] and Patch Token Interaction in Vision Transformers", arXiv 2602.08626.
With x = [CLS, patches], the tokens of one picture, what differs from a plain ViT is:

    1. norms   LN(x) -> [LN_cls(x_cls), LN_patch(x_patch)]   norm1, norm2, LayerScale of every block
    2. qkv     W x   -> [W_cls x_cls,   W_patch x_patch]     the fused projection of the first third
    3. nothing else: attention, out-projection and MLP stay shared. Each token meets one set of
       weights, so FLOPs do not change. (`proj`, `mlp`, `final` are components for ablations.)

Letters: B pictures, N = h w patches, T = 1 + N tokens, D width, H heads, d = D / H. A plain model
has the state-dict names of DINO and DINOv2; a specialised layer is `name.cls` and `name.patch`.
"""

import copy
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

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
    spec: tuple[str, ...] = ()  # specialised components, from COMPONENTS
    spec_blocks: int = 0  # qkv, proj, mlp: in how many blocks
    spec_where: str = "first"  # ... counted from the "first" or the "last" block
    spec_rank: int = 0  # 0: qkv gets a full [CLS] copy; r > 0: a rank-r update of the patches' copy


def config(size: str = "small", spec_blocks: int | None = None, **changes) -> Config:
    """The Config of a named size. spec_blocks None: a third of the depth, the paper's best."""
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; choose from {', '.join(SIZES)}")
    width, depth, heads, patch = SIZES[size]
    cfg = Config(**{"width": width, "depth": depth, "heads": heads, "patch": patch} | changes)
    if cfg.width % cfg.heads:
        raise ValueError(f"width {cfg.width} is not a multiple of {cfg.heads} heads; change either")
    if cfg.image_size % cfg.patch or cfg.image_size <= 0:
        raise ValueError(f"image size {cfg.image_size} is no multiple of the patch, {cfg.patch} px;"
                         f" try {max(round(cfg.image_size / cfg.patch), 1) * cfg.patch}")
    check_spec(cfg.spec, spec_blocks, cfg.depth, cfg.spec_where, cfg.spec_rank)
    in_blocks = {"qkv", "proj", "mlp"} & set(cfg.spec)
    blocks = cfg.depth // 3 if spec_blocks is None else spec_blocks
    return replace(cfg, spec_blocks=blocks if in_blocks else 0)


def check_spec(spec, blocks: int | None, depth: int, where: str, rank: int) -> None:
    """Raise ValueError where a specialisation names what does not exist."""
    for name in spec:
        if name not in COMPONENTS:
            known = ", ".join(COMPONENTS)
            raise ValueError(f"unknown component {name!r} in spec; choose from {known}")
    if blocks is not None and not 0 <= blocks <= depth:
        raise ValueError(f"spec blocks {blocks} is outside 0 to {depth}, the depth of this model")
    if where not in ("first", "last"):
        raise ValueError(f"spec where {where!r} is not 'first' or 'last'")
    if rank < 0 or (rank and "qkv" not in spec):
        raise ValueError(f"spec rank {rank} must be >= 0 and needs component qkv; spec is {spec}")


# --------------------------------------------------------------------------------------------------
# The idea of this repository: one layer twice, a copy for [CLS] and a copy for the patches.


class Fork(torch.autograd.Function):
    """x (B, T, D) -> x and a copy of its [CLS] row. The gradient of a slice would be a (B, T, D) of
    zeros around one row; here the row is added into the gradient that the layer has just made."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x), x[:, :1].clone()

    @staticmethod
    def backward(ctx, grad, grad_cls):
        grad[:, :1] += grad_cls
        return grad


class Specialised(nn.Module):
    """[CLS] passes `cls`, every other token passes `patch`; both start as copies of one layer.

    All tokens pass `patch` in one call and row 0 is then overwritten, which costs one copy of the
    gradient: a ViT-S took 1 to 3 % longer for it on a CPU, and 8 % with two slices and a cat.
    rank > 0 (linear layers): W_cls = W_patch + up down, `up` = 0 at first (LoRA, arXiv 2106.09685).
    """

    def __init__(self, layer: nn.Module, rank: int = 0):
        super().__init__()
        self.rank = rank
        self.patch = layer
        if rank:
            with torch.random.fork_rng(devices=[]):  # what is built later is as in a plain model
                down = nn.Linear(layer.in_features, rank, bias=False)
                up = nn.Linear(rank, layer.out_features, bias=False)
            nn.init.zeros_(up.weight)
            self.cls = nn.Sequential(down, up).to(layer.weight)
        else:
            self.cls = copy.deepcopy(layer)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D')
        x, x_cls = Fork.apply(x)
        y = self.patch(x)
        y[:, :1] = y[:, :1] + self.cls(x_cls) if self.rank else self.cls(x_cls)
        return y


def specialize(model: "ViT", spec, blocks: int | None = None, where: str = "first",
               rank: int = 0) -> "ViT":
    """Give a plain model, new or trained, separate [CLS] and patch weights, in place; returns it.

    spec: names from COMPONENTS; blocks: how many blocks get qkv, proj and mlp (None: a third of the
    depth), from the `first` or the `last` one. The copies start equal: outputs do not change.
    """
    if model.config.spec:
        raise ValueError(f"this model has {', '.join(model.config.spec)} already; give a plain one")
    spec, depth = tuple(spec), len(model.blocks)
    check_spec(spec, blocks, depth, where, rank)
    blocks = depth // 3 if blocks is None else blocks
    blocks = blocks if {"qkv", "proj", "mlp"} & set(spec) else 0
    for i, block in enumerate(model.blocks):
        if "norms" in spec:
            block.norm1, block.norm2 = Specialised(block.norm1), Specialised(block.norm2)
            if model.config.layerscale:
                block.ls1, block.ls2 = Specialised(block.ls1), Specialised(block.ls2)
        if not (i < blocks if where == "first" else i >= depth - blocks):
            continue
        if "qkv" in spec:
            block.attn.qkv = Specialised(block.attn.qkv, rank)
        if "proj" in spec:
            block.attn.proj = Specialised(block.attn.proj)
        if "mlp" in spec:
            block.mlp = Specialised(block.mlp)
    if "final" in spec:
        model.norm = Specialised(model.norm)
    model.config = replace(model.config, spec=spec, spec_blocks=blocks, spec_where=where,
                           spec_rank=rank)
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


class Attention(nn.Module):
    """Multi-head self-attention over all tokens: the place where [CLS] and patches meet."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (rearrange(y, "b t (h d) -> b h t d", h=self.heads) for y in qkv)
        out = F.scaled_dot_product_attention(q, k, v)  # (B, H, T, d)
        return self.proj(rearrange(out, "b h t d -> b t (h d)"))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


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
        self.attn = Attention(c.width, c.heads)
        self.ls1 = LayerScale(c.width, c.layerscale) if c.layerscale else nn.Identity()
        self.norm2 = nn.LayerNorm(c.width, eps=1e-6)
        self.mlp = Mlp(c.width, int(c.width * c.mlp_ratio))
        self.ls2 = LayerScale(c.width, c.layerscale) if c.layerscale else nn.Identity()
        self.drop_path = StochasticDepth(c.drop_path, "row") if c.drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class ViT(nn.Module):
    """Pictures to tokens. Built plain, then specialised as the config says, so that a plain and a
    specialised model of one seed start from the same weights."""

    def __init__(self, cfg: Config):
        super().__init__()
        c = self.config = replace(cfg, spec=(), spec_blocks=0, spec_where="first", spec_rank=0)
        grid = c.image_size // c.patch
        self.checkpointing = False  # recompute blocks in the backward pass instead of keeping them
        self.patch_embed = PatchEmbed(c.patch, c.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.width))
        self.mask_token = nn.Parameter(torch.zeros(1, c.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, c.width))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width, eps=1e-6)

        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        # 0.02 is meant for D >= 384; a narrower layer needs larger weights to pass on as much.
        std = 0.02 * max(1.0, (384 / c.width) ** 0.5)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=std)
                nn.init.zeros_(m.bias)
        if cfg.spec:
            specialize(self, cfg.spec, cfg.spec_blocks, cfg.spec_where, cfg.spec_rank)

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

    def forward(self, img: Tensor, mask: Tensor | None = None,
                layer: int | None = None) -> dict[str, Tensor]:
        """img: (B, 3, h p, w p), normalised pictures; mask: (B, N) bool, True hides a patch.

        layer: go through this many blocks; None: through all. Returns the tokens after the final
        norm: cls (B, D), patches (B, N, D).
        Raises ValueError if a side is not a multiple of the patch p.
        """
        p = self.config.patch
        if img.shape[-2] % p or img.shape[-1] % p:
            raise ValueError(f"picture of {img.shape[-2]} x {img.shape[-1]} px: both sides must be "
                             f"multiples of the patch, {p} px; resize or crop it")
        x = self.patch_embed(img)  # (B, N, D)
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, T, D)
        x = x + self.positions(img.shape[-2] // p, img.shape[-1] // p)
        for block in self.blocks[:layer]:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        x = self.norm(x)
        return {"cls": x[:, 0], "patches": x[:, 1:]}


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
        else:
            key = next((k for k in ("qkv", "proj", "mlp") if f".{k}." in name), "norms")
        table[key] += p.numel()
    return table | {"total": sum(p.numel() for p in model.parameters())}


def flops(c: Config, h: int, w: int) -> int:
    """FLOPs of a forward pass on one picture of h x w pixels: 2 for a multiply-add of a product.

    Specialised or not makes no difference, but for the low-rank update of spec_rank.
    """
    n = (h // c.patch) * (w // c.patch)
    t = 1 + n
    linear = 2 * t * c.width**2 * (4 + 2 * c.mlp_ratio)  # qkv 3, proj 1, mlp 2 x ratio
    attention = 2 * 2 * t * t * c.width  # q k and p v
    low_rank = c.spec_blocks * 2 * c.spec_rank * 4 * c.width
    return int(2 * n * 3 * c.patch**2 * c.width + c.depth * (linear + attention) + low_rank)


def load(path, network: str = "teacher") -> ViT:
    """The ViT of the "teacher" or "student" in a checkpoint of train.py, or "untrained", as both
    were at step 0; on the CPU, eval mode."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        cfg = Config(**state["model"] | {"spec": tuple(state["model"]["spec"])})
        if network == "untrained":
            torch.manual_seed(state["args"]["seed"])
            return ViT(cfg).eval()
        parts = ((name.partition("backbone."), value) for name, value in state[network].items())
        weights = {name: value for (_, found, name), value in parts if found}
        model = ViT(cfg)
        model.load_state_dict(weights)
    except FileNotFoundError:
        raise ValueError(f"no checkpoint at {path}; train one with: python train.py") from None
    except Exception as err:
        why = str(err).splitlines()[0]
        raise ValueError(f"{path} is not a checkpoint of this project ({why})") from None
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
