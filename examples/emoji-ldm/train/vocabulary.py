"""A byte-pair vocabulary in CLIP's format, in which every word of a caption is one token.

Files and ids are laid out as OpenAI's (github.com/openai/CLIP, clip/simple_tokenizer.py): 256 byte characters, the same
at the end of a word, the merges in order, start and end.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

START, END = "<|startoftext|>", "<|endoftext|>"


def write(folder: Path, captions: Iterable[str], length: int) -> None:
    """Learns merges until the words of `captions` are whole, and writes a folder that `CLIPTokenizer` reads."""
    words = sorted({word for caption in captions for word in caption.split()})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    learner.train_from_iterator(
        words,
        trainers.BpeTrainer(
            vocab_size=1 << 16,
            min_frequency=1,
            end_of_word_suffix="</w>",
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    merges = json.loads(learner.to_str())["model"]["merges"]
    pairs = [tuple(merge.split()) if isinstance(merge, str) else tuple(merge) for merge in merges]
    tokens = [
        *alphabet,
        *(byte + "</w>" for byte in alphabet),
        *("".join(pair) for pair in pairs),
        START,
        END,
    ]

    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "do_lower_case": True,
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
