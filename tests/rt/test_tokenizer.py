import json
import os
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin
from tokenizers import Regex, normalizers
from transformers import CLIPTokenizer

from rt.errors import BundleError, CheckpointError, ConfigError
from rt.tokenizer import MAX_CHARACTERS, SPACES, Tokenizer, from_folder

FOLDER = Path(__file__).parents[1] / "data" / "tokenizer"
START, END = 2310, 2311
MAX_LENGTH = 16

PIECES = [
    *("red", "Happy", "face", "don't", "THEY'LL", "we've", "'S", "''", "1234", "½", "Ⅷ", "٣", "(best:1.3)"),
    *("!", "!!", ".", "...", "“q”", "&amp;", "$A", ":", "<|", "|>", "<cat-toy>", "<Dog>", "<dog>"),
    *("<|startoftext|>", "<|endoftext|>", "<|EndOfText|>", "<|STARTOFTEXT|>"),
    *("é", "e\u0301", "ß", "İ", "Å", "\ufb01", "ſ", "ΑΣ", "漢字", "😀", "👩\u200d👩\u200d👧"),
    *("  ", "\r\n", *" \t\n\r\0\a\x1b\x7f\x85\xa0\u2028\u200d\u3000\ufeff\U0010ffff"),
]


def random_text(rng: random.Random) -> str:
    code_points = [*range(0x20, 0x250), *(rng.randrange(0xE000, 0x110000) for _ in range(100))]
    kinds = [
        lambda n: "".join(rng.choices(PIECES, k=n)),
        lambda n: " ".join(rng.choices(PIECES, k=3 * n)),
        lambda n: "".join(map(chr, rng.choices(code_points, k=2 * n))),
        lambda n: "".join(chr(rng.randrange(0xD800)) for _ in range(n)),
    ]
    return rng.choice(kinds)(rng.randrange(16))


