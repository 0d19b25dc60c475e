"""A model of the Hugging Face hub as a folder on this machine, and what it has besides weights."""

from __future__ import annotations

from pathlib import Path

from parts.base.files import sha256_of
from parts.base.text import one_line
from parts.data.tokenizers import FILES as TOKENIZER_FILES
from parts.storage import formats


def from_hub(name: str) -> Path:
    """
    The folder of a model in the hub's cache, downloaded by the hub's library if it is not there.

    Raises ValueError if it is not available, or if a file differs from the sha256 in its name.
    """
    from huggingface_hub import snapshot_download  # only this function needs it
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(weights: str) -> Path:
        files = ["config.json", "added_tokens.json", "tokenizer_config.json", *TOKENIZER_FILES]
        files.append(weights)
        return Path(snapshot_download(name, allow_patterns=files, etag_timeout=10))

    try:
        try:
            folder = Path(snapshot_download(name, local_files_only=True))
            formats.read_folder(folder)
        except (LocalEntryNotFoundError, ValueError):  # not in the cache, or not all of it
            folder = download("model*.safetensors*")
            if not any(folder.glob("model*.safetensors*")):
                folder = download("pytorch_model*.bin*")
    except Exception as e:  # noqa: BLE001  errors of whatever http library the hub's client uses
        reason = one_line(e, 150)
        raise ValueError(
            f"hf:{name}: not in the hub's cache, and not available from the hub ({reason}); "
            "give a folder instead"
        ) from e
    for file in sorted([*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        blob = file.resolve()  # the cache names large files after their sha256
        if len(blob.name) == 64 and sha256_of(blob) != blob.name:
            raise ValueError(
                f"{blob}: differs from the sha256 in its name; delete it and run the command again"
            )
    return folder


# besides weights and config.json: the tokenizer, and how to sample
BESIDE_WEIGHTS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "generation_config.json"),
    *("chat_template.jinja", "chat_template.json"),
)


def files_of(folder, names=BESIDE_WEIGHTS) -> dict[str, bytes]:
    """{name: contents} of those of these files that a folder has."""
    paths = [Path(folder) / name for name in names]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}
