"""What the README tells a reader to type, and what it shows."""

import copy
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import analyze
import clsspec
import eval_dense
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"(?:python|torchrun)[^`\n|&]*train\.py[^`\n|&#]*", README)))
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_commands():
    assert "python train.py --spec norms,qkv --spec-blocks 8" in [c.strip() for c in COMMANDS]


def test_it_can_be_read_in_ten_minutes():
    assert len(README.split()) <= 1600


@pytest.mark.parametrize("command", COMMANDS)
def test_train_commands_have_flags_that_exist(command):
    args = train.parse(shlex.split(command.split("train.py", 1)[1]))
    clsspec.config(args.size or "small", spec_blocks=args.spec_blocks, spec=args.spec, image_size=args.image_size)


@pytest.mark.parametrize("script, command", sorted(set(re.findall(r"python (eval_dense|analyze)\.py ([^`\n#]*)", README))))
def test_other_commands_have_flags_that_exist(script, command):
    args = {"eval_dense": eval_dense, "analyze": analyze}[script].parse(shlex.split(command))
    assert script != "analyze" or set(args.what) <= set(analyze.WHAT)


def test_the_run_folder_it_names_is_the_one_that_its_command_makes():
    assert f"runs/{train.parse(['--spec', 'norms,qkv', '--spec-blocks', '8', '--device', 'cpu']).out.name} " in README.replace("\n", " ")


def test_files_that_it_names_exist():
    for name in re.findall(r"(?:results/|tests/)[\w./-]*\w|\w+\.py\b", README):
        assert (ROOT / name).exists(), name


def test_every_flag_it_names_exists():
    parsed = train.parse([]), eval_dense.parse(["RUN"]), analyze.parse(["RUN"])
    known = {name.replace("_", "-") for args in parsed for name in vars(args)}
    flags = set(re.findall(r"`--([a-z-]+)", README))
    assert len(flags) > 10 and flags <= known, flags - known


def test_the_class_it_shows_is_the_one_of_the_code():
    names = {"nn": nn, "copy": copy}
    exec(next(s for s in SNIPPETS if "class Specialised" in s), names)
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 12), torch.randn(2, 5, 4)
    theirs, ours = names["Specialised"](layer), clsspec.Specialised(layer)
    for module in (theirs, ours):
        nn.init.ones_(module.cls.weight)
    assert torch.equal(theirs(x), ours(x)) and not torch.equal(ours(x)[:, 0], layer(x)[:, 0])


def test_the_shapes_it_shows_are_those_that_come_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = train.parse(["--scale", "nano", "--device", "cpu"])
    network = train.Network(args)
    (tmp_path / "runs/plain").mkdir(parents=True)
    torch.save({"model": vars(network.backbone.config), "args": {"seed": 0},
                "teacher": network.state_dict()}, "runs/plain/last.pt")
    torch.save(clsspec.ViT(clsspec.config("small", patch=14, image_size=28)).state_dict(), "dinov2_vits14_pretrain.pth")
    Image.new("RGB", (300, 225)).save("photo.jpg")
    names = {}
    for snippet in SNIPPETS[1:]:
        exec(snippet, names)
    assert (tuple(names["out"]["cls"].shape), tuple(names["out"]["patches"].shape)) == ((2, 64), (2, 36, 64))
    assert "# (2, 64), (2, 36, 64)" in README and names["model"].config.spec_blocks == 4
    assert (tuple(names["features"]["cls"].shape),
            tuple(names["features"]["patches"].shape)) == ((1, 384), (1, 16 * 21, 384))
    assert clsspec.load("specialised.pt").config == names["model"].config
