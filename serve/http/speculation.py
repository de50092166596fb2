"""How speculation went for one request, in the shape of vLLM's per-request metrics."""

from collections.abc import Sequence
from typing import Any


def speculation(
    rounds: Sequence[tuple[int, int]], draft_length: int, detailed: bool
) -> dict[str, Any] | None:
    """The summary of (verified, accepted) rounds; None when nothing was drafted.

    `acceptance_histogram[k]` counts the rounds that accepted k drafts; the acceptance length counts
    the bonus token too.
    """
    if not rounds:
        return None
    drafted = sum(verified for verified, _ in rounds)
    accepted = sum(kept for _, kept in rounds)
    histogram = [0] * (draft_length + 1)
    for _, kept in rounds:
        histogram[min(kept, draft_length)] += 1
    found: dict[str, Any] = {
        "mean_acceptance_length": 1 + accepted / len(rounds),
        "draft_acceptance_rate": accepted / drafted if drafted else 0.0,
        "acceptance_histogram": histogram,
        "num_spec_steps": len(rounds),
        "num_accepted_draft_tokens": accepted,
        "num_draft_tokens": drafted,
        "num_spec_tokens": draft_length,
    }
    if detailed:
        found["per_step_accepted"] = [kept for _, kept in rounds]
        found["per_step_drafted"] = [verified for verified, _ in rounds]
    return found
