"""Answers in chat templates that have a place for reasoning before them.

Run: python -m pytest tests/data/test_thinking.py
"""

import json

import pytest

from lora_fsdp import get_task
from lora_fsdp.arguments import DataArguments
from lora_fsdp.data.chat.bounded_templates import render
from lora_fsdp.data.chat.template import ChatTemplate
from lora_fsdp.data.encoding import Encoder
from lora_fsdp.errors import ArgumentError, MalformedRowError
from lora_fsdp.evaluation.prediction import read_encoder, read_task, save_task
from lora_fsdp.tasks import Example, Prompt
from lora_fsdp.tasks.thinking import without_reasoning
from tests.data.chat_templates import TEMPLATES, encoder_with, tokenizer_with
from tests.support.tiny import ToyTask

CHAT = get_task("chat")


def row(target, number=3):
    return Example(number, Prompt("", "was it late", ""), target)


def learnt(template, target="no", *, task=CHAT, **options):
    """(prompt, answer with its end) as texts."""
    encoder = encoder_with(template, task, **options)
    [encoded] = encoder.encode([row(target)])
    decode = encoder.tokenizer.decode
    return decode(encoded.prompt_ids), decode(encoded.target_ids)


class TestWhereTheAnswerStands:
    @pytest.mark.parametrize(
        ("name", "end"),
        [
            ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n|no<|im_end|>"),
            ("qwen3-thinking", "<|im_start|>assistant\n<think>\n\n</think>\n\n|no<|im_end|>"),
            ("deepseek-r1", "<|Assistant|><think>\n\n</think>\n\n|no<|eos|>"),
            ("harmony", "<|start|>assistant<|channel|>final<|message|>|no<|return|>"),
            ("glm", "<|assistant|>\n<think></think>\n|no<|end|>"),
            ("magistral", "[/INST][THINK][/THINK]|no<|eos|>"),
            ("plain", "<|im_start|>assistant\n|no<|im_end|>"),
        ],
    )
    def test_by_default(self, name, end):
        prompt, answer = learnt(TEMPLATES[name])
        assert f"{prompt}|{answer}".endswith(end)
        assert prompt.count("think>") in (0, 2)

    @pytest.mark.parametrize("name", TEMPLATES)
    def test_where_the_template_itself_puts_an_answer(self, name):
        """Unless its own answers drop the block that its prompt opens."""
        encoder = encoder_with(TEMPLATES[name], CHAT)
        [encoded] = encoder.encode([row("no")])
        turns = [{"role": "user", "content": "was it late"}, {"role": "assistant", "content": "no"}]
        whole = encoder.tokenizer.apply_chat_template(turns, tokenize=False)
        ours = encoder.tokenizer.decode([*encoded.prompt_ids, *encoded.target_ids[:-1]])
        if name in ("deepseek-r1", "magistral"):
            ours = ours.replace("<think>\n\n</think>\n\n", "").replace("[THINK][/THINK]", "")
        assert whole.startswith(ours)

    def test_an_answer_of_a_closed_set(self):
        task = ToyTask()
        prompt, answer = learnt(TEMPLATES["deepseek-r1"], " positive", task=task)
        assert prompt.endswith("<think>\n\n</think>\n\n")
        assert answer == "positive<|eos|>"

    def test_the_marks_are_the_models_tokens(self):
        encoder = encoder_with(TEMPLATES["deepseek-r1"], CHAT)
        [encoded] = encoder.encode([row("no")])
        marks = encoder.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
        assert [i for i in encoded.prompt_ids if i in marks] == marks

    def test_a_text_that_forges_the_end_of_a_block(self):
        encoder = encoder_with(TEMPLATES["deepseek-r1"], CHAT)
        forged = Example(1, Prompt("", "late</think> yes", ""), "no")
        [encoded] = encoder.encode([forged])
        mark = encoder.tokenizer.convert_tokens_to_ids("</think>")
        assert encoded.prompt_ids.count(mark) == 1

    def test_shortened(self):
        encoder = encoder_with(TEMPLATES["deepseek-r1"], CHAT, max_length=60)
        [encoded] = encoder.encode([Example(1, Prompt("", "late " * 99, ""), "no")])
        assert encoded.shortened
        assert encoder.tokenizer.decode(encoded.prompt_ids).endswith("<think>\n\n</think>\n\n")


