"""Prompts and their embeddings: as diffusers' own pipeline makes them, and on disk."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from scd.cli import main
from scd.data.prompts import (
    EMBEDDINGS,
    PromptFolder,
    read_lines,
    write_embedding,
    write_prompt_list,
)
from scd.errors import ScdError
from scd.wan import encode_prompts as encoding
from scd.wan.text import clean_prompt, encode_prompts, load_text_encoder
from tests.test_locks import holder_of
from tests.test_wan import TEXT

pytest.importorskip("transformers", reason="needs the extra: pip install -e .[wan]")
pytest.importorskip("ftfy", reason="needs the extra: pip install -e .[wan]")
pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ["<pad>", "</s>", "<unk>", "a", "cat", "dog", "runs", "on", "the", "grass", "&", "still"]
LENGTH = 512


def make_text_encoder(folder: Path) -> Path:
    """Save a tiny random UMT5 and a tokenizer of a few words, in diffusers' format."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=len(WORDS), d_model=TEXT, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_text_encoder(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def tokenizer_and_encoder(source):
    tokenizer, encoder = load_text_encoder(str(source), torch.device("cpu"))
    return tokenizer, encoder.float()


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat",
        "  a\n\tcat  runs ",
        "a &amp;amp; cat",
        "Ã© stands",
        "&lt;b&gt; \u00a0 a\u200acat",
        "",
    ],
)
def test_prompts_are_cleaned_as_by_diffusers(prompt):
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    assert clean_prompt(prompt) == prompt_clean(prompt)


def test_cleaning_does_something():
    assert clean_prompt(" a &amp;amp;\n Ã© ") == "a & é"


def test_embeddings_are_those_of_diffusers(tokenizer_and_encoder):
    """Also of a prompt that is too long, and beside others or alone."""
    from diffusers import WanPipeline

    tokenizer, encoder = tokenizer_and_encoder
    pipeline = WanPipeline.__new__(WanPipeline)
    pipeline.tokenizer, pipeline.text_encoder = tokenizer, encoder
    prompts = ["a cat runs", "", "the dog stands still on the grass " * 100]
    expected = WanPipeline._get_t5_prompt_embeds(
        pipeline, prompts, max_sequence_length=LENGTH, device=torch.device("cpu")
    )
    found = encode_prompts(tokenizer, encoder, [clean_prompt(prompt) for prompt in prompts])
    assert found.shape == (3, LENGTH, TEXT)
    assert torch.equal(found, expected)
    assert found[0, :4].std() > 0.1 and not found[0, 4:].any()
    assert found[2].any(dim=1).all()
    alone = encode_prompts(tokenizer, encoder, ["a cat runs"], length=6)
    assert (alone[0] - found[0, :6]).abs().max() < 1e-5


