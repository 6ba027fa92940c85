"""The study of results/STUDY.md: train, judge and measure a list of runs, then compare them.

    python results/study.py --list                      # the runs in their order, what is done
    python results/study.py --minutes 60 --workers 2    # go on for an hour, two runs at once
    python results/study.py --minutes 60 --scale small  # the same with ViT-S/16, for a GPU
    python results/study.py --tiny path/to/tiny_imagenet --nyu path/to/nyu   # real pictures, too
    python results/study.py --tables --lines results/study.jsonl   # the published runs, in tables
    python results/study.py --draw --lines results/study.jsonl     # and in pictures beside them

What is done is skipped. At the time limit, or at Ctrl-C, a run saves its checkpoint and the next
call goes on with it. Every finished run is a line of ROOT/study.jsonl: command, versions, all
numbers; a run with a line there, but without a folder, is skipped too, so that the study can go on
elsewhere: --lines FILE. A command that fails is written down there, and tried again with --retry.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch

HOUSE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOUSE))  # so that it runs from any folder

import analyze  # noqa: E402
from clsspec import need  # noqa: E402
from eval_dense import Parser, names, one_line, read_json, read_log, within, write  # noqa: E402

# --------------------------------------------------------------------------------------------------
# The list. A run is (data, arm, seed): what it is trained on, which flags are tried, which random
# numbers it sees. Another question is a few more rows of ARMS and a line of PLAN.


class Arm(NamedTuple):
    flags: str  # of train.py
    label: str  # what it is, in words
    control: str = "plain"  # the arm that it is compared with, seed by seed; "": with none


QKV4, QKV8 = (f"--spec norms,qkv --spec-blocks {blocks}" for blocks in (4, 8))
BEST = f"{QKV4} --cls-lr 2"  # had the most mIoU of the specialised with seeds 40 to 45
WIDE = "--size tiny --patch 8"
X4, X16 = "--steps 5000 --probe-every 250", "--steps 20000 --probe-every 1000"
LARGE = "--batch-size 128 --steps 312 --probe-every 0"  # as many looks at pictures in a quarter
ARMS = {
    "untrained": Arm("", "untrained", ""),  # no runs of its own: what plain ones are at step 0
    # Question 1: is there a difference of a point?
    "plain": Arm("", "plain", ""),
    "norms": Arm("--spec norms", "norms"),
    "qkv4": Arm(QKV4, "norms, qkv in 4 blocks"),
    "qkv8": Arm(QKV8, "norms, qkv in 8 blocks"),
    # Question 2: where does it come from? The learning rate of [CLS]'s copies, and all of it; how
    # they start; how many pictures a step shows them.
    **{f"qkv{n}-k{k}": Arm(f"{spec} --cls-lr {k}", f"norms, qkv in {n} blocks, copies {k} x")
       for n, spec in ((8, QKV8), (4, QKV4)) for k in (2, 3, 5, 10)},
    "norms-k3": Arm("--spec norms --cls-lr 3", "norms, copies 3 x"),
    "qkv8-fresh": Arm(f"{QKV8} --spec-init fresh", "norms, qkv in 8 blocks, drawn anew"),
    "qkv4-fresh": Arm(f"{QKV4} --spec-init fresh", "norms, qkv in 4 blocks, drawn anew"),
    # On another CPU than `plain`, which rounds otherwise: how much arms differ by chance alone.
    "plain-again": Arm("", "plain, again on another CPU"),
    "plain-half": Arm("--lr 2e-3", "plain, half the rate"),
    "plain-double": Arm("--lr 8e-3", "plain, twice the rate"),
    "plain-large": Arm(LARGE, "plain, batch 128", ""),
    "qkv8-large": Arm(f"{LARGE} {QKV8}", "norms, qkv in 8 blocks, batch 128", "plain-large"),
    "best": Arm(BEST, "norms, qkv in 4 blocks, copies 2 x"),
    # Question 3: from how many steps on does it pay? Does anything degrade?
    "plain-x4": Arm(X4, "plain, 5,000 steps", ""),
    "best-x4": Arm(f"{X4} {BEST}", "norms, qkv in 4 blocks, copies 2 x, 5,000 steps", "plain-x4"),
    "qkv4-x4": Arm(f"{X4} {QKV4}", "norms, qkv in 4 blocks, 5,000 steps", "plain-x4"),
    "plain-x16": Arm(X16, "plain, 20,000 steps", ""),
    "best-x16": Arm(f"{X16} {BEST}", "norms, qkv in 4 blocks, copies 2 x, 20,000 steps",
                    "plain-x16"),
    "dino-x4": Arm(f"--recipe dino {X4}", "dino, 5,000 steps", ""),
    "dino-best-x4": Arm(f"--recipe dino {X4} {BEST}", "dino, norms, qkv in 4 blocks, copies 2 x, "
                        "5,000 steps", "dino-x4"),
    "dino-entmax-x4": Arm(f"--recipe dino {X4} --attn entmax15", "dino, entmax-1.5, 5,000 steps",
                          "dino-x4"),
    # Question 4: entmax with `dinov2`.
    "entmax": Arm("--attn entmax15", "entmax-1.5"),
    "entmax-half": Arm("--attn entmax15 --lr 2e-3", "entmax-1.5, half the rate", "plain-half"),
    "entmax-double": Arm("--attn entmax15 --lr 8e-3", "entmax-1.5, twice the rate", "plain-double"),
    # Question 6: a wider network. (5, real pictures, has arms of the others.)
    "tiny-width": Arm(WIDE, "width 192, plain", ""),
    "tiny-width-best": Arm(f"{WIDE} {BEST}", "width 192, norms, qkv in 4 blocks, copies 2 x",
                           "tiny-width"),
    # nano's learning rate is for width 64, and proved too high for three times that width.
    "tiny-width-third": Arm(f"{WIDE} --lr 1.33e-3", "width 192, plain, a third of the rate", ""),
    "tiny-width-best-third": Arm(f"{WIDE} --lr 1.33e-3 {BEST}", "width 192, norms, qkv in 4 "
                                 "blocks, copies 2 x, a third of the rate", "tiny-width-third"),
    # Question 1: is it the parameters? Plain has as many here as with norms and qkv in 4 blocks.
    "plain-wide": Arm("--mlp-ratio 2.535", "plain, as many parameters as qkv in 4 blocks"),
}
CHOOSE, CLAIM = tuple(range(40, 46)), tuple(range(100, 112))  # seeds: none is used for both
PLAN = [  # (data, arms, seeds), in the order of the questions
    ("scenes", ("plain", "norms", "qkv4", "qkv8"), CLAIM),
    ("scenes", ("plain", "norms", "qkv8", "qkv8-k2", "qkv8-k3", "qkv8-k5", "qkv8-k10", "qkv8-fresh",
                "plain-half", "plain-double", "norms-k3", "plain-large", "qkv8-large"), CHOOSE),
    ("scenes", ("qkv4", "qkv4-k2", "qkv4-k3", "qkv4-k5", "qkv4-k10", "qkv4-fresh"), CHOOSE),
    ("scenes", ("plain-again",), CHOOSE),
    ("scenes", ("best",), CLAIM),
    ("scenes", ("plain-x4", "best-x4", "qkv4-x4"), CLAIM[:6]),
    ("scenes", ("dino-x4", "dino-best-x4", "dino-entmax-x4"), CLAIM[:6]),
    ("scenes", ("plain-x16", "best-x16"), CLAIM[:6]),
    ("scenes", ("entmax", "plain-half", "entmax-half", "plain-double", "entmax-double"), CLAIM[:6]),
    ("tiny", ("plain", "qkv8", "best"), CLAIM[:6]),
    ("scenes", ("tiny-width", "tiny-width-best"), CLAIM[:3]),
    ("scenes", ("plain-wide",), CLAIM[:6]),
    ("scenes", ("tiny-width-third", "tiny-width-best-third"), CLAIM[:3]),
]
# The commits whose scripts made the runs. They count as one: the second mends --spec-init fresh,
# which failed, and makes all other runs to the same bits.
HOUSES = "ec40638", "06087fe"
# The plan's claims: differences of these arms to their controls, in these outcomes.
CLAIMS = (("norms", "qkv4", "qkv8", "best", "best-x4", "qkv4-x4"),
          ("mIoU", "RMSE", "linear", "k-NN"))
SCALES = "nano", "small"
DATA = {"scenes": "Scenes", "tiny": "Tiny ImageNet"}


def runs() -> list[tuple[str, str, int]]:
    """Every (data, arm, seed), once. Seed by seed, so that the first pairs are there early."""
    every = [(data, arm, seed) for data, arms, seeds in PLAN for seed in seeds for arm in arms]
    return list(dict.fromkeys(every))


def name_of(scale: str, data: str, arm: str, seed: int) -> str:
    """A run's name, and that of its folder below --root."""
    name = f"{data}-{arm}-{seed}"
    return name if scale == "nano" else f"{scale}-{name}"


