"""
Write docs/reading-guide.md: what to read in which order, what the production trainer has in place
of each line of the simple one, and a glossary.

    python docs/make_reading_guide.py   # after changing a trainer, README.md or docs/benchmarks.md

No line number or figure is typed here. A stretch of pretraining_simple.py is found by a text in its
first line and ends where the next one begins, the code in its place by a text in that file, and a
figure by a pattern in README.md or docs/benchmarks.md. A text that does not occur exactly once is
an error.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIMPLE = "pretraining_simple.py"
ADVANCED = "pretraining_advanced.py"
MEASURED = ("README.md", "docs/benchmarks.md")  # where figures are looked up, in this order

# (text of the first line of the stretch, what the lines do,
#  what is in their place: (file, a text in it), what that adds, pattern of a measured figure or "")
ROWS = [
    (
        '"""\nPretrain a GPT on books',
        "what the script does, and how to start it",
        (ADVANCED, "Pretrain a GPT on token shards, on a laptop"),
        "text of any size, many GPUs; the same command resumes the run after a kill",
        r"[\d.]+ bits per byte after 1,400 steps, [\w ]+ from start to end",
    ),
    (
        "# Before torch is imported",
        "no traceback if Ctrl-C comes during the imports",
        (ADVANCED, "    quiet_ctrl_c()\n"),
        "the same",
        "",
    ),
    (
        "import hashlib",
        "imports",
        (ADVANCED, "from parts.storage import checkpoint\n"),
        "one file in `parts/` for each concern; this list is a map of the table",
        "",
    ),
    (
        "@dataclass\nclass SimpleConfig",
        "the settings, which are also the flags",
        (ADVANCED, "class RunConfig:"),
        "a YAML file, which flags override; a resumed run refuses what would change its result",
        "",
    ),
    (
        "# What None stands for",
        "defaults that depend on the device",
        ("configs/laptop.yaml", "tokenizer: bpe:4096"),
        "one file for each machine and model, chosen with `--config`",
        r"1,000 steps on [\w-]+ \| [\w ]+, [\d.]+ bits per byte on held-out documents",
    ),
    (
        "def resolve(config: SimpleConfig",
        "fill in the defaults, refuse impossible values",
        ("parts/training/run_settings.py", "def check_settings("),
        "the same; a resumed run is also compared with its checkpoint",
        "",
    ),
    (
        "def split_documents(",
        "hold out text for validation",
        ("parts/data/corpus.py", "def in_validation("),
        "the same rule, a hash, for streamed text that is never in memory as a whole",
        "",
    ),
    (
        "def train_batches(",
        "batches in random order, without end",
        ("parts/data/batches.py", "class TrainBatches("),
        "an order that is computed, not stored, for any number of processes; hashes are checked",
        r"a batch of [^|]+ \| \d+ us; nanoGPT's get_batch \d+ us",
    ),
    (
        "def val_batches(",
        "the validation text, in order",
        ("parts/data/batches.py", "def val_batches("),
        "read from disk when needed; batches of one shape, so that nothing is compiled again",
        "",
    ),
    (
        "def learning_rate_share(",
        "the learning rate: warmup, then half a cosine",
        ("parts/training/optim.py", "def learning_rate("),
        "flags for both ends and the warmup; also linear, constant, wsd (warmup, stable, decay)",
        "",
    ),
    (
        "def start_run(run_dir: Path, facts",
        "create the run folder with run.json",
        ("parts/training/outputs.py", "def start_run("),
        "versions, device, git commit, and the command that resumes the run",
        "",
    ),
    (
        "def main(config: SimpleConfig)",
        "the device and the settings",
        (ADVANCED, "    dtype, why = choose_dtype("),
        "also the number format (bf16 if the machine has it); the processes find each other",
        r"[\d.]+ ms per step in fp32, [\d.]+ ms in bf16",
    ),
    (
        "    # --plan prints",
        "print what the run would need, without starting it",
        (ADVANCED, "def show_plan(job: Job"),
        "disk, several processes, gradient accumulation, the steps that are left",
        "",
    ),
    (
        "    # Text to tokens",
        "text to tokens, in memory",
        ("prep_dataset.py", "def prepare_tokens("),
        "token shards on disk, made once in constant memory; a killed build is resumed",
        (
            r"[\d.]+ MB/s from start to end; `datasets.map\(num_proc=2\)` writing the same shards "
            r"[\d.]+ MB/s"
        ),
    ),
    (
        "    # Tokens to batches",
        "the number of steps",
        ("parts/training/run_settings.py", "def resolve_length("),
        "a resumed run keeps its length, its warmup and (`share_out`) its rows per step",
        "",
    ),
    (
        "    batches = train_batches(",
        "the stream of batches",
        ("parts/data/batches.py", "class Prefetch:"),
        "a thread makes the next batches and copies them to the device",
        "",
    ),
    (
        "    validation = val_batches(",
        "what validation needs",
        (ADVANCED, "class Job:"),
        "model and data in one record, so that the same loop trains other models",
        "",
    ),
    (
        "    # The model: random weights",
        "the model",
        (ADVANCED, "def gpt_job("),
        "initial weights from a checkpoint (`--init_from`); models too large for one process",
        "",
    ),
    (
        '    print(f"{n_steps} steps of',
        "report what will run",
        ("parts/training/messages.py", "def tell_what_runs("),
        "rows per step over all processes, the attention kernel, bytes of optimizer state",
        "",
    ),
    (
        "    # The optimizer: AdamW",
        "AdamW, with weight decay on matrices only",
        ("parts/training/optim.py", "class Optimizer:"),
        "GaLore and Muon; state that is saved by name; clipping inside the fused kernel",
        r"rank 128, on the 124M shape \| [\d.]+ of AdamW's",
    ),
    (
        "    # What stays of the run",
        "start the run folder",
        ("parts/storage/run_folder.py", "def claimed("),
        "a lock, so that two runs never write to one folder",
        "",
    ),
    (
        "    train_losses = [None]",
        "what is recorded",
        ("parts/training/metrics.py", "class Journal:"),
        "one line per step, however often the run was killed; also TensorBoard and wandb",
        "",
    ),
    (
        "    def evaluate(step: int)",
        "evaluate",
        (ADVANCED, "def evaluate(job: Job"),
        "divided among the processes, added in one order: bit-identical on any number of them",
        "",
    ),
    (
        "    def sample(step: int)",
        "write a sample",
        (ADVANCED, "def sample(job: Job"),
        "without compilation, since every length would be compiled; can be stopped halfway",
        "",
    ),
    (
        "    def save(step: int) -> bool:",
        "save a checkpoint",
        ("parts/training/resume.py", "def save("),
        "the optimizer state too; a thread writes a copy of it (`parts/storage/writer.py`)",
        r"a checkpoint of [^|]+ \| training stands still for [\d.]+ s; torch.save takes [\d.]+ s",
    ),
    (
        "    # Training: guess,",
        "Ctrl-C sets a flag",
        (ADVANCED, "stack.enter_context(requests)"),
        "all processes agree on it, also during an evaluation or a sample",
        "",
    ),
    (
        "        for step in range(1, n_steps + 1):",
        "the loop",
        (ADVANCED, "        while True:\n            # Between two steps"),
        "starts at the step of the checkpoint, and evaluates, samples and saves before the step",
        "",
    ),
    (
        "            lr = config.lr * learning_rate_share",
        "set the learning rate",
        (ADVANCED, "            lr = learning_rate(step"),
        "the same: a function of the step, with nothing to save",
        "",
    ),
    (
        "            inputs, targets = next(batches)",
        "one batch",
        (ADVANCED, "def next_step("),
        "several micro-batches per step; if a shard is damaged, the run saves and ends",
        "",
    ),
    (
        "            loss = calc_loss_batch(",
        "forward and backward",
        (ADVANCED, "def gradients(job"),
        "one division by the targets of all processes; bf16; smaller batches if memory runs out",
        r"a training step, [^|]+ \| [^|]+ times the tokens/s, [^|]+ of the memory",
    ),
    (
        "            norm = torch.nn.utils.clip_grad_norm_(",
        "clip, and read the loss",
        ("parts/training/engine.py", "    def read(self, total)"),
        "over all processes, in one read of the GPU",
        "",
    ),
    (
        "            if not math.isfinite(train_loss + norm):",
        "a loss or gradient that is not finite ends the run, saved as it was before this step",
        ("parts/training/guard.py", "class Guard:"),
        "skips the step; after several, rolls back to a checkpoint and skips their text",
        "",
    ),
    (
        "            optimizer.step()",
        "update, clear, and measure the time",
        ("parts/training/engine.py", "    def step(self, lr"),
        "the loss scale of fp16; tokens/s over the last 50 steps, and MFU if the peak is known",
        "",
    ),
    (
        "            train_losses.append(train_loss)",
        "record the step",
        (ADVANCED, '            record = {"step": step + 1'),
        "also the gradient norm, speed and memory",
        "",
    ),
    (
        "            last = stop or step == n_steps",
        "time to evaluate?",
        (ADVANCED, "            due = step % config.eval_freq"),
        "not again after a resume if it was recorded",
        "",
    ),
    (
        "            if step % config.save_ckpt_freq == 0 or last:",
        "time to save?",
        (ADVANCED, "            due = saves.due or"),
        "also every few minutes; never during bad steps; the best checkpoint is kept",
        "",
    ),
    (
        "            if step % config.print_sample_iter == 0 or last:",
        "time to sample? the end?",
        (ADVANCED, "            due = step and (step % config.print_sample_iter"),
        "the same",
        "",
    ),
    (
        "        # The end: the curve",
        "the end",
        (ADVANCED, "        if saves.failed:\n"),
        "one exit code each for finished, failed, bad input and stopped",
        "",
    ),
    (
        "        steps = list(range(step + 1))",
        "the plot",
        ("gpt_train.py", "def plot_run("),
        "drawn from metrics.jsonl, at most two thousand points, also every ten minutes",
        "",
    ),
    (
        '    picture = "loss.png',
        "report where the results are",
        ("parts/training/messages.py", "def last_line("),
        "the same",
        "",
    ),
    (
        "# Left out, to keep this page short",
        "what this script leaves out",
        (ADVANCED, "def train(job: Job"),
        "all of it",
        "",
    ),
    (
        'if __name__ == "__main__":\n    notes',
        "start",
        (ADVANCED, "def start("),
        "the same",
        "",
    ),
]

