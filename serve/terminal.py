"""`--prompt`: one answer in the terminal, accepted drafts coloured by their place in the block."""

import queue
import sys

from rich.console import Console
from rich.text import Text
from tokenizers.decoders import DecodeStream

from dspark_jax.serve.build import Built
from dspark_jax.serve.messages import Delta, SamplingParams, Work
from dspark_jax.serve.settings import ServeSettings

COLOURS = ("green", "cyan", "blue", "magenta", "bright_green", "bright_cyan", "bright_blue")


def answer(settings: ServeSettings, built: Built, tokenizer: object) -> int:
    """Stream the answer to `--prompt`; 0, or 1 when it failed."""
    prompt = prompt_tokens(tokenizer, settings.prompt or "")
    room = built.sizes.longest * built.sizes.page - len(prompt)
    if room < 1:
        raise ValueError(f"the prompt has {len(prompt)} tokens; --max-model-len leaves no room.")
    sampling = SamplingParams(temperature=settings.temperature, seed=settings.seed)
    work = Work("prompt", prompt, min(settings.max_tokens, room), sampling)
    heard: queue.SimpleQueue[Delta] = queue.SimpleQueue()
    built.engine.submit(work, heard.put)
    console, rounds, count = Console(highlight=False), 0, 0
    stream = DecodeStream(skip_special_tokens=True)
    while True:
        delta = heard.get()
        rounds, count = rounds + 1, count + len(delta.tokens)
        for i, token in enumerate(delta.tokens):
            piece = stream.step(tokenizer.backend_tokenizer, token)  # pyright: ignore
            style = COLOURS[i % len(COLOURS)] if i < delta.accepted else "bold"
            console.print(Text(piece or "", style=style), end="", soft_wrap=True)
        if delta.finish is not None:
            break
    console.print()
    if delta.finish == "error":
        print(f"error: {delta.error}", file=sys.stderr)
        return 1
    told = f"{count} tokens in {rounds} rounds: {count / rounds:.2f} tokens a round"
    Console(stderr=True, highlight=False).print(told, style="dim")
    return 0


def prompt_tokens(tokenizer: object, prompt: str) -> tuple[int, ...]:
    """A question, ready for its answer."""
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(  # pyright: ignore
        turns, tokenize=False, add_generation_prompt=True
    )
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])  # pyright: ignore
