"""
Write docs/reading-guide.md: what to read in which order, the production counterpart of each line of
the simple trainer, and a glossary.

    python docs/make_reading_guide.py          # after a change of a trainer, of README.md or of docs/benchmarks.md

No line number or figure is typed: a stretch of pretraining_simple.py is found by a text in its
first line and ends where the next one begins, the code that replaces it by a text in that file, a
figure by a pattern in README.md or docs/benchmarks.md. A text that is not found exactly once is an
error.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIMPLE = "pretraining_simple.py"
ADVANCED = "pretraining_advanced.py"
MEASURED = ("README.md", "docs/benchmarks.md")  # looked through in this order for a figure

# (text from the first line of the stretch, what the lines do,
#  the place that replaces them: (file, a text in it), what that adds, pattern of a figure or "")
ROWS = [
    (
        '"""\nPretrain a GPT on books',
        "what the script is, and how to start it",
        (ADVANCED, "Pretrain a GPT on token shards (files of token ids)"),
        "text of any size, many GPUs, and the same line goes on after a kill",
        r"[\d.]+ bits per byte after 1,400 steps, [\w ]+ from start to end",
    ),
    (
        "from __future__ import annotations",
        "Ctrl-C during the imports leaves no traceback",
        (ADVANCED, "    quiet_ctrl_c()\n"),
        "the same",
        "",
    ),
    (
        "import hashlib",
        "imports",
        (ADVANCED, "from parts.storage import checkpoint, run_folder\n"),
        "one small file in `parts/` for each concern: that list is a map of this table",
        "",
    ),
    (
        "@dataclass\nclass SimpleConfig",
        "the settings, which are the flags",
        (ADVANCED, "class TrainConfig:"),
        (
            "a YAML file under the flags; a run that goes on refuses settings that would change its "
            "result"
        ),
        "",
    ),
    (
        "# What None stands for",
        "settings that depend on the machine",
        ("configs/laptop.yaml", "tokenizer: bpe:4096"),
        "one file for each machine and model, named on the command line",
        r"1,000 steps on [\w-]+ \| [\w ]+, [\d.]+ bits per byte on held-out documents",
    ),
    (
        "def resolve(config: SimpleConfig",
        "refuse what cannot be",
        (ADVANCED, "def check(config: TrainConfig)"),
        (
            "the same before anything is touched; what needs the data is refused by "
            "`parts/training/run_settings.py`"
        ),
        "",
    ),
    (
        "def split_documents(",
        "hold some text out for validation",
        ("parts/data/corpus.py", "def in_validation("),
        "the same rule, a hash, on text that streams by and never lies in memory as a whole",
        "",
    ),
    (
        "def train_batches(",
        "rows of the text in random order, without end",
        ("parts/data/batches.py", "class TrainBatches:"),
        (
            "the order is computed and not remembered, for any number of processes; each block is "
            "compared with its hash"
        ),
        r"a batch of [^|]+ \| \d+ us; nanoGPT's get_batch \d+ us",
    ),
    (
        "def val_batches(",
        "the validation text in order",
        ("parts/data/batches.py", "def val_batches("),
        "read from disk as it is needed; one shape, so that nothing is compiled anew",
        "",
    ),
    (
        "def main(config: SimpleConfig)",
        "device and seed",
        (ADVANCED, "    dtype, why = choose_dtype("),
        (
            "the arithmetic is chosen too (bf16 where the machine has it), and the processes find "
            "each other"
        ),
        r"[\d.]+ ms per step in fp32, [\d.]+ ms in bf16",
    ),
    (
        "    B, T, run_dir = config.batch_size",
        "the run folder",
        ("parts/storage/run_folder.py", "def claimed("),
        (
            "a lock, so that two runs never share a folder; the disk must have room for the "
            "checkpoints"
        ),
        "",
    ),
    (
        "    if config.plan or config.plan_memory_gb:",
        "what the run would take, without starting it",
        (ADVANCED, "def show_plan(config"),
        "disk, several processes, accumulation, the steps still to go",
        "",
    ),
    (
        "    documents, source = load_documents",
        "text to tokens, in memory",
        ("prep_dataset.py", "def prepare_tokens("),
        "token shards on disk, made once; a build that was killed goes on; memory does not grow",
        (
            r"[\d.]+ MB/s from start to end; `datasets.map\(num_proc=2\)` writing the same shards "
            r"[\d.]+ MB/s"
        ),
    ),
    (
        "    n_windows = (len(train_tokens) - 1) // T",
        "how many steps there are",
        ("parts/training/run_settings.py", "def resolve_length("),
        "a run that goes on keeps its length, its warmup, and (`share_out`) its rows per step",
        "",
    ),
    (
        "    validation, token_bytes = val_batches",
        "what validation needs",
        (ADVANCED, "class Job:"),
        (
            "everything about model and data in one record, so that another model trains with the "
            "same loop"
        ),
        "",
    ),
    (
        "    model_config = GPTConfig.of_size(",
        "the model",
        (ADVANCED, "def gpt_job("),
        "weights to begin with (`--init_from`); a model that one process alone could not hold",
        "",
    ),
    (
        "    decayed = [\n",
        "AdamW, weight decay on matrices only",
        ("parts/training/optim.py", "class Optimizer:"),
        "GaLore and Muon, a state that is saved by name, clipping inside the fused kernel",
        r"rank 128, on the 124M shape \| [\d.]+ of AdamW's",
    ),
    (
        "    scheduler = torch.optim.lr_scheduler.LambdaLR",
        "the learning rate changes with the step",
        ("parts/training/optim.py", "def learning_rate("),
        "a formula of the step with nothing to save; linear, constant and wsd besides cosine",
        "",
    ),
    (
        '    print(\n        f"{source}: {len(documents)} documents',
        "say what will run",
        (ADVANCED, "def tell_what_runs("),
        "rows per step over all processes, the kernel of attention, the bytes of the optimizer",
        "",
    ),
    (
        "    start_run(\n        run_dir,\n",
        "begin the run folder",
        (ADVANCED, '            state["wandb_id"] = start_run('),
        "on the first process only; samples and metrics behind the checkpoint are taken out",
        "",
    ),
    (
        "    losses, events = (\n",
        "what is to be written down",
        ("parts/training/metrics.py", "class Journal:"),
        "one line per step however often the run was killed; TensorBoard and wandb beside it",
        "",
    ),
    (
        "    def look(step: int)",
        "evaluate",
        (ADVANCED, "def evaluate(job: Job"),
        "shared out to all processes and added in one order: the same bits on any number of them",
        "",
    ),
    (
        "    def sample(step: int)",
        "let it write",
        (ADVANCED, "def sample(job: Job"),
        "uncompiled, since each length would be compiled; may be stopped in the middle",
        "",
    ),
    (
        "    def save(step: int) -> bool:",
        "write a checkpoint",
        (ADVANCED, "def save(\n"),
        (
            "the optimizer's state too, from a copy in memory by a thread "
            "(`parts/storage/writer.py`) while the training goes on"
        ),
        r"a checkpoint of [^|]+ \| training stands still for [\d.]+ s; torch.save takes [\d.]+ s",
    ),
    (
        "    batches, seconds = train_batches(",
        "the stream of batches",
        ("parts/data/batches.py", "class Prefetch:"),
        "the next batches are made and moved to the device by a thread",
        "",
    ),
    (
        "    with (\n        StopRequest() as stop,",
        "Ctrl-C becomes a flag",
        (ADVANCED, "stop = stack.enter_context(StopRequest())"),
        "all processes agree on it, also in an evaluation or a sample",
        "",
    ),
    (
        "        for step in range(1, n_steps + 1):",
        "the loop",
        (ADVANCED, "            last = step == max_steps\n"),
        (
            "begins at the step of the checkpoint; looking, sampling and saving stand before the "
            "step, so that a resumed run makes up for them"
        ),
        "",
    ),
    (
        "            inputs, targets = next(batches)",
        "one batch",
        (ADVANCED, "itertools.islice(feed, accum)"),
        "several micro-batches per step; shards that are damaged end the run after saving",
        "",
    ),
    (
        "            loss = calc_loss_batch(",
        "forward and backward",
        (ADVANCED, "def gradients(\n"),
        (
            "one division by the targets of all processes; bf16; compiled blocks; cut in two where "
            "the memory does not suffice"
        ),
        r"a training step, [^|]+ \| [^|]+ times the tokens/s, [^|]+ of the memory",
    ),
    (
        "            torch.nn.utils.clip_grad_norm_(",
        "clip, update, clear",
        ("parts/training/engine.py", "    def step(self, optimizer, norm"),
        (
            "over all processes; nothing is updated where the gradient is not finite; the loss scale "
            "of fp16"
        ),
        "",
    ),
    (
        "            lr = scheduler.get_last_lr()[0]",
        "the next learning rate",
        (ADVANCED, "            lr = learning_rate(\n"),
        "set before the step, from its number",
        "",
    ),
    (
        "            losses[step] = (loss.item(), None)",
        "note the loss and the time",
        (ADVANCED, "            figures = speed.stop("),
        (
            "tokens/s over the last 50 steps, and the share of the peak of the device (MFU) where "
            "that is known"
        ),
        "",
    ),
    (
        "            if not math.isfinite(losses[step][0]):",
        "a loss that is no number ends the run",
        ("parts/training/guard.py", "class Guard:"),
        "the step is left out; after several the run goes back to a checkpoint and past that text",
        "",
    ),
    (
        "            events.append(\n",
        "one line for the step",
        (ADVANCED, '            record = {\n                "step": step,'),
        "the norm of the gradient, speed and memory too",
        "",
    ),
    (
        "            last = stop or step == n_steps",
        "time to evaluate?",
        (ADVANCED, "            if not stopping and (step % config.eval_freq == 0 or last)"),
        "not again after a resume, if the record says that it was done",
        "",
    ),
    (
        "            if step % config.save_ckpt_freq == 0 or last:",
        "time to save?",
        (ADVANCED, "            due = (\n"),
        "also by minutes; never in the middle of bad steps; the best one is kept",
        "",
    ),
    (
        "            if step % config.print_sample_iter == 0 or last:",
        "time to sample? the end?",
        (ADVANCED, "                and job.sample\n"),
        "the same",
        "",
    ),
    (
        "        print(\n            f\"{'stopped' if stop else 'finished'} at step",
        "the end",
        (ADVANCED, "    if failed:\n"),
        "exit codes that a script can tell apart: finished, failed, bad input, stopped",
        "",
    ),
    (
        "        curves = zip(*[(s, s * B * T",
        "the picture",
        ("gpt_train.py", "def plot_run("),
        "drawn from metrics.jsonl, at most two thousand points, also every ten minutes",
        "",
    ),
    (
        '    print(f"{run_dir}: loss.png',
        "say where it is",
        (ADVANCED, '        f"finished at step {step}'),
        "the same",
        "",
    ),
    (
        "def learning_rate_share(",
        "warmup, then half a cosine",
        ("parts/training/optim.py", "def learning_rate("),
        "the same curve with both ends in your hands (`--max_lr`, `--min_lr`, `--warmup_steps`)",
        "",
    ),
    (
        "def start_run(run_dir: Path, facts",
        "run.json",
        (ADVANCED, "def start_run(run_dir: Path, job"),
        "versions, device, git commit, the line that started it and the line that goes on",
        "",
    ),
    (
        "# Left out, so that the page stays short.",
        "what the page leaves out",
        (ADVANCED, "def train(job: Job"),
        "all of it",
        "",
    ),
    (
        'if __name__ == "__main__":\n    run_script(\n',
        "start",
        (ADVANCED, "    run_script(lambda: main(parse(TrainConfig)))"),
        "the same",
        "",
    ),
]

