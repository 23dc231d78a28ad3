"""The MoE layer as it runs here: route, resolve, ensure, matmul, combine. Start reading in `block`."""

from buddymoe_ray.moe.block import MoEBlock
from buddymoe_ray.moe.first_layer import FirstLayer
from buddymoe_ray.moe.outcome import STANDIN_KINDS, StepOutcome, Substitution
from buddymoe_ray.moe.read_ahead import Choice, ReadAhead
from buddymoe_ray.moe.recorded import DeviceTables, RecordedLayer, Told, affordable
from buddymoe_ray.moe.rows import Accesses
from buddymoe_ray.moe.standin_compute import record_computes
from buddymoe_ray.moe.standins import Standins
from buddymoe_ray.moe.step import Observer, Overlay, Phase, StepState, StepTerms
from buddymoe_ray.moe.stretch import Outlook, Stretch
from buddymoe_ray.moe.waves import ExpertCompute, OnDevice, OneByOne, OneCall, WaveCompute

__all__ = [
    "STANDIN_KINDS",
    "Accesses",
    "Choice",
    "DeviceTables",
    "ExpertCompute",
    "FirstLayer",
    "MoEBlock",
    "Observer",
    "OnDevice",
    "OneByOne",
    "Outlook",
    "Overlay",
    "OneCall",
    "Phase",
    "ReadAhead",
    "RecordedLayer",
    "Standins",
    "StepOutcome",
    "StepState",
    "StepTerms",
    "Stretch",
    "Substitution",
    "Told",
    "WaveCompute",
    "affordable",
    "record_computes",
]
