"""The bodies of requests: names and types; what their values may be is in `checks`.

Fields that a request does not give are None where the model has a default of its own. Unknown
fields are taken and ignored, as vLLM and OpenAI's own clients expect.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

INT64 = 2**63
Token = Annotated[int, Field(ge=0)]


class Fields(BaseModel):
    """Known fields with their types, and any others."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class Body(Fields):
    """What all bodies share; without a name, the one served model is meant."""

    model: str | None = None


class StreamOptions(Fields):
    """Whether a stream ends in a chunk of usage, and whether every chunk carries it."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ResponseFormat(Fields):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None


class StructuredOutputs(Fields):
    """vLLM's way to ask for an answer of a form; exactly one is given."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Generation(Body):
    """How to make an answer: the fields completions and chat completions share."""

    max_tokens: int | None = None
    min_tokens: int = 0
    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: Annotated[int, Field(ge=-INT64, le=INT64 - 1)] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stop_token_ids: list[Token] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    echo: bool = False
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    priority: int = 0
    user: str | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    speculate: bool = True
    """Ours: false decodes plainly, without a draft."""
    dspark_details: bool = False
    """Ours: chunks say which of their tokens were drafted."""


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: str | list[str] | list[Token] | list[list[Token]] | None = None
    logprobs: int | None = None
    add_special_tokens: bool = True


class Message(Fields):
    """A turn of a conversation; what else it holds is handed to the template."""

    role: str
    content: str | list[dict[str, Any]] | None = None


class Templated(Body):
    """How a conversation becomes a prompt."""

    messages: list[Message]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: str | None = None


class ChatRequest(Templated, Generation):
    """POST /v1/chat/completions."""

    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None


class TokenizePrompt(Body):
    """POST /tokenize with a text."""

    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChat(Templated):
    """POST /tokenize with a conversation."""

    return_token_strs: bool = False


class DetokenizeRequest(Body):
    """POST /detokenize."""

    tokens: list[Token]