# (word, what it means, a file in which it occurs)
WORDS = [
    (
        "activation",
        (
            "a number that a layer computes from its input; the backward pass needs them, and they "
            "take most of the memory of a training step"
        ),
        ADVANCED,
    ),
    (
        "AdamW",
        (
            "the usual optimizer: the step of each parameter is scaled by running means of its "
            "gradient and of the square of its gradient (the two moments)"
        ),
        SIMPLE,
    ),
    (
        "attention",
        (
            "how a position reads from other positions: it compares its query with their keys, and "
            "adds up their values, weighted by how well they match"
        ),
        "gpt_train.py",
    ),
    (
        "backward pass",
        (
            "computing the gradient, from the loss back to the input: how the loss changes with "
            "each parameter"
        ),
        ADVANCED,
    ),
    ("batch", "the rows of text that one step is computed on", SIMPLE),
    (
        "bf16, fp16, fp32",
        (
            "floating-point formats of 16 or 32 bits. bf16 has the range of fp32 with 8 bits of "
            "precision; fp16 is more precise, but its range is small"
        ),
        "parts/base/machine.py",
    ),
    (
        "bits per byte",
        (
            "the loss of a text in bits, divided by its length in bytes: the size of the text if "
            "it were compressed with the model. Knowing nothing costs 8. Use it to compare models "
            "that have different tokenizers"
        ),
        SIMPLE,
    ),
    ("block", "attention followed by an MLP; a GPT is a stack of blocks", "gpt_train.py"),
    (
        "BPE",
        (
            "byte-pair encoding: a vocabulary made by joining, again and again, the most frequent "
            "pair of neighbouring tokens into a new token"
        ),
        "parts/data/tokenizers.py",
    ),
    ("checkpoint", "the weights at one step on disk, with what is needed to resume", SIMPLE),
    (
        "clipping",
        "shortening a gradient that is longer than a limit, so that one odd batch does no harm",
        "parts/training/engine.py",
    ),
    (
        "compile",
        "torch.compile: fusing many small operations into fast kernels, before the first step",
        "parts/base/machine.py",
    ),
    ("context", "the tokens that the model can see at once; context length is how many", SIMPLE),
    (
        "cross-entropy",
        (
            "the loss of a language model: minus the logarithm of the probability that it gave to "
            "the token that followed"
        ),
        "gpt_train.py",
    ),
    (
        "DDP",
        (
            "distributed data parallel: every process has the whole model and reads its own rows; "
            "the gradients are averaged"
        ),
        "parts/training/engine.py",
    ),
    ("document", "one text of the corpus: a book, a web page, a row of a table", SIMPLE),
    (
        "dropout",
        "setting random activations to zero while training, to keep the model from memorising",
        "gpt_train.py",
    ),
    ("embedding", "the vector of numbers for a token, or for a position", "gpt_train.py"),
    ("end-of-text", "the special token after each document", "gpt_train.py"),
    ("epoch", "one pass over the whole training text", SIMPLE),
    ("fingerprint", "a short hash: equal fingerprints mean equal content", "prep_dataset.py"),
    (
        "FLOPs",
        "floating-point operations; training takes about six per parameter and token",
        "parts/training/plan.py",
    ),
    (
        "FSDP",
        (
            "fully sharded data parallel: like DDP, but each process keeps only its part of the "
            "weights, gradients and moments"
        ),
        "README.md",
    ),
    (
        "GaLore",
        (
            "an optimizer that saves memory: it keeps the moments of a matrix in a small subspace "
            "of its gradient"
        ),
        "parts/training/optim.py",
    ),
    (
        "GELU",
        (
            "the nonlinear function between the two matrices of the MLP; without it they would act "
            "like a single matrix"
        ),
        "gpt_train.py",
    ),
    (
        "gradient",
        "for each parameter, how much the loss grows with it; a step goes the opposite way",
        SIMPLE,
    ),
    (
        "gradient accumulation",
        "adding the gradients of several micro-batches, for a large batch in little memory",
        SIMPLE,
    ),
    ("greedy", "always taking the most likely token", "gpt_train.py"),
    (
        "head",
        (
            "the matrix that turns the last vector of a position into logits; an attention head is "
            "one of several attentions that run side by side"
        ),
        "gpt_train.py",
    ),
    ("held out", "never trained on, kept for validation", SIMPLE),
    (
        "HellaSwag",
        (
            "questions about everyday scenes, each with four endings, one of them right; guessing "
            "scores 0.25"
        ),
        "parts/report/scoring.py",
    ),
    ("hub", "huggingface.co, a site with models and texts to download", "prep_dataset.py"),
    ("kernel", "the machine code for one operation on a device", "parts/model/cpu_products.py"),
    (
        "LayerNorm",
        (
            "scaling the numbers of a position to mean 0 and variance 1, so that no layer gets "
            "very large or very small ones"
        ),
        "gpt_train.py",
    ),
    ("learning rate", "the size of a step", SIMPLE),
    (
        "logits",
        "the scores of all tokens of the vocabulary; softmax turns them into probabilities",
        "gpt_train.py",
    ),
    ("loss", "how wrong the model is; here the mean cross-entropy in nats", SIMPLE),
    (
        "loss scale",
        "a factor that keeps the small gradients of fp16 from rounding to zero",
        ADVANCED,
    ),
    (
        "MFU",
        (
            "model FLOPs utilisation: the FLOPs that the model needs per second, as a share of the "
            "peak of the device"
        ),
        "parts/training/metrics.py",
    ),
    (
        "micro-batch",
        "the rows that pass through the model at once; a step has one or more",
        ADVANCED,
    ),
    (
        "MLP",
        (
            "multi-layer perceptron: two matrix products with GELU between them, computed for each "
            "position separately"
        ),
        "gpt_train.py",
    ),
    (
        "Muon",
        "an optimizer for matrices: momentum, rescaled so that all its directions count equally",
        "parts/training/optim.py",
    ),
    ("nats", "the unit of the loss with natural logarithms; 1 nat is 1.44 bits", SIMPLE),
    ("optimizer", "turns gradients into changes of the parameters", SIMPLE),
    ("parameter", "a number that is learned; also called a weight", SIMPLE),
    (
        "perplexity",
        "e to the power of the loss: as uncertain as a choice among so many equally likely tokens",
        "gpt_train.py",
    ),
    ("rank", "the number of a process among those that train together, from 0", ADVANCED),
    (
        "residual stream",
        "the vector of a position on its way through the blocks; each reads it and adds to it",
        "gpt_train.py",
    ),
    (
        "SDPA",
        "scaled dot-product attention: torch's function for attention, which has several kernels",
        "docs/benchmarks.md",
    ),
    ("seed", "the number that random numbers start from: same seed, same run", SIMPLE),
    (
        "RMSNorm",
        "dividing a vector by the root of the mean of its squares; a LayerNorm without the mean",
        "parts/model/llama.py",
    ),
    (
        "rotary",
        (
            "of positions: queries and keys are turned by an angle that grows with the position, "
            "so that attention depends on distances"
        ),
        "parts/model/llama.py",
    ),
    ("SwiGLU", "an MLP in which one half, after SiLU, scales the other", "parts/model/llama.py"),
    (
        "grouped query",
        "attention in which several query heads share a key and a value",
        "parts/model/llama.py",
    ),
    (
        "softmax",
        "exponentials divided by their sum: turns scores into probabilities",
        "gpt_train.py",
    ),
    ("step", "one update of the parameters", SIMPLE),
    (
        "target",
        "the token to be predicted at a position: the one that follows; -100 means none",
        SIMPLE,
    ),
    (
        "temperature",
        "logits are divided by it before a token is drawn: below 1 is bolder, 0 is greedy",
        "gpt_train.py",
    ),
    (
        "tied weights",
        "one matrix is both the token embedding and the head",
        "gpt_train.py",
    ),
    ("token", "a piece of text (a word, a part of one, a byte) that has a number, its id", SIMPLE),
    ("token shard", "a file of token ids, ready for training", "prep_dataset.py"),
    ("tokenizer", "cuts text into tokens, and joins tokens into text again", SIMPLE),
    (
        "top-k, top-p",
        (
            "drawing only from the k most likely tokens, or from the fewest tokens whose "
            "probabilities add up to p"
        ),
        "gpt_train.py",
    ),
    (
        "torchrun",
        "the launcher of torch: starts a script several times and tells each process its rank",
        ADVANCED,
    ),
    ("validation", "measuring the loss on text that was held out", SIMPLE),
    ("vocabulary", "the set of all tokens", SIMPLE),
    (
        "warmup",
        (
            "the first steps, in which the learning rate grows from 0, because the first gradients "
            "are large and point in all directions"
        ),
        SIMPLE,
    ),
    ("weight decay", "shrinking the weights a little in each step", SIMPLE),
    ("window", "a row of context length, cut from the text", SIMPLE),
    ("world size", "the number of processes that train together", "parts/training/ranks.py"),
]

