"""Tables as classification tasks. Run: python -m pytest tests/tasks/test_classification.py"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score

from lora_fsdp.data.tables import read_table
from lora_fsdp.errors import (
    ColumnNotFoundError,
    EmptyTextError,
    IncompleteTaskError,
    NoRowsError,
    SingleLabelError,
    UnknownLabelError,
)
from lora_fsdp.evaluation.intervals import PairedBootstrap
from lora_fsdp.tasks import ClassificationTask, SentimentTask
from lora_fsdp.tasks.cells import label_text

TWEETS = Path(__file__).parents[2] / "../shared/data/tweet_emotions.csv"


def table_of(texts: list[object], labels: list[object]) -> pd.DataFrame:
    index = pd.RangeIndex(1, len(texts) + 1, name="row")
    return pd.DataFrame({"content": texts, "sentiment": labels}, index=index)


@pytest.fixture
def tweets() -> pd.DataFrame:
    return table_of(["so happy", "late again", "ok"], ["positive", "negative", "neutral"])


@pytest.fixture
def task(tweets: pd.DataFrame) -> SentimentTask:
    return SentimentTask().bind(tweets)


def test_prompt_and_target_are_in_the_format_of_the_article(
    task: SentimentTask, tweets: pd.DataFrame
) -> None:
    example = task.examples(tweets)[0]
    assert example.row == 1
    assert f"{example.prompt}{example.target}" == (
        "Instruction: Analyze the sentiment of the following tweet. Output exactly one word, with "
        "no punctuation or extra text:\nInput: so happy\nOutput: positive"
    )
    assert example.prompt.text == "so happy"
    assert example.prompt.after == "\nOutput:"


def test_subclass_needs_no_method() -> None:
    class SpamTask(ClassificationTask):
        name = "spam"
        instruction = "Spam or ham?"
        text_column = "message"
        label_column = "kind"
        labels = ("spam", "ham")

    table = pd.DataFrame({"kind": ["ham", "spam"], "message": ["hello", "win money"]})
    task = SpamTask().bind(table)
    assert [example.target for example in task.examples(table)] == [" ham", " spam"]
    assert task.labels == ("spam", "ham")


def test_constructor_wins_over_class_attributes_and_none_keeps_them() -> None:
    task = SentimentTask(instruction="Mood?", labels=[0, 1], text_column=None)  # type: ignore[list-item]
    assert task.instruction == "Mood?"
    assert task.labels == ("0", "1")
    assert task.layouts == SentimentTask.layouts
    assert SentimentTask.instruction.startswith("Analyze")


def test_bind_returns_a_copy(tweets: pd.DataFrame) -> None:
    task = SentimentTask()
    bound = task.bind(tweets)
    assert bound is not task
    assert (task.text_column, task.labels) == (None, None)
    assert (bound.text_column, bound.label_column) == ("content", "sentiment")
    assert bound.labels == ("negative", "neutral", "positive")


def test_layouts_are_tried_in_order_and_completed_by_what_is_given() -> None:
    airline = pd.DataFrame({"text": ["a", "b"], "airline_sentiment": ["x", "y"]})
    assert SentimentTask().bind(airline).label_column == "airline_sentiment"
    mixed = airline.rename(columns={"airline_sentiment": "mood"})
    assert SentimentTask(label_column="mood").bind(mixed).text_column == "text"


def test_missing_columns_are_named_with_the_nearest(tweets: pd.DataFrame) -> None:
    task = ClassificationTask(text_column="contnt", label_column="sentiment")
    with pytest.raises(ColumnNotFoundError) as caught:
        task.bind(tweets)
    message = str(caught.value)
    assert "'contnt' and 'sentiment'" in message
    assert "Did you mean 'content' for 'contnt'?" in message
    assert "'content', 'sentiment'" in message
    assert "--text_column" in message


def test_no_fitting_layout_names_all_of_them() -> None:
    with pytest.raises(ColumnNotFoundError, match="'content' and 'sentiment', or 'text' and"):
        SentimentTask().bind(pd.DataFrame({"a": ["x"], "b": ["y"]}))


def test_columns_must_come_from_somewhere(tweets: pd.DataFrame) -> None:
    with pytest.raises(IncompleteTaskError, match=r"which columns.*--label_column.*'content'"):
        ClassificationTask().bind(tweets)
    with pytest.raises(IncompleteTaskError, match="which columns"):
        ClassificationTask(text_column="content").bind(tweets)


def test_blank_instruction_is_refused(tweets: pd.DataFrame) -> None:
    with pytest.raises(IncompleteTaskError, match="instruction"):
        SentimentTask(instruction=" ").bind(tweets)


def test_unbound_task_says_so() -> None:
    task = SentimentTask()
    with pytest.raises(IncompleteTaskError, match=r"bind\(table\)"):
        task.build_prompt({"content": "x"})
    with pytest.raises(IncompleteTaskError, match=r"bind\(table\)"):
        task.build_target({"sentiment": "x"})
    with pytest.raises(IncompleteTaskError, match="label set"):
        task.parse("positive")


def test_empty_table_is_refused(tweets: pd.DataFrame) -> None:
    with pytest.raises(NoRowsError, match="without rows"):
        SentimentTask().bind(tweets[:0])


@pytest.mark.parametrize("empty", [None, float("nan"), "", " \n", pd.NA])
def test_empty_text_is_refused(empty: object) -> None:
    with pytest.raises(EmptyTextError) as caught:
        SentimentTask().bind(table_of(["a", empty, "b"], ["x", "x", "y"]))
    message = str(caught.value)
    assert message.startswith("1 of 3 rows have no text in column 'content': row 2 (no text).")
    assert "--on_bad_rows drop" in message


def test_at_most_five_bad_rows_are_listed() -> None:
    with pytest.raises(EmptyTextError) as caught:
        SentimentTask().bind(table_of(["a", "b", *[""] * 30], ["x", "y", *["x"] * 30]))
    assert "30 of 32" in str(caught.value)
    assert "row 7 (no text), …" in str(caught.value)
    assert "row 8" not in str(caught.value)


def test_unknown_and_missing_labels_are_named(tweets: pd.DataFrame) -> None:
    tweets.loc[1, "sentiment"] = "postive"
    tweets.loc[3, "sentiment"] = None
    with pytest.raises(UnknownLabelError) as caught:
        SentimentTask(labels=["negative", "neutral", "positive"]).bind(tweets)
    message = str(caught.value)
    assert "2 of 3 rows" in message
    assert "row 1 (label 'postive'), row 3 (no label)" in message
    assert "none of 'negative', 'neutral', 'positive'" in message
    assert "--on_bad_rows drop" in message


def test_missing_labels_are_refused_when_the_set_is_read_from_the_data() -> None:
    with pytest.raises(UnknownLabelError, match=r"row 2 \(no label\)"):
        SentimentTask().bind(table_of(["a", "b", "c"], ["x", " ", "y"]))


def test_single_label_is_refused_unless_evaluating() -> None:
    table = table_of(["a", "b"], ["x", "x"])
    with pytest.raises(SingleLabelError, match=r"All 2 rows have the label 'x'.*sorted file"):
        SentimentTask().bind(table)
    task = SentimentTask(labels=["x", "y"]).bind(table, for_training=False)
    assert task.labels == ("x", "y")


def test_table_to_predict_needs_no_labels() -> None:
    table = pd.DataFrame({"content": ["a", "b"]})
    task = SentimentTask(labels=["x", "y"]).bind(table, with_labels=False)
    examples = task.examples(table, with_targets=False)
    assert [example.target for example in examples] == [None, None]
    assert task.labels == ("x", "y")
    with pytest.raises(ColumnNotFoundError, match="needs 'content', or 'text', but"):
        SentimentTask().bind(pd.DataFrame({"tweet": ["a"]}), with_labels=False)
    with pytest.raises(EmptyTextError):
        task.bind(pd.DataFrame({"content": [""]}), with_labels=False)


def test_bad_rows_can_be_dropped() -> None:
    table = table_of(["a", " ", "c", "d", ""], ["x", "x", "z", "y", ""])
    task = SentimentTask(labels=["x", "y"])
    assert task.bad_rows(table).to_dict() == {2: "no text", 3: "label 'z'", 5: "no text"}
    kept, dropped = task.drop_bad_rows(table)
    assert (list(kept.index), dropped) == ([1, 4], 3)
    assert task.bind(kept).bad_rows(kept).empty
    kept, dropped = task.drop_bad_rows(table, with_labels=False)
    assert (list(kept.index), dropped) == ([1, 3, 4], 2)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (np.int64(1), "1"),
        (1.0, "1"),
        (np.float32(2.0), "2"),
        (0.5, "0.5"),
        (True, "True"),
        (" joy ", "joy"),
        ("1.0", "1.0"),
        (None, ""),
        (float("nan"), ""),
        (pd.NA, ""),
    ],
)
def test_label_text(value: object, text: str) -> None:
    assert label_text(value) == text


def test_labels_that_pandas_made_floats_are_whole_numbers_again() -> None:
    table = table_of(["a", "b", "c"], [0, 1, None])
    kept, _ = SentimentTask().drop_bad_rows(table)
    task = SentimentTask().bind(kept)
    assert task.labels == ("0", "1")
    assert task.examples(kept)[1].target == " 1"


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        (" positive", "positive"),
        ("Positive.", "positive"),
        ('"POSITIVE"\nbecause', "positive"),
        ("\n\n positive", "positive"),
        ("**neutral**", "neutral"),
        ("- neutral", "neutral"),
        ("positive, I think", "positive"),
        ("negative because it is late", "negative"),
        ("very negative", "very negative"),
        ("not positive", None),
        ("non-negative", None),
        ("positively", None),
        ("The sentiment is positive", None),
        ("", None),
        (" \n ", None),
    ],
)
def test_parse(answer: str, label: str | None) -> None:
    labels = ["negative", "neutral", "positive", "very negative", "very"]
    assert ClassificationTask(labels=labels).parse(answer) == label


@pytest.mark.parametrize(
    ("labels", "answer", "label"),
    [
        (["C", "C++"], "C++ of course", "C++"),
        (["us", "US"], "US", "US"),
        (["us", "US"], "us", "us"),
        (["0", "1"], "-1", None),
        (["-1", "1"], "-1", "-1"),
        (["0", "1"], "1.5", None),
        (["0", "1"], "1.", "1"),
        ([":)", ":("], ":(", ":("),
    ],
)
def test_parse_of_unusual_labels(labels: list[str], answer: str, label: str | None) -> None:
    assert ClassificationTask(labels=labels).parse(answer) == label


def test_metrics_by_hand(task: SentimentTask) -> None:
    targets = ["positive", "positive", "negative", "negative"]
    metrics = task.compute_metrics(targets, ["positive", None, "negative", "positive"])
    assert metrics["accuracy"] == 0.5
    assert metrics["precision/positive"] == 0.5
    assert metrics["recall/negative"] == 0.5
    assert metrics["f1/negative"] == pytest.approx(2 / 3)
    # The label set has a third label, which is in neither: no mean counts it.
    assert metrics["f1/neutral"] == 0
    assert metrics["macro_f1"] == pytest.approx((0.5 + 2 / 3) / 2)
    assert metrics["weighted_f1"] == pytest.approx((0.5 + 2 / 3) / 2)
    assert task.primary_metric in metrics
    assert all(type(value) is float for value in metrics.values())
    assert len(metrics) == 3 + 3 * 3


@pytest.mark.parametrize(
    ("targets", "given"),
    [
        (["negative", "positive"], ["negative", "positive"]),
        (["negative", "positive"], ["negative", "neutral"]),  # given, and never right
        (["neutral"], ["neutral"]),
        (["negative", "negative", "positive"], ["positive", "positive", "positive"]),
    ],
)
def test_macro_f1_is_that_of_scikit_learn(
    task: SentimentTask, targets: list[str], given: list[str]
) -> None:
    """Over the labels that occur; the interval's own value is the same."""
    expected = f1_score(targets, given, average="macro", zero_division=0)
    assert task.compute_metrics(targets, given)["macro_f1"] == pytest.approx(expected)
    bootstrap = PairedBootstrap(targets, {"x": given}, labels=task.labels)
    assert bootstrap.interval("x", "macro_f1").value == pytest.approx(expected)


