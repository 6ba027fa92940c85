"""Training: losses against loops from their formulas, views, masks, networks; then the run itself and what goes wrong."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision

import clsspec
import eval_dense
import train
from conftest import QUICK, save_map
from scenes import Scenes

LABELS = ["--recipe", "deit3", "--local-crops", "0"]


# --- losses ------------------------------------------------------------------------------------------


def softmax(row):
    e = [math.exp(v - max(row)) for v in row]
    return [v / sum(e) for v in e]


@pytest.mark.parametrize("rows", [3, 12], ids=["fewer rows than the bottleneck", "more"])
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_logits_of_a_head_are_cosines_with_the_prototypes(norm, rows):
    torch.manual_seed(0)
    head, x = train.Head(8, 5, prototypes=7, layers=2, hidden=6, norm=norm), torch.randn(rows, 8)
    out = F.cosine_similarity(head.mlp(x)[:, None], head.last[None], dim=-1)
    assert torch.allclose(head(x), out, atol=1e-6)
    ours = torch.autograd.grad(head(x).square().sum(), list(head.parameters()))
    for a, b in zip(ours, torch.autograd.grad(out.square().sum(), list(head.parameters()))):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


def test_dino_loss_equals_a_loop():
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 3, 5), torch.rand(2, 3, 5)
    terms = []
    for t in range(2):
        for s in range(4):
            if s != t:
                for b in range(3):
                    p = softmax((student[s, b] / 0.1).tolist())
                    terms.append(-sum(teacher[t, b, k].item() * math.log(p[k]) for k in range(5)))
    assert train.dino_loss(student, teacher, 0.1).item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_ibot_loss_equals_a_loop():
    torch.manual_seed(0)
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
    student, teacher = torch.randn(3, 4, 5), torch.rand(3, 4, 5)
    total = 0.0
    for view in range(3):
        terms = []
        for n in range(4):
            if mask[view, n]:
                p = softmax((student[view, n] / 0.1).tolist())
                terms.append(-sum(teacher[view, n, k].item() * math.log(p[k]) for k in range(5)))
        total += sum(terms) / len(terms) if terms else 0.0
    weight = (1 / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(mask)[mask]
    ours = train.ibot_loss(student[mask], teacher[mask], weight, 0.1, views=3)
    assert ours.item() == pytest.approx(total / 3, rel=1e-5)


def test_koleo_equals_a_loop():
    torch.manual_seed(0)
    z = torch.randn(6, 4)
    rows = [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in z.tolist()]
    near = [min(math.dist(a, b) for j, b in enumerate(rows) if j != i) for i, a in enumerate(rows)]
    assert train.koleo(z).item() == pytest.approx(-sum(math.log(d + 1e-8) for d in near) / 6, rel=1e-5)


def test_koleo_of_equal_embeddings_is_finite():
    z = torch.ones(4, 8, requires_grad=True)
    train.koleo(z).backward()
    assert torch.isfinite(z.grad).all()


def test_sinkhorn_equals_a_loop_and_balances():
    torch.manual_seed(0)
    logits = torch.rand(12, 4)
    q = [[math.exp(v / 0.05) for v in row] for row in logits.tolist()]
    for _ in range(3):
        columns = [sum(row[k] for row in q) for k in range(4)]
        q = [[row[k] / columns[k] for k in range(4)] for row in q]
        q = [[v / sum(row) for v in row] for row in q]
    torch.testing.assert_close(train.sinkhorn(logits, 0.05), torch.tensor(q), atol=1e-5, rtol=1e-4)
    many = train.sinkhorn(logits, 0.05, iterations=200)
    torch.testing.assert_close(many.sum(1), torch.ones(12))
    torch.testing.assert_close(many.sum(0), torch.full((4,), 3.0), atol=1e-3, rtol=0)


def test_sinkhorn_of_no_token_at_all():
    """A rank may have no masked patch."""
    assert train.sinkhorn(torch.zeros(0, 4), 0.05).shape == (0, 4)


def test_ema_centre_is_the_softmax_about_it_and_moves_a_tenth():
    logits, centre = torch.randn(6, 4), torch.randn(4)
    expected, moved = F.softmax((logits - centre) / 0.04, -1), 0.9 * centre + 0.1 * logits.mean(0)
    torch.testing.assert_close(train.ema_centre(logits, 0.04, centre), expected)
    torch.testing.assert_close(centre, moved)
    train.ema_centre(logits[:0], 0.04, centre)  # a step that masks no patch
    torch.testing.assert_close(centre, moved)


def test_teacher_follows_the_power_law():
    student, teacher = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    start = [p.clone() for p in teacher.parameters()]
    for _ in range(7):
        train.update_teacher(teacher, student, 0.9)
    for t, t0, s in zip(teacher.parameters(), start, student.parameters()):
        torch.testing.assert_close(t, 0.9**7 * t0 + (1 - 0.9**7) * s)


def test_schedules_start_peak_and_end_where_they_should():
    args = train.parse(["--scale", "large", "--recipe", "dinov2"])
    first, peak, last = (train.schedule(args, step, 96) for step in (0, 100_000, 624_999))
    assert first["lr"] == 0 and peak["lr"] == pytest.approx(2e-4 * 3**0.5) and last["lr"] == pytest.approx(1e-6, rel=1e-3)
    assert (first["wd"], first["ema"], first["temp"]) == pytest.approx((0.04, 0.994, 0.04))
    assert last["wd"] == pytest.approx(0.2) and last["ema"] == pytest.approx(1) and last["temp"] == 0.07
    assert train.schedule(args, 37_500, 96)["temp"] == pytest.approx(0.07)
    assert train.schedule(args, 18_750, 96)["temp"] == pytest.approx(0.055)
    assert [train.cosine(step, 20, 1.0, 0.0, 5) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]  # DINO's linspace
    assert [train.cosine(step, 9, 2.0, 0.0, warmup=1) for step in (0, 1)] == [2, 2]
    labels = [train.parse(["--scale", "nano", *flags]) for flags in (["--supervised"], ["--recipe", "deit3"])]
    assert [(args.lr, args.layerscale, args.local_crops) for args in labels] == [(1e-3, 0.1, 0)] * 2
    args = train.parse(["--scale", "large", "--recipe", "dino"])
    assert train.schedule(args, 12_510, 32)["lr"] == pytest.approx(5e-4 * 4)  # linear in the batch: 1024 / 256


# --- views and masks ---------------------------------------------------------------------------------


def plain_u(n, **columns):
    """Uniform numbers that make a view without jitter, flip, blur, grey, solarise; then changes."""
    u = torch.full((n, train.DRAWN), 0.999)
    for column, value in columns.items():
        column = int(column[1:])
        at = slice(train.TRIES, 2 * train.TRIES) if column == 1 else 2 * train.TRIES + column - 2
        u[:, at] = value
    return u


def still(img, size, **columns):
    out = train.view(img, plain_u(len(img), **{"c1": 0.5} | columns), size, (1.0, 1.0), 0.0, 0.0, 2.0)
    return out * torch.tensor(clsspec.STD)[:, None, None] + torch.tensor(clsspec.MEAN)[:, None, None]


def test_whole_picture_is_the_picture_and_flips():
    img = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(still(img, 16), img, atol=1e-5, rtol=0)
    torch.testing.assert_close(still(img, 16, c4=0.1), img.flip(-1), atol=1e-5, rtol=0)


def test_halving_a_picture_equals_antialiased_bilinear():
    img = torch.rand(2, 3, 32, 32)
    theirs = F.interpolate(img, size=(16, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(still(img, 16), theirs, atol=1e-5, rtol=0)


def test_crop_is_the_box_it_says():
    img = torch.rand(1, 3, 32, 32)
    u = plain_u(1, c1=0.5, c2=0.5, c3=0.25)  # a quarter of the area: 16 x 16 px at row 8, column 4
    out = train.view(img, u, 16, (0.25, 0.25), 0.0, 0.0, 2.0)
    torch.testing.assert_close(out, train.normalise(img[:, :, 8:24, 4:20]), atol=1e-5, rtol=0)


def test_crops_that_are_too_large_are_drawn_again_as_torchvision_does():
    torch.manual_seed(0)
    seen, sides, real = [], [], train.resample
    train.resample = lambda low, high, *rest: (sides.append(high - low), real(low, high, *rest))[1]
    try:
        train.view(torch.rand(20_000, 3, 8, 8), torch.rand(20_000, train.DRAWN), 8, (0.32, 1.0), 0.0, 0.0, 2.0)
    finally:
        train.resample = real
    ours = (sides[0] * sides[1] / 64).mean().item()
    for _ in range(4000):
        i, j, h, w = torchvision.transforms.RandomResizedCrop.get_params(
            torch.empty(3, 512, 512), (0.32, 1.0), (3 / 4, 4 / 3))
        seen.append(h * w / 512**2)
    assert ours == pytest.approx(sum(seen) / len(seen), abs=0.012)  # cut off instead, it is .647


def test_blur_equals_torchvisions_in_the_middle():
    img = torch.rand(1, 3, 32, 32)
    u = plain_u(1, c1=0.5, c5=0.0, c6=0.5)
    sigma = 2.0 * (0.05 + 0.95 * 0.5)
    out = train.view(img, u, 32, (1.0, 1.0), 1.0, 0.0, 2.0)
    theirs = train.normalise(torchvision.transforms.v2.functional.gaussian_blur(img, [15, 15], [sigma, sigma]))
    torch.testing.assert_close(out[..., 8:24, 8:24], theirs[..., 8:24, 8:24], atol=1e-3, rtol=0)


@pytest.mark.parametrize("columns, function, factor", [
    (dict(c8=0.9), "adjust_brightness", 1 + 0.4 * 0.8), (dict(c9=0.1), "adjust_contrast", 1 - 0.4 * 0.8),
    (dict(c10=0.1), "adjust_saturation", 1 - 0.2 * 0.8)])
def test_colours_equal_torchvisions(columns, function, factor):
    img = 0.25 + 0.3 * torch.rand(2, 3, 16, 16)  # nothing is clipped
    rest = {f"c{k}": 0.5 for k in (8, 9, 10, 11)} | columns  # 0.5: no change
    theirs = getattr(torchvision.transforms.v2.functional, function)(img, factor)
    torch.testing.assert_close(still(img, 16, c7=0.0, **rest), theirs, atol=2e-3, rtol=0)


def test_hue_turns_colours_and_keeps_grey_and_solarise_inverts():
    half = {f"c{k}": 0.5 for k in (8, 9, 10)}
    red = torch.tensor([0.6, 0.3, 0.3])[:, None, None].expand(1, 3, 16, 16)
    turned = still(red, 16, c7=0.0, c11=0.9, **half)[0, :, 0, 0]
    assert turned.sum().item() == pytest.approx(1.2, abs=1e-4) and turned[1] > turned[2]  # red towards yellow
    grey = torch.full((1, 3, 16, 16), 0.4)
    torch.testing.assert_close(still(grey, 16, c7=0.0, c11=0.9, **half), grey, atol=1e-5, rtol=0)
    out = train.view(torch.full((1, 3, 16, 16), 0.9), plain_u(1, c1=0.5, c13=0.0), 16, (1.0, 1.0), 0.0, 1.0, 2.0)
    torch.testing.assert_close(out, train.normalise(torch.full((1, 3, 16, 16), 0.1)), atol=1e-5, rtol=0)


def test_views_of_ranks_are_the_slices_of_one_batch():
    args = train.parse(QUICK)
    img = torch.randint(0, 255, (8, 3, 32, 32), dtype=torch.uint8)
    whole, _ = train.make_views(args, img, 3, 0, 1)
    parts = [train.make_views(args, img[r * 4 : r * 4 + 4], 3, r, 2)[0] for r in (0, 1)]
    by_rank = torch.cat([p.unflatten(0, (2, 4)) for p in parts], 1).flatten(0, 1)
    torch.testing.assert_close(by_rank, whole, atol=1e-6, rtol=0)
    assert not torch.allclose(whole, train.make_views(args, img, 4, 0, 1)[0])
    whole = train.make_masks(args, 8, 8, 3, 0, 1)
    parts = [train.make_masks(args, 4, 8, 3, r, 2).unflatten(0, (2, 4)) for r in (0, 1)]
    assert torch.equal(torch.cat(parts, 1).flatten(0, 1), whole)


def test_every_view_is_drawn_for_itself_and_of_its_kind(monkeypatch):
    seen = []

    def blank(img, u, size, **how):
        seen.append((u[0, 0].item(), size, how))
        return torch.zeros(len(img), 3, size, size)

    monkeypatch.setattr(train, "view", blank)
    args = train.parse([*QUICK, "--local-crops", "2", "--local-scale", "0.1", "0.2", "--colour", "0.3"])
    train.make_views(args, torch.zeros(2, 3, 32, 32, dtype=torch.uint8), 0, 0, 1)
    drawn, sizes, kinds = zip(*seen)
    assert len(set(drawn)) == 4 and sizes == (32, 32, 16, 16) and {kind["strength"] for kind in kinds} == {0.3}
    found = [(tuple(kind["area"]), kind["blur"], kind["solarise"]) for kind in kinds]
    assert found == [((0.4, 1), 1, 0), ((0.4, 1), 0.1, 0.2)] + [((0.1, 0.2), 0.5, 0)] * 2


def test_masks_hide_the_share_they_should_in_blocks():
    args = train.parse(["--scale", "large"])
    mask = train.make_masks(args, 200, 14, 0, 0, 1)
    share = mask.float().mean(1)
    assert mask.shape == (400, 256) and (share > 0).sum() == 200 and share.max() <= 0.5
    assert share[share > 0].mean().item() == pytest.approx(0.3, abs=0.03)
    grid = mask[share > 0].view(-1, 16, 16)
    line = torch.arange(1, 401) % 40 + 20
    reached = train.block_masks(line, 16, torch.rand(400, 20, 4)).sum(1) == line
    assert reached.float().mean() > 0.92  # of DINOv2's 93 %
    neighbours = (grid[:, 1:] & grid[:, :-1]).sum() / grid.sum()
    assert neighbours > 0.7  # scattered patches of the same number: about 0.3


def test_batches_are_epochs_of_all_pictures():
    seen = torch.cat([train.batch_index(10, 3, seed=0, step=s) for s in range(3)])
    assert len(set(seen.tolist())) == 9
    assert not torch.equal(train.batch_index(10, 3, 0, 0), train.batch_index(10, 3, 0, 3))
    assert not torch.equal(train.batch_index(10, 3, 0, 0), train.batch_index(10, 3, 1, 0))
    img, *_ = next(train.batches(train.parse(QUICK), None, 0, 0, 1))
    assert torch.equal(img, Scenes("train", 32)(train.batch_index(16, 4, 0, 0))["image"])  # not those that judge


# --- networks ----------------------------------------------------------------------------------------


def test_batch_norm_of_the_heads_equals_torchs():
    x = 3 + 2 * torch.randn(50, 8)
    torch.testing.assert_close(train.BatchNorm()(x), torch.nn.BatchNorm1d(8, affine=False)(x), atol=1e-5, rtol=1e-5)


def networks(*flags):
    args = train.parse([*QUICK, *flags])
    torch.manual_seed(0)
    student = train.Network(args)
    return args, student, train.make_teacher(student)


@pytest.mark.parametrize("flags", [[], ["--recipe", "dino"], ["--no-separate-head"], ["--local-crops", "0"],
                                   ["--spec", "norms,qkv", "--centring", "ema"]])
def test_every_parameter_that_should_learn_gets_a_gradient_and_the_teacher_none(flags):
    args, student, teacher = networks(*flags)
    img = torch.randint(0, 255, (4, 3, 32, 32), dtype=torch.uint8)
    mask = train.make_masks(args, 4, 8, 0, 0, 1) if args.ibot else None
    chosen = None if mask is None else mask.flatten().nonzero()[:, 0]
    views = train.make_views(args, img, 0, 0, 1)
    cls, _, _ = student(*views, mask, chosen)
    terms, meters = train.distil(args, student, teacher, *views, mask, 0.04)
    if args.koleo:  # view by view: the other one of the same picture would be nearest
        assert terms["koleo"].item() == pytest.approx(0.1 * sum(train.koleo(one) for one in cls.chunk(2)).item(), rel=1e-4)
    sum(terms.values()).backward()
    assert [n for n, p in student.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(p.grad is None for p in teacher.parameters())
    ours = {p.data_ptr() for p in student.parameters()}
    assert not ours & {p.data_ptr() for p in teacher.parameters()}
    assert set(terms) == {"dino"} | ({"ibot", "koleo"} if args.ibot else set())
    assert 0 < meters["entropy"] <= 1 and meters["kl"] > 0


def test_a_meter_tells_of_prototypes_that_nobody_uses():
    img = torch.randint(0, 255, (8, 3, 32, 32), dtype=torch.uint8)
    found = {}
    for centring in ("sinkhorn", "ema"):
        args, student, teacher = networks("--recipe", "dino", "--centring", centring, "--prototypes", "16")
        teacher.cls_centre[3:] += 10  # nobody gets these
        found[centring] = train.distil(
            args, student, teacher, *train.make_views(args, img, 0, 0, 1), None, 0.04)[1]["usage"]
    assert found["sinkhorn"] == pytest.approx(1, abs=0.02) and 0 < found["ema"] <= math.log(3) / math.log(16) + 1e-4


def test_meters_tell_of_a_collapse():
    args, student, teacher = networks("--recipe", "dino")
    img = torch.randint(0, 255, (8, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():  # all pictures look alike, all prototypes are one
        teacher.backbone.patch_embed.proj.weight.zero_()
        teacher.cls_head.last[:] = teacher.cls_head.last[:1].clone()
        meters = train.distil(args, student, teacher, *train.make_views(args, img, 0, 0, 1), None, 0.04)[1]
    assert meters["cls_std"] < 1e-3 and meters["entropy"] == pytest.approx(1, abs=1e-4)


def test_the_moving_centre_is_for_large_scales():
    kind = lambda *flags: train.parse(["--recipe", "dino", *flags]).centring
    assert [kind("--scale", scale) for scale in train.SCALES] == ["ema", "sinkhorn", "sinkhorn"]
    assert kind("--scale", "nano", "--centring", "ema") == "ema"


def test_teacher_sees_whole_global_views_only():
    args, student, teacher = networks()
    seen = []
    teacher.backbone.register_forward_pre_hook(lambda m, a: seen.append(a))
    img = torch.randint(0, 255, (4, 3, 32, 32), dtype=torch.uint8)
    train.distil(args, student, teacher, *train.make_views(args, img, 0, 0, 1),
                 train.make_masks(args, 4, 8, 0, 0, 1), 0.04)
    assert len(seen) == 1 and seen[0][0].shape == (8, 3, 32, 32) and seen[0][1] is None


def test_teacher_skips_no_branch():
    args, student, teacher = networks("--drop-path", "0.5")
    img = torch.randn(4, 3, 32, 32)
    assert torch.equal(teacher.backbone(img)["cls"], teacher.backbone(img)["cls"])
    assert not torch.equal(student.backbone(img)["cls"], student.backbone(img)["cls"])


def test_no_weight_decay_on_biases_norms_and_layerscale():
    _, student, _ = networks("--spec", "norms,qkv", "--spec-blocks", "1", "--layerscale", "0.1", "--head-layers", "2")
    names = {id(p): n.removeprefix("backbone.") for n, p in student.named_parameters()}
    optimizer = train.make_optimizer(train.parse([]), student)
    groups = optimizer.param_groups
    train.set_rates(train.parse([]), optimizer, {"lr": 0.1, "wd": 0.2}, 3)
    assert all(group["weight_decay"] == (0 if group["free"] else 0.2) for group in groups)
    found = {names[id(p)]: group for group in groups for p in group["params"]}
    assert found.keys() == set(names.values())
    decayed = {n for n, group in found.items() if not group["free"] and not n.startswith("blocks")}
    heads = {f"{h}_head.{w}" for h in ("cls", "patch") for w in ("last", "mlp.0.weight", "mlp.3.weight")}
    assert decayed == {"cls_token", "mask_token", "pos_embed", "patch_embed.proj.weight"} | heads
    in_blocks = {n.partition(".")[2].partition(".")[2] for n, group in found.items() if not group["free"] and n.startswith("blocks")}
    assert in_blocks == {f"{n}.weight" for n in ("attn.qkv", "attn.qkv.cls", "attn.qkv.patch",
                                                 "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert {n for n, group in found.items() if group["kind"] == "last"} == {"cls_head.last", "patch_head.last"}


def test_parts_have_rates_of_their_own():
    args = train.parse([*QUICK, "--spec", "norms,qkv", "--cls-lr", "3", "--head-lr", "10", "--patch-embed-lr", "0.5",
                        "--freeze-last", "0.5", "--steps", "4"])
    student = train.Network(args)
    names, optimizer = {id(p): n for n, p in student.named_parameters()}, train.make_optimizer(args, student)
    for step in (0, 3):
        train.set_rates(args, optimizer, {"lr": 0.1, "wd": 0.2}, step)
        rate = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert rate.keys() == set(names.values())
        for name, lr in rate.items():
            wanted = 0.3 if ".cls." in name else 0.05 if "patch_embed" in name else 1.0 if "head" in name else 0.1
            assert lr == pytest.approx(0 if step == 0 and name.endswith("head.last") else wanted), (step, name)
    assert {"backbone.cls_token", "cls_head.last", "patch_head.last", "backbone.norm.weight"} <= rate.keys()


@pytest.mark.parametrize("flags, largest", [
    (["--hidden", "131072", "--head-layers", "3", "--no-separate-head"], "weights and optimiser"),
    (["--prototypes", "16777216", "--bottleneck", "1", "--no-separate-head"], "logits"),
    (["--batch-size", "16384", "--pictures", "16384"], "activations"), (["--pictures", "9000000"], "pictures")])
def test_what_the_machine_has_no_memory_for_is_not_begun(flags, largest, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(eval_dense, "machine_gib", lambda device: 8.0)
    monkeypatch.setattr(train, "RunFolder", lambda *_: pytest.fail("it was begun"))
    with pytest.raises(SystemExit, match=f"^error: this would take about [0-9]+ GiB, and there are 8; "
                                         f"{largest} are [0-9]+ of it: .*--[a-z]*.*; --dry-run"):
        train.main([*QUICK, *flags, "--out", str(tmp_path / "run")])
    train.main([*QUICK, *flags, "--dry-run"])
    assert re.search("memory .* GiB a process, about, of 8.0 here: ", capsys.readouterr().out)


@pytest.mark.parametrize("data, name", [("pets", "Abyssinian"), ("cifar10", "dark"), ("voc", "")])
def test_sets_by_name(fetched_sets, data, name, tmp_path, capsys):
    flags = [f for f in QUICK if f != "--no-probe"]
    train.main([*flags, "--data", data, "--root", str(fetched_sets), "--out", str(tmp_path / "run"),
                "--workers", "0", "--probe" if name else "--no-probe"])
    said = capsys.readouterr().out
    assert (tmp_path / "run/last.pt").exists() and ("k-NN by [CLS]: every tenth of" in said) == bool(name)
    folder = train.Folder(data, 32, str(fetched_sets))
    assert next(iter(folder.classes)) == name and folder[1][0].shape == (3, 32, 32) and len(folder.classes) == (2 if name else 1)
    with pytest.raises(SystemExit, match=f"--data {data} wants in --root nowhere: .*--download fetches it"):
        train.main([*QUICK, "--data", data, "--root", "nowhere", "--out", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


def test_download_is_refused_where_nothing_is_fetched(tmp_path):
    with pytest.raises(SystemExit, match="--data scenes cannot be fetched, only voc, pets, imagenette, cifar10"):
        train.main([*QUICK, "--download", "--out", str(tmp_path / "run")])


@pytest.mark.parametrize("flags, words", [
    (["--spec", "norms", "qkv"], "unrecognized arguments: qkv (a list is joined by commas"),
    (["--spce", "qkv"], "unrecognized arguments: --spce qkv;"),
    (["--data", ""], "argument --data: is empty"), (["--init", ""], "argument --init: is empty"),
    (["--out", ""], "argument --out: is empty"), (["--temp-start", "0.005"], "--temp-start: 0.005 is outside 0.01"),
    (["--spec", ","], "argument --spec: names nothing"), (["--spec", " , "], "argument --spec: names nothing"),
    (["--resume", "--overwrite"], "--overwrite starts anew; give one of them"),
    (["--root", "x"], "argument --root: is for sets by name"),
    (["--bench", "1", "--resume"], "argument --bench: times steps of noise"),
    (["--bench", "1", "--download", "--data", "pets"], "argument --bench: times steps of noise"),
    (["--supervised", "--koleo", "3"], "argument --koleo: --supervised has one view a picture and one loss"),
    (["--supervised", "--local-crops", "8"], "argument --local-crops: --supervised has one view"),
    (["--recipe", "deit3", "--ibot", "2"], "argument --ibot: --supervised"),
    (["--seed", str(10**10 + 1)], "argument --seed: 10000000001 is outside 0 to")])
def test_flags_that_mean_nothing_are_refused(flags, words, capsys):
    with pytest.raises(SystemExit):
        train.parse([*QUICK, *flags])
    line = capsys.readouterr().err
    assert words in line and line.count("\n") == 1


def test_flags_that_specialise_nothing_are_refused(tmp_path):
    run(tmp_path / "a", "--steps", 1)
    for flags, words in ((["--cls-lr", 3], "--cls-lr: of no use where --spec is left out"),
                         (["--spec-init", "fresh", "--spec-blocks", 3], "--spec-init and --spec-blocks: of no use"),
                         (["--spec", "norms", "--spec-blocks", 2], "--spec-blocks: of no use where --spec is norms"),
                         (["--spec", "norms", "--spec-where", "last"], "--spec-where")):
        for start in ([], ["--init", tmp_path / "a"]):
            assert words in error(*start, *flags, "--out", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_fresh_copies_of_given_weights_leave_the_heads_as_the_controls(tmp_path):
    run(tmp_path / "a", "--steps", 1)
    flags = [*QUICK, "--init", str(tmp_path / "a/last.pt"), "--lr", "0", "--steps", "1", "--wd", "0"]
    students = {}
    for name, more in (("plain", []), ("fresh", ["--spec", "norms,qkv", "--spec-init", "fresh"]),
                       ("rank", ["--spec", "norms,qkv", "--spec-rank", "2"])):
        train.main([*flags, *more, "--out", str(tmp_path / name)])
        students[name] = torch.load(tmp_path / name / "last.pt", weights_only=True)["student"]
        start = clsspec.load(tmp_path / name / "last.pt", "untrained").state_dict()
        assert all(torch.equal(students[name][f"backbone.{key}"], v) for key, v in start.items()), name
    heads = [key for key in students["plain"] if "head" in key]
    assert heads and all(torch.equal(students["plain"][key], students[name][key]) for name in students for key in heads)
    assert not torch.equal(students["fresh"]["backbone.blocks.0.attn.qkv.cls.weight"],
                           students["fresh"]["backbone.blocks.0.attn.qkv.patch.weight"])


def test_a_stale_environment_of_torchrun_is_said(monkeypatch, tmp_path):
    for rank, ranks, words in (("3", "", "RANK 3 of WORLD_SIZE 1"),
                               ("", "0", "RANK 0 of WORLD_SIZE 1|RANK 0 of WORLD_SIZE 0"),
                               ("x", "1", "'x'")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", ranks)
        assert re.search(words, error("--out", tmp_path / "a"))


def test_a_resumed_run_sees_the_same_pictures(tmp_path):
    pictures(tmp_path / "set")
    flags = ["--data", tmp_path / "set", "--out", tmp_path / "a", "--workers", 0]
    run(tmp_path / "a", *flags[:2], "--workers", 0)
    # written in another way
    run(tmp_path / "a", "--data", f"{tmp_path}/set/", "--workers", 0, "--resume", "--steps", 5)
    (tmp_path / "set").rename(tmp_path / "moved")
    flags[1] = tmp_path / "moved"
    assert run(tmp_path / "a", *flags[:2], "--workers", 0, "--resume", "--steps", 6)["step"] == 6
    (tmp_path / "moved/class0/3.JPEG").unlink()
    assert re.search(r"it has --data with 12 files .* \(now 11 files", error(*flags, "--resume", "--steps", 7))


def test_results_of_the_steps_before_are_moved_aside(tmp_path):
    run(tmp_path / "a")
    for name in ("eval", "analysis"):
        (tmp_path / f"a/{name}.json").write_text('{"teacher scenes": {}}')
    run(tmp_path / "a", "--resume")  # nothing is left to train
    assert (tmp_path / "a/eval.json").exists()
    run(tmp_path / "a", "--resume", "--steps", 6)
    for name in ("eval", "analysis"):
        assert not (tmp_path / f"a/{name}.json").exists()
        assert (tmp_path / f"a/{name}.step4.json").read_text() == '{"teacher scenes": {}}'
    (tmp_path / "a/eval.json").write_text("{}")
    out = train.RunFolder(SimpleNamespace(out=tmp_path / "a", resume=True, overwrite=False))
    out.saved = 6
    out.save(torch.load(tmp_path / "a/last.pt", weights_only=True))  # of a signal right after a save
    out.close()
    assert (tmp_path / "a/eval.json").exists()


def test_a_run_does_not_replace_what_it_starts_from(tmp_path):
    run(tmp_path / "a")
    assert "is what --out" in error("--init", tmp_path / "a", "--out", tmp_path / "a", "--overwrite")
    assert torch.load(tmp_path / "a/last.pt", weights_only=True)["step"] == 4


def test_a_dry_run_looks_at_its_pictures_and_fetches_none(tmp_path, capsys, monkeypatch):
    pictures(tmp_path / "set")
    train.main([*QUICK, *LABELS, "--data", str(tmp_path / "set"), "--dry-run"])
    assert "3 classes" in capsys.readouterr().out
    assert "neither 'scenes', nor a folder" in error("--data", tmp_path / "none", "--dry-run")
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive",
                        lambda *_, **__: pytest.fail("it fetches"))
    assert "--download fetches it, 0.2 GB" in error("--data", "cifar10", "--root", tmp_path / "c",
                                                    "--download", "--dry-run")


def test_one_photo_is_enough_to_see_it_run(tmp_path, capsys):
    save_map(tmp_path / "photo.jpg", torch.arange(256).expand(32, 256), "RGB")
    train.main([*QUICK, "--data", str(tmp_path / "photo.jpg"), "--out", str(tmp_path / "run"), "--workers", "0"])
    assert "note: 1 picture(s) are less than a batch of 4; some are in it several times" in capsys.readouterr().out
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert len(losses) == 4 and all(map(math.isfinite, losses))


def test_lists_may_have_spaces_and_any_order():
    args = [train.parse(["--scale", "nano", "--spec", spec]) for spec in ("qkv, norms,qkv", "norms,qkv")]
    assert args[0].spec == args[1].spec == ("norms", "qkv") and args[0].out == args[1].out
    assert train.parse(["--out=~/x"]).out == Path.home() / "x"


def test_other_pictures_of_the_same_names_are_other_pictures(tmp_path):
    for film, side in (("a", 8), ("b", 16)):
        save_map(tmp_path / film / "frame0.png", 7, size=(side, side))
    assert len({train.Folder(str(tmp_path / film), 8).found() for film in "ab"}) == 2


def test_weights_that_have_learnt_get_lower_rates_by_themselves():
    new, init = (train.parse(["--scale", "nano", *more]) for more in ([], ["--init", "w.pth"]))
    assert (new.lr, new.head_lr, init.lr, init.head_lr) == (4e-3, 1, 1e-4, 10)
    assert train.parse(["--init", "w.pth", "--lr", "1e-3", "--head-lr", "2"]).lr == 1e-3  # what is typed counts


def test_positions_and_cls_are_free_of_decay_with_labels_as_in_deit():
    args = train.parse([*QUICK, *LABELS])
    args.classes = 3
    student = train.Network(args)
    free = {id(p) for group in train.make_optimizer(args, student).param_groups if group["free"] for p in group["params"]}
    assert {id(student.backbone.pos_embed), id(student.backbone.cls_token)} <= free
    assert id(student.backbone.patch_embed.proj.weight) not in free


# --- labels ------------------------------------------------------------------------------------------


def test_three_augment_does_one_of_three():
    torch.manual_seed(0)
    img = torch.rand(1, 3, 16, 16).expand(3, -1, -1, -1)
    u = plain_u(3, c1=0.5, c4=0.9, c6=1.0, c12=torch.tensor([0.1, 0.5, 0.9]))
    out = train.view(img, u, 16, (1.0, 1.0), 0.0, 0.0, 2.0, strength=0.0, three=True)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    grey, solarised, blurred = out * std + mean
    luma = 0.299 * img[0, 0] + 0.587 * img[0, 1] + 0.114 * img[0, 2]
    torch.testing.assert_close(grey, luma.expand(3, -1, -1), atol=1e-4, rtol=0)
    torch.testing.assert_close(solarised, torch.where(img[0] > 0.5, 1 - img[0], img[0]), atol=1e-4, rtol=0)
    assert blurred.std() < 0.5 * img[0].std() and blurred.mean() == pytest.approx(img[0].mean().item(), abs=0.02)


def test_jitter_of_three_augment_is_brightness_contrast_saturation():
    img = torch.full((2, 3, 8, 8), 0.25)
    img[:, 0] = 0.5
    # c11 would turn the hue
    u = plain_u(2, c1=0.5, c12=0.5, c7=0.99, c8=torch.tensor([1.0, 0.5]), c9=0.5, c10=0.5, c11=1.0)
    out = train.view(img, u, 8, (1.0, 1.0), 0.0, 0.0, 2.0, three=True)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    bright, same = out * std + mean
    torch.testing.assert_close(same, img[1], atol=1e-4, rtol=0)
    torch.testing.assert_close(bright[1:], 1.3 * img[0, 1:], atol=1e-4, rtol=0)
    torch.testing.assert_close(bright[0], 1 - 1.3 * img[0, 0], atol=1e-4, rtol=0)  # 0.65: solarised


@pytest.mark.parametrize("mixup, cutmix", [(0, 0), (0.8, 0), (0, 1.0), (0.8, 1.0)])
def test_targets_are_what_is_in_the_mixture(mixup, cutmix):
    args = train.parse(QUICK + [*LABELS, "--mixup", str(mixup), "--cutmix", str(cutmix), "--colour", "0"])
    args.classes, labels = 5, torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    img = (labels[:, None, None, None] * 40).expand(-1, 3, 32, 32).to(torch.uint8)
    torch.manual_seed(0)
    views, targets, clean = train.labelled_views(args, img, labels, 0, 0, 1)
    assert views.shape == (8, 3, 32, 32) and targets.shape == (8, 5)
    torch.testing.assert_close(clean, train.normalise(img / 255))
    mixed = targets.sum(1) > 1
    assert (targets[torch.arange(8), labels] == 1).all() and set(targets.unique().tolist()) == {0, 1}
    assert mixed.any() == bool(mixup or cutmix)
    whole, _, _ = train.labelled_views(args, img, labels, 0, 0, 1)
    half, _, _ = train.labelled_views(args, img[4:], labels[4:], 0, 1, 2)
    if not (mixup or cutmix):  # which pictures meet is drawn by each rank
        torch.testing.assert_close(whole[4:], half)


def test_supervised_loss_and_top1():
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, 3.0]])
    targets = torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    network = lambda x: x
    terms, meters = train.supervise(network, network, logits, targets, logits, torch.tensor([0, 1]))
    log_sigmoid = lambda v: -math.log(1 + math.exp(-v))
    pairs = zip(logits.flatten().tolist(), targets.flatten().tolist())
    loop = -sum(t * log_sigmoid(v) + (1 - t) * log_sigmoid(-v) for v, t in pairs) / 6
    assert terms["bce"].item() == pytest.approx(loop, rel=1e-5) and meters["top1"].item() == 50


@pytest.mark.parametrize("flags, name", [
    ([], "dinov2-nano-plain-s0"), (["--spec", "norms,qkv", "--seed", "3"], "dinov2-nano-norms-qkv-s3"),
    (["--spec", "qkv", "--spec-blocks", "8", "--data", "at/photos"], "dinov2-nano-photos-qkv-8blocks-s0"),
    (["--recipe", "dino", "--init", "at/weights.pth"], "dino-nano-weights-s0"),
    (["--data", "imagenet/train"], "dinov2-nano-imagenet-train-plain-s0"),
    (["--init", "runs/mine/last.pt"], "dinov2-nano-mine-s0"),
    (["--init", "hub/model.safetensors", "--data", "a/list.txt"], "dinov2-nano-hub-list-s0")], ids=str)
def test_name_of_a_run(flags, name):
    assert train.parse(["--scale", "nano", *flags]).out == Path("runs") / name


def test_defaults_are_those_of_the_device_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = [(a.device, a.scale, a.precision) for a in map(train.parse, ([], ["--device", "cpu"]))]
    assert found == [("cuda", "small", None), ("cpu", "nano", None)]  # precision: see below


@pytest.mark.parametrize("able, width, flags, expected", [
    ((), 384, [], "fp32"), (("_is_avx512_bf16_supported",), 384, [], "bf16"),
    (("_is_amx_tile_supported",), 384, [], "bf16"),
    (("_is_avx512_bf16_supported",), 192, [], "fp32"),
    (("_is_avx512_bf16_supported",), 384, ["--precision", "fp32"], "fp32"),
    ((), 64, ["--precision", "bf16"], "bf16")], ids=str)
def test_precision_is_what_pays_here(tmp_path, monkeypatch, capsys, able, width, flags, expected):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in able, raising=False)
    size = {64: "nano", 192: "tiny", 384: "small"}[width]
    train.main([*QUICK, "--size", size, "--patch", "16", "--dry-run", *flags])
    assert f"(no GPU in use, {expected})" in capsys.readouterr().out
    for has, kind in ((True, "bf16"), (False, "fp32")):  # as NVIDIA's T4
        monkeypatch.setattr(eval_dense, "gpu_has_bf16", lambda: has)
        assert train.precision_for("cuda", width) == kind


ROOT = Path(__file__).parent.parent


def start(*flags, ranks=1, **more) -> list:
    """train.py's processes, as a user starts them; several ranks: as torchrun does."""
    with socket.socket() as free:  # the system knows which port nobody listens on
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    jobs = []
    for rank in range(ranks):
        dist = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port} if ranks > 1 else {}
        jobs.append(subprocess.Popen([sys.executable, str(ROOT / "train.py"), *map(str, flags)], env=env | dist,
                                     stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more))
    return jobs


