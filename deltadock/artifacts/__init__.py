"""The delta file: container, manifest, encodings, reader, writer, verification and export."""
