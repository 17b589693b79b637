import { ndarray, type NdArray } from "../tensor/ndarray.ts";
import { randomUniform } from "../tensor/philox.ts";

/** Temperatures below this are greedy: dividing by them would overflow long before it changed the choice. */
const GREEDY_BELOW = 1e-5;

/** Index of the largest logit of each row, the lowest index on ties. logits [B, V] -> [B]. */
export function argmax(logits: NdArray): NdArray {
  const [B, V] = logits.shape as [number, number];
  return ndarray([B], Array.from({ length: B }, (_, b) => {
    const row = logits.data.subarray(b * V, (b + 1) * V);
    return row.indexOf(row.reduce((a, z) => Math.max(a, z)));
  }));
}

/**
 * The distribution that `sample` draws from, by rows. The filters, in this order, keep ever shorter prefixes
 * of the tokens in order of falling logit (rising index on ties): temperature; the top_k first; the shortest
 * prefix with at least top_p of what is left, but one token at least; tokens with at least min_p times the
 * largest probability.
 *
 * @param logits    [B, V]
 * @param settings  [4]: temperature (below 1e-5: all on the arg-max), top_k (0 = off), top_p (1 = off), min_p
 *   (0 = off)
 * @returns [B, V], rows adding up to 1
 */
export function probabilities(logits: NdArray, settings: NdArray): NdArray {
  const [B, V] = logits.shape as [number, number];
  const [temperature, top_k, top_p, min_p] = settings.data as unknown as [number, number, number, number];
  const out = ndarray([B, V]);
  for (let b = 0; b < B; b++) {
    const z = logits.data.subarray(b * V, (b + 1) * V);
    let kept = Array.from(z, (_, i) => i).sort((i, j) => (z[i]! > z[j]! ? -1 : z[i]! < z[j]! ? 1 : i - j));
    const largest = z[kept[0]!]!;
    if (temperature < GREEDY_BELOW) {
      out.data[b * V + kept[0]!] = 1;
      continue;
    }
    const weight = z.map((value) => Math.exp((value - largest) / temperature));
    const mass = (tokens: number[]): number => tokens.reduce((sum, i) => sum + weight[i]!, 0);
    if (top_k >= 1) kept = kept.slice(0, Math.floor(top_k));
    if (top_p < 1) {
      const needed = top_p * mass(kept);
      let sum = 0;
      const last = kept.findIndex((i) => (sum += weight[i]!) >= needed);
      kept = kept.slice(0, last + 1);
    }
    kept = kept.filter((i) => weight[i]! >= min_p);
    const total = mass(kept);
    for (const i of kept) out.data[b * V + i] = weight[i]! / total;
  }
  return out;
}

/**
 * One token per row, drawn from `probabilities`: the first index whose cumulative probability exceeds the
 * Philox uniform of element b (the row).
 *
 * @param logits   [B, V]
 * @param counter  [4]: seed low word, seed high word, step, stream
 * @returns [B]
 */
export function sample(logits: NdArray, settings: NdArray, counter: NdArray): NdArray {
  const [B, V] = logits.shape as [number, number];
  const [low, high, step, stream] = counter.data as unknown as [number, number, number, number];
  const seed = (BigInt(high) << 32n) | BigInt(low);
  const p = probabilities(logits, settings);
  const tokens = ndarray([B]);
  for (let b = 0; b < B; b++) {
    const u = randomUniform({ seed, stream, step }, b);
    let sum = 0;
    tokens.data[b] = p.data.subarray(b * V, (b + 1) * V).findIndex((probability) => (sum += probability) > u);
  }
  return tokens;
}