# (word, what it means, a file in which it stands)
WORDS = [
    (
        "compile",
        "torch.compile: making one fast kernel of many small operations, before the first step",
        "parts/base/machine.py",
    ),
    ("document", "one text of the corpus: a book, a web page, a row of a table", "prep_dataset.py"),
    (
        "head",
        (
            "the matrix that turns the last embeddings into scores of all tokens; an attention head "
            "is one of several attentions side by side"
        ),
        "gpt_train.py",
    ),
    (
        "HellaSwag",
        (
            "questions about everyday scenes with four endings each, of which one is right; guessing "
            "gives 0.25"
        ),
        "gpt_train.py",
    ),
    ("hub", "huggingface.co, from where models and texts are downloaded", "prep_dataset.py"),
    ("kernel", "the piece of machine code that does one operation on the device", "gpt_train.py"),
    ("optimizer", "what turns gradients into a change of the parameters", "README.md"),
    ("seed", "the number that randomness starts from: the same seed gives the same run", SIMPLE),
    (
        "target",
        "the token to be predicted at a position: the one that follows; -100 stands for none",
        SIMPLE,
    ),
    ("tokenizer", "what cuts text into tokens, and puts it together again", SIMPLE),
    (
        "torchrun",
        "torch's program that starts one script several times and tells each process its rank",
        ADVANCED,
    ),
    (
        "activation",
        (
            "a number that a layer computes from its input, kept until the backward pass needs it; "
            "most of the memory of a training"
        ),
        ADVANCED,
    ),
    (
        "AdamW",
        (
            "the usual optimizer: each parameter gets a step of its own size, from running means of "
            "its gradient and of its square (its two moments)"
        ),
        "parts/training/optim.py",
    ),
    (
        "attention",
        (
            "how a position of the text reads from other positions: it weighs them by how well its "
            "query fits their keys, and adds up their values"
        ),
        "gpt_train.py",
    ),
    (
        "backward pass",
        (
            "computing, from the loss back to the input, how the loss would change with each "
            "parameter (the gradient)"
        ),
        ADVANCED,
    ),
    ("batch", "the rows of text that one step looks at", SIMPLE),
    (
        "bf16, fp16, fp32",
        (
            "numbers of 16 or 32 bits. bf16 has the range of fp32 and 8 bits of precision, fp16 more "
            "precision and a small range"
        ),
        "parts/base/machine.py",
    ),
    (
        "bits per byte",
        (
            "the loss of a whole text in bits, divided by its length in bytes: what compressing it "
            "with the model would come to. 8 is no knowledge at all; the one figure that can be "
            "compared between tokenizers"
        ),
        "README.md",
    ),
    (
        "block",
        "attention and an MLP, one after the other; a GPT is a stack of them",
        "gpt_train.py",
    ),
    (
        "BPE",
        (
            "byte-pair encoding: a vocabulary made by joining, again and again, the two neighbours "
            "that are most frequent together"
        ),
        "parts/data/tokenizers.py",
    ),
    ("checkpoint", "weights (and what is needed to go on) on disk, at one step", SIMPLE),
    ("context", "how many tokens the model can see at once", SIMPLE),
    (
        "cross-entropy",
        (
            "the loss of a language model: minus the logarithm of the probability that it gave to "
            "the token that really came"
        ),
        "gpt_train.py",
    ),
    (
        "DDP",
        (
            "distributed data parallel: every process has the whole model, reads other rows, and the "
            "gradients are averaged"
        ),
        "parts/training/engine.py",
    ),
    (
        "dropout",
        "zeroing some activations at random while training, against learning by heart",
        "gpt_train.py",
    ),
    ("embedding", "the row of numbers that stands for a token, or for a position", "gpt_train.py"),
    ("end-of-text", "the token that stands between documents", "gpt_train.py"),
    ("epoch", "one pass over the whole training text", SIMPLE),
    (
        "FLOPs",
        "floating-point operations; training costs about six per parameter and token",
        "gpt_train.py",
    ),
    ("fingerprint", "a short hash: what has the same fingerprint is the same", "prep_dataset.py"),
    (
        "FSDP",
        (
            "fully sharded data parallel: as DDP, but each process keeps only a slice of weights, "
            "gradients and moments"
        ),
        "README.md",
    ),
    (
        "GaLore",
        (
            "an optimizer that keeps the moments of a matrix in a small subspace of its gradient, "
            "for less memory"
        ),
        "parts/training/optim.py",
    ),
    (
        "GELU",
        (
            "the bend between the two products of the MLP; without one, two matrices would be no "
            "more than one"
        ),
        "gpt_train.py",
    ),
    (
        "gradient",
        (
            "for each parameter, how much the loss grows when the parameter does; the step goes the "
            "other way"
        ),
        ADVANCED,
    ),
    (
        "gradient accumulation",
        (
            "adding up the gradients of several micro-batches before one step, for a large batch in "
            "little memory"
        ),
        SIMPLE,
    ),
    (
        "clipping",
        (
            "shortening the whole gradient where its norm (its length) is above a limit, so that one "
            "odd batch does no harm"
        ),
        "parts/training/optim.py",
    ),
    ("greedy", "taking the most likely token each time", "gpt_train.py"),
    ("held out", "never trained on, kept for validation", ADVANCED),
    ("learning rate", "the size of a step", SIMPLE),
    (
        "LayerNorm",
        (
            "bringing the numbers of a position to mean 0 and variance 1, so that no layer sees too "
            "large or too small ones"
        ),
        "gpt_train.py",
    ),
    (
        "logits",
        (
            "the scores of all tokens, one per token of the vocabulary; softmax turns them into "
            "probabilities"
        ),
        "gpt_train.py",
    ),
    ("loss", "how wrong the model was; here the mean cross-entropy in nats", SIMPLE),
    (
        "loss scale",
        "a factor on the loss that keeps the small gradients of fp16 from becoming zero",
        ADVANCED,
    ),
    (
        "MFU",
        (
            "model FLOPs utilisation: the share of the peak of the device that the products of the "
            "model make use of"
        ),
        "parts/training/metrics.py",
    ),
    ("micro-batch", "what goes through the model at one time; a step may have several", ADVANCED),
    (
        "MLP",
        (
            "multi-layer perceptron: two matrix products with a bend between, at each position for "
            "itself"
        ),
        "gpt_train.py",
    ),
    (
        "Muon",
        "an optimizer for matrices: momentum whose directions are all given the same strength",
        "parts/training/optim.py",
    ),
    ("nats", "the unit of the loss with natural logarithms; 1 nat is 1.44 bits", SIMPLE),
    ("parameter", "a number that is learned; weights are parameters", SIMPLE),
    (
        "perplexity",
        (
            "e to the power of the loss: the model is as unsure as if it chose evenly among so many "
            "tokens"
        ),
        "gpt_train.py",
    ),
    ("rank", "the number of a process among those that train together, from 0", ADVANCED),
    (
        "residual stream",
        (
            "the row of numbers of a position that goes through all blocks; each block reads it and "
            "adds to it"
        ),
        "gpt_train.py",
    ),
    (
        "SDPA",
        (
            "scaled dot-product attention, torch's function for attention, with several kernels "
            "behind it"
        ),
        "docs/benchmarks.md",
    ),
    ("softmax", "exponentials divided by their sum: scores become probabilities", "gpt_train.py"),
    ("step", "one update of the parameters", SIMPLE),
    (
        "temperature",
        "the scores are divided by it before a token is drawn: below 1 bolder, 0 greedy",
        "gpt_train.py",
    ),
    (
        "tied weights",
        "the matrix that turns tokens into embeddings turns the last embeddings into scores, too",
        "gpt_train.py",
    ),
    ("token", "a piece of text (a word, a part of one, a byte) with a number, its id", SIMPLE),
    ("token shard", "a file of token ids, ready to be read while training", "prep_dataset.py"),
    (
        "top-k, top-p",
        (
            "drawing only from the k most likely tokens, or from the fewest whose probabilities "
            "reach p"
        ),
        "gpt_train.py",
    ),
    ("validation", "measuring the loss on text that was held out", SIMPLE),
    ("vocabulary", "all tokens that there are", "gpt_train.py"),
    (
        "warmup",
        (
            "the first steps, over which the learning rate grows from nothing, since the first "
            "gradients are large and point anywhere"
        ),
        SIMPLE,
    ),
    ("weight decay", "drawing weights a little towards zero in each step", ADVANCED),
    ("window", "a row of context length, cut from the text", SIMPLE),
    ("world size", "the number of processes that train together", ADVANCED),
]