def script(*flags, ranks=1, code=0, **more):
    """Run train.py as a user does; returns what it printed."""
    jobs = start(*flags, ranks=ranks, **more)
    late = threading.Timer(170, lambda: [job.kill() for job in jobs])  # so that a hang shows what was printed
    late.start()
    outputs = [job.communicate()[0] for job in jobs]
    late.cancel()
    assert [job.returncode for job in jobs] == [code] * ranks, "\n".join(outputs)
    return outputs[0]


def run(out, *flags):
    train.main([*QUICK, "--out", str(out), *map(str, flags)])
    return torch.load(out / "last.pt", weights_only=True)


def error(*flags):
    with pytest.raises(SystemExit) as caught:
        train.main([*QUICK, *map(str, flags)])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(a, b):
    """Equal to the last bit, through dicts and lists of tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_a_long_run_says_after_100_steps_what_is_learnt(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(clsspec.SIZES, "nano", (32, 1, 1, 8))
    run(tmp_path / "a", "--steps", 200, "--save-every", 200, "--batch-size", 2, "--log-every", 20)
    told = [line for line in capsys.readouterr().out.splitlines() if "foretells" in line]
    assert len(told) == 1 and re.search(r"^step 100: .* is \d\.\d\d; knowing nothing it is 2.77. About \d+ minutes to go", told[0]), told
    lines = {line["step"]: line for line in logged(tmp_path / "a")}
    assert f"is {lines[100]['dino']:.2f};" in told[0]


def logged(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# --- runs --------------------------------------------------------------------------------------------


def test_a_run_leaves_what_it_should_and_its_checkpoint_loads(tmp_path):
    state = run(tmp_path / "a", "--spec", "norms,qkv", "--spec-blocks", 8)
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["args"]["spec"] == ["norms", "qkv"] and config["model"]["spec_blocks"] == 8 and config["torch"]
    lines = logged(tmp_path / "a")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    keys = {"step", "epoch", "loss", "dino", "ibot", "koleo", "entropy", "usage", "kl", "cls_std",
            "lr", "wd", "ema", "temp",
            "grad_norm", "img_per_s", "peak_mb", "skipped"}
    assert keys <= lines[0].keys() and all(math.isfinite(line["loss"]) for line in lines)
    model = clsspec.load(tmp_path / "a/last.pt")
    for name, value in model.state_dict().items():
        assert torch.equal(value, state["teacher"][f"backbone.{name}"])
    assert not list((tmp_path / "a").glob("*.tmp"))


@pytest.mark.parametrize("flags, who, like", [
    (["--ema", 1, "--ema-end", 1], "teacher", "untrained"), (["--ema", 0, "--ema-end", 0], "teacher", "student"),
    (["--clip", 1e-12, "--wd", 0, "--wd-end", 0], "student", "untrained")])
def test_the_teacher_follows_as_it_should_and_the_gradient_is_clipped(tmp_path, flags, who, like):
    run(tmp_path / "a", *flags, "--steps", 2)
    a, b = (clsspec.load(tmp_path / "a/last.pt", name).state_dict() for name in (who, like))
    assert all(torch.allclose(a[key], b[key], atol=1e-6) for key in a)
    untrained, student = (clsspec.load(tmp_path / "a/last.pt", name) for name in ("untrained", "student"))
    moved = (untrained.norm.weight - student.norm.weight).abs().max()
    assert moved > 1e-4 or "--clip" in flags


def test_pictures_a_second_are_of_training_alone(tmp_path, monkeypatch):
    clock, save = {"now": 1.0}, train.RunFolder.save

    def tick():
        clock["now"] += 1
        return clock["now"]

    def wait():  # a long time
        clock["now"] += 1e6

    monkeypatch.setattr(train, "time", SimpleNamespace(time=tick, process_time=tick, sleep=time.sleep))
    monkeypatch.setattr(train, "probe", lambda vit: wait() or {"miou": 1.0})
    monkeypatch.setattr(train.RunFolder, "save", lambda self, state: wait() or save(self, state))
    run(tmp_path / "a", "--probe-every", 2, "--save-every", 1, "--log-every", 1)
    assert min(line["img_per_s"] for line in logged(tmp_path / "a")) > 0.1


def test_other_ways_to_run(tmp_path):
    every = ["--spec", "norms,qkv,proj,mlp,final", "--layerscale", "0.1", "--steps", 2]
    found = {}
    for flags in ([], ["--precision", "bf16"], ["--checkpointing"], ["--mask-share", "0"], ["--recipe", "dino"],
                  ["--no-separate-head"], ["--head-norm", "none"], ["--spec-init", "fresh"]):
        out = tmp_path / " ".join(flags)
        run(out, *every, *flags)
        assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in logged(out)), flags
        found[" ".join(flags)] = logged(out)[1]
    usual, bf16 = found[""]["loss"], found["--precision bf16"]["loss"]
    assert found["--checkpointing"]["loss"] == pytest.approx(usual, rel=1e-5)
    assert bf16 != usual and bf16 == pytest.approx(usual, rel=5e-2)
    assert found["--mask-share 0"]["ibot"] == 0 < found[""]["ibot"] and "ibot" not in found["--recipe dino"]
    del found["--checkpointing"]  # all others change it
    assert len({line["loss"] for line in found.values()}) == 7


def test_a_compiled_run_is_the_run(tmp_path, monkeypatch):
    """Without the compiler's last part, which needs a C++ compiler and minutes."""
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **more: real(self, backend="aot_eager", **more))
    monkeypatch.setitem(clsspec.SIZES, "nano", (64, 2, 2, 8))
    flags = ["--spec", "norms,qkv", "--spec-blocks", 1, "--registers", 2, "--attn-bias", "--steps", 2]
    for name in ("--no-compile", "--compile"):
        torch._dynamo.reset()
        run(tmp_path / name, *flags, name)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3  # two sizes of views, two networks
    eager, compiled = (logged(tmp_path / name) for name in ("--no-compile", "--compile"))
    assert [line["loss"] for line in compiled] == pytest.approx([line["loss"] for line in eager], rel=1e-4)


