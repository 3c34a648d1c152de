"""Registers the dataset ``parquet-rows`` with sentcompress."""

import sentcompress


@sentcompress.hookimpl
def register_datasets(register):
    # A string, so that the module is imported only when the dataset is used.
    register("parquet-rows", "sentcompress_parquet.dataset:ParquetDataset")
