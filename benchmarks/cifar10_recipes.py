r"""Which network and recipe of the package learns CIFAR-10 best in a given number of epochs.

    python benchmarks/cifar10_recipes.py --data_dir TREE "" "lr=.03" "lr=.03 batch_size=64"
    python benchmarks/cifar10_recipes.py --data_dir TREE --file CHANGES.txt     one change a line

A change is any number of NAME=VALUE, NAME a field of TrainConfig, and is made to BASE; "" is BASE
itself. Two more names: `adamw` is the factor from the rate of Muon to that of AdamW beside it, and
`momentum` Muon's. 45,000 training images train; accuracy is that on the 5,000 held out, plain and
with test-time augmentation. The test images are not read. On a GPU, --jobs runs share it: their
seconds mean little. Runs that the result already holds are not done again. Writes <name>.json into
benchmarks/results.
"""
import math
import statistics
from dataclasses import fields
from pathlib import Path

from common import amp_dtype, make_parser, result_path, run_study, train_on_cifar10

from convnext_nb.data import pick_device
from convnext_nb.model import count_macs, count_params
from convnext_nb.train import TrainConfig, evaluate

BASE = dict(
    depths="1,2,2", dims="64,128,256", kernel_size=3, patch_size=2, mlp_ratio=2.,
    norm_layer="batchnorm", optimizer="muon", lr=.02, schedule="linear", warmup_epochs=.5,
    epochs=5, batch_size=128, ema_decay=0., label_smoothing=.2, max_shift=2, alternate_flip=True)
OWN = dict(adamw=1., momentum=.95)  # of the optimizers, and no field of TrainConfig


def read_change(text):
    "The values that a change names, each of the type that its field has."
    values = {}
    kinds = {f.name: f.type for f in fields(TrainConfig)} | dict.fromkeys(OWN, float)
    for pair in text.split():
        name, _, value = pair.partition("=")
        if name not in kinds: raise SystemExit(f"unknown name {name!r} in the change {text!r}")
        kind = next(t for t in (bool, int, float, str)
                    if t is kinds[name] or t.__name__ in str(kinds[name]).split(" | "))
        values[name] = None if value == "None" else kind(value) if kind is not bool \
            else value == "True"
    return values


def train_one(change, seed, a):
    "Train a network; its cost and its validation accuracy."
    values = BASE | read_change(change)
    own = OWN | {k: values.pop(k) for k in OWN if k in values}
    cfg = TrainConfig(**values, seed=seed, device=a.device, amp_dtype=a.amp_dtype,
                      cuda_graph=a.device != "cpu")
    def prepare(run):
        muon, adamw = run.optimizers[0], run.optimizers[-1]
        for g in adamw.param_groups: g["lr_scale"] *= own["adamw"]
        if muon is not adamw:
            for g in muon.param_groups: g["momentum"] = own["momentum"]
    run, val_dl, seconds = train_on_cifar10(cfg, a.data_dir, 1, prepare=prepare)
    plain, views = (evaluate(run.eval_model, val_dl, run.dtype, tta=t) for t in (False, True))
    return dict(change=change, seed=seed, epochs=cfg.epochs, val_top1=plain["top1"],
                val_top1_tta=views["top1"], val_loss=plain["loss"], seconds=seconds,
                train_loss=run.history[-1]["train_loss"],
                macs=count_macs(run.model, (3, 32, 32)), params=count_params(run.model))


def summarize(runs):
    "Mean over the seeds of each change, the best first."
    summary = []
    for change in dict.fromkeys(r["change"] for r in runs):
        rows = [r for r in runs if r["change"] == change]
        top1 = [r["val_top1"] for r in rows]
        summary.append(dict(
            change=change or "none", epochs=rows[0]["epochs"], seeds=len(rows),
            val_top1=statistics.mean(top1), spread=max(top1) - min(top1),
            val_top1_tta=statistics.mean(r["val_top1_tta"] for r in rows),
            macs=rows[0]["macs"], params=rows[0]["params"]))
    return sorted(summary, key=lambda s: (s["epochs"], -s["val_top1"]))


def describe(r):
    "A line on a run."
    return (f"{r['change'] or 'none':50} seed {r['seed']}: {r['val_top1']:.2%}, with test-time "
            f"augmentation {r['val_top1_tta']:.2%}, {r['seconds']:.0f} s")


def read_options():
    parser = make_parser(__doc__, "cifar10_recipes")
    add = parser.add_argument
    add("changes", nargs="*", metavar="CHANGE")
    add("--file", type=Path, help="more changes, one a line")
    add("--data_dir", help="imagefolder tree; without it torchvision downloads into ./data")
    add("--seeds", type=int, default=1, help="number of seeds, from 0")
    add("--jobs", type=int, help="runs at once (default: a CPU: one on each core; a GPU: 1)")
    add("--minutes", type=float, default=math.inf, help="begin no run after so many")
    add("--amp_dtype", help="default: bfloat16 if it is fast, else float32")
    return parser.parse_args()


def main():
    a = read_options()
    device = pick_device(a.device)
    a.device, a.amp_dtype = device.type, amp_dtype(a, device)
    name = a.name or f"cifar10_recipes_{a.device}"
    changes = a.changes + (a.file.read_text().splitlines() if a.file else [])
    for change in changes: read_change(change)
    wanted = [(change, seed) for seed in range(a.seeds) for change in dict.fromkeys(changes)]
    run_study(a, name, dict(base=BASE, amp_dtype=a.amp_dtype), ("change", "seed"), wanted,
              train_one, summarize, describe)
    print(result_path(name))


if __name__ == "__main__": main()
