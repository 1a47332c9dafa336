"""Soft gates of visual tokens in a frozen language model, of which no forward is copied.

`key_bias` and `policy_softmax` act in the attention: inside of `with gating(model):` the language
model runs an attention of ours, and the gates travel to it as arguments of the language model, down
through its layers, also where these run again in the backward pass. The others change what the
language model reads, and leave its attention alone.

L columns of a prompt with its answer, E layers that add rows of the tower, d width of a head.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ocvtp.choices import Positions
from ocvtp.hosts.asked import Asked, drop, gates_of_rows
from ocvtp.hosts.base import Host
from ocvtp.hosts.registry import find_host
from ocvtp.selectors.parts import Part, Parts
from ocvtp.selectors.relaxations import Gates
from ocvtp.transformers_names import (
    GATED,
    attending,
    checkpointed_layers,
    register_attention,
    sdpa_attention,
)

KEY_BIAS, POLICY = "ocvtp_key_bias", "ocvtp_policy"
"""Arguments of the language model, [B, L]: what is added to the logits of each key, and the factor
of its attention."""
_GONE = -1000.0  # of a key: no attention is left in any precision, and every number stays finite
_SMALL = 1e-4  # below it the root of a gate is a line, whose slope is finite

Denoiser = Literal["none", "diag"]
_G = TypeVar("_G", bound="type[Gate]")


class Gate(nn.Module, Part):
    """How soft gates act in a language model: what it reads in the place of a question.

    A subclass is named by `register_gate`. It has parameters or buffers only after `build`, and
    keeps each argument of its constructor as the attribute of its name.
    """

    reads_model: ClassVar[bool] = True
    """Whether it is of use for losses that let the language model read."""

    def __init__(self) -> None:
        super().__init__()

    @abstractmethod
    def forward(
        self, asked: Asked, gates: Gates, generator: torch.Generator | None = None
    ) -> tuple[Asked, dict[str, Any]]:
        """What is read in the place of `asked`, and arguments of the language model.

        Args:
            asked: the questions.
            gates: [B, N] of their visual tokens.
            generator: of what is random.
        """

    def build(self, host: Host) -> None:
        """Make parameters and buffers for a model."""
        del host

    def measure(self, batches: Iterable[Asked]) -> None:
        """Take from questions about training images what the gate must know of them."""
        del batches


GATES: Parts[Gate] = Parts("gate", Gate)  # type: ignore[type-abstract]


def register_gate(name: str) -> Callable[[_G], _G]:
    """Class decorator: make a gate known under `name`.

    Raises:
        ValueError: if the name is taken or is none, or the class is no gate.
    """
    return GATES.register(name)  # type: ignore[return-value]


def list_gates() -> list[str]:
    """Names of all gates, sorted; those of installed packages among them."""
    return GATES.names()


def build_gate(name: str, **settings: Any) -> Gate:
    """Make a gate, e.g. `build_gate("key_bias", floor=1e-3)`.

    Raises:
        ValueError: for unknown names and settings.
    """
    return GATES.build(name, settings)


@register_gate("key_bias")
class KeyBias(Gate):
    """log g is added to the logits of a token's key, in every layer that reads it.

    At g = 0 that is dropping, the positions left as they were. The gradient passes the floor: a
    token that is left at it learns as one there.

    Args:
        floor: least g that acts. At 0 the others are gone, and learn nothing.

    Raises:
        ValueError: for a floor outside of 0..1.
    """

    def __init__(self, floor: float = 1e-3) -> None:
        super().__init__()
        if not 0 <= floor <= 1:
            raise ValueError(f"floor={floor!r}; pass a share from 0 to 1, e.g. 0.001.")
        self.floor = floor

    def forward(
        self, asked: Asked, gates: Gates, generator: torch.Generator | None = None
    ) -> tuple[Asked, dict[str, Any]]:
        values = asked.by_column(gates.values.float())
        floored = values + (values.clamp(min=self.floor) - values).detach()
        there = floored.detach() > 0
        bias = torch.where(there, torch.where(there, floored, 1.0).log(), _GONE)
        return asked, {KEY_BIAS: bias}


@register_gate("policy_softmax")
class PolicySoftmax(Gate):
    """A token's attention is multiplied by g and shared out again, except its own to itself.

    At g = 0 that is dropping, and the gradient is that of the factor: tokens that are gone learn,
    too. It takes memory of the square of the prompt's length. As DynamicViT trains
    (https://arxiv.org/abs/2106.02034).
    """

    def forward(
        self, asked: Asked, gates: Gates, generator: torch.Generator | None = None
    ) -> tuple[Asked, dict[str, Any]]:
        return asked, {POLICY: asked.by_column(gates.values.float())}


@register_gate("scale")
class Scale(Gate):
    """A token, and what the tower adds to it in the first layers, is multiplied by g.

    A norm undoes that, down to very small g: see `ocvtp probe`.
    """

    def forward(
        self, asked: Asked, gates: Gates, generator: torch.Generator | None = None
    ) -> tuple[Asked, dict[str, Any]]:
        return asked.weighted(asked.by_column(gates.values.float())), {}


@register_gate("noise")
class Noise(Gate):
    """A token x becomes mean + sqrt(g) (x - mean) + sqrt(1 - g) std noise, of the tokens' spread.

    What the tower adds to it in the first layers becomes noise, too. Mean and std are those of
    training images, by `measure`, and are saved with the gate.

    Args:
        denoiser: `diag` learns to tell what a token was, from itself alone; the more noise is in a
            token, the more of that is added. At inference there is neither.
        dim: width of the denoiser.
        seed: of the noise in evaluation, where no generator is passed: it is then the same at
            every call. In training it is drawn by torch's own generator.

    Raises:
        ValueError: for another denoiser.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, denoiser: Denoiser = "none", dim: int = 128, seed: int = 0) -> None:
        super().__init__()
        if denoiser not in get_args(Denoiser):
            raise ValueError(f"denoiser={denoiser!r}; pass one of {', '.join(get_args(Denoiser))}.")
        self.denoiser: Denoiser = denoiser
        self.dim, self.seed = dim, seed
        self.denoise: nn.Module | None = None
        self._is_known = False

    def build(self, host: Host) -> None:
        width = host.model.config.get_text_config().hidden_size
        sizes = (1 + host.num_deepstack_layers, width)
        for name in ("mean", "std"):  # NaN tells that nothing was measured
            self.register_buffer(name, torch.full(sizes, float("nan")))
        if self.denoiser == "diag":
            last = nn.Linear(self.dim, width)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            first = nn.Linear(width, self.dim)
            self.denoise = nn.Sequential(nn.LayerNorm(width), first, nn.GELU(), last)

    @torch.no_grad()
    def measure(self, batches: Iterable[Asked]) -> None:
        """The mean and the spread of visual tokens; without any, those known before stay.

        Raises:
            RuntimeError: before `build`.
        """
        self._built()
        count = 0
        total = squares = torch.zeros_like(self.mean, dtype=torch.float64)
        for asked in batches:
            rows = [asked.embeddings[asked.image]]
            if asked.deepstack is not None:
                rows += list(asked.deepstack.rows)
            sizes = {len(part) for part in rows}
            assert len(sizes) == 1, sizes
            values = torch.stack([part.double() for part in rows])
            if len(values) < len(self.mean):  # before a later layer nothing is added any more
                values = torch.cat(
                    [values, values.new_zeros(len(self.mean) - 1, *values.shape[1:])]
                )
            count += values.shape[1]
            total, squares = total + values.sum(dim=1), squares + values.square().sum(dim=1)
        if not count:
            return
        mean = total / count
        spread = (squares / count - mean**2).clamp(min=0).sqrt()
        self.mean.copy_(mean)
        self.std.copy_(spread)

    def _built(self) -> None:
        if not hasattr(self, "mean"):
            raise RuntimeError("a noise gate has no sizes yet; call build(host) first.")

    def forward(
        self, asked: Asked, gates: Gates, generator: torch.Generator | None = None
    ) -> tuple[Asked, dict[str, Any]]:
        self._built()
        self._is_known = self._is_known or not bool(self.mean.isnan().any())
        if not self._is_known:
            raise ValueError(
                "a noise gate must know the spread of visual tokens; call"
                " measure([asker.ask(...), ...]) on training images, or load a saved one."
            )
        if generator is None and not self.training:
            generator = torch.Generator(asked.embeddings.device).manual_seed(self.seed)
        shares = asked.by_column(gates.values.float())
        embeddings = self._noised(asked.embeddings, shares, 0, generator)
        deepstack = asked.deepstack
        if deepstack is not None:
            own = gates_of_rows(deepstack, shares)
            rows = [
                self._noised(row, own, number, generator)
                for number, row in enumerate(deepstack.rows, start=1)
            ]
            deepstack = replace(deepstack, rows=torch.stack(rows))
        return replace(asked, embeddings=embeddings, deepstack=deepstack), {}

    def _noised(
        self, values: Tensor, gates: Tensor, layer: int, generator: torch.Generator | None
    ) -> Tensor:
        """Rows [..., D'] with gates [...]."""
        given, gates = values.float(), gates[..., None]
        place = values.device if generator is None else generator.device
        noise = torch.randn(values.shape, generator=generator, device=place)
        less = (_root(gates) - 1) * (given - self.mean[layer])  # 0 at g = 1
        mixed = given + less + _root(1 - gates) * self.std[layer] * noise.to(given)
        if self.denoise is not None and layer == 0:
            mixed = mixed + (1 - gates) * self.denoise(mixed)
        return mixed.to(values.dtype)


