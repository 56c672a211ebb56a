"""timm's interface on timm's terms: its registry, extractors, optimizers and EMA take our networks.

With CONVNEXT_NB_TIMM, a folder with a checkout of timm of the installed version or near it (its
tests and scripts are not in the package), timm's own tests run on our networks too, and its
train.py and validate.py; without it these two are skipped."""
import ast
import csv
import json
import os
import runpy
import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest
import timm
import torch
from helpers import Fresh, tree
from timm.data import resolve_model_data_config
from timm.models.convnext import ConvNeXt as TimmConvNeXt
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from timm_plugin import NAMES

from convnext_nb.blocks import randomize
from convnext_nb.model import ConvNeXt

SMALL = dict(depths=(1, 1, 2, 1), dims=(16, 32, 64, 128), num_classes=10)
IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pair():
    "Our network and timm's, small, with the same weights of ordinary size."
    ours, theirs = randomize(ConvNeXt(**SMALL)).eval(), TimmConvNeXt(**SMALL).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_every_variant_is_registered_with_timms_settings():
    assert set(NAMES) == set(timm.list_models("nb_*")) and len(NAMES) == 18
    same = "num_classes mean std interpolation first_conv classifier".split()
    for name in NAMES:
        ours, theirs = map(timm.get_pretrained_cfg, (name, name.removeprefix("nb_")))
        assert [getattr(ours, k) for k in same] == [getattr(theirs, k) for k in same], name


def test_create_model():
    net = timm.create_model("nb_convnext_atto", num_classes=7, in_chans=1, drop_path_rate=.1)
    assert net(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    unpooled = timm.create_model("nb_convnextv2_atto", num_classes=0, global_pool="")
    assert unpooled(torch.randn(2, 3, 32, 64)).shape == (2, unpooled.head_hidden_size, 1, 2)
    with pytest.raises(ValueError, match="drop_rate is 0.1; this network has no dropout"):
        timm.create_model("nb_convnext_atto", drop_rate=.1)


def test_resolve_model_data_config():
    ours, theirs = [timm.create_model(n + "convnext_atto", num_classes=2) for n in ("nb_", "")]
    ours, theirs = map(resolve_model_data_config, (ours, theirs))
    assert ours == theirs | dict(crop_pct=ours["crop_pct"])  # it belongs to trained weights


@pytest.mark.parametrize("kwargs", [
    dict(), dict(indices=2), dict(indices=(3, -3)), dict(indices=[1], stop_early=True),
    dict(norm=True, output_fmt="NCHW"), dict(indices=[0, 1], intermediates_only=True)])
def test_forward_intermediates(pair, kwargs):
    for checkpointing in (False, True):
        for net in pair: net.set_grad_checkpointing(checkpointing)
        ours, theirs = [net.forward_intermediates(IMAGES, **kwargs) for net in pair]
        assert_close(ours, theirs)


@pytest.mark.parametrize("classes", [0, 5])
def test_reset_classifier(pair, classes):
    "With and without a classifier and a mean, timm's head is a convolution where ours is linear."
    for pool in (None, "", None, "avg"):
        for net in pair: net.reset_classifier(classes, pool)
        ours, theirs = pair
        state = theirs.state_dict()
        ours.load_state_dict({k: v.view_as(ours.state_dict()[k]) for k, v in state.items()})
        assert ours.num_classes == classes and ours.head_hidden_size == theirs.head_hidden_size
        assert_close(ours(IMAGES), theirs(IMAGES))
        features = ours.forward_features(IMAGES)
        assert_close(*[net.forward_head(features, pre_logits=True) for net in pair])


@pytest.mark.skipif(tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 31),
                    reason="until 1.0.30 timm kept the head's norm and the number of features")
@pytest.mark.parametrize("kwargs", [
    dict(), dict(indices=[0, 2]), dict(indices=4, prune_head=False), dict(indices=[-4, -3])])
