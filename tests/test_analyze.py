"""Every number against a case made by hand, where the answer is known; then the commands."""

import importlib.util
import json
import math
from collections import Counter

import pytest
import torch
from PIL import Image

import analyze
import clsspec
import train
from analyze import POINTS, Step, survey, walk
from conftest import QUICK
from test_clsspec import vit
from test_variants import VARIANTS


def step(x=None, attention=None, first=1, cls=True, bias=0, grid=(2, 2)):
    """A Step with the same tokens x (B, T, D) everywhere."""
    x = torch.zeros(1, first + grid[0] * grid[1], 4) if x is None else x
    return Step({p: x for p in POINTS}, x, x, attention, first, cls, bias, grid)


# --- the walk ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [*VARIANTS.values(), dict(spec=("norms", "qkv"), registers=2, registers_path="cls")])
def test_the_walk_is_the_forward_pass(changes):
    model, img = vit(**changes), torch.randn(2, 3, 24, 40, dtype=torch.float64)
    steps, out = list(walk(model, img)), model(img)
    assert len(steps) == 4 and steps[-1].attention is None and steps[0].grid == (3, 5)
    assert torch.equal(steps[-1].points["before norm"], steps[-2].out)
    assert torch.equal(steps[-1].points["after norm"], steps[-1].out)
    torch.testing.assert_close(steps[-1].out[:, 0], out["cls"], atol=1e-9, rtol=0)
    torch.testing.assert_close(steps[-1].out[:, steps[-1].first:], out["patches"], atol=1e-9, rtol=0)
    for i, s in enumerate(steps[:3]):
        early = model(img, layer=i + 1)
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
    d = analyze.dimension_numbers(model, kept["dimensions"])
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
    d = analyze.dimension_numbers(model, survey(model, img, [analyze.dimensions])["dimensions"])
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
    expected = {"entropy": mean(entropy[2:]), "support": mean(support[2:]), "cls_entropy": entropy[0], "cls_support": support[0],
                "distance": mean(distance), "to_bias": 100 * row[2:, 0].mean().item(), "to_cls": 100 * row[2:, 1].mean().item(),
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


def test_overlap_by_hand():
    assert analyze.overlap(torch.tensor([3.0, 1, 0]), torch.tensor([2.0, 0, 2])) == pytest.approx(0.5)
    assert analyze.overlap(torch.tensor([3.0, 1]), torch.tensor([6.0, 2])) == pytest.approx(1)


def test_outliers_of_patch_norms():
    x = torch.ones(2, 1 + 9, 4)  # norm 2
    x[0, 1] = 50  # row 0, column 0
    x[1, 1 + 4] = 3.1  # the middle
    x[1, 1 + 5] = 2.9  # row 1, column 2: below three medians
    x[:, 0] = 1000  # [CLS] does not count
    kept = analyze.norms(step(x, torch.zeros(0), grid=(3, 3)))
    assert kept["norm"].shape == (2, 9)
    n = analyze.norm_numbers({"norm": [kept["norm"]]}, (3, 3))
    assert n["median"] == [2.0] and n["largest"] == [100.0]
    assert n["outliers"] == pytest.approx([100 * 2 / 18]) and n["on_border"] == pytest.approx([50])
    assert n["map"] == [[[50, 0, 0], [0, 50, 0], [0, 0, 0]]]
    many = torch.arange(1, 1002).float().repeat(6, 1).T.reshape(1001, 6)  # 1 to 1001, six times each
    n = analyze.norm_numbers({"norm": [many]}, (2, 3))
    assert n["p99"] == [991] and n["quantiles"] == [pytest.approx([11, 51, 251, 501, 751, 951])]
    corner = torch.ones(2, 12)
    corner[1, 3] = 9  # row 0, column 3 of 3 x 4
    n = analyze.norm_numbers({"norm": [corner]}, (3, 4))
    assert n["map"] == [[[0, 0, 0, 50], [0] * 4, [0] * 4]] and n["on_border"] == [100]
    inside = torch.ones(1, 12)
    inside[0, 6] = 9
    assert analyze.norm_numbers({"norm": [inside]}, (3, 4))["on_border"] == [0]
    uneven = torch.cat([torch.ones(1, 9), torch.full((1, 9), 3.5)])  # the median is of all pictures together
    assert analyze.norm_numbers({"norm": [uneven]}, (3, 3))["outliers"] == [50]
    none = analyze.norm_numbers({"norm": [torch.ones(2, 9)]}, (3, 3))
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
    assert a == pytest.approx({"entropy": 0, "support": 1, "cls_entropy": 0, "cls_support": 1, "to_bias": 0, "to_cls": 50,
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
    assert analyze.patch_labels(mask, (2, 3), 3).tolist() == [[1, 2, 255, 255, 255, 0]]


def test_foreground_that_is_planted():
    torch.manual_seed(0)
    labels = (torch.rand(6, 64) < 0.4).long() * 3 + (torch.rand(6, 64) < 0.5).long()  # 0, 1 behind; 3, 4 in front
    front = labels >= 3
    x = 0.1 * torch.randn(6, 64, 8)
    x[..., 0] += 5 * front  # the first component
    x[..., 1] += labels % 3 == 1
    cosine = torch.where(front, 0.9, 0.1)
    labels[0, :5] = 255
    cosine[0, :5] = -1  # of patches without a class
    labels[5] = 3  # all in front: does not count
    n = analyze.foreground_numbers({"patches": [x, torch.randn(6, 64, 8)], "cosine": [cosine, -cosine]}, labels, (0, 1))
    assert n["auc_cls"] == [1, 0] and n["auc_pc"][0] == 1 and 0.5 <= n["auc_pc"][1] < 0.6
    one_class = analyze.foreground_numbers({"patches": [x], "cosine": [cosine]}, torch.zeros(6, 64).long(), (0, 1))
    assert math.isnan(one_class["auc_cls"][0])


def test_probes_are_read_from_eval_json(tmp_path):
    def result(miou, layer):
        return {"miou": miou, "protocol": {"layer": layer}}

    (tmp_path / "eval.json").write_text(json.dumps({
        "teacher scenes tasks=seg,depth": result(30.0, None), "teacher scenes tasks=seg layer=2": result(20.0, 2),
        "teacher scenes layer=1 seed=3": result(9.0, 1), "untrained scenes layer=1": result(8.0, 1),
        "teacher voc layer=1": result(7.0, 1), "teacher scenes tasks=knn layer=1": {"knn": 5.0, "protocol": {"layer": 1}}}))
    found = analyze.probes(tmp_path, "teacher", "scenes", "", 3)
    assert math.isnan(found[0]) and found[1:] == [20, 30]
    assert all(map(math.isnan, analyze.probes(tmp_path / "none", "teacher", "scenes", "", 2)))
    (tmp_path / "eval.json").write_text(json.dumps({"teacher pairs nyu layer=1": result(7.0, 1), "teacher pairs b layer=1": result(6.0, 1)}))
    assert analyze.probes(tmp_path, "teacher", "pairs", "at/nyu", 1) == [7]
    (tmp_path / "eval.json").write_text("{")
    with pytest.raises(ValueError, match="eval.json is damaged"):
        analyze.probes(tmp_path, "teacher", "scenes", "", 3)


def test_degradation_finds_the_peak(tmp_path):
    values = [(100, 20.0, 1.9, 30.0), (200, 26.0, 1.5, 31.0), (300, 24.5, 1.6, 35.0)]
    lines = [{"step": s, "miou": m, "rmse": r, "knn": k} for s, m, r, k in values]
    lines.insert(1, {"step": 150, "loss": 3.0})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    d = analyze.degradation(tmp_path)
    assert (d["miou"]["best"], d["miou"]["best_step"], d["miou"]["last"], d["miou"]["lost"]) == (26, 200, 24.5, 1.5)
    assert d["rmse"]["best"] == 1.5 and d["rmse"]["lost"] == pytest.approx(0.1)  # lower is better
    assert d["knn"]["lost"] == 0 and d["knn"]["steps"] == [100, 200, 300]
    with pytest.raises(ValueError, match="no online probe; train with --probe-every"):
        analyze.degradation(tmp_path / "none")


def test_components_are_the_axes_of_largest_variance():
    torch.manual_seed(0)
    x = torch.randn(4, 50, 5) * torch.tensor([1.0, 9, 3, 0.1, 0.1]) + 7
    pc, share = analyze.components(x, 2)
    for i, axis in enumerate((1, 2)):
        assert torch.corrcoef(torch.stack([pc[..., i].flatten(), x[..., axis].flatten().double()]))[0, 1].abs() > 0.99
    assert share == pytest.approx([100 * 81 / 91, 100 * 9 / 91], rel=0.2)
    keep = torch.zeros(4, 50, dtype=torch.bool)
    keep[1] = True  # there the third dimension is the largest, about a mean of its own
    x[1] = torch.randn(50, 5) * torch.tensor([1.0, 0, 5, 0, 0]) - 3
    pc, share = analyze.components(x, 1, keep)
    assert torch.corrcoef(torch.stack([pc[0, :, 0], x[0, :, 2].double()]))[0, 1].abs() > 0.95
    assert pc[1].mean().abs() < 1e-6 < pc.mean().abs() and share[0] > 90


def test_colours_are_in_the_first_models_order_and_signs():
    torch.manual_seed(0)
    x = torch.randn(48, 6)
    x = torch.linalg.qr(x - x.mean(0))[0]  # uncorrelated, mean 0
    x = x.view(3, 16, 6) * torch.tensor([9.0, 5, 2, 0.1, 0.1, 0.1])
    turned = -x @ torch.linalg.qr(torch.randn(6, 6))[0]
    other = x * torch.tensor([0.3, -1, 1, 1, 1, 1])  # now the second component is the largest
    fine = x.view(3, 4, 4, 6).repeat_interleave(2, 1).repeat_interleave(2, 2).view(3, 64, 6)
    (a, b, c, d), shares = analyze.rgb([x, turned, other, fine], [(4, 4), (4, 4), (4, 4), (8, 8)], False)
    assert a.shape == b.shape == (3, 3, 4, 4) and d.shape == (3, 3, 8, 8) and a.min() == 0 and a.max() == 1
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    torch.testing.assert_close(a, c, atol=1e-4, rtol=0)
    torch.testing.assert_close(a, torch.nn.functional.avg_pool2d(d, 2), atol=0.05, rtol=0)  # quantiles differ a little
    assert shares[0][0] > shares[0][1] > shares[0][2] and shares[2][1] > shares[2][0] > shares[2][2]
    assert shares[0] == pytest.approx([100 * v / 110.03 for v in (81, 25, 4)])
    assert all(v.isfinite().all() for v in analyze.rgb([torch.ones(2, 4, 3)], [(2, 2)], False)[0])


@pytest.mark.parametrize("sign", [1, -1])
def test_foreground_is_what_the_border_has_less_of(sign):
    inside = torch.zeros(4, 4)
    inside[1:3, 1:3] = 1
    x = (sign * 9 * inside.flatten()[:, None] * torch.eye(4)[0] + 0.1 * torch.randn(2, 16, 4))
    assert torch.equal(analyze.foreground(x, 4, 4), inside.flatten().bool().expand(2, -1))
    wide = torch.zeros(3, 5)
    wide[1, 1:4] = 1
    y = sign * 9 * wide.flatten()[:, None] * torch.eye(4)[0] + 0.1 * torch.randn(2, 15, 4)
    assert torch.equal(analyze.foreground(y, 3, 5), wide.flatten().bool().expand(2, -1))
    colour, = analyze.rgb([x], [(4, 4)], True)[0]
    shown = colour[:, :, 1:3, 1:3]  # scaled by what is shown, not by what is black
    assert shown.amin() == 0 and shown.amax() == 1 and shown.std() > 0.2
    assert (colour[:, :, 0] == 0).all() and (colour[:, :, 1:3, 1:3].amax(1) > 0).all()


# --- the command -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, more in (("plain", []), ("spec", ["--spec", "norms,qkv", "--registers", "2", "--attn", "entmax15"])):
        train.main(QUICK + more + ["--out", str(folder / name)])
    probes = [{"step": s, "miou": 20.0 + s, "rmse": 2.0, "knn": 30.0} for s in (1, 2)]
    (folder / "plain" / "log.jsonl").write_text("".join(json.dumps(p) + "\n" for p in probes))
    return folder


def test_everything_of_two_runs(trained, capsys, monkeypatch):
    monkeypatch.setattr(analyze, "cost", lambda *_: {"plain": dict.fromkeys(
        ("parameters", "gflops_counted", "gflops", "kept_mib", "rounds", "forward_ms", "step_ms"), 1.0)
        | {"forward_ratio": [1, 1, 1], "step_ratio": [1, 1, 1]}})
    analyze.main([str(trained / "plain"), str(trained / "spec"), "--pictures", "4", "--out", str(trained / "both")])
    text, saved = capsys.readouterr().out, json.loads((trained / "both" / "analysis.json").read_text())
    assert saved.keys() == set(analyze.WHAT)
    assert all(saved[w]["models"].keys() == {"plain", "spec"} for w in set(analyze.WHAT) - {"degradation", "cost"})
    assert saved["pca"]["made"]["versions"]["torch"] and saved["pca"]["made"]["pictures"] == {"plain": 4, "spec": 4}
    assert len(saved["attention"]["models"]["spec"]["support"]) == 12
    assert all(f"\n{w}: plain" in text for w in ("cosines", "dimensions", "norms", "attention", "foreground"))
    assert "best   22.000 at step 2" in text and "degradation: left out" in text and "no online probe" in text
    sheet = Image.open(trained / "both" / "pca.png")
    assert sheet.size == (2 + 3 * 130, 14 + 2 + 4 * 130)
    figures = {f"{w}.png" for w in (*analyze.WHAT, "gains")}
    made = {f.name for f in (trained / "both").glob("*.png")}
    if importlib.util.find_spec("matplotlib"):
        assert made == figures and "no matplotlib" not in text
    else:
        assert made == {"pca.png"} and "python -m pip install matplotlib" in text


def test_what_is_of_a_run_is_in_its_folder(trained):
    analyze.main([str(trained / "plain"), str(trained / "spec"), "--what", "cosines", "--pictures", "2"])
    plain, spec = (json.loads((trained / n / "analysis.json").read_text())["cosines"]["models"] for n in ("plain", "spec"))
    assert plain.keys() == {"plain", "spec"} and spec == {"spec": plain["spec"]}
    plain, spec = (analyze.numbers_of(trained / n)["cosines, mean over blocks of 2 pictures"] for n in ("plain", "spec"))
    assert plain.keys() == spec.keys() and plain != spec


def test_class_attention_has_no_cls_at_first(tmp_path):
    train.main(QUICK + ["--class-attn", "2", "--attn-bias", "--out", str(tmp_path / "cait")])
    analyze.main([str(tmp_path / "cait"), "--what", "cosines,dimensions,norms,attention,foreground,pca", "--pictures", "3"])
    saved = {w: v["models"]["cait"] for w, v in json.loads((tmp_path / "cait" / "analysis.json").read_text()).items()}
    for what, key in (("cosines", "before norm cls_patch"), ("dimensions", "gain on cls dims"), ("attention", "cls_entropy"),
                      ("attention", "to_cls"), ("foreground", "auc_cls"), ("dimensions", "before norm overlap")):
        values = saved[what][key]
        assert len(values) in (12, 13)
        missing = [v is None or v == [None] * len(v) if not isinstance(v, float) else False for v in values]
        assert missing[:10] == [True] * 10 and (key == "to_cls" or not any(missing[10:])), key
    assert all(len(v) == 12 for v in saved["attention"].values())


def test_models_of_two_sizes(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(clsspec.SIZES, "tiny", (48, 3, 3, 4))
    train.main(QUICK + ["--size", "tiny", "--patch", "4", "--out", str(tmp_path / "tiny")])
    train.main(QUICK + ["--image-size", "24", "--out", str(tmp_path / "low")])  # positions of another shape
    sizes = []
    monkeypatch.setattr(analyze, "cost", lambda given, side, *_: sizes.append((list(given), side)) or {
        k: dict.fromkeys(("parameters", "gflops_counted", "gflops", "kept_mib", "rounds", "forward_ms", "step_ms"), 1.0)
        | {"forward_ratio": [1, 1, 1], "step_ratio": [1, 1, 1]} for k in ("plain", *given)})
    analyze.main([str(trained / "plain"), str(tmp_path / "tiny"), str(trained / "spec"), str(tmp_path / "low"), "--what",
                  "attention,pca,cost", "--pictures", "2", "--image-size", "32", "--out", str(tmp_path / "both")])
    assert sizes == [(["plain", "spec"], 32), (["tiny"], 32), (["low"], 32)]
    saved = json.loads((tmp_path / "both" / "analysis.json").read_text())
    pca = saved["pca image_size=32"]["made"]
    assert pca["grids"] == {"plain": [4, 4], "tiny": [8, 8], "spec": [4, 4], "low": [4, 4]}
    assert saved["cost"]["models"].keys() == {"plain", "tiny", "low"} and pca["pictures"]["tiny"] == 2
    assert "attention does not compare" in capsys.readouterr().out


def test_analysis_of_public_weights_and_a_folder_of_pictures(trained, tmp_path, capsys):
    torch.save(clsspec.load(trained / "plain" / "last.pt").state_dict(), tmp_path / "dino.pth")
    for i in range(3):
        Image.new("RGB", (40 + i, 50), (i * 80, 9, 9)).save(tmp_path / f"{i}.png")
    analyze.main([str(tmp_path / "dino.pth"), "--what", "cosines,foreground,degradation,pca", "--data", str(tmp_path),
                  "--image-size", "32", "--network", "student", "--out", str(tmp_path)])
    text = capsys.readouterr().out
    assert "cosines: dino" in text and "it wants masks" in text and "no online probe" in text
    saved = json.loads((tmp_path / "analysis.json").read_text())
    on = f"student {tmp_path.name} image_size=32"
    assert saved.keys() == {f"cosines {on}", f"pca {on}"} and Image.open(tmp_path / "pca.png").size == (2 + 2 * 130, 16 + 3 * 130)
    assert saved[f"pca {on}"]["made"]["pictures"] == {"dino": 3}
    analyze.main([str(tmp_path / "dino.pth"), "--what", "norms,", "--data", str(tmp_path / "1.png").replace("1.png", ""),
                  "--image-size", "32", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "analysis.json").read_text()).keys() - saved.keys() == {f"norms {tmp_path.name} image_size=32"}


def test_masks_of_a_set_on_disk(trained, tmp_path, capsys):
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / kind / split).mkdir(parents=True)
        for i in range(2):
            Image.effect_noise((48, 40), 50).convert("RGB").save(tmp_path / "images" / split / f"{i}.png")
            mask = Image.new("L", (48, 40), 0)
            mask.paste(1, (0, 0, 24, 40))
            mask.save(tmp_path / "masks" / split / f"{i}.png")
    analyze.main([str(trained / "plain"), "--what", "foreground", "--data", "pairs", "--root", str(tmp_path),
                  "--image-size", "32", "--out", str(tmp_path)])
    on = f"foreground pairs {tmp_path.name} image_size=32"
    numbers = json.loads((tmp_path / "analysis.json").read_text())[on]["models"]["plain"]
    assert len(numbers["auc_pc"]) == 12 and all(0.5 <= v <= 1 for v in numbers["auc_pc"])
    analyze.main([str(trained / "plain"), "--what", "foreground", "--data", "pairs", "--root", str(tmp_path),
                  "--image-size", "32", "--out", str(tmp_path), "--background", "0,1"])
    saved = json.loads((tmp_path / "analysis.json").read_text())[f"{on} background=0,1"]
    assert saved["models"]["plain"]["auc_pc"] == [None] * 12 and saved["made"]["root"] == str(tmp_path)


@pytest.mark.parametrize("flags, words", [
    ([], "give run folders or weights"), (["x", "--what", "cosine"], "unknown cosine; choose from cosines, dimensions"),
    (["nowhere"], "no checkpoint at nowhere"), (["x", "--device", "cuda"], "torch sees no GPU here"),
    (["x", "--compare", "a", "b"], "--compare and nothing else"),
    (["x", "--what", "cost,size"], "unknown size")])
def test_errors_say_what_to_do(flags, words):
    if "cuda" in flags and torch.cuda.is_available():
        return
    with pytest.raises(SystemExit, match=f"error: .*{words}"):
        analyze.main(flags)


def test_errors_of_pictures(trained, tmp_path):
    model = str(trained / "plain")
    with pytest.raises(SystemExit, match="neither scenes, voc or pairs, nor a folder with pictures"):
        analyze.main([model, "--data", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="--image-size 33 is no multiple of 8, the patch of plain; try 32"):
        analyze.main([model, "--what", "cosines", "--image-size", "33"])
    with pytest.raises(SystemExit, match="--data pairs wants in --root"):
        analyze.main([model, "--what", "foreground", "--data", "pairs", "--root", str(tmp_path)])
    with pytest.raises(SystemExit, match="the same model twice"):
        analyze.main([model, model])
    with pytest.raises(SystemExit, match="nothing was measured"):
        analyze.main([str(trained / "spec"), "--what", "degradation"])


def test_numbers_are_json_that_anyone_can_read():
    assert json.dumps(analyze.tidy({"a": [math.nan, 1.23456789, 3, (0.1,)], "b": "x"})) == '{"a": [null, 1.2346, 3, [0.1]], "b": "x"}'


def test_the_docstring_has_a_paragraph_for_every_output():
    first_words = Counter(line.split()[0] for line in analyze.__doc__.splitlines() if line and line[0] != " ")
    assert all(first_words[w] == 1 for w in analyze.WHAT)
