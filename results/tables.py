"""From lines of study.jsonl to tables and pictures of STUDY.md: `study.py --tables`, `--draw`."""

import math
import textwrap
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import torch

import study  # the plan, which says what is compared with what
from study import analyze, need

# Comparing runs. A `group` is {arm: {seed: line}} of one scale, one data set and one use of seeds.
# An outcome is {its name in a table, arrow in the better direction: (name in a line's "results",
# metric, digits)}.

COSINES = "cosines, mean over blocks"
OUTCOMES = {
    "mIoU % ↑": ("teacher scenes", "miou", 2),
    "RMSE m ↓": ("teacher scenes", "rmse", 3),
    "linear % ↑": ("teacher scenes", "linear", 2),
    "k-NN % ↑": ("teacher scenes", "knn", 2),
    "NYU mIoU % ↑": ("teacher pairs", "miou", 2),
    "NYU RMSE m ↓": ("teacher pairs", "rmse", 3),
    "Tiny ImageNet k-NN % ↑": ("teacher imagefolder image_size=64", "knn", 2),
    "Tiny ImageNet linear % ↑": ("teacher imagefolder image_size=64", "linear", 2),
    "cosine before norms": (COSINES, "before norm cls_patch", 3),
    "cosine after norms": (COSINES, "after norm cls_patch", 3),
    "the same, Tiny ImageNet": ("cosines tiny, mean over blocks", "after norm cls_patch", 3),
    "shared part": (COSINES, "shared", 3),
    "neighbour excess": (COSINES, "neighbours", 3),
    "neighbour excess, centred": (COSINES, "neighbours centred", 3),
    "keys, patches": ("attention, mean over blocks", "support", 1),
    "keys, [CLS]": ("attention, mean over blocks", "cls_support", 1),
    "entropy, patches": ("attention, mean over blocks", "entropy", 3),
    "how far patches look": ("attention, mean over blocks", "distance", 2),
    "copies apart, QKV": ("copies", "qkv", 3),
    "copies apart, norm1": ("copies", "norm1", 3),
    "online mIoU, late - middle": ("drift", "miou", 2),
    "online RMSE, late - middle": ("drift", "rmse", 3),
    "online k-NN, late - middle": ("drift", "knn", 2),
}


# {what a group's seeds are for: seeds}; runs of other seeds are of earlier studies.
USES = {"seeds for choosing": study.CHOOSE, "seeds for claims": study.CLAIM}


def drift(probes: list[dict]) -> dict[str, float]:
    """{metric: mean of the last sixth of the steps minus that of the sixth in the middle}, of a
    run's online probes; empty where there are none."""
    last = max((probe["step"] for probe in probes), default=0)
    late = [probe for probe in probes if probe["step"] >= last * 5 / 6]
    middle = [probe for probe in probes if last * 5 / 12 <= probe["step"] <= last * 7 / 12]
    if not middle or len(probes) < 4:
        return {}
    return {metric: mean(probe[metric] for probe in late) - mean(probe[metric] for probe in middle)
            for metric in ("miou", "rmse", "knn")}


def groups(lines: list[dict]) -> dict[tuple[str, str, str], dict]:
    """{(scale, data, use of its seeds): group} of the runs that are judged. ValueError: a run had
    other flags than its arm has now."""
    out = {}
    for line in lines:
        if "scenes" not in line["minutes"]:
            continue
        uses = [use for use, seeds in USES.items() if line["seed"] in seeds]
        use = (uses or ["an earlier study"])[0]
        arm = study.ARMS.get(line["arm"])
        flags = " ".join(f"--scale {line['scale']} {arm.flags} --seed".split()) if arm else ""
        same = use not in USES or flags in line["command"]
        need(same, f"{line['run']} was made with other flags than its arm has: {line['command']}; "
             "move its folder away, and its line")
        group = out.setdefault((line["scale"], line["data"], use), {arm: {} for arm in study.ARMS})
        line["results"]["drift"] = drift(line["probes"])
        if line["git"] in study.HOUSES:
            line["git"] = study.HOUSES[0]
        group.setdefault(line["arm"], {})[line["seed"]] = line
        # The network at step 0 was judged beside the trained one; here it is an arm of its own.
        untrained = {result.replace("untrained", "teacher"): found
                     for result, found in line["results"].items() if "untrained" in result}
        if untrained:
            group["untrained"][line["seed"]] = line | {"results": untrained}
    return out


