import { randomUniform } from "../tensor/philox.ts";
import { UsageError } from "../tensor/errors.ts";

/** How the next token is drawn from the model's distribution. */
export interface Sampling {
  /** 0 takes the most probable token. */
  readonly temperature: number;
  /** Keep the k most probable tokens; 0: all. */
  readonly top_k: number;
  /** Keep the most probable tokens that together reach this probability; 1: all. */
  readonly top_p: number;
  /** Keep tokens of at least this share of the most probable one's probability; 0: all. */
  readonly min_p: number;
  /** Same seed, same model, same adapter: same tokens. */
  readonly seed: number;
}

export const GREEDY: Sampling = { temperature: 0, top_k: 0, top_p: 1, min_p: 0, seed: 0 };

/** @throws UsageError for a value out of range. */
export function checkSampling(sampling: Sampling): void {
  const { temperature, top_k, top_p, min_p, seed } = sampling;
  const refuse = (name: string, range: string, found: number) => {
    throw new UsageError(`${name} must be ${range}, found ${found}.`);
  };
  if (!(temperature >= 0 && Number.isFinite(temperature))) {
    refuse("temperature", "a number of at least 0", temperature);
  }
  if (!(Number.isInteger(top_k) && top_k >= 0)) refuse("top_k", "a whole number of at least 0", top_k);
  if (!(top_p > 0 && top_p <= 1)) refuse("top_p", "above 0 and at most 1", top_p);
  if (!(min_p >= 0 && min_p <= 1)) refuse("min_p", "from 0 to 1", min_p);
  if (!(Number.isSafeInteger(seed) && seed >= 0)) refuse("seed", "a whole number of at least 0", seed);
}

/** Result of checking drafted tokens against the model: what was accepted, and the token that follows. */
export interface Verdict {
  readonly accepted: number;
  readonly next: number;
}

/**
 * Lossless rejection (Leviathan et al. 2023, Chen et al. 2023): accepts draft i with probability
 * min(1, p_i/q_i); the first rejected place is drawn from max(p - q, 0), and after a full acceptance one more
 * token from p. The tokens are then distributed exactly as if each had been drawn from p.
 *
 * @param drafts n tokens; @param q n rows of V probabilities they were drawn from;
 * @param p n + 1 rows of the model
 * @param uniform draws from [0, 1)
 */
export function verifyDrafts(
  drafts: readonly number[], q: Float32Array, p: Float32Array, vocab: number, uniform: () => number,
): Verdict {
  for (let i = 0; i < drafts.length; i++) {
    const x = drafts[i]!;
    const pRow = p.subarray(i * vocab, (i + 1) * vocab);
    const qRow = q.subarray(i * vocab, (i + 1) * vocab);
    if (uniform() * qRow[x]! < pRow[x]!) continue;
    const residual = pRow.map((value, token) => Math.max(0, value - qRow[token]!));
    return { accepted: i, next: draw(residual, uniform()) };
  }
  return { accepted: drafts.length, next: draw(p.subarray(drafts.length * vocab), uniform()) };
}

/** Inverse-CDF draw from non-negative weights, in index order. */
export function draw(weights: Float32Array, u: number): number {
  let total = 0;
  for (const weight of weights) total += weight;
  let left = u * total;
  let last = 0;
  for (let i = 0; i < weights.length; i++) {
    if (weights[i] === 0) continue;
    last = i;
    left -= weights[i]!;
    if (left < 0) return i;
  }
  return last;
}

/** A stream of uniform numbers in [0, 1) from Philox counters. */
export function uniformStream(seed: number, stream: number): () => number {
  let element = 0;
  return () => randomUniform({ seed, stream, step: 0 }, element++);
}
