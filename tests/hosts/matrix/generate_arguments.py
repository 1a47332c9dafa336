"""Argument sets of generate()."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from tiny_models import PAD, tiny_processor
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    MinLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)

from matrix.families import BATCH, ONE, SEVERAL, TEXT
from matrix.keep_all import ARGS, Call, Inputs, Table
from ocvtp.transformers_names import cache_name

GENERATE = Table("generate")
NUM_NEW = 4
GREEDY = {"max_new_tokens": NUM_NEW, "do_sample": False}
WHOLE = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
ENDS = list(range(3, 128, 2))
"""Half of all tokens end an answer."""


def length_of(inputs: Inputs) -> int:
    """Columns of the prompt."""
    return int(inputs["input_ids"].shape[1])


# ------------------------------------------------------------------------------ plain settings

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "one tensor of tokens": dict.fromkeys(WHOLE, False),
    "sampling": {"do_sample": True},
    "sampling, `temperature`, `top_k`, `top_p`": {
        "do_sample": True, "temperature": 1.5, "top_k": 20, "top_p": 0.9,
    },
    "sampling, `min_p`, `typical_p`, `epsilon_cutoff`, `eta_cutoff`": {
        "do_sample": True, "min_p": 0.01, "typical_p": 0.95,
        "epsilon_cutoff": 1e-4, "eta_cutoff": 1e-4,
    },
    "sampling, `top_h`": {"do_sample": True, "top_h": 0.5},
    "`num_return_sequences`": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beams, `num_return_sequences`, `length_penalty`, `early_stopping`": {
        "num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5, "early_stopping": True,
        "eos_token_id": ENDS,
    },
    "beams, sampling": {"num_beams": 2, "do_sample": True},
    "`repetition_penalty`": {"repetition_penalty": 1.7},
    "`no_repeat_ngram_size`": {"no_repeat_ngram_size": 1},
    "`encoder_repetition_penalty`": {"encoder_repetition_penalty": 1.5},
    "`encoder_no_repeat_ngram_size`": {"encoder_no_repeat_ngram_size": 1},
    "`min_new_tokens`": {"min_new_tokens": 3, "eos_token_id": ENDS},
    "`max_time`": {"max_time": 1e9},
    "`max_time`, none left": {"max_time": 1e-9},
    "`eos_token_id`, several": {"eos_token_id": ENDS, "max_new_tokens": 9},
    "`forced_bos_token_id`, `forced_eos_token_id`": {
        "forced_bos_token_id": 7, "forced_eos_token_id": 9,
    },
    "`suppress_tokens`, `begin_suppress_tokens`": {
        "suppress_tokens": [5, 6], "begin_suppress_tokens": [*range(3, 60)],
    },
    "`bad_words_ids`": {"bad_words_ids": [[i] for i in range(3, 60)] + [[70, 71]]},
    "`sequence_bias`": {"sequence_bias": {(7,): 9.0, (7, 8): 9.0}},
    "`exponential_decay_length_penalty`": {
        "exponential_decay_length_penalty": (1, 1.5), "eos_token_id": ENDS, "max_new_tokens": 9,
    },
    "`guidance_scale`": {"guidance_scale": 1.5},
    "`renormalize_logits`, `remove_invalid_values`": {
        "renormalize_logits": True, "remove_invalid_values": True,
    },
    "`output_hidden_states`": {"output_hidden_states": True},
    "`use_cache=False`": {"use_cache": False},
    '`cache_implementation="dynamic"`': {"cache_implementation": "dynamic"},
    '`cache_implementation="static"`': {"cache_implementation": "static"},
    '`cache_implementation="offloaded"`': {"cache_implementation": "offloaded"},
    '`cache_implementation="offloaded_static"`': {"cache_implementation": "offloaded_static"},
    '`cache_implementation="quantized"`': {
        "cache_implementation": "quantized", "cache_config": {"backend": "quanto"},
    },
    "`prefill_chunk_size`": {"prefill_chunk_size": 7},
    "`prompt_lookup_num_tokens`": {"prompt_lookup_num_tokens": 3, "output_scores": True},
    "`num_beam_groups`": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "`penalty_alpha`": {"penalty_alpha": 0.6, "top_k": 4},
    "`dola_layers`": {"dola_layers": "low"},
    "`logits_to_keep`, a number": {"logits_to_keep": 2},
    "`synced_gpus`": {"synced_gpus": False},
    "`disable_compile`": {"disable_compile": True},
    "an argument that nobody knows": {"colour": "red"},
}  # fmt: skip
FAST = {
    "greedy", "sampling", "`num_return_sequences`", "beams", "`repetition_penalty`",
    "`encoder_no_repeat_ngram_size`", "`min_new_tokens`", "`use_cache=False`",
    "`prefill_chunk_size`", "`logits_to_keep`, a number", "an argument that nobody knows",
}  # fmt: skip
"""Most of the others never reach what is ours."""
HUB = "requires `trust_remote_code=True`"
NO_CUDA = "CUDA driver|not compiled with CUDA|Backend doesn't support"
RAISES = {
    "`guidance_scale`": "mat1 and mat2 shapes cannot be multiplied",  # Qwen's
    '`cache_implementation="offloaded"`': NO_CUDA,
    '`cache_implementation="offloaded_static"`': NO_CUDA,
    '`cache_implementation="quantized"`': "You need to install optimum-quanto",
    "`num_beam_groups`": HUB,
    "`penalty_alpha`": HUB,
    "`dola_layers`": HUB,
    "an argument that nobody knows": "`model_kwargs` are not used by the model: .'colour'",
}
SINCE = (5, 18)
"""Before, rows that stand several times share images wrongly, and chunks are of the wrong axis."""
WRONG_BEFORE = {"num_beams", "num_return_sequences", "prefill_chunk_size"}
LEAVE_SOMETHING = ("cache_implementation", "prompt_lookup_num_tokens")
"""Settings of which transformers leaves something on the model."""


def with_settings(settings: dict[str, Any], call: Call) -> Inputs:
    inputs = call.inputs(ONE if "prompt_lookup_num_tokens" in settings else BATCH)
    if settings.keys() & {*LEAVE_SOMETHING}:
        call.copy()
    if "offloaded" in settings.get("cache_implementation", "") and torch.cuda.is_available():
        call.model.cuda()
        inputs = {name: value.cuda() for name, value in inputs.items()}
    return inputs | GREEDY | WHOLE | settings


for _title, _settings in SETTINGS.items():
    _marks = {"slow": _title not in FAST, "raises": RAISES.get(_title)}
    if _settings.keys() & WRONG_BEFORE:
        _marks["since"] = SINCE
    GENERATE(_title, **_marks)(partial(with_settings, _settings))


@GENERATE("`output_attentions`", slow=True)
def attentions(call: Call) -> Inputs:
    call.copy().set_attn_implementation("eager")
    return call.inputs() | GREEDY | WHOLE | {"output_attentions": True}


@GENERATE("`max_length`, `min_length`")
def lengths(call: Call) -> Inputs:
    inputs = call.inputs()
    numbers = {"min_length": length_of(inputs) + 2, "max_length": length_of(inputs) + 5}
    return inputs | WHOLE | numbers | {"do_sample": False, "eos_token_id": ENDS}


@GENERATE("`max_length` and `max_new_tokens`", slow=True)
def both_lengths(call: Call) -> Inputs:
    inputs = call.inputs()
    return inputs | GREEDY | WHOLE | {"max_length": length_of(inputs) + 2}


@GENERATE("no length at all", slow=True)
def no_length(call: Call) -> Inputs:
    return call.inputs() | {"do_sample": False}


@GENERATE("`generation_config`", slow=True)
def config(call: Call) -> Inputs:
    inputs = call.inputs()
    settings = {"max_length": length_of(inputs) + 4, "repetition_penalty": 1.3}
    return inputs | {"generation_config": GenerationConfig(pad_token_id=PAD, **WHOLE, **settings)}


@GENERATE("`generation_config` and arguments")
def config_and_arguments(call: Call) -> Inputs:
    inputs = call.inputs()
    given = GenerationConfig(max_length=length_of(inputs) + 9, pad_token_id=PAD, num_beams=2)
    return inputs | WHOLE | {"generation_config": given, "max_new_tokens": 3, "num_beams": 1}


@GENERATE("the model's own `generation_config`")
def own_config(call: Call) -> Inputs:
    inputs, own = call.inputs(), call.copy().generation_config
    own.max_length, own.min_length = length_of(inputs) + 6, length_of(inputs) + 3
    own.eos_token_id, own.repetition_penalty = ENDS, 1.3
    return inputs | WHOLE


@GENERATE("`watermarking_config`", slow=True)
def watermark(call: Call) -> Inputs:
    given = WatermarkingConfig(bias=2.5, seeding_scheme="selfhash")
    return call.inputs(ONE) | GREEDY | WHOLE | {"watermarking_config": given}


@GENERATE("`watermarking_config`, SynthID", slow=True)
def synthid(call: Call) -> Inputs:
    given = SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2, 3, 4])
    return call.inputs() | GREEDY | WHOLE | {"watermarking_config": given, "do_sample": True}


@GENERATE("`stop_strings`", slow=True)
def stop_strings(call: Call) -> Inputs:
    words = {"stop_strings": ["e", "a", "x", "7"], "tokenizer": tiny_processor().tokenizer}
    return call.inputs() | GREEDY | WHOLE | words | {"max_new_tokens": 12}


@GENERATE(
    "`token_healing`",
    raises="Image features and image tokens do not match",
    refused="did not read the prompt that it was given.*token_healing",
    remedy="Leave `token_healing` out: it rewrites the prompt that was shortened.",
)
def token_healing(call: Call) -> Inputs:
    healing = {"token_healing": True, "tokenizer": tiny_processor().tokenizer}
    return call.inputs(ONE) | GREEDY | healing


# ---------------------------------------------------------------------- objects of the caller's


class Notes:
    """Notes what it is shown; a processor, a criterion, a prefix function and a streamer."""

    def __init__(self, call: Call) -> None:
        self.seen = call.seen

    def put(self, value: Tensor) -> None:
        self.seen.append(value.clone())

    def end(self) -> None:
        self.seen.append("end")

    def allow(self, row: int, prefix: Tensor) -> list[int]:
        self.seen.append((row, prefix.clone()))
        return [7 + row, 20 + len(prefix) % 3, 40 + row]


class NotedProcessor(Notes, LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append((input_ids.clone(), scores.clone()))
        return scores.roll(1, dims=-1)


class NotedCriterion(Notes, StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.seen.append((input_ids.clone(), sorted(kwargs)))
        return input_ids[:, -1] % 3 == 0


@GENERATE("`streamer`")
def streamer(call: Call) -> Inputs:
    return call.inputs(ONE) | GREEDY | WHOLE | {"streamer": Notes(call)}


@GENERATE("a `streamer` of a batch", slow=True)
def streamer_of_batch(call: Call) -> Inputs:
    return call.inputs() | GREEDY | WHOLE | {"streamer": Notes(call)}


@GENERATE("`logits_processor`", slow=True)
def processor(call: Call) -> Inputs:
    return call.inputs() | GREEDY | WHOLE | {"logits_processor": [NotedProcessor(call)]}


@GENERATE("`stopping_criteria`")
def criterion(call: Call) -> Inputs:
    given = StoppingCriteriaList([NotedCriterion(call)])
    return call.inputs() | GREEDY | WHOLE | {"stopping_criteria": given, "max_new_tokens": 9}


@GENERATE("`logits_processor`, `stopping_criteria`, beams", since=SINCE)
def both_with_beams(call: Call) -> Inputs:
    given: dict[str, Any] = {"logits_processor": LogitsProcessorList([NotedProcessor(call)])}
    given |= {"stopping_criteria": StoppingCriteriaList([NotedCriterion(call)]), "num_beams": 2}
    return call.inputs() | GREEDY | WHOLE | given


OWN_PROCESSORS: dict[str, tuple[dict[str, Any], Callable[[int], Any]]] = {
    "`RepetitionPenalty...`": (
        {"repetition_penalty": 1.7}, lambda n: RepetitionPenaltyLogitsProcessor(1.01),
    ),
    "`NoRepeatNGram...`": ({"no_repeat_ngram_size": 1}, lambda n: NoRepeatNGramLogitsProcessor(3)),
    "`MinLength...`": (
        {"min_length": 10**3, "max_new_tokens": 8, "eos_token_id": ENDS},
        lambda n: MinLengthLogitsProcessor(n + 3, ENDS, device="cpu"),
    ),
}  # fmt: skip
OWN_CRITERIA: dict[str, tuple[dict[str, Any], Callable[[int], Any]]] = {
    "`MaxLengthCriteria`": ({}, lambda n: MaxLengthCriteria(n + 6)),
    "`MaxTimeCriteria`": ({"max_time": 1e-9}, lambda n: MaxTimeCriteria(1e9)),
}


def own_processor(settings: dict[str, Any], make: Any, call: Call) -> Inputs:
    inputs = call.inputs()
    given = {"logits_processor": LogitsProcessorList([make(length_of(inputs))])}
    return inputs | GREEDY | WHOLE | settings | given


def own_criterion(settings: dict[str, Any], make: Any, call: Call) -> Inputs:
    inputs = call.inputs()
    given = {"stopping_criteria": StoppingCriteriaList([make(length_of(inputs))])}
    return inputs | GREEDY | WHOLE | settings | given


for _title, _given in OWN_PROCESSORS.items():
    GENERATE(f"{_title} in place of generate's own")(partial(own_processor, *_given))
for _title, _given in OWN_CRITERIA.items():
    GENERATE(f"{_title} in place of generate's own")(partial(own_criterion, *_given))

PREFIXES: dict[str, dict[str, Any]] = {
    "": {},
    ", beams": {"num_beams": 3, "num_return_sequences": 2},
    ", `num_return_sequences`": {"do_sample": True, "num_return_sequences": 3},
}


def prefixes(settings: dict[str, Any], call: Call) -> Inputs:
    given = {"prefix_allowed_tokens_fn": Notes(call).allow}
    return call.inputs() | GREEDY | WHOLE | given | settings


for _title, _settings in PREFIXES.items():
    _since = SINCE if _settings.keys() & WRONG_BEFORE else (5, 17)
    GENERATE(f"`prefix_allowed_tokens_fn`{_title}", since=_since)(partial(prefixes, _settings))


@GENERATE("`negative_prompt_ids`", raises="mat1 and mat2 shapes cannot be multiplied", slow=True)
def negative_prompt(call: Call) -> Inputs:
    inputs = call.inputs(ONE)
    negative = {"negative_prompt_ids": torch.tensor([[1, 5, 6]]), "guidance_scale": 1.5}
    return inputs | GREEDY | WHOLE | negative


@GENERATE("`assistant_model`", slow=True)
def assistant(call: Call) -> Inputs:
    other = deepcopy(call.copy())
    weights = other.lm_head.weight.data
    weights.mul_(torch.rand(weights.shape, generator=torch.Generator().manual_seed(0)) + 0.5)
    return call.inputs(ONE) | GREEDY | WHOLE | {"assistant_model": other}


def decode(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
    """A decoding loop of the caller's: two tokens, each the second best."""
    kwargs = {k: v for k, v in kwargs.items() if k not in NOT_OF_THE_MODEL}
    for step in range(2):
        prepared = model.prepare_inputs_for_generation(
            input_ids, is_first_iteration=step == 0, **kwargs
        )
        output = model(**prepared, return_dict=True)
        second = output.logits[:, -1].topk(2).indices[:, 1:]
        input_ids = torch.cat([input_ids, second], dim=1)
        kwargs = model._update_model_kwargs_for_generation(output, kwargs)
    return input_ids


