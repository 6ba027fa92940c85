"""The command behind results/STUDY.md: it does what is left, stops in time, and writes down what it found."""

import json
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

PUBLISHED = ROOT / "results/study.jsonl"

# What a stage leaves behind, without its work.
FAKE = """
import json, pathlib, sys, time
stage, run, arm, seed = sys.argv[1:]
run = pathlib.Path(run)
run.mkdir(exist_ok=True)
if (stage, arm) == ("train", "slow"):
    (run / "log.jsonl").write_text("")
    time.sleep(60)  # until it is told to leave
if (stage, arm) == ("train", "bad"):
    sys.exit("error: not finite at step 3")
if stage == "train":
    config = {"git": "g", "torch": "t", "device": "cpu", "threads": 1}
    command = f"python train.py --data /secret/pictures --out {run}"
    config |= {"command": command, "args": {"data": "/secret/pictures"}}
    (run / "config.json").write_text(json.dumps(config))
    log = {"step": 4, "img_per_s": 2.0, "miou": 1.0, "lr": 9}
    (run / "log.jsonl").write_text(json.dumps(log) + "\\n")
elif stage == "scenes":
    judged = {"teacher scenes layer=4": {"miou": 1}, "untrained scenes": {"miou": 9},
              "teacher scenes": {"miou": 30.0 + int(seed) + (arm == "norms"), "rmse": 1.5}}
    (run / "eval.json").write_text(json.dumps(judged))
elif stage == "inside":
    found = {"models": {run.name: {"after norm cls_patch": [None, 0.5, 0.25 + int(seed)]}},
             "made": {"pictures": {run.name: 256}}}
    file = run / "analysis.json"
    file.write_text(json.dumps({"cosines": found, "cosines pictures": found}))
"""


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The study with commands that only pretend; returns a function that is its command line."""
    (tmp_path / "fake.py").write_text(FAKE)
    real = study.stages

    def stages(args, run, data, arm, seed):
        return {stage: [f"{tmp_path}/fake.py", stage, str(run), arm, str(seed)]
                for stage in real(args, run, data, arm, seed)}

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["study.py", "--root", f"{tmp_path}/runs", *map(str, flags)])
        study.main()
        return study.read(call.lines) if call.lines.exists() else []

    def rewrite(lines):
        call.lines.write_text("".join(json.dumps(line) + "\n" for line in lines))

    call.lines, call.rewrite = tmp_path / "runs/study.jsonl", rewrite
    monkeypatch.setattr(study, "stages", stages)
    monkeypatch.setattr(study, "PLAN", [("scenes", ("plain", "norms"), (0, 1))])
    monkeypatch.setattr(study, "STOP", threading.Event())
    for name in ("bad", "slow"):
        monkeypatch.setitem(study.ARMS, name, study.Arm("", (), name))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def blocks(text):
    """{head: its rows}, of all tables."""
    return {rows.splitlines()[0]: rows.splitlines()[1:] for rows in text.split("\n\n")}


@pytest.mark.parametrize("scale", study.SCALES)
def test_every_run_of_the_plan_has_flags_that_train_takes(tmp_path, scale):
    args = SimpleNamespace(tiny="pictures", nyu="nyu", scale=scale)

    def parsed(data, arm, seed):
        return train.parse(study.stages(args, tmp_path / "run", data, arm, seed)["train"][1:])

    sizes = {}
    for data, arm, seed in study.runs():
        flags = parsed(data, arm, seed)
        assert flags.seed == seed and (flags.data == "scenes") == (data == "scenes")
        if arm not in sizes:
            flags.classes = 6
            with torch.device("meta"):
                sizes[arm] = clsspec.parameters(train.Network(flags).backbone)[0]
    assert abs(sizes["wide"] / sizes["qkv4"] - 1) < 0.002 < sizes["qkv4"] / sizes["plain"] - 1
    assert parsed("scenes", "plain-half", 5).lr == parsed("scenes", "plain", 5).lr / 2


def test_arms_are_compared_with_arms_of_the_same_data():
    planned = {(data, arm, seed) for data, arm, seed in study.runs()}
    for data, arm, seed in planned:
        for control in study.ARMS[arm].controls:
            assert seed > 4 or (data, control, 0) in planned, (arm, control)


def test_it_does_what_is_left_and_compares(small, capsys):
    lines = small("--workers", 2, "--arms", "plain")
    assert [d["run"] for d in lines] == ["scenes-plain-0", "scenes-plain-1"] and not any(d["failed"] for d in lines)
    assert set(lines[0]["minutes"]) == {"train", "scenes", "untrained", "inside"}
    assert lines[0]["probes"] == [{"step": 4, "miou": 1.0}] and lines[0]["cosine by block"] == [0.5, 0.25]
    capsys.readouterr()
    lines = small("--workers", 2)
    printed = capsys.readouterr().out
    assert "plain" not in printed and printed.count("norms") == 6 and len(lines) == 4
    small("--tables")
    table = blocks(capsys.readouterr().out)
    rows = [" ".join(row.split()) for row in table["mIoU on Scenes, % ↑"]]
    assert rows == ["untrained 0, 1 9.00 ± 0.00", "plain 0, 1 30.50 ± 0.71",
                    "norms 0, 1 31.50 ± 0.71 +1.00 [+1.00, +1.00] * against plain (n = 2)"]
    assert table["cosine of [CLS] and patches, after norm1"][0].split() == ["plain", "0,", "1", "0.625", "±", "0.354"]
    assert "1 of 3 intervals leave out zero; by chance alone about 0.1 would." in table and "Failed runs: none" in table
    small("--list")
    assert "scenes-norms-1           train, scenes, inside" in capsys.readouterr().out


def test_pictures_of_the_tables(small, monkeypatch):
    monkeypatch.setattr(study, "PLAN", [("scenes", ("plain", "norms"), (0, 1, 2))])
    if study.analyze.Figure is None:
        with pytest.raises(SystemExit, match="python -m pip install matplotlib"):
            small("--draw", "--lines", PUBLISHED)
        return
    small("--workers", 2)
    small("--draw")
    made = {file.name for file in small.lines.parent.glob("*.png")}
    assert made == {"study-nano-scenes.png", "study-cosines.png"}


def test_it_stops_when_told_to_and_goes_on(tmp_path, monkeypatch, capsys):
    """With the real train.py, which is stopped as soon as it has written down a step."""
    run = tmp_path / "runs/scenes-plain-0"
    monkeypatch.setattr(study, "STOP", threading.Event())
    monkeypatch.setattr(study.signal, "signal", lambda *_: None)
    monkeypatch.setattr(study, "PLAN", [("scenes", ("plain", "norms"), (0,))])
    monkeypatch.setitem(study.ARMS, "plain", study.Arm(" ".join([*QUICK, "--steps", "100000"]), (), ""))
    monkeypatch.setattr(sys, "argv", ["study.py", "--root", str(tmp_path / "runs")])

    def when_it_works():
        while not (run / "log.jsonl").exists() or not (run / "log.jsonl").read_text():
            time.sleep(0.05)
        study.STOP.set()

    threading.Thread(target=when_it_works, daemon=True).start()
    with pytest.raises(SystemExit, match="the same command goes on"):
        study.main()
    assert capsys.readouterr().out == "scenes-plain-0: train is not done, and goes on with the next call\n"
    assert study.state_of(run)["before"]["train"] > 0 and not (tmp_path / "runs/study.jsonl").read_text()
    args = SimpleNamespace(scale="nano", tiny=None, nyu=None)
    assert (run / "last.pt").exists() and "--resume" in study.stages(args, run, "scenes", "plain", 0)["train"]


def test_it_stops_in_time(small, monkeypatch, capsys):
    monkeypatch.setattr(study, "PLAN", [("scenes", ("slow", "norms"), (0,))])
    start = time.time()
    assert small("--minutes", 0.01) == [] and time.time() - start < 10
    assert capsys.readouterr().out == "scenes-slow-0: train is not done, and goes on with the next call\n"
    assert study.state_of(small.lines.parent / "scenes-slow-0")["before"]["train"] > 0


def test_a_line_stays_when_its_folder_goes(small):
    before = small("--workers", 2)
    shutil.rmtree(small.lines.parent / "scenes-plain-0")
    assert small("--arms", "norms") == before


def test_a_line_names_no_folder_of_this_machine(small, monkeypatch, tmp_path):
    monkeypatch.setattr(study, "PLAN", [("tiny", ("plain",), (0,))])
    line, = small("--tiny", tmp_path)
    assert line["command"] == "python train.py --data path/to/tiny_imagenet --out runs/study/tiny-plain-0"
    assert "cosines tiny, mean over blocks of 256 pictures" in line["results"]
    assert "secret" not in json.dumps(line) and str(tmp_path) not in json.dumps(line)


def test_runs_with_other_threads_are_no_pair(small, capsys):
    lines = small("--workers", 2)
    {line["run"]: line for line in lines}["scenes-norms-1"]["threads"] = 2
    small.rewrite(lines)
    capsys.readouterr()
    small("--tables")
    assert "against" not in capsys.readouterr().out


def test_a_failure_is_written_down_and_not_tried_again(small, monkeypatch, capsys):
    monkeypatch.setattr(study, "PLAN", [("scenes", ("bad", "norms"), (0,))])
    lines = small()
    assert [d["run"] for d in lines] == ["scenes-bad-0", "scenes-norms-0"] and not lines[1]["failed"]
    assert "not finite at step 3" in lines[0]["failed"]["train"]
    capsys.readouterr()
    assert len(small()) == 2 and capsys.readouterr().out == ""
    small("--tables")
    assert "Failed runs: scenes-bad-0 (train)" in capsys.readouterr().out
    small("--retry")
    assert "bad-0: train FAILED" in capsys.readouterr().out


def test_arms_are_compared_with_their_own_control(small, monkeypatch, capsys):
    monkeypatch.setattr(study, "PLAN", [("scenes", ("plain", "bias", "bias-qkv4", "dino"), (0, 1))])
    lines = small("--workers", 2)
    for d in lines:
        d["results"]["teacher scenes"]["miou"] = {"plain": 30, "bias": 20, "bias-qkv4": 25, "dino": 9}[d["arm"]]
    small.rewrite(lines)
    capsys.readouterr()
    small("--tables")
    rows = blocks(capsys.readouterr().out)["mIoU on Scenes, % ↑"]
    assert [" ".join(row.split()[-8:]) for row in rows[2:4]] == [
        "[-10.00, -10.00] * against plain (n = 2)", "+5.00] * against attention bias (n = 2)"]
    assert rows[4].endswith("9.00 ± 0.00")


def test_long_runs_are_compared_late_with_half_way(small, monkeypatch, capsys):
    monkeypatch.setattr(study, "PLAN", [("scenes", ("plain", "dino", "dino-entmax"), (0, 1))])
    lines = small("--workers", 2)
    fall = {("dino", 0): -4, ("dino", 1): -2, ("dino-entmax", 0): 1, ("dino-entmax", 1): 2}
    for d in lines:  # up to step 3500 30 +- 1, from 5000 on 30 +- 1 and what it fell by; between them anything
        d["probes"] = []
        for step in range(500, 1501 if d["arm"] == "plain" else 6001, 500):
            late = fall.get((d["arm"], d["seed"]), 0) * (step > 4500)
            miou = 30 + (step // 500 % 3 - 1) + late + 9 * (step == 4000)
            d["probes"].append({"step": step, "miou": miou, "rmse": 1.0, "knn": 2.0})
    small.rewrite(lines)
    capsys.readouterr()
    small("--tables")
    rows = [" ".join(row.split()) for row in blocks(capsys.readouterr().out)["online mIoU, % ↑"]]
    assert rows == [
        "dino, 6000 steps 0, 1 -3.00 ± 1.41 -3.00 [-15.71, +9.71] against no change (n = 2)",
        "dino, 6000 steps, entmax-1.5 0, 1 1.50 ± 0.71 +4.50 [-1.85, +10.85] against dino, 6000 steps (n = 2)"]


@pytest.mark.parametrize("flags, said", [
    (["--arms", "plain,typo"], "no typo; the plan has plain"), (["--data", "tiny"], "needs --tiny"),
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


def test_the_published_tables_and_pictures_can_be_made(monkeypatch, capsys, tmp_path):
    file = tmp_path / "study.jsonl"
    shutil.copy(PUBLISHED, file)
    monkeypatch.setattr(sys, "argv", ["study.py", "--tables", "--lines", str(file)])
    study.main()
    shown = capsys.readouterr().out
    # Numbers of results/STUDY.md.
    for part in ("32.67 ± 2.03", "-1.90 [-3.53, -0.26] * against plain (n = 5)", "+2.34 [-1.54, +6.21] against dino",
                 "-0.83 [-4.38, +2.72] against plain, as many parameters", "0.835 ± 0.017", "15 of 89 intervals"):
        assert part in shown, part
    if study.analyze.Figure:
        monkeypatch.setattr(sys, "argv", ["study.py", "--draw", "--lines", str(file)])
        study.main()
        made = {picture.name for picture in tmp_path.glob("*.png")}
        assert made == {picture.name for picture in ROOT.glob("results/study-*.png")}


def test_head_ends_the_tables_without_a_word():
    command = [sys.executable, str(ROOT / "results/study.py"), "--tables", "--lines", str(PUBLISHED)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.read(10)
    child.stdout.close()
    assert child.stderr.read() == b"" and child.wait() in (0, 1)  # 0: all of it fitted into the pipe
