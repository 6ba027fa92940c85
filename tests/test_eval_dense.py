"""Metrics, losses and heads against loops; probes on features that know or do not; data sets on disk; the commands."""

import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import urllib.error
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clsspec
import eval_dense
import train
from conftest import ROOT, save_map
from eval_dense import PROTOCOLS, Head, Protocol
from scenes import Scenes

CPU = torch.device("cpu")


# --- metrics and losses ------------------------------------------------------------------------------


def test_iou_equals_a_loop_with_ignored_pixels_and_absent_classes():
    torch.manual_seed(0)
    predicted, truth = torch.randint(0, 4, (3, 8, 8)), torch.randint(0, 3, (3, 8, 8))
    predicted[0, 0] = 1
    truth[torch.rand(truth.shape) < 0.2] = 255
    counts = eval_dense.confusion(predicted, truth.to(torch.uint8), 5)
    assert counts.shape == (3, 5, 5)
    for b in range(3):
        for t in range(5):
            for p in range(5):
                assert counts[b, t, p] == ((predicted[b] == p) & (truth[b] == t)).sum()
    expected = []
    for c in range(5):
        pairs = [(p, t) for p, t in zip(predicted.flatten().tolist(), truth.flatten().tolist()) if t != 255]
        both, either = sum(p == c and t == c for p, t in pairs), sum(p == c or t == c for p, t in pairs)
        expected.append(100 * both / either if either else math.nan)
    ours = (100 * eval_dense.class_iou(counts.sum(0))).tolist()
    assert ours == pytest.approx(expected, nan_ok=True) and math.isnan(ours[4]) and ours[3] == 0
    score = lambda c, weight=None: eval_dense.scores({"picture": torch.ones(3), "counts": c}, weight)["miou"].item()
    assert score(counts) == pytest.approx(sum(expected[:4]) / 4)
    assert score(counts, torch.tensor([[2.0, 0, 1]]).double()) == pytest.approx(score(counts[[0, 0, 2]]))


def test_depth_errors_are_their_formulas_per_picture():
    torch.manual_seed(0)
    p, t = torch.rand(3, 4, 5) + 0.5, torch.rand(3, 4, 5) + 0.5
    t[0, 0], t[2] = 0, 0
    ours = eval_dense.depth_errors(p, t)
    for b in range(2):
        pairs = [(a, c) for a, c in zip(p[b].flatten().tolist(), t[b].flatten().tolist()) if c > 0]
        n = len(pairs)
        assert ours["rmse"][b].item() == pytest.approx(math.sqrt(sum((a - c) ** 2 for a, c in pairs) / n))
        assert ours["absrel"][b].item() == pytest.approx(sum(abs(a - c) / c for a, c in pairs) / n)
        assert ours["delta1"][b].item() == pytest.approx(100 * sum(max(a / c, c / a) < 1.25 for a, c in pairs) / n)
    assert all(v[2].isnan() for v in ours.values())
    scores = eval_dense.scores({"picture": torch.ones(3), **ours})
    assert scores["rmse"].item() == pytest.approx(ours["rmse"][:2].mean().item())


def test_silog_is_its_formula_on_valid_pixels():
    predicted, truth = torch.rand(2, 4, 4) + 0.5, torch.rand(2, 4, 4) + 0.5
    truth[0, 0] = 0
    g = [math.log(p) - math.log(t) for p, t in zip(predicted.flatten().tolist(), truth.flatten().tolist()) if t > 0]
    mean = sum(g) / len(g)
    expected = math.sqrt(sum((v - mean) ** 2 for v in g) / len(g) + 0.15 * mean**2)
    assert eval_dense.silog(predicted, truth).item() == pytest.approx(expected, rel=1e-4)
    assert (eval_dense.silog(2 * truth.clamp(min=0.1), truth).item()
            == pytest.approx(math.sqrt(0.15) * math.log(2), rel=1e-3))
    nothing = eval_dense.silog(predicted.requires_grad_(), torch.zeros_like(truth))
    nothing.backward()
    assert nothing.item() == 0 and predicted.grad.abs().max() == 0


def test_cross_entropy_ignores_255_and_survives_a_batch_of_it():
    logits, mask = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    mask[0] = 255
    terms = [-F.log_softmax(logits[1, :, i, j], 0)[mask[1, i, j]].item() for i in range(4) for j in range(4)]
    batch = {"mask": mask.to(torch.uint8)}
    assert eval_dense.head_loss("seg", logits, batch).item() == pytest.approx(sum(terms) / 16, rel=1e-5)
    assert eval_dense.head_loss("seg", logits, {"mask": torch.full_like(batch["mask"], 255)}).item() == 0


def test_knn_equals_brute_force():
    torch.manual_seed(0)
    x, labels, test = torch.randn(40, 64), torch.randint(0, 3, (40,)), torch.randn(30, 64)  # far neighbours count, too
    for i, guess in enumerate(eval_dense.knn(x, labels, test, 3).tolist()):
        cosine = [F.cosine_similarity(test[i], row, dim=0).item() for row in x]
        votes = [0.0] * 3
        for j in sorted(range(40), key=lambda j: -cosine[j])[:20]:
            votes[labels[j]] += math.exp(cosine[j] / 0.07)
        assert guess == votes.index(max(votes))


def test_linear_reads_what_is_there_and_chooses_the_input_that_has_it(monkeypatch):
    torch.manual_seed(0)
    seen, fit = [], eval_dense.softmax_regression
    monkeypatch.setattr(eval_dense, "softmax_regression", lambda x, *rest: seen.append(len(x)) or fit(x, *rest))
    labels, test = torch.randint(0, 3, (300,)), torch.randint(0, 3, (100,))
    features = lambda y: torch.cat([torch.randn(len(y), 4), F.one_hot(y, 4) + 0.1 * torch.randn(len(y), 4)], 1)
    guess, chosen = eval_dense.linear(features(labels), labels, features(test), 3)
    assert (guess == test).float().mean() > 0.99 and chosen.startswith("[CLS] and mean patch")
    assert set(seen[:-1]) == {240} and seen[-1] == 300  # chosen on a fifth, then trained on all
    guess, _ = eval_dense.linear(torch.randn(300, 8), labels, torch.randn(100, 8), 3)
    assert (guess == test).float().mean() < 0.55


def test_softmax_regression_ends_where_its_loss_has_no_slope():
    torch.manual_seed(0)
    x, y = F.pad(torch.randn(50, 4), (0, 1), value=1), torch.randint(3, (50,))
    w = eval_dense.softmax_regression(x, y, torch.zeros(5, 3), 0.1)
    slope = x.T @ ((x @ w).softmax(1) - F.one_hot(y, 3)) / 50 + 0.1 * F.pad(w[:-1], (0, 0, 0, 1))  # no penalty on the bias
    assert slope.abs().max() < 1e-3


def test_linear_is_chosen_on_pictures_that_it_has_not_seen():
    """[CLS] tells, the mean patch is loud noise: who sees the held-out pictures prefers to learn the noise by heart."""
    torch.manual_seed(0)
    kind = torch.randint(0, 2, (60,))
    labels = torch.where(torch.arange(60) < 9, 1 - kind, kind)  # some are wrong
    x = torch.cat([F.one_hot(kind, 60).float(), torch.randn(60, 60)], 1)
    assert eval_dense.linear(x, labels, x, 2)[1].startswith("[CLS], penalty")


def test_rows_and_columns_that_the_loss_looks_at_are_those_of_the_labels(monkeypatch):
    seen = []

    def positions(self, x, rows, columns):  # of the looked-at pixels, in patches, as interpolation has them
        lines = (rows @ torch.arange(4.0))[:, None] + 10 * (columns @ torch.arange(6.0))
        return self.linear.weight.sum() * 0 + lines.expand(len(x), -1, -1)

    def look(task, out, batch):
        seen.append((out.detach()[0], batch["depth"][0]))
        return out.sum()

    monkeypatch.setattr(Head, "forward", positions)
    monkeypatch.setattr(eval_dense, "head_loss", look)
    row, column = (torch.arange(8 * n)[:, None] for n in (4, 6))
    at = lambda i, n: ((i + 0.5) / 8 - 0.5).clamp(0, n - 1)
    depth = at(row, 4) + 10 * at(column.T, 6)
    cache = {"x": torch.zeros(3, 4, 6, 5), "depth": depth.expand(3, -1, -1)}
    p, schedules, schedule = replace(SHORT, tasks=("depth",), iterations=20), [], torch.optim.lr_scheduler.LambdaLR
    monkeypatch.setattr(torch.optim.lr_scheduler, "LambdaLR", lambda o, f: schedules.append(f) or schedule(o, f))
    eval_dense.train_heads(Oracle(), eval_dense.Pictures(memory=cache), torch.arange(3), p, 0)
    for out, truth in seen:
        assert out.shape == (8, 12)
        torch.testing.assert_close(out, truth)
    assert len({truth[2, 2].item() for _, truth in seen}) > 5
    assert [schedules[0](t) for t in (0, 1, 11, 19)] == pytest.approx([0.5, 1, 0.5, 1 / 18])  # up in a tenth, down to 0


