r"""What a trained network's answers rest on: class activation maps of images that it never saw.

    convnext-train --preset cifar10-fast --val_fraction 0 \
        --dataset imagefolder --data_dir TREE --out runs/cifar10
    python benchmarks/explain.py runs/cifar10 TREE/test

(The committed result shows an older and smaller network of that preset, trained with AdamW.)
Takes a run's folder and a folder with a folder of images for each class. Eight images are chosen
by --seed alone, good and bad answers as they come. Writes <name>.png and <name>.json into
benchmarks/results.
"""
import json
import os
import random
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import matplotlib.pyplot as plt
from common import environment, result_path, write_result

from convnext_nb.data import pick_device
from convnext_nb.pretrained import (
    IMAGE_SUFFIXES,
    atomic_write,
    classify,
    draw_activation_map,
    load_model,
)

PLACES = ("data_dir", "out", "resume")  # where something is: no matter of the result


def choose(folder, n, seed):
    "That many images of a tree of class folders."
    found = sorted(p for p in Path(folder).glob("*/*") if p.suffix.lower() in IMAGE_SUFFIXES)
    return random.Random(seed).sample(found, n)


def draw(model, paths, png):
    "A column for each image: the image, and its map with the answer; the answers as dicts."
    fig, axes = plt.subplots(2, len(paths), figsize=(10, 3.1), layout="constrained")
    answers = []
    for i, path in enumerate(paths):
        label, p = classify(model, path, topk=1)[0][0]
        draw_activation_map(model, path, axes[:, i])
        axes[0, i].set_title(path.parent.name, fontsize=10)
        color = "k" if label == path.parent.name else "C3"
        axes[1, i].set_xlabel(f"{label} {p:.0%}", fontsize=10, color=color)
        answers.append(dict(image=f"{path.parent.name}/{path.name}", answer=label, probability=p))
    for row, name in enumerate(("image", "map over it")):
        axes[row, 0].set_ylabel(name, fontsize=10)
    atomic_write(png, lambda tmp: fig.savefig(tmp, format="png", dpi=100))
    return answers


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("images", help="a folder of class folders")
    parser.add_argument("--seed", type=int, default=0, help="of the choice (default: %(default)s)")
    parser.add_argument("--n", type=int, default=8, help="how many (default: %(default)s)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--name", default="explain_cifar10", help="of the result (%(default)s)")
    a = parser.parse_args()
    device = pick_device(a.device)
    model = load_model(a.run / "best.safetensors").to(device)
    answers = draw(model, choose(a.images, a.n, a.seed), result_path(a.name, ".png"))
    config, result = (json.loads((a.run / f"{f}.json").read_text()) for f in ("config", "result"))
    config = {k: v for k, v in config.items() if k not in PLACES}
    where = environment(device, os.path.dirname(a.images.rstrip("/")))  # the tree's root
    print(write_result(a.name, **where, config=config | dict(choice_seed=a.seed),
                       result=result, settings=answers))


if __name__ == "__main__": main()
