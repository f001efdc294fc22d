"""`LLM`: a model in this process, without a server."""

import functools
import inspect
import logging
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from os import PathLike, fspath
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from kvrelay.offline.arguments import refuse_call_arguments, refuse_engine_arguments
from kvrelay.offline.outputs import RequestOutput
from kvrelay.offline.sampling_params import SamplingParams
from kvrelay_protocol.errors import Draining, InvalidRequest, UsageError
from kvrelay_protocol.model_files import ModelFiles, resolve_model

if TYPE_CHECKING:
    from kvrelay.offline.engine import OfflineEngine, Request
    from kvrelay.offline.loading import Loaded
    from kvrelay.offline.progress import Bar
    from kvrelay.offline.prompts import Prompt, TokenisedPrompt
    from kvrelay.offline.tokenizer import LLMTokenizer

log = logging.getLogger(__name__)

_FINGERPRINT = "offline"
"""The pool is this process's own, so that blocks need not be told from another model's."""


class LLM:
    """Answers lists of prompts with continuous batching, chunked prefill and a prefix cache.

        with LLM("Qwen/Qwen3-0.6B") as llm:
            outputs = llm.generate(["Hello, my name is"], SamplingParams(max_tokens=32))

    Names of arguments and results are vLLM's; what vLLM has and this engine has not is refused by
    name. One call runs at a time; others wait.
    """

    def __init__(
        self,
        model: str | PathLike[str],
        *,
        tokenizer: str | PathLike[str] | None = None,
        skip_tokenizer_init: bool = False,
        dtype: Any = "auto",
        quantization: str | None = None,
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        seed: int | None = 0,
        gpu_memory_utilization: float = 0.9,
        kv_cache_memory_bytes: int | None = None,
        num_gpu_blocks_override: int | None = None,
        block_size: int = 16,
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int | None = None,
        max_logprobs: int = 20,
        enable_prefix_caching: bool = True,
        device: str = "auto",
        threads: int = 0,
        **unsupported: object,
    ) -> None:
        """Load a model.

        Args:
            model: a Hugging Face folder, a hub id, `s3://bucket/prefix`, or `kvrelay-demo`.
            tokenizer: folder or hub id of another tokenizer.
            skip_tokenizer_init: load none; prompts are token ids and answers have no text.
            dtype: `auto`, `float32`, `bfloat16`, `float16`, or a torch dtype.
            quantization: None, or `int8` for 8-bit weights.
            revision: branch, tag or commit of a hub id.
            tokenizer_revision: the same for `tokenizer`.
            seed: of requests that name none; None draws another one in every process.
            gpu_memory_utilization: share of a GPU's memory for weights and KV pool together.
            kv_cache_memory_bytes: size of the KV pool; by default what a GPU has left, at most 1 GiB
                on a CPU.
            num_gpu_blocks_override: the same in blocks, on a CPU too.
            block_size: tokens a block.
            max_model_len: tokens of prompt and answer together; by default the model's own limit or
                what the pool holds.
            max_num_seqs: sequences in one step.
            max_num_batched_tokens: prompt tokens in one step; 2048 on a CPU, 8192 on a GPU.
            max_logprobs: the most `SamplingParams.logprobs` may ask for; -1: no limit.
            enable_prefix_caching: False computes every prompt from its first token.
            device: `auto`, `cpu`, `cuda` or `cuda:N`.
            threads: of the engine on a CPU; 0 leaves torch's choice.
            **unsupported: further arguments of vLLM's, which must ask for nothing.

        Raises:
            UsageError: an argument is out of range or not supported.
            InvalidModel, UnsupportedModel: it is no model folder, or of another architecture.
            NotEnoughMemory, DeviceUnavailable: there is not what it takes.
            TypeError: an unknown argument.
        """
        refuse_engine_arguments(unsupported, _parameters(LLM.__init__))
        for name, value in (
            ("kv_cache_memory_bytes", kv_cache_memory_bytes),
            ("num_gpu_blocks_override", num_gpu_blocks_override),
            ("max_model_len", max_model_len),
            ("max_num_batched_tokens", max_num_batched_tokens),
        ):
            if value is not None:
                _check_whole(name, value, 1)
        _check_whole("block_size", block_size, 1)
        _check_whole("max_num_seqs", max_num_seqs, 1)
        _check_whole("max_logprobs", max_logprobs, -1)
        _check_whole("threads", threads, 0)
        if seed is not None:
            _check_whole("seed", seed, None)
        if not 0 < gpu_memory_utilization <= 1:
            raise _wrong("gpu_memory_utilization", gpu_memory_utilization, "above 0 and at most 1")
        from kvrelay.offline.loading import LoadWish, load
        from kvrelay.offline.memory import PoolWish

        files = resolve_model(fspath(model), revision=revision)
        # Before the weights: what is wrong with a tokenizer then shows at once.
        self._tokenizer = (
            None if skip_tokenizer_init else _load_tokenizer(files, tokenizer, tokenizer_revision)
        )
        loaded = load(
            files,
            LoadWish(
                device=device,
                dtype=str(dtype).removeprefix("torch."),
                quantization=quantization,
                threads=threads,
                max_batch_tokens=max_num_batched_tokens,
            ),
            PoolWish(
                block_size=block_size,
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
                kv_cache_memory_bytes=kv_cache_memory_bytes,
                num_gpu_blocks_override=num_gpu_blocks_override,
                gpu_memory_utilization=gpu_memory_utilization,
            ),
        )
        self._begin(loaded, max_num_seqs, share_prefixes=enable_prefix_caching)
        self._seeds = random.Random(seed) if seed is not None else random.SystemRandom()
        self._max_logprobs = max_logprobs
        self._requests = 0
        self._lock = threading.Lock()

    def _begin(self, loaded: "Loaded", max_sequences: int, *, share_prefixes: bool) -> None:
        from kvrelay.offline.engine import OfflineEngine
        from kvrelay.offline.prompts import PromptReader

        config, tokenizer = loaded.runner.config, self._tokenizer
        named = frozenset[int]() if tokenizer is None else tokenizer.eos_token_ids
        self._eos_token_ids = frozenset(
            token for token in named.union(config.eos_token_ids) if token < config.vocab_size
        )
        self._reader = PromptReader(tokenizer, config.vocab_size, loaded.max_model_len)
        self._engine: OfflineEngine | None = OfflineEngine(
            loaded.runner,
            tokenizer=tokenizer,
            fingerprint=_FINGERPRINT,
            max_batch_tokens=loaded.max_batch_tokens,
            max_sequences=max_sequences,
            share_prefixes=share_prefixes,
        )

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together."""
        return self._reader.max_model_len

    def generate(
        self,
        prompts: "Prompt | Sequence[Prompt]",
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: "bool | Callable[..., Bar]" = True,
        **unsupported: object,
    ) -> list[RequestOutput]:
        """Answer prompts, all at once.

        Args:
            prompts: a text, a list of token ids, a `TextPrompt` or `TokensPrompt`, or a list of
                these.
            sampling_params: for all prompts, or one for each; None is `get_default_sampling_params`.
            use_tqdm: show a progress bar where standard error is a terminal, or make it with this.
            **unsupported: further arguments of vLLM's, which must ask for nothing.

        Returns:
            One a prompt, in their order. Where the engine could not go on with an answer, its
            `finish_reason` is `error` and `RequestOutput.error` says why.

        Raises:
            InvalidRequest, ContextOverflow: a prompt or parameter is wrong; nothing was computed.
            Draining: `shutdown` was called.
        """
        refuse_call_arguments(unsupported, "generate", _parameters(LLM.generate))
        from kvrelay.offline.prompts import as_list

        given, single = as_list(prompts)
        read = [
            self._reader.read(prompt, "prompt" if single else f"prompts[{at}]")
            for at, prompt in enumerate(given)
        ]
        return self._run(read, sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: "bool | Callable[..., Bar]" = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        **unsupported: object,
    ) -> list[RequestOutput]:
        """Answer conversations, all at once.

        Args:
            messages: one conversation, or a list of them.
            sampling_params: for all, or one for each; None is `get_default_sampling_params`.
            use_tqdm: see `generate`.
            chat_template: Jinja source to use instead of the model's own.
            add_generation_prompt: False leaves out the beginning of the assistant's turn.
            **unsupported: further arguments of vLLM's, which must ask for nothing.

        Returns:
            See `generate`.

        Raises:
            InvalidRequest: the model has no template, or it refuses the messages.
            InvalidModel: `chat_template` does not compile.
            ContextOverflow, Draining: see `generate`.
        """
        refuse_call_arguments(unsupported, "chat", _parameters(LLM.chat))
        tokenizer = self.get_tokenizer()
        from kvrelay.offline.prompts import conversations, read_messages

        read: list[TokenisedPrompt] = []
        for where, conversation in conversations(messages):
            text = tokenizer.render(
                read_messages(conversation, where),
                chat_template,
                add_generation_prompt=add_generation_prompt,
            )
            read.append(self._reader.read_rendered(text, where))
        return self._run(read, sampling_params, use_tqdm)

    def get_tokenizer(self) -> "LLMTokenizer":
        """The model's tokenizer.

        Raises:
            InvalidRequest: `skip_tokenizer_init=True` loaded none.
        """
        if self._tokenizer is None:
            raise InvalidRequest(
                "skip_tokenizer_init=True loaded no tokenizer; leave it out", param="tokenizer"
            )
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What a call without parameters gets: the values of generation_config.json."""
        if self._tokenizer is None:
            return SamplingParams()
        defaults = self._tokenizer.sampling_defaults
        return SamplingParams(
            temperature=defaults.temperature,
            top_k=defaults.top_k,
            top_p=defaults.top_p,
            min_p=defaults.min_p,
        )

    def reset_prefix_cache(self) -> bool:
        """Forget all cached blocks."""
        with self._lock:
            self._running_engine().reset()
        return True

    def shutdown(self) -> None:
        """Give weights and pool back. Idempotent; waits for a call that runs."""
        with self._lock:
            engine, self._engine = self._engine, None
        if engine is None:
            return
        engine.check_integrity()
        on_gpu = engine.runner.device.type == "cuda"
        del engine
        if on_gpu:
            import torch

            # To the driver, so that another process can have it.
            torch.cuda.empty_cache()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shutdown()

    def _run(
        self,
        prompts: "Sequence[TokenisedPrompt]",
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: "bool | Callable[..., Bar]",
    ) -> list[RequestOutput]:
        from kvrelay.offline.progress import Progress

        params = self._params_for(sampling_params, len(prompts))
        with self._lock:
            engine = self._running_engine()
            requests = [
                self._request(prompt, each) for prompt, each in zip(prompts, params, strict=True)
            ]
            progress = Progress(use_tqdm, total=len(requests), description="Processed prompts")
            try:
                outputs = engine.run(requests, progress.finished)
            finally:
                progress.close()
        _report_failures(outputs)
        return outputs

    def _running_engine(self) -> "OfflineEngine":
        if self._engine is None:
            raise Draining("this LLM was shut down; construct another one")
        return self._engine

    def _params_for(
        self, given: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> Sequence[SamplingParams]:
        """One for each prompt, checked against the model."""
        if given is None:
            given = self.get_default_sampling_params()
        if isinstance(given, SamplingParams):
            self._check_params(given)
            return [given] * count
        if not isinstance(given, Sequence) or not all(isinstance(p, SamplingParams) for p in given):
            raise _bad_request(
                "sampling_params",
                f"is a {type(given).__name__}",
                "SamplingParams or a list of them",
            )
        if len(given) != count:
            raise _bad_request(
                "sampling_params", f"has {len(given)} entries", f"one for each of {count} prompts"
            )
        for params in given:
            self._check_params(params)
        return given

    def _check_params(self, params: SamplingParams) -> None:
        vocab_size = self._reader.vocab_size
        outside = [i for i in params.stop_token_ids or () if not 0 <= i < vocab_size]
        if outside:
            raise _bad_request(
                "stop_token_ids", f"has {outside[0]}", f"below the vocabulary's {vocab_size}"
            )
        asked = vocab_size if params.logprobs == -1 else params.logprobs or 0
        if self._max_logprobs != -1 and asked > self._max_logprobs:
            raise _bad_request(
                "logprobs",
                f"is {params.logprobs}",
                f"at most {self._max_logprobs}; raise LLM(max_logprobs=...)",
            )
        if self._tokenizer is None and params.stop_strings:
            raise _bad_request("stop", "is set", "None with skip_tokenizer_init=True")

    def _request(self, prompt: "TokenisedPrompt", params: SamplingParams) -> "Request":
        from kvrelay.offline.engine import Request

        left = self.max_model_len - len(prompt.ids)
        request_id, self._requests = str(self._requests), self._requests + 1
        ends = frozenset(params.stop_token_ids or ())
        return Request(
            request_id=request_id,
            prompt=prompt,
            params=params,
            seed=self._seeds.getrandbits(64) if params.seed is None else params.seed,
            max_tokens=left if params.max_tokens is None else min(params.max_tokens, left),
            eos_token_ids=self._eos_token_ids,
            stop_token_ids=ends if params.ignore_eos else ends | self._eos_token_ids,
        )


def _load_tokenizer(
    files: ModelFiles, reference: str | PathLike[str] | None, revision: str | None
) -> "LLMTokenizer":
    from kvrelay.offline.tokenizer import LLMTokenizer
    from kvrelay_router.text.served_model import load_served_model

    if reference is not None:
        files = resolve_model(fspath(reference), revision=revision, weights=False)
    return LLMTokenizer(load_served_model(files.directory, files.name), files.directory)


def _report_failures(outputs: Sequence[RequestOutput]) -> None:
    failed = [output for output in outputs if output.error is not None]
    if failed:
        log.warning(
            "%d of %d requests failed, the first (%s) with: %s",
            len(failed),
            len(outputs),
            failed[0].request_id,
            failed[0].error,
        )


@functools.cache
def _parameters(function: Callable[..., object]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _check_whole(name: str, value: object, low: int | None) -> None:
    if type(value) is not int or (low is not None and value < low):
        raise _wrong(name, value, "a whole number" + ("" if low is None else f" of at least {low}"))


def _wrong(name: str, value: object, expected: str) -> UsageError:
    return UsageError(f"{name}={value!r}; it must be {expected}", param=name)


def _bad_request(name: str, found: str, expected: str) -> InvalidRequest:
    return InvalidRequest(f"{name} {found}; it must be {expected}", param=name)
