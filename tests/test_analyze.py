"""Every number against a case made by hand, where the answer is known; then the commands."""

import importlib.util
import json
import math
import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import analyze
import clsspec
import eval_dense
import train
from analyze import POINTS, Step, survey, walk
from conftest import QUICK
from scenes import Scenes
from test_clsspec import VARIANTS, vit


def step(x=None, attention=None, first=1, cls=True, bias=0, grid=(2, 2)):
    """A Step with the same tokens x (B, T, D) everywhere."""
    x = torch.zeros(1, first + grid[0] * grid[1], 4) if x is None else x
    return Step({p: x for p in POINTS}, x, x, attention, first, cls, bias, grid)


def subject(**more):
    """What a function of numbers may ask about a model: its pictures are Scenes, its grid 2 x 2."""
    args = SimpleNamespace(data="scenes", root="", network="teacher", background=None)
    return SimpleNamespace(**{"args": args, "mask": None, "grid": (2, 2), "model": None} | more)


# --- where one looks ---------------------------------------------------------------------------------


def test_neighbour_excess_against_loops():
    x = torch.randn(2, 6, 5)  # a grid of 2 rows, 3 columns
    cos = lambda b, i, j: F.cosine_similarity(x[b, i], x[b, j], dim=0).item()
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    beside = [(0, 1), (1, 2), (3, 4), (4, 5), (0, 3), (1, 4), (2, 5)]
    for b, found in enumerate(analyze.neighbour_excess(x, (2, 3)).tolist()):
        mean = lambda some: sum(cos(b, i, j) for i, j in some) / len(some)
        assert found == pytest.approx(mean(beside) - mean(pairs), abs=1e-5)


def test_what_patches_share_is_what_centring_takes_off():
    model = vit().float()
    step = next(walk(model, torch.randn(2, 3, 24, 40)))
    unit = F.normalize(step.final[:, step.first :], dim=-1)
    found = analyze.cosines(step)
    torch.testing.assert_close(found["shared"], unit.mean(1).norm(dim=-1))
    alike = replace(step, final=step.final * 0 + step.final[:1, -1:])  # all patches the same
    assert analyze.cosines(alike)["shared"].tolist() == pytest.approx([1, 1], abs=1e-5)
    assert analyze.cosines(alike)["neighbours"].tolist() == pytest.approx([0, 0], abs=1e-5)
    *_, last, end = walk(model, torch.randn(2, 3, 24, 40))  # of the last block it is told once
    assert "shared" in analyze.cosines(last) and "shared" not in analyze.cosines(end)


def test_outliers_are_said_in_a_sentence():
    numbers = {"outliers": [0.0, 2.1, 0.3], "largest": [1.0, 15.0, 9.0], "median": [1.0, 3.0, 1.0]}
    assert "block 2 has most, 2.1 % of its patches" in (said := analyze.outlier_sentence(numbers)) and "the longest 5.0 medians" in said
    assert analyze.outlier_sentence(numbers | {"outliers": [0.0, 0.04, 0.0]}).startswith("no outliers")


@pytest.mark.parametrize("changes", [{}, dict(registers=2, attn_bias=True), dict(class_attn=1)], ids=str)
def test_maps_are_the_attention_of_cls_and_its_shares(changes, tmp_path, monkeypatch):
    model, img = vit(**changes).float(), torch.randint(256, (3, 3, 24, 40), dtype=torch.uint8)
    kept = analyze.survey(model, img, [analyze.features])["features"]
    one = subject(name="m", img=img, grid=(3, 5), model=model, args=SimpleNamespace(block=3, patch=None))
    seen = {name: blocks[2] for name, blocks in kept.items()}
    lights, over = [], analyze.over
    monkeypatch.setattr(analyze, "over", lambda img, light: lights.append(light) or over(img, light))
    shares = analyze.maps(tmp_path / "maps.png", [seen], [one])["m"]
    assert (lights[-1][:, 1, 2] > 0.999).all()  # the middle patch is like itself
    attention = list(walk(model, clsspec.normalise(img / 255)))[2].attention[:, :, 0]  # (P, H, keys)
    expected = {"patches": attention[..., -15:].sum(-1).mean(0)}
    if changes.get("attn_bias"):
        expected |= {"bias": attention[..., 0].mean(0), "registers": attention[..., 2:4].sum(-1).mean(0)}
    for kind, value in expected.items():
        assert shares[kind] == pytest.approx((100 * value).tolist(), abs=1e-3), kind
    assert all(sum(head) == pytest.approx(100, abs=1e-3) for head in zip(*shares.values()))
    with Image.open(tmp_path / "maps.png") as page:  # picture, two heads, similarity
        assert page.height == 4 + 4 * 116
        lit, x = page.convert("RGB"), 96 + round(112 * 40 / 24) // 2
        assert any(lit.getpixel((x + dx, 4 + 3 * 116 + y)) == (255, 0, 0) for dx in range(-30, 30) for y in range(112))  # the frame
    if changes.get("class_attn"):
        with pytest.raises(ValueError, match="block 3 of m has no .CLS. yet"):
            analyze.maps(tmp_path / "maps.png", [seen | {"looks": kept["looks"][0]}], [one])


def test_a_survey_keeps_no_more_than_it_says(monkeypatch):
    model, img, spare = vit().float(), torch.randint(256, (3, 3, 24, 40), dtype=torch.uint8), []

    def cat(tensors, *more, **named):  # what a step held must not live on behind a slice of it
        spare.extend(x.untyped_storage().nbytes() - x.nbytes for x in tensors if x.shape[1:] == (2, 16))
        return torch.concatenate(tensors, *more, **named)

    monkeypatch.setattr(torch, "cat", cat)
    survey(model, img, [analyze.features], batch=2)
    assert spare == [0] * 6  # 3 blocks, 2 batches


def test_block_and_network_are_those_that_are_asked_for(trained, tmp_path):
    analyze.main([str(trained / "plain"), "--what", "pca", "--block", "2", "--network", "student", "--pictures", "2",
                  "--out", str(tmp_path)])
    saved = json.loads((tmp_path / "analysis.json").read_text())
    img = Scenes("test", 64)(torch.arange(2))["image"]
    step = list(walk(clsspec.load(trained / "plain", "student"), clsspec.normalise(img / 255)))[1]
    expected = analyze.components(step.final[:, step.first :].half(), 3)[1]
    assert saved["pca student block=2"]["models"]["plain"]["share"] == pytest.approx(expected, rel=1e-3)


