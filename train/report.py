"""The run's report: report.json, report.md and plots."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

EXAMPLES = 3
TIES = {
    True: "a near tie",
    False: "NOT A NEAR TIE",
    None: "in a narrow type, where rounding may decide",
}


def write_report(
    output: Path,
    report: dict[str, Any],
    curve: list[dict[str, float | int]],
    bins: dict[str, list[float]],
) -> None:
    """Write all of it beside the checkpoints."""
    (output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (output / "report.md").write_text(markdown(report))
    plot_curve(output / "loss.png", curve)
    plot_acceptance(output / "acceptance.png", report)
    plot_reliability(output / "confidence.png", bins)


def markdown(report: dict[str, Any]) -> str:
    """The report for reading."""
    validation, served = report["validation"], report["served"]
    lines = [
        "# DSpark training report",
        "",
        f"Target `{report['target']}`, draft `{report['checkpoint']}`, {report['steps']} steps.",
        f"`{report['command']}` on {report['machine']}; other work on it slows what is timed.",
        "",
        "## Validation (teacher-forced, held-out conversations)",
        "",
        "| metric | value |",
        "|---|---|",
    ]
    for name, value in validation.items():
        if isinstance(value, float) and name != "blocks":
            lines.append(f"| {name.replace('_', ' ')} | {value:.3f} |")
    accuracy = " / ".join(f"{x:.3f}" for x in validation["position_accuracy"] if x is not None)
    lines += [f"| position accuracy | {accuracy} |", "", "## Served (real decoding, batch 1)", ""]
    lines += [
        "| decoding | answers | acceptance length | tokens/s | plain tokens/s | speed-up |",
        "|---|---|---|---|---|---|",
    ]
    for mode, part in served.items():
        rows = {
            mode: part,
            **{f"{mode}, {k.replace('_', ' ')}": v for k, v in part["by_answer"].items()},
        }
        lines += [_served_row(name, table) for name, table in rows.items() if table["answers"]]
    lines += ["", *_by_length(served)]
    greedy = served["greedy"]
    lines += [
        f"Greedy answers identical to plain decoding by the same program: "
        f"**{'yes' if greedy['identical_to_plain'] else 'NO'}**. "
        f"Against the separately compiled one-token program "
        f"{len(greedy['one_token_program_divergences'])} of {greedy['answers']} answers diverge"
        + "".join(
            f"; prompt {d['prompt']} at token {d['position']}, by a {d['kind']} margin of "
            f"{d['margin']:.1e} ({TIES[d['near_tie']]})"
            for d in greedy["one_token_program_divergences"]
        )
        + ".",
        "",
        *_elsewhere(greedy),
        *_calibrated(report.get("calibration")),
        "Tokens per second are those of decoding, the prompt already read. Reading all prompts "
        f"took {greedy['prompt_seconds']:.2f} s with the draft, "
        f"{greedy['plain_prompt_seconds']:.2f} s without.",
        "",
        "Looping answers repeat one short piece at their end; repetition can flatter a draft.",
        "",
        "![loss](loss.png) ![acceptance](acceptance.png) ![confidence](confidence.png)",
        "",
    ]
    return "\n".join(lines + _examples(greedy))


def _by_length(served: dict[str, Any]) -> list[str]:
    """What it brings to verify less of every block than all of it, the table above."""
    lines = [
        "Where a verified row costs time, the end of a block may not be worth it:",
        "",
        "| decoding | drafts verified | acceptance length | tokens/s | speed-up |",
        "|---|---|---|---|---|",
    ]
    for mode, part in served.items():
        for length, table in part["by_verify_length"].items():
            lines.append(
                f"| {mode} | {length} | {table['acceptance_length']:.2f} "
                f"| {table['tokens_per_second']:.0f} | {table['speedup']:.2f} |"
            )
    parted = [
        f"prompt {d['prompt']} at token {d['position']} with {length} drafts, by a {d['kind']} "
        f"margin of {d['margin']:.1e} ({TIES[d['near_tie']]})"
        for length, table in served["greedy"]["by_verify_length"].items()
        for d in table.get("whole_block_divergences", ())
    ]
    said = "; ".join(parted) or "none"
    return [*lines, "", f"Greedy answers that differ from those of whole blocks: {said}.", ""]


def _examples(greedy: dict[str, Any]) -> list[str]:
    """The first answers as text, so that there is something to read."""
    lines = ["## Answers (greedy, as the target alone would give them)", ""]
    for prompt in greedy["prompts"][:EXAMPLES]:
        rounds = f"{len(prompt['answer_token_ids'])} tokens in {prompt['rounds']} rounds"
        lines += [f"{rounds}:", "", "`````", prompt["prompt"] + prompt["answer"], "`````", ""]
    return lines


def _elsewhere(greedy: dict[str, Any]) -> list[str]:
    """transformers beside us, where it was measured."""
    found = greedy.get("transformers")
    if found is None:
        return []
    return [
        f"`generate` of transformers {found['transformers']} (torch {found['torch']}) on the same "
        f"files, plain greedy, prompts included: {found['tokens_per_second']:.0f} tokens/s.",
        "",
    ]


def _calibrated(found: dict[str, Any] | None) -> list[str]:
    """How far the confidences are off, with temperatures and without; nothing without the head."""
    if found is None:
        return []
    rows = {"temperature": found["temperatures"]}
    rows |= {f"error {name}": values for name, values in found["survival_error"].items()}
    positions = range(1, len(found["temperatures"]) + 1)
    return [
        f"Calibration of survival on the {found['rounds']} rounds above: the expected calibration "
        "error before, and with temperatures fitted to the other half of the prompts.",
        "",
        "".join(f"| {x} " for x in ("drafted position", *positions)) + "|",
        "|---" * (1 + len(positions)) + "|",
        *(
            "".join([f"| {name} ", *(f"| {x:.3f} " for x in row), "|"])
            for name, row in rows.items()
        ),
        "",
    ]


def _served_row(name: str, part: dict[str, Any]) -> str:
    return (
        f"| {name} | {part['answers']} | {part['acceptance_length']:.2f} "
        f"| {part['tokens_per_second']:.0f} | {part['plain_tokens_per_second']:.0f} "
        f"| {part['speedup']:.2f} |"
    )


def plot_curve(path: Path, curve: list[dict[str, float | int]]) -> None:
    """Loss and expected acceptance length over training."""
    figure, left = plt.subplots(figsize=(6, 4))
    steps = [point["step"] for point in curve]
    left.plot(steps, [point["loss"] for point in curve], color="tab:blue")
    left.set_xlabel("step")
    left.set_ylabel("loss", color="tab:blue")
    right = left.twinx()
    right.plot(steps, [point["accept_len"] for point in curve], color="tab:orange")
    right.set_ylabel("expected acceptance length", color="tab:orange")
    left.set_title("Training")
    _save(figure, path)


def plot_acceptance(path: Path, report: dict[str, Any]) -> None:
    """Share of rounds in which each drafted position survived."""
    figure, axes = plt.subplots(figsize=(6, 4))
    for mode, part in report["served"].items():
        values = part["position_survival"]
        label = f"{mode} (acceptance length {part['acceptance_length']:.2f})"
        axes.plot(range(1, len(values) + 1), values, marker="o", label=label)
    axes.set_ylim(0, 1)
    axes.set_xlabel("drafted position")
    axes.set_ylabel("share of rounds accepted up to here")
    axes.set_title("Served acceptance by position")
    axes.legend()
    _save(figure, path)


def plot_reliability(path: Path, bins: dict[str, list[float]]) -> None:
    """Predicted against observed acceptance rate, by bins of equal width."""
    figure, axes = plt.subplots(figsize=(6, 4))
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--", label="calibrated")
    axes.plot(bins["predicted"], bins["observed"], marker="o", label="confidence head")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("predicted acceptance")
    axes.set_ylabel("observed acceptance rate")
    axes.set_title("Confidence reliability (validation)")
    axes.legend()
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
