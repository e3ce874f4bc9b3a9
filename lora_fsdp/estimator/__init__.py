"""scikit-learn's interface over a run and its finished adapter."""

from lora_fsdp.estimator.classifier import LoraClassifier

__all__ = ["LoraClassifier"]
