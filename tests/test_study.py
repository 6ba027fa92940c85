"""The command behind results/STUDY.md: it does what is left, stops in time, and writes down what it found."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

import clsspec
import train
from conftest import QUICK, ROOT

sys.path.insert(0, str(ROOT / "results"))
import study  # noqa: E402
import tables  # noqa: E402

PUBLISHED = ROOT / "results/first-study.jsonl"

# What a stage leaves behind, without its work.
FAKE = """
import json, pathlib, sys, time
stage, run, arm, seed, flags = sys.argv[1:]
run = pathlib.Path(run)
run.mkdir(exist_ok=True)
if (stage, arm) == ("train", "slow"):
    (run / "log.jsonl").write_text("")
    time.sleep(60)  # until it is told to leave
if (stage, arm) == ("train", "bad"):
    sys.exit("error: not finite at step 3")
if stage == "train":
    config = {"git": "g", "torch": "t", "device": "cpu", "threads": 1}
    command = " ".join(f"python train.py --scale nano {flags} --seed {seed}".split()) + f" --data /secret/pictures --out {run}"
    config |= {"command": command, "args": {"data": "/secret/pictures"}}
    (run / "config.json").write_text(json.dumps(config))
    log = {"step": 4, "img_per_s": 2.0, "miou": 1.0, "lr": 9}
    (run / "log.jsonl").write_text(json.dumps(log) + "\\n")
elif stage == "scenes":
    judged = {"teacher scenes layer=4": {"miou": 1}, "untrained scenes": {"miou": 9},
              "teacher imagefolder tiny": {"knn": 7}, "teacher imagefolder tiny image_size=64": {"knn": 8.5},
              "teacher scenes": {"miou": 30.0 + int(seed) + (arm == "norms"), "rmse": 1.5}}
    (run / "eval.json").write_text(json.dumps(judged))
elif stage == "inside":
    found = {"models": {run.name: {"after norm cls_patch": [None, 0.5, 0.25 + int(seed)]}},
             "made": {"pictures": {run.name: 256}}}
    file = run / "analysis.json"
    looks = {"models": {run.name: {"support": [[65, 33.26], [1, 2]]}}, "made": found["made"]}
    file.write_text(json.dumps({"cosines": found, "cosines pictures": found, "attention": looks}))