@register_gate("gather")
class Gather(Gate):
    """The tokens that are not of the top K are dropped; gradients reach those that stay.

    Args:
        positions: `contiguous` numbers what is left from 0, as at inference; `original` leaves the
            gaps. Where tokens have coordinates, they always keep them.

    Raises:
        ValueError: for other positions.
    """

    def __init__(self, positions: Positions = "contiguous") -> None:
        super().__init__()
        if positions not in get_args(Positions):
            raise ValueError(f"positions={positions!r}; pass 'contiguous' or 'original'.")
        self.positions: Positions = positions

    def forward(
        self, asked: Asked, gates: Gates, generator: torch.Generator | None = None
    ) -> tuple[Asked, dict[str, Any]]:
        values = asked.by_column(gates.values.float())
        ones = values - values.detach() + 1
        return drop(asked.weighted(ones), gates.hard, self.positions), {}


@register_gate("none")
class NoGate(Gate):
    """All tokens are read as they are, for losses that need no language model."""

    reads_model: ClassVar[bool] = False

    def forward(
        self, asked: Asked, gates: Gates, generator: torch.Generator | None = None
    ) -> tuple[Asked, dict[str, Any]]:
        return asked, {}


@contextmanager
def gating(model: Any) -> Iterator[None]:
    """Inside the block, gates can act in the attention of the language model.

    Without a gate it runs the attention that transformers calls `sdpa`. Its own is back at the end.

    Args:
        model: a supported VLM, see `find_host`; or a `Host`.

    Raises:
        ValueError: if its attention cannot be replaced.
    """
    register_attention(_attend)
    host = model if isinstance(model, Host) else find_host(model)
    with attending(host.language_model, GATED):
        yield


