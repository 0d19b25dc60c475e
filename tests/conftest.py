"""Where the real data is, if it is here at all, and how to start a script as a person does."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = (
    "1"  # of torch, here and in every process started from here: two tests run at a time
)

ROOT = Path(__file__).resolve().parent.parent
# Real books, vocabularies and the fault harness. Tests that need them skip by name without it.
SHARED = ROOT.parent / "shared"
GPT2_CACHE = SHARED / "data/gpt2/tiktoken_cache"


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="every test; without it a short selection")
    parser.addoption("--nightly", action="store_true", help="thirty faults of each kind, not two")


# What the default run leaves to --all: file -> its tests, none of them meaning all. A test that
# stays in spite of that, by its id, is in KEPT.
FULL = {
    "test_arabic_tokenizer.py": (
        "test_two_runs_with_another_hash_seed_write_the_same_files",
        "test_both_folders_load_and_the_report_says_what_was_measured",
        "test_rows_by_translation_are_weighted_means_and_the_others_means",
        "test_old_rows_stay_to_the_bit_and_so_do_the_logits",
        "test_bad_input_is_one_line_and_nothing_is_written",
        "test_plain_news_takes_at_most_two_fifths_of_the_tokens",
        "test_segmented_news_takes_at_most_45_percent_of_the_tokens",
        "test_text_that_keeps_its_vowel_marks_takes_a_quarter_of_the_tokens",
    ),
    "faults/test_faults.py": (),
    "test_advanced.py": (
        "test_ranks_and_accumulation_are_one_big_batch",
        "test_another_optimizer_begins_anew_where_that_is_allowed",
        "test_four_ranks_resumed_equal_straight_to_the_bit",
        "test_an_older_checkpoint_of_the_run_itself_does_not_undo_what_came_after_it",
        "test_of_an_attempt_without_a_checkpoint_nothing_is_taken_over",
        "test_a_damaged_run_json_or_record_does_not_stop_the_run",
        "test_epochs_on_another_number_of_processes",
        "test_resumed_equals_straight_to_the_bit",
        "test_one_two_one_processes_see_the_same_rows",
        "test_a_finished_run_says_so_and_never_moves_it_aside",
    ),
    "test_advanced_faults.py": (),
    "test_arabic_collection.py": (
        "test_a_run_that_is_stopped_in_the_middle_of_a_file_resumes_there",
        "test_a_hub_that_cannot_be_reached_is_one_line",
    ),
    "test_arabic_preprocessing.py": (
        "test_the_documented_commands_on_the_shared_data",
        "test_the_number_of_processes_does_not_change_the_result",
        "test_a_run_that_is_killed_ends_with_the_same_bytes",
        "test_near_duplicates_are_those_of_all_pairs_of_the_window",
    ),
    "test_arabic_segmentation.py": ("test_the_round_trip_is_exact_on_all_real_text",),
    "test_arabic_xml.py": ("test_200_mb_of_xml_take_at_most_60_mb_of_memory",),
    "test_archives.py": ("test_hostile_archives",),
    "test_benchmarks.py": (),
    "test_checkpoint_tools.py": (
        "test_training_goes_on_from_imported_weights",
        "test_info_says_what_it_is_and_the_line_that_goes_on_goes_on",
    ),
    "test_closed_streams.py": (),
    "test_compare.py": ("test_damaged_lines_and_half_a_line_are_left_out",),
    "test_corpus.py": ("test_the_english_of_python_is_plenty_and_always_the_same",),
    "test_cuda.py": ("test_a_run_on_the_cpu_makes_no_cuda_context",),
    "test_deepspeed.py": (),
    "test_doc_commands.py": (),
    "test_engines.py": ("test_five_sharding_strategies_train_as_one_process_does",),
    "test_fsdp.py": (),
    "test_full_disk.py": (),
    "test_guard.py": (
        "test_too_little_memory_on_one_of_two_ranks",
        "test_a_run_that_was_stopped_in_a_bad_stretch_ends_with_the_same_bits",
    ),
    "test_hostile_checkpoints.py": (),
    "test_hostile_formats.py": (),
    "test_hostile_safetensors.py": (),
    "test_huggingface_tokenizer.py": (
        "test_ids_are_those_of_transformers",
        "test_every_text_comes_back_and_cannot_write_a_special_token",
        "test_documents_together_are_documents_apart",
        "test_the_json_gives_the_same_tokenizer",
        "test_both_trainers_take_one_and_sample_with_it",
        "test_what_ends_and_begins_a_document",
    ),
    "test_job.py": (
        "test_patience_stops_a_killed_run_at_the_same_step",
        "test_metrics_are_the_same_bits_on_any_number_of_ranks",
        "test_checkpoints_may_have_a_name_of_the_jobs_own",
    ),
    "test_llama_training.py": (),
    "test_llama_weights.py": (
        "test_in_and_out_and_in_again_has_the_same_bits",
        "test_a_tokenizer_that_tiktoken_cannot_run_goes_in_and_out",
    ),
    "test_lora.py": (
        "test_peft_loads_the_folder_of_our_files",
        "test_logits_and_gradients_equal_those_of_peft_also_after_five_steps",
        "test_a_compiled_block_with_adapters_is_one_graph",
    ),
    "test_lora_training.py": (),
    "test_long_runs.py": (
        "test_a_vocabulary_of_ordinary_text_is_the_one_of_the_library",
        "test_the_library_of_hugging_face_encodes_a_long_run_in_seconds",
    ),
    "test_nf4.py": (
        "test_codes_are_those_of_bitsandbytes_to_the_bit",
        "test_every_level_and_every_boundary_between_two_is_coded_as_in_bitsandbytes",
        "test_the_error_is_not_above_that_of_bitsandbytes",
        "test_a_compiled_block_is_one_graph_with_the_same_results",
    ),
    "test_notebook.py": (
        "test_settings_name_the_run_and_a_training_that_fails_tells_its_error_line",
    ),
    "test_notebook_page.py": (),
    "test_on_gpu.py": (),
    "test_orchestrator_runs.py": (),
    "test_packages.py": (
        "test_without_tqdm_and_matplotlib_a_run_is_complete_but_for_its_plot",
        "test_runs_are_compared_without_matplotlib",
        "test_the_bytes_of_a_text_need_no_tiktoken_in_training_and_sampling",
        "test_a_job_is_trained_without_the_mirrors_of_its_metrics",
        "test_a_package_that_every_run_needs_is_named_in_one_line",
        "test_a_vocabulary_that_needs_tiktoken_says_so_in_one_line",
        "test_local_text_is_tokenised_and_trained_on_without_datasets",
        "test_what_needs_pyarrow_or_datasets_says_so_in_one_line",
    ),
    "test_plan.py": ("test_memory_and_files_of_a_run_are_those_planned",),
    "test_prep.py": ("test_memory_does_not_grow_with_the_number_of_files",),
    "test_prep_clean.py": (
        "test_foreign_books_and_second_editions_are_left_out",
        "test_every_real_book_keeps_both_boundary_phrases",
        "test_repetitive_text_takes_no_quadratic_time",
    ),
    "test_q_data.py": (
        "test_the_shared_rows_without_licences_are_one_line_and_the_others_are_written",
        "test_near_duplicates_of_real_files_are_those_of_all_pairs",
        "test_the_same_input_gives_the_same_bytes_also_with_the_result_inside_it",
        "test_memory_does_not_grow_with_the_texts",
    ),
    "test_readme.py": ("test_the_second_command_finds_the_tests",),
    "test_shards_build.py": ("test_memory_of_a_build_does_not_grow_with_the_text",),
    "test_q_commands.py": ("test_commands_of_the_document_run_one_after_another_and_learn",),
    "test_q_other_models.py": (
        "test_a_gpt_neox_learns_resumes_and_loads_in_peft",
        "test_models_that_cannot_be_trained_are_refused",
    ),
    "test_q_lora.py": (
        "test_a_run_learns_leaves_its_tree_and_resumes_to_the_same_bits",
        "test_a_checkpoint_has_adapters_only_and_their_merge_computes_the_same",
        "test_another_base_is_refused_when_resuming_and_when_merging",
        "test_another_method_takes_another_folder_and_says_so",
        "test_bad_input_is_one_line_and_leaves_no_run",
    ),
    "test_q_reference.py": (),
    "test_readers.py": (
        "test_a_parquet_column_of_another_type_exits_with_2_every_time",
        "test_damaged_gzip_data_is_one_line_with_the_file",
    ),
    "test_sources.py": (
        "test_simple_tokenize_gutenberg_and_eval_agree_on_odd_folders",
        "test_a_file_that_is_no_text_is_refused_with_what_would_read_it",
    ),
    "test_saves.py": (
        "test_a_signal_ends_the_wait",
        "test_the_wait_ends_with_its_time_and_older_checkpoints_stay",
        "test_a_run_that_can_save_again_is_not_stopped",
        "test_ranks_wait_together_for_a_disk_that_is_full",
        "test_a_signal_to_one_rank_ends_the_wait_of_all",
        "test_the_last_save_waits_until_there_is_space",
        "test_a_stop_on_request_waits_too_and_the_same_command_resumes",
        "test_a_refused_save_is_repeated_with_the_newest_state",
    ),
    "test_simple.py": (
        "test_a_full_disk_is_a_warning_and_then_the_exit_code",
        "test_ctrl_c_at_any_time_leaves_no_traceback_and_nothing_half_written",
        "test_a_console_without_unicode_does_not_stop_the_run",
    ),
    "test_foreign_weights.py": ("test_the_trainer_says_so_too",),
    "test_strategies.py": (
        "test_accumulation_on_one_process_changes_nothing",
        "test_two_ranks_train_as_one",
        "test_four_ranks_under_each_strategy_train_as_one",
        "test_unused_parameters_are_found_only_if_asked_for",
        "test_fsdp_killed_ten_times_equals_straight_to_the_bit",
    ),
    "test_start.py": ("test_all_ranks_refuse_before_any_text_is_read",),
    "test_warm.py": (),
    "test_wt_load.py": (
        "test_transformers_to_here_and_back_is_the_same_to_the_bit",
        "test_loading_takes_hardly_more_memory_than_the_weights",
    ),
}
KEPT = (
    "test_a_run_that_is_stopped_in_the_middle_of_a_file_resumes_there[KILL]",
    "test_the_number_of_processes_does_not_change_the_result[flags1]",
    "test_old_rows_stay_to_the_bit_and_so_do_the_logits[dtype0-0-True-mean]",
    "test_bad_input_is_one_line_and_nothing_is_written[--max-vocab-size 5]",
    "test_bad_input_is_one_line_and_nothing_is_written[--model-name wordpiece]",
    "test_a_gpt_neox_learns_resumes_and_loads_in_peft[lora]",
    "test_twenty_losses_equal_those_of_transformers_and_peft[lora-raw]",
    "test_a_rank_with_another_file_is_one_line_and_nobody_waits",
    "test_a_tiny_llama_of_100_steps_opens_in_transformers[none]",
    "test_a_run_that_is_killed_ends_with_the_same_bits[1]",
    "test_two_ranks_train_as_one[ddp-4-2]",
    "test_two_ranks_train_as_one_process[3]",
    "test_a_signal_ends_the_wait[SIGTERM-True]",
    "test_the_trainer_says_so_too[hf---init_from]",
    "test_a_run_learns_leaves_its_tree_and_resumes_to_the_same_bits[lora]",
    "test_bad_input_is_one_line_and_leaves_no_run[--lora_rank 0---lora_rank: 0]",
    "test_adapters_are_resumed_to_the_bit_and_the_base_stays_as_it_was[lora]",
    "test_kill[none]",
    "test_kill[ddp]",
    "test_signals[none]",
    "test_signals[ddp]",
    "test_resumed_equals_straight_to_the_bit[dropout]",
    "test_ctrl_c_at_any_time_leaves_no_traceback_and_nothing_half_written[1.5]",
    "test_both_trainers_take_one_and_sample_with_it[pretraining_simple.py]",
    "test_every_command_runs_as_it_stands[docs/how-to-extend.md: A model family]",
    "test_the_commands_that_do_not_run_here_are_these",
    "test_slices_train_as_the_whole_model_does[2-2-2]",
    "test_any_arrangement_trains_as_one_process[2-ddp-2-2-False]",
    "test_in_and_out_and_in_again_has_the_same_bits[llama-dtype0-5GB]",
    "test_bad_input_is_one_line_and_leaves_no_run_folder",
    "test_without_tqdm_and_matplotlib_a_run_is_complete_but_for_its_plot[missing-packages0]",
    "test_local_text_is_tokenised_and_trained_on_without_datasets[a.txt-missing]",
    "test_damaged_gzip_data_is_one_line_with_the_file[cut]",
    "test_a_file_that_is_no_text_is_refused_with_what_would_read_it[a.csv]",
    "test_a_package_that_every_run_needs_is_named_in_one_line[torch-without its library]",
    "test_a_package_that_every_run_needs_is_named_in_one_line[tyro-without its library]",
    "test_a_gradient_that_is_not_finite_is_left_out_and_told",
    "test_a_refused_save_is_repeated_with_the_newest_state[refused1-attempts1]",
    "test_the_last_save_waits_until_there_is_space[1]",
)


def pytest_configure(config):
    explicit = config.args_source != pytest.Config.ArgsSource.TESTPATHS
    if not hasattr(config, "workerinput") and (
        explicit or config.option.all or config.option.nightly
    ):
        os.environ["EVERY_TEST"] = "1"  # the processes of xdist inherit it


def is_full(item) -> bool:
    """Whether a test runs with --all only."""
    file = item.path.relative_to(ROOT / "tests").as_posix()
    names = FULL.get(file)
    if names is None or item.name in KEPT or item.originalname in KEPT:
        return False
    return not names or item.originalname in names


def pytest_collection_modifyitems(config, items):
    if "EVERY_TEST" in os.environ:
        return
    full = [item for item in items if is_full(item)]
    config.hook.pytest_deselected(items=full)
    items[:] = [item for item in items if not is_full(item)]


def shared(path: str) -> Path:
    """A file or folder of the test data; skips the test, naming it, where it is absent."""
    if not (SHARED / path).exists():
        pytest.skip(f"needs ../shared/{path}")
    return SHARED / path


def run(
    script: str, *arguments, cwd, timeout=120, env=None, fresh=False
) -> subprocess.CompletedProcess:
    """
    Start a script of the project in the folder `cwd`, offline, one thread.

    In a process forked from one that has torch imported (warm.py). With `fresh`, or if `env` holds
    variables that python reads, by python itself.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **(env or {})}
    if fresh or any(name.startswith(("PYTHON", "MALLOC")) for name in env or {}):
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        return subprocess.run(
            command,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment,
            check=False,
        )
    return Warm(script, *arguments, cwd=cwd, environments=[environment]).wait(timeout)[0]


