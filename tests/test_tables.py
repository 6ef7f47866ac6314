"""Tables of labels: what is read, in CSV and Parquet alike, and what is refused with its line."""

import csv
import io
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from datasets.splitlist import merge_list
from datasets.tables import Columns, Row, match_rows, plain_id, read_table, read_values
from hpc.tables import print_rows

FINDINGS = Columns(id="Image Index", labels=("Finding Labels",), separator="|", none="No Finding", group="Patient ID")


def write(folder, text, name="t.csv"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    "text",
    [
        "id,label,group\nscan.1,a b,p\ncat/2.nii.gz,c,\n",
        "id;label;group\nscan.1;a b;p\ncat/2.nii.gz;c;\n",
        "id\tlabel\tgroup\nscan.1\ta b\tp\ncat/2.nii.gz\tc\t\n",
        "\ufeffid,label,group\r\nscan.1,a b,p\r\ncat/2.nii.gz,c,\r\n",
        'id,"label",group\r\n "scan.1" ,a b , p \n\n"cat\\2.png","c",\n,,\n',
        "age,id,label,group,sex\n3,./scan.1,a b,p,\n4,cat/2.DCM,c,,f\n",
    ],
    ids=["commas", "semicolons", "tabs", "bom-crlf", "quotes-blanks", "more columns"],
)
def test_all_ways_to_write_a_table_give_the_same_rows(tmp_path, text):
    table = read_table(write(tmp_path, text.replace(' "scan.1" ', '"scan.1"')))
    assert table.rows == {"scan.1": Row(("a b",), "p"), "cat/2": Row(("c",))}
    assert table.class_names == ["a b", "c"] and not table.several


def test_a_cell_may_hold_quotes_signs_and_line_ends(tmp_path):
    rows = read_table(write(tmp_path, 'id,label\n"a,1","x\n""y"""\nb,z\x0b\u2028z\n')).rows
    assert rows == {"a,1": Row(('x\n"y"',)), "b": Row(("z\x0b\u2028z",))}


WORDS = st.text(st.characters(exclude_characters="|;\0\r", exclude_categories=["Cs"]), min_size=1).filter(
    lambda word: word == word.strip()
)


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,5}", fullmatch=True), WORDS, min_size=1), st.sampled_from(",;\t"))
def test_what_csv_writes_is_read(tmp_path_factory, labels, delimiter):
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows([("id", "label"), *labels.items()])
    path = write(tmp_path_factory.mktemp("t"), file.getvalue())
    assert {id: row.labels for id, row in read_table(path).rows.items()} == {id: (name,) for id, name in labels.items()}


def test_splits_folds_and_masks(tmp_path):
    lines = ["id,label,split,fold,mask", "a,x,Train,,", "b,x,VAL,,", "c,x,2,,m/c.png", "d,x,,3,", "e,x,testing,,/e.nii"]
    rows = read_table(write(tmp_path, "\n".join(lines))).rows
    assert [(row.split, row.fold) for row in rows.values()] == [(0, -1), (1, -1), (2, -1), (-1, 3), (2, -1)]
    assert [row.mask for row in rows.values()] == [None, None, tmp_path / "m/c.png", None, Path("/e.nii")]


def test_a_column_of_each_class(tmp_path):
    path = write(tmp_path, "id,mel,nv,age,bcc\n1,1,0,3,TRUE\n2,0.0,1.0,4,no\n3,0,false,5,0\n")
    table = read_table(path, Columns(labels=("nv", "mel", "bcc")))
    assert table.several and table.class_names == ["nv", "mel", "bcc"]
    assert [row.labels for row in table.rows.values()] == [("mel", "bcc"), ("nv",), ()]
    alone = write(tmp_path, "id,mel,split,group,nv\n1,1,test,p,0\n", "alone.csv")
    assert read_table(alone, Columns(labels=("*",))).class_names == ["mel", "nv"]


def test_several_names_in_a_cell_as_chestxray14_has_them(tmp_path):
    lines = ["Image Index,Finding Labels,Follow-up #,Patient ID", "00000001_000.png,Cardiomegaly|Emphysema,0,1"]
    path = write(tmp_path, "\n".join([*lines, "00000002_000.png,No Finding,0,2", "3.png,Emphysema,0,2"]))
    table = read_table(path, FINDINGS)
    assert table.class_names == ["Cardiomegaly", "Emphysema"] and table.several
    assert table.rows["00000001_000"] == Row(("Cardiomegaly", "Emphysema"), "1")
    assert table.rows["00000002_000"] == Row((), "2")


