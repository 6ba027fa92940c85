"""Registers, attention bias, entmax-1.5, class-attention, public weights: each against its equation or layout."""

import argparse
import re
from dataclasses import asdict
from itertools import product

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import clsspec
import train
from clsspec import Entmax15, ViT, config, flops, specialize
from conftest import QUICK
from test_clsspec import TINY, vit

VARIANTS = {
    "plain": {}, "registers": dict(registers=3), "bias": dict(attn_bias=True), "entmax": dict(attn="entmax15"),
    "all": dict(registers=2, attn_bias=True, attn="entmax15"), "class": dict(class_attn=1),
    "class all": dict(class_attn=2, registers=2, attn_bias=True, attn="entmax15")}


def picture(b=2, h=32, w=32):
    return torch.randn(b, 3, h, w, dtype=torch.float64)


def tokens(model, img):
    out = model(img)
    return torch.cat([out["cls"][:, None], out["registers"], out["patches"]], 1)


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
    assert model(img, layer=1)["patches"].shape == (2, 16, 32)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("spec", [("norms",), ("norms", "qkv"), clsspec.COMPONENTS], ids=",".join)
@pytest.mark.parametrize("path", ["patch", "cls"])
@pytest.mark.parametrize("variant", ["registers", "bias", "entmax", "all"])
def test_specialising_a_variant_changes_no_output(variant, path, spec, rank):
    if (path == "cls" and not VARIANTS[variant].get("registers")) or (rank and "qkv" not in spec):
        with pytest.raises(ValueError, match="registers path|needs component qkv"):
            specialize(vit(**VARIANTS[variant]), spec, rank=rank, registers_path=path)
        return
    model, img = vit(**VARIANTS[variant]), picture(h=24)
    before = tokens(model, img)
    specialize(model, spec, blocks=2, rank=rank, registers_path=path)
    torch.testing.assert_close(tokens(model, img), before, atol=1e-12, rtol=0)


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


LOW_RANK = {f"low rank, {path}": dict(registers=2, spec=("qkv",), spec_rank=2, registers_path=path) for path in ("patch", "cls")}
FLOPS = VARIANTS | LOW_RANK | {"narrow": dict(mlp_ratio=2.5)}


@pytest.mark.parametrize("changes", FLOPS.values(), ids=FLOPS)
def test_flops_of_variants_equal_torchs_counter(changes):
    model = ViT(config("nano", **TINY, **changes))
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, math:
        model(torch.randn(1, 3, 32, 48))
    assert counter.get_total_flops() == flops(model.config, 32, 48)


@pytest.mark.parametrize("size", ["large", "huge"])
def test_large_models_go_forward_and_backward(size):
    cfg = config(size, depth=6, image_size=28, patch=14, spec=("norms", "qkv"), registers=4, attn_bias=True)
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
    (dict(registers_path="cls", registers=2), "there are registers and a spec"),
    (dict(registers_path="both"), "'both' must be 'patch', or 'cls'")])
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
    for spec, registers, bias in product(["", "norms,qkv"], [0, "patch", "cls"], [False, True]):
        more = ["--spec", spec, "--out", str(tmp_path), "--attn-bias" if bias else "--no-attn-bias"]
        if registers:
            more += ["--registers", "2", "--registers-path", registers]
        if spec and class_attn != "0" or registers == "cls" and not spec:
            with pytest.raises(SystemExit, match="nothing is left to specialise|registers path 'cls' must be"):
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