def test_maps_that_cannot_be_drawn_cost_no_other_measure(tmp_path, capsys):
    clsspec.save(clsspec.ViT(clsspec.config("nano", depth=3, class_attn=1)), tmp_path / "cait.pt")
    analyze.main([str(tmp_path / "cait.pt"), "--what", "cosines,maps", "--block", "1", "--pictures", "2",
                  "--out", str(tmp_path)])
    assert "maps: left out, block 1 of cait has no [CLS] yet" in capsys.readouterr().out
    assert json.loads((tmp_path / "analysis.json").read_text()).keys() == {"cosines"}


# --- the walk ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [*VARIANTS.values(), dict(spec=("norms", "qkv"), registers=2,
                                                              registers_path="cls")])
def test_the_walk_is_the_forward_pass(changes):
    model, img = vit(**changes), torch.randn(2, 3, 24, 40, dtype=torch.float64)
    steps, out = list(walk(model, img)), model(img)
    assert len(steps) == 4 and steps[-1].attention is None and steps[0].grid == (3, 5)
    assert torch.equal(steps[-1].points["before norm"], steps[-2].out)
    assert torch.equal(steps[-1].points["after norm"], steps[-1].out)
    torch.testing.assert_close(steps[-1].out[:, 0], out["cls"], atol=1e-9, rtol=0)
    torch.testing.assert_close(steps[-1].out[:, steps[-1].first:], out["patches"], atol=1e-9, rtol=0)
    for i, s in enumerate(steps[:3]):
        early = model(img, layers=(i + 1,))
        torch.testing.assert_close(s.final[:, s.first:], early["patches"], atol=1e-9, rtol=0)
        assert s.cls == (i >= model.join) and s.bias == model.config.attn_bias
        torch.testing.assert_close(s.attention.sum(-1), torch.ones_like(s.attention[..., 0]), atol=1e-9, rtol=0)
        before, branch, after = (s.points[p] for p in ("before norm", "attention", "after attention"))
        n = branch.shape[1]
        assert n == (1 if s.cls and changes.get("class_attn") else before.shape[1])
        torch.testing.assert_close(after, torch.cat([before[:, :n] + branch, before[:, n:]], 1))
        assert torch.equal(s.points["after norm"], model.blocks[i].norm1(before))


def disjoint():
    """A model whose [CLS] lives on dimensions 0 to 15, patches on 16 to 31, and whose blocks add nothing."""
    model = vit().float()
    with torch.no_grad():
        for block in model.blocks:
            for p in (*block.attn.proj.parameters(), *block.mlp.fc2.parameters(), block.norm1.bias):
                p.zero_()
            block.norm1.weight.fill_(2.0)
        model.patch_embed.proj.weight.zero_()
        model.patch_embed.proj.bias.zero_()
        model.cls_token.zero_()[..., :16] = torch.tensor([1.0, -1.0]).repeat(8)  # mean 0: the norm shifts nothing
        model.pos_embed.zero_()[:, 1:, 16:] = torch.tensor([3.0, -3.0]).repeat(8)
    return model


def test_a_model_of_disjoint_dimensions():
    model, img = disjoint(), torch.zeros(5, 3, 32, 32, dtype=torch.uint8)
    kept = survey(model, img, [analyze.cosines, analyze.dimensions], batch=2)
    c = analyze.means(kept["cosines"])
    assert len(c["before norm cls_patch"]) == 4 and len(c["attention cls_patch"]) == 3
    for point in ("before norm", "after norm", "after attention"):
        assert c[f"{point} cls_patch"][0] == pytest.approx(0, abs=1e-6)
        assert c[f"{point} patch_patch"][0] == pytest.approx(1, abs=1e-6)
    assert all(v.shape == (5,) for v in kept["cosines"]["before norm cls_patch"])
    d = analyze.dimension_numbers(kept["dimensions"], subject(model=model))
    assert d["before norm overlap"][:3] == pytest.approx([0] * 3, abs=1e-6)
    assert d["before norm cls"][0] == pytest.approx([1.0] * 16 + [0.0] * 16)
    assert d["before norm patch"][0] == pytest.approx([0.0] * 16 + [3.0] * 16)
    norm = 2 / 0.5**0.5  # gain 2, standard deviation sqrt(1 / 2)
    assert d["after norm patch"][0] == pytest.approx([0.0] * 16 + [norm] * 16, abs=1e-4)
    assert d["gains_cosine"][:3] == pytest.approx([1] * 3)
    assert d["gain on cls dims"][0] == d["gain on patch dims"][0] == 2.0
    clsspec.specialize(model, ("norms",))
    with torch.no_grad():
        model.blocks[0].norm1.cls.weight[:16] = 5.0
        model.blocks[0].norm1.patch.weight[16:] = 3.0
    d = analyze.dimension_numbers(survey(model, img, [analyze.dimensions])["dimensions"], subject(model=model))
    expected = {"gain on cls dims": 5, "gain on patch dims": 3, "gains_cosine": 16 / math.sqrt(29 * 13)}
    assert {k: d[k][0] for k in expected} == pytest.approx(expected)


# --- one number at a time ----------------------------------------------------------------------------


def test_cosines_of_tokens_with_given_angles():
    cls = [2.0, 0, 0, 0]
    patches = [[0.6, 0.8, 0, 0], [0.6, -0.8, 0, 0], [0, 0, 5, 0], [1, 0, 0, 0]]
    kept = analyze.cosines(step(torch.tensor([[cls, [9.0, 9, 9, 9], *patches]]), first=2))  # a register: not counted
    assert kept["before norm cls_patch"].tolist() == pytest.approx([(0.6 + 0.6 + 0 + 1) / 4])
    pairs = [0.36 - 0.64, 0, 0.6, 0, 0.6, 0]
    assert kept["attention patch_patch"].tolist() == pytest.approx([sum(pairs) / 6])
    without = analyze.cosines(step(torch.tensor([[cls, [9.0, 9, 9, 9], *patches]]), first=2, cls=False))
    assert without["before norm cls_patch"].isnan().all()


