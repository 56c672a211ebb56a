"""How fast batches come, and how long a training step waits for them.

    python benchmarks/data.py       25,600 images of CIFAR-10's size; and an atto at patch_size 2
                                    that trains on them
    python benchmarks/data.py --device cuda --batch_size 512

Images: crop, flip and random erasing of 32x32 images, by our `MemoryLoader` and by
torchvision.transforms.v2 image by image in a DataLoader with a worker for each core (started before
the clock), as tutorials have it; both give normalized float32 batches on the device. Interleaved
rounds, shuffled; a ratio is the median over rounds of the peer's time over ours in the same round,
with the 95% interval of that median (bootstrap).

Waiting: the same training steps with batches from the loader and with one batch that is already
there, in turns; what the first take longer is waiting. Images are random bytes: no time depends on
what is on them. Writes <name>.json into benchmarks/results.
"""
import os
import statistics

import torch
import torch.nn.functional as F
from common import (
    autocast,
    environment,
    interleaved,
    make_parser,
    median_ratio,
    seconds_of,
    write_result,
)
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from convnext_nb.data import DATASETS, DataConfig, MemoryLoader, pick_device
from convnext_nb.model import create_model

INFO = DATASETS["cifar10"]


class TransformedImages(Dataset):
    "What a tutorial does: each image through torchvision's transforms."
    def __init__(self, images, labels):
        self.images, self.labels = images.permute(0, 3, 1, 2), labels
        self.transform = v2.Compose([
            v2.RandomCrop(32, 4, padding_mode="reflect"), v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize(INFO.mean, INFO.std),
            v2.RandomErasing(.25)])

    def __len__(self): return len(self.labels)
    def __getitem__(self, i): return self.transform(self.images[i]), self.labels[i]


def make_loaders(a, device):
    "Ours, and torchvision's, on the same random images."
    images = torch.randint(256, (a.images, 32, 32, 3), dtype=torch.uint8)
    labels = torch.randint(10, (a.images,))
    cfg = DataConfig(batch_size=a.batch_size, device=str(device), random_erasing=.25)
    theirs = DataLoader(
        TransformedImages(images, labels), a.batch_size, shuffle=True, drop_last=True,
        num_workers=len(os.sched_getaffinity(0)), persistent_workers=True,
        pin_memory=device.type == "cuda")
    return MemoryLoader(images, labels, INFO, cfg, train=True), theirs


def read_epoch(batches, device):
    "Bring every batch to the device."
    for x, y in batches: x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def compare_loaders(a, device, ours, theirs):
    "Images per second of both, and the ratio of their times."
    loaders = dict(ours=ours, torchvision=theirs)
    seconds = {label: [] for label in loaders}
    for epoch, label in interleaved(list(loaders), a.rounds + 1):
        ours.set_epoch(epoch)
        taken = seconds_of(device, read_epoch, loaders[label], device)
        if epoch: seconds[label].append(taken)  # the first round starts workers and fills caches
    images = len(ours) * a.batch_size
    speed = {label: images / statistics.median(mine) for label, mine in seconds.items()}
    ratio = median_ratio([t / o for t, o in zip(seconds["torchvision"], seconds["ours"])])
    print(f"images/s: ours {speed['ours']:,.0f}, torchvision with {theirs.num_workers} workers "
          f"{speed['torchvision']:,.0f}; "
          f"ratio {ratio['ratio']:.1f} [{ratio['low']:.1f}, {ratio['high']:.1f}]", flush=True)
    return speed, ratio


class Trainer:
    "A small network that trains on batches."
    def __init__(self, device):
        net = create_model("convnext_atto", num_classes=10, patch_size=2)
        self.net = net.to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-4, fused=True)
        self.device = device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def train(self, batches):
        for x, y in batches:
            with autocast(self.device, self.dtype): loss = F.cross_entropy(self.net(x), y)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def measure_waiting(rounds, steps, device, loader):
    "The share of a training step's time in which it waits for its batch."
    trainer, batches = Trainer(device), dict(loader=loader, there=[next(iter(loader))] * steps)
    seconds = {label: [] for label in batches}
    for epoch, label in interleaved(list(batches), rounds + 1):
        loader.set_epoch(epoch, start=len(loader) - steps)
        taken = seconds_of(device, trainer.train, batches[label])
        if epoch: seconds[label].append(taken)  # the first round warms up
    found = median_ratio([1 - without / waiting for without, waiting
                          in zip(seconds["there"], seconds["loader"])])
    share, low, high = found["ratio"], found["low"], found["high"]
    print(f"a training step waits for data {share:.1%} [{low:.1%}, {high:.1%}] of its time",
          flush=True)
    return dict(share=share, low=low, high=high)


def read_options():
    parser = make_parser(__doc__, "data")
    add = parser.add_argument
    add("--images", type=int, default=25_600)
    add("--batch_size", type=int, default=128)
    add("--rounds", type=int, default=7)
    add("--steps", type=int,
        help="in a round of training (default: 10 on a CPU, an epoch on a GPU)")
    return parser.parse_args()


def main():
    a = read_options()
    device = pick_device(a.device)
    torch.manual_seed(0)
    name, where = a.name or f"data_{device.type}", environment(device)
    ours, theirs = make_loaders(a, device)
    workers = theirs.num_workers
    speed, ratio = compare_loaders(a, device, ours, theirs)
    del theirs  # and its workers with it
    steps = min(len(ours), a.steps or (10 if device.type == "cpu" else len(ours)))
    waiting = measure_waiting(a.rounds, steps, device, ours)
    config = dict(images=a.images, batch_size=a.batch_size, rounds=a.rounds, steps=steps,
                  workers=workers, seed=0)
    settings = dict(images_per_s=speed, torchvision_over_ours=ratio, waiting=waiting)
    print(write_result(name, **where, config=config, settings=settings))


if __name__ == "__main__": main()
