"""The server's Prometheus metrics: vLLM's names, and dspark's own beside them.

The HTTP side counts what a request shows it: tokens, latencies, accepted drafts, ends. The engine
tells the rest through `gauges`, `round`, `admitted`, `timed`, `preempted`, `compiled` and
`calibrated`. Every method may be called from any thread and returns at once.
"""

from collections.abc import Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
CHOICES = (1, 2, 5, 10, 20)
LABELS = ("model_name", "engine")
Number = int | float


class Metrics:
    """All metrics of one engine, in a registry of their own."""

    def __init__(self, model_name: str, draft_length: int, engine: str = "0"):
        self.registry = CollectorRegistry()
        self._names = {"model_name": model_name, "engine": engine}
        self._gauges()
        self._counters()
        self._histograms()
        self._dspark()
        # Positions that were never accepted show as 0 instead of being absent.
        self._per_position = [
            self._accepted_per_position.labels(**self._names, position=str(i))
            for i in range(draft_length)
        ]

    # What the engine calls.

    def gauges(self, running: int, waiting: int, kv_usage: Number) -> None:
        """Answers in slots, answers in the queue, and the share of cache pages in use, 0 to 1."""
        self._running.set(running)
        self._waiting.set(waiting)
        self._kv_usage.set(kv_usage)

    def cache_config(self, config: Mapping[str, str | int | float | bool]) -> None:
        """Once at the start: page size, pages and the like, which become labels."""
        labels = {name: str(value) for name, value in config.items()}
        names = (*LABELS, *labels)
        info = Gauge(
            "vllm:cache_config_info", "Settings of the cache", names, registry=self.registry
        )
        info.labels(**self._names, **labels).set(1)

    def round(
        self, tokens: int, verify_tokens: int, bucket_tokens: int, seconds: Mapping[str, Number]
    ) -> None:
        """After each decode round, over all its answers.

        `tokens` were emitted, `verify_tokens` rows went through the target in a program for
        `bucket_tokens` rows. `seconds` are those of the whole "round" since the one before it, and
        of "host", the part in which this process worked before it waited for the device.
        """
        self._iteration_tokens.observe(tokens)
        self._verify_tokens.inc(verify_tokens)
        self._bucket.labels(**self._names, bucket=str(bucket_tokens)).inc()
        self._padding.inc(bucket_tokens - verify_tokens)
        for phase, value in seconds.items():
            self._step.labels(**self._names, phase=phase).observe(value)

    def prefilled(self, tokens: int) -> None:
        """After each chunk of a prompt: its tokens."""
        self._iteration_tokens.observe(tokens)

    def admitted(self, prompt_tokens: int, cached_tokens: int) -> None:
        """When a prompt was looked up in the prefix cache: tokens asked for, tokens found."""
        self._queries.inc(prompt_tokens)
        self._hits.inc(cached_tokens)

    def timed(self, queue: Number, prefill: Number, decode: Number) -> None:
        """When an answer has ended: seconds it waited, prefilled and decoded."""
        self._queue_time.observe(queue)
        self._prefill_time.observe(prefill)
        self._decode_time.observe(decode)
        self._inference_time.observe(prefill + decode)

    def preempted(self, answers: int = 1) -> None:
        """Answers put back into the queue because the cache was full."""
        self._preemptions.inc(answers)

    def compiled(self, programs: int = 1) -> None:
        """Programs compiled; any after the start is a fault to look into."""
        self._compilations.inc(programs)

    def corrupted(self, answers: int = 1) -> None:
        """Answers that ended because their logits were not finite."""
        self._corrupted.inc(answers)

    def rejected(self, reason: str) -> None:
        """An answer refused by the queue: `max_num_queued_reqs` or `max_num_queued_tokens`."""
        self._rejections.labels(**self._names, reason=reason).inc()

    def calibrated(self, confidence: Sequence[Number], accepted: Sequence[Number]) -> None:
        """A block's confidences and, for each of its positions, 1 where the draft was accepted."""
        for i, (claimed, hit) in enumerate(zip(confidence, accepted, strict=True)):
            self._claimed.labels(**self._names, position=str(i)).inc(claimed)
            self._hit.labels(**self._names, position=str(i)).inc(hit)

    # What the HTTP side calls.

    def asked(self, n: int, max_tokens: int) -> None:
        """A request was accepted for queueing."""
        self._params_n.observe(n)
        self._params_max_tokens.observe(max_tokens)

    def prompt(self, tokens: int, cached: int) -> None:
        """An answer's first delta came: its prompt is through."""
        self._prompt_tokens.inc(tokens)
        self._prompt_cached.inc(cached)
        self._request_prompt.observe(tokens)

    def first_token(self, seconds: Number) -> None:
        """From a request's arrival to its first token."""
        self._first_token.observe(seconds)

    def tokens(self, count: int, seconds: Number | None) -> None:
        """Tokens of one delta; seconds since the delta before, None for the first."""
        self._generation_tokens.inc(count)
        if seconds is not None:
            self._inter_token.observe(seconds)

    def drafted(self, verified: int, accepted: int) -> None:
        """One round of one answer that drafted: tokens verified, tokens accepted."""
        self._drafts.inc()
        self._draft_tokens.inc(verified)
        self._accepted.inc(accepted)
        for child in self._per_position[:accepted]:
            child.inc()

    def ended(self, reason: str, tokens: int, seconds: Number, decoding: Number) -> None:
        """An answer ended: why, its tokens, seconds since arrival and since its first token."""
        self._success.labels(**self._names, finished_reason=reason).inc()
        self._request_generation.observe(tokens)
        self._e2e.observe(seconds)
        if tokens > 1:
            self._per_output_token.observe(decoding / (tokens - 1))

    # Their names.

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, LABELS, registry=self.registry).labels(**self._names)

    def _count(self, name: str, text: str) -> Counter:
        return Counter(name, text, LABELS, registry=self.registry).labels(**self._names)

    def _counts(self, name: str, text: str, label: str) -> Counter:
        return Counter(name, text, (*LABELS, label), registry=self.registry)

    def _spread(self, name: str, text: str, buckets: Sequence[Number] = SECONDS) -> Histogram:
        kept = Histogram(name, text, LABELS, registry=self.registry, buckets=buckets)
        return kept.labels(**self._names)

    def _gauges(self) -> None:
        self._running = self._gauge("vllm:num_requests_running", "Answers in slots")
        self._waiting = self._gauge("vllm:num_requests_waiting", "Answers in the queue")
        self._kv_usage = self._gauge("vllm:kv_cache_usage_perc", "Pages in use, 1 is all")

    def _counters(self) -> None:
        count = self._count
        self._drafts = count("vllm:spec_decode_num_drafts", "Rounds that drafted, per answer")
        self._draft_tokens = count("vllm:spec_decode_num_draft_tokens", "Drafted tokens verified")
        self._accepted = count("vllm:spec_decode_num_accepted_tokens", "Drafted tokens accepted")
        self._accepted_per_position = self._counts(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "Accepted at a position", "position"
        )
        self._prompt_tokens = count("vllm:prompt_tokens", "Prompt tokens")
        self._generation_tokens = count("vllm:generation_tokens", "Emitted tokens")
        self._prompt_cached = count("vllm:prompt_tokens_cached", "Prompt tokens from the cache")
        self._queries = count("vllm:prefix_cache_queries", "Tokens looked up in the cache")
        self._hits = count("vllm:prefix_cache_hits", "Tokens found in the cache")
        self._preemptions = count("vllm:num_preemptions", "Answers put back into the queue")
        self._corrupted = count("vllm:corrupted_requests", "Answers with logits not finite")
        self._success = self._counts("vllm:request_success", "Ended answers", "finished_reason")
        self._rejections = self._counts(
            "vllm:admission_rejections", "Answers the queue refused", "reason"
        )

    def _histograms(self) -> None:
        spread = self._spread
        self._first_token = spread("vllm:time_to_first_token_seconds", "Arrival to first token")
        self._inter_token = spread("vllm:inter_token_latency_seconds", "Between two deltas")
        self._per_output_token = spread(
            "vllm:request_time_per_output_token_seconds", "Mean between an answer's tokens"
        )
        self._e2e = spread("vllm:e2e_request_latency_seconds", "Arrival to last token")
        self._queue_time = spread("vllm:request_queue_time_seconds", "In the queue")
        self._prefill_time = spread("vllm:request_prefill_time_seconds", "In prefill")
        self._decode_time = spread("vllm:request_decode_time_seconds", "In decoding")
        self._inference_time = spread("vllm:request_inference_time_seconds", "Prefill, decoding")
        self._request_prompt = spread("vllm:request_prompt_tokens", "Tokens of a prompt", TOKENS)
        self._request_generation = spread("vllm:request_generation_tokens", "Of an answer", TOKENS)
        self._params_n = spread("vllm:request_params_n", "Asked answers per prompt", CHOICES)
        self._params_max_tokens = spread("vllm:request_params_max_tokens", "Asked", TOKENS)
        self._iteration_tokens = spread("vllm:iteration_tokens_total", "Per engine step", TOKENS)

    def _dspark(self) -> None:
        self._verify_tokens = self._count("dspark:verify_tokens", "Rows the target verified")
        self._bucket = self._counts("dspark:verify_bucket_tokens", "Rounds by their rows", "bucket")
        self._padding = self._count("dspark:padding_tokens", "Rows that held no token")
        self._compilations = self._count("dspark:compilations", "Compiled programs")
        names = (*LABELS, "phase")
        self._step = Histogram(
            "dspark:step_seconds", "A phase", names, registry=self.registry, buckets=SECONDS
        )
        self._claimed = self._counts(
            "dspark:confidence_calibration_sum", "Summed confidence", "position"
        )
        self._hit = self._counts("dspark:confidence_calibration_hit", "Accepted", "position")
