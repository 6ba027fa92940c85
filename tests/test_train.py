"""The run itself: what it leaves, resume, ranks, signals, bad input."""

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
import torchvision

import clsspec
import train
from conftest import QUICK

ROOT = Path(__file__).parent.parent


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


# --- runs --------------------------------------------------------------------------------------------


def test_a_run_leaves_what_it_should_and_its_checkpoint_loads(tmp_path):
    state = run(tmp_path / "a", "--spec", "norms,qkv", "--spec-blocks", 8)
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["args"]["spec"] == ["norms", "qkv"] and config["model"]["spec_blocks"] == 8 and config["torch"]
    lines = logged(tmp_path / "a")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    keys = {"step", "epoch", "loss", "dino", "ibot", "koleo", "entropy", "usage", "kl", "cls_std", "lr", "wd", "ema", "temp",
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


@pytest.mark.parametrize("recipe, centring", [("dinov2", "sinkhorn"), ("dinov2", "ema"), ("dino", "ema")])
def test_two_ranks_equal_one_process_with_the_double_batch(tmp_path, recipe, centring):
    flags = [*QUICK, "--recipe", recipe, "--spec", "norms,qkv", "--steps", 3, "--centring", centring]
    run(tmp_path / "one", *flags, "--batch-size", 8)
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


def test_labels_of_folders_are_learnt(tmp_path):
    for i in range(24):
        (tmp_path / "set" / "abc"[i % 3] / "deeper").mkdir(parents=True, exist_ok=True)
        img = torch.zeros(3, 40, 40, dtype=torch.uint8)
        img[:, :: (2, 8, 40)[i % 3]] = 120 + 5 * i  # fine stripes, coarse stripes, one line
        torchvision.transforms.v2.functional.to_pil_image(img).save(tmp_path / "set" / "abc"[i % 3] / f"deeper/{i}.png")
    folder = train.Folder(str(tmp_path / "set"), 32)
    assert list(folder.classes) == ["a", "b", "c"] and [folder[i][1] for i in (0, 8, 23)] == [0, 1, 2]
    flags = ["--recipe", "deit3", "--data", tmp_path / "set", "--batch-size", 12, "--lr", "2e-2", "--mixup", 0, "--cutmix", 0,
             "--colour", 0, "--ema", 0.5, "--steps", 40, "--workers", 0]
    state = run(tmp_path / "r", *flags)
    lines = logged(tmp_path / "r")
    assert {"bce", "top1"} <= lines[0].keys() and "dino" not in lines[0]
    assert lines[0]["bce"] == pytest.approx(math.log(2), abs=0.05)  # of a coin
    assert lines[-1]["bce"] < 0.4 and sum(line["top1"] for line in lines[-4:]) / 4 > 80
    assert state["student"]["cls_head.weight"].shape == (3, 64)
    folder.files[0] = str(tmp_path / "gone.png")
    assert folder[0][1] == folder.labels[1] and len(folder[0][2]) == 1


def test_a_supervised_run_is_resumed_to_the_same_bits(tmp_path):
    flags = ["--recipe", "deit3", "--drop-path", 0.2]
    whole = run(tmp_path / "whole", *flags, "--steps", 4)
    code, save = [], train.save
    train.save = lambda path, state: (save(path, state), code.append(state["step"]), os.kill(os.getpid(), signal.SIGTERM))
    try:
        with pytest.raises(SystemExit):
            run(tmp_path / "parts", *flags, "--steps", 4, "--save-every", 2)
    finally:
        train.save = save
    assert code[0] == 2
    parts = run(tmp_path / "parts", *flags, "--steps", 4, "--save-every", 2, "--resume")
    assert same(whole["student"], parts["student"]) and same(whole["teacher"], parts["teacher"])


# --- when things go wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize("flags, words", [
    (["--spec", "norm"], "unknown component 'norm'"), (["--spec", "qkv", "--spec-blocks", 13], "outside 0 to 12"),
    (["--image-size", 36, "--source-size", 36], "no multiple of the patch"), (["--local-size", 18, "--dry-run"], "--local-size 18.*try 16"),
    (["--image-size", 64], "--source-size 32 is less than --image-size 64"), (["--local-size", 18], "--local-size 18.*try 16"),
    (["--batch-size", 17], "17 pictures is larger than the set.*has 16"), (["--batch-size", 1], "KoLeo needs a neighbour"),
    (["--data", "nowhere"], "--data nowhere: neither"), (["--device", "cuda"], "--device cuda: torch sees no GPU"), (["--resume", "--out", "nowhere"], "there is no nowhere/last.pt")])
