"""Examples to token ids: prompt and target apart, only the text ever shortened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_fsdp.data.chat.template import MARKER, ChatTemplate
from lora_fsdp.data.control_tokens import ControlTokens, tokenize, tokenize_as_text
from lora_fsdp.errors import (
    ArgumentError,
    ControlTokenError,
    EmptyTextError,
    LabelCollisionError,
    MalformedRowError,
    RowTooLongError,
    UnknownLabelError,
)
from lora_fsdp.tasks import Example, Prompt, Task
from lora_fsdp.tasks.shots import Shot, shown_before


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """One example as token ids.

    Attributes:
        row: its row number, for messages.
        prompt_ids: the prompt, with the tokenizer's leading special token if it has one.
        target_ids: the answer and the end token; empty if the example has no target. Where more
            than one candidate may be right, those that are in part, one after the other.
        candidate_ids: every text of `AnswerKind.candidates`, each with the end token.
        label: index of the target among the candidates, or `None`.
        shortened: whether the text was cut to fit.
        example: what was encoded.
        given: how many tokens at the beginning of each candidate are given and not scored; empty =
            none (`AnswerKind.contexts`).
        shares: how right each candidate is (`Example.shares`); empty = the target alone.
    """

    row: int
    prompt_ids: list[int]
    target_ids: list[int]
    candidate_ids: tuple[list[int], ...]
    label: int | None
    shortened: bool
    example: Example
    given: tuple[int, ...] = ()
    shares: tuple[float, ...] = ()

    @property
    def tokens(self) -> int:
        """The prompt with its target, in tokens."""
        return len(self.prompt_ids) + len(self.target_ids)

    @property
    def scored_ids(self) -> Sequence[list[int]]:
        """What is scored after the prompt: the candidates, or the target where there are none."""
        return self.candidate_ids or (self.target_ids,)


class Encoder:
    """Tokenises a task's examples.

    Prompt and target are tokenised apart and joined as ids, so the border between them cannot move:
    training sees exactly the prompt tokens that prediction will see, and the label mask cannot be
    off by a merge. The target is tokenised as the continuation of the prompt's last part, which
    matters for tokenizers that mark the start of a text.

    A text cannot forge the control tokens that end a text or a turn: whatever `Prompt.text` or a
    target spells (`</s>`, `<|im_end|>`) is tokenised as the letters it is, and so is what `lead`,
    `tail` and `turns` spell. Control tokens are the tokenizer's special tokens and the added ones
    that its chat template writes. Those in `Prompt.before` and `Prompt.after`, which the task's
    author wrote, and those of the chat template keep their meaning.

    Args:
        tokenizer: a fast or slow tokenizer with an end token.
        task: gives the kind of answer, and so the texts that are scored.
        max_length: longest prompt + longest answer + end token, in tokens.
        chat_template: put the prompt through the tokenizer's chat template, as a user's message.
        chat_template_kwargs: further arguments of that template (`{"enable_thinking": false}`).
        thinking: where an answer stands in a template that has a place for reasoning
            (`ChatTemplate`).
        shots: rows that every prompt shows with their answers before its own, in a chat template as
            messages.

    Attributes:
        chat: how the chat template is rendered; `None` without.

    Raises:
        ArgumentError: the tokenizer has no end token, or its chat template does not allow this.
        UnsafeFileError: the chat template takes more time or memory than any needs.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        task: Task,
        max_length: int = 512,
        chat_template: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        thinking: str = "auto",
        shots: Sequence[Shot] = (),
    ) -> None:
        end_of_answer(tokenizer, chat_template=False)  # that there is one
        self.chat: ChatTemplate | None = None
        if chat_template:
            self.chat = ChatTemplate(tokenizer, arguments=chat_template_kwargs, thinking=thinking)
        elif chat_template_kwargs or thinking != "auto":
            raise ArgumentError(
                "--chat_template_kwargs and --thinking are for chat templates: set "
                "--chat_template true, or leave them out."
            )
        self.tokenizer = tokenizer
        self.task = task
        self.kind = task.answer_kind
        self.max_length = max_length
        self.chat_template = chat_template
        self.shots = tuple(shots)
        self._continuation_ids = lru_cache(maxsize=4096)(self._tokenize_continuation)
        self._shared_ids = lru_cache(maxsize=256)(self._encode_shared)
        self._frame = lru_cache(maxsize=4096)(self._build_frame)

    def showing(
        self, shots: Sequence[Shot] | None = None, *, max_length: int | None = None
    ) -> Encoder:
        """The same with other rows in its prompts, or another longest example; `None` = as here."""
        return Encoder(
            self.tokenizer,
            task=self.task,
            max_length=self.max_length if max_length is None else max_length,
            chat_template=self.chat_template,
            chat_template_kwargs=None if self.chat is None else self.chat.arguments,
            thinking="auto" if self.chat is None else self.chat.thinking,
            shots=self.shots if shots is None else shots,
        )

    def encode(
        self, examples: Sequence[Example] | Sequence[EncodedExample]
    ) -> list[EncodedExample]:
        """Token ids of all `examples`, in order; those that are encoded already stay as they are.

        Raises:
            RowTooLongError: an example does not fit even without its text.
            UnknownLabelError: a target that is not one of the closed set's answers.
            LabelCollisionError: labels that the model could not tell apart.
            MalformedRowError: the chat template refuses an example's conversation.
        """
        new = [example for example in examples if isinstance(example, Example)]
        prompts = iter(self._tokenize(list(map(self._rendered, new))) if new else ())
        return [
            self._encode_one(example, self._without_forged(example, next(prompts)))
            if isinstance(example, Example)
            else example
            for example in examples
        ]

    def refusal(self, example: Example) -> str | None:
        """Why the chat template does not take the example, naming its row, or `None`."""
        try:
            self._rendered(example)
        except MalformedRowError as error:
            return str(error)
        return None

    def _rendered(self, example: Example) -> str:
        prompt = example.prompt
        try:
            if self.chat is not None and example.target is not None:
                self.chat.answer(example)
            rendered = self.render(prompt)
            self._frame(prompt.before, prompt.after, tuple(role for role, _ in prompt.turns))
        except ArgumentError as error:
            if not self.chat_template:
                raise
            self.render(Prompt("", "a", ""))  # which fails if it is not the row's fault
            raise MalformedRowError(
                f"Row {example.row}: {error} Correct the row, or leave such rows out with "
                "--on_bad_rows drop."
            ) from error
        return rendered

    def render(self, prompt: Prompt) -> str:
        """The prompt as the model sees it, behind the rows that it shows."""
        if self.chat is None:
            if prompt.turns:
                raise ArgumentError(
                    f"Task {self.task.name!r} gives conversations, which a chat template lays out: "
                    "set --chat_template true, with a chat model's tokenizer."
                )
            return str(shown_before(prompt, self.shots))
        prompt = shown_before(prompt, self.shots, as_turns=True)
        turns = [{"role": role, "content": content} for role, content in prompt.turns]
        turns.append({"role": "user", "content": prompt.message})
        return self.chat.render(turns)

    def _encode_one(self, example: Example, prompt_ids: list[int]) -> EncodedExample:
        after, target = example.prompt.after, example.target
        if target is not None and self.chat is not None:
            target = self.chat.answer(example)
        target_ids = [] if target is None else self._answer_ids(after, target)
        candidates, given = self._candidate_ids(example)
        label = candidates.index(target_ids) if target_ids in candidates else None
        if example.shares:
            target_ids = self._in_part_right(example, candidates)
        scored = candidates if example.shares else (target_ids, *candidates)
        longest = max(map(len, scored), default=0)
        shortened = len(prompt_ids) + longest > self.max_length
        if shortened:
            prompt_ids = self._shorten(example, budget=self.max_length - longest)
        if not prompt_ids:
            raise EmptyTextError(f"Row {example.row}: the prompt has no tokens; give it a text.")
        if candidates and target_ids and label is None and not example.shares:
            answers = list(self.kind.candidates(example))
            raise UnknownLabelError(
                f"Row {example.row}: the target {example.target!r} is none of the possible answers "
                f"{answers}: build_target must give one of them to the letter."
            )
        return EncodedExample(
            example.row,
            prompt_ids,
            target_ids,
            candidates,
            label,
            shortened,
            example,
            given=given,
            shares=example.shares,
        )

    def _in_part_right(self, example: Example, candidates: Sequence[list[int]]) -> list[int]:
        if len(example.shares) != len(candidates):
            raise MalformedRowError(
                f"Row {example.row} has {len(example.shares)} shares, and {len(candidates)} "
                "possible answers: build_shares must give one for each of them."
            )
        shared = zip(candidates, example.shares, strict=True)
        return [token for ids, share in shared if share > 0 for token in ids]

    def _shorten(self, example: Example, *, budget: int) -> list[int]:
        """Ids of the prompt with the longest head of its text that fits `budget` tokens."""
        prompt = example.prompt

        def ids_with(characters: int) -> list[int]:
            text = prompt.text[:characters].rstrip()
            shorter = replace(example, prompt=replace(prompt, text=text))
            return self._without_forged(shorter, self._tokenize([self.render(shorter.prompt)])[0])

        fits, too_long = 0, len(prompt.text)
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if len(ids_with(middle)) <= budget:
                fits = middle
            else:
                too_long = middle
        ids = ids_with(fits)
        if len(ids) > budget or fits == 0:
            shown = f", the {len(self.shots)} rows of --few_shot" if self.shots else ""
            raise RowTooLongError(
                f"Row {example.row}: what is never shortened (instruction, answer, a row's other "
                f"columns{shown}) leaves no room for the text within --max_length "
                f"{self.max_length}; raise it or shorten the instruction."
            )
        return ids

    def _candidate_ids(self, example: Example) -> tuple[tuple[list[int], ...], tuple[int, ...]]:
        """Every candidate with what is given before it, and how many tokens that has."""
        texts, after = tuple(self.kind.candidates(example)), example.prompt.after
        labels, contexts = tuple(self.kind.labels), tuple(self.kind.contexts(example))
        if labels or contexts:  # the same for all rows: encoded and checked once
            return self._shared_ids(after, texts, contexts, labels)
        # One may begin like another: the end token tells them apart.
        ids = [self._answer_ids(after, text) for text in texts]
        for place, own in enumerate(ids):
            if (first := ids.index(own)) != place:
                raise LabelCollisionError(
                    f"Row {example.row}: to this tokenizer the choices {texts[first].strip()!r} "
                    f"and {texts[place].strip()!r} are the same; change one of them."
                )
        return tuple(ids), ()

    def _encode_shared(
        self,
        after: str,
        texts: tuple[str, ...],
        contexts: tuple[str, ...],
        labels: tuple[str, ...],
    ) -> tuple[tuple[list[int], ...], tuple[int, ...]]:
        if contexts:
            branches = [
                self._branch_ids(after, context, text)
                for context, text in zip(contexts, texts, strict=True)
            ]
            return tuple(ids for ids, _ in branches), tuple(given for _, given in branches)
        candidates = [self._answer_ids(after, text) for text in texts]
        first_with: dict[tuple[int, ...], str] = {}
        for label, ids in zip(labels, candidates, strict=True):
            # One may begin like another: the end token is part of its score, and tells them apart.
            first = first_with.setdefault(tuple(ids), label)
            if first != label:
                raise LabelCollisionError(
                    f"Labels {first!r} and {label!r}: to this tokenizer both are {ids[:-1]}; "
                    "rename one of them."
                )
        return tuple(candidates), ()

    def _branch_ids(self, after: str, context: str, text: str) -> tuple[list[int], int]:
        """A context and a text that continues it, and how many of the tokens are the context's."""
        given = self._continuation_ids(after, context)
        anchor = context.strip() if self.chat_template else f"{after}{context}"
        return [*given, *self._continued(anchor, text), self.end_token_id], len(given)

    def _answer_ids(self, after: str, target: str) -> list[int]:
        return [*self._continuation_ids(after, target), self.end_token_id]

    def _tokenize_continuation(self, after: str, target: str) -> tuple[int, ...]:
        if self.chat is not None:  # the template ends a turn; the answer starts a new one
            return self._tokenize_turn(target.strip(), marks=self.chat.marks_of(target))
        return self._continued(after, target)

    def _continued(self, before: str, text: str) -> tuple[int, ...]:
        """Ids of `text` as it continues `before`."""
        texts = [before, before + text, text]
        anchor, joined, alone = tokenize_as_text(self.tokenizer, texts)
        if joined[: len(anchor)] == anchor:
            return tuple(joined[len(anchor) :])
        return tuple(alone)

    def _tokenize_turn(self, target: str, *, marks: Sequence[str]) -> tuple[int, ...]:
        """An answer's ids, in which the marks of its own thinking block are the model's tokens."""
        ids: list[int] = []
        for mark in marks:
            text, found, target = target.partition(mark)
            ids += tokenize_as_text(self.tokenizer, [text])[0] if text else []
            ids += tokenize(self.tokenizer, [found])[0]
        return (*ids, *(tokenize_as_text(self.tokenizer, [target])[0] if target else ()))

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return [[*self.leading_ids, *ids] for ids in tokenize(self.tokenizer, texts)]

    @cached_property
    def leading_ids(self) -> list[int]:
        """Special tokens this tokenizer puts before a text (never those it puts after one)."""
        if self.chat_template:  # the template writes its own
            return []
        probe = self.tokenizer("a")["input_ids"]
        bare = tokenize(self.tokenizer, ["a"])[0]
        return list(probe[: probe.index(bare[0])])

    # ---- texts that forge control tokens --------------------------------------------------------

    def _without_forged(self, example: Example, ids: list[int]) -> list[int]:
        """`ids`, or other ids of the same prompt if its text has forged a control token.

        Ids are counted rather than strings searched, because that needs to know nothing of how the
        tokenizer finds its added tokens. What holds no forged token, nearly everything, is left
        exactly as the tokenizer has it.
        """
        prompt = example.prompt
        roles = tuple(role for role, _ in prompt.turns)
        frames, allowed = self._frame(prompt.before, prompt.after, roles)
        if self._controls.count(ids) == allowed + self._controls.count(self.leading_ids):
            return ids
        texts = [*(text for _, text in prompt.turns), f"{prompt.lead}{prompt.text}{prompt.tail}"]
        rebuilt = self._controls.texts_between(frames, texts, allowed=allowed)
        if rebuilt is None:
            raise ControlTokenError(
                f"Row {example.row}: the text spells a control token of the tokenizer "
                f"{self.tokenizer.name_or_path!r}, which cannot take it as ordinary text: remove "
                "it from the text."
            )
        return [*self.leading_ids, *rebuilt]

    @cached_property
    def _controls(self) -> ControlTokens:
        template = "" if self.chat is None else self.chat.source
        return ControlTokens(self.tokenizer, template=template)

    def _build_frame(
        self, before: str, after: str, roles: tuple[str, ...]
    ) -> tuple[Sequence[str], int]:
        """What stands around a row's texts as the model sees it, and its control tokens.

        Args:
            before, after: the prompt's.
            roles: of the turns before it.

        Returns:
            The frames, one more than there are texts, and how many control tokens they have.
        """
        frames = [shown_before(Prompt(before, "", after), self.shots).before, after]
        if self.chat_template:
            turns = tuple((role, MARKER) for role in roles)
            frames = self.render(Prompt(before, MARKER, after, turns=turns)).split(MARKER)
        if len(frames) != len(roles) + 2:
            raise ArgumentError(
                f"The chat template of the tokenizer {self.tokenizer.name_or_path!r} drops or "
                f"repeats messages of a conversation of {', '.join((*roles, 'user'))}: use another "
                "model, or rows without these messages."
            )
        return frames, sum(map(self._controls.count, tokenize(self.tokenizer, frames)))

    @cached_property
    def end_token_id(self) -> int:
        """The token that ends an answer: the chat template's end of turn, else the end of text."""
        arguments = None if self.chat is None else self.chat.arguments
        return end_of_answer(
            self.tokenizer, chat_template=self.chat_template, chat_template_kwargs=arguments
        )


def end_of_answer(
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: bool,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> int:
    """The token that ends an answer: the chat template's end of turn, else the end of text.

    Raises:
        ArgumentError: the tokenizer has no end token, or its chat template cannot be rendered.
    """
    if tokenizer.eos_token_id is None:
        raise ArgumentError(
            f"The tokenizer {tokenizer.name_or_path!r} has no end token (eos_token), so the end of "
            "an answer could not be learnt: set one in its tokenizer_config.json."
        )
    if not chat_template or not tokenizer.chat_template:
        return int(tokenizer.eos_token_id)
    behind = ChatTemplate(tokenizer, arguments=chat_template_kwargs).end_of_answer()
    tail = tokenizer(behind, add_special_tokens=False)["input_ids"]
    known = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((token for token in tail if token in known), int(tokenizer.eos_token_id))
