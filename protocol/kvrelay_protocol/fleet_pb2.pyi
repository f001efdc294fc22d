from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_PREFILL: _ClassVar[Role]
    ROLE_DECODE: _ClassVar[Role]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
ROLE_UNSPECIFIED: Role
ROLE_PREFILL: Role
ROLE_DECODE: Role
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason

class Error(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class WorkerMessage(_message.Message):
    __slots__ = ("hello", "heartbeat", "step_output", "sequence_started", "sequence_failed", "lease_granted", "kv_sent", "kv_received", "kv_missing", "drained", "batch", "starting", "sleep_state", "number")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    STEP_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_STARTED_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FAILED_FIELD_NUMBER: _ClassVar[int]
    LEASE_GRANTED_FIELD_NUMBER: _ClassVar[int]
    KV_SENT_FIELD_NUMBER: _ClassVar[int]
    KV_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    KV_MISSING_FIELD_NUMBER: _ClassVar[int]
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    STARTING_FIELD_NUMBER: _ClassVar[int]
    SLEEP_STATE_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    heartbeat: Heartbeat
    step_output: StepOutput
    sequence_started: SequenceStarted
    sequence_failed: SequenceFailed
    lease_granted: LeaseGranted
    kv_sent: KvSent
    kv_received: KvReceived
    kv_missing: KvMissing
    drained: Drained
    batch: WorkerBatch
    starting: Starting
    sleep_state: SleepState
    number: int
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., step_output: _Optional[_Union[StepOutput, _Mapping]] = ..., sequence_started: _Optional[_Union[SequenceStarted, _Mapping]] = ..., sequence_failed: _Optional[_Union[SequenceFailed, _Mapping]] = ..., lease_granted: _Optional[_Union[LeaseGranted, _Mapping]] = ..., kv_sent: _Optional[_Union[KvSent, _Mapping]] = ..., kv_received: _Optional[_Union[KvReceived, _Mapping]] = ..., kv_missing: _Optional[_Union[KvMissing, _Mapping]] = ..., drained: _Optional[_Union[Drained, _Mapping]] = ..., batch: _Optional[_Union[WorkerBatch, _Mapping]] = ..., starting: _Optional[_Union[Starting, _Mapping]] = ..., sleep_state: _Optional[_Union[SleepState, _Mapping]] = ..., number: _Optional[int] = ...) -> None: ...