def test_metrics_without_any_answer_are_zero(task: SentimentTask) -> None:
    assert set(task.compute_metrics(["positive", "negative"], [None, "what"]).values()) == {0.0}


def test_confusion_matrix(task: SentimentTask) -> None:
    targets = ["positive", "positive", "negative"]
    matrix = task.confusion_matrix(targets, ["positive", "negative", "negative"])
    assert list(matrix.columns) == list(matrix.index) == ["negative", "neutral", "positive"]
    assert matrix.loc["positive", "negative"] == 1
    assert matrix.to_numpy().sum() == 3
    matrix = task.confusion_matrix(targets, ["positive", None, "negative"])
    assert matrix.columns[-1] == "(none)"
    assert matrix.loc["positive", "(none)"] == 1
    assert matrix.to_numpy().sum() == 3


@pytest.mark.skipif(not TWEETS.exists(), reason="needs the article's tweets")
def test_the_tweets_of_the_article() -> None:
    table = read_table(TWEETS)
    with pytest.raises(UnknownLabelError, match=r"1 of 40001 rows .* row 40001 \(no label\)"):
        SentimentTask().bind(table)
    kept, dropped = SentimentTask().drop_bad_rows(table)
    assert dropped == 1
    assert len(SentimentTask().bind(kept).labels or ()) == 13
