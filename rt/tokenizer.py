"""CLIP's byte-pair tokenizer, on the `tokenizers` package alone.

The ids are those of transformers' `CLIPTokenizer.from_pretrained(folder)` with `padding="max_length"` and
`truncation=True`, which is how diffusers calls it. The steps are those of OpenAI's tokenizer
(github.com/openai/CLIP, clip/simple_tokenizer.py) without its repair of broken Unicode: NFC, one space for
any whitespace, lower case; split into words, single digits and runs of signs; bytes as printable characters;
merges within a word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors

from rt.checkpoint_file import read_bytes, read_json
from rt.errors import BundleError, CheckpointError, ConfigError, shown
from rt.json_file import read_bounded

# A prompt of 1 MB takes seconds to tokenize, and no model reads as far as this: 77 tokens of 200 characters. Spaces are
# no tokens, however many there are, so they are folded before the cut.
MAX_CHARACTERS = 16384
SPACES = re.compile(r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
SHOWN = 500

_MOST_IDS = 1 << 20

# In the order in which transformers adds them: where two differ in how they match, the last one counts.
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True, eq=False)
class Tokens:
    """A prompt as a text encoder reads it.

    Attributes:
        ids: int64 (max_length,): start, words, end, padding.
        count: Tokens with start and end, whether or not they fit; of the first 16,384 characters where there are more,
            with spaces folded.
        dropped: The end of the prompt that did not fit, "" when all of it did.
    """

    ids: NDArray[np.int64]
    count: int
    dropped: str

    @property
    def warning(self) -> str:
        """What to tell the user about `dropped`; "" when nothing was."""
        if not self.dropped:
            return ""
        return (
            f"the prompt has {self.count} tokens; this model reads {self.ids.size}; "
            f"dropped: {self.dropped[:SHOWN]}{'…' * (len(self.dropped) > SHOWN)}"
        )


class Tokenizer:
    """Prompt to token ids. `build` or `from_folder` makes one, `open` gets it from a bundle. Thread-safe."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._vectors = _vectors(tokenizer)

    @classmethod
    def build(
        cls,
        vocab: Mapping[str, int],
        merges: Sequence[str],
        *,
        max_length: int,
        bos_token: str,
        eos_token: str,
        pad_token: str,
        added_tokens: Sequence[AddedToken] = (),
    ) -> Tokenizer:
        """From a vocabulary and its merges, each "a b", the first to be merged first.

        Args:
            max_length: Length of the ids, with start and end; 77 in Stable Diffusion.
            added_tokens: Looked for in the text before it is split. Start, end and padding token join them.

        Raises:
            CheckpointError: Vocabulary, merges and special tokens do not fit together.
            ConfigError: `max_length` has no room for a word.
        """
        if max_length < 3:
            raise ConfigError(f"max_length is {max_length}: expected at least 3 (start, a word, end)")
        _check_ids(vocab)
        for token in (bos_token, eos_token, pad_token):
            if token not in vocab:
                raise CheckpointError(f"the special token {shown(token)} is not in the vocabulary")
        try:
            pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
            bpe = models.BPE(dict(vocab), pairs, unk_token=eos_token, end_of_word_suffix="</w>")
        except Exception as error:  # `tokenizers` raises the bare class
            raise CheckpointError(
                f"vocabulary and merges do not fit together: {shown(str(error))}"
            ) from error

        tokenizer = tokenizers.Tokenizer(bpe)
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos_token, "$A", eos_token],
            special_tokens=[(bos_token, vocab[bos_token]), (eos_token, vocab[eos_token])],
        )
        known = {token.content for token in added_tokens}
        specials = [token for token in (bos_token, eos_token, pad_token) if token not in known]
        tokenizer.add_tokens([*added_tokens, *(AddedToken(token, special=True) for token in specials)])
        tokenizer.enable_truncation(max_length)
        tokenizer.enable_padding(length=max_length, pad_id=vocab[pad_token], pad_token=pad_token)
        return cls(tokenizer)

    @classmethod
    def open(cls, path: Path) -> Tokenizer:
        """From the file that `save` wrote.

        Raises:
            BundleError: There is no such file, or it is not one of ours.
        """
        try:
            tokenizer = tokenizers.Tokenizer.from_str(read_bounded(path).decode("utf-8"))
        except Exception as error:  # `tokenizers` raises the bare class
            raise BundleError(f"cannot read the tokenizer {path}: {error}; build the bundle again") from error
        if tokenizer.truncation is None or tokenizer.padding is None:
            raise BundleError(f"{path} is a tokenizer without truncation and padding; build the bundle again")
        return cls(tokenizer)

    def save(self, path: Path) -> None:
        """As one file in the JSON format of `tokenizers`."""
        path.write_text(self._tokenizer.to_str(), encoding="utf-8")

    def __call__(self, text: str) -> Tokens:
        """The ids of a prompt.

        Raises:
            ConfigError: `text` has a lone surrogate, as from undecodable bytes on a command line.
        """
        try:
            text = self._written_out(SPACES.sub(" ", text) if len(text) > MAX_CHARACTERS else text)
            first = self._tokenizer.encode(text[:MAX_CHARACTERS])
        except TypeError as error:
            raise ConfigError(f"the prompt is not a string of valid Unicode: {ascii(text)[:80]}") from error
        rest = first.overflowing
        # Each piece of the rest has a start and an end of its own.
        count = sum(sum(encoding.attention_mask) for encoding in (first, *rest)) - 2 * len(rest)
        end = rest[0].offsets[1][0] if rest else MAX_CHARACTERS
        return Tokens(np.array(first.ids, np.int64), count, text[end:])

    def _written_out(self, text: str) -> str:
        """`text` with every vector of a textual inversion: what diffusers' `maybe_convert_prompt` makes of it.

        That reads the tokens in no order, which matters only where a token is a part of another one's.
        """
        head = text[:MAX_CHARACTERS]
        if not any(token in head for token in self._vectors):
            return text
        first = self._tokenizer.encode(head, add_special_tokens=False)
        for token in dict.fromkeys(token for piece in (first, *first.overflowing) for token in piece.tokens):
            head = head.replace(token, self._vectors.get(token, token))[: 2 * MAX_CHARACTERS]
        return head + text[MAX_CHARACTERS:]