def test_what_is_kept_of_a_step_equals_loops():
    """Tokens [CLS, register, 2 x 3 patches] that differ at every point; attention bias in front of the keys."""
    torch.manual_seed(0)
    points = {p: torch.randn(2, 8, 4) for p in POINTS}
    out, final, w = torch.randn(2, 8, 4), torch.randn(2, 8, 4), torch.rand(2, 3, 8, 9)
    w = w * (w > 0.3)
    s = Step(points, out, final, w, 2, True, 1, (2, 3))
    for point in POINTS[:2]:
        kept = analyze.dimensions(s)
        torch.testing.assert_close(kept[f"{point} cls"], points[point][:, 0].abs())
        torch.testing.assert_close(kept[f"{point} patch"], sum(points[point][:, i].abs() for i in range(2, 8)) / 6)
    assert analyze.norms(s)["norm"][1, 2].item() == pytest.approx(math.hypot(*out[1, 4].tolist()))
    f = analyze.features(s)
    assert torch.equal(f["patches"], final[:, 2:].half())
    expected = [torch.dot(final[1, 0], final[1, i]) / final[1, 0].norm() / final[1, i].norm() for i in range(2, 8)]
    torch.testing.assert_close(f["cosine"][1], torch.stack(expected))
    a, row = analyze.attention(s), w[1, 2]  # picture 1, head 2
    entropy = [-sum(v * math.log(v) for v in q if v) for q in row.tolist()]
    support = [sum(v > 0 for v in q) for q in row.tolist()]
    far = [[math.hypot(i // 3 - j // 3, i % 3 - j % 3) for j in range(6)] for i in range(6)]
    distance = [sum(v * d for v, d in zip(q[3:], far[i])) / sum(q[3:]) for i, q in enumerate(row.tolist()[2:])]
    mean = lambda v: sum(v) / len(v)
    expected = {"entropy": mean(entropy[2:]), "support": mean(support[2:]),
                "cls_entropy": entropy[0], "cls_support": support[0],
                "distance": mean(distance), "to_bias": 100 * row[2:, 0].mean().item(),
                "to_cls": 100 * row[2:, 1].mean().item(),
                "to_registers": 100 * row[2:, 2].mean().item()}
    assert {k: v[1, 2].item() for k, v in a.items()} == pytest.approx(expected, rel=1e-5)
    none = {**analyze.dimensions(step(cls=False)), **analyze.features(step(attention=w[:1, :, :5], cls=False))}
    assert none["before norm cls"].isnan().all() and none["cosine"].isnan().all()


def test_the_survey_normalises_pictures_and_keeps_their_order():
    model, img = vit().float(), torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    kept = survey(model, img, [analyze.norms], batch=2)["norms"]["norm"]
    whole = [s.out[:, 1:].norm(dim=-1) for s in walk(model, train.normalise(img / 255))]
    for block in range(3):
        torch.testing.assert_close(kept[block], whole[block], atol=1e-3, rtol=1e-4)


def test_overlap_and_gains_by_hand():
    """Ten dimensions, no block, one norm: the largest tenth is the one dimension that is largest."""
    norm = torch.nn.LayerNorm(10)
    with torch.no_grad():
        norm.weight.copy_(-torch.arange(10.0))
    zero, one = torch.zeros(1, 10), torch.eye(10)
    kept = {"before norm cls": [3 * one[4:5] + one[7:8]], "before norm patch": [2 * one[4:5] + 2 * one[9:]],
            "after norm cls": [zero + 3], "after norm patch": [zero + 6]}
    n = analyze.dimension_numbers(kept, subject(model=SimpleNamespace(blocks=[], norm=norm)))
    assert n["before norm overlap"] == pytest.approx([0.5]) and n["after norm overlap"] == pytest.approx([1])
    assert n["gain on cls dims"] == [4] and n["gain on patch dims"][0] in (4, 9)
    assert n["cls gain"] == n["patch gain"] == [[-float(i) for i in range(10)]]


def test_outliers_of_patch_norms():
    x = torch.ones(2, 1 + 9, 4)  # norm 2
    x[0, 1] = 50  # row 0, column 0
    x[1, 1 + 4] = 3.1  # the middle
    x[1, 1 + 5] = 2.9  # row 1, column 2: below three medians
    x[:, 0] = 1000  # [CLS] does not count
    kept = analyze.norms(step(x, torch.zeros(0), grid=(3, 3)))
    assert kept["norm"].shape == (2, 9)
    n = analyze.norm_numbers({"norm": [kept["norm"]]}, subject(grid=(3, 3)))
    assert n["median"] == [2.0] and n["largest"] == [100.0]
    assert n["outliers"] == pytest.approx([100 * 2 / 18]) and n["on_border"] == pytest.approx([50])
    many = torch.arange(1, 1002).float().repeat(6, 1).T.reshape(1001, 6)  # 1 to 1001, six times each
    assert analyze.norm_numbers({"norm": [many]}, subject(grid=(2, 3)))["p99"] == [991]
    corner, inside, left = torch.ones(2, 12), torch.ones(1, 12), torch.ones(1, 12)
    corner[1, 3] = 9  # row 0, column 3 of 3 x 4
    inside[0, 6], left[0, 4] = 9, 9
    three = analyze.norm_numbers({"norm": [corner, inside, left]}, subject(grid=(3, 4)))  # of three blocks
    assert three["on_border"] == [100, 0, 100] and three["outliers"] == pytest.approx([100 / 24, 100 / 12, 100 / 12])
    uneven = torch.cat([torch.ones(1, 9), torch.full((1, 9), 3.5)])  # the median is of all pictures together
    assert analyze.norm_numbers({"norm": [uneven]}, subject(grid=(3, 3)))["outliers"] == [50]
    none = analyze.norm_numbers({"norm": [torch.ones(2, 9)]}, subject(grid=(3, 3)))
    assert none["outliers"] == [0] and math.isnan(none["on_border"][0])


def test_attention_that_is_uniform():
    b = analyze.attention(step(attention=torch.full((2, 3, 7, 8), 1 / 8), first=3, bias=1))
    a = {k: v.unique().tolist() for k, v in b.items()}
    assert b["entropy"].shape == (2, 3)
    corner = (0 + 1 + 1 + math.sqrt(2)) / 4  # of 2 x 2 patches every one is a corner
    expected = {"entropy": math.log(8), "support": 8, "cls_entropy": math.log(8), "cls_support": 8, "distance": corner,
                "to_bias": 12.5, "to_cls": 12.5, "to_registers": 25}
    assert {k: v[0] for k, v in a.items()} == pytest.approx(expected) and all(len(v) == 1 for v in a.values())


def test_attention_that_is_one_hot():
    w = torch.zeros(1, 1, 5, 5)
    w[0, 0, 0, 1] = 1  # [CLS] to patch (0, 0)
    w[0, 0, 1, 4] = 1  # patch (0, 0) to patch (1, 1)
    w[0, 0, 2, 4] = 1  # patch (0, 1) to patch (1, 1)
    w[0, 0, 3:, 0] = 1  # the others to [CLS]
    a = {k: v.item() for k, v in analyze.attention(step(attention=w)).items()}
    assert a == pytest.approx({"entropy": 0, "support": 1, "cls_entropy": 0, "cls_support": 1,
                               "to_bias": 0, "to_cls": 50,
                               "to_registers": 0, "distance": (math.sqrt(2) + 1) / 2})
    no_cls = analyze.attention(step(attention=w[:, :, 1:, 1:], first=0, cls=False))
    assert all(no_cls[k].isnan().all() for k in ("to_cls", "cls_entropy", "cls_support"))


def test_entmax_models_look_at_fewer_keys():
    img = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    support = {}
    for kind in ("softmax", "entmax15"):
        model = vit(attn=kind).float()
        with torch.no_grad():
            model.blocks[0].attn.qkv.weight.mul_(5)
        kept = analyze.means(survey(model, img, [analyze.attention])["attention"])
        support[kind] = kept["support"][0]
    assert support["softmax"] == [17.0, 17.0] and max(support["entmax15"]) < 15


def test_auc_by_hand():
    truth = torch.tensor([True, True, False, False, False])
    assert analyze.auc(torch.tensor([3.0, 1.0, 2.0, 1.0, 0.0]), truth) == pytest.approx((3 + 1.5) / 6)


def test_patch_labels_are_the_commonest_class():
    mask = torch.full((1, 4, 6), 255, dtype=torch.uint8)
    mask[0, :2, :2] = torch.tensor([[1, 1], [1, 2]])
    mask[0, :2, 2:4] = torch.tensor([[255, 255], [255, 2]])
    mask[0, 2:, 4:] = 0
    assert analyze.patch_labels(mask, (2, 3)).tolist() == [[1, 2, 255, 255, 255, 0]]


def test_foreground_that_is_planted():
    torch.manual_seed(0)
    labels = (torch.rand(6, 64) < 0.4).long() * 4 + (torch.rand(6, 64) < 0.5).long() * 3  # 0, 3 behind; 4, 7 in front
    front = labels >= 4
    x = 0.1 * torch.randn(6, 64, 8)
    x[..., 0] += 5 * front  # the first component
    x[..., 1] += labels % 4 == 3
    cosine = torch.where(front, 0.9, 0.1)
    labels[0, :5] = 255
    cosine[0, :5] = -1  # of patches without a class
    labels[5] = 4  # all in front: does not count
    kept = {"patches": [x, torch.randn(6, 64, 8)], "cosine": [cosine, -cosine]}
    more = dict(grid=(8, 8), mask=labels.view(6, 8, 8))  # a patch is a pixel
    n = analyze.foreground_numbers(kept, subject(**more))
    assert n["auc_cls"] == [1, 0] and n["auc_pc"][0] == 1 and 0.5 <= n["auc_pc"][1] < 0.6
    one_class = analyze.foreground_numbers(kept, subject(**more | {"mask": torch.zeros(6, 8, 8).long()}))
    assert math.isnan(one_class["auc_cls"][0])
    voc = subject(**more)
    voc.args.data, voc.args.background = "voc", None  # there, only class 0 is behind
    assert 0.5 < analyze.foreground_numbers(kept, voc)["auc_cls"][0] < 0.9
    voc.args.background = (0, 3)
    assert analyze.foreground_numbers(kept, voc)["auc_cls"][0] == 1


def test_degradation_finds_the_peak(tmp_path):
    values = [(100, 20.0, 1.9, 30.0), (200, 26.0, 1.5, 31.0), (300, 24.5, 1.6, 35.0)]
    lines = [{"step": s, "miou": m, "rmse": r, "knn": k} for s, m, r, k in values]
    lines.insert(1, {"step": 150, "loss": 3.0})
    run, log = subject(home=tmp_path), tmp_path / "log.jsonl"
    with pytest.raises(ValueError, match="public weights have none"):
        analyze.degradation({}, run)
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    d = analyze.degradation({}, run)
    assert (d["miou"]["best"], d["miou"]["best_step"], d["miou"]["last"], d["miou"]["lost"]) == (26, 200, 24.5, 1.5)
    assert d["rmse"]["best"] == 1.5 and d["rmse"]["lost"] == pytest.approx(0.1)  # lower is better
    assert d["knn"]["lost"] == 0 and d["knn"]["steps"] == [100, 200, 300]
    log.write_text(json.dumps(lines[1]))
    with pytest.raises(ValueError, match="no online probe; train with --probe-every"):
        analyze.degradation({}, run)


def test_components_are_the_axes_of_largest_variance():
    torch.manual_seed(0)
    x = torch.randn(4, 50, 5) * torch.tensor([1.0, 9, 3, 0.1, 0.1]) + 7
    pc, share = analyze.components(x, 2)
    for i, axis in enumerate((1, 2)):
        assert torch.corrcoef(torch.stack([pc[..., i].flatten(), x[..., axis].flatten().double()]))[0, 1].abs() > 0.99
    assert share == pytest.approx([100 * 81 / 91, 100 * 9 / 91], rel=0.2)


def test_colours_are_in_the_first_models_order_and_signs():
    torch.manual_seed(0)
    x = torch.randn(48, 6)
    x = torch.linalg.qr(x - x.mean(0))[0]  # uncorrelated, mean 0
    x = x.view(3, 16, 6) * torch.tensor([9.0, 5, 2, 0.1, 0.1, 0.1])
    turned = -x @ torch.linalg.qr(torch.randn(6, 6))[0]
    other = x * torch.tensor([0.3, -1, 1, 1, 1, 1])  # now the second component is the largest
    fine = x.view(3, 4, 4, 6).repeat_interleave(2, 1).repeat_interleave(2, 2).view(3, 64, 6)
    (a, b, c, d), shares = analyze.rgb([x, turned, other, fine], [(4, 4), (4, 4), (4, 4), (8, 8)])
    assert a.shape == b.shape == (3, 3, 4, 4) and d.shape == (3, 3, 8, 8) and a.min() == 0 and a.max() == 1
    assert ((a > 0) & (a < 1)).float().mean() > 0.9  # the whole range is used, and only 1 % at an end is cut
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    torch.testing.assert_close(a, c, atol=1e-4, rtol=0)
    torch.testing.assert_close(a, torch.nn.functional.avg_pool2d(d, 2), atol=0.05, rtol=0)  # quantiles differ a little
    assert shares[0][0] > shares[0][1] > shares[0][2] and shares[2][1] > shares[2][0] > shares[2][2]
    assert shares[0] == pytest.approx([100 * v / 110.03 for v in (81, 25, 4)])
    assert all(v.isfinite().all() for v in analyze.rgb([torch.ones(2, 4, 3)], [(2, 2)])[0])


# --- the command -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, more in (("plain", []), ("spec", ["--spec", "norms,qkv", "--registers", "2", "--attn", "entmax15"])):
        train.main(QUICK + more + ["--out", str(folder / name)])
    probes = [{"step": s, "miou": 20.0 + s, "rmse": 2.0, "knn": 30.0} for s in (1, 2)]
    (folder / "plain" / "log.jsonl").write_text("".join(json.dumps(p) + "\n" for p in probes))
    return folder


def test_everything_of_two_runs(trained, capsys):
    analyze.main([str(trained / "plain"), str(trained / "spec"), "--pictures", "4", "--out", str(trained / "both")])
    text, saved = capsys.readouterr().out, json.loads((trained / "both" / "analysis.json").read_text())
    assert saved.keys() == set(analyze.WHAT)
    assert all(saved[w]["models"].keys() == {"plain", "spec"} for w in set(analyze.WHAT) - {"degradation"})
    assert saved["pca"]["made"]["versions"]["torch"] and saved["pca"]["made"]["pictures"] == {"plain": 4, "spec": 4}
    assert len(saved["attention"]["models"]["spec"]["support"]) == 12
    assert len(saved["pca"]["models"]["spec"]["share"]) == 3
    assert all(f"\n{w}: plain" in text for w in analyze.WHAT)
    assert "degradation: left out of spec" in text and "no online probe" in text and not re.search(r"\bnan\b", text)
    assert Image.open(trained / "both" / "pca.png").size == (96 + 4 * 116, 3 * 116 + 4)
    made = {f.name for f in (trained / "both").glob("*.png")}
    if importlib.util.find_spec("matplotlib"):
        drawn = {*analyze.WHAT, "gains"}
        assert made == {f"{w}.png" for w in drawn} and "without matplotlib" not in text
    else:
        assert made == {"pca.png", "maps.png"} and "python -m pip install matplotlib" in text


def test_a_table_has_its_words_above_its_numbers(capsys):
    attention = {"entropy": [[1.0, 2.0]], "cls_entropy": [[math.nan, math.nan]], "support": [[17.0, 17.0]],
                 "cls_support": [[17.0, 16.0]], "distance": [1.25], "to_cls": [5.0],
                 "to_registers": [0.0], "to_bias": [0.0]}
    analyze.table("attention", "mine", attention)
    model, titles, labels, block = capsys.readouterr().out.splitlines()[1:]
    assert model == "attention: mine" and block.split() == "block 1 1.500 - 17 16 1.25 5.00 0.00 0.00".split()
    for word, number in (("patches", "1.500"), ("how far", "1.25"), ("[CLS]", "-"), ("bias", "0.00")):
        at = labels.rindex(word) if word == "bias" else labels.index(word)
        assert block[: at + len(word)].endswith(number)
    analyze.table("dimensions", "mine", {key: [0.5, 0.25] for key in analyze.BLOCKS["dimensions"]})
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[4:]] == [["block", "1"], ["final", "norm"]]


def test_what_is_the_same_everywhere_is_not_drawn():
    flat, line = {"a": [0.0, 0.0], "b": [0.0, 0.0]}, {"a": [0.0, 0.0], "b": [1.0, 2.0]}
    assert analyze.curves(["a", "b"], {"m": flat}) == [] == analyze.curves(["c"], {"m": flat})
    assert analyze.curves(["a"], {"m": {"a": [257.0, 256.9999]}}) == [] == analyze.curves(["a"], {"m": {"a": [math.nan]}})
    assert [(i, j) for i, j, *_ in analyze.curves(["a", "b"], {"m": flat, "n": line})] == [(0, 0), (1, 0), (1, 1)]
    found = {"miou": {"steps": [5, 10], "values": [1.0, 2.0]}}
    assert analyze.curves(["miou"], {"m": found}) == [(0, 0, [5, 10], [1.0, 2.0])]


@pytest.mark.parametrize("flags", [["--image-size", "1024"], ["--pictures", "10000", "--image-size", "256"]])
def test_what_the_machine_has_no_memory_for_is_not_begun(trained, monkeypatch, flags):
    monkeypatch.setattr(eval_dense, "machine_gib", lambda device: 4.0)
    monkeypatch.setattr(analyze, "pictures", lambda *_: pytest.fail("it was begun"))
    with pytest.raises(SystemExit, match="[0-9]+ pictures of [0-9]+ px would take about [0-9]+ GiB, "
                                         "and there are 4; lower --pictures or --image-size"):
        analyze.main([str(trained / "plain"), *flags])


def test_named_sets(trained, fetched_sets, capsys):
    for data, maps in (("pets", True), ("cifar10", False)):
        flags = [str(trained / "plain"), "--data", data, "--root", str(fetched_sets), "--pictures", "2"]
        img, mask = analyze.pictures(analyze.parse(flags), 16)
        assert img.shape == (2, 3, 16, 16) and (mask is not None) == maps
        analyze.main([*flags, "--what", "cosines"])
        assert f"cosines {data} sets" in json.loads((trained / "plain/analysis.json").read_text())


def test_what_is_of_a_run_is_in_its_folder(trained):
    analyze.main([str(trained / "plain"), str(trained / "spec"), "--what", "cosines", "--pictures", "2"])
    plain, spec = (json.loads((trained / n / "analysis.json").read_text())["cosines"]["models"] for n in ("plain", "spec"))
    assert plain.keys() == {"plain", "spec"} and spec == {"spec": plain["spec"]}
    plain, spec = (analyze.numbers_of(trained / n)["cosines, mean over blocks of 2 pictures"] for n in ("plain", "spec"))
    assert plain.keys() == spec.keys() and plain != spec


def test_class_attention_has_no_cls_at_first(tmp_path):
    train.main(QUICK + ["--class-attn", "2", "--attn-bias", "--out", str(tmp_path / "cait")])
    analyze.main([str(tmp_path / "cait"), "--what",
                  "cosines,dimensions,norms,attention,foreground,pca", "--pictures", "3"])
    saved = {w: v["models"]["cait"] for w, v in json.loads((tmp_path / "cait" / "analysis.json").read_text()).items()}
    for what, key in (("cosines", "before norm cls_patch"), ("dimensions", "gain on cls dims"),
                      ("attention", "cls_entropy"),
                      ("attention", "to_cls"), ("foreground", "auc_cls"), ("dimensions", "before norm overlap")):
        values = saved[what][key]
        assert len(values) in (12, 13)
        missing = [v is None or v == [None] * len(v) if not isinstance(v, float) else False for v in values]
        assert missing[:10] == [True] * 10 and (key == "to_cls" or not any(missing[10:])), key
    assert all(len(v) == 12 for v in saved["attention"].values())


def test_models_of_two_sizes(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(clsspec.SIZES, "tiny", (48, 3, 3, 4))
    train.main(QUICK + ["--size", "tiny", "--patch", "4", "--out", str(tmp_path / "tiny")])
    analyze.main([str(trained / "plain"), str(tmp_path / "tiny"), "--what", "attention,pca", "--pictures", "2",
                  "--image-size", "32", "--out", str(tmp_path / "both")])
    saved = json.loads((tmp_path / "both" / "analysis.json").read_text())
    pca = saved["pca image_size=32"]["made"]
    assert pca["grids"] == {"plain": [4, 4], "tiny": [8, 8]} and pca["pictures"]["tiny"] == 2
    assert "attention does not compare" in capsys.readouterr().out


def test_two_runs_of_one_name(trained, tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "last.pt").write_bytes((trained / "plain" / "last.pt").read_bytes())
    analyze.main([str(trained / "plain"), str(tmp_path / "plain"), "--what", "norms", "--pictures", "2"])
    saved = json.loads((tmp_path / "plain" / "analysis.json").read_text())["norms"]["models"]
    assert saved.keys() == {f"{tmp_path.name}/plain"}
    assert "norms, mean over blocks of 2 pictures" in analyze.numbers_of(tmp_path / "plain")


def test_analysis_of_public_weights_and_a_folder_of_pictures(trained, tmp_path, capsys):
    torch.save(clsspec.load(trained / "plain" / "last.pt").state_dict(), tmp_path / "dino.pth")
    for i in range(3):
        Image.new("RGB", (40 + i, 50), (i * 80, 9, 9)).save(tmp_path / f"{i}.png")
    flags = [str(tmp_path / "dino.pth"), "--image-size", "32", "--out", str(tmp_path)]
    analyze.main(flags + ["--what", "cosines,foreground,degradation,pca", "--data", str(tmp_path)])
    text = capsys.readouterr().out
    assert "cosines: dino" in text and "it wants masks" in text and "public weights have none" in text
    saved = json.loads((tmp_path / "analysis.json").read_text())
    on = f"{tmp_path.name} image_size=32"
    assert saved.keys() == {f"cosines {on}", f"pca {on}"}
    assert Image.open(tmp_path / "pca.png").size == (96 + 3 * 116, 2 * 116 + 4)
    assert saved[f"pca {on}"]["made"]["pictures"] == {"dino": 3}
    analyze.main(flags + ["--what", "norms", "--data", str(tmp_path), "--pictures", "2"])
    assert json.loads((tmp_path / "analysis.json").read_text())[f"norms {on}"]["made"]["pictures"] == {"dino": 2}
    (tmp_path / "some.txt").write_text("1.png\n2.png\n")
    for data, n in (("some.txt", 2), ("0.png", 1)):
        analyze.main(flags + ["--what", "norms,", "--data", str(tmp_path / data)])
        saved = json.loads((tmp_path / "analysis.json").read_text())
        assert saved[f"norms {data} image_size=32"]["made"]["pictures"] == {"dino": n}


def test_masks_of_a_set_on_disk(trained, tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down: the mask is not, so neither may be the picture
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / kind / split).mkdir(parents=True)
        for i in range(2):
            mask = Image.new("L", (48, 40), 0)
            mask.paste(1, (0, 0, 24, 20))
            mask.point([0, 255] + [0] * 254).convert("RGB").save(tmp_path / "images" / split / f"{i}.png", exif=turned)
            mask.save(tmp_path / "masks" / split / f"{i}.png")
    flags = [str(trained / "plain"), "--what", "foreground", "--data", "pairs", "--root",
             str(tmp_path), "--image-size", "32"]
    img, mask = analyze.pictures(analyze.parse(flags), 32)
    assert img.shape == (2, 3, 32, 32) and mask.shape == (2, 32, 32)
    assert ((img[:, 0] > 127) == (mask == 1)).float().mean() > 0.95 and (mask[:, :14, :14] == 1).all()
    analyze.main(flags + ["--out", str(tmp_path)])
    on = f"foreground pairs {tmp_path.name} image_size=32"
    numbers = json.loads((tmp_path / "analysis.json").read_text())[on]["models"]["plain"]
    assert len(numbers["auc_pc"]) == 12 and all(0.5 <= v <= 1 for v in numbers["auc_pc"])
    analyze.main(flags + ["--out", str(tmp_path), "--background", "0,1"])
    saved = json.loads((tmp_path / "analysis.json").read_text())[f"{on} background=0,1"]
    assert saved["models"]["plain"]["auc_pc"] == [None] * 12 and saved["made"]["root"] == str(tmp_path)


@pytest.mark.parametrize("flags, words", [
    ([], "give run folders or weights"), (["x", "--what", "cosine"], "unknown cosine; choose from cosines, dimensions"),
    (["x", "--compare", "a", "b"], "--compare and nothing else"),
    (["--compare", "a", "b", "--image-size", "64", "--network", "student"],
     "--compare reads results that are there, and has no use for --network --image-size"),
    (["x", "--root", "y"], "--root is for sets by name, "),
    (["x", "--what", "norms,size"], "unknown size"), (["x", "--pictures", "0"], "--pictures"),
    (["x", "--patch", "3"], "'3' is not ROW,COLUMN"),
    (["x", "--patch", "1,a"], "'a' is not a whole number"),
    (["x", "--block", "0"], "--block: 0 is outside"),
    (["x", "--background", "0,sky"], "--background"), (["x", "--background", "300"], "--background"),
    (["x", "--seconds", "3"], "--seconds")])
def test_flags_are_refused_by_the_parser(flags, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        analyze.main(flags)
    text = capsys.readouterr().err
    assert text.startswith("error: ") and words in text and text.count("\n") == 1


def test_errors_say_what_to_do(trained, tmp_path):
    model = str(trained / "plain")
    with pytest.raises(SystemExit, match="error: no checkpoint at nowhere"):
        analyze.main(["nowhere"])
    with pytest.raises(SystemExit, match="neither 'scenes', nor a folder, nor a file of paths, nor a set by name .*voc, pets"):
        analyze.main([model, "--data", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="--image-size 33 is no multiple of 8, the patch of plain; try 32"):
        analyze.main([model, "--what", "cosines", "--image-size", "33"])
    with pytest.raises(SystemExit, match="--data pairs wants in --root"):
        analyze.main([model, "--what", "foreground", "--data", "pairs", "--root", str(tmp_path)])
    with pytest.raises(SystemExit, match="--block 13: plain has 12 blocks"):
        analyze.main([model, "--what", "pca", "--block", "13"])
    with pytest.raises(SystemExit, match="--patch 8,0 is outside the 8 rows and 8 columns of plain"):
        analyze.main([model, "--what", "cosines,maps", "--patch", "8,0"])
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit, match="file cannot be written to, or is no folder"):
        analyze.main([model, "--what", "cosines", "--out", str(tmp_path / "file")])
    with pytest.raises(SystemExit, match="two models of one name"):
        analyze.main([model, model])
    for device, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        if not there:
            with pytest.raises(SystemExit, match=f"--device {device}: torch sees no GPU here; give --device cpu"):
                analyze.main([model, "--device", device])
    with pytest.raises(SystemExit, match="nothing was measured"):
        analyze.main([str(trained / "spec"), "--what", "degradation"])


def test_the_docstring_has_a_paragraph_for_every_output():
    first_words = Counter(line.split()[0] for line in analyze.__doc__.splitlines() if line and line[0] != " ")
    assert all(first_words[w] == 1 for w in analyze.WHAT)


# --- two groups of runs -------------------------------------------------------------------------------


def test_interval_by_hand():
    a, b = torch.tensor([30.0, 31, 32]).double(), torch.tensor([31.0, 33, 32]).double()
    r = analyze.interval(a, b)  # differences 1, 2, 0: mean 1, standard deviation 1; t of 2 degrees of freedom 4.303
    assert (r["a"], r["b"], r["difference"], r["n"]) == (31, 32, 1, 3)
    assert r["high"] - 1 == pytest.approx(4.303 / math.sqrt(3)) == 1 - r["low"]
    assert math.isnan(analyze.interval(a[:1], b[:1])["low"])
    assert len(analyze.T95) == 30 and list(analyze.T95) == sorted(analyze.T95, reverse=True)
    assert (analyze.T95[0], analyze.T95[4], analyze.T95[9], analyze.T95[29]) == (12.706, 2.571, 2.228, 2.042)
    many = torch.tensor([-1.0, 1.0]).double().repeat(50)
    assert analyze.interval(0 * many, many)["high"] == pytest.approx(2.042 * many.std().item() / 10)


def runs(folder, name, results, key="teacher scenes"):
    for seed, metrics in results.items():
        (folder / f"{name}-{seed}").mkdir()
        (folder / f"{name}-{seed}" / "config.json").write_text(json.dumps({"args": {"seed": seed}}))
        (folder / f"{name}-{seed}" / "eval.json").write_text(json.dumps({key: metrics, f"only {name}": metrics}))


def test_compare_pairs_seeds_and_says_when_zero_is_inside(tmp_path, capsys):
    runs(tmp_path, "a", {s: {"miou": 30 + s, "rmse": 1.5, "knn": 40 + s} for s in (0, 1, 2, 7)})
    runs(tmp_path, "b", {s: {"miou": 32 + s + 0.1 * (s == 1), "rmse": 1.6 + 0.01 * s,
                             "knn": 41 - s} for s in (0, 1, 2, 8)})
    analyze.main(["--compare", str(tmp_path / "a-*"), str(tmp_path / "b-*")])
    text = capsys.readouterr().out
    assert "paired over seeds [0, 1, 2], without [7, 8]" in text and "only" not in text
    lines = {line.split()[0]: line for line in text.splitlines() if line.startswith("    ")}
    assert lines["miou"].endswith("better") and "+2.033" in lines["miou"]
    assert lines["rmse"].endswith("worse") and lines["knn"].endswith("no difference measured: the interval contains zero")
    saved = json.loads((tmp_path / "analysis.json").read_text())
    (key, found), = saved.items()
    assert not any("*" in str(f.name) for f in tmp_path.iterdir())
    assert key.startswith("compare ") and found["results"]["teacher scenes"]["miou"]["n"] == 3 and found["made"]["command"]


def test_compare_says_in_what_runs_differ(tmp_path, capsys):
    for name, spec in (("a", []), ("b", ["norms"])):
        runs(tmp_path, name, {s: {"miou": 30 + s} for s in (0, 1)})
        for s in (0, 1):
            args = {"seed": s, "spec": spec, "out": f"{name}-{s}", "steps": 4 + (name == "b" and s)}
            (tmp_path / f"{name}-{s}" / "config.json").write_text(json.dumps({"args": args, "threads": 1 + (name == "b")}))
    for s in (0, 1):  # a flag that only newer runs know
        config = json.loads((tmp_path / f"b-{s}" / "config.json").read_text())
        config["args"]["novel"] = 1
        (tmp_path / f"b-{s}" / "config.json").write_text(json.dumps(config))
    analyze.main(["--compare", str(tmp_path / "a-*"), str(tmp_path / "b-*")])
    assert capsys.readouterr().out.splitlines()[0].endswith("seeds [0, 1]; runs differ in: novel, spec, steps, threads")


def test_compare_finds_what_was_measured_in_a_folder_since_renamed(tmp_path, capsys):
    for name in "ab":
        runs(tmp_path, name, {s: {"miou": 30} for s in (0, 1)})
        for s in (0, 1):
            found = {"models": {"old-name": {"shared": [0.5, s]}}, "made": {"pictures": {"old-name": 8}}}
            (tmp_path / f"{name}-{s}" / "analysis.json").write_text(json.dumps({"cosines": found}))
    analyze.main(["--compare", str(tmp_path / "a-*"), str(tmp_path / "b-*")])
    assert "cosines, mean over blocks of 8 pictures\n    shared" in capsys.readouterr().out
    found["made"]["command"] = f"python analyze.py other --out {tmp_path}/b-1"  # another's, put there
    (tmp_path / "b-1/analysis.json").write_text(json.dumps({"cosines": found}))
    analyze.main(["--compare", str(tmp_path / "a-*"), str(tmp_path / "b-*")])
    assert "cosines" not in capsys.readouterr().out


def test_compare_says_what_is_missing(tmp_path):
    runs(tmp_path, "a", {0: {"miou": 1}})
    runs(tmp_path, "b", {1: {"miou": 1}})
    both = ["--compare", str(tmp_path / "a-*"), str(tmp_path / "b-*")]
    with pytest.raises(SystemExit, match=r"no pairs: seeds of .* are \[0\], of .* \[1\]"):
        analyze.main(both)
    runs(tmp_path, "b", {0: {"miou": 1}}, "teacher voc")
    with pytest.raises(SystemExit, match="2 runs share no number: .* first has teacher scenes, only a, the last teacher voc"):
        analyze.main(both)
    (tmp_path / "a-0" / "eval.json").write_text("{")
    with pytest.raises(SystemExit, match="a-0/eval.json is damaged"):
        analyze.main(both)
    (tmp_path / "a-0.txt").write_text("a log, not a run")
    runs(tmp_path, "b-again", {0: {"miou": 1}})
    with pytest.raises(SystemExit, match="b-.* has two runs of seed 0"):
        analyze.main(["--compare", str(tmp_path / "b-0"), str(tmp_path / "b-*")])
    (tmp_path / "a-0" / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="a-0/config.json names no seed"):
        analyze.main(both)


@pytest.mark.parametrize("file, text", [
    *[("eval.json", f'{{"teacher scenes": {x}}}') for x in ("5", "null", '{"miou": [1, 2]}', '{"miou": "x"}')],
    *[("analysis.json", text) for text in ('{"cosines": 5}', '{"cosines": {"models": []}}',
                                           '{"cosines": {"models": {"a-0": {"shared": "x"}}}}')],
    ("config.json", '{"args": []}'), ("config.json", '{"args": {"seed": [1]}}')])
def test_damaged_files_of_a_run_are_named(tmp_path, file, text):
    for name in "ab":
        runs(tmp_path, name, {0: {"miou": 30}})
    (tmp_path / "a-0" / file).write_text(text)
    with pytest.raises(SystemExit, match=rf"a-0/{file} (is damaged, or not of this project .*; move it away|names no seed)") as err:
        analyze.main(["--compare", str(tmp_path / "a-*"), str(tmp_path / "b-*")])
    assert "\n" not in str(err.value)


def test_what_is_no_number_is_not_compared(tmp_path, capsys):
    for name in "ab":
        runs(tmp_path, name, {s: {"miou": math.nan, "rmse": None, "knn": 30 + s} for s in (0, 1)})
    analyze.main(["--compare", str(tmp_path / "a-*"), str(tmp_path / "b-*")])
    assert "miou" not in (said := capsys.readouterr().out) and "rmse" not in said and "knn" in said
    for flags, words in ((["a-*", "a-*"], "have runs in common; name two groups"), (["a-*", "a-[0-9]"], "in common"),
                         (["c-*", "a-*"], "no run folder matches '.*c-")):
        with pytest.raises(SystemExit, match=words):
            analyze.main(["--compare", *(str(tmp_path / flag) for flag in flags)])


def test_compare_knows_what_was_analysed(tmp_path, capsys):
    for name, more in (("a", 0.0), ("b", 0.25)):
        runs(tmp_path, name, {s: {"miou": 1.0} for s in (0, 1)})
        for s in (0, 1):
            numbers = {"before norm cls_patch": [0.1 + more, 0.3 + more, None],
                       "after norm patch_patch": [[0.5, 0.7], [None, None]], "x": [1.0]}
            (tmp_path / f"{name}-{s}" / "analysis.json").write_text(json.dumps({"cosines": {
                "models": {f"{name}-{s}": numbers, "beside": {"before norm cls_patch": [9.0]}},
                "made": {"pictures": {"beside": 8}}}}))
    found = analyze.compare(str(tmp_path / "a-*"), str(tmp_path / "b-*"))["results"]["cosines, mean over blocks of 8 pictures"]
    assert found.keys() == {"before norm cls_patch", "after norm patch_patch"}
    assert found["before norm cls_patch"]["a"] == pytest.approx(0.2) and found["after norm patch_patch"]["b"] == pytest.approx(0.6)
    assert found["before norm cls_patch"]["difference"] == pytest.approx(0.25)
    everything = json.loads((tmp_path / "b-1" / "eval.json").read_text())
    for k, metrics in everything.items():
        del metrics["miou"]
        metrics["absrel"] = 0.2
    (tmp_path / "b-1" / "eval.json").write_text(json.dumps(everything))  # one run lacks one, has another
    assert "teacher scenes" not in analyze.compare(str(tmp_path / "a-*"), str(tmp_path / "b-*"))["results"]
    assert {"rmse", "absrel"} == analyze.LOWER
    analyze.main(["--compare", str(tmp_path / "a-*"), str(tmp_path / "b-*")])
    assert "a difference" in capsys.readouterr().out
