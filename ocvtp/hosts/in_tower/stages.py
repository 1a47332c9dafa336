"""Pruners before and inside a vision tower: hooks that let its blocks run on fewer rows.

U views of a call (images, or tiles of images), T tokens of the tower (the CLS included, where there
is one), N patches, R rows that run.

A hook before each block takes the rows that are left from the T tokens. A hook after it puts them
back, with zeros in all other places: what reads the tower sees the whole grid.
Nothing of the tower's forward is copied. All hooks are inert where no `TowerRun` is handed to the
blocks, as it is inside of `taps.recording()`. What a block did is in its `Step`, and done again
where checkpointing runs it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ocvtp.hosts.in_tower.block_merging import BlockMerging
from ocvtp.hosts.in_tower.pixels import PixelScale, patches
from ocvtp.ops.token_views import counted, left_over, seen_of_tiles
from ocvtp.pruners import Pruner
from ocvtp.pruners.base import named
from ocvtp.pruners.block_merger import BlockMerger
from ocvtp.structures import Needs, Selection, VisualTokens
from ocvtp.towers import taps
from ocvtp.towers.hooks import Hook, after, before
from ocvtp.towers.recordings import CALL, Recording, TowerCall
from ocvtp.towers.rows import Rows, Step, TowerRun
from ocvtp.transformers_names import TESTED, hands_on_arguments, is_checkpointed

_CARRIER = "ocvtp_tower_run"
"""The argument of blocks and of their attention that is the `TowerRun`. Gradient checkpointing runs
a block again in the backward pass, perhaps in another thread, after the call is over; it keeps this
argument with the others."""

_TURNS = "position_embeddings"
"""The argument of blocks by whose tables [N, d] attention turns the patches, in some towers."""


class TowerStages:
    """Pruners of stages `pixels` and `encoder` in one tower.

    Args:
        parts: at most one of each stage.
        look: gives the view of the tower, as it is now.
        num_prefix: tokens before the patches.
        patch_size: in pixels.
        scale: how to undo what the image processor did; for stage `pixels`.

    Raises:
        ValueError: if the tower cannot supply what one of them reads, or not in time.
    """

    def __init__(
        self,
        parts: Sequence[Pruner],
        look: Callable[[], taps.Tower],
        num_prefix: int,
        patch_size: int,
        scale: PixelScale | None,
    ) -> None:
        stages = {part.stage: part for part in parts}
        inside = stages.get("encoder")
        self.pixels = stages.get("pixels")
        self.merger = inside if isinstance(inside, BlockMerger) else None
        self.dropper = None if isinstance(inside, BlockMerger) else inside
        merging = None if self.merger is None else BlockMerging(self.merger, look, num_prefix)
        self._merging = merging
        self._look = look
        self._num_prefix = num_prefix
        self._patch_size = patch_size
        self._scale = scale
        self._at = None if self.dropper is None else first_block(self.dropper, self._view)
        if not all(map(hands_on_arguments, self._view.blocks)):
            raise ValueError(
                f"the blocks of this vision tower ({type(self._view.blocks[0]).__name__} of the"
                " installed transformers) take nothing but hidden states, so that"
                f" {parts[0].name!r} cannot tell them which tokens are left; install transformers"
                f" {TESTED[1]}, or use a pruner of stage llm_input."
            )
        if self.merger is not None and self.pixels is not None and not self.pixels.exact:
            raise ValueError(
                f"{self.pixels.name!r} leaves images different numbers of patches, and"
                f" {self.merger.name!r} merges equally many of each; give {self.pixels.name!r}"
                " num_keep or keep_ratio, without adaptive."
            )

    @property
    def _view(self) -> taps.Tower:
        return self._look()

    @property
    def uses_masks(self) -> bool:
        """Whether attention needs a bias: of the sizes of rows, or on padding."""
        return self.merger is not None or any(
            part is not None and not part.exact for part in (self.pixels, self.dropper)
        )

    def check(self, needs: Needs, attention: str) -> None:
        """Refuse needs and attention that these stages do not allow.

        Args:
            needs: of what reads the tower after these stages.
            attention: the tower's implementation of it.

        Raises:
            ValueError: if attention takes no bias, or if tokens are read that are merged later.
        """
        self._check_attention(attention)
        if self.merger is not None and (needs.hidden or needs.attention or needs.keys):
            raise ValueError(
                f"{self.merger.name!r} merges tokens in every block, so there are no hidden states,"
                " attention or keys of those that are left; use a pruner after it that reads none"
                " of these (see `ocvtp list`)."
            )

    def _check_attention(self, attention: str) -> None:
        if self.uses_masks and attention not in ("sdpa", "eager"):
            raise ValueError(
                f"the vision tower's attention is {attention!r}, which takes no bias for rows of"
                " other sizes; load the model with attn_implementation='sdpa', or call"
                " model.set_attn_implementation({'vision_config': 'sdpa'})."
            )

    def begin(self, record: Recording, layers: Sequence[int], attention: str) -> None:
        """Begin a call.

        Args:
            record: of the call.
            layers: of `hidden_states` that the projector reads.
            attention: the tower's implementation of it, which may have changed.

        Raises:
            ValueError: if tokens cannot be dropped before these layers, or by this attention.
        """
        self._check_attention(attention)
        read = [self._view.layer(layer) for layer in layers]
        if min(read) == 0 or (self.merger is not None and len(set(read)) > 1):
            raise ValueError(
                f"vision_feature_layer={list(layers)}, before which no tokens can be dropped"
                " (layer 0), or which have different ones (several layers, where a pruner merges);"
                " select one layer after the first block, or use a pruner of stage llm_input."
            )
        record.run = TowerRun(max(read))

    def ran(self, record: Recording) -> Tensor | None:
        """[U, N] which patches are left, None if all are.

        Raises:
            RuntimeError: if the hooks did not fire.
        """
        run = record.run
        if run is None or not run.started:
            raise RuntimeError(
                "the vision tower ran but the hooks in it did not fire: attach the pruner before"
                " the tower is compiled or exported."
            )
        return None if run.rows is None else run.rows.ran()[:, self._num_prefix :]

    def watch(self, tower: Any, features: Tensor) -> None:
        """Refuse a backward pass that runs blocks again without the hooks in them.

        Args:
            tower: that made `features`, or the last of its blocks that is read.
        """
        runs_again = any(map(is_checkpointed, self._view.blocks))
        if runs_again and features.requires_grad:
            features.register_hook(partial(self._check_installed, tower))

    def _check_installed(self, tower: Any, gradient: Tensor) -> None:
        if self._start not in tower._forward_pre_hooks.values():
            raise ValueError(
                "gradient checkpointing runs the vision tower again in the backward pass, where the"
                " pruner of the forward pass is gone; call backward() before you remove it (inside"
                " its `with` block)."
            )

    def hooks(self, tower: Any) -> list[Hook]:
        """Hooks in a tower whose `encoder` and `parts` are known."""
        view = self._view
        assert view.encoder is not None
        assert view.parts is not None
        hooks = [before(tower, self._start, with_kwargs=True)]
        hooks.append(before(view.encoder, _hand_to_blocks, with_kwargs=True))
        if self.dropper is not None:
            hooks += taps.hooks_for(view, self.dropper.needs)
        for number, block in enumerate(view.blocks):
            enter, leave = partial(self._enter, number), partial(self._leave, number)
            hooks.append(before(block, enter, with_kwargs=True))
            # Before other hooks see the block's output: those of transformers and of `taps`.
            hooks.append(after(block, leave, prepend=True, with_kwargs=True))
            attention = view.parts(block).attention
            hooks.append(before(attention, partial(_attend, number), with_kwargs=True))
            if self._merging is not None:
                hooks += self._merging.hooks(number, block)
        return hooks

    def _start(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The tower gets its pixels: choose among the patches."""
        if (run := _running()) is None:
            return
        run.started = True
        pixel_values: Tensor = args[0] if args else kwargs["pixel_values"]
        height, width = (size // self._patch_size for size in pixel_values.shape[-2:])
        run.grid_hw = (height, width)
        if self.pixels is not None:
            assert self._scale is not None
            with torch.no_grad():
                values = patches(self._scale.undo(pixel_values), self._patch_size)
                self._keep(run, _select(self.pixels, VisualTokens(values, run.grid_hw)), None)

    def _enter(self, number: int, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Before a block: hand it the rows that run."""
        run: TowerRun | None = kwargs.get(_CARRIER)
        if run is None:
            return None
        states: Tensor = args[0]
        if number not in run.steps:
            with torch.no_grad():
                run.steps[number] = self._step(run, number, states)
        if (rows := run.steps[number].rows) is None:
            return args, kwargs
        if (turns := kwargs.get(_TURNS)) is not None:
            turns = tuple(rows.gather_patches(table, self._num_prefix) for table in turns)
            kwargs = kwargs | {_TURNS: turns}
        return (rows.gather(states), *args[1:]), kwargs

    def _leave(
        self, number: int, module: Any, args: Any, kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        """After a block: put its rows back in their places."""
        run: TowerRun | None = kwargs.get(_CARRIER)
        if run is None:
            return None
        run.rows = left = run.steps[number].left
        return None if left is None else left.scatter(output[:, : left.places.shape[1]])

    def _step(self, run: TowerRun, number: int, states: Tensor) -> Step:
        """What a block does when it runs the first time, on `states` [U, T, D]."""
        if number == self._at:
            self._drop(run, states)
        if self._merging is not None and number == 0:
            num_rows = states.shape[1] if run.rows is None else run.rows.places.shape[1]
            run.merges = self._merging.schedule(num_rows, run.num_read)
        if run.rows is not None:
            record = taps.current()
            assert record is not None
            record.rows[number] = run.rows
        return Step(run.rows, run.merges[number] if run.merges else 0)

    def _drop(self, run: TowerRun, states: Tensor) -> None:
        """Choose among the patches that are left, by what the tower has given so far."""
        record, part = taps.current(), self.dropper
        assert record is not None
        assert part is not None
        found = taps.gather(record, self._view, part.needs, self._num_prefix)
        found["features"] = states[:, self._num_prefix :]
        index = None
        if run.rows is not None:
            ran = run.rows.ran()[:, self._num_prefix :]
            index, valid = left_over(ran)
            everyone = torch.arange(len(index), device=index.device)
            found = seen_of_tiles(found, counted(index, ran.shape[1]), everyone)
            found["valid"] = valid
        self._keep(run, _select(part, VisualTokens(grid_hw=run.grid_hw, **found)), index)

    def _keep(self, run: TowerRun, selection: Selection, index: Tensor | None) -> None:
        """Continue with the patches that were selected.

        Args:
            run: the current one.
            selection: of patches [U, K].
            index: [U, M] their numbers among all N; None where they are all.
        """
        keep, valid = selection.keep_indices, selection.valid
        if valid is not None:
            most = int(valid.sum(dim=1).max())
            keep, valid = keep[:, :most], valid[:, :most]
            valid = None if bool(valid.all()) else valid
        height, width = run.grid_hw
        keep = keep if index is None else index.gather(1, keep)
        if valid is None and keep.shape[1] == height * width:
            return
        num_tokens = self._num_prefix + height * width
        everything = Rows.all(len(keep), num_tokens, keep.device)
        run.rows = everything.keep(keep, valid, self._num_prefix)


def first_block(part: Pruner, view: taps.Tower) -> int:
    """The first block before which everything is known that a pruner reads."""
    needs = part.needs
    inside = Needs(hidden=needs.hidden, attention=needs.attention, keys=needs.keys)
    inside = replace(inside, cls_queries=needs.cls_queries, patch_queries=needs.patch_queries)
    if needs != inside:
        raise ValueError(
            f"pruner {part.name!r} drops tokens inside the vision tower, where only its hidden"
            " states, attention and keys are known; use one that reads nothing else."
        )
    known = [view.layer(i) for i in needs.hidden] + [view.block(b) + 1 for b in needs.blocks]
    first = max(known, default=0)
    if first >= len(view.blocks):
        raise ValueError(
            f"pruner {part.name!r} reads what the tower's last block gives, after which there is"
            " nothing to drop tokens from; let it read earlier ones, or act at stage llm_input."
        )
    return first


def _select(pruner: Pruner, tokens: VisualTokens) -> Selection:
    try:
        return pruner.select(tokens)
    except ValueError as error:
        found = named(error, pruner.name)
        raise found from found.__cause__


def _running() -> TowerRun | None:
    record = taps.current()
    return None if record is None else record.run


def _hand_to_blocks(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Before all blocks."""
    run = _running()
    return None if run is None else (args, kwargs | {_CARRIER: run})


def _attend(number: int, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Before a block's attention: take the forward over for the hooks that get no arguments.

    The attention gets what is added to the logits of every row as a key.
    """
    run: TowerRun | None = kwargs.get(_CARRIER)
    call, merging = CALL.get(), run if run is not None and run.merges else None
    if type(call) is TowerCall and call.recording is None:
        CALL.set(call := None)  # left by a backward pass; threads that began since have it too
    if call is None and merging is not None:  # in the backward pass
        CALL.set(call := TowerCall())
    if call is not None:
        call.block_run = merging
    if run is None:
        return None
    kwargs = {name: value for name, value in kwargs.items() if name != _CARRIER}
    rows = run.steps[number].rows
    if rows is not None and (bias := rows.bias()) is not None:
        states: Tensor = args[0] if args else kwargs["hidden_states"]
        kwargs["attention_mask"] = bias[:, None, None].to(states.dtype)
    return args, kwargs
