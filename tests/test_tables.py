"""Tables of labels: choice of columns, file formats and errors."""
import re
import shutil

import pytest
from PIL import Image

from timm_mobileformer.cli.console import InputError
from timm_mobileformer.cli.data import open_data

pytest.importorskip('pandas', reason='pandas reads tables')

FILES = [f'{name}.png' for name in ('ant', 'bee', 'cod', 'doe', 'eel', 'fox')]
LABELS = ['a', 'b', 'a', 'b', 'a', 'b']


@pytest.fixture(scope='module')
def six(tmp_path_factory):
    """Six images, and others in subfolders."""
    root = tmp_path_factory.mktemp('six')
    for i, path in enumerate(FILES + ['deep/er/gnu.png', 'one/twin.png', 'two/twin.png', 'PHOTO.JPG']):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 6), (i, 0, 0)).save(root / path)
    return root


@pytest.fixture
def root(six, tmp_path):
    shutil.copytree(six, tmp_path / 'root')
    return tmp_path / 'root'


def table(*columns, sep=','):
    """Return a table of columns, each a header with values; a single value is repeated."""
    columns = [[head, *(values if isinstance(values, (list, range)) else [values] * 6)] for head, values in columns]
    return '\n'.join(sep.join(map(str, row)) for row in zip(*columns, strict=True)) + '\n'


def read(root, text, name='labels.csv', **options):
    """Read a table; return the label of each path by split, and the remarks."""
    file = root / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    data = open_data(root, file, **options)
    sides = [{path[len(str(root)) + 1:]: data.classes[i] for path, i in side.samples if side}
             for side in (data.train, data.val, data.test) if side]
    return sides, data.remarks


TAKEN = dict(zip(FILES, LABELS, strict=True))
FILE, LABEL = ('file', FILES), ('label', LABELS)
SPECIES, SPLIT = ('species', LABELS), ('Split', ['train', 'train', 'Train', 'val', 'val', 'VAL'])


@pytest.mark.parametrize('text, taken', [
    (table(('image_id', FILES), ('width', range(6)), LABEL), 'files in column `image_id`; labels in column `label`'),
    (table(('filename', FILES), ('fold', [1, 2] * 3), SPECIES), '`species`, 2 classes: a, b; unused columns: `fold`'),
    (table(('image', FILES), ('a', [1, 0] * 3), ('b', [0, 1] * 3)), 'labels in column `a`, `b`, 2 classes: a, b'),
    (table(('image', FILES), ('a', ['True', 'False'] * 3), ('b', ['False', 'True'] * 3), ('age', 7)),
     'unused columns: `age`'),
    (table(('image', FILES), ('note', ['note', 'x', '', 'y', 'z', 'u']), LABEL), 'unused columns: `note`'),
    (table(('', range(6)), ('x', FILES), ('y', LABELS)), 'files in column `x`; labels in column `y`'),
    (table(('', range(6)), FILE, ('Label', [0, 1] * 3), ('ClassName', LABELS)), 'labels in column `ClassName`'),
    (table(('id', [f[:-4] for f in FILES]), ('breed', LABELS)), 'files in column `id`; labels in column `breed`'),
    (table(('ant', [f[:-4] for f in FILES[1:]]), ('a', LABELS[1:])), 'files in column `1`; labels in column `2`'),
    (table(FILE, ('mask', FILES[::-1]), ('what', LABELS)), 'labels in column `what`'),
    (table(('Class Name', LABELS), ('Filepath', FILES)), 'files in column `Filepath`; labels in column `Class Name`'),
    (table(('1', FILES), ('2', LABELS))[4:], 'files in column `1`; labels in column `2`'),
])
def test_the_right_columns_are_chosen_and_reported(root, text, taken):
    (train, val), remarks = read(root, text)
    assert {**train, **val} == TAKEN and taken in remarks[0]


