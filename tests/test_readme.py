"""What the README tells a reader to type."""

import re
import shlex
from pathlib import Path

import pytest

import analyze
import clsspec
import eval_dense
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"(?:python|torchrun)[^`\n|&]*train\.py[^`\n|&#]*", README)))


def test_there_are_commands():
    assert "python train.py --spec norms,qkv --spec-blocks 8" in [c.strip() for c in COMMANDS]


@pytest.mark.parametrize("command", COMMANDS)
def test_train_commands_have_flags_that_exist(command):
    args = train.parse(shlex.split(command.split("train.py", 1)[1]))
    clsspec.config(args.size, spec_blocks=args.spec_blocks, spec=args.spec, image_size=args.image_size)


@pytest.mark.parametrize("script, command", sorted(set(re.findall(r"python (eval_dense|analyze)\.py ([^`\n#]*)", README))))
def test_other_commands_have_flags_that_exist(script, command):
    args = {"eval_dense": eval_dense, "analyze": analyze}[script].parse(shlex.split(command))
    assert script != "analyze" or set(args.what) <= set(analyze.WHAT)


def test_files_that_it_names_exist():
    for name in re.findall(r"(?:results/|tests/)[\w./-]*\w|\w+\.py", README):
        assert (ROOT / name).exists(), name


def test_every_flag_it_names_exists():
    parsed = train.parse([]), eval_dense.parse([]), analyze.parse([])
    known = {name.replace("_", "-") for args in parsed for name in vars(args)}
    flags = set(re.findall(r"`--([a-z-]+)", README))
    assert len(flags) > 10 and flags <= known, flags - known
