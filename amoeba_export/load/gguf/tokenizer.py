"""The tokenizer of a GGUF file as `tokenizer.json`: the same tokens that llama.cpp makes of a text with this file.

Read from llama.cpp's `llama-vocab.cpp`. Two kinds of it: `gpt2`, byte-level BPE behind a splitting rule that has a name
(`tokenizer.ggml.pre`), and `llama`, SentencePiece's BPE. What the file leaves out has a default there, which is not
always what one would guess: a beginning of text is added by some rules and by all of SentencePiece.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amoeba_export.errors import DamagedFile, UnsupportedError
from amoeba_export.gguf_file import GgufFile

_GPT2_DEFAULT_ID = 11
"""What llama.cpp takes for the token that begins and the one that ends a text, when a `gpt2` file names none."""

_LETTERS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp tells upper from lower case among the letters of ASCII alone.
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+|"
    r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ENDINGS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?((?=[\p{{L}}])([^a-z]))*((?=[\p{{L}}])([^A-Z]))+{_ENDINGS}|"
    rf"[^\r\n\p{{L}}\p{{N}}]?((?=[\p{{L}}])([^a-z]))+((?=[\p{{L}}])([^A-Z]))*{_ENDINGS}|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _Rule:
    """A splitting rule of llama.cpp.

    Attributes:
        pattern: The regular expression that splits; None for GPT-2's own.
        digits: Split off every digit first.
        adds_bos: Unless the file says otherwise.
        ignores_merges: A piece that is a token is that token, whatever the merges say.
    """

    pattern: str | None = None
    digits: bool = False
    adds_bos: bool = False
    ignores_merges: bool = False


_LLAMA3 = _Rule(pattern=_LETTERS % r"\p{N}{1,3}", adds_bos=True, ignores_merges=True)
_LLAMA3_PLAIN = _Rule(pattern=_LETTERS % r"\p{N}{1,3}")
_QWEN2 = _Rule(pattern=_LETTERS % r"\p{N}")
_SMOLLM = _Rule(digits=True)
_RULES: Mapping[str, _Rule] = {
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), _LLAMA3
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _LLAMA3_PLAIN),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2", "hunyuan"), _QWEN2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _SMOLLM),
    **dict.fromkeys(
        ("gpt-2", "phi-2", "mpt", "olmo", "jais", "mellum", "trillion", "granite-docling", "exaone4"), _Rule()
    ),
    **dict.fromkeys(("gpt-4o", "llama4"), _Rule(pattern=_GPT4O)),
    "tekken": _Rule(pattern=_TEKKEN, adds_bos=True, ignores_merges=True),
}
"""`tokenizer.ggml.pre` -> what it does. Names of one line are one rule to llama.cpp."""

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
_DEFAULTS = {"bos": 1, "eos": 2, "unk": 0}
"""Of a `llama` file that does not say."""

_REFUSED = ("tokenizer.ggml.suppress_tokens", "tokenizer.ggml.precompiled_charsmap")
NEXT_STEP = "Give the model as a Hugging Face folder instead, with its tokenizer.json."


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What the metadata says of tokens, defaults filled in.

    Attributes:
        special: `bos`, `eos`, `unk`, `pad` -> id, those that there are.
    """

    path: Path
    kind: str
    rule: _Rule
    tokens: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float]
    merges: Sequence[str]
    special: Mapping[str, int]
    adds_bos: bool
    adds_eos: bool
    adds_space: bool
    chat_template: str | None
    more_templates: Mapping[str, str]