@pytest.mark.parametrize('names, values', [(('0', '1'), (1, 0)), (('True', 'False'), ('True', 'False'))])
def test_one_hot_columns_may_be_named_like_their_values(root, names, values):
    columns = [(name, list(some * 3)) for name, some in zip(names, (values, values[::-1]), strict=True)]
    (train, val), remarks = read(root, table(('image', FILES), *columns))
    assert {**train, **val} == dict(zip(FILES, names * 3, strict=True))
    assert f'labels in column `{names[0]}`, `{names[1]}`, 2 classes' in remarks[0]


@pytest.mark.parametrize('text', [
    table(('Filepath', FILES), SPLIT, ('Class Name', LABELS)),
    table(FILE, LABEL, ('set', 'test'), ('fold', ['train'] * 3 + ['val'] * 3)),
    table(FILE, ('x', LABELS), ('subset', ['training'] * 3 + ['validation'] * 3)),
    table(('label', LABELS), ('partition', ['TRAIN'] * 3 + ['test'] * 3), ('name', FILES), ('y', 1)),
])
def test_a_column_of_splits_is_followed(root, text):
    (train, val), remarks = read(root, text)
    assert list(train) == FILES[:3] and list(val) == FILES[3:] and {**train, **val} == TAKEN
    assert 'splits by column `' in remarks[0]


def test_a_column_of_splits_may_have_a_test_set(root):
    sides, _ = read(root, table(FILE, LABEL, ('split', ['train', 'train', 'val', 'val', 'test', 'test'])))
    assert [list(side) for side in sides] == [FILES[:2], FILES[2:4], FILES[4:]]


def test_without_a_column_of_splits_their_folders_are_followed(root):
    names = [f'{split}/{f}' for split, f in zip(['train'] * 3 + ['val'] * 3, FILES, strict=True)]
    for name, file in zip(names, FILES, strict=True):
        (root / name).parent.mkdir(exist_ok=True)
        (root / file).rename(root / name)
    (train, val), remarks = read(root, table(('file', FILES), LABEL))
    assert list(train) == names[:3] and list(val) == names[3:] and 'splits by folders' in remarks[0]


@pytest.mark.parametrize('columns, column', [
    ([('filename', FILES), ('sex', ['m', 'f'] * 3), ('dx', LABELS)], 'dx'),
    ([FILE, ('label', [1, 1, 2] * 2), ('class', LABELS)], 'class'),
    ([FILE, ('fold', [1, 1, 2] * 2), ('x', LABELS)], 'X'),
    ([FILE, ('set', ['train', 'test'] * 3)], 'set'),
])
def test_an_ambiguous_column_of_labels_must_be_named(root, columns, column):
    with pytest.raises(InputError, match=re.escape(', '.join(f'`{name}`' for name, _ in columns)) + '.*--label-column'):
        read(root, table(*columns))
    (train, val), remarks = read(root, table(*columns), label_column=column)
    assert list({**train, **val}.values()).count(list(train.values())[0]) == 3
    assert f'labels in column `{column.lower()}`' in remarks[0]


def test_a_column_of_a_table_without_a_header_is_named_by_its_number(root):
    text = table(('', FILES), ('', [1, 1, 2] * 2), ('', LABELS))[3:]
    (train, val), _ = read(root, text, label_column='3')
    assert {**train, **val} == TAKEN
    with pytest.raises(InputError, match="no column '4'"):
        read(root, text, label_column='4')


