"""
Speed of each kind of tokenizer on documents: tiktoken's, and Hugging Face's library.

    python benchmarks/tokenizer_speed.py                        # gpt2 if it is cached, bpe, bytes
    python benchmarks/tokenizer_speed.py FOLDER tokenizer.json  # and these, as for --tokenizer

Encodes Python's documentation, cut into documents of 4,000 characters, with `encode_documents`, and
the same with AutoTokenizer of transformers, its peer where there is one: five times each in turn.
Prints MB/s from the medians, and the ratio. Half a minute.
"""

import os
import statistics
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from parts.data.python_docs import python_docs
from parts.data.tokenizers import Tokenizer, byte_tokenizer, gpt2_tokenizer, train_bpe


def peer_of(spec: str):
    """transformers' tokenizer of the same files as a function of documents, or None."""
    if not Path(spec).exists():
        return None
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(spec)
    if path.is_dir():
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    else:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=spec)
    return lambda documents: tokenizer(documents, add_special_tokens=False)["input_ids"]


def main(specs: list[str]) -> None:
    """Measure and print."""
    text = "\n\n".join(python_docs())
    documents = [text[i : i + 4000] for i in range(0, len(text), 4000)]
    megabytes = sum(len(document.encode()) for document in documents) / 1e6
    tokenizers = {"bytes": byte_tokenizer(), "bpe:4096": train_bpe(documents, 4096)}
    try:
        tokenizers["gpt2"] = gpt2_tokenizer(timeout_s=5)
    except OSError as e:
        print(f"gpt2 is left out: {e}")
    tokenizers |= {spec: Tokenizer.load(spec) for spec in specs}
    for name, tokenizer in tokenizers.items():
        sides = {"ours": tokenizer.encode_documents, "peer": peer_of(name)}
        seconds = {side: [] for side, encode in sides.items() if encode}
        for _ in range(5):
            for side, times in seconds.items():
                started = time.perf_counter()
                sides[side](documents)
                times.append(time.perf_counter() - started)
        rates = {side: megabytes / statistics.median(times) for side, times in seconds.items()}
        line = f"{name} ({type(tokenizer).__name__}): {rates['ours']:.1f} MB/s"
        if "peer" in rates:
            ratio = rates["ours"] / rates["peer"]
            line += f", transformers {rates['peer']:.1f} MB/s; ratio {ratio:.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
