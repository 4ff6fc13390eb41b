"""The networks that target `coreml` is measured on: one of each family of timm, made so that random weights behave like trained ones.

FAMILIES has one network of each model module of timm: of the registered names without the prefix `test_` one of those with the fewest
parameters, found by building them on the device `meta`. Modules whose smallest network has more than 40 M parameters have no row (beit,
deepseek_vit, gemma4_vit, nasnet, pnasnet, qwen3_vit, vision_transformer_sam …).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from edgekit.errors import TraceError
from edgekit.graph.canonicalize import canonicalize
from edgekit.graph.opset import OPSET, to_opset
from edgekit.graph.shapes import infer_shapes
from edgekit.source import Source
from edgekit.trace import EXPORTERS, trace

FAMILIES = {
    "byoanet": "halonet_h1",
    "byobnet": "mobileone_s1",
    "cait": "cait_xxs24_224",
    "coat": "coat_lite_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "convnext_atto",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_9_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deit": "deit_tiny_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "mobilenetv2_035",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "eva02_tiny_patch14_224",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_a",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "hieradet_small",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_v3": "inception_v3",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "mambaout_femto",
    "maxxvit": "maxvit_rmlp_pico_rw_256",
    "metaformer": "poolformer_s12",
    "mlp_mixer": "mixer_s32_224",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "nfnet_l0",
    "pit": "pit_ti_224",
    "pvt_v2": "pvt_v2_b0",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m0_9",
    "res2net": "res2net50_48w_2s",
    "resnest": "resnest14d",
    "resnet": "resnet10t",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42b",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_pcpvt_small",
    "visformer": "visformer_tiny",
    "vision_transformer": "vit_tiny_patch16_224",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "vit_relpos_small_patch16_rpn_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41",
    "xcit": "xcit_nano_12_p16_224",
}
"""By module of timm, one network."""


def images(shape: tuple[int, ...], count: int, seed: int = 0) -> torch.Tensor:
    """`[count, C, H, W]`: random fields of several scales, each smooth at its scale; each image has a colour and a contrast of its own."""
    generator = torch.Generator().manual_seed(seed)
    _, channels, height, width = shape
    total = torch.randn(count, channels, 1, 1, generator=generator) * 0.5
    for size in (3, 9, 27, 81):
        field = torch.randn(count, channels, size, size, generator=generator)
        total = total + torch.nn.functional.interpolate(field, (height, width), mode="bilinear") * 0.5
    return total * (0.5 + torch.rand(count, 1, 1, 1, generator=generator))


def prepare(module: torch.nn.Module, batch: torch.Tensor, seed: int = 0) -> None:
    """Draws the weights of a network anew, in evaluation mode, and measures the statistics of its batch norms on a batch."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        weight = getattr(part, "weight", None)
        if isinstance(part, (torch.nn.Linear, torch.nn.modules.conv._ConvNd)) and isinstance(weight, torch.nn.Parameter):
            weight.data = torch.randn(weight.shape, generator=generator) / math.sqrt(weight[0].numel())
    for tensor in module.parameters():
        if tensor.numel() > 1 and (tensor == tensor.flatten()[0]).all():
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.data = noise * 0.2 - 0.1 if tensor.flatten()[0] == 0 else noise + 0.5
    norms = [part for part in module.modules() if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        module(batch)
    module.eval()


def canonical(module: torch.nn.Module, example: torch.Tensor, name: str, exporters: Sequence[str] = EXPORTERS) -> tuple[ir.Model, str]:
    """The canonical graph of a network, and the exporter that wrote it."""
    failures = []
    for exporter in exporters:
        try:
            model = trace(Source(name, module=module, example_inputs=(example,)), exporter).model
        except TraceError as error:
            failures.append(error)
            continue
        infer_shapes(model)
        model = canonicalize(to_opset(model, OPSET))
        infer_shapes(model)
        return model, exporter
    raise failures[0]


def package(model: ir.Model, half: bool, path: Path) -> str:
    """Writes a canonical graph, which is changed, as a package; returns the deployment target that it needs."""
    from edgekit.targets.coreml.convert import Options, convert
    from edgekit.targets.coreml.interface import METADATA
    from edgekit.targets.coreml.legalize import legalize

    legalize(model)
    infer_shapes(model)
    converted = convert(model, Options(half))
    converted.model.user_defined_metadata[METADATA] = converted.interface.to_json()
    converted.model.save(str(path))
    return converted.version


def run_package(path: Path, batch: np.ndarray) -> np.ndarray:
    """The logits of a package, image by image: `[count, classes]`."""
    from edgekit.targets.coreml.executable import load_package

    loaded = load_package(path, 1)
    return np.concatenate([loaded.run({loaded.inputs[0]: image[None]})[loaded.outputs[0]] for image in batch])