NOT_OF_THE_MODEL = ("logits_processor", "stopping_criteria", "generation_config")


@GENERATE("`custom_generate`, a function")
def custom_generate(call: Call) -> Inputs:
    return call.inputs() | GREEDY | {"custom_generate": decode}


# --------------------------------------------------------------------------------------- caches

CACHES = {
    "`past_key_values`, empty": ("past_key_values", DynamicCache),
    "the cache by the version's own name": (cache_name(), DynamicCache),
    "`past_key_values`, static": ("past_key_values", StaticCache),
}


def cache(name: str, kind: Any, call: Call) -> Inputs:
    sizes = {"max_cache_len": 200} if kind is StaticCache else {}
    given = kind(config=call.model.config.get_text_config(), **sizes)
    return call.inputs() | GREEDY | WHOLE | {name: given}


for _title, _given in CACHES.items():
    GENERATE(_title)(partial(cache, *_given))


# --------------------------------------------------------------------------- prompts and masks


@GENERATE("right padding")
def right_padding(call: Call) -> Inputs:
    return call.inputs(side="right") | GREEDY | WHOLE


def pad_both(inputs: Inputs) -> Inputs:
    """Two columns of padding more at either end, but for the row that is the longest."""
    for name in inputs.keys() & {"input_ids", "attention_mask", "mm_token_type_ids", "labels"}:
        values, fill = inputs[name], -100 if name == "labels" else 0
        more = values.new_full((len(values), 2), fill)
        inputs[name] = torch.cat([more, values, more], dim=1)
    return inputs


