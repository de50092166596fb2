"""A server under load: plain decoding, fixed and adaptive verification, in one run.

    python benchmarks/serve.py [--concurrency 1 2 4] [--requests 6] [--tokens 128]
        [--temperature 0] [--checkpoint DIR] [--json FILE]

By default 1, 2, 4 … 32 at once.

Three real servers, `python -m dspark_jax.serve` with the same models, are started side by side and
take turns: only one is asked at a time. Each level of concurrency keeps so many requests open until
each of its askers has had `--requests` answers of `--tokens` tokens (fewer from nine askers on),
over HTTP, streamed. Prompts are signatures and docstrings of the standard library that the target
never trained on, each used once by every server, and prefix caching is off.

tokens/s counts all answers' tokens over the wall clock; per user, over the time from an answer's
first token to its last. TTFT is from sending a request to its first token, TPOT the mean time of
the others; p50 and p99 over answers. Acceptance length is 1 + accepted / rounds; verified is rows
per round; padding the share of rows that held no token; host the part of a round's time in which
the engine's thread worked before it waited for the device (`/metrics`). Where torch is installed,
transformers' own `generate` answers the same prompts with the embedded target, one at a time.
"""

import argparse
import asyncio
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from dspark_jax.checkpoints.folder import embedded
from dspark_jax.target_folder import load_tokenizer
from dspark_jax.train.conversations import prompt_tokens
from dspark_jax.train.prompts import library_prompts
from dspark_jax.train.transformers_speed import measure_transformers

KINDS = {
    "plain": {"num_speculative_tokens": 0},
    "fixed": {"enable_adaptive_verification": False},
    "adaptive": {"enable_adaptive_verification": True},
}
LONGEST_CHARACTERS = 400
METRICS = {
    "rounds": "vllm:spec_decode_num_drafts_total",
    "accepted": "vllm:spec_decode_num_accepted_tokens_total",
    "verified": "dspark:verify_tokens_total",
    "padding": "dspark:padding_tokens_total",
    "steps": "dspark:verify_bucket_tokens_total",
    "compiled": "dspark:compilations_total",
    "round_seconds": 'dspark:step_seconds_sum:phase="round"',
    "host_seconds": 'dspark:step_seconds_sum:phase="host"',
}
"""Names, and with a colon behind them the label to sum over."""


class Answer(NamedTuple):
    """Seconds from sending to the first and to the last token, and how many came."""

    first: float
    last: float
    tokens: int


