"""``python -m sentcompress`` is the ``sentcompress`` command."""

from sentcompress.cli import main

if __name__ == "__main__":
    main()