def stages(args, run: Path, data: str, arm: str, seed: int) -> dict[str, list[str]]:
    """{stage: command} of a run. Each can be repeated without harm."""
    resume = "--resume" if (run / "last.pt").exists() else "--overwrite"
    pictures = ["--data", str(args.tiny)] if data == "tiny" else []
    judge = ["eval_dense.py", str(run)]
    measure = ["analyze.py", str(run), "--pictures", "256", "--what"]
    nyu = judge + ["--data", "pairs", "--root", str(args.nyu)]
    train = ["train.py", "--scale", args.scale, *ARMS[arm].flags.split(), "--seed", str(seed),
             *pictures,
             "--no-probe",  # the next stage judges
             "--save-every", "50",  # so that little is lost at the time limit
             "--out", str(run), resume]
    out = {"train": train, "scenes": judge, "inside": measure + ["cosines,dimensions,attention"]}
    if data == "tiny":  # `inside` is of Scenes; this is of pictures like those it has learnt from
        out["inside tiny"] = measure + ["cosines", "--data", str(args.tiny)]
        out["tiny"] = judge + ["--data", "imagefolder", "--root", str(args.tiny.parent),
                               "--image-size", "64"]  # theirs; at the usual 224 it takes an hour
        if args.nyu:
            out["nyu"] = nyu
            if arm == "plain":  # all arms of a seed begin like this one
                out["nyu untrained"] = nyu + ["--network", "untrained"]
    if (data, arm) == ("scenes", "plain"):
        out["untrained"] = judge + ["--network", "untrained"]
    return out