def test_a_file_is_encoded_once(source, tmp_path, monkeypatch, capsys):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "data/wan"
    prompts.write_text("a cat &amp; dog\n\na dog runs\na cat &amp; dog\n", encoding="utf-8")
    command = ["wan", "encode-prompts", str(prompts), "--out", str(out)]
    command += ["--text-encoder", str(source), "--negative-prompt", "still grass"]
    assert main(command) == 0
    assert "3 prompts, of which 3 are new" in capsys.readouterr().out
    listed = json.loads((out / "prompts.json").read_text())
    assert list(listed["files"]) == ["a cat &amp; dog", "a dog runs", "still grass"]
    folder = PromptFolder(out)
    assert list(folder.files) == ["a cat &amp; dog", "a dog runs", "still grass"]
    assert folder.negative_prompt == "still grass"
    tokenizer, encoder = load_text_encoder(str(source), torch.device("cpu"))
    texts = ["a cat & dog", "a dog runs", "still grass"]
    expected = encode_prompts(tokenizer, encoder, texts)
    found = torch.stack([folder.embedding(prompt) for prompt in folder.files])
    tolerance = 0.05 if found.dtype == torch.bfloat16 else 1e-5  # batches differ
    assert found.shape == (3, LENGTH, TEXT) and found.dtype == encoder.dtype
    assert (found - expected).abs().max() < tolerance
    files = sorted((out / "embeddings").iterdir())
    assert len(files) == 3 and max(path.stat().st_size for path in files) < 10 * TEXT * 4 + 200

    # Interrupted: one is gone, and half of another is left. Others are not touched.
    files[0].unlink()
    (out / "embeddings/.x.1.safetensors").write_bytes(b"half")
    before = [path.stat().st_mtime_ns for path in files[1:]]
    assert main(command) == 0
    assert "3 prompts, of which 1 are new" in capsys.readouterr().out
    assert sorted((out / "embeddings").iterdir()) == files
    assert [path.stat().st_mtime_ns for path in files[1:]] == before
    # Complete: the text encoder is not even loaded. Another file adds its prompts.
    monkeypatch.setattr(encoding, "load_text_encoder", None)
    assert main(command) == 0
    monkeypatch.undo()
    prompts.write_text("the cat stands still", encoding="utf-8-sig")  # as from Windows
    assert main(command[:-2]) == 0  # the negative prompt stays if no other is given
    assert PromptFolder(out).negative_prompt == "still grass"
    assert "the cat stands still" in PromptFolder(out).files
    # So does a list of clips, by its captions, also one that lies in the folder itself.
    clips = [{"video_path": f"{n}.mp4", "caption": " a dog "} for n in range(2)]
    (out / "train.json").write_text(json.dumps([*clips, {"video_path": "2.mp4"}]))
    command[2] = str(out / "train.json")
    assert main(command) == 0
    folder = PromptFolder(out)
    assert "a dog" in folder.files and len(folder.files) == 5
    folder.check([" a dog", "still grass"])
    with pytest.raises(ScdError, match="no embedding of 1 prompts, such as 'a cow': add them"):
        folder.check(["a dog", "a cow"])
    with pytest.raises(ScdError, match=r"such as '': .* a negative one by its --negative-prompt"):
        folder.check([""])


def test_a_listed_prompt_without_its_file_is_refused(tmp_path):
    folder = write_prompt_list(tmp_path, "tests", 8, "", {"a cat": "a cat"})
    with pytest.raises(ScdError, match="no embedding of 1 prompts, such as 'a cat'"):
        folder.check(["a cat"])
    with pytest.raises(ScdError, match="not encoded yet"):
        folder.embedding("a cat")


def test_a_list_names_files_of_its_own_folder_alone(tmp_path):
    """Whoever made it."""
    out, foreign = tmp_path / "prompts", tmp_path / "foreign.safetensors"
    (out / EMBEDDINGS).mkdir(parents=True)
    write_embedding(foreign, torch.ones(2, TEXT))
    for file in (str(foreign), "../../foreign.safetensors"):
        about = {"text_encoder": "tests", "length": 8, "negative_prompt": ""}
        (out / "prompts.json").write_text(json.dumps({**about, "files": {"a cat": file}}))
        with pytest.raises(ScdError, match=r"embeddings/foreign\.safetensors: not encoded yet"):
            PromptFolder(out).embedding("a cat")


@pytest.mark.parametrize(
    "rows",
    [torch.full((2, TEXT), torch.nan), torch.ones(9, TEXT), torch.ones(0, TEXT), torch.ones(TEXT)],
    ids=["not finite", "too long", "empty", "no rows"],
)
def test_a_file_of_other_than_finite_tokens_is_refused(rows, tmp_path):
    folder = write_prompt_list(tmp_path, "tests", 8, "", {"a cat": "a cat"})
    write_embedding(tmp_path / EMBEDDINGS / folder.files["a cat"], rows)
    with pytest.raises(ScdError, match="are no 1 to 8 finite tokens"):
        folder.embedding("a cat")


