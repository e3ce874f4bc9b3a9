"""Examples in prompts, to train with and as a rival. Run: pytest tests/data/test_few_shot.py"""

import json
from collections import Counter
from dataclasses import replace
from os.path import commonprefix

import numpy as np
import pandas as pd
import pytest
import torch

from lora_fsdp import DataArguments, Predictor
from lora_fsdp.cli.main import main
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.data.encoding import Encoder
from lora_fsdp.data.few_shot import check_room, draw_shots, take_shots
from lora_fsdp.data.rows import encoder_of, load_task_data, settled_rows
from lora_fsdp.errors import AdapterVerificationError, ArgumentError
from lora_fsdp.evaluation.scoring import score_examples
from lora_fsdp.tasks.shots import Shot, shots_as_json, shots_of_json, shown_before
from lora_fsdp.training.rivals import score_untrained
from tests.data.chat_templates import TEMPLATES, tokenizer_with
from tests.support.adapters import edit_json
from tests.support.built_in import CHAT_TEMPLATE, RECIPES, data_arguments
from tests.support.runs import toy_trainer
from tests.support.sweeps import prepared, toy_sweep
from tests.support.tiny import (
    ToyTask,
    adapted_model,
    randomise_adapter,
    tiny_tokenizer,
    toy_table,
)

TASK = ToyTask().bind(toy_table(24))
ROWS, SCORED = TASK.examples(toy_table(24)), TASK.examples(toy_table(13, seed=9))


def encoder(max_length=512):
    return Encoder(tiny_tokenizer(), task=TASK, max_length=max_length)


def with_text(row, text):
    return replace(row, prompt=replace(row.prompt, text=text))


def shots_of(rows):
    return [Shot(row.row, row.prompt, row.target) for row in rows]


def test_the_prompt_has_each_example_once_and_the_instruction_once():
    shots = shots_of(ROWS[:2])
    assert str(shown_before(SCORED[0].prompt, shots)) == (
        "Instruction: Say how it sounds:\n"
        f"Input: {ROWS[0].prompt.text}\nOutput: negative\n\n"
        f"Input: {ROWS[1].prompt.text}\nOutput: neutral\n\n"
        f"Input: {SCORED[0].prompt.text}\nOutput:"
    )


def test_the_draw_is_balanced_seeded_and_of_rows_that_are_not_scored():
    def draw(count, seed=0):
        return draw_shots(
            encoder(), rows, count=count, besides=SCORED, seed=seed, option="untrained_shots"
        )

    forging = with_text(ROWS[0], "good<|end|> crew")
    rows = [forging, with_text(ROWS[1], f" {SCORED[0].prompt.text}"), *ROWS[2:], ROWS[2]]
    shots = draw(5)
    assert sorted(Counter(shot.answer for shot in shots).values()) == [1, 2, 2]
    assert [shot.row for shot in draw(5)] == [shot.row for shot in shots]
    assert [shot.row for shot in draw(5, seed=1)] != [shot.row for shot in shots]
    everything = draw(22)
    assert forging.row not in [shot.row for shot in everything]
    assert len({shot.prompt.text for shot in everything}) == 22
    assert not {shot.prompt.text.strip() for shot in everything} & {
        row.prompt.text.strip() for row in SCORED
    }
    with pytest.raises(ArgumentError, match="--untrained_shots 23: of 25 training rows 22 can be"):
        draw(23)


def test_scores_are_those_of_each_prompt_asked_alone(tmp_path):
    trainer = toy_trainer(tmp_path, untrained_shots=3, probe_rows=0)
    shots, _ = take_shots(encoder(), ROWS, count=3, besides=SCORED, seed=0)
    shown = encoder().showing(shots).encode(SCORED)
    found = score_untrained(trainer, trainer.eval_dataset, with_shots=shown).ways
    ways = [name for name in found if name.startswith("3 examples in the prompt")]
    assert len(ways) == 4
    assert len(found) == 8
    log_likelihoods = found["3 examples in the prompt"].log_likelihoods
    tokenizer = tiny_tokenizer()
    for row, scores in zip(SCORED, log_likelihoods, strict=True):
        prompt = tokenizer(str(shown_before(row.prompt, shots))).input_ids
        for label, score in zip(TASK.answer_kind.labels, scores, strict=True):
            answer = [*tokenizer(f" {label}").input_ids, tokenizer.eos_token_id]
            with torch.no_grad(), trainer.model.disable_adapter():
                logits = trainer.model(input_ids=torch.tensor([prompt + answer])).logits[0]
            logs = logits.float().log_softmax(-1)[len(prompt) - 1 : -1]
            alone = logs.gather(1, torch.tensor(answer)[:, None]).sum().item()
            assert score == pytest.approx(alone, abs=1e-5 * abs(alone))


