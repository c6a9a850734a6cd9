"""Reading images: file formats, color profiles, bit depths, random crops and errors."""
import io
import os
import random
import re
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageCms
from timm.data import create_loader, create_transform, resolve_model_data_config
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.models import save_for_hf

from timm_mobileformer.cli import main
from timm_mobileformer.cli.batches import CachedBatches
from timm_mobileformer.cli.console import InputError
from timm_mobileformer.cli.data import open_data
from timm_mobileformer.cli.dataset import ImageDataset, read_crop
from timm_mobileformer.cli.image_checks import check_images
from timm_mobileformer.cli.images import SUFFIXES, decode, read_image
from timm_mobileformer.cli.metadata import describe

y, x = np.mgrid[:24, :32]
COLORS = np.stack([8 * x, 10 * y, 255 - 4 * (x + y)], -1).clip(0, 255).astype(np.uint8)
GRAY = (8 * x).astype(np.uint8)
HALF = np.where(x < 16, 255, 0).astype(np.uint8)
SHOWN = np.where(x[..., None] < 16, COLORS, 255)  # COLORS with HALF as alpha, on white


def rgb(gray):
    return np.stack([gray] * 3, -1)


def png(array, bits, color, *chunks):
    """Return a PNG of a kind that Pillow can read but not write."""
    height, width = array.shape[:2]
    header = struct.pack('>IIBBBBB', width, height, bits, color, 0, 0, 0)
    rows = b''.join(b'\0' + row.tobytes() for row in array.astype(f'>u{bits // 8}'))
    chunks = (b'IHDR' + header, *chunks, b'IDAT' + zlib.compress(rows), b'IEND')
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(chunk) - 4) + chunk + struct.pack('>I', zlib.crc32(chunk)) for chunk in chunks)


