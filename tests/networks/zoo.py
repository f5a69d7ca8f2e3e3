"""Small networks of other libraries, with random weights: what happens when they are converted and trained.

    pip install -e ".[networks]"
    python tests/networks/zoo.py                 # the table over all networks
    python tests/networks/zoo.py bert timm/vit   # some of them

| column | meaning |
|---|---|
| dropout | whether its own dropouts are tuned: yes; in part, and numbers that stay constant are named; or none |
| exact | largest difference of the outputs that conversion makes, in evaluation |
| dropout | whether its own dropouts are tuned: yes, none, or in part (numbers that stay constant are named) |
| silent | parameters that train and whose gate gets no gradient |
| export | largest difference between the trained network and its export, with a centred and an uncentred response |
| fresh | the same for a new plain network that has loaded the state dict of the export |
"""

import copy
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from lightning_stn import STN, ConversionError, DeltaSTN, Float, HyperparameterSet, convert, export
from lightning_stn.binding import bind_weight_phase, cache_effective_parameters, unbind
from lightning_stn.layers import ResponseLayer
from lightning_stn.methods import Method

Build = Callable[[], nn.Module]
EXAMPLES = 3


def images(size: int = 32) -> Tensor:
    return torch.randn(EXAMPLES, 3, size, size, generator=torch.Generator().manual_seed(0))


def words() -> Tensor:
    return torch.randint(3, 90, (EXAMPLES, 12), generator=torch.Generator().manual_seed(0))


Entry = tuple[Build, Tensor]


def from_transformers() -> dict[str, Entry]:
    import transformers as t

    size = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"intermediate_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    picture = {k: v for k, v in size.items() if "token" not in k and k != "vocab_size"}
    picture |= {"image_size": 32, "patch_size": 8, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    wide = {"vocab_size": 100, "d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 2, "num_heads": 2}
    makers: dict[str, tuple[Build, Tensor]] = {
        "bert": (lambda: t.BertForMaskedLM(t.BertConfig(**size)), words()),
        "roberta": (lambda: t.RobertaForMaskedLM(t.RobertaConfig(**size)), words()),
        "electra": (lambda: t.ElectraForMaskedLM(t.ElectraConfig(embedding_size=16, **size)), words()),
        "albert": (
            lambda: t.AlbertForMaskedLM(t.AlbertConfig(embedding_size=16, hidden_dropout_prob=0.1, **size)),
            words(),
        ),
        "distilbert": (
            lambda: t.DistilBertForMaskedLM(
                t.DistilBertConfig(vocab_size=100, dim=32, n_layers=2, n_heads=2, hidden_dim=64, pad_token_id=0)
            ),
            words(),
        ),
        "gpt2": (
            lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=2, **ids)),
            words(),
        ),
        "opt": (
            lambda: t.OPTForCausalLM(
                t.OPTConfig(
                    vocab_size=100,
                    hidden_size=32,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    ffn_dim=64,
                    word_embed_proj_dim=32,
                    **ids,
                )
            ),
            words(),
        ),
        "llama": (lambda: t.LlamaForCausalLM(t.LlamaConfig(**size)), words()),
        "mistral": (lambda: t.MistralForCausalLM(t.MistralConfig(num_key_value_heads=1, **size)), words()),
        "gpt-neox": (lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(hidden_dropout=0.1, **size)), words()),
        "t5": (lambda: t.T5EncoderModel(t.T5Config(**wide, **ids)), words()),
        "hf-vit": (lambda: t.ViTForImageClassification(t.ViTConfig(**picture)), images()),
        "hf-deit": (lambda: t.DeiTForImageClassification(t.DeiTConfig(**picture)), images()),
        "hf-swin": (
            lambda: t.SwinForImageClassification(
                t.SwinConfig(
                    image_size=32,
                    patch_size=4,
                    embed_dim=16,
                    depths=[1, 1],
                    num_heads=[2, 2],
                    window_size=4,
                    hidden_dropout_prob=0.1,
                    drop_path_rate=0.1,
                )
            ),
            images(),
        ),
        "hf-convnext": (
            lambda: t.ConvNextForImageClassification(
                t.ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], drop_path_rate=0.1)
            ),
            images(),
        ),
    }
    return makers


