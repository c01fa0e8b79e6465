# SPDX-License-Identifier: Apache-2.0
"""Residual maps of `grcsf residuals` become further channels of nnU-Net's images.

Every image gets one file for each map behind its own channels, `_0001` and `_0002` say, and
dataset.json lists them as "noNorm": they are in [0, 1] already. Doing it again writes the same.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from grcsf_kernels.common.atomic_files import write_whole
from grcsf_kernels.engine import InputError
from grcsf_kernels.engine.io.nifti import read_residual, read_volume, write_volume

NOT_NORMALIZED = "noNorm"


def image_channels(dataset_json):
    """Names of the channels without those of residual maps, which are the last."""
    channels = json.loads(dataset_json.read_text())["channel_names"]
    names = [channels[key] for key in sorted(channels, key=int)]
    while names and names[-1] == NOT_NORMALIZED:
        names.pop()
    return names


def find_map(folder, case):
    """`grcsf residuals` names a map after its image, which in nnU-Net ends in _0000."""
    for name in (f"{case}_residual.nii.gz", f"{case}_0000_residual.nii.gz"):
        if (folder / name).is_file():
            return folder / name
    raise InputError(folder, f"has no {case}_residual.nii.gz", "run grcsf residuals on the images")


def add_maps(image_path, maps, first):
    """Write the maps of one image as channels from `first` on; returns how many there are."""
    case = re.sub(r"_0000\.nii\.gz$", "", image_path.name)
    image = read_volume(image_path)
    residual = read_residual(find_map(maps, case), image)
    count = residual.array.shape[3]
    for index in range(count):
        path = image_path.with_name(f"{case}_{first + index:04d}.nii.gz")
        write_volume(path, residual.array[..., index], image)
    return count


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("maps", type=Path, help="folder of <case>_residual.nii.gz")
    parser.add_argument("dataset", type=Path, help="folder DatasetXXX_Name with dataset.json")
    parser.add_argument(
        "--images", type=Path, help="folder of <case>_0000.nii.gz; without it imagesTr and imagesTs"
    )
    arguments = parser.parse_args()
    dataset_json = arguments.dataset / "dataset.json"
    inside = [arguments.dataset / name for name in ("imagesTr", "imagesTs")]
    folders = [arguments.images] if arguments.images else inside
    names = image_channels(dataset_json)
    counts, failed = {}, 0
    for path in sorted(path for folder in folders for path in folder.glob("*_0000.nii.gz")):
        try:
            counts[path.name] = add_maps(path, arguments.maps, len(names))
        except InputError as error:
            print(f"skipped: {error}", file=sys.stderr)
            failed += 1
    if len(set(counts.values())) != 1:
        sys.exit(f"{arguments.maps}: maps are {counts or 'of no image'}, expected as many for each")
    description = json.loads(dataset_json.read_text())
    channels = [*names, *[NOT_NORMALIZED] * next(iter(counts.values()))]
    description["channel_names"] = {str(index): name for index, name in enumerate(channels)}
    text = json.dumps(description, indent=4)
    write_whole(dataset_json, lambda temporary: temporary.write_text(text))
    print(f"{len(counts)} images of channels {', '.join(channels)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