def test_plain_and_specialised_runs_start_equal(tmp_path):
    first = []
    for i, flags in enumerate(([], ["--spec", "norms,qkv"], ["--spec", "qkv", "--spec-rank", 2])):
        run(tmp_path / str(i), *flags, "--steps", 1)
        first.append(logged(tmp_path / str(i))[0]["loss"])
    assert first[1:] == pytest.approx(first[:1] * 2, rel=1e-5)


def test_stopped_and_resumed_equals_unbroken(tmp_path):
    flags = ["--spec", "norms,qkv", "--steps", 6, "--drop-path", 0.2]
    whole = run(tmp_path / "whole", *flags)
    real, calls = train.make_views, []

    def interrupted(*a):
        calls.append(a)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*a)

    train.make_views = interrupted
    try:
        with pytest.raises(SystemExit) as stopped:
            run(tmp_path / "parts", *flags)
    finally:
        train.make_views = real
    assert stopped.value.code == 128 + signal.SIGINT
    assert torch.load(tmp_path / "parts/last.pt", weights_only=True)["step"] == 3
    with open(tmp_path / "parts/log.jsonl", "a") as log:
        log.write('{"step": 4, "lo')  # as a full disk leaves it
    parts = run(tmp_path / "parts", *flags, "--resume")
    for part in ("student", "teacher", "optimizer", "step", "model"):
        assert same(whole[part], parts[part]), part
    drop = ("img_per_s", "peak_mb")
    strip = lambda lines: [{k: v for k, v in line.items() if k not in drop} for line in lines]
    assert strip(logged(tmp_path / "whole")) == strip(logged(tmp_path / "parts"))


