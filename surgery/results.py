"""What the verbs return: plain dicts, ready for JSON, and what each key of them holds.

Numbers may be NaN or infinite; `--json` writes those as text. Differences are in nats per token, of mean negative
log-likelihoods (NLL), with a paired 95% interval over chunks. Keys that only some recipes bring need not be there.
`plan` returns a `Plan`, whose `to_dict` is what `--json` writes.
"""

# Annotations are not postponed here: TypedDict would then take every key for required.
from typing import Any, Literal, NotRequired, TypedDict


class Score(TypedDict):
    """Perplexity, mean NLL in nats, and over how many predicted tokens; where these are fewer than the bare original's,
    that one's NLL on them."""

    ppl: float
    nll: float
    tokens: int
    bare_nll: NotRequired[float]


class Delta(TypedDict):
    """A mean over chunks and its 95% interval."""

    mean: float
    low: float
    high: float


class Massive(TypedDict):
    """Massive activations: how many, the largest over the median of its layer, and where: dims, layers, token ids.

    `tokens`: what those ids are, where the figures are part of a verdict.
    """

    count: int
    worst_ratio: float
    dims: list[int]
    layers: list[int]
    token_ids: list[int]
    tokens: NotRequired[list[str]]


# ---- scan


class MassiveActivation(TypedDict):
    """One of them: `position` is in its chunk."""

    dim: int
    position: int
    token: str
    value: float


class Layer(TypedDict):
    """One layer of a survey: layer 0 is the embeddings' output, layer k what block k - 1 writes, and its attention.

    Means are over sequences; lists are by head. What belongs to attention is None in layer 0.
    """

    layer: int
    max: float  # largest |x|
    median: float  # of |x|
    ratio: float  # largest |x| over the median
    count: int  # massive activations
    massive: list[MassiveActivation]
    dims: list[Any]  # (dim, how many)
    tokens: list[Any]  # (token, how many)
    top3: list[float]  # the largest |x|
    first_norm: float  # L2 norm of the first token
    rest_norm: float  # of all others, mean
    p1: float | None  # share of the energy in the strongest direction
    entropy_bits: float | None  # of the spectrum
    entropy_normalised: float | None
    dominance: float | None
    sink_score: list[float] | None
    sink_rate: float | None  # share of heads that sink
    mixing: float | None

    # Beside these; the observers in surgery.survey define them.
    auto_count: NotRequired[int]  # massive activations by the scale-free criterion
    auto_ratio: NotRequired[float]  # largest |x| over what an ordinary token's is
    p1_bound: NotRequired[float | None]  # what one long first token alone makes of p1, and of entropy_bits
    entropy_bound: NotRequired[float | None]
    spectra: NotRequired[int]  # how many sequences p1 and entropy are of
    lens_ppl: NotRequired[float | None]  # perplexity of this layer read through the final norm and the output layer
    slot_score: NotRequired[list[list[float]] | None]  # by head and slot
    learned_sink_score: NotRequired[list[float] | None]  # of a learned sink logit, where sites have one
    attention_entropy: NotRequired[list[float] | None]  # in nats
    effective_tokens: NotRequired[list[float] | None]  # exp of it
    value_variance_first: NotRequired[list[float] | None]  # of each head's output at the first token, and at others
    value_variance_rest: NotRequired[list[float] | None]
    attended_share: NotRequired[list[float] | None]  # of places that hold 90% of a row's weight
    separability: NotRequired[list[float | None] | None]
    selection_distance: NotRequired[list[float] | None]
    gradient_sensitivity: NotRequired[list[float] | None]
    gradient_bound: NotRequired[float | None]
    cls_norm: NotRequired[float | None]  # of an image's tokens, by kind; patch_norm, patch_norm_max, special_norm too
    register_norm: NotRequired[float | None]
    high_norm: NotRequired[float]  # share of patches at least three times as long as the median patch
    to_cls: NotRequired[float | None]  # attention of patches to CLS, to all registers, to patches of high norm
    to_registers: NotRequired[float | None]
    to_high: NotRequired[float | None]
    mixer: NotRequired[str | None]  # class of a layer that hands on a state; and norms of what it gives
    state_first: NotRequired[float | None]  # at the first token
    state_rest: NotRequired[float | None]  # at all others, mean
    lead_near: NotRequired[float | None]  # share of it that is due to the prefix or first token, at the next 8 tokens
    lead_far: NotRequired[float | None]  # and at the last 8
    attended_by_length: NotRequired[dict[str, list[float]] | None]  # length, tokens


