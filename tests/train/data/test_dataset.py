import pytest

from lapilli.errors import DataError
from lapilli.prompt.templates import TEMPLATES
from lapilli.train.data import RowMaker, Rows, open_dataset
from lapilli.train.recipe import SourceRecipe


def maker(tokenizer, model, max_length=None, template="vicuna_v1"):
    return RowMaker(tokenizer, TEMPLATES[template], model, max_length)


def test_a_folder_becomes_rows(folder, tokenizer, model):
    dataset = open_dataset([SourceRecipe(path=str(folder / "data.json"))])
    rows = Rows(dataset, maker(tokenizer, model))
    one, none, two = (rows.row(i) for i in range(3))
    assert [row.id for row in (one, none, two)] == ["one", "none", "two"]
    assert [len(row.media) for row in (one, none, two)] == [1, 0, 2]
    assert one.media[0].pixel_values.shape == (1, 3, 28, 28)
    assert [span.length for span in two.prompt.spans] == [4, 4]
    assert dataset.words().tolist() == [9, -6, 9]


def test_a_bad_sample_ends_the_run_or_is_replaced_by_the_next(folder, tokenizer, model):
    (folder / "red.png").write_bytes(b"no picture")
    dataset = open_dataset([SourceRecipe(path=str(folder / "data.json"))])
    with pytest.raises(DataError, match=r"data.json:2 \(id 'one'\): .*red.png"):
        Rows(dataset, maker(tokenizer, model)).row(0)
    rows = Rows(dataset, maker(tokenizer, model), on_bad_sample="skip")
    row = rows.row(2)
    assert row.id == "none"
    assert len(row.skipped) == 2
    assert "'two'" in row.skipped[0]
    assert "'one'" in row.skipped[1]
