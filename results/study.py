"""The study of results/STUDY.md: train, judge and measure a list of runs, then compare them.

    python results/study.py --list                      # the runs in their order, what is done
    python results/study.py --minutes 60 --workers 2    # go on for an hour, two runs at once
    python results/study.py --minutes 60 --scale small  # the same with ViT-S/16, for a GPU
    python results/study.py --tiny path/to/tiny_imagenet --nyu path/to/nyu   # real pictures, too
    python results/study.py --tables --lines results/study.jsonl   # the published runs, in tables
    python results/study.py --draw --lines results/study.jsonl     # and in pictures beside them

What is done is skipped. At the time limit, or at Ctrl-C, a run saves its checkpoint and the next
call goes on with it. Every finished run is a line of ROOT/study.jsonl: command, versions, all
numbers. A command that fails is written down there too, and tried again only with --retry.
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
from statistics import mean, stdev
from typing import NamedTuple

import torch

HOUSE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOUSE))  # so that it runs from any folder

import analyze  # noqa: E402
from eval_dense import Parser, names, one_line, read_json, within, write  # noqa: E402

# --------------------------------------------------------------------------------------------------
# The list. A run is (data, arm, seed): what it is trained on, which flags are tried, which random
# numbers it sees. Another question is a few more rows of ARMS and a line of PLAN.


class Arm(NamedTuple):
    flags: str  # of train.py; what stands in braces is in SCALES
    controls: tuple[str, ...]  # the arms that it is compared with, seed by seed
    label: str  # what it is, in words


SCALES = {  # wide: as many parameters as qkv4; half: of the default rate
    "nano": {"wide": 4.535, "half": 2e-3},
    "small": {"wide": 4.508, "half": 5e-4},
}
QKV4 = "--spec norms,qkv --spec-blocks 4"  # a third of 12 blocks, the paper's choice
LONG = "--recipe dino --steps 6000"  # four times the default
ARMS = {
    "untrained": Arm("", (), "untrained"),  # no runs of its own: what plain ones are at step 0
    # Questions 1 to 3: what specialising does; `wide` tells it from having more parameters.
    "plain": Arm("", (), "plain"),
    "norms": Arm("--spec norms", ("plain",), "norms"),
    "qkv4": Arm(QKV4, ("plain", "wide"), "norms, qkv in 4 blocks"),
    "wide": Arm("--mlp-ratio {wide}", ("plain",), "plain, as many parameters"),
    # Question 4: in how many blocks?
    "qkv2": Arm("--spec norms,qkv --spec-blocks 2", ("plain",), "norms, qkv in 2 blocks"),
    "qkv8": Arm("--spec norms,qkv --spec-blocks 8", ("plain",), "norms, qkv in 8 blocks"),
    "qkv12": Arm("--spec norms,qkv --spec-blocks 12", ("plain",), "norms, qkv in 12 blocks"),
    # Question 6: what does it add to registers, to attention bias? So these are the controls.
    "registers": Arm("--registers 4", ("plain",), "registers"),
    "registers-qkv4": Arm(f"--registers 4 {QKV4}", ("registers",), "registers, norms, qkv in 4"),
    "bias": Arm("--attn-bias", ("plain",), "attention bias"),
    "bias-qkv4": Arm(f"--attn-bias {QKV4}", ("bias",), "attention bias, norms, qkv in 4"),
    # One seed each, to see that they work.
    "rank8": Arm(f"{QKV4} --spec-rank 8", ("plain",), "norms, qkv in 4 blocks, rank 8"),
    "entmax": Arm("--attn entmax15", ("plain",), "entmax-1.5"),
    "classattn": Arm("--class-attn 2", ("plain",), "class attention"),
    "deit3": Arm("--recipe deit3", (), "recipe deit3"),  # learns from labels: no control is fair
    "dino-short": Arm("--recipe dino", (), "dino, 1500 steps"),
    # Question 5: do dense features of a long run degrade?
    "dino": Arm(LONG, (), "dino, 6000 steps"),
    "dino-entmax": Arm(f"{LONG} --attn entmax15", ("dino",), "dino, 6000 steps, entmax-1.5"),
    "dino-ema": Arm(f"{LONG} --centring ema", (), "dino, 6000 steps, moving centre"),
    # Does specialising only want another learning rate?
    "plain-half": Arm("--lr {half}", (), "plain, half the rate"),
    "qkv4-half": Arm(f"--lr {{half}} {QKV4}", ("plain-half",), "norms, qkv in 4, half the rate"),
}
MAIN = "plain", "norms", "qkv4", "wide"
PLAN = [  # (data, arms, seeds), in the order of the questions; the last two were added later
    ("scenes", MAIN, (0, 1, 2)),
    ("scenes", ("rank8", "registers", "bias", "entmax", "classattn", "deit3"), (0,)),
    ("tiny", MAIN, (0, 1, 2)),
    ("scenes", MAIN, (3, 4)),
    ("scenes", ("qkv2", "qkv8", "qkv12"), (0, 1, 2)),
    ("scenes", ("registers", "registers-qkv4", "bias", "bias-qkv4"), (0, 1, 2)),
    ("scenes", ("dino", "dino-entmax"), (0, 1, 2)),
    ("scenes", ("dino-ema", "dino-short"), (0,)),
    ("scenes", ("plain-half", "qkv4-half"), (5, 6, 7)),
]
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
    """{stage: command} of a run. Each can be done again at no harm."""
    resume = "--resume" if (run / "last.pt").exists() else "--overwrite"
    flags = ARMS[arm].flags.format(**SCALES[args.scale]).split()
    pictures = ["--data", str(args.tiny)] if data == "tiny" else []
    judge = ["eval_dense.py", str(run)]
    measure = ["analyze.py", str(run), "--pictures", "256", "--what"]
    nyu = judge + ["--data", "pairs", "--root", str(args.nyu)]
    train = ["train.py", "--scale", args.scale, *flags, "--seed", str(seed), *pictures,
             "--no-probe",  # the next stage judges
             "--save-every", "50",  # so that little is lost at the time limit
             "--out", str(run), resume]
    out = {"train": train, "scenes": judge, "inside": measure + ["cosines,dimensions,norms"]}
    if data == "tiny":  # `inside` is of Scenes; this is of pictures like those it has learnt from
        out["inside tiny"] = measure + ["cosines", "--data", str(args.tiny)]
    if args.nyu:
        out["nyu"] = nyu
    if (data, arm) == ("scenes", "plain"):  # all arms of a seed begin like this one
        out["untrained"] = judge + ["--network", "untrained"]
        if args.nyu:
            out["nyu untrained"] = nyu + ["--network", "untrained"]
    return out


# --------------------------------------------------------------------------------------------------
# Working through the list.

STOP = threading.Event()  # set by Ctrl-C and the like: somebody wants this to end


def state_of(run: Path) -> dict:
    """What is done: {"minutes": {stage: minutes}, "before": {stage: minutes so far, of one that was
    cut short}, "failed": {stage: its last words}}."""
    return {"minutes": {}, "before": {}, "failed": {}} | read_json(run / "study.json")


def call(command: list[str], log: Path, end: float) -> int:
    """Run one command until it ends, the time is up or STOP is set. Returns its exit code."""
    with open(log, "a") as out:
        child = subprocess.Popen([sys.executable, *command], cwd=HOUSE, stdout=out, stderr=out)
    while child.poll() is None and time.time() < end and not STOP.wait(0.1):
        pass
    child.terminate()  # train.py saves a checkpoint first; one that has ended feels nothing
    return child.wait()


def work(args, end: float, data: str, arm: str, seed: int) -> None:
    """Take one run as far as the time allows."""
    name = name_of(args.scale, data, arm, seed)
    run, log = args.root / name, args.root / f"{name}.txt"
    state = state_of(run)
    if args.retry:
        state["failed"] = {}
    for stage, command in stages(args, run, data, arm, seed).items():
        if stage in state["minutes"]:
            continue
        if state["failed"] or STOP.is_set() or time.time() > end:
            return
        start = time.time()
        code = call(command, log, end)
        minutes = (time.time() - start) / 60 + state["before"].pop(stage, 0)
        if code == 0:
            state["minutes"][stage] = minutes
            said = f"{minutes:.1f} min"
        elif STOP.is_set() or time.time() > end:  # we ended it
            state["before"][stage] = minutes
            said = "is not done, and goes on with the next call"
        else:  # it ended by itself: the end of what it said goes into study.jsonl
            state["failed"] = {stage: log.read_text()[-500:]}
            said = f"FAILED, see {log}"
        write(run / "study.json", json.dumps(state))
        print(f"{name}: {stage} {said}", flush=True)
        if code:
            return  # what is not trained to its end is not judged


def line_of(run: Path, root: Path, scale: str, data: str, arm: str, seed: int) -> dict:
    """What a run's files say, as a line of study.jsonl."""
    state, config = state_of(run), read_json(run / "config.json")
    log = run / "log.jsonl"
    steps = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    keep = "step", "loss", "kl", "entropy", "bce", "top1", "miou", "rmse", "knn"
    # No path of this machine goes into a line: it may be published.
    command = config.get("command", "").replace(str(root), "runs/study")
    pictures = config.get("args", {}).get("data", "")
    if data == "tiny":
        command = command.replace(pictures, "path/to/tiny_imagenet")
    results = {}
    for result, found in analyze.numbers_of(run).items():
        result = result.replace(f"cosines {Path(pictures).name},", "cosines tiny,")
        results[result] = {metric: round(x, 4) for metric, x in found.items()}
    cosines = read_json(run / "analysis.json").get("cosines", {}).get("models", {})
    by_block = cosines.get(run.name, {}).get("after norm cls_patch", ())
    return {
        "run": run.name, "scale": scale, "data": data, "arm": arm, "seed": seed,
        "command": command, **{key: config.get(key) for key in analyze.SETTING},
        "minutes": {stage: round(m, 1) for stage, m in state["minutes"].items()},
        "failed": state["failed"],
        "img_per_s": mean(step["img_per_s"] for step in steps) if steps else 0,
        "probes": [{k: step[k] for k in keep if k in step} for step in steps if "miou" in step],
        "results": results,
        # None where a block has no [CLS] yet: class attention
        "cosine by block": [round(x, 4) for x in by_block if x is not None]}