@pytest.mark.parametrize("recipe, centring", [("dinov2", "sinkhorn"), ("dino", "ema")])
def test_two_ranks_equal_one_process_with_the_double_batch(tmp_path, recipe, centring):
    flags = [*QUICK, "--recipe", recipe, "--spec", "norms,qkv", "--steps", 3, "--centring", centring]
    run(tmp_path / "one", *flags, "--batch-size", 8)
    script(*flags, "--batch-size", 4, "--out", tmp_path / "two", ranks=2)
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert len(one) == len(two) == 3
    for a, b in zip(one, two):
        for key in ("lr", "grad_norm", "epoch", "loss", "dino", "entropy"):  # means over ranks
            assert a[key] == pytest.approx(b[key], rel=2e-3), key
    a, b = (torch.load(tmp_path / n / "last.pt", weights_only=True) for n in ("one", "two"))
    for name in ("cls_centre", "patch_centre"):
        torch.testing.assert_close(a["teacher"][name], b["teacher"][name], atol=1e-4, rtol=1e-3, msg=name)
    first = clsspec.load(tmp_path / "one/last.pt", "untrained").state_dict()
    a, b = ({name: state["student"][f"backbone.{name}"] for name in first} for state in (a, b))
    flat = lambda x, y: torch.cat([(x[name] - y[name]).flatten() for name in first])
    assert flat(a, b).norm() < 0.3 * flat(a, first).norm()  # they have gone the same way