EARLIER = {"dino-entmax": "dino", "qkv4-half": "plain-half", "registers-qkv4": "registers",
           "bias-qkv4": "bias"}  # controls of arms that only the first study has


def arm_of(name: str) -> study.Arm:
    """An arm's row in ARMS; an arm of an earlier study is called by its name."""
    return study.ARMS.get(name) or study.Arm("", name, EARLIER.get(name, "plain"))


def options(name: str) -> tuple[str, set[str]]:
    """A result's name -> what was judged, and with which options."""
    words = name.split(" ")
    return " ".join(word for word in words if "=" not in word), {w for w in words if "=" in w}


def numbers(seeds: dict[int, dict], result: str, metric: str) -> dict[int, float]:
    """{seed: number} of an arm."""
    out, (wanted, protocol) = {}, options(result)
    for seed, line in sorted(seeds.items()):
        for key, found in line["results"].items():
            # A folder, or the number of pictures, may come after the name. Other options are
            # another protocol, and so another outcome.
            name, theirs = options(key)
            if f"{name} ".startswith(f"{wanted} ") and theirs == protocol and metric in found:
                out.setdefault(seed, found[metric])
    return out


def difference(group: dict, arm: str, result: str, metric: str) -> dict | None:
    """Arm minus control over the seeds that both have: analyze.interval, "each" seed's difference,
    and "p". None if there are fewer than two pairs."""
    control = arm_of(arm).control
    mine = numbers(group[arm], result, metric)
    theirs = numbers(group.get(control, {}), result, metric)
    pairs = {}
    for seed in sorted(mine.keys() & theirs.keys()):
        one, other = group[arm][seed], group[control][seed]
        # Another version, device or number of threads rounds otherwise: that is no pair.
        if all(one[key] == other[key] for key in analyze.SETTING):
            pairs[seed] = mine[seed] - theirs[seed]
    return about(pairs) if len(pairs) > 1 else None


def about(each: dict[int, float]) -> dict:
    """{seed: difference} -> analyze.interval, "p" (a p-value, of no difference), and "each"."""
    d = torch.tensor([*each.values()]).double()
    t = d.mean() / (d.std() / len(d) ** 0.5).clamp(min=1e-12)
    found = analyze.interval(torch.zeros_like(d), d)
    return found | {"each": each, "p": p_value(t.item(), len(d) - 1)}


def shown(d: dict, digits: int) -> str:
    """A difference and its interval, as a cell of a table."""
    middle, low, high = (f"{d[key]:+.{digits}f}" for key in ("difference", "low", "high"))
    return f"{middle} [{low}, {high}]"


def p_value(t: float, freedom: int) -> float:
    """Of Student's t, two-sided. With t = sqrt(freedom) tan(angle) its density becomes
    cos(angle)^(freedom - 1), which is flat enough to add up."""
    whole = torch.linspace(0, math.pi / 2, 100_001, dtype=torch.float64)
    start = math.atan(abs(t) / freedom**0.5)
    tail = torch.linspace(start, math.pi / 2, 100_001, dtype=torch.float64)
    area = [torch.trapezoid(x.cos() ** (freedom - 1), x).item() for x in (tail, whole)]
    return area[0] / area[1]


def holm(p: list[float]) -> list[float]:
    """p-values corrected for their number (Holm's method): the k-th smallest of n times n - k + 1,
    and never less than the one before."""
    out, most = [0.0] * len(p), 0.0
    for k, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        most = max(most, min(p[i] * (len(p) - k), 1.0))
        out[i] = most
    return out


# --------------------------------------------------------------------------------------------------
# Tables and pictures.

EXPLAINED = """\
In a cell: mean ± standard deviation over seeds; below it the mean difference to the control of the
same seed [95 % interval, Student's t, not corrected for the number of intervals]. ↑ more is better,
↓ less is better. Cosines are of [CLS] with patches, means over norm1 of all blocks and the final
norm. Keys: how many get a weight in attention. Copies apart: |W_cls - W_patch| / |W_patch|, mean
over layers."""