TEXT = """# Reading guide

Written by `python docs/make_reading_guide.py`, which looks up every line number and figure. Edit
that script, not this page.

## In which order

1. **pretraining_simple.py**, from top to bottom, while it runs in another window. Start with
   `main`: text becomes tokens, tokens become batches, the model guesses each next token, the loss
   says how wrong the guesses were, and `loss.backward()` computes in which direction to change each
   parameter. The rest of the project makes these few lines run faster, longer, or on more machines.
2. **gpt_train.py**, up to the ruler "loss, evaluation": first `GPT.forward`, then `Block`, then
   `CausalSelfAttention`. The section "sampling" shows how a model writes.
3. **The table below**, with both trainers open: what the production trainer has in place of each
   part of the simple one.
4. **pretraining_advanced.py**: `train`, from `while True:` on, which is the same loop. Then
   `gradients`, and `Job`, which you fill in to train something else
   ([how-to-extend.md](how-to-extend.md)).
5. **The files in `parts/`**, as questions come up. They are in folders by subject: `base`, `cli`,
   `data`, `model`, `storage`, `training`, `report`. A file imports only from its own folder and
   from the folders before it in this list, so you can read them in this order.

If something goes wrong: [troubleshooting.md](troubleshooting.md). If a word is new to you:
[words](#words), at the end of this page.

## From simple to advanced

Each line of [pretraining_simple.py](../pretraining_simple.py), except blank lines and rulers, is in
one row. *Measured* quotes [README.md](../README.md) or [benchmarks.md](benchmarks.md), which name
the device and the date. A dash means that nothing was measured, not that nothing was gained.

| lines | what they do | in their place | what that adds | measured |
|---|---|---|---|---|
{rows}

## Words

Each with a file in which it occurs.

{words}
"""