def write_folder(folder: Path, **files: object) -> Path:
    """A vocabulary of 1,800 merges with other configs."""
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("*config.json", "*map.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def token(content: str, normalized: bool) -> dict[str, object]:
    how = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": normalized}
    return {"content": content, **how}


GOLDEN = {
    "": [],
    "grinning face": [882, 537],
    "A  RED\theart, 100%!": [320, 589, 588, 267, 272, 271, 271, 4, 256],
    "don't": [67, 515, 6, 339],
    "😀 é漢": [172, 253, 246, 478, 127, 102, 162, 120, 351],
    "<|endoftext|>red": [END, 589],
}

START_TOKEN, END_TOKEN = token("<|startoftext|>", True), token("<|endoftext|>", True)
STRINGS = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
DICTS = {"bos_token": START_TOKEN, "eos_token": END_TOKEN, "unk_token": END_TOKEN}
DECODER = {str(START): START_TOKEN, str(END): END_TOKEN}

LAYOUTS = {
    "bare": {},
    "strings": {"special_tokens_map": {**STRINGS, "pad_token": "<|endoftext|>"}},
    "sd1": {"special_tokens_map": {**DICTS, "pad_token": "<|endoftext|>"}},
    "config only": {"tokenizer_config": {**STRINGS, "pad_token": "!"}},
    "sd2: the map beats the config": {
        "special_tokens_map": {**DICTS, "pad_token": "!"},
        "tokenizer_config": {"pad_token": "<|endoftext|>"},
    },
    "sdxl: the decoder beats the map": {
        "special_tokens_map": {**DICTS, "pad_token": "<|endoftext|>"},
        "tokenizer_config": {
            **STRINGS,
            "pad_token": "!",
            "added_tokens_decoder": {"0": token("!", False), **DECODER},
        },
    },
    "textual inversion": {
        "special_tokens_map": {**DICTS, "pad_token": "<|endoftext|>"},
        "added_tokens": {"<cat-toy>": END + 1, "<Dog>": END + 2, "<|endoftext|>": END},
    },
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return from_folder(FOLDER, MAX_LENGTH)


def check_against_transformers(folder: Path, texts: list[str]) -> None:
    ours, theirs = from_folder(folder, MAX_LENGTH), CLIPTokenizer.from_pretrained(folder)
    for text in texts:
        whole = theirs(text, return_offsets_mapping=True)
        padded = theirs(text, padding="max_length", truncation=True, max_length=MAX_LENGTH)
        tokens = ours(text)
        assert tokens.ids.tolist() == padded["input_ids"], repr(text)
        assert tokens.count == len(whole["input_ids"]), repr(text)
        fits = tokens.count <= MAX_LENGTH
        dropped = "" if fits else text[whole["offset_mapping"][MAX_LENGTH - 1][0] :]
        assert tokens.dropped == dropped, repr(text)


def test_parity_with_transformers():
    rng = random.Random()
    check_against_transformers(FOLDER, ["", *PIECES, *(random_text(rng) for _ in range(2000))])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parity_for_every_layout_of_the_configs(layout, tmp_path):
    folder = write_folder(tmp_path / "tokenizer", **LAYOUTS[layout])
    rng = random.Random()
    check_against_transformers(folder, [*PIECES, *(random_text(rng) for _ in range(300))])


def test_parity_for_tokenizer_json_alone(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "tokenizer.json")
    rng = random.Random()
    check_against_transformers(tmp_path, [*PIECES, *(random_text(rng) for _ in range(300))])


# Textual inversions: their names, and how many vectors each has.
INVERSIONS = {"<style>": 2, "<one>": 1, "sks": 3, "<Upper Case>": 4, "*": 2, "<five>": 5, "é": 2}
INVERTED = [
    *INVERSIONS,
    *(
        "<style>_1",
        "<style>_2",
        "<STYLE>",
        "<Style>",
        "<style",
        "SKS",
        "sksy",
        "masks",
        "<upper case>",
        "<five>_4",
    ),
    *("<style>.", "(<style>:1.2)", "a<style>b", "<style><style>", "sks,sks", "**", "E\u0301", "É"),
]


def write_inversions(folder: Path, inversions: dict[str, int]) -> Path:
    """As diffusers' `load_textual_inversion` and `save_pretrained` do."""
    theirs = CLIPTokenizer.from_pretrained(FOLDER)
    for name, vectors in inversions.items():
        theirs.add_tokens([name, *(f"{name}_{i}" for i in range(1, vectors))])
    theirs.save_pretrained(folder)
    return folder


def check_against_diffusers(folder: Path, ours: Tokenizer, texts: list[str]) -> None:
    theirs = CLIPTokenizer.from_pretrained(folder)
    for text in texts:
        converted = TextualInversionLoaderMixin().maybe_convert_prompt(text, theirs)
        padded = theirs(converted, padding="max_length", truncation=True, max_length=MAX_LENGTH)
        assert ours(text).ids.tolist() == padded["input_ids"], repr(text)
        assert ours(text).count == len(theirs(converted)["input_ids"]), repr(text)


def test_textual_inversions_of_several_vectors(tmp_path):
    folder = write_inversions(tmp_path / "tokenizer", INVERSIONS)
    ours = from_folder(folder, MAX_LENGTH)
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    pieces = [*INVERTED, *PIECES]
    texts = [rng.choice((" ", "", ", ")).join(rng.choices(pieces, k=rng.randrange(9))) for _ in range(1000)]
    check_against_diffusers(folder, ours, [*INVERTED, "a red heart in <style> style", *texts])
    ours.save(tmp_path / "bundled.json")
    check_against_diffusers(folder, Tokenizer.open(tmp_path / "bundled.json"), texts[:100])


def test_many_vectors_are_no_more_than_a_prompt_has_room_for(tmp_path):
    folder = write_inversions(tmp_path / "tokenizer", {"<many>": 3000})
    ours = from_folder(folder, MAX_LENGTH)
    check = CLIPTokenizer.from_pretrained(folder).convert_tokens_to_ids
    tokens = ours("<many> " * 2000)
    assert tokens.ids.tolist()[:5] == [START, *(check(f"<many>{end}") for end in ("", "_1", "_2", "_3"))]
    assert tokens.dropped.startswith("<many>_14 <many>_15")


def test_golden(tokenizer):
    for text, ids in GOLDEN.items():
        assert tokenizer(text).ids.tolist() == [START, *ids] + [END] * (MAX_LENGTH - 1 - len(ids))


def test_padding_comes_from_the_folder(tmp_path):
    folder = write_folder(tmp_path / "sd2", special_tokens_map={**DICTS, "pad_token": "!"})
    assert from_folder(folder, MAX_LENGTH)("").ids.tolist() == [START, END] + [0] * (MAX_LENGTH - 2)


def test_ids_are_int64_of_max_length(tokenizer):
    for text in ("", "red", "red " * 100):
        assert tokenizer(text).ids.dtype == np.int64
        assert tokenizer(text).ids.shape == (MAX_LENGTH,)


def test_warning_names_what_was_dropped(tokenizer):
    assert tokenizer("red face").warning == ""
    tokens = tokenizer("1 2 3 4 5 6 7 8 9 0 1 2 3 4 Red  Éclair")
    assert tokens.dropped == "Red  Éclair"
    assert tokens.warning == (
        f"the prompt has {tokens.count} tokens; this model reads 16; dropped: Red  Éclair"
    )


def test_long_prompts_read_as_transformers_reads_them():
    """Full of spaces, of one character, of what Unicode composes; before, between and behind the words."""
    ours, theirs = from_folder(FOLDER, 77), CLIPTokenizer.from_pretrained(FOLDER)
    rng = random.Random()
    kinds = [
        " ",
        "\n",
        "\u3000",
        " \t\r\n\x85\xa0\u2028",
        "a",
        "=",
        "<|",
        "e\u0301",
        "\u1112\u1161\u11ab",
        "😀",
        "\x1f",
        "\u200b",
    ]
    for kind in kinds:
        for count in (5000, MAX_CHARACTERS + 1):
            filler = kind * (count // len(kind) + 1)
            for text in (
                filler + "red face",
                "red" + filler + "face",
                " ".join(rng.choices(PIECES, k=9)) + filler,
            ):
                expected = theirs(text, padding="max_length", truncation=True, max_length=77)["input_ids"]
                assert ours(text).ids.tolist() == expected, (kind, count)


def test_spaces_are_those_of_the_tokenizer():
    folding = normalizers.Replace(Regex(r"\s+"), " ")
    for code in (*range(0xD800), *range(0xE000, 0x10000)):
        assert (SPACES.sub(" ", f"a{chr(code)}") == "a ") == (
            folding.normalize_str(f"a{chr(code)}") == "a "
        ), hex(code)


def test_a_warning_is_of_bounded_length(tokenizer):
    assert len(tokenizer("red " * 10000).warning) < 600


def test_what_is_cut_before_tokenizing_is_dropped(tokenizer):
    spaces = " " * MAX_CHARACTERS
    assert tokenizer(spaces).dropped == ""
    assert tokenizer(spaces + "red").dropped == ""
    digits = "1" * 10 * MAX_CHARACTERS
    tokens = tokenizer(digits)
    assert tokens.count == MAX_CHARACTERS + 2
    assert tokens.dropped == digits[MAX_LENGTH - 2 :]


def test_save_and_open(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    opened = Tokenizer.open(path)
    rng = random.Random()
    for text in (random_text(rng) for _ in range(200)):
        np.testing.assert_array_equal(opened(text).ids, tokenizer(text).ids)
        assert opened(text).dropped == tokenizer(text).dropped
    opened.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_threads_share_one(tokenizer):
    rng = random.Random()
    texts = [random_text(rng) for _ in range(2000)]
    expected = [tokenizer(text).ids.tolist() for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert [tokens.ids.tolist() for tokens in pool.map(tokenizer, texts)] == expected


@pytest.mark.parametrize("text", ["\udcff", None, b"red"])
def test_prompt_that_is_no_text(tokenizer, text):
    with pytest.raises(ConfigError, match="not a string of valid Unicode"):
        tokenizer(text)


@pytest.mark.parametrize("content", [None, b"", b"\xff", b"{}", b'{"version": "1.0"}'])
def test_open_refuses_what_is_no_tokenizer(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError, match=r"tokenizer\.json.*build the bundle again"):
        Tokenizer.open(path)


def test_open_refuses_a_tokenizer_without_length(tmp_path, tokenizer):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "truncation": None}))
    with pytest.raises(BundleError, match="without truncation and padding"):
        Tokenizer.open(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", None, r"vocab\.json is missing"),
        ("merges.txt", None, r"merges\.txt is missing"),
        ("vocab.json", b"{", r"vocab\.json is not JSON"),
        ("vocab.json", b"[]", r"vocab\.json holds a JSON list"),
        ("vocab.json", b"\xff", r"vocab\.json is not JSON \(not UTF-8"),
        ("vocab.json", b'{"<|startoftext|>": 0}', r"'<\|endoftext\|>' is not in the vocabulary"),
        ("vocab.json", b'{"<|startoftext|>": "a", "<|endoftext|>": 1}', "as 'a': expected a number"),
        ("merges.txt", b"#version: 0.2\nq q q\n", "do not fit together"),
        ("merges.txt", b"zzz yyy\n", "do not fit together"),
        ("tokenizer.json", b"{}", r"not a CLIP tokenizer: KeyError .*model"),
        ("tokenizer_config.json", b'{"pad_token": 3}', "not a CLIP tokenizer: TypeError"),
        ("special_tokens_map.json", b'{"pad_token": "<pad>"}', "'<pad>' is not in the vocabulary"),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"x": "!"}}',
            "not a CLIP tokenizer: ValueError",
        ),
    ],
)
def test_folder_with_a_bad_file(tmp_path, name, content, message):
    folder = write_folder(tmp_path / "tokenizer")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        from_folder(folder, MAX_LENGTH)