def collect(root: Path, file: Path) -> None:
    """Write every run that is judged, or failed, to `file`."""
    # Lines that are there stay, so that folders may be moved away, or be on other machines.
    lines = {line["run"]: line for line in read(file)} if file.exists() else {}
    for scale in SCALES:
        for one in runs():
            run = root / name_of(scale, *one)
            state = state_of(run)
            if state["failed"] or {"train", "scenes", "inside"} <= state["minutes"].keys():
                lines[run.name] = line_of(run, root, scale, *one)
    write(file, "".join(json.dumps(line) + "\n" for line in lines.values()))


# --------------------------------------------------------------------------------------------------
# Comparing runs. A `group` is {arm: {seed: line}} of one scale and one data set. An outcome is
# {in words, with unit and an arrow in the better direction: (name in a line's "results", metric)}.

COSINES = "cosines, mean over blocks"
OUTCOMES = {  # the plan's
    "mIoU on Scenes, % ↑": ("teacher scenes", "miou"),
    "depth RMSE on Scenes, m ↓": ("teacher scenes", "rmse"),
    "linear accuracy on Scenes, % ↑": ("teacher scenes", "linear"),
    "k-NN accuracy on Scenes, % ↑": ("teacher scenes", "knn"),
    "mIoU on NYU, % ↑": ("teacher pairs", "miou"),
    "depth RMSE on NYU, m ↓": ("teacher pairs", "rmse"),
    "cosine of [CLS] and patches, after norm1": (COSINES, "after norm cls_patch"),
}
INSIDE = {
    "cosine, on Tiny ImageNet": ("cosines tiny, mean over blocks", "after norm cls_patch"),
    "overlap of large dimensions": ("dimensions, mean over blocks", "after norm overlap"),
}
for point in ("before norm", "after norm", "attention", "after attention"):
    INSIDE[f"cosine of [CLS] and patches, {point}"] = COSINES, f"{point} cls_patch"
    INSIDE[f"cosine among patches, {point}"] = COSINES, f"{point} patch_patch"
