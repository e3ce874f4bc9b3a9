"""scikit-learn's own checks of an estimator. Run: python -m pytest tests/estimator -m slow"""

import pytest
from sklearn.utils.estimator_checks import check_estimator
from sklearn.utils.validation import check_is_fitted, validate_data

from lora_fsdp import LoraClassifier
from tests.support.adapters import save_base

#: What does not apply, and why.
DOES_NOT_APPLY = {
    "check_sample_weight_equivalence_on_dense_data": "gradient descent in steps: a row twice makes "
    "more steps than a row of weight 2 (a row of weight 0 is the same as none, which is tested)",
    "check_classifiers_train": "asks for 83 % on blobs of numbers, and the base of the tests has "
    "random weights and one step",
    "check_methods_sample_order_invariance": "rows in another order lie in other packed sequences, "
    "whose sums round otherwise in float32: equal to 1e-5, and 1e-7 is asked for",
    "check_methods_subset_invariance": "as check_methods_sample_order_invariance",
}


class OfNumbers(LoraClassifier):
    """Rows of numbers, each written as a text; scikit-learn checks no estimators of texts."""

    def __init__(
        self,
        model_name_or_path="",
        *,
        instruction="Tell the sign:",
        text_column=None,
        max_length=256,
        max_steps=1,
        seed=0,
    ):
        super().__init__(model_name_or_path, instruction=instruction, text_column=text_column)
        self.max_length, self.max_steps, self.seed = max_length, max_steps, seed

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.string = True, False
        return tags

    def fit(self, X, y, sample_weight=None):
        if y is None:
            return super().fit([], y)
        X, y = validate_data(self, X, y)
        return super().fit(written(X), y, sample_weight)

    def predict_proba(self, X):
        check_is_fitted(self)
        return super().predict_proba(written(validate_data(self, X, reset=False)))


def written(rows):
    return [" ".join(f"{value:.1f}" for value in row[:8]) for row in rows]


@pytest.mark.slow
def test_scikit_learns_checks(tmp_path):
    base = save_base(tmp_path / "base")
    found = check_estimator(
        OfNumbers(str(base)), expected_failed_checks=DOES_NOT_APPLY, on_skip=None
    )
    passed = [one for one in found if one["status"] == "passed"]
    assert len(passed) >= 50
    # A reason that is no longer one must go.
    failing = {one["check_name"] for one in found if one["status"] == "xfail"}
    assert failing == set(DOES_NOT_APPLY)
