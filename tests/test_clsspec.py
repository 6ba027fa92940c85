"""The model: the same function as a plain ViT at the start, every variant against its equation, public weights."""

import argparse
import json
import re
from dataclasses import asdict
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2.functional import resize

import clsspec
import train
from clsspec import COMPONENTS, Entmax15, ViT, config, flops, parameters, specialize
from conftest import QUICK

TINY = dict(width=32, depth=3, heads=2, patch=8, image_size=32)
EVERY_SPEC = [("norms",), ("qkv",), ("proj",), ("mlp",), ("final",), ("norms", "qkv"), COMPONENTS]


def vit(seed=0, **changes):
    """A small float64 model whose weights are all different from zero and one."""
    torch.manual_seed(seed)
    model = ViT(config("nano", **TINY | changes)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def naive(model, img):
    """A plain ViT written down from its equations, one head and one token at a time where it matters."""
    s, c = model.state_dict(), model.config
    ln = lambda x, name: F.layer_norm(x, (c.width,), s[f"{name}.weight"], s[f"{name}.bias"], 1e-6)
    rows = []
    for y in range(0, img.shape[2], c.patch):
        for x in range(0, img.shape[3], c.patch):
            patch = img[:, :, y : y + c.patch, x : x + c.patch].flatten(1)
            rows.append(patch @ s["patch_embed.proj.weight"].flatten(1).T + s["patch_embed.proj.bias"])
    x = torch.stack([s["cls_token"][0, 0].expand(len(img), -1), *rows], 1) + s["pos_embed"]
    d = c.width // c.heads
    for i in range(c.depth):
        b = f"blocks.{i}"
        q, k, v = (ln(x, f"{b}.norm1") @ s[f"{b}.attn.qkv.weight"].T + s[f"{b}.attn.qkv.bias"]).chunk(3, -1)
        heads = []
        for h in range(c.heads):
            part = slice(h * d, (h + 1) * d)
            p = torch.softmax(q[..., part] @ k[..., part].mT / d**0.5, -1)
            heads.append(p @ v[..., part])
        out = torch.cat(heads, -1) @ s[f"{b}.attn.proj.weight"].T + s[f"{b}.attn.proj.bias"]
        x = x + out * s[f"{b}.ls1.gamma"]
        out = F.gelu(ln(x, f"{b}.norm2") @ s[f"{b}.mlp.fc1.weight"].T + s[f"{b}.mlp.fc1.bias"])
        out = out @ s[f"{b}.mlp.fc2.weight"].T + s[f"{b}.mlp.fc2.bias"]
        x = x + out * s[f"{b}.ls2.gamma"]
    return ln(x, "norm")


def tokens(model, img, **more):
    out = model(img, **more)
    return torch.cat([out["cls"][:, None], out["registers"], out["patches"]], 1)


@pytest.mark.parametrize("side", [32, 64])  # 17 and 65 tokens: by plain and by fused attention
def test_plain_vit_equals_its_equations(side):
    model, img = vit(image_size=side), torch.randn(2, 3, side, side, dtype=torch.float64)
    torch.testing.assert_close(tokens(model, img), naive(model, img), atol=1e-10, rtol=0)


@pytest.mark.parametrize("spec", EVERY_SPEC, ids=",".join)
def test_specialised_layers_equal_two_separate_layers(spec):
    """After their weights part, outputs and all gradients equal a model that slices and concatenates."""

    class Cat(clsspec.Specialised):
        def forward(self, x):
            return torch.cat([self.cls(x[:, :1]), self.patch(x[:, 1:])], 1)

    model = specialize(vit(), spec, blocks=2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".cls." in name:
                p.add_(0.1 * torch.randn_like(p))
    img = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    weight = torch.randn(2, 17, 32, dtype=torch.float64)

    def run():
        model.zero_grad()
        out = tokens(model, img)
        (out * weight).sum().backward()
        return out.detach(), {n: p.grad for n, p in model.named_parameters()}

    ours, our_grads = run()
    for m in model.modules():
        if isinstance(m, clsspec.Specialised):
            m.__class__ = Cat
    theirs, their_grads = run()
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    for name, grad in their_grads.items():
        if grad is not None:
            torch.testing.assert_close(our_grads[name], grad, atol=1e-10, rtol=1e-10, msg=name)


def test_a_low_rank_copy_is_a_low_rank_update():
    model = specialize(vit(), ("qkv",), blocks=1, rank=2)
    qkv, x = model.blocks[0].attn.qkv, torch.randn(2, 5, 32, dtype=torch.float64)
    with torch.no_grad():
        qkv.cls[1].weight.normal_()
    full = qkv.patch.weight + qkv.cls[1].weight @ qkv.cls[0].weight
    torch.testing.assert_close(qkv(x)[:, 0], F.linear(x[:, 0], full, qkv.patch.bias), atol=1e-12, rtol=0)
    torch.testing.assert_close(qkv(x)[:, 1:], qkv.patch(x[:, 1:]), atol=1e-12, rtol=0)


def test_low_rank_copies_differ_and_leave_the_random_numbers_alone():
    torch.manual_seed(0)
    model = ViT(config("nano", **TINY, spec=("qkv",), spec_blocks=2, spec_rank=2))
    after = torch.rand(3)
    torch.manual_seed(0)
    ViT(config("nano", **TINY))
    assert torch.equal(after, torch.rand(3))
    downs = [model.blocks[i].attn.qkv.cls[0].weight for i in (0, 1)]
    assert not torch.equal(*downs) and all(d.std() > 0 for d in downs)
    assert (model.blocks[0].attn.qkv.cls[1].weight == 0).all()


def test_gradient_of_a_low_rank_copy_by_finite_differences():
    qkv = specialize(vit(), ("qkv",), blocks=1, rank=2).blocks[0].attn.qkv
    torch.nn.init.normal_(qkv.cls[1].weight)
    x = torch.randn(2, 3, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: qkv(x).square().sum(), x, fast_mode=True)


def test_weights_start_at_the_sizes_that_are_said():
    model = ViT(config("nano", **TINY | {"width": 96, "registers": 4, "attn_bias": True}))
    near = lambda v: pytest.approx(v, rel=0.15)
    assert model.pos_embed.std().item() == near(0.02) and model.blocks[1].attn.bias_k.std().item() == near(0.02)
    assert model.register_tokens.std().item() == near(1e-6)
    assert model.blocks[0].mlp.fc1.weight.std().item() == near(0.04)  # 0.02 sqrt(384 / 96)
    assert ViT(config("tiny", depth=1, width=768)).blocks[0].mlp.fc1.weight.std().item() == near(0.02)


def test_a_branch_is_skipped_picture_by_picture():
    x = torch.randn(1, 5, 32).expand(64, -1, -1)
    model = ViT(config("nano", **TINY | {"drop_path": 0.5, "layerscale": 1.0}))
    block = model.train().blocks[0]
    seen = []
    block.mlp.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    assert len({tuple(row) for row in block(x).flatten(1)[:, :3].tolist()}) == 4  # none, either, both
    assert seen == [32]  # and it is not computed for the others
    ones = block.add(torch.zeros(4, 5, 32), lambda x: torch.ones_like(x))
    assert sorted(ones[:, 0, 0].tolist()) == [0, 0, 2, 2]  # the same in the mean
    block.eval()
    assert len({tuple(row) for row in block(x).flatten(1)[:, :3].tolist()}) == 1
    assert torch.equal(block.train().add(x[:1], torch.ones_like), 1 + x[:1])  # of one, none is skipped
    with pytest.raises(ValueError, match="drop path 1.0 is not from 0"):
        config("nano", drop_path=1.0)


@pytest.mark.parametrize("more", [{}, {"class_attn": 2}, {"registers": 2, "registers_path": "cls"},
                                  {"attn": "entmax15"}],
                         ids=str)
def test_cls_only_is_cls_of_the_whole(more):
    more |= {} if "class_attn" in more else {"spec": ("norms", "qkv", "proj", "mlp"), "spec_blocks": 3}
    model, img = vit(**more, drop_path=0.0), torch.randn(2, 3, 16, 24, dtype=torch.float64)
    whole, alone = model(img), model(img, cls_only=True)
    torch.testing.assert_close(alone["cls"], whole["cls"], rtol=1e-12, atol=1e-12)
    assert alone["patches"].shape == (2, 0, 32) and alone["registers"].shape == (2, 0, 32)
    with FlopCounterMode(display=False) as counter:
        model(img, cls_only=True)
    with FlopCounterMode(display=False) as every:
        model(img)
    assert counter.get_total_flops() < every.get_total_flops() or "class_attn" in more
    a, b = (torch.autograd.grad(out["cls"].sum(), model.patch_embed.proj.weight)[0] for out in (whole, alone))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("changes, recompute", [
    ({"spec": COMPONENTS, "spec_blocks": 1}, True), ({"spec": ("norms", "qkv"), "spec_blocks": 1}, False),
    ({"spec": ("qkv",), "spec_rank": 2, "registers": 2, "registers_path": "cls", "attn_bias": True,
      "spec_blocks": 1}, True),
    ({"attn": "entmax15"}, False), ({"class_attn": 1}, True), ({"checkpointing": True}, True)], ids=str)
def test_a_step_of_every_component_eager_and_compiled(changes, recompute, monkeypatch):
    """The same outputs and gradients, in training, with the parts of the compiler that need no C++ compiler."""
    monkeypatch.setattr(clsspec.Mlp, "recompute_from", 0 if recompute else 999)
    img, changes = torch.randn(2, 3, 32, 32, dtype=torch.float64), dict(changes)
    checkpointing = changes.pop("checkpointing", False)
    model = vit(**{"depth": 2, "layerscale": 0.1} | changes).train()
    model.checkpointing = checkpointing
    found = []
    torch._dynamo.reset()
    for call in (model, torch.compile(model, backend="aot_eager", dynamic=False)):
        model.zero_grad()
        out = tokens(call, img)
        out.square().sum().backward()
        found.append((out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (eager, grads), (compiled, compiled_grads) = found
    torch.testing.assert_close(compiled, eager, atol=1e-10, rtol=0)
    assert grads.keys() == compiled_grads.keys() == {n for n, _ in model.named_parameters() if n != "mask_token"}
    for name in grads:
        torch.testing.assert_close(compiled_grads[name], grads[name], atol=1e-9, rtol=1e-9, msg=name)


def test_checkpointing_is_for_training(monkeypatch):
    calls, real = [], clsspec.checkpoint
    monkeypatch.setattr(clsspec, "checkpoint", lambda *a, **k: calls.append(1) or real(*a, **k))
    model = vit(drop_path=0.0)
    model.checkpointing = True
    model.eval()(torch.randn(1, 3, 32, 32, dtype=torch.float64))
    assert not calls
    model.train()(torch.randn(1, 3, 32, 32, dtype=torch.float64))
    assert len(calls) == 3


def test_positions_are_added_row_by_row():
    model, img = vit(), torch.randn(1, 3, 16, 40, dtype=torch.float64)
    mask = torch.zeros(1, 10, dtype=torch.bool)
    mask[0, 3] = True
    cls, x = model.embed(img, mask)
    positions = model.positions(2, 5)
    bare = model.patch_embed(img)
    bare[0, 3] = model.mask_token[0]
    torch.testing.assert_close(x, bare + positions[:, 1:], atol=1e-12, rtol=0)
    torch.testing.assert_close(cls, model.cls_token + positions[:, :1], atol=1e-12, rtol=0)


def test_which_blocks_are_specialised():
    for where, expected in (("first", [True, False, False]), ("last", [False, False, True])):
        model = specialize(vit(), ("norms", "qkv"), blocks=1, where=where)
        assert [isinstance(b.attn.qkv, clsspec.Specialised) for b in model.blocks] == expected
        assert all(isinstance(b.norm1, clsspec.Specialised) for b in model.blocks)  # norms: in every block
        assert all(isinstance(b.ls2, clsspec.Specialised) for b in model.blocks)
    assert config("large", spec=("qkv",)).spec_blocks == 8  # a third of 24
    assert [config("nano", spec=(s,)).spec_blocks for s in COMPONENTS] == [0, 4, 4, 4, 0]
    assert config("nano", spec=("mlp",), spec_blocks=12).spec_blocks == 12


def test_parameter_counts_are_the_papers():
    """Table arithmetic of arXiv 2602.08626: ViT-S 22.06 M, ViT-L 304.4 M at patch 14 and 518 px positions."""
    for size, total, norms, scale, qkv in (("small", 22.06e6, 0.08, 0.04, 8.04), ("large", 304.4e6, 0.03, 0.016, 8.28)):
        with torch.device("meta"):
            plain, bare, both, only_qkv = (
                ViT(config(size, patch=14, image_size=518, spec=s, layerscale=ls))
                for s, ls in (((), 1e-5), (("norms",), 0.0), (("norms",), 1e-5), (("qkv",), 1e-5)))
        base = parameters(plain)[0]
        added = [100 * parameters(m)[1] / base for m in (bare, both, only_qkv)]
        assert base == pytest.approx(total, rel=2e-4)
        assert added[0] == pytest.approx(norms, abs=0.005)
        assert added[1] - added[0] == pytest.approx(scale, abs=0.005)
        assert added[2] == pytest.approx(qkv, abs=0.005)


def test_flops_formula_equals_torchs_counter():
    """Specialising costs no FLOPs in the method; the code does row 0 of a specialised matrix twice."""
    model = ViT(config("nano", **TINY, spec=("norms", "qkv", "proj", "mlp"), spec_blocks=2))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(torch.randn(1, 3, 32, 48))
    row = 2 * 32 * 32 * (3 + 1 + 8)  # of qkv, proj and mlp, in each block
    assert counter.get_total_flops() - 2 * row == flops(model.config, 32, 48)
    n, t, d = 24, 25, 32  # patches, tokens, width: 24 d^2 of products a token and block, 4 d of attention
    assert flops(model.config, 32, 48) == 2 * n * 3 * 64 * d + 3 * (24 * t * d * d + 4 * t * t * d)


def test_positions_are_resampled_in_the_three_public_ways():
    model = vit()
    grid = model.pos_embed[0, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    assert model.positions(4, 4) is model.pos_embed
    dino = F.interpolate(grid, scale_factor=(6.1 / 4, 3.1 / 4), mode="bicubic")
    timm = F.interpolate(grid, size=(6, 3), mode="bicubic", antialias=True)
    hub = F.interpolate(grid, size=(6, 3), mode="bicubic")
    for offset, antialias, expected in ((0.1, False, dino), (0.1, True, timm), (0.0, False, hub)):
        model.config = clsspec.replace(model.config, pos_offset=offset, pos_antialias=antialias)
        ours = model.positions(6, 3)
        assert ours.shape == (1, 19, 32) and torch.equal(ours[:, 0], model.pos_embed[:, 0])
        torch.testing.assert_close(ours[0, 1:].float(), expected.flatten(2)[0].T.float(), atol=1e-6, rtol=0)


def test_mask_hides_exactly_the_masked_patches():
    model, mask = vit(), torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True
    img = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    other = img.clone()
    other[:, :, 8:16, 8:16] = 9.0  # patch 5 = row 1, column 1
    assert torch.equal(tokens(model, img, mask=mask), tokens(model, other, mask=mask))
    assert not torch.equal(tokens(model, img), tokens(model, other))


def test_making_gelu_anew_changes_no_gradient_and_keeps_less(monkeypatch):
    model, img, found = vit(depth=1), torch.randn(2, 3, 32, 32, dtype=torch.float64), []
    for width in (999, 0):
        monkeypatch.setattr(clsspec.Mlp, "recompute_from", width)
        kept = {}

        def pack(x):
            kept[x.untyped_storage().data_ptr()] = x
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = tokens(model, img)
        model.zero_grad()
        out.sin().sum().backward()
        found.append(([p.grad for p in model.parameters() if p.grad is not None], sum(x.nbytes for x in kept.values())))
    (grads, whole), (others, less) = found
    assert all(torch.equal(a, b) for a, b in zip(grads, others)) and less < whole


def test_checkpointing_changes_no_gradient():
    img, grads = torch.randn(2, 3, 32, 32, dtype=torch.float64), []
    for on in (False, True):
        model = specialize(vit(), ("norms", "qkv"))
        model.checkpointing = on
        tokens(model, img).sin().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(a is b or torch.allclose(a, b, atol=1e-12) for a, b in zip(*grads))


def test_names_are_those_of_dino_and_dinov2():
    names = set(ViT(config("nano", **TINY)).state_dict())
    layers = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    expected = {"cls_token", "mask_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    expected |= {"norm.weight", "norm.bias"}
    expected |= {f"blocks.{i}.{m}.{p}" for i in range(3) for m in layers for p in ("weight", "bias")}
    expected |= {f"blocks.{i}.ls{k}.gamma" for i in range(3) for k in (1, 2)}
    assert names == expected
    assert {"blocks.0.attn.qkv.cls.weight", "blocks.0.attn.qkv.patch.weight", "blocks.2.ls1.cls.gamma"} <= set(
        ViT(config("nano", **TINY, spec=("norms", "qkv"))).state_dict())


@pytest.mark.parametrize("changes, words", [
    (dict(spec=("norm",)), "unknown component \\['norm'\\]"), (dict(spec=("qkv",), spec_blocks=13), "outside 0 to 12"),
    (dict(spec=("qkv",), spec_where="middle"), "'middle'"), (dict(spec=("norms",), spec_rank=4), "needs qkv in spec"),
    (dict(spec=("qkv",), spec_rank=-1), "spec rank -1 is below 0"), (dict(image_size=0), "image size 0"),
    (dict(image_size=60), "no multiple of the patch, 8 px; try 64"), (dict(heads=5), "not a multiple of 5 heads")])
def test_bad_configurations_say_what_to_do(changes, words):
    with pytest.raises(ValueError, match=words):
        config("nano", **changes)


def test_other_bad_input():
    with pytest.raises(ValueError, match="unknown size 'giant'; choose from nano"):
        config("giant")
    with pytest.raises(ValueError, match="33 x 32 px.*multiples of the patch, 8 px"):
        vit()(torch.randn(1, 3, 33, 32))
    with pytest.raises(ValueError, match="has norms already"):
        specialize(specialize(vit(), ("norms",)), ("qkv",))
    with pytest.raises(ValueError, match="no checkpoint at nowhere.pt"):
        clsspec.load("nowhere.pt")


VARIANTS = {
    "plain": {}, "registers": dict(registers=3), "bias": dict(attn_bias=True), "entmax": dict(attn="entmax15"),
    "all": dict(registers=2, attn_bias=True, attn="entmax15"), "class": dict(class_attn=1),
    "class all": dict(class_attn=2, registers=2, attn_bias=True, attn="entmax15")}


def picture(b=2, h=32, w=32):
    return torch.randn(b, 3, h, w, dtype=torch.float64)


# --- entmax ------------------------------------------------------------------------------------------


def bisect(x):
    z = x.double() / 2
    low, high = z.amax(-1, keepdim=True) - 1, z.amax(-1, keepdim=True)
    for _ in range(100):
        middle = (low + high) / 2
        more = (z - middle).clamp(min=0).square().sum(-1, keepdim=True) >= 1
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    return (z - low).clamp(min=0).square()


@pytest.mark.parametrize("n", [1, 2, 5, 16, 17, 64, 197, 1025])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entmax_equals_bisection(n, dtype):
    torch.manual_seed(n)
    rows = [scale * torch.randn(50, n) for scale in (1e-3, 0.1, 1, 10, 1e4)]
    late = torch.arange(n) >= torch.randint(1, n + 1, (100, 1))  # a few large scores, many smaller: Newton's worst
    rows += [-2 * torch.rand(100, 1) * late, torch.zeros(1, n), 3e4 + torch.randn(5, n)]
    x = torch.cat(rows).to(dtype)
    p = Entmax15.apply(x)
    assert p.dtype == dtype
    torch.testing.assert_close(p.double(), bisect(x), atol=1e-6, rtol=0)
    torch.testing.assert_close(p.sum(-1), torch.ones(len(x), dtype=dtype), atol=3e-6, rtol=0)


def test_entmax_by_hand():
    assert torch.equal(Entmax15.apply(torch.tensor([[5.0]])), torch.ones(1, 1))
    assert Entmax15.apply(torch.tensor([[0.0, -2.0]])).tolist() == [[1.0, 0.0]]  # 2 below the largest: exactly 0
    torch.testing.assert_close(Entmax15.apply(torch.zeros(3, 4)), torch.full((3, 4), 0.25))
    # Two scores a apart: (a / 2 - t)^2 + t^2 = 1 for -t = tau.
    a = torch.tensor(1.0).double()
    low = (-a / 2 + (2 - a**2 / 4).sqrt()) / 2
    p = Entmax15.apply(torch.tensor([[0.0, -1.0]]).double())
    torch.testing.assert_close(p, torch.stack([(low + a / 2) ** 2, low**2])[None], atol=1e-9, rtol=0)


def test_gradient_of_entmax_by_finite_differences():
    torch.manual_seed(0)
    x = (2 * torch.randn(2, 3, 9, dtype=torch.float64)).requires_grad_()
    assert (Entmax15.apply(x) == 0).any()
    assert torch.autograd.gradcheck(Entmax15.apply, x)


@pytest.mark.parametrize("scores", [[1e30, -1e30, 1e30], [-6e4, -6e4, -6e4], [0.0, float("-inf"), 1.0]])
def test_entmax_is_safe_in_bf16(scores):
    x = torch.tensor([scores], dtype=torch.bfloat16, requires_grad=True)
    p = Entmax15.apply(x)
    p.backward(torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.bfloat16))
    assert p.dtype == x.grad.dtype == torch.bfloat16 and p.isfinite().all() and x.grad.isfinite().all()
    torch.testing.assert_close(p.sum().item(), 1.0, atol=0.01, rtol=0)


# --- attention and blocks ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["softmax", "entmax15"])
@pytest.mark.parametrize("bias", [False, True])
def test_attention_equals_a_loop_over_heads_and_queries(kind, bias):
    attn = vit(attn=kind, attn_bias=bias).blocks[0].attn
    x = torch.randn(1, 5, 32, dtype=torch.float64)
    out = torch.zeros(5, 32, dtype=torch.float64)
    qkv = x[0] @ attn.qkv.weight.T + attn.qkv.bias
    for head, query in product(range(2), range(5)):
        part = lambda i: qkv[:, 32 * i + 16 * head : 32 * i + 16 * head + 16]
        keys, values = list(part(1)), list(part(2))
        if bias:
            keys, values = [attn.bias_k[0, head, 0], *keys], [attn.bias_v[0, head, 0], *values]
        scores = torch.stack([part(0)[query] @ key / 4 for key in keys])
        p = torch.softmax(scores, 0) if kind == "softmax" else bisect(scores)
        out[query, 16 * head : 16 * head + 16] = sum(a * v for a, v in zip(p, values))
    expected = out @ attn.proj.weight.T + attn.proj.bias
    torch.testing.assert_close(attn(x)[0], expected, atol=1e-9, rtol=0)
    q, k, _ = attn.queries_keys_values(x)
    weights = attn.weights(q, k)
    assert weights.shape == (1, 2, 5, 5 + bias)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 5).double(), atol=1e-9, rtol=0)


def test_registers_have_no_position_and_come_back_in_their_place():
    model, img = vit(registers=3), picture(h=16, w=40)
    out = model(img)
    assert [out[k].shape for k in ("cls", "registers", "patches")] == [(2, 32), (2, 3, 32), (2, 10, 32)]
    cls, x = model.embed(img)
    assert torch.equal(x[:, :3], model.register_tokens.expand(2, -1, -1)) and cls.shape == (2, 1, 32)
    with torch.no_grad():
        model.register_tokens.copy_(model.register_tokens.flip(1))
    again = model(img)
    torch.testing.assert_close(again["registers"], out["registers"].flip(1), atol=1e-12, rtol=0)
    torch.testing.assert_close(again["patches"], out["patches"], atol=1e-12, rtol=0)


def test_class_attention_is_the_first_row_of_attention_and_leaves_patches_alone():
    model, img = vit(class_attn=1, registers=2), picture()
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    for some in ({}, {"attn_bias": True}, {"attn": "entmax15"}, {"spec": ("qkv",), "spec_blocks": 1}):
        attn = vit(**some).blocks[0].attn
        assert attn(x, 1).shape == (2, 1, 32)
        torch.testing.assert_close(attn(x, 1), attn(x)[:, :1], atol=1e-12, rtol=0)
    before = model(img)
    _, x = model.embed(img)
    for block in model.blocks[:2]:
        x = block(x)
    torch.testing.assert_close(before["patches"], model.norm(x)[:, 2:], atol=1e-12, rtol=0)
    with torch.no_grad():
        model.cls_token += torch.randn_like(model.cls_token)
    after = model(img)
    assert torch.equal(before["patches"], after["patches"]) and not torch.equal(before["cls"], after["cls"])
    assert model(img, layers=(1,))["patches"].shape == (2, 16, 32)


SPECIALISED = [
    (variant, path, spec, rank) for variant, path, spec, rank in product(
        ("plain", "registers", "bias", "entmax", "all"), ("patch", "cls"), EVERY_SPEC, (0, 2))
    if (path == "patch" or VARIANTS[variant].get("registers")) and (not rank or "qkv" in spec)]


@pytest.mark.parametrize("variant, path, spec, rank", SPECIALISED)
def test_specialising_changes_no_output(variant, path, spec, rank):
    model, img = vit(**VARIANTS[variant]), picture(h=24)
    before = tokens(model, img)
    specialize(model, spec, blocks=2, rank=rank, registers_path=path)
    torch.testing.assert_close(tokens(model, img), before, atol=1e-12, rtol=0)


def test_fresh_copies_are_drawn_anew_as_widely_and_nothing_else():
    def made(**changes):
        torch.manual_seed(0)
        return ViT(config("nano", **TINY | changes))

    plain, equal, fresh = made(), made(spec=("norms", "qkv")), made(spec=("norms", "qkv"), spec_init="fresh")
    a, b = equal.state_dict(), fresh.state_dict()
    assert {k for k in a if not torch.equal(a[k], b[k])} == {"blocks.0.attn.qkv.cls.weight"}
    ours, theirs = b["blocks.0.attn.qkv.cls.weight"], b["blocks.0.attn.qkv.patch.weight"]
    assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.1) and (ours * theirs).mean().abs() < 0.05 * theirs.var()
    assert torch.equal(plain.blocks[0].attn.qkv.weight, theirs)
    with pytest.raises(ValueError, match="no use for a spec rank"):
        specialize(plain, ("qkv",), rank=2, init="fresh")


@pytest.mark.parametrize("path, rows", [("patch", 1), ("cls", 4)])
def test_registers_pass_the_weights_of_their_path(path, rows):
    model = specialize(vit(registers=3), ("norms", "qkv"), registers_path=path)
    norm, x = model.blocks[0].norm1, torch.randn(2, 8, 32, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        norm.cls.weight += 1
    expected = torch.cat([norm.cls(x[:, :rows]), norm.patch(x[:, rows:])], 1)
    torch.testing.assert_close(norm(x), expected, atol=1e-12, rtol=0)
    weight = torch.randn_like(x)
    ours, = torch.autograd.grad((norm(x) * weight).sum(), x)
    theirs, = torch.autograd.grad((expected * weight).sum(), x)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_every_component_knows_its_rows():
    for path, rows in (("patch", 1), ("cls", 3)):
        for rank in (0, 2):
            model = specialize(vit(registers=2), clsspec.COMPONENTS, blocks=3, rank=rank, registers_path=path)
            found = {m.rows for m in model.modules() if isinstance(m, clsspec.Specialised)}
            assert found == {rows} and model.blocks[0].attn.qkv.rank == rank


def test_the_bias_is_key_0():
    attn = vit(attn_bias=True).blocks[0].attn
    q, k, v = attn.queries_keys_values(torch.randn(2, 5, 32, dtype=torch.float64))
    assert torch.equal(k[0, :, :1], attn.bias_k[0]) and torch.equal(v[1, :, :1], attn.bias_v[0])


def test_a_class_block_by_its_equations():
    block, x = vit(class_attn=1).blocks[2], torch.randn(2, 6, 32, dtype=torch.float64)
    cls = x[:, :1] + block.attn(block.norm1(x), 1) * block.ls1.gamma
    cls = cls + block.mlp(block.norm2(cls)) * block.ls2.gamma
    torch.testing.assert_close(block(x), torch.cat([cls, x[:, 1:]], 1), atol=1e-12, rtol=0)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_variant_starts_as_the_plain_model_of_its_seed(changes):
    states = []
    for more in ({}, changes):
        torch.manual_seed(3)
        states.append(ViT(config("nano", **TINY, **more)).state_dict())
    plain, variant = states
    assert all(torch.equal(plain[k], variant[k]) for k in plain)
    extra = {re.sub(r".*\.", "", k) for k in variant.keys() - plain}
    assert extra == set(["register_tokens"] * ("registers" in changes) + ["bias_k", "bias_v"] * ("attn_bias" in changes))
    assert all(variant[k].std() > 0 for k in variant.keys() - plain)


@pytest.mark.parametrize("size", ["large", "huge"])
def test_large_models_go_forward_and_backward(size):
    cfg = config(size, depth=3, image_size=28, patch=14, spec=("norms", "qkv"), registers=4, attn_bias=True)
    with torch.device("meta"):
        model = ViT(cfg)
    model = model.to_empty(device="cpu")  # drawing 600 M random numbers takes longer than the test
    for p in model.parameters():
        torch.nn.init.constant_(p, 0.01)
    out = model(torch.randn(1, 3, 28, 28))
    out["patches"].sum().backward()
    assert out["patches"].shape == (1, 4, cfg.width) and cfg.spec_blocks == cfg.depth // 3
    assert all(p.grad is not None for n, p in model.named_parameters() if n != "mask_token")


@pytest.mark.parametrize("changes, words", [
    (dict(attn="sparsemax"), "'sparsemax' is not 'softmax' or 'entmax15'"), (dict(registers=-1), "-1 registers"),
    (dict(class_attn=12), "outside 0 to 11"), (dict(class_attn=2, spec=("norms",)), "nothing is left to specialise"),
    (dict(registers_path="cls", registers=2), "needs registers, and a spec"),
    (dict(registers_path="both"), "'both' is not 'cls' or 'patch'")])
def test_variants_that_cannot_be(changes, words):
    with pytest.raises(ValueError, match=words):
        config("nano", **changes)


# --- every combination of flags ----------------------------------------------------------------------


@pytest.mark.parametrize("recipe", train.RECIPES)
@pytest.mark.parametrize("attn", ["softmax", "entmax15"])
@pytest.mark.parametrize("class_attn", ["0", "2"])
def test_every_combination_trains_or_is_refused(recipe, attn, class_attn, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(clsspec.SIZES, "nano", (32, 3, 2, 8))
    flags = QUICK + ["--recipe", recipe, "--attn", attn, "--class-attn", class_attn, "--overwrite", "--steps", "2"]
    flags += ["--local-crops", "0"] if recipe == "deit3" else []
    every = list(product(["", "norms,qkv"], [0, "patch", "cls"], [False, True]))
    for spec, registers, bias in every if recipe == "dinov2" else (every[0], every[-1]):
        more = ["--spec", spec, "--out", str(tmp_path), "--attn-bias" if bias else "--no-attn-bias"]
        if registers:
            more += ["--registers", "2", "--registers-path", registers]
        if spec and class_attn != "0" or registers == "cls" and not spec:
            with pytest.raises(SystemExit, match="nothing is left to specialise|registers path 'cls' needs"):
                train.main(flags + more)
        else:
            train.main(flags + more)
            model = clsspec.load(tmp_path / "last.pt")
            assert model.config.attn == attn and model.config.attn_bias == bias
            before = clsspec.load(tmp_path / "last.pt", "untrained").state_dict()
            moved = {k for k, v in clsspec.load(tmp_path / "last.pt", "student").state_dict().items()
                     if not torch.equal(v, before[k])}
            # A loss that sees [CLS] alone teaches nothing that only patches pass after the last attention.
            late = "norm2.patch.weight", "norm2.patch.bias", "ls1.patch.gamma", "ls2.patch.gamma"
            frozen = {"mask_token", *(f"blocks.2.{name}" for name in late)} & before.keys()
            assert before.keys() - moved == (set() if recipe == "dinov2" else frozen)


# --- public weights ----------------------------------------------------------------------------------


def transformers_names(state, new=False):
    """Our names -> those of transformers' Dinov2, as of 4.40 and, `new`, of 5."""
    where = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"} if new else \
        {"q": "attention.query", "k": "attention.key", "v": "attention.value", "o": "output.dense"}
    rules = [(r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
             (r"^pos_embed$", "embeddings.position_embeddings"),
             (r"^patch_embed.proj", "embeddings.patch_embeddings.projection"), (r"^blocks", "encoder.layer"),
             (r"attn.proj", f"attention.{where['o']}"), (r"ls(\d).gamma", r"layer_scale\1.lambda1"),
             (r"^norm\.", "layernorm.")]
    out = {}
    for name, value in state.items():
        for ours, theirs in rules:
            name = re.sub(ours, theirs, name)
        if ".attn.qkv." in name:
            for part, one in zip("qkv", value.chunk(3)):
                out[name.replace("attn.qkv", f"attention.{where[part]}")] = one.clone()
        else:
            out[name] = value
    return out


def write_safetensors(path, state, header=None, cut=0):
    """As the format's specification says: length of the header, header, bytes."""
    kinds, entries, parts, at = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}, {}, [], 0
    for name, value in state.items():
        raw = bytes(value.contiguous().flatten().view(torch.uint8).tolist())
        entries[name] = {"dtype": kinds[value.dtype], "shape": list(value.shape), "data_offsets": [at, at + len(raw)]}
        at, parts = at + len(raw), [*parts, raw]
    text = json.dumps(header or entries | {"__metadata__": {"format": "pt"}}).encode()
    whole = len(text).to_bytes(8, "little") + text + b"".join(parts)
    path.write_bytes(whole[: len(whole) - cut])


def layouts():
    """Name -> (our model, the same weights as the public file has them, what load_weights takes besides)."""
    def model(**changes):
        shape = dict(width=64, depth=3, heads=2, patch=8, image_size=32)
        return vit(**shape | changes).float().eval()

    def state(m, without="mask_token"):
        return {k: v.clone() for k, v in m.state_dict().items() if k != without}

    def no_cls_position(m):
        s = state(m)
        s["cls_token"] = s["cls_token"] + s["pos_embed"][:, :1]
        s["pos_embed"] = s["pos_embed"][:, 1:]
        return s

    with torch.no_grad():
        dino, v2, reg = model(layerscale=0.0), model(), model(registers=4, pos_antialias=True)
        for m in (dino, reg):
            m.mask_token.zero_()
        timm = model(pos_antialias=True)
        deit = model()
        deit.pos_embed[:, 0] = 0
        head = {"head.weight": torch.zeros(5, 64), "head.bias": torch.zeros(5)}
        whole = {"student": {f"module.backbone.{k}": v for k, v in state(dino).items()},
                 "teacher": {f"backbone.{k}": v for k, v in state(dino).items()} | {"head.mlp.0.weight": torch.zeros(2)},
                 "args": argparse.Namespace(arch="vit_small"), "epoch": 3}
        chunks = {re.sub(r"blocks\.(\d)", r"blocks.1.\1", k): v for k, v in state(v2, None).items()}
        chunks = {f"backbone.{k}": v for k, v in chunks.items()} | {"dino_head.mlp.0.weight": torch.zeros(2)}
        timm_reg = no_cls_position(reg)
        timm_reg["reg_token"] = timm_reg.pop("register_tokens")
        deit_names = {re.sub(r"ls(\d).gamma", r"gamma_\1", k): v for k, v in no_cls_position(deit).items()}
        hub = model(pos_offset=0.0)
    return {"transformers": (hub, transformers_names(state(hub, None)), {}),
            "transformers, classifier": (hub, {f"dinov2.{k}": v for k, v in transformers_names(state(hub, None)).items()}
                                         | {"classifier.weight": torch.zeros(5, 128)}, {}),
            "transformers, new names": (hub, transformers_names(state(hub, None), new=True), {}),
            "transformers, registers": (reg, transformers_names(state(reg, None)), {}),
            "DINO": (dino, state(dino), {}), "DINO, whole training": (dino, whole, {}),
            "DINO, its student": (dino, whole, {"network": "student"}),
            "DINOv2": (v2, state(v2, None), {}), "DINOv2, whole training": (v2, {"teacher": chunks}, {}),
            "DINOv2 with registers": (reg, state(reg, None), {}), "timm's DINOv2": (timm, state(timm), {}),
            "timm's registers": (reg, timm_reg, {}), "DeiT-III": (deit, {"model": deit_names | head}, {}),
            "timm's DINO": (dino, state(dino), {"pos_antialias": True})}


@pytest.mark.parametrize("name", layouts())
def test_public_weights_load_and_compute_the_same(name, tmp_path):
    model, state, more = layouts()[name]
    torch.save(state, tmp_path / "weights.pth")
    img = torch.randn(1, 3, 32, 32)
    for source in (state, tmp_path / "weights.pth"):
        ours = clsspec.load_weights(source, **more)
        torch.testing.assert_close(tokens(ours, img), tokens(model, img), atol=1e-5, rtol=0)
        antialias = more.get("pos_antialias", model.config.pos_antialias)
        assert (ours.config.pos_antialias, ours.config.spec) == (antialias, ())
    assert not ours.training and (ours.config.heads, ours.config.registers) == (2, model.config.registers)
    img = torch.randn(1, 3, 24, 48)
    if antialias == model.config.pos_antialias:
        torch.testing.assert_close(tokens(ours, img), tokens(model, img), atol=1e-5, rtol=0)
    before = tokens(ours.double(), img.double())
    after = tokens(specialize(ours, ("norms", "qkv")), img.double())
    torch.testing.assert_close(after, before, atol=1e-12, rtol=0)


def test_a_file_of_safetensors(tmp_path):
    file, small = tmp_path / "a.safetensors", {"x": torch.randn(2, 3),
                                               "y": torch.randn(4).bfloat16(),
                                               "z": torch.tensor(2.0).half()}
    write_safetensors(file, small)
    found = clsspec.read(file)
    assert found.keys() == small.keys() and all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in small.items())
    model, state, _ = layouts()["transformers, classifier"]
    (tmp_path / "hub").mkdir()
    write_safetensors(tmp_path / "hub" / "model.safetensors", state)
    ours = clsspec.load(tmp_path / "hub")
    img = torch.randn(1, 3, 24, 48)
    torch.testing.assert_close(tokens(ours, img), tokens(model, img), atol=1e-5, rtol=0)
    assert "all 49 tensors" in ours.origin and "LayerScale" in ours.origin and "made for 32 px" in ours.origin, ours.origin


@pytest.mark.parametrize("what", ["cut in the bytes", "cut in the header", "cut in the length",
                                  "text", "foreign type", "list",
                                  "beyond", "backwards", "negative", "shape", "words", "too long",
                                  "overlap", "more", "hole"])
def test_a_damaged_file_of_safetensors_is_refused(what, tmp_path):
    file, state = tmp_path / "a.safetensors", {"x": torch.randn(2, 3), "y": torch.randn(4)}
    one = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    headers = {"foreign type": {"x": one | {"dtype": "F8"}}, "list": [1, 2],
               "beyond": {"x": one | {"data_offsets": [0, 400]}},
               "backwards": {"x": one | {"data_offsets": [24, 0]}}, "negative": {"x": one | {"data_offsets": [-24, 0]}},
               "shape": {"x": one | {"shape": [2, 4]}}, "words": {"x": one | {"data_offsets": ["a", "b"]}},
               "overlap": {"x": one, "y": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}},
               "hole": {"y": {"dtype": "F32", "shape": [4], "data_offsets": [24, 40]}}}
    cuts = {"cut in the bytes": 3, "cut in the header": 50, "cut in the length": 10**4}
    write_safetensors(file, state, headers.get(what))
    if what in cuts:
        file.write_bytes(file.read_bytes()[: -cuts[what]] if cuts[what] < 10**4 else file.read_bytes()[:5])
    if what == "text":
        file.write_text("version https://git-lfs.github.com/spec/v1")
    if what == "more":
        file.write_bytes(file.read_bytes() + b"junk")
    if what == "too long":
        file.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="is cut short, damaged, or no safetensors file") as err:
        clsspec.read(file)
    assert "\n" not in str(err.value)


@pytest.mark.parametrize("key, value, words", [
    ("norm.bias", lambda x: x.to(torch.int8), "norm.bias holds no floating-point numbers .int8"),
    ("norm.bias", lambda x: x > 0, "holds no floating-point numbers .bool"),
    ("norm.bias", lambda x: x.to(torch.complex64), "complex64"),
    ("norm.bias", lambda x: x.to(torch.float8_e4m3fn), "float8_e4m3fn"),
    ("norm.bias", lambda x: x.to_sparse(), "sparse_coo"),
    ("norm.bias", lambda x: x.to("meta"), "holds no floating-point"),
    ("norm.bias", lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "qint8"),
    ("norm.bias", lambda x: [1.0], "must be a tensor, and is a list"),
    ("cls_token", lambda x: x[0, 0, 0], "cls_token is of no ViT's shape"),
    ("pos_embed", lambda x: x[0, 0], "pos_embed is of no"),
    ("pos_embed", lambda x: x[:, :0], "pos_embed is of no"),
    ("patch_embed.proj.weight", lambda x: x[..., :0], "patch_embed.proj.weight is of no"),
    ("blocks.0.mlp.fc1.weight", lambda x: x[0, 0], "fc1.weight is of no"),
    ("blocks.x.foo", None, "blocks.x.foo is of no ViT's shape or name"),
    ("module.norm.bias", None, "two of the file's tensors are norm.bias; keep one network in it"),
    ("norm.bias", lambda x: x / 0, "norm.bias is not finite")])
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_weight_is_refused(key, value, words):
    state = layouts()["DINOv2"][1]
    one = state["norm.bias"] + 1
    state[key] = value(state[key] + 1) if value else one
    with pytest.raises(ValueError, match=words) as err:
        clsspec.load_weights(state)
    assert "\n" not in str(err.value)


def test_public_weights_have_no_student(tmp_path):
    torch.save(layouts()["DINOv2"][1], tmp_path / "w.pth")
    for network in ("student", "untrained"):
        with pytest.raises(ValueError, match=f"holds weights alone: nobody knows its {network} network; leave out --network"):
            clsspec.load(tmp_path / "w.pth", network)
    assert clsspec.load(tmp_path / "w.pth").config.depth == 3


def test_a_tensor_too_many_or_too_few_is_refused(tmp_path):
    for name in ("transformers", "DINOv2"):
        _, state, _ = layouts()[name]
        left_out = next(key for key in state if "query.bias" in key or "qkv.bias" in key)
        for wrong in (state | {"blocks.0.extra": torch.zeros(3)}, {k: v for k, v in state.items() if k != left_out}):
            with pytest.raises(ValueError, match="extra|qkv.bias|attn.k.bias"):
                clsspec.load_weights(wrong)


def test_the_file_in_a_folder_and_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    with pytest.raises(ValueError, match="empty has no last.pt, model.safetensors, pytorch_model.bin; name a run folder"):
        clsspec.load("empty")
    with pytest.raises(ValueError, match="hf download facebook/dinov2-small --local-dir dinov2-small, then give dinov2-small$"):
        clsspec.load("facebook/dinov2-small")
    with pytest.raises(ValueError, match="train.py$"):
        clsspec.load("runs/a/last.pt")
    Path("runs").mkdir()
    with pytest.raises(ValueError, match="no checkpoint at runs/plan; train one with: python train.py$"):
        clsspec.load("runs/plan")


def test_a_saved_network_comes_back(tmp_path):
    torch.manual_seed(0)
    model = vit(registers=2, attn_bias=True).float().eval()
    specialize(model, ("norms", "qkv"), blocks=2)
    clsspec.save(model, tmp_path / "mine.pt")
    again, img = clsspec.load(tmp_path / "mine.pt"), torch.randn(1, 3, 24, 48)
    assert torch.equal(tokens(again, img), tokens(model, img)) and again.config == model.config
    assert "specialised: norms and qkv in the first 2 blocks" in again.origin and not again.training
    with pytest.raises(ValueError, match="nobody knows its untrained network"):
        clsspec.load(tmp_path / "mine.pt", "untrained")


def test_preprocess_resizes_to_whole_patches_and_normalises():
    img = torch.full((3, 50, 90), 255, dtype=torch.uint8)
    for side, size in ((0, (56, 84)), (28, (28, 56)), (224, (224, 406)), (1, (14, 14))):
        assert clsspec.preprocess(img, 14, side).shape == (1, 3, *size)
    white = clsspec.preprocess(img, 14)[0, :, 3, 5]
    torch.testing.assert_close(white, (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225]))
    noise = torch.randint(256, (2, 3, 28, 42), dtype=torch.uint8)
    torch.testing.assert_close(clsspec.preprocess(noise, 14), clsspec.normalise(noise / 255), atol=1e-5, rtol=0)
    smaller = clsspec.normalise(resize(noise[..., :28], [14, 14], antialias=True) / 255)  # rounded to whole numbers
    torch.testing.assert_close(clsspec.preprocess(noise[..., :28], 14, 14), smaller, atol=0.02, rtol=0)
    for bad in (torch.zeros(3, 14, 14), torch.zeros(14, 14, 3, dtype=torch.uint8),
                torch.zeros(1, 14, 14, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="preprocess takes uint8 pictures"):
            clsspec.preprocess(bad, 14)


def test_several_layers_stand_side_by_side():
    for some in ({}, {"class_attn": 1, "registers": 2}):
        model, img = vit(**some), picture()
        one = [model(img, layers=(i,)) for i in (1, 3)]
        both = model(img, layers=(1, 3))
        for kind, x in both.items():
            torch.testing.assert_close(x, torch.cat([part[kind] for part in one], dim=-1), atol=1e-12, rtol=0)
        assert both["patches"].shape == (2, 16, 64)
        torch.testing.assert_close(one[1]["patches"], model(img)["patches"], atol=0, rtol=0)


def test_wrappings_and_shapes_of_weights(tmp_path):
    model, state, _ = layouts()["DINOv2 with registers"]
    wrapped = {"state_dict": {f"_orig_mod.{k}": v for k, v in state.items()}}
    both = {f"{who}.backbone.{k}": v + (who == "student") for k, v in state.items() for who in ("teacher", "student")}
    for network in ("teacher", "student"):
        found = clsspec.load_weights({"model": both}, network).state_dict()
        assert all(torch.equal(found[k], v + (network == "student")) for k, v in state.items())
        torch.save({"model": both}, tmp_path / "both.pth")
        found = clsspec.load(tmp_path / "both.pth", network).state_dict()
        assert all(torch.equal(found[k], v + (network == "student")) for k, v in state.items())
    for name in ("DeiT-III", "transformers"):  # how positions are resampled is known in any wrapping
        weights = layouts()[name][1]
        inside = clsspec.unwrapped(weights, "teacher")
        plain, *others = (clsspec.load_weights(one).config for one in (
            weights, {"state_dict": inside}, {"model": inside}, {"teacher": {"state_dict": inside}, "model": "ViT-S"}))
        assert others == [plain] * 3, name
    with pytest.raises(ValueError, match="not a multiple of 7 heads"):
        clsspec.load_weights(state, heads=7)
    assert clsspec.load_weights(wrapped).config.registers == 4
    assert not clsspec.load_weights(state, pos_antialias=False).config.pos_antialias
    odd = vit(width=64, registers=3, mlp_ratio=2.3, patch=8, image_size=32).float()
    found = clsspec.load_weights(odd.state_dict()).config
    assert (found.registers, round(64 * found.mlp_ratio), found.depth, found.image_size) == (3, round(64 * 2.3), 3, 32)


def test_networks_of_a_checkpoint(tmp_path):
    models = {"teacher": vit(1).float(), "student": vit(2).float()}
    cfg = asdict(models["teacher"].config)
    state = {k: {f"backbone.{n}": v for n, v in m.state_dict().items()} for k, m in models.items()}
    torch.save(state | {"model": cfg, "args": {"seed": 5}}, tmp_path / "last.pt")
    for name, m in models.items():
        assert torch.equal(clsspec.load(tmp_path / "last.pt", name).norm.weight, m.norm.weight)
    torch.manual_seed(5)
    new = ViT(models["teacher"].config)
    assert torch.equal(clsspec.load(tmp_path / "last.pt", "untrained").pos_embed, new.pos_embed)
    torch.save(state | {"model": cfg, "args": {"seed": 5, "init": str(tmp_path / "moved.pth")}}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="^no checkpoint at .*moved.pth"):  # its own error, not one of last.pt
        clsspec.load(tmp_path / "last.pt", "untrained")
    del state["student"]["backbone.norm.weight"]
    torch.save(state | {"model": cfg, "args": {"seed": 5}}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="cannot be used as a checkpoint"):
        clsspec.load(tmp_path / "last.pt", "student")


def test_a_start_has_the_specialisation_that_is_asked_for(tmp_path):
    _, state, _ = layouts()["DINOv2"]
    torch.save(state, tmp_path / "w.pth")
    spec = clsspec.NO_SPEC | dict(spec=("norms", "qkv"), spec_blocks=2, spec_where="last", spec_rank=3)
    model = clsspec.start(tmp_path / "w.pth", 0.25, spec)
    assert model.config == clsspec.replace(clsspec.load(tmp_path / "w.pth").config, drop_path=0.25, **spec)
    assert model.blocks[0].drop_path == 0.25
    assert [isinstance(b.attn.qkv, clsspec.Specialised) for b in model.blocks] == [False, True, True]
    assert clsspec.start(tmp_path / "w.pth", 0.25, clsspec.NO_SPEC).config.spec == ()


def test_weights_that_do_not_fit_are_named(tmp_path):
    _, state, _ = layouts()["DINOv2"]
    with pytest.raises(ValueError, match="Missing key.*blocks.1.norm1.bias.*Unexpected key.*extra.weight"):
        clsspec.load_weights({k: v for k, v in state.items() if k != "blocks.1.norm1.bias"} | {"extra.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="size mismatch for norm.weight"):
        clsspec.load_weights(state | {"norm.weight": torch.ones(3)})
    swiglu = {k.replace("fc1", "w12"): v for k, v in state.items()}
    with pytest.raises(ValueError, match="no blocks.0.mlp.fc1.weight, so neither a checkpoint of train.py nor a ViT of DINO.*SwiGLU"):
        clsspec.load_weights(swiglu)
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match="text.pth is no checkpoint that torch can load"):
        clsspec.load(tmp_path / "text.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)  # torch's format before 1.6
    assert clsspec.load(tmp_path / "old.pth").config.width == 64
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="list.pth is no checkpoint that torch can load .it is a list"):
        clsspec.load(tmp_path / "list.pth")


def test_training_goes_on_from_public_weights(tmp_path):
    """--init: at step 0 the specialised copy computes what the original did, and it is what "untrained" then means."""
    model, state, _ = layouts()["timm's registers"]
    torch.save(state, tmp_path / "weights.pth")
    flags = QUICK + ["--init", str(tmp_path / "weights.pth"), "--spec", "norms,qkv", "--registers-path", "cls"]
    train.main(flags + ["--out", str(tmp_path / "run")])
    img = torch.randn(2, 3, 32, 40)
    start = clsspec.load(tmp_path / "run" / "last.pt", "untrained")
    assert start.config.spec == ("norms", "qkv") and start.config.registers_path == "cls"
    torch.testing.assert_close(tokens(start.double(), img.double()),
                               tokens(clsspec.load_weights(state).double(), img.double()), atol=1e-12, rtol=0)
    after = clsspec.load(tmp_path / "run" / "last.pt", "student")
    assert (tokens(after, img) - tokens(model, img)).abs().max() > 1e-4
    # A run can start from a run, keeping its specialisation.
    train.main(QUICK + ["--init", str(tmp_path / "run" / "last.pt"), "--out", str(tmp_path / "again")])
    again = clsspec.load(tmp_path / "again" / "last.pt", "untrained")
    teacher = clsspec.load(tmp_path / "run" / "last.pt")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in teacher.state_dict().items())


def test_init_refuses_another_shape(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.parse(["--init", "w.pth", "--registers", "4"])
    assert "argument --registers: --init has a shape; leave this out" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no checkpoint at .*w.pth"):
        train.main(QUICK + ["--init", str(tmp_path / "w.pth"), "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
