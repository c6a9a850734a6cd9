"""Image folders: splits, classes, ambiguous layouts, duplicates and unreadable images."""
import csv
import os
import random
import re
import shutil
import zlib
from pathlib import Path

import pytest
from PIL import Image
from timm.utils.misc import natural_key

from timm_mobileformer.cli import main
from timm_mobileformer.cli.console import InputError, progress
from timm_mobileformer.cli.data import open_data
from timm_mobileformer.cli.duplicates import identical_files
from timm_mobileformer.cli.folders import natural_order
from timm_mobileformer.cli.image_checks import check_images
from timm_mobileformer.cli.images import read_image
from timm_mobileformer.cli.options import parse


def draw(root, *names):
    """Write small images of these names, each of a different color."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 6), tuple(zlib.crc32(name.encode()).to_bytes(4, 'big')[:3])).save(root / name)
    return root


def found(data):
    """Return the file names and classes of the training set and the validation set."""
    return [sorted((os.path.basename(path), data.classes[i]) for path, i in side.samples)
            for side in (data.train, data.val)]


@pytest.mark.parametrize('train, val', [
    ('train', 'val'), ('Train', 'VAL'), ('training', 'validation'), ('TRAIN', 'valid'), ('train', 'Eval'),
    ('train', 'test'),
])
def test_splits_are_found_by_their_usual_names_in_any_case(tmp_path, train, val):
    draw(tmp_path, f'{train}/a/1.png', f'{train}/b/2.jpg', f'{val}/a/3.png', f'{val}/b/4.png')
    data = open_data(tmp_path)
    assert found(data) == [[('1.png', 'a'), ('2.jpg', 'b')], [('3.png', 'a'), ('4.png', 'b')]]
    assert not data.remarks


@pytest.mark.parametrize('prefix', ['', 'train/'])
def test_without_a_validation_folder_a_fifth_of_every_class_is_for_validation(tmp_path, prefix):
    counts = dict(a=10, b=25, c=2)
    draw(tmp_path / 'here', *(f'{prefix}{name}/{i}.png' for name, n in counts.items() for i in range(n)))
    data = open_data(tmp_path / 'here')
    counts = [[sum(i == k for _, i in side.samples) for k in range(3)] for side in (data.train, data.val)]
    assert counts == [[8, 20, 1], [2, 5, 1]] and data.remarks == [
        'validation set: 21.6 % of the images, including at least one of every class that has two or more']
    counts = [sum(i == k for _, i in open_data(tmp_path / 'here', val_split=0.4).val.samples) for k in range(3)]
    assert counts == [4, 10, 1]

    (tmp_path / 'here').rename(tmp_path / 'there')
    draw(tmp_path / 'there', f'{prefix}c/new.png')
    assert set(found(open_data(tmp_path / 'there'))[1]) >= set(found(data)[1]) - {('0.png', 'c'), ('1.png', 'c')}
    assert found(open_data(tmp_path / 'there')) == found(open_data(tmp_path / 'there'))


UP = 'links to a parent folder, not followed: {{root}}/{}'
SPLITS = 'train/a/1.png', 'train/b/2.png', 'val/a/3.png', 'val/b/4.png'


def beside(root, name):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('not an image')


@pytest.mark.parametrize('add, remark', [
    (lambda root: draw(root, 'train/a/.hidden.png', 'train/.git/5.png', '.cache/a/6.png'), None),
    (lambda root: draw(root, 'train/a/deep/er/5.png'), None),
    (lambda root: draw(root, 'train/c/5.png'), 'classes missing from the validation set: c'),
    (lambda root: draw(root, 'val/c/5.png'), 'classes only in the validation set, ignored: c'),
    (lambda root: [beside(root, f'train/{name}') for name in ('a/5.doc', 'b/6.DOC', 'a/x.txt', 'a/README')],
     'ignored files: 2 .doc, 1 without extension, 1 .txt'),
    (lambda root: draw(root, 'val/5.png'), 'images outside of class folders, ignored: {root}/val/5.png'),
    (lambda root: (root / 'train' / 'c').mkdir(), 'folders without images, not used as classes: {root}/train/c'),
    (lambda root: draw(root, 'extra/a/5.png'), 'ignored folders in {root}: extra'),
    (lambda root: (root / 'test').mkdir(), 'ignored folders in {root}: test'),
    (lambda root: draw(root, 'test/a/5.png', 'test/c/5.png'), 'classes only in the test set, ignored: c'),
    (lambda root: (root / 'train/a/up').symlink_to('..'), UP.format('train/a/up')),
    (lambda root: (root / 'train/a/up').symlink_to('../..'), UP.format('train/a/up')),
    (lambda root: (root / 'train/a/up').symlink_to(root / 'train' / 'a'), UP.format('train/a/up')),
    (lambda root: (root / 'val/up').symlink_to('.'), UP.format('val/up')),
    (lambda root: (root / 'val/up').symlink_to('/'), UP.format('val/up')),
])
def test_what_is_ignored_is_reported(tmp_path, add, remark):
    draw(tmp_path, *SPLITS)
    add(tmp_path)
    data = open_data(tmp_path)
    assert data.remarks == ([remark.format(root=tmp_path)] if remark else [])
    assert {name for side in found(data) for name, _ in side} - {'5.png'} == {'1.png', '2.png', '3.png', '4.png'}
    assert not any(part.startswith('.') for path, _ in data.train.samples for part in path.split(os.sep))


def test_a_test_set_is_for_validation_only_if_there_is_no_validation_set(tmp_path):
    draw(tmp_path, *SPLITS, 'Test/a/5.png', 'Test/b/6.png')
    data = open_data(tmp_path)
    assert data.test.samples == [(str(tmp_path / 'Test/a/5.png'), 0), (str(tmp_path / 'Test/b/6.png'), 1)]
    assert found(data) == [[('1.png', 'a'), ('2.png', 'b')], [('3.png', 'a'), ('4.png', 'b')]]
    assert not data.validates_on_test and not data.remarks
    (tmp_path / 'val').rename(tmp_path / '.val')
    data = open_data(tmp_path)
    assert data.validates_on_test and data.test is None and len(data.val) == 2


@pytest.mark.parametrize('names, wanted', [
    ((), 'has no folders with images'),
    (('1.png', '2.png'), 'no folders with images; without class folders, name a table of labels'),
    (('train/1.png', 'test/2.png'), 'no folder train with a folder for every class'),
    (('val/a/1.png', 'test/a/2.png'), 'no folder train with a folder for every class'),
    (('cat/1.png', 'cat/2.png'), 'only one class (cat)'),
    (('pets/train/cat/1.png', 'pets/train/dog/2.png'), 'only one class (pets); at least two are needed; if its'),
    (('train/a/1.png', 'train/b/2.png', 'test/unknown/3.png'), 'share no class (a, b; unknown)'),
    (('a/1.png', 'b/2.png'), 'only one image per class'),
])
def test_a_folder_that_cannot_be_trained_on_is_refused(tmp_path, names, wanted):
    draw(tmp_path, *names)
    with pytest.raises(InputError, match=re.escape(wanted)):
        open_data(tmp_path)


def test_a_table_beside_a_single_folder_of_images_is_pointed_out(tmp_path):
    draw(tmp_path, 'img/1.png', 'img/2.png')
    (tmp_path / 'labels.csv').write_text('file,label\n1.png,cat\n2.png,dog\n')
    with pytest.raises(InputError, match=re.escape(f'add --labels {tmp_path}/labels.csv')):
        open_data(tmp_path)


@pytest.mark.parametrize('names, wanted', [
    (('fold1/cat/1.png', 'fold1/dog/2.png', 'fold2/cat/3.png', 'fold2/dog/4.png', 'fold2/5.png'),
     "fold1, fold2 (--label-pattern '^([^/]+)/'), or cat, dog (--label-pattern '^[^/]+/([^/]+)/')"),
    (('train/2023/cat/1.png', 'train/2023/dog/2.png', 'train/2024/cat/3.png', 'train/2024/dog/4.png',
      'train/2024/cow/5.png', 'val/2023/cat/6.png'), 'or cat, dog ('),
    (('seg_train/seg_train/a/1.png', 'seg_train/seg_train/b/2.png', 'seg_test/seg_test/a/3.png',
      'seg_test/seg_test/b/4.png', 'seg_pred/5.png'), "or a, b (--label-pattern '^[^/]+/[^/]+/([^/]+)/')"),
    (('cat/train/1.png', 'cat/test/2.png', 'dog/train/3.png', 'dog/test/4.png'),
     "with test, train as splits (--label-pattern '^(?P<label>[^/]+)/(?P<split>[^/]+)/')"),
    (('train2017/1.png', 'val2017/2.png', 'annotations/x.json'), 'train2017, val2017, which look like splits or parts'),
    (('images_part_1/1.png', 'images_part_2/2.png', 'metadata.txt'), 'images_part_1, images_part_2, which look like'),
    (('images/train/1.png', 'images/val/2.png', 'labels/train/1.txt'), 'data sets for object detection'),
    (('train/images/1.png', 'valid/images/2.png', 'train/labels/1.txt', 'valid/labels/2.txt'), 'object detection'),
    (('Abyssinian_1.png', 'Abyssinian_22.png', 'great_pyrenees_3.png'), "--label-pattern '([^/]+)_[0-9]+'"),
    (('pets.zip',), 'no folders with images, only 1 .zip; unpack the archive first'),
])
def test_an_ambiguous_layout_is_refused_with_the_options_that_resolve_it(tmp_path, names, wanted):
    for name in names:
        draw(tmp_path, name) if name.endswith('.png') else beside(tmp_path, name)
    with pytest.raises(InputError, match=re.escape(wanted)):
        open_data(tmp_path)


def test_a_pattern_is_not_suggested_where_it_would_match_a_single_label(tmp_path):
    draw(tmp_path, 'image_00001.png', 'image_00002.png', 'image_00003.png')
    with pytest.raises(InputError, match='name a table of labels with --labels$'):
        open_data(tmp_path)


@pytest.mark.parametrize('command', [('finetune',), ('evaluate', '--model', 'm'), ('export', 'onnx')])
@pytest.mark.parametrize('options, wanted', [
    ((), '--label-pattern needs --data-dir'), (('--labels', __file__), 'not allowed with argument --labels')])
def test_a_pattern_is_for_the_images_of_a_folder(command, options, wanted):
    with pytest.raises(InputError, match=wanted):
        parse([*command, *options, '--label-pattern', '(.)'])


@pytest.mark.parametrize('names, classes, remark', [
    (('cat/images/1.png', 'cat/images/2.png', 'dog/images/3.png', 'dog/images/4.png'), ['cat', 'dog'], None),
    (('cat/tabby/1.png', 'cat/siam/2.png', 'dog/collie/3.png', 'dog/poodle/4.png'), ['cat', 'dog'], None),
    (('cat/1.png', 'cat/2.png', 'cat/blurred/3.png', 'dog/4.png', 'dog/5.png', 'dog/blurred/6.png'),
     ['cat', 'dog'], None),
    (('cat/1.png', 'cat/2.png', 'dog/3.png', 'dog/4.png', '__MACOSX/cat/5.png', 'dog/@eaDir/6.png'),
     ['cat', 'dog'], None),
    (('Cat/1.png', 'Cat/2.png', 'cat/3.png', 'cat/4.png'), ['Cat', 'cat'],
     "class names that differ only in case, spaces or Unicode form: 'Cat' and 'cat'"),
    (('caf\u00e9/1.png', 'caf\u00e9/2.png', 'cafe\u0301/3.png', 'cafe\u0301/4.png'), ['cafe\u0301', 'caf\u00e9'],
     "class names that differ only in case, spaces or Unicode form: 'cafe\u0301' and 'caf\u00e9'"),
])
def test_subfolders_of_classes_are_not_classes(tmp_path, names, classes, remark):
    data = open_data(draw(tmp_path, *names))
    assert data.classes == classes and data.remarks[1:] == ([remark] if remark else [])
    assert not any(part in path for part in ('__MACOSX', '@eaDir') for path, _ in data.train.samples)


def test_the_order_of_classes_is_unique_for_any_names(tmp_path):
    names = ['Zebra', 'cat', 'Cat', 'CAT', 'dog', '1', '01', '001', '10', '9', 'x1', 'x1\u00b2', 'x01', 'x\u0661',
             'x-1', 'caf\u00e9', 'cafe\u0301', '\u2460', 'a' + 200 * '9', 'a' + 199 * '9']
    draw(tmp_path, *(f'{name}/{i}.png' for name in names for i in range(2)))
    classes = open_data(tmp_path).classes
    for seed in range(9):
        random.Random(seed).shuffle(names)
        assert classes == sorted(names, key=natural_order)
    assert classes[:5] == ['001', '01', '1', '9', '10']
    plain = [name for name in names if name.isascii() and name.lower() not in ('cat', '1', '01', '001', 'x1', 'x01')]
    assert [name for name in classes if name in plain] == sorted(plain, key=natural_key)  # the order of timm's readers


@pytest.mark.parametrize('names, pattern, train, val', [
    (('Abyssinian_1.png', 'Abyssinian_22.png', 'great_pyrenees_3.png', 'great_pyrenees_4.png'), '([^/]+)_[0-9]+',
     {'Abyssinian', 'great_pyrenees'}, None),
    (('fold1/cat/1.png', 'fold1/dog/2.png', 'fold2/cat/3.png', 'fold2/dog/4.png'), '^([^/]+)/', {'fold1', 'fold2'},
     None),
    (('fold1/cat/1.png', 'fold1/dog/2.png', 'fold2/cat/3.png', 'fold2/dog/4.png'), '^[^/]+/([^/]+)/', {'cat', 'dog'},
     None),
    (('train/cat_1.png', 'train/dog_2.png', 'val/cat_3.png', 'val/dog_4.png', 'test/cat_5.png'), '(cat|dog)_',
     {'1.png', '2.png'}, {'3.png', '4.png'}),
    (('cat/train/1.png', 'dog/train/2.png', 'cat/test/3.png', 'dog/test/4.png'),
     '^(?P<label>[^/]+)/(?P<split>[^/]+)/', {'1.png', '2.png'}, {'3.png', '4.png'}),
])
def test_a_pattern_takes_labels_from_paths(tmp_path, names, pattern, train, val):
    data = open_data(draw(tmp_path, *names), label_pattern=pattern)
    if val is None:
        assert set(data.classes) == train and len(data.train) == len(data.val) == 2
    else:
        assert [{re.split('[/_]', path)[-1] for path, _ in side.samples} for side in (data.train, data.val)] == [
            train, val]


@pytest.mark.parametrize('pattern, wanted', [
    ('(cat|dog)_', '2 of 6 images without a match of the pattern'),
    ('^(?P<label>[a-z]+)_(?P<split>[0-9])', "'1' in {root}/cat_1.png is not a split"),
])
def test_a_pattern_that_does_not_fit_is_refused(tmp_path, pattern, wanted):
    draw(tmp_path, *(f'{name}_{i}.png' for name in ('cat', 'dog', 'cow') for i in (1, 2)))
    with pytest.raises(InputError, match=re.escape(wanted.format(root=tmp_path))):
        open_data(tmp_path, label_pattern=pattern)


def copies(root, *names):
    """Write copies of one image under these names."""
    draw(root, *names)
    for name in names[1:]:
        shutil.copy(root / names[0], root / name)


def test_identical_images_are_kept_in_one_split(tmp_path):
    draw(tmp_path, *(f'{label}/{i}.png' for label in 'abc' for i in range(20)))
    plain = [side.samples for side in (open_data(tmp_path).train, open_data(tmp_path).val)]
    copies(tmp_path, 'a/0.png', 'a/1.png', 'a/2.png', 'b/0.png')
    copies(tmp_path, 'c/0.png', *(f'c/{i}.png' for i in range(1, 20)))
    copies(tmp_path, 'd/0.png', 'd/1.png', 'e/3.png', 'd/4.png')
    draw(tmp_path, 'd/other.gif', 'e/other.bmp')
    (tmp_path / 'b/link.png').symlink_to(tmp_path / 'b/5.png')
    data = open_data(tmp_path)
    sides = [{path: path.split('/')[-2] for path, _ in side.samples} for side in (data.train, data.val)]
    contents = [{Path(path).read_bytes() for path in side} for side in sides]
    assert not contents[0] & contents[1]
    for label, most in dict(a=4, b=4, c=0, d=1, e=1).items():
        train, val = (list(side.values()).count(label) for side in sides)
        assert train and val == most
    assert any('images have identical copies, which are kept in the same split' in remark for remark in data.remarks)
    assert any(f'{tmp_path}/a/0.png = {tmp_path}/a/1.png = {tmp_path}/a/2.png = {tmp_path}/b/0.png' in remark
               and '8 images are identical to images of another class' in remark for remark in data.remarks)
    moved = {path for path, _ in plain[1] if '/a/' in path} ^ {path for path in sides[1] if '/a/' in path}
    assert len(moved) <= 4  # the others keep their split


def test_identical_images_across_the_splits_of_a_folder_are_reported(tmp_path):
    draw(tmp_path, *SPLITS, 'test/a/5.png')
    copies(tmp_path, 'train/a/1.png', 'val/a/copy.png', 'val/b/wrong.png', 'val/b/too.png')
    os.link(tmp_path / 'train/b/2.png', tmp_path / 'test/a/link.png')
    data = open_data(tmp_path)
    assert data.remarks[0] == (
        '3 of 5 validation images identical to training images, 2 of them only to images of another class: '
        + ', '.join(f'{tmp_path}/val/{name} = {tmp_path}/train/a/1.png'
                    for name in ('a/copy.png', 'b/too.png', 'b/wrong.png'))
        + '; accuracy on them is not meaningful')
    assert '1 of 2 test images identical to training images, 1 of them only to' in data.remarks[1]
    assert '6 images are identical to images of another class' in data.remarks[2]


def test_only_regular_files_of_equal_size_are_compared(tmp_path, monkeypatch):
    big = bytes(100_000)
    for name, content in dict(a=big + b'a', b=big + b'b', c=big + b'a', d=b'x', e=big).items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / 'pipe')
    os.mkfifo(tmp_path / 'other')
    paths = [str(tmp_path / name) for name in ('a', 'b', 'c', 'd', 'e', 'pipe', 'other', 'gone', 'lost')]
    assert identical_files(paths) == [[str(tmp_path / 'a'), str(tmp_path / 'c')]]


def test_classes_may_have_names_of_splits(tmp_path):
    draw(tmp_path, 'valid/1.png', 'valid/2.png', 'invalid/3.png', 'invalid/4.png', 'train/5.png', 'train/6.png')
    assert open_data(tmp_path).classes == ['invalid', 'train', 'valid']


# Images that cannot be used

def spoiled(root):
    """Write 24 images, 7 of which cannot be read; return the paths of these."""
    draw(root, *(f'{label}/{i}.png' for label in 'ab' for i in range(12)))
    for i in range(7):
        (root / f'a/{i}.png').write_bytes(b'')
    return [str(root / f'a/{i}.png') for i in range(7)]


def test_all_images_that_cannot_be_used_are_listed_in_a_file(tmp_path, capsys):
    bad = spoiled(tmp_path / 'images')
    settings = ['finetune', '--data-dir', tmp_path / 'images', '--model', 'test_mobileformer', '--img-size', 32,
                '--epochs', 1, '--workers', 0, '--output', tmp_path / 'out']
    assert main([*map(str, settings)])
    listing = tmp_path / 'out/bad_images.csv'
    assert f'{listing} lists all of them, --skip-bad-images leaves them out' in capsys.readouterr().err
    with listing.open(newline='') as file:
        rows = list(csv.reader(file))
    assert rows[0] == ['path', 'problem'] and sorted(path for path, _ in rows[1:]) == bad
    assert all(problem for _, problem in rows)

    assert not main([*map(str, settings), '--skip-bad-images'])
    out = capsys.readouterr().out
    assert 'skipped 7 images that cannot be used: ' in out
    assert 'bad_images.csv' in next(line for line in out.splitlines() if line.startswith('results of the best epoch'))
    assert sum(map(int, re.search('([0-9]+) training and ([0-9]+) validation images', out).groups())) == 17


def test_a_class_without_usable_images_is_refused(tmp_path):
    draw(tmp_path, *(f'{label}/{i}.png' for label in 'ab' for i in range(4)))
    data = open_data(tmp_path)
    with pytest.raises(InputError, match='no training image of a can be used'):
        data.leave_out({path: 'broken' for path, target in data.train.samples if target == 0})
    with pytest.raises(InputError, match='no validation image can be used'):
        open_data(tmp_path).leave_out({path: 'broken' for path, _ in data.val.samples})


@pytest.mark.parametrize('progressive', [False, True])
def test_a_jpeg_whose_last_bytes_are_missing_is_used_if_no_pixel_is_missing(tmp_path, progressive):
    noise = Image.frombytes('RGB', (64, 48), random.Random(0).randbytes(64 * 48 * 3))
    noise.save(tmp_path / 'whole.jpg', progressive=progressive)
    data = (tmp_path / 'whole.jpg').read_bytes()
    for cut in 1, 2, 20, 2000:
        (tmp_path / f'{cut}.jpg').write_bytes(data[:-cut])
    (tmp_path / 'more.jpg').write_bytes(data + b'trailer')
    paths = [str(tmp_path / f'{name}.jpg') for name in ('whole', 1, 2, 20, 2000, 'more')]
    checked = check_images(paths, 2, skip_bad=True)
    assert list(checked.bad) == paths[3:5] and checked.truncated == paths[1:3]
    assert f'no pixel is missing: {paths[1]}, {paths[2]}' in checked.remarks()[0]
    for path in paths[:3] + paths[5:]:
        assert read_image(path).tobytes() == read_image(paths[0]).tobytes()
    for path in paths[3:5]:
        with pytest.raises(OSError, match='(?i)truncated'):
            read_image(path)


def test_without_a_terminal_progress_is_printed_as_occasional_lines(monkeypatch, capsys):
    seconds = iter(range(0, 1000, 7))
    monkeypatch.setattr('timm_mobileformer.cli.console.time.monotonic', lambda: next(seconds))
    with progress(total=20, desc='checking images', mininterval=0) as bar:
        for _ in range(20):
            bar.update()
            bar.refresh()
    lines = capsys.readouterr().err.splitlines()
    assert 1 < len(lines) < 12 and all(re.match(r'checking images: +[0-9]+%.* [0-9]+/20 \[', line) for line in lines)
