"""The study that results/STUDY.md plans: train, judge and measure a list of (data, arm, seed).

    python results/study.py --list                        # the runs, in their order, and what is done
    python results/study.py --minutes 60 --workers 2      # go on with the list for an hour, two at once
    python results/study.py --minutes 10 --nyu path/to/nyu --tiny path/to/tiny_imagenet
    python results/study.py --tables                      # from results/study.jsonl, for the README

What is done is skipped; at the time limit a run saves its checkpoint, and the next call goes on with
it. Every finished run is a line of results/study.jsonl: command, versions, all numbers, the log's
probes. A command that fails is written down there too, and not tried again (unless --retry).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

LINES = HERE / "study.jsonl"

ARMS = {  # flags of train.py; `wide` has as many parameters as qkv4
    "plain": "", "norms": "--spec norms", "qkv4": "--spec norms,qkv --spec-blocks 4",
    "wide": "--mlp-ratio 4.535",
    "qkv2": "--spec norms,qkv --spec-blocks 2", "qkv8": "--spec norms,qkv --spec-blocks 8",
    "qkv12": "--spec norms,qkv --spec-blocks 12",
    "rank8": "--spec norms,qkv --spec-blocks 4 --spec-rank 8",
    "registers": "--registers 4", "registers-qkv4": "--registers 4 --spec norms,qkv --spec-blocks 4",
    "bias": "--attn-bias", "bias-qkv4": "--attn-bias --spec norms,qkv --spec-blocks 4",
    "entmax": "--attn entmax15", "classattn": "--class-attn 2", "deit3": "--recipe deit3",
    "dino": "--recipe dino --steps 6000", "dino-entmax": "--recipe dino --steps 6000 --attn entmax15",
}
MAIN = "plain", "norms", "qkv4", "wide"
PLAN = [  # (data, arms, seeds), in the order of the questions
    *[("scenes", MAIN, [seed]) for seed in (0, 1, 2)],
    ("scenes", ("rank8", "registers", "bias", "entmax", "classattn", "deit3"), [0]),
    *[("tiny", MAIN, [seed]) for seed in (0, 1, 2)],
    *[("scenes", MAIN, [seed]) for seed in (3, 4)],
    *[("scenes", ("qkv2", "qkv8", "qkv12"), [seed]) for seed in (0, 1, 2)],
    *[("scenes", ("registers", "registers-qkv4", "bias", "bias-qkv4"), [seed]) for seed in (0, 1, 2)],
    *[("scenes", ("dino", "dino-entmax"), [seed]) for seed in (0, 1, 2)],
]


def names() -> list[tuple[str, str, int]]:
    runs = [(data, arm, seed) for data, arms, seeds in PLAN for seed in seeds for arm in arms]
    return list(dict.fromkeys(runs))


def stages(args, run: Path, data: str, arm: str, seed: int) -> dict[str, str]:
    """{stage: command}, each of them made again at no harm."""
    resume = " --resume" if (run / "last.pt").exists() else " --overwrite"
    pictures = f" --data {args.tiny}" if data == "tiny" else ""
    out = {"train": f"train.py {ARMS[arm]} --seed {seed}{pictures} --no-probe --save-every 50 --out {run}{resume}",
           "scenes": f"eval_dense.py {run}"}
    if (data, arm) == ("scenes", "plain"):
        out["untrained"] = f"eval_dense.py {run} --network untrained"
    if args.nyu:
        out["nyu"] = f"eval_dense.py {run} --data pairs --root {args.nyu}"
    if args.nyu and (data, arm) == ("scenes", "plain"):
        out["nyu untrained"] = f"eval_dense.py {run} --data pairs --root {args.nyu} --network untrained"
    return out | {"inside": f"analyze.py {run} --what cosines,dimensions,norms --pictures 256"}


def work(args, end: float, data: str, arm: str, seed: int) -> None:
    """Take one run as far as the time allows."""
    run = args.root / f"{data}-{arm}-{seed}"
    file, name = run / "study.json", f"{data}-{arm}-{seed}"
    state = json.loads(file.read_text()) if file.exists() else {"minutes": {}, "failed": {}}
    if args.retry:
        state["failed"] = {}
    for stage, command in stages(args, run, data, arm, seed).items():
        if state["failed"] or time.time() > end:
            break
        if stage in state["minutes"]:
            continue
        start, log = time.time(), args.root / f"{name}.txt"
        with open(log, "a") as out:
            child = subprocess.Popen([sys.executable, *command.split()], cwd=HERE.parent, stdout=out, stderr=out)
        try:
            code = child.wait(timeout=max(end - start, 1))
        except subprocess.TimeoutExpired:
            child.terminate()  # train.py saves, and then leaves
            child.wait()
            code = -15
        if code in (-2, -15, 130, 143):
            print(f"{name}: {stage} is not done, and goes on with the next call", flush=True)
            state["before"] = state.get("before", 0) + (time.time() - start) / 60
            break
        minutes = (time.time() - start) / 60
        if code:
            state["failed"] = {stage: log.read_text()[-500:]}
        else:
            state["minutes"][stage] = minutes + (state.pop("before", 0) if stage == "train" else 0)
        print(f"{name}: {stage} {'FAILED, see ' + str(log) if code else f'{minutes:.1f} min'}", flush=True)
    if state["minutes"] or state["failed"] or run.exists():
        run.mkdir(exist_ok=True)
        file.write_text(json.dumps(state))


def collect(root: Path) -> None:
    """Every run that is judged, or failed, as a line of study.jsonl; lines of others stay."""
    import analyze  # not at the top: torch is large, and this process mostly waits
    lines = {d["run"]: d for d in map(json.loads, LINES.read_text().splitlines())} if LINES.exists() else {}
    for data, arm, seed in names():
        run = root / f"{data}-{arm}-{seed}"
        state = json.loads((run / "study.json").read_text()) if (run / "study.json").exists() else {"minutes": {}}
        if "inside" not in state["minutes"] and not state.get("failed"):
            continue
        config = analyze.read_json(run / "config.json")
        log = (run / "log.jsonl").read_text().splitlines() if (run / "log.jsonl").exists() else []
        log = [json.loads(line) for line in log]
        keys = "step", "loss", "kl", "entropy", "bce", "top1", "miou", "rmse", "knn"
        lines[run.name] = {
            "run": run.name, "data": data, "arm": arm, "seed": seed, "flags": ARMS[arm],
            **{k: config.get(k) for k in ("git", "torch", "device", "threads")},
            "minutes": {k: round(v, 1) for k, v in state["minutes"].items()}, "failed": state.get("failed", {}),
            "img_per_s": sum(d["img_per_s"] for d in log) / max(len(log), 1),
            "probes": [{k: d[k] for k in keys if k in d} for d in log if "miou" in d],
            "results": {k: {m: round(x, 4) for m, x in v.items()} for k, v in analyze.numbers_of(run).items()}}
    order = {f"{d}-{a}-{s}": i for i, (d, a, s) in enumerate(names())}
    LINES.write_text("".join(json.dumps(lines[k]) + "\n" for k in sorted(lines, key=lambda k: order.get(k, 999))))


SHOWN = {"mIoU %": ("teacher scenes", "miou"), "RMSE m": ("teacher scenes", "rmse"),
         "linear %": ("teacher scenes", "top1"), "k-NN %": ("teacher scenes", "knn"),
         "NYU mIoU %": ("teacher pairs", "miou"), "NYU RMSE m": ("teacher pairs", "rmse"),
         "cosine": ("cosines, mean over blocks", "after norm cls_patch")}


def number(line: dict, result: str, metric: str) -> float | None:
    return next((v[metric] for k, v in line["results"].items() if k.startswith(result) and metric in v), None)


def tables() -> None:
    """For every data set: each arm's mean and standard deviation, and its paired difference to plain."""
    import torch

    import analyze
    lines = [d for d in map(json.loads, LINES.read_text().splitlines()) if not d["failed"]]
    for data in dict.fromkeys(d["data"] for d in lines):
        by = {(d["arm"], d["seed"]): d for d in lines if d["data"] == data}
        print(f"\n{data}\n\n| arm | seeds | " + " | ".join(SHOWN) + " |\n|---|---|" + "---|" * len(SHOWN))
        for arm in dict.fromkeys(arm for arm, _ in by):
            seeds, cells = sorted(s for a, s in by if a == arm), []
            for result, metric in SHOWN.values():
                found = [(number(by[arm, s], result, metric), number(by["plain", s], result, metric))
                         for s in seeds if ("plain", s) in by]
                found = [pair for pair in found if None not in pair]
                if not found:
                    cells.append("")
                    continue
                b, a = torch.tensor(found).double().T
                digits = 3 if metric in ("rmse", "after norm cls_patch") else 2
                spread = f" ± {b.std():.{digits}f}" if len(b) > 1 else ""
                d = analyze.interval(a, b)
                more = (f" ({d['difference']:+.{digits}f} [{d['low']:+.{digits}f}, {d['high']:+.{digits}f}])"
                        if arm != "plain" and len(b) > 1 else "")
                cells.append(f"{b.mean():.{digits}f}{spread}{more}")
            print(f"| {arm} | {', '.join(map(str, seeds))} | " + " | ".join(cells) + " |")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--root", type=Path, default=Path("runs/study"), help="folder of the runs (default: %(default)s)")
    p.add_argument("--minutes", type=float, default=60, help="time limit (default: %(default)s)")
    p.add_argument("--workers", type=int, default=1, help="runs at once (default: %(default)s)")
    p.add_argument("--data", choices=["scenes", "tiny"], help="only this data set")
    p.add_argument("--arms", help="only these arms, a comma list")
    p.add_argument("--tiny", help="folder of Tiny ImageNet's training pictures; without it those runs are left out")
    p.add_argument("--nyu", help="NYU Depth v2 in the layout `pairs` of eval_dense.py, to judge on as well")
    for name, text in (("list", "print the plan and stop"), ("tables", "print tables and stop"),
                       ("retry", "try again what failed")):
        p.add_argument(f"--{name}", action="store_true", help=text)
    args = p.parse_args()
    args.root = args.root.absolute()
    if args.tables:
        return tables()
    wanted = [(data, arm, seed) for data, arm, seed in names()
              if (data != "tiny" or args.tiny) and data in (args.data or data) and arm in (args.arms or arm).split(",")]
    if args.list:
        for data, arm, seed in wanted:
            file = args.root / f"{data}-{arm}-{seed}" / "study.json"
            done = json.loads(file.read_text()) if file.exists() else {}
            print(f"{data}-{arm}-{seed:<4}", "FAILED" if done.get("failed") else ", ".join(done.get("minutes", ())))
        return
    args.root.mkdir(parents=True, exist_ok=True)
    threads = max((os.cpu_count() or 1) // args.workers, 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    end = time.time() + 60 * args.minutes
    with ThreadPoolExecutor(args.workers) as pool:
        for _ in pool.map(lambda one: time.time() < end and work(args, end, *one), wanted):
            pass
    collect(args.root)


if __name__ == "__main__":
    main()
