"Downloads from a server on this machine; the same batches in any number of processes."
import functools
import hashlib
import http.server
import io
import json
import os
import pickle
import shutil
import signal
import stat
import tarfile
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FRESH, Fresh, free_port, settle, told, tree
from torch import distributed as dist

from convnext_nb.data import (
    DataConfig,
    check_same_data,
    compare_fingerprints,
    create_loaders,
    describe_splits,
    load_splits,
)


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


# Folders as they really are: what is done to a good tree, and what the first line then says.

def copy_image(path, source="train/cat/0.png"):
    "One image more; a function of the tree's root, as are the next ones."
    def do(root):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / source, root / path)
    return do


def write(*paths):
    "Files that are no images."
    def do(root):
        for path in paths:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(b"\0\5\26\7")
    return do


def link(path, target):
    "A symbolic link; a relative target begins at the tree's root."
    def do(root):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).symlink_to(root / target)
    return do


def move(path, target): return lambda root: (root / path).rename(root / target)


def elsewhere(root):
    "A class whose images are on another disk, as it were."
    other = root.parent / "elsewhere"
    (root / "train" / "dog").rename(other)
    (root / "train" / "dog").symlink_to(other)


def class_folders_alone(root):
    shutil.rmtree(root / "test")
    for c in ("cat", "dog"): (root / "train" / c).rename(root / c)
    (root / "train").rmdir()


def all_of(*does): return lambda root: [do(root) for do in does]


def odd_bytes(root):
    name = os.fsdecode(b"caf\xe9")
    for split in ("train", "test"): (root / split / "cat").rename(root / split / name)
    (root / "train" / name / "0.png").rename(root / "train" / name / os.fsdecode(b"\xff.png"))


GOOD = ("data: train 18 images of 2 classes from train/; val 2 images of 2 classes cut from "
        "train/; test 10 images of 2 classes from test/")
ONE_CLASS = GOOD.replace("10 images of 2 classes from test/",
                         "5 images of 1 class from test/; test/ has no images of cat")
