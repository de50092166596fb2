"""A thousand streams at once on the real server: every answer arrives whole, memory stays flat."""

import asyncio
import json
import resource
import signal
from pathlib import Path

import httpx
import pytest

from tests.e2e.test_serve import metric, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STREAMS, TOKENS = 1000, 8
GROWTH_BYTES = 48 << 20
"""What a third thousand may leave behind beyond the second: allocators do not give all back."""


def resident_bytes(process_id: int) -> int:
    """Of a process, as Linux counts it."""
    status = Path(f"/proc/{process_id}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) << 10


async def stream(client: httpx.AsyncClient, number: int, opened: list[int]) -> tuple[int, str]:
    """(tokens, why it ended) of one answer; nobody reads before all are open."""
    body = {
        "prompt": f"def function_{number}(value):",
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "temperature": number % 2,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    tokens, reason = 0, ""
    async with client.stream("POST", "/v1/completions", json=body) as reply:
        assert reply.status_code == 200, await reply.aread()
        opened.append(number)
        while len(opened) < STREAMS:
            await asyncio.sleep(0.05)
        lines = [line async for line in reply.aiter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    for event in (json.loads(line.removeprefix("data: ")) for line in lines[:-1]):
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
        reason = next((c["finish_reason"] for c in event["choices"] if c["finish_reason"]), reason)
    return tokens, reason


async def thousand(address: str) -> list[tuple[int, str]]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as client:
        opened: list[int] = []
        return await asyncio.gather(*(stream(client, i, opened) for i in range(STREAMS)))


def test_a_thousand_streams_held_open_all_end_whole_and_leave_nothing():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * STREAMS + 200
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"only {hard} files may be open here, {wanted} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    process, address = start("--max-queued-requests", str(STREAMS))
    try:
        held = []
        for _ in range(3):
            answers = asyncio.run(thousand(address))
            assert answers == [(TOKENS, "length")] * STREAMS
            assert metric(address, "vllm:num_requests_running") == 0
            assert metric(address, "vllm:num_requests_waiting") == 0
            held.append(resident_bytes(process.pid))
        print("resident after each thousand, MB:", [round(x / 1e6) for x in held])
        assert held[2] - held[1] < GROWTH_BYTES
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
