"""Built-in memories, registered exactly as a stranger's are."""

from sentcompress.hookspecs import Register, hookimpl


@hookimpl
def register_memories(register: Register) -> None:
    register("window", "sentcompress.memories.window:Window")
    register("entries", "sentcompress.memories.entries:Entries")
    register("recall", "sentcompress.memories.recall:Recall")