def test_difference_is_paired_over_pictures():
    torch.manual_seed(0)
    hard = 5 * torch.rand(200)  # pictures differ far more than models do
    a = {"picture": torch.ones(200), "rmse": hard}
    b = {"picture": torch.ones(200), "rmse": hard - 0.1 + 0.02 * torch.randn(200)}
    d, low, high = eval_dense.difference(a, b)["rmse"]
    assert d == pytest.approx(-0.1, abs=0.01) and low < d < high and high - low < 0.02
    assert eval_dense.difference(a, a)["rmse"] == (0, 0, 0)
    few = {name: torch.cat([value[:2], math.nan * value[2:]]) for name, value in b.items()} | {"picture": torch.ones(200)}
    d, low, high = eval_dense.difference(few, few | {"rmse": few["rmse"] + 1})["rmse"]  # some draws have neither of the two
    assert (d, low, high) == pytest.approx((1, 1, 1))
    one = eval_dense.difference(*({name: value[:1] for name, value in x.items()} for x in (a, b)))["rmse"]
    assert math.isnan(one[1]) and math.isnan(one[2]) and not math.isnan(one[0])


# --- heads -------------------------------------------------------------------------------------------


def test_head_is_linear_then_interpolated_and_depth_an_expectation():
    torch.manual_seed(0)
    x, size = torch.randn(2, 3, 4, 6), (24, 20)
    rows, columns = (eval_dense.bilinear(n, m, CPU) for n, m in zip((3, 4), size))
    up = lambda v: F.interpolate(v, size=size, mode="bilinear", align_corners=False)
    seg, depth = (Head(t, 6, 5, 10.0, bins=8).eval() for t in ("seg", "depth"))
    flat = lambda head: head.linear(head.norm(x.reshape(-1, 6))).view(2, 3, 4, -1)
    torch.testing.assert_close(seg(x, rows, columns), up(flat(seg).permute(0, 3, 1, 2)))
    weight = flat(depth).relu() + 0.1
    expected = sum(weight[..., k] / weight.sum(-1) * (1e-3 + k * (10 - 1e-3) / 7) for k in range(8))
    torch.testing.assert_close(depth(x, rows, columns), up(expected[:, None])[:, 0])
    # Some rows and columns are those of the whole.
    torch.testing.assert_close(seg(x, rows[1::4], columns[3::4]), seg(x, rows, columns)[..., 1::4, 3::4])


class Oracle(torch.nn.Module):
    """A backbone of patch 8 whose patches say the class of what they see (red = 50 x class), or only noise."""

    def __init__(self, knows=True):
        super().__init__()
        self.config, self.knows = types.SimpleNamespace(patch=8, width=5, depth=1, heads=1,
                                                        mlp_ratio=4.0, attn="softmax"), knows
        self.nothing = torch.nn.Parameter(torch.zeros(1))
        self.draw = torch.Generator().manual_seed(0)

    def forward(self, img, layers=()):
        red = F.avg_pool2d((img[:, :1] * 0.229 + 0.485) * 255 / 50, 8).flatten(1)
        one = F.one_hot(red.round().long().clamp(0, 4), 5).float()
        patches = one if self.knows else torch.randn(one.shape, generator=self.draw)
        return {"patches": patches, "cls": patches.mean(1)}


