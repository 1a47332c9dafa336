"""One file a scorer: what is in this folder registers itself, see `ocvtp.selectors.scorer`."""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