def cell(group: dict, arm: str, result: str, metric: str, digits: int) -> str:
    values = numbers(group[arm], result, metric).values()
    if not values:
        return ""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    out = f"{mean(values):.{digits}f}{spread}"
    d = difference(group, arm, result, metric)
    if d:
        out += f"<br>{shown(d, digits)}"
        out += f" of {d['n']} pairs" if d["n"] < len(values) else ""
    return out


def markdown(heads: list[str], rows: list[list]) -> str:
    """A table in Markdown; "" without rows."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) if rows else ""


def table(group: dict) -> str:
    """A row for each arm, a column for each outcome that is there."""
    arms = [arm for arm in group if group[arm]]
    heads = [head for head, (result, metric, _) in OUTCOMES.items()
             if any(numbers(group[arm], result, metric) for arm in arms)]
    rows = []
    for arm in arms:
        control = arm_of(arm).control
        against = f"<br>minus {arm_of(control).label}" if control else ""
        seeds = sorted(group[arm])
        span = f"{seeds[0]}–{seeds[-1]}" if len(seeds) > 1 else str(seeds[0])
        rows.append([arm_of(arm).label + against, f"{span} ({len(seeds)})",
                     *(cell(group, arm, *OUTCOMES[head]) for head in heads)])
    return markdown(["arm, control", "seeds", *heads], rows)


def claims(group: dict) -> str:
    """A line for each claim of the plan that has its runs: difference, interval, p, and p corrected
    for the number of claims that the plan has."""
    arms, outcomes = study.CLAIMS
    found = []
    for arm, (head, what) in product(arms, OUTCOMES.items()):
        d = difference(group, arm, *what[:2]) if head.split()[0] in outcomes else None
        if d:
            planned = len({seed for data, some, seeds in study.PLAN for seed in seeds
                           if data == "scenes" and arm in some and seed in study.CLAIM})
            found.append((arm, head, what[2], d, planned))
    # Claims without all their pairs count in the correction, too, as if they had no effect.
    to_come = len(arms) * len(outcomes) - len(found)
    corrected = holm([d["p"] if d["n"] == planned else 1.0 for *_, d, planned in found]
                     + [1.0] * to_come)
    rows = [[arm_of(arm).label, head, f"{d['n']} of {planned}", shown(d, digits), f"{d['p']:.3f}",
             f"{p:.3f}"] for (arm, head, digits, d, planned), p in zip(found, corrected)]
    heads = ["arm", "outcome", "pairs", "difference [95 % interval]", "p", "p, Holm"]
    return markdown(heads, rows)


FASTER = 1, 2, 3, 5, 10  # factors on the learning rate of [CLS]'s copies


def slopes(group: dict) -> str:
    """A line for each outcome: what a doubling of the copies' learning rate changes, by a least
    squares fit over FASTER for each seed, and what each changes beside 1 x; means of both depths.
    """
    rows, x = [], torch.tensor(FASTER).double().log2()
    x -= x.mean()
    for head, (result, metric, digits) in OUTCOMES.items():
        each = {}
        for seed in study.CHOOSE:
            depths = []  # for each depth a number for each factor
            for arm in ("qkv4", "qkv8"):
                arms = [arm if k == 1 else f"{arm}-k{k}" for k in FASTER]
                values = [numbers(group[name], result, metric).get(seed) for name in arms]
                depths += [values] if None not in values else []
            if depths:
                y = torch.tensor(depths).double()  # (depths, factors)
                slope = (y @ x).mean() / (x @ x)
                each[seed] = [slope, *(y[:, 1:] - y[:, :1]).mean(0)]
        if len(each) > 1:
            columns = [about(dict(zip(each, map(float, column)))) for column in zip(*each.values())]
            rows.append([head, len(each), *(shown(d, digits) for d in columns)])
    minus = [f"{k} x, minus 1 x" for k in FASTER[1:]]
    return markdown(["copies' learning rate", "seeds", "each doubling", *minus], rows)


GROWS = (("qkv8", "qkv8-large"), ("qkv4", "qkv4-x4"), ("best", "best-x4"), ("best", "best-x16"))


def grows(group: dict) -> str:
    """A line for each pair of arms and outcome: by how much the difference to the control changes
    from the first arm to the second, over the seeds that both have."""
    rows = []
    for arms, (head, what) in product(GROWS, OUTCOMES.items()):
        before, after = (difference(group, arm, *what[:2]) for arm in arms)
        if before and after:
            each = {seed: d - before["each"][seed] for seed, d in after["each"].items()
                    if seed in before["each"]}
            if len(each) > 1:
                labels = [arm_of(arm).label for arm in arms]
                rows.append([*labels, head, len(each), shown(about(each), what[2])])
    heads = ["from", "to", "outcome", "seeds", "its difference to plain changes by"]
    return markdown(heads, rows)


def tables(lines: list[dict]) -> str:
    """Every outcome that is there, of every scale, data set and use of seeds."""
    out = [EXPLAINED]
    for (scale, data, use), group in groups(lines).items():
        out.append(f"{scale}, trained on {study.DATA[data]}, {use}")
        out += [table(group), grows(group)]
        if (scale, data, use) == ("nano", "scenes", "seeds for choosing"):
            out.append(slopes(group))
        if (scale, data, use) == ("nano", "scenes", "seeds for claims"):
            count = len(study.CLAIMS[0]) * len(study.CLAIMS[1])
            out += [f"Claims of the plan (intervals are not corrected, Holm's p for all {count}):",
                    claims(group)]
    failed = [f"{line['run']} ({stage})" for line in lines
              for stage in line["failed"] | line.get("retried", {})]
    hours = sum(sum(line["minutes"].values()) for line in lines) / 60
    out.append(f"{len(lines)} runs, {hours:.1f} hours of a core. Failed runs: "
               + (", ".join(failed) or "none"))
    return "\n\n".join(filter(None, out))


SHOWN = "mIoU % ↑", "RMSE m ↓", "linear % ↑", "k-NN % ↑"
HORIZON = {1250: "best", 5000: "best-x4", 20_000: "best-x16"}  # steps: arm


def draw_effects(path: Path, group: dict, arms: dict[str, str], steps: bool = False) -> None:
    """A panel for each outcome, with each arm's difference to its control, of every seed and their
    mean with its interval: a row for each arm, or over the number of steps, where a line joins the
    dots of a seed. arms: {arm: label}."""
    fig, axes = analyze.canvas(len(SHOWN), len(SHOWN), sharey=not steps)
    fig.set_size_inches(11, 3.2 if steps else 1.2 + 0.4 * len(arms))
    beside = 0.1 if steps else 0.2  # dots are beside an interval, not on it
    for ax, head in zip(axes, SHOWN):
        dots = {}  # seed: [(arm's place, difference)]
        for i, arm in enumerate(arms):
            d = difference(group, arm, *OUTCOMES[head][:2])
            if not d:
                continue
            for seed, each in d["each"].items():
                dots.setdefault(seed, []).append((i + beside, each))
            marks = [([d["difference"]], [i], "ko")]
            if d["n"] > 2:  # that of two is too wide to say much
                marks.append(([d["low"], d["high"]], [i, i], "k_-" if steps else "k|-"))
            for x, y, how in marks:
                ax.plot(*((y, x) if steps else (x, y)), how)
        for found in dots.values():
            at, each = zip(*found)
            if steps:
                ax.plot(at, each, "C1.-", linewidth=0.7)
            else:
                ax.plot(each, at, "C1.")
        ticks = dict(ticks=range(len(arms)), labels=arms.values())
        if steps:
            ax.set_xticks(**ticks)
            ax.set_xlim(-0.3, len(arms) - 0.5)
            ax.set_xlabel("training steps")
            ax.axhline(0, color="#0072B2", linestyle="--")
        else:
            ax.set_yticks(**ticks)
            ax.set_ylim(len(arms) - 0.5, -0.5)
            ax.axvline(0, color="#0072B2", linestyle="--")
        better = "higher" if "↑" in head else "lower"
        ax.set_title(f"{head.split()[0]}, {head.split()[1].replace('%', 'points')} ({better} is "
                     "better)", fontsize=9)
        ax.tick_params(labelsize=8)
    who = study.ARMS["best"].label.capitalize() if steps else "Specialised"
    orange = "a seed, joined by lines" if steps else "a seed"
    fig.suptitle(f"{who}, minus plain of the same seed. Orange: {orange}. Black: mean and 95 % "
                 "interval. Blue: no difference.", fontsize=9)
    fig.savefig(path, dpi=90)


def curve(ax, i: int, x, middle, low, high, label: str) -> None:
    """A line in a band."""
    how = analyze.style(i)
    ax.fill_between(x, low, high, color=how["color"], alpha=0.12)
    ax.plot(x, middle, **how, linewidth=2, label=label)
    ax.grid(alpha=0.3)


def draw_cosines(path: Path, group: dict, arms: list[str]) -> None:
    """The cosine of [CLS] and patches, block by block: means over seeds, and the difference to
    plain of the same seed with its interval. arms: those that are drawn beside plain."""
    fig, axes = analyze.canvas(2, 2)
    plain = {seed: line["cosine by block"] for seed, line in group["plain"].items()}
    for i, arm in enumerate(["plain", *arms]):
        cosines = {seed: line["cosine by block"] for seed, line in group[arm].items()}
        means = list(map(mean, zip(*cosines.values())))  # of each block
        blocks, label = range(1, len(means) + 1), arm_of(arm).label
        curve(axes[0], i, blocks, means, means, means, label)
        both = sorted(cosines.keys() & plain.keys())
        if arm != "plain" and len(both) > 1:
            d = [about({seed: cosines[seed][block - 1] - plain[seed][block - 1] for seed in both})
                 for block in blocks]
            ends = [[found[key] for found in d] for key in ("difference", "low", "high")]
            curve(axes[1], i, blocks, *ends, label)
    axes[0].set_title("cosine of [CLS] and patches, mean of the seeds", fontsize=9)
    axes[1].set_title("minus plain of the same seed; bands: 95 % intervals", fontsize=9)
    axes[1].axhline(0, color="#0072B2")
    for ax in axes:
        ax.set_xlabel("block, after norm1 (13: after the final norm)", fontsize=9)
    axes[0].legend(fontsize=8)
    fig.savefig(path, dpi=90)


def draw_online(path: Path, group: dict, rows: list[list[str]]) -> None:
    """The online probe over training steps: means over seeds, in bands of a standard deviation.
    rows: the arms of each row of panels."""
    metrics = {"mIoU %": "miou", "RMSE m": "rmse", "k-NN %": "knn"}
    fig, axes = analyze.canvas(3 * len(rows), 3)
    fig.set_size_inches(11, 2.9 * len(rows))
    panels = product(rows, metrics.items())
    for ax, (arms, (head, metric)) in zip(axes, panels):
        for i, arm in enumerate(arms):
            runs = [line["probes"] for line in group[arm].values()]
            y = torch.tensor([[probe[metric] for probe in probes] for probes in runs]).double()
            middle, spread = y.mean(0), y.std(0, correction=min(1, len(y) - 1))
            steps = [probe["step"] for probe in runs[0]]
            label = textwrap.fill(f"{arm_of(arm).label} ({len(runs)} seeds)", 36)
            curve(ax, i, steps, middle, middle - spread, middle + spread, label)
        ax.set_title(f"online {head}", fontsize=9)
        ax.tick_params(labelsize=8)
        ax.set_xlabel("training step", fontsize=8)
    for ax in axes[1::3]:  # the middle panels have room, as depth falls
        ax.legend(fontsize=7, loc="upper right")
    fig.savefig(path, dpi=90)


def draw(file: Path, every: dict[tuple[str, str, str], dict]) -> None:
    """Of the claims on Scenes: study-effects.png; study-steps.png, effects over training steps;
    study-cosines.png, block by block; study-online.png, probes of long runs."""
    group = every.get(("nano", "scenes", "seeds for claims"))
    if not group:
        raise ValueError("no run of nano on Scenes with a seed of the claims is there yet")
    there = {arm: study.ARMS[arm].label for arm in ("norms", "qkv4", "qkv8", "best") if group[arm]}
    draw_effects(file.with_name("study-effects.png"), group, there)
    long = {arm: f"{steps:,}\n{len(group[arm])} seeds" for steps, arm in HORIZON.items()
            if len(group[arm]) > 1}
    if long:
        draw_effects(file.with_name("study-steps.png"), group, long, steps=True)

    if group["plain"]:
        draw_cosines(file.with_name("study-cosines.png"), group, list(there))
    rows = {}  # control: it, and the arms that are compared with it
    for arm in study.ARMS:
        if len(numbers(group[arm], "drift", "miou")) > 1:
            rows.setdefault(arm_of(arm).control or arm, []).append(arm)
    if rows:
        draw_online(file.with_name("study-online.png"), group, [*rows.values()])
