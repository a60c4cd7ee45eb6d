"""`fedscan phantom`: synthetic patients, and a table of real images as DICOM."""

import argparse
from pathlib import Path
from typing import Any

_PHANTOM = """\
Draws synthetic patients. Nothing in them comes from a person.

  fedscan phantom images/                       a research table: metadata.csv and PNG images, for --data
  fedscan phantom hospital/ --dicom             one hospital: DICOM files with invented identities, labels, consent
  fedscan phantom from-table --help             a research table of your own, written as DICOM"""

_FROM_TABLE = """\
Writes a research table (a CSV beside PNG, JPEG or npz images) as DICOM, to try the door with real images: one
folder for each site of the table, with dicom/, labels.csv and consent.csv. Sex and age are the table's; names, numbers,
dates and everything else that the de-identification has to find are invented. Everybody consents.

  fedscan phantom from-table images/metadata.csv hospitals/

Do not give it images whose identity is a secret: it hides nothing."""


def add(commands: "argparse._SubParsersAction[Any]") -> None:
    """Adds `phantom` and `phantom from-table` to the parser of `fedscan`."""
    plain = argparse.RawDescriptionHelpFormatter
    phantom = commands.add_parser(
        "phantom", help="draw synthetic patients", description=_PHANTOM, formatter_class=plain
    )
    phantom.add_argument("folder", metavar="DIR", type=Path, help="a new or empty folder")
    phantom.add_argument("--dicom", action="store_true", help="one hospital as DICOM instead of a table with PNG")
    phantom.add_argument("--patients", type=int, default=200, help="how many (default %(default)s)")
    phantom.add_argument("--sites", type=int, default=4, help="sites of the table (default %(default)s)")
    phantom.add_argument("--size", type=int, default=64, help="rows and columns of an image (default %(default)s)")
    phantom.add_argument("--seed", type=int, default=0, help="the same seed draws the same patients")
    phantom.set_defaults(command=_phantom)

    table = commands.add_parser("phantom from-table", description=_FROM_TABLE, formatter_class=plain)
    table.add_argument(
        "table", metavar="TABLE.csv", type=Path, help="columns file (below its folder), patient_id, label"
    )
    table.add_argument("folder", metavar="DIR", type=Path, help="a new or empty folder")
    table.add_argument("--label-column", default="label", help="which column is the label (default %(default)s)")
    table.add_argument("--seed", type=int, default=0, help="decides the invented identities")
    table.set_defaults(command=_phantom_from_table)


def _phantom(arguments: argparse.Namespace) -> int:
    from fedscan import phantom
    from fedscan_core.errors import ConfigError, FolderError

    folder: Path = arguments.folder
    if arguments.patients < 8 or not 1 <= arguments.sites <= arguments.patients or not 32 <= arguments.size <= 256:
        raise ConfigError(
            "Phantoms need at least 8 patients, no more sites than patients, and a size from 32 to 256.",
            remedy="Correct --patients, --sites or --size.",
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FolderError(f"{folder} is not an empty folder.", remedy="Give a new one.")
    drawn = {"patients": arguments.patients, "seed": arguments.seed, "image_size": arguments.size}
    try:
        if arguments.dicom:
            phantom.draw_hospital(folder, name=folder.resolve().name, **drawn)
        else:
            phantom.phantom_table(folder, sites=arguments.sites, **drawn)
    except OSError as error:
        raise FolderError(f"{folder} cannot be filled: {error.strerror}.", remedy="Check its permissions.") from None
    print(f"{arguments.patients} synthetic patients are in {folder}")
    return 0


def _phantom_from_table(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from fedscan import phantom_table
    from fedscan_core.errors import FolderError

    folder: Path = arguments.folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FolderError(f"{folder} is not an empty folder.", remedy="Give a new one.")
    notes = Console(stderr=True)
    with Progress(console=notes, transient=True, disable=not notes.is_terminal) as bar:
        task = bar.add_task("images", total=None)
        made = phantom_table.table_to_hospitals(
            arguments.table,
            folder,
            label_column=arguments.label_column,
            seed=arguments.seed,
            tell=lambda done, of: bar.update(task, completed=done, total=of),
        )
    for name, patients in made.items():
        print(f"{patients} patients as DICOM are in {folder / name}")
    return 0