"""


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The study with commands that only pretend; returns a function that is its command line."""
    (tmp_path / "fake.py").write_text(FAKE)
    real = study.stages

    def stages(args, run, data, arm, seed):
        return {stage: [f"{tmp_path}/fake.py", stage, str(run), arm, str(seed), study.ARMS[arm].flags]
                for stage in real(args, run, data, arm, seed)}

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["study.py", "--root", f"{tmp_path}/runs", *map(str, flags)])
        study.main()
        return study.read(call.lines) if call.lines.exists() else []

    def rewrite(lines):
        call.lines.write_text("".join(json.dumps(line) + "\n" for line in lines))

    call.lines, call.rewrite = tmp_path / "runs/study.jsonl", rewrite
    monkeypatch.setattr(study, "stages", stages)
    monkeypatch.setattr(study, "PLAN", [("scenes", ("plain", "norms"), (100, 101))])
    monkeypatch.setattr(study, "STOP", threading.Event())
    for name in ("bad", "slow"):
        monkeypatch.setitem(study.ARMS, name, study.Arm("", name, ""))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def rows(text):
    """{first words of a row: its cells}, of all tables in Markdown."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in cells}


@pytest.mark.parametrize("scale", study.SCALES)
def test_every_run_of_the_plan_has_flags_that_train_takes(tmp_path, scale):
    args = SimpleNamespace(tiny=tmp_path / "train", nyu="nyu", scale=scale)
    looks = {}
    for data, arm, seed in study.runs():
        flags = train.parse(study.stages(args, tmp_path / "run", data, arm, seed)["train"][1:])
        assert flags.seed == seed and (flags.data == "scenes") == (data == "scenes")
        judged_on_nyu = {stage for stage in study.stages(args, tmp_path / "run", data, arm, seed) if "nyu" in stage}
        assert judged_on_nyu == (set() if data == "scenes" else {"nyu", "nyu untrained"} if arm == "plain" else {"nyu"})
        looks[arm] = flags.batch_size * flags.steps
    if scale == "nano":
        assert looks["plain"] == 40_000 and abs(looks["qkv8-large"] / looks["plain"] - 1) < 0.01
        assert (looks["plain-x4"], looks["plain-x16"]) == (160_000, 640_000)


def test_a_line_says_how_far_apart_the_copies_are(tmp_path):
    student, teacher = (clsspec.ViT(clsspec.config("nano", spec=("norms", "qkv"), spec_blocks=2,
                                                   image_size=48)) for _ in range(2))
    for i, block in enumerate(teacher.blocks):
        block.norm1.cls.weight.data += 0.1 * i  # weights are 1 at first, so 0 to 1.1 of what they are
    for block, factor in zip(teacher.blocks, (3, 2)):
        block.attn.qkv.cls.weight.data = factor * block.attn.qkv.patch.weight.data
    assert study.copies(tmp_path) == {}
    torch.save({name: {f"backbone.{k}": v for k, v in vit.state_dict().items()}
                for name, vit in (("student", student), ("teacher", teacher))},
               tmp_path / "last.pt")
    assert study.copies(tmp_path) == {"norm1": 0.55, "norm2": 0.0, "qkv": 1.5}
    (tmp_path / "config.json").write_text("{}")
    assert study.line_of(tmp_path, tmp_path, "nano", "scenes", "qkv8", 40)["results"]["copies"]["qkv"] == 1.5


def test_a_run_of_other_flags_is_not_taken_for_an_arms(small, monkeypatch):
    monkeypatch.setattr(study, "PLAN", [("scenes", ("plain", "best"), (100, 101))])
    monkeypatch.setitem(study.ARMS, "best", study.Arm("--spec norms", "best"))
    assert {line["arm"] for line in small("--workers", 2)} == {"plain", "best"}
    small("--tables")
    for others in ("--spec norms,qkv", ""):  # of which the second is part of the first's command
        monkeypatch.setitem(study.ARMS, "best", study.Arm(others, "best"))
        with pytest.raises(SystemExit, match="scenes-best-10[01] was made with other flags than its arm "
                                             "has: python train.py --scale nano --spec norms --seed"):
            small("--tables")


def test_what_a_doubling_of_the_copies_rate_changes(small, monkeypatch, capsys):
    """Two points each, with four blocks 7 higher than with eight, in each seed at another level; and 2 more or less by chance."""
    arms = {f"qkv{n}" if k == 1 else f"qkv{n}-k{k}": (n, k) for n in (4, 8) for k in (1, 2, 3, 5, 10)}
    monkeypatch.setattr(study, "PLAN", [("scenes", tuple(arms), (40, 41))])
    lines = small("--workers", 2)
    for d in lines:
        n, k = arms[d["arm"]]
        d["results"]["teacher scenes"]["miou"] = 7 * (n == 4) + (2 + 0.1 * (-1) ** d["seed"]) * math.log2(k) + d["seed"]
    small.rewrite(lines)
    capsys.readouterr()
    small("--tables")
    said = "\n| mIoU % ↑ | 2 | +2.00 [+0.73, +3.27] | +2.00 [+0.73, +3.27] | +3.17 [+1.16, +5.18] | +4.64"  # 12.706 * 0.1 and more
    assert said in capsys.readouterr().out
    # then of seed 40 it is that of eight blocks alone
    small.rewrite([d for d in lines if d["run"] != "scenes-qkv4-k3-40"])
    small("--tables")
    assert said in capsys.readouterr().out


def test_whether_an_effect_grows_with_the_batch(small, monkeypatch, capsys):
    monkeypatch.setattr(study, "PLAN", [("scenes", ("plain", "qkv8", "plain-large", "qkv8-large"), (40, 41, 42))])
    lines = small("--workers", 2)
    for d in lines:
        grown = {40: 3, 41: 5}.get(d["seed"], 4) if d["arm"] == "qkv8-large" else 0
        d["results"]["teacher scenes"]["miou"] = grown + (d["arm"] == "qkv8") + d["seed"]
    small.rewrite([d for d in lines if d["run"] != "scenes-qkv8-42"])  # of 42 there is then no pair
    capsys.readouterr()
    small("--tables")
    said = "| norms, qkv in 8 blocks | norms, qkv in 8 blocks, batch 128 | mIoU % ↑ | 2 | +3.00 [-9.71, +15.71] |"  # 12.706 * 1
    assert said in capsys.readouterr().out


def test_arms_are_compared_with_arms_of_the_same_runs_and_no_seed_serves_twice():
    planned = {(data, arm, seed) for data, arms, seeds in study.PLAN for arm in arms for seed in seeds}
    for data, arm, seed in planned:
        control = study.ARMS[arm].control
        assert not control or (data, control, seed) in planned, (data, arm, seed)
    assert not set(study.CHOOSE) & set(study.CLAIM) and max(study.CHOOSE) < min(study.CLAIM) == study.CLAIM[0]


def test_it_does_what_is_left_and_compares(small, capsys):
    lines = sorted(small("--workers", 2, "--arms", "plain"), key=lambda d: d["run"])  # either may end first
    assert [d["run"] for d in lines] == ["scenes-plain-100", "scenes-plain-101"] and not any(d["failed"] for d in lines)
    assert set(lines[0]["minutes"]) == {"train", "scenes", "untrained", "inside"}
    assert lines[0]["probes"] == [{"step": 4, "miou": 1.0}] and lines[0]["cosine by block"] == [0.5, 100.25]
    assert lines[0]["support by head"] == [[65, 33.3], [1, 2]]
    capsys.readouterr()
    lines = small("--workers", 2)
    printed = capsys.readouterr().out
    assert "plain" not in printed and printed.count("norms") == 6 and len(lines) == 4
    small("--tables")
    text = capsys.readouterr().out
    table = rows(text)
    assert table["arm, control"] == ["seeds", "mIoU % ↑", "RMSE m ↓", "Tiny ImageNet k-NN % ↑", "cosine after norms",
                                           "the same, Tiny ImageNet", "keys, patches"]
    assert table["plain"] == ["100–101 (2)", "130.50 ± 0.71", "1.500 ± 0.000", "8.50 ± 0.00",
                              "50.625 ± 0.354", "50.625 ± 0.354", "25.3 ± 0.0"]
    assert table["untrained"] == ["100–101 (2)", "9.00 ± 0.00", "", "", "", "", ""]
    assert table["norms<br>minus plain"][1] == "131.50 ± 0.71<br>+1.00 [+1.00, +1.00]"
    assert all(line["cpu"] == study.cpu() != "" for line in lines)
    assert "nano, trained on Scenes, seeds for claims" in text and "4 runs, 0.0 hours of a core. Failed runs: none" in text
    small("--list")
    assert "scenes-norms-101         train, scenes, inside" in capsys.readouterr().out


def test_it_goes_on_where_the_folders_of_what_is_done_are_not(small, tmp_path, capsys):
    lines = small("--arms", "plain")
    for line in lines:
        shutil.rmtree(tmp_path / "runs" / line["run"])
    capsys.readouterr()
    small("--list")
    listed = capsys.readouterr().out
    assert "scenes-plain-100         train, scenes, inside, untrained\n" in listed and "scenes-norms-100         \n" in listed
    after = small()
    printed = capsys.readouterr().out
    assert "plain" not in printed and printed.count("norms") == 6 and after[:2] == lines and len(after) == 4


def test_a_line_without_all_stages_is_no_run_that_is_done(small, tmp_path, capsys):
    lines = small("--arms", "plain")
    for line in lines:
        shutil.rmtree(tmp_path / "runs" / line["run"])
    del lines[0]["minutes"]["untrained"]  # it was stopped there, and its folder is lost
    small.rewrite(lines)
    capsys.readouterr()
    after = small("--arms", "plain")
    printed = capsys.readouterr().out
    assert printed.count("scenes-plain-100") == 4 and "plain-101" not in printed
    assert "untrained" in after[0]["minutes"]


def test_p_values_and_their_correction():
    # of tables
    for t, freedom, p in ((2.0, 11, 0.0708), (12.706, 1, 0.05), (2.045, 29, 0.05), (0.0, 5, 1.0),
                          (-2.571, 5, 0.05)):
        assert tables.p_value(t, freedom) == pytest.approx(p, abs=2e-4)
    assert tables.holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert tables.holm([0.6, 0.9]) == pytest.approx([1.0, 1.0]) and tables.holm([]) == []


def test_claims_are_those_of_the_plan_and_corrected_for_their_number(small, monkeypatch, capsys):
    monkeypatch.setattr(study, "PLAN", [("scenes", ("plain", "norms", "qkv8-k3"), (100, 101, 102)),
                                        ("scenes", ("plain", "norms"), (40, 41))])
    lines = small("--workers", 2)
    for d in lines:
        d["results"]["teacher scenes"]["miou"] += {0: 0.05, 1: 0, 2: -0.05}.get(d["seed"] % 10, 0) * (d["arm"] == "norms")
        d["results"]["teacher scenes"]["rmse"] += 0.01 * (d["seed"] % 3) * (d["arm"] == "norms")
    small.rewrite(lines)
    capsys.readouterr()
    small("--tables")
    text = capsys.readouterr().out
    assert "seeds for choosing" in text and text.count("Claims of the plan") == 1
    claims = text.split("Holm's p for all 24):")[1].strip().split("\n\n")[0]
    found = [line for line in claims.splitlines() if line.startswith("| norms")]
    assert len(found) == 2 and "qkv" not in claims
    miou = [cell.strip() for cell in found[0].split("|")[2:-1]]
    assert miou[:3] == ["mIoU % ↑", "3 of 3", "+1.00 [+0.88, +1.12]"]
    # 24, although only two are there: those still to come count, too.
    assert float(miou[4]) == pytest.approx(24 * tables.p_value(1 / (0.05 / 3**0.5), 2), abs=2e-3)
    small.rewrite([d for d in lines if d["run"] != "scenes-norms-101"])
    small("--tables")
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| norms | mIoU"))
    assert "| 2 of 3 |" in row and row.endswith("| 1.000 |")  # a claim waits for all its pairs


def test_pictures_of_the_tables(small, monkeypatch):
    monkeypatch.setattr(study, "PLAN", [("scenes", ("plain", "norms", "best", "plain-x4", "best-x4"), (100, 101, 102))])
    for arm, control in (("best", "plain"), ("best-x4", "plain-x4")):
        monkeypatch.setitem(study.ARMS, arm, study.Arm("--spec norms", arm, control))
    if study.analyze.Figure is None:
        with pytest.raises(SystemExit, match="python -m pip install matplotlib"):
            small("--draw", "--lines", PUBLISHED)
        return
    lines = small("--workers", 2)
    for d in lines:
        d["probes"] = [{"step": step, "miou": 30, "rmse": 1, "knn": 20} for step in range(1, 9)]
    lines = [d for d in lines if d["arm"] != "best-x4" or d["seed"] == 100]
    small.rewrite(lines)
    rows, lengths, effects, online = [], [], tables.draw_effects, tables.draw_online
    monkeypatch.setattr(tables, "draw_online", lambda *a: (rows.extend(a[2]), online(*a)))
    monkeypatch.setattr(tables, "draw_effects", lambda *a, **more: (lengths.append([*a[2]]), effects(*a, **more)))
    small("--draw")
    # A row of panels for each control; an arm of one run has neither an interval nor a line.
    assert rows == [["plain", "norms", "best"], ["plain-x4"]]
    assert lengths == [["norms", "best"], ["best"]]
    made = {file.name for file in small.lines.parent.glob("*.png")}
    assert made == {"study-effects.png", "study-cosines.png", "study-steps.png", "study-online.png"}


def test_it_stops_when_told_to_and_goes_on(tmp_path, monkeypatch, capsys):
    """With the real train.py, which is stopped as soon as it has written down a step."""
    run = tmp_path / "runs/scenes-plain-0"
    monkeypatch.setattr(study, "STOP", threading.Event())
    monkeypatch.setattr(study.signal, "signal", lambda *_: None)
    monkeypatch.setattr(study, "PLAN", [("scenes", ("plain", "norms"), (0,))])
    monkeypatch.setitem(study.ARMS, "plain", study.Arm(" ".join([*QUICK, "--steps", "100000"]), "", ""))
    monkeypatch.setattr(sys, "argv", ["study.py", "--root", str(tmp_path / "runs")])

    def when_it_works():
        while not (run / "log.jsonl").exists() or not (run / "log.jsonl").read_text():
            time.sleep(0.05)
        study.STOP.set()

    threading.Thread(target=when_it_works, daemon=True).start()
    with pytest.raises(SystemExit, match="the same command goes on"):
        study.main()
    assert capsys.readouterr().out == "scenes-plain-0: train is not done, and goes on with the next call\n"
    assert study.state_of(run)["before"]["train"] > 0 and not (tmp_path / "runs/study.jsonl").exists()
    args = SimpleNamespace(scale="nano", tiny=None, nyu=None)
    assert (run / "last.pt").exists() and "--resume" in study.stages(args, run, "scenes", "plain", 0)["train"]


def test_it_stops_in_time(small, monkeypatch, capsys):
    monkeypatch.setattr(study, "PLAN", [("scenes", ("slow", "norms"), (0,))])
    start = time.time()
    assert small("--minutes", 0.01) == [] and time.time() - start < 10
    assert capsys.readouterr().out == "scenes-slow-0: train is not done, and goes on with the next call\n"
    assert study.state_of(small.lines.parent / "scenes-slow-0")["before"]["train"] > 0


def test_a_line_stays_when_its_folder_goes_and_only_runs_asked_for_are_read(small, monkeypatch):
    before, real, asked = small("--workers", 2), study.line_of, []
    shutil.rmtree(small.lines.parent / "scenes-plain-100")
    monkeypatch.setattr(study, "line_of", lambda run, *rest: asked.append(run.name) or real(run, *rest))
    assert small("--arms", "norms") == before
    assert asked == ["scenes-norms-100", "scenes-norms-101"]


def test_a_line_names_no_folder_of_this_machine(small, monkeypatch, tmp_path):
    monkeypatch.setattr(study, "PLAN", [("tiny", ("plain",), (0,))])
    line, = small("--tiny", tmp_path)
    assert line["command"] == "python train.py --scale nano --seed 0 --data path/to/tiny_imagenet --out runs/study/tiny-plain-0"
    assert "cosines tiny, mean over blocks of 256 pictures" in line["results"]
    assert "secret" not in json.dumps(line) and str(tmp_path) not in json.dumps(line)


def test_runs_of_the_studys_two_commits_are_pairs(small, capsys):
    lines = small("--workers", 2)
    for git, pair in ((study.HOUSES, True), (("ec40638", "0ther"), False)):
        for line in lines:
            line["git"] = git[line["arm"] == "norms"]
        small.rewrite(lines)
        capsys.readouterr()
        small("--tables")
        assert ("+1.00 [+1.00, +1.00]" in capsys.readouterr().out) == pair


def test_runs_with_other_threads_are_no_pair(small, capsys):
    lines = small("--workers", 2)
    {line["run"]: line for line in lines}["scenes-norms-101"]["threads"] = 2
    small.rewrite(lines)
    capsys.readouterr()
    small("--tables")
    assert "[" not in capsys.readouterr().out.replace(tables.EXPLAINED, "").replace("[95 %", "")


def test_a_failure_is_written_down_and_not_tried_again(small, monkeypatch, capsys):
    monkeypatch.setattr(study, "PLAN", [("scenes", ("bad", "norms"), (0,))])
    lines = small()
    assert [d["run"] for d in lines] == ["scenes-bad-0", "scenes-norms-0"] and not lines[1]["failed"]
    assert lines[0]["failed"] == {"train": "error: not finite at step 3"}
    capsys.readouterr()
    assert len(small()) == 2 and capsys.readouterr().out == ""
    small("--tables")
    assert "Failed runs: scenes-bad-0 (train)" in capsys.readouterr().out
    small("--retry")
    assert "bad-0: train FAILED" in capsys.readouterr().out
    state = small.lines.parent / "scenes-bad-0/study.json"
    state.write_text(json.dumps(study.state_of(state.parent) | {"failed": {}}))  # as if it had gone well now
    monkeypatch.setitem(study.ARMS, "bad", study.Arm("", "good", ""))
    small("--arms", "norms")
    small("--tables")
    assert "Failed runs: scenes-bad-0 (train)" in capsys.readouterr().out  # it is still said


def test_arms_are_compared_with_their_own_control(small, monkeypatch, capsys):
    monkeypatch.setattr(study, "PLAN", [("scenes", ("plain", "plain-large", "qkv8-large", "qkv8"), (40, 41))])
    lines = small("--workers", 2)
    for d in lines:
        d["results"]["teacher scenes"]["miou"] = {"plain": 30, "plain-large": 20, "qkv8-large": 25, "qkv8": 9}[d["arm"]]
    small.rewrite(lines)
    capsys.readouterr()
    small("--tables")
    table = rows(capsys.readouterr().out)
    assert table["norms, qkv in 8 blocks, batch 128<br>minus plain, batch 128"][1].endswith("+5.00 [+5.00, +5.00]")
    assert (table["norms, qkv in 8 blocks<br>minus plain"][1].endswith("-21.00 [-21.00, -21.00]")
            and table["plain, batch 128"][1] == "20.00 ± 0.00")


def test_late_probes_are_compared_with_those_half_way():
    def probes(last, fall):  # the middle sixth 30 +- 1, from five sixths on 30 +- 1 less `fall`; else anything
        return [{"step": step,
                 "miou": 30 + (step // 500 % 3 - 1) - fall * (step > 4500) + 9 * (step == 4000),
                 "rmse": 1.0, "knn": 2.0}
                for step in range(500, last + 1, 500)]

    assert tables.drift(probes(6000, 4)) == {"miou": -4, "rmse": 0, "knn": 0}
    assert tables.drift(probes(1000, 4)) == {} and tables.drift([]) == {}


def test_another_house_is_run(small, tmp_path, monkeypatch):
    seen = []
    real = subprocess.Popen
    monkeypatch.setattr(study.subprocess, "Popen", lambda *a, cwd, **k: seen.append(cwd) or real(*a, cwd=cwd, **k))
    monkeypatch.setattr(study, "PLAN", [("scenes", ("norms",), (100,))])
    (tmp_path / "clone").mkdir()
    small("--house", tmp_path / "clone")
    assert set(seen) == {tmp_path / "clone"}


@pytest.mark.parametrize("flags, said", [
    (["--arms", "plain,typo"], "no typo; the plan has plain"),
    (["--nyu", "nowhere"], "there is no folder"), (["--workers", "0"], "outside 1 to 64"),
    (["--minutes", "nan"], "outside 0")], ids=str)
def test_what_cannot_be_is_said_in_one_line(small, capsys, flags, said):
    with pytest.raises(SystemExit):
        small(*flags)
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == 1


def test_tables_without_a_run(small):
    with pytest.raises(SystemExit, match="run some of the plan first"):
        small("--tables")


def test_the_published_tables_can_be_made(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["study.py", "--tables", "--lines", str(PUBLISHED)])
    study.main()
    text = capsys.readouterr().out
    table = rows(text.split("trained on Tiny ImageNet")[0])
    assert "nano, trained on Scenes, an earlier study" in text and "Claims" not in text
    assert {"dino-entmax<br>minus dino", "qkv4-half<br>minus plain, half the rate",
            "registers-qkv4<br>minus registers"} <= table.keys()
    for part in ("32.28 ± 1.51<br>-0.38 [-1.20, +0.43]", "-1.67 [-2.27, -1.07]", "0.420 ± 0.051",
                 "wide<br>minus plain", "31.60 ± 1.58"):
        assert part in str(table), part  # numbers of STUDY.md
    assert "71 runs, 20.8 hours of a core. Failed runs: none" in text


def check_table(lines: list[str], group, arms: str, heads) -> None:
    """Rows of a table in Markdown, one for each arm ("-": not of the published runs), are what `tables.cell` makes."""
    numbers = lambda text: [float(number) for number in re.findall(r"[+-]?\d+\.?\d*", text.partition(" of ")[0])]
    for arm, line in zip(arms.split(), lines, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")][1:]
        for head, cell in zip(heads, cells, strict=True):
            result, metric, digits = tables.OUTCOMES[head]
            finer = tables.cell(group, arm, result, metric, digits + 3) if arm != "-" else ""
            if not finer:  # softmax gives all 65 tokens a weight
                assert arm == "-" or cell in ("", "65"), (arm, head)
                continue
            shown, made = numbers(cell), numbers(finer)
            assert len(shown) in (1, 2, len(made)), (arm, head)  # the mean; its standard deviation; the difference
            digits = len(cell.split()[0].partition(".")[2])  # may be fewer
            assert shown == pytest.approx(made[: len(shown)], abs=0.51 * 10**-digits), (arm, head)


def test_readmes_table_is_made_of_the_published_runs():
    group = tables.groups(study.read(ROOT / "results/study.jsonl"))["nano", "scenes", "seeds for claims"]
    table = (ROOT / "README.md").read_text().split("| `nano` on Scenes")[1].split("\n\n")[0].splitlines()[2:]
    check_table(table, group, "untrained plain norms qkv4 qkv8", tables.SHOWN)


FACTORS = "qkv{0} qkv{0}-k2 qkv{0}-k3 qkv{0}-k5 qkv{0}-k10 qkv{0}-fresh"
TABLES = [  # of STUDY.md: trained on, seeds, arms
    ("scenes", study.CLAIM, "untrained plain norms qkv4 qkv8"),
    ("scenes", study.CLAIM, "plain norms qkv4 qkv8"),
    ("scenes", study.CHOOSE, f"untrained plain plain-half plain-double norms norms-k3 {FACTORS.format(4)} "
                             f"{FACTORS.format(8)} plain-large qkv8-large"),
    ("scenes", study.CLAIM, "best"),
    ("scenes", study.CLAIM[:6], "plain plain-x4 qkv4-x4 best-x4"),
    ("scenes", study.CLAIM[:6], "dino-x4 dino-best-x4 dino-entmax-x4"),
    ("scenes", study.CLAIM[:6], "plain-x16 best-x16"),
    ("scenes", study.CLAIM[:6], "plain entmax plain-half entmax-half plain-double entmax-double"),
    ("tiny", study.CLAIM[:6], "- plain qkv8 best"),
    ("scenes", study.CLAIM[:3], "- tiny-width-third tiny-width-best-third tiny-width tiny-width-best")]


def test_studys_tables_are_made_of_the_published_runs():
    results = (ROOT / "results/STUDY.md").read_text().split("## Results")[1].split("### The 24 tests")[0]
    found = re.findall(r"^\|  \|(.*)\n\| ---.*\n((?:\|.*\n)+)", results, re.M)
    assert len(re.findall(r"^\| ---", results, re.M)) == len(found) + 4  # the answers, slopes, 20,000 steps without a seed, what is ruled out
    lines = study.read(ROOT / "results/study.jsonl")
    names = {"cosine after norms, Tiny ImageNet": "the same, Tiny ImageNet"}
    names |= {head.removeprefix("online "): head for head in tables.OUTCOMES}
    for (heads, table), (data, seeds, arms) in zip(found, TABLES, strict=True):
        (group,) = tables.groups([line for line in lines if line["data"] == data and line["seed"] in seeds]).values()
        heads = [head.strip().removeprefix("Scenes ") for head in heads.strip("|").split("|")]
        check_table(table.splitlines(), group, arms, [names.get(head, head) for head in heads])


def test_studys_differences_with_and_without_a_seed_are_of_the_published_runs():
    text = (ROOT / "results/STUDY.md").read_text().split("| specialised minus plain |")[1].split("\n\n")[0]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    group = tables.groups(study.read(ROOT / "results/study.jsonl"))["nano", "scenes", "seeds for claims"]

    def gained(length, head):
        values = [tables.numbers(group[f"{arm}{length}"], *tables.OUTCOMES[head][:2]) for arm in ("plain", "best")]
        return {seed: values[1][seed] - values[0][seed] for seed in study.CLAIM[:6]}

    checked = [name for name, *_ in table if name in tables.OUTCOMES]
    assert len(checked) == 9
    for name, *cells in table:
        if name in tables.OUTCOMES:
            each = gained("-x16", name)
        elif name == "... more than at 1,250 steps":
            each = {seed: value - gained("", "mIoU % ↑")[seed] for seed, value in gained("-x16", "mIoU % ↑").items()}
        else:
            continue
        for cell, seeds in zip(cells, (each, each.keys() - {100}), strict=True):
            made = tables.about({seed: each[seed] for seed in sorted(seeds)})
            shown = [float(number) for number in re.findall(r"[+-]\d+\.\d+", cell)]
            digits = len(cell.split()[0].partition(".")[2])
            assert shown == pytest.approx([made[key] for key in ("difference", "low", "high")], abs=0.51 * 10**-digits), name


def test_head_ends_the_tables_without_a_word():
    command = [sys.executable, str(ROOT / "results/study.py"), "--tables", "--lines", str(PUBLISHED)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.read(10)
    child.stdout.close()
    assert child.stderr.read() == b"" and child.wait() in (0, 1)  # 0: all of it fitted into the pipe
