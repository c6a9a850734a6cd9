"""Labelled images for evaluation: the data set of a finetuned model, and classes matched by name."""
import argparse
from collections import Counter
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

from timm.data import DatasetInfoLabelMapper, ImageNetInfo, infer_imagenet_subset

from .console import InputError, abbreviate
from .data import Data, open_data
from .options import DATA_OPTIONS, data_arguments
from .run_state import fingerprint, read_state

__all__ = ['TrainingData', 'match_classes', 'training_data']


class TrainingData(NamedTuple):
    """The data set that a model was finetuned on."""
    data_dir: Optional[Path]
    arguments: Dict[str, Any]  # for `open_data`
    images_hash: str  # see `fingerprint`
    skip_bad_images: Optional[bool] = None  # the option of this name

    @property
    def paths(self) -> List[Path]:
        """Paths of the data set, which must still exist; empty for the digits."""
        return [path for path in (self.data_dir, self.arguments.get('labels')) if path]

    @property
    def root(self) -> Optional[Path]:
        """Folder of the data set; None for the digits."""
        return (self.data_dir or self.paths[0].parent) if self.paths else None

    def fill_in(self, args: argparse.Namespace) -> None:
        """Set the data options that were not given to those of the training."""
        options = {**self.arguments, 'skip_bad_images': self.skip_bad_images}
        vars(args).update({key: value for key, value in options.items() if getattr(args, key, None) is None})

    def open(self, root: Path, args: argparse.Namespace) -> Optional[Data]:
        """Open a folder as in training; the folder and the table of labels may be copies.

        Returns:
            The data set; None if data options were given that are not those of the training, or if the folder does not
            hold the images that the model was trained on.
        """
        given = data_arguments(args)
        labels = given.pop('labels', self.arguments.get('labels'))
        if any(value != self.arguments.get(key) for key, value in given.items()):
            return None
        try:
            data = open_data(root, **{**self.arguments, 'labels': labels})
        except InputError:
            return None
        return data if fingerprint(data, root) == self.images_hash else None


def training_data(model: str) -> Optional[TrainingData]:
    """Return the data set of a model in a folder that finetune wrote; None for other models."""
    try:
        state = read_state(Path(model.removeprefix('local-dir:')))
    except InputError:
        return None
    trained = state['args']
    arguments = {key: trained[key] for key in DATA_OPTIONS if trained.get(key) is not None}
    return TrainingData(trained['data_dir'], arguments, state['pictures'], trained.get('skip_bad_images'))


def match_classes(labels: Iterable[str], known: Sequence[str], model: str) -> Tuple[Dict[str, int], List[str]]:
    """Match the labels of images with the classes of a model by name.

    Args:
        labels: Class names; for ImageNet models, WordNet IDs such as `n01440764` match too.
        known: Class names of the model, by index.
        model: Name of the model, for messages.

    Returns:
        The class index of each label that matches, and remarks on labels and classes that do not.

    Raises:
        InputError: No label matches.
    """
    index = {name: i for i, name in enumerate(known)}
    if subset := infer_imagenet_subset({'num_classes': len(known)}):
        info: Any = ImageNetInfo(subset)
        if list(map(DatasetInfoLabelMapper(info), range(len(known)))) == list(known):
            index.update({info.index_to_label_name(i): i for i in range(len(known)) if info.has_label(i)})
    for name, count in Counter(known).items():
        if count > 1:  # ambiguous, such as ImageNet's `crane`: a bird and a machine
            index.pop(name, None)
    labels = set(labels)
    found = {label: index[label] for label in sorted(labels) if label in index}
    if not found:
        raise InputError(f'none of the classes of the images ({abbreviate(labels)}) is a class of {model} '
                         f'({abbreviate(known)}); if the names of the model are wrong or missing, use --class-map '
                         'FILE, with one name per line')
    remarks = []
    if unknown := labels - found.keys():
        remarks.append(f'not a class of {model}, and left out: {abbreviate(unknown)}')
    indices = set(found.values())
    if absent := [name for i, name in enumerate(known) if i not in indices]:
        remarks.append(f'no images of {len(absent):,} of the {len(known):,} classes of {model}: {abbreviate(absent)}')
    return found, remarks