def test_prune_intermediate_layers(pair, kwargs):
    ours, theirs = pair
    assert ours.prune_intermediate_layers(**kwargs) == theirs.prune_intermediate_layers(**kwargs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert_close(ours(IMAGES), theirs(IMAGES))
    assert (ours.num_features, ours.head_hidden_size) == (theirs.num_features,) * 2
    for net in pair: net.reset_classifier(5, "avg")
    theirs.load_state_dict(ours.state_dict())  # a new classifier on what remains
    assert_close(ours(IMAGES), theirs(IMAGES))


@pytest.mark.parametrize("kind", ["list", "getter"])
@pytest.mark.parametrize("chosen", [(0, 1, 2, 3), (1, 2), (-2,)])
def test_features_only(kind, chosen):
    def made(**kwargs):
        torch.manual_seed(0)
        return timm.create_model("nb_convnext_atto", **kwargs).eval()
    net = made(features_only=True, feature_cls=kind, out_indices=chosen)
    found, maps = net(IMAGES), made().forward_intermediates(IMAGES, intermediates_only=True)
    assert_close(found, [maps[i] for i in chosen])
    assert net.feature_info.channels() == [m.shape[1] for m in found]
    assert net.feature_info.reduction() == [64 // m.shape[2] for m in found]


def test_layer_decay(pair):
    "timm gives each of our parameters the learning rate and weight decay that it gives its own."
    def settings(net):
        optimizer = create_optimizer_v2(net, "adamw", lr=1., weight_decay=.05, layer_decay=.7)
        name = {id(p): n for n, p in net.named_parameters()}
        return {name[id(p)]: (group["lr_scale"], group["weight_decay"])
                for group in optimizer.param_groups for p in group["params"]}
    ours, theirs = map(settings, pair)
    assert ours == theirs and len({scale for scale, _ in ours.values()}) > 4


def test_ema_of_the_weights(pair):
    ours, _ = pair
    ema = ModelEmaV3(ours, decay=.75)
    before = ours.head.fc.weight.detach().clone()
    ours.head.fc.weight.data += 1
    ema.update(ours)
    assert_close(ema.module.head.fc.weight, before + .25)
    assert ema(IMAGES).shape == (2, 10)


# timm's own tests and scripts

MODELS = ["nb_convnext_atto", "nb_convnext_tiny", "nb_convnextv2_atto"]
NOT_APPLICABLE = {
    "test_model_inference": "compares trained weights from the hub with their published logits",
    "test_model_load_pretrained": "loads trained weights from the hub",
    "test_model_features_pretrained": "loads trained weights from the hub",
    "test_model_forward_torchscript_with_features_fx": "is about one network of timm's, a RegNet",
    "test_naflexvit": "is about another architecture",
    "test_gemma4": "is about another architecture"}
FAILS = {"test_model_forward_torchscript": "torch.jit.script, which torch has deprecated, knows "
         "less Python than our layers use; after torch.fx has traced them it takes them"}


@pytest.fixture
def checkout():
    path = os.environ.get("CONVNEXT_NB_TIMM")
    if not path: pytest.skip("CONVNEXT_NB_TIMM names no checkout of timm")
    path = Path(path).resolve()
    assert all((path / f).is_file() for f in ("tests/test_models.py", "train.py", "validate.py"))
    return path


def timms_tests(path, report):
    "In a process of its own: timm's tests, each with our networks in place of timm's."
    timm.list_models = lambda *args, pretrained=False, **kwargs: [] if pretrained else MODELS
    timm.list_pretrained = lambda *args, **kwargs: []
    options = ["-k", "nb_", "-p", "no:cacheprovider", "-W", "ignore", f"--junitxml={report}"]
    sys.exit(pytest.main([str(path), *options]))


def outcomes(report):
    "Test function -> what became of it for each network."
    found = defaultdict(list)
    for case in ElementTree.parse(report).iter("testcase"):
        bad = [e.tag for e in case if e.tag in ("failure", "error", "skipped")]
        found[case.get("name").partition("[")[0]] += bad or ["pass"]
    return found


def test_timms_own_tests(checkout, tmp_path):
    path, report = checkout / "tests" / "test_models.py", tmp_path / "report.xml"
    out, err = Fresh(timms_tests, path, report).communicate()
    assert report.exists(), out + err
    found, table = outcomes(report), {}
    functions = [n.name for n in ast.walk(ast.parse(path.read_text()))
                 if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
    for name in functions:
        why = [v for k, v in NOT_APPLICABLE.items() if name == k or name.startswith(k + "_")]
        if name in found: table[name] = "/".join(sorted(set(found[name])))
        else: table[name] = f"not applicable: {why[0]}" if why else "not run"
    for name, result in table.items(): print(f"{name:50} {result}")
    for name in FAILS: assert table.pop(name) == "failure", f"{name} passes now: say so"
    assert all(v == "pass" or v.startswith("not applicable") for v in table.values()), out
    assert sum(v == "pass" for v in table.values()) >= 9


def timms_script(path, args):
    "In a process of its own: a script of timm's, with our networks in timm's registry."
    sys.argv = [str(path), *map(str, args)]
    runpy.run_path(str(path), run_name="__main__")


def test_timms_scripts_train_and_validate(checkout, tmp_path):
    data = tree(tmp_path / "data", dict(train=4, validation=2), (40, 40))
    common = ["--data-dir", data, "--model", "nb_convnext_atto", "--num-classes", 2, "--img-size",
              32, "--batch-size", 8, "--device", "cpu", "--workers", 0]
    recipe = ["--opt", "adamw", "--lr", 1e-3, "--layer-decay", .7, "--drop-path", .1,
              "--model-ema", "--grad-checkpointing", "--epochs", 1, "--warmup-epochs", 0]
    p = Fresh(timms_script, checkout / "train.py",
              [*common, *recipe, "--output", tmp_path, "--experiment", "run"])
    out, err = p.communicate()
    assert p.returncode == 0, out + err
    row, = csv.DictReader((tmp_path / "run" / "summary.csv").read_text().splitlines())
    assert 0 < float(row["train_loss"]) < 2 and float(row["eval_top1"]) in (0, 25, 50, 75, 100)

    args = ["--checkpoint", tmp_path / "run" / "last.pth.tar", "--use-ema", "--split", "validation",
            "--results-file", tmp_path / "r.json", "--results-format", "json"]
    p = Fresh(timms_script, checkout / "validate.py", [*common, *args])
    out, err = p.communicate()
    assert p.returncode == 0, out + err
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["model"] == "nb_convnext_atto" and 0 <= result["top1"] <= 100
