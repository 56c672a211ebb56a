"convnext-classify --explain, the command in a process of its own."
from types import SimpleNamespace

import pytest
from helpers import Fresh, names, tree
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


def test_a_folder_that_is_none(given, tmp_path):
    "Refused before the weights are read, in one line; what was there stays."
    (tmp_path / "file").write_text("mine")
    for name in ("cat", "cat_map"): Image.new("RGB", (40, 40)).save(tmp_path / f"{name}.png")
    before = (tmp_path / "cat_map.png").read_bytes()
    for place, message in [("file", "file is a file"), ("file/maps", "file is a file"),
                           (".", "would replace")]:
        p = classify(tmp_path / "cat.png", tmp_path / "cat_map.png", "--weights",
                     given / "gone.safetensors", "--explain", tmp_path / place)
        assert p.status == 2 and p.err.count("\n") == 1 and not p.out, p.err
        assert p.err.startswith("convnext-classify: error: ") and message in p.err
    assert names(tmp_path) == ["cat.png", "cat_map.png", "file"]
    assert (tmp_path / "cat_map.png").read_bytes() == before