def test_bad_flags_are_one_clear_line(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = error(*flags)
    assert message.startswith("error: ")
    assert re.search(words, message), message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flag", ["--steps", "--batch-size", "--log-every"])
def test_counts_are_one_or_more(flag, capsys):
    with pytest.raises(SystemExit):
        train.main([*QUICK, flag, "0"])
    assert f"argument {flag}: must be 1 or more, not 0" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--recipe", "simclr"], ["--size", "giant"], ["--centring", "none"]])
def test_unknown_names_list_the_known_ones(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        train.main([*QUICK, *flags])
    assert caught.value.code == 2 and "choose from" in capsys.readouterr().err


def test_labels_want_a_folder_for_each_class(tmp_path):
    pictures(tmp_path / "set")
    flags = ["--recipe", "deit3", "--out", tmp_path / "r", "--data"]
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
    with pytest.raises(ValueError, match="neither a checkpoint of train.py nor a ViT"):
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
    for words in ("scale large", "625000 steps", "K = 131072", "[CLS] copies", "peak", "logits 7.8"):
        assert words in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ranks", [1, 2])
def test_bench_times_both_networks_in_turns_and_leaves_nothing(tmp_path, ranks):
    out = script(*QUICK, "--class-attn", 2, "--bench", 3, cwd=tmp_path, ranks=ranks)
    rows = {line[:14].strip(): line[14:].split() for line in out.splitlines() if "[" in line and "quartiles" not in line}
    assert list(rows) == ["as given", "plain", "plain again", "views alone"] and rows["plain"][2:] == ["1.000", "[1.000,", "1.000]"]
    ms, speed = float(rows["plain"][0]), float(rows["plain"][1])
    assert ms * speed == pytest.approx(1000 * 4 * ranks, rel=0.02)
    assert not list(tmp_path.iterdir())


def test_bench_compares_what_it_says(monkeypatch, capsys, tmp_path):
    """As given with its variant, plain without, plain again the very same network; labels have views of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(clsspec.SIZES, "nano", (64, 2, 1, 8))
    calls, real = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda args, learner, *rest: calls.append((id(learner), args.attn, args.spec, rest[-3]))
                        or real(args, learner, *rest))
    train.main([*QUICK, "--attn", "entmax15", "--spec", "norms", "--bench", "2"])
    given, plain = calls[0][:3], calls[3][:3]
    assert given[1:] == ("entmax15", ("norms",)) and plain[1:] == ("softmax", ())
    assert [c[:3] for c in calls[:6]] == [given] * 3 + [plain] * 3
    for step, turn in ((3, calls[6:9]), (4, calls[9:])):  # equal work in a round
        assert sorted(c[:3] for c in turn) == sorted([given, plain, plain]) and {c[3] for c in turn} == {step}
    torch.manual_seed(0)
    torch.save(train.Network(train.parse(QUICK)).backbone.state_dict(), "w.pth")
    train.main([*QUICK, "--init", "w.pth", "--spec", "norms", "--bench", "1"])
    assert [c[2] for c in calls[-3:]].count(()) == 2  # plain is plain then, too
    train.main([*QUICK, "--recipe", "deit3", "--bench", "1"])
    assert "views alone" in capsys.readouterr().out
    run(Path("spec"), "--spec", "norms", "--steps", "1")
    for flags in ([], ["--spec", "norms"]):
        assert "the weights in spec/last.pt are specialised" in error(*flags, "--init", "spec/last.pt", "--bench", "1")