# --------------------------------------------------------------------------------------------------
# Working through the list.

STOP = threading.Event()  # set by Ctrl-C and the like


def state_of(run: Path) -> dict:
    """What is done: {"minutes": {stage: minutes}, "before": {stage that was cut short: minutes so
    far}, "failed": {stage: its last words}, "retried": what had failed before, "cpu"}."""
    usual = {"minutes": {}, "before": {}, "failed": {}, "retried": {}, "cpu": ""}
    return usual | read_json(run / "study.json")


def cpu() -> str:
    """This machine's CPU, and the instructions that torch uses on it: others round otherwise."""
    file = Path("/proc/cpuinfo")  # Linux
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return ", ".join([*names[:1], torch.backends.cpu.get_cpu_capability()])


def call(house: Path, command: list[str], log: Path, end: float) -> int:
    """Run one command until it ends, the time is up or STOP is set. Returns its exit code."""
    with open(log, "a") as out:
        child = subprocess.Popen([sys.executable, *command], cwd=house, stdout=out, stderr=out)
    while child.poll() is None and time.time() < end and not STOP.wait(0.1):
        pass
    child.terminate()  # train.py then saves a checkpoint; no effect on a command that has ended
    return child.wait()


def work(args, end: float, data: str, arm: str, seed: int) -> None:
    """Take one run as far as the time allows."""
    name = name_of(args.scale, data, arm, seed)
    run, log = args.root / name, args.root / f"{name}.txt"
    state = state_of(run)
    if args.retry:
        state["retried"], state["failed"] = state["retried"] | state["failed"], {}
    for stage, command in stages(args, run, data, arm, seed).items():
        if stage in state["minutes"]:
            continue
        if state["failed"] or STOP.is_set() or time.time() > end:
            return
        start = time.time()
        code = call(args.house, command, log, end)
        minutes = (time.time() - start) / 60 + state["before"].pop(stage, 0)
        if code == 0:
            state["minutes"][stage] = minutes
            state["cpu"] = state["cpu"] or cpu()
            said = f"{minutes:.1f} min"
        elif STOP.is_set() or time.time() > end:  # we ended it
            state["before"][stage] = minutes
            said = "is not done, and goes on with the next call"
        else:  # it ended by itself: its last words go into study.jsonl
            words = log.read_text().strip() or f"exit code {code}"
            state["failed"] = {stage: words.splitlines()[-1][-500:]}
            said = f"FAILED, see {log}"
        write(run / "study.json", json.dumps(state))
        print(f"{name}: {stage} {said}", flush=True)
        if code:
            return  # a run that is not trained to its end is not judged