def from_torchvision() -> dict[str, Entry]:
    import torchvision.models as v

    return {
        "tv/resnet18": (lambda: v.resnet18(num_classes=5), images()),
        "tv/mobilenet_v2": (lambda: v.mobilenet_v2(num_classes=5), images()),
        "tv/mobilenet_v3": (lambda: v.mobilenet_v3_small(num_classes=5), images()),
        "tv/efficientnet_b0": (lambda: v.efficientnet_b0(num_classes=5), images(64)),
        "tv/shufflenet": (lambda: v.shufflenet_v2_x0_5(num_classes=5), images(64)),
        "tv/squeezenet": (lambda: v.squeezenet1_1(num_classes=5), images(64)),
        "tv/densenet": (lambda: v.DenseNet(8, (2, 2), 16, drop_rate=0.1, num_classes=5), images()),
        "tv/alexnet": (lambda: v.alexnet(num_classes=5), images(64)),
        "tv/convnext": (lambda: v.convnext_tiny(num_classes=5), images()),
        "tv/vit": (
            lambda: v.VisionTransformer(32, 8, 2, 2, 32, 64, dropout=0.1, attention_dropout=0.1, num_classes=5),
            images(),
        ),
        "tv/swin": (
            lambda: v.SwinTransformer(
                [4, 4],
                16,
                [1, 1],
                [2, 2],
                [4, 4],
                dropout=0.1,
                attention_dropout=0.1,
                stochastic_depth_prob=0.1,
                num_classes=5,
            ),
            images(),
        ),
        "tv/maxvit": (
            lambda: v.maxvit_t(num_classes=5),
            images(224),
        ),
    }


TIMM: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "deit3_small_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "beit_base_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "swin_tiny_patch4_window7_224": {
        "img_size": 32,
        "window_size": 4,
        "embed_dim": 16,
        "depths": (1, 1),
        "num_heads": (2, 2),
    },
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
    "convnextv2_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
    **{
        name: {}
        for name in (
            "resnet10t",
            "resnet18",
            "resnetv2_18",
            "seresnet18",
            "skresnet18",
            "res2net50_14w_8s",
            "resnest14d",
            "ese_vovnet19b_slim_dw",
            "efficientnet_lite0",
            "mobilenetv3_small_050",
            "mnasnet_small",
            "lcnet_035",
            "ghostnet_050",
            "rexnet_100",
            "regnetx_002",
            "regnety_002",
            "repvgg_a0",
            "mobileone_s0",
            "dla46_c",
            "hardcorenas_a",
            "selecsls42",
            "densenet121",
            "cs3darknet_s",
            "edgenext_xx_small",
            "poolformer_s12",
            "inception_next_atto",
            "fbnetc_100",
            "tinynet_e",
            "repghostnet_050",
            "starnet_s1",
            "nf_regnet_b0",
            "efficientvit_b0",
            "pvt_v2_b0",
            "xcit_nano_12_p16_224",
            "mobilevitv2_050",
        )
    },
}
SIZES = {"xcit_nano_12_p16_224": 224, "mobilevitv2_050": 64}


def from_timm() -> dict[str, Entry]:
    import timm

    def build(name: str, options: dict[str, Any]) -> Build:
        def make() -> nn.Module:
            for rates in ({"drop_rate": 0.1, "drop_path_rate": 0.1}, {"drop_rate": 0.1}, {}):
                try:
                    return timm.create_model(name, num_classes=5, **rates, **options)  # type: ignore[no-any-return]
                except TypeError:
                    continue
            raise ValueError(name)

        return make

    return {f"timm/{name}": (build(name, o), images(SIZES.get(name, 32 if o else 64))) for name, o in TIMM.items()}


def zoo() -> dict[str, Entry]:
    """All networks of the libraries that are installed."""
    found: dict[str, Entry] = {}
    for source in (from_transformers, from_torchvision, from_timm):
        try:
            found |= source()
        except ImportError as error:
            print(f"{source.__name__}: {error}", file=sys.stderr)
    return found


