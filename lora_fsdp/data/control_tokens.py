"""Tokens that steer a model (end of text, end of turn), and texts that try to forge them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

#: A character for private use, which no vocabulary has.
_UNKNOWN = "\U000f1234"


class ControlTokens:
    """A tokenizer's control tokens: the special ones, and the added ones its chat template writes.

    The definition is that of transformers' `apply_chat_template(sanitize_control_tokens=True)`.
    Blanks are no control tokens, and neither is a token for unknown pieces that any text may give.

    Args:
        tokenizer: fast or slow.
        template: the chat template, or "" if it is not used.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, template: str) -> None:
        self._tokenizer = tokenizer
        given_by_any_text = tokenize_as_text(tokenizer, [_UNKNOWN])[0]
        chosen = {
            index: token
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.content.strip()
            and (token.special or (len(token.content) > 1 and token.content in template))
            and (index != tokenizer.unk_token_id or index not in given_by_any_text)
        }
        self._ids = frozenset(chosen)
        self._any = _any_of([token.content for token in chosen.values()])
        # Where to cut what tokenizers cannot be told to take as text.
        plain = [token.content for token in chosen.values() if not token.special]
        everything = [token.content for token in chosen.values()]
        self._cuts = [_behind_first_letter_of(plain), _behind_first_letter_of(everything)]

    def count(self, ids: Sequence[int]) -> int:
        """How many of `ids` are control tokens."""
        return sum(token in self._ids for token in ids)

    def texts_between(
        self, frames: Sequence[str], texts: Sequence[str], *, allowed: int
    ) -> list[int] | None:
        """Ids of the complete prompt, with control tokens in `frames` and none in `texts`.

        Between control tokens a tokenizer starts afresh, so the parts are tokenised apart there.

        Args:
            frames: what stands before, between and after the texts; one more than there are texts.
            texts: what must not hold a control token.
            allowed: how many control tokens the frames have.

        Returns:
            the ids, or `None` if this tokenizer cannot take the texts as text.
        """
        stretches = self._stretches(frames, texts)
        for cut in self._cuts:
            ids: list[int] = []
            for stretch, steers in stretches:
                if steers:
                    parts = tokenize(self._tokenizer, [stretch])
                else:
                    parts = tokenize_as_text(self._tokenizer, cut.split(stretch))
                ids += [i for part in parts for i in part]
            if self.count(ids) == allowed:
                return ids
        return None

    def _stretches(self, frames: Sequence[str], texts: Sequence[str]) -> list[tuple[str, bool]]:
        """The prompt in parts, each with whether it is a frame's and may hold control tokens."""
        stretches = []
        pending = ""
        for place, (frame, text) in enumerate(zip(frames, [*texts, ""], strict=True)):
            tokens = list(self._any.finditer(frame))
            if tokens:
                start = 0 if place == 0 else tokens[0].start()
                end = len(frame) if place == len(texts) else tokens[-1].end()
                stretches += [(pending + frame[:start], False), (frame[start:end], True)]
                pending = frame[end:] + text
            else:
                pending += frame + text
        return [*stretches, (pending, False)]


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of the texts alone; what spells a special token is that token."""
    return _tokenize(tokenizer, texts, split_special_tokens=False)


def tokenize_as_text(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of the texts alone; what spells a special token is letters like any other."""
    return _tokenize(tokenizer, texts, split_special_tokens=True)


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, split_special_tokens: bool
) -> list[list[int]]:
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        verbose=False,
        split_special_tokens=split_special_tokens,
    )
    return [list(ids) for ids in encoded["input_ids"]]


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    """Matches any of the texts, the longest first; nothing if there are none."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _behind_first_letter_of(texts: Sequence[str]) -> re.Pattern[str]:
    """Matches the place behind the first letter of any of the texts; nothing if there are none."""
    places = [f"(?<={re.escape(text[0])})(?={re.escape(text[1:])})" for text in texts if text[1:]]
    return re.compile("|".join(places) or r"(?!)")
