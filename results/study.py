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


def stages(args, run: Path, data: str, arm: str, seed: int) -> dict[str, list[str]]:
    """{stage: command}, each of them made again at no harm; judging on NYU last, as it may be left out."""
    resume = "--resume" if (run / "last.pt").exists() else "--overwrite"
    pictures = ["--data", str(args.tiny)] if data == "tiny" else []
    judge, nyu = ["eval_dense.py", str(run)], ["--data", "pairs", "--root", str(args.nyu)]
    untrained = ["--network", "untrained"]
    out = {"train": ["train.py", *ARMS[arm].split(), "--seed", str(seed), *pictures, "--no-probe", "--save-every", "50",
                     "--out", str(run), resume], "scenes": judge}
    if (data, arm) == ("scenes", "plain"):
        out["untrained"] = judge + untrained
    out["inside"] = ["analyze.py", str(run), "--what", "cosines,dimensions,norms", "--pictures", "256"]
    if args.nyu:
        out["nyu"] = judge + nyu
    if args.nyu and (data, arm) == ("scenes", "plain"):
        out["nyu untrained"] = judge + nyu + untrained
    return out


def keep(file: Path, state: dict) -> None:
    file.parent.mkdir(exist_ok=True)
    file.with_suffix(".tmp").write_text(json.dumps(state))
    file.with_suffix(".tmp").replace(file)


def work(args, end: float, data: str, arm: str, seed: int) -> None:
    """Take one run as far as the time allows."""
    name = f"{data}-{arm}-{seed}"
    run, log = args.root / name, args.root / f"{name}.txt"
    file = run / "study.json"
    state = {"minutes": {}, "before": {}, "failed": {}} | (json.loads(file.read_text()) if file.exists() else {})
    state["failed"] = {} if args.retry else state["failed"]
    for stage, command in stages(args, run, data, arm, seed).items():
        if state["failed"] or time.time() > end:
            return
        if stage in state["minutes"]:
            continue
        start = time.time()
        with open(log, "a") as out:
            child = subprocess.Popen([sys.executable, *command], cwd=HERE.parent, stdout=out, stderr=out)
        try:
            code = child.wait(timeout=max(end - start, 1))
        except subprocess.TimeoutExpired:
            child.terminate()  # train.py saves, and then leaves
            code = child.wait()
        minutes = state["before"].pop(stage, 0) + (time.time() - start) / 60
        if code in (-2, -15, 130, 143):
            state["before"][stage] = minutes
            said = "is not done, and goes on with the next call"
        elif code:
            state["failed"], said = {stage: log.read_text()[-500:]}, f"FAILED, see {log}"
        else:
            state["minutes"][stage], said = minutes, f"{minutes:.1f} min"
        keep(file, state)
        print(f"{name}: {stage} {said}", flush=True)


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
            "run": run.name, "data": data, "arm": arm, "seed": seed,
            "command": config.get("command", "").replace(str(root), "runs/study"),
            **{k: config.get(k) for k in ("git", "torch", "device", "threads")},
            "minutes": {k: round(v, 1) for k, v in state["minutes"].items()}, "failed": state.get("failed", {}),
            "img_per_s": sum(d["img_per_s"] for d in log) / max(len(log), 1),
            "probes": [{k: d[k] for k in keys if k in d} for d in log if "miou" in d],
            "results": {k: {m: round(x, 4) for m, x in v.items()} for k, v in analyze.numbers_of(run).items()}}
    order = {f"{d}-{a}-{s}": i for i, (d, a, s) in enumerate(names())}
    LINES.write_text("".join(json.dumps(lines[k]) + "\n" for k in sorted(lines, key=lambda k: order.get(k, 999))))


# What an arm is compared with: plain, but where the recipe or the high-norm strategy differs.
CONTROL = {"dino-entmax": "dino", "registers-qkv4": "registers", "bias-qkv4": "bias", "deit3": None, "dino": None,
           "plain": None}

SHOWN = {"mIoU %": ("teacher scenes", "miou"), "RMSE m": ("teacher scenes", "rmse"),
         "linear %": ("teacher scenes", "linear"), "k-NN %": ("teacher scenes", "knn"),
         "NYU mIoU %": ("teacher pairs", "miou"), "NYU RMSE m": ("teacher pairs", "rmse"),
         "cosine": ("cosines, mean over blocks", "after norm cls_patch")}


def number(line: dict, result: str, metric: str) -> float | None:
    return next((v[metric] for k, v in line["results"].items() if k.startswith(result) and metric in v), None)


def tables() -> None:
    """For every data set: each arm's mean and standard deviation, and its paired difference to its control."""
    import torch

    import analyze
    if not LINES.exists():
        sys.exit(f"error: there is no {LINES}; run some of the plan first: python results/study.py --minutes 60")
    every = [json.loads(line) for line in LINES.read_text().splitlines()]
    lines = [d for d in every if "inside" in d["minutes"]]  # judged on Scenes at least
    for data in dict.fromkeys(d["data"] for d in lines):
        by = {(d["arm"], d["seed"]): d for d in lines if d["data"] == data}
        print(f"\n{data}\n\n| arm | against | seeds | " + " | ".join(SHOWN) + " |\n|---|---|---|" + "---|" * len(SHOWN))
        for arm in dict.fromkeys(arm for arm, _ in by):
            control, seeds, cells = CONTROL.get(arm, "plain"), sorted(s for a, s in by if a == arm), []
            for result, metric in SHOWN.values():
                digits = 3 if metric in ("rmse", "after norm cls_patch") else 2
                own = {s: x for s in seeds if (x := number(by[arm, s], result, metric)) is not None}
                pairs = [(x, y) for s, y in own.items() if (control, s) in by
                         and (x := number(by[control, s], result, metric)) is not None]
                values = torch.tensor(list(own.values())).double()
                cell = f"{values.mean():.{digits}f}" if own else ""
                cell += f" ± {values.std():.{digits}f}" if len(own) > 1 else ""
                cell += f" (n = {len(own)})" if own and len(own) < len(seeds) else ""
                if len(pairs) > 1:
                    d = analyze.interval(*torch.tensor(pairs).double().T)
                    cell += f" ({d['difference']:+.{digits}f} [{d['low']:+.{digits}f}, {d['high']:+.{digits}f}])"
                cells.append(cell)
            print(f"| {arm} | {control or ''} | {', '.join(map(str, seeds))} | " + " | ".join(cells) + " |")
    print("\nfailed: " + (", ".join(f"{d['run']} ({stage})" for d in every for stage in d["failed"]) or "none"))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--root", type=Path, default=Path("runs/study"), help="folder of the runs (default: %(default)s)")
    p.add_argument("--minutes", type=float, default=60, help="time limit (default: %(default)s)")
    p.add_argument("--workers", type=int, choices=range(1, 65), metavar="N", default=1, help="runs at once (default: %(default)s)")
    p.add_argument("--data", choices=["scenes", "tiny"], help="only this data set")
    p.add_argument("--arms", help="only these arms, a comma list")
    p.add_argument("--tiny", type=Path, help="folder of Tiny ImageNet's training pictures; without it those runs are left out")
    p.add_argument("--nyu", type=Path, help="NYU Depth v2 in the layout `pairs` of eval_dense.py, to judge on as well")
    for name, text in (("list", "print the plan and stop"), ("tables", "print tables and stop"),
                       ("retry", "try again what failed")):
        p.add_argument(f"--{name}", action="store_true", help=text)
    args = p.parse_args()
    if args.tables:
        return tables()
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