def read_vocabulary(file: GgufFile) -> Vocabulary | None:
    """The tokenizer in the metadata; None when the file has none.

    Raises:
        UnsupportedError: A kind of tokenizer, or a splitting rule, that we do not compute.
        DamagedFile: The parts do not fit together.
    """
    fields = file.fields
    kind = fields.get("tokenizer.ggml.model", "none")
    if kind == "none":
        return None
    if kind not in ("gpt2", "llama"):
        raise _refused(file.path, f"Its tokenizer is of the kind '{kind}'")
    for key in _REFUSED:
        if fields.get(key):
            raise _refused(file.path, f"It has {key}")
    if fields.get("tokenizer.ggml.remove_extra_whitespaces"):
        raise _refused(file.path, "Its tokenizer removes spaces (tokenizer.ggml.remove_extra_whitespaces)")
    pre = fields.get("tokenizer.ggml.pre", "default")
    rule = _Rule(adds_bos=True) if kind == "llama" else _RULES.get(pre)
    if rule is None:
        raise _refused(file.path, f"Its tokenizer's way to split text (tokenizer.ggml.pre = '{pre}') is not known")
    tokens = _list(file, "tokens", str)
    if len(set(tokens)) != len(tokens):
        raise DamagedFile(file.path, "two of its tokens are the same")
    types = _list(file, "token_type", int, len(tokens)) or [_NORMAL] * len(tokens)
    special = dict(_DEFAULTS) if kind == "llama" else {}
    for name, key in _SPECIAL.items():
        idx = fields.get(f"tokenizer.ggml.{key}")
        if isinstance(idx, int) and 0 <= idx < len(tokens):  # llama.cpp goes on without one that is out of range
            special[name] = idx
    adds_bos = bool(fields.get("tokenizer.ggml.add_bos_token", rule.adds_bos))
    adds_eos = bool(fields.get("tokenizer.ggml.add_eos_token", False))
    if kind == "gpt2":
        for name, adds in (("bos", adds_bos), ("eos", adds_eos)):
            if adds:
                special.setdefault(name, _GPT2_DEFAULT_ID)
    templates = _templates(file)
    return Vocabulary(
        path=file.path,
        kind=kind,
        rule=rule,
        tokens=tokens,
        types=types,
        scores=_list(file, "scores", float, len(tokens)) or [0.0] * len(tokens),
        merges=_list(file, "merges", str),
        special={name: idx for name, idx in special.items() if idx < len(tokens)},
        adds_bos=adds_bos,
        adds_eos=adds_eos,
        # llama.cpp puts no space in front of byte-level text, whatever the file says.
        adds_space=kind == "llama" and bool(fields.get("tokenizer.ggml.add_space_prefix", True)),
        chat_template=templates.pop("", None),
        more_templates=templates,
    )


def _templates(file: GgufFile) -> dict[str, str]:
    """Chat templates by name, the usual one as "". Raises `DamagedFile`: tokens may be any bytes, and these not."""
    found = {}
    for key, value in file.fields.items():
        stem, _, name = key.partition(".chat_template")
        if stem != "tokenizer" or (name and not name.startswith(".")):
            continue
        if not isinstance(value, str):
            raise DamagedFile(file.path, f"{key} is no text")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DamagedFile(file.path, f"{key} is no text in UTF-8 (at letter {error.start + 1})") from error
        found[name.removeprefix(".")] = value
    return found


def _refused(path: Path, what: str) -> UnsupportedError:
    return UnsupportedError(f"{what}; it is not supported.", where=path, next_step=NEXT_STEP)


def _list(file: GgufFile, key: str, kind: type, length: int | None = None) -> list[Any]:
    """A list of the file, [] when it is not there."""
    values = file.fields.get(f"tokenizer.ggml.{key}", [])
    wanted = (int, float) if kind is float else kind
    if not isinstance(values, list) or not all(isinstance(value, wanted) for value in values):
        raise DamagedFile(file.path, f"tokenizer.ggml.{key} is no list of {kind.__name__}")
    if length is not None and values and len(values) != length:
        raise DamagedFile(file.path, f"tokenizer.ggml.{key} has {len(values)} entries for {length} tokens")
    return values