@GENERATE("padding on both sides")
def padding_on_both_sides(call: Call) -> Inputs:
    return pad_both(call.inputs()) | GREEDY | WHOLE


def hide_word(inputs: Inputs) -> Inputs:
    """Hide a word behind the images of the first row."""
    mask = inputs["attention_mask"].clone()
    mask[0, -2] = 0
    return inputs | {"attention_mask": mask}


@GENERATE("a mask that hides a word")
def word_hidden(call: Call) -> Inputs:
    return hide_word(call.inputs()) | GREEDY | WHOLE


@GENERATE("several images a prompt", slow=True)
def several(call: Call) -> Inputs:
    return call.inputs(SEVERAL) | GREEDY | WHOLE


@GENERATE("text alone", slow=True)
def text(call: Call) -> Inputs:
    return call.inputs(TEXT) | GREEDY | WHOLE


@GENERATE("no mask")
def no_mask(call: Call) -> Inputs:
    inputs = call.inputs()
    del inputs["attention_mask"]
    return inputs | GREEDY | WHOLE


@GENERATE("no mask, no padding", slow=True)
def no_mask_alone(call: Call) -> Inputs:
    inputs = call.alone()
    del inputs["attention_mask"]
    return inputs | GREEDY | WHOLE


@GENERATE("a mask of zeros and ones as `bool`", slow=True)
def bool_mask(call: Call) -> Inputs:
    inputs = call.inputs()
    return inputs | GREEDY | WHOLE | {"attention_mask": inputs["attention_mask"].bool()}


