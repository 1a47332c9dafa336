"""What an attached model carries: its pruner, and all that was decided when it was attached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ocvtp.hosts.base import Host
from ocvtp.hosts.prompt.read_call import Encode, encode_anew, look
from ocvtp.hosts.prompt.read_prompt import Reader
from ocvtp.hosts.prompt.select import Select, select
from ocvtp.hosts.prompt.shorten import Positions, Prompt, Shortened, shorten
from ocvtp.hosts.runtime.forward_output import Logits
from ocvtp.hosts.runtime.installed_hooks import InstalledHooks
from ocvtp.pruners import Pruner
from ocvtp.pruners.layer_pruner import LayerPruner
from ocvtp.structures import Needs
from ocvtp.transformers_names import cache_name

_ON_MODEL = "_ocvtp_attachment"


@dataclass
class Attachment:
    """A pruner in a model; the arguments are those of `ocvtp.attach`, made ready.

    Args:
        host: of the model. pruner: of stage `llm_input`; None if all tokens come so far.
        needs: of all that reads the tower.
        reader: of prompts; None if nothing reads them.
        layers: what drops tokens inside the language model.
        encode: what runs the tower. select: what runs the pruner.
        keeps_all: whether nothing is pruned, so that nothing may be left out.
        cache_name: what this version of transformers calls the KV cache.
    """

    host: Host
    pruner: Pruner | None
    needs: Needs
    positions: Positions
    on_prune: Callable[[Prompt], None] | None
    reader: Reader | None = None
    layers: LayerPruner | None = None
    encode: Encode = encode_anew
    select: Select = select
    logits: Logits = "short"
    keeps_all: bool = False
    cache_name: str = field(default_factory=cache_name)
    hooks: InstalledHooks = field(init=False)

    def put(self) -> None:
        """Put everything into the model, or nothing if that fails."""
        vars(self.host.model)[_ON_MODEL] = self
        try:
            self.hooks.renew()
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Leave the model as it was; may be called more than once."""
        self.hooks.remove()
        attributes = vars(self.host.model)
        if attributes.get(_ON_MODEL) is self:  # not removed before
            del attributes[_ON_MODEL]

    def shorten(self, inputs: dict[str, Any], whole: bool = False) -> Shortened:
        """The short inputs and the prompt, reported; `whole`: see `look`."""
        self.hooks.renew()
        seen = look(self.host, self.needs, inputs, self.reader, self.encode, whole)
        settings = (self.positions, self.layers, self.select)
        short = shorten(self.host, self.pruner, inputs, seen, *settings)
        if self.on_prune is not None:
            self.on_prune(short.prompt)
        return short


def attachment_of(model: Any) -> Attachment | None:
    """What a model carries; None without a pruner."""
    found: Attachment | None = vars(model).get(_ON_MODEL)
    return found