TEXT = """# Reading guide

Written by `python docs/make_reading_guide.py`, which looks up every line number and figure; change that, not this.

## In which order

1. **pretraining_simple.py**, top to bottom, while a run of it goes on in another window. Begin with `main`: text becomes tokens, tokens
   become batches, the model guesses each next token, the loss says how wrong it was, and `loss.backward()` says which way each parameter
   has to go. Everything else in this project is there so that these few lines run faster, longer, or on more machines.
2. **gpt_train.py**, up to the ruler "loss, evaluation": begin with `GPT.forward`, then `Block`, then `CausalSelfAttention`. Of the
   rest, `stream` is how a model writes. Behind "sampling from a checkpoint" is the command line.
3. **The table below**, with both trainers open: for each stretch of the simple one, what the production trainer has in its place.
4. **pretraining_advanced.py**: `train`, from `while True:` on. It is the same loop. Then `gradients`, and `Job`, which is what you
   fill in to train something else ([how-to-extend.md](how-to-extend.md)).
5. **The files in `parts/`** as questions come up; none of them imports another, so each can be read alone.

Something goes wrong on the way: [troubleshooting.md](troubleshooting.md). A word is new: [words](#words), at the end.

## From simple to advanced

Each line of [pretraining_simple.py](../pretraining_simple.py) but blank ones and rulers is in one row. *Measured* quotes
[README.md](../README.md) or [benchmarks.md](benchmarks.md), where device and date stand; a dash means that nothing was measured,
not that nothing is gained.

| lines | what they do | in its place | what that adds | measured |
|---|---|---|---|---|
{rows}

## Words

{words}
"""