def hide(inputs: Inputs) -> Inputs:
    """Hide one placeholder of the first row, and a word."""
    mask = inputs["attention_mask"].clone()
    first = int((inputs["input_ids"][0] == 100).nonzero()[3])
    mask[0, first] = mask[0, -1 - NUM_NEW] = 0
    return inputs | {"attention_mask": mask}


@GENERATE(
    "a mask that hides placeholders",
    refused="attention_mask is 0 on .* pass a mask that is 1 on all of them",
    remedy="Pass the mask that the processor makes: the pruner drops tokens.",
)
def hidden(call: Call) -> Inputs:
    return hide(call.inputs()) | GREEDY | WHOLE


@GENERATE(
    "a mask of four dimensions",
    raises="must be 2D",
    refused="attention_mask has 4 dimensions; pass the 2-D one",
    remedy="Pass the mask that the processor makes.",
)
def wide_mask(call: Call) -> Inputs:
    inputs = call.inputs()
    length = length_of(inputs)
    return inputs | GREEDY | {"attention_mask": torch.zeros(len(BATCH), 1, length, length)}


def second_turn(call: Call, first: Any) -> Inputs:
    """The answer and a question more, without the images."""
    random = torch.Generator().manual_seed(5)
    question = torch.randint(3, 99, (len(BATCH), 4), generator=random)
    inputs = call.inputs()
    ids = torch.cat([first.sequences, question], dim=1)
    turn = {"input_ids": ids, cache_name(): first[cache_name()]}
    for name in inputs.keys() & {"attention_mask", "mm_token_type_ids"}:
        columns = ids.shape[1] - length_of(inputs)
        more = inputs[name].new_full((len(BATCH), columns), int(name == "attention_mask"))
        turn[name] = torch.cat([inputs[name], more], dim=1)
    return turn | GREEDY | WHOLE


