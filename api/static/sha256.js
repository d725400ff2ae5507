// A worker that hashes a file piece by piece; crypto.subtle needs the whole file in memory.

import { sha256 } from "./noble-sha256.min.js";

const PIECE = 4 * 1024 * 1024;

self.addEventListener("message", async ({ data: file }) => {
  try {
    const hash = sha256.create();
    for (let start = 0; start < file.size; start += PIECE) {
      const piece = await file.slice(start, start + PIECE).arrayBuffer();
      hash.update(new Uint8Array(piece));
      self.postMessage({ done: Math.min(start + PIECE, file.size) });
    }
    const hex = [...hash.digest()].map((byte) => byte.toString(16).padStart(2, "0")).join("");
    self.postMessage({ hex });
  } catch (error) {
    self.postMessage({ error: `${file.name} cannot be read: ${error.message}` });
  }
});