@dataclass
class Outcome:
    """A row of the table."""

    network: str
    dropout: str = ""
    exact: float = float("nan")
    shared: str = ""
    rows: str = ""
    delta: str = ""
    silent: str = ""
    export: float = float("nan")
    fresh: float = float("nan")


def prediction(net: nn.Module, x: Tensor) -> Tensor:
    output = net(x)
    for name in ("logits", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)  # type: ignore[no-any-return]
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def step(net: nn.Module, hyperparameters: HyperparameterSet, method: Method, rows: int, x: Tensor) -> str:
    """Gradients of a weight step: ok, or the error."""
    net.zero_grad()
    method.prepare(net, hyperparameters)
    bind_weight_phase(hyperparameters, hyperparameters.sample(rows, torch.Generator().manual_seed(1)))
    try:
        _, objective = method.objective(net, hyperparameters, lambda: prediction(net, x).square().mean())
        objective.backward()
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {str(error).split(';')[0][:160]}"
    finally:
        unbind(hyperparameters)
    return "ok"


def silent(net: nn.Module) -> list[str]:
    """Responding parameters that have a gradient, and whose gates have none."""
    return [
        f"{prefix}.{name}"
        for prefix, layer in net.named_modules()
        if isinstance(layer, ResponseLayer)
        for name in layer.responding
        if layer.base_parameter(name).grad is not None and layer.gate_weights(name).grad is None
    ]


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def tune_dropouts(net: nn.Module, hyperparameters: HyperparameterSet) -> str:
    """Convert with as many dropouts tuned as there are."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for keywords in ({"dropout": "rate", "drop_path": "rate"}, {"drop_path": "rate"}, {}):
            try:
                convert(net, hyperparameters, **keywords)  # type: ignore[arg-type]
                break
            except ConversionError:
                if not keywords:
                    raise
    constant = any("stay constant" in str(one.message) for one in caught)
    tuned = "rate" not in hyperparameters.unread() or any(getattr(m, "tuned_by", None) for m in net.modules())
    return ("in part" if constant else "yes") if tuned else "none"


def examine(name: str, build: Build, x: Tensor) -> Outcome:
    """Convert, train by one step of each kind, and export."""
    torch.manual_seed(0)
    net, outcome = build().eval(), Outcome(name)
    plain = copy.deepcopy(net)
    hyperparameters = HyperparameterSet({"rate": Float(0.0, 0.9, init=0.1), "other": Float(0.0, 1.0, init=0.5)})
    outcome.dropout = tune_dropouts(net, hyperparameters)
    with torch.no_grad():
        outcome.exact = difference(prediction(net, x), prediction(plain, x))
    net.train()
    outcome.rows = step(net, hyperparameters, STN(), EXAMPLES, x)
    outcome.delta = step(net, hyperparameters, DeltaSTN(), 1, x)
    outcome.shared = step(net, hyperparameters, STN(), 1, x)
    outcome.silent = ", ".join(silent(net)) or "none"
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(2):
        step(net, hyperparameters, STN(), 1, x)
        optimizer.step()
    moved = torch.tensor([0.5, -0.3])
    hyperparameters.unconstrained += moved
    STN().follow(net, hyperparameters, moved)
    net.eval()
    with torch.no_grad():
        exported = export(net)
        trained = prediction(net, x)
        outcome.export = difference(trained, prediction(exported, x))
        plain.load_state_dict(exported.state_dict())
        outcome.fresh = difference(trained, prediction(plain, x))
        STN(centred=False).prepare(net, hyperparameters)
        cache_effective_parameters(hyperparameters, True)  # as evaluation loops do
        outcome.export = max(outcome.export, difference(prediction(net, x), prediction(export(net), x)))
        unbind(hyperparameters)
    return outcome


def main(wanted: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    columns = [field.name for field in fields(Outcome)]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name, (build, x) in zoo().items():
        if not wanted or any(part in name for part in wanted):
            cells = [getattr(examined, c) for examined in [examine(name, build, x)] for c in columns]
            print("| " + " | ".join(f"{c:.1e}" if isinstance(c, float) else c for c in cells) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
