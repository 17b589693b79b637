/**
 * Philox4x32-10: random numbers as a function of a counter. There is no state to keep or to restore: the same
 * key and element give the same bits here and in `shaders/lib/philox.wgsl`, in any order and on any device.
 *
 * Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
 * Tested in test/null/philox.test.ts against the authors' known answers.
 */
import { UsageError } from "./errors.ts";

/** Four 32-bit words, each in [0, 2^32). */
export type PhiloxBlock = [number, number, number, number];

/** What a sequence of random elements is keyed by. */
export interface RandomKey {
  /** Integer in [0, 2^53), or a bigint in [0, 2^64). */
  readonly seed: number | bigint;
  /** Which use of the seed (a parameter, a dropout layer, the sampler): unsigned 32-bit. */
  readonly stream: number;
  /** Which time (a training step, a position in the text): unsigned 32-bit. */
  readonly step: number;
}

const MULTIPLIER_0 = 0xd2511f53;
const MULTIPLIER_1 = 0xcd9e8d57;
const WEYL_0 = 0x9e3779b9; // golden ratio
const WEYL_1 = 0xbb67ae85; // sqrt(3) - 1
const ROUNDS = 10;

/** High 32 bits of the 64-bit product of two 32-bit numbers, signed. No partial sum exceeds 32 bits. */
function multiplyHigh(a: number, b: number): number {
  const low = Math.imul(a & 0xffff, b & 0xffff);
  const middle = (Math.imul(a >>> 16, b & 0xffff) + (low >>> 16)) >>> 0;
  const lower = (Math.imul(a & 0xffff, b >>> 16) + (middle & 0xffff)) >>> 0;
  return (Math.imul(a >>> 16, b >>> 16) + (middle >>> 16) + (lower >>> 16)) | 0;
}

/**
 * The ten-round Philox bijection of one counter.
 *
 * @param counter  four unsigned 32-bit words
 * @param key      two unsigned 32-bit words
 */
export function philox4x32(counter: Readonly<PhiloxBlock>, key: readonly [number, number]): PhiloxBlock {
  let [c0, c1, c2, c3] = counter;
  let [k0, k1] = key;
  for (let round = 0; round < ROUNDS; round++) {
    const high0 = multiplyHigh(MULTIPLIER_0, c0);
    const high1 = multiplyHigh(MULTIPLIER_1, c2);
    const low0 = Math.imul(MULTIPLIER_0, c0);
    const low1 = Math.imul(MULTIPLIER_1, c2);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 = (k0 + WEYL_0) | 0;
    k1 = (k1 + WEYL_1) | 0;
  }
  return [c0 >>> 0, c1 >>> 0, c2 >>> 0, c3 >>> 0];
}

/**
 * Splits a seed into its low and high 32-bit word: the key of the generator.
 * @throws UsageError for a number that is not an integer in [0, 2^53) and a bigint outside [0, 2^64)
 */
export function seedWords(seed: number | bigint): [number, number] {
  const valid = typeof seed === "bigint"
    ? seed >= 0n && seed < 1n << 64n
    : Number.isSafeInteger(seed) && seed >= 0;
  if (!valid) {
    throw new UsageError(`seed: expected an integer in [0, 2^53) or a bigint in [0, 2^64), found ${seed}`);
  }
  if (typeof seed === "bigint") return [Number(seed & 0xffffffffn), Number(seed >> 32n)];
  return [seed >>> 0, Math.floor(seed / 4294967296)];
}

/**
 * The block that holds elements 4 * block .. 4 * block + 3: counter (block low, block high, step, stream),
 * key = seed. Element e of a sequence is word e % 4 of block floor(e / 4).
 */
function blockOf(key: RandomKey, block: number): PhiloxBlock {
  const high = Math.floor(block / 4294967296);
  return philox4x32([block >>> 0, high >>> 0, key.step >>> 0, key.stream >>> 0], seedWords(key.seed));
}

const toUniform = (word: number): number => (word >>> 8) * 2 ** -24;

/** Box-Muller: two words to two standard normals. The radius takes 24 bits in (0, 1], so it is finite. */
function toNormals(word0: number, word1: number): [number, number] {
  const radius = Math.sqrt(-2 * Math.log(((word0 >>> 8) + 1) * 2 ** -24));
  const angle = 2 * Math.PI * toUniform(word1);
  return [radius * Math.cos(angle), radius * Math.sin(angle)];
}

/** 32 random bits of one element, as an unsigned number. */
export function randomBits(key: RandomKey, element: number): number {
  return blockOf(key, Math.floor(element / 4))[element % 4]!;
}

/** Uniform in [0, 1) with 24 bits, exact in f32: the upper 24 bits of the element, times 2^-24. */
export function randomUniform(key: RandomKey, element: number): number {
  return toUniform(randomBits(key, element));
}

/** Standard normal by Box-Muller, below 5.8 in magnitude; elements 2j and 2j + 1 share a pair of words. */
export function randomNormal(key: RandomKey, element: number): number {
  const words = blockOf(key, Math.floor(element / 4));
  const pair = element % 4 < 2 ? toNormals(words[0], words[1]) : toNormals(words[2], words[3]);
  return pair[element % 2]!;
}

type Floats = Float32Array | Float64Array;

/** Fills `out` with `randomUniform` of elements first, first + 1, ...; `first` must be a multiple of 4. */
export function fillUniform<A extends Floats>(key: RandomKey, out: A, first = 0): A {
  return fill(key, out, first, (words) => words.map(toUniform));
}

/** Fills `out` with `randomNormal` of elements first, first + 1, ...; `first` must be a multiple of 4. */
export function fillNormal<A extends Floats>(key: RandomKey, out: A, first = 0): A {
  return fill(key, out, first, ([a, b, c, d]) => [...toNormals(a, b), ...toNormals(c, d)]);
}

function fill<A extends Floats>(
  key: RandomKey, out: A, first: number, values: (words: PhiloxBlock) => number[],
): A {
  if (!Number.isSafeInteger(first) || first < 0 || first % 4 !== 0) {
    throw new UsageError(`first element: expected a multiple of 4, at least 0, found ${first}`);
  }
  for (let i = 0; i < out.length; i += 4) {
    const block = values(blockOf(key, (first + i) / 4));
    for (let j = 0; j < 4 && i + j < out.length; j++) out[i + j] = block[j]!;
  }
  return out;
}