TAKEN = {
    "as it should be": (lambda root: None, ""),
    "Jupyter's checkpoints": (copy_image("train/.ipynb_checkpoints/0-checkpoint.png"), ""),
    "Jupyter's checkpoints in a class": (copy_image("train/cat/.ipynb_checkpoints/0.png"), ""),
    "AppleDouble": (write("train/cat/._0.png", "train/._cat", "._train"), ""),
    "__MACOSX": (all_of(write("__MACOSX/train/cat/._0.png"), copy_image("train/__MACOSX/0.png")),
                 ""),
    "system files": (write(*(f"train/cat/{n}" for n in (".DS_Store", "Thumbs.db", "desktop.ini")),
                           "train/.directory", "train/cat/.0.png.swp"), ""),
    "a file server's thumbnails": (copy_image("train/cat/@eaDir/0.png/SYNO.png"), ""),
    "photographs of another format": (write(*(f"train/dog/{i}.HEIC" for i in range(12))),
                                      "; 12 .heic ignored"),
    "lists and notes": (write("train/labels.csv", "train/cat/LICENSE", "test/dog/a.txt", "a.md"),
                        "; 1 .csv, 1 file without suffix, 1 .txt ignored"),
    "an editor's backup": (write("train/cat/0.png~"), "; 1 .png~ ignored"),
    "an image beside the classes": (copy_image("train/stray.png"),
                                    "; stray.png in train/ itself ignored, of no class"),
    "a folder beside the splits": (copy_image("extra/cat/0.png"), "; extra/ not read"),
    "suffixes in capitals": (all_of(move("train/cat/0.png", "train/cat/0.PNG"),
                                    move("train/cat/1.png", "train/cat/1.Jpeg")), ""),
    "images in folders of a class": (all_of(copy_image("train/cat/a/b/0.png"),
                                            lambda root: os.remove(root / "train/cat/0.png")),
                                     ""),
    "a FIFO": (lambda root: os.mkfifo(root / "train/cat/pipe.png"), "; 1 FIFO ignored"),
    "a socket": (lambda root: os.mknod(root / "test/dog/s.png", stat.S_IFSOCK | 0o600),
                 "; 1 socket ignored"),
    "a device": (link("train/cat/null.png", "/dev/null"), "; 1 device ignored"),
    "a FIFO in the place of a class": (lambda root: os.mkfifo(root / "train/rat"),
                                       "; 1 FIFO ignored"),
    "a link to nothing": (link("train/cat/gone.png", "gone.png"), "; 1 broken link ignored"),
    "links in a ring": (all_of(link("train/cat/a.png", "train/cat/b.png"),
                               link("train/cat/b.png", "train/cat/a.png")),
                        "; 2 broken links ignored"),
    "a link to an image": (all_of(move("train/cat/0.png", "away.png"),
                                  link("train/cat/0.png", "away.png")), ""),
    "a class that is a link": (elsewhere, ""),
    "a link to the folder that holds it": (link("train/cat/again", "train/cat"),
                                           "; 1 repeated link ignored"),
    "a link to another class": (link("train/a", "train/cat"), "; 1 repeated link ignored"),
    "a link to the tree": (link("train/cat/all", "."), "; 1 repeated link ignored"),
    "a link above the tree": (link("train/cat/above", "../.."), "; 1 repeated link ignored"),
    "names that are no UTF-8": (odd_bytes, ""),
    "a line break in a name": (
        all_of(move("train/cat", "train/c\nt"), move("test/cat", "test/c\nt"),
               lambda root: (root / "ex\ntra").mkdir()), r"; ex\ntra/ not read"),
}
TAKEN_AS = {  # the whole line
    "a class without test images": (lambda root: shutil.rmtree(root / "test" / "cat"), ONE_CLASS),
    "an empty class of test": (lambda root: [p.unlink() for p in (root / "test/cat").iterdir()],
                               ONE_CLASS),
    "valid/": (all_of(*(copy_image(f"valid/{c}/0.png") for c in ("cat", "dog"))),
               "data: train 20 images of 2 classes from train/; val 2 images of 2 classes from "
               "valid/; test 10 images of 2 classes from test/"),
    "Training/, validation/": (
        all_of(*(copy_image(f"validation/{c}/0.png") for c in ("cat", "dog")),
               move("train", "Training"), move("test", "TESTING")),
        "data: train 20 images of 2 classes from Training/; val 2 images of 2 classes from "
        "validation/; test 10 images of 2 classes from TESTING/"),
    "dev/ and no test/": (move("test", "dev"),
                          "data: train 18 images of 2 classes from train/; val 2 images of 2 "
                          "classes cut from train/; test 10 images of 2 classes from dev/"),
    "class folders alone": (class_folders_alone,
                            "data: train 14 images of 2 classes from tree/; val 2 images of 2 "
                            "classes cut from tree/; test 4 images of 2 classes cut from tree/"),
    "a class that is called train": (
        all_of(class_folders_alone,
               *(copy_image(f"train/{i}.png", "cat/0.png") for i in range(10))),
        "data: train 21 images of 3 classes from tree/; val 3 images of 3 classes cut from "
        "tree/; test 6 images of 3 classes cut from tree/"),
}
REFUSED = {
    "no folder": (shutil.rmtree, "there is no folder .*tree; imagefolder wants train/<class>/"),
    "a file": (all_of(shutil.rmtree, lambda root: root.write_text("")), "there is no folder .*e;"),
    "an empty folder": (lambda root: [shutil.rmtree(p) for p in root.iterdir()],
                        "there is no folder .*train; imagefolder wants"),
    "no train/": (move("train", "trian"), "there is no folder .*train; imagefolder wants"),
    "one folder too high": (all_of(lambda root: (root / "a").mkdir(), move("train", "a/train")),
                            "there is no folder .*train; did you mean .*tree/a?"),
    "two names for one split": (all_of(copy_image("val/cat/0.png"), copy_image("valid/cat/0.png")),
                                "has val/, valid/, which both mean val; keep one"),
    "two names for train": (copy_image("training/cat/0.png"),
                            "has train/, training/, which both mean train"),
    "an empty class": (lambda root: (root / "train" / "rat").mkdir(),
                       "train has no images of rat; add some"),
    "a class of another format": (write("train/rat/0.heic", "train/rat/1.heic"),
                                  r"train has no images of rat \(2 .heic\); add some"),
    "images in no class": (all_of(lambda root: shutil.rmtree(root / "train"),
                                  copy_image("train/0.png", "test/cat/0.png")),
                           r"train has no class folders \(in it: 1 image\); imagefolder wants"),
    "val/ as ImageNet's archive has it": (copy_image("val/ILSVRC2012_val_00000001.png"),
                                          "val has no images in class folders; add some"),
    "val/ on a disk that is not there": (link("val", "gone"), "val is a broken link; imagefolder"),
    "val/ that links to itself": (link("val", "val"), "val is a broken link; imagefolder"),
    "a FIFO for val/": (lambda root: os.mkfifo(root / "val"), "val is a FIFO; imagefolder wants"),
    "val/ that is train/": (link("val", "train"), "val leads to a folder that is read already"),
    "a class that train/ has not": (copy_image("test/rat/0.png"),
                                    "test has the class 'rat', which train/ has not; give both"),
    "a class in another case": (move("test/dog", "test/Dog"),
                                "test has the class 'Dog', which train/ has not; rename it to "),
    "text that calls itself an image": (write("train/cat/a.png"), "cannot read the image .*a.png"),
}