def layouts():
    """Name -> (our model, the same weights as the public file has them, what load_weights takes besides)."""
    def model(**changes):
        shape = dict(width=128, depth=3, heads=2, patch=8, image_size=32)
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
        head = {"head.weight": torch.zeros(5, 128), "head.bias": torch.zeros(5)}
        whole = {"student": {f"module.backbone.{k}": v for k, v in state(dino).items()},
                 "teacher": {f"backbone.{k}": v for k, v in state(dino).items()} | {"head.mlp.0.weight": torch.zeros(2)},
                 "args": argparse.Namespace(arch="vit_small"), "epoch": 3}
        chunks = {re.sub(r"blocks\.(\d)", r"blocks.1.\1", k): v for k, v in state(v2, None).items()}
        chunks = {f"backbone.{k}": v for k, v in chunks.items()} | {"dino_head.mlp.0.weight": torch.zeros(2)}
        timm_reg = no_cls_position(reg)
        timm_reg["reg_token"] = timm_reg.pop("register_tokens")
        deit_names = {re.sub(r"ls(\d).gamma", r"gamma_\1", k): v for k, v in no_cls_position(deit).items()}
    return {"DINO": (dino, state(dino), {}), "DINO, whole training": (dino, whole, {}),
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


def test_wrappings_and_shapes_of_weights():
    model, state, _ = layouts()["DINOv2 with registers"]
    wrapped = {"state_dict": {f"_orig_mod.{k}": v for k, v in state.items()}}
    both = {f"{who}.backbone.{k}": v + (who == "student") for k, v in state.items() for who in ("teacher", "student")}
    for network in ("teacher", "student"):
        found = clsspec.load_weights({"model": both}, network).state_dict()
        assert all(torch.equal(found[k], v + (network == "student")) for k, v in state.items())
    assert clsspec.load_weights(wrapped).config.registers == 4
    assert not clsspec.load_weights(state, pos_antialias=False).config.pos_antialias
    odd = vit(width=128, registers=3, mlp_ratio=2.3, patch=8, image_size=32).float()
    found = clsspec.load_weights(odd.state_dict()).config
    assert (found.registers, round(128 * found.mlp_ratio), found.depth, found.image_size) == (3, round(128 * 2.3), 3, 32)


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
    with pytest.raises(ValueError, match="not a checkpoint of this project"):
        clsspec.load(tmp_path / "last.pt", "student")
    both = {k: layouts()["DINO"][0].state_dict() for k in ("teacher", "student")}  # public, of two networks
    both["student"]["norm.bias"] = both["student"]["norm.bias"] + 1
    torch.save(both, tmp_path / "both.pth")
    student = clsspec.load(tmp_path / "both.pth", "student").norm.bias
    assert torch.equal(student, clsspec.load(tmp_path / "both.pth", "teacher").norm.bias + 1)


def test_a_start_has_the_specialisation_that_is_asked_for(tmp_path):
    _, state, _ = layouts()["DINOv2"]
    torch.save(state, tmp_path / "w.pth")
    cfg = clsspec.replace(clsspec.load(tmp_path / "w.pth").config, spec=("norms", "qkv"), spec_blocks=2, spec_where="last",
                          spec_rank=3, drop_path=0.25)
    model = clsspec.start(clsspec.checked(cfg), tmp_path / "w.pth")
    assert model.config == cfg and model.blocks[0].drop_path == 0.25
    assert [isinstance(b.attn.qkv, clsspec.Specialised) for b in model.blocks] == [False, True, True]
    assert clsspec.start(clsspec.replace(cfg, spec=(), spec_rank=0, spec_blocks=0, spec_where="first"), tmp_path / "w.pth").config.spec == ()


def test_weights_that_do_not_fit_are_named(tmp_path):
    _, state, _ = layouts()["DINOv2"]
    with pytest.raises(ValueError, match="blocks.1.norm1.bias is missing; extra.weight is left over"):
        clsspec.load_weights({k: v for k, v in state.items() if k != "blocks.1.norm1.bias"} | {"extra.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"norm.weight has shape \(3,\), not \(128,\)"):
        clsspec.load_weights(state | {"norm.weight": torch.ones(3)})
    swiglu = {k.replace("fc1", "w12"): v for k, v in state.items()}
    with pytest.raises(ValueError, match="no blocks.0.mlp.fc1.weight, so neither a checkpoint of train.py nor a ViT of DINO.*SwiGLU"):
        clsspec.load_weights(swiglu)
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match="text.pth is no checkpoint that torch can load"):
        clsspec.load(tmp_path / "text.pth")
    torch.save(state, tmp_path / "v2.pth")
    with pytest.raises(ValueError, match="nobody knows its untrained network"):
        clsspec.load(tmp_path / "v2.pth", "untrained")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)  # torch's format before 1.6
    assert clsspec.load(tmp_path / "old.pth").config.width == 128
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