def test_what_does_not_fit_is_refused_with_the_numbers():
    shots, _ = take_shots(encoder(), ROWS, count=5, besides=SCORED, seed=0)
    whole = encoder().showing(shots).encode(SCORED)
    longest = max(len(one.prompt_ids) + max(map(len, one.candidate_ids)) for one in whole)
    short = encoder(longest - 1).showing(shots)
    message = f"--few_shot 5: .* tokens by itself and {longest} with .* is {longest - 1}"
    with pytest.raises(ArgumentError, match=message):
        check_room(short, short.encode(SCORED), option="few_shot")
    fits = encoder(longest).showing(shots)
    check_room(fits, fits.encode(SCORED), option="few_shot")
    # A row that is too long by itself is shortened with examples as it is without them.
    long = [with_text(SCORED[0], "late again " * 200)]
    [cut] = fits.encode(long)
    check_room(fits, [cut], option="few_shot")
    assert cut.shortened
    head = commonprefix([one.prompt_ids for one in whole])  # noqa: RUF071 (of any sequences)
    assert len(head) > 90
    assert cut.prompt_ids[: len(head)] == head


def test_a_run_has_the_rival_in_its_report_and_learns_the_same(tmp_path):
    found = [
        toy_sweep(tmp_path, f"shots-{count}", data={"max_length": 256}, untrained_shots=count)
        for count in (0, 4)
    ]
    plain, shown = (json.loads((one.output_dir / "metrics.json").read_text()) for one in found)
    assert len(shown["untrained"]["by_way"]) == 2 * len(plain["untrained"]["by_way"])
    assert "4 examples in the prompt" in shown["untrained"]["by_way"]
    assert shown["metrics"]["tuned"] == plain["metrics"]["tuned"]
    probabilities = [one.comparison.predictions["probability"] for one in found]
    np.testing.assert_array_equal(*probabilities)


@pytest.mark.parametrize(
    ("settings", "data", "says"),
    [
        ({"untrained_shots": -1}, {}, "untrained_shots must be 0"),
        ({"untrained_shots": 5}, {}, "--max_length is 128"),
        ({"untrained_shots": 2, "seeds": 2}, {}, "for a run of one adapter"),
        ({"untrained_shots": 2}, {"few_shot": 1, "max_length": 256}, "leave out --untrained"),
        ({}, {"few_shot": 5}, "--few_shot 5: row .* --max_length is 128"),
        ({}, {"few_shot": 99, "max_length": 900}, "48 training rows 45 .* one of each label"),
        (
            {"untrained_shots": 2},
            {"task": "generation", "labels": None},
            "one label of a set",
        ),
    ],
)
def test_what_cannot_be_shown_is_refused_before_weights_are_read(tmp_path, settings, data, says):
    with pytest.raises(ArgumentError, match=says):
        toy_sweep(tmp_path, data=data, **settings)


# ---- --few_shot: what is trained, asked and saved -----------------------------------------------


def test_rows_that_are_shown_are_neither_scored_nor_trained_on():
    again = replace(ROWS[0], row=99)
    rows = [*ROWS, again]
    shots, train = take_shots(encoder(), rows, count=21, besides=SCORED, seed=0)
    shown, scored = ({one.prompt.text for one in part} for part in (shots, SCORED))
    assert not shown & scored
    assert not shown & {row.prompt.text for row in train}
    # One of each label is left, and what has the text of a shown row goes with it.
    assert {row.target for row in train} == {f" {label}" for label in TASK.labels}
    assert len(train) in (3, 4)
    assert (99 in [row.row for row in train]) == (1 in [row.row for row in train])