@pytest.fixture
def photos(tmp_path): return tree(tmp_path / "tree", dict(train=10, test=5), (8, 8))


def late(*_): raise TimeoutError("it blocks")


def first_line(root):
    "What a run says of its data; what does not answer fails."
    signal.signal(signal.SIGALRM, late)
    signal.alarm(120)
    cfg = DataConfig(dataset="imagefolder", data_dir=str(root), batch_size=2, device="cpu")
    try: line = describe_splits(*create_loaders(cfg))
    finally: signal.alarm(0)
    assert line.isprintable()
    return line


@pytest.mark.parametrize("change", TAKEN)
def test_folder_is_taken(photos, change):
    do, more = TAKEN[change]
    do(photos)
    assert first_line(photos) == GOOD + more
    told("Folders of images that are taken", change, f"taken, as without it{more}")


@pytest.mark.parametrize("change", TAKEN_AS)
def test_splits_are_found(photos, change):
    do, line = TAKEN_AS[change]
    do(photos)
    assert first_line(photos) == line
    told("Folders of images that are taken", change, line)


@pytest.mark.parametrize("change", REFUSED)
def test_folder_is_refused(photos, change):
    do, message = REFUSED[change]
    do(photos)
    with pytest.raises((ValueError, OSError), match=message) as e: first_line(photos)
    assert "\n" not in str(e.value)
    told("Folders of images that are refused", change, str(e.value))


def as_nobody(root, path):
    "In a process of its own, without root's rights: what a run says."
    settle()
    if os.geteuid() == 0:  # whom no mode stops
        os.setgid(65534)
        os.setuid(65534)
    try: print(first_line(root))
    except OSError as e: print(e)


@pytest.mark.parametrize("path, message", {
    "train": "cannot read '{}': Permission denied; change its permissions, or take it out",
    "train/cat": "cannot read '{}': Permission denied; change its permissions, or take it out",
    "train/cat/0.png": "cannot read the image {}: [Errno 13] Permission denied: ",
}.items())
def test_what_may_not_be_read(path, message):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        root = tree(Path(folder) / "tree", dict(train=10, test=5), (8, 8))
        os.chmod(root / path, 0)
        out, err = Fresh(as_nobody, root, path).communicate()
        os.chmod(root / path, 0o755)
    assert out.startswith(message.format(root / path)) and out.count("\n") == 1, (out, err)