# Question 5: is the online probe worse late in a long run (steps) than half way? Late minus middle.
LATE, MIDDLE = (5000, 5500, 6000), (2500, 3000, 3500)
DRIFT = {
    "online mIoU, % ↑": ("drift", "miou"),
    "online depth RMSE, m ↓": ("drift", "rmse"),
    "online k-NN accuracy, % ↑": ("drift", "knn"),
}
TABLES = {
    "judged after the last step": OUTCOMES,
    "what is inside, means over blocks": INSIDE,
    "the online probe at steps 5000 to 6000 minus that at 2500 to 3500": DRIFT,
}


def read(file: Path) -> list[dict]:
    if not file.exists():
        raise ValueError(f"there is no {file}; run some of the plan first: python results/study.py "
                         "--minutes 60, or give --lines results/study.jsonl, the published runs")
    return [json.loads(line) for line in file.read_text().splitlines()]


def drift(probes: list[dict]) -> dict[str, float]:
    """{metric: late minus middle} of a run's online probes; empty if it was not a long one."""
    at = {probe["step"]: probe for probe in probes}
    if not at.keys() >= {*LATE, *MIDDLE}:
        return {}
    return {metric: mean(at[s][metric] for s in LATE) - mean(at[s][metric] for s in MIDDLE)
            for _, metric in DRIFT.values()}