def read(file: str) -> str:
    """The text of a file of the project."""
    return (ROOT / file).read_text(encoding="utf-8")


def line_of(file: str, anchor: str) -> int:
    """The number of the line where a text begins. Raises ValueError unless it occurs once."""
    text = read(file)
    n = text.count(anchor)
    if n != 1:
        what = f"{anchor!r} occurs {n} times in {file}"
        raise ValueError(f"docs/make_reading_guide.py: {what}; choose another text")
    return text.count("\n", 0, text.index(anchor)) + 1


def name_of(file: str, line: int) -> str:
    """The file and, if the line is in a function or class, its name: `engine.py Parallel.step`."""
    if not file.endswith(".py"):
        return file
    before = read(file).splitlines()[:line]
    starts = [i for i, text in enumerate(before) if re.match(r"(class|def) ", text)]
    if not starts:
        return file
    # A line that starts at the left margin after the def or class has ended it.
    after = before[starts[-1] + 1 :]
    if any(re.match(r"[^\s#)\]}@]", text) for text in after):
        return file
    name = re.match(r"(?:class|def) (\w+)", before[starts[-1]])[1]
    if method := re.match(r"    def (\w+)", before[-1]):
        name += f".{method[1]}"
    return f"{file} `{name}`"


def stretches() -> list[tuple[int, int]]:
    """
    (first, last) line of each row in the simple trainer: a row ends where the next one begins.

    Raises ValueError if a text of a row is missing, or the rows are not in the order of the file.
    """
    lines = read(SIMPLE).splitlines()
    firsts = [line_of(SIMPLE, row[0]) for row in ROWS]
    if firsts != sorted(set(firsts)) or firsts[0] != 1:
        raise ValueError(f"docs/make_reading_guide.py: ROWS are not in the order of {SIMPLE}")
    found = []
    for first, following in itertools.pairwise([*firsts, len(lines) + 1]):
        last = following - 1
        while re.match(r"\s*$|# ---", lines[last - 1]):  # a blank line or a ruler
            last -= 1
        found.append((first, last))
    return found