def copies(run: Path) -> dict[str, float]:
    """How far [CLS]'s copies have gone from the patches': |W_cls - W_patch| / |W_patch| of the
    teacher's layers, mean over those of each name; empty for a plain network."""
    file, found = run / "last.pt", {}
    weights = torch.load(file, weights_only=True)["teacher"] if file.exists() else {}
    for name, w_cls in weights.items():
        if name.endswith(".cls.weight"):
            *_, layer, _, _ = name.split(".")  # norm1, norm2, qkv
            w_patch = weights[name.replace(".cls.", ".patch.")]
            found.setdefault(layer, []).append((w_cls - w_patch).norm() / w_patch.norm())
    return {layer: round(torch.stack(each).mean().item(), 4) for layer, each in found.items()}


def line_of(run: Path, root: Path, scale: str, data: str, arm: str, seed: int) -> dict:
    """A run's line of study.jsonl, from its files."""
    state, config = state_of(run), read_json(run / "config.json")
    log = run / "log.jsonl"
    steps = read_log(log) if log.exists() else []
    keep = "step", "loss", "kl", "entropy", "miou", "rmse", "knn"
    # A line must not hold paths of this machine, as it may be published.
    command = config.get("command", "").replace(str(root), "runs/study")
    pictures = config.get("args", {}).get("data", "")
    if data == "tiny":
        command = command.replace(pictures, "path/to/tiny_imagenet")
    results = {}
    for result, found in analyze.numbers_of(run).items():
        result = result.replace(f"cosines {Path(pictures).name},", "cosines tiny,")
        results[result] = {metric: round(x, 4) for metric, x in found.items()}
    results |= {"copies": parted} if (parted := copies(run)) else {}
    inside = {what: found.get("models", {}).get(run.name, {})
              for what, found in read_json(run / "analysis.json").items()}
    by_block = inside.get("cosines", {}).get("after norm cls_patch", ())
    by_head = inside.get("attention", {}).get("support", ())  # lists of the blocks' heads
    return {
        "run": run.name, "scale": scale, "data": data, "arm": arm, "seed": seed,
        "command": command, **{key: config.get(key) for key in analyze.SETTING},
        "minutes": {stage: round(m, 1) for stage, m in state["minutes"].items()},
        "failed": state["failed"], "retried": state["retried"], "cpu": state["cpu"],
        "img_per_s": mean(step["img_per_s"] for step in steps) if steps else 0,
        "probes": [{k: step[k] for k in keep if k in step} for step in steps if "miou" in step],
        "results": results,
        # None where a block has no [CLS] yet: class attention
        "cosine by block": [round(x, 4) for x in by_block if x is not None],
        "support by head": [[round(x, 1) for x in heads] for heads in by_head]}


def read(file: Path) -> list[dict]:
    if not file.exists():
        raise ValueError(f"there is no {file}; run some of the plan first: python results/study.py "
                         "--minutes 60, or give --lines results/study.jsonl, the published runs")
    return [json.loads(line) for line in file.read_text().splitlines()]


def collect(root: Path, file: Path, scale: str, one: tuple[str, str, int]) -> None:
    """Write a run's line to `file`, if it is judged, or failed."""
    run = root / name_of(scale, *one)
    state = state_of(run)
    if state["failed"] or {"train", "scenes", "inside"} <= state["minutes"].keys():
        # Other lines stay, so that their folders may be moved away or be on another machine.
        lines = {line["run"]: line for line in read(file)} if file.exists() else {}
        lines[run.name] = line_of(run, root, scale, *one)
        write(file, "".join(json.dumps(line) + "\n" for line in lines.values()))