FILES = ["vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json"]


@pytest.mark.parametrize("name", [*FILES, "special_tokens_map.json", "added_tokens.json"])
def test_folder_with_a_git_lfs_pointer(tmp_path, name):
    folder = write_folder(tmp_path / "tokenizer")
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1059962\n")
    with pytest.raises(CheckpointError, match=rf"{name} is a git-lfs pointer, not the file: run `git lfs"):
        from_folder(folder, MAX_LENGTH)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_folder_with_a_file_that_is_none(tmp_path, name, make):
    folder = write_folder(tmp_path / "tokenizer")
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read: (Is a directory|a pipe|a device)"):
        from_folder(folder, MAX_LENGTH)


def test_no_room_for_a_word():
    with pytest.raises(ConfigError, match="at least 3"):
        from_folder(FOLDER, 2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab", {"a": "1"}, "the vocabulary has 'a' as '1': expected a number of its own, 0 to 1,048,575"),
        ("vocab", {"a": True}, "'a' as True"),
        ("vocab", {"a": -1}, "'a' as -1"),
        ("vocab", {"a": 10**400}, "'a' as 1000"),
        ("vocab", {"a": 3, "b": 3}, "'b' as 3"),
        ("added_tokens", {"<a>": 1, "<b>": "2"}, "is not a CLIP tokenizer: TypeError"),
        ("tokenizer_config", {"added_tokens_decoder": {"x": "<a>"}}, "is not a CLIP tokenizer: ValueError"),
        (
            "tokenizer_config",
            {"added_tokens_decoder": {"1": {"content": 3}}},
            "is not a CLIP tokenizer: TypeError",
        ),
        ("special_tokens_map", {"bos_token": "x" * 10**5}, "the special token 'xxxxx"),
        (
            "tokenizer",
            {"model": {"vocab": {}, "merges": [3]}, "added_tokens": []},
            "is not a CLIP tokenizer: TypeError",
        ),
    ],
)
def test_values_of_other_types(tmp_path, name, content, message):
    folder = write_folder(tmp_path / "tokenizer", **{name: content})
    with pytest.raises(CheckpointError) as caught:
        from_folder(folder, MAX_LENGTH)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
