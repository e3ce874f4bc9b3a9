"""Fine-tune a causal LM to tell the sentiment of tweets, and compare it with what it should beat.

    accelerate launch --config_file accelerate_configs/fsdp2.yaml examples/sentiment.py \
        --config examples/recipes/deepseek-7b-article.yaml --data_file tweets.csv

Every option can stand in the recipe or on the command line (`--help` lists them). `--task` takes
any other registered task; a table of one's own needs only `--task classification
--instruction ... --text_column ... --label_column ...`.
"""

from lora_fsdp import finetune
from lora_fsdp.scripts import parse_arguments

if __name__ == "__main__":
    finetune(**parse_arguments(task="sentiment"))
