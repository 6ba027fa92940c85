"""The study that results/STUDY.md plans: train, judge and measure a list of (data, arm, seed).

    python results/study.py --list                        # the runs, in their order, and what is done
    python results/study.py --minutes 60 --workers 2      # go on with the list for an hour, two at once
    python results/study.py --minutes 10 --nyu path/to/nyu --tiny path/to/tiny_imagenet
    python results/study.py --minutes 10 --workers 3 --scale small             # ViT-S/16, with a GPU
    python results/study.py --tables --lines results/study.jsonl               # the published runs; without --lines, yours
    python results/study.py --draw --lines results/study.jsonl                 # the same as pictures, beside that file

What is done is skipped; at the time limit, or at Ctrl-C, a run saves its checkpoint, and the next call
goes on with it. Every finished run is a line of ROOT/study.jsonl: command, versions, all numbers, the
log's probes. A command that fails is written down there too, and not tried again (unless --retry).
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

STOP, CHILDREN = threading.Event(), set()  # somebody wants this to end; what is at work

WIDE = {"nano": 4.535, "small": 4.508}  # the MLP's ratio, so that `wide` has as many parameters as qkv4
HALF = {"nano": 2e-3, "small": 5e-4}  # half of train.py's learning rate
ARMS = {  # flags of train.py
    "plain": "", "norms": "--spec norms", "qkv4": "--spec norms,qkv --spec-blocks 4",
    "wide": "--mlp-ratio {wide}",
    "qkv2": "--spec norms,qkv --spec-blocks 2", "qkv8": "--spec norms,qkv --spec-blocks 8",
    "qkv12": "--spec norms,qkv --spec-blocks 12",
    "rank8": "--spec norms,qkv --spec-blocks 4 --spec-rank 8",
    "registers": "--registers 4", "registers-qkv4": "--registers 4 --spec norms,qkv --spec-blocks 4",
    "bias": "--attn-bias", "bias-qkv4": "--attn-bias --spec norms,qkv --spec-blocks 4",
    "entmax": "--attn entmax15", "classattn": "--class-attn 2", "deit3": "--recipe deit3",
    "dino": "--recipe dino --steps 6000", "dino-entmax": "--recipe dino --steps 6000 --attn entmax15",
    "dino-ema": "--recipe dino --steps 6000 --centring ema", "dino-short": "--recipe dino",
    "plain-half": "--lr {half}", "qkv4-half": "--lr {half} --spec norms,qkv --spec-blocks 4",
}
MAIN = "plain", "norms", "qkv4", "wide"
PLAN = [  # (data, arms, seeds), in the order of the questions; last what STUDY.md added to them
    *[("scenes", MAIN, [seed]) for seed in (0, 1, 2)],
    ("scenes", ("rank8", "registers", "bias", "entmax", "classattn", "deit3"), [0]),
    *[("tiny", MAIN, [seed]) for seed in (0, 1, 2)],
    *[("scenes", MAIN, [seed]) for seed in (3, 4)],
    *[("scenes", ("qkv2", "qkv8", "qkv12"), [seed]) for seed in (0, 1, 2)],
    *[("scenes", ("registers", "registers-qkv4", "bias", "bias-qkv4"), [seed]) for seed in (0, 1, 2)],
    *[("scenes", ("dino", "dino-entmax"), [seed]) for seed in (0, 1, 2)],
    ("scenes", ("dino-ema", "dino-short"), [0]),
    *[("scenes", ("plain-half", "qkv4-half"), [seed]) for seed in (5, 6, 7)],
]


def named(scale: str, data: str, arm: str, seed: int) -> str:
    """A run's name, and its folder's below --root."""
    return f"{'' if scale == 'nano' else scale + '-'}{data}-{arm}-{seed}"


def names() -> list[tuple[str, str, int]]:
    runs = [(data, arm, seed) for data, arms, seeds in PLAN for seed in seeds for arm in arms]
    return list(dict.fromkeys(runs))


def stages(args, run: Path, data: str, arm: str, seed: int) -> dict[str, list[str]]:
    """{stage: command}, each of them made again at no harm; judging on NYU last, as it may be left out."""
    resume = "--resume" if (run / "last.pt").exists() else "--overwrite"
    pictures = ["--data", str(args.tiny)] if data == "tiny" else []
    judge, nyu = ["eval_dense.py", str(run)], ["--data", "pairs", "--root", str(args.nyu)]
    untrained = ["--network", "untrained"]
    flags = ARMS[arm].format(wide=WIDE[args.scale], half=HALF[args.scale]).split()
    out = {"train": ["train.py", "--scale", args.scale, *flags, "--seed", str(seed), *pictures, "--no-probe",
                     "--save-every", "50", "--out", str(run), resume], "scenes": judge}
    if (data, arm) == ("scenes", "plain"):
        out["untrained"] = judge + untrained
    inside = ["analyze.py", str(run), "--pictures", "256", "--what"]
    out["inside"] = inside + ["cosines,dimensions,norms"]
    if data == "tiny":  # of pictures like those that it has learnt from, too
        out["inside tiny"] = inside + ["cosines", "--data", str(args.tiny)]
    if args.nyu:
        out["nyu"] = judge + nyu
    if args.nyu and (data, arm) == ("scenes", "plain"):
        out["nyu untrained"] = judge + nyu + untrained
    return out


def keep(file: Path, state: dict) -> None:
    file.parent.mkdir(exist_ok=True)
    file.with_suffix(".tmp").write_text(json.dumps(state))
    file.with_suffix(".tmp").replace(file)


def leave(*_) -> None:
    """Ctrl-C or SIGTERM: train.py saves, the rest is lost, and nothing more is begun."""
    STOP.set()
    for child in list(CHILDREN):
        child.terminate()


def work(args, end: float, data: str, arm: str, seed: int) -> None:
    """Take one run as far as the time allows."""
    name = named(args.scale, data, arm, seed)
    run, log = args.root / name, args.root / f"{name}.txt"
    file = run / "study.json"
    state = {"minutes": {}, "before": {}, "failed": {}} | (json.loads(file.read_text()) if file.exists() else {})
    state["failed"] = {} if args.retry else state["failed"]
    for stage, command in stages(args, run, data, arm, seed).items():
        if stage in state["minutes"]:
            continue
        if state["failed"] or STOP.is_set() or time.time() > end:
            return
        start = time.time()
        with open(log, "a") as out:
            child = subprocess.Popen([sys.executable, *command], cwd=HERE.parent, stdout=out, stderr=out)
        CHILDREN.add(child)
        if STOP.is_set():  # while it was being started
            child.terminate()
        try:
            code = child.wait(timeout=max(end - start, 1))
        except subprocess.TimeoutExpired:
            child.terminate()  # train.py saves, and then leaves
            code = child.wait()
        CHILDREN.remove(child)
        minutes = (time.time() - start) / 60 + state["before"].pop(stage, 0)
        if code == 0:
            state["minutes"][stage], said = minutes, f"{minutes:.1f} min"
        elif STOP.is_set() or code in (-2, -15, 130, 143):
            state["before"][stage], said = minutes, "is not done, and goes on with the next call"
        else:
            state["failed"], said = {stage: log.read_text()[-500:]}, f"FAILED, see {log}"
        keep(file, state)
        print(f"{name}: {stage} {said}", flush=True)
        if code:
            return  # what is not trained to its end is not judged


def collect(args) -> None:
    """Every run that is judged, or failed, as a line of --lines; lines of others stay, and so do those of runs to
    which nothing was added, whatever has happened to their folders."""
    import analyze  # not at the top: torch is large, and this process mostly waits
    lines = {d["run"]: d for d in read(args.lines)} if args.lines.exists() else {}
    plan = {named(scale, *one): (scale, *one) for scale in WIDE for one in names()}
    for name, (scale, data, arm, seed) in plan.items():
        run = args.root / name
        state = {"minutes": {}, "failed": {}} | analyze.read_json(run / "study.json")
        minutes = {k: round(v, 1) for k, v in state["minutes"].items()}
        done = {"train", "scenes", "inside"} <= minutes.keys()
        if not (done or state["failed"]) or (
                name in lines and lines[name]["minutes"] == minutes and lines[name]["failed"] == state["failed"]):
            continue
        config, log = analyze.read_json(run / "config.json"), run / "log.jsonl"
        log = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        inside = analyze.read_json(run / "analysis.json").get("cosines", {}).get("models", {})
        command = config.get("command", "").replace(str(args.root), "runs/study")
        own = config.get("args", {}).get("data", "")
        if data == "tiny":
            command = command.replace(own, "path/to/tiny_imagenet")
        keys = "step", "loss", "kl", "entropy", "bce", "top1", "miou", "rmse", "knn"
        lines[name] = {
            "run": name, "scale": scale, "data": data, "arm": arm, "seed": seed,
            "command": command, **{k: config.get(k) for k in analyze.SETTING}, "minutes": minutes, "failed": state["failed"],
            "img_per_s": sum(d["img_per_s"] for d in log) / max(len(log), 1),
            "probes": [{k: d[k] for k in keys if k in d} for d in log if "miou" in d],
            "results": {k.replace(f"cosines {Path(own).name},", "cosines tiny,"): {m: round(x, 4) for m, x in v.items()}
                        for k, v in analyze.numbers_of(run).items()},
            "cosine by block": [round(x, 4) for x in inside.get(name, {}).get("after norm cls_patch", ()) if x is not None]}
    order = {name: i for i, name in enumerate(plan)}
    beside = args.lines.with_suffix(".tmp")
    beside.write_text("".join(json.dumps(lines[k]) + "\n" for k in sorted(lines, key=lambda k: order.get(k, 999))))
    beside.replace(args.lines)


# What an arm is compared with: plain, but where recipe, high-norm strategy or learning rate differ.
CONTROL = {"dino-entmax": "dino", "registers-qkv4": "registers", "bias-qkv4": "bias", "deit3": None, "dino": None,
           "dino-ema": None, "dino-short": None, "plain-half": None, "qkv4-half": "plain-half", "plain": None,
           "untrained": None}

SHOWN = {"mIoU %": ("teacher scenes", "miou"), "RMSE m": ("teacher scenes", "rmse"),
         "linear %": ("teacher scenes", "linear"), "k-NN %": ("teacher scenes", "knn"),
         "NYU mIoU %": ("teacher pairs", "miou"), "NYU RMSE m": ("teacher pairs", "rmse"),
         "cosine": ("cosines, mean over blocks", "after norm cls_patch")}  # of [CLS] with patches, after norm1
INSIDE = {"cosine, on Tiny ImageNet": ("cosines tiny, mean over blocks", "after norm cls_patch"),
          "overlap of large dimensions, after norm": ("dimensions, mean over blocks", "after norm overlap")} | {
    f"cosine {who}, {point}": ("cosines, mean over blocks", f"{point} {key}")
    for point in ("before norm", "after norm", "attention", "after attention")
    for who, key in (("[CLS]-patch", "cls_patch"), ("patch-patch", "patch_patch"))}
LATE, MIDDLE = (5000, 5500, 6000), (2500, 3000, 3500)  # steps of the online probes that question 5 compares
DRIFT = {"mIoU %": ("drift", "miou"), "RMSE m": ("drift", "rmse"), "k-NN %": ("drift", "knn")}
TABLES = {"": SHOWN, ": what is inside": INSIDE, ": online probes of steps 5000 to 6000 minus those of 2500 to 3500": DRIFT}
LABELS = {"qkv4": "norms, qkv in 4", "wide": "plain, as many\nparameters", "qkv2": "norms, qkv in 2",
          "qkv8": "norms, qkv in 8", "qkv12": "norms, qkv in 12"}


def read(file: Path) -> list[dict]:
    if not file.exists():
        sys.exit(f"error: there is no {file}; run some of the plan first: python results/study.py --minutes 60, "
                 "or give --lines results/study.jsonl, which are the published runs")
    return [json.loads(line) for line in file.read_text().splitlines()]


def groups(every: list[dict]) -> dict[str, dict]:
    """{data set, with the scale: {(arm, seed): line}} of what is judged on Scenes at least. The networks that
    plain ones were at step 0 are an arm of their own, `untrained`."""
    out = {}
    for d in every:
        if "inside" not in d["minutes"]:
            continue
        by = out.setdefault(f"{d['scale']}, {d['data']}", {})
        start = {k.replace("untrained", "teacher"): v for k, v in d["results"].items() if k.startswith("untrained")}
        if start:
            by["untrained", d["seed"]] = d | {"results": start}
        by[d["arm"], d["seed"]] = d
    return out


def drift(by: dict, arm: str, metric: str) -> dict[int, float]:
    """{seed: mean of the late online probes minus that of the middle ones}, of long runs."""
    out = {}
    for (name, seed), line in by.items():
        at = {probe["step"]: probe[metric] for probe in line["probes"] if metric in probe}
        if name == arm and at.keys() >= {*LATE, *MIDDLE}:
            out[seed] = statistics.mean(at[s] for s in LATE) - statistics.mean(at[s] for s in MIDDLE)
    return out


def numbers(by: dict, arm: str, result: str, metric: str) -> dict[int, float]:
    """{seed: number}, judged by the protocol as it is: other options would stand in the result's name."""
    if result == "drift":
        return drift(by, arm, metric)
    found = {s: [v[metric] for k, v in line["results"].items() if f"{k} ".startswith(f"{result} ") and "=" not in k
                 and metric in v] for (a, s), line in by.items() if a == arm}
    return {s: found[s][0] for s in sorted(found) if found[s]}


