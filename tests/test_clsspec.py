"""The model: the same function as a plain ViT at the start, more freedom afterwards, and the right size."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import clsspec
from clsspec import COMPONENTS, ViT, config, flops, parameters_by_component, specialize

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
    return torch.cat([out["cls"][:, None], out["patches"]], 1)


def test_plain_vit_equals_its_equations():
    model, img = vit(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(tokens(model, img), naive(model, img), atol=1e-12, rtol=0)


@pytest.mark.parametrize("spec, rank", [(s, 0) for s in EVERY_SPEC] + [(s, 2) for s in EVERY_SPEC if "qkv" in s])
def test_specialising_changes_no_output(spec, rank):
    model, img = vit(), torch.randn(2, 3, 32, 48, dtype=torch.float64)
    before = tokens(model, img)
    specialize(model, spec, blocks=2, rank=rank)
    torch.testing.assert_close(tokens(model, img), before, atol=1e-12, rtol=0)


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


@pytest.mark.parametrize("layerscale", [0.0, 0.1])
def test_gradients_of_a_specialised_model_by_finite_differences(layerscale):
    """Fork adds into a gradient in place: the gradient of the picture must still be the true one."""
    model = specialize(vit(layerscale=layerscale, depth=2), COMPONENTS, blocks=1)
    img = torch.randn(1, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tokens(model, x).square().sum(), img, fast_mode=True)


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
    with pytest.raises(ValueError, match="drop path 1.0 is outside"):
        config("nano", drop_path=1.0)


@pytest.mark.parametrize("more", [{}, {"class_attn": 2}, {"registers": 2, "registers_path": "cls"}, {"attn": "entmax15"}],
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


def test_gelu_linear_has_the_gradient_of_its_formula():
    x, w, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 5), (4, 5), (4,)))
    assert torch.autograd.gradcheck(clsspec.GeluLinear.apply, (x, w, b))
    torch.testing.assert_close(clsspec.GeluLinear.apply(x, w, b), F.linear(F.gelu(x), w, b))
    with torch.autocast("cpu", torch.bfloat16):
        y = clsspec.GeluLinear.apply(F.linear(x.float(), torch.eye(5)), w.float(), b.float())
    y.float().square().sum().backward()
    expected = torch.autograd.grad(F.linear(F.gelu(x), w, b).square().sum(), (x, w, b))
    for p, grad in zip((x, w, b), expected):
        assert p.grad.dtype == p.dtype and (p.grad - grad).norm() < 0.05 * grad.norm()


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
        base = parameters_by_component(plain)["total"]
        added = [100 * parameters_by_component(m)["[CLS] copies"] / base for m in (bare, both, only_qkv)]
        assert base == pytest.approx(total, rel=2e-4)
        assert added[0] == pytest.approx(norms, abs=0.005)
        assert added[1] - added[0] == pytest.approx(scale, abs=0.005)
        assert added[2] == pytest.approx(qkv, abs=0.005)


@pytest.mark.parametrize("size", list(clsspec.SIZES))
def test_components_add_up(size):
    with torch.device("meta"):
        table = parameters_by_component(ViT(config(size, spec=COMPONENTS)))
    assert table.pop("total") == sum(table.values()) and all(table.values())


def test_flops_formula_equals_torchs_counter():
    """Specialising costs no FLOPs in the method; the code does row 0 of a specialised matrix twice."""
    model = ViT(config("nano", **TINY, spec=("norms", "qkv", "proj", "mlp"), spec_blocks=2))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(torch.randn(1, 3, 32, 48))
    row = 2 * 32 * 32 * (3 + 1 + 8)  # of qkv, proj and mlp, in each block
    assert counter.get_total_flops() - 2 * row == flops(model.config, 32, 48)


def test_positions_are_resampled_in_both_public_ways():
    model = vit()
    grid = model.pos_embed[0, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    assert model.positions(4, 4) is model.pos_embed
    dino = F.interpolate(grid, scale_factor=(6.1 / 4, 3.1 / 4), mode="bicubic")
    timm = F.interpolate(grid, size=(6, 3), mode="bicubic", antialias=True)
    for antialias, expected in ((False, dino), (True, timm)):
        model.config = clsspec.replace(model.config, pos_antialias=antialias)
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
    (dict(spec=("norm",)), "unknown component 'norm'"), (dict(spec=("qkv",), spec_blocks=13), "outside 0 to 12"),
    (dict(spec=("qkv",), spec_where="middle"), "'middle'"), (dict(spec=("norms",), spec_rank=4), "needs component qkv"),
    (dict(spec=("qkv",), spec_rank=-1), "spec rank -1 must be >= 0"), (dict(image_size=0), "image size 0"),
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
