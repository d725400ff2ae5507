"""The delta file: container, manifest, packing, reader, writer, verification and export."""
