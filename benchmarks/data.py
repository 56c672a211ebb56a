"""How fast batches come, and how long a training step waits for them.

    python benchmarks/data.py                       25,600 images of CIFAR-10's size; and an atto at patch_size 2 that trains on them
    python benchmarks/data.py --device cuda --batch_size 512

Images: crop, flip and random erasing of 32x32 images, by our `MemoryLoader` and by torchvision.transforms.v2 image by image in a DataLoader with
a worker for each core (started before the clock), as tutorials have it; both give normalized float32 batches on the device. Interleaved rounds,
shuffled; a ratio is the median over rounds of the peer's time over ours in the same round, with the 95% interval of that median (bootstrap).

Waiting: the same training steps with batches from the loader and with one batch that is already there, in turns; what the first take longer is
waiting. Images are random bytes: no time depends on what is on them. Writes benchmarks/results/<name>.json.
"""
import argparse
import os
import random
import statistics
import time

import torch
import torch.nn.functional as F
from common import environment, write
from throughput import interval
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from convnext_nb.data import DATASETS, DataConfig, MemoryLoader, pick_device
from convnext_nb.model import create_model

ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument("--images", type=int, default=25_600)
ap.add_argument("--batch_size", type=int, default=128)
ap.add_argument("--rounds", type=int, default=7)
ap.add_argument("--steps", type=int, help="in a round of training; default: 10 on a CPU, an epoch on a GPU")
ap.add_argument("--device")
ap.add_argument("--name", help="of the result; default: data_<device>")


class PerSample(Dataset):
    "What a tutorial does: each image through torchvision's transforms."
    def __init__(self, images, labels, info):
        self.images, self.labels = images.permute(0, 3, 1, 2), labels
        self.transform = v2.Compose([v2.RandomCrop(32, 4, padding_mode="reflect"), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True),
                                     v2.Normalize(info.mean, info.std), v2.RandomErasing(.25)])
    def __len__(self): return len(self.labels)
    def __getitem__(self, i): return self.transform(self.images[i]), self.labels[i]


def epoch(batches, device):
    "Seconds until every batch of an epoch is on the device."
    start = time.perf_counter()
    for x, y in batches: x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
    if device.type == "cuda": torch.cuda.synchronize()
    return time.perf_counter() - start


def training(net, optimizer, batches, device):
    "Seconds of training steps on these batches."
    start = time.perf_counter()
    for x, y in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"): loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if device.type == "cuda": torch.cuda.synchronize()
    return time.perf_counter() - start


def main():
    a = ap.parse_args()
    device = pick_device(a.device)
    torch.manual_seed(0)
    name, where = a.name or f"data_{device.type}", environment(device)
    info = DATASETS["cifar10"]
    images, labels = torch.randint(256, (a.images, 32, 32, 3), dtype=torch.uint8), torch.randint(10, (a.images,))
    ours = MemoryLoader(images, labels, info, DataConfig(batch_size=a.batch_size, device=str(device), random_erasing=.25), train=True)
    workers = len(os.sched_getaffinity(0))
    theirs = DataLoader(PerSample(images, labels, info), a.batch_size, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=True,
                        pin_memory=device.type == "cuda")
    seconds, order = {"ours": [], "torchvision": []}, random.Random(0)
    for r in range(a.rounds + 1):
        for k in order.sample(list(seconds), 2):
            ours.set_epoch(r)
            t = epoch(dict(ours=ours, torchvision=theirs)[k], device)
            if r: seconds[k].append(t)  # the first round starts workers and fills caches
    del theirs
    speed = {k: len(ours) * a.batch_size / statistics.median(t) for k, t in seconds.items()}
    ratio = interval([p / o for p, o in zip(seconds["torchvision"], seconds["ours"])])
    print(f"images/s: ours {speed['ours']:,.0f}, torchvision with {workers} workers {speed['torchvision']:,.0f}; "
          f"ratio {ratio['ratio']:.1f} [{ratio['low']:.1f}, {ratio['high']:.1f}]", flush=True)

    net = create_model("convnext_atto", num_classes=10, patch_size=2).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    steps = min(len(ours), a.steps or (10 if device.type == "cpu" else len(ours)))
    there = next(iter(ours))
    times = {"loader": [], "there": []}
    for r in range(a.rounds + 1):
        for k in order.sample(list(times), 2):
            ours.set_epoch(r, start=len(ours) - steps)
            t = training(net, optimizer, ours if k == "loader" else [there] * steps, device)
            if r: times[k].append(t)
    wait = interval([1 - t / l for t, l in zip(times["there"], times["loader"])])
    wait = {"share" if k == "ratio" else k: v for k, v in wait.items()}
    print(f"a training step waits for data {wait['share']:.1%} [{wait['low']:.1%}, {wait['high']:.1%}] of its time", flush=True)
    config = dict(images=a.images, batch_size=a.batch_size, rounds=a.rounds, steps=steps, workers=workers, seed=0)
    print(write(name, **where, config=config, settings=dict(images_per_s=speed, torchvision_over_ours=ratio, waiting=wait)))


if __name__ == "__main__": main()