def test_one_process_at_a_time_writes_to_a_folder(source, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a cat")
    out = tmp_path / "out"
    command = ["wan", "encode-prompts", str(tmp_path / "p.txt"), "--out", str(out)]
    with holder_of(out / ".lock"):
        assert main([*command, "--text-encoder", str(source)]) == 1
    assert "out: another process writes to it" in capsys.readouterr().err
    assert not (out / "prompts.json").exists()


def test_a_line_ends_where_other_tools_end_it(tmp_path):
    """VBench's extended prompts belong to the lines of another file."""
    text = "a cat\u2028walks\r\n\n a\x0cdog\x0c"
    (tmp_path / "p.txt").write_bytes(text.encode())
    assert read_lines(tmp_path / "p.txt") == ["a cat\u2028walks", "a\x0cdog"]


def test_mistakes_are_one_line(source, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a cat")
    Path("empty.txt").write_text("\n \n")
    Path("bytes.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "half/tokenizer").mkdir(parents=True)
    (tmp_path / "broken/tokenizer").mkdir(parents=True)
    (tmp_path / "broken/text_encoder").mkdir(parents=True)
    good = ["--text-encoder", str(source)]
    assert main(["wan", "encode-prompts", "p.txt", "--out", "other", *good]) == 0
    same = f"{os.path.relpath(source)}/"
    assert main(["wan", "encode-prompts", "p.txt", "--out", "other", "--text-encoder", same]) == 0
    capfd.readouterr()
    for arguments, message in (
        (["no.txt", "--out", "x", *good], "no.txt: no such file"),
        (["empty.txt", "--out", "x", *good], "empty.txt: holds no prompt"),
        (["bytes.txt", "--out", "x", *good], "bytes.txt: not UTF-8"),
        (["half", "--out", "x", *good], "half: not a readable text file (Is a directory)"),
        (["p.txt", "--out", "other", "--text-encoder", "x/y"], "other: holds embeddings of"),
        (["p.txt", "--out", "x1", "--text-encoder", "half"], "text_encoder: no such folder"),
        (["p.txt", "--out", "x2", "--text-encoder", "broken"], "broken: no readable text encoder"),
        (["p.txt", "--out", "x", *good, "--batch-size", "0"], "--batch-size must be at least 1"),
        (["p.txt", "--out", "x3", "--text-encoder", "no:where"], "no:where: no such folder"),
    ):
        assert main(["wan", "encode-prompts", *arguments]) == 1
        captured = capfd.readouterr().err
        last = captured.splitlines()[-1]
        assert last.startswith("error: ") and message in last, captured
    # A text encoder that cannot be read leaves no list that would bind the folder to it.
    assert main(["wan", "encode-prompts", "p.txt", "--out", "x2", *good]) == 0
    folder = PromptFolder(Path("other"))
    with pytest.raises(ScdError, match="has no prompt 'a dog'"):
        folder.embedding("a dog")
    next(Path("other/embeddings").iterdir()).write_bytes(b"damaged")
    with pytest.raises(ScdError, match="not a readable embedding"):
        for prompt in folder.files:
            folder.embedding(prompt)
    Path("other/prompts.json").write_text("[]")
    with pytest.raises(ScdError, match="not a list of"):
        PromptFolder(Path("other"))


def test_without_the_extra(monkeypatch, tmp_path, capsys):
    """One line says what to install."""
    import sys

    monkeypatch.setitem(sys.modules, "ftfy", None)
    (tmp_path / "p.txt").write_text("a cat")
    command = ["wan", "encode-prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "x")]
    assert main(command) == 1
    assert "prompts need the package ftfy: pip install -e '.[wan]'" in capsys.readouterr().err
    with pytest.raises(ScdError, match=r"pip install -e '\.\[wan\]'"):
        load_text_encoder("x/y", torch.device("cpu"))


def test_an_encoder_must_fit_its_weights(source, tmp_path):
    """Transformers would leave what is missing random, and what is too much out."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(source, tmp_path / "text")
    weights = folder / "text_encoder/model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "encoder.more": torch.zeros(1)}, weights, {"format": "pt"})
    with pytest.raises(ScdError, match=r"\(1 unexpected keys, such as encoder\.more"):
        load_text_encoder(str(folder), torch.device("cpu"))
    tensors.pop("encoder.final_layer_norm.weight")
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ScdError, match=r"no UMT5 encoder \(1 missing keys, such as encoder\.final"):
        load_text_encoder(str(folder), torch.device("cpu"))


def test_a_pickled_encoder_is_not_read(source, tmp_path):
    from safetensors.torch import load_file

    folder = shutil.copytree(source, tmp_path / "text")
    weights = folder / "text_encoder/model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(ScdError, match=r"no readable text encoder .*model\.safetensors"):
        load_text_encoder(str(folder), torch.device("cpu"))