def checkpointed(model: Any) -> AbstractContextManager[None]:
    """Inside the block, the layers of the language model run again in the backward pass.

    That saves the memory of what they compute; gradients are the same. Nothing but these layers is
    in training mode, and nothing inside of them: there is no dropout.

    The backward pass may come after the block, and after that of `gating`.

    Args:
        model: a supported VLM, see `find_host`; or a `Host`.

    Raises:
        ValueError: for layers that cannot.
    """
    host = model if isinstance(model, Host) else find_host(model)
    return checkpointed_layers(host.language_model)


def _root(gates: Tensor) -> Tensor:
    """The square root, with a gradient at 0."""
    return gates / gates.clamp(min=_SMALL).sqrt()


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention of a layer, [B, L, H, d]: that of `sdpa`, unless gates act."""
    bias, policy = kwargs.pop(KEY_BIAS, None), kwargs.pop(POLICY, None)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if policy is not None:
        return _shared_out(query, key, value, attention_mask, scaling, policy), None
    if bias is None:
        return sdpa_attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    width = value.shape[-1]
    heads = _widened(query, key, value, bias / scaling)
    found, _ = sdpa_attention(module, *heads, attention_mask, scaling=scaling, **kwargs)
    return found[..., :width].contiguous(), None


def _widened(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Heads with further coordinates, by which every product with a key j is bias[j] greater.

    So the bias needs no mask of its own: memory stays linear in the length, and a kernel that
    takes no mask may run. Of low precision there are two parts, what is rounded and the rest.

    Args:
        query: [B, H, L, d]. key: [B, H', L, d]. value: [B, H', L, d].
        bias: [B, L] fp32.
    """
    parts = [bias.to(key.dtype)]
    parts.append((bias - parts[0].float()).to(key.dtype))
    more = 8 + -query.shape[-1] % 8  # kernels want multiples of 8
    of_keys = pad(torch.stack(parts, dim=-1), (0, more - len(parts)))[:, None]
    of_queries = query.new_zeros(more)
    of_queries[: len(parts)] = 1
    return (
        torch.cat([query, of_queries.expand(*query.shape[:-1], -1)], dim=-1),
        torch.cat([key, of_keys.expand(-1, key.shape[1], -1, -1)], dim=-1),
        pad(value, (0, more)),
    )


def _shared_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    policy: Tensor,
) -> Tensor:
    """[B, L, H, d], each key's attention times its factor [B, L], a row's own times 1."""
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    length = query.shape[2]
    logits = (query @ key.transpose(2, 3)).float() * scaling
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=logits.device).tril()
    if mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    else:
        logits = logits + mask
    own = torch.eye(length, dtype=torch.bool, device=logits.device)
    factors = torch.where(own, 1.0, policy[:, None, None, :])
    shares = (logits - logits.amax(dim=-1, keepdim=True).detach()).exp() * factors
    shares = shares / shares.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(shares.dtype).tiny)
    return (shares.to(value.dtype) @ value).transpose(1, 2).contiguous()