@pytest.mark.parametrize('name, text, remark', [
    ('semicolons', table(FILE, LABEL, sep=';'), None),
    ('tabs', table(FILE, LABEL, sep='\t'), None),
    ('bars', table(FILE, LABEL, sep='|'), None),
    ('blanks', table(FILE, LABEL, sep='  '), None),
    ('spaces after commas', table(FILE, LABEL, sep=', '), None),
    ('byte-order mark, CRLF', '\ufeff' + table(FILE, LABEL).replace('\n', '\r\n'), None),
    ('UTF-16', table(FILE, LABEL, sep='\t').encode('utf-16'), None),
    ('Latin-1', table(FILE, LABEL, ('note', 'g\u00fcn')).encode('cp1252'), 'was read as Latin-1'),
    ('sep=;', 'sep=;\r\n' + table(FILE, LABEL, ('note', 'x,y'), sep=';'), None),
    ('comments', '# made by hand, 2024\n#\n' + table(FILE, LABEL).replace('bee', '# more\nbee'), 'skipped 3 lines'),
    ('blank lines', '\n\n' + table(FILE, LABEL).replace('\n', '\n\n') + ',\n', None),
    ('huge field', table(FILE, LABEL, ('note', 200_000 * 'x')), None),
    ('ids', table(('id', [f[:-4] for f in FILES]), LABEL), 'such as \'ant\' for {root}/ant.png'),
    ('backslashes', table(('file', ['.\\' + f for f in FILES]), LABEL), None),
    ('case', table(('file', [f.upper() for f in FILES]), LABEL), 'such as \'ANT.PNG\' for {root}/ant.png'),
    ('folders elsewhere', table(('file', [f'C:\\data\\pics\\{f}' for f in FILES]), LABEL), '6 names other than'),
    ('again', table(FILE, LABEL) * 2, None),
    ('again, below', table(FILE, LABEL) + 'ant.png,a\n', '1 row with an image of another row'),
])
def test_common_formats_are_read(root, name, text, remark):
    if name == 'again':
        with pytest.raises(InputError, match="neither in .* nor beside the table: file"):
            read(root, text)
        return
    (train, val), remarks = read(root, text)
    assert {**train, **val} == TAKEN
    assert not remark or any(remark.format(root=root) in line for line in remarks)


def test_labels_may_have_any_characters(root):
    labels = ['tench, Tinca tinca', 'an "A"', 'two\nlines', '#1', 'None', 'x;y']
    text = 'file,label\n' + ''.join('{}.png,"{}"\n'.format(name, label.replace('"', '""'))
                                    for name, label in [*zip('abcdef', labels, strict=True)] + [*zip('ghijkl', labels,
                                                                                                    strict=True)])
    for i, name in enumerate('abcdefghijkl'):
        Image.new('RGB', (8, 6), (i, 1, 0)).save(root / f'{name}.png')
    (train, val), _ = read(root, text)
    assert [{**train, **val}[f'{name}.png'] for name in 'abcdef'] == labels


def test_files_are_found_in_the_folder_of_the_table_too(root):
    (root / 'images').mkdir()
    (root / 'labels.csv').write_text(table(FILE, LABEL))
    data = open_data(root / 'images', root / 'labels.csv')
    assert len(data.train) + len(data.val) == 6


@pytest.mark.parametrize('name, text', [
    ('metadata.csv', table(('file_name', FILES), LABEL)),
    ('metadata.jsonl', ''.join(f'{{"file_name": "{f}", "label": "{x}", "box": [1, 2]}}\n' for f, x in TAKEN.items())),
    ('_classes.csv', table(('filename', FILES), (' a', [1, 0] * 3), (' b', [0, 1] * 3))),
])
@pytest.mark.parametrize('splits', [False, True])
def test_a_table_of_a_usual_name_is_found_beside_the_images(tmp_path, root, name, text, splits):
    (root / name).write_text(text)
    if not splits:
        data = open_data(root)
        assert {path.rpartition('/')[2]: data.classes[i] for side in (data.train, data.val)
                for path, i in side.samples} == TAKEN
    else:
        for split in 'train', 'valid', 'test':
            shutil.copytree(root, tmp_path / 'parts' / split)
        data = open_data(tmp_path / 'parts')
        for split, side in ('train', data.train), ('valid', data.val), ('test', data.test):
            assert {path: data.classes[i] for path, i in side.samples} == {
                str(tmp_path / 'parts' / split / f): label for f, label in TAKEN.items()}
    assert f'{name}: files in column' in data.remarks[0]


def test_class_folders_take_precedence_over_a_table_that_is_not_named(tmp_path):
    for name in 'cat/1.png', 'cat/2.png', 'dog/3.png', 'dog/4.png':
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new('RGB', (8, 6), (ord(name[4]), 0, 0)).save(tmp_path / name)
    (tmp_path / 'metadata.csv').write_text('file_name,text\ncat/1.png,a cat\n')
    data = open_data(tmp_path)
    assert data.classes == ['cat', 'dog'] and any('metadata.csv is not used' in remark for remark in data.remarks)