def groups(lines: list[dict]) -> dict[tuple[str, str], dict]:
    """{(scale, data): group} of the runs that are judged and measured."""
    out = {}
    for line in lines:
        if "inside" not in line["minutes"]:
            continue
        group = out.setdefault((line["scale"], line["data"]), {arm: {} for arm in ARMS})
        line["results"]["drift"] = drift(line["probes"])
        group.setdefault(line["arm"], {})[line["seed"]] = line
        # The network at step 0 was judged beside the trained one; here it is an arm of its own.
        untrained = {result.replace("untrained", "teacher"): found
                     for result, found in line["results"].items() if "untrained" in result}
        if untrained:
            group["untrained"][line["seed"]] = line | {"results": untrained}
    return out


def numbers(seeds: dict[int, dict], result: str, metric: str) -> dict[int, float]:
    """{seed: number} of an arm."""
    out = {}
    for seed, line in sorted(seeds.items()):
        for key, found in line["results"].items():
            # After the name may stand a folder, or how many pictures. A "=" is an option that
            # somebody judged with by hand: another protocol, and so another outcome.
            if f"{key} ".startswith(f"{result} ") and "=" not in key and metric in found:
                out.setdefault(seed, found[metric])
    return out


def difference(group: dict, arm: str, control: str, result: str, metric: str) -> dict | None:
    """Arm minus control over the seeds of both: analyze.interval, and "each" difference. None where
    there are not two pairs."""
    mine = numbers(group[arm], result, metric)
    theirs = numbers(group.get(control, {}), result, metric)
    pairs = []
    for seed in sorted(mine.keys() & theirs.keys()):
        one, other = group[arm][seed], group[control][seed]
        # Another version, device or number of threads rounds otherwise: that is no pair.
        if all(one[key] == other[key] for key in analyze.SETTING):
            pairs.append((theirs[seed], mine[seed]))
    if result == "drift" and not control:
        pairs = [(0, number) for number in mine.values()]  # it is a difference already
    if len(pairs) < 2:
        return None
    a, b = torch.tensor(pairs).double().T
    return analyze.interval(a, b) | {"each": (b - a).tolist()}


# --------------------------------------------------------------------------------------------------
# Tables and pictures.


EXPLAINED = """\
A row: an arm, its seeds, mean ± standard deviation over them; then its mean difference to another
arm [95 % interval, Student's t] over n pairs of equal seeds, * if that leaves out zero.
↑ more is better, ↓ less is better."""


def row(group: dict, arm: str, what: tuple[str, str], digits: int) -> str:
    """An arm in the table of one outcome."""
    values = numbers(group[arm], *what)
    own = f"{mean(values.values()):.{digits}f}"
    if len(values) > 1:
        own += f" ± {stdev(values.values()):.{digits}f}"
    against = []
    for control in ARMS[arm].controls or [""]:
        d = difference(group, arm, control, *what)
        if d:
            middle, low, high = (f"{d[key]:+.{digits}f}" for key in ("difference", "low", "high"))
            star = " *" if d["low"] > 0 or d["high"] < 0 else ""
            label = ARMS[control].label if control else "no change"
            against.append(f"{middle} [{low}, {high}]{star} against {label} (n = {d['n']})")
    left = f"{ARMS[arm].label:33}{', '.join(map(str, values)):15}{own:16}"
    return (left + f"\n{' ' * len(left)}".join(against)).rstrip()


