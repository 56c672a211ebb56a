"convnext-classify --explain, the command in a process of its own."
import json
from types import SimpleNamespace

import pytest
from helpers import Fresh, benchmark, names, tree
from PIL import Image

from convnext_nb.model import ConvNeXt
from convnext_nb.pretrained import save_weights


def classify_main(args):
    "The command `convnext-classify`."
    from convnext_nb.pretrained import main
    main(args)


def classify(*args):
    p = Fresh(classify_main, [*map(str, args)])
    out, err = p.communicate()
    return SimpleNamespace(status=p.returncode, out=out, err=err)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    "Weights of a small network, and two folders whose images have the same names."
    root = tmp_path_factory.mktemp("classify")
    model = ConvNeXt(num_classes=2, depths=(1, 1), dims=(8, 16))
    model.pretrained_cfg = dict(input_size=[3, 32, 32], label_names=["cat", "a $ sign"])
    save_weights(model, root / "net.safetensors")
    tree(root, {"": 2}, (40, 60))
    return root


def test_pictures_beside_the_answers(given, tmp_path):
    args = given / "cat", given / "dog", "--weights", given / "net.safetensors"
    out = tmp_path / "new" / "maps"
    plain, explained = classify(*args), classify(*args, "--explain", out)
    assert explained.status == 0 and not explained.err, explained.err
    assert explained.out == f"{plain.out}pictures are in {out}\n"
    assert names(out) == ["0_map.png", "0_map2.png", "1_map.png", "1_map2.png"]
    pixels = set()
    for path in out.iterdir():
        with Image.open(path) as picture: pixels.add(picture.convert("RGB").tobytes())
        assert picture.size == (640, 380)
    assert len(pixels) == 4


def test_pictures_replace_nothing(given, tmp_path):
    "Neither the images nor the pictures of an earlier call: the next free number is taken."
    for name in ("cat", "cat_map"): Image.new("RGB", (40, 40)).save(tmp_path / f"{name}.png")
    args = tmp_path / "cat.png", tmp_path / "cat_map.png", "--weights", given / "net.safetensors"
    there = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for new in ["cat_map2.png", "cat_map_map.png"], ["cat_map3.png", "cat_map_map2.png"]:
        p = classify(*args, "--explain", tmp_path)
        assert p.status == 0 and not p.err, p.err
        assert names(tmp_path) == sorted([*there, *new])
        for name, content in there.items(): assert (tmp_path / name).read_bytes() == content
        there = {p.name: p.read_bytes() for p in tmp_path.iterdir()}


def test_a_folder_that_is_none(given, tmp_path):
    "Refused before the weights are read, in one line."
    (tmp_path / "file").write_text("mine")
    for place, message in [(tmp_path / "file", "file is a file"), ("", "--explain is empty"),
                           (tmp_path / "file" / "maps", "file is a file")]:
        p = classify(given / "cat", "--weights", given / "gone.safetensors", "--explain", place)
        assert p.status == 2 and p.err.count("\n") == 1 and not p.out, p.err
        assert p.err.startswith("convnext-classify: error: ") and message in p.err
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"


def test_benchmark_of_explanations(finished, benchmarks, tmp_path):
    "benchmarks/explain.py on a run and a folder of classes."
    images = tree(tmp_path, dict(test=2), (8, 8), classes=("0", "1"))
    benchmark(benchmarks, "explain", finished, images / "test", "--n", 3, "--device", "cpu",
              "--name", "tiny")
    r = json.loads((benchmarks / "results" / "tiny.json").read_text())
    assert len(r["settings"]) == 3 and r["result"]["epochs"] == 3
    assert str(tmp_path) not in json.dumps(r) and " TREE/test " in r["command"]
    with Image.open(benchmarks / "results" / "tiny.png") as picture: assert picture.width == 1000
