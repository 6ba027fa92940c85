"""What a variant costs, and how two groups of runs are compared."""

import json
import math

import pytest
import torch

import analyze
import clsspec
from test_clsspec import TINY


def test_the_papers_setting_costs_8_percent_of_parameters_and_no_flops():
    plain, ours = (analyze.counts(clsspec.config("large", image_size=518, spec=s), 56) for s in ((), ("norms", "qkv")))
    assert ours["parameters"] / plain["parameters"] == pytest.approx(1.083, abs=5e-4)
    assert ours["gflops"] == plain["gflops"] == plain["gflops_counted"]
    assert 1 < ours["gflops_counted"] / plain["gflops_counted"] < 1.01  # row 0 passes both copies
    assert "+8.3% parameters, +0.0% FLOPs" in analyze.paper_setting()


def test_memory_kept_grows_with_the_batch_and_leaves_out_weights():
    model = clsspec.ViT(clsspec.config("nano", **TINY))
    one, four = (analyze.kept_mib(model, torch.randn(b, 3, 32, 32)) for b in (1, 4))
    assert four == pytest.approx(4 * one, rel=0.05)
    tokens, width = 17, 32
    assert 15 < one * 2**20 / (4 * 3 * tokens * width) < 40  # numbers a block, token and dimension


def test_cost_of_every_variant():
    cfg = clsspec.config("nano", **TINY, spec=("qkv",), spec_rank=2)
    found = analyze.cost({"mine": cfg, "other": clsspec.replace(cfg, spec_rank=4)}, 32, 2, 0.0, "cpu", False)
    assert found.keys() == {*analyze.VARIANTS, "mine", "other", "plain again"}
    added = [found[k]["parameters"] - found["plain"]["parameters"] for k in ("mine", "other")]
    assert added == [2 * (32 + 96), 4 * (32 + 96)]  # in one block of three
    assert found["plain"]["step_ratio"] == found["plain"]["forward_ratio"] == [1, 1, 1]
    assert found["norms, qkv in a third"]["gflops"] == found["plain"]["gflops"] < found["4 registers"]["gflops"]
    base = clsspec.parameters_by_component(clsspec.ViT(clsspec.config("nano", **TINY)))["total"]
    other = clsspec.config("nano", **TINY, registers=3, attn_bias=True, attn="entmax15", class_attn=1)
    deep = clsspec.replace(other, depth=12)
    again = analyze.cost({"other": other, "deep": deep}, 32, 1, 0.0, "cpu", False)
    assert again["plain"]["parameters"] == found["plain"]["parameters"] == base
    assert again["plain"]["kept_mib"] == pytest.approx(found["plain"]["kept_mib"], rel=0.1)  # of a picture
    low, middle, high = again["deep"]["step_ratio"]
    assert 1.2 < low <= middle <= high and again["deep"]["step_ms"] > 1.2 * again["deep"]["forward_ms"]
    assert all(n["rounds"] == 3 and n["step_ms"] > 0 < n["step_ratio"][1] for n in found.values())


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
    runs(tmp_path, "b", {s: {"miou": 32 + s + 0.1 * (s == 1), "rmse": 1.6 + 0.01 * s, "knn": 41 - s} for s in (0, 1, 2, 8)})
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
    analyze.main(["--compare", str(tmp_path / "a-*"), str(tmp_path / "b-*")])
    assert capsys.readouterr().out.splitlines()[0].endswith("seeds [0, 1]; runs differ in: spec, steps, threads")


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


def test_compare_knows_what_was_analysed(tmp_path, capsys):
    for name, more in (("a", 0.0), ("b", 0.25)):
        runs(tmp_path, name, {s: {"miou": 1.0} for s in (0, 1)})
        for s in (0, 1):
            numbers = {"before norm cls_patch": [0.1 + more, 0.3 + more, None], "after norm patch_patch": [[0.5, 0.7], [None, None]], "x": [1.0]}
            (tmp_path / f"{name}-{s}" / "analysis.json").write_text(json.dumps({"cosines": {
                "models": {f"{name}-{s}": numbers, "beside": {"before norm cls_patch": [9.0]}}, "made": {"pictures": {"beside": 8}}}}))
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
