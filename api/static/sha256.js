// A worker that hashes a file piece by piece: SHA-256 (FIPS 180-4), since crypto.subtle needs the
// whole file in memory.

const ROUNDS = new Uint32Array(64);
const START = new Uint32Array(8);
const root = (prime, power) => {
  const value = prime ** power;
  return Math.floor((value - Math.floor(value)) * 2 ** 32);
};
for (let prime = 2, count = 0; count < 64; prime++) {
  let divisor = 2;
  while (divisor * divisor <= prime && prime % divisor) divisor++;
  if (divisor * divisor <= prime) continue;
  if (count < 8) START[count] = root(prime, 1 / 2);
  ROUNDS[count++] = root(prime, 1 / 3);
}

class Sha256 {
  #state = START.slice();
  #words = new Uint32Array(64);
  #rest = new Uint8Array(0);
  #length = 0;

  update(bytes) {
    this.#length += bytes.length;
    let start = 0;
    if (this.#rest.length) {
      start = Math.min(64 - this.#rest.length, bytes.length);
      const joined = new Uint8Array(this.#rest.length + start);
      joined.set(this.#rest);
      joined.set(bytes.subarray(0, start), this.#rest.length);
      this.#rest = joined;
      if (joined.length < 64) return;
      this.#block(new DataView(joined.buffer), 0);
    }
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    for (; start + 64 <= bytes.length; start += 64) this.#block(view, start);
    this.#rest = bytes.slice(start);
  }

  hex() {
    const length = this.#length;
    const padding = new Uint8Array(((119 - (length % 64)) % 64) + 9);
    padding[0] = 0x80;
    const view = new DataView(padding.buffer);
    view.setUint32(padding.length - 8, Math.floor(length / 2 ** 29));
    view.setUint32(padding.length - 4, (length * 8) % 2 ** 32);
    this.update(padding);
    return [...this.#state].map((word) => word.toString(16).padStart(8, "0")).join("");
  }

  #block(view, offset) {
    const w = this.#words, state = this.#state;
    for (let i = 0; i < 16; i++) w[i] = view.getUint32(offset + 4 * i);
    for (let i = 16; i < 64; i++) {
      const x = w[i - 15], y = w[i - 2];
      const s0 = ((x >>> 7) | (x << 25)) ^ ((x >>> 18) | (x << 14)) ^ (x >>> 3);
      const s1 = ((y >>> 17) | (y << 15)) ^ ((y >>> 19) | (y << 13)) ^ (y >>> 10);
      w[i] = (w[i - 16] + s0 + w[i - 7] + s1) | 0;
    }
    let a = state[0] | 0, b = state[1] | 0, c = state[2] | 0, d = state[3] | 0;
    let e = state[4] | 0, f = state[5] | 0, g = state[6] | 0, h = state[7] | 0;
    for (let i = 0; i < 64; i++) {
      const s1 = ((e >>> 6) | (e << 26)) ^ ((e >>> 11) | (e << 21)) ^ ((e >>> 25) | (e << 7));
      const t1 = (h + s1 + ((e & f) ^ (~e & g)) + ROUNDS[i] + w[i]) | 0;
      const s0 = ((a >>> 2) | (a << 30)) ^ ((a >>> 13) | (a << 19)) ^ ((a >>> 22) | (a << 10));
      const t2 = (s0 + ((a & b) ^ (a & c) ^ (b & c))) | 0;
      h = g; g = f; f = e; e = (d + t1) | 0; d = c; c = b; b = a; a = (t1 + t2) | 0;
    }
    state[0] += a; state[1] += b; state[2] += c; state[3] += d;
    state[4] += e; state[5] += f; state[6] += g; state[7] += h;
  }
}

const PIECE = 4 * 1024 * 1024;

self.addEventListener("message", async ({ data: file }) => {
  try {
    const hash = new Sha256();
    for (let start = 0; start < file.size; start += PIECE) {
      const piece = await file.slice(start, start + PIECE).arrayBuffer();
      hash.update(new Uint8Array(piece));
      self.postMessage({ done: Math.min(start + PIECE, file.size) });
    }
    self.postMessage({ hex: hash.hex() });
  } catch (error) {
    self.postMessage({ error: `${file.name} cannot be read: ${error.message}` });
  }
});
