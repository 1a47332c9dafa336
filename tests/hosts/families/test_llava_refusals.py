"""Every refusal says what was given, what is allowed and what to do."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from reference import BATCH, IMG, ONE, SEVERAL, Scripted, make_batch, num_registers
from reference_next import make_next
from tiny_models import _llava
from tiny_next import tiny_next
from transformers import LlamaConfig, LlamaForCausalLM

from ocvtp import Needs, Pruner, Selection, attach, build_pruner

pytestmark = pytest.mark.usefixtures("untouched")


@pytest.fixture
def pruner() -> Pruner:
    return build_pruner("uniform", num_keep=5)


def both_refuse(model: Any, pruner: Pruner, message: str, inputs: Any) -> None:
    """forward() and generate() refuse these inputs."""
    with pruner(model):
        with pytest.raises(ValueError, match=message):
            model(**inputs)
        with pytest.raises(ValueError, match=message):
            model.generate(**inputs, max_new_tokens=2)


# ------------------------------------------------------------------------------------ attaching


def test_unknown_models(llava: Any, pruner: Pruner) -> None:
    settings = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    text_only = LlamaForCausalLM(LlamaConfig(**settings, num_attention_heads=1))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM .*'llama'.* llava, llava_next\b"):
        attach(text_only, pruner)
    with pytest.raises(ValueError, match=r"Linear \(model_type=None\) is not supported"):
        attach(torch.nn.Linear(1, 1), pruner)
    with pytest.raises(ValueError, match=r"LlavaModel .*ForConditionalGeneration"):
        attach(llava.model, pruner)


def test_a_second_pruner(llava: Any, pruner: Pruner) -> None:
    with pruner(llava), pytest.raises(ValueError, match=r"remove it first \(handle\.remove\(\)"):
        attach(llava, pruner)


def test_unknown_positions(llava: Any, pruner: Pruner) -> None:
    with pytest.raises(ValueError, match="positions='kept'; pass 'contiguous' or 'original'"):
        attach(llava, pruner, positions="kept")  # type: ignore[arg-type]


def test_stages_that_the_host_does_not_serve(llava: Any) -> None:
    pruner = Scripted()
    pruner.stage = "decoding"  # type: ignore[misc,assignment]
    with pytest.raises(ValueError, match="stage 'decoding'; .*'llava' serves .*llm_input"):
        attach(llava, pruner)


def test_cls_methods_on_a_tower_without_one(llava_siglip: Any) -> None:
    message = "CLS token, which a siglip_vision_model has not; use `received` attention"
    for needs in (
        Needs(cls=True),
        Needs(attention=((0, "received"), (1, "cls"))),
        Needs(keys=(1, 2), cls_queries=(2,)),
    ):
        with pytest.raises(ValueError, match=message):
            attach(llava_siglip, Scripted(wants=needs))
    with pytest.raises(ValueError, match=message):
        attach(llava_siglip, build_pruner("fastervlm", num_keep=5))
    with Scripted(wants=Needs(keys=(1, 2)))(llava_siglip):  # keys alone are to be had
        llava_siglip(**make_batch(ONE))


def test_clips_space_behind_another_tower(llava_siglip: Any) -> None:
    message = "where the tokens of a siglip_vision_model are not; use a pruner that reads .* `text`"
    with pytest.raises(ValueError, match=message):
        attach(llava_siglip, Scripted(wants=Needs(clip=True)))


def test_the_cls_of_several_layers(llava: Any) -> None:
    model = deepcopy(llava)
    model.config.vision_feature_layer = [-2, -3]
    with pytest.raises(ValueError, match=r"selects several: vision_feature_layer=\[-2, -3\]"):
        attach(model, Scripted(wants=Needs(cls=True)))


def test_blocks_beyond_the_tower(llava: Any) -> None:
    with pytest.raises(ValueError, match=r"blocks\[22\] does not exist.*pass -6 to 5"):
        attach(llava, build_pruner("fastervlm", num_keep=5, block=22))


def test_other_towers(pruner: Pruner) -> None:
    from transformers import LlavaConfig, LlavaForConditionalGeneration, PixtralVisionConfig

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision = PixtralVisionConfig(**sizes, num_attention_heads=1, image_size=32, patch_size=16)
    text = LlamaConfig(**sizes, vocab_size=8, num_attention_heads=1)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
    message = "has a pixtral tower; .* after clip_vision_model and siglip_vision_model and dinov2"
    with pytest.raises(ValueError, match=message):
        attach(model, pruner)


def test_siglip2_of_packed_patches(pruner: Pruner) -> None:
    """The bare model does not hand on what such a tower needs; its other kind is a SigLIP."""
    from transformers import Siglip2VisionConfig

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision = Siglip2VisionConfig(**sizes, num_attention_heads=1, num_patches=16, patch_size=14)
    model = _llava(vision, vision_feature_select_strategy="full")
    message = (
        r"a siglip2_vision_model tower; .*siglip_vision_model.* \(SigLIP2 where images have one"
    )
    with pytest.raises(ValueError, match=message):
        attach(model, pruner)


def test_registers_in_tiles(pruner: Pruner) -> None:
    """The bare model refuses its images, too."""
    model, inputs = tiny_next("dinov2_with_registers"), make_next([(3, IMG, 2)])
    with pytest.raises(RuntimeError, match="must match the existing size"):
        model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
    with pytest.raises(ValueError, match=r"LLaVA-NeXT has 4 registers, .*; use a tower without"):
        attach(model, pruner)


def test_dino_towers_that_hand_over_their_cls(llava_dino: Any, pruner: Pruner) -> None:
    inputs = make_batch(ONE, registers=num_registers(llava_dino))
    full = inputs | {"vision_feature_select_strategy": "full"}
    both_refuse(llava_dino, pruner, "strategy='full' does not .* grid .*; pass 'default'", full)


# ----------------------------------------------------------------------------------------- calls


def test_masks_of_other_shapes(llava: Any, pruner: Pruner) -> None:
    inputs = make_batch(BATCH)
    length = inputs["input_ids"].shape[1]
    wide = inputs | {"attention_mask": torch.zeros(3, 1, length, length)}
    both_refuse(llava, pruner, "attention_mask has 4 dimensions; pass the 2-D one", wide)
    longer = inputs | {"attention_mask": torch.ones(3, length + 1)}
    both_refuse(llava, pruner, rf"is \[3, {length + 1}\], input_ids \[3, {length}\]", longer)


def test_embeddings_in_place_of_ids(llava: Any, pruner: Pruner) -> None:
    inputs = make_batch(ONE)
    embeddings = llava.get_input_embeddings()(inputs["input_ids"]).detach()
    message = "pass input_ids and pixel_values and leave inputs_embeds out"
    both_refuse(llava, pruner, message, inputs | {"inputs_embeds": embeddings})
    del inputs["input_ids"]
    both_refuse(llava, pruner, message, inputs | {"inputs_embeds": embeddings})


def test_placeholders_and_images_that_do_not_fit(llava: Any, pruner: Pruner) -> None:
    inputs = make_batch(SEVERAL)
    fewer = inputs | {"pixel_values": inputs["pixel_values"][:2]}
    message = "has 48 image placeholders, but the images give 32 tokens; make both with one call"
    both_refuse(llava, pruner, message, fewer)


def test_videos(llava: Any, pruner: Pruner) -> None:
    inputs = make_batch(ONE)
    video = inputs["pixel_values"][None]
    message = "videos are not pruned; call the model without the pruner"
    both_refuse(llava, pruner, message, inputs | {"pixel_values_videos": video})
    del inputs["pixel_values"]
    both_refuse(llava, pruner, message, inputs | {"pixel_values_videos": video})


def test_images_that_were_encoded_beforehand(llava: Any, pruner: Pruner) -> None:
    inputs = make_batch(ONE)
    encoded = llava.get_image_features(inputs.pop("pixel_values"), return_dict=True)
    message = "mm_encoder_outputs hold images that were encoded already; pass pixel_values"
    both_refuse(llava, pruner, message, inputs | {"mm_encoder_outputs": {"image": encoded}})


def test_strategies_without_the_grid(llava: Any, llava_siglip: Any, pruner: Pruner) -> None:
    inputs = make_batch(ONE)
    full = inputs | {"vision_feature_select_strategy": "full"}
    both_refuse(llava, pruner, "strategy='full' does not .* grid .*; pass 'default'", full)
    default = inputs | {"vision_feature_select_strategy": "default"}
    both_refuse(llava_siglip, pruner, "strategy='default' .*; pass 'full'", default)


def test_sizes_of_pixtral_images(llava: Any, pruner: Pruner) -> None:
    inputs = make_batch(ONE) | {"image_sizes": torch.tensor([[56, 56]])}
    both_refuse(llava, pruner, "image_sizes belong to Pixtral towers", inputs)


def test_the_cls_of_a_layer_chosen_in_the_call(llava: Any) -> None:
    inputs = make_batch(ONE) | {"vision_feature_layer": -3}
    message = r"of layer -2, but vision_feature_layer=-3 .*; set model\.config\."
    both_refuse(llava, Scripted(wants=Needs(cls=True)), message, inputs)


def test_logits_by_token_number(llava: Any, pruner: Pruner) -> None:
    with pruner(llava), pytest.raises(ValueError, match="token numbers, .*; pass an int"):
        llava(**make_batch(ONE), logits_to_keep=torch.tensor([3, 4]))


def test_a_negative_prompt_with_an_image(llava: Any, pruner: Pruner) -> None:
    inputs = make_batch(ONE)
    negative = make_batch(ONE, seed=4)["input_ids"]
    with pruner(llava), pytest.raises(ValueError, match="placeholders that are not the prompt's"):
        llava.generate(**inputs, guidance_scale=1.5, negative_prompt_ids=negative)


@pytest.mark.parametrize(
    ("indices", "valid"),
    [
        ([[3, 1]], None),
        ([[3, 3]], None),
        ([[3, 16]], None),
        ([[-1, 3]], None),
        ([[1, 3], [1, 3]], None),
        ([[1, 3]], [[False, True]]),
    ],
    ids=["unsorted", "twice", "beyond", "negative", "images", "padding_first"],
)
def test_indices_that_would_mix_up_tokens(llava: Any, indices: Any, valid: Any) -> None:
    mask = None if valid is None else torch.tensor(valid)
    pruner = Scripted(choose=lambda tokens: Selection(torch.tensor(indices), valid=mask))
    message = r"'scripted' returned keep_indices .*; for each of 1 images, return unique ascending"
    both_refuse(llava, pruner, message, make_batch(ONE))