@contextmanager
def server(kind: str, given: argparse.Namespace) -> Iterator[str]:
    """A started server's address; it is gone afterwards."""
    command = [
        *(sys.executable, "-m", "dspark_jax.serve", "--port", "0"),
        *("--max-num-seqs", str(max(given.concurrency)), "--max-model-len", "1024"),
        *("--speculative-config", json.dumps(KINDS[kind]), "--no-enable-prefix-caching"),
        "--profile-again",
        *(("--checkpoint", given.checkpoint) if given.checkpoint else ()),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("ready: "):
                break
        else:
            raise SystemExit(f"the {kind} server ended with {process.wait()}")
        try:
            yield line.split()[1]
        finally:
            process.terminate()


async def ask(client: httpx.AsyncClient, prompt: str, given: argparse.Namespace) -> Answer:
    """One streamed answer."""
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": given.tokens,
        "ignore_eos": True,
        "temperature": given.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begun, first, tokens = time.perf_counter(), 0.0, 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
            elif not first and event["choices"] and event["choices"][0]["delta"].get("content"):
                first = time.perf_counter() - begun
    return Answer(first, time.perf_counter() - begun, tokens)


def each(concurrency: int, given: argparse.Namespace) -> int:
    """Answers of one asker: fewer where there are more than eight, as prompts are used once."""
    return min(given.requests, max(2, 8 * given.requests // concurrency))


async def load(address: str, prompts: Sequence[str], concurrency: int, given: Any) -> list[Answer]:
    """Askers side by side, each with one request open at a time."""
    waiting = iter(prompts)
    answers: list[Answer] = []

    async def asker(client: httpx.AsyncClient) -> None:
        for _ in range(each(concurrency, given)):
            answers.append(await ask(client, next(waiting), given))

    async with httpx.AsyncClient(base_url=address, timeout=600) as client:
        await asyncio.gather(*(asker(client) for _ in range(concurrency)))
    return answers


def counters(address: str) -> dict[str, float]:
    """The sums of what `/metrics` counts."""
    totals = dict.fromkeys(METRICS, 0.0)
    for line in httpx.get(f"{address}/metrics").text.splitlines():
        for name, metric in METRICS.items():
            metric, _, label = metric.partition("_sum:")
            metric = f"{metric}_sum" if label else metric
            if line.startswith(metric + "{") and label in line:
                totals[name] += float(line.rsplit(" ", 1)[1])
    return totals


def measure(address: str, prompts: Sequence[str], concurrency: int, given: Any) -> dict[str, Any]:
    """One row of the table."""
    before, begun = counters(address), time.perf_counter()
    answers = asyncio.run(load(address, prompts, concurrency, given))
    seconds = time.perf_counter() - begun
    spent = {name: value - before[name] for name, value in counters(address).items()}
    first = sorted(1e3 * a.first for a in answers)
    rest = sorted(1e3 * (a.last - a.first) / (a.tokens - 1) for a in answers)
    rows = spent["verified"] + spent["padding"]
    return {
        "tokens_per_second": sum(a.tokens for a in answers) / seconds,
        "tokens_per_second_per_user": 1e3 / statistics.median(rest),
        "ttft_ms_p50": statistics.median(first),
        "ttft_ms_p99": first[int(0.99 * (len(first) - 1))],
        "tpot_ms_p50": statistics.median(rest),
        "tpot_ms_p99": rest[int(0.99 * (len(rest) - 1))],
        "acceptance_length": 1 + spent["accepted"] / max(spent["rounds"], 1),
        "verified_per_step": spent["verified"] / max(spent["steps"], 1),
        "padding_share": spent["padding"] / max(rows, 1),
        "host_share": spent["host_seconds"] / max(spent["round_seconds"], 1e-9),
        "compiled": spent["compiled"],
        "tokens": sum(a.tokens for a in answers),
    }


def transformers_speed(texts: Sequence[str], given: argparse.Namespace) -> dict[str, Any] | None:
    """Of the first prompts; None without torch, or for another target than the embedded one."""
    if given.checkpoint:
        return None
    folder = embedded("tiny-glm")
    tokenizer = load_tokenizer(folder)
    asked = ([{"role": "user", "content": text}] for text in texts)
    prompts = [np.array(prompt_tokens(tokenizer, messages), np.int32) for messages in asked]
    return measure_transformers(folder, prompts, given.tokens, print)


def report(rows: list[dict[str, Any]], console: Console) -> None:
    """The table, plain beside the others."""
    table = Table(title="tokens/s of all answers, against plain decoding at the same concurrency")
    for name in ("at once", "decoding", "tokens/s", "x plain", "per user", "TTFT p50/p99 ms"):
        table.add_column(name, justify="right")
    for name in ("TPOT p50/p99 ms", "accepted", "rows a step", "padding", "host"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row["concurrency"]),
            row["kind"],
            f"{row['tokens_per_second']:.0f}",
            f"{row['speedup']:.2f}",
            f"{row['tokens_per_second_per_user']:.0f}",
            f"{row['ttft_ms_p50']:.0f} / {row['ttft_ms_p99']:.0f}",
            f"{row['tpot_ms_p50']:.2f} / {row['tpot_ms_p99']:.2f}",
            "" if row["kind"] == "plain" else f"{row['acceptance_length']:.2f}",
            f"{row['verified_per_step']:.1f}",
            f"{row['padding_share']:.0%}",
            f"{row['host_share']:.0%}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--requests", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--checkpoint")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    texts = [t for t in library_prompts(0).held_out if len(t) <= LONGEST_CHARACTERS]
    rows, place = [], 0
    needed = given.requests + sum(c * each(c, given) for c in given.concurrency)
    if needed > len(texts):
        raise SystemExit(f"{needed} prompts are needed and there are {len(texts)}; ask for fewer.")
    with (
        server("plain", given) as plain,
        server("fixed", given) as fixed,
        server("adaptive", given) as adaptive,
    ):
        addresses = {"plain": plain, "fixed": fixed, "adaptive": adaptive}
        for address in addresses.values():  # connections, first touches
            measure(address, texts[-given.requests :], 1, given)
        for concurrency in given.concurrency:
            count = concurrency * each(concurrency, given)
            prompts, place = texts[place : place + count], place + count
            base = None
            for kind, address in addresses.items():
                row = measure(address, prompts, concurrency, given)
                base = base or row["tokens_per_second"]
                row |= {"concurrency": concurrency, "kind": kind}
                rows.append(row | {"speedup": row["tokens_per_second"] / base})
    report(rows, Console(width=140))
    other = transformers_speed(texts[: given.requests], given)
    if other is not None:
        print(
            f"transformers {other['transformers']} with torch {other['torch']}, one prompt at a "
            f"time: {other['tokens_per_second']:.0f} tokens/s, prompts included"
        )
    if given.json:
        about = {"machine": platform.processor() or platform.machine(), "settings": vars(given)}
        found = {"about": about, "rows": rows, "transformers": other}
        text = json.dumps(found, indent=2, default=str)
        given.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