def arrow(folder, **columns):
    parquet.write_table(pyarrow.table(columns), folder / "t.parquet")
    return folder / "t.parquet"


@pytest.mark.parametrize(
    ("ids", "labels", "names"),
    [
        (["a", "b.nii"], [3, 10], ["3", "10"]),
        ([1, 2], [3.0, 10.0], ["3", "10"]),
        ([1.0, 2.0], [0.5, 2.0], ["0.5", "2"]),
        (["a", "b"], [True, False], ["False", "True"]),
        (pyarrow.array(["a", "b"]).dictionary_encode(), pyarrow.array(["x", "y"]).dictionary_encode(), ["x", "y"]),
        (pyarrow.array([b"a", b"b"]), pyarrow.array([7, 8], pyarrow.uint8()), ["7", "8"]),
    ],
    ids=["integers", "floats", "halves", "bools", "dictionaries", "bytes"],
)
def test_parquet(tmp_path, ids, labels, names):
    path = arrow(tmp_path, id=ids, label=labels, group=["p", None], image=[[1], [2]])
    table = read_table(path)
    assert sorted(table.class_names) == sorted(names) and not {name for name in table.rows if name.endswith(".0")}
    assert [row.group for row in table.rows.values()] == ["p", None]


def test_parquet_with_columns_of_classes_and_folds(tmp_path):
    path = arrow(tmp_path, id=[1, 2], a=[1.0, 0.0], b=[False, True], fold=[0.0, float("nan")])
    rows = read_table(path, Columns(labels=("a", "b"))).rows
    assert rows == {"1": Row(("a",), fold=0), "2": Row(("b",))}


PLAIN, SEVERAL = Columns(), Columns(labels=("a", "b"))


@pytest.mark.parametrize(
    ("text", "columns", "words"),
    [
        ("", PLAIN, "is empty; its first line must name the columns"),
        ("\n\n", PLAIN, "is empty"),
        ("id,label\n", PLAIN, "names no sample; write a line for each: id,label"),
        ("ID,lable\n1,a\n", PLAIN, r"no column 'id' \(is it 'ID'\?\); its columns are ID, lable"),
        ("id,lable\n1,a\n", PLAIN, r"no column 'label' \(is it 'lable'\?\)"),
        ("id,label,id\n1,a,1\n", PLAIN, "has the column 'id' 2 times"),
        ("id,label\na.nii,x\na.nii.gz,x\n", PLAIN, "t.csv line 3 gives the id 'a' a second time"),
        ("id,label\na,\n", PLAIN, "line 2 has no label; fill the cell or remove the line"),
        ("id,label\n ,x\n", PLAIN, "line 2 has no id"),
        ("id,label\na,x,y\n", PLAIN, "line 2 has 3 cells, its header 2"),
        (b"id,label\na,x\nb,caf\xe9\n", PLAIN, r"not UTF-8 text \(line 3\)"),
        ("id,label\na,x\nb,y\nc,x|y\n", PLAIN, "the label 'x|y' is several classes; add --separator '|'"),
        ("id,label,split\na,x,trian\n", PLAIN, "line 2: split 'trian' is unknown; use train, validation, test"),
        ("id,label,fold\na,x,-1\n", PLAIN, "fold '-1' is not a whole number from 0 to 99"),
        ("id,label,split,fold\na,x,test,1\n", PLAIN, "gives 'a' a fold and the split test"),
        ("id,a,b\n1,1,0\n2,1,\n", SEVERAL, "line 3 has an empty cell in column 'b'; write 0 or 1"),
        ("id,a,b\n1,1,NaN\n", SEVERAL, "line 2 has 'NaN' in column 'b'"),
        ("id,a,b\n1,-1.0,0\n", SEVERAL, "line 2 has '-1.0' in column 'a'"),
        ("id,a\n1,1\n", SEVERAL, r"no column 'b'"),
        ("Image Index,Finding Labels,Patient ID\n1,A||B,1\n", FINDINGS, "line 2 has an empty name in 'A||B'"),
        ("Image Index,Finding Labels,Patient ID\n1,,1\n", FINDINGS, "line 2 has an empty name"),
        ("Image Index,Finding Labels,Patient ID\n1,A|No Finding,1\n", FINDINGS, "'No Finding' stands for no class"),
        ("id,label\n1,x\n", Columns(labels=()), "has a column 'label', but the labels come from elsewhere"),
        ('id,label\n1,"' + "x" * 200_000, PLAIN, "line 2 is no line of a table: field larger"),
    ],
)
def test_bad_tables_are_refused_with_the_line(tmp_path, text, columns, words):
    with pytest.raises(ValueError, match=words.replace("|", r"\|")) as told:
        read_table(write(tmp_path, text), columns)
    assert "\n" not in str(told.value)