@GENERATE("a later turn", then=second_turn)
def turns(call: Call) -> Inputs:
    return call.inputs() | GREEDY | WHOLE


@GENERATE("`position_ids`")
def positions(call: Call) -> Inputs:
    inputs = call.inputs()
    numbers = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    return inputs | GREEDY | WHOLE | {"position_ids": numbers + 3}


@GENERATE("`labels`")
def labels(call: Call) -> Inputs:
    inputs = call.inputs()
    return inputs | GREEDY | WHOLE | {"labels": inputs["input_ids"]}


@GENERATE("`logits_to_keep`, token numbers")
def kept_logits(call: Call) -> Inputs:
    return call.inputs() | GREEDY | WHOLE | {"logits_to_keep": torch.tensor([-1])}


@GENERATE("`inputs`, by keyword", slow=True)
def inputs_by_keyword(call: Call) -> Inputs:
    inputs = call.inputs()
    ids = inputs.pop("input_ids")
    return inputs | GREEDY | WHOLE | {"inputs": ids}


@GENERATE("`inputs`, positional")
def inputs_positional(call: Call) -> Inputs:
    inputs = call.inputs()
    ids = inputs.pop("input_ids")
    return inputs | GREEDY | WHOLE | {ARGS: (ids,)}


@GENERATE("all that can be positional")
def all_positional(call: Call) -> Inputs:
    inputs = call.inputs()
    ids, notes = inputs.pop("input_ids"), Notes(call)
    given = GenerationConfig(pad_token_id=PAD, do_sample=False, max_new_tokens=3, **WHOLE)
    lists = ([NotedProcessor(call)], StoppingCriteriaList([NotedCriterion(call)]), notes.allow)
    return inputs | {ARGS: (ids, given, *lists)}


@GENERATE(
    "`inputs_embeds`",
    refused="pass input_ids and pixel_values and leave inputs_embeds out",
    remedy="Pass `input_ids` and `pixel_values`: placeholders are found in them.",
)
def embeddings(call: Call) -> Inputs:
    inputs = call.inputs()
    embed = call.model.get_input_embeddings()
    return inputs | GREEDY | {"inputs_embeds": embed(inputs["input_ids"])}


@GENERATE("a model in bfloat16", slow=True)
def bfloat16(call: Call) -> Inputs:
    call.copy().bfloat16()
    inputs = call.inputs()
    return inputs | GREEDY | WHOLE | {"pixel_values": inputs["pixel_values"].bfloat16()}


@GENERATE("a model that runs eager attention", slow=True)
def eager(call: Call) -> Inputs:
    call.copy().set_attn_implementation("eager")
    return call.inputs() | GREEDY | WHOLE