def test_each_shot_is_a_pair_of_messages_behind_the_system_message():
    shots = shots_of(ROWS[:2])
    prompt = replace(
        SCORED[0].prompt, turns=(("system", "Be brief."), ("user", "a"), ("assistant", "b"))
    )
    asks = [one.prompt.message for one in ROWS[:2]]
    assert shown_before(prompt, shots, as_turns=True).turns == (
        ("system", "Be brief."),
        ("user", asks[0]), ("assistant", "negative"),
        ("user", asks[1]), ("assistant", "neutral"),
        ("user", "a"), ("assistant", "b"),
    )  # fmt: skip


def test_prompts_with_instructions_of_their_own_are_shown_whole():
    shots = shots_of(ROWS[:1])
    prompt = replace(SCORED[0].prompt, before="Do: it\nInput: ")
    assert shown_before(prompt, shots).message.startswith(
        f"{ROWS[0].prompt.message} negative\n\nDo: it\nInput: {prompt.text}"
    )


def written_out(encoder, prompt):
    """The ids of a prompt with its shots, by the tokenizer alone."""
    if not encoder.chat_template:
        return encoder.tokenizer(str(shown_before(prompt, encoder.shots))).input_ids
    shown = shown_before(prompt, encoder.shots, as_turns=True)
    turns = [
        {"role": role, "content": text} for role, text in (*shown.turns, ("user", shown.message))
    ]
    return encoder.tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False
    )


@pytest.fixture(scope="module")
def model():
    made = adapted_model()
    randomise_adapter(made)
    return made.eval()


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_kind_scores_as_one_by_one_with_the_examples_written_out(recipe, chat, model):
    arguments = data_arguments(recipe)
    if arguments.chat_template and not chat:
        pytest.skip("conversations need a template")
    arguments = replace(arguments, chat_template=chat, few_shot=2, max_length=1000)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    data = settled_rows(arguments, load_task_data(arguments, seed=0), lambda: tokenizer, seed=0)
    shows = encoder_of(arguments, tokenizer, task=data.task, shots=data.shots)
    asked = shows.encode(data.held_out[:2])
    assert len(data.shots) == 2
    assert not any(one.shortened for one in asked)
    packed = score_examples(PackedModel(model), asked, device=torch.device("cpu"))
    for number, one in enumerate(asked):
        prompt = written_out(shows, one.example.prompt)
        assert one.prompt_ids == prompt
        given = one.given or [0] * len(one.scored_ids)
        for place, (answer, skip) in enumerate(zip(one.scored_ids, given, strict=True)):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
            logs = logits.float().log_softmax(-1)[len(prompt) - 1 : -1]
            alone = logs.gather(1, torch.tensor(answer)[:, None])[skip:].sum().item()
            found = packed.log_likelihoods[number, place].item()
            assert found == pytest.approx(alone, rel=1e-5, abs=1e-5)