# --------------------------------------------------------------------------------------------------


def folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text}")
    return Path(text).absolute()  # commands run in the repository, not here


def parse() -> argparse.Namespace:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--house", type=folder, default=HOUSE, help="the scripts to run, a clone at the "
                   "commit of the study, as runs of two commits are no pair (default: these)")
    p.add_argument("--root", type=Path, default=Path("runs/study"), help="folder of the runs")
    p.add_argument("--lines", type=Path, help="file of numbers (default: ROOT/study.jsonl)")
    p.add_argument("--minutes", type=within(float, 0, 1e6), default=60, help="limit (default: 60)")
    p.add_argument("--workers", type=within(int, 1, 64), default=1, help="runs at once, default 1")
    p.add_argument("--scale", choices=SCALES, default="nano", help="(default: nano)")
    p.add_argument("--arms", type=names, help="only these arms, a comma list")
    p.add_argument("--tiny", type=folder, help="Tiny ImageNet's train/, beside its val/; runs on "
                   "it are else left out")
    p.add_argument("--nyu", type=folder, help="NYU Depth v2, `pairs` of eval_dense.py: judge on "
                   "it what has learnt on Tiny ImageNet")
    p.add_argument("--list", action="store_true", help="print the plan and stop")
    p.add_argument("--tables", action="store_true", help="print tables and stop")
    p.add_argument("--draw", action="store_true", help="make pictures, with matplotlib, and stop")
    p.add_argument("--retry", action="store_true", help="try again what failed")
    args = p.parse_args()
    known = dict.fromkeys(arm for _, arm, _ in runs())
    unknown = [arm for arm in args.arms or () if arm not in known]
    if unknown:
        p.error(f"argument --arms: no {', '.join(unknown)}; the plan has {', '.join(known)}")
    return args


def run(args) -> None:
    file = args.lines or args.root / "study.jsonl"
    if args.tables or args.draw:
        import tables  # here, as it wants the plan above
        if args.tables:
            return print(tables.tables(read(file)), flush=True)
        need(analyze.Figure, "pictures want matplotlib: python -m pip install matplotlib")
        return tables.draw(file, tables.groups(read(file)))
    wanted = [(data, arm, seed) for data, arm, seed in runs() if arm in (args.arms or [arm])
              and (data != "tiny" or args.tiny)]
    if args.scale != "nano":  # whose are the lengths and rates of all other arms
        wanted = [one for one in wanted if one[1] in ("plain", "norms", "qkv4", "qkv8")]
    lines = {line["run"]: line for line in read(file)} if file.exists() else {}
    if args.list:
        for one in wanted:
            name = name_of(args.scale, *one)
            state = lines.get(name) or state_of(args.root / name)
            print(f"{name:24}", "FAILED" if state["failed"] else ", ".join(state["minutes"]))
        return
    args.root = args.root.absolute()
    args.root.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # the commands inherit it; others round otherwise: no pairs
    end = time.time() + 60 * args.minutes
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # each command is ended, then we
        signal.signal(number, lambda *_: STOP.set())

    def elsewhere(one) -> bool:
        """The run's line has every stage, and its folder is not here."""
        run = args.root / name_of(args.scale, *one)
        done = lines.get(run.name, {}).get("minutes", {}).keys()
        return not run.exists() and stages(args, run, *one).keys() <= done

    wanted = [one for one in wanted if not elsewhere(one)]
    writing = threading.Lock()

    def take(one) -> None:
        work(args, end, *one)
        with writing:
            collect(args.root, file, args.scale, one)

    with ThreadPoolExecutor(args.workers) as pool:  # a thread waits for one process
        list(pool.map(take, wanted))  # list: raises what one raised
    if STOP.is_set():
        sys.exit("stopped: what was trained is saved, and the same command goes on with it")


def main() -> None:
    with one_line():
        run(parse())


if __name__ == "__main__":
    main()
