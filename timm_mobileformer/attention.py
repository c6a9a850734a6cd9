"""What the tokens see: the attention on every bridge between image and tokens, as tensors and as pictures.

    python -m timm_mobileformer.attention IMAGE... --model NAME [--pretrained | --checkpoint FILE] --out tokens.png
"""
import argparse
import os
import textwrap
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, NamedTuple, NoReturn, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from timm.data import (
    CustomDatasetInfo,
    DatasetInfoLabelMapper,
    ImageNetInfo,
    create_dataset,
    create_transform,
    infer_imagenet_subset,
    resolve_model_data_config,
)
from timm.data.readers.class_map import load_class_map
from timm.models import create_model, get_arch_name, list_models, load_state_dict
from timm.models._features import FeatureGetterNet
from timm.utils.checkpoint_saver import load_checkpoint_metadata
from tqdm import tqdm

from .checkpoint import checkpoint_filter_fn
from .mobileformer import FormerToMobile, MobileFormer, MobileToFormer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ['BridgeAttention', 'attention_maps']


class BridgeAttention(NamedTuple):
    """The attention on the two bridges of one block, or on the last bridge (Sec. 3.1, Eq. 1 and 2).

    Attributes:
        name: The block, such as 'stages.1.0', or 'mobile_to_former' for the last bridge.
        mobile_to_former: Mobile->Former (B, heads, M, H, W): where in the block's input each token gathers; sums to 1
            over the positions. The last bridge serves the first token alone: (B, heads, 1, H, W).
        former_to_mobile: Mobile<-Former (B, heads, M, H / stride, W / stride): from which tokens each position of the
            block's output takes; sums to 1 over the tokens. None for the last bridge, which has one direction only.
    """
    name: str
    mobile_to_former: torch.Tensor
    former_to_mobile: Optional[torch.Tensor]