def read(file: str) -> str:
    """The text of a file of the project."""
    return (ROOT / file).read_text(encoding="utf-8")


def line_of(file: str, anchor: str) -> int:
    """Number of the line on which a text begins. Raises ValueError unless the file has it exactly once."""
    text = read(file)
    if text.count(anchor) != 1:
        raise ValueError(
            f"docs/make_reading_guide.py: {anchor!r} stands {text.count(anchor)} times in {file}; choose another text"
        )
    return text.count("\n", 0, text.index(anchor)) + 1


def name_of(file: str, line: int) -> str:
    """What a reader looks for: the function or class of a line, else the file."""
    if not file.endswith(".py"):
        return file
    before = read(file).splitlines()[:line]
    nearest = next((i for i in reversed(range(line)) if re.match(r"(class|def) ", before[i])), None)
    outside = nearest is None or any(
        re.match(r"[^\s#)\]}@]", text) for text in before[nearest + 1 :]
    )
    name = "" if outside else " `" + re.match(r"(?:class|def) (\w+)", before[nearest])[1] + "`"
    inner = re.match(r"    def (\w+)", before[-1])
    return f"{file}{name[:-1] + '.' + inner[1] + '`' if inner and name else name}"


def stretches() -> list[tuple[int, int]]:
    """
    (first, last) line of each row in the simple trainer: a row ends where the next one begins.

    Raises ValueError if a row's text is not there, or the rows are not in the order of the file.
    """
    lines = read(SIMPLE).splitlines()
    firsts = [line_of(SIMPLE, row[0]) for row in ROWS]
    if firsts != sorted(set(firsts)) or firsts[0] != 1:
        raise ValueError(f"docs/make_reading_guide.py: ROWS are not in the order of {SIMPLE}")
    found = []
    for first, following in itertools.pairwise([*firsts, len(lines) + 1]):
        told = [n for n in range(first, following) if not re.match(r"\s*$|# ---", lines[n - 1])]
        found.append((first, told[-1]))
    return found


