"""Built-in backbone adapters, registered exactly as a stranger's are."""

from sentcompress.hookspecs import Register, hookimpl


@hookimpl
def register_backbones(register: Register) -> None:
    register("opt", "sentcompress.backbones.opt:OPTBackbone")
