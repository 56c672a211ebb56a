r"""CIFAR-10 from scratch: our presets, with several seeds, and the stock network in the same time.

    python benchmarks/cifar10.py --data_dir TREE        a GPU: all three presets
    python benchmarks/cifar10.py --data_dir TREE --presets cifar10-fast --stock     a CPU

All 50,000 training images train (`--val_fraction 0`: no epoch is chosen); the 10,000 test images
are looked at once, at the end, plain and with test-time augmentation. The presets were chosen on
images held out of the training set: cifar10_study.py. `--stock` trains the stock convnext_atto
(4x4 stem, the paper's start, AdamW) too, for as many whole epochs as fit in the time that the
preset took; `--compiled` trains the last seed once more under torch.compile. Without --data_dir,
torchvision downloads CIFAR-10. Further options are convnext-train's. Runs that the result already
holds are not done again. Writes <name>.json, <name>.png and <name>_errors.png into
benchmarks/results.
"""
import csv
import json
import math
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from cifar10_study import SHARED, STOCK
from common import environment, make_parser, read_result, result_path, write_result

from convnext_nb.data import pick_device
from convnext_nb.runs import evaluate_run, train
from convnext_nb.runs import make_parser as make_train_parser
from convnext_nb.train import PRESETS, TrainConfig, preset

CIFAR10_PRESETS = [p for p in PRESETS if p.startswith("cifar10")]
# fields of TrainConfig that say where something is: two runs that differ in them are the same
PLACES = ("data_dir", "out", "resume", "dataset")


def config_in_result(cfg):
    "The configuration as it stands in a result: what JSON makes of it, without the places."
    values = {k: v for k, v in asdict(cfg).items() if k not in PLACES}
    return json.loads(json.dumps(values))


def read_history(folder):
    "A dict for each epoch of a run; what was not measured is left out."
    with (Path(folder) / "history.csv").open() as f: rows = list(csv.DictReader(f))
    return [{k: float(v) for k, v in row.items() if v} for row in rows]


def train_and_test(cfg, label, errors_png):
    "Train, and look at the test images; the picture of the worst errors goes to `errors_png`."
    cuda = torch.device(cfg.device).type == "cuda"
    if cuda: torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    result = train(cfg)
    total = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if cuda else None
    with_tta = evaluate_run(cfg.out, tta=True, device=cfg.device)
    shutil.copy(Path(cfg.out) / "errors.png", errors_png)
    return dict(label=label, config=config_in_result(cfg), result=result,
                test_top1_tta=with_tta["top1"], total_seconds=total, peak_memory=peak,
                history=read_history(cfg.out))


class Runs:
    "The runs that a result holds: each is done once, and written down when it ends."
    def __init__(self, name, where, minutes, scratch):
        self.name, self.where, self.scratch = name, where, scratch
        self.end = time.monotonic() + 60 * minutes
        self.rows = [r for r in read_result(name).get("runs", []) if "label" in r]
        self.trained = self.without_time = 0  # runs of this call

    def labelled(self, label): return [r for r in self.rows if r["label"] == label]

    def new_folder(self): return tempfile.mkdtemp(dir=self.scratch)

    def time_for(self, label):
        "Would a run like the last of this label end in time, as far as one can tell?"
        longest = max((r["total_seconds"] for r in self.labelled(label)), default=0)
        return time.monotonic() + longest <= self.end

    def find(self, cfg, label):
        "The run, if it was done before."
        config = config_in_result(cfg)
        return next((r for r in self.labelled(label) if r["config"] == config), None)

    def forget_other_recipes(self, cfg, label):
        "Of this label only runs that differ in their seed are kept."
        def recipe(config): return {k: v for k, v in config.items() if k != "seed"}
        kept = recipe(config_in_result(cfg))
        self.rows = [r for r in self.rows if r["label"] != label or recipe(r["config"]) == kept]

    def get(self, cfg, label):
        "The run, done now or before; None if there is no time for it."
        found = self.find(cfg, label)
        if found: return found
        title = f"{label}, seed {cfg.seed}"
        if not self.time_for(label):
            self.without_time += 1
            return print(f"no time left for {title}")
        self.forget_other_recipes(cfg, label)
        print(title, flush=True)
        cfg, errors_png = replace(cfg, out=self.new_folder()), result_path(self.name, "_errors.png")
        r = train_and_test(cfg, label, errors_png) | dict(commit=self.where["commit"])
        self.rows.append(r)
        self.trained += 1
        # after each run: what is stopped keeps what it has
        write_result(self.name, **self.where, summary=summarize(self.rows), runs=self.rows)
        print(f"{title}: test {r['result']['test_top1']:.2%}, with augmentation "
              f"{r['test_top1_tta']:.2%}, {r['result']['seconds']:.1f} s", flush=True)
        return r

    def get_stock(self, ours, cfg, label):
        "The stock network, for as many whole epochs as fit into the time of the run `ours`."
        stock = TrainConfig(
            **SHARED | STOCK, dataset=cfg.dataset, data_dir=cfg.data_dir, val_fraction=0.,
            seed=cfg.seed, device=cfg.device, amp_dtype=cfg.amp_dtype, cuda_graph=cfg.cuda_graph)
        label = f"stock, in the time of {label}"
        before = self.labelled(label)
        if before: epochs = before[0]["config"]["epochs"]
        else:
            probe = train(replace(stock, epochs=1, out=self.new_folder()))
            epochs = max(1, round(ours["result"]["seconds"] / probe["seconds"]))
        return self.get(replace(stock, epochs=epochs), label)


