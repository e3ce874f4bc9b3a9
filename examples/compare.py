"""Base against tuned on chosen texts: load an adapter as plain PEFT and ask both.

    python examples/compare.py --adapter runs/sentiment --data_file .cache/default/airline_tweets.csv

For each sampled row: the text, the true label, the base's answer, the tuned answer and its
probability; with `--generate` also what both write by themselves.
"""