def tree(at, train=24, val=8, size=(32, 48), kinds=("masks", "depth"), classes=4):
    """The `pairs` layout: blocks of 16 pixels of a class, red = 50 x class, depth = class + 1 metres."""
    draw = torch.Generator().manual_seed(0)
    for split, n in (("train", train), ("val", val)):
        for kind in ("images", *kinds):
            (at / kind / split).mkdir(parents=True)
        for i in range(n):
            c = torch.randint(0, classes, [s // 16 for s in size], generator=draw)
            c = c.repeat_interleave(16, 0).repeat_interleave(16, 1)
            img = torch.stack([50 * c, 0 * c, 0 * c], -1).to(torch.uint8)
            Image.fromarray(img.numpy()).save(at / f"images/{split}/{i}.png")
            mask, depth = c.to(torch.uint8).clone(), ((c + 1) * 1000).to(torch.uint16).clone()
            mask[:2], depth[:2] = 255, torch.zeros(1, dtype=torch.uint16)
            if "masks" in kinds:
                Image.fromarray(mask.numpy()).save(at / f"masks/{split}/{i}.png")
            if "depth" in kinds:
                Image.fromarray(depth.numpy()).save(at / f"depth/{split}/{i}.png")
    return at


SHORT = replace(PROTOCOLS["pairs"], iterations=250, batch_size=8)


@pytest.mark.parametrize("how", [{}, {"crop": 32, "window": 32}, {"flip": True}, {"cat_cls": True, "lr": (1e-2, 1e-6)}],
                         ids=str)
def test_probes_on_features_that_know(tmp_path, how):
    p = replace(SHORT, **how)
    result, stats, _ = eval_dense.evaluate(Oracle(), "pairs", str(tree(tmp_path / "t")), p)
    # Where four blocks meet, interpolated logits round the corner; in scaled crops patches see several blocks.
    assert result["miou"] > (90 if p.crop else 96) and result["rmse"] < 0.7 and result["delta1"] > 75
    assert list(result["iou"]) == list("0123") and stats["counts"].sum((1, 2)).tolist() == [30 * 48] * 8
    if "lr" in how:
        assert result["chosen"] == {"seg": "lr 0.01", "depth": "lr 0.01"}


def test_probes_on_noise_stay_at_chance(tmp_path):
    result = eval_dense.evaluate(Oracle(False), "pairs", str(tree(tmp_path / "t")), SHORT)[0]
    assert result["miou"] < 25 and result["rmse"] > 0.9
    scenes = Protocol(("cls", "knn"), train=200, test=100)
    result = eval_dense.evaluate(Oracle(False), p=scenes)[0]
    assert result["linear"] < 35 and result["knn"] < 35  # six kinds


def test_same_seed_same_numbers_and_the_random_state_is_left_alone(tmp_path):
    at, p = str(tree(tmp_path / "t")), replace(SHORT, iterations=5)
    torch.manual_seed(5)
    first = eval_dense.evaluate(Oracle(), "pairs", at, p)[0]
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    # Without stored features, and with processes that read: the same.
    again, other = (eval_dense.evaluate(Oracle(), "pairs", at, replace(p, seed=s), workers=2, cache_gib=0.0)[0]
                    for s in (0, 1))
    assert first["iou"] == again["iou"] and first["rmse"] == again["rmse"] != other["rmse"]


def test_windows_of_a_constant_field_are_the_constant_and_cover_everything():
    head = Head("seg", 5, 3, 1.0).eval()
    constant = Oracle()
    for h, w, window in ((40, 72, 16), (16, 16, 32), (24, 64, 24)):
        img = torch.full((2, 3, h, w), 100, dtype=torch.uint8)
        for flip in (False, True):
            p = replace(SHORT, window=window, flip=flip)
            out = eval_dense.predict(constant, [head], img, (h + 3, w), p)["seg"]
            lines = [eval_dense.bilinear(1, n, CPU) for n in (h + 3, w)]
            expected = head(F.one_hot(torch.full((2, 1, 1), 2), 5).float(), *lines)
            torch.testing.assert_close(out, expected)


def test_windows_are_averaged_where_they_overlap_and_mirrored_ones_turned_back():
    class Columns(Oracle):  # a patch says which column of its window it is in
        def forward(self, img, layers=()):
            n = img.shape[3] // 8
            one = F.one_hot(torch.arange(n).repeat(img.shape[2] // 8), 5).float().expand(len(img), -1, -1)
            return {"patches": one, "cls": one.mean(1)}

    head = Head("depth", 5, 0, 10.0).eval()
    img, p = torch.zeros(1, 3, 8, 32, dtype=torch.uint8), replace(SHORT, window=24)
    whole = lambda m, x, q: eval_dense.predict(m, [head], x, x.shape[2:], q)["depth"][0, 0]
    one = whole(Columns(), img[..., :24], SHORT)
    expected = torch.cat([one[:8], (one[8:] + one[:16]) / 2, one[16:]])  # at 0 and at 8
    torch.testing.assert_close(whole(Columns(), img, p), expected)
    both = whole(Columns(), img[..., :24], replace(SHORT, flip=True))
    torch.testing.assert_close(both, (one + one.flip(0)) / 2)


def test_layers_and_cls_beside_every_patch():
    torch.manual_seed(0)
    model = clsspec.ViT(clsspec.config("nano", image_size=32)).eval()
    img, p = torch.randint(0, 255, (2, 3, 32, 24), dtype=torch.uint8), PROTOCOLS["scenes"]
    x, image = eval_dense.tokens(model, img, p)
    out = model(clsspec.normalise(img / 255))
    torch.testing.assert_close(x.flatten(1, 2), out["patches"])
    torch.testing.assert_close(image, torch.cat([out["cls"], out["patches"].mean(1)], 1))
    both, _ = eval_dense.tokens(model, img, replace(p, cat_cls=True))
    assert both.shape == (2, 4, 3, 128) and torch.equal(both[..., :64], x) and torch.equal(both[:, 1, 2, 64:], out["cls"])
    shallow, _ = eval_dense.tokens(model, img, replace(p, layers=(3,)))
    several, image = eval_dense.tokens(model, img, replace(p, layers=(3, 12), cat_cls=True))
    assert torch.equal(several[..., :128], torch.cat([shallow, x], -1)) and several.shape[-1] == 256 and image.shape[-1] == 256
    model.blocks = model.blocks[:3]
    torch.testing.assert_close(shallow, eval_dense.tokens(model, img, p)[0])


def test_scenes_are_judged_on_others_than_heads_learn_from():
    p = replace(PROTOCOLS["scenes"], train=2, test=2)
    for one, split in zip(eval_dense.open_set("scenes", "", p, 8, CPU), ("probe", "test")):
        assert torch.equal(one.memory["image"], Scenes(split, 64)(torch.arange(2))["image"])


# --- commands ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    at = tmp_path_factory.mktemp("runs")
    flags = "--scale nano --device cpu --pictures 8 --batch-size 4 --steps 2 --no-probe --probe-every 0".split()
    for name, seed in (("a", "0"), ("b", "1")):
        train.main([*flags, "--spec", "norms", "--seed", seed, "--out", str(at / name)])
    return at


FEW = "--train 60 --test 20 --iterations 10 --device cpu".split()


def test_commands_write_what_they_print(runs, capsys):
    a, b = str(runs / "a"), str(runs / "b")
    eval_dense.main([a, b, *FEW, "--save-pictures", "3"])
    out = capsys.readouterr().out
    for name in (a, b):
        results = json.loads((Path(name) / "eval.json").read_text())
        key, = results
        assert key == "teacher scenes iterations=10 train=60 test=20" and f"{name}: {key}" in out
        r = results[key]
        assert set(eval_dense.METRICS) < set(r) and list(r["iou"]) == list(Scenes.classes)
        assert f"miou {r['miou']:.2f} %  rmse {r['rmse']:.3f} m" in out and r["versions"]["torch"] == torch.__version__ and r["seconds"] > 0
        assert r["protocol"]["train"] == 60 and r["protocol"]["height"] == 64 and r["chosen"]["cls"]
        with Image.open(Path(name) / f"{key.replace(' ', '-')}.png") as img:
            assert img.width > 3 * 64 and img.height > 5 * 64 and len(img.getcolors(1 << 20)) > 100
    assert f"minus {a}" in out and out.count("[") >= 6
    eval_dense.main([a, *FEW, "--layers", "3", "--cat-cls", "--tasks", "seg", "--network", "student"])
    results = json.loads((runs / "a/eval.json").read_text())
    student = results["student scenes tasks=seg layers=3 cat_cls=True iterations=10 train=60 test=20"]
    assert len(results) == 2 and "rmse" not in student and "; student, step 2" in student["model"]


def test_a_run_that_has_trained_on_meanwhile_keeps_no_old_number(runs, tmp_path, monkeypatch):
    shutil.copytree(runs / "a", tmp_path / "a")
    evaluate = eval_dense.evaluate
    monkeypatch.setattr(eval_dense, "evaluate", lambda *args, **more: os.utime(tmp_path / "a/last.pt") or evaluate(*args, **more))
    (tmp_path / "a/eval.json").unlink(missing_ok=True)
    eval_dense.main([str(tmp_path / "a"), *FEW[:4], "--tasks", "knn"])
    key, = json.loads((tmp_path / "a/eval.json").read_text())
    assert key.endswith(", has trained on since")


def test_results_of_a_file_stay_out_of_a_run_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert eval_dense.home(Path("runs/a/last.pt")) == Path("runs/a")
    assert eval_dense.home(Path("a.pth")) == Path("runs/a")
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/last.pt").touch()
    assert eval_dense.home(Path("a.pth")) == Path("runs/a-weights")


def test_untrained_is_the_network_at_step_0(runs):
    args = train.parse("--scale nano --device cpu --spec norms --seed 1".split())
    torch.manual_seed(1)
    start = train.Network(args).backbone.state_dict()
    ours = clsspec.load(runs / "b/last.pt", "untrained").state_dict()
    assert start.keys() == ours.keys() and all(torch.equal(v, ours[k]) for k, v in start.items())


def test_online_probe_is_in_the_log_and_the_table_in_eval_json(tmp_path, monkeypatch, capsys):
    few = dict(train=40, test=20, iterations=5)
    monkeypatch.setattr(train, "ONLINE", replace(train.ONLINE, **few))
    monkeypatch.setitem(PROTOCOLS, "scenes", replace(PROTOCOLS["scenes"], **few))
    train.main([*"--scale nano --device cpu --pictures 8 --batch-size 4 --steps 4 --probe-every 2 --log-every 3".split(),
                "--out", str(tmp_path / "a")])
    lines = [json.loads(line) for line in (tmp_path / "a/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4] and [("miou" in line) for line in lines] == [True, False, True]
    assert {"miou", "rmse", "absrel", "delta1", "knn"} < lines[0].keys() and 0 < lines[0]["miou"] < 100
    results = json.loads((tmp_path / "a/eval.json").read_text())
    assert list(results) == ["untrained scenes tasks=seg,depth", "teacher scenes tasks=seg,depth"]
    text = capsys.readouterr().out
    before, after = (results[f"{who} scenes tasks=seg,depth"]["miou"] for who in ("untrained", "teacher"))
    assert f"before training{before:25.2f}" in text and f"after training{after:26.2f}" in text and f"pictures: {tmp_path}/a/pictures.png" in text
    with Image.open(tmp_path / "a/pictures.png") as img:  # 7 rows of 6 pictures
        assert img.width > 6 * 100 and img.height > 7 * 100


def test_pictures_in_class_folders_are_judged_by_nearest_neighbours(tmp_path, monkeypatch, capsys):
    for kind, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        (tmp_path / "own" / kind).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (40, 50), tuple(c + i for c in colour)).save(tmp_path / "own" / kind / f"{i}.png")
    flags = "--scale nano --device cpu --batch-size 4 --steps 2 --probe-every 0 --workers 0 --data".split()
    named, knn = [], eval_dense.knn
    monkeypatch.setattr(eval_dense, "knn", lambda x, y, test, n: named.append((len(x), len(test))) or knn(x, y, test, n))
    train.main([*flags, str(tmp_path / "own"), "--out", str(tmp_path / "a")])
    assert named == [(36, 4)] * 2  # by the others
    text = capsys.readouterr().out
    assert "every tenth of 40 pictures" in text and "of 2\n" in text and "(Scenes" not in text
    results = json.loads((tmp_path / "a/eval.json").read_text())
    assert list(results) == ["untrained own trained on", "teacher own trained on"]
    assert results["untrained own trained on"]["knn"] == 100 and "before training                   100.00" in text  # colours are easy to tell
    (tmp_path / "own/red/3.png").write_bytes(b"no picture")
    train.main([*flags, str(tmp_path / "own"), "--out", str(tmp_path / "b")])
    text = capsys.readouterr().out
    assert named[2:] == [(35, 4)] * 2 and "every tenth of 39 pictures" in text and "after training  " in text
    few = dict(train=40, test=20, iterations=5)
    monkeypatch.setitem(PROTOCOLS, "scenes", replace(PROTOCOLS["scenes"], **few))
    train.main([*flags, str(tmp_path / "own/blue"), "--out", str(tmp_path / "c")])  # no classes
    assert f"(Scenes, another world than {tmp_path}/own/blue)" in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [
    (["nowhere"], "no checkpoint at nowhere"), (["RUN", "--tasks", "seg,box"], "unknown box; choose from seg"),
    (["RUN", "--layers", "9,13"], "--layers 9,13 is outside 1 to 12"),
    (["RUN", "--split", "probe"], "heads are trained on it; give test, val or train"),
    (["RUN", "--train", "1"], "one training picture is too few"),
    (["RUN", "nowhere"], "^error: no checkpoint at nowhere"),
    (["RUN", "--crop", "32"], "scenes has no use for --crop"),
    (["RUN", "--data", "nyu", "--train", "9"], "nyu has no use for --train"),
    (["RUN", "--data", "imagefolder", "--flip"], "imagefolder has no use for --flip"),
    (["RUN", "--data", "cifar10", "--crop", "8"], "cifar10 has no use for --crop"),
    (["RUN", "--root", "."], "--root: Scenes lie in no folder"),
    (["RUN", "--tasks", "knn", "--flip"], "scenes has no use for --flip with --tasks knn"),
    (["RUN", "--tasks", "knn", "--save-pictures", "1"], "--save-pictures draws what seg and depth predict"),
    (["RUN", "RUN"], "results of two of these would go to .*a; rename one"),
    (["RUN", "--data", "pairs", "--tasks", "seg", "--unit", "2"], "pairs has no use for --unit with --tasks seg"),
    (["RUN", "--download"], "scenes cannot be fetched, only voc, pets, imagenette, cifar10; "
     "leave out --download"),
    (["RUN", "--device", "cuda"], "torch sees no GPU"),
    (["RUN", "--data", "voc"], "there is no|wants in --root data/voc")])
def test_bad_flags_are_one_line(runs, monkeypatch, flags, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=words) as caught:
        eval_dense.main([str(runs / "a") if f == "RUN" else f for f in flags])
    assert "\n" not in str(caught.value)


def test_a_model_too_shallow_for_the_layers_is_found_before_another_is_judged(tmp_path, runs, monkeypatch):
    clsspec.save(clsspec.ViT(clsspec.config("nano", depth=2)), tmp_path / "two.pt")
    monkeypatch.setattr(eval_dense, "evaluate", lambda *_, **__: pytest.fail("it was begun"))
    with pytest.raises(SystemExit, match="--layers 3,6 is outside 1 to 2, the depth of .*two.pt"):
        eval_dense.main([str(runs / "a"), str(tmp_path / "two.pt"), "--layers", "3,6"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no such signals")
def test_a_process_that_reads_files_ends_without_an_error():
    """An error would interrupt a step of the main process that takes longer than half a minute."""
    def read():
        eval_dense.patient(0)
        os.kill(os.getpid(), signal.SIGALRM)
        sys.exit(1)

    child = multiprocessing.get_context("fork").Process(target=read)
    child.start()
    child.join()
    assert child.exitcode == 0


@pytest.mark.parametrize("flags, words", [
    (["--train", "1000000"], "1,001,000 Scenes of 64 px would take about .* GiB, and there are 8; lower --train, --test or --image-size"),
    (["--image-size", "16384", "--train", "2", "--test", "2"], "4 Scenes of 16384 px would"),
    (["--batch-size", "65536", "--layers", "12"],
     "a batch of 65536 pictures of 64 x 64 px would take .* lower --image-size, --crop or --batch-size")])
def test_what_the_machine_has_no_memory_for_is_not_begun(runs, monkeypatch, flags, words):
    small = Scenes("probe", 64)(torch.arange(2))
    split = eval_dense.Pictures(memory=small, classes=Scenes.classes, labels=Scenes.labels)
    monkeypatch.setattr(eval_dense, "machine_gib", lambda device: 8.0)
    monkeypatch.setattr(eval_dense, "rendered", lambda *_: split)  # so that a miss shows at once
    monkeypatch.setattr(eval_dense, "features", lambda *_: pytest.fail("it was begun"))
    with pytest.raises(SystemExit, match=words):
        eval_dense.main([str(runs / "a"), *flags])


def test_a_container_has_what_it_is_given(monkeypatch, tmp_path):
    (tmp_path / "limit").write_text(f"{2**28}\n")
    (tmp_path / "none").write_text("max\n")
    for files, gib in ((("limit", "none"), 0.25), (("missing", "limit"), 0.25)):
        monkeypatch.setattr(eval_dense, "CONTAINER", [str(tmp_path / file) for file in files])
        assert eval_dense.machine_gib("cpu") == gib
    monkeypatch.setattr(eval_dense, "CONTAINER", [str(tmp_path / "none")])
    assert 0.25 < eval_dense.machine_gib("cpu") < 2**20


def test_nothing_is_judged_where_nothing_can_be_written(runs, monkeypatch, capsys):
    monkeypatch.setattr(eval_dense.os, "access", lambda *_: False)
    with pytest.raises(SystemExit, match="a cannot be written to"):
        eval_dense.main([str(runs / "a"), *FEW])
    assert not capsys.readouterr().out


def test_public_weights_and_networks_that_see_other_sizes(runs, tmp_path, monkeypatch, capsys):
    torch.save(clsspec.ViT(clsspec.config("nano", depth=2, patch=16, image_size=64)).state_dict(), tmp_path / "w.pth")
    monkeypatch.chdir(tmp_path)
    eval_dense.main([str(runs / "a"), "w.pth", *FEW, "--tasks", "knn,seg,knn"])
    assert "which it saw at 64 x 64 px, this one at 128 x 128 px, with" in capsys.readouterr().out
    (key, result), = json.loads((tmp_path / "runs/w/eval.json").read_text()).items()
    assert key == "teacher scenes tasks=knn,seg iterations=10 train=60 test=20" and result["knn"] > 0


def test_masks_without_any_class(tmp_path):
    at = tree(tmp_path / "t", kinds=("masks",))
    for file in (at / "masks/val").iterdir():
        Image.new("L", Image.open(file).size, 255).save(file)
    with pytest.raises(ValueError, match="no picture has a pixel with a class"):
        eval_dense.evaluate(Oracle(), "pairs", str(at), replace(SHORT, iterations=2))


def test_sides_are_made_multiples_of_the_patch(tmp_path):
    at, p = str(tree(tmp_path / "t")), replace(SHORT, image_size=30, crop=30, window=21, iterations=2)
    protocol = eval_dense.evaluate(Oracle(), "pairs", at, p)[0]["protocol"]
    assert [protocol[k] for k in ("crop", "window", "height", "width")] == [32, 24, 32, 48]


def test_image_tasks_see_whole_pictures_whatever_the_windows(runs):
    model = clsspec.load(runs / "a/last.pt")
    p = replace(PROTOCOLS["scenes"], train=60, test=40, iterations=2, tasks=("seg", "knn"))
    whole, windows = (eval_dense.evaluate(model, p=replace(p, window=w))[0] for w in (0, 32))
    assert whole["knn"] == windows["knn"] and whole["miou"] != windows["miou"]


def test_heads_that_diverge_are_left_out_or_an_error(tmp_path):
    at, p = str(tree(tmp_path / "t")), replace(SHORT, iterations=60)
    with pytest.raises(ValueError, match="the seg heads diverged with --lr 1e[+]30; lower it"):
        eval_dense.evaluate(Oracle(), "pairs", at, replace(p, lr=(1e30,)))
    result = eval_dense.evaluate(Oracle(), "pairs", at, replace(p, lr=(1e30, 1e-2)))[0]
    assert set(result["chosen"].values()) == {"lr 0.01"} and result["miou"] > 80


def test_a_rate_too_high_for_one_task_is_kept_for_the_other(tmp_path, monkeypatch):
    at, p, train_heads = str(tree(tmp_path / "t")), replace(SHORT, lr=(1e-2, 1e-9)), eval_dense.train_heads

    learnt_from = []

    def diverging(*args):
        learnt_from.append(args[2])
        heads = train_heads(*args)
        heads[1e-2, "depth"].linear.bias.data += math.nan
        return heads

    monkeypatch.setattr(eval_dense, "train_heads", diverging)
    assert eval_dense.evaluate(Oracle(), "pairs", at, p)[0]["chosen"] == {"seg": "lr 0.01", "depth": "lr 1e-09"}
    assert len(learnt_from[0]) == 21 and (learnt_from[0] % 10 != 0).all()  # of 24; a tenth is for choosing
    with pytest.raises(ValueError, match="the depth heads diverged with --lr 0.01; lower it"):
        eval_dense.evaluate(Oracle(), "pairs", at, replace(p, lr=(1e-2,)))


def test_several_sizes_are_refused_wherever_they_are(tmp_path):
    at = tree(tmp_path / "t", train=60)  # features are made 50 pictures at a time, heads see 8
    for i in range(50, 60):
        for kind, mode in (("images", "RGB"), ("masks", "L"), ("depth", "I;16")):
            save_map(at / f"{kind}/train/{i}.png", 1, mode, (64, 96))
    order = sorted(f"{i}.png" for i in range(60))
    assert order.index("50.png") < 50 < len(order)  # both sizes are in the first batch
    with pytest.raises(ValueError, match=r"has \(64, 96\) pixels \(rows, columns; image\).* \(32, 48\); for several sizes give --crop"):
        eval_dense.evaluate(Oracle(), "pairs", str(at), SHORT)
    with pytest.raises(ValueError, match=r"has \(64, 96\) pixels \(rows, columns; mask\)"):  # labels are not resized
        eval_dense.evaluate(Oracle(), "pairs", str(at), replace(SHORT, image_size=32))
    with pytest.raises(ValueError, match=r"several sizes \(mask\); for several sizes give --crop"):  # each batch of one
        eval_dense.joined([{"mask": torch.zeros(50, 32, 48)}, {"mask": torch.zeros(10, 64, 96)}])


def test_maps_count_in_what_features_take(tmp_path, monkeypatch):
    at, p = tree(tmp_path / "t"), replace(SHORT, image_size=8, iterations=2, tasks=("seg",))
    for split, n in (("train", 24), ("val", 8)):
        for i in range(n):  # large maps of pictures that are made small
            for kind, mode in (("images", "RGB"), ("masks", "L"), ("depth", "I;16")):
                save_map(at / f"{kind}/{split}/{i}.png", 2000 if kind == "depth" else i % 3, mode, (320, 480))
    made = []
    features = eval_dense.features
    monkeypatch.setattr(eval_dense, "features", lambda *args: made.append(1) or features(*args))
    maps = 24 * 320 * 480 * 5 / 2**30  # a byte of class and four of depth
    for cache, times in ((1.2 * maps, 1), (0.9 * maps, 0)):
        made.clear()
        eval_dense.evaluate(Oracle(), "pairs", str(at), p, cache_gib=cache)
        assert len(made) == times


def test_an_error_without_words_is_a_line_too(capsys):
    with pytest.raises(SystemExit, match="^error: UnicodeError$"), eval_dense.one_line():
        raise UnicodeError


def test_predictions_that_are_not_numbers_are_not_passed_over():
    p, t = torch.ones(3, 2, 2), torch.ones(3, 2, 2)
    p[0], t[1] = math.inf, 0
    rmse = eval_dense.scores({"picture": torch.ones(3), **eval_dense.depth_errors(p, t)})["rmse"].item()
    assert not math.isfinite(rmse)


def test_a_damaged_eval_json_is_named_and_kept(runs, capsys):
    file = runs / "b/eval.json"
    file.write_text("{")
    with pytest.raises(SystemExit, match="eval.json is damaged"):  # before the work
        eval_dense.main([str(runs / "b"), *FEW[:4], "--tasks", "knn"])
    assert not capsys.readouterr().out and file.read_text() == "{"
    file.unlink()


@pytest.mark.parametrize("flags", [["--iterations", "0"], ["--batch-size", "-1"], ["--train", "0"],
                                   ["--lr", "x"], ["--image-size", "-8"], ["--tasks", ","]])
def test_numbers_out_of_range(flags, capsys):
    with pytest.raises(SystemExit):
        eval_dense.main(["runs/a", *flags])
    assert f"argument {flags[0]}" in capsys.readouterr().err.splitlines()[-1]


def test_tasks_that_a_set_cannot_do(tmp_path):
    at = tree(tmp_path / "t", kinds=("depth",))
    with pytest.raises(ValueError, match="--tasks seg: here pairs has what it takes for depth only"):
        eval_dense.evaluate(Oracle(), "pairs", str(at), replace(SHORT, tasks=("seg",)))
    result = eval_dense.evaluate(Oracle(), "pairs", str(at), replace(SHORT, iterations=5))[0]
    assert "rmse" in result and "miou" not in result
    at = tree(tmp_path / "u")
    (at / "depth/val").rename(at / "depth/test")
    # half of it is no mistake to pass over
    with pytest.raises(ValueError, match="8 of 24 files are missing, as .*depth/val/0.png"):
        eval_dense.evaluate(Oracle(), "pairs", str(at), replace(SHORT, iterations=5))


def opened(data, at, **how):
    p = replace(PROTOCOLS[data], **{"image_size": 0, "crop": 0, "window": 0} | how)
    return eval_dense.open_set(data, str(at), p, 8, CPU)


def test_voc(tmp_path):
    at = tmp_path / "VOCdevkit/VOC2012"
    for name, split, value in (("a", "train", 20), ("b", "val", 255)):
        save_map(at / f"JPEGImages/{name}.jpg", 7, "RGB")
        save_map(at / f"SegmentationClass/{name}.png", value)
        (at / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (at / f"ImageSets/Segmentation/{split}.txt").write_text(name + "\n")
    first, second = opened("voc", tmp_path)
    assert len(first) == len(second) == 1 and len(first.classes) == 21 and first.classes[20] == "tvmonitor"
    assert first[0]["mask"].unique().tolist() == [20] and second[0]["mask"].unique().tolist() == [255]


def test_ade20k_drops_class_0(tmp_path):
    at = tmp_path / "ADEChallengeData2016"
    rows = torch.tensor([0, 1, 150, 2]).repeat_interleave(4)[:, None].expand(16, 16)
    for split in ("training", "validation"):
        save_map(at / f"images/{split}/x.jpg", 7, "RGB")
        save_map(at / f"annotations/{split}/x.png", rows)
    item = opened("ade20k", tmp_path)[1][0]
    assert item["mask"][::4, 0].tolist() == [255, 0, 149, 1]
    assert PROTOCOLS["ade20k"].window == 512 and len(opened("ade20k", tmp_path)[0].classes) == 150


def test_cityscapes_train_ids(tmp_path):
    rows = torch.tensor([0, 7, 26, 33]).repeat_interleave(4)[:, None].expand(16, 16)
    for split in ("train", "val"):
        save_map(tmp_path / f"leftImg8bit/{split}/town/town_0_leftImg8bit.png", 7, "RGB")
        save_map(tmp_path / f"gtFine/{split}/town/town_0_gtFine_labelIds.png", rows)
    data = opened("cityscapes", tmp_path)[0]
    assert data[0]["mask"][::4, 0].tolist() == [255, 0, 13, 18]  # unlabelled, road, car, bicycle
    assert data.classes[0] == "road" and data.classes[13] == "car" and len(data.classes) == 19


def nyu_tree(at):
    for name in ("train", "test"):
        save_map(at / name / "rgb.jpg", 7, "RGB", (480, 640))
        depth = torch.full((480, 640), 2500)
        depth[:, 320:], depth[100] = 12_000, 0
        save_map(at / name / "depth.png", depth, "I;16")
        (at / f"nyu_{name}.txt").write_text(f"/{name}/rgb.jpg /{name}/depth.png 518.8\n/{name}/rgb.jpg None 518.8\n")


def test_nyu_is_in_metres_to_ten_in_eigens_crop(tmp_path):
    nyu_tree(tmp_path)
    first, test = opened("nyu", tmp_path)
    assert len(first) == len(test) == 1 and first.max_depth == 10
    depth = first[0]["depth"]
    assert depth[0, 0] == 2.5 and depth[0, 320] == 0 and depth[100, 0] == 0
    valid = test[0]["depth"] > 0
    rows, columns = valid.any(1).nonzero()[:, 0].tolist(), valid.any(0).nonzero()[:, 0].tolist()
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (45, 470, 41, 319) and 100 not in rows
    assert opened("nyu", tmp_path, image_size=240)[0][0]["image"].shape == (3, 240, 320)


def test_kitti_is_cropped_and_scaled_by_256(tmp_path):
    for name in ("train", "test"):
        save_map(tmp_path / f"input/d/{name}.png", torch.arange(375)[:, None].expand(375, 1242) % 200, "RGB")
        save_map(tmp_path / f"gt_depth/e/{name}.png", 256 * 10, "I;16", (375, 1242))
        (tmp_path / f"kitti_eigen_{name}.txt").write_text(f"d/{name}.png e/{name}.png 721.5\nd/{name}.png None 721.5\n")
    first, test = opened("kitti", tmp_path)
    item = first[0]
    assert item["depth"].shape == (352, 1216) and item["image"].shape == (3, 352, 1216) and item["depth"].unique() == 10
    assert item["image"][0, 0, 0] == 23  # rows from the bottom
    valid = test[0]["depth"] > 0
    rows, columns = valid.any(1).nonzero()[:, 0], valid.any(0).nonzero()[:, 0]
    assert (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) == (143, 349, 43, 1172) and first.max_depth == 80


def test_sunrgbd_turns_bits_back_cuts_at_8_m_and_learns_on_nyu(tmp_path, monkeypatch):
    nyu_tree(tmp_path / "nyu")
    lines = ""
    for name, size, mm in (("a", (480, 640), 3000), ("b", (530, 730), 9000)):
        save_map(tmp_path / f"SUNRGBD/SUNRGBD/kv1/image/{name}.jpg", 7, "RGB", size)
        save_map(tmp_path / f"SUNRGBD/SUNRGBD/kv1/depth/{name}.png", (mm << 3 | mm >> 13) & 0xFFFF, "I;16", size)
        lines += f"SUNRGBD/kv1/image/{name}.jpg SUNRGBD/kv1/depth/{name}.png\n"
    (tmp_path / "SUNRGBD/SUNRGBD_val_splits.txt").write_text(lines)
    first, test = opened("sunrgbd", tmp_path)
    assert first[0]["depth"].shape == (480, 640) and first.max_depth == 10
    for i, metres in enumerate((3.0, 8.0)):
        valid = test[i]["depth"][45:471, 41:601]
        assert valid.unique().item() == pytest.approx(metres) and (test[i]["depth"] > 0).sum() == valid.numel()
    p = replace(PROTOCOLS["sunrgbd"], image_size=64, iterations=2, batch_size=2, lr=(1e-3,))
    result, stats, _ = eval_dense.evaluate(Oracle(), "sunrgbd", str(tmp_path), p)  # of two sizes
    assert len(stats["rmse"]) == 2 and math.isfinite(result["rmse"])
    far = lambda model, heads, img, size, p: {"depth": torch.full((len(img), *size), 9.0)}
    monkeypatch.setattr(eval_dense, "predict", far)  # which counts as 8 m
    assert eval_dense.evaluate(Oracle(), "sunrgbd", str(tmp_path), p)[1]["rmse"].tolist() == pytest.approx([5, 0])


def test_imagefolder_and_its_two_tasks(tmp_path):
    for split, n in (("train", 20), ("val", 6)):
        for c in range(2):
            for i in range(n):
                save_map(tmp_path / f"{split}/c{c}/{i}.jpg", 100 * c + 50, "RGB", (40, 30 + i))
    first, _ = opened("imagefolder", tmp_path, image_size=16)
    middle = replace(first, middle=True)[0]
    assert middle["image"].shape == (3, 16, 16) and first.labels == ("c0", "c1") and len(first) == 40
    p = replace(PROTOCOLS["imagefolder"], image_size=16)
    result = eval_dense.evaluate(Oracle(), "imagefolder", str(tmp_path), p)[0]
    assert result["linear"] == 100 and result["knn"] == 100 and "miou" not in result
    odd, _ = opened("imagefolder", tmp_path, image_size=18)
    assert replace(odd, middle=True)[0]["image"].shape == (3, 16, 16)  # whole patches
    with pytest.raises(ValueError, match="--image-size 0: imagefolder cuts pictures to one side"):
        opened("imagefolder", tmp_path)
    (tmp_path / "val/c1").rename(tmp_path / "val/c2")
    with pytest.raises(ValueError, match="have other classes"):
        opened("imagefolder", tmp_path, image_size=16)


def test_pets_have_maps_and_breeds(fetched_sets):
    first, test = opened("pets", fetched_sets, image_size=16)
    assert first.classes == ("background", "pet") and first.labels == test.labels == ("Abyssinian", "Great Pyrenees")
    item = first[0]
    assert "label" not in item
    assert item["mask"][0].unique().tolist() == [255] and item["mask"][8].tolist() == 8 * [1] + 16 * [0]  # border; pet, background
    item = replace(first, middle=True)[1]
    assert item.keys() == {"image", "label"} and item["image"].shape == (3, 16, 16) and item["label"] == 1
    p = replace(PROTOCOLS["pets"], image_size=16, crop=16, iterations=100, batch_size=8)
    result = eval_dense.evaluate(Oracle(), "pets", str(fetched_sets), p)[0]
    assert result["miou"] > 60 and result["linear"] == result["knn"] == 100 and result["iou"].keys() == {"background", "pet"}
    as_they_are = replace(p, tasks=("seg",), image_size=0)
    assert eval_dense.evaluate(Oracle(), "pets", str(fetched_sets), as_they_are)[0]["miou"] > 60
    with pytest.raises(ValueError, match="--image-size 0: pets cuts pictures"):
        eval_dense.evaluate(Oracle(), "pets", str(fetched_sets), replace(p, image_size=0))


@pytest.mark.parametrize("data, labels", [("imagenette", ("tench", "English springer")),
                                          ("cifar10", ("dark", "bright"))])
def test_sets_of_labelled_pictures(fetched_sets, data, labels):
    first, test = opened(data, fetched_sets, image_size=16)
    assert first.labels == test.labels == labels and replace(first, middle=True)[0]["image"].shape == (3, 16, 16)
    result = eval_dense.evaluate(Oracle(), data, str(fetched_sets), replace(PROTOCOLS[data], image_size=16))[0]
    assert result["linear"] == result["knn"] == 100 and "miou" not in result


@pytest.mark.parametrize("data, module", [("voc", "voc"), ("pets", "oxford_iiit_pet"),
                                          ("imagenette", "imagenette"), ("cifar10", "cifar")])
def test_download_reaches_torchvision(fetched_sets, tmp_path, monkeypatch, data, module):
    there, empty, urls = fetched_sets, tmp_path / "empty", []
    with pytest.raises(ValueError, match=f"not there, or not whole; --data {data} wants.*; --download fetches it, .* GB$"):
        eval_dense.open_split(data, str(empty), "train")

    def fetch(url, *_, **__):  # torchvision's way to the net
        urls.append(url)
        shutil.copytree(there, empty, dirs_exist_ok=True)

    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", offline)
    with pytest.raises(ValueError, match=f"no network.*; --data {data} wants in") as caught:
        eval_dense.open_split(data, str(empty), "train", download=True)
    assert "--download" not in str(caught.value)  # which was given
    monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", fetch)
    for split in ("train", "val", "train"):
        assert len(eval_dense.open_split(data, str(empty), split, download=True)) > 1
    assert len(urls) == (2 if data == "pets" else 1)  # once: pictures and annotations of pets are apart


def test_a_set_of_cifar_that_is_not_as_published_is_not_opened(fetched_sets):
    file = fetched_sets / "cifar-10-batches-py/data_batch_1"
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(ValueError, match="not whole; --data cifar10 wants"):
        eval_dense.open_split("cifar10", str(fetched_sets), "train")


def test_pairs_and_random_crops(tmp_path):
    first, test = opened("pairs", tree(tmp_path / "t"))
    item = first[3]
    assert item["mask"][:2].unique().tolist() == [255] and item["depth"][:2].max() == 0
    assert torch.equal(item["image"][0][2:], 50 * item["mask"][2:]) and len(first) == 24 and len(test) == 8
    torch.testing.assert_close(item["depth"][2:], item["mask"][2:] + 1.0)
    file, exif = first.rows[3]["image"], Image.Exif()
    exif[0x0112] = 3  # upside down, says the camera; masks lie as pixels do
    Image.open(file).save(file, exif=exif)
    assert torch.equal(first[3]["image"], item["image"])
    near, _ = opened("pairs", tmp_path / "t", crop=32)  # no scaling where there is depth; no flip, top left
    assert torch.equal(near[1, (0.9, 0.0, 0.0, 0.9)]["image"], first[1]["image"][:, :32, :32])
    assert first.max_depth == test.max_depth == 4
    save_map(tmp_path / "t/depth/train/0.png", 6000, "I;16", (32, 48))  # in fp32 6000 x 0.001 is more than 6
    first, _ = opened("pairs", tmp_path / "t")
    assert first.max_depth == 6 and first[0]["depth"].unique().tolist() == [6]
    (tmp_path / "t/classes.txt").write_text("# id name\n0\tred\n1\tblue\n2\tgreen\n3\tgrey\n4\tblack\n")
    assert opened("pairs", tmp_path / "t")[0].classes == ("red", "blue", "green", "grey", "black")
    only = opened("pairs", tree(tmp_path / "u", kinds=("masks",)), crop=40)[0]
    seen = [only[0, torch.rand(4, generator=torch.Generator().manual_seed(s)).tolist()] for s in range(20)]
    for crop in seen:
        assert crop["image"].shape == (3, 40, 40) and crop["mask"].shape == (40, 40)
        inside = crop["mask"] != 255  # the two go together, but for the blur at edges
        assert ((crop["image"][0].float() / 50 - crop["mask"]).abs()[inside] < 0.5).float().mean() > 0.85
    assert any((c["mask"][-1] == 255).all() for c in seen) and len({c["image"].float().mean().item() for c in seen}) > 15


@pytest.mark.parametrize("data", sorted(eval_dense.OPEN))
def test_a_missing_set_says_what_is_wanted_and_where_it_is_had(tmp_path, data):
    with pytest.raises(ValueError, match=f"--data {data} wants in --root {tmp_path}: ") as caught:
        opened(data, tmp_path)
    assert "\n" not in str(caught.value) and eval_dense.OPEN[data].__doc__.split()[0] in str(caught.value)
    with pytest.raises(ValueError, match="wants in --root nowhere"):
        opened(data, "nowhere")


def broken(at, what):
    file = {"mask": at / "masks/val/1.png", "depth": at / "depth/val/1.png"}.get(what, at / "images/val/1.png")
    if what == "no mask":
        (at / "masks/train/3.png").unlink()
    elif what == "beyond":
        save_map(at / "masks/val/1.png", 9, size=(32, 48))
    elif what == "rgb":
        save_map(at / "masks/val/1.png", 9, "RGB", (32, 48))
    elif what == "8 bit depth":
        save_map(at / "depth/train/0.png", 9, size=(32, 48))
    elif what == "8 bit depth in val":
        save_map(at / "depth/val/1.png", 9, size=(32, 48))
    elif what == "truncated":
        file.write_bytes(file.read_bytes()[:50])
    elif what == "no depth":
        for i in range(8):
            save_map(at / f"depth/val/{i}.png", 0, "I;16", (32, 48))
    elif what == "mask size":
        save_map(at / "masks/val/1.png", 1, size=(16, 48))
    elif what == "sizes":
        for kind, mode in (("images", "RGB"), ("masks", "L"), ("depth", "I;16")):
            save_map(at / f"{kind}/train/5.png", 1, mode, (48, 48))
    elif what == "empty":
        for f in (at / "images/val").iterdir():
            f.unlink()
    elif what == "black and white":
        for file in at.glob("masks/*/*.png"):
            save_map(file, (torch.arange(48) > 20).expand(32, 48) * 255, size=(32, 48))
    elif what == "full depth":
        for file in at.glob("depth/*/*.png"):
            save_map(file, 65535, "I;16", (32, 48))
    elif what.startswith("names"):
        (at / "classes.txt").write_text(what.removeprefix("names "))


@pytest.mark.parametrize("what, words", [
    ("no mask", "1 of 72 files are missing, as .*masks/train/3.png"),
    ("beyond", "masks/val/1.png has class 9, but the set has only 4"),
    ("rgb", "masks/val/1.png must be an 8-bit index PNG, but its mode is RGB"),
    ("8 bit depth", "depth/train/0.png must be a 16-bit grey PNG"), ("truncated", "cannot read .*images/val/1.png"),
    ("8 bit depth in val", "depth/val/1.png must be a 16-bit grey PNG, but its mode is L"),
    ("no depth", "no file in .*depth/val has a depth of at most 4 m; correct --unit or --max-depth"), ("mask size", "masks/val/1.png has .16, 48. pixels"),
    ("sizes", r"images/train/5.png|several sizes"), ("empty", "no picture in split val"),
    ("black and white", "no mask in .*masks/train has another class than 0, as 255 means ignored; in black and white masks make 255 a 1"),
    ("full depth", "no file in .*depth/train has a depth, from 1 to 65534"),
    ("names 0\tred\n0\tblue",
     "classes.txt: in '0.tblue', 0 must be a number from 0 to 254, each once"),
    ("names red\tblue", "red must be a number")])
def test_bad_data_is_one_line_that_names_the_file(tmp_path, monkeypatch, what, words):
    workers = int(what == "sizes")  # one with: it makes no difference, and takes five seconds to leave
    at = tree(tmp_path / "t")
    broken(at, what)
    monkeypatch.setattr(clsspec, "load", lambda *a: Oracle())
    monkeypatch.setattr(eval_dense, "best_heads", lambda *_: pytest.fail("heads were trained first"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        eval_dense.main(["x", "--data", "pairs", "--root", str(at), "--iterations", "2", "--workers", str(workers)])
    message = str(caught.value)
    assert message.startswith("error: ") and "\n" not in message
    assert re.search(words, message), message
    assert not Path("runs").exists()  # no folder for results that never came


def test_classes_have_the_numbers_that_their_file_says(tmp_path):
    at = tree(tmp_path / "t")
    (at / "classes.txt").write_text("# mine\n3\tfour\n0\tone\n1\ttwo\n")
    assert opened("pairs", at)[0].classes == ("one", "two", "class 2", "four")
    (at / "classes.txt").write_text("a\nb\nc\nd\n")
    assert opened("pairs", at)[0].classes == tuple("abcd")


def test_depth_has_a_unit_and_a_limit(tmp_path):
    at = tree(tmp_path / "t")
    save_map(at / "depth/train/0.png", 65535, "I;16", (32, 48))  # as cameras write "too far"
    train, _ = opened("pairs", at)
    assert train.max_depth == pytest.approx(4.0) and (train[0]["depth"] == 0).all()
    train, test = opened("pairs", at, unit=0.01, max_depth=25.0)
    depth = train[1]["depth"]
    assert train.max_depth == test.max_depth == 25.0 and set(depth.unique().tolist()) <= {0.0, 10.0, 20.0}
    with pytest.raises(SystemExit, match="scenes has no use for --max-depth"):
        eval_dense.main([str(tmp_path), "--max-depth", "5"])


NUMBERS = [f.name.replace("_", "-") for f in eval_dense.fields(eval_dense.Protocol) if f.name not in ("tasks", "flip", "cat_cls", "split")]


@pytest.mark.parametrize("flag", [*NUMBERS, "workers", "save-pictures"])
def test_every_number_has_a_range(flag, capsys):
    for value in ("nan", "inf", "-inf", "x", "", "-1", "1e30"):
        with pytest.raises(SystemExit) as caught:
            eval_dense.main(["runs/a", f"--{flag}={value}"])
        line = capsys.readouterr().err
        assert caught.value.code == 2 and line.count("\n") == 1 and line.startswith(f"error: argument --{flag}"), (value, line)


def leave(number, *flags, wait=b"training heads", cwd, script="eval_dense.py"):
    """Start a script as a user does, in a session of its own, send its processes a signal; what it
    said, its code and the seconds that took."""
    job = subprocess.Popen([sys.executable, str(ROOT / script), *map(str, flags)], stdout=subprocess.DEVNULL,
                           stderr=subprocess.PIPE, start_new_session=True, cwd=cwd,
                           env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    said = b""
    while wait not in said and (more := os.read(job.stderr.fileno(), 1000)):
        said += more
    start = time.time()
    os.killpg(job.pid, number)
    said += job.communicate(timeout=60)[1]
    return said.decode(), job.returncode, time.time() - start


@pytest.mark.parametrize("number, data", [
    (signal.SIGHUP, "scenes"), (signal.SIGINT, "pairs"), (signal.SIGTERM, "pairs")])
def test_signals_end_it_in_one_line_and_keep_what_is_there(tmp_path, runs, number, data):
    shutil.copytree(runs / "a", tmp_path / "a")
    (tmp_path / "a/eval.json").write_text("{}")
    flags = (["--root", tree(tmp_path / "t"), "--workers", 1, "--crop", 16] if data == "pairs"
             else ["--tasks", "seg", "--train", 50, "--test", 50])
    said, code, seconds = leave(number, tmp_path / "a", "--data", data, "--iterations", 10**6, *flags, cwd=tmp_path)
    assert code == 128 + number and "Traceback" not in said and seconds < 20
    assert said.splitlines()[-1].strip().endswith(f"stopped by {number.name}; what was finished is kept")
    assert (tmp_path / "a/eval.json").read_text() == "{}" and not list((tmp_path / "a").glob("*.tmp"))


def test_analyze_leaves_in_one_line_too(tmp_path, runs, number=signal.SIGINT):
    shutil.copytree(runs / "a", tmp_path / "a")
    (tmp_path / "a/analysis.json").write_text("{}")
    flags = [tmp_path / "a", "--what", "cosines", "--pictures", 1000]
    said, code, seconds = leave(number, *flags, wait=b"walking", cwd=tmp_path, script="analyze.py")
    assert code == 128 + number and "Traceback" not in said and seconds < 20
    assert said.splitlines()[-1].strip().endswith(f"stopped by {number.name}; what was finished is kept")
    assert (tmp_path / "a/analysis.json").read_text() == "{}" and not list((tmp_path / "a").glob("*.tmp"))


@pytest.mark.parametrize("data", ["pairs", "imagefolder"])
def test_a_bad_picture_in_a_process_that_reads_ends_it_at_once(tmp_path, runs, data):
    """The processes that read files are not waited for."""
    shutil.copytree(runs / "a", tmp_path / "a")
    flags = []
    if data == "pairs":
        save_map(tree(tmp_path / "t") / "images/train/3.png", 7, "RGB", (16, 16))
    else:
        for i in range(120):
            save_map(tmp_path / f"t/{('train', 'val')[i % 2]}/c{i // 2 % 2}/{i}.jpg", 7, "RGB")
        (tmp_path / "t/train/c0/4.jpg").write_text("no picture")
        flags = ["--image-size", 16]
    start = time.time()
    done = subprocess.run([sys.executable, str(ROOT / "eval_dense.py"), str(tmp_path / "a"),
                           "--data", data, "--root", str(tmp_path / "t"), "--workers", "2",
                           *map(str, flags)],
                          capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 1 and time.time() - start < 25 and "Traceback" not in done.stderr and "Alarm" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: "), done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="not on this system")
def test_a_full_stdout_is_one_line(tmp_path, runs):
    shutil.copytree(runs / "a", tmp_path / "a")
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, str(ROOT / "eval_dense.py"), str(tmp_path / "a"),
                               *FEW[:4], "--tasks", "knn"],
                              stdout=full, stderr=subprocess.PIPE, text=True,
                              env=os.environ | {"PYTHONUNBUFFERED": ""})  # or each print would fail by itself
    assert done.returncode == 1 and "Exception" not in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert "error: No space left on device" in done.stderr and (tmp_path / "a/eval.json").exists()


def test_a_closed_stderr_stops_nothing(tmp_path, runs):
    shutil.copytree(runs / "a", tmp_path / "a")
    command = f'"{sys.executable}" "{ROOT}/eval_dense.py" "{tmp_path}/a" {" ".join(FEW[:4])} --tasks knn 2>&-'
    done = subprocess.run(["bash", "-c", command], stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0 and "knn" in done.stdout


def test_numbers_that_cannot_be_kept_are_printed(runs, monkeypatch, capsys):
    def full(*_):
        raise ValueError("could not write eval.json: No space left on device")

    monkeypatch.setattr(eval_dense, "record", full)
    with pytest.raises(SystemExit, match="No space left"):
        eval_dense.main([str(runs / "a"), *FEW[:4], "--tasks", "knn"])
    assert re.search(r"knn \d+\.\d\d %", capsys.readouterr().out)


def test_a_folder_with_a_link_to_itself_is_read_once(tmp_path):
    for name in ("a.jpg", "b/c.jpg", ".hidden/d.jpg"):
        save_map(tmp_path / "set" / name, 7, "RGB")
    for name in ("loop", "b/up", "b/again"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "set", target_is_directory=True)
    (tmp_path / "set/far").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    save_map(tmp_path / "elsewhere/e.jpg", 7, "RGB")
    found = [os.path.relpath(file, tmp_path / "set") for file in eval_dense.picture_files(tmp_path / "set")]
    assert found == ["a.jpg", "b/c.jpg", "far/e.jpg"]
    for name in ("first", "last"):  # of a folder with several names the first one counts
        (tmp_path / "set" / name).symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    found = [os.path.relpath(file, tmp_path / "set") for file in eval_dense.picture_files(tmp_path / "set")]
    assert found == ["a.jpg", "b/c.jpg", "far/e.jpg"]
    (tmp_path / "set/far").unlink()
    assert [Path(file).parent.name for file in eval_dense.picture_files(tmp_path / "set")] == ["set", "b", "first"]


def test_results_of_two_folders_of_one_name_are_told_apart(tmp_path, runs, monkeypatch):
    shutil.copytree(runs / "a", tmp_path / "a")
    for place in ("here", "there"):
        tree(tmp_path / place / "set", kinds=("masks",), train=4, val=2)
    flags = [str(tmp_path / "a"), "--data", "pairs", "--iterations", "2", "--batch-size", "2",
             "--workers", "0", "--root"]
    eval_dense.main([*flags, str(tmp_path / "here/set")])
    before = (tmp_path / "a/eval.json").read_text()
    with pytest.raises(SystemExit, match="has 'teacher pairs set .*' of .*here/set, another folder of that name, already; rename one"):
        eval_dense.main([*flags, str(tmp_path / "there/set")])
    assert (tmp_path / "a/eval.json").read_text() == before
    monkeypatch.chdir(tmp_path / "here/set")
    eval_dense.main([*flags, "."])  # the same one
    assert json.loads((tmp_path / "a/eval.json").read_text()).keys() == json.loads(before).keys()


def test_a_set_that_everybody_has_may_move(tmp_path, runs, fetched_sets):
    shutil.copytree(runs / "a", tmp_path / "a")
    for name in ("here", "there"):
        (tmp_path / name).symlink_to(fetched_sets, target_is_directory=True)
        eval_dense.main([str(tmp_path / "a"), "--data", "pets", "--tasks", "knn", "--image-size", "16",
                         "--workers", "0", "--root", str(tmp_path / name)])
    found = json.loads((tmp_path / "a/eval.json").read_text())
    assert [result["root"] for key, result in found.items() if "pets" in key] == [str(tmp_path / "there")]


def test_a_batch_of_a_single_patch_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a batch of a single patch has no variance.*raise --batch-size"):
        eval_dense.evaluate(Oracle(), "pairs", str(tree(tmp_path / "t", size=(16, 16))),
                            replace(SHORT, batch_size=1, image_size=8))


def test_two_pictures_of_one_map_and_classes_beyond_are_known_before_training(tmp_path):
    at = tree(tmp_path / "t")
    save_map(at / "masks/val/1.png", 9, size=(32, 48))
    with pytest.raises(ValueError, match="masks/val/1.png has class 9, but the set has only 4"):
        opened("pairs", at)
    save_map(at / "images/train/3.jpg", 7, "RGB", (32, 48))
    with pytest.raises(ValueError, match="3.jpg and 3.png in .*images/train would have one map; rename one"):
        opened("pairs", at)


def test_pairs_whose_halves_do_not_match_are_refused(tmp_path):
    at = tree(tmp_path / "a")
    shutil.rmtree(at / "masks/val")
    with pytest.raises(ValueError, match="8 of 24 files are missing, as .*masks/val/0.png"):
        opened("pairs", at)
    at = tree(tmp_path / "b")
    with pytest.raises(ValueError, match="depth up to 4e-06 m only, and heads begin at 1 mm; correct --unit or --max-depth"):
        opened("pairs", at, unit=1e-9)
    (at / "classes.txt").write_text("wall\nwall\nfloor\ndoor\n")
    with pytest.raises(ValueError, match="classes.txt: 'wall' is there twice; tell them apart"):
        opened("pairs", at)


@pytest.mark.parametrize("text", ["junk\n", "[]\n", "5\n", "null\n", '{"a": 1}\n', '{"step": "x"}\n', "\udcff\udcfe\n"])
def test_a_damaged_log_is_named(tmp_path, text):
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n' + text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="log.jsonl is damaged, or not of this project .*; move it away"):
        eval_dense.read_log(tmp_path / "log.jsonl")
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n\n{"step": 2}\n{"st')  # cut by a full disk
    assert [line["step"] for line in eval_dense.read_log(tmp_path / "log.jsonl")] == [1, 2]


def test_a_reader_that_has_seen_enough_loses_no_result(tmp_path, runs):
    shutil.copytree(runs / "a", tmp_path / "a")
    job = subprocess.Popen([sys.executable, str(ROOT / "eval_dense.py"), str(tmp_path / "a"),
                            *FEW[:4], "--tasks", "knn"], stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    job.stdout.close()
    said = job.communicate(timeout=120)[1].decode()
    assert job.returncode == 1 and "Traceback" not in said and "Exception" not in said and "error" not in said
    assert len(json.loads((tmp_path / "a/eval.json").read_text())) >= 1


@pytest.mark.parametrize("err, words", [
    (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "a process that reads files has died"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
    (MemoryError(), "out of memory"),
    (OSError(28, "No space left on device", "f.json"), "No space left on device: f.json"),
    (RuntimeError("[../gloo/transport/tcp/pair.cc:1] Connection closed by peer"),
     "another process of this run has ended"),
    (ValueError("Caught ValueError in worker\nTraceback\nValueError: p.jpg is broken"), "error: p.jpg is broken")])
def test_what_the_machine_did_is_one_line(err, words):
    with pytest.raises(SystemExit) as caught, eval_dense.one_line():
        raise err
    assert words in str(caught.value) and "\n" not in str(caught.value) and caught.value.code != 0


@pytest.mark.parametrize("words", ["size mismatch", "CUDA error: an illegal memory access was encountered"])
def test_a_fault_of_the_program_shows_itself(words):
    with pytest.raises(RuntimeError, match=words), eval_dense.one_line():
        raise RuntimeError(words)


def test_a_signal_waits_for_what_must_not_be_cut_in_two_but_a_second_one_does_not(monkeypatch):
    done = []
    with pytest.raises(SystemExit) as caught, eval_dense.one_line():
        with eval_dense.signals.held():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # within a second it is the same one
            done.append("first")
        done.append("never")
    assert done == ["first"] and caught.value.code == 128 + signal.SIGTERM
    with pytest.raises(SystemExit), eval_dense.one_line():
        with eval_dense.signals.held():
            os.kill(os.getpid(), signal.SIGINT)
            monkeypatch.setattr(eval_dense.signals, "at", eval_dense.signals.at - 2)
            os.kill(os.getpid(), signal.SIGINT)
            done.append("never")
    assert done == ["first"]


def test_pictures_of_several_sizes_are_fine_with_crops(tmp_path):
    at = tree(tmp_path / "t")
    for kind, mode in (("images", "RGB"), ("masks", "L"), ("depth", "I;16")):
        for split in ("train", "val"):
            save_map(at / f"{kind}/{split}/5.png", 1, mode, (56, 40))
    result, stats, _ = eval_dense.evaluate(Oracle(), "pairs", str(at),
                                           replace(SHORT, crop=32, window=32, iterations=20))
    assert stats["counts"][5].sum() == 56 * 40 and result["protocol"]["test"] == 8
