"""Models in half precision, offloaded, with adapters, compiled, in pipelines."""

from __future__ import annotations

from copy import deepcopy
from tempfile import TemporaryDirectory
from typing import Any

import torch
from reference import assert_close

from matrix.checks import (
    NUM_NEW,
    answer,
    by_hand,
    check_greedy,
    feature,
    pruner,
)
from matrix.families import BATCH, ONE, Family
from ocvtp import build_pruner


@feature("bf16")
def bfloat16(family: Family) -> None:
    inputs, model = family.make(BATCH, "left"), deepcopy(family.model).bfloat16()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    logits, said, short = (
        model(**inputs).logits,
        answer(model, inputs),
        by_hand(family, inputs, model),
    )
    real = short.mask.bool()
    with build_pruner("none")(model):
        assert model(**inputs).logits.equal(logits)
        assert answer(model, inputs).equal(said)
    with pruner()(model):
        pruned = model(**inputs).logits
        assert answer(model, inputs).equal(short.greedy(NUM_NEW))
    assert pruned.dtype == torch.bfloat16
    assert_close(pruned[real], short.logits()[real], 1e-2)


@feature("`device_map`, all but the head on disk")
def device_map(family: Family) -> None:
    where = {"model": "disk", "lm_head": "cpu"}
    with TemporaryDirectory() as folder:
        family.model.save_pretrained(folder)
        model = type(family.model).from_pretrained(
            folder, device_map=where, offload_folder=f"{folder}/offloaded"
        )
        model.generation_config = deepcopy(family.model.generation_config)
        assert all(parameter.is_meta for parameter in model.model.parameters())
        check_greedy(family, model)


@feature("PEFT adapters, and training them")
def peft(family: Family) -> None:
    from peft import LoraConfig, get_peft_model

    targets = r".*language_model.*\.(q_proj|v_proj)"
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(deepcopy(family.model), config)
    inputs = family.make(BATCH, "left")
    short = by_hand(family, inputs, model.get_base_model())
    real = short.mask.bool()
    plain = by_hand(family, inputs).logits()[real]
    assert (short.logits()[real] - plain).abs().max() > 0.1
    with pruner()(model):
        assert answer(model, inputs).equal(short.greedy(NUM_NEW))
        with torch.enable_grad():
            output = model(**inputs, labels=inputs["input_ids"])
            output.loss.backward()
    assert_close(output.logits[real].detach(), short.logits()[real], 1e-5)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name)


@feature("`torch.compile` of the language model", slow=True)
def compiled_language_model(family: Family) -> None:
    model = deepcopy(family.model)
    torch.compiler.reset()
    model.model.language_model.compile(backend="eager")
    check_greedy(family, model, ONE)


@feature("compiled decoding", slow=True)
def compiled_decoding(family: Family) -> None:
    from transformers import CompileConfig

    model = deepcopy(family.model)
    torch.compiler.reset()
    compiling = CompileConfig(backend="eager", mode=None, fullgraph=True)
    compiling._compile_all_devices = True
    check_greedy(family, model, cache_implementation="static", compile_config=compiling)
    assert hasattr(model, "_compiled_call")


@feature('`pipeline("image-text-to-text")`, also in batches')
def pipeline(family: Family) -> None:
    from PIL import Image
    from transformers import pipeline as make_pipeline

    model, processor = family.with_processor()
    pipe = make_pipeline("image-text-to-text", model=model, processor=processor)
    settings = {"max_new_tokens": NUM_NEW, "do_sample": False}
    talks, expected, kept = [], [], list[Any]()
    pictures = {"what?": Image.linear_gradient("L"), "what is that?": Image.radial_gradient("L")}
    for text, picture in pictures.items():  # of one size: transformers stacks their tiles
        image = picture.convert("RGB").resize((280, 140))
        content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
        talks.append([{"role": "user", "content": content}])
    with build_pruner("uniform", num_keep=5)(model, on_prune=kept.append):
        for talk in talks:
            form = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
            inputs = processor.apply_chat_template(talk, return_tensors="pt", **form)
            said = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
            expected.append(processor.decode(said[0], skip_special_tokens=True))
        for batch_size in (1, 2):
            said = pipe(
                text=talks, generate_kwargs=settings, return_full_text=False, batch_size=batch_size
            )
            assert [talk[0]["generated_text"] for talk in said] == expected
    counts = [prompt.summary()["visual_tokens_kept"] for prompt in kept]
    assert counts == [[5], [5], [5], [5], [5, 5]]