@pytest.mark.parametrize('text, wanted', [
    (table(FILE, ('label', ['a', 'b', 'a|b'] * 2)), 'row 4 of {file} has 2 labels, a|b; an image must have one'),
    (table(FILE, ('label', ['a', 'b', '"a,b"'] * 2)), 'row 4 of {file} has 2 labels, a,b'),
    (table(FILE, ('a', [1, 0, 1] * 2), ('b', [0, 1, 1] * 2)), 'row 4 of {file} has 2 labels, `a`, `b`'),
    (table(FILE, ('label', ['a', '', 'b', 'nan', 'b', 'NaN'])),
     '3 of 6 rows in {file} without a label: row 3, row 5, row 7'),
    (table(FILE, LABEL) + '\n\n,c\n', '1 of 7 files in {file} neither'),
    ('ant.png,a\nbee.png,b\ngnat.png,a\n', 'of 3 files in {file} neither in {root} nor beside the table: gnat.png'),
    ('猫,a\nant,a\nbee,b\n', '1 of 3 files in {file} neither in {root} nor beside the table: 猫'),
    ('gnat,a\nant,a\nbee,b\n', '1 of 3 files in {file} neither in {root} nor beside the table: gnat'),
    (table(('file', ['twin'] + FILES[1:]), LABEL),
     "'twin' in {file} matches several images: {root}/one/twin.png, {root}/two/twin"),
    (table(FILE, LABEL) + './ant.png,b\n', '{root}/ant.png is both a and b in {file}, in rows 2 and 8'),
    (table(FILE, LABEL) + 'ant,b\n', '{root}/ant.png is both a and b in {file}, in rows 2 and 8'),
    (table(FILE, LABEL, SPLIT) + 'ant.png,a,val\n', '{root}/ant.png is both train and val in {file}, in rows 2 and 8'),
    (table(FILE, LABEL, ('split', ['train', 'val', ''] * 2)), 'must be train, val or test in every row'),
    (table(FILE, LABEL, ('split', 'test')), '{file} has no training set, only test'),
    (table(FILE, LABEL, ('split', ['val', 'test'] * 3)), '{file} has no training set, only '),
    (table(FILE, ('x', [0.2, 0.8, 0.4] * 2), ('y', [0.8, 0.2, 0.6] * 2)),
     '{file} has an ambiguous column of labels; its columns are `file`'),
    (table(('n', range(6)), ('file', FILES)), '{file} has no column of labels; its columns are `n`, `file`'),
    (table(FILE), 'has no column of labels'),
    (table(('x', 1), ('y', 2)), 'no column of {file} has names of images in {root}'),
    ('', '{file} cannot be read as a table'),
    ('6\n' + table(FILE, LABEL, sep=' '), 'the first line of {file} is only a number, 6, such as a count of rows'),
    ('file,label\nant.png,tench, Tinca tinca\n', 'cannot be read as a table'),
    ('ant.png,a\nbee.png,a\n', 'only one class (a)'),
    ('ant.png,a\nbee.png,b\n', 'only one image per class'),
    (b'PK\3\4\0\0', '{file} is not a text file; save the table as CSV'),
])
def test_an_invalid_table_is_refused(root, text, wanted):
    with pytest.raises(InputError, match=re.escape(wanted.format(file=root / 'labels.csv', root=root))):
        read(root, text)


def test_rows_without_a_label_are_skipped_on_request(root):
    text = table(FILE, ('label', ['a', '', 'a', 'b', 'nan', 'b']))
    (train, val), remarks = read(root, text, skip_unlabeled=True)
    assert {**train, **val} == {'ant.png': 'a', 'cod.png': 'a', 'doe.png': 'b', 'fox.png': 'b'}
    assert any('skipped 2 of 6 rows' in remark for remark in remarks)


def test_the_order_of_rows_does_not_matter(root):
    head, *rows = table(FILE, LABEL).splitlines()
    assert read(root, '\n'.join([head, *rows]))[0] == read(root, '\n'.join([head, *rows[::-1]]))[0]