def _check_ids(vocab: Mapping[str, int]) -> None:
    seen: set[int] = set()
    for token, index in vocab.items():
        if type(index) is not int or not 0 <= index < _MOST_IDS or index in seen:
            raise CheckpointError(
                f"the vocabulary has {shown(token)} as {shown(index)}: expected a number of its own, 0 to "
                f"{_MOST_IDS - 1:,}"
            )
        seen.add(index)


def _vectors(tokenizer: tokenizers.Tokenizer) -> dict[str, str]:
    """The added tokens that stand for several, "TOKEN" to "TOKEN TOKEN_1 …", and no more than a prompt has room for."""
    names = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    rest = range(1, tokenizer.truncation["max_length"] if tokenizer.truncation else 1)
    vectors = {name: [name, *takewhile(names.__contains__, (f"{name}_{i}" for i in rest))] for name in names}
    return {name: " ".join(tokens) for name, tokens in vectors.items() if len(tokens) > 1}


def from_folder(folder: Path, max_length: int) -> Tokenizer:
    """From a tokenizer folder of diffusers: `vocab.json` and `merges.txt`, or `tokenizer.json`; and configs.

    Which file wins is transformers' rule: `tokenizer.json` over the pair, and `added_tokens_decoder` of
    `tokenizer_config.json` over `special_tokens_map.json` and the other lists of added tokens.

    Raises:
        CheckpointError: A file is missing or is not what its name says.
        ConfigError: `max_length` has no room for a word.
    """
    config = _read_if_there(folder / "tokenizer_config.json")
    try:
        if (folder / "tokenizer.json").exists():
            fast = read_json(folder / "tokenizer.json")
            vocab, listed = fast["model"]["vocab"], fast["added_tokens"]
            merges = [
                merge if isinstance(merge, str) else " ".join(merge) for merge in fast["model"]["merges"]
            ]
        else:
            vocab, listed = read_json(folder / "vocab.json"), []
            lines = _read(folder / "merges.txt").split("\n")
            merges = [line for line in map(str.strip, lines) if line and not line.startswith("#version")]

        if "added_tokens_decoder" not in config:
            config |= _read_if_there(folder / "special_tokens_map.json")
        roles = {role: _added_token(config[role]) for role in ROLES if config.get(role)}
        name = {role: token.content for role, token in roles.items()}

        if "added_tokens_decoder" in config:
            added = {
                int(index): _added_token(token) for index, token in config["added_tokens_decoder"].items()
            }
        else:
            legacy = _read_if_there(folder / "added_tokens.json")
            added = {
                index: AddedToken(token, special=token in name.values()) for token, index in legacy.items()
            }
            added |= {token["id"]: _added_token(token) for token in listed}
        in_order = [added[index] for index in sorted(added)]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        what = f"{type(error).__name__} {shown(str(error))}"
        raise CheckpointError(f"{folder} is not a CLIP tokenizer: {what}") from error

    known = {token.content for token in in_order}
    return Tokenizer.build(
        vocab,
        merges,
        max_length=max_length,
        bos_token=name.get("bos_token", "<|startoftext|>"),
        eos_token=name.get("eos_token", "<|endoftext|>"),
        pad_token=name.get("pad_token", "<|endoftext|>"),
        added_tokens=[
            *in_order,
            *(token for token in roles.values() if token.content not in known),
        ],
    )


def _added_token(token: str | Mapping[str, Any]) -> AddedToken:
    """A special token as the configs have it: its text, or its text and how to look for it."""
    if isinstance(token, str):
        return AddedToken(token, special=True)
    how = {key: token[key] for key in ("lstrip", "rstrip", "single_word", "normalized") if key in token}
    return AddedToken(token["content"], **how, special=True)


def _read(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: get the tokenizer again") from error


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
