"""One hash for all records of a run, by which a later start knows them again."""

from __future__ import annotations

import hashlib
import json

from lavintk.data.records import Record


def fingerprint(records: list[Record]) -> str:
    """Return a SHA-256 over ids, messages and images of the records (file names and sizes, or encoded bytes)."""
    digest = hashlib.sha256()
    for record in records:
        images = [
            hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else f"{image.name}:{image.stat().st_size}"
            for image in record.images
        ]
        content = [record.id, [(m.role, m.text) for m in record.messages], images]
        digest.update(json.dumps(content, ensure_ascii=False).encode())
    return digest.hexdigest()
