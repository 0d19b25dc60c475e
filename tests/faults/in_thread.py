"""pretraining_advanced.py with every checkpoint written by the thread, also those that are small. For the fault harness."""

import parts.storage.writer
from parts.cli.config import parse
from parts.cli.launch import run_script
from pretraining_advanced import TrainConfig, main

parts.storage.writer.SMALL = -1
run_script(lambda: main(parse(TrainConfig)))
