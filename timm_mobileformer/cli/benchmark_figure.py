"""Plot of published accuracy over measured latency."""
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Sequence, Tuple

from timm_mobileformer.authors import PAPER_TOP1

from .benchmark import RUNTIMES
from .files import save_figure
from .published import PUBLISHED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .benchmarking import Row

__all__ = ['draw', 'other_sizes']


def other_sizes(rows: Sequence['Row']) -> str:
    """Return a remark if latencies and published accuracies are for different image sizes, else ''."""
    sizes = [(row.x.shape[-1], PUBLISHED[row.name].size) for row in rows]
    if all(measured == scored for measured, scored in sizes):
        return ''
    measured, scored = (', '.join(f'{n} × {n}' for n in sorted(set(column))) for column in zip(*sizes, strict=True))
    return f'latencies are for images of {measured} pixels, published accuracies for {scored}'


def draw(rows: Sequence['Row'], heading: str, path: Path) -> None:
    """Draw published accuracy over measured latency, with one panel per runtime.

    Models that fusing changes are shown fused.

    Args:
        rows: Models with a published accuracy.
        heading: Description of the device and the versions.
        path: File to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    runtimes = list(rows[0].runs)
    figure = Figure(figsize=(max(4.8 * len(runtimes), 6.4), 5.4), dpi=150, layout='constrained')
    figure.suptitle('\n'.join(filter(None, (heading, other_sizes(rows)))), fontsize=8, color='0.35')
    panels = figure.subplots(1, len(runtimes), sharey=True, squeeze=False)[0]
    accuracy = {row.name: PUBLISHED[row.name].top1 for row in rows}
    fastest = {row.name: row for row in rows}  # a fused row comes later
    for axes, runtime in zip(panels, runtimes, strict=True):
        latency = {name: row.latency(runtime) for name, row in fastest.items()}
        frontier: List[str] = []
        for name in sorted(latency, key=lambda n: (latency[n][1], -accuracy[n])):
            if not frontier or accuracy[name] > accuracy[frontier[-1]]:
                frontier.append(name)
        end = 1.6 * max(high for _, _, high in latency.values())
        axes.step([*(latency[n][1] for n in frontier), end], [accuracy[n] for n in [*frontier, frontier[-1]]],
                  where='post', color='0.88', linewidth=7, zorder=1, label='Pareto frontier')
        for names, style in (
                ([n for n in latency if n in PAPER_TOP1], dict(fmt='o-', color='C3', label='Mobile-Former')),
                ([n for n in latency if n not in PAPER_TOP1], dict(fmt='s', color='C0', label='other timm models')),
        ):
            if names:
                names.sort(key=lambda n: accuracy[n])
                low, median, high = zip(*(latency[n] for n in names), strict=True)
                spread = [[m - a for m, a in zip(median, low, strict=True)],
                          [b - m for m, b in zip(median, high, strict=True)]]
                axes.errorbar(median, [accuracy[n] for n in names], xerr=spread, markersize=5, linewidth=1.5,
                              elinewidth=1, zorder=3, **style)
        axes.set_xscale('log')
        axes.set_xlim(min(low for low, _, _ in latency.values()) / 1.6, end)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(RUNTIMES[runtime], fontsize=11)
        axes.set_xlabel(f'latency, ms (median and quartiles), batch of {len(rows[0].x)}')
        axes.grid(color='0.93', linewidth=0.8)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_formatter(lambda v, _: f'{v:g}')
        axes.tick_params(axis='x', labelsize=8)
    lowest, highest = min(accuracy.values()), max(accuracy.values())
    room = max(1, 0.1 * (highest - lowest))
    panels[0].set_ylim(lowest - room, highest + room)  # shared by all panels
    panels[0].set_ylabel('ImageNet-1k top-1, % (as published)')
    figure.legend(*panels[0].get_legend_handles_labels(), loc='outside lower center', ncols=3, fontsize=8,
                  frameon=False)
    figure.draw_without_rendering()  # fixes the scales, on which the positions of the labels depend
    for axes, runtime in zip(panels, runtimes, strict=True):
        label(axes, {name: (row.latency(runtime)[1], accuracy[name]) for name, row in fastest.items()})
    save_figure(figure, path)


def label(axes: 'Axes', points: Dict[str, Tuple[float, float]]) -> None:
    """Label each point (latency, accuracy) with the name of its model."""
    from textalloc import allocate

    ours = sorted((y, x) for name, (x, y) in points.items() if name in PAPER_TOP1)
    line = dict(x_lines=[[x for _, x in ours]], y_lines=[[y for y, _ in ours]]) if len(ours) > 1 else {}
    x, y = (list(values) for values in zip(*points.values(), strict=True))
    place: Any = allocate
    place(axes, x, y, [name.removeprefix('mobileformer_').upper() if name in PAPER_TOP1 else name for name in points],
          x_scatter=x, y_scatter=y, **line, textsize=8, min_distance=0.012, max_distance=0.25, linecolor='0.6',
          linewidth=0.6, textcolor=['C3' if name in PAPER_TOP1 else '0.2' for name in points])
