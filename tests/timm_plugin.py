"""Our networks in timm's registry: importing this module makes `nb_convnext_tiny` and its seventeen
relatives known to `timm.create_model`, and so to timm's scripts and timm's own tests."""
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from convnext_nb.model import VARIANTS, ConvNeXt

NAMES = [f"nb_{name}" for name in VARIANTS]
CFG = dict(
    url="", num_classes=1000, input_size=(3, 224, 224), pool_size=(7, 7), crop_pct=.875,
    interpolation="bicubic", mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD,
    first_conv="stem.0", classifier="head.fc", license="apache-2.0")
default_cfgs = generate_default_cfgs({name: CFG for name in NAMES})  # timm looks for this name


def register(name):
    "Let timm build the variant `name`; ValueError for a dropout rate, which our head has not."
    def build(pretrained=False, drop_rate=0., **kwargs):  # train.py always passes a `drop_rate`
        if drop_rate: raise ValueError(f"drop_rate is {drop_rate}; this network has no dropout")
        features = dict(out_indices=(0, 1, 2, 3), flatten_sequential=True)
        sizes = VARIANTS[name.removeprefix("nb_")] | kwargs
        return build_model_with_cfg(ConvNeXt, name, pretrained, feature_cfg=features, **sizes)
    build.__name__ = name
    register_model(build)


for name in NAMES: register(name)
