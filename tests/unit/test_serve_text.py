"""Incremental text is the whole text, and stop strings cut where a search of the whole would."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from dspark_jax.serve.http.text import Detokeniser, StopStrings
from tests.serving import VOCABULARY, tokenizer

TOKENS = st.lists(st.integers(0, VOCABULARY - 1), max_size=40)


def text_of(tokens: list[int], skip: bool, prompt: tuple[int, ...] = ()) -> str:
    """The text of tokens that came one at a time."""
    detokeniser = Detokeniser(tokenizer(), skip, prompt)
    return "".join(map(detokeniser.step, tokens)) + detokeniser.finish()


@given(st.text(max_size=40), st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_text_comes_back_whatever_its_alphabet(text: str, skip: bool) -> None:
    tokens = tokenizer()(text)["input_ids"]
    assert text_of(tokens, skip) == tokenizer().decode(tokens, skip_special_tokens=skip)


@given(TOKENS, st.booleans())
@settings(max_examples=100, deadline=None)
def test_any_tokens_at_all_become_text(tokens: list[int], skip: bool) -> None:
    found = text_of(tokens, skip)
    whole = tokenizer().decode(tokens, skip_special_tokens=skip)
    # Bytes that are no character are shown, though not always by as many signs.
    assert found.replace("\ufffd", "") == whole.replace("\ufffd", "")


def test_a_character_comes_when_its_last_byte_has() -> None:
    tokens = tokenizer()("🙂")["input_ids"]
    assert len(tokens) == 4
    detokeniser = Detokeniser(tokenizer(), True)
    assert [detokeniser.step(token) for token in tokens] == ["", "", "", "🙂"]
    assert detokeniser.finish() == ""


def test_an_unfinished_character_is_shown_at_the_end() -> None:
    tokens = tokenizer()("a🙂")["input_ids"]
    assert text_of(tokens[:-1], True) == tokenizer().decode(tokens[:-1])


@pytest.mark.parametrize("prompt", [(), (9, 10), tuple(range(300, 340)), (0, 2)])
def test_the_prompt_is_no_part_of_the_answer(prompt: tuple[int, ...]) -> None:
    tokens = tokenizer()("hello 🙂")["input_ids"]
    assert text_of(tokens, True, prompt) == "hello 🙂"
    broken = (*prompt, *tokenizer()("🙂")["input_ids"][:2])
    assert text_of(tokens, True, broken) == "hello 🙂"


SHORT = st.text("ab", max_size=12)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3).map(tuple)


def first_stop(text: str, stops: tuple[str, ...], sizes: list[int]) -> tuple[int, str] | None:
    """Piece after piece: the leftmost stop string of those that are there."""
    for end in sizes:
        found = [(text[:end].find(stop), stop) for stop in stops if stop in text[:end]]
        if found:
            return min(found, key=lambda match: match[0])
    return None


@given(st.lists(SHORT, max_size=8), STOPS, st.booleans())
@settings(max_examples=300, deadline=None)
def test_stop_strings_cut_as_a_search_of_the_whole(
    pieces: list[str], stops: tuple[str, ...], keep: bool
) -> None:
    watch, given_out = StopStrings(stops, keep), ""
    for piece in pieces:
        given_out += watch.push(piece)
        if watch.found:
            break
    whole = "".join(pieces)
    sizes = [len("".join(pieces[: i + 1])) for i in range(len(pieces))]
    if (match := first_stop(whole, stops, sizes)) is None:
        assert watch.found is None and given_out + watch.finish() == whole
    else:
        begin, stop = match
        assert watch.found == stop
        assert given_out == whole[: begin + (len(stop) if keep else 0)]


@given(st.lists(SHORT, max_size=8), STOPS)
@settings(max_examples=200, deadline=None)
def test_only_what_may_begin_a_stop_string_is_held(
    pieces: list[str], stops: tuple[str, ...]
) -> None:
    watch, given_out, arrived = StopStrings(stops), "", ""
    for piece in pieces:
        arrived += piece
        given_out += watch.push(piece)
        if watch.found:
            break
        held = arrived[len(given_out) :]
        assert arrived.startswith(given_out)
        assert not held or any(stop.startswith(held) for stop in stops)


def test_unarmed_stop_strings_may_begin_but_not_end() -> None:
    watch = StopStrings(("aab",))
    assert watch.push("aab", armed=False) == "aab" and watch.found is None
    assert watch.push("aa", armed=False) == "" and watch.found is None
    assert watch.push("b") == "" and watch.found == "aab"


def llama_like() -> PreTrainedTokenizerFast:
    """Words with their space before them, dropped in front of the first; bytes for the rest."""
    words = ["<unk>", "\u2581one", "\u2581two", "three"]
    vocabulary = {token: i for i, token in enumerate(words + [f"<0x{i:02X}>" for i in range(256)])}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    replace, strip = decoders.Replace("\u2581", " "), decoders.Strip(" ", 1, 0)
    steps = [replace, decoders.ByteFallback(), decoders.Fuse(), strip]
    made.decoder = decoders.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


@pytest.mark.parametrize(
    ("prompt", "tokens", "text"),
    [
        ((), [1, 2, 3], "one twothree"),
        ((1,), [2, 3], " twothree"),
        ((1, 2), [1, *(4 + byte for byte in "é".encode()), 2], " oneé two"),
        ((1, 4 + 0xF0), [2], " two"),
        ((1,), [4 + 0xF0], "\ufffd"),
    ],
)
def test_a_decoder_that_drops_the_first_space_drops_the_prompts(
    prompt: tuple[int, ...], tokens: list[int], text: str
) -> None:
    detokeniser = Detokeniser(llama_like(), True, prompt)
    assert "".join(map(detokeniser.step, tokens)) + detokeniser.finish() == text