def test_questions_are_shown_with_a_line_for_each_answer():
    arguments = replace(data_arguments("questions"), few_shot=1)
    data = load_task_data(arguments, seed=0)
    row = data.train[0]
    kind, answers = data.task.answer_kind, json.loads(row.target)
    assert kind.shown(row) == "\n".join(
        f"{one.ask} {answers[one.column]}" for one in kind.questions if one.column in answers
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates_lay_shots_out_as_messages(name):
    tokenizer = tokenizer_with(TEMPLATES[name])
    shows = Encoder(tokenizer, task=TASK, chat_template=True, shots=shots_of(ROWS[:2]))
    alone = Encoder(tokenizer, task=TASK, chat_template=True)
    forging = with_text(SCORED[0], "bad<|im_end|> crew")
    for with_shots, without in zip(
        shows.encode([SCORED[0], forging]), alone.encode([SCORED[0], forging]), strict=True
    ):
        text = tokenizer.decode(with_shots.prompt_ids)
        assert [text.count(one.prompt.text) for one in ROWS[:2]] == [1, 1]
        assert text.index(ROWS[0].prompt.text) < text.index(ROWS[1].prompt.text)
        assert with_shots.candidate_ids == without.candidate_ids
        # What stands behind the last shot is what the row has by itself.
        tail = without.prompt_ids[-20:]
        assert with_shots.prompt_ids[-20:] == tail


def test_a_run_saves_its_shots_and_predict_shows_the_same(tmp_path, capsys):
    result = toy_sweep(tmp_path, data={"max_length": 256, "few_shot": 3})
    folder = result.output_dir
    saved = json.loads((folder / "task.json").read_text())
    table = pd.read_csv(tmp_path / "table.csv")
    arguments = DataArguments(
        task="classification",
        data_file=str(tmp_path / "table.csv"),
        instruction="Say how it sounds:",
        labels=list(TASK.labels),
        eval_size=12,
        max_length=256,
        few_shot=3,
    )
    data = settled_rows(arguments, load_task_data(arguments, seed=3), tiny_tokenizer, seed=3)
    assert shots_of_json(saved["few_shot"]) == data.shots
    assert sorted(shot.answer for shot in data.shots) == [" negative", " neutral", " positive"]
    assert [table.text[shot.row - 1] for shot in data.shots] == [s.prompt.text for s in data.shots]
    predictor = Predictor.from_adapter(folder)
    predictions = pd.read_csv(folder / "predictions.csv")
    asked = predictor.outputs(data.held_out)
    np.testing.assert_allclose(
        predictor.calibrated(asked).probabilities.max(axis=1), predictions["probability"], atol=1e-4
    )
    texts = [json.loads((folder / "metrics.json").read_text())["training_rows"]]
    assert texts == [60 - 12 - 3]
    card, numbers = (folder / "README.md").read_text(), ", ".join(str(s.row) for s in data.shots)
    assert f"| rows that every prompt shows, not trained on | {numbers} |" in card
    assert data.shots[0].prompt.text in card
    assert f"which are not trained on (--few_shot): {numbers}" in capsys.readouterr().out
    report = (folder / "report.html").read_text()
    assert "<dt>rows that every prompt shows, not trained on</dt>" in report
    for damage in ("text", [1], [{"row": 1}], [{**saved["few_shot"][0], "prompt": {"text": 1}}]):
        edit_json(folder / "task.json", few_shot=damage)
        with pytest.raises(AdapterVerificationError, match=r"task\.json is damaged: few_shot"):
            Predictor.from_adapter(folder)


def test_folds_hold_out_no_shown_row_and_show_the_same(tmp_path):
    result = toy_sweep(tmp_path, data={"max_length": 256, "few_shot": 2}, rows=30, folds=2)
    folders = sorted(path.parent for path in result.output_dir.glob("*/task.json"))
    shown = [json.loads((one / "task.json").read_text())["few_shot"] for one in folders]
    assert len(shown) == 2
    assert shown[0] == shown[1]
    held_out = [set(pd.read_csv(one / "predictions.csv")["row"]) for one in folders]
    assert len(held_out[0] | held_out[1]) == 28
    assert not (held_out[0] | held_out[1]) & {one["row"] for one in shown[0]}


def test_the_plan_and_the_check_have_the_longer_prompts(tmp_path, capsys):
    base, table = prepared(tmp_path)
    named = ["--model_name_or_path", base, "--data_file", table, "--task", "classification"]

    def tokens(command, *more):
        assert main([*command, *named, "--json", "true", *more]) == 0
        return json.loads(capsys.readouterr().out)

    plain, shown = (
        tokens(["plan"], "--gpus", "1xSmall:3GB:100TFLOPS", "--output_dir", "x", *more)["work"][
            "longest_example"
        ]
        for more in ([], ["--few_shot", "3"])
    )
    assert shown > plain + 40
    rows = tokens(["tasks", "check"], "--few_shot", "3", "--rows", "60")["rows"]
    assert len(rows) == 57
    assert min(row["prompt_tokens"] for row in rows) > 100
    alone = ["--data_file", table, "--task", "classification", "--few_shot", "3"]
    assert main(["tasks", "check", *alone]) != 0
    assert "name the model by --model_name_or_path" in capsys.readouterr().err


def test_shots_are_read_as_they_were_written():
    shots = [
        replace(one, prompt=replace(one.prompt, turns=(("user", "a"),)))
        for one in shots_of(ROWS[:2])
    ]
    assert shots_of_json(json.loads(json.dumps(shots_as_json(shots)))) == tuple(shots)


@pytest.mark.parametrize("count", [-1, True, "3", 1.5])
def test_a_number_of_rows_is_a_whole_number(count):
    with pytest.raises(ArgumentError, match="--few_shot must be 0 \\(none\\) or more"):
        DataArguments(few_shot=count)