def figure(pattern: str) -> str:
    """The only match of a pattern in README.md, else in docs/benchmarks.md. Raises ValueError."""
    for file in MEASURED:
        found = list(re.finditer(pattern, " ".join(read(file).split())))
        if len(found) == 1:
            return found[0][0].replace(" | ", ": ")
    what = f"{pattern!r} does not match exactly once in {' or '.join(MEASURED)}"
    raise ValueError(f"docs/make_reading_guide.py: {what}; fix the pattern of its row")


def table_rows() -> list[str]:
    """The lines of the table."""
    result = []
    for (first, last), row in zip(stretches(), ROWS, strict=True):
        _, what, (file, anchor), adds, pattern = row
        numbers = f"{first}-{last}" if last > first else str(first)
        lines = f"[{numbers}](../{SIMPLE}#L{first}-L{last})"
        line = line_of(file, anchor)
        place = f"[{name_of(file, line)}](../{file}#L{line})"
        measured = figure(pattern) if pattern else "-"
        result.append(f"| {lines} | {what} | {place} | {adds} | {measured} |")
    return result


def glossary() -> list[str]:
    """The lines of the glossary. Raises ValueError if a word does not occur in its file."""
    result = []
    for words, meaning, file in sorted(WORDS, key=lambda row: row[0].lower()):
        text = read(file)
        for word in words.split(", "):
            pattern = r"[-_ \n]".join(re.split("[- ]", word))
            if not re.search(pattern, text, re.IGNORECASE):
                what = f"{word!r} does not occur in {file}"
                raise ValueError(f"docs/make_reading_guide.py: {what}; name another file")
        result.append(f"- **{words}** ({file}): {meaning}.")
    return result


def guide() -> str:
    """The text of docs/reading-guide.md. Raises ValueError if something is not found once."""
    return TEXT.format(rows="\n".join(table_rows()), words="\n".join(glossary()))


if __name__ == "__main__":
    (ROOT / "docs/reading-guide.md").write_text(guide(), encoding="utf-8", newline="\n")
