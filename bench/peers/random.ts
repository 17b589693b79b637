export interface Input {
  readonly shape: readonly number[];
  readonly data: Float32Array;
}

/** Uniform numbers of mean 0 and the given standard deviation; the seed is the input's own. */
export function random(seed: number, shape: readonly number[], deviation: number): Input {
  const data = new Float32Array(shape.reduce((a, b) => a * b, 1));
  const scale = (2 * Math.sqrt(3) * deviation) / 2 ** 32;
  let state = Math.imul(seed + 1, 0x9e3779b9) >>> 0;
  for (let i = 0; i < data.length; i++) {
    state = (state + 0x6d2b79f5) >>> 0;
    let z = Math.imul(state ^ (state >>> 15), state | 1);
    z ^= z + Math.imul(z ^ (z >>> 7), z | 61);
    data[i] = (((z ^ (z >>> 14)) >>> 0) - 2 ** 31) * scale;
  }
  return { shape, data };
}
