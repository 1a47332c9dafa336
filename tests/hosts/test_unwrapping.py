"""The one supported model in wrappers that hold it and forward its attributes."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import pytorch_lightning
import torch
from reference import ask, fingerprint
from test_llava_wrappers import DataParallelLike, lora
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ocvtp import Pruner, attach
from ocvtp.hosts.registry import find_host, unwrap
from ocvtp.hosts.runtime.shared_encodings import SharedEncodings

pytestmark = pytest.mark.usefixtures("untouched")


class Forwarding(nn.Module):
    """Like FSDP and DeepSpeed's engine, it hands on whatever it has not itself."""

    def __init__(self, model: nn.Module, name: str = "module") -> None:
        super().__init__()
        self.name = name
        self._modules[name] = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules[vars(self)["name"]], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._modules[self.name](*args, **kwargs)


class Engine:
    """The same, but no module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["module"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class Lightning(pytorch_lightning.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.student = model
        self.head = nn.Linear(2, 2)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.student(*args, **kwargs)

    def generate(self, **kwargs: Any) -> Any:
        return self.student.generate(**kwargs)


class Unregistered(nn.Module):
    """Keeps the model's weights out of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        vars(self)["model"] = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return vars(self)["model"](*args, **kwargs)

    def generate(self, **kwargs: Any) -> Any:
        return vars(self)["model"].generate(**kwargs)


def fabric(model: nn.Module) -> Any:
    from lightning_fabric import Fabric

    return Fabric(accelerator="cpu", devices=1).setup(model)


def accelerated(model: nn.Module) -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare_model(model, evaluation_mode=True)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "Fabric": fabric,
    "accelerate": accelerated,
    "FSDP-like": lambda model: Forwarding(model, "_fsdp_wrapped_module"),
    "DeepSpeed-like": Forwarding,
    "engine": Engine,
    "Lightning": Lightning,
    "unregistered": Unregistered,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "forwarding in forwarding": lambda model: Forwarding(Forwarding(model), "_orig_module"),
    "PEFT in DDP in Fabric": lambda model: fabric(Forwarding(lora(model))),
    "Fabric in Lightning": lambda model: Lightning(fabric(model)),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("how", WRAPPERS)
def test_the_model_inside_is_pruned(
    llava: Any, pruner: Pruner, inputs: Any, answer: Tensor, how: str
) -> None:
    model = deepcopy(llava)
    wrapped = WRAPPERS[how](model)
    inner = unwrap(wrapped)
    assert type(inner) is type(model)
    assert (inner is model) == ("PEFT" not in how)
    assert find_host(wrapped).model is inner
    assert SharedEncodings.of(wrapped, [pruner]).model is inner
    before, own = fingerprint(inner), dict(vars(wrapped))
    prompts: list[Any] = []
    expected = ask(inner, inputs)
    with pruner(wrapped, on_prune=prompts.append):
        assert "generate" in vars(inner)
        assert wrapped is inner or vars(wrapped) == own
        said = ask(wrapped, inputs)
        assert said.equal(answer) or "PEFT" in how
        assert len(prompts) == 1
        if how != "torch.compile":
            with torch.no_grad():
                assert wrapped(**inputs).logits.equal(inner(**inputs).logits)
            assert len(prompts) == 3
        with pytest.raises(ValueError, match="attached to this model already"):
            attach(inner, pruner)
    assert ask(inner, inputs).equal(expected)
    assert not ask(inner, inputs).equal(said)
    assert "generate" not in vars(inner)
    assert not {key for key in fingerprint(inner) if key not in before and "ocvtp" in key}


def test_fsdp_is_unwrapped(llava: Any, pruner: Pruner, inputs: Any, tmp_path: Any) -> None:
    model, prompts = deepcopy(llava), list[Any]()
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        sharded = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        assert find_host(sharded).model is model
        with torch.no_grad():
            with pruner(llava):
                expected = llava(**inputs).logits
            with pruner(sharded, on_prune=prompts.append):
                assert sharded(**inputs).logits.equal(expected)
    finally:
        torch.distributed.destroy_process_group()
    assert len(prompts) == 1


def test_one_of_several_models_must_be_named(llava: Any, llava_siglip: Any, pruner: Pruner) -> None:
    both = nn.ModuleDict({"policy": llava, "reference": DataParallelLike(llava_siglip)})
    message = r"ModuleDict holds 2 models .*: \.policy \(Llava\w+\), \.reference\.module \(Llava"
    with pytest.raises(ValueError, match=message + r".*pass the one that is meant"):
        attach(both, pruner)
    assert unwrap(both["reference"]) is llava_siglip
    tower = deepcopy(llava.model.vision_tower)  # is no host
    assert unwrap(nn.ModuleList([tower, llava, nn.Sequential(llava)])) is llava


def test_wrappers_of_other_models_are_refused(llava: Any, pruner: Pruner) -> None:
    for wrapped in (Forwarding(llava.model), Engine(llava.model.language_model)):
        with pytest.raises(ValueError, match=rf"{type(wrapped).__name__} \(model_type='llam?"):
            attach(wrapped, pruner)
        assert "generate" not in vars(wrapped)
