"Downloads from a server on this machine; the same batches in any number of processes."
import functools
import hashlib
import http.server
import io
import os
import pickle
import tarfile
import threading

import numpy as np
import pytest
import torch
from helpers import FRESH, free_port, settle, tree
from torch import distributed as dist

from convnext_nb.data import DataConfig, create_loaders


def test_test_images_never_train():
    for seed in range(3):
        loaders = create_loaders(DataConfig(seed=seed, device="cpu"))
        seen = [{im.numpy().tobytes() for im in dl.images} for dl in loaders]
        if seed == 0: test = seen[2]
        assert seen[2] == test and not seen[0] & test and not seen[1] & test


def cifar_archive(path, folder):
    "An archive in CIFAR-10's form, of 20 training and 10 test images; its files' checksums."
    rng = np.random.default_rng(0)
    def batch(n):
        images = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
        return pickle.dumps({"data": images, "labels": [i % 10 for i in range(n)]})
    files = {"data_batch_1": batch(20), "test_batch": batch(10),
             "batches.meta": pickle.dumps({"label_names": list("abcdefghij")})}
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return {name: hashlib.md5(content).hexdigest() for name, content in files.items()}


@pytest.fixture
def cifar10(tmp_path):
    "torchvision's CIFAR10, which downloads from a server on this machine."
    from torchvision.datasets import CIFAR10
    (tmp_path / "www").mkdir()
    archive = tmp_path / "www" / CIFAR10.filename
    md5 = cifar_archive(archive, CIFAR10.base_folder)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=archive.parent)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    meta = dict(filename="batches.meta", key="label_names", md5=md5["batches.meta"])
    ours = dict(
        url=f"http://127.0.0.1:{server.server_address[1]}/{CIFAR10.filename}", meta=meta,
        tgz_md5=hashlib.md5(archive.read_bytes()).hexdigest(),
        train_list=[["data_batch_1", md5["data_batch_1"]]],
        test_list=[["test_batch", md5["test_batch"]]])
    with pytest.MonkeyPatch.context() as m:
        for k, v in ours.items(): m.setattr(CIFAR10, k, v)
        yield CIFAR10
    server.shutdown()
    server.server_close()


def test_download(cifar10, tmp_path):
    root = tmp_path / "data"
    cfg = DataConfig(dataset="cifar10", data_dir=str(root), batch_size=5, val_fraction=.5,
                     device="cpu")
    train, val, test = create_loaders(cfg)
    assert (train.num_samples, val.num_samples, test.num_samples) == (10, 10, 10)
    assert test.info.classes == tuple("abcdefghij")
    # nothing listens any more: what was downloaded serves, and nothing is written
    cifar10.url, paths = "http://127.0.0.1:9/", [root, *root.rglob("*")]
    for path in paths: path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.stat().st_mtime_ns for path in paths}
    assert create_loaders(cfg)[2].num_samples == 10
    assert {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]} == before
    for path in paths: path.chmod(0o755)


def test_damaged_download_is_refused(cifar10, tmp_path):
    cifar10.tgz_md5 = "0" * 32
    cfg = DataConfig(dataset="cifar10", data_dir=str(tmp_path / "data"), device="cpu")
    message = "cannot get cifar10 into .*with no network, copy cifar-10-python.tar.gz"
    with pytest.raises(OSError, match=message): create_loaders(cfg)


def save_share(root, out, image_size, rank, world, port):
    "In a process of its own: the batches of one epoch, everything switched on."
    settle()
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    cfg = DataConfig(dataset="imagefolder", data_dir=str(root), image_size=image_size,
                     batch_size=8, val_fraction=0, device="cpu", num_workers=1,
                     random_erasing=.5, rand_augment=9., mixup=.8, cutmix=1.)
    train = create_loaders(cfg)[0]
    train.set_epoch(2)
    torch.save(list(train), out / f"{world}_{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("size, image_size", [((32, 32), 32), ((80, 100), 96)],
                         ids=["memory", "files"])
def test_processes_share_the_same_batches(tmp_path, size, image_size):
    "One, two and four processes: put together, their batches are equal to the bit."
    root, whole = tree(tmp_path / "tree", dict(train=10, test=1), size), {}
    for n in (1, 2, 4):
        port = free_port()
        ranks = [FRESH.Process(target=save_share, args=(root, tmp_path, image_size, r, n, port))
                 for r in range(n)]
        for p in ranks: p.start()
        for p in ranks: p.join(timeout=300)
        assert [p.exitcode for p in ranks] == [0] * n
        shares = [torch.load(tmp_path / f"{n}_{r}.pt") for r in range(n)]
        whole[n] = [[torch.cat(t) for t in zip(*batch)] for batch in zip(*shares)]
    assert len(whole[1]) == 2 and whole[1][0][0].shape == (8, 3, image_size, image_size)
    for n in (2, 4):
        for a, b in zip(whole[n], whole[1]): assert all(torch.equal(u, v) for u, v in zip(a, b))
