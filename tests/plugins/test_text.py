"""Streaming text equals the text of the whole, for any tokens, pushed in any pieces; stop strings end it where they should."""

import functools
import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_text.codec import Codec
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from kernel_core.contexts import ModelInfo
from kernel_core.errors import ConfigError, RequestError
from kernel_core.protocols import TextCodec
from kernel_core.request import SamplingParams

CORPUS = ["the cat sat on the mat, naïve façade ", "你好世界 你好 世", "👩‍👩‍👧 🏳️‍🌈 flags", "def f(x):\n    return x + 1\n"] * 20
SPECIAL = ["<s>", "</s>", "<|é end|>"]
BROKEN = "\N{REPLACEMENT CHARACTER}"


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet))
    tokenizer.add_tokens([AddedToken("<tool call>", special=False)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As in Llama 2: spaces are "▁", unknown characters are bytes, the first space of a text is dropped."""
    words = ["▁the", "▁cat", "▁", "t", "h", "e", "c", "a", "s", "o", "n", "m", ",", "你", "▁naï", "."]
    vocab = {token: i for i, token in enumerate(["<unk>", *SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def word_piece() -> Tokenizer:
    words = ["[UNK]", "the", "cat", "##s", "##at", ",", ".", "don", "'", "t", "mat", "is"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


KINDS = {"byte_level": byte_level, "byte_fallback": byte_fallback, "word_piece": word_piece}


@functools.cache
def codec_of(kind: str, folder: Path) -> Codec:
    path = folder / kind
    path.mkdir()
    KINDS[kind]().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    return Codec(ModelInfo(str(path), "safetensors", {"eos_token_id": 300}, {"eos_token_id": [301, 302]}))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


def streamed(codec: Codec, ids: list[int], cuts: list[int], prompt: list[int] = (), **params) -> str:
    stream = codec.stream(prompt, SamplingParams(**params))
    edges = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    return "".join(stream.push(ids[a:b])[0] for a, b in itertools.pairwise(edges)) + stream.flush()


ids_of = {kind: st.lists(st.integers(0, make().get_vocab_size() - 1), max_size=40) for kind, make in KINDS.items()}
cuts_of = st.lists(st.integers(0, 40), max_size=6)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_tokens_in_any_pieces_give_the_text_of_the_whole(kind, folder, data):
    codec = codec_of(kind, folder)
    ids, cuts, skip = data.draw(ids_of[kind]), data.draw(cuts_of), data.draw(st.booleans())
    whole = codec.decode(ids, skip_special_tokens=skip)
    text = streamed(codec, ids, cuts, skip_special_tokens=skip)
    if kind == "byte_level":
        # Incomplete at the end, and dropped. Half a surrogate is two broken characters to tokenizers and one to Python.
        assert text in {whole, whole.removesuffix(BROKEN), whole.removesuffix(2 * BROKEN)}
    elif BROKEN not in whole:
        assert text == whole


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@settings(deadline=None, max_examples=150)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters=BROKEN), max_size=30), cuts=cuts_of)
def test_real_text_is_never_shown_half(kind, folder, text, cuts):
    codec = codec_of(kind, folder)
    ids = codec.encode(text)
    stream, shown = codec.stream([], SamplingParams()), ""
    for token in ids:
        shown += stream.push([token])[0]
        assert BROKEN not in shown and codec.decode(ids).startswith(shown)
    assert shown + stream.flush() == streamed(codec, ids, cuts) == codec.decode(ids)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("kept", [1, 2])
def test_a_prompt_that_ends_in_half_a_character_shows_that_character_and_nothing_of_the_prompt(kind, kept, folder):
    codec = codec_of(kind, folder)
    if kind == "byte_level":
        letter = codec.tokenizer.token_to_id
        half = [letter(piece) for piece in ("æ", "½", "°")]  # 0xE6 0xBD 0xB0: 潰 minus its last byte's neighbours
    else:
        half = [codec.tokenizer.token_to_id(f"<0x{byte}>") for byte in ("E6", "BD", "B0")]
    prompt = codec.encode("the cat") + half[:kept]
    assert streamed(codec, half[kept:] + codec.encode("t"), [1, 2, 3], prompt).strip() in {"潰t", "潰 t"}


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_real_replacement_character_at_the_end_of_the_prompt_is_not_shown_again(kind, folder):
    codec = codec_of(kind, folder)
    prompt = codec.encode("cat" + BROKEN)
    assert streamed(codec, codec.encode("th"), [1], prompt).strip() == "th"


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_completion_cut_inside_a_character_drops_it_and_keeps_what_came_before(kind, folder):
    codec = codec_of(kind, folder)
    ids = codec.encode("the ☃")[:-1]
    assert streamed(codec, ids, []) == streamed(codec, ids, list(range(len(ids)))) == "the "


def test_special_tokens_show_only_on_request_and_others_always(folder):
    codec = codec_of("byte_level", folder)
    ids = [*codec.encode("cat"), codec.tokenizer.token_to_id("<|é end|>"), codec.tokenizer.token_to_id("<tool call>")]
    assert streamed(codec, ids, [1]) == "cat<tool call>"
    assert streamed(codec, ids, [1], skip_special_tokens=False) == "cat<|é end|><tool call>"


def test_ids_beyond_the_tokenizer_are_no_text(folder):
    codec = codec_of("byte_level", folder)
    assert streamed(codec, [*codec.encode("cat"), 5000, *codec.encode("cat")], []) == "catcat"


# ---- stop strings -------------------------------------------------------------------------------------------------


def expected(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The definition: the stop string that is complete first (of several at one place, the longest) ends the text."""
    for end in range(len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            stop = max(done, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(deadline=None, max_examples=300)
@given(
    text=st.text("ab你 ", max_size=16),
    stops=st.lists(st.text("ab你 ", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
    cuts=cuts_of,
)
def test_stop_strings_over_token_borders(folder, text, stops, include, cuts):
    codec = codec_of("byte_level", folder)
    ids = codec.encode(text)
    stream = codec.stream([], SamplingParams(stop=stops, include_stop_str_in_output=include))
    edges = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    shown, found, counted = "", None, 0
    for a, b in itertools.pairwise(edges):
        new, found, count = stream.push(ids[a:b])
        shown, counted = shown + new, counted + count
        assert expected(text, stops, include)[0].startswith(shown)
        if found:
            break
    shown += "" if found else stream.flush()
    assert (shown, found) == expected(text, stops, include)
    enough = [n for n in range(len(ids) + 1) if expected(codec.decode(ids[:n]).rstrip(BROKEN), stops, include)[1]]
    assert counted == (enough[0] if enough else len(ids))


def test_only_a_possible_beginning_of_a_stop_string_is_held_back(folder):
    codec = codec_of("byte_level", folder)
    stream = codec.stream([], SamplingParams(stop=["mat!"]))
    assert stream.push(codec.encode("the cat"))[0] == "the cat"
    assert stream.push(codec.encode(" m"))[0] == " "
    assert stream.push(codec.encode("e"))[0] == "me"


def test_min_tokens_delays_stop_strings(folder):
    codec = codec_of("byte_level", folder)
    stream = codec.stream([], SamplingParams.of(stop=["a"], min_tokens=2))
    ids = [codec.tokenizer.token_to_id("a")] * 4
    assert stream.push(ids) == ("aa", "a", 3)


# ---- the codec ----------------------------------------------------------------------------------------------------


def test_end_tokens_are_those_of_all_three_files(folder):
    codec = codec_of("byte_level", folder)
    assert isinstance(codec, TextCodec)
    assert codec.eos_ids == {300, 301, 302, codec.tokenizer.token_to_id("</s>")}


def chat_codec(path: Path, template: str | None) -> Codec:
    path.mkdir()
    byte_level().save(str(path / "tokenizer.json"))
    settings_ = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings_ | ({"chat_template": template} if template else {})))
    return Codec(ModelInfo(str(path), "safetensors", {}))


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if tools %}T{{ tools | length }}{% endif %}{{ mood or '' }}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_chats_are_rendered_with_the_models_template(tmp_path):
    codec = chat_codec(tmp_path / "m", TEMPLATE)
    user = [{"role": "user", "content": "the cat"}]
    ids = codec.apply_chat_template(user, template_args={"mood": "!"})
    assert ids[0] == codec.tokenizer.token_to_id("<s>") and codec.decode(ids) == "[user]the cat![assistant]"
    assert codec.decode(codec.apply_chat_template(user, tools=[{"type": "function"}], add_generation_prompt=False)).endswith("T1")
    assert codec.decode(codec.apply_chat_template(user, template="{{ messages[0].content }}")) == "the cat"
    with pytest.raises(RequestError, match="no system here"):
        codec.apply_chat_template([{"role": "system", "content": "x"}])
    with pytest.raises(RequestError, match="non-empty list of messages"):
        codec.apply_chat_template([])


def test_a_model_without_a_chat_template_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match="no chat template: pass `template`"):
        chat_codec(tmp_path / "m", None).apply_chat_template([{"role": "user", "content": "x"}])


def test_a_tokenizer_that_cannot_be_loaded_is_refused(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no tokenizer can be loaded"):
        Codec(ModelInfo(str(tmp_path), "safetensors", {}))


def test_a_checkpoint_without_a_tokenizer_takes_and_gives_token_ids_only(tmp_path, caplog):
    codec = Codec(ModelInfo(str(tmp_path), "safetensors", {"eos_token_id": 2}))
    assert "has no tokenizer" in caplog.text
    assert codec.eos_ids == {2}
    stream = codec.stream([1], SamplingParams())
    assert stream.push([5, 6])[0] + stream.flush() == ""
    with pytest.raises(RequestError, match="send token ids"):
        codec.encode("hello")
    with pytest.raises(RequestError, match="no chat template"):
        codec.apply_chat_template([{"role": "user", "content": "hello"}])


def test_half_a_surrogate_is_refused_and_no_chat_is_not_an_accident(folder):
    codec = codec_of("byte_level", folder)
    with pytest.raises(RequestError, match="no valid Unicode"):
        codec.encode("a\ud800")
    for chat in (None, 5, [], [5], "hello", [{"content": "no role"}]):
        with pytest.raises(RequestError, match="a chat is"):
            codec.apply_chat_template(chat)