def pictures(folder, n=12):
    """A nested folder of pictures, two of which are broken."""
    for i in range(n):
        (folder / f"class{i % 3}").mkdir(parents=True, exist_ok=True)
        img = torch.randint(0, 255, (1 if i == 0 else 3, 40, 50 + i), dtype=torch.uint8)
        torchvision.transforms.v2.functional.to_pil_image(img).save(folder / f"class{i % 3}/{i}.JPEG")
    whole = (folder / "class1/1.JPEG").read_bytes()
    (folder / "class1/1.JPEG").write_bytes(whole[: len(whole) // 20])
    (folder / "class2/2.JPEG").write_text("not a picture")


def test_image_folder_any_number_of_workers_and_broken_files(tmp_path):
    pictures(tmp_path / "set")
    states = [run(tmp_path / f"w{n}", "--data", tmp_path / "set", "--workers", n) for n in (0, 2)]
    assert same(states[0]["student"], states[1]["student"])
    assert logged(tmp_path / "w2")[-1]["skipped"] >= 2
    files = sorted((tmp_path / "set").rglob("*.JPEG"))
    (tmp_path / "list.txt").write_text("\n".join(map(str, files)) + "\n")
    listed = run(tmp_path / "list", "--data", tmp_path / "list.txt")
    (tmp_path / "relative.txt").write_text("\n".join(["gone.png", *(str(file.relative_to(tmp_path)) for file in files)]))
    gone, *others = eval_dense.picture_files(tmp_path / "relative.txt")  # from the list's own folder
    assert others == list(map(str, files)) and gone == str(tmp_path / "gone.png")
    assert same(listed["student"], states[0]["student"])


def test_loss_falls_and_meters_are_quiet(tmp_path):
    run(tmp_path / "a", "--steps", 60, "--lr", "3e-3", "--pictures", 8, "--batch-size", 8, "--log-every", 10)
    lines = logged(tmp_path / "a")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    assert lines[-1]["entropy"] < 0.98 and lines[-1]["cls_std"] > 0.2


def test_labels_of_folders_are_learnt(tmp_path):
    for i in range(24):
        (tmp_path / "set" / "abc"[i % 3] / "deeper").mkdir(parents=True, exist_ok=True)
        img = torch.zeros(3, 40, 40, dtype=torch.uint8)
        img[:, :: (2, 8, 40)[i % 3]] = 120 + 5 * i  # fine stripes, coarse stripes, one line
        torchvision.transforms.v2.functional.to_pil_image(img).save(tmp_path / "set" / "abc"[i % 3] / f"deeper/{i}.png")
    folder = train.Folder(str(tmp_path / "set"), 32)
    assert list(folder.classes) == ["a", "b", "c"] and [folder[i][1] for i in (0, 8, 23)] == [0, 1, 2]
    flags = [*LABELS, "--data", tmp_path / "set", "--batch-size", 12, "--lr", "2e-2",
             "--mixup", 0, "--cutmix", 0,
             "--colour", 0, "--ema", 0.5, "--steps", 100, "--workers", 0]
    state = run(tmp_path / "r", *flags)
    lines = logged(tmp_path / "r")
    assert {"bce", "top1"} <= lines[0].keys() and "dino" not in lines[0]
    assert lines[0]["bce"] == pytest.approx(math.log(2), abs=0.05)  # of a coin
    assert lines[-1]["bce"] < 0.4 and sum(line["top1"] for line in lines[-4:]) / 4 > 80
    assert state["student"]["cls_head.weight"].shape == (3, 64)
    folder.files[0] = str(tmp_path / "gone.png")
    assert folder[0][1] == folder.labels[1] and len(folder[0][2]) == 1


def test_a_supervised_run_is_resumed_to_the_same_bits(tmp_path, monkeypatch):
    flags = [*LABELS, "--drop-path", 0.2]
    whole = run(tmp_path / "whole", *flags, "--steps", 4)
    code, save = [], train.RunFolder.save
    monkeypatch.setattr(train.RunFolder, "save", lambda self, state: (
        save(self, state), code.append(state["step"]), os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(SystemExit):
        run(tmp_path / "parts", *flags, "--steps", 4, "--save-every", 2)
    monkeypatch.undo()
    assert code[0] == 2
    parts = run(tmp_path / "parts", *flags, "--steps", 4, "--save-every", 2, "--resume")
    assert same(whole["student"], parts["student"]) and same(whole["teacher"], parts["teacher"])


# --- when things go wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize("flags, words", [
    (["--spec", "norm"], "unknown component"), (["--spec", "qkv", "--spec-blocks", 13], "outside 0 to 12"),
    (["--image-size", 36, "--source-size", 36], "no multiple of the patch"),
    (["--local-size", 18, "--dry-run"], "--local-size 18.*try 16"),
    (["--image-size", 64], "--source-size 32 is less than --image-size 64"),
    (["--local-size", 18], "--local-size 18.*try 16"),
    (["--batch-size", 17], "17 pictures is larger than the set.*has 16"),
    (["--batch-size", 1], "KoLeo needs a neighbour"),
    (["--data", "nowhere"], "--data nowhere: neither"),
    (["--device", "cuda"], "--device cuda: torch sees no GPU"),
    (["--resume", "--out", "nowhere"], "there is no nowhere/last.pt; start anew with --overwrite in place of --resume")])
def test_bad_flags_are_one_clear_line(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = error(*flags)
    assert message.startswith("error: ")
    assert re.search(words, message), message
    assert not (tmp_path / "runs").exists()


def test_labels_want_a_folder_for_each_class(tmp_path):
    pictures(tmp_path / "set")
    flags = [*LABELS, "--out", tmp_path / "r", "--data"]
    assert "must be a folder that has a folder of pictures for each class" in error(*flags, tmp_path / "set/class1")
    files = "\n".join(map(str, (tmp_path / "set").rglob("*.JPEG")))
    (tmp_path / "list.txt").write_text(files)
    assert "must be a folder" in error(*flags, tmp_path / "list.txt")
    (tmp_path / "set/class0/0.JPEG").rename(tmp_path / "set/0.JPEG")
    assert "no pictures beside them" in error(*flags, tmp_path / "set")


def test_folders_without_a_readable_picture(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no picture" in error("--data", tmp_path / "empty", "--out", tmp_path / "r")
    for i in range(16):
        (tmp_path / f"empty/{i}.jpg").write_text("no")
    message = error("--data", tmp_path / "empty", "--out", tmp_path / "r", "--workers", 0)
    assert "none of its 16 files is a readable picture" in message
    assert not (tmp_path / "r").exists()


def test_runs_are_never_overwritten_or_mixed_by_accident(tmp_path):
    before = run(tmp_path / "a", "--steps", 2)
    assert "give --resume to go on, --overwrite" in error("--out", tmp_path / "a", "--steps", 2)
    assert "is of another run: it has --lr" in error("--out", tmp_path / "a", "--steps", 2, "--resume", "--lr", 0.5)
    assert same(torch.load(tmp_path / "a/last.pt", weights_only=True)["student"], before["student"])
    torch.save({"something": 1}, tmp_path / "a/last.pt")
    assert "not a checkpoint of train.py" in error("--out", tmp_path / "a", "--steps", 2, "--resume")
    with pytest.raises(ValueError, match="neither a checkpoint of train.py nor a ViT"):
        clsspec.load(tmp_path / "a/last.pt")
    assert run(tmp_path / "a", "--overwrite", "--steps", 1)["step"] == 1


def listing(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("flags, words", [
    (["--data", "rel.txt"], "neither 'scenes', nor a folder"),
    (["--local-size", 17], r"--local-size 17 \(try 16\): no multiple of the patch, 8"),
    (["--registers", 4096, "--batch-size", 4096, "--pictures", 4096], "this would take about"),
    (["--pictures", 10**9], "pictures are 2,861"), (["--ibot", 0, "--koleo", 0, "--centring", "broken"], "")])
def test_an_old_run_is_untouched_until_the_new_one_has_a_checkpoint(tmp_path, monkeypatch, flags, words):
    run(tmp_path / "a", "--steps", 2)
    (tmp_path / "a/eval.json").write_text('{"old": 1}')
    before = listing(tmp_path / "a")
    if not words:  # it fails in its third step
        flags, words, real, calls = [], "not finite at step 3.*the old run is as it was", train.koleo, []
        monkeypatch.setattr(train, "koleo", lambda z: real(z) * (math.nan if calls.append(1) or len(calls) > 4 else 1))
    message = error("--out", tmp_path / "a", "--overwrite", *flags)
    assert re.search(words, message), message
    assert listing(tmp_path / "a") == before


def test_a_new_run_takes_the_old_ones_place_whole(tmp_path):
    run(tmp_path / "a", "--steps", 2)
    for name in ("eval.json", "eval.step2.json", "analysis.step2.json", "pictures.png", "mine.png"):
        (tmp_path / "a" / name).write_text('{"old": 1}')
    run(tmp_path / "a", "--steps", 1, "--overwrite", "--seed", 10**10)
    (tmp_path / "a/mine.png").unlink()  # of that nobody knows what it is
    assert set(listing(tmp_path / "a")) == {"config.json", "log.jsonl", "last.pt"}
    assert len(logged(tmp_path / "a")) == 1
    assert json.loads((tmp_path / "a/config.json").read_text())["args"]["seed"] == 10**10


@pytest.mark.parametrize("name", ["log.jsonl", "config.json", "eval.json"])
def test_a_folder_with_any_part_of_a_run_is_not_written_over(tmp_path, name):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).write_text("{}")
    assert f"holds a run already ({name}): give --overwrite to start anew" in error("--out", tmp_path / "a")
    assert listing(tmp_path / "a") == {name: b"{}"}


def test_a_run_needs_a_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file/run"):
        assert f"{out} cannot be written to, or is no folder, and results would go there" in error("--out", out)
    assert listing(tmp_path) == {"file": b"mine"}


def test_a_folder_belongs_to_one_process(tmp_path):
    code = ("import fcntl, sys, time; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX); "
            "f.write('77'); f.flush(); print(1, flush=True); time.sleep(99)")
    (tmp_path / "a").mkdir()
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a/.lock")], stdout=subprocess.PIPE)
    other.stdout.readline()
    assert "is in use by process 77" in error("--out", tmp_path / "a")
    other.kill()
    other.wait()
    run(tmp_path / "a", "--steps", 1)  # a dead one's claim is taken over
    assert set(listing(tmp_path / "a")) == {"config.json", "log.jsonl", "last.pt"}


@pytest.mark.parametrize("flags", [["--recipe", "deit3"], ["--supervised"]], ids=str)
def test_help_shows_that_labels_need_one_view_and_no_other_loss(flags, capsys):
    with pytest.raises(SystemExit):
        train.parse([*flags, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "local views a picture; 0 to 64 (default: 0)" in shown and "weight of KoLeo; 0 to 1000 (default: 0.0)" in shown


def test_what_makes_a_run_is_its_global_batch(tmp_path):
    run(tmp_path / "a", "--steps", 2, "--batch-size", 4)
    flags = [*QUICK, "--out", tmp_path / "a", "--steps", 3, "--resume"]
    script(*flags, "--batch-size", 2, ranks=2)
    assert [line["step"] for line in logged(tmp_path / "a")] == [1, 2, 3]
    message = error("--out", tmp_path / "a", "--steps", 4, "--resume", "--batch-size", 8)
    assert "a global batch (--batch-size x processes) of 4 (now 8)" in message
    run(tmp_path / "a", "--steps", 4, "--resume", "--batch-size", 4)


def test_a_run_goes_on_for_longer_and_says_so(tmp_path, capsys):
    run(tmp_path / "a", "--steps", 2)
    assert "at step 2, beyond --steps 1" in error("--out", tmp_path / "a", "--steps", 1, "--resume")
    state = run(tmp_path / "a", "--steps", 5, "--resume")
    assert state["step"] == 5 and state["args"]["steps"] == 5 and len(logged(tmp_path / "a")) == 5
    assert "--steps was 2 and is 5 now" in capsys.readouterr().out
    wanted = train.schedule(train.parse([*QUICK, "--steps", "5"]), 3, 1)["lr"]
    assert logged(tmp_path / "a")[3]["lr"] == pytest.approx(wanted)


def test_skipped_files_are_counted_on_after_a_resume_and_blank_lines_passed_over(tmp_path):
    pictures(tmp_path / "set")
    flags = ["--data", tmp_path / "set", "--workers", 0]
    run(tmp_path / "a", *flags, "--steps", 4)
    before = logged(tmp_path / "a")[-1]["skipped"]
    with open(tmp_path / "a/log.jsonl", "a") as log:
        log.write("\n\n")
    run(tmp_path / "a", *flags, "--steps", 8, "--resume")
    assert before > 0 and logged(tmp_path / "a")[4]["skipped"] >= before


def test_the_log_is_intact_where_it_cannot_be_written_anew(tmp_path, monkeypatch):
    run(tmp_path / "a", "--steps", 2)
    before = listing(tmp_path / "a")

    def full(self, text):
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(Path, "write_text", full)
    assert "Disk quota exceeded" in error("--out", tmp_path / "a", "--steps", 3, "--resume")
    assert listing(tmp_path / "a") == before


@pytest.mark.parametrize("network", ["student", "teacher"])
def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path, monkeypatch, network):
    run(tmp_path / "a", "--steps", 2)
    real = train.update_teacher

    def spoil(teacher, student, momentum):
        real(teacher, student, momentum)
        with torch.no_grad():
            {"student": student, "teacher": teacher}[network].backbone.cls_token.fill_(math.nan)

    monkeypatch.setattr(train, "update_teacher", spoil)
    message = error("--out", tmp_path / "b", "--steps", 1)
    assert f"backbone.cls_token of the {network} is not finite at step 1" in message and "there is no checkpoint yet" in message
    assert not (tmp_path / "b").exists()
    assert "the checkpoint of step 2 is intact" in error("--out", tmp_path / "a", "--steps", 3, "--resume")
    state = torch.load(tmp_path / "a/last.pt", weights_only=True)
    state[network]["backbone.norm.bias"][0] = math.inf
    torch.save(state, tmp_path / "a/last.pt")
    with pytest.raises(ValueError, match="a/last.pt.*norm.bias is not finite"):
        clsspec.load(tmp_path / "a/last.pt", network)
    assert "--resume: backbone.norm.bias in" in error("--out", tmp_path / "a", "--steps", 3, "--resume")


def test_weights_that_are_specialised_in_another_way_are_refused(tmp_path, capsys):
    run(tmp_path / "a", "--steps", 1, "--spec", "norms,qkv", "--spec-blocks", 4)
    init = "--init", tmp_path / "a/last.pt", "--out", tmp_path / "b", "--steps", 1
    assert "is specialised already, in another way" in error(*init, "--spec", "norms,qkv", "--spec-blocks", 8)
    run(tmp_path / "b", *init, "--spec", "norms,qkv", "--spec-blocks", 4)
    assert clsspec.load(tmp_path / "b/last.pt").config.spec_blocks == 4
    for flags, words in ((["--spec-blocks", 2], "--spec-blocks: of no use where --spec is left out"),
                         (["--spec-where", "last"], "--spec-where: of no use"),
                         (["--spec-rank", 2], "--spec-rank: of no use"),
                         (["--spec-init", "fresh"], "--spec-init: of no use")):
        assert words in error(*init, *flags)
    capsys.readouterr()
    train.main([*QUICK, "--init", str(tmp_path / "a/last.pt"), "--cls-lr", "2", "--dry-run"])  # it stays what it is
    out = capsys.readouterr().out
    assert "spec norms,qkv\n" in out and "--mlp-ratio" not in out


def test_init_says_what_it_starts_from_and_not_nano(tmp_path, capsys):
    torch.save(clsspec.ViT(clsspec.Config(width=192, depth=2, heads=3, patch=16,
                                          image_size=64)).state_dict(), tmp_path / "w.pth")
    flags = "--init", tmp_path / "w.pth", "--steps"
    run(tmp_path / "a", *flags, 1)
    text = capsys.readouterr().out
    assert f"next: python eval_dense.py {tmp_path / 'w.pth'} {tmp_path / 'a'} --data pairs --root LABELLED (before and after)" in text
    assert ("w.pth: ViT-Ti/16, 2 blocks, 3 heads" in text
            and "all 35 tensors of the backbone used" in text
            and "nano" not in text.replace(str(tmp_path), "")), text
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert (config["args"]["size"], config["args"]["patch"], config["model"]["width"],
            config["model"]["patch"]) == (None, None, 192, 16)
    run(tmp_path / "a", *flags, 2, "--resume")
    sizes = error("--init", tmp_path / "w.pth", "--image-size", 40, "--local-size", 24, "--out", tmp_path / "b")
    assert "--image-size 40 (try 32) and --local-size 24 (try 32): no multiple of the patch, 16 px" in sizes


# No folder, no run: a flag out of range is refused by the parser. With each of the table's rows.
ODD = [(name, value) for rows in train.FLAGS.values() for name, default, span, _ in rows if isinstance(span, tuple)
       for value in ("nan", "inf", "-inf", "x", "", repr(span[0] - 1), repr(span[1] * 2 + 1))]


def test_every_number_has_a_range(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(ODD) > 300
    pairs = {name for rows in train.FLAGS.values() for name, default, *_ in rows if isinstance(default, tuple)}
    for name, value in ODD:
        with pytest.raises(SystemExit) as caught:
            train.main([f"--{name}", value, value] if name in pairs else [f"--{name}={value}"])
        line = capsys.readouterr().err
        assert caught.value.code == 2 and line.count("\n") == 1 and line.startswith(f"error: argument --{name}"), (name, value, line)
    for name in pairs:
        with pytest.raises(SystemExit):
            train.main([f"--{name}", "0.5", "0.2"])
        assert "the wrong way round" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    run(tmp_path / "a", "--steps", 2)
    before = (tmp_path / "a/last.pt").read_bytes()

    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    message = error("--out", tmp_path / "a", "--steps", 4, "--resume")
    assert re.search("at step 4: No space left.*step 2 is intact.*--resume", message), message
    assert (tmp_path / "a/last.pt").read_bytes() == before and not list((tmp_path / "a").glob("*.tmp"))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    real, calls = train.koleo, []
    monkeypatch.setattr(train, "koleo", lambda z: real(z) * (math.nan if calls.append(1) or len(calls) > 6 else 1))
    message = error("--out", tmp_path / "a", "--steps", 8, "--save-every", 2, "--log-every", 5)
    assert "not finite at step 4" in message and "koleo nan" in message and "dino " in message, message
    state = torch.load(tmp_path / "a/last.pt", weights_only=True)
    assert state["step"] == 2 and all(v.isfinite().all() for v in state["student"].values())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_killed_runs_leave_a_checkpoint_that_loads(tmp_path, number):
    """Signals reach all processes of a terminal or a job, those that read files too."""
    pictures(tmp_path / "set")
    flags = [*QUICK, "--steps", 100_000, "--save-every", 1, "--out", tmp_path / "a", "--data",
             tmp_path / "set", "--workers", 2]
    job = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *map(str, flags)], text=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
                           env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    end = time.time() + 120
    while not (tmp_path / "a/last.pt").exists() and time.time() < end:
        time.sleep(0.05)
    time.sleep(1)
    os.killpg(job.pid, number)
    said = job.communicate(timeout=60)[1]
    assert job.returncode == (-number if number == signal.SIGKILL else 128 + number)
    step = torch.load(tmp_path / "a/last.pt", weights_only=True)["step"]
    assert step >= 1
    if number != signal.SIGKILL:
        assert f"stopped by {number.name}; step {step} is saved, go on with --resume" in said
        assert "Traceback" not in said and logged(tmp_path / "a")[-1]["step"] == step


def test_the_death_of_a_rank_ends_the_others_in_one_line(tmp_path, dead=1):
    """As a scheduler's or the system's SIGKILL for want of memory."""
    jobs = start(*QUICK, "--steps", 100_000, "--save-every", 1, "--out", tmp_path / "a", ranks=2)
    end = time.time() + 120
    while not (tmp_path / "a/last.pt").exists() and time.time() < end:
        time.sleep(0.05)
    jobs[dead].kill()
    said = jobs[1 - dead].communicate(timeout=60)[0]
    jobs[dead].communicate()
    assert jobs[1 - dead].returncode == 1 and "Traceback" not in said, said
    assert said.splitlines()[-1].startswith("error: another process of this run has ended; its own message says why"), said
    assert torch.load(tmp_path / "a/last.pt", weights_only=True)["step"] >= 1


@pytest.mark.parametrize("err, code", [(ValueError("full disk"), 1), (train.Stopped(15, False), 143), (SystemExit(130), 130)])
def test_a_rank_that_fails_on_a_gpu_does_not_wait_for_the_others(monkeypatch, err, code):
    """NCCL's would wait for the failed one, and nobody would be told why."""
    last, left = [], []
    monkeypatch.setattr(train.atexit, "register", last.append)
    monkeypatch.setattr(train.os, "_exit", left.append)
    monkeypatch.setattr(train.dist, "destroy_process_group", lambda: left.append("together"))
    with pytest.raises(type(err)):
        try:
            raise err
        finally:
            train.leave_group("cuda")
    last[0]()
    train.leave_group("cuda")
    assert left == [code, "together"]


def test_dry_run_shows_the_papers_set_up_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(["--scale", "large", "--spec", "norms,qkv", "--dry-run", "--device", "cpu"])
    out = capsys.readouterr().out
    for words in ("scale large", "625000 steps", "K = 131072", "[CLS] copies", "peak", "logits 7.8"):
        assert words in out
    assert not list(tmp_path.iterdir())


def test_dry_run_names_a_plain_network_of_as_many_parameters(capsys):
    nano = ["--scale", "nano", "--device", "cpu"]
    spec = ["--spec", "norms,qkv", "--spec-blocks", "4"]
    train.main([*nano, *spec, "--dry-run"])
    ratio = re.search(r"--mlp-ratio ([\d.]+)", capsys.readouterr().out)[1]
    assert ratio == "2.535"  # as README and the study have it
    wide, specialised = (clsspec.parameters(train.Network(train.parse([*nano, *flags])).backbone)[0]
                         for flags in (["--mlp-ratio", ratio], spec))
    assert wide == pytest.approx(specialised, rel=2e-3)


def test_bench_times_both_networks_in_turns_and_leaves_nothing(tmp_path, ranks=2):
    out = script(*QUICK, "--class-attn", 2, "--bench", 3, cwd=tmp_path, ranks=ranks)
    rows = {line[:14].strip(): line[14:].split() for line in out.splitlines() if "[" in line and "quartiles" not in line}
    assert (list(rows) == ["as given", "plain", "plain again", "views alone"]
            and rows["plain"][2:] == ["1.000", "[1.000,", "1.000]"])
    ms, speed = float(rows["plain"][0]), float(rows["plain"][1])
    assert ms * speed == pytest.approx(1000 * 4 * ranks, rel=0.02)
    assert not list(tmp_path.iterdir())


def test_bench_compares_what_it_says(monkeypatch, capsys, tmp_path):
    """As given with its variant, plain without, plain again the very same network; labels have views of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(clsspec.SIZES, "nano", (64, 2, 1, 8))
    calls, real = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda args, learner, *rest: (
        calls.append((id(learner), args.attn, args.spec, rest[-3])) or real(args, learner, *rest)))
    read, counted, counter = [], [], train.FlopCounterMode
    monkeypatch.setattr(train, "peak_mb", lambda cuda: read.append(len(calls)) or 0.0)
    monkeypatch.setattr(train, "FlopCounterMode", lambda **how: counted.append(len(calls)) or counter(**how))
    train.main([*QUICK, "--attn", "entmax15", "--spec", "norms", "--bench", "2"])
    assert read == [4] and counted == [14]  # memory is read before the second network, FLOPs are counted after all else
    given, plain = calls[0][:3], calls[4][:3]
    assert given[1:] == ("entmax15", ("norms",)) and plain[1:] == ("softmax", ())
    assert [c[:3] for c in calls[:8]] == [given] * 4 + [plain] * 4
    for step, turn in ((4, calls[8:11]), (5, calls[11:14])):  # equal work in a round
        assert sorted(c[:3] for c in turn) == sorted([given, plain, plain]) and {c[3] for c in turn} == {step}
    torch.manual_seed(0)
    torch.save(train.Network(train.parse(QUICK)).backbone.state_dict(), "w.pth")
    train.main([*QUICK, "--init", "w.pth", "--spec", "norms", "--bench", "1"])
    assert [c[2] for c in calls[-4:-1]].count(()) == 2  # plain is plain then, too
    train.main([*QUICK, *LABELS, "--bench", "1"])
    assert "views alone" in capsys.readouterr().out
    run(Path("spec"), "--spec", "norms", "--steps", "1")
    for flags in ([], ["--spec", "norms"]):
        assert "the weights in spec/last.pt are specialised" in error(*flags, "--init", "spec/last.pt", "--bench", "1")
