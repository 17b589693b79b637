/**
 * Counting models of order 1 to 3: what a language model has to beat before its loss means anything. They see
 * the same training tokens and are scored on the same validation tokens as the network.
 */
import { UsageError } from "../tensor/errors.ts";
import { type TokenCorpus, bitsPerByte } from "./packing.ts";

export interface NgramScore {
  /**
   * Mean negative log-likelihood per scored token, in nats: comparable with the cross-entropy of the
   * network.
   */
  readonly loss: number;
  readonly bitsPerByte: number;
}

export interface NgramBaselines {
  readonly unigram: NgramScore;
  readonly bigram: NgramScore;
  readonly trigram: NgramScore;
}

/** Base of the keys of pairs and triples: the largest whose cube is exact in a double (below 2^53). */
const BASE = 208063;

/** The probabilities of `token` after `previous` by the models of order 1, 2 and 3. */
export type NgramProbabilities = [unigram: number, bigram: number, trigram: number];

/**
 * Fits a unigram, a bigram and a trigram model to the training tokens and scores the validation tokens with
 * each. Positions without enough context in their document use the longest one they have; a document's first
 * token is not scored, as in training.
 *
 * @param vocabSize  number of tokens, V; every token of both corpora is below it
 * @throws UsageError  when a token is out of range, or the training data has over 208062 different ones
 */
export function ngramBaselines(
  train: TokenCorpus,
  validation: TokenCorpus,
  vocabSize: number,
): NgramBaselines {
  const model = new NgramModel(train, vocabSize);
  const sums = [0, 0, 0];
  forEachScored(validation, vocabSize, (token, previous, beforePrevious) => {
    const p = model.probabilities(token, previous, beforePrevious);
    for (let order = 0; order < 3; order++) sums[order]! -= Math.log(p[order]!);
  });
  const [unigram, bigram, trigram] = sums.map((sum) => {
    const loss = sum / Math.max(validation.scored, 1);
    return { loss, bitsPerByte: bitsPerByte(loss, validation) };
  });
  return { unigram: unigram!, bigram: bigram!, trigram: trigram! };
}

/**
 * Interpolated Witten-Bell smoothing:
 *
 *   P(c | h) = (count(h c) + kinds(h) * P(c | h')) / (count(h) + kinds(h))
 *
 * with kinds(h) the number of different tokens seen after h, h' the context without its oldest token, and the
 * uniform distribution 1/V below the unigram. It has nothing to tune, and an unseen context leaves the choice
 * to h'.
 *
 * Source  Witten & Bell 1991, in the interpolated form of Chen & Goodman 1998, section 2.6.
 */
export class NgramModel {
  readonly vocabSize: number;
  /** Number of each token in the order of first use, from 1; 0 for tokens that the training data lacks. */
  readonly #numbers: Uint32Array;
  #used = 0;
  // All that follows goes by these numbers.
  readonly #unigram: Uint32Array;
  #total = 0;
  #kinds = 0;
  /** Pairs: count(b c), keyed b*BASE + c, and per context b its count and kinds. */
  readonly #pairs = new CountTable();
  readonly #pairCount: Uint32Array;
  readonly #pairKinds: Uint32Array;
  /** Triples: count(a b c), keyed (a*BASE + b)*BASE + c, and per context a*BASE + b its count and kinds. */
  readonly #triples = new CountTable();
  readonly #tripleCount = new CountTable();
  readonly #tripleKinds = new CountTable();
  readonly #result: NgramProbabilities = [0, 0, 0];

  constructor(train: TokenCorpus, vocabSize: number) {
    this.vocabSize = vocabSize;
    this.#numbers = new Uint32Array(vocabSize);
    const tokens = Math.min(vocabSize, train.tokens.length) + 1;
    this.#unigram = new Uint32Array(tokens);
    this.#pairCount = new Uint32Array(tokens);
    this.#pairKinds = new Uint32Array(tokens);
    forEachScored(train, vocabSize, (token, previous, beforePrevious) => {
      const before = beforePrevious < 0 ? -1 : this.#number(beforePrevious);
      this.#count(this.#number(token), this.#number(previous), before);
    });
  }