def test_what_is_no_file_is_told(tmp_path):
    for path in (tmp_path, tmp_path / "none.csv"):
        with pytest.raises(ValueError, match="cannot be read: "):
            read_table(path)
    with pytest.raises(ValueError, match=r"t.csv is broken Parquet: "):
        read_table(write(tmp_path, b"PAR1 no more"))


@pytest.mark.parametrize(
    ("values", "words"),
    [({"labels": ("a", "b"), "separator": "|"}, "give one"), ({"none": "No Finding"}, "give a separator")],
)
def test_options_that_contradict_each_other(values, words):
    with pytest.raises(ValueError, match=words):
        Columns(**values)


@given(st.from_regex(r"[a-z_]([a-z./_-]{0,6}[a-z0-9])?", fullmatch=True))
def test_an_id_without_its_suffix_stays(name):
    assert plain_id(f"./{name}.nii.gz") == plain_id(f" {name}.NPY ") == name
    assert plain_id(name.replace("/", "\\")) == plain_id(name)


def test_rows_find_their_files_with_or_without_folders():
    rows = {name: Row((name,)) for name in ("a", "x/b", "c")}
    found = match_rows(Path("t.csv"), rows, ["b", "y/c", "a"])
    assert {id: row.labels[0] for id, row in found.items()} == {"a": "a", "b": "x/b", "y/c": "c"}


@pytest.mark.parametrize(
    ("names", "ids", "words"),
    [
        (["scan_1", "scan_3"], ["scan_1", "scan_2"], r"no file is given for 'scan_3' \(did you mean 'scan_2'\?\)"),
        (["a"], ["a", "b", "c"], "no line names 'b' and 1 more"),
        (["a"], ["x/a", "y/a"], "'a' may be 'x/a' or 'y/a'; write the folder, too"),
        (["x/a", "a"], ["a"], "two lines name 'a', one of them as 'a'"),
    ],
)
def test_rows_and_files_that_do_not_fit(names, ids, words):
    with pytest.raises(ValueError, match=words):
        match_rows(Path("t.csv"), dict.fromkeys(names, Row(("x",))), ids)


def test_a_list_may_name_one_split_in_two_ways(tmp_path):
    path = write(tmp_path, '{"train": ["x/a"], "val": ["b.png"], "validation": ["c"]}', "l.json")
    merged = merge_list(path, {"b": Row(("k",), "g", mask=Path("m"))}, ["a", "b", "c"])
    assert merged == {"a": Row(split=0), "b": Row(("k",), "g", 1, mask=Path("m")), "c": Row(split=1)}


def test_values_of_an_atlas(tmp_path):
    assert read_values(write(tmp_path, "value,label\n10,left\n20,right\n30,left\n")) == {
        10: "left",
        20: "right",
        30: "left",
    }
    with pytest.raises(ValueError, match="line 3: value 10 occurs twice"):
        read_values(write(tmp_path, "value,label\n10,left\n10,right\n"))


def test_a_row_on_the_screen_is_one_line_whatever_its_words(capsys):
    odd = "a\nb\tc\r\u2028\x1b[2J\udc80 | `d` é"
    print_rows([{"name": "plain", "value": "1"}, {"name": odd, "value": odd}], 200, ())
    head, plain, last = capsys.readouterr().out.split("\n")[:-1]
    shown = r"a\nb\tc\r\u2028\x1b[2J\udc80 | `d` é"
    assert last == f"{shown}  {shown}" and head.index("value") == plain.index("1") == len(shown) + 2
