"""`LoraClassifier`: scikit-learn's estimator interface over a run and its finished adapter.

It takes the place of a pipeline's last step: scikit-learn's cross-validation, grid search and
pipelines work on it. Training is `LoraTrainer`'s, answers are `Predictor`'s.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted
from transformers import set_seed

from lora_fsdp.adapter.attach import lora_config
from lora_fsdp.arguments import DataArguments, FineTuningArguments, LoraArguments, ModelArguments
from lora_fsdp.base.loading import load_tokenizer
from lora_fsdp.base.streaming import open_base
from lora_fsdp.data.few_shot import take_shots
from lora_fsdp.data.rows import encoder_of
from lora_fsdp.errors import (
    ArgumentError,
    DataError,
    OutputFolderError,
)
from lora_fsdp.estimator.inputs import labels_of, texts_of, weights_of
from lora_fsdp.estimator.settings import SETTINGS, refusal
from lora_fsdp.evaluation.prediction import Predictor
from lora_fsdp.ranks import world_size
from lora_fsdp.tasks import ClassificationTask, Example
from lora_fsdp.tasks.cells import label_text
from lora_fsdp.tasks.shots import Shot
from lora_fsdp.tasks.weights import check_weights, weighted
from lora_fsdp.training.trainer import LoraTrainer

_LABEL, _WEIGHT = "label", "sample_weight"


class LoraClassifier(ClassifierMixin, BaseEstimator):
    """A classifier of texts: a LoRA adapter, trained by `fit`.

    `X` holds one text for each row: a list, an array, a Series, or a DataFrame (of several columns
    `text_column` is the one). `y` holds a label for each: texts, numbers or truth values.

    Args:
        model_name_or_path: the base, a folder or a name on the Hub.
        instruction: what the model is told to do; `None` = `ClassificationTask`'s own.
        text_column: of a DataFrame with several columns.
        settings: options of `lora-fsdp train` by their names (`learning_rate`, `lora_r`, `seed`,
            `class_weights`, ...), but for those of folders, held-out rows and several adapters.
            They are parameters as scikit-learn has them: `set_params`, a grid and `clone` know
            them.

    Attributes:
        classes_: the labels as `y` has them, sorted; the columns of `predict_proba`.
        adapter_: the finished adapter's folder, the bytes of each file by its name. It goes with
            a pickle; the base does not, and is looked for by its name.
        n_iter_: optimizer steps of `fit`.
    """

    classes_: np.ndarray
    adapter_: dict[str, bytes]
    n_iter_: int

    def __init__(
        self,
        model_name_or_path: str = "",
        *,
        instruction: str | None = None,
        text_column: str | None = None,
        **settings: Any,
    ) -> None:
        self.model_name_or_path = model_name_or_path
        self.instruction = instruction
        self.text_column = text_column
        for name, value in settings.items():
            if (why := refusal(name)) is not None:
                raise ArgumentError(why)
            setattr(self, name, value)

    # ---- parameters, as scikit-learn asks for them ----------------------------------------------
    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """All parameters by name, the settings that were given among them."""
        given = {name: value for name, value in vars(self).items() if name in SETTINGS}
        return {**super().get_params(deep=deep), **given}

    def set_params(self, **params: Any) -> Self:
        """Set parameters; also settings that were not given before.

        Raises:
            ArgumentError: there is no such parameter.
        """
        own = super().get_params(deep=False)
        for name in params:
            if name not in own and (why := refusal(name)) is not None:
                raise ArgumentError(why)
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.string = True
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "adapter_")

    # ---- training and answers -------------------------------------------------------------------
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train an adapter on all rows.

        Args:
            X: N texts.
            y: N labels, of at least two.
            sample_weight: how much each row counts in the loss, N numbers from 0; `None` = alike.

        Raises:
            DataError: rows without text, label or weight; the message names them (from 1).
            ArgumentError: a setting cannot be carried out.
            ModelError: the base cannot be used.
        """
        if world_size() > 1:
            raise ArgumentError(
                "LoraClassifier trains in one process: start it without a launcher, or train with "
                "lora-fsdp train and ask the adapter with Predictor.from_adapter."
            )
        texts, column = texts_of(X, text_column=self.text_column)
        labels, classes = labels_of(y, rows=len(texts))
        table = pd.DataFrame(
            {column: texts, _other(_LABEL, column): labels},
            index=pd.RangeIndex(1, len(texts) + 1, name="row"),
        )
        weight = None
        if sample_weight is not None:
            weight = _other(_WEIGHT, column)
            table[weight] = weights_of(sample_weight, rows=len(texts))
            check_weights(table, weight)
            if not table[weight].astype(float).any():
                raise DataError(f"sample_weight: every weight is zero, of {len(texts)} rows.")
        task = ClassificationTask(
            instruction=self.instruction,
            text_column=column,
            label_column=_other(_LABEL, column),
            labels=[label_text(one) for one in classes.tolist()],
        ).bind(table)
        data = DataArguments(**self._given(DataArguments))
        examples = weighted(
            task, task.examples(table), table, column=weight, classes=data.class_weights
        )
        with tempfile.TemporaryDirectory(prefix="lora-classifier-") as folder:
            steps = self._train(task, examples, data, Path(folder))
            adapter = _read_files(Path(folder))
        self.classes_, self.adapter_, self.n_iter_ = classes, adapter, steps
        _asked_again.pop(self, None)
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """[N, classes] the probability of each label, in the order of `classes_`.

        Raises:
            NotFittedError: `fit` has not been called.
            DataError: rows without text; the message names them (from 1).
        """
        check_is_fitted(self)
        predictor = self._asked()
        texts, _ = texts_of(X, text_column=self.text_column)
        column = str(predictor.task.options()["text_column"])
        table = pd.DataFrame(
            {column: texts}, index=pd.RangeIndex(1, len(texts) + 1, name="row"), dtype=object
        )
        task = predictor.task.bind(table, with_labels=False, for_training=False)
        outputs = predictor.outputs(task.examples(table, with_targets=False))
        found = np.asarray(predictor.calibrated(outputs).probabilities, dtype=np.float64)
        return found / found.sum(axis=1, keepdims=True)  # of float32 values: to the last digit

    def predict(self, X: Any) -> np.ndarray:
        """[N] the likeliest label of each text, as `y` had it."""
        likeliest = self.predict_proba(X).argmax(axis=1)
        return np.asarray(self.classes_[likeliest])

    def save_adapter(self, folder: str | Path) -> Path:
        """Write the adapter's folder, for `lora-fsdp predict`, PEFT, or a server.

        Raises:
            NotFittedError: `fit` has not been called.
            OutputFolderError: the folder is there and not empty.
        """
        check_is_fitted(self)
        target = Path(folder)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise OutputFolderError(f"{target} is there and not an empty folder: name another.")
        target.mkdir(parents=True, exist_ok=True)
        for name, content in self.adapter_.items():
            (target / name).write_bytes(content)
        return target

    # ---- parts ----------------------------------------------------------------------------------
    def _given(self, kind: type) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if SETTINGS.get(name) is kind}

    def _train(
        self,
        task: ClassificationTask,
        examples: Sequence[Example],
        data: DataArguments,
        folder: Path,
    ) -> int:
        """Train into `folder`; returns the optimizer steps."""
        quiet = {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
        given = {**quiet, **self._given(FineTuningArguments), "output_dir": str(folder)}
        training = FineTuningArguments(**given)
        model = ModelArguments(self.model_name_or_path, **self._given(ModelArguments))
        lora = LoraArguments(**self._given(LoraArguments))
        adapter = lora_config(lora, revision=model.model_revision)
        tokenizer = load_tokenizer(model)
        shots: Sequence[Shot] = ()
        if data.few_shot:
            encoder = encoder_of(data, tokenizer, task=task)
            seed = int(training.seed)
            shots, examples = take_shots(encoder, examples, count=data.few_shot, seed=seed)
        set_seed(training.seed)  # the adapter's first values
        trainer = LoraTrainer(
            model=open_base(model, device=training.device, peft_config=adapter),
            args=training,
            task=task,
            processing_class=tokenizer,
            train_dataset=examples,
            peft_config=adapter,
            adapter_name_or_path=lora.adapter_name_or_path,
            max_length=data.max_length,
            chat_template=data.chat_template,
            chat_template_kwargs=data.template_kwargs(),
            thinking=data.thinking,
            shots=shots,
        )
        trainer.train()
        trainer.save_model()
        return int(trainer.state.global_step)

    def _asked(self) -> Predictor:
        """The finished adapter, loaded when it is first asked."""
        if self not in _asked_again:
            with tempfile.TemporaryDirectory(prefix="lora-classifier-") as folder:
                self.save_adapter(folder)
                _asked_again[self] = Predictor.from_adapter(
                    folder,
                    base=self.model_name_or_path,
                    dtype=self.get_params().get("dtype", "auto"),
                    trust_remote_code=self.get_params().get("trust_remote_code", False),
                )
        return _asked_again[self]


# Beside the objects: a pickle or a copy of one holds no base, and asking changes none of them.
_asked_again: WeakKeyDictionary[LoraClassifier, Predictor] = WeakKeyDictionary()


def _other(name: str, taken: str) -> str:
    return f"{name}_" if name == taken else name


def _read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