def saved(image, kind='PNG', **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(orientation, kind):
    """Return `COLORS` as a camera in this orientation stores them."""
    exif = Image.Exif()
    exif[274] = orientation
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # inverse Image.Transpose
    return saved(Image.fromarray(COLORS).transpose(Image.Transpose(back)), kind, exif=exif,
                 **(dict(lossless=True, exact=True) if kind == 'WEBP' else {}))


palette = Image.fromarray(GRAY).convert('P')
palette.putpalette([value for i in range(256) for value in (i, 255 - i, 7)])
PALETTE = np.stack([GRAY, 255 - GRAY, np.full_like(GRAY, 7)], -1)
see_through = Image.fromarray(np.dstack([COLORS, HALF]))
twelve_bits = (GRAY.astype(np.uint32) * 4095 // 248).astype(np.uint16)

KINDS = {
    'RGB': (saved(Image.fromarray(COLORS)), COLORS),
    'gray': (saved(Image.fromarray(GRAY)), rgb(GRAY)),
    '1 bit': (saved(Image.fromarray(HALF).convert('1')), rgb(HALF)),
    'palette': (saved(palette), PALETTE),
    'palette, one colour transparent': (saved(palette, transparency=8), np.where((GRAY == 8)[..., None], 255, PALETTE)),
    'palette, transparency of every colour': (saved(palette, transparency=bytes(255 * (i != 8) for i in range(256))),
                                              np.where((GRAY == 8)[..., None], 255, PALETTE)),
    'RGBA': (saved(see_through), SHOWN),
    'RGBA, half transparent': (saved(Image.fromarray(np.dstack([COLORS, np.full_like(GRAY, 102)]))),
                               255 - (255 - COLORS.astype(int)) * 2 / 5),
    'RGBA, WebP': (saved(see_through, 'WEBP', lossless=True), SHOWN),
    'RGBA, TIFF': (saved(see_through, 'TIFF'), SHOWN),
    'RGB, one colour transparent': (png(COLORS, 8, 2, struct.pack('>4sHHH', b'tRNS', *COLORS[5, 5])),
                                    np.where(np.equal(COLORS, COLORS[5, 5]).all(-1, keepdims=True), 255, COLORS)),
    'gray with alpha': (saved(Image.fromarray(np.dstack([GRAY, HALF]), 'LA')), rgb(np.where(HALF, GRAY, 255))),
    'gray, one transparent': (saved(Image.fromarray(GRAY), transparency=16), rgb(np.where(GRAY == 16, 255, GRAY))),
    'GIF, transparent': (saved(palette, 'GIF', transparency=8), np.where((GRAY == 8)[..., None], 255, PALETTE)),
    'CMYK, TIFF': (saved(Image.fromarray(np.dstack([255 - COLORS, 0 * GRAY]), 'CMYK'), 'TIFF'), COLORS),
    '16 bits': (png(GRAY * 257., 16, 0), rgb(GRAY)),
    '16 bits, one transparent': (png(GRAY * 257., 16, 0, struct.pack('>4sH', b'tRNS', 16 * 257)),
                                 rgb(np.where(GRAY == 16, 255, GRAY))),
    '16 bits, RGB': (png(COLORS * 257., 16, 2), COLORS),
    '16 bits, RGBA': (png(np.dstack([COLORS, HALF]) * 257., 16, 6), SHOWN),
    '16 bits, TIFF': (saved(Image.fromarray(GRAY.astype(np.uint16) * 257), 'TIFF'), rgb(GRAY)),
    '12 of 16 bits': (saved(Image.fromarray(twelve_bits)), rgb(twelve_bits / 4095 * 255)),
    '8 of 16 bits': (saved(Image.fromarray(GRAY.astype(np.uint16))), rgb(GRAY)),
    '32 bits with signs': (saved(Image.fromarray(GRAY.astype(np.int32) * 40 - 1000), 'TIFF'), rgb(GRAY / 248 * 255)),
    'float': (saved(Image.fromarray(GRAY.astype(np.float32) / 1000), 'TIFF'), rgb(GRAY / 248 * 255)),
    'float, not all finite': (saved(Image.fromarray(np.where(HALF, GRAY, [[np.nan], [np.inf]] * 12).astype(np.float32)),
                                    'TIFF'), rgb(np.where(HALF, GRAY / 120 * 255, [[0], [255]] * 12))),
    'float, all the same': (saved(Image.fromarray(np.full((24, 32), 7, np.float32)), 'TIFF'), np.zeros_like(COLORS)),
    'several': (saved(Image.fromarray(COLORS), 'TIFF', save_all=True, append_images=[Image.fromarray(GRAY)]), COLORS),
    **{f'turned, {kind} {i}': (turned(i, kind), COLORS) for kind in ('PNG', 'WEBP', 'TIFF') for i in range(2, 9)},
}


@pytest.mark.parametrize('kind', KINDS)
def test_an_image_is_read_as_a_viewer_shows_it(tmp_path, kind):
    data, wanted = KINDS[kind]
    (tmp_path / 'image').write_bytes(data)
    image = read_image(tmp_path / 'image')
    assert image.mode == 'RGB'
    assert np.abs(np.asarray(image, float) - wanted).max() <= 1


@pytest.mark.parametrize('kind', ['turned, PNG 6', 'CMYK, TIFF', 'RGB'])
def test_a_jpeg_is_read_as_a_viewer_shows_it_but_for_compression(tmp_path, kind):
    with Image.open(io.BytesIO(KINDS[kind][0])) as image:
        image.save(tmp_path / 'image', 'JPEG', quality=100, subsampling=0, exif=image.getexif())
    assert np.abs(np.asarray(read_image(tmp_path / 'image'), float) - COLORS).mean() < 2


def test_a_large_jpeg_is_read_in_full_size(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'large.jpg')
    with Image.open(tmp_path / 'large.jpg') as image:
        wanted = np.asarray(image.convert('RGB'))
    assert np.array_equal(np.asarray(read_image(tmp_path / 'large.jpg')), wanted)


# Color profiles

ADOBE_RGB = ((0.60974, 0.20528, 0.14919), (0.31111, 0.62567, 0.06322), (0.01947, 0.06087, 0.74457))  # to XYZ, D50
SRGB = ((0.43607, 0.38515, 0.14307), (0.22249, 0.71687, 0.06061), (0.01392, 0.09708, 0.71410))


def fixed(*numbers):
    return b''.join(struct.pack('>i', round(n * 65536)) for n in numbers)


def icc(space, **tags):
    """Return an ICC profile of version 2.4."""
    tags = {'wtpt': b'XYZ \0\0\0\0' + fixed(0.9642, 1, 0.8249), **tags}
    table, data = struct.pack('>I', len(tags)), b''
    for name, content in tags.items():
        table += name.encode() + struct.pack('>II', 132 + 12 * len(tags) + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    pcs = b'Lab ' if 'A2B0' in tags else b'XYZ '
    header = (struct.pack('>I4sI', 128 + len(table + data), b'', 0x02400000) + b'mntr' + space + pcs + bytes(12)
              + b'acsp' + bytes(28) + fixed(0.9642, 1, 0.8249))
    return header.ljust(128, b'\0') + table + data


def gamma(value):
    return b'curv\0\0\0\0' + struct.pack('>IH', 1, round(value * 256))


def matrix_profile(matrix, curve):
    colorants = {f'{c}XYZ': b'XYZ \0\0\0\0' + fixed(*column) for c, column in zip('rgb', zip(*matrix, strict=True),
                                                                                  strict=True)}
    return icc(b'RGB ', **colorants, **{f'{c}TRC': gamma(curve) for c in 'rgb'})


def encode(linear):
    """Convert linear values in 0 to 1 to sRGB values in 0 to 255."""
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def from_adobe_rgb(pixels):
    return encode((pixels / 255) ** 2.2 @ np.array(ADOBE_RGB).T @ np.linalg.inv(SRGB).T)


ADOBE = matrix_profile(ADOBE_RGB, 2.19921875)
GRAY_2_2 = icc(b'GRAY', kTRC=gamma(2.19921875))
DARK = icc(b'GRAY', kTRC=gamma(3))
PROFILES = {
    'RGB': (saved(Image.fromarray(COLORS), icc_profile=ADOBE), from_adobe_rgb(COLORS)),
    'RGB, TIFF': (saved(Image.fromarray(COLORS), 'TIFF', icc_profile=ADOBE), from_adobe_rgb(COLORS)),
    'RGB, WebP': (saved(Image.fromarray(COLORS), 'WEBP', lossless=True, icc_profile=ADOBE), from_adobe_rgb(COLORS)),
    'RGBA': (saved(see_through, icc_profile=ADOBE), np.where(x[..., None] < 16, from_adobe_rgb(COLORS), 255)),
    'palette': (saved(palette, icc_profile=ADOBE), from_adobe_rgb(PALETTE / 1)),
    'gray': (saved(Image.fromarray(GRAY), icc_profile=DARK), encode((rgb(GRAY) / 255) ** 3)),
    'gray with alpha': (saved(Image.fromarray(np.dstack([GRAY, HALF]), 'LA'), icc_profile=DARK),
                        encode((rgb(np.where(HALF, GRAY, 255)) / 255) ** 3)),
    '16 bits': (saved(Image.fromarray(GRAY.astype(np.uint16) * 257), 'TIFF', icc_profile=DARK),
                encode((rgb(GRAY) / 255) ** 3)),
}


@pytest.mark.parametrize('kind', PROFILES)
def test_a_color_profile_is_applied(tmp_path, kind):
    data, wanted = PROFILES[kind]
    (tmp_path / 'image').write_bytes(data)
    difference = np.abs(np.asarray(read_image(tmp_path / 'image'), float) - wanted)
    assert difference.max() <= 4 and difference.mean() < 0.7  # of 255; the slopes of the curves near black differ


def test_a_cmyk_color_profile_is_applied(tmp_path):
    lab = [(255, 128, 128)] * 16  # paper white
    lab[8] = (128, 98, 78)  # full cyan
    identity = bytes(range(256))
    table = (b'mft1\0\0\0\0' + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + 4 * identity
             + bytes(value for color in lab for value in color) + 3 * identity)
    inks = np.zeros((2, 2, 4), np.uint8)
    inks[0, :, 0] = 255
    Image.fromarray(inks, 'CMYK').save(tmp_path / 'image.tif', icc_profile=icc(b'CMYK', A2B0=table))
    cyan, paper = np.asarray(read_image(tmp_path / 'image.tif'), float)[:, 0]
    assert np.abs(cyan - (0, 133, 200)).max() < 12 and paper.min() > 252  # Lab 50, -30, -50


@pytest.mark.parametrize('profile', [
    matrix_profile(SRGB, 2.2)[:200], b'no profile', DARK,
    ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes(),
], ids=['damaged', 'none', 'of grays', 'sRGB'])
def test_an_invalid_profile_and_srgb_leave_the_pixels_unchanged(tmp_path, profile):
    Image.fromarray(COLORS).save(tmp_path / 'image.png', icc_profile=profile)
    assert np.array_equal(np.asarray(read_image(tmp_path / 'image.png')), COLORS)


# 16-bit grayscale

def grays(folder, **maxima):
    for name, maximum in maxima.items():
        Image.fromarray(np.linspace(0, maximum, 48, dtype=np.uint16).reshape(6, 8)).save(folder / f'{name}.png')
    return [str(folder / f'{name}.png') for name in maxima]


@pytest.mark.parametrize('maxima, level', [
    (dict(a=200, b=255), 255), (dict(a=300, b=1023), 1023), (dict(a=300, b=4095), 4095), (dict(a=4096, b=0), 16383),
    (dict(a=16384, b=1), 65535),
])
def test_16_bit_images_of_a_data_set_share_the_smallest_bit_depth_that_holds_them(tmp_path, maxima, level):
    paths = grays(tmp_path, **maxima)
    assert check_images(paths, 2).white_level == level
    for path, maximum in zip(paths, maxima.values(), strict=True):
        assert np.asarray(read_image(path, white_level=level)).max() == round(maximum / level * 255)


def test_with_a_white_level_a_larger_maximum_does_not_rescale_an_image(tmp_path):
    images = [np.asarray(read_image(path, white_level=4095), int) for path in grays(tmp_path, a=4095, b=4096)]
    assert np.abs(images[0] - images[1]).max() <= 1


def test_8_bit_and_float_images_have_no_white_level(tmp_path):
    Image.fromarray(GRAY).save(tmp_path / 'a.png')
    Image.fromarray(GRAY.astype(np.float32)).save(tmp_path / 'b.tif')
    assert check_images([str(tmp_path / 'a.png'), str(tmp_path / 'b.tif')], 1).white_level is None


# Random crops for training

def smooth(width, height):
    """Return an image of waves long enough to survive downscaling."""
    rows, columns = np.mgrid[:height, :width] / 40
    waves = [np.sin(columns + rows / 2), np.cos(rows - columns / 3), np.sin(rows + columns)]
    return Image.fromarray((128 + 100 * np.stack(waves, -1)).astype(np.uint8))


@pytest.mark.parametrize('kind', ['JPEG', 'PNG'])
@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic', 'random'])
@pytest.mark.parametrize('size', [(300, 200), (200, 300), (50, 40), (300, 20)])
def test_a_crop_equals_that_of_timm_unless_a_jpeg_is_decoded_smaller(tmp_path, kind, interpolation, size):
    smooth(*size).save(tmp_path / 'image', kind)
    crop = RandomResizedCropAndInterpolation((96, 128), scale=(0.3, 1), interpolation=interpolation)
    for seed in range(5):
        random.seed(seed)
        got, state = read_crop(tmp_path / 'image', crop), random.getstate()
        random.seed(seed)
        assert np.array_equal(np.asarray(got), np.asarray(crop(read_image(tmp_path / 'image'))))
        assert random.getstate() == state


@pytest.mark.parametrize('orientation', range(1, 9))
def test_a_crop_of_a_large_jpeg_is_decoded_at_a_smaller_size(tmp_path, monkeypatch, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    smooth(1203, 901).save(tmp_path / 'image.jpg', exif=exif, quality=95)
    decoded = []
    monkeypatch.setattr('timm_mobileformer.cli.dataset.decode',
                        lambda image, *args: decoded.append(image.size) or decode(image, *args))
    divisors = set()
    for size in (32, 36), (96, 72), (224, 224):
        crop = RandomResizedCropAndInterpolation(size, scale=(0.2, 1), interpolation='bilinear')
        for seed in range(8):
            random.seed(seed)
            got = np.asarray(read_crop(tmp_path / 'image.jpg', crop), float)
            random.seed(seed)
            wanted = np.asarray(crop(read_image(tmp_path / 'image.jpg')), float)
            assert np.abs(got - wanted).mean() < 0.7 and np.abs(got - wanted).max() < 12

            random.seed(seed)
            shape = (901, 1203) if orientation < 5 else (1203, 901)
            *_, height, width = crop.get_params(torch.empty(shape), crop.scale, crop.ratio)
            divisor = round(1203 / decoded[-1][0])
            divisors.add(divisor)
            detail = min(height / size[0], width / size[1]) / divisor
            assert (detail >= 2 or divisor == 1) and (detail < 4 or divisor == 8)
    assert divisors == {1, 2, 4, 8}


def test_random_crops_are_read_in_training_only(tmp_path):
    smooth(600, 400).save(tmp_path / 'image.jpg')
    dataset = ImageDataset([(str(tmp_path / 'image.jpg'), 3)])
    loader = create_loader(dataset, (3, 64, 64), 1, num_workers=0, device=torch.device('cpu'), use_prefetcher=False)
    transform = create_transform((3, 64, 64))
    for images, targets in loader:
        assert torch.equal(images[0], transform(read_image(tmp_path / 'image.jpg'))) and targets.tolist() == [3]
    create_loader(dataset, (3, 64, 64), 1, is_training=True, hflip=0, color_jitter=0, device=torch.device('cpu'))
    random.seed(0)
    image = dataset[0][0]
    random.seed(0)
    crop = read_crop(tmp_path / 'image.jpg', dataset.transform.transforms[0])
    assert np.array_equal(image.numpy().transpose(1, 2, 0), np.asarray(crop))


def test_validation_images_are_cached_if_they_fit_into_the_budget(tmp_path):
    for i in range(3):
        smooth(80, 60 + i).save(tmp_path / f'{i}.jpg')
    dataset = ImageDataset([(str(tmp_path / f'{i}.jpg'), i) for i in range(3)])
    loader: Any = create_loader(dataset, (3, 32, 32), 2, num_workers=0, device=torch.device('cpu'))
    wanted, batches = list(loader), loader.loader
    kept, not_kept = CachedBatches(batches), CachedBatches(batches, budget=3 * 3 * 32 * 32 - 1)
    for loader.loader in kept, not_kept:
        assert all(torch.equal(a, b) for got, want in zip(loader, wanted, strict=True)
                   for a, b in zip(got, want, strict=True))
    for file in tmp_path.iterdir():
        file.unlink()
    loader.loader = kept
    assert all(torch.equal(got[0], want[0]) for got, want in zip(loader, wanted, strict=True))
    with pytest.raises(InputError):
        list(not_kept)


# Pillow plugins

def test_heic_images_are_read(tmp_path):
    pytest.importorskip('pillow_heif', reason='pillow-heif reads HEIC')
    upright = smooth(96, 64)
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    stored.getexif()[274] = 6
    for i, name in enumerate(('a/1.heic', 'a/2.HEIC', 'b/3.heif', 'b/4.HEIC')):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        stored.save(tmp_path / name, 'HEIF', quality=95 - 10 * i)
    data = open_data(tmp_path)
    assert len(data.train) == len(data.val) == 2
    assert check_images([path for path, _ in data.train.samples], 1).white_level is None
    image = read_image(tmp_path / 'a/1.heic')
    assert image.size == (96, 64)
    assert np.abs(np.asarray(image, float) - np.asarray(upright, float)).mean() < 5


@pytest.mark.parametrize('suffix, package', [('.jxl', 'pillow-jxl-plugin'), ('.heic', 'pillow-heif')])
def test_the_package_of_a_missing_plugin_is_named(tmp_path, monkeypatch, suffix, package):
    monkeypatch.setattr('timm_mobileformer.cli.folders.SUFFIXES', SUFFIXES - {suffix})
    for i, name in enumerate(('a/1.png', 'a/2.png', 'b/3.png', 'b/4.png', f'b/5{suffix}')):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(GRAY // (i + 1)).save(tmp_path / name, 'PNG')
    assert f'ignored files: 1 {suffix} (to read them, pip install {package})' in open_data(tmp_path).remarks


@pytest.mark.parametrize('name, spoil', [
    ('a.png', lambda path: path.write_bytes(path.read_bytes()[:-40])),
    ('a.jpg', lambda path: path.write_bytes(path.read_bytes()[:-40])),
    ('a.png', lambda path: path.write_bytes(b'not an image')),
    ('a.png', lambda path: (path.unlink(), path.symlink_to('nowhere'))),
    ('a.png', lambda path: (path.unlink(), path.symlink_to(path))),
    ('a.png', lambda path: (path.unlink(), os.mkfifo(path))),
    ('a.png', lambda path: Image.new('L', (1001, 1)).save(path)),
])
def test_an_image_that_cannot_be_used_is_named(tmp_path, name, spoil):
    for i, file in enumerate((name, 'b.png')):
        Image.new('RGB', (8, 6), (40 * i, 0, 0)).save(tmp_path / file)
    spoil(tmp_path / name)
    with pytest.raises(InputError, match=re.escape(f'1 of 2 images cannot be used: {tmp_path / name} (')):
        check_images([str(tmp_path / name), str(tmp_path / 'b.png')], 2)


# Commands

@pytest.fixture(scope='module')
def gray_images(tmp_path_factory):
    """Class folders of 12-bit grayscale images."""
    folder, generator = tmp_path_factory.mktemp('gray'), np.random.default_rng(0)
    for i in range(12):
        (path := folder / 'ab'[i % 2] / f'{i}.png').parent.mkdir(exist_ok=True)
        pixels = generator.integers(0, 2048, (40, 40)) + 2047 * (i % 2)
        Image.fromarray(pixels.astype(np.uint16)).save(path)
    return folder


def saved_model(folder, channels):
    model = timm.create_model('test_mobileformer', in_chans=channels, num_classes=2)
    model.pretrained_cfg.update(input_size=(channels, 32, 32), mean=[0.5] * channels, std=[0.5] * channels)
    save_for_hf(model, folder, safe_serialization=True)
    return str(folder)


@pytest.mark.parametrize('channels', [1, 3])
def test_the_white_level_is_saved_with_the_model_for_prediction_and_export(tmp_path, gray_images, channels, capsys):
    work = tmp_path / 'work'
    start = saved_model(tmp_path / 'start', channels)
    assert not main(['finetune', '--data-dir', str(gray_images), '--model', start, '--img-size', '32', '--epochs', '1',
                     '--workers', '0', '--output', str(work)])
    model: Any = timm.create_model(f'local-dir:{work}', pretrained=True).eval()
    data_config = resolve_model_data_config(model)
    about = describe(model, data_config, ['a', 'b'])
    assert about['input_white_level'] == 4095 and about['input_color'] == {1: 'L', 3: 'RGB'}[channels]

    values = np.linspace(0, 900, 48, dtype=np.uint16).reshape(6, 8)  # 10 bits without the saved white level
    Image.fromarray(values).save(tmp_path / 'dark.png')
    pixels = Image.fromarray(np.rint(values / 4095 * 255).astype(np.uint8)).convert(about['input_color'])
    wanted = model(create_transform(**data_config)(pixels)[None]).softmax(1).max().item()
    capsys.readouterr()
    assert not main(['predict', str(tmp_path / 'dark.png'), '--model', str(work), '--workers', '0'])
    assert float(capsys.readouterr().out.splitlines()[1].split(',')[2]) == pytest.approx(wanted, abs=2e-4)


def test_a_model_with_4_input_channels_is_refused_before_any_image_is_read(tmp_path, capsys):
    for name in 'a/1.png', 'a/2.png', 'b/3.png', 'b/4.png':
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f'no image {name}')
    start = saved_model(tmp_path / 'start', 4)
    assert main(['finetune', '--data-dir', str(tmp_path), '--model', start, '--output', str(tmp_path / 'out')])
    assert 'takes images of 4 channels, but files are read as 3 (RGB) or 1 (gray)' in capsys.readouterr().err