def difference(by: dict, control: str | None, arm: str, result: str, metric: str) -> dict | None:
    """An arm minus its control over the seeds that both have: analyze.interval, and the single ones. Runs of other
    versions, devices or numbers of threads are no pair. A drift without a control is compared with none, 0."""
    import analyze
    import torch
    a, b = (numbers(by, who, result, metric) for who in (control, arm))
    same = [s for s in a if s in b and all(by[control, s][k] == by[arm, s][k] for k in analyze.SETTING)]
    if result == "drift" and not control:
        a, same = dict.fromkeys(b, 0.0), list(b)
    pairs = torch.tensor([(a[s], b[s]) for s in same]).double()
    return analyze.interval(*pairs.T) | {"each": (pairs @ pairs.new_tensor([-1, 1])).tolist()} if same else None


def comparisons(by: dict) -> list[tuple[str, str | None]]:
    """(arm, its control) of what is there; qkv4 also against the plain network of as many parameters."""
    there = {arm for arm, _ in by}
    out = [(arm, CONTROL.get(arm, "plain")) for arm in ("untrained", *ARMS) if arm in there]
    return out + [("qkv4", "wide")] * (there >= {"qkv4", "wide"})


def tables(file: Path) -> None:
    """For every data set: each arm's mean and standard deviation, and its paired difference to its control; then the
    same of what is inside, and of how the online probe goes on in long runs."""
    every = read(file)
    for (title, by), (what, shown) in product(groups(every).items(), TABLES.items()):
        effects, intervals, rows = 0, 0, []
        shown = {name: at for name, at in shown.items() if any(numbers(by, arm, *at) for arm, _ in by)}
        for arm, control in comparisons(by):
            seeds, cells = sorted(s for a, s in by if a == arm), []
            for result, metric in shown.values():
                digits = 2 if metric in ("miou", "linear", "knn") else 3
                own, d = [*numbers(by, arm, result, metric).values()], difference(by, control, arm, result, metric)
                cell = f"{statistics.mean(own):.{digits}f}" if own else ""
                cell += f" ± {statistics.stdev(own):.{digits}f}" if len(own) > 1 else ""
                cell += f" (n = {len(own)})" if own and len(own) < len(seeds) else ""
                if d and d["n"] > 1:
                    effects, intervals = effects + (d["low"] > 0 or d["high"] < 0), intervals + 1
                    cell += f" ({d['difference']:+.{digits}f} [{d['low']:+.{digits}f}, {d['high']:+.{digits}f}]"
                    cell += f", n = {d['n']})" if d["n"] < len(own) else ")"
                cells.append(cell)
            if any(cells):
                rows.append(f"| {arm} | {control or ''} | {', '.join(map(str, seeds))} | " + " | ".join(cells) + " |")
        if rows:
            print(f"\n{title}{what}\n\n| arm | against | seeds | " + " | ".join(shown) + " |\n|---|---|---|" + "---|" * len(shown))
            print("\n".join(rows))
            print(f"\n{effects} of {intervals} intervals leave out zero; of as many without any effect, {intervals / 20:.1f} would")
    print("\nfailed: " + (", ".join(f"{d['run']} ({stage})" for d in every for stage in d["failed"]) or "none"))


