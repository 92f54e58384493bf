"""Which sets a validation reads, and what refuses to be one."""

import pytest

from tests.data.made import data, made
from titans_pretrain.data.sources import validation_sets
from titans_pretrain.errors import DataError


@pytest.fixture
def folders(tmp_path):
    """Sources a and b, a folder w that is none, and e without a validation document."""
    for seed, name in enumerate("abwe"):
        made(tmp_path / name, 1000, seed=seed, validation=0 if name == "e" else 300)
    return {name: tmp_path / name for name in "abwe"}


def sets_of(folders, sources="ab", **validation):
    config = data(
        {name: folders[name] for name in sources},
        validation={name: {"path": str(folders[f])} for name, f in validation.items()},
    )
    return {name: m.folder for name, m in validation_sets(config).items()}


def test_the_sources_unless_the_config_names_others(folders):
    assert sets_of(folders) == {"a": folders["a"], "b": folders["b"]}
    named = {"wiki": folders["w"], "mine": folders["b"]}
    assert sets_of(folders, wiki="w", mine="b") == named
    assert sets_of(folders, sources="ae", wiki="w") == {"wiki": folders["w"]}


def test_an_empty_set_is_refused(folders):
    with pytest.raises(DataError, match=r"data\.sources\.e .*: the validation split is empty") as e:
        sets_of(folders, sources="ae")
    assert "data.validation" in e.value.remedy and "validation.every=0" in e.value.remedy
    with pytest.raises(DataError, match=r"data\.validation\.x .*: the validation split is empty"):
        sets_of(folders, x="e")


def test_another_tokenizer_is_refused(folders, tmp_path):
    made(tmp_path / "o", 1000, tokenizer="another")
    with pytest.raises(DataError, match=r"data\.validation\.x .*sha256 another") as told:
        sets_of({**folders, "o": tmp_path / "o"}, x="o")
    assert "data.sources.a" in str(told.value)
    with pytest.raises(DataError, match=r"nowhere/manifest\.json"):
        sets_of({**folders, "o": tmp_path / "nowhere"}, x="o")
