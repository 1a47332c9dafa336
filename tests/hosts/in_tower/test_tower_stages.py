"""Pruners before and inside the tower of LLaVA, against towers that were run by hand."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from reference import (
    ask,
    assert_close,
    first_patch,
    make_batch,
    num_registers,
    shorten,
    single,
)
from reference_tower import (
    MEAN,
    STD,
    blocks_of,
    make_pictures,
    masked_by_hand,
    merged_by_hand,
    normalised,
    patches_of,
)
from tiny_models import _llava, tiny_llava, tiny_vision
from torch import Tensor

import ocvtp
from ocvtp import Compose, Needs, OCPruner, VisualTokens, build_pruner
from ocvtp.hosts import find_host
from ocvtp.hosts.in_tower.pixels import scale_of
from ocvtp.ops.bipartite import even_schedule
from ocvtp.slots import OCPrunerConfig
from ocvtp.transformers_names import hands_on_arguments

pytestmark = [pytest.mark.usefixtures("untouched"), pytest.mark.sampled(2)]
SCALES = {"clip_vision_model": (MEAN, STD), "siglip_vision_model": (0.5, 0.5)}
IMAGENET = tuple(
    torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
)
ROWS = [(5, "image", 4), (9,), (3, "image", 2, "image", 6)]
NUM_READ = 5  # blocks of the tiny tower in front of the layer that is read
EVERY_STAGE = ["tome", "vprune", "adaptive", "early"]


def build(kind: str, num_keep: int = 6) -> Any:
    if kind == "adaptive":
        return build_pruner("vprune")
    if kind != "early":
        return build_pruner(kind, num_keep=num_keep)
    return build_pruner("ocvtp", num_keep=num_keep, network=network(), early=True)


def network() -> OCPruner:
    torch.manual_seed(0)
    sizes = {"feature_dim": 32, "hidden_dim": 32, "slot_dim": 8, "ffn_dim": 16}
    return OCPruner(OCPrunerConfig(**sizes, grid_hw=(4, 4), layer=3)).eval()


def make_inputs(rows: Any = ROWS, side: Any = "left", registers: int = 0) -> Any:
    inputs = make_batch(rows, side, registers=registers)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = normalised(make_pictures(len(inputs["pixel_values"])))
    return inputs


@torch.no_grad()
def by_hand(model: Any, pixels: Tensor, kind: str, num_keep: int = 6) -> tuple[list[int], Tensor]:
    """The patches of one image that are left, and their states [K, D] of the layer that is read.

    Registers come before these.
    """
    tower = model.model.vision_tower
    first = first_patch(model)
    if kind == "tome":
        schedule = even_schedule(16, num_keep, NUM_READ)
        return merged_by_hand(tower, pixels, schedule, has_cls=first > 0)
    pruner = build(kind, num_keep)

    def choose(number: int, states: Tensor, weights: Tensor | None) -> Any:
        if kind == "early" and number == 3:
            assert weights is not None
            tokens = VisualTokens(
                states[None, first:],
                (4, 4),
                hidden={3: states[None, first:]},
                attention={(2, "received"): weights.mean(dim=(0, 1))[None, first:]},
            )
        elif kind != "early" and number == 0:
            mean, std = SCALES.get(tower.config.model_type, IMAGENET)
            raw = ((pixels * std + mean) * 255).round().clamp(0, 255)
            tokens = VisualTokens(patches_of(raw)[None], (4, 4))
        else:
            return None
        found = pruner.select(tokens)
        keep = found.keep_indices[0]
        return (keep if found.valid is None else keep[found.valid[0]]).tolist()

    kept, layers, _ = masked_by_hand(tower, pixels, NUM_READ, choose)
    registers = range(first - num_registers(model), first)
    return kept, layers[NUM_READ][[*registers, *(patch + first for patch in kept)]]


def prompt_by_hand(model: Any, inputs: Any, kind: str, side: Any = "left") -> Any:
    """The pruned prompt."""
    kept, first = [], num_registers(model)
    projected = torch.zeros(len(inputs["pixel_values"]), first + 16, 48)
    for image, pixels in enumerate(inputs["pixel_values"]):
        places, states = by_hand(model, pixels, kind)
        with torch.no_grad():
            rows = [*range(first), *(first + place for place in places)]
            projected[image, rows] = model.model.multi_modal_projector(states)
        kept.append(places)
    return shorten(model, inputs, kept, side, projected)


def seen(model: Any, pruner: Any, inputs: Any, **settings: Any) -> Any:
    """What the pruner at the language model is shown."""
    prompts: list[Any] = []
    with pruner(model, on_prune=prompts.append, **settings), torch.no_grad():
        model(**inputs)
    return prompts[0]


# The tower


@pytest.mark.sampled(1)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_merging_is_a_plain_reference(family: str, attention: str) -> None:
    """Exactly K for every K, each in the place of its first patch."""
    model = tiny_llava(family).double()
    model.model.vision_tower.set_attn_implementation(attention)
    inputs = make_inputs([(2, "image", "image", 2)])
    inputs["pixel_values"] = inputs["pixel_values"].double()
    for num_keep in range(1, 17):
        prompt = seen(model, build("tome", num_keep), inputs)
        features, places = prompt.encoded.tokens.features, prompt.encoded.places
        assert features.shape[1] == num_keep
        for image, pixels in enumerate(inputs["pixel_values"]):
            expected, states = by_hand(model, pixels, "tome", num_keep)
            assert (places[image] - 16 * image).tolist() == expected
            assert_close(features[image], states, 1e-6)


def test_merging_by_the_official_schedule(llava: Any) -> None:
    inputs = make_inputs([(2, "image", 2)])
    prompt = seen(llava, build_pruner("tome", r=(2, -1.0)), inputs)
    schedule = (4, 3, 2, 1, 0)  # of six blocks, of which five are read: 4 3.2 2.4 1.6 .8 0
    tower = llava.model.vision_tower
    places, states = merged_by_hand(tower, inputs["pixel_values"][0], schedule, has_cls=True)
    assert prompt.encoded.places[0].tolist() == places
    assert_close(prompt.encoded.tokens.features[0], states, 1e-5)
    assert prompt.summary()["visual_tokens"] == [16]
    assert prompt.summary()["visual_tokens_kept"] == [6]


def test_merging_576_tokens_to_50() -> None:
    """Among others, with the grid of LLaVA-1.5."""
    config = tiny_vision("clip")
    config.image_size = 336
    settings = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    model = _llava(config, **settings).double()
    pixels = torch.randn(1, 3, 336, 336, dtype=torch.float64)
    ids = torch.tensor([[1, *[100] * 576, 5]])
    inputs = {"input_ids": ids, "pixel_values": pixels}
    prompt = seen(model, build_pruner("tome", num_keep=50), inputs)
    schedule = even_schedule(576, 50, NUM_READ)
    places, states = merged_by_hand(model.model.vision_tower, pixels[0], schedule, has_cls=True)
    assert len(places) == 50
    assert prompt.encoded.places[0].tolist() == places
    assert_close(prompt.encoded.tokens.features[0], states, 1e-6)


@pytest.mark.parametrize("kind", ["vprune", "adaptive", "early"])
@pytest.mark.parametrize("num_images", [1, 3])
def test_dropping_is_masking_in_the_whole_tower(llava: Any, kind: str, num_images: int) -> None:
    """A batch of as many patches as each, or of other numbers, beside a key mask."""
    inputs = make_inputs([(2, *["image"] * num_images, 2)])
    prompt = seen(llava, build(kind), inputs)
    tokens = prompt.encoded.tokens
    counts = []
    for image, pixels in enumerate(inputs["pixel_values"]):
        kept, states = by_hand(llava, pixels, kind)
        counts.append(len(kept))
        places = prompt.encoded.places[image]
        assert (places[places >= 0] - 16 * image).tolist() == kept
        assert_close(tokens.features[image, : len(kept)], states, 1e-5)
    assert tokens.real.sum(dim=1).tolist() == counts
    assert prompt.summary()["visual_tokens"] == [16] * num_images
    if kind == "adaptive":
        assert len(set(counts)) == num_images
        assert max(counts) < 16
    else:
        assert counts == [6] * num_images
    cells = find_host(llava).cells(prompt.encoded)
    assert cells[0, : counts[0]].equal(prompt.encoded.places[0, : counts[0]])
    assert bool((cells[1:] == -1).all()), "they are other images"


def test_the_whole_tower_runs_on_fewer_rows(llava: Any) -> None:
    """Blocks get what is left, not what is masked."""
    lengths: list[int] = []
    hooks = [
        block.mlp.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
        for block in llava.model.vision_tower.encoder.layers
    ]
    inputs = make_inputs([(2, "image", 2)])
    for kind, expected in (
        ("tome", [15, 13, 11, 9, 7]),
        ("vprune", [7] * NUM_READ),
        ("early", [17, 17, 17, 7, 7]),
    ):
        lengths.clear()
        seen(llava, build(kind), inputs)
        assert lengths == expected
    for hook in hooks:
        hook.remove()


def test_noise_and_flat_images(llava: Any) -> None:
    """Without a budget: one patch a group of a flat image, all of noise, which changes nothing."""
    inputs = make_batch([(3, "image", 4)])
    noise = torch.randint(0, 256, (1, 3, 56, 56), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        bare = llava(**inputs | {"pixel_values": normalised(noise.float())}).logits
    for pictures, count in ((torch.full((1, 3, 56, 56), 70.0), 4), (noise.float(), 16)):
        inputs["pixel_values"] = normalised(pictures)
        prompt = seen(llava, build("adaptive"), inputs)
        assert prompt.selection.counts().tolist() == [count]
    with build("adaptive")(llava), torch.no_grad():
        assert torch.equal(llava(**inputs).logits, bare)


# The language model


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", EVERY_STAGE)
def test_answers_are_those_of_prompts_made_by_hand(llava: Any, kind: str, side: Any) -> None:
    inputs = make_inputs(side=side)
    short = prompt_by_hand(llava, inputs, kind, side)
    with build(kind)(llava), torch.no_grad():
        logits = llava(**inputs).logits
        answer = ask(llava, inputs) if side == "left" else None
    real = short.mask.bool()
    assert_close(logits[real], short.logits()[real], 1e-4)
    if answer is not None:
        assert answer.equal(short.greedy(5))


@pytest.mark.usefixtures("untouched_dino")
@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", EVERY_STAGE)
def test_dino_towers(llava_dino: Any, kind: str) -> None:
    """Registers stay, and each token is turned by its own place, whichever are left."""
    tower = llava_dino.model.vision_tower
    if not hands_on_arguments(blocks_of(tower)[0]):
        with pytest.raises(ValueError, match=r"blocks .* take nothing but hidden states.*install"):
            ocvtp.attach(llava_dino, build(kind))
        return
    first, inputs = num_registers(llava_dino), make_inputs(registers=num_registers(llava_dino))
    prompt = seen(llava_dino, build(kind), inputs)
    for image, pixels in enumerate(inputs["pixel_values"]):
        kept, states = by_hand(llava_dino, pixels, kind)
        places = prompt.encoded.places[image]
        assert (places[places >= 0] - (first + 16) * image - first).tolist() == kept
        assert_close(prompt.encoded.tokens.features[image, : len(kept)], states[first:], 1e-5)
    short = prompt_by_hand(llava_dino, inputs, kind)
    with torch.no_grad():
        bare = llava_dino(**inputs).logits
        with build(kind, 16)(llava_dino):
            same = llava_dino(**inputs).logits
        assert kind == "adaptive" or torch.equal(same, bare)
        with build(kind)(llava_dino):
            logits = llava_dino(**inputs).logits
            together = ask(llava_dino, inputs)
            alone = [ask(llava_dino, single(inputs, row)) for row in range(3)]
    real = short.mask.bool()
    assert_close(logits[real], short.logits()[real], 1e-4)
    assert together.equal(short.greedy(5))
    assert together.equal(torch.cat(alone))


class Half(torch.nn.Module):
    """Stands for stochastic depth."""

    def forward(self, states: Tensor) -> Tensor:
        return 0.5 * states


def test_merging_in_blocks_that_drop_paths() -> None:
    """One module ends both halves of a block."""
    model = tiny_llava("dinov3_vit")
    for block in blocks_of(model.model.vision_tower):
        block.drop_path = Half()
    inputs = make_inputs([(2, "image", 2)], registers=4)
    prompt = seen(model, build("tome"), inputs)
    kept, states = by_hand(model, inputs["pixel_values"][0], "tome")
    assert (prompt.encoded.places[0] - 4).tolist() == kept
    assert_close(prompt.encoded.tokens.features[0], states[4:], 1e-5)


@pytest.mark.parametrize("kind", ["tome", "vprune", "adaptive"])
def test_a_tower_without_cls(llava_siglip: Any, kind: str) -> None:
    inputs = make_inputs()
    short = prompt_by_hand(llava_siglip, inputs, kind)
    with build(kind)(llava_siglip):
        assert ask(llava_siglip, inputs).equal(short.greedy(5))


@pytest.mark.parametrize("kind", EVERY_STAGE)
def test_a_batch_answers_as_its_rows_do(llava: Any, kind: str) -> None:
    inputs = make_inputs()
    with build(kind)(llava):
        together = ask(llava, inputs)
        alone = [ask(llava, single(inputs, row)) for row in range(3)]
    assert together.equal(torch.cat(alone))


@pytest.mark.parametrize("kind", EVERY_STAGE)
def test_original_positions(llava: Any, kind: str) -> None:
    inputs = make_inputs()
    short = prompt_by_hand(llava, inputs, kind)
    with build(kind)(llava, positions="original"):
        assert ask(llava, inputs).equal(short.greedy(5, "original"))


@pytest.mark.parametrize("kind", ["tome", "vprune", "early"])
def test_keeping_all_is_the_bare_model(llava: Any, kind: str) -> None:
    inputs = make_inputs()
    with torch.no_grad():
        bare = llava(**inputs).logits
        with build(kind, 16)(llava):
            assert torch.equal(llava(**inputs).logits, bare)
        with build(kind)(llava):
            assert llava(**inputs).logits.shape[1] < bare.shape[1]
        assert torch.equal(llava(**inputs).logits, bare)


def test_zero_merges_are_the_bare_model(llava: Any) -> None:
    inputs = make_inputs()
    with torch.no_grad():
        bare = llava(**inputs).logits
        with build_pruner("tome", r=0)(llava):
            assert torch.equal(llava(**inputs).logits, bare)


def test_early_is_off_by_default(llava: Any) -> None:
    late = build_pruner("ocvtp", num_keep=6, network=network())
    assert (late.stage, late.needs.attention) == ("llm_input", ((-2, "received"),))
    early = build("early")
    assert (early.stage, early.needs.attention) == ("encoder", ((2, "received"),))
    inputs = make_inputs([(2, "image", 2)])
    assert seen(llava, late, inputs).encoded.tokens.num_tokens == 16


@pytest.mark.parametrize("kind", EVERY_STAGE)
def test_half_precision(llava: Any, kind: str) -> None:
    model = deepcopy(llava).bfloat16()
    inputs = make_inputs()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with build(kind)(model):
        assert ask(model, inputs).shape == (3, 5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tome", "vprune"])
def test_a_compiled_tower_runs_eagerly(llava: Any, kind: str) -> None:
    model, inputs = deepcopy(llava), make_inputs()
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model.model.vision_tower.compile(backend=backend)
    model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    count = len(graphs)
    with build(kind)(llava):
        expected = ask(llava, inputs)
    with build(kind)(model):
        assert ask(model, inputs).equal(expected)
    assert len(graphs) == count > 0, "compiled with the hooks in it"


# Together


def test_what_follows_sees_the_patches_that_ran(llava: Any) -> None:
    """CLS attention, keys and hidden states of the tower behind dropped patches."""
    inputs = make_inputs()
    taken: list[Any] = []

    class Watching(type(build_pruner("visionzip", num_keep=3))):  # type: ignore[misc]
        @property
        def needs(self) -> Needs:
            return super().needs | Needs(attention=((-2, "cls_sharpest"),))

        def select(self, tokens: VisualTokens) -> Any:
            taken.append(tokens)
            return super().select(tokens)

    for kind in ("vprune", "adaptive", "early"):
        taken.clear()
        behind = Watching(num_keep=3)
        with Compose([build(kind), behind])(llava), torch.no_grad():
            llava(**inputs)
        tokens = taken[0]
        for image, pixels in enumerate(inputs["pixel_values"]):
            kept, _ = by_hand(llava, pixels, kind)
            rows = [0] + [patch + 1 for patch in kept]

            def choose(number: int, *_: Any, kind: str = kind, kept: Any = kept) -> Any:
                return kept if number == (3 if kind == "early" else 0) else None

            tower = llava.model.vision_tower
            _, layers, attentions = masked_by_hand(tower, pixels, 6, choose)
            heads = attentions[4][:, 0, rows[1:]]
            sharpest = heads[heads.log().std(dim=1).argmax()]
            for of_cls, row in (("cls", heads.mean(dim=0)), ("cls_sharpest", sharpest)):
                assert_close(tokens.attention[-2, of_cls][image, : len(kept)], row, 1e-5)
            normed = tower.encoder.layers[4].layer_norm1(layers[4])
            keys = tower.encoder.layers[4].self_attn.k_proj(normed)[rows].detach()
            assert_close(tokens.keys[-2][image, : len(kept)], keys[1:], 1e-5)
            assert_close(tokens.cls_keys[-2][image], keys[0], 1e-5)
            assert_close(tokens.cls[image], layers[5][0], 1e-5)


@pytest.mark.parametrize("kind", ["received", "given"])
def test_means_of_attention_leave_dropped_patches_out(llava: Any, kind: Any) -> None:
    inputs = make_inputs()
    prompt = seen(llava, Compose([build("adaptive"), build_pruner("fopru", num_keep=2)]), inputs)
    for image, pixels in enumerate(inputs["pixel_values"]):
        kept, _ = by_hand(llava, pixels, "adaptive")
        rows = [patch + 1 for patch in kept]

        def choose(number: int, *_: Any, kept: Any = kept) -> Any:
            return kept if number == 0 else None

        _, _, attentions = masked_by_hand(llava.model.vision_tower, pixels, 6, choose)
        weights = attentions[4].mean(dim=0)[rows][:, rows]
        mean = weights.mean(dim=0 if kind == "received" else 1)
        found = prompt.encoded.tokens.attention[-2, kind][image, : len(kept)]
        assert_close(found, mean, 1e-5)


@pytest.mark.parametrize("kinds", [("vprune", "early"), ("adaptive", "early"), ("vprune", "tome")])
def test_stages_in_one_tower(llava: Any, kinds: Any) -> None:
    """Pixels first, then inside, then the language model: nothing comes back."""
    inputs = make_inputs()
    parts = [build(kinds[0], 9), build(kinds[1], 4), build_pruner("divprune", num_keep=2)]
    prompt = seen(llava, Compose(parts), inputs)
    assert prompt.encoded.tokens.real.sum(dim=1).tolist() == [4, 4, 4]
    assert prompt.selection.counts().tolist() == [2, 2, 2]
    before = seen(llava, build(kinds[0], 9), inputs).encoded.places
    for image in range(3):
        assert set(prompt.encoded.places[image].tolist()) <= set(before[image].tolist())
    with Compose(parts)(llava):
        together = ask(llava, inputs)
        assert together.equal(torch.cat([ask(llava, single(inputs, row)) for row in range(3)]))


def test_inside_after_pixels_by_hand(llava: Any) -> None:
    """The slots and their fill see nothing but the patches that were encoded."""
    inputs = make_inputs([(2, "image", "image", "image", 2)])
    prompt = seen(llava, Compose([build("adaptive"), build("early", 3)]), inputs)
    for image, pixels in enumerate(inputs["pixel_values"]):
        encoded, _ = by_hand(llava, pixels, "adaptive")
        rows = [patch + 1 for patch in encoded]

        def choose(
            number: int, states: Tensor, weights: Any, encoded: Any = encoded, rows: Any = rows
        ) -> Any:
            if number != 3:
                return None if number else encoded
            attention = weights.mean(dim=0)[[0, *rows]].mean(dim=0)[rows]
            hidden = states[rows]
            tokens = VisualTokens(
                hidden[None],
                (4, 4),
                hidden={3: hidden[None]},
                attention={(2, "received"): attention[None]},
            )
            return [encoded[i] for i in build("early", 3).select(tokens).keep_indices[0].tolist()]

        tower = llava.model.vision_tower
        kept, layers, _ = masked_by_hand(tower, pixels, NUM_READ, choose)
        assert (prompt.encoded.places[image] - 16 * image).tolist() == kept
        states = layers[NUM_READ][[patch + 1 for patch in kept]]
        assert_close(prompt.encoded.tokens.features[image], states, 1e-5)


def test_training_goes_through_the_tower(llava: Any) -> None:
    """Gradients reach the first block, by the patches that are left."""
    model, inputs = deepcopy(llava), make_inputs([(2, "image", 2)])
    for kind in EVERY_STAGE:
        with build(kind)(model):
            model.zero_grad()
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradient = model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.grad
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0


def test_merged_then_diverse(llava: Any) -> None:
    inputs = make_inputs([(2, "image", 2)])
    places, states = by_hand(llava, inputs["pixel_values"][0], "tome")
    with torch.no_grad():
        projected = llava.model.multi_modal_projector(states)[None]
    tokens = VisualTokens(states[None], (4, 4), projected=projected)
    kept = build_pruner("divprune", num_keep=3).select(tokens).keep_indices[0].tolist()
    whole = torch.zeros(1, 16, 48)
    whole[0, places] = projected
    short = shorten(llava, inputs, [[places[i] for i in kept]], projected=whole)
    with Compose([build("tome"), build_pruner("divprune", num_keep=3)])(llava):
        assert ask(llava, inputs).equal(short.greedy(5))


def test_several_selected_layers(llava: Any) -> None:
    """All of them lack the patches that were dropped."""
    model = tiny_llava("clip", vision_feature_layer=[-2, 3])
    inputs = make_inputs([(2, "image", 2)])
    tokens = seen(model, build("vprune"), inputs).encoded.tokens
    chosen, _ = by_hand(llava, inputs["pixel_values"][0], "vprune")
    tower = model.model.vision_tower
    _, layers, _ = masked_by_hand(
        tower, inputs["pixel_values"][0], 6, lambda n, *_: None if n else chosen
    )
    rows = [patch + 1 for patch in chosen]
    assert_close(tokens.features[0], torch.cat([layers[5][rows], layers[3][rows]], dim=1), 1e-5)
    with pytest.raises(ValueError, match="several layers, where a pruner merges"):
        seen(model, build("tome"), inputs)


# Pixels


def test_pixels_are_what_the_processor_was_given(llava: Any, processor: Any) -> None:
    pictures = make_pictures(1).round()
    shown = processor.image_processor(
        images=[pictures[0].byte()], return_tensors="pt", do_resize=False, do_center_crop=False
    )
    scale = scale_of(processor, "clip_vision_model")
    assert scale.undo(shown["pixel_values"]).equal(pictures)
    assert scale_of(None, "clip_vision_model").undo(normalised(pictures)).equal(pictures)
    assert scale_of(None, "siglip_vision_model").undo(pictures / 127.5 - 1).equal(pictures)
    with pytest.raises(ValueError, match="pass processor=, the one that makes"):
        scale_of(None, "other_model")


def test_the_processor_says_what_pixels_were(llava: Any) -> None:
    """Patches that differ by 40 of 255 are alike only to one who takes them for 0.2 of 255."""

    class Raw:
        image_mean, image_std, rescale_factor = (0.0,) * 3, (1.0,) * 3, 1.0

    inputs = make_batch([(2, "image", 2)])
    inputs["pixel_values"] = make_pictures(1)
    inputs["pixel_values"][:, :, 28:] = 100.0
    raw = seen(llava, build("adaptive"), inputs, processor=Raw())
    other = seen(llava, build("adaptive"), inputs)
    assert raw.selection.counts().tolist() != other.selection.counts().tolist()
    tokens = VisualTokens(patches_of(inputs["pixel_values"][0])[None], (4, 4))
    assert raw.selection.counts().equal(build("adaptive").select(tokens).counts())


# Refusals


def test_refusals(llava: Any, llava_siglip: Any) -> None:
    tome, zip_ = build("tome"), build_pruner("fastervlm", num_keep=3)
    with pytest.raises(ValueError, match="'tome' merges tokens in every block.*reads none"):
        ocvtp.attach(llava, Compose([tome, zip_]))
    with pytest.raises(ValueError, match="'vprune' leaves images different numbers.*num_keep"):
        ocvtp.attach(llava, Compose([build("adaptive"), tome]))
    late = build_pruner("ocvtp", num_keep=3, network=network(), early=True, fill_block=-1)
    with pytest.raises(ValueError, match="'ocvtp' reads what the tower's last block gives"):
        ocvtp.attach(llava, late)
    cls = build_pruner("ocvtp", num_keep=3, network=network(), early=True, fill="cls")
    with pytest.raises(ValueError, match="reads the CLS token, which a siglip"):
        ocvtp.attach(llava_siglip, cls)
    inputs = make_inputs([(2, "image", 2)])
    for layer in (0, -7):
        with pytest.raises(ValueError, match=r"no tokens can be dropped\s*\(layer 0\)"):
            seen(llava, build("vprune"), inputs | {"vision_feature_layer": layer})
    with pytest.raises(ValueError, match="num_keep=1 of 16 tokens in 3 blocks.*at least 2"):
        seen(llava, build("tome", 1), inputs | {"vision_feature_layer": 3})


def test_attention_without_masks_is_refused(llava: Any) -> None:
    model = deepcopy(llava)
    model.model.vision_tower.config._attn_implementation = "flash_attention_2"
    for kind in ("tome", "adaptive"):
        with pytest.raises(ValueError, match="'flash_attention_2', which takes no bias.*'sdpa'"):
            ocvtp.attach(model, build(kind))
    for kind in ("vprune", "early"):
        ocvtp.attach(model, build(kind)).remove()


def test_other_hosts_refuse_these_stages(internvl: Any, qwen: Any) -> None:
    for model in (internvl, qwen):
        for kind in ("tome", "vprune"):
            with pytest.raises(ValueError, match=r"acts at stage '(encoder|pixels)'.*ocvtp list"):
                ocvtp.attach(model, build(kind))


@pytest.mark.parametrize("kind", EVERY_STAGE)
def test_an_attached_model_can_be_copied(llava: Any, kind: str) -> None:
    """A copy prunes on its own, and stays pruned when the original is not any more."""
    inputs = make_inputs([(2, "image", 2)])
    handle = ocvtp.attach(llava, build(kind))
    expected = ask(llava, inputs)
    copy = deepcopy(llava)
    handle.remove()
    assert ask(copy, inputs).equal(expected)


@pytest.mark.parametrize("kind", EVERY_STAGE)
def test_the_tower_alone_is_left_alone(llava: Any, kind: str) -> None:
    """Hooks do nothing outside of the model's own calls."""
    inputs = make_inputs([(2, "image", 2)])
    tower = llava.model.vision_tower
    with torch.no_grad():
        bare = tower(inputs["pixel_values"]).last_hidden_state
        with build(kind)(llava):
            assert tower(inputs["pixel_values"]).last_hidden_state.equal(bare)


@pytest.mark.parametrize("kind", EVERY_STAGE)
def test_from_the_tower_into_the_language_model(llava: Any, kind: str) -> None:
    """What the language model drops is of what the tower left."""
    inputs, prompts = make_inputs(), []
    inside = build_pruner("fastv", stages=((1, 2),))
    both = Compose([build(kind), inside])
    with both(llava, on_prune=prompts.append):
        together = ask(llava, inputs)
        alone = [ask(llava, single(inputs, row)) for row in range(3)]
    assert together.equal(torch.cat(alone))
    with build(kind)(llava):
        assert not ask(llava, inputs).equal(together)
    layers = prompts[0].layers
    assert layers is not None
    with Compose([build(kind), build_pruner("fastv", stages=((1, 16),))])(llava):
        whole = ask(llava, inputs)
    with build(kind)(llava):
        assert ask(llava, inputs).equal(whole)