def spread(values): return statistics.stdev(values) if len(values) > 1 else None


def summarize(runs):
    """Mean and standard deviation over the seeds of each label; `seconds` are those of the training
    steps, `total_seconds` those of the whole call."""
    summary = {}
    for label in dict.fromkeys(r["label"] for r in runs):
        rows = [r for r in runs if r["label"] == label]
        plain, tta = [r["result"]["test_top1"] for r in rows], [r["test_top1_tta"] for r in rows]
        summary[label] = dict(
            test_top1=statistics.mean(plain), test_top1_tta=statistics.mean(tta),
            test_top1_std=spread(plain), test_top1_tta_std=spread(tta),
            seeds=len(rows), epochs=rows[0]["config"]["epochs"],
            seconds=statistics.median(r["result"]["seconds"] for r in rows),
            total_seconds=statistics.median(r["total_seconds"] for r in rows),
            peak_memory=rows[0]["peak_memory"])
    return summary


def draw(runs, path):
    "Training accuracy over seconds, a curve for each run; the legend says what the test said."
    fig, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for i, (label, s) in enumerate(summarize(runs).items()):
        legend = (f"{label}: test {s['test_top1']:.2%}, "
                  f"with augmentation {s['test_top1_tta']:.2%}")
        for history in (r["history"] for r in runs if r["label"] == label):
            seconds = list(accumulate(h["seconds"] for h in history))
            top1 = [h["train_top1"] for h in history]
            ax.plot(seconds, top1, "o-", ms=3, color=f"C{i}", alpha=.8, label=legend)
            legend = None  # one line of the legend for each label
    ax.set(xlabel="seconds of training", ylabel="training accuracy (augmented)",
           title="ConvNeXt from scratch on CIFAR-10")
    ax.grid(alpha=.3)
    ax.legend(fontsize=8)
    fig.savefig(path, dpi=110)


def read_options():
    "Our options, and those of convnext-train that were given."
    parser = make_parser(__doc__, "cifar10", allow_abbrev=False)
    add = parser.add_argument
    add("--data_dir", help="imagefolder tree, train/ and test/")
    add("--presets", nargs="+", choices=CIFAR10_PRESETS, default=CIFAR10_PRESETS)
    add("--seeds", type=int, default=1, help="number of seeds, from 0")
    add("--stock", action="store_true", help="the stock network too, for the same time")
    add("--compiled", action="store_true", help="the last seed once more, under torch.compile")
    add("--minutes", type=float, default=math.inf,
        help="begin no run that would end later, as far as one can tell")
    a, more = parser.parse_known_args()
    given = vars(make_train_parser().parse_args(more))
    del given["preset"]
    return a, given


def train_all(runs, a, values):
    "Every preset with every seed, in turns: what the machine does meanwhile, it does to all."
    for seed in range(a.seeds):
        for name in a.presets:
            cfg = preset(name, **values | dict(seed=seed))
            ours = runs.get(cfg, name)
            if not ours: continue
            if a.compiled and seed == a.seeds - 1:
                runs.get(replace(cfg, compile=True), f"{name}, compiled")
            if a.stock: runs.get_stock(ours, cfg, name)


def main():
    a, given = read_options()
    device = pick_device(a.device)
    name, where = a.name or f"cifar10_{device.type}", environment(device, a.data_dir)
    values = dict(dataset="cifar10", val_fraction=0., device=device.type)
    if a.data_dir: values |= dict(dataset="imagefolder", data_dir=a.data_dir)
    with tempfile.TemporaryDirectory() as scratch:
        runs = Runs(name, where, a.minutes, scratch)
        train_all(runs, a, values | given)
    if not runs.trained and not runs.without_time: print("nothing left to do")
    if runs.rows: draw(runs.rows, result_path(name, ".png"))
    print(result_path(name))


if __name__ == "__main__": main()
