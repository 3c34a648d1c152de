"""Built-in metrics, registered exactly as a stranger's are."""

from sentcompress.hookspecs import Register, hookimpl


@hookimpl
def register_metrics(register: Register) -> None:
    register("exact-match", "sentcompress.metrics.exact_match:ExactMatch")
    register("token-accuracy", "sentcompress.metrics.token_accuracy:TokenAccuracy")