def tables(lines: list[dict]) -> str:
    """Every outcome that is there, of every scale and data set."""
    out = [EXPLAINED]
    for (scale, data), group in groups(lines).items():
        for title, outcomes in TABLES.items():
            table = ""
            for head, what in outcomes.items():
                rows = [row(group, arm, what, digits=2 if "%" in head else 3)
                        for arm in ARMS if numbers(group[arm], *what)]
                table += "\n".join([f"\n{head}", *rows, ""]) if rows else ""
            if table:
                n, effects = table.count("(n = "), table.count(" * ")
                out.append(f"{scale}, trained on {DATA[data]}: {title}\n{table}\n{effects} of {n} "
                           f"intervals leave out zero; by chance alone about {n / 20:.1f} would.")
    failed = [f"{line['run']} ({stage})" for line in lines for stage in line["failed"]]
    return "\n\n".join([*out, "Failed runs: " + (", ".join(failed) or "none")])


def draw_differences(path: Path, title: str, group: dict) -> None:
    """A panel an outcome, a row a comparison of three pairs or more."""
    every = [(arm, control) for arm, row in ARMS.items() for control in row.controls]
    found = {(head, pair): difference(group, *pair, *what)
             for head, what in OUTCOMES.items() for pair in every}
    found = {key: d for key, d in found.items() if d and d["n"] > 2}
    heads = [head for head in OUTCOMES if any((head, pair) in found for pair in every)]
    pairs = [pair for pair in every if any((head, pair) in found for head in heads)]
    if not found:
        return
    # With the labels once, at the left, 13 rows in 7 panels fit a page.
    fig, axes = analyze.canvas(len(heads), 4, sharey=True)
    fig.set_size_inches(11, 2 * (1 + 0.3 * len(pairs)))
    for (head, pair), d in found.items():
        ax, y = axes[heads.index(head)], pairs.index(pair)
        ax.plot([d["low"], d["high"]], [y, y], "k|-")
        ax.plot(d["difference"], y, "ko", markersize=5)
        ax.plot(d["each"], [y] * d["n"], "o", color="#D55E00", markersize=3)
    labels = [ARMS[arm].label + (f"\nminus {ARMS[control].label}" if control != "plain" else "")
              for arm, control in pairs]
    for ax, head in zip(axes, heads):
        ax.axvline(0, color="#0072B2", linestyle="--")
        ax.set(yticks=range(len(pairs)), yticklabels=labels, ylim=(len(pairs) - 0.5, -0.5))
        ax.set_title(head.replace("%", "points").replace(", ", "\n"), fontsize=9)
        ax.tick_params(labelsize=8)
        ax.locator_params(axis="x", nbins=4)
    fig.suptitle(f"{title}: difference to plain with the same seed, or to what follows 'minus'.\n"
                 "Orange: one seed. Black: their mean and its 95 % interval. Blue: no difference.")
    fig.savefig(path, dpi=90)


def curves(ax, group: dict, arms, points) -> None:
    """A thin line a seed, a thick one their mean. points(line): [(x, y)] of a run."""
    for i, arm in enumerate(arms):
        found = [points(line) for line in group[arm].values()]
        for run in found:
            ax.plot(*zip(*run), **analyze.style(i), linewidth=0.8, alpha=0.4)
        # zip(*found): the same place of every run; zip(*place): its xs, its ys
        middle = [[mean(values) for values in zip(*place)] for place in zip(*found)]
        ax.plot(*zip(*middle), **analyze.style(i), linewidth=2, label=ARMS[arm].label)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)