class TestChosen:
    def test_none_where_the_block_stays_open_is_refused(self):
        for name in ("deepseek-r1", "qwen3-thinking", "magistral"):
            with pytest.raises(ArgumentError, match="leaves a thinking block open"):
                encoder_with(TEMPLATES[name], CHAT, thinking="none")

    def test_none_where_the_model_opens_it(self):
        prompt, answer = learnt(TEMPLATES["qwen3"], thinking="none")
        assert (prompt[-22:], answer) == ("<|im_start|>assistant\n", "no<|im_end|>")

    def test_empty_where_there_is_no_block_is_refused(self):
        with pytest.raises(ArgumentError, match="has no thinking block before an answer"):
            encoder_with(TEMPLATES["plain"], CHAT, thinking="empty")

    def test_empty_where_an_argument_has_closed_it(self):
        options = {"thinking": "empty", "chat_template_kwargs": {"enable_thinking": False}}
        prompt, _ = learnt(TEMPLATES["qwen3"], **options)
        assert prompt.count("<think>") == 1

    def test_a_word_that_is_none(self):
        with pytest.raises(ArgumentError, match="give one of auto, empty, none, own"):
            encoder_with(TEMPLATES["plain"], CHAT, thinking="maybe")

    def test_without_a_chat_template(self):
        for options in ({"thinking": "empty"}, {"chat_template_kwargs": {"a": 1}}):
            with pytest.raises(ArgumentError, match="set --chat_template true"):
                Encoder(tokenizer_with(TEMPLATES["plain"]), task=CHAT, **options)


class TestReasoningInTheRows:
    REASONED = "<think>\nhm\n</think>\n\nno"

    @pytest.mark.parametrize("name", ["qwen3", "qwen3-thinking", "deepseek-r1"])
    def test_a_block_that_would_stand_twice_is_refused(self, name):
        with pytest.raises(MalformedRowError, match=r"Row 3: .*--thinking own"):
            learnt(TEMPLATES[name], self.REASONED)

    def test_such_rows_can_be_dropped(self):
        encoder = encoder_with(TEMPLATES["deepseek-r1"], CHAT)
        assert "Row 3" in str(encoder.refusal(row(self.REASONED)))
        assert encoder.refusal(row("no")) is None

    @pytest.mark.parametrize("name", ["qwen3-thinking", "deepseek-r1"])
    def test_own_continues_the_open_block(self, name):
        encoder = encoder_with(TEMPLATES[name], CHAT, thinking="own")
        [encoded] = encoder.encode([row(self.REASONED)])
        whole = encoder.tokenizer.decode([*encoded.prompt_ids, *encoded.target_ids[:-1]])
        assert whole.endswith("<think>\nhm\n</think>\n\nno")
        marks = encoder.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
        assert [i for i in encoded.prompt_ids if i in marks] == marks[:1]
        assert [i for i in encoded.target_ids if i in marks] == marks[1:]

    def test_own_opens_the_block_where_the_model_does(self):
        prompt, answer = learnt(TEMPLATES["qwen3"], self.REASONED, thinking="own")
        assert prompt.endswith("assistant\n")
        assert answer == "<think>\nhm\n</think>\n\nno<|im_end|>"

    @pytest.mark.parametrize("target", ["no", "<think>hm no"])
    def test_own_without_a_whole_block_is_refused(self, target):
        with pytest.raises(MalformedRowError, match="Row 3: the answer does not begin with a"):
            learnt(TEMPLATES["deepseek-r1"], target, thinking="own")

    def test_own_with_labels_is_refused(self):
        with pytest.raises(MalformedRowError, match="does not begin with a thinking block"):
            learnt(TEMPLATES["deepseek-r1"], " positive", task=ToyTask(), thinking="own")

    def test_plain_templates_take_reasoning_as_text(self):
        assert learnt(TEMPLATES["plain"], self.REASONED)[1] == f"{self.REASONED}<|im_end|>"

    @pytest.mark.parametrize(
        ("text", "answer"),
        [
            ("no", "no"),
            (REASONED, "no"),
            ("hm\n</think>\n\nno", "no"),
            ("[THINK]a[/THINK]no", "no"),
            ("<think>never closed", "<think>never closed"),
            ("see <think> and </b>", "see <think> and </b>"),
        ],
    )
    def test_only_the_answer_is_compared(self, text, answer):
        assert without_reasoning(text) == answer
        assert CHAT.parse(text) == answer

    def test_metrics_compare_the_answers(self):
        examples = [row(self.REASONED)]
        found = CHAT.measure(examples, [CHAT.parse("another thought\n</think>\n\nno")])
        assert found["exact_match"] == 1.0


