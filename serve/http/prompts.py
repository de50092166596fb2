"""Prompts as token ids: texts and conversations, tokenised away from the event loop."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from dspark_jax.serve.http.checks import in_vocabulary
from dspark_jax.serve.http.errors import bad, shortened, valid_unicode
from dspark_jax.serve.http.protocol import CompletionRequest, Message, Templated
from dspark_jax.serve.http.settings import HttpSettings, ServedModel

Result = TypeVar("Result")

EMPTY = "Either prompt or prompt_embeds must be provided and non-empty."
RESERVED = frozenset(
    "conversation messages tools documents chat_template add_generation_prompt tokenize "
    "continue_final_message padding truncation max_length return_tensors return_dict "
    "return_assistant_tokens_mask tokenizer_kwargs".split()
)
"""Arguments of apply_chat_template that `chat_template_kwargs` may not set."""


class Prompts:
    """Makes prompts in a few threads; tokenizers work without Python's lock."""

    def __init__(self, model: ServedModel, settings: HttpSettings):
        self._model = model
        self._most = settings.max_answers
        self._pool = ThreadPoolExecutor(settings.tokenise_threads, "tokenise")
        # The first call drops truncation and padding that tokenizer.json may ask for; done here,
        # no later call changes what other threads are reading.
        model.tokenizer("")
        tokens = model.tokenizer.get_vocab()
        self._max_chars = model.max_model_len * max(map(len, tokens), default=1)

    def close(self) -> None:
        """Let the threads go."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def completion(self, request: CompletionRequest) -> list[tuple[int, ...]]:
        """The prompts of a completion, one or several."""
        asked = request.prompt
        if asked is None or len(asked) == 0:
            raise bad(EMPTY, "prompt")
        several: Sequence[str | list[int]]
        several = [asked] if isinstance(asked, str) or isinstance(asked[0], int) else asked  # pyright: ignore[reportAssignmentType]
        if len(several) * request.n > self._most:
            raise bad(
                f"a request has at most {self._most} answers, prompts times n; "
                f"got {len(several) * request.n}.",
                "prompt",
            )
        return [await self._one(prompt, request.add_special_tokens) for prompt in several]

    async def chat(self, request: Templated) -> tuple[int, ...]:
        """The prompt of a conversation: the checkpoint's template, rendered in a sandbox."""
        text = await self._away(lambda: rendered(request, self._model))
        return await self._one(text, request.add_special_tokens, "messages")

    async def text(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        """The tokens of a text, which may be empty."""
        self._short_enough(text, "prompt")
        return await self._away(lambda: self._tokenise(text, add_special_tokens, "prompt"))

    async def _one(
        self, prompt: str | list[int], add_special_tokens: bool, param: str = "prompt"
    ) -> tuple[int, ...]:
        if isinstance(prompt, str):
            self._short_enough(prompt, param)
            tokens = await self._away(lambda: self._tokenise(prompt, add_special_tokens, param))
        else:
            tokens = tuple(prompt)
            for token in tokens:
                in_vocabulary(token, self._model, param)
        if not tokens:
            raise bad(EMPTY, param)
        self._fits(len(tokens))
        return tokens

    def _short_enough(self, text: str, param: str) -> None:
        """A text of more characters than that many tokens hold need not be tokenised."""
        if len(text) > self._max_chars:
            raise bad(
                f"This model's maximum context length is {self._model.max_model_len} tokens, and "
                f"no more than {self._max_chars} characters. However, your prompt contains "
                f"{len(text)} characters. Please reduce the length of the input prompt.",
                "input_tokens",
                len(text),
            )

    def _fits(self, count: int) -> None:
        longest = self._model.max_model_len
        if count >= longest:
            raise bad(
                f"This model's maximum context length is {longest} tokens. However, your prompt "
                f"contains {count} input tokens, which exceeds this limit "
                f"{'even without any output tokens' if count > longest else 'with one of output'}. "
                "Please reduce the length of the input prompt.",
                "input_tokens",
                count,
            )

    def _tokenise(self, text: str, add_special_tokens: bool, param: str) -> tuple[int, ...]:
        valid_unicode(text, param)
        return tuple(
            self._model.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        )

    async def _away(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


def rendered(request: Templated, model: ServedModel) -> str:
    """The text of a conversation; 400 when the template does not take it."""
    if not request.messages:
        raise bad(
            "Cannot apply chat template to an empty conversation. Provide at least one message.",
            "messages",
        )
    if request.chat_template is not None:
        raise bad("the template is the model's own and not the request's", "chat_template")
    if request.add_generation_prompt and request.continue_final_message:
        raise bad(
            "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
            "continue_final_message",
        )
    kwargs = request.chat_template_kwargs or {}
    if taken := RESERVED & kwargs.keys():
        raise bad(f"chat_template_kwargs cannot set {min(taken)}", "chat_template_kwargs")
    template = model.chat_template or model.tokenizer.chat_template
    if template is None:
        raise bad("this model has no chat template; use /v1/completions", "messages")
    try:
        return model.tokenizer.apply_chat_template(
            [_turn(message) for message in request.messages],
            **kwargs,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
        )
    except Exception as error:  # a template is foreign code: it may raise anything
        raise bad(f"the chat template refuses this: {shortened(error)}", "messages") from None


def _turn(message: Message) -> dict[str, Any]:
    """A message as templates take it: its text in one piece."""
    found = message.model_dump(exclude_none=True)
    found["content"] = _text(message.content)
    return found


def _text(content: str | list[dict[str, Any]] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise bad(f"this model reads text only, not {shortened(part.get('type'))}", "messages")
    return "".join(part["text"] for part in content)