class WorkerBatch(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[WorkerMessage]
    def __init__(self, messages: _Optional[_Iterable[_Union[WorkerMessage, _Mapping]]] = ...) -> None: ...

class Starting(_message.Message):
    __slots__ = ("protocol_version", "worker_name", "role", "model", "join_token", "phase", "done", "total", "elapsed_seconds")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    WORKER_NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    JOIN_TOKEN_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    worker_name: str
    role: Role
    model: str
    join_token: str
    phase: str
    done: int
    total: int
    elapsed_seconds: float
    def __init__(self, protocol_version: _Optional[int] = ..., worker_name: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., model: _Optional[str] = ..., join_token: _Optional[str] = ..., phase: _Optional[str] = ..., done: _Optional[int] = ..., total: _Optional[int] = ..., elapsed_seconds: _Optional[float] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol_version", "software_version", "worker_name", "incarnation", "role", "model", "kv_layout", "transport", "transport_address", "max_model_len", "device", "load", "join_token", "asleep", "weights_id")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    WORKER_NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    KV_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    JOIN_TOKEN_FIELD_NUMBER: _ClassVar[int]
    ASLEEP_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_ID_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    software_version: str
    worker_name: str
    incarnation: int
    role: Role
    model: str
    kv_layout: KvLayout
    transport: str
    transport_address: bytes
    max_model_len: int
    device: str
    load: Load
    join_token: str
    asleep: bool
    weights_id: str
    def __init__(self, protocol_version: _Optional[int] = ..., software_version: _Optional[str] = ..., worker_name: _Optional[str] = ..., incarnation: _Optional[int] = ..., role: _Optional[_Union[Role, str]] = ..., model: _Optional[str] = ..., kv_layout: _Optional[_Union[KvLayout, _Mapping]] = ..., transport: _Optional[str] = ..., transport_address: _Optional[bytes] = ..., max_model_len: _Optional[int] = ..., device: _Optional[str] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., join_token: _Optional[str] = ..., asleep: _Optional[bool] = ..., weights_id: _Optional[str] = ...) -> None: ...

class WeightsWanted(_message.Message):
    __slots__ = ("protocol_version", "worker_name", "role", "model", "join_token", "weights_id", "transport", "transport_address")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    WORKER_NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    JOIN_TOKEN_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    worker_name: str
    role: Role
    model: str
    join_token: str
    weights_id: str
    transport: str
    transport_address: bytes
    def __init__(self, protocol_version: _Optional[int] = ..., worker_name: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., model: _Optional[str] = ..., join_token: _Optional[str] = ..., weights_id: _Optional[str] = ..., transport: _Optional[str] = ..., transport_address: _Optional[bytes] = ...) -> None: ...

class WeightsFound(_message.Message):
    __slots__ = ("error", "worker_name", "transport_address", "tag", "ticket", "seconds")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    WORKER_NAME_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TAG_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    error: Error
    worker_name: str
    transport_address: bytes
    tag: int
    ticket: bytes
    seconds: float
    def __init__(self, error: _Optional[_Union[Error, _Mapping]] = ..., worker_name: _Optional[str] = ..., transport_address: _Optional[bytes] = ..., tag: _Optional[int] = ..., ticket: _Optional[bytes] = ..., seconds: _Optional[float] = ...) -> None: ...

class KvLayout(_message.Message):
    __slots__ = ("model_fingerprint", "dtype", "block_size", "num_layers", "num_kv_heads", "head_dim", "protocol_version", "tensor_parallel", "tensor_rank")
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    TENSOR_RANK_FIELD_NUMBER: _ClassVar[int]
    model_fingerprint: str
    dtype: str
    block_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    protocol_version: int
    tensor_parallel: int
    tensor_rank: int
    def __init__(self, model_fingerprint: _Optional[str] = ..., dtype: _Optional[str] = ..., block_size: _Optional[int] = ..., num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., protocol_version: _Optional[int] = ..., tensor_parallel: _Optional[int] = ..., tensor_rank: _Optional[int] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("running", "waiting", "total_blocks", "free_blocks", "cached_blocks", "leased_blocks", "used_blocks", "backlog_tokens", "prefill_tokens_per_second", "preemptions", "prefix_cache_queries", "prefix_cache_hits", "corrupt_frames", "expired_leases", "open_transfers", "transport_bandwidth", "computed_tokens", "foreign_frames", "repeated_messages", "missing_messages", "silent_routers", "let_go")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LEASED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    USED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BACKLOG_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_CACHE_QUERIES_FIELD_NUMBER: _ClassVar[int]
    PREFIX_CACHE_HITS_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_FRAMES_FIELD_NUMBER: _ClassVar[int]
    EXPIRED_LEASES_FIELD_NUMBER: _ClassVar[int]
    OPEN_TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_BANDWIDTH_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FOREIGN_FRAMES_FIELD_NUMBER: _ClassVar[int]
    REPEATED_MESSAGES_FIELD_NUMBER: _ClassVar[int]
    MISSING_MESSAGES_FIELD_NUMBER: _ClassVar[int]
    SILENT_ROUTERS_FIELD_NUMBER: _ClassVar[int]
    LET_GO_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    total_blocks: int
    free_blocks: int
    cached_blocks: int
    leased_blocks: int
    used_blocks: int
    backlog_tokens: int
    prefill_tokens_per_second: float
    preemptions: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    corrupt_frames: int
    expired_leases: int
    open_transfers: int
    transport_bandwidth: float
    computed_tokens: int
    foreign_frames: int
    repeated_messages: int
    missing_messages: int
    silent_routers: int
    let_go: int
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., total_blocks: _Optional[int] = ..., free_blocks: _Optional[int] = ..., cached_blocks: _Optional[int] = ..., leased_blocks: _Optional[int] = ..., used_blocks: _Optional[int] = ..., backlog_tokens: _Optional[int] = ..., prefill_tokens_per_second: _Optional[float] = ..., preemptions: _Optional[int] = ..., prefix_cache_queries: _Optional[int] = ..., prefix_cache_hits: _Optional[int] = ..., corrupt_frames: _Optional[int] = ..., expired_leases: _Optional[int] = ..., open_transfers: _Optional[int] = ..., transport_bandwidth: _Optional[float] = ..., computed_tokens: _Optional[int] = ..., foreign_frames: _Optional[int] = ..., repeated_messages: _Optional[int] = ..., missing_messages: _Optional[int] = ..., silent_routers: _Optional[int] = ..., let_go: _Optional[int] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("load", "unknown")
    LOAD_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    load: Load
    unknown: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, load: _Optional[_Union[Load, _Mapping]] = ..., unknown: _Optional[_Iterable[int]] = ...) -> None: ...

class StepOutput(_message.Message):
    __slots__ = ("runs",)
    RUNS_FIELD_NUMBER: _ClassVar[int]
    runs: _containers.RepeatedCompositeFieldContainer[TokenRun]
    def __init__(self, runs: _Optional[_Iterable[_Union[TokenRun, _Mapping]]] = ...) -> None: ...

class TokenRun(_message.Message):
    __slots__ = ("sequence_id", "first_index", "tokens", "finish")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    first_index: int
    tokens: _containers.RepeatedScalarFieldContainer[int]
    finish: FinishReason
    def __init__(self, sequence_id: _Optional[int] = ..., first_index: _Optional[int] = ..., tokens: _Optional[_Iterable[int]] = ..., finish: _Optional[_Union[FinishReason, str]] = ...) -> None: ...

class SequenceStarted(_message.Message):
    __slots__ = ("sequence_id", "cached_tokens", "queue_seconds")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    cached_tokens: int
    queue_seconds: float
    def __init__(self, sequence_id: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., queue_seconds: _Optional[float] = ...) -> None: ...

class SequenceFailed(_message.Message):
    __slots__ = ("sequence_id", "error")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    error: Error
    def __init__(self, sequence_id: _Optional[int] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("lease_id", "epoch", "generation", "tag", "transport_address", "worker_name", "first_block", "max_message_bytes", "ticket", "kv_layout")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TAG_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    WORKER_NAME_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    KV_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    lease_id: bytes
    epoch: int
    generation: int
    tag: int
    transport_address: bytes
    worker_name: str
    first_block: int
    max_message_bytes: int
    ticket: bytes
    kv_layout: KvLayout
    def __init__(self, lease_id: _Optional[bytes] = ..., epoch: _Optional[int] = ..., generation: _Optional[int] = ..., tag: _Optional[int] = ..., transport_address: _Optional[bytes] = ..., worker_name: _Optional[str] = ..., first_block: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., ticket: _Optional[bytes] = ..., kv_layout: _Optional[_Union[KvLayout, _Mapping]] = ...) -> None: ...

class LeaseGranted(_message.Message):
    __slots__ = ("sequence_id", "lease")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    lease: Lease
    def __init__(self, sequence_id: _Optional[int] = ..., lease: _Optional[_Union[Lease, _Mapping]] = ...) -> None: ...

class KvSent(_message.Message):
    __slots__ = ("sequence_id", "bytes", "messages", "seconds", "prefill_seconds", "transport")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    bytes: int
    messages: int
    seconds: float
    prefill_seconds: float
    transport: str
    def __init__(self, sequence_id: _Optional[int] = ..., bytes: _Optional[int] = ..., messages: _Optional[int] = ..., seconds: _Optional[float] = ..., prefill_seconds: _Optional[float] = ..., transport: _Optional[str] = ...) -> None: ...

class KvReceived(_message.Message):
    __slots__ = ("sequence_id", "bytes", "messages", "seconds", "exposed_seconds", "transport")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    bytes: int
    messages: int
    seconds: float
    exposed_seconds: float
    transport: str
    def __init__(self, sequence_id: _Optional[int] = ..., bytes: _Optional[int] = ..., messages: _Optional[int] = ..., seconds: _Optional[float] = ..., exposed_seconds: _Optional[float] = ..., transport: _Optional[str] = ...) -> None: ...

class KvMissing(_message.Message):
    __slots__ = ("sequence_id", "messages")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    messages: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, sequence_id: _Optional[int] = ..., messages: _Optional[_Iterable[int]] = ...) -> None: ...

class Drained(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SleepState(_message.Message):
    __slots__ = ("asleep", "order")
    ASLEEP_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    asleep: bool
    order: int
    def __init__(self, asleep: _Optional[bool] = ..., order: _Optional[int] = ...) -> None: ...

class RouterMessage(_message.Message):
    __slots__ = ("welcome", "refused", "submit_prefill", "submit_decode", "open_transfer", "resend_kv", "release_kv", "cancel", "drain", "batch", "pulse", "all_sent", "sleep", "wake", "offer_weights", "number")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_PREFILL_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_DECODE_FIELD_NUMBER: _ClassVar[int]
    OPEN_TRANSFER_FIELD_NUMBER: _ClassVar[int]
    RESEND_KV_FIELD_NUMBER: _ClassVar[int]
    RELEASE_KV_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    PULSE_FIELD_NUMBER: _ClassVar[int]
    ALL_SENT_FIELD_NUMBER: _ClassVar[int]
    SLEEP_FIELD_NUMBER: _ClassVar[int]
    WAKE_FIELD_NUMBER: _ClassVar[int]
    OFFER_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    refused: Refused
    submit_prefill: SubmitPrefill
    submit_decode: SubmitDecode
    open_transfer: OpenTransfer
    resend_kv: ResendKv
    release_kv: ReleaseKv
    cancel: Cancel
    drain: Drain
    batch: RouterBatch
    pulse: Pulse
    all_sent: AllSent
    sleep: Sleep
    wake: Wake
    offer_weights: OfferWeights
    number: int
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ..., submit_prefill: _Optional[_Union[SubmitPrefill, _Mapping]] = ..., submit_decode: _Optional[_Union[SubmitDecode, _Mapping]] = ..., open_transfer: _Optional[_Union[OpenTransfer, _Mapping]] = ..., resend_kv: _Optional[_Union[ResendKv, _Mapping]] = ..., release_kv: _Optional[_Union[ReleaseKv, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., drain: _Optional[_Union[Drain, _Mapping]] = ..., batch: _Optional[_Union[RouterBatch, _Mapping]] = ..., pulse: _Optional[_Union[Pulse, _Mapping]] = ..., all_sent: _Optional[_Union[AllSent, _Mapping]] = ..., sleep: _Optional[_Union[Sleep, _Mapping]] = ..., wake: _Optional[_Union[Wake, _Mapping]] = ..., offer_weights: _Optional[_Union[OfferWeights, _Mapping]] = ..., number: _Optional[int] = ...) -> None: ...

class RouterBatch(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[RouterMessage]
    def __init__(self, messages: _Optional[_Iterable[_Union[RouterMessage, _Mapping]]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("router_id", "heartbeat_seconds")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    heartbeat_seconds: float
    def __init__(self, router_id: _Optional[str] = ..., heartbeat_seconds: _Optional[float] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("error",)
    ERROR_FIELD_NUMBER: _ClassVar[int]
    error: Error
    def __init__(self, error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "min_p", "seed")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ...) -> None: ...

class Sequence(_message.Message):
    __slots__ = ("sequence_id", "request_id", "tokens", "output_offset", "max_tokens", "stop_token_ids", "sampling", "deadline_seconds", "traceparent", "cache_salt")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_OFFSET_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    request_id: str
    tokens: _containers.RepeatedScalarFieldContainer[int]
    output_offset: int
    max_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: Sampling
    deadline_seconds: float
    traceparent: str
    cache_salt: bytes
    def __init__(self, sequence_id: _Optional[int] = ..., request_id: _Optional[str] = ..., tokens: _Optional[_Iterable[int]] = ..., output_offset: _Optional[int] = ..., max_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., deadline_seconds: _Optional[float] = ..., traceparent: _Optional[str] = ..., cache_salt: _Optional[bytes] = ...) -> None: ...

class SubmitPrefill(_message.Message):
    __slots__ = ("sequence",)
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    sequence: Sequence
    def __init__(self, sequence: _Optional[_Union[Sequence, _Mapping]] = ...) -> None: ...

class SubmitDecode(_message.Message):
    __slots__ = ("sequence", "expect_kv", "lease_seconds")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    EXPECT_KV_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    sequence: Sequence
    expect_kv: bool
    lease_seconds: float
    def __init__(self, sequence: _Optional[_Union[Sequence, _Mapping]] = ..., expect_kv: _Optional[bool] = ..., lease_seconds: _Optional[float] = ...) -> None: ...

class OpenTransfer(_message.Message):
    __slots__ = ("sequence_id", "lease")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    lease: Lease
    def __init__(self, sequence_id: _Optional[int] = ..., lease: _Optional[_Union[Lease, _Mapping]] = ...) -> None: ...

class ResendKv(_message.Message):
    __slots__ = ("sequence_id", "messages")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    messages: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, sequence_id: _Optional[int] = ..., messages: _Optional[_Iterable[int]] = ...) -> None: ...

class AllSent(_message.Message):
    __slots__ = ("sequence_id",)
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    def __init__(self, sequence_id: _Optional[int] = ...) -> None: ...

class ReleaseKv(_message.Message):
    __slots__ = ("sequence_id",)
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    def __init__(self, sequence_id: _Optional[int] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("sequence_id", "reason")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    reason: str
    def __init__(self, sequence_id: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Pulse(_message.Message):
    __slots__ = ("live", "stalled")
    LIVE_FIELD_NUMBER: _ClassVar[int]
    STALLED_FIELD_NUMBER: _ClassVar[int]
    live: _containers.RepeatedScalarFieldContainer[int]
    stalled: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, live: _Optional[_Iterable[int]] = ..., stalled: _Optional[_Iterable[int]] = ...) -> None: ...

class Sleep(_message.Message):
    __slots__ = ("order",)
    ORDER_FIELD_NUMBER: _ClassVar[int]
    order: int
    def __init__(self, order: _Optional[int] = ...) -> None: ...

class Wake(_message.Message):
    __slots__ = ("order",)
    ORDER_FIELD_NUMBER: _ClassVar[int]
    order: int
    def __init__(self, order: _Optional[int] = ...) -> None: ...

class OfferWeights(_message.Message):
    __slots__ = ("worker_name", "weights_id", "transport_address", "tag", "ticket", "seconds")
    WORKER_NAME_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TAG_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    worker_name: str
    weights_id: str
    transport_address: bytes
    tag: int
    ticket: bytes
    seconds: float
    def __init__(self, worker_name: _Optional[str] = ..., weights_id: _Optional[str] = ..., transport_address: _Optional[bytes] = ..., tag: _Optional[int] = ..., ticket: _Optional[bytes] = ..., seconds: _Optional[float] = ...) -> None: ...

class Drain(_message.Message):
    __slots__ = ("grace_seconds",)
    GRACE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    grace_seconds: float
    def __init__(self, grace_seconds: _Optional[float] = ...) -> None: ...

class Handover(_message.Message):
    __slots__ = ("first_token", "first_token_index", "prompt_tokens", "computed_at", "cached_tokens", "transport", "send_seconds", "gather_seconds_each", "send_seconds_each")
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_INDEX_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_AT_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    SEND_SECONDS_FIELD_NUMBER: _ClassVar[int]
    GATHER_SECONDS_EACH_FIELD_NUMBER: _ClassVar[int]
    SEND_SECONDS_EACH_FIELD_NUMBER: _ClassVar[int]
    first_token: int
    first_token_index: int
    prompt_tokens: int
    computed_at: float
    cached_tokens: int
    transport: str
    send_seconds: float
    gather_seconds_each: _containers.RepeatedScalarFieldContainer[float]
    send_seconds_each: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, first_token: _Optional[int] = ..., first_token_index: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., computed_at: _Optional[float] = ..., cached_tokens: _Optional[int] = ..., transport: _Optional[str] = ..., send_seconds: _Optional[float] = ..., gather_seconds_each: _Optional[_Iterable[float]] = ..., send_seconds_each: _Optional[_Iterable[float]] = ...) -> None: ...