def fingerprint(root, **kw):
    cfg = DataConfig(dataset="imagefolder", data_dir=str(root), device="cpu", **kw)
    return load_splits(cfg)[1].fingerprint


def test_fingerprint_is_of_the_data_alone(photos, tmp_path):
    "Not of where it is, the seed, or the size asked for; and files can hold it."
    odd_bytes(photos)
    before = fingerprint(photos)
    assert before["train"].keys() == {"source", "images", "classes", "sha256"}
    assert fingerprint(photos, seed=1, image_size=16, val_fraction=0) == before
    photos.rename(tmp_path / "moved")
    assert fingerprint(tmp_path / "moved") == before
    assert json.loads(json.dumps(before)) == before
    torch.save(before, tmp_path / "f.pt")
    assert torch.load(tmp_path / "f.pt", weights_only=True) == before


def a_byte_more(root):
    with (root / "test" / "cat" / "0.png").open("ab") as f: f.write(b"\0")


CHANGED = {
    "an image more": (copy_image("train/cat/10.png"), "train/: 1 image more"),
    "two fewer": (lambda root: [(root / f"test/dog/{i}.png").unlink() for i in range(2)],
                  "test/: 2 images fewer"),
    "a class more": (copy_image("train/rat/0.png"), "train/: 1 image more, new classes: rat"),
    "another name": (move("train/cat/0.png", "train/cat/00.png"), "train/: other files or pixels"),
    "another class": (move("train/cat/0.png", "train/dog/00.png"), "train/: other files or pixels"),
    "another size": (a_byte_more, "test/: other files or pixels"),
    "a split more": (copy_image("val/cat/0.png"), "val/ is new"),
    "a split less": (lambda root: shutil.rmtree(root / "test"), "test/ is gone"),
    "a class renamed": (all_of(move("train/cat", "train/rat"), move("test/cat", "test/rat")),
                        "train/: new classes: rat, lost classes: cat; "
                        "test/: new classes: rat, lost classes: cat"),
    "what is not taken": (write("train/cat/a.txt", "train/.DS_Store"), ""),
    "another name of a split": (move("train", "Training"), ""),
}


@pytest.mark.parametrize("change", CHANGED)
def test_changed_data_is_told(photos, change):
    do, told = CHANGED[change]
    before = fingerprint(photos)
    do(photos)
    assert compare_fingerprints(before, fingerprint(photos)) == told


def compare_data(root, rank, world, port, out):
    "In a process of its own, whose data may be another's: what it says."
    settle()
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    cfg = DataConfig(dataset="imagefolder", data_dir=str(root), batch_size=world, device="cpu")
    message = "agree"
    try: check_same_data(create_loaders(cfg)[0])
    except ValueError as e: message = str(e)
    (out / f"{rank}.txt").write_text(message)
    dist.destroy_process_group()


@pytest.mark.parametrize("more", [0, 1])
def test_processes_compare_their_data(tmp_path, more):
    parts, port = dict(train=10, test=5), free_port()
    roots = [tree(tmp_path / str(r), parts, (8, 8)) for r in range(3)]
    if more: copy_image("train/dog/10.png")(roots[2])
    ranks = [FRESH.Process(target=compare_data, args=(root, rank, 3, port, tmp_path))
             for rank, root in enumerate(roots)]
    for p in ranks: p.start()
    for p in ranks: p.join(timeout=300)
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in range(3)]
    if not more: assert said == ["agree"] * 3
    else: assert said == ["another process has other data than process 0; see what it says"] * 2 + [
        "process 2 has other data than process 0: train/: 1 image more; copy process 0's"]
