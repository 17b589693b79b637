import { ndarray, type NdArray } from "../tensor/ndarray.ts";
import { philox4x32 } from "../tensor/philox.ts";

interface NoiseOptions {
  readonly stream: number;
}

/** Four uniforms in [0, 1) of a block of features of a token. */
function uniforms(counter: NdArray, stream: number, block: number, token: number): number[] {
  const [low, high, step] = counter.data as unknown as [number, number, number];
  return philox4x32([block, token, step, stream], [low, high]).map((word) => (word >>> 8) * 2 ** -24);
}

/** x [T, D] with the factor of every element: 1 + amount * (2 u - 1). */
export function router_jitter(
  x: NdArray, counter: NdArray, { stream, amount }: NoiseOptions & { amount: number },
  rows: NdArray | null = null,
): NdArray {
  const D = x.shape[1]!;
  return ndarray(x.shape, x.data.map((value, i) => {
    const [t, d] = [Math.floor(i / D), i % D];
    const u = uniforms(counter, stream, Math.floor(d / 4), rows?.data[t] ?? t)[d % 4]!;
    return value * (1 + amount * (2 * u - 1));
  }));
}

export function router_jitter_vjp(
  [dy]: readonly (NdArray | null)[], x: NdArray, counter: NdArray, options: NoiseOptions & { amount: number },
  rows: NdArray | null = null,
): (NdArray | null)[] {
  return [dy ? router_jitter(dy, counter, options, rows) : ndarray(x.shape), null, null, null];
}

/** sqrt(3) * (sum of four uniforms - 2), whatever the logits [T, E] are. */
export function random_logits(
  logits: NdArray, counter: NdArray, { stream }: NoiseOptions, rows: NdArray | null = null,
): NdArray {
  const E = logits.shape[1]!;
  return ndarray(logits.shape, logits.data.map((_, i) => {
    const t = Math.floor(i / E);
    const u = uniforms(counter, stream, i % E, rows?.data[t] ?? t);
    return Math.sqrt(3) * (u.reduce((a, b) => a + b) - 2);
  }));
}

/** Straight through. */
export function random_logits_vjp([dy]: readonly (NdArray | null)[]): (NdArray | null)[] {
  return [dy ?? null, null, null, null];
}
