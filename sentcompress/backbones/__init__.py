"""Built-in backbone adapters, registered exactly as a stranger's are."""

from sentcompress.hookspecs import Register, hookimpl


@hookimpl
def register_backbones(register: Register) -> None:
    register("opt", "sentcompress.backbones.opt:OPTBackbone")
    register("llama", "sentcompress.backbones.llama:LlamaBackbone")
    register("gpt2", "sentcompress.backbones.gpt2:GPT2Backbone")
    register("gpt_neox", "sentcompress.backbones.gpt_neox:GPTNeoXBackbone")
    register("gemma", "sentcompress.backbones.gemma:GemmaBackbone")
    register("phi", "sentcompress.backbones.phi:PhiBackbone")
    register("auto", "sentcompress.backbones.auto:AutoBackbone")
