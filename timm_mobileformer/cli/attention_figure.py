"""Draw the attention of the tokens of a Mobile-Former over images."""
import argparse
import warnings
from typing import TYPE_CHECKING, Any, Dict, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import create_transform

from timm_mobileformer.attention import BridgeAttention, attention_maps

from .console import progress
from .files import atomic_dir, save_figure
from .image_checks import check_images
from .images import read_image
from .load import class_names, load_mobileformer, model_data_config, reading_options

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ['draw', 'run']


def shorten(text: Any, inches: float) -> None:
    """Truncate a matplotlib text to a width."""
    name = text.get_text().encode(errors='replace').decode()  # file names may not be valid UTF-8
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph')  # matplotlib draws boxes for glyphs that the font lacks
        for length in range(len(name), 0, -1):
            text.set_text(name if length == len(name) else name[:length] + '…')
            if text.get_window_extent().width <= inches * text.figure.dpi:
                return


def draw(
        image: torch.Tensor,
        maps: Sequence[BridgeAttention],
        top: Sequence[Tuple[str, float]],
        title: str,
) -> 'Figure':
    """Draw an image, its most likely classes, and the attention of every token in every block, in both directions.

    Attention is averaged over the heads and drawn relative to uniform attention, over the positions for Mobile->Former
    and over the tokens for Mobile<-Former, so that maps of all sizes share one color scale.

    Args:
        image: Input image of the model (3, H, W), values from 0 to 1.
        maps: Output of `attention_maps` for this image only, without gradients.
        top: The most likely classes and their probabilities.
        title: Title of the image.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    num_tokens = maps[0].mobile_to_former.shape[2]
    cell, step, size = 0.6, 0.64, 1.8  # inches: a heat map, from one to the next, the image
    x0, y0 = size + 0.95, 0.64  # of the first heat map
    panel = y0 + num_tokens * step + 0.1
    width, height = x0 + len(maps) * step + 0.75, max(2 * panel, y0 + size + 1.3)
    fig = Figure(figsize=(width, height))

    def axes(x: float, y: float, w: float, h: float) -> 'Axes':
        return fig.add_axes((x / width, 1 - (y + h) / height, w / width, h / height))

    def text(x: float, y: float, string: str, **kwargs: Any) -> Any:
        return fig.text(x / width, 1 - y / height, string, parse_math=False, **kwargs)

    axes(0.2, y0, size, size).imshow(image.permute(1, 2, 0).numpy())
    fig.axes[0].set_axis_off()
    shorten(text(0.2, y0 - 0.06, title[:100], fontsize=8, va='bottom'), size)
    for i, (name, probability) in enumerate(top):
        y, weight = y0 + size + 0.1 + 0.2 * i, 'normal' if i else 'bold'
        shorten(text(0.2, y, name[:100], fontsize=8, va='top', weight=weight), size - 0.45)
        text(0.2 + size, y, f'{probability:.1%}', fontsize=8, va='top', ha='right', weight=weight)

    colors, opacity = colormaps['RdBu_r'], 0.75
    gray = image.mean(0)[..., None].numpy()
    for top_y, heading, unit, limit, extend, directed in (
            (0., 'Mobile→Former: positions that each token gathers from', 'relative to uniform', 8, 'both',
             [m.mobile_to_former for m in maps]),
            (panel, 'Mobile←Former: positions that read from each token', 'relative to uniform', num_tokens, 'min',
             [m.former_to_mobile for m in maps]),
    ):
        norm = LogNorm(1 / limit, limit, clip=True)
        y = top_y + y0
        text(x0, top_y + 0.1, heading, fontsize=9, va='top', weight='bold')
        text(x0 - 0.08, y - 0.04, 'block\nmap', fontsize=6.5, va='bottom', ha='right', color='0.4')
        for token in range(num_tokens):
            text(x0 - 0.08, y + token * step + cell / 2, f'token {token}', fontsize=7, va='center', ha='right')
        for i, (m, attn) in enumerate(zip(maps, directed, strict=True)):
            if attn is None:
                continue
            x = x0 + i * step
            num, h, w = attn.shape[2:]
            block = 'last' if m.former_to_mobile is None else m.name.removeprefix('stages.')
            text(x + cell / 2, y - 0.04, f'{block}\n{h}×{w}', fontsize=6.5, va='bottom', ha='center')
            heat = attn.float().mean(1) * (num if directed[-1] is None else h * w)
            for token, ratio in enumerate(F.interpolate(heat, image.shape[1:])[0].numpy()):
                ax = axes(x, y + token * step, cell, cell)
                ax.imshow(opacity * colors(norm(ratio))[..., :3] + (1 - opacity) * gray)
                ax.set_axis_off()
        ax = axes(x0 + len(maps) * step + 0.06, y, 0.09, (num_tokens - 1) * step + cell)
        bar = fig.colorbar(ScalarMappable(norm, colors), cax=ax, extend=extend)
        ticks = {2.**k: f'{2**k}' if k >= 0 else f'1/{2**-k}' for k in range(-3, 4) if 2.**abs(k) <= limit}
        bar.set_ticks(list(ticks), labels=list(ticks.values()), minor=False)
        bar.ax.tick_params(labelsize=6.5)
        bar.ax.minorticks_off()
        bar.set_label(unit, fontsize=7)
    return fig


def arrays(maps: Sequence[BridgeAttention]) -> Dict[str, Any]:
    """Return the attention of one image by block and direction, each (heads, tokens, H, W), see `BridgeAttention`."""
    return {f'{m.name}.{direction}': getattr(m, direction)[0].numpy()
            for m in maps for direction in ('mobile_to_former', 'former_to_mobile')
            if getattr(m, direction) is not None}


def run(args: argparse.Namespace) -> None:
    check_images([str(path) for path in args.images], workers=1)
    model = load_mobileformer(args).eval()
    names = class_names(model, args.class_map)
    config = model_data_config(model, vars(args))
    transform: Any = create_transform(**config)
    mean, std = (torch.tensor(config[k]).view(3, 1, 1) for k in ('mean', 'std'))
    for path, out in zip(progress(args.images, unit='image'), args.output, strict=True):
        x = transform(read_image(path, **reading_options(model)))
        with torch.inference_mode():
            maps, probabilities = attention_maps(model, x[None]), model(x[None]).softmax(dim=1)[0]
        values, indices = probabilities.topk(min(5, len(names)))
        top = [(names[i], v) for i, v in zip(indices.tolist(), values.tolist(), strict=True)]
        with atomic_dir(out.parent) as folder:
            save_figure(draw((x * std + mean).clamp(0, 1), maps, top, path.name), folder / out.name, dpi=200)
            if args.npz:
                np.savez_compressed(folder / f'{out.stem}.npz', **arrays(maps))
        progress.write('\n'.join([f'{path} -> {out}', *(f'{v:7.1%}  {name}' for name, v in top)]))
