"""The command behind results/STUDY.md: it does what is left, stops in time, and writes down what it found."""

import importlib.util
import json
import subprocess
import sys
import threading
import time

import pytest
import torch

import clsspec
from conftest import QUICK, ROOT

sys.path.insert(0, str(ROOT / "results"))
import study  # noqa: E402
import train  # noqa: E402


FAKE = """
import json, pathlib, sys, time
stage, run, arm, seed = sys.argv[1:]  # what a stage leaves behind, without its work
run = pathlib.Path(run)
if (stage, arm) == ("train", "slow"):
    run.mkdir(exist_ok=True)
    while True:  # until it is told to leave
        (run / "log.jsonl").open("a").write(json.dumps({"step": 4, "img_per_s": 2.0}) + "\\n")
        time.sleep(0.05)
if (stage, arm) == ("train", "bad"):
    sys.exit("error: not finite at step 3")
if (stage, arm) == ("train", "killed"):
    sys.exit(143)
run.mkdir(exist_ok=True)
if stage == "train":
    (run / "config.json").write_text(json.dumps({"git": "g", "torch": "t", "device": "cpu", "threads": 1}))
    (run / "log.jsonl").write_text(json.dumps({"step": 4, "img_per_s": 2.0, "miou": 1.0}) + "\\n")
elif stage == "scenes":
    result = {"miou": 30.0 + int(seed) + (arm == "norms"), "rmse": 1.5}
    (run / "eval.json").write_text(json.dumps({"teacher scenes layer=4": {"miou": 1}, "teacher scenes": result, "untrained scenes": {"miou": 9}}))
elif stage == "inside":
    cosines = {"models": {run.name: {"after norm cls_patch": [None, 0.5, 0.25 + int(seed)]}}, "made": {"pictures": {run.name: 256}}}
    (run / "analysis.json").write_text(json.dumps({"cosines": cosines}))
"""


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The study with commands that only pretend; returns a function that is its command line."""
    (tmp_path / "fake.py").write_text(FAKE)
    real = study.stages
    monkeypatch.setattr(study, "stages", lambda args, run, data, arm, seed: {
        stage: [f"{tmp_path}/fake.py", stage, str(run), arm, str(seed)] for stage in real(args, run, data, arm, seed)})
    monkeypatch.setattr(study, "PLAN", [("scenes", ("plain", "norms"), [0, 1])])
    monkeypatch.setattr(study, "STOP", threading.Event())

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["study.py", "--root", str(tmp_path / "runs"), *map(str, flags)])
        study.main()
        return [json.loads(line) for line in call.lines.read_text().splitlines()] if call.lines.exists() else []
    call.lines = tmp_path / "runs/study.jsonl"
    return call


@pytest.mark.parametrize("scale", study.WIDE)
def test_every_run_of_the_plan_has_flags_that_train_takes(tmp_path, scale):
    args = type("args", (), {"tiny": "pictures", "nyu": "nyu", "scale": scale})
    made = set()
    for data, arm, seed in study.names():
        parsed = train.parse(study.stages(args, tmp_path / "run", data, arm, seed)["train"][1:])
        assert parsed.seed == seed and (parsed.data == "scenes") == (data == "scenes")
        if arm not in made:
            made.add(arm)
            parsed.classes = 6
            with torch.device("meta"):
                train.Network(parsed)
    wide, qkv4 = (train.parse(study.stages(args, tmp_path, "scenes", arm, 0)["train"][1:]) for arm in ("wide", "qkv4"))
    count = lambda args: clsspec.parameters_by_component(train.Network(args).backbone)["total"]
    assert abs(count(wide) / count(qkv4) - 1) < 0.002 and wide.scale == scale
    half = train.parse(study.stages(args, tmp_path, "scenes", "plain-half", 5)["train"][1:])
    assert half.lr == qkv4.lr / 2


def test_it_does_what_is_left_and_compares(small, capsys):
    lines = small("--workers", 2, "--arms", "plain")
    assert [d["run"] for d in lines] == ["scenes-plain-0", "scenes-plain-1"] and not any(d["failed"] for d in lines)
    assert list(lines[0]["minutes"]) == ["train", "scenes", "untrained", "inside"]
    capsys.readouterr()
    lines = small("--workers", 2)
    printed = capsys.readouterr().out
    assert "plain" not in printed and printed.count("norms") == 6 and len(lines) == 4
    small("--tables")
    table = capsys.readouterr().out.splitlines()
    assert "| untrained |  | 0, 1 | 9.00 ± 0.00 |  |  |" in table
    assert "| plain |  | 0, 1 | 30.50 ± 0.71 | 1.500 ± 0.000 | 0.625 ± 0.354 |" in table
    assert ("| norms | plain | 0, 1 | 31.50 ± 0.71 (+1.00 [+1.00, +1.00]) | 1.500 ± 0.000 (+0.000 [+0.000, +0.000]) "
            "| 0.625 ± 0.354 (+0.000 [+0.000, +0.000]) |") in table and table[-1] == "failed: none"
    small("--list")
    assert "scenes-norms-1           train, scenes, inside" in capsys.readouterr().out


def test_pictures_of_the_tables(small, monkeypatch):
    monkeypatch.setattr(study, "PLAN", [("scenes", ("plain", "norms"), [0, 1, 2])])
    assert small()[0]["cosine by block"] == [0.5, 0.25]
    if not importlib.util.find_spec("matplotlib"):
        with pytest.raises(SystemExit, match="python -m pip install matplotlib"):
            small("--draw")
        return
    small("--draw")
    made = {file.name for file in small.lines.parent.glob("*.png")}
    assert made == {"study-nano-scenes.png", "study-cosines.png"}


def test_it_stops_in_time_and_goes_on(tmp_path, monkeypatch, capsys):
    """With the real train.py; the time is up as soon as it has written down a step."""
    log = tmp_path / "runs/scenes-plain-0/log.jsonl"
    count = lambda: len(log.read_text().splitlines()) if log.exists() else 0

    class UntilItWorks(subprocess.Popen):
        def wait(self, timeout=None):
            if timeout is None:
                return super().wait()
            assert 0 < timeout <= 60
            before = count()
            while self.poll() is None and count() <= before:
                time.sleep(0.05)
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(study.subprocess, "Popen", UntilItWorks)
    monkeypatch.setattr(study, "PLAN", [("scenes", ("plain",), [0])])
    monkeypatch.setitem(study.ARMS, "plain", " ".join(QUICK) + " --steps 100000")
    monkeypatch.setattr(sys, "argv", ["study.py", "--root", str(tmp_path / "runs"), "--minutes", "1"])
    logs = []
    for _ in range(2):
        study.main()
        assert "train is not done, and goes on" in capsys.readouterr().out
        logs.append(log.read_text())
    assert len(logs[1]) > len(logs[0]) > 0 and logs[1].startswith(logs[0])
    assert not (tmp_path / "runs/study.jsonl").read_text()


def test_it_leaves_when_told_to(small, monkeypatch, capsys):
    monkeypatch.setattr(study, "PLAN", [("scenes", ("slow", "norms"), [0])])
    monkeypatch.setitem(study.ARMS, "slow", "")
    log = small.lines.parent / "scenes-slow-0/log.jsonl"

    def when_it_runs():
        while not log.exists():
            time.sleep(0.05)
        study.leave()

    threading.Thread(target=when_it_runs, daemon=True).start()
    small()
    assert capsys.readouterr().out == "scenes-slow-0: train is not done, and goes on with the next call\n"
    assert not (log.parent.parent / "scenes-norms-0").exists()


def test_what_was_killed_while_it_trained_is_not_judged(small, monkeypatch, capsys):
    monkeypatch.setattr(study, "PLAN", [("scenes", ("killed", "norms"), [0])])
    monkeypatch.setitem(study.ARMS, "killed", "")
    assert [d["run"] for d in small()] == ["scenes-norms-0"]
    shown = capsys.readouterr().out
    assert "killed-0: train is not done" in shown and "killed-0: scenes" not in shown


def test_a_line_stays_as_it_is_when_somebody_plays_with_its_folder(small):
    before = small()
    for file in small.lines.parent.glob("*/eval.json"):
        file.write_text("{}")
    assert small() == before


def test_runs_with_other_threads_are_no_pair(small, capsys):
    lines = small()
    lines[3]["threads"] = 2  # norms, seed 1
    small.lines.write_text("".join(json.dumps(d) + "\n" for d in lines))
    capsys.readouterr()
    small("--tables")
    assert "| norms | plain | 0, 1 | 31.50 ± 0.71 | 1.500" in capsys.readouterr().out


def test_a_failure_is_written_down_and_not_tried_again(small, monkeypatch, capsys):
    monkeypatch.setattr(study, "PLAN", [("scenes", ("bad", "norms"), [0])])
    monkeypatch.setitem(study.ARMS, "bad", "")
    lines = small()
    assert [d["run"] for d in lines] == ["scenes-bad-0", "scenes-norms-0"] and not lines[1]["failed"]
    assert "not finite at step 3" in lines[0]["failed"]["train"]
    capsys.readouterr()
    assert len(small()) == 2 and capsys.readouterr().out == ""
    small("--tables")
    assert "failed: scenes-bad-0 (train)" in capsys.readouterr().out
    small("--retry")
    assert "bad-0: train FAILED" in capsys.readouterr().out


def test_a_failure_after_all_numbers_are_there_is_written_down_too(small, monkeypatch):
    before = small()
    file = small.lines.parent / "scenes-norms-1/study.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"failed": {"nyu": "error: no room"}}))
    assert [d["failed"] for d in small()] == [*[{}] * 3, {"nyu": "error: no room"}] and len(before) == 4


def test_arms_are_compared_with_their_own_control(small, monkeypatch, capsys):
    monkeypatch.setattr(study, "PLAN", [("scenes", ("plain", "bias", "bias-qkv4", "dino"), [0, 1])])
    small("--workers", 2)
    lines = [json.loads(line) for line in small.lines.read_text().splitlines()]
    for d in lines:
        d["results"]["teacher scenes"]["miou"] = {"plain": 30, "bias": 20, "bias-qkv4": 25, "dino": 9}[d["arm"]]
    small.lines.write_text("".join(json.dumps(d) + "\n" for d in lines))
    capsys.readouterr()
    small("--tables")
    table = capsys.readouterr().out
    assert "| bias | plain | 0, 1 | 20.00 ± 0.00 (-10.00" in table and "| bias-qkv4 | bias | 0, 1 | 25.00 ± 0.00 (+5.00" in table
    assert "| dino |  | 0, 1 | 9.00 ± 0.00 |" in table


def test_long_runs_are_compared_late_with_half_way(small, monkeypatch, capsys):
    monkeypatch.setattr(study, "PLAN", [("scenes", ("plain", "dino", "dino-entmax"), [0, 1])])
    small("--workers", 2)
    lines = [json.loads(line) for line in small.lines.read_text().splitlines()]
    fall = {("dino", 0): -4, ("dino", 1): -2, ("dino-entmax", 0): 1, ("dino-entmax", 1): 2}
    for d in lines:  # up to step 3500 30 +- 1, from 5000 on 30 +- 1 and what it fell by; between them anything
        late = lambda step: fall.get((d["arm"], d["seed"]), 0) * (step > 4500)
        steps = range(500, 6001, 500) if d["arm"] != "plain" else range(500, 1501, 500)
        d["probes"] = [{"step": s, "miou": 30 + (s // 500 % 3 - 1) + late(s) + 9 * (s == 4000), "rmse": 1.0} for s in steps]
    small.lines.write_text("".join(json.dumps(d) + "\n" for d in lines))
    capsys.readouterr()
    small("--tables")
    table = capsys.readouterr().out.split("online probes of steps 5000 to 6000 minus those of 2500 to 3500\n\n")[1]
    assert table.startswith("| arm | against | seeds | mIoU % | RMSE m |\n")  # no k-NN
    assert "| dino |  | 0, 1 | -3.00 ± 1.41 (-3.00 [-15.71, +9.71]) | 0.000 ± 0.000" in table and "plain" not in table
    assert "| dino-entmax | dino | 0, 1 | 1.50 ± 0.71 (+4.50 [-1.85, +10.85]) |" in table
    if importlib.util.find_spec("matplotlib"):
        small("--draw")
        assert (small.lines.parent / "study-nano-scenes-long.png").exists()


@pytest.mark.parametrize("flags, said", [
    (["--arms", "plain,typo"], "no typo; the plan has plain"), (["--data", "tiny"], "needs --tiny"),
    (["--nyu", "nowhere"], "there is no folder"), (["--workers", "0"], "invalid choice")], ids=str)
def test_what_cannot_be_is_said(small, capsys, flags, said):
    with pytest.raises(SystemExit):
        small(*flags)
    assert said in capsys.readouterr().err


def test_tables_without_a_run(small):
    with pytest.raises(SystemExit, match="run some of the plan first"):
        small("--tables")


def test_the_published_tables_can_be_made(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["study.py", "--tables", "--lines", str(ROOT / "results/study.jsonl")])
    study.main()
    shown = capsys.readouterr().out
    assert "nano, scenes" in shown and "| qkv4 | wide | 0, 1, 2" in shown
