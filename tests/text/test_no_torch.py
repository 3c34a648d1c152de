"""Reading and tokenizing text must not cost the import of torch: worker processes do nothing else."""

from __future__ import annotations

import subprocess
import sys


def test_corpus_and_datasets_do_not_import_torch() -> None:
    script = (
        "import sys\n"
        "import sentcompress.text.corpus, sentcompress.text.segmentation, sentcompress.text.encoding\n"
        "import sentcompress.datasets.text, sentcompress.datasets.jsonl\n"
        "import sentcompress.datasets.hub, sentcompress.datasets.python_package\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