def draw(file: Path) -> None:
    """study-SCALE-DATA.png: paired differences, from three seeds on, each in colour; study-cosines.png: by block;
    study-SCALE-DATA-long.png: the online probe of the long runs."""
    import analyze
    if analyze.Figure is None:
        sys.exit("error: pictures want matplotlib: python -m pip install matplotlib")
    data = groups(read(file))
    if not data:
        sys.exit(f"error: no run of {file} is judged yet")
    for title, by in data.items():
        panels = {}
        for (arm, control), (name, what) in product(comparisons(by), SHOWN.items()):
            if (d := difference(by, control, arm, *what)) and d["n"] > 2:
                label = LABELS.get(arm, arm) + (f" - {control}" if control != "plain" else "")
                panels.setdefault(f"{title}: {name}", []).append((label, d["low"], d["difference"], d["high"], *d["each"]))
        if panels:
            analyze.draw_intervals(file.with_name(f"study-{title.replace(', ', '-')}.png"), panels, 0, 3)
    fig, axes = analyze.canvas(len(data), min(len(data), 2))
    for ax, (title, by) in zip(axes, data.items()):
        curves(ax, {LABELS.get(arm, arm): [(range(1, 1 + len(d["cosine by block"])), d["cosine by block"])
                                           for (a, _), d in by.items() if a == arm] for arm in MAIN})
        ax.set(title=title, xlabel="block (the last is the final norm)", ylabel="cosine, [CLS] and patches, after norm1")
    fig.savefig(file.with_name("study-cosines.png"), dpi=90)
    for title, by in data.items():
        if not (shown := {name: metric for name, (_, metric) in DRIFT.items() if drift(by, "dino", metric)}):
            continue
        fig, axes = analyze.canvas(len(shown), len(shown))
        for ax, (name, metric) in zip(axes, shown.items()):
            curves(ax, {arm: [([p["step"] for p in d["probes"]], [p[metric] for p in d["probes"]])
                              for (a, _), d in by.items() if a == arm] for arm in ("dino", "dino-entmax")})
            ax.set(title=f"{title}, online probe: {name}", xlabel="step")
        fig.savefig(file.with_name(f"study-{title.replace(', ', '-')}-long.png"), dpi=90)


