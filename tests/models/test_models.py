"""The reference networks against the figures published for them, and the keys under which others publish weights."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from tdcompile.core.network import Network
from tdcompile.errors import InputError
from tdcompile.models.cifar_resnet import ResNet20
from tdcompile.models.digits_net import DigitsNet
from tdcompile.models.vit_tiny import VisionTransformer, ViTTiny

FILES = ("lenet5", "garipovnet", "cifar_resnet", "resnet", "vgg", "mobilenet_v2", "vit_tiny", "digits_net")

# Parameters and multiply-accumulates, both exact; ``None`` where nobody has published an exact one.
PARAMS = {
    "lenet5": 61_706,  # LeCun 1998 with full connections
    "resnet18": 11_689_512,  # torchvision's own counts, to vit_tiny's, which is timm's
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "vgg16": 138_365_992,
    "mobilenet_v2": 3_504_872,
    "vit_tiny": 5_717_416,
}
ROUNDED_PARAMS = {  # in millions, as published
    "garipovnet": "0.558",
    "resnet20": "0.27",
    "resnet32": "0.46",
    "resnet44": "0.66",
    "resnet56": "0.85",
    "resnet110": "1.7",
    "vgg16_cifar": "14.73",
    "resnet18_cifar": "11.17",
    "mobilenet_v2_cifar": "2.24",
}
CONV_MACS = {  # of convolutions alone, in millions, as published
    "resnet20": "40.55",
    "resnet32": "68.86",
    "resnet44": "97.17",
    "resnet56": "125.49",
    "resnet110": "252.89",
    "vgg16_cifar": "313.20",
}
MACS = {  # of convolutions, linear layers and attention, in thousands of millions, as published
    "resnet18": "1.814",
    "resnet34": "3.664",
    "resnet50": "4.089",
    "vgg16": "15.47",
    "mobilenet_v2": "0.301",
    "vit_tiny": "1.3",
    "resnet18_cifar": "0.56",
    "mobilenet_v2_cifar": "0.088",
}


def networks() -> dict[str, type[Network]]:
    modules = [importlib.import_module(f"tdcompile.models.{file}") for file in FILES]
    classes = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    return {c.name: c for c in classes if issubclass(c, Network) and c.name}


NETWORKS = networks()


def on_meta(name: str, **options: str) -> tuple[nn.Module, torch.Tensor]:
    """The network and an input of two samples without memory behind them."""
    with torch.device("meta"):
        network = NETWORKS[name].from_options(options)
        return network.build(), torch.empty(2, *network.input_shapes[0])


def params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def macs(name: str) -> dict[str, float]:
    """Multiply-accumulates for one sample, by operation."""
    module, x = on_meta(name)
    with FlopCounterMode(display=False) as counter:
        module(x)
    return {str(op): flops / 2 / len(x) for op, flops in counter.get_flop_counts()["Global"].items()}


def rounded(value: float, like: str) -> str:
    return f"{value:.{len(like.partition('.')[2])}f}"


def test_every_network_of_the_issue_is_there() -> None:
    assert set(NETWORKS) == {
        *("lenet5", "garipovnet", "digits_net", "mobilenet_v2", "vit_tiny", "vgg16", "vgg16_cifar"),
        *("mobilenet_v2_cifar", "resnet18_cifar"),
        *(f"resnet{depth}" for depth in (18, 20, 32, 34, 44, 50, 56, 110)),
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_builds_in_eval_mode_with_the_classes_asked_for(name: str) -> None:
    module, x = on_meta(name, num_classes="7")
    assert not any(part.training for part in module.modules())
    assert module(x).shape == (2, 7)
    assert NETWORKS[name]().build.__doc__


@pytest.mark.parametrize("name", NETWORKS)
def test_traces_into_its_layers_and_changes_nothing_in_place(name: str) -> None:
    module, x = on_meta(name)
    graph = fx.symbolic_trace(module)
    assert graph(x).shape == module(x).shape
    layers = {name for name, part in module.named_modules() if isinstance(part, nn.Conv2d | nn.Linear)}
    assert layers <= {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    assert not any(getattr(part, "inplace", False) for part in module.modules())
    assert not any(node.kwargs.get("inplace") or str(node.target).endswith("_") for node in graph.graph.nodes)


@pytest.mark.parametrize("name", PARAMS)
def test_parameters_are_the_published_ones(name: str) -> None:
    assert params(on_meta(name)[0]) == PARAMS[name]


@pytest.mark.parametrize("name", ROUNDED_PARAMS)
def test_parameters_round_to_the_published_ones(name: str) -> None:
    assert rounded(params(on_meta(name)[0]) / 1e6, ROUNDED_PARAMS[name]) == ROUNDED_PARAMS[name]


@pytest.mark.parametrize("name", CONV_MACS)
def test_macs_of_convolutions_are_the_published_ones(name: str) -> None:
    assert rounded(macs(name)["aten.convolution"] / 1e6, CONV_MACS[name]) == CONV_MACS[name]


@pytest.mark.parametrize("name", MACS)
def test_macs_are_the_published_ones(name: str) -> None:
    assert rounded(sum(macs(name).values()) / 1e9, MACS[name]) == MACS[name]


def test_lenet5_has_the_macs_of_the_paper() -> None:
    assert sum(macs("lenet5").values()) == 416_520


def test_digits_net_is_worth_compiling_and_small_enough_to_ship() -> None:
    assert 600_000 <= params(on_meta("digits_net")[0]) <= 1_000_000
    assert 100e6 <= sum(macs("digits_net").values()) <= 200e6


# A key of each kind that the publisher's checkpoint has, its shape, and how many entries the checkpoint has.
KEYS: dict[str, tuple[int, dict[str, tuple[int, ...]]]] = {
    "resnet20": (
        116,
        {
            "conv1.weight": (16, 3, 3, 3),
            "bn1.running_mean": (16,),
            "layer2.0.conv1.weight": (32, 16, 3, 3),
            "layer3.2.bn2.num_batches_tracked": (),
            "linear.weight": (10, 64),
        },
    ),
    "resnet18": (
        122,
        {
            "conv1.weight": (64, 3, 7, 7),
            "layer1.1.bn2.running_var": (64,),
            "layer2.0.downsample.0.weight": (128, 64, 1, 1),
            "layer2.0.downsample.1.bias": (128,),
            "fc.bias": (1000,),
        },
    ),
    "resnet34": (218, {"layer3.5.conv2.weight": (256, 256, 3, 3)}),
    "resnet50": (
        320,
        {
            "layer1.0.conv1.weight": (64, 64, 1, 1),
            "layer1.0.downsample.0.weight": (256, 64, 1, 1),
            "layer4.2.conv2.weight": (512, 512, 3, 3),
            "layer4.2.bn3.weight": (2048,),
            "fc.weight": (1000, 2048),
        },
    ),
    "vgg16": (
        13 * 7 + 3 * 2,
        {
            "features.0.weight": (64, 3, 3, 3),
            "features.0.bias": (64,),
            "features.1.running_mean": (64,),
            "features.7.weight": (128, 64, 3, 3),
            "features.40.weight": (512, 512, 3, 3),
            "features.41.bias": (512,),
            "classifier.0.weight": (4096, 25088),
            "classifier.6.bias": (1000,),
        },
    ),
    "mobilenet_v2": (
        314,
        {
            "features.0.0.weight": (32, 3, 3, 3),
            "features.1.conv.0.0.weight": (32, 1, 3, 3),
            "features.1.conv.1.weight": (16, 32, 1, 1),
            "features.1.conv.2.running_var": (16,),
            "features.2.conv.0.0.weight": (96, 16, 1, 1),
            "features.2.conv.1.1.weight": (96,),
            "features.17.conv.2.weight": (320, 960, 1, 1),
            "features.17.conv.3.bias": (320,),
            "features.18.0.weight": (1280, 320, 1, 1),
            "classifier.1.weight": (1000, 1280),
        },
    ),
    "vit_tiny": (
        152,
        {
            "cls_token": (1, 1, 192),
            "pos_embed": (1, 197, 192),
            "patch_embed.proj.weight": (192, 3, 16, 16),
            "blocks.0.norm1.weight": (192,),
            "blocks.11.attn.qkv.weight": (576, 192),
            "blocks.11.attn.proj.bias": (192,),
            "blocks.3.mlp.fc1.weight": (768, 192),
            "blocks.3.mlp.fc2.weight": (192, 768),
            "norm.bias": (192,),
            "head.weight": (1000, 192),
        },
    ),
}


@pytest.mark.parametrize("name", KEYS)
def test_state_dict_has_the_publishers_keys(name: str) -> None:
    entries, known = KEYS[name]
    state = on_meta(name)[0].state_dict()
    assert len(state) == entries
    assert {key: tuple(state[key].shape) for key in known if key in state} == known


def test_shortcut_without_parameters_pads_channels_on_both_sides() -> None:
    block = ResNet20().build().get_submodule("layer2.0.shortcut")
    x = torch.randn(2, 16, 6, 6)
    out = block(x)
    assert out.shape == (2, 32, 3, 3)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_initial_weights_come_from_torchs_seed_alone() -> None:
    first, again, other = (_first_weight(seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def _first_weight(seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return next(ViTTiny().build().parameters())


def test_an_unknown_option_names_the_known_one() -> None:
    with pytest.raises(InputError, match="num_classes"):
        DigitsNet.from_options({"classes": "10"})


@pytest.mark.parametrize("name", ["resnet20", "vit_tiny"])
def test_exports_with_a_dynamic_batch(name: str) -> None:
    torch.manual_seed(0)
    shape = NETWORKS[name].input_shapes[0]
    # two blocks show what twelve would, and take a fifth of the time
    module = VisionTransformer(48, 3, 2, 10).eval() if name == "vit_tiny" else NETWORKS[name]().build()
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(module, (torch.randn(2, *shape),), dynamic_shapes=({0: batch},)).module()
    for size in (1, 3):
        x = torch.randn(size, *shape)
        with torch.no_grad():
            torch.testing.assert_close(exported(x), module(x), rtol=1e-4, atol=1e-5)
