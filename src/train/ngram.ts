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

/** Keys of triples stay exact in a double: the cube of this is the last below 2^53. */
const MAX_VOCABULARY = 208063;

/** The probabilities of `token` after `previous` by the models of order 1, 2 and 3. */
export type NgramProbabilities = [unigram: number, bigram: number, trigram: number];

/**
 * Fits a unigram, a bigram and a trigram model to the training tokens and scores the validation tokens with
 * each. Positions without enough context in their document use the longest one they have; a document's first
 * token is not scored, as in training.
 *
 * @param vocabSize  number of tokens, V; every token of both corpora is below it, and V <= 208063
 * @throws UsageError  when a token is out of range
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
  readonly #unigram: Uint32Array;
  #total = 0;
  #kinds = 0;
  /** Pairs: count(b c), keyed b*V + c, and per context b its count and kinds. */
  readonly #pairs = new CountTable();
  readonly #pairCount: Uint32Array;
  readonly #pairKinds: Uint32Array;
  /** Triples: count(a b c), keyed (a*V + b)*V + c, and per context a*V + b its count and kinds. */
  readonly #triples = new CountTable();
  readonly #tripleCount = new CountTable();
  readonly #tripleKinds = new CountTable();
  readonly #result: NgramProbabilities = [0, 0, 0];

  constructor(train: TokenCorpus, vocabSize: number) {
    if (!Number.isInteger(vocabSize) || vocabSize < 1 || vocabSize > MAX_VOCABULARY) {
      throw new UsageError(`The n-gram vocabulary must hold 1 to ${MAX_VOCABULARY} tokens, found ${vocabSize}.`);
    }
    this.vocabSize = vocabSize;
    this.#unigram = new Uint32Array(vocabSize);
    this.#pairCount = new Uint32Array(vocabSize);
    this.#pairKinds = new Uint32Array(vocabSize);
    forEachScored(train, vocabSize, (token, previous, beforePrevious) => {
      this.#count(token, previous, beforePrevious);
    });
  }

  /**
   * Gives P(token), P(token | previous) and P(token | beforePrevious, previous). The array is reused by the
   * next call.
   *
   * @param beforePrevious  -1 where the document has no such token; the trigram then equals the bigram
   */
  probabilities(token: number, previous: number, beforePrevious: number): NgramProbabilities {
    const V = this.vocabSize;
    const p = this.#result;
    p[0] = this.#kinds === 0
      ? 1 / V
      : (this.#unigram[token]! + this.#kinds / V) / (this.#total + this.#kinds);
    const pairKinds = this.#pairKinds[previous]!;
    p[1] = pairKinds === 0
      ? p[0]
      : (this.#pairs.get(previous * V + token) + pairKinds * p[0]) / (this.#pairCount[previous]! + pairKinds);
    p[2] = p[1];
    if (beforePrevious >= 0) {
      const context = beforePrevious * V + previous;
      const kinds = this.#tripleKinds.get(context);
      const count = this.#tripleCount.get(context);
      if (kinds > 0) p[2] = (this.#triples.get(context * V + token) + kinds * p[1]) / (count + kinds);
    }
    return p;
  }

  #count(token: number, previous: number, beforePrevious: number): void {
    const V = this.vocabSize;
    if (this.#unigram[token]!++ === 0) this.#kinds++;
    this.#total++;
    if (this.#pairs.add(previous * V + token) === 1) this.#pairKinds[previous]!++;
    this.#pairCount[previous]!++;
    if (beforePrevious < 0) return;
    const context = beforePrevious * V + previous;
    if (this.#triples.add(context * V + token) === 1) this.#tripleKinds.add(context);
    this.#tripleCount.add(context);
  }
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
 * Counts of non-negative integer keys below 2^53: open addressing with linear probing, at most half full. Flat
 * arrays, since a `Map` boxes every key beyond 31 bits.
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