def curves(ax, lines: dict[str, list]) -> None:
    """{label: [(x, y) of a run]}, all of one label with the same x: a thin line a run, a thick one their mean."""
    import analyze
    for i, (label, runs) in enumerate(lines.items()):
        for x, y in runs:
            ax.plot(x, y, **analyze.style(i), linewidth=0.8, alpha=0.4)
        if runs:
            mean = [statistics.mean(some) for some in zip(*(y for _, y in runs))]
            ax.plot(x, mean, **analyze.style(i), linewidth=2, label=label)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--root", type=Path, default=Path("runs/study"), help="folder of the runs (default: %(default)s)")
    p.add_argument("--lines", type=Path, help="file of numbers, a line a run (default: ROOT/study.jsonl)")
    p.add_argument("--minutes", type=float, default=60, help="time limit (default: %(default)s)")
    p.add_argument("--workers", type=int, choices=range(1, 65), metavar="N", default=1, help="runs at once (default: %(default)s)")
    p.add_argument("--threads", type=int, choices=range(1, 65), metavar="N", default=1,
                   help="of each run; other numbers round otherwise, and make no pairs (default: %(default)s)")
    p.add_argument("--scale", choices=list(WIDE), default="nano", help="train.py's (default: %(default)s)")
    p.add_argument("--data", choices=["scenes", "tiny"], help="only this data set")
    p.add_argument("--arms", help="only these arms, a comma list")
    p.add_argument("--tiny", type=Path, help="folder of Tiny ImageNet's training pictures; without it those runs are left out")
    p.add_argument("--nyu", type=Path, help="NYU Depth v2 in the layout `pairs` of eval_dense.py, to judge on as well")
    for name, text in (("list", "print the plan and stop"), ("tables", "print tables and stop"),
                       ("draw", "make pictures of them, with matplotlib, and stop"),
                       ("retry", "try again what failed")):
        p.add_argument(f"--{name}", action="store_true", help=text)
    args = p.parse_args()
    args.lines = args.lines or args.root / "study.jsonl"
    if args.tables or args.draw:
        return draw(args.lines) if args.draw else tables(args.lines)
    for name in ("root", "tiny", "nyu"):
        if getattr(args, name):
            setattr(args, name, getattr(args, name).absolute())
            if name != "root" and not getattr(args, name).is_dir():
                p.error(f"argument --{name}: there is no folder {getattr(args, name)}")
    if unknown := set(filter(None, (args.arms or "").split(","))) - ARMS.keys():
        p.error(f"argument --arms: no {', '.join(sorted(unknown))}; the plan has {', '.join(ARMS)}")
    if args.data == "tiny" and not args.tiny:
        p.error("argument --data: tiny needs --tiny, the folder of Tiny ImageNet's training pictures")
    wanted = [(data, arm, seed) for data, arm, seed in names()
              if (data != "tiny" or args.tiny) and data in (args.data or data) and arm in (args.arms or arm).split(",")]
    if args.list:
        for data, arm, seed in wanted:
            name = named(args.scale, data, arm, seed)
            file = args.root / name / "study.json"
            done = json.loads(file.read_text()) if file.exists() else {}
            print(f"{name:24}", "FAILED" if done.get("failed") else ", ".join(done.get("minutes", ())))
        return
    args.root.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    end = time.time() + 60 * args.minutes
    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT)}
    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(lambda one: work(args, end, *one), wanted))
    collect(args)
    for number, handler in before.items():
        signal.signal(number, handler)


if __name__ == "__main__":
    main()
