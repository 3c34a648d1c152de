"""Built-in datasets, registered exactly as a stranger's are."""

from sentcompress.hookspecs import Register, hookimpl


@hookimpl
def register_datasets(register: Register) -> None:
    register("text", "sentcompress.datasets.text:TextDataset")
    register("jsonl", "sentcompress.datasets.jsonl:JsonlDataset")
    register("parquet", "sentcompress.datasets.parquet:ParquetDataset")
    register("csv", "sentcompress.datasets.csv:CsvDataset")
    register("python-package", "sentcompress.datasets.python_package:PythonPackageDataset")
    register("hub", "sentcompress.datasets.hub:HubDataset")
    register("mix", "sentcompress.datasets.mix:MixDataset")