def draw(file: Path, every: dict[tuple[str, str], dict]) -> None:
    """study-SCALE-DATA.png: differences; study-cosines.png: [CLS] and patches, block by block;
    study-SCALE-DATA-long.png: online probes of long runs."""
    fig, axes = analyze.canvas(len(every), min(len(every), 2), sharey=True)
    for ax, ((scale, data), group) in zip(axes, every.items()):
        there = [arm for arm in MAIN if group[arm]]
        curves(ax, group, there, lambda line: [*enumerate(line["cosine by block"], 1)])
        ax.set(title=f"{scale}, trained on {DATA[data]}", ylabel="cosine of [CLS] and patches",
               xlabel="block, after norm1; the last is the final norm")
    fig.savefig(file.with_name("study-cosines.png"), dpi=90)
    for (scale, data), group in every.items():
        path = file.with_name(f"study-{scale}-{data}.png")
        draw_differences(path, f"{scale}, trained on {DATA[data]}", group)
        long = [arm for arm in ARMS if len(numbers(group[arm], "drift", "miou")) > 1]
        if long:
            fig, axes = analyze.canvas(len(DRIFT), len(DRIFT))
            fig.set_size_inches(11, 3.4)
            for ax, (head, (_, metric)) in zip(axes, DRIFT.items()):
                curves(ax, group, long, lambda line: [
                    (probe["step"], probe[metric]) for probe in line["probes"]])
                ax.set(title=head, xlabel="training step")
            fig.savefig(path.with_name(f"{path.stem}-long.png"), dpi=90)


# --------------------------------------------------------------------------------------------------


def folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text}")
    return Path(text).absolute()  # commands run in the repository, not here


def parse() -> argparse.Namespace:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--root", type=Path, default=Path("runs/study"), help="folder of the runs")
    p.add_argument("--lines", type=Path, help="file of numbers (default: ROOT/study.jsonl)")
    p.add_argument("--minutes", type=within(float, 0, 1e6), default=60, help="limit (default: 60)")
    p.add_argument("--workers", type=within(int, 1, 64), default=1, help="runs at once, default 1")
    p.add_argument("--threads", type=within(int, 1, 64), default=1,
                   help="of each run; others round otherwise and make no pairs (default: 1)")
    p.add_argument("--scale", choices=list(SCALES), default="nano", help="(default: nano)")
    p.add_argument("--data", choices=list(DATA), help="only runs that train on this")
    p.add_argument("--arms", type=names, help="only these arms, a comma list")
    p.add_argument("--tiny", type=folder, help="Tiny ImageNet's training pictures; else left out")
    p.add_argument("--nyu", type=folder, help="NYU Depth v2, `pairs` of eval_dense.py: judge on it")
    p.add_argument("--list", action="store_true", help="print the plan and stop")
    p.add_argument("--tables", action="store_true", help="print tables and stop")
    p.add_argument("--draw", action="store_true", help="make pictures, with matplotlib, and stop")
    p.add_argument("--retry", action="store_true", help="try again what failed")
    args = p.parse_args()
    known = dict.fromkeys(arm for _, arm, _ in runs())
    unknown = [arm for arm in args.arms or () if arm not in known]
    if unknown:
        p.error(f"argument --arms: no {', '.join(unknown)}; the plan has {', '.join(known)}")
    if args.data == "tiny" and not args.tiny:
        p.error("argument --data: tiny needs --tiny, the folder of Tiny ImageNet's pictures")
    return args


def run(args) -> None:
    file = args.lines or args.root / "study.jsonl"
    if args.tables:
        return print(tables(read(file)), flush=True)
    if args.draw:
        if analyze.Figure is None:
            raise ValueError("pictures want matplotlib: python -m pip install matplotlib")
        return draw(file, groups(read(file)))
    wanted = [(data, arm, seed) for data, arm, seed in runs() if arm in (args.arms or [arm])
              and data == (args.data or data) and (data != "tiny" or args.tiny)]
    if args.list:
        for one in wanted:
            name = name_of(args.scale, *one)
            state = state_of(args.root / name)
            print(f"{name:24}", "FAILED" if state["failed"] else ", ".join(state["minutes"]))
        return
    args.root = args.root.absolute()
    args.root.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # the commands inherit it
    end = time.time() + 60 * args.minutes
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # each command is ended, then we
        signal.signal(number, lambda *_: STOP.set())
    with ThreadPoolExecutor(args.workers) as pool:  # a thread waits for one process
        list(pool.map(lambda one: work(args, end, *one), wanted))  # list: raises what one raised
    collect(args.root, file)
    if STOP.is_set():
        sys.exit("stopped: what was trained is saved, and the same command goes on with it")


def main() -> None:
    with one_line():
        run(parse())


if __name__ == "__main__":
    main()
