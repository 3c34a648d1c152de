"""Registers the memory ``numbers`` with sentcompress."""

import sentcompress


@sentcompress.hookimpl
def register_memories(register):
    # A string, so that the module is imported only when the memory is used.
    register("numbers", "sentcompress_numbers.memory:Numbers")