def save_tokenizer(vocabulary: Vocabulary, folder: Path, *, max_positions: int) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and the chat template.

    Raises:
        DamagedFile: Merges or tokens that make no tokenizer.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = _built(vocabulary)
    except Exception as error:  # of the Rust library, which has no class of its own for them
        raise DamagedFile(vocabulary.path, f"its tokens make no tokenizer ({error})") from error
    named = {f"{name}_token": vocabulary.tokens[idx] for name, idx in vocabulary.special.items()}
    fast: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_positions, **named)
    fast.chat_template = (
        {"default": vocabulary.chat_template, **vocabulary.more_templates}
        if vocabulary.more_templates and vocabulary.chat_template
        else vocabulary.chat_template
    )
    fast.save_pretrained(folder)
    # `TokenizersBackend` is a class of transformers 5 alone; this name is right in 4 and 5.
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings = {key: value for key, value in settings.items() if key not in ("backend", "is_local", "local_files_only")}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _built(vocabulary: Vocabulary) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    ids = {token: idx for idx, token in enumerate(vocabulary.tokens)}
    if vocabulary.kind == "gpt2":
        pairs = [_parts(merge) for merge in vocabulary.merges]
        affixes = {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
        tokenizer = Tokenizer(models.BPE(ids, pairs, ignore_merges=vocabulary.rule.ignores_merges, **affixes))
        tokenizer.pre_tokenizer = _splitter(vocabulary.rule)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        unknown = vocabulary.tokens[vocabulary.special["unk"]] if "unk" in vocabulary.special else None
        tokenizer = Tokenizer(
            models.BPE(ids, _merges(vocabulary, ids), unk_token=unknown, fuse_unk=True, byte_fallback=True)
        )
        # The text before, between and after special tokens is normalized piece by piece, each with a space in front.
        spaces: list[Any] = [normalizers.Replace(" ", "\u2581")]
        if vocabulary.adds_space:
            spaces.insert(0, normalizers.Prepend("\u2581"))
        tokenizer.normalizer = normalizers.Sequence(spaces)
        stripped = [decoders.Strip(" ", 1, 0)] if vocabulary.adds_space else []
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *stripped]
        )
    added = [
        AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind in (_CONTROL, _USER_DEFINED, _UNKNOWN)
    ]
    tokenizer.add_tokens(added)
    around = {
        name: vocabulary.tokens[vocabulary.special[name]]
        for name, adds in (("bos", vocabulary.adds_bos), ("eos", vocabulary.adds_eos))
        if adds and name in vocabulary.special
    }
    if around:
        single = [around.get("bos"), "$A", around.get("eos")]
        pair = [around.get("bos"), "$A", around.get("eos"), around.get("bos"), "$B", around.get("eos")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[part for part in single if part],
            pair=[f"{part}:1" if idx > 2 else part for idx, part in enumerate(pair) if part],
            special_tokens=[(token, ids[token]) for token in dict.fromkeys(around.values())],
        )
    return tokenizer


def _parts(merge: str) -> tuple[str, str]:
    """llama.cpp looks for the space between the parts from the second letter on."""
    left, _, right = merge[1:].partition(" ")
    return merge[:1] + left, right


def _splitter(rule: _Rule) -> Any:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    parts: list[Any] = []
    if rule.pattern is not None:
        parts.append(Split(Regex(rule.pattern), "isolated"))
    if rule.digits:
        parts.append(Digits(individual_digits=True))
    parts.append(ByteLevel(add_prefix_space=False, use_regex=rule.pattern is None))
    return Sequence(parts) if len(parts) > 1 else parts[0]


def _merges(vocabulary: Vocabulary, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Merges that go by the scores: llama.cpp joins the two neighbours whose joint token has the highest score."""
    found = []
    for token, idx in ids.items():
        if vocabulary.types[idx] in (_BYTE, _CONTROL):
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-vocabulary.scores[idx], idx, cut, left, right))
    return [(left, right) for *_, left, right in sorted(found)]
