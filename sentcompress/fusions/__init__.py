"""Built-in fusions, registered exactly as a stranger's are."""

from sentcompress.hookspecs import Register, hookimpl


@hookimpl
def register_fusions(register: Register) -> None:
    register("sum-norm", "sentcompress.fusions.sum_norm:SumNorm")
    register("mean", "sentcompress.fusions.mean:Mean")
    register("last", "sentcompress.fusions.last:Last")
    register("weighted-sum", "sentcompress.fusions.weighted_sum:WeightedSum")
    register("attention", "sentcompress.fusions.attention:AttentionPooling")
    register("pack", "sentcompress.fusions.pack:Pack")
