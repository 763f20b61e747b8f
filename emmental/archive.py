"""What is looked at in a file of `torch.save` before torch is given it."""

import zipfile
from pathlib import Path


def what_is_odd(path: Path) -> str | None:
    """Why the file, a zip archive, is not one that torch wrote; None if nothing is, or if it is no archive.

    torch stores its records side by side, as they are. An archive whose records are compressed or overlap can
    be small and fill the memory. (Others, as of torch before 1.6, cannot hold more than their size.)
    """
    try:
        with path.open("rb") as file:
            begins_as_one = file.read(4) == b"PK\3\4"  # by which torch knows them
        if not begins_as_one and not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        return f"it is no whole archive ({error})"
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        return "its records are compressed, which torch never does"
    if sum(record.file_size for record in records) > path.stat().st_size:
        return "its records are larger than itself"
    return None