  /**
   * Gives P(token), P(token | previous) and P(token | beforePrevious, previous). The array is reused by the
   * next call.
   *
   * @param beforePrevious  -1 where the document has no such token; the trigram then equals the bigram
   */
  probabilities(token: number, previous: number, beforePrevious: number): NgramProbabilities {
    const p = this.#result;
    const c = this.#numbers[token]!;
    const b = this.#numbers[previous]!;
    const uniform = 1 / this.vocabSize;
    p[0] = interpolate(this.#unigram[c]!, this.#total, this.#kinds, uniform);
    p[1] = interpolate(this.#pairs.get(b * BASE + c), this.#pairCount[b]!, this.#pairKinds[b]!, p[0]);
    p[2] = p[1];
    if (beforePrevious >= 0) {
      const context = this.#numbers[beforePrevious]! * BASE + b;
      const kinds = this.#tripleKinds.get(context);
      p[2] = interpolate(this.#triples.get(context * BASE + c), this.#tripleCount.get(context), kinds, p[1]);
    }
    return p;
  }

  #number(token: number): number {
    const number = (this.#numbers[token] ||= ++this.#used);
    if (number < BASE) return number;
    throw new UsageError(`An n-gram model takes at most ${BASE - 1} different tokens; the data has more.`);
  }

  #count(token: number, previous: number, beforePrevious: number): void {
    if (this.#unigram[token]!++ === 0) this.#kinds++;
    this.#total++;
    if (this.#pairs.add(previous * BASE + token) === 1) this.#pairKinds[previous]!++;
    this.#pairCount[previous]!++;
    if (beforePrevious < 0) return;
    const context = beforePrevious * BASE + previous;
    if (this.#triples.add(context * BASE + token) === 1) this.#tripleKinds.add(context);
    this.#tripleCount.add(context);
  }
}

function interpolate(count: number, total: number, kinds: number, lower: number): number {
  return kinds === 0 ? lower : (count + kinds * lower) / (total + kinds);
}

/** Calls `visit` for every token but the first of each document; a missing second token before it is -1. */
function forEachScored(
  corpus: TokenCorpus,
  vocabSize: number,
  visit: (token: number, previous: number, beforePrevious: number) => void,
): void {
  const { tokens, starts } = corpus;
  for (const [document, start] of starts.entries()) {
    const end = starts[document + 1] ?? tokens.length;
    let beforePrevious = -1;
    let previous = -1;
    for (let i = start; i < end; i++) {
      const token = tokens[i]!;
      if (token < 0 || token >= vocabSize) {
        throw new UsageError(`Token ${i} of the corpus is ${token}, expected a value below ${vocabSize}.`);
      }
      if (previous >= 0) visit(token, previous, beforePrevious);
      beforePrevious = previous;
      previous = token;
    }
  }
}

/**
 * Counts of non-negative integer keys below 2^53: open addressing with linear probing, at most half full.
 * Flat arrays, since a `Map` boxes every key beyond 31 bits.
 */
class CountTable {
  #keys = new Float64Array(1 << 10).fill(-1);
  #counts = new Uint32Array(1 << 10);
  #size = 0;

  /** The key's count, 0 when it was never added. */
  get(key: number): number {
    return this.#counts[this.#slot(key)]!;
  }

  /** Adds one to the key's count and returns it. */
  add(key: number): number {
    const slot = this.#slot(key);
    if (this.#keys[slot] !== key) {
      this.#keys[slot] = key;
      this.#size++;
      this.#counts[slot] = 1;
      if (2 * this.#size > this.#keys.length) this.#grow();
      return 1;
    }
    return ++this.#counts[slot]!;
  }

  #slot(key: number): number {
    const mask = this.#keys.length - 1;
    const high = Math.floor(key / 4294967296);
    let hash = Math.imul(key >>> 0, 0x9e3779b1) ^ Math.imul(high, 0x85ebca6b);
    hash ^= hash >>> 15;
    let slot = hash & mask;
    while (this.#keys[slot] !== key && this.#keys[slot] !== -1) slot = (slot + 1) & mask;
    return slot;
  }

  #grow(): void {
    const keys = this.#keys;
    const counts = this.#counts;
    this.#keys = new Float64Array(4 * keys.length).fill(-1);
    this.#counts = new Uint32Array(4 * keys.length);
    for (const [index, key] of keys.entries()) {
      if (key < 0) continue;
      const slot = this.#slot(key);
      this.#keys[slot] = key;
      this.#counts[slot] = counts[index]!;
    }
  }
}
