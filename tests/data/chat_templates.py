"""Short chat templates that lay a conversation out as known families do, in our own words."""

from lora_fsdp.data.encoding import Encoder
from tests.support.tiny import tiny_tokenizer

#: The model opens the block itself; its own answers have an empty one; a switch closes it.
QWEN3 = (
    "{%- for m in messages %}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<|im_start|>assistant\n<think>\n' ~ (m.reasoning_content or '')|trim ~ '\n</think>\n\n' }}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') ~ '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
#: The generation prompt opens the block.
QWEN3_THINKING = QWEN3.replace(
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}",
    "{{ '<think>\n' }}",
)
#: The same, and the template's own answers have no block.
DEEPSEEK_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% elif m.role == 'assistant' %}"
    "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + '<|eos|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
#: Channels: an answer stands in the final one.
HARMONY = (
    "{{ '<|start|>system<|message|>Reasoning: ' ~ (reasoning_effort or 'medium') }}<|end_turn|>"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end_turn|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
#: A block on one line, and no token that ends a turn.
GLM = (
    "[gMASK]<sop>{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>\n' + m.content }}"
    "{% else %}{{ '<|assistant|>\n<think></think>\n' + m.content|trim }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{{ '\n<think></think>' if enable_thinking is defined and not enable_thinking else '' }}"
    "{% endif %}"
)
#: Square brackets.
MAGISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% else %}{{ m.content }}<|eos|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[THINK]{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "qwen3": QWEN3,
    "qwen3-thinking": QWEN3_THINKING,
    "deepseek-r1": DEEPSEEK_R1,
    "harmony": HARMONY,
    "glm": GLM,
    "magistral": MAGISTRAL,
    "plain": PLAIN,
}
_SPECIAL = ("<|im_start|>", "<|im_end|>", "<|User|>", "<|Assistant|>", "<|eos|>", "<|start|>",
            "<|channel|>", "<|message|>", "<|end_turn|>", "<|return|>", "<|user|>",
            "<|assistant|>")  # fmt: skip


def tokenizer_with(template):
    """A tiny tokenizer with this template and the control tokens of all of them."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(_SPECIAL)})
    tokenizer.add_tokens(["<think>", "</think>", "[THINK]", "[/THINK]"])
    tokenizer.bos_token = "<|end|>"
    tokenizer.chat_template = template
    return tokenizer


def encoder_with(template, task, **options):
    """An encoder that uses this template."""
    return Encoder(tokenizer_with(template), task=task, chat_template=True, **options)
