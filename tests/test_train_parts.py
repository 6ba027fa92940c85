"""What train.py is made of: losses against loops written from their formulas, views, masks, networks."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch.utils.flop_counter import FlopCounterMode

import train
from conftest import QUICK


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
    args = train.parse(["--scale", "large", "--recipe", "dino"])
    assert train.schedule(args, 12_510, 32)["lr"] == pytest.approx(5e-4 * 4)  # linear in the batch: 1024 / 256


# --- views and masks ---------------------------------------------------------------------------------


def plain_u(n, **columns):
    """Uniform numbers that make a view without jitter, flip, blur, grey, solarise; then changes."""
    u = torch.full((n, 16), 0.999)
    for column, value in columns.items():
        u[:, int(column[1:])] = value
    return u


def still(img, size, **columns):
    out = train.view(img, plain_u(len(img), **{"c1": 0.5} | columns), size, (1.0, 1.0), 0.0, 0.0, 2.0)
    return out * torch.tensor(train.eval_dense.STD)[:, None, None] + torch.tensor(train.eval_dense.MEAN)[:, None, None]


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


def test_masks_hide_the_share_they_should_in_blocks():
    args = train.parse(["--scale", "large"])
    mask = train.make_masks(args, 200, 14, 0, 0, 1)
    share = mask.float().mean(1)
    assert mask.shape == (400, 256) and (share > 0).sum() == 200 and share.max() <= 0.5
    assert share[share > 0].mean().item() == pytest.approx(0.3, abs=0.03)
    grid = mask[share > 0].view(-1, 16, 16)
    neighbours = (grid[:, 1:] & grid[:, :-1]).sum() / grid.sum()
    assert neighbours > 0.7  # scattered patches of the same number: about 0.3


def test_batches_are_epochs_of_all_pictures():
    seen = torch.cat([train.batch_index(10, 3, seed=0, step=s) for s in range(3)])
    assert len(set(seen.tolist())) == 9
    assert not torch.equal(train.batch_index(10, 3, 0, 0), train.batch_index(10, 3, 0, 3))
    assert not torch.equal(train.batch_index(10, 3, 0, 0), train.batch_index(10, 3, 1, 0))


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
    terms, meters = train.compare(args, student, teacher, *train.make_views(args, img, 0, 0, 1), mask, 0.04)
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
        found[centring] = train.compare(args, student, teacher, *train.make_views(args, img, 0, 0, 1), None, 0.04)[1]["usage"]
    assert found["sinkhorn"] == pytest.approx(1, abs=0.02) and 0 < found["ema"] <= math.log(3) / math.log(16) + 1e-4


def test_the_moving_centre_is_for_large_scales():
    kind = lambda *flags: train.parse(["--recipe", "dino", *flags]).centring
    assert [kind("--scale", scale) for scale in train.SCALES] == ["ema", "sinkhorn", "sinkhorn"]
    assert kind("--scale", "nano", "--centring", "ema") == "ema"


def test_teacher_sees_whole_global_views_only():
    args, student, teacher = networks()
    seen = []
    teacher.backbone.register_forward_pre_hook(lambda m, a: seen.append(a))
    img = torch.randint(0, 255, (4, 3, 32, 32), dtype=torch.uint8)
    train.compare(args, student, teacher, *train.make_views(args, img, 0, 0, 1), train.make_masks(args, 4, 8, 0, 0, 1), 0.04)
    assert len(seen) == 1 and seen[0][0].shape == (8, 3, 32, 32) and seen[0][1] is None


def test_teacher_skips_no_branch():
    args, student, teacher = networks("--drop-path", "0.5")
    img = torch.randn(4, 3, 32, 32)
    assert torch.equal(teacher.backbone(img)["cls"], teacher.backbone(img)["cls"])
    assert not torch.equal(student.backbone(img)["cls"], student.backbone(img)["cls"])


def test_no_weight_decay_on_biases_norms_and_layerscale():
    _, student, _ = networks("--spec", "norms,qkv", "--spec-blocks", "1", "--layerscale", "0.1", "--head-layers", "2")
    names = {id(p): n.removeprefix("backbone.") for n, p in student.named_parameters()}
    groups = train.make_optimizer(train.parse([]), student).param_groups
    found = {names[id(p)]: group for group in groups for p in group["params"]}
    assert found.keys() == set(names.values())
    decayed = {n for n, group in found.items() if not group["free"] and not n.startswith("blocks")}
    heads = {f"{h}_head.{w}" for h in ("cls", "patch") for w in ("last", "mlp.0.weight", "mlp.3.weight")}
    assert decayed == {"cls_token", "mask_token", "pos_embed", "patch_embed.proj.weight"} | heads
    in_blocks = {n.partition(".")[2].partition(".")[2] for n, group in found.items() if not group["free"] and n.startswith("blocks")}
    assert in_blocks == {f"{n}.weight" for n in ("attn.qkv", "attn.qkv.cls", "attn.qkv.patch", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert {n for n, group in found.items() if group["kind"] == "last"} == {"cls_head.last", "patch_head.last"}


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
    u = plain_u(2, c1=0.5, c12=0.5, c7=0.99, c8=torch.tensor([1.0, 0.5]), c9=0.5, c10=0.5, c11=1.0)  # c11 would turn the hue
    out = train.view(img, u, 8, (1.0, 1.0), 0.0, 0.0, 2.0, three=True)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    bright, same = out * std + mean
    torch.testing.assert_close(same, img[1], atol=1e-4, rtol=0)
    torch.testing.assert_close(bright[1:], 1.3 * img[0, 1:], atol=1e-4, rtol=0)
    torch.testing.assert_close(bright[0], 1 - 1.3 * img[0, 0], atol=1e-4, rtol=0)  # 0.65: solarised


@pytest.mark.parametrize("mixup, cutmix", [(0, 0), (0.8, 0), (0, 1.0), (0.8, 1.0)])
def test_targets_are_what_is_in_the_mixture(mixup, cutmix):
    args = train.parse(QUICK + ["--recipe", "deit3", "--mixup", str(mixup), "--cutmix", str(cutmix), "--colour", "0"])
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


@pytest.mark.parametrize("flags", [[], ["--recipe", "dino"], ["--recipe", "deit3"]], ids=str)
def test_flops_of_a_step_are_those_that_torch_counts(flags, monkeypatch):
    args = train.parse([*QUICK, "--prototypes", "65536", *flags])
    args.classes = 65536  # so that heads are most of the step
    torch.manual_seed(0)
    student = train.Network(args)
    teacher, optimizer = train.make_teacher(student), train.make_optimizer(args, student)
    img, labels = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8), torch.zeros(4, dtype=torch.long)
    fused = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)  # countable
    with FlopCounterMode(display=False) as counter, fused:
        train.train_step(args, student, teacher, optimizer, img, labels, 1)
    if args.ibot:  # four small pictures hide fewer patches than are expected of many
        hidden = train.make_masks(args, 4, student.backbone.config.patch, 1, 0, 1).sum().item() / 4
        monkeypatch.setattr(train, "masked", lambda args, patch: hidden)
    # Counted by torch alone: views, KoLeo.
    assert train.step_flops(args, student) * 4 == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_as_many_patches_are_masked_as_the_estimate_says():
    args = train.parse([*QUICK, "--image-size", "224", "--local-size", "96", "--patch", "14"])
    hidden = sum(train.make_masks(args, 32, 14, step, 0, 1).sum().item() for step in range(5)) / (32 * 5)
    assert hidden == pytest.approx(train.masked(args, 14), rel=0.05)


@pytest.mark.parametrize("flags, name", [
    ([], "dinov2-nano-plain-s0"), (["--spec", "norms,qkv", "--seed", "3"], "dinov2-nano-norms-qkv-s3"),
    (["--spec", "qkv", "--spec-blocks", "8", "--data", "at/photos"], "dinov2-nano-photos-qkv-8blocks-s0"),
    (["--recipe", "dino", "--init", "at/weights.pth"], "dino-nano-weights-plain-s0")], ids=str)
def test_name_of_a_run(flags, name):
    assert train.parse(["--scale", "nano", *flags]).out == Path("runs") / name


def test_defaults_are_those_of_the_device_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = [(a.device, a.scale, a.precision) for a in map(train.parse, ([], ["--device", "cpu"]))]
    assert found == [("cuda", "small", "bf16"), ("cpu", "nano", "fp32")]
