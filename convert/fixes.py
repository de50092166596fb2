"""What to change in a draft's files once a mistake in them is known."""

from dspark_jax.convert.patient import Patient
from dspark_jax.convert.readings import Reading, Vocabulary
from dspark_jax.convert.verdict import Diagnosis
from dspark_jax.draft_formats.formats import TABLES
from dspark_jax.draft_formats.keys import altered

MAPS: dict[Vocabulary, str] = {
    "offsets": "d2t holds offsets: the target token of draft token i is i + d2t[i]",
    "ids": "d2t holds target ids where offsets are needed: subtract the index from every entry",
    "t2d": "d2t is not the map of t2d: write d2t[i] = (index of t2d's i-th true entry) - i",
    "first": "d2t is not this draft's: draft token i is target token i, so d2t is zero everywhere",
}


def fixes(patient: Patient, diagnosis: Diagnosis) -> list[str]:
    """One sentence for every key or tensor that has to be another."""
    before, after = patient.as_configured(), diagnosis.final
    said = patient.told.said
    changed = altered(TABLES[patient.told.kind], patient.opened.described, said, after.config)
    lines = [f"in config.json set {path} to {new!r} (it is {old!r})" for path, old, new in changed]
    return lines + (_tensors(before, after) if after != before else [])


def _tensors(before: Reading, after: Reading) -> list[str]:
    """Of mistakes that no key of config.json can tell."""
    lines = []
    if after.last_normed != before.last_normed:
        lines.append(
            "the draft was trained on transformers' hidden_states, whose last one has been through "
            "the target's final norm; engines give the state before it. Train it on, from these "
            "weights, on states before the norm, or leave the last state out"
        )
    if after.normed != before.normed:
        lines.append(
            "the draft was trained without its last norm (norm.weight), which every engine "
            "applies; train it on with the norm"
        )
    if after.interleaved != before.interleaved:
        lines.append(
            "the rows of q_proj and k_proj, and q_norm and k_norm, are in the order of "
            "neighbouring rotary pairs; put each head's even rows before its odd ones"
        )
    if after.vocabulary != before.vocabulary:
        lines.append(MAPS[after.vocabulary])
    return lines
