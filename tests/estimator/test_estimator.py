"""scikit-learn's interface over a run. Run: python -m pytest tests/estimator"""

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import get_tags
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_fsdp import LoraClassifier, Predictor
from lora_fsdp.errors import (
    ArgumentError,
    BaseMismatchError,
    ColumnNotFoundError,
    DataError,
    EmptyTextError,
    LabelCollisionError,
    MalformedRowError,
    OutputFolderError,
    SingleLabelError,
    UnknownLabelError,
)
from tests.support.adapters import save_base
from tests.support.tiny import toy_table

INSTRUCTION = "Say how it sounds:"
TABLE = toy_table(24)
TEXTS, LABELS = TABLE["text"].tolist(), TABLE["label"].tolist()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_base(tmp_path_factory.mktemp("estimator") / "base"))


def classifier(base, **settings):
    defaults = {
        "instruction": INSTRUCTION,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "lora_target_modules": ["all-linear"],
        "max_length": 128,
    }
    return LoraClassifier(base, **{**defaults, **settings})


@pytest.fixture(scope="module")
def fitted(base):
    return classifier(base).fit(TEXTS, LABELS)


def test_few_shot_goes_with_the_adapter(base, tmp_path):
    made = classifier(base, few_shot=3, max_length=256, num_train_epochs=1).fit(TEXTS, LABELS)
    assert made.get_params()["few_shot"] == 3
    shown = Predictor.from_adapter(made.save_adapter(tmp_path / "saved")).encoder.shots
    assert sorted(shot.answer.strip() for shot in shown) == sorted(set(LABELS))
    assert {shot.prompt.text for shot in shown} < set(TEXTS)
    assert made.n_iter_ == 3  # 21 rows, 8 a step