def figure(pattern: str) -> str:
    """What a pattern matches in README.md, else in docs/benchmarks.md, exactly once there. Raises ValueError."""
    for file in MEASURED:
        found = list(re.finditer(pattern, " ".join(read(file).split())))
        if len(found) == 1:
            return found[0][0].replace(" | ", ": ")
    raise ValueError(
        f"docs/make_reading_guide.py: {pattern!r} is not once in {' or '.join(MEASURED)}; mend the row's pattern"
    )


def guide() -> str:
    """The text of docs/reading-guide.md. Raises ValueError where something is not found, or twice."""
    rows, words = [], []
    for (first, last), (_, what, (file, anchor), adds, pattern) in zip(
        stretches(), ROWS, strict=True
    ):
        lines = f"[{first}{f'-{last}' if last > first else ''}](../{SIMPLE}#L{first}-L{last})"
        line = line_of(file, anchor)
        rows.append(
            f"| {lines} | {what} | [{name_of(file, line)}](../{file}#L{line}) | {adds} | {figure(pattern) if pattern else '-'} |"
        )
    for word, meaning, file in sorted(WORDS, key=lambda row: row[0].lower()):
        for one in word.split(", "):
            if not re.search(r"[-_ \n]".join(re.split("[- ]", one)), read(file), re.IGNORECASE):
                raise ValueError(
                    f"docs/make_reading_guide.py: {one!r} does not stand in {file}; name another file"
                )
        words.append(f"- **{word}** ({file}): {meaning}.")
    return TEXT.format(rows="\n".join(rows), words="\n".join(words))


if __name__ == "__main__":
    (ROOT / "docs/reading-guide.md").write_text(guide(), encoding="utf-8", newline="\n")