def _scores(tokens: torch.Tensor, x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Scaled products of tokens (B, M, C) and positions (B, C, H, W) in every head: (B, heads, M, H, W)."""
    tokens = rearrange(tokens, 'b m (n c) -> b n m c', n=num_heads)
    x = rearrange(x, 'b (n c) h w -> b n c h w', n=num_heads)
    return torch.einsum('bnmc,bnchw->bnmhw', tokens * tokens.shape[3] ** -0.5, x)


@contextmanager
def _recording(model: nn.Module) -> Iterator[List[BridgeAttention]]:
    """Put the model in evaluation mode and record, at every bridge, what the attention there is made of."""
    net = model.model if isinstance(model, FeatureGetterNet) else model
    compiled = any(m._compiled_call_impl is not None for m in model.modules())
    if compiled or not isinstance(net, MobileFormer):
        raise TypeError(
            'attention is read inside a Mobile-Former as create_model returns it, with features_only or without, '
            f'before it is compiled, scripted or wrapped; not in {"compiled " * compiled}{type(net).__name__}')

    maps: List[BridgeAttention] = []
    names = {m: n.removesuffix('.mobile_to_former') for n, m in net.named_modules() if isinstance(m, MobileToFormer)}

    def record(bridge: nn.Module, args: Tuple[torch.Tensor, torch.Tensor]) -> None:
        x, z = args
        if isinstance(bridge, MobileToFormer):
            scores = _scores(bridge.q(z), x, bridge.num_heads)
            attn = scores.flatten(3).softmax(dim=3).view_as(scores)
            maps.append(BridgeAttention(names[bridge], attn, None))
        elif isinstance(bridge, FormerToMobile):
            attn = _scores(bridge.k(z), x, bridge.num_heads).softmax(dim=2)
            maps[-1] = maps[-1]._replace(former_to_mobile=attn)

    modes = [(m, m.training) for m in model.modules()]
    checkpointing = [(stage, stage.grad_checkpointing) for stage in net.stages]
    with ExitStack() as hooks:
        for module in net.modules():
            if isinstance(module, (MobileToFormer, FormerToMobile)):
                hooks.enter_context(module.register_forward_pre_hook(record))
        try:
            model.eval()
            net.set_grad_checkpointing(False)  # which would run the blocks again in backward, without the hooks
            yield maps
        finally:
            for stage, enabled in checkpointing:
                stage.grad_checkpointing = enabled
            for module, mode in modes:
                module.training = mode


def attention_maps(model: nn.Module, images: torch.Tensor) -> List[BridgeAttention]:
    """The attention that a Mobile-Former pays, in both directions of every bridge.

    The model runs once in evaluation mode and is left as it was. As with a call of the model, the result is part of
    the autograd graph unless the caller says `torch.no_grad()`, so a loss or a saliency method may use it; device,
    dtype and autocast are the caller's too.

    Args:
        model: A Mobile-Former, also with `features_only` or after `reparameterize_model`.
        images: Preprocessed images (B, in_chans, H, W).

    Returns:
        One `BridgeAttention` for each Mobile-Former block in order, then one for the last bridge if the model has it
        (with `features_only` it has not).

    Raises:
        TypeError: The model is no Mobile-Former, or it is compiled, scripted or wrapped.
    """
    with _recording(model) as maps:
        model(images)
    return maps


def draw(
        image: torch.Tensor,
        maps: Sequence[BridgeAttention],
        top: Sequence[Tuple[str, float]],
        title: str,
) -> 'Figure':
    """Draw an image, its most likely classes, and over it the attention of tokens x blocks, in both directions.

    Attention is averaged over the heads and shown as a multiple of an even spread, over the positions for
    Mobile->Former and over the tokens for Mobile<-Former, so that maps of all sizes share one colour scale.

    Args:
        image: The image that the model saw (3, H, W), values 0 ... 1.
        maps: What `attention_maps` returned for this image alone, without gradients.
        top: The most likely classes and their probabilities.
        title: Line over the image.
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

    def text(x: float, y: float, string: str, **kwargs: Any) -> None:
        fig.text(x / width, 1 - y / height, string, parse_math=False, **kwargs)

    axes(0.2, y0, size, size).imshow(image.permute(1, 2, 0).numpy())
    fig.axes[0].set_axis_off()
    text(0.2, y0 - 0.06, _shorten(title, 28), fontsize=8, va='bottom')
    for i, (name, probability) in enumerate(top):
        y, weight = y0 + size + 0.1 + 0.2 * i, 'normal' if i else 'bold'
        name = _shorten(name.split(',')[0], 20)  # the first of an ImageNet class's synonyms
        text(0.2, y, name, fontsize=8, va='top', weight=weight)
        text(0.2 + size, y, f'{probability:.1%}', fontsize=8, va='top', ha='right', weight=weight)

    colours, opacity = colormaps['RdBu_r'], 0.75
    gray = image.mean(0)[..., None].numpy()
    for top_y, heading, unit, limit, extend, directed in (
            (0., 'Mobile→Former: where each token gathers from', 'times an even spread', 8, 'both',
             [m.mobile_to_former for m in maps]),
            (panel, 'Mobile←Former: where each token gives to', 'times an equal share', num_tokens, 'min',
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
                ax.imshow(opacity * colours(norm(ratio))[..., :3] + (1 - opacity) * gray)
                ax.set_axis_off()
        ax = axes(x0 + len(maps) * step + 0.06, y, 0.09, (num_tokens - 1) * step + cell)
        bar = fig.colorbar(ScalarMappable(norm, colours), cax=ax, extend=extend)
        ticks = {2.**k: f'{2**k}' if k >= 0 else f'1/{2**-k}' for k in range(-3, 4) if 2.**abs(k) <= limit}
        bar.set_ticks(list(ticks), labels=list(ticks.values()), minor=False)
        bar.ax.tick_params(labelsize=6.5)
        bar.ax.minorticks_off()
        bar.set_label(unit, fontsize=7)
    return fig


def _shorten(string: str, width: int) -> str:
    return string if len(string) <= width else string[:width - 1] + '…'


def _load_model(args: argparse.Namespace) -> Tuple[MobileFormer, Dict[str, Any]]:
    """The model in evaluation mode and the preprocessing of its images, as in training unless `args` say otherwise."""
    known = list_models(module='mobileformer')
    if ':' not in args.model and get_arch_name(args.model) not in known:  # hf-hub: and local-dir: show what they hold
        raise ValueError(f'{args.model} is no Mobile-Former; these are: {", ".join(known)}')
    if args.checkpoint and not os.path.isfile(args.checkpoint):
        raise ValueError(f'no such checkpoint: {args.checkpoint}')

    model: Any = create_model(args.model, pretrained=not args.checkpoint)
    if not isinstance(model, MobileFormer):
        raise ValueError(f'{args.model} holds a {type(model).__name__}, no Mobile-Former')
    saved: Any = {}
    if args.checkpoint:
        try:
            state_dict = load_state_dict(args.checkpoint)
            if not args.checkpoint.endswith('.safetensors'):
                saved = load_checkpoint_metadata(args.checkpoint).get('args') or {}
                saved = saved if isinstance(saved, dict) else vars(saved)
        except Exception as e:  # a file of another kind makes its reader raise anything
            reason = str(e).split('. ')[0] or type(e).__name__  # the first sentence; timm goes on to advise
            raise ValueError(f'cannot read {args.checkpoint} as a checkpoint: {reason}') from e
        state_dict = checkpoint_filter_fn(state_dict, model)
        model.reset_classifier(len(state_dict.get('classifier.bias', ())))
        model.load_state_dict(state_dict)
    if model.num_classes == 0:
        raise ValueError(f'the weights of {args.checkpoint or args.model} have no classifier')
    if args.num_classes not in (None, model.num_classes):
        raise ValueError(f'--num-classes {args.num_classes}, but the weights have {model.num_classes} classes')
    if args.img_size is not None:
        if args.img_size < 32:
            raise ValueError(f'--img-size must be at least 32, not {args.img_size}')
        saved = {**saved, 'input_size': None, 'img_size': args.img_size}
    return model.eval(), resolve_model_data_config(model, saved)


def _load_names(args: argparse.Namespace, model: MobileFormer) -> Callable[[int], str]:
    """The name of a class by its index."""
    cfg: Dict[str, Any] = getattr(model, 'pretrained_cfg', {})
    names, descriptions = cfg.get('label_names'), cfg.get('label_descriptions')
    if args.class_map or args.data_dir:
        if args.class_map:
            class_to_idx = load_class_map(args.class_map)
        elif not os.path.isdir(args.data_dir):
            raise ValueError(f'no such folder: {args.data_dir}')
        else:
            class_to_idx = create_dataset('', root=args.data_dir, split='train').reader.class_to_idx
        names, descriptions = {i: name for name, i in class_to_idx.items()}, None
        if len(names) != model.num_classes:
            raise ValueError(
                f'{args.class_map or args.data_dir} names {len(names)} classes, the model has {model.num_classes}')
    if names is not None and len(names) == model.num_classes:
        return DatasetInfoLabelMapper(CustomDatasetInfo(names, descriptions))
    subset = infer_imagenet_subset(model)
    return DatasetInfoLabelMapper(ImageNetInfo(subset)) if subset is not None else 'class {}'.format


def _load_image(path: Path) -> Image.Image:
    if path.is_dir():
        raise ValueError(f'{path} is a folder; name the images in it, {path / "*"}')
    try:
        with Image.open(path) as image:
            return image.convert('RGB')
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise ValueError(f'cannot read the image {path}: {e}') from e


def _name_outputs(out: Path, images: Sequence[Path]) -> List[Path]:
    """A file for each image: tokens.png for one; tokens-1-CAT.png, tokens-2-DOG.png for CAT.jpg and DOG.jpg."""
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if out.suffix[1:].lower() not in formats:
        raise ValueError(f'--out {out} must end in one of {", ".join(sorted(formats))}')
    outs = [out]
    if len(images) > 1:
        digits = len(str(len(images)))
        outs = [out.with_stem(f'{out.stem}-{i:0{digits}}-{p.stem}') for i, p in enumerate(images, 1)]
    for path in outs:
        if path.is_dir() or path.resolve() in [i.resolve() for i in images]:
            raise ValueError(f'--out would overwrite {path}')
    return outs


def main() -> None:
    parser = argparse.ArgumentParser(
        prog='python -m timm_mobileformer.attention',
        description='Draw what the tokens of a Mobile-Former attend to in images, block by block, in both directions, '
                    'and print the five most likely classes.')
    parser.add_argument('images', metavar='IMAGE', type=Path, nargs='+')
    parser.add_argument('--model', '-m', required=True, help='model architecture, or hf-hub:… or local-dir:…')
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument('--pretrained', action='store_true', help='use pretrained weights (the default)')
    weights.add_argument('--checkpoint', metavar='FILE', help='use the weights of a checkpoint')
    parser.add_argument('--num-classes', type=int, metavar='N', help='number of classes that the weights must have')
    parser.add_argument('--img-size', type=int, metavar='N', help='image size (default: as in training)')
    names = parser.add_mutually_exclusive_group()
    names.add_argument('--class-map', metavar='FILE', help='names of the classes, one a line (.txt)')
    names.add_argument('--data-dir', metavar='DIR', help='data set whose folders are the names of the classes')
    parser.add_argument('--out', type=Path, default=Path('tokens.png'), metavar='FILE',
                        help='picture to write; of several images, numbered and named after each (default: tokens.png)')
    args = parser.parse_args()

    def fail(e: Exception) -> NoReturn:
        parser.exit(2, f'{parser.prog}: error: {textwrap.shorten(str(e) or repr(e), 500, placeholder=" …")}\n')

    try:
        outs = _name_outputs(args.out, args.images)
        for path in args.images:
            _load_image(path)
        model, config = _load_model(args)
        to_name = _load_names(args, model)
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError) as e:
        fail(e)

    transform = create_transform(**config)
    mean, std = (torch.tensor(config[k]).view(3, 1, 1) for k in ('mean', 'std'))
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        for path, out in zip(tqdm(args.images, unit='image', disable=len(outs) == 1), outs, strict=True):
            x = transform(_load_image(path))
            with torch.inference_mode(), _recording(model) as maps:
                probabilities = model(x[None]).softmax(dim=1)[0]
            values, indices = probabilities.topk(min(5, model.num_classes))
            top = [(to_name(i), v) for i, v in zip(indices.tolist(), values.tolist(), strict=True)]
            draw((x * std + mean).clamp(0, 1), maps, top, path.name).savefig(out, dpi=200)
            tqdm.write('\n'.join([f'{path} -> {out}', *(f'{v:7.1%}  {name}' for name, v in top)]))
    except OSError as e:
        fail(e)


if __name__ == '__main__':
    main()