class Warm:
    """
    A script in one process for each environment, all at once, forked from tests/warm.py.

    One such group at a time.
    """

    server = None

    def __init__(self, script: str, *arguments, cwd, environments: list[dict]):
        self.folder, self.command = (
            tempfile.TemporaryDirectory(),
            [str(ROOT / script), *map(str, arguments)],
        )
        self.out, self.err = (
            [Path(self.folder.name, f"{kind}{n}") for n in range(len(environments))]
            for kind in ("out", "err")
        )
        for path in (*self.out, *self.err):
            path.touch()
        request = {
            "script": self.command[0],
            "arguments": self.command[1:],
            "cwd": str(cwd),
            "env": environments,
        }
        request |= {"out": list(map(str, self.out)), "err": list(map(str, self.err))}
        if Warm.server is None:
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "ERROR"}
            line = [sys.executable, str(ROOT / "tests/warm.py")]
            Warm.server = subprocess.Popen(
                line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
        print(json.dumps(request), file=Warm.server.stdin, flush=True)
        self.pids = json.loads(Warm.server.stdout.readline())

    def kill(self, number=signal.SIGKILL) -> None:
        """Send each process a signal."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self, timeout: float) -> list[subprocess.CompletedProcess]:
        """What came of each, as from subprocess.run."""
        late = threading.Timer(timeout, self.kill)
        late.start()
        codes = json.loads(Warm.server.stdout.readline())
        in_time = late.is_alive()
        late.cancel()
        out, err = (
            [path.read_text(encoding="utf-8") for path in paths] for paths in (self.out, self.err)
        )
        self.folder.cleanup()
        if not in_time:
            raise subprocess.TimeoutExpired(self.command, timeout, "".join(out), "".join(err))
        return [
            subprocess.CompletedProcess(self.command, *result)
            for result in zip(codes, out, err, strict=True)
        ]


def ranks(script, *arguments, world: int, cwd) -> Warm:
    """The script on `world` processes that find each other as under torchrun, without torchrun."""
    numbers = [{}]
    if world > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            group = {
                "WORLD_SIZE": world,
                "LOCAL_WORLD_SIZE": world,
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": free.getsockname()[1],
            }
        numbers = [{**group, "RANK": rank, "LOCAL_RANK": rank} for rank in range(world)]
    common = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environments = [
        {**common, **{name: str(value) for name, value in each.items()}} for each in numbers
    ]
    return Warm(script, *arguments, cwd=cwd, environments=environments)


def pytest_unconfigure():
    """The end of the process that scripts are started from."""
    if Warm.server:
        Warm.server.communicate()  # ends with its input


def one_error_line(result: subprocess.CompletedProcess, code: int) -> str:
    """The single `error:` line of a command that had to fail cleanly with this exit code."""
    assert result.returncode == code, (result.returncode, result.stderr[-2000:])
    assert "Traceback" not in result.stderr + result.stdout, result.stderr[-2000:]
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr[-2000:]
    return errors[0]


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """A folder with three small English texts."""
    folder = tmp_path_factory.mktemp("texts")
    words = (
        "the old man and a small dog went down to the sea "
        "where ships of every kind lay still in the morning light"
    ).split()
    for n in range(3):
        lines = [
            " ".join(words[(i * (n + 2) + j * 7) % len(words)] for j in range(9)) + f" {i}."
            for i in range(400)
        ]
        (folder / f"text_{n}.txt").write_text("\n\n".join(lines), encoding="utf-8")
    return folder


# torchrun on one machine; the number of processes and the script follow
TORCHRUN = (
    *(sys.executable, "-m", "torch.distributed.run"),
    *("--standalone", "--nproc_per_node"),
)
TINY = (
    "--model_size",
    "nano",
    "--context_length",
    "16",
    "--batch_size",
    "4",
    "--device",
    "cpu",
    "--tokenizer",
    "bytes",
)
