"""Rules over the base model's folder and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator

from lora_fsdp.base.conversion.low_precision import published_in
from lora_fsdp.base.conversion.model_weights import ModelWeights
from lora_fsdp.base.fingerprints import base_parameters
from lora_fsdp.compute.architectures import check_architecture, check_token_ids, why_apart
from lora_fsdp.data.encoding import end_of_answer
from lora_fsdp.doctor.case import Case
from lora_fsdp.doctor.fact import UnknownFactError
from lora_fsdp.doctor.finding import Problem, Rules
from lora_fsdp.errors import ArgumentError
from lora_fsdp.placement.packing import PackingChoice
from lora_fsdp.placement.request import Request

RULES = Rules()


@RULES.error(
    "model-missing",
    "There is no such model folder, and the Hub gives no such model.",
    "Check --model_name_or_path.",
)
def _folder(case: Case) -> None:
    case.folder.check()


@RULES.error(
    "model-not-causal",
    "`config.json` is missing, or describes no causal language model.",
    "Choose a causal language model.",
)
def _not_causal(case: Case) -> None:
    case.skeleton.check()


@RULES.error(
    "model-incomplete",
    "The safetensors files lack weights, are cut off, or do not fit `config.json`.",
    "Download the model again (lora-fsdp download).",
)
def _weights(case: Case) -> Iterator[Problem]:
    folder = case.folder.value
    if any(folder.glob("pytorch_model*.bin")) and not any(folder.glob("*.safetensors")):
        raise UnknownFactError  # pickles: their names are known only when they are read
    if not case.is_local and not any(folder.glob("*.safetensors")):
        raise UnknownFactError  # on the Hub
    if (error := case.weights.error) is not None:
        yield Problem(str(error))
        return
    skeleton = case.skeleton.value
    settings = getattr(skeleton.config, "quantization_config", None)
    if settings is not None and published_in(settings) is None:
        raise UnknownFactError  # stored under names of its own
    weights = ModelWeights(skeleton, case.weights.value)
    absent = [name for name, _ in base_parameters(skeleton) if name not in weights]
    shapes = [
        name
        for name, parameter in base_parameters(skeleton)
        if name in weights and weights.shapes[name] != tuple(parameter.shape)
    ]
    kind = type(skeleton).__name__
    if absent:
        yield Problem(
            f"The files of {folder} lack {len(absent)} of the weights of {kind} (for example "
            f"{absent[0]})."
        )
    if shapes:
        yield Problem(
            f"{len(shapes)} weights of {folder} have other shapes than config.json says (for "
            f"example {shapes[0]})."
        )


@RULES.warning(
    "model-pickled",
    "The weights are a pickle, which is read completely and cannot be checked here.",
    "Load the model once with transformers and save it with save_pretrained.",
)
def _pickles(case: Case) -> Iterator[Problem]:
    folder = case.folder.value
    pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if pickles and not any(folder.glob("*.safetensors")):
        yield Problem(f"{folder} has its weights in a pickle ({pickles[0]}).")


@RULES.error(
    "architecture",
    "A model that reads in both directions, or examples longer than its positions.",
    "Choose a causal model, or lower --max_length.",
)
def _architecture(case: Case) -> None:
    check_architecture(case.skeleton.value, longest=case.data_args.max_length)


@RULES.error(
    "packing-impossible",
    "`--packing always` or `--share_prefix always`, with a model that cannot be packed.",
    "Leave both at auto.",
)
def _packing_impossible(case: Case) -> None:
    _asked_packing(case)


@RULES.note(
    "examples-apart",
    "Each example gets a sequence of its own: ALiBi, some recurrent layers, or `--packing never`.",
    "Nothing to do; models that can be packed train faster.",
)
def _examples_apart(case: Case) -> Iterator[Problem]:
    try:
        choice = _asked_packing(case)
    except ArgumentError as error:
        raise UnknownFactError from error
    if choice.packing.is_apart:
        yield Problem(f"Examples are computed as {choice}.")


def _asked_packing(case: Case) -> PackingChoice:
    arguments = case.arguments.value
    reason = why_apart(case.skeleton.value)
    share = arguments.share_prefix
    return Request(packing=arguments.packing, share_prefix=share, why_apart=reason).packing_choice


@RULES.warning(
    "remote-code",
    "`--trust_remote_code true`: the model's own Python code may run.",
    "Leave it out unless the model needs it and you have read its code.",
)
def _remote_code(case: Case) -> Iterator[Problem]:
    if case.model_args.trust_remote_code:
        yield Problem(
            f"trust_remote_code is on: Python code that comes with "
            f"{case.model_args.model_name_or_path} may run on this machine."
        )


@RULES.error(
    "tokenizer-missing",
    "The folder has no tokenizer, or one that cannot be loaded.",
    "Copy the tokenizer's files of the same model into the folder.",
)
def _tokenizer(case: Case) -> None:
    case.tokenizer.check()


@RULES.error(
    "no-end-token",
    "The tokenizer has no end token, so the end of an answer could not be learnt.",
    "Set eos_token in tokenizer_config.json.",
)
def _end_token(case: Case) -> None:
    end_of_answer(case.tokenizer.value, chat_template=False)


@RULES.error(
    "token-without-embedding",
    "A token of the rows, or the padding token, beyond the model's embeddings.",
    "Take the tokenizer that belongs to the model, or give the model more embeddings.",
)
def _beyond_embeddings(case: Case) -> None:
    check_token_ids(case.skeleton.value, case.encoded.value, case.tokenizer.value)


@RULES.error(
    "no-chat-template",
    "`--chat_template true`, and a tokenizer without a chat template.",
    "Leave it out, or use the chat model's own tokenizer.",
)
def _chat_template(case: Case) -> Iterator[Problem]:
    if case.tokenizer.value.eos_token_id is not None and case.encoder.error is not None:
        yield Problem(str(case.encoder.error))


@RULES.note(
    "pad-is-end-token",
    "The padding token is the end token: handled, labels are masked by position.",
    "Nothing to do.",
)
def _pad_is_end(case: Case) -> Iterator[Problem]:
    tokenizer = case.tokenizer.value
    if tokenizer.eos_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        yield Problem(
            f"The padding token is the end token ({tokenizer.eos_token!r}). This is handled: "
            "labels are masked by position, so the end of an answer is learnt all the same."
        )
