"""Which files a path means, and what is said of those that are passed over."""

from pathlib import Path

import pytest

from adaptive.data.config import DataConfig
from adaptive.data.find import find
from adaptive.data.pipeline import open_data
from adaptive.errors import DataError, UserError
from adaptive.recipe import Recipe
from adaptive.settings import show


@pytest.fixture
def folder(tmp_path):
    """A folder of texts, with files in it given as name=content."""
    (tmp_path / "texts").mkdir()

    def filled(**files):
        for name, content in files.items():
            path = tmp_path / "texts" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
        return tmp_path / "texts"

    return filled


def names(path) -> list[str]:
    return [file.name for file in find(str(path)).files]


def test_folders_and_globs(folder):
    texts = folder(**{"b.txt": "b", "deep/a.jsonl": '{"text": "a"}', "c.csv": "x", ".hidden.txt": "x"})
    assert names(texts) == ["b.txt", "a.jsonl"]
    assert names(texts / "*.txt") == ["b.txt"]
    assert names(texts / "**" / "*.jsonl") == ["a.jsonl"]


def test_nothing_below_a_hidden_folder_unless_it_is_named(folder):
    hidden = {f"{at}/copy.txt": "x" for at in (".ipynb_checkpoints", ".git/objects", "deep/.cache/below", ".Trash")}
    texts = folder(**{"a.txt": "a", "deep/b.txt": "b"} | hidden)
    assert names(texts) == ["a.txt", "b.txt"]
    assert names(texts / ".git") == ["copy.txt"]
    assert names(texts / ".Trash" / "copy.txt") == ["copy.txt"]
    assert names(texts / "**" / "*.txt") == ["a.txt", "b.txt"]


def test_links_are_followed_and_no_file_is_read_twice(folder, tmp_path):
    texts = folder(**{"a.txt": "a", "deep/b.txt": "b"})
    (tmp_path / "elsewhere" / "more").mkdir(parents=True)
    (tmp_path / "elsewhere" / "more" / "c.txt").write_text("c", encoding="utf-8")
    (texts / "linked").symlink_to(tmp_path / "elsewhere")
    (texts / "again").symlink_to(tmp_path / "elsewhere" / "more")
    (texts / "deep" / "loop").symlink_to(texts)
    (tmp_path / "elsewhere" / "back").symlink_to(texts)
    (texts / "z.txt").symlink_to(texts / "a.txt")
    (texts / "gone.txt").symlink_to(texts / "nowhere")
    found = find(str(texts))
    assert sorted(file.name for file in found.files) == ["a.txt", "b.txt", "c.txt"]
    assert found.files[0] == texts / "a.txt" and found.passed_over["broken links"] >= 1
    assert names(texts / "?.txt") == ["a.txt"]


def test_what_is_passed_over_is_counted_by_suffix(folder):
    texts = folder(
        **{f"{i}.csv": "x" for i in range(3)} | {"a.TXT": "a", "b.Json.GZ": "b", "c.tar.gz": "c", "LICENSE": ""}
    )
    found = find(str(texts))
    assert [file.name for file in found.files] == ["a.TXT", "b.Json.GZ"]
    assert found.passed_over == {".csv": 3, ".tar.gz": 1, "without a suffix": 1}
    assert found.about() == "2 files (1 .txt, 1 .json.gz); passed over: 3 .csv, 1 without a suffix, 1 .tar.gz" or (
        found.about() == "2 files (1 .txt, 1 .json.gz); passed over: 3 .csv, 1 .tar.gz, 1 without a suffix"
    )
    assert find(str(texts / "a.TXT")).about() == ""


def test_nothing_found(folder):
    texts = folder(**{"a.csv": "x", "b.csv": "x"})
    with pytest.raises(DataError, match=r"the folder holds no \.txt, .* file, but 2 \.csv"):
        find(str(texts))
    with pytest.raises(DataError, match="no file matches"):
        find(str(texts / "*.txt"))
    with pytest.raises(DataError, match="no such file or folder"):
        find(str(texts / "a.txt"))
    with pytest.raises(UserError, match="it is too long"):
        find("x" * 5000)


