"""pretraining_advanced.py with every checkpoint written by the thread, also those that are small. For the fault harness."""

import parts.writer
from parts.config import parse
from parts.launch import run_script
from pretraining_advanced import TrainConfig, main

parts.writer.SMALL = -1
run_script(lambda: main(parse(TrainConfig)))
