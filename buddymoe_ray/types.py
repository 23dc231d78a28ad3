"""The words every layer shares: frozen, keyword-only records without behaviour.

No torch, no ray: this module is imported by all layers and imports only the standard library.
On the token path: a `GenerationRequest` goes in, `TokenEvent`s come out, an `EngineResult` sums them up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "cancelled", "error"]
Mode = Literal["exact", "bounded", "fast"]
StructuredKind = Literal["json", "json_object", "regex", "choice", "grammar", "structural_tag"]
EXACT, BOUNDED, FAST = 0, 1, 2
"""Modes as arrays of rows have them."""
GuardState = Literal["off", "ok", "tripped"]
CalibrationState = Literal["none", "collecting", "ready", "refused"]


class ExpertKey(NamedTuple):
    """The unit of residency: one expert of one MoE layer; `layer` counts those in model order from 0."""

    layer: int
    expert: int


@dataclass(frozen=True, kw_only=True)
class StructuredOutput:
    """What a generated text must be, as a whole.

    `source` is a JSON schema, a regular expression, a JSON list of texts (`choice`), a grammar in llama.cpp's EBNF, or
    xgrammar's structural tag as JSON; of `json_object` it is not read. Errors call it `field`, as the caller did.
    """

    kind: StructuredKind
    source: str
    field: str = "structured_outputs"


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen; the names and meanings are those of OpenAI's API and vLLM.

    Args:
        temperature: 0 is greedy. Above 0 logits are divided by it.
        top_p: nucleus mass in (0, 1].
        top_k: keep the k best; 0 keeps all.
        min_p: drop what is less likely than this share, in [0, 1], of the likeliest token's probability.
        seed: random numbers are keyed by (seed, position): the same request gives the same tokens whatever is batched
            beside it. None draws a seed.
        presence_penalty, frequency_penalty: OpenAI's additive penalties over generated tokens, in [-2, 2].
        repetition_penalty: multiplicative, over prompt and generated tokens; 1 is off.
        logit_bias: by token id, what is added to its logit, in [-100, 100].
        stop: strings that end the output and are not part of it.
        stop_token_ids: ids that end the output beside the model's own end tokens.
        ignore_eos: go on past the model's end tokens.
        max_tokens: most tokens generated; 0 where `prompt_logprobs` are all that is asked for. Where the model's
            context ends before, so does the text (`length`); over HTTP that is refused.
        logprobs: number of alternatives reported per token (0: the chosen token alone; None: nothing), at most 20. The
            chosen token is among them: where it is none of the likeliest, there is one more.
        prompt_logprobs: the same of the prompt's own tokens, but for the first, which follows nothing. Exact in every
            mode; nothing of the prompt is reused for it.
        skip_special_tokens: special tokens give no text. The end token never does.
        structured_outputs: what the whole text must be, as a StructuredOutput or as vLLM's mapping, such as
            `{"json": schema}`: tokens that would break it are not chosen.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    max_tokens: int = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutput | Mapping[str, object] | None = None


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """Log probability (nats, of the model's own distribution before temperature) of one generated token. Of the expert
    accesses of the step that chose it, stand-ins answered `standins`."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    standins: int = 0


@dataclass(frozen=True, kw_only=True)
class ThoughtBudget:
    """Most tokens of a model's thoughts, which the token `end` ends and the tokens `begin` begin: none where the prompt
    has done that."""

    tokens: int
    begin: tuple[int, ...]
    end: int


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One sequence to generate. `prompt_token_ids` is never empty; `request_id` is unique within an engine.

    `mode` and `budget` (nats of expected extra loss per generated token, for `bounded`) are the engine's where None.
    `record` asks for the request's expert accesses with its last event; `replay` is such a record: every access is
    answered as it says, so the same tokens come out whatever is resident now. `resumed_token_ids` are output tokens
    that the caller already has, from another engine: this one goes on after them, and its events tell what is new. A
    request with `record` or `replay` cannot be resumed. Requests share what was computed of a common beginning only if
    their `cache_salt` is the same. `thoughts` is how long the model may think, if there is a limit. Requests of
    different `tenant`s wait for no more than their share of each other, which is as large as their `weight`.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    mode: Mode | None = None
    budget: float | None = None
    record: bool = False
    replay: str | None = None
    resumed_token_ids: tuple[int, ...] = ()
    cache_salt: str = ""
    thoughts: ThoughtBudget | None = None
    tenant: str = ""
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class StandinAccesses:
    """How many (token, slot) uses each kind of stand-in answered."""

    lowbit: int = 0
    lowrank: int = 0
    buddy: int = 0
    mean: int = 0
    drop: int = 0

    @property
    def total(self) -> int:
        """Uses answered by any stand-in."""
        return self.lowbit + self.lowrank + self.buddy + self.mean + self.drop


@dataclass(frozen=True, kw_only=True)
class CalibrationUsage:
    """Where the engine's own calibration stood when a request came, and on how many tokens stand-ins were measured.

    `none`: there is nothing to calibrate, as in mode exact or with a profile.
    """

    state: CalibrationState = "none"
    tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What one request cost.

    Expert accesses are (token, slot) pairs of its decode steps: `hits` found their expert resident when the step began,
    `peer` were computed exactly by another worker, `host` by a GPU's host (a CPU's last bits), `fetched` waited for the
    expert, `standins` were answered by something else at an `expected_rise` of loss (nats, summed over the completion).
    `completion_tokens` counts all tokens; `resumed` of them were made before the last move to another worker, and what
    those used and were charged is not counted here (of a `bounded` request at most `budget` each). `mode` is what the
    request got, `requested_mode` what it asked for: they differ when `guard` is `tripped`, or before the engine's own
    `calibration` is ready. `budget` is the allowance per generated token of a `bounded` request. `record` is there for
    a request that asked for it. `cached_tokens` of the prompt were not computed: another request had the same
    beginning.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    resumed: int = 0
    hits: int = 0
    peer: int = 0
    host: int = 0
    fetched: int = 0
    mode: Mode = "exact"
    requested_mode: Mode = "exact"
    budget: float | None = None
    standins: StandinAccesses = StandinAccesses()
    expected_rise: float = 0.0
    guard: GuardState = "off"
    record: str | None = None
    cached_tokens: int = 0
    calibration: CalibrationUsage = CalibrationUsage()


@dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """What one step added to one request. `text` is whole characters only; `usage` comes with the last event.

    `text_offsets` come with `logprobs`: the characters at which tokens begin in the request's text, of the next tokens
    for which that is settled. A token whose text is held back is told later than its log probability.
    `prompt_logprobs` come with the first event, one for each token of the prompt, None for its first.
    `stop` is the stop string that ended it, `error` the message of an error that did (finish_reason "error").
    """

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    text_offsets: tuple[int, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    stop: str | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class EngineResult:
    """A finished request, as `LLM.generate` returns it."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = field(default=())
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExpertPiece:
    """One run of bytes of an expert: where it lies in a file and where it goes in the expert's slot.

    `path` is an absolute file path, `offset` and `nbytes` count bytes in the file, `slot_offset` bytes in the slot.
    """

    path: str
    offset: int
    nbytes: int
    slot_offset: int


@dataclass(frozen=True, kw_only=True)
class SlotTensor:
    """A named tensor inside an expert's slot, in the layout of the model's experts module without its E dimension.

    `name` is the module's parameter name (`gate_up_proj`, `down_proj`, `gate_up_proj_bias`, ...), `dtype` torch's name
    without the prefix (`bfloat16`), `offset` a multiple of 64 bytes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class CodeFormat:
    """How a checkpoint stores a quantised matrix [N, K]: a code for each weight and a scale for each block of codes.

    `codes`: `fp8` (e4m3), `int8`, `int4` (less 8 or a zero point), `mxfp4` or `nvfp4` (e2m1), `gptq` or `awq` (four
    bits less a zero point, [K, N]); those of four bits two to a byte, the first of them low. `block`: outputs and
    inputs that share a scale, 0 for all of them. `scale`: torch's name of the scales' dtype, or `e8m0` for powers of
    two in bytes. `zeros`: each block has a zero point, four bits. `global_scale`: what is done to all scales with a
    float32 of the matrix, `*` or `/`; empty where there is none.
    """

    codes: str
    block: tuple[int, int]
    scale: str
    zeros: bool = False
    global_scale: str = ""

    def __str__(self) -> str:
        """For plans and reports: `fp8/128x128`, `int8/channel`, `int4/g128`, `mxfp4`, `nvfp4`."""
        outputs, inputs = self.block
        shared = f"g{inputs}" if outputs == 1 else f"{outputs}x{inputs}"
        if not inputs:
            shared = "channel" if outputs else "tensor"
        return self.codes if self.codes in ("mxfp4", "nvfp4") else f"{self.codes}/{shared}{'+zeros' * self.zeros}"

    @classmethod
    def named(cls, text: str) -> CodeFormat | None:
        """The format that is told by such a text, but for the dtype of its scales and what is done to all of them; None
        for what is none."""
        codes, _, shared = text.removesuffix("+zeros").partition("/")
        if codes == "mxfp4":
            return cls(codes=codes, block=(1, 32), scale="e8m0")
        if codes == "nvfp4":
            return cls(codes=codes, block=(1, 16), scale="float8_e4m3fn", global_scale="*")
        if not shared:
            return None
        if shared.startswith("g"):
            block = 1, int(shared[1:])
        else:
            outputs, _, inputs = {"channel": "1x0", "tensor": "0x0"}.get(shared, shared).partition("x")
            block = int(outputs), int(inputs)
        return cls(codes=codes, block=block, scale="bfloat16", zeros=text.endswith("+zeros"))


@dataclass(frozen=True, kw_only=True)
class CodedMatrix:
    """A quantised matrix [N, K] called `name`: `parts` equal ones, one below the other, each with scales of its own.

    A slot has it as `name.codes`, `name.scales` and, where there are such, `name.zeros` or `name.global_scale`, in the
    bytes of the checkpoint.
    """

    name: str
    format: CodeFormat
    parts: int
    N: int
    K: int


@dataclass(frozen=True, kw_only=True)
class ExpertLayout:
    """How every expert of a model lies in a slot, and where each one's bytes are on disk.

    `slot_bytes` is the size of a slot (a multiple of 64); `expert_bytes` the bytes of one expert as stored (slot_bytes
    less the padding). `pieces[key]` lists disjoint runs that together fill every SlotTensor. `coded` are the matrices
    that are stored quantised: all of an expert's, or none. `files` are size, time (ns) and some bytes of the files
    when their headers were read, where they must stay so.
    """

    tensors: tuple[SlotTensor, ...]
    slot_bytes: int
    expert_bytes: int
    layers: int
    experts_per_layer: tuple[int, ...]
    pieces: dict[ExpertKey, tuple[ExpertPiece, ...]]
    coded: tuple[CodedMatrix, ...] = ()
    files: Mapping[str, tuple[int, int, bytes]] = field(default_factory=dict)

    @property
    def stored_as(self) -> str:
        """The format of quantised matrices, else the dtype, by torch's name."""
        return str(self.coded[0].format) if self.coded else self.tensors[0].dtype

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of an expert's parameters, those of quantised matrices without their codes, `[out, in]`."""
        return plain_shapes(self.tensors, self.coded)

    @property
    def total_bytes(self) -> int:
        """Bytes of all routed experts as stored: the 100 % of `--memory`."""
        return self.expert_bytes * sum(self.experts_per_layer)


def plain_shapes(tensors: Sequence[SlotTensor], coded: Sequence[CodedMatrix]) -> dict[str, tuple[int, ...]]:
    """Shapes of what the tensors of a slot are, by parameter; quantised matrices are `[out, in]`."""
    known: dict[str, tuple[int, ...]] = {matrix.name: (matrix.N, matrix.K) for matrix in coded}
    plain = {tensor.name: tensor.shape for tensor in tensors if tensor.name.partition(".")[0] not in known}
    return known | plain


@dataclass(frozen=True, kw_only=True)
class SlotPlan:
    """How a device budget is cut into expert slots; decided by `policy.memory.split_slots`, followed by the cache.

    `layer_slots[l]` slots belong to MoE layer l, `wave_slots` to whoever needs one for a moment. `overhead_bytes` is
    what staging, scratch and stand-ins take from the same budget. `reserved_bytes` are for records that are still to be
    made, and for whoever makes them: part of the overhead, but for `lent_slots[l]` of layer l's slots that have them
    meanwhile. `fully_resident` plans hold every expert and need no waves. `pinned[l]`, where given, names the experts
    that keep layer l's slots for good.
    """

    budget_bytes: int
    slot_bytes: int
    overhead_bytes: int
    wave_slots: int
    layer_slots: tuple[int, ...]
    fully_resident: bool
    pinned: tuple[tuple[int, ...], ...] = ()
    reserved_bytes: int = 0
    lent_slots: tuple[int, ...] = ()

    @property
    def slots_total(self) -> int:
        """All slots: those of the layers come first, wave slots last."""
        return sum(self.layer_slots) + self.wave_slots