def asked_one_by_one(base, folder, texts, labels):
    """[texts, labels] probabilities by PEFT and transformers alone, a forward each."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in texts:
        prompt = tokenizer(f"Instruction: {INSTRUCTION}\nInput: {text}\nOutput:").input_ids
        scores = []
        for label in labels:
            answer = [*tokenizer(f" {label}").input_ids, tokenizer.eos_token_id]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0].float()
            logs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            scores.append(logs.gather(1, torch.tensor(answer)[:, None]).sum().item())
        rows.append(scores)
    return torch.tensor(rows).softmax(-1).numpy()


def test_probabilities_are_those_of_the_saved_adapter_asked_one_by_one(base, fitted, tmp_path):
    found = fitted.predict_proba(TEXTS)
    folder = fitted.save_adapter(tmp_path / "adapter")
    plain = asked_one_by_one(base, folder, TEXTS[:6], fitted.classes_)
    np.testing.assert_allclose(found[:6], plain, atol=1e-5)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-12)
    assert list(fitted.predict(TEXTS)) == list(fitted.classes_[found.argmax(axis=1)])
    table = Predictor.from_adapter(folder).predict(TEXTS)
    assert table["predicted_label"].tolist() == list(fitted.predict(TEXTS))
    np.testing.assert_allclose(table["probability"], found.max(axis=1), atol=1e-6)


def test_fit_learns(base):
    texts = ["good friendly crew", "bad lost bag"] * 12
    labels = [1, 0] * 12
    model = classifier(base, num_train_epochs=6).fit(texts, labels)
    assert model.score(texts, labels) == 1.0
    assert model.classes_.tolist() == [0, 1]
    assert model.predict(texts[:2]).tolist() == [1, 0]  # as y had them, not as texts
    assert model.n_iter_ == 18


@pytest.mark.parametrize(
    "form",
    [
        np.array,
        lambda texts: np.array(texts, dtype=object)[:, None],
        pd.Series,
        lambda texts: pd.DataFrame({"review": texts}, index=range(7, 7 + len(texts))),
    ],
    ids=["array", "column", "series", "frame"],
)
def test_every_form_of_texts_is_the_same(fitted, form):
    assert (fitted.predict_proba(form(TEXTS[:5])) == fitted.predict_proba(TEXTS[:5])).all()


def test_a_frame_of_several_columns_is_trained_on_the_one_that_is_named(base, fitted):
    frame = pd.DataFrame({"id": range(24), "label": TEXTS})  # a name that the task uses, too
    model = classifier(base, text_column="label").fit(frame, pd.Series(LABELS, name="label"))
    np.testing.assert_array_equal(model.predict_proba(frame), fitted.predict_proba(TEXTS))


def test_a_pickle_answers_alike_and_holds_no_base(base, fitted):
    before = fitted.predict_proba(TEXTS)
    pickled = pickle.dumps(fitted)
    assert len(pickled) < 300_000
    assert (pickle.loads(pickled).predict_proba(TEXTS) == before).all()


def test_another_base_is_refused(fitted, tmp_path):
    from tests.support.tiny import tiny_model, tiny_tokenizer

    tiny_model(seed=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    moved = pickle.loads(pickle.dumps(fitted))
    moved.set_params(model_name_or_path=str(tmp_path / "other"))
    with pytest.raises(BaseMismatchError):
        moved.predict(TEXTS)


def test_weights_count_as_the_same_rows_left_out(base):
    weights = [1.0, 0.0] * 12
    kept = [place for place, weight in enumerate(weights) if weight]
    some = [TEXTS[place] for place in kept], [LABELS[place] for place in kept]
    weighted = classifier(base).fit(TEXTS, LABELS, sample_weight=weights)
    np.testing.assert_allclose(
        weighted.predict_proba(TEXTS), classifier(base).fit(*some).predict_proba(TEXTS), atol=1e-6
    )
    assert (
        weighted.predict_proba(TEXTS) != classifier(base).fit(TEXTS, LABELS).predict_proba(TEXTS)
    ).any()


def test_parameters_are_scikit_learns(base):
    model = classifier(base, lora_r=4)
    assert model.get_params()["lora_r"] == 4
    twin = clone(model)
    assert twin.get_params() == model.get_params()
    assert twin.set_params(learning_rate=1.0, seed=7).get_params()["seed"] == 7
    assert "seed" not in model.get_params()
    assert "lora_r=4" in repr(model)
    tags = get_tags(model)
    assert tags.input_tags.string
    assert not tags.input_tags.two_d_array
    with pytest.raises(NotFittedError):
        twin.predict(TEXTS)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"learning_rat": 1}, "no setting 'learning_rat'. Did you mean 'learning_rate'"),
        ({"output_dir": "x"}, "save_adapter"),
        ({"eval_strategy": "epoch"}, "hold rows out with scikit-learn"),
        ({"folds": 5}, "model selection"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(base, settings, says):
    with pytest.raises(ArgumentError, match=says):
        LoraClassifier(base, **settings)
    with pytest.raises(ValueError, match=says):
        LoraClassifier(base).set_params(**settings)


@pytest.mark.parametrize(
    ("texts", "labels", "weights", "error", "says"),
    [
        ("a text", ["x"], None, DataError, "give a list of texts"),
        (np.ones((2, 2)), [0, 1], None, DataError, r"shape \(2, 2\)"),
        ([1.5, "b"], ["x", "y"], None, DataError, "Row 1 of X is 1.5"),
        (["a", ["b"]], ["x", "y"], None, DataError, "Row 2 of X"),
        (["a", " ", None], list("xyx"), None, EmptyTextError, "2 of 3 rows .*'text'.*row 2"),
        (["a", "b"], ["x", None], None, UnknownLabelError, "row 2"),
        (["a", "b"], ["x"], None, DataError, "2 rows and y 1"),
        (["a", "b"], None, None, DataError, "requires y"),
        (["a", "b"], ["x", "x"], None, SingleLabelError, "one class, 'x'"),
        (["a", "b"], np.array([1, "1"], object), None, ValueError, "Unknown label type"),
        (["a", "b"], ["x", "y"], [0, 0], DataError, "every weight is zero"),
        (["a", "b"], ["x", "x "], None, LabelCollisionError, "'x'"),
        (["a", "b"], [0.1, 0.7], None, ValueError, "continuous"),
        (["a", "b"], ["x", "y"], [1, -1], MalformedRowError, "row 2.*sample_weight"),
        (["a", "b"], ["x", "y"], [1], DataError, "sample_weight has the shape"),
        (pd.DataFrame({"a": ["t"], "b": ["t"]}), ["x"], None, ColumnNotFoundError, "text_column"),
    ],
)
def test_rows_that_cannot_be_learnt_are_refused_before_the_base_is_looked_for(
    texts, labels, weights, error, says
):
    with pytest.raises(error, match=says):
        LoraClassifier("no/such/base").fit(texts, labels, sample_weight=weights)


def test_a_text_that_is_empty_is_refused_where_it_is_asked_about(fitted):
    with pytest.raises(EmptyTextError, match="row 2"):
        fitted.predict(["a", ""])


def test_a_folder_that_holds_something_is_not_written_into(fitted, tmp_path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(OutputFolderError):
        fitted.save_adapter(tmp_path)


@pytest.mark.slow
def test_cross_validation_pipelines_and_grids(base):
    model = classifier(base, num_train_epochs=1)
    assert len(cross_val_score(model, TEXTS, LABELS, cv=2)) == 2
    found = cross_val_predict(model, TABLE[["text"]], LABELS, cv=2, method="predict_proba")
    assert found.shape == (24, 3)
    lower = FunctionTransformer(lambda texts: [text.lower() for text in texts])
    pipeline = make_pipeline(lower, clone(model)).fit(TEXTS, LABELS)
    assert set(pipeline.predict(TEXTS)) <= set(LABELS)
    assert isinstance(pipeline, Pipeline)
    grid = GridSearchCV(
        make_pipeline(lower, model), {"loraclassifier__learning_rate": [1e-4, 1e-2]}, cv=2
    ).fit(TEXTS, LABELS)
    assert len(grid.cv_results_["params"]) == 2
    rates = {one["loraclassifier__learning_rate"] for one in grid.cv_results_["params"]}
    assert grid.best_params_["loraclassifier__learning_rate"] in rates
    scores = grid.cv_results_["mean_test_score"]
    assert np.isfinite(scores).all()
