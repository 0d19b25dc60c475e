"""pretraining_advanced.py with every checkpoint written by the thread. For the fault harness."""

import parts.storage.writer
from pretraining_advanced import start

parts.storage.writer.SMALL = -1  # bytes; larger checkpoints are written by the thread
start()
