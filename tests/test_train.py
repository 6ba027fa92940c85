"""Losses against loops written from their formulas; the run itself: order, resume, ranks, signals, bad input."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision

import clsspec
import train

ROOT = Path(__file__).parent.parent
# A run of seconds: every part of the default, small.
QUICK = ["--scale", "nano", "--device", "cpu", "--pictures", "16", "--batch-size", "4", "--image-size", "32",
         "--source-size", "32", "--local-size", "16", "--local-crops", "1", "--prototypes", "16", "--hidden", "16", "--log-every", "1",
         "--no-probe", "--steps", "4"]


def script(*flags, ranks=1, code=0, **more):
    """Run train.py as a user does; returns what it printed. Several ranks: as torchrun starts them."""
    port = str(20000 + os.getpid() % 20000)
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    jobs = []
    for rank in range(ranks):
        dist = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port} if ranks > 1 else {}
        jobs.append(subprocess.Popen([sys.executable, str(ROOT / "train.py"), *map(str, flags)], env=env | dist,
                                     stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more))
    outputs = [job.communicate(timeout=170)[0] for job in jobs]
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


def logged(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# --- losses ------------------------------------------------------------------------------------------


def softmax(row):
    e = [math.exp(v - max(row)) for v in row]
    return [v / sum(e) for v in e]


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
    return args, student, train.make_teacher(args, student)


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
    _, student, _ = networks("--spec", "norms,qkv", "--layerscale", "0.1")
    names = {id(p): n for n, p in student.named_parameters()}
    args = train.parse([])
    for group in train.make_optimizer(args, student).param_groups:
        for p in group["params"]:
            n = names[id(p)]
            assert group["free"] == (n.endswith("bias") or "norm" in n or "gamma" in n), n
            assert (group["kind"] == "last") == n.endswith("head.last")


# --- runs --------------------------------------------------------------------------------------------


def test_a_run_leaves_what_it_should_and_its_checkpoint_loads(tmp_path):
    state = run(tmp_path / "a", "--spec", "norms,qkv", "--spec-blocks", 8)
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["args"]["spec"] == ["norms", "qkv"] and config["model"]["spec_blocks"] == 8 and config["torch"]
    lines = logged(tmp_path / "a")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    keys = {"step", "epoch", "loss", "dino", "ibot", "koleo", "entropy", "kl", "cls_std", "lr", "wd", "ema", "temp",
            "grad_norm", "img_per_s", "peak_mb", "skipped"}
    assert keys <= lines[0].keys() and all(math.isfinite(line["loss"]) for line in lines)
    model = clsspec.load(tmp_path / "a/last.pt")
    for name, value in model.state_dict().items():
        assert torch.equal(value, state["teacher"][f"backbone.{name}"])
    assert not list((tmp_path / "a").glob("*.tmp"))


@pytest.mark.parametrize("flags", [["--precision", "bf16"], ["--checkpointing"], ["--recipe", "dino"],
                                   ["--no-separate-head"], ["--mask-share", "0"], ["--head-norm", "none"]])
def test_other_ways_to_run(tmp_path, flags):
    run(tmp_path / "a", "--spec", "norms,qkv,proj,mlp,final", "--layerscale", "0.1", "--steps", 2, *flags)
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in logged(tmp_path / "a"))


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
    parts = run(tmp_path / "parts", *flags, "--resume")
    for part in ("student", "teacher", "optimizer", "step", "model"):
        assert same(whole[part], parts[part]), part
    drop = ("img_per_s", "peak_mb")
    strip = lambda lines: [{k: v for k, v in line.items() if k not in drop} for line in lines]
    assert strip(logged(tmp_path / "whole")) == strip(logged(tmp_path / "parts"))


@pytest.mark.parametrize("recipe", ["dinov2", "dino"])
def test_two_ranks_equal_one_process_with_the_double_batch(tmp_path, recipe):
    flags = [*QUICK, "--recipe", recipe, "--spec", "norms,qkv", "--steps", 3, "--centring",
             "sinkhorn" if recipe == "dinov2" else "ema"]
    script(*flags, "--batch-size", 8, "--out", tmp_path / "one")
    script(*flags, "--batch-size", 4, "--out", tmp_path / "two", ranks=2)
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert len(one) == len(two) == 3
    for a, b in zip(one, two):
        for key in ("lr", "grad_norm", "epoch"):
            assert a[key] == pytest.approx(b[key], rel=2e-3), key
    a, b = (torch.load(tmp_path / n / "last.pt", weights_only=True)["teacher"] for n in ("one", "two"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-4, rtol=1e-3, msg=name)


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
    assert same(listed["student"], states[0]["student"])


def test_loss_falls_and_meters_are_quiet(tmp_path):
    run(tmp_path / "a", "--steps", 60, "--lr", "3e-3", "--pictures", 8, "--batch-size", 8, "--log-every", 10)
    lines = logged(tmp_path / "a")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    assert lines[-1]["entropy"] < 0.98 and lines[-1]["cls_std"] > 0.2


# --- when things go wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize("flags, words", [
    (["--spec", "norm"], "unknown component 'norm'"), (["--spec", "qkv", "--spec-blocks", 13], "outside 0 to 12"),
    (["--image-size", 36], "no multiple of the patch"), (["--local-size", 18], "--local-size 18.*try 16"),
    (["--batch-size", 17], "17 pictures is larger than the set.*has 16"), (["--batch-size", 1], "KoLeo needs a neighbour"),
    (["--data", "nowhere"], "--data nowhere: neither"), (["--resume", "--out", "nowhere"], "there is no nowhere/last.pt")])
def test_bad_flags_are_one_clear_line(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = error(*flags)
    assert message.startswith("error: ")
    assert re.search(words, message), message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flags", [["--recipe", "simclr"], ["--size", "giant"], ["--centring", "none"]])
def test_unknown_names_list_the_known_ones(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        train.main([*QUICK, *flags])
    assert caught.value.code == 2 and "choose from" in capsys.readouterr().err


def test_folders_without_a_readable_picture(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no picture" in error("--data", tmp_path / "empty", "--out", tmp_path / "r")
    for i in range(16):
        (tmp_path / f"empty/{i}.jpg").write_text("no")
    for workers in (0, 2):
        message = error("--data", tmp_path / "empty", "--out", tmp_path / "r", "--workers", workers)
        assert "none of its 16 files is a readable picture" in message


def test_runs_are_never_overwritten_or_mixed_by_accident(tmp_path):
    before = run(tmp_path / "a", "--steps", 2)
    assert "holds a run already" in error("--out", tmp_path / "a", "--steps", 2)
    assert "is of another run: it has --lr" in error("--out", tmp_path / "a", "--steps", 2, "--resume", "--lr", 0.5)
    assert same(torch.load(tmp_path / "a/last.pt", weights_only=True)["student"], before["student"])
    torch.save({"something": 1}, tmp_path / "a/last.pt")
    assert "not a checkpoint of train.py" in error("--out", tmp_path / "a", "--steps", 2, "--resume")
    with pytest.raises(ValueError, match="not a checkpoint of this project"):
        clsspec.load(tmp_path / "a/last.pt")
    assert run(tmp_path / "a", "--overwrite", "--steps", 1)["step"] == 1


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    run(tmp_path / "a", "--steps", 2)
    before = (tmp_path / "a/last.pt").read_bytes()

    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ValueError, match="No space left.*the one before is intact.*--resume"):
        train.save(tmp_path / "a/last.pt", {"step": 3})
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
    flags = [*QUICK, "--steps", 100_000, "--save-every", 1, "--out", tmp_path / "a"]
    if number == signal.SIGINT:  # from a terminal: the workers get it too
        pictures(tmp_path / "set")
        flags += ["--data", tmp_path / "set", "--workers", 2]
    job = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *map(str, flags)], text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
                           env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    end = time.time() + 120
    while not (tmp_path / "a/last.pt").exists() and time.time() < end:
        time.sleep(0.05)
    time.sleep(1)
    os.killpg(job.pid, number)
    out = job.communicate(timeout=60)[0]
    assert job.returncode == (-number if number == signal.SIGKILL else 128 + number)
    step = torch.load(tmp_path / "a/last.pt", weights_only=True)["step"]
    assert step >= 1
    if number != signal.SIGKILL:
        assert "--resume" in out and logged(tmp_path / "a")[-1]["step"] == step


def test_dry_run_shows_the_papers_set_up_and_leaves_nothing(tmp_path):
    out = script("--scale", "large", "--spec", "norms,qkv", "--dry-run", cwd=tmp_path)
    for words in ("scale large", "625000 steps", "K = 131072", "[CLS] copies", "peak"):
        assert words in out
    assert not list(tmp_path.iterdir())
