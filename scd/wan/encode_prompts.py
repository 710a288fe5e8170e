"""Encode the prompts of a file once, into a folder: the text encoder is four times the model."""

from pathlib import Path

import torch
from tqdm import tqdm

from scd.data.prompts import (
    EMBEDDINGS,
    LIST,
    PromptFolder,
    file_name,
    prompts_in,
    write_embedding,
    write_prompt_list,
)
from scd.errors import ScdError
from scd.utils.files import remove_unfinished
from scd.utils.locks import hold_lock
from scd.wan.text import MAX_TOKENS, clean_prompt, encode_prompts, load_text_encoder


def encode_prompt_file(
    path: Path,
    out: Path,
    source: str,
    negative_prompt: str | None = None,
    batch_size: int = 8,
    length: int = MAX_TOKENS,
) -> None:
    """Write the embeddings of a file's prompts, and of the negative one, to a folder.

    What is there already is not encoded again: an interrupted run continues, and another file adds
    its prompts. Names depend on the prompts alone.

    Args:
        path: a prompt in every line; or a list of clips with captions.
        source: see `scd.wan.text.load_text_encoder`.
        negative_prompt: None: the one that the folder has, or else an empty one.

    Raises:
        ScdError: a file or the text encoder is missing or damaged, or the folder holds embeddings
            of another text encoder.
    """
    if batch_size < 1:
        raise ScdError(f"--batch-size must be at least 1, not {batch_size}")
    prompts = prompts_in(path)
    with hold_lock(out / ".lock", f"{out}: another process writes to it", "wait for it"):
        old = PromptFolder(out) if (out / LIST).is_file() else None
        if old is not None:
            old.check_source(source, length)
        if negative_prompt is None:
            negative_prompt = "" if old is None else old.negative_prompt
        negative_prompt = negative_prompt.strip()
        cleaned = {prompt: clean_prompt(prompt) for prompt in [*prompts, negative_prompt]}
        embeddings = out / EMBEDDINGS
        texts = {embeddings / file_name(text): text for text in cleaned.values()}
        missing = [file for file in texts if not file.exists()]
        if missing:  # before the list names a text encoder that may not exist
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            tokenizer, encoder = load_text_encoder(source, device)
        folder = write_prompt_list(out, source, length, negative_prompt, cleaned)
        embeddings.mkdir(exist_ok=True)
        remove_unfinished(embeddings)
        if missing:
            for start in tqdm(range(0, len(missing), batch_size), desc="encode", unit="batch"):
                batch = missing[start : start + batch_size]
                found = encode_prompts(tokenizer, encoder, [texts[file] for file in batch], length)
                for file, rows in zip(batch, found, strict=True):
                    last = int(rows.any(dim=1).nonzero().max())
                    write_embedding(file, rows[: last + 1])
    print(f"{out}: {len(folder.files)} prompts, of which {len(missing)} are new")
