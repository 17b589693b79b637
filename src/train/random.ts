/** The order of data on the host: seeded permutations and hashes. */
import { randomBits, seedWords } from "../tensor/philox.ts";

/** Mixes 32 bits so that every input bit reaches every output bit (the finaliser of MurmurHash3). */
export function mix32(x: number): number {
  x ^= x >>> 16;
  x = Math.imul(x, 0x85ebca6b);
  x ^= x >>> 13;
  x = Math.imul(x, 0xc2b2ae35);
  return (x ^ (x >>> 16)) >>> 0;
}

/** Hashes a text with a seed to an unsigned 32-bit number (FNV-1a over UTF-16 code units, then mixed). */
export function hashText(text: string, seed = 0): number {
  let hash = start(seed);
  for (let i = 0; i < text.length; i++) hash = Math.imul(hash ^ text.charCodeAt(i), 0x01000193);
  return mix32(hash);
}

/** Hashes a list of 32-bit integers with a seed to an unsigned 32-bit number. */
export function hashIntegers(values: ArrayLike<number>, seed = 0): number {
  let hash = start(seed);
  for (let i = 0; i < values.length; i++) hash = mix32(Math.imul(hash ^ values[i]!, 0x01000193));
  return mix32(hash ^ values.length);
}

/** The random stream that orders data: apart from those of weights and sampling with the same seed. */
const ORDER_STREAM = 0x6f726472;

/**
 * Draws a permutation of 0..n-1 from (seed, step): Fisher-Yates with Philox.
 *
 * @param seed  integer, 0 <= seed < 2^53
 * @param step  unsigned 32-bit; every step (an epoch, say) has an order of its own
 */
export function permutation(n: number, seed: number, step: number): Uint32Array {
  const order = Uint32Array.from({ length: n }, (_, i) => i);
  const key = { seed, stream: ORDER_STREAM, step };
  for (let i = n - 1; i > 0; i--) {
    const j = Math.floor((randomBits(key, i) / 4294967296) * (i + 1));
    const kept = order[i]!;
    order[i] = order[j]!;
    order[j] = kept;
  }
  return order;
}

function start(seed: number): number {
  const [low, high] = seedWords(seed);
  return 0x811c9dc5 ^ mix32(mix32(low) ^ high);
}
