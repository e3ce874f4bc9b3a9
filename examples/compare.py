"""Base against tuned on held-out rows of a finished run, with the adapter loaded by PEFT alone.

    python examples/compare.py --adapter runs/sentiment [--rows 10] [--generate] [--temperature 0.7]

For each sampled row: the text, the true label, the base's answer, the tuned answer and its
probability; with --generate also what both write by themselves. It ends by saying whether the
adapter answers as it did at the end of training.
"""

import argparse

import pandas as pd

from lora_fsdp.evaluation.comparison import format_written, written_answers
from lora_fsdp.evaluation.metrics import predicted_labels
from lora_fsdp.evaluation.prediction import Predictor
from lora_fsdp.evaluation.report import PredictionRow, format_predictions_table
from lora_fsdp.scripts import configure_output


def compare(adapter: str, *, rows: int, generate: bool, temperature: float, seed: int) -> bool:
    """Print the comparison; returns whether the answers are those of the run's own evaluation."""
    predictor = Predictor.from_adapter(adapter)
    held_out = pd.read_csv(f"{adapter}/predictions.csv", keep_default_na=False).set_index("row")
    sample = held_out.sample(min(rows, len(held_out)), random_state=seed)
    text_column = predictor.task.options()["text_column"]
    table = sample[["text"]].rename(columns={"text": text_column})
    examples = predictor.task.examples(table, with_targets=False)

    tuned = predictor.score(examples)
    answers = predicted_labels(predictor.task, tuned)
    probabilities = tuned.probabilities.amax(dim=1).tolist()
    with predictor.model.disable_adapter():
        base_answers = predicted_labels(predictor.task, predictor.score(examples))
    columns = zip(
        sample.index, sample.text, sample.target, base_answers, answers, probabilities, strict=True
    )
    print(format_predictions_table([PredictionRow(*values) for values in columns]))

    if generate:
        texts = predictor.write(examples, temperature=temperature)
        with predictor.model.disable_adapter():
            base_texts = predictor.write(examples, temperature=temperature)
        for entry in written_answers(predictor.task, examples, base=base_texts, tuned=texts):
            print(format_written(entry))

    agreeing = sum(a == b for a, b in zip(answers, sample.tuned, strict=True))
    print(f"{agreeing} of {len(sample)} answers are those of the run's own evaluation.")
    return agreeing == len(sample)


if __name__ == "__main__":
    configure_output()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapter", required=True, help="output folder of a finished run")
    parser.add_argument("--rows", type=int, default=10, help="how many held-out rows")
    parser.add_argument("--generate", action="store_true", help="let both write freely, too")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    compare(**vars(parser.parse_args()))