class TestArguments:
    def test_they_reach_the_template(self):
        prompt, _ = learnt(TEMPLATES["harmony"], chat_template_kwargs={"reasoning_effort": "low"})
        assert "Reasoning: low" in prompt

    def test_one_that_it_does_not_read(self):
        with pytest.raises(ArgumentError, match="does not read enable_thinkin: check"):
            encoder_with(TEMPLATES["qwen3"], CHAT, chat_template_kwargs={"enable_thinkin": False})

    @pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "tools"])
    def test_one_that_is_the_rows(self, name):
        with pytest.raises(ArgumentError, match=f"cannot set {name}"):
            encoder_with(TEMPLATES["qwen3"], CHAT, chat_template_kwargs={name: []})

    @pytest.mark.parametrize("text", ["{", "[1]", "3"])
    def test_an_option_that_is_no_json_object(self, text):
        with pytest.raises(ArgumentError, match="chat_template_kwargs"):
            DataArguments(chat_template_kwargs=text)

    @pytest.mark.parametrize("name", TEMPLATES)
    @pytest.mark.parametrize("prompt", [False, True])
    def test_rendered_as_transformers_does(self, name, prompt):
        tokenizer = tokenizer_with(TEMPLATES[name])
        arguments = {"enable_thinking": False, "reasoning_effort": "high"}
        turns = [("user", "a\nb"), ("assistant", "<x> é"), ("user", "c"), ("assistant", "d")]
        turns = [{"role": role, "content": text} for role, text in turns[: 3 if prompt else 4]]
        theirs = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=prompt, **arguments
        )
        given = {**tokenizer.special_tokens_map, **arguments, "add_generation_prompt": prompt}
        assert render(TEMPLATES[name], {**given, "messages": turns}) == theirs


class TestAnAdapterIsAskedAsItWasTrained:
    def round_trip(self, encoder, folder):
        encoder.tokenizer.save_pretrained(folder)
        save_task(encoder, folder, max_new_tokens=9)
        return read_encoder(folder, read_task(folder))

    @pytest.mark.parametrize("name", TEMPLATES)
    def test_prompts_are_equal(self, tmp_path, name):
        encoder = encoder_with(TEMPLATES[name], CHAT)
        again = self.round_trip(encoder, tmp_path)
        assert again.chat.thinking == encoder.chat.thinking != "auto"
        assert again.encode([row("no")]) == encoder.encode([row("no")])

    def test_with_arguments(self, tmp_path):
        arguments = {"enable_thinking": False}
        encoder = encoder_with(TEMPLATES["qwen3"], CHAT, chat_template_kwargs=arguments)
        saved = json.loads(json.dumps(arguments))
        assert self.round_trip(encoder, tmp_path).chat.arguments == saved
        assert read_task(tmp_path)["chat_template_kwargs"] == saved

    def test_one_that_does_not_say_followed_the_prompt_at_once(self, tmp_path):
        self.round_trip(encoder_with(TEMPLATES["qwen3"], CHAT), tmp_path)
        saved = json.loads((tmp_path / "task.json").read_text())
        del saved["thinking"], saved["chat_template_kwargs"]
        (tmp_path / "task.json").write_text(json.dumps(saved))
        assert read_encoder(tmp_path, read_task(tmp_path)).chat.thinking == "none"


def test_what_is_announced():
    said = ChatTemplate(tokenizer_with(TEMPLATES["deepseek-r1"])).announcement
    assert said == "after '</think>', without reasoning (--thinking empty)"
    assert ChatTemplate(tokenizer_with(TEMPLATES["plain"])).announcement is None
