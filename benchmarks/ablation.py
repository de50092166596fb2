"""What the Markov head is worth: the same draft trained with it and without, served on one set.

    python benchmarks/ablation.py --output runs/ablation [any flag of dspark_jax.train]

Both runs share data, steps and seed; rank 0 is plain DFlash. Prints a table and writes
`ablation.json`.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Train twice, compare the served acceptance lengths."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"))
    known, flags = parser.parse_known_args()
    reports = {}
    for name, rank in (("markov", []), ("rank 0", ["--markov-rank", "0"])):
        output = known.output / name.replace(" ", "_")
        share_data(known.output / "markov" / "data", output / "data")
        command = [sys.executable, "-m", "dspark_jax.train", "--output", str(output)]
        subprocess.run([*command, *flags, *rank], check=True)
        reports[name] = json.loads((output / "report.json").read_text())["served"]
    table = {
        mode: {name: served[mode]["acceptance_length"] for name, served in reports.items()}
        for mode in ("greedy", "sampled")
    }
    for row in table.values():
        row["gain"] = row["markov"] / row["rank 0"] - 1
    (known.output / "ablation.json").write_text(json.dumps(table, indent=1) + "\n")
    for mode, row in table.items():
        print(f"{mode}: {row['markov']:.2f} against {row['rank 0']:.2f} ({row['gain']:+.1%})")


def share_data(source: Path, destination: Path) -> None:
    """Let the second run reuse the first run's conversations."""
    if source.exists() and not destination.exists():
        shutil.copytree(source, destination)


if __name__ == "__main__":
    main()
