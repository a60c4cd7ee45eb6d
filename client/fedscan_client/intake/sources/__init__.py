"""Where images come from. Nothing here decodes a pixel, and nothing here decides who may be read.

folder.py    DICOM files in a folder tree and in zip archives
spool.py     what came over the network, encrypted, until it has been ingested
pull.py      asking a PACS: what is listed is fetched once, and every instance is accounted for
dicomweb.py  ... by QIDO-RS and WADO-RS
dimse.py     ... by C-FIND with C-MOVE or C-GET
scp.py       what a PACS routes to us by C-STORE
table.py     a research table beside PNG, JPEG or npz files
settings.py  the [source] section of site.toml
"""

from fedscan_client.intake.sources.found import Found

__all__ = ["Found"]