class Survey(TypedDict):
    """What `scan` found of one source."""

    source: str
    model_type: str
    chunks: int
    chunk_length: int
    n_slots: int
    normed_sites: int  # whose heads are normed
    parameters: NotRequired[int]
    perplexity: NotRequired[Score]  # of text
    images: NotRequired[dict[str, Any]]  # grid, special, registers: what tokens an image becomes
    audio: NotRequired[dict[str, Any]]  # frames (or a grid), special, registers: what tokens a recording becomes
    text: NotRequired[dict[str, Any]]  # tokens, special, registers, causal: of a text encoder, what a text is
    norm_maps: NotRequired[dict[str, Any]]  # layers; images: name, png (base64), norms by layer
    massive_activations: Massive
    layers: list[Layer]
    across: dict[str, Any]  # born, died, dims, tokens, phases, correlations: what the layers say together
    super_neurons: list[dict[str, Any]]  # layer, unit, dim, share
    attention_maps: list[dict[str, Any]]
    landscape: dict[str, Any]
    interventions: NotRequired[list[dict[str, Any]]]  # with `interventions=True`
    audit: NotRequired[dict[str, Any]]
    provenance: NotRequired[dict[str, Any]]
    speed: NotRequired[dict[str, Any] | None]  # tokens, seconds: these three in surveys of `run`
    sample: NotRequired[dict[str, str] | None]  # prompt, written
    files: NotRequired[dict[str, Any]]  # bytes, kind


# ---- run and verify


class Gate(TypedDict):
    """One judgement: `value` may be at most `limit`, or where `minimum` is true at least."""

    name: str
    passed: bool
    value: float
    limit: float
    minimum: NotRequired[bool]


class Check(TypedDict):
    """One check of the files, and what it found in words."""

    name: str
    passed: bool
    detail: str


class Integrity(TypedDict):
    """All checks of the files; `passed` where all of them did."""

    passed: bool
    checks: list[Check]


class Verdict(TypedDict):
    """What `run` and `verify` found. `passed` is None where nothing was measured (`verify=False`) or written."""

    passed: bool | None
    gates: list[Gate]
    integrity: Integrity
    nothing_to_do: NotRequired[str]  # why an operation left the model alone, so that nothing was written

    # Of every checkpoint that was measured on text; without an original only what is of the converted model.
    perplexity: NotRequired[dict[Literal["bare", "bos", "control", "converted"], Score]]
    delta_nll: NotRequired[dict[Literal["vs_control", "vs_bare"], Delta]]  # of the converted model
    massive_activations: NotRequired[dict[Literal["before", "after"], Massive]]

    # Of gates that a recipe names, by their names; surgery.verification.gates documents each.
    agreement: NotRequired[dict[str, Any]]  # share (mean, low, high), tokens
    quantised: NotRequired[dict[str, Any]]  # scheme -> original, converted (Score), delta_nll, calibrations
    streaming: NotRequired[dict[str, Any]]  # original, original_kept, converted (Score), delta_nll
    cache_edits: NotRequired[dict[str, Any]]  # edit -> original, original_kept, converted (Score), delta_nll
    tasks: NotRequired[dict[str, Any]]

    # Of operations.
    prefix: NotRequired[dict[str, Any]]  # ids, tokens: what was folded
    prefix_search: NotRequired[dict[str, Any]]  # objective, tried: best first
    random_ids: NotRequired[dict[str, float]]  # largest differences of logits: plain, padded, cached; and the limit
    smoothing: NotRequired[dict[str, Any]]
    rotation: NotRequired[dict[str, Any]]
    head_norm: NotRequired[dict[str, Any]]
    tune: NotRequired[dict[str, Any]]

    # Of the checkpoint as a whole.
    status: NotRequired[str]  # what its manifest says: verified or unverified
    digest: NotRequired[str]  # SHA-256 of the manifest
    sealed: NotRequired[Any]  # whether it is signed, and by which key
    required: NotRequired[list[Check]]  # what the caller asked for besides
    unchecked: NotRequired[list[str]]  # what `verify` was not asked to look at
    notes: NotRequired[list[str]]  # what has to be told though it is no fault
    provenance: NotRequired[dict[str, Any]]  # texts, chunks, device, date, versions
    surveys: NotRequired[list[Survey]]  # with `surveys=True`: of the original and of the converted model


# ---- export


class Export(TypedDict):
    """What `export` wrote. `passed` is None where nothing was measured on text, False where nothing was written."""

    passed: bool | None
    engine: str
    gates: list[Gate]  # log_probability: the largest |delta| of a token to the checkpoint, in nats; or the mean
    integrity: Integrity  # of the converted checkpoint
    proof: str  # what was found of the files without text, in one sentence
    files: dict[str, Any]  # name -> sha256, bytes
    perplexity: NotRequired[dict[Literal["converted", "exported"], Score]]  # with text
    delta_log_probability: NotRequired[float]  # with text: the largest of a token
    mean_delta_log_probability: NotRequired[float]  # with text
    provenance: dict[str, Any]


# ---- pretrain


class Curves(TypedDict):
    """How one variant trained."""

    parameters: int
    losses: list[float]  # of every step
    measured: list[dict[str, Any]]  # step, loss, ppl, massive, ratio, sink_rate, ... where it was measured


class Pretrained(TypedDict):
    """What `pretrain` found: variant -> curves, and what they were trained by. `curves.json` holds the same."""

    surgery: str  # version
    recipe: dict[str, Any]
    vocabulary: int
    training_tokens: int
    text_sha256: str
    variants: dict[str, Curves]
