"""Arithmetic: one expert's feed-forward over the rows routed to it, and the sum over a token's experts.

Knows nothing of residency, slots or models: it gets tensors and returns tensors. `reference` is the spec.
"""

from buddymoe_ray.kernels.coded import coded_forward, decoded, plain_weights
from buddymoe_ray.kernels.coded_format import COLUMNS, CodedWeight, coded_shapes
from buddymoe_ray.kernels.cpu import CpuLinear, combine, combine_kernel, decodes, linear_rows
from buddymoe_ray.kernels.cpu import prepare as prepare_lowbit
from buddymoe_ray.kernels.decoder import DecoderLayer, DecoderLayers, DecoderParts, Routed, StandinRecords, Tallies
from buddymoe_ray.kernels.expert_layer import ExpertLayer
from buddymoe_ray.kernels.lowbit import (
    LowbitFormat,
    PackedMatrix,
    dequantise,
    lowbit_forward,
    pack,
    packed_parts,
    record_tensors,
    unpack,
)
from buddymoe_ray.kernels.lowbit_format import BLOCK, matrix_at, packed_shapes
from buddymoe_ray.kernels.lowrank import lowrank_forward, mean_forward
from buddymoe_ray.kernels.norm import CpuNorm
from buddymoe_ray.kernels.paged_attention import PagedLayer
from buddymoe_ray.kernels.reference import ExpertMath, expert_forward
from buddymoe_ray.kernels.rounding_cpu import pack_plain
from buddymoe_ray.kernels.router import CpuRouter
from buddymoe_ray.kernels.slot_words import unchanged
from buddymoe_ray.kernels.stored import widens
from buddymoe_ray.kernels.triton.attention import decode_attention
from buddymoe_ray.kernels.triton.experts import TritonExperts, combine_on_device
from buddymoe_ray.kernels.triton.launching import interpreted
from buddymoe_ray.kernels.triton.resolve import RowTerms, resolve_on_device
from buddymoe_ray.kernels.upcast import UpcastScratch

__all__ = [
    "COLUMNS",
    "BLOCK",
    "CodedWeight",
    "ExpertMath",
    "LowbitFormat",
    "DecoderLayer",
    "DecoderLayers",
    "DecoderParts",
    "ExpertLayer",
    "CpuLinear",
    "CpuNorm",
    "CpuRouter",
    "PackedMatrix",
    "PagedLayer",
    "Routed",
    "RowTerms",
    "StandinRecords",
    "Tallies",
    "TritonExperts",
    "UpcastScratch",
    "coded_forward",
    "coded_shapes",
    "combine",
    "combine_on_device",
    "combine_kernel",
    "decode_attention",
    "decoded",
    "decodes",
    "dequantise",
    "expert_forward",
    "interpreted",
    "linear_rows",
    "lowbit_forward",
    "lowrank_forward",
    "matrix_at",
    "mean_forward",
    "pack",
    "pack_plain",
    "packed_parts",
    "packed_shapes",
    "plain_weights",
    "prepare_lowbit",
    "record_tensors",
    "resolve_on_device",
    "unchanged",
    "unpack",
    "widens",
]