def test_a_folder_that_may_not_be_read_is_passed_over(folder, monkeypatch):
    texts = folder(**{"a.txt": "a", "lost/b.txt": "b"})
    listed = Path.iterdir

    def refused(path):
        if path.name == "lost":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", refused)
    assert find(str(texts)).passed_over == {"folders that may not be read": 1}


def config(texts, **changes) -> DataConfig:
    cache = str(texts.parent / "cache")
    return DataConfig(source="files", paths=(str(texts),), seq_len=4, cache_dir=cache, validation_every=0, **changes)


def test_the_user_is_told_what_was_read_and_left_out(folder):
    rows = '{"text": "one text"}\n{"text": null}\n{"id": 7}\n{"text": ""}\n{"text": "another"}\n'
    texts = folder(**{"a.jsonl": rows, "b.txt": "", "c.md": "a third", "d.csv": "x"})
    lines = "\n".join(open_data(config(texts), batch_size=2, vocab_size=320).describe())
    assert f"{texts}: 3 files (1 .jsonl, 1 .txt, 1 .md); passed over: 1 .csv" in lines
    assert "3 documents (3 empty, 1 without 'text' left out), 22 bytes of text" in lines


def test_a_corpus_without_any_text_is_an_error_that_names_the_keys(folder):
    texts = folder(**{"a.jsonl": '{"body": "x", "id": 1}\n{"body": "yyyy"}\n{"text": null}\n', "b.txt": ""})
    message = (
        r"no text found in .*a\.jsonl, .*b\.txt: 2 records or files are empty, and 2 records have no 'text', "
        "only body, id"
    )
    with pytest.raises(DataError, match=message):
        open_data(config(texts), batch_size=2, vocab_size=320)
    assert open_data(config(texts, text_key="body"), batch_size=1, vocab_size=320)


def test_a_comma_in_a_setting():
    recipe = Recipe(name="x").with_('data.paths="texts,part 2",b, "say ""so""" ,"c')
    assert recipe.data.paths == ("texts,part 2", "b", 'say "so"', '"c')
    for paths in (recipe.data.paths, ('"a"', " b ", "", "c,d"), ("one",)):
        assert Recipe(name="x").with_(f"data.paths={show(paths)}").data.paths == paths
    assert Recipe(name="x").with_("data.weights=0.5,0.25").data.weights == (0.5, 0.25)


@pytest.mark.parametrize("at", ["texts,part 2", 'a"b', "a,b.txt"])
def test_a_comma_in_a_path(tmp_path, at):
    (tmp_path / at).mkdir()
    (tmp_path / at / "a.txt").write_text("some text", encoding="utf-8")
    assert open_data(config(tmp_path / at), batch_size=1, vocab_size=320).sources[0].name.endswith(at)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"paths": ("gs://bucket/texts",)}, r"data\.paths: gs://bucket/texts needs the package gcsfs: pip install"),
        ({"paths": ("hf://datasets/a/b",)}, r"data\.paths: hf://datasets/a/b is an address"),
        ({"paths": ("https://host/a.jsonl",), "source": "tokens"}, r"data\.paths: https://host/a\.jsonl is an address"),
        ({"paths": ("hf://datasets/a/b",), "source": "huggingface"}, "as owner/name or owner/name:config"),
        ({"cache_dir": "s3://bucket/cache"}, r"data\.cache_dir: s3://bucket/cache is an address"),
        ({"tokenizer": "hf://owner/name"}, r"data\.tokenizer: hf://owner/name is an address"),
    ],
)
def test_addresses_of_other_places_are_refused_at_once(changes, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**({"source": "files", "paths": ("texts",)} | changes)).validate()


def test_an_address_of_a_local_file_is_its_path(folder):
    texts = folder(**{"a b.txt": "a"})
    assert find(f"file://{texts}/a%20b.txt").files == [texts / "a b.txt"]
